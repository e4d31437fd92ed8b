//! Signals that ask the monitor to end.
//!
//! They are blocked in every thread and taken by one that waits for them, so no code runs in a signal handler.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use doppel_seccomp::{Kind, narrowed};
use nix::sys::signal::{SigSet, Signal};

const ENDING: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// A file that would become larger than the process may make one (ulimit -f) is an error of the write that wanted it, and no signal.
pub fn block_file_size() -> Result<()> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGXFSZ);
    set.thread_block().context("blocking SIGXFSZ")
}

/// The signals, blocked. Threads started from here on inherit that, so this comes before the first of them.
pub struct Signals(SigSet);

impl Signals {
    /// Blocks the ending signals, SIGCONT and SIGWINCH in this thread.
    pub fn block() -> Result<Signals> {
        let mut set = SigSet::empty();
        for signal in ENDING
            .into_iter()
            .chain([Signal::SIGCONT, Signal::SIGWINCH])
        {
            set.add(signal);
        }
        set.thread_block().context("blocking signals")?;
        block_file_size()?;
        Ok(Signals(set))
    }

    /// Starts the thread that takes them. Until it is told what to do ([`Watch::tell`]), one that asks to end ends the process: there is
    /// no guest yet, but to read a hostile kernel or disk may take long.
    pub fn watch(self) -> Result<Watch> {
        let watch = Watch::default();
        let told = watch.clone();
        let thread = std::thread::Builder::new().name("signals".to_owned());
        let started = thread.spawn(narrowed(Kind::Console, move || {
            while let Ok(signal) = self.0.wait() {
                told.take(signal);
            }
        }));
        started.context("a thread cannot be started")?;
        Ok(watch)
    }
}

/// What is done about signals.
#[derive(Clone, Default)]
pub struct Watch(Arc<Mutex<Option<Handlers>>>);

/// What a running machine does about signals.
pub struct Handlers {
    /// It is asked to end by the signal of this name.
    pub end: Box<dyn Fn(&str) + Send>,
    /// The process goes on after a stop.
    pub continued: Box<dyn Fn() + Send>,
    /// The terminal's window has another size.
    pub resized: Box<dyn Fn() + Send>,
}

impl Watch {
    /// From now on the machine sees to them.
    pub fn tell(&self, handlers: Handlers) {
        *self.handlers() = Some(handlers);
    }

    fn handlers(&self) -> MutexGuard<'_, Option<Handlers>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self, signal: Signal) {
        match (signal, &*self.handlers()) {
            (Signal::SIGCONT, Some(handlers)) => {
                (handlers.continued)();
                (handlers.resized)();
            }
            (Signal::SIGWINCH, Some(handlers)) => (handlers.resized)(),
            (Signal::SIGCONT | Signal::SIGWINCH, None) => {}
            (signal, Some(handlers)) => (handlers.end)(signal.as_str()),
            // In silence: somebody may wait with standard error locked.
            (_, None) => std::process::exit(1),
        }
    }
}
