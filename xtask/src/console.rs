//! A machine with a serial console on its standard input and output, talked to like a person would.

use anyhow::{Context, Result, bail};
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// A machine that runs; it is killed when it is dropped.
pub struct Console {
    child: Child,
    input: ChildStdin,
    output: Receiver<Vec<u8>>,
    /// What was shown and not asked for yet.
    shown: String,
    start: Instant,
}

impl Console {
    /// Starts it.
    pub fn start(mut command: Command) -> Result<Console> {
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let start = Instant::now();
        let mut child = command
            .spawn()
            .with_context(|| format!("{:?}", command.get_program()))?;
        let input = child.stdin.take().context("no stdin")?;
        let mut from = child.stdout.take().context("no stdout")?;
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = from.read(&mut bytes) {
                if sender.send(bytes[..n].to_vec()).is_err() {
                    return;
                }
            }
        });
        Ok(Console {
            child,
            input,
            output,
            shown: String::new(),
            start,
        })
    }

    /// Waits until `text` is shown; what was shown before it.
    pub fn until(&mut self, text: &str, limit: Duration) -> Result<String> {
        let end = Instant::now() + limit;
        loop {
            if let Some(at) = self.shown.find(text) {
                let before = self.shown[..at].to_owned();
                self.shown.drain(..at + text.len());
                return Ok(before);
            }
            match self
                .output
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no {text:?} within {limit:?}:\n{}", self.tail())
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("it ended without {text:?}:\n{}", self.tail())
                }
            }
        }
    }

    /// Runs a command in the guest's shell; what it printed. The end is told by a mark that the echo of the command does not have.
    pub fn shell(&mut self, command: &str, limit: Duration) -> Result<String> {
        self.send(&format!("{command}; echo en''d=$?"))?;
        let printed = self.until("end=", limit)?;
        let status = self.until("\n", limit)?;
        match status.trim() {
            "0" => Ok(printed),
            status => bail!("{command:?} ended with {status}:\n{printed}"),
        }
    }

    /// Types a line.
    pub fn send(&mut self, line: &str) -> Result<()> {
        Ok(self.input.write_all(format!("{line}\n").as_bytes())?)
    }

    /// The monitor's process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The last of what it said.
    pub fn said(&mut self) -> String {
        while let Ok(bytes) = self.output.try_recv() {
            self.shown.push_str(&String::from_utf8_lossy(&bytes));
        }
        self.tail().to_owned()
    }

    /// Time since its start.
    pub fn age(&self) -> Duration {
        self.start.elapsed()
    }

    /// Waits for its end.
    pub fn end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        bail!("it did not end within {limit:?}")
    }

    /// Kills it, as a crash of the host would.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// All that it shows from now until its end.
    pub fn rest(&mut self) -> String {
        while let Ok(bytes) = self.output.recv() {
            self.shown.push_str(&String::from_utf8_lossy(&bytes));
        }
        std::mem::take(&mut self.shown)
    }

    fn tail(&self) -> &str {
        let from = self.shown.len().saturating_sub(2000);
        let from = (from..).find(|at| self.shown.is_char_boundary(*at));
        &self.shown[from.unwrap_or_default()..]
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[test]
    fn a_shell_is_talked_to() {
        let mut console = Console::start(Command::new("sh")).unwrap();
        assert_eq!(console.shell("echo a; echo b", LIMIT).unwrap(), "a\nb\n");
        let error = console
            .shell("echo c; false", LIMIT)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("ended with 1") && error.contains('c'),
            "{error}"
        );
        assert!(console.until("x", Duration::from_millis(50)).is_err());
        console.send("echo last; exit 3").unwrap();
        assert_eq!(console.end(LIMIT).unwrap().code(), Some(3));
        assert_eq!(console.rest(), "last\n");
    }
}
