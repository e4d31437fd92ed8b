//! Who serves a long request: the vCPU that notifies, or the thread of the queue.
//!
//! Problem: to wake the thread, and the vCPU again at the end, takes as long as to copy a megabyte. In exchange the guest can go on meanwhile;
//! but a guest that waits for each request before it makes the next has nothing to go on with.
//! Idea: the thread notes whether another request came while it was at a long one. Where none did, the vCPU serves the next ones
//! itself, but for trials, by which a change is noticed: one in [`TRIAL_FIRST`] at first, half as many after each that found no change.
//! Cost: one long request in [`TRIAL_LAST`] takes the longer way, and a driver that changes is noticed after as many at the latest.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// With this many bytes a request is long.
pub const LONG: usize = 128 << 10;
/// No vCPU is kept longer than these bytes take.
pub const LONGEST: usize = 4 << 20;
/// Long requests from one that the thread serves to the next, of a driver that just began to wait.
const TRIAL_FIRST: u32 = 16;
/// The same of one that always did.
const TRIAL_LAST: u32 = 256;

/// What is known of a queue's driver.
#[derive(Debug)]
pub struct Pace {
    /// It waits for each long request.
    waits: AtomicBool,
    /// Long requests until the next trial.
    left: AtomicU32,
    /// From one trial to the next.
    interval: AtomicU32,
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            waits: AtomicBool::new(false),
            left: AtomicU32::new(TRIAL_FIRST),
            interval: AtomicU32::new(TRIAL_FIRST),
        }
    }
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
        // Who asks holds the queue.
        let left = self.left.load(Ordering::Relaxed).saturating_sub(1);
        if len > LONG {
            self.left.store(left, Ordering::Relaxed);
        }
        len > LONG && left == 0
    }

    /// The thread served a request of `len` bytes; there was another by then, or not.
    pub fn served(&self, len: usize, another: bool) {
        if len <= LONG {
            return;
        }
        let waited = self.waits.swap(!another, Ordering::Relaxed);
        let interval = match waited && !another {
            true => self.interval.load(Ordering::Relaxed).saturating_mul(2),
            false => TRIAL_FIRST,
        };
        let interval = interval.min(TRIAL_LAST);
        self.interval.store(interval, Ordering::Relaxed);
        self.left.store(interval, Ordering::Relaxed);
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
        assert!((0..64).all(|_| !pace.is_trial(4096)));
        let next = |pace: &Pace| (1..).find(|_| pace.is_trial(1 << 20)).unwrap();
        for interval in [TRIAL_FIRST, 32, 64, 128, TRIAL_LAST, TRIAL_LAST] {
            assert_eq!(next(&pace), interval);
            assert!(pace.is_trial(1 << 20), "until the thread has served one");
            pace.served(1 << 20, false);
        }
        pace.served(1 << 20, true);
        assert_eq!(pace.room(), LONG);
        pace.served(1 << 20, false);
        assert_eq!(next(&pace), TRIAL_FIRST);
        pace.several();
        assert_eq!(pace.room(), LONG);
    }
}
