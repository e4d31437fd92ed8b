//! Driver domains: back-ends in processes of their own, which are this program again.

use crate::args::{Run, on_or_off};
use crate::own_memory_unsafe;
use crate::sandbox;
use crate::signals;
use anyhow::{Result, bail};
use clap::{ArgAction, Args};
use doppel_machine::Backing;
use doppel_machine::block::{self, BlockBackend, DiskSpec, RemoteDisk};
use std::fs::{self, DirEntry};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
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
    /// Whether it confines itself once the disk is open.
    #[arg(long, value_name = "on|off", default_value = "on", action = ArgAction::Set, value_parser = on_or_off)]
    pub sandbox: bool,
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

/// A disk in a process of its own, and the files that one which follows it will open.
pub fn disk(spec: &DiskSpec, sandbox: bool) -> Result<(Arc<dyn BlockBackend>, Vec<OpenFile>)> {
    let text = spec.to_string();
    let start = move |socket: OwnedFd| start(&text, sandbox, socket);
    let disk = RemoteDisk::new(Box::new(start))?;
    let files = open_files(disk.process());
    Ok((Arc::new(disk), files))
}

/// A file that a process has open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// Its path.
    pub path: PathBuf,
    /// Whether it may be written to.
    pub writable: bool,
}

/// Those of a process that have a path.
fn open_files(process: u32) -> Vec<OpenFile> {
    let entries = fs::read_dir(format!("/proc/{process}/fd")).into_iter();
    let file = |entry: io::Result<DirEntry>| {
        let link = entry.ok()?.path();
        let path = fs::read_link(&link).ok()?;
        // The mode of the link says how the file was opened (proc(5)).
        let writable = link.symlink_metadata().ok()?.mode() & 0o200 != 0;
        let kind = path.metadata().ok()?.file_type();
        let on_disk = path.is_absolute() && (kind.is_file() || kind.is_block_device());
        on_disk.then_some(OpenFile { path, writable })
    };
    entries.flatten().filter_map(file).collect()
}

/// The process has a group of its own, so that what a terminal sends to the monitor's does not end it first.
fn start(disk: &str, sandbox: bool, socket: OwnedFd) -> io::Result<Child> {
    let options: &[&str] = match sandbox {
        true => &[],
        false => &["--sandbox", "off"],
    };
    Command::new("/proc/self/exe")
        .arg(COMMAND)
        .args(options)
        .args(["--", disk])
        .stdin(Stdio::from(socket))
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
}

/// The life of such a process. It ends when the monitor does.
pub fn serve(args: &Backend) -> Result<()> {
    own_memory_unsafe::prepare_allocator(1);
    signals::block_file_size()?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    block::serve(socket, || {
        let disk = args.disk.open()?;
        if args.sandbox {
            sandbox::enter_disk_process()?;
        }
        anyhow::Ok(disk)
    })?;
    Ok(())
}
