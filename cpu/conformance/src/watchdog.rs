//! Ends guests that do not end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use doppel_x86::Kick;

/// How long a guest may run, and then how long the engine may take to answer a kick.
const LIMIT: Duration = Duration::from_secs(5);

/// Watches one run until it is dropped.
pub struct Watchdog {
    _running: Sender<()>,
    bitten: Arc<AtomicBool>,
}

impl Watchdog {
    /// Starts to watch.
    pub fn new(kicker: Arc<dyn Kick>) -> Self {
        Self::with_limit(kicker, LIMIT)
    }

    /// The same for a guest that may run so long.
    pub fn with_limit(kicker: Arc<dyn Kick>, limit: Duration) -> Self {
        let (running, stopped) = channel();
        let bitten = Arc::new(AtomicBool::new(false));
        let bites = bitten.clone();
        std::thread::spawn(move || {
            let over = || stopped.recv_timeout(limit) == Err(RecvTimeoutError::Disconnected);
            if over() {
                return;
            }
            bites.store(true, Ordering::SeqCst);
            kicker.kick();
            if !over() {
                eprintln!("the engine does not answer a kick");
                std::process::abort();
            }
        });
        Watchdog {
            _running: running,
            bitten,
        }
    }

    /// True once the guest has run for too long.
    pub fn has_bitten(&self) -> bool {
        self.bitten.load(Ordering::SeqCst)
    }
}
