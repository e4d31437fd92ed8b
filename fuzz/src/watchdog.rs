//! Ends cases that do not end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use doppel_x86::Kick;

/// Kicks an engine whose case takes too long.
pub struct Watchdog(Arc<Watched>);

struct Watched {
    /// Odd while a case runs.
    turn: AtomicU64,
    /// Kicks in this turn.
    bites: AtomicU32,
    ended: AtomicBool,
}

/// Time after which a case is kicked, and kicked again.
pub const WATCH_PERIOD: Duration = Duration::from_millis(200);

impl Watchdog {
    /// Watches the engine of this kick.
    pub fn new(kick: Arc<dyn Kick>) -> Self {
        Self::with_period(kick, WATCH_PERIOD)
    }

    /// The same with another period.
    pub fn with_period(kick: Arc<dyn Kick>, period: Duration) -> Self {
        let watched = Arc::new(Watched {
            turn: AtomicU64::new(0),
            bites: AtomicU32::new(0),
            ended: AtomicBool::new(false),
        });
        let seen_by_thread = watched.clone();
        std::thread::spawn(move || {
            let mut last = 0;
            while !seen_by_thread.ended.load(Relaxed) {
                std::thread::sleep(period);
                let turn = seen_by_thread.turn.load(Relaxed);
                if turn % 2 == 1 && turn == last {
                    seen_by_thread.bites.fetch_add(1, Relaxed);
                    kick.kick();
                }
                last = turn;
            }
        });
        Watchdog(watched)
    }

    /// A case begins.
    pub fn start(&self) {
        self.0.bites.store(0, Relaxed);
        self.0.turn.fetch_add(1, Relaxed);
    }

    /// How often it was kicked for taking long.
    pub fn bites(&self) -> u32 {
        self.0.bites.load(Relaxed)
    }

    /// It has ended.
    pub fn stop(&self) {
        self.0.turn.fetch_add(1, Relaxed);
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.0.ended.store(true, Relaxed);
    }
}
