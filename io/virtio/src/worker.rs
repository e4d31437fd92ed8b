//! The thread of a device, from activation to deactivation.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use doppel_seccomp::{Kind, spawn};

use crate::{Interrupt, Notifier};

/// The wish that a thread come to its end.
#[derive(Debug)]
pub struct Stop {
    wanted: AtomicBool,
    notifier: Notifier,
}

impl Stop {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Stop {
            wanted: AtomicBool::new(false),
            notifier: Notifier::new()?,
        })
    }

    /// True once the thread is to end. A thread asks between any two requests, since a driver can make work for ever.
    pub fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Acquire)
    }

    pub(crate) fn want(&self) {
        self.wanted.store(true, Ordering::Release);
        self.notifier.notify();
    }
}

/// Readable once the thread is to end.
impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notifier.as_fd()
    }
}

/// A thread that gives something back when it is stopped.
#[derive(Debug)]
pub struct Worker<T> {
    stop: Arc<Stop>,
    thread: JoinHandle<T>,
}

impl<T: Send + 'static> Worker<T> {
    /// Starts a thread. Where it panics, the device needs a reset.
    pub fn start(
        (kind, name): (Kind, &str),
        interrupt: Arc<dyn Interrupt>,
        body: impl FnOnce(&Stop) -> T + Send + 'static,
    ) -> io::Result<Self> {
        let stop = Arc::new(Stop::new()?);
        let seen = stop.clone();
        let thread = spawn(kind, name, move || {
            let _watch = OnPanic(interrupt);
            body(&seen)
        })?;
        Ok(Worker { stop, thread })
    }

    /// Asks the thread to end, without waiting for it.
    pub fn ask_to_stop(&self) {
        self.stop.want();
    }

    /// Ends the thread and takes what it gives back; `None` where it panicked.
    pub fn stop(self) -> Option<T> {
        self.stop.want();
        self.thread.join().ok()
    }
}

struct OnPanic(Arc<dyn Interrupt>);

impl Drop for OnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.needs_reset("a thread of the device panicked");
        }
    }
}
