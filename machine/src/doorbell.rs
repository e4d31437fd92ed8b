//! Wakes a vCPU wherever it is: in its engine or halted.
//!
//! A halted vCPU sleeps in [`std::thread::park`]. Parking leaves no gap: a ring between the engine's last look at the
//! interrupt lines and the sleep leaves a token that ends the sleep at once. Rings that find the vCPU awake cost
//! two atomic stores and at most one look at the lines in vain.

use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};

use doppel_x86::Kick;

/// The doorbell of one vCPU.
pub struct Doorbell {
    kicker: Arc<dyn Kick>,
    thread: OnceLock<Thread>,
}

impl Doorbell {
    /// For the vCPU whose engine `kicker` kicks.
    pub fn new(kicker: Arc<dyn Kick>) -> Arc<Self> {
        Arc::new(Doorbell {
            kicker,
            thread: OnceLock::new(),
        })
    }

    /// Makes the vCPU look at its interrupt lines and at the machine's end. From any thread, under any lock.
    pub fn ring(&self) {
        self.kicker.kick();
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Says that the calling thread is the vCPU's. Call before the vCPU first runs.
    pub fn answer_here(&self) {
        let _ = self.thread.set(thread::current());
    }

    /// Sleeps until the next ring; may return early.
    pub fn sleep(&self) {
        thread::park();
    }
}
