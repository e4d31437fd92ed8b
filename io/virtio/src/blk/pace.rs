//! Who serves a long request: the vCPU that notifies, or the thread of the queue.
//!
//! Problem: to wake the thread, and the vCPU again at the end, takes as long as to copy a megabyte. In exchange the guest can go on meanwhile;
//! but a guest that waits for each request before it makes the next has nothing to go on with.
//! Idea: the thread notes whether another request came while it was at a long one. Where none did, the vCPU serves the next ones
//! itself, all but one in [`TRIAL`], by which a change is noticed.
//! Cost: one long request in [`TRIAL`] takes the longer way.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// With this many bytes a request is long.
pub const LONG: usize = 128 << 10;
/// No vCPU is kept longer than these bytes take.
pub const LONGEST: usize = 4 << 20;
/// Long requests from one that the thread serves to the next.
const TRIAL: u32 = 16;

/// What is known of a queue's driver.
#[derive(Debug, Default)]
pub struct Pace {
    /// It waits for each long request.
    waits: AtomicBool,
    long: AtomicU32,
}

impl Pace {
    /// Bytes that the vCPU may serve now.
    pub fn room(&self) -> usize {
        match self.waits.load(Ordering::Relaxed) {
            true => LONGEST,
            false => LONG,
        }
    }

    /// Whether the vCPU is to leave this request to the thread, to see what becomes of it.
    pub fn is_trial(&self, len: usize) -> bool {
        len > LONG && self.long.fetch_add(1, Ordering::Relaxed) % TRIAL == TRIAL - 1
    }

    /// The thread served a request of `len` bytes; there was another by then, or not.
    pub fn served(&self, len: usize, another: bool) {
        if len > LONG {
            self.waits.store(!another, Ordering::Relaxed);
        }
    }

    /// Several came at once.
    pub fn several(&self) {
        self.waits.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_waits_is_served_at_once_but_for_trials() {
        let pace = Pace::default();
        assert_eq!(pace.room(), LONG);
        pace.served(LONG, false);
        assert_eq!(pace.room(), LONG, "a short one tells nothing");
        pace.served(LONG + 1, false);
        assert_eq!(pace.room(), LONGEST);
        let trials = (0..64).filter(|_| pace.is_trial(1 << 20)).count();
        assert_eq!(trials, 4);
        assert!((0..64).all(|_| !pace.is_trial(4096)));
        pace.served(1 << 20, true);
        assert_eq!(pace.room(), LONG);
        pace.served(1 << 20, false);
        pace.several();
        assert_eq!(pace.room(), LONG);
    }
}
