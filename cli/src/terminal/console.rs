//! The guest's serial port, or a console of it, on the user's side: threads that do the blocking input and output.

use super::escape::{Command, Escape, HELP};
use crate::args::Serial;
use anyhow::{Context, Result};
use doppel_machine::{Backed, CharSink, CharSource, InputQueue, OutputQueue};
use doppel_seccomp::{Kind, narrowed};
use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

/// Bytes that may wait for a guest that does not read; what is typed beyond that holds up the escape key as well.
const INPUT_CAPACITY: usize = 1 << 20;
/// Bytes that may wait for a slow terminal before the guest's UART does.
const OUTPUT_CAPACITY: usize = 1 << 16;

/// A thread that does blocking input or output.
fn start(body: impl FnOnce() + Send + 'static) -> Result<()> {
    let thread = thread::Builder::new().name("console".to_owned());
    let started = thread.spawn(narrowed(Kind::Console, body));
    started.map(drop).context("a thread cannot be started")
}

/// Both directions of a serial port or a console.
pub struct Console {
    input: Arc<InputQueue>,
    output: Arc<OutputQueue>,
    written: Option<Receiver<()>>,
}

impl Console {
    /// Opens what `option` says, which is `to`, and starts to write there. Input waits for [`Console::listen_to_pipe`] or
    /// [`Console::listen_to_terminal`].
    pub fn open(option: &str, to: &Serial) -> Result<Console> {
        let to: Box<dyn Write + Send> = match to {
            Serial::Stdio => Box::new(io::stdout()),
            Serial::None => Box::new(io::sink()),
            Serial::File(path) => {
                let file = File::create(path);
                Box::new(file.with_context(|| {
                    format!(
                        "{option}: {} cannot be written; name a file in a directory that is yours",
                        path.display()
                    )
                })?)
            }
        };
        let output = OutputQueue::new(OUTPUT_CAPACITY);
        let (done, written) = channel();
        let (queue, option) = (output.clone(), option.to_owned());
        start(move || {
            let what = match option.as_str() {
                "--serial" => "the serial port's",
                _ => "a console's",
            };
            let _ = queue.run(Announced {
                to,
                what,
                failed: false,
            });
            let _ = done.send(());
        })?;
        Ok(Console {
            input: InputQueue::new(INPUT_CAPACITY),
            output,
            written: Some(written),
        })
    }

    /// Says what device it is, so that it hears of input and of room for output.
    pub fn connect(&self, to: Weak<dyn Backed>) {
        self.input.connect(to.clone());
        self.output.connect(to);
    }

    /// Passes standard input on to the guest as it is, to its end; the guest outlives it.
    pub fn listen_to_pipe(&self) -> Result<()> {
        let queue = self.input.clone();
        start(move || {
            let _ = queue.run(io::stdin().lock());
        })
    }

    /// Passes on what is typed, all but the escape commands; `leave` is called for the one that ends the machine.
    pub fn listen_to_terminal(&self, leave: impl Fn() + Send + 'static) -> Result<()> {
        let queue = self.input.clone();
        start(move || {
            let (mut escape, mut buffer) = (Escape::default(), [0; 1024]);
            let mut stdin = io::stdin().lock();
            while let Ok(n @ 1..) = stdin.read(&mut buffer) {
                let mut guest = Vec::new();
                for command in escape.filter(&buffer[..n], &mut guest) {
                    match command {
                        Command::Leave => leave(),
                        Command::Help => super::say(HELP),
                    }
                }
                if !queue.push(&guest) {
                    return;
                }
            }
        })
    }

    /// Waits until all that the guest wrote is out, for `limit` at most where there is one.
    pub fn finish(&mut self, limit: Option<Duration>) {
        self.output.close();
        let Some(written) = self.written.take() else {
            return;
        };
        let _: Result<(), RecvTimeoutError> = match limit {
            Some(limit) => written.recv_timeout(limit),
            None => written.recv().map_err(RecvTimeoutError::from),
        };
    }

    /// The machine's view.
    pub fn ends(&self) -> (Arc<dyn CharSource>, Arc<dyn CharSink>) {
        (self.input.clone(), self.output.clone())
    }
}

/// Output that says when it is closed. The guest goes on, as a machine does whose screen is unplugged.
struct Announced {
    to: Box<dyn Write + Send>,
    what: &'static str,
    failed: bool,
}

impl Announced {
    fn announce<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result
            && error.kind() != io::ErrorKind::Interrupted
            && !std::mem::replace(&mut self.failed, true)
        {
            super::say(&format!(
                "doppel: {} output is lost from here on ({error}); the guest goes on",
                self.what
            ));
        }
        result
    }
}

impl Write for Announced {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let result = self.to.write(bytes);
        self.announce(result)
    }

    fn flush(&mut self) -> io::Result<()> {
        let result = self.to.flush();
        self.announce(result)
    }
}
