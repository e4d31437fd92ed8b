//! The user's terminal while a guest owns it.
//!
//! For the guest's line discipline to do the work (echo, Ctrl-C, line editing), the host's must do none: raw mode. A
//! terminal left raw is useless, so the settings come back on every way out: the end of [`Raw`], a panic (its
//! hook), a signal (which ends the machine, then [`Raw`]), and a death that runs no more code of ours (SIGKILL, abort)
//! through a watchdog, a child that waits for the parent's end of a pipe to close.

pub mod console;
pub mod escape;
mod printable;

pub use printable::printable;

use anyhow::{Context, Result};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

/// The hidden subcommand that is the watchdog.
pub const WATCHDOG: &str = "terminal-watchdog";

/// What the watchdog is told at an orderly end.
const DONE: u8 = b'.';

/// A terminal's settings as they were found, and the way back to them.
struct Saved {
    terminal: OwnedFd,
    settings: Termios,
}

impl Saved {
    fn new(terminal: impl AsFd) -> io::Result<Saved> {
        let settings = tcgetattr(&terminal)?;
        let terminal = terminal.as_fd().try_clone_to_owned()?;
        Ok(Saved { terminal, settings })
    }

    fn make_raw(&self) -> io::Result<()> {
        Ok(tcsetattr(
            &self.terminal,
            OptionalActions::Flush,
            &raw(&self.settings),
        )?)
    }

    fn restore(&self) -> io::Result<()> {
        Ok(tcsetattr(
            &self.terminal,
            OptionalActions::Drain,
            &self.settings,
        )?)
    }
}

fn raw(settings: &Termios) -> Termios {
    let mut raw = settings.clone();
    raw.make_raw();
    raw
}

/// Shows a message of the monitor's in between; a raw terminal needs carriage returns.
pub(crate) fn say(message: &str) {
    let shown = printable(message).replace('\n', "\r\n");
    eprint!("\r\n{shown}\r\n");
}

/// Standard input in raw mode for as long as this lives.
pub struct Raw {
    saved: Arc<Saved>,
    watchdog: Option<Child>,
}

impl Raw {
    /// Takes standard input into raw mode; `None` where it is not a terminal.
    pub fn new() -> Result<Option<Raw>> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(None);
        }
        let saved = Arc::new(Saved::new(&stdin).context("reading the terminal's settings")?);
        let watchdog = start_watchdog(&saved.terminal).ok(); // a second net: its lack is no reason to refuse
        restore_at_panic(saved.clone());
        saved
            .make_raw()
            .context("changing the terminal's settings")?;
        Ok(Some(Raw { saved, watchdog }))
    }

    /// A way to enter raw mode again after a stop and continue, when the shell has set the terminal its way.
    pub fn again(&self) -> impl Fn() + Send + use<> {
        let saved = self.saved.clone();
        move || {
            let _ = saved.make_raw();
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = self.saved.restore();
        if let Some(child) = &mut self.watchdog {
            if let Some(pipe) = &mut child.stdin {
                let _ = pipe.write_all(&[DONE]);
            }
            let _ = child.wait();
        }
    }
}

fn restore_at_panic(saved: Arc<Saved>) {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let _ = saved.restore();
        report(info);
    }));
}

/// The size of the terminal on standard input in rows and columns, where it is known.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(io::stdin()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Starts this program as its own watchdog, with the terminal as standard error, and waits until it has the settings.
fn start_watchdog(terminal: &OwnedFd) -> io::Result<Child> {
    let mut child = Command::new("/proc/self/exe")
        .arg(WATCHDOG)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(terminal.try_clone()?)
        .spawn()?;
    if let Some(mut ready) = child.stdout.take() {
        ready.read_exact(&mut [0])?;
    }
    Ok(child)
}

/// The watchdog: remembers the settings of the terminal on standard error, and gives them back if standard input ends
/// with no word before and the terminal is still raw (it is not where the shell was quicker).
pub fn watch() -> Result<()> {
    nix::sys::signal::SigSet::all().thread_block()?; // lives through what kills the parent, and may set the terminal
    let saved = Saved::new(io::stderr())?;
    io::stdout().write_all(&[DONE])?;
    io::stdout().flush()?;
    let orderly = io::stdin().read(&mut [0]).is_ok_and(|n| n == 1);
    let now = tcgetattr(&saved.terminal)?;
    if !orderly && now.local_modes == raw(&saved.settings).local_modes {
        saved.restore()?;
    }
    Ok(())
}
