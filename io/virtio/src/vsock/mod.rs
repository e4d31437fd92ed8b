//! The socket device (virtio 1.2, 5.10): streams between programs of the guest and Unix sockets of the host.
//!
//! A program in the guest that connects to the host (address 2) at port N reaches who listens at `PATH_N`. A program of the
//! host connects to `PATH`, writes `CONNECT N\n`, and once the guest has accepted reads `OK M\n`, where M is the port that its end has.
//! So does Firecracker, and programs made for that work.
//!
//! One thread does everything: it waits for the guest's notifications and for the host's sockets. Where the guest has given no buffers,
//! or leaves refusals unread, the other side waits, so what is kept is bounded (`muxer.rs`, `connection.rs`).

mod connection;
mod muxer;
mod packet;
mod socket;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use doppel_memory::GuestRam;
use doppel_seccomp::Kind;
use serde::{Deserialize, Serialize};

use crate::device::copy_config;
use crate::worker::{Stop, Worker};
use crate::{Activation, Broken, DeviceState, Queue, VirtioDevice, wait_readable_for};
use muxer::Muxer;
pub(crate) use packet::{HEADER_LEN, Header};
#[cfg(feature = "testing")]
pub(crate) use packet::{HOST, STREAM};
pub use socket::VsockSocket;

const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];
/// Packets in a direction before the other has its turn.
const BATCH: usize = 256;
/// The event that tells a driver that its connections are gone, of 4 bytes.
const TRANSPORT_RESET: u32 = 0;
/// The address that a guest has where nothing is said.
pub const VSOCK_CID: u32 = 3;

/// What is saved of a device. Connections are not: the guest is told that they are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// 1.
    pub version: u32,
    /// The guest's address.
    pub cid: u32,
}

const STATE_VERSION: u32 = 1;

/// What a device has done.
#[derive(Debug, Default)]
pub struct VsockCounters {
    /// Connections, whoever asked for them.
    pub connections: AtomicU64,
    /// Packets of the guest that were answered with a reset.
    pub refused: AtomicU64,
    /// Bytes from the guest.
    pub sent_bytes: AtomicU64,
    /// Bytes to the guest.
    pub received_bytes: AtomicU64,
}

/// The socket device.
pub struct Vsock {
    cid: u32,
    socket: Arc<VsockSocket>,
    counters: Arc<VsockCounters>,
    /// The connections, while nobody drives the device.
    muxer: Option<Muxer>,
    /// The driver is to be told that its connections are gone.
    gone: bool,
    worker: Option<Worker<Serving>>,
}

impl Vsock {
    /// The device of a guest with this address, which is 3 or more.
    pub fn new(cid: u32, socket: Arc<VsockSocket>) -> Self {
        Vsock {
            cid,
            socket,
            counters: Arc::default(),
            muxer: None,
            gone: false,
            worker: None,
        }
    }

    /// What it has done so far.
    pub fn counters(&self) -> Arc<VsockCounters> {
        self.counters.clone()
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK as u16
    }

    fn features(&self) -> u64 {
        // Streams are there without a feature.
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let bytes = u64::from(self.cid).to_le_bytes();
        copy_config(&bytes, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            queues,
            ram,
            interrupt,
            ..
        } = activation;
        let muxer = match self.muxer.take() {
            Some(muxer) => muxer,
            None => Muxer::new(self.cid.into(), self.socket.clone(), self.counters.clone())?,
        };
        let mut serving = Serving {
            queues,
            muxer,
            gone: self.gone,
        };
        let worker = Worker::start((Kind::Device, "virtio-vsock"), interrupt, move |stop| {
            serving.serve(&ram, stop);
            serving
        })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some(serving) = self.worker.take().and_then(Worker::stop) else {
            return Vec::new();
        };
        self.muxer = Some(serving.muxer);
        self.gone = serving.gone;
        serving.queues
    }

    fn reset(&mut self) {
        self.muxer = None;
        self.gone = false;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState {
            version: STATE_VERSION,
            cid: self.cid,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Vsock(state) = state else {
            return false;
        };
        // The address may be another: the driver asks for it anew.
        self.muxer = None;
        self.gone = true;
        state.version == STATE_VERSION
    }
}

/// A device whose driver is ready.
struct Serving {
    queues: Vec<Queue>,
    muxer: Muxer,
    gone: bool,
}

impl Serving {
    fn queue(&mut self, index: u16) -> Option<(&mut Queue, &mut Muxer)> {
        let queue = self.queues.iter_mut().find(|q| q.index() == index)?;
        Some((queue, &mut self.muxer))
    }

