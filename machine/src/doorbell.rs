//! Wakes a vCPU wherever it is: in its engine or halted.
//!
//! A halted vCPU sleeps in [`std::thread::park`] until it is called. There is no gap: a ring between the engine's last look at the
//! interrupt lines and the sleep ends the sleep at once. Rings that find the vCPU awake cost
//! three atomic stores and at most one look at the lines in vain.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, Thread};

use doppel_x86::Kick;

/// The doorbell of one vCPU.
pub struct Doorbell {
    kicker: Arc<dyn Kick>,
    thread: OnceLock<Thread>,
    rung: AtomicBool,
}

impl Doorbell {
    /// For the vCPU whose engine `kicker` kicks.
    pub fn new(kicker: Arc<dyn Kick>) -> Arc<Self> {
        Arc::new(Doorbell {
            kicker,
            thread: OnceLock::new(),
            rung: AtomicBool::new(false),
        })
    }

    /// Makes the vCPU look at its interrupt lines and at the machine's end. From any thread, under any lock.
    pub fn ring(&self) {
        self.rung.store(true, Ordering::SeqCst);
        self.kicker.kick();
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Says that the calling thread is the vCPU's. Call before the vCPU first runs.
    pub fn answer_here(&self) {
        let _ = self.thread.set(thread::current());
    }

    /// Sleeps until it is rung, or was since [`Self::answer`].
    pub fn sleep(&self) {
        while !self.is_rung() {
            thread::park();
        }
    }

    /// True from a ring to the answer.
    pub fn is_rung(&self) -> bool {
        self.rung.load(Ordering::SeqCst)
    }

    /// The vCPU is about to look why it was called.
    pub fn answer(&self) {
        self.rung.store(false, Ordering::SeqCst);
    }
}
