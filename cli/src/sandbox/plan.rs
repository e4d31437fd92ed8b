//! What a machine needs of the host's files and network, from its command line.

use crate::args::{Run, Serial};
use crate::domain::OpenFile;
use crate::terminal;
use doppel_machine::net::{Network, switch_folder};
use doppel_machine::{EngineChoice, NetConfig};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// What may be done with a file, or with all that is in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Files are read, directories listed.
    Read,
    /// Files are read and written.
    Write,
    /// Devices likewise, and their ioctls.
    Device,
    /// Files are read and executed.
    Execute,
    /// Everything but execution and devices.
    All,
}

impl Right {
    /// Its name in `--print-sandbox`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Right::Read => "read",
            Right::Write => "read, write",
            Right::Device => "device",
            Right::Execute => "execute",
            Right::All => "all",
        }
    }
}

/// One thing that the machine keeps.
#[derive(Clone, Debug)]
pub struct Grant {
    /// The file or directory.
    pub path: PathBuf,
    /// What may be done there.
    pub right: Right,
    /// Why.
    pub reason: &'static str,
}

/// What every machine needs.
const ALWAYS: &[(&str, Right, &str)] = &[
    (
        "/proc",
        Right::Read,
        "the host's limits, and how busy it is",
    ),
    (
        "/sys/devices/system/cpu/possible",
        Right::Read,
        "what RDTSCP may tell on this host",
    ),
    ("/sys/devices/system/node/possible", Right::Read, "the same"),
    ("/dev/null", Right::Write, "standard output of processes"),
];

/// What a user network reads to find the host's name servers. The directory: the file is replaced, not written.
const RESOLVERS: &str = "/etc/resolv.conf";

/// All that the machine keeps.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    grants: Vec<Grant>,
    tcp: bool,
}

impl Plan {
    /// What `args` need, with `boot`, the files that are read at each boot of the machine, and those of `disks` in processes
    /// of their own, which are opened again when such a process has died.
    #[must_use]
    pub fn new(args: &Run, boot: &[PathBuf], disks: &[OpenFile]) -> Plan {
        let mut plan = Plan::default();
        for (path, right, reason) in ALWAYS {
            plan.grant(path, *right, reason);
        }
        let modules = args.module.iter().map(|(file, _)| file);
        for path in boot.iter().chain(modules) {
            plan.grant(path, Right::Read, "read at each boot");
        }
        plan.files(args);
        args.devices.cards().for_each(|card| plan.network(card));
        // Without its ioctls, which alone do anything.
        if matches!(args.engine, EngineChoice::Auto | EngineChoice::Kvm) {
            plan.grant("/dev/kvm", Right::Write, "whether it is there");
        }
        for file in disks {
            let right = match file.writable {
                true => Right::Write,
                false => Right::Read,
            };
            plan.grant(&file.path, right, "--driver-domain");
        }
        if !args.driver_domain.is_empty() {
            plan.this_program("a back-end's next process");
        }
        if terminal::size().is_some() {
            plan.this_program("the terminal's watchdog");
        }
        plan
    }

    /// What the process of a card's network needs once that is open.
    #[must_use]
    pub fn of_network(card: &NetConfig) -> Plan {
        let mut plan = Plan::default();
        plan.network(card);
        plan
    }

    /// The files and directories.
    pub fn grants(&self) -> impl Iterator<Item = &Grant> {
        self.grants.iter()
    }

    /// Whether the machine connects and listens by TCP.
    #[must_use]
    pub fn tcp(&self) -> bool {
        self.tcp
    }

    fn grant(&mut self, path: impl AsRef<Path>, right: Right, reason: &'static str) {
        let path = path.as_ref().to_owned();
        self.grants.push(Grant {
            path,
            right,
            reason,
        });
    }

    fn files(&mut self, args: &Run) {
        for share in args.devices.shares() {
            let right = match share.read_only {
                true => Right::Read,
                false => Right::All,
            };
            self.grant(&share.directory, right, "--share");
        }
        let consoles = args.devices.consoles().map(|spec| &spec.to);
        for to in consoles.chain([&args.serial()]) {
            if let Serial::File(path) = to {
                self.grant(path, Right::Write, "--serial, --console");
            }
        }
    }

    fn network(&mut self, card: &NetConfig) {
        match &card.network {
            Network::User(_) => {
                self.tcp = true;
                let file = Path::new(RESOLVERS);
                let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
                self.grant(folder_of(&file), Right::Read, "the host's name servers");
                self.grant("/etc", Right::Read, "which of them are in force");
            }
            Network::Switch(name) => {
                if let Ok(folder) = switch_folder(name) {
                    self.grant(folder, Right::All, "--net switch");
                }
            }
            Network::Tap(_) => self.grant("/dev/net/tun", Right::Device, "--net tap"),
        }
    }

    /// A process that is this program again: its files, which are those mapped here.
    fn this_program(&mut self, reason: &'static str) {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let path = |line: &str| line.find('/').map(|at| PathBuf::from(&line[at..]));
        let files: BTreeSet<PathBuf> = maps.lines().filter_map(path).collect();
        for file in files.iter().filter(|file| file.is_file()) {
            self.grant(file, Right::Execute, reason);
        }
        self.grant("/etc/ld.so.cache", Right::Read, reason);
    }
}

/// The directory that has `path`.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}
