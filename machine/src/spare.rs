//! Descriptors that will be asked for later: when the guest's drivers start its devices, and when a process of a disk or network follows one that died.
//!
//! A device that lacks them then can only say that it needs a reset, which Linux's drivers wait for; so whether the host has them to spare is asked before the guest
//! runs, where it is an error with a sentence.

use std::io;
use std::os::fd::OwnedFd;

use rustix::event::{EventfdFlags, eventfd};

/// For each device: threads that can be stopped, the file of guest memory, the ends of a socket.
const EACH: usize = 4;
/// For what the machine has once: a process to be started, processes that run user code.
const MORE: usize = 6;

/// Whether as many are to be had as so many devices may need.
///
/// # Errors
/// The host gives fewer.
pub fn descriptors(devices: usize) -> io::Result<()> {
    let one = |_| Ok(eventfd(0, EventfdFlags::CLOEXEC)?);
    let all: io::Result<Vec<OwnedFd>> = (0..MORE + EACH * devices).map(one).collect();
    all.map(drop)
}
