//! Programs that are started while signals are blocked here, and are to end by them.
//!
//! A child inherits which signals its parent's thread has blocked, and keeps that through exec (signal(7)).

use nix::sys::signal::SigSet;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Has the program start with no signal blocked.
pub fn unblocked(command: &mut Command) -> &mut Command {
    let set_none = || Ok(SigSet::empty().thread_set_mask()?);
    // SAFETY: between fork and exec the closure makes one system call, rt_sigprocmask, which is async-signal-safe
    // (signal-safety(7)); it neither allocates nor takes a lock, and touches nothing of the parent's.
    unsafe { command.pre_exec(set_none) }
}
