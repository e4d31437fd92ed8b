//! Back-ends of block devices: what a disk of the guest is on the host.
//!
//! A block device (virtio-blk) speaks to a [`BlockBackend`] and knows nothing of files and formats. [`DiskSpec`] is what the user
//! asks for on the command line, and [`DiskSpec::open`] makes a back-end of it: [`Raw`] for a host file or block device byte for byte,
//! [`Qcow2`] for an image in QEMU's format, which may stand on another.
//!
//! Everything in an image may come from a hostile guest or a stranger: headers and tables are checked, a damaged image is an error.
//! What the host refuses (a full disk, a medium error) is an error of the one request, which the guest sees as an I/O error.

mod backend;
mod create;
mod error;
mod file;
mod format;
mod guest;
mod lock;
mod overlay;
mod qcow2;
mod raw;
mod remote;
mod spec;
#[cfg(feature = "testing")]
pub mod testing;

pub use backend::{BlockBackend, SECTOR};
pub use create::{Info, create, info, settle};
pub use error::BlockError;
pub use format::Format;
pub use qcow2::Qcow2;
pub use raw::Raw;
pub use remote::{RemoteDisk, serve};
pub use spec::DiskSpec;
