//! The entropy device (virtio 1.2, 5.4): fills buffers from the host's random number generator.
//!
//! One queue, one thread, no configuration. A buffer is filled up to [`BYTES_MAX`], so that no request keeps the thread for
//! long; the driver sees how much it got and asks again.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use doppel_memory::GuestRam;
use doppel_seccomp::Kind;
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use crate::worker::{Stop, Worker};
use crate::{Activation, Broken, Buffers, DeviceState, Queue, VirtioDevice, wait_readable};

const QUEUE_SIZE: u16 = 64;
/// Most bytes that one request gets.
const BYTES_MAX: usize = 4096;

/// What is saved of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngState {
    /// 1.
    pub version: u32,
}

/// The entropy device.
#[derive(Default)]
pub struct Rng {
    worker: Option<Worker<Vec<Queue>>>,
}

impl Rng {
    /// A device that is not active.
    pub fn new() -> Self {
        Self::default()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_RNG as u16
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            mut queues,
            ram,
            interrupt,
            ..
        } = activation;
        let worker = Worker::start((Kind::Device, "virtio-rng"), interrupt, move |stop| {
            if let Some(queue) = queues.first_mut() {
                serve(queue, &ram, stop);
            }
            queues
        })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let queues = self.worker.take().and_then(Worker::stop);
        queues.unwrap_or_default()
    }

    fn save(&self) -> DeviceState {
        DeviceState::Rng(RngState { version: 1 })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        matches!(state, DeviceState::Rng(RngState { version: 1 }))
    }
}

/// The thread.
fn serve(queue: &mut Queue, ram: &Arc<GuestRam>, stop: &Stop) {
    let notifier = queue.notifier().clone();
    while !stop.is_wanted() {
        if let Err(broken) = drain(queue, ram, stop) {
            return queue.give_up(broken);
        }
        if wait_readable(&[stop.as_fd(), notifier.as_fd()]).is_err() {
            return;
        }
        notifier.take();
    }
}

/// Serves all requests that there are.
fn drain(queue: &mut Queue, ram: &GuestRam, stop: &Stop) -> Result<(), Broken> {
    queue.quiet()?;
    while !stop.is_wanted() {
        if let Some(chain) = queue.pop(ram)? {
            queue.push(chain.head, fill(&chain.writable) as u32)?;
            queue.announce()?;
        } else if !queue.listen()? {
            break;
        }
    }
    Ok(())
}

/// Random bytes to the front of the buffers; how many.
fn fill(buffers: &Buffers<'_>) -> usize {
    let mut bytes = [0; BYTES_MAX];
    let wanted = buffers.len().min(BYTES_MAX);
    // It blocks at most until the host has booted, and gives up to 256 bytes without fail.
    let got = getrandom(&mut bytes[..wanted], GetRandomFlags::empty()).unwrap_or(0);
    buffers.write(&bytes[..got])
}
