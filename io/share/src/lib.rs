//! Shared host directories: a file server that speaks FUSE (Linux's `fuse.h`, protocol 7.31 and later).
//!
//! Problem: a guest is to work in a directory of the host as in one of its own, and the guest is hostile: it must not leave the
//! directory, whatever it names and however the host renames things meanwhile; nothing there may harm the monitor; and it must not
//! make the monitor hold more and more.
//! Idea: the host never follows a path. Each request names a node, which the guest has looked up before, and at most one component
//! below it; the server opens that component, without following a symbolic link, below the descriptor of its parent. The guest's kernel follows
//! symbolic links itself. A node is remembered as its parent, its name and its identity (device, inode, time of birth); its
//! descriptor is only a cache, so that a guest may know more files than the host lends descriptors.
//! Invariant: a descriptor is used for a node only after its identity was compared. What is opened for data is a regular file or a
//! directory; device files, FIFOs and sockets are names and attributes.
//! Cost: one statx(2) for a lookup, two system calls more where a descriptor is not in the cache.
//!
//! [`Share`] is the directory, [`Session`] what one mount of it knows. It knows no virtio: a transport hands it messages. docs/share.md tells more.

mod attributes;
mod directories;
mod files;
mod handles;
mod message;
mod names;
mod nodes;
mod session;
mod share;
mod state;
mod tree;

pub use message::{Answer, Call, HEADER_LEN, Header, REPLY_LEN, opcode, reply};
pub use session::{Session, TRANSFER_MAX};
pub use share::{Limits, Share, ShareError, ShareSpec, TAG_MAX};
pub use state::{HandleState, NodeState, SessionState};
