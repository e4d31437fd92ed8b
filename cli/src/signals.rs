//! Signals that ask the monitor to end.
//!
//! They are blocked in every thread and taken by one that waits for them, so no code runs in a signal handler.

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

    /// Starts the thread that takes them: `end` is told the name of a signal that asks to end, `continued` is called
    /// when the process goes on after a stop, `resized` when the terminal's window has another size.
    pub fn watch(
        self,
        end: impl Fn(&str) + Send + 'static,
        continued: impl Fn() + Send + 'static,
        resized: impl Fn() + Send + 'static,
    ) -> Result<()> {
        let thread = std::thread::Builder::new().name("signals".to_owned());
        let started = thread.spawn(narrowed(Kind::Console, move || {
            while let Ok(signal) = self.0.wait() {
                match signal {
                    Signal::SIGCONT => {
                        continued();
                        resized();
                    }
                    Signal::SIGWINCH => resized(),
                    signal => end(signal.as_str()),
                }
            }
        }));
        started.map(drop).context("a thread cannot be started")
    }
}
