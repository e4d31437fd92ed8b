//! The seam between a device class and its transport: [`VirtioDevice`].
//!
//! A device says what it is and what it can, and is handed its queues when the driver is ready. From then until
//! [`VirtioDevice::deactivate`] its own threads serve them: a notification wakes the thread that waits at the queue's
//! [`Notifier`](crate::Notifier), used buffers are announced through the queue, and no lock of the transport is involved.

use std::io;
use std::sync::Arc;

use doppel_memory::GuestRam;
use serde::{Deserialize, Serialize};

use crate::balloon::BalloonState;
use crate::blk::BlkState;
use crate::console::ConsoleState;
use crate::fs::FsState;
use crate::net::NetState;
use crate::rng::RngState;
use crate::vsock::VsockState;
use crate::{Interrupt, Queue};

/// What the driver agreed on, and what the device works with.
pub struct Activation {
    /// The features that both sides want, the transport's own included.
    pub features: u64,
    /// The queues that the driver enabled, in ascending order of [`Queue::index`]. Some may be missing.
    pub queues: Vec<Queue>,
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// What tells the driver of changes.
    pub interrupt: Arc<dyn Interrupt>,
}

/// A device of one class (virtio 1.2, section 5). The transport calls it under its lock: no call blocks for long but `deactivate`,
/// which waits for the requests that are being served.
pub trait VirtioDevice: Send {
    /// The device ID of section 5.
    fn device_type(&self) -> u16;

    /// The feature bits of its class that it offers. The transport adds those of the ring.
    fn features(&self) -> u64;

    /// The largest size of each queue, powers of two up to 32768. As many as there are queues.
    fn queue_sizes(&self) -> Vec<u16>;

    /// Fills `data` from `offset` of the configuration space; what lies beyond it stays as it is (0).
    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    /// The driver writes to the configuration space.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready. Threads start here; what cannot be had of the host is an error, and the driver is told that the
    /// device needs a reset.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// Stops the threads and gives the queues back as they are. Requests that are being served end first, or are left where they are
    /// long; those that were taken and not begun are left ([`Queue`] keeps them, and the front-end has it put them back into the ring
    /// or drops them). Called for a reset, for the reset of one queue, to save the device, and before it is dropped.
    fn deactivate(&mut self) -> Vec<Queue>;

    /// Forgets what the driver told it. The device is not active.
    fn reset(&mut self) {}

    /// What the device remembers beyond its queues. The device is not active.
    fn save(&self) -> DeviceState;

    /// Takes back what [`VirtioDevice::save`] gave. False where it is another device's.
    fn restore(&mut self, state: &DeviceState) -> bool;
}

/// What devices remember, by class; each a plain struct with a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
#[non_exhaustive]
pub enum DeviceState {
    Net(NetState),
    Rng(RngState),
    Blk(BlkState),
    Fs(FsState),
    Console(ConsoleState),
    Balloon(BalloonState),
    Vsock(VsockState),
}

/// Fills `data` from `offset` of a configuration space of these bytes.
pub(crate) fn copy_config(bytes: &[u8], offset: u64, data: &mut [u8]) {
    let at = usize::try_from(offset).unwrap_or(usize::MAX);
    let from = bytes.get(at..).unwrap_or_default();
    data.iter_mut().zip(from).for_each(|(to, byte)| *to = *byte);
}
