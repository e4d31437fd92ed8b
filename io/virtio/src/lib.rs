//! Split drivers: the half of a device driver that is in the monitor (virtio 1.2).
//!
//! The guest's half puts requests into rings in its memory and writes to a register to say so; this half takes them out, does the work and
//! puts the answers back. Three seams keep the parts apart:
//!
//! - a *transport* ([`VirtioPci`], [`VirtioMmio`]) has registers and interrupts and knows no device class;
//! - a *device* ([`VirtioDevice`]) knows its requests and no register, and serves its [`Queue`]s in threads of its own;
//! - a *back-end* (a disk image, a network) is behind a trait of the device and knows no virtio.
//!
//! The guest is hostile. Every chain is checked before a device sees it, every ring error stops the device until it is reset, and a reset
//! may come at any moment. A write to guest memory cannot miss the tracker of pages (see `doppel_memory::GuestView`).
//!
//! docs/virtio.md tells more.

mod balloon;
mod blk;
mod buffers_unsafe;
mod chain;
mod console;
mod device;
mod frontend;
mod fs;
#[cfg(feature = "testing")]
pub mod hostile;
mod interrupt;
mod locks;
mod mmio;
mod net;
mod notifier;
mod pci;
mod pci_common;
mod pci_interrupt;
mod pool;
mod queue;
mod rng;
#[cfg(feature = "testing")]
pub mod testing;
mod vsock;
mod worker;

pub use balloon::{Balloon, BalloonControl, BalloonCounters, BalloonState, GuestMemoryStats};
pub use blk::{BLK_QUEUES_MAX, Blk, BlkCounters, BlkState};
pub use buffers_unsafe::Buffers;
pub use chain::{Chain, SEGMENTS_MAX};
pub use console::{Console, ConsoleBackend, ConsoleCounters, ConsoleState, WindowSize};
pub use device::{Activation, DeviceState, VirtioDevice};
pub use frontend::{
    DRIVER_OK, EVENT_IDX, FEATURES_OK, FrontendState, NEEDS_RESET, Status, VERSION_1,
};
pub use fs::{Fs, FsState};
pub use interrupt::Interrupt;
pub use mmio::{MMIO_SIZE, MmioState, VirtioMmio};
pub use net::{Net, NetCounters, NetState};
pub use notifier::{Notifier, OnNotify, wait_readable, wait_readable_for};
pub use pci::{BAR_SIZE, PciState, PciWiring, VirtioPci};
pub use queue::{Broken, Queue, QueueState};
pub use rng::{Rng, RngState};
pub use vsock::{VSOCK_CID, Vsock, VsockCounters, VsockSocket, VsockState};
pub use worker::{Stop, Worker};
