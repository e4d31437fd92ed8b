//! Filters of system calls (Linux, seccomp(2)), one for each kind of thread of a machine.
//!
//! Problem: a thread that fell to its guest can ask the host's kernel for anything, though it needs a few dozen of some 370 system calls, and threads
//! are started deep inside crates that know nothing of the command line, which says what a machine needs.
//! Idea: a filter is a property of the thread, which the kernel hands on to each thread and process that it starts. So are [`Filters`] here: the first
//! thread takes them by [`Filters::confine`], and whoever starts a thread says by [`narrowed`] or [`spawn`] of which kind it is. Where there are no
//! filters, nothing happens. What the kinds may call is not known here (the program's policy is).
//! Invariant: a thread has the filters of all its ancestors besides its own, and none is ever lifted. A refused call never returns: SIGSYS is
//! unblocked in every confined thread, and its handler says who called what and ends the process with [`REFUSED`].
//! Cost: for a call that a filter permits whatever its arguments are, Linux from 5.11 on looks at one bit. Filters are installed with
//! SECCOMP_FILTER_FLAG_SPEC_ALLOW, without which older kernels take branch prediction and store bypass from the thread, some tens of per cent of its speed.

mod filters;
mod install_unsafe;
mod kind;

pub use filters::{Filters, SeccompError, narrowed, spawn};
pub use install_unsafe::REFUSED;
pub use kind::Kind;

/// A filter: a program in classic BPF.
pub type Program = seccompiler::BpfProgram;
