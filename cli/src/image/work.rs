//! A folder for scratch files beside the file that is made. It goes when all is done, and when a signal ends the command.

use crate::signals::Signals;
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::{Arc, Mutex, PoisonError};

/// Exit status for a signal.
const ERROR: i32 = 1;
/// While a child of ours still writes there, the folder may fill again.
const ATTEMPTS: usize = 20;

/// The folder.
pub struct Work {
    path: PathBuf,
    /// A program that works for us.
    child: Arc<Mutex<Option<Pid>>>,
}

impl Work {
    /// Makes it: `.OUT.partial-PID`.
    pub fn new(output: &Path) -> Result<Work> {
        let name = output.file_name().context("OUT needs the name of a file")?;
        let name = format!(".{}.partial-{}", name.to_string_lossy(), std::process::id());
        let path = std::path::absolute(output)?.with_file_name(name);
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        Ok(Work {
            path,
            child: Arc::default(),
        })
    }

    /// Makes it, and from now on a signal that ends the process removes it first. For a process that does nothing else.
    pub fn guarded(output: &Path) -> Result<Work> {
        // Before anything can be left behind.
        let signals = Signals::block()?;
        let work = Work::new(output)?;
        let (path, child) = (work.path.clone(), work.child.clone());
        let end = move |signal: &str| {
            eprintln!("doppel: ended by {signal}");
            if let Some(pid) = *child.lock().unwrap_or_else(PoisonError::into_inner) {
                let _ = kill(pid, Signal::SIGTERM);
            }
            remove(&path);
            std::process::exit(ERROR);
        };
        signals.watch(end, || {}, || {});
        Ok(work)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for a program that is to end with us.
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
    }
}

fn remove(path: &Path) {
    for _ in 0..ATTEMPTS {
        let _ = fs::remove_dir_all(path);
        if !path.exists() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}
