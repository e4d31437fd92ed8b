//! Driver domains: back-ends in processes of their own, which are this program again.

use crate::args::{Run, on_or_off};
use crate::own_memory_unsafe;
use crate::sandbox;
use crate::signals;
use anyhow::{Result, bail};
use clap::{ArgAction, Args};
use doppel_machine::block::{self, BlockBackend, DiskSpec, RemoteDisk};
use doppel_machine::net::{self, StartNetwork};
use doppel_machine::{Backing, HostClock, NetConfig};
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
    /// Each network card's network.
    Net,
}

const CLASSES: &str = "write disk, net or disk,net";

impl Domain {
    fn name(self) -> &'static str {
        match self {
            Domain::Disk => "disk",
            Domain::Net => "net",
        }
    }
}

impl FromStr for Domain {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let classes = [Domain::Disk, Domain::Net].into_iter();
        let mut named = classes.filter(|class| class.name() == text);
        named.next().ok_or_else(|| CLASSES.to_owned())
    }
}

/// What a back-end's process serves.
#[derive(Debug, Args)]
pub struct Backend {
    /// Whether it confines itself once that is open.
    #[arg(long, value_name = "on|off", default_value = "on", action = ArgAction::Set, value_parser = on_or_off)]
    pub sandbox: bool,
    /// The number of the network card.
    #[arg(long, default_value_t = 0)]
    pub card: u8,
    /// What that is.
    pub class: Domain,
    /// The disk or network, as for --disk and --net.
    pub what: String,
}

/// Whether what was asked for fits together.
pub fn check(args: &Run) -> Result<()> {
    match args.memory_backing {
        Some(backing) if backing != Backing::Memfd && disks_apart(args) => {
            bail!("--driver-domain disk needs --memory-backing memfd, which it takes by itself")
        }
        _ => Ok(()),
    }
}

/// What guest memory has to be made of, or the user wants it to be.
pub fn backing(args: &Run) -> Option<Backing> {
    match disks_apart(args) {
        true => Some(Backing::Memfd),
        false => args.memory_backing,
    }
}

/// Whether disks have processes of their own, which move data between image and guest memory.
fn disks_apart(args: &Run) -> bool {
    args.driver_domain.contains(&Domain::Disk)
}

/// A disk in a process of its own, and the files that one which follows it will open.
pub fn disk(spec: &DiskSpec, sandbox: bool) -> Result<(Arc<dyn BlockBackend>, Vec<OpenFile>)> {
    let text = spec.to_string();
    let start = move |socket| start(Domain::Disk, &text, &[], sandbox, socket);
    let disk = RemoteDisk::new(Box::new(start))?;
    let files = open_files(disk.process());
    Ok((Arc::new(disk), files))
}

/// Starts the processes of the machine's networks, if they are to have some.
pub fn networks(args: &Run) -> Option<StartNetwork> {
    let there = args.driver_domain.contains(&Domain::Net);
    let cards: Vec<_> = args.devices.cards().map(ToString::to_string).collect();
    let sandbox = args.sandbox;
    let start = move |card: u8, socket: OwnedFd| {
        let what = cards.get(usize::from(card)).map_or("", String::as_str);
        let number = card.to_string();
        start(Domain::Net, what, &["--card", &number], sandbox, socket)
    };
    there.then(|| Arc::new(start) as StartNetwork)
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
fn start(
    class: Domain,
    what: &str,
    options: &[&str],
    sandbox: bool,
    socket: OwnedFd,
) -> io::Result<Child> {
    let without: &[&str] = match sandbox {
        true => &[],
        false => &["--sandbox", "off"],
    };
    Command::new("/proc/self/exe")
        .arg(COMMAND)
        .args(without)
        .args(options)
        .args(["--", class.name(), what])
        .stdin(Stdio::from(socket))
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
}

/// The life of such a process. It ends when the monitor does.
pub fn serve(args: &Backend) -> Result<()> {
    own_memory_unsafe::prepare_allocator(1);
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    match args.class {
        Domain::Disk => serve_disk(args, socket),
        Domain::Net => serve_network(args, socket),
    }
}

fn serve_disk(args: &Backend, socket: OwnedFd) -> Result<()> {
    signals::block_file_size()?;
    block::serve(socket, || {
        let spec: DiskSpec = args.what.parse().map_err(anyhow::Error::msg)?;
        let disk = spec.open()?;
        if args.sandbox {
            sandbox::enter_disk_process()?;
        }
        anyhow::Ok(disk)
    })?;
    Ok(())
}

fn serve_network(args: &Backend, socket: OwnedFd) -> Result<()> {
    let clock = Arc::new(HostClock::new());
    net::serve(socket, &*clock.clone(), || {
        let config: NetConfig = args.what.parse().map_err(anyhow::Error::msg)?;
        let network = config.open(args.card, clock)?;
        if args.sandbox {
            sandbox::enter_network_process(&config)?;
        }
        anyhow::Ok(network)
    })?;
    Ok(())
}