    /// The thread.
    fn serve(&mut self, ram: &GuestRam, stop: &Stop) {
        let notifiers: Vec<_> = self.queues.iter().map(|q| q.notifier().clone()).collect();
        while !stop.is_wanted() {
            let more = match self.work(ram) {
                Ok(more) => more,
                Err((index, broken)) => {
                    if let Some((queue, _)) = self.queue(index) {
                        queue.give_up(broken);
                    }
                    return;
                }
            };
            if !more && self.wait(stop, &notifiers).is_err() {
                return;
            }
            for notifier in &notifiers {
                notifier.take();
            }
            self.muxer.expire();
            // Where the guest has no buffers, what there is stays with the host.
            let dry = !more && self.muxer.has_packets();
            if !dry && self.muxer.service().is_err() {
                return;
            }
        }
    }

    fn wait(&self, stop: &Stop, notifiers: &[Arc<crate::Notifier>]) -> io::Result<()> {
        let mut descriptors = vec![stop.as_fd()];
        descriptors.extend(notifiers.iter().map(|notifier| notifier.as_fd()));
        if !self.muxer.has_packets() {
            descriptors.push(self.muxer.as_fd());
        }
        wait_readable_for(&descriptors, self.muxer.patience()).map(drop)
    }

    /// Moves packets both ways. True where there is more that could be moved now; or which queue is broken.
    fn work(&mut self, ram: &GuestRam) -> Result<bool, (u16, Broken)> {
        self.tell().map_err(|broken| (EVENT, broken))?;
        let mut more = false;
        if let Some((queue, muxer)) = self.queue(TX) {
            more |= take(queue, muxer, ram).map_err(|broken| (TX, broken))?;
        }
        if let Some((queue, muxer)) = self.queue(RX) {
            let held_up = !muxer.may_take();
            more |= give(queue, muxer, ram).map_err(|broken| (RX, broken))?;
            more |= held_up && muxer.may_take();
        }
        Ok(more)
    }

    /// Tells the driver that its connections are gone, if they are.
    fn tell(&mut self) -> Result<(), Broken> {
        let gone = self.gone;
        let Some((queue, _)) = self.queue(EVENT).filter(|_| gone) else {
            return Ok(());
        };
        let ram = queue.ram().clone();
        let chain = match queue.pop(&ram)? {
            None if queue.listen()? => queue.pop(&ram)?,
            found => found,
        };
        if let Some(chain) = chain {
            let written = chain.writable.write(&TRANSPORT_RESET.to_le_bytes());
            queue.push(chain.head, written as u32)?;
            queue.announce()?;
            self.gone = false;
        }
        Ok(())
    }
}

/// Takes the guest's packets. True where there may be more that can be taken.
fn take(queue: &mut Queue, muxer: &mut Muxer, ram: &GuestRam) -> Result<bool, Broken> {
    queue.quiet()?;
    for _ in 0..BATCH {
        if !muxer.may_take() {
            return Ok(false);
        }
        let Some(chain) = queue.pop(ram)? else {
            if queue.listen()? {
                continue;
            }
            return Ok(false);
        };
        let mut payload = chain.readable.clone();
        let mut header = [0; HEADER_LEN];
        // What is too short for a packet is none.
        if payload.split_off_front(HEADER_LEN).read(&mut header) == HEADER_LEN {
            muxer.take(&Header::parse(&header), &payload);
        }
        queue.push(chain.head, 0)?;
        queue.announce()?;
    }
    Ok(true)
}

/// Gives the guest packets. True where there may be more to give, and buffers for it.
fn give(queue: &mut Queue, muxer: &mut Muxer, ram: &GuestRam) -> Result<bool, Broken> {
    queue.quiet()?;
    for _ in 0..BATCH {
        if !muxer.has_packets() {
            return Ok(false);
        }
        let Some(chain) = queue.pop(ram)? else {
            if queue.listen()? {
                continue;
            }
            return Ok(false);
        };
        let mut payload = chain.writable.clone();
        let room = payload.split_off_front(HEADER_LEN);
        if payload.is_empty() {
            return Err(Broken("a buffer with no room for a packet"));
        }
        let Some(header) = muxer.packet(&payload) else {
            queue.undo_pop();
            continue;
        };
        room.write(&header.bytes());
        queue.push(chain.head, HEADER_LEN as u32 + header.len)?;
        queue.announce()?;
    }
    Ok(true)
}
