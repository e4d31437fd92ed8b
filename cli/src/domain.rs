//! Driver domains: back-ends in processes of their own, which are this program again.

use crate::args::Run;
use crate::signals;
use anyhow::{Result, bail};
use clap::Args;
use doppel_machine::Backing;
use doppel_machine::block::{self, BlockBackend, DiskSpec, RemoteDisk};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::sync::Arc;

/// The hidden command of such a process.
pub const COMMAND: &str = "backend";

/// What can be in a process of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Domain {
    /// Each disk.
    Disk,
}

impl FromStr for Domain {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "disk" => Ok(Domain::Disk),
            "net" => Err("networks stay in the monitor in this version; write disk".to_owned()),
            _ => Err("write disk".to_owned()),
        }
    }
}

/// What a back-end's process serves.
#[derive(Debug, Args)]
pub struct Backend {
    /// The disk.
    pub disk: DiskSpec,
}

/// Whether what was asked for fits together.
pub fn check(args: &Run) -> Result<()> {
    match args.memory_backing {
        Some(backing) if backing != Backing::Memfd && !args.driver_domain.is_empty() => {
            bail!("--driver-domain needs --memory-backing memfd, which it takes by itself")
        }
        _ => Ok(()),
    }
}

/// What guest memory has to be made of, or the user wants it to be.
pub fn backing(args: &Run) -> Option<Backing> {
    match args.driver_domain.is_empty() {
        true => args.memory_backing,
        false => Some(Backing::Memfd),
    }
}

/// A disk in a process of its own.
pub fn disk(spec: &DiskSpec) -> Result<Arc<dyn BlockBackend>> {
    let text = spec.to_string();
    let start = move |socket: OwnedFd| start(&text, socket);
    Ok(Arc::new(RemoteDisk::new(Box::new(start))?))
}

/// The process has a group of its own, so that what a terminal sends to the monitor's does not end it first.
fn start(disk: &str, socket: OwnedFd) -> io::Result<Child> {
    Command::new("/proc/self/exe")
        .args([COMMAND, "--", disk])
        .stdin(Stdio::from(socket))
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
}

/// The life of such a process. It ends when the monitor does.
pub fn serve(args: &Backend) -> Result<()> {
    signals::block_file_size()?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    block::serve(socket, || args.disk.open())?;
    Ok(())
}
