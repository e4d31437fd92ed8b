//! Kicks: how any thread, or a signal handler, makes a running child stop.
//!
//! A flag says that a kick was asked for, another number which child runs. `run` publishes the child and then looks at the flag; `kick` sets
//! the flag and then looks for a child: one of them sees the other. A child that runs gets a signal.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

use rustix::process::{Signal, pidfd_send_signal};

/// SIGUSR1, which the stub handles.
const KICK: Signal = Signal::USR1;
const NONE: i32 = -1;

/// Asks the vCPU to which it belongs to stop running user code. One for all children of a vCPU; it stays set until it is cleared.
#[derive(Debug)]
pub struct KickFlag {
    asked: AtomicBool,
    /// The pidfd of the child that runs.
    running: AtomicI32,
    /// Calls of `kick` that may be using `running`.
    kicking: AtomicU32,
}

impl Default for KickFlag {
    fn default() -> Self {
        KickFlag {
            asked: AtomicBool::new(false),
            running: AtomicI32::new(NONE),
            kicking: AtomicU32::new(0),
        }
    }
}

impl KickFlag {
    /// A flag that is not set.
    pub fn new() -> KickFlag {
        KickFlag::default()
    }

    /// Sets the flag and stops the child that runs, if one does, within microseconds. From any thread, and from a signal handler.
    pub fn kick(&self) {
        self.asked.store(true, Ordering::SeqCst);
        self.kicking.fetch_add(1, Ordering::SeqCst);
        let fd = self.running.load(Ordering::SeqCst);
        if fd != NONE {
            // SAFETY: `leave` waits for `kicking` to be 0 before the owner of the descriptor can close it.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            // A child that is dead has stopped.
            let _ = pidfd_send_signal(fd, KICK);
        }
        self.kicking.fetch_sub(1, Ordering::SeqCst);
    }

    /// Whether a kick was asked for since the flag was last cleared.
    pub fn is_set(&self) -> bool {
        self.asked.load(Ordering::SeqCst)
    }

    /// Clears the flag; true where it was set.
    pub fn clear(&self) -> bool {
        self.asked.swap(false, Ordering::SeqCst)
    }

    /// Says that `child` is about to run; false where it must not, since a kick was asked for. Ends with [`KickFlag::leave`] either way.
    pub(crate) fn enter(&self, child: BorrowedFd<'_>) -> bool {
        self.running.store(child.as_raw_fd(), Ordering::SeqCst);
        !self.is_set()
    }

    /// Says that the child no longer runs, and waits for those who may be kicking it.
    pub(crate) fn leave(&self) {
        self.running.store(NONE, Ordering::SeqCst);
        while self.kicking.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
    }
}
