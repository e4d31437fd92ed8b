//! A folder for scratch files beside the file that is made, and one where programs that work for us have theirs. They go when all is done, and when a
//! signal ends the command.
//!
//! What mmdebstrap makes may belong to users that only it can be (user_namespaces(7)), so it is told to end, with all that it started, and
//! waited for while it cleans up.

use crate::signals::{Handlers, Signals};
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::process::{WaitId, WaitIdOptions, waitid};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Exit status for a signal.
const ERROR: i32 = 1;
/// While a child of ours still writes there, the folder may fill again.
const ATTEMPTS: usize = 20;
const PAUSE: Duration = Duration::from_millis(50);
/// How long a program may clean up behind itself.
const FAREWELL: Duration = Duration::from_secs(60);

/// The folder.
pub struct Work {
    path: PathBuf,
    /// Where programs have what is temporary; others can look into it, since these programs may run as others.
    temporary: PathBuf,
    /// A program that works for us, in a process group of its own.
    child: Arc<Mutex<Option<Pid>>>,
}

impl Work {
    /// Makes it: `.OUT.partial-PID`.
    pub fn new(output: &Path) -> Result<Work> {
        let name = output.file_name().context("OUT needs the name of a file")?;
        let (name, pid) = (name.to_string_lossy(), std::process::id());
        let path = std::path::absolute(output)?.with_file_name(format!(".{name}.partial-{pid}"));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        let temporary = format!("doppel-image-{pid}-{name}");
        let temporary = std::path::absolute(std::env::temp_dir())?.join(temporary);
        // One that is there is not ours.
        if let Err(error) = fs::create_dir(&temporary) {
            let _ = fs::remove_dir(&path);
            return Err(error).with_context(|| temporary.display().to_string());
        }
        Ok(Work {
            path,
            temporary,
            child: Arc::default(),
        })
    }

    /// Makes it, and from now on a signal that ends the process removes it first. For a process that does nothing else.
    pub fn guarded(output: &Path) -> Result<Work> {
        // Before anything can be left behind.
        let signals = Signals::block()?;
        let work = Work::new(output)?;
        let (path, temporary) = (work.path.clone(), work.temporary.clone());
        let child = work.child.clone();
        let end = move |signal: &str| {
            eprintln!("doppel: ended by {signal}");
            // Held to the end: who waits for the program goes no further.
            let child = child.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(pid) = *child {
                end_group(pid);
            }
            remove(&path);
            remove(&temporary);
            std::process::exit(ERROR);
        };
        signals.watch()?.tell(Handlers {
            end: Box::new(end),
            continued: Box::new(|| {}),
            resized: Box::new(|| {}),
        });
        Ok(work)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Prepares a program that is to end with us.
    pub fn prepare<'c>(&self, command: &'c mut Command) -> &'c mut Command {
        command.env("TMPDIR", &self.temporary).process_group(0)
    }

    /// Waits for one that was [prepared](Work::prepare).
    pub fn wait_for(
        &self,
        child: &mut Child,
        meanwhile: impl FnOnce(),
    ) -> Result<std::process::ExitStatus> {
        self.set_child(Some(Pid::from_raw(child.id() as i32)));
        meanwhile();
        // It cannot be another's number before it is waited for.
        self.set_child(None);
        Ok(child.wait()?)
    }

    fn set_child(&self, pid: Option<Pid>) {
        *self.child.lock().unwrap_or_else(PoisonError::into_inner) = pid;
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
        let _ = fs::remove_dir_all(&self.temporary);
    }
}

/// Has a program of ours and all that it started end, and waits until it has.
fn end_group(pid: Pid) {
    let _ = killpg(pid, Signal::SIGTERM);
    let start = Instant::now();
    while start.elapsed() < FAREWELL && !has_ended(pid) {
        std::thread::sleep(PAUSE);
    }
    let _ = killpg(pid, Signal::SIGKILL);
}

/// Whether a child has ended, which somebody else waits for.
fn has_ended(pid: Pid) -> bool {
    let Some(pid) = rustix::process::Pid::from_raw(pid.as_raw()) else {
        return true;
    };
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    !matches!(waitid(WaitId::Pid(pid), look), Ok(None))
}

fn remove(path: &Path) {
    for _ in 0..ATTEMPTS {
        let _ = fs::remove_dir_all(path);
        if !path.exists() {
            return;
        }
        std::thread::sleep(PAUSE);
    }
}
