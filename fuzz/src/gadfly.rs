//! Kicks an engine while it runs, again and again.
//!
//! A kick calls an engine out of whatever it is doing, as timers and other CPUs do all the time, and the guest must see nothing of it. Where in the
//! guest it comes is left to chance: an outcome that differs may not do so again.

use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use doppel_x86::Kick;

type Victim = Mutex<Option<Arc<dyn Kick>>>;

/// Kicks whom it was set on.
pub struct Gadfly(Arc<Victim>);

impl Gadfly {
    /// Kicks after each `period`.
    pub fn new(period: Duration) -> Self {
        let victim: Arc<Victim> = Arc::default();
        let seen_by_thread = Arc::downgrade(&victim);
        std::thread::spawn(move || sting(&seen_by_thread, period));
        Gadfly(victim)
    }

    /// An engine begins to run, or nobody does.
    pub fn set_on(&self, victim: Option<Arc<dyn Kick>>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = victim;
    }
}

fn sting(victim: &Weak<Victim>, period: Duration) {
    while let Some(victim) = victim.upgrade() {
        if let Some(kick) = &*victim.lock().unwrap_or_else(PoisonError::into_inner) {
            kick.kick();
        }
        drop(victim);
        std::thread::sleep(period);
    }
}
