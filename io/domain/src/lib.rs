//! Driver domains: a device's back-end in a process of its own, whose crash takes down neither the monitor nor the guest.
//!
//! Problem: a back-end reads what strangers wrote (image formats, packets), so it is the likeliest part of a monitor to crash, or to fall to somebody. It holds the
//! least of a machine's state.
//! Idea: the monitor starts a process for it, with a Unix socket between the two (`record`). The process opens what it serves, says in its first record what that
//! is like, or why it cannot ([`answer_for`]), confines itself and goes on. A thread of the monitor, the *supervisor* ([`Domain`]), waits for its end and starts
//! another. What the two say to each other, and what becomes of what was under way, is the device class's business ([`Frontend`]).
//! Invariant: a process is reaped before the next starts, so nothing of an old one comes later. Neither side believes the other: what is no message ends the
//! connection, and with it the process.
//! Cost: a thread of the monitor that sleeps; the rest is the class's.

mod record;
mod supervise;

pub use record::{receive, send};
pub use supervise::{Domain, EndOnPanic, Frontend, Start, answer_for, pair};
