//! The signals that the stub handles, by their numbers on x86-64 Linux. All others are blocked in every child.

pub(crate) const SIGILL: u32 = 4;
pub(crate) const SIGTRAP: u32 = 5;
pub(crate) const SIGBUS: u32 = 7;
pub(crate) const SIGFPE: u32 = 8;
/// The signal of a kick.
pub(crate) const SIGUSR1: u32 = 10;
pub(crate) const SIGSEGV: u32 = 11;
pub(crate) const SIGCHLD: u32 = 17;
pub(crate) const SIGSYS: u32 = 31;

/// What a trap, a system call or a kick raises.
pub(crate) const HANDLED: [u32; 7] = [SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGUSR1, SIGSEGV, SIGSYS];

/// The same as a set of signals.
pub(crate) const HANDLED_MASK: u64 = mask(&HANDLED);

const fn mask(signals: &[u32]) -> u64 {
    match signals {
        [] => 0,
        [first, rest @ ..] => 1 << (*first - 1) | mask(rest),
    }
}
