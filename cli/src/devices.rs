//! Virtio devices on the command line: options of several kinds, in the order in which they were written.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use doppel_machine::block::{BlockBackend, DiskSpec};
use doppel_machine::net::StartNetwork;
use doppel_machine::share::{Share, ShareSpec};
use doppel_machine::{
    BalloonControl, CharLink, ConsoleBackend, DeviceConfig, NetConfig, VSOCK_CID, VirtioTransport,
    VsockSocket,
};

use crate::args::Serial;
use crate::size;

const RNG: &str = "rng";
const DISK: &str = "disk";
const NET: &str = "net";
const SHARE: &str = "share";
const CONSOLE: &str = "console";
const VSOCK: &str = "vsock";
const BALLOON: &str = "balloon";
/// How often the guest is asked what its memory is like, where somebody wants to know.
const BALLOON_PERIOD: Duration = Duration::from_secs(5);

const VSOCK_HELP: &str = "\
Sockets between guest and host (AF_VSOCK), with [,cid=N], the guest's address, 3 unless said: a program of the guest that connects to the host \
(address 2) at port N reaches who listens at PATH_N, one of the host connects to PATH and writes \"CONNECT N\"";

/// A balloon of no size gives back what the guest reports as free.
const BALLOON_DEFAULT: Option<u64> = Some(0);

const BALLOON_HELP: &str = "\
A memory balloon, through which the guest gives memory that it does not use back to the host: SIZE is taken from it at once, as far as \
it can do without (0: nothing is); or off, which is no balloon";
const NO_NET: &str = "none";

const NET_HELP: &str = "\
A network card, plugged into: user (a network of its own that reaches the host's, with \
[,hostfwd=tcp|udp:[ADDRESS]:PORT-[ADDRESS]:PORT]... [,restrict] [,dns=ADDRESS[:PORT]]... [,mtu=N]), switch=NAME (shared with other \
machines of yours), tap=NAME (a tap device); each with [,mac=MAC] [,at-once=on|off]; or none. \
One that is plugged into \"user\" where nothing is said";

const SHARE_HELP: &str = "\
A directory of the host, which the guest mounts by its tag (mount -t virtiofs TAG /mnt): \
TAG=DIR[,ro][,owner=UID[:GID]]; what is yours is the owner's to the guest, root's where nothing is said";
const CONSOLE_HELP: &str = "\
A console (hvc0, hvc1, ...) that leads to: stdio (in place of the serial port), file=PATH (output alone), or none, which is no \
console; with [,at-once=on|off]: whether the processor that writes hands it over itself";

/// What `--virtio` says.
pub fn parse_transport(text: &str) -> Result<VirtioTransport, String> {
    match text {
        "pci" => Ok(VirtioTransport::Pci),
        "mmio" => Ok(VirtioTransport::Mmio),
        _ => Err("write pci or mmio".to_owned()),
    }
}

/// The devices that were asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices(Vec<Device>);

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Device {
    Rng,
    Disk(DiskSpec),
    Net(NetConfig),
    Share(ShareSpec),
    Console(ConsoleSpec),
    Balloon(u64),
    Vsock(VsockSpec),
}

/// What `--vsock` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec {
    /// Where the monitor listens.
    pub path: PathBuf,
    /// The guest's address.
    pub cid: u32,
}

fn vsock(text: &str) -> Result<VsockSpec, String> {
    let (path, cid) = match text.rsplit_once(",cid=") {
        Some((path, cid)) => (path, cid.parse().unwrap_or(0)),
        None => (text, VSOCK_CID),
    };
    // 0, 1 and 2 are the hypervisor, the guest itself and the host; the last is anybody.
    if !(VSOCK_CID..u32::MAX).contains(&cid) || path.is_empty() {
        return Err(format!(
            "write PATH or PATH,cid=N with N from {VSOCK_CID} to {}",
            u32::MAX - 1
        ));
    }
    let path = path.into();
    Ok(VsockSpec { path, cid })
}

/// What `--balloon` takes.
#[derive(Clone, Copy, Debug)]
struct BalloonSize(Option<u64>);

fn balloon(text: &str) -> Result<BalloonSize, String> {
    match text {
        "off" => Ok(BalloonSize(None)),
        "0" => Ok(BalloonSize(Some(0))),
        _ => size::parse(text).map(|bytes| BalloonSize(Some(bytes))),
    }
}

/// What `--console` takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleSpec {
    /// Where it leads.
    pub to: Serial,
    /// The vCPU that notifies sends by itself.
    pub at_once: bool,
}

impl std::str::FromStr for ConsoleSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (to, at_once) = match text.rsplit_once(",at-once=") {
            Some((to, "on")) => (to, true),
            Some((to, "off")) => (to, false),
            Some(_) => return Err("write at-once=on or at-once=off".to_owned()),
            None => (text, true),
        };
        let to = to.parse()?;
        Ok(ConsoleSpec { to, at_once })
    }
}

/// What `--net` takes.
#[derive(Clone, Debug)]
struct Card(Option<NetConfig>);

fn card(text: &str) -> Result<Card, String> {
    match text {
        NO_NET => Ok(Card(None)),
        _ => text.parse().map(|config| Card(Some(config))),
    }
}

impl Devices {
    /// The disks among them.
    pub fn disks(&self) -> impl Iterator<Item = &DiskSpec> {
        self.0.iter().filter_map(|device| match device {
            Device::Disk(spec) => Some(spec),
            _ => None,
        })
    }

    /// The shared directories among them.
    pub fn shares(&self) -> impl Iterator<Item = &ShareSpec> {
        self.0.iter().filter_map(|device| match device {
            Device::Share(spec) => Some(spec),
            _ => None,
        })
    }

    /// The network cards among them.
    pub fn cards(&self) -> impl Iterator<Item = &NetConfig> {
        self.0.iter().filter_map(|device| match device {
            Device::Net(config) => Some(config),
            _ => None,
        })
    }

    /// The consoles among them.
    pub fn consoles(&self) -> impl Iterator<Item = &ConsoleSpec> {
        self.0.iter().filter_map(|device| match device {
            Device::Console(spec) => Some(spec),
            _ => None,
        })
    }

    /// The socket device among them, if there is one.
    pub fn vsock(&self) -> Option<&VsockSpec> {
        self.0.iter().find_map(|device| match device {
            Device::Vsock(spec) => Some(spec),
            _ => None,
        })
    }

    /// True where a console has standard input and output.
    pub fn has_console_on_stdio(&self) -> bool {
        self.consoles().any(|spec| spec.to == Serial::Stdio)
    }

    /// What the machine is to have, made of what was opened for it.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn configurations(&self, opened: Opened<'_>) -> io::Result<Vec<DeviceConfig>> {
        let mut disks = opened.disks.iter().cloned().enumerate();
        let mut shares = opened.shares.iter().cloned();
        let mut consoles = opened.consoles.into_iter();
        let period = opened.counted.then_some(BALLOON_PERIOD);
        let mut configuration = |device: &Device| match device {
            Device::Rng => Some(Ok(DeviceConfig::Rng)),
            Device::Disk(spec) => disks.next().map(|(n, backend)| {
                Ok(DeviceConfig::Disk {
                    backend,
                    serial: format!("disk{n}"),
                    at_once: spec.at_once,
                })
            }),
            Device::Net(config) => Some(Ok(DeviceConfig::Net {
                config: config.clone(),
                apart: opened.networks.clone(),
            })),
            Device::Share(_) => shares.next().map(|share| Ok(DeviceConfig::Share(share))),
            Device::Vsock(spec) => {
                let (cid, socket) = (spec.cid, opened.vsock.clone()?);
                Some(Ok(DeviceConfig::Vsock { cid, socket }))
            }
            Device::Balloon(bytes) => {
                let control = BalloonControl::new(*bytes);
                Some(control.map(|control| DeviceConfig::Balloon { control, period }))
            }
            Device::Console(spec) => {
                let (backend, link) = consoles.next()?;
                Some(Ok(DeviceConfig::Console {
                    backend,
                    link,
                    at_once: spec.at_once,
                }))
            }
        };
        self.0.iter().filter_map(&mut configuration).collect()
    }
}

/// What was opened on the host for the devices that need it, each in their order.
pub struct Opened<'a> {
    /// For [`Devices::disks`].
    pub disks: &'a [Arc<dyn BlockBackend>],
    /// What starts processes for [`Devices::cards`], if they are to have some.
    pub networks: Option<StartNetwork>,
    /// For [`Devices::shares`].
    pub shares: &'a [Arc<Share>],
    /// For [`Devices::consoles`].
    pub consoles: Vec<(ConsoleBackend, Arc<CharLink>)>,
    /// For [`Devices::vsock`].
    pub vsock: Option<Arc<VsockSocket>>,
    /// Somebody wants to know what was counted.
    pub counted: bool,
}

impl Args for Devices {
    fn augment_args(command: Command) -> Command {
        command
            .arg(
                Arg::new(DISK)
                    .long(DISK)
                    .value_name("FILE")
                    .action(ArgAction::Append)
                    .value_parser(str::parse::<DiskSpec>)
                    .help(
                        "A disk: FILE[,format=raw|qcow2][,ro][,overlay=FILE]. Without --kernel, what is on the first is booted",
                    ),
            )
            .arg(
                Arg::new(RNG)
                    .long(RNG)
                    .action(ArgAction::SetTrue)
                    .help("An entropy device, fed by the host's random number generator"),
            )
            .arg(
                Arg::new(NET)
                    .long(NET)
                    .value_name("NETWORK")
                    .action(ArgAction::Append)
                    .value_parser(card)
                    .help(NET_HELP),
            )
            .arg(
                Arg::new(SHARE)
                    .long(SHARE)
                    .value_name("TAG=DIR")
                    .action(ArgAction::Append)
                    .value_parser(str::parse::<ShareSpec>)
                    .help(SHARE_HELP),
            )
            .arg(
                Arg::new(CONSOLE)
                    .long(CONSOLE)
                    .value_name("WHERE")
                    .action(ArgAction::Append)
                    .value_parser(str::parse::<ConsoleSpec>)
                    .help(CONSOLE_HELP),
            )
            .arg(
                Arg::new(VSOCK)
                    .long(VSOCK)
                    .value_name("PATH")
                    .value_parser(vsock)
                    .help(VSOCK_HELP),
            )
            .arg(
                Arg::new(BALLOON)
                    .long(BALLOON)
                    .value_name("SIZE|off")
                    .value_parser(balloon)
                    .help(BALLOON_HELP),
            )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Devices {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut found = Vec::new();
        if matches.value_source(RNG) == Some(ValueSource::CommandLine) {
            found.extend(matches.index_of(RNG).map(|at| (at, Device::Rng)));
        }
        let disks = matches.get_many::<DiskSpec>(DISK).into_iter().flatten();
        let disks = disks.map(|spec| Device::Disk(spec.clone()));
        found.extend(matches.indices_of(DISK).into_iter().flatten().zip(disks));
        let shares = matches.get_many::<ShareSpec>(SHARE).into_iter().flatten();
        let shares = shares.map(|spec| Device::Share(spec.clone()));
        found.extend(matches.indices_of(SHARE).into_iter().flatten().zip(shares));
        let vsock = matches.get_one::<VsockSpec>(VSOCK).cloned();
        let asked = matches.index_of(VSOCK).zip(vsock);
        found.extend(asked.map(|(at, spec)| (at, Device::Vsock(spec))));
        let consoles = matches
            .get_many::<ConsoleSpec>(CONSOLE)
            .into_iter()
            .flatten();
        let places = matches.indices_of(CONSOLE).into_iter().flatten();
        let asked = places.zip(consoles.cloned());
        let asked = asked.filter(|(_, spec)| spec.to != Serial::None);
        found.extend(asked.map(|(at, spec)| (at, Device::Console(spec))));
        let cards = matches.get_many::<Card>(NET).into_iter().flatten();
        let places = matches.indices_of(NET).into_iter().flatten();
        let asked = places.zip(cards);
        found.extend(asked.filter_map(|(at, card)| Some((at, Device::Net(card.0.clone()?)))));
        if !matches.contains_id(NET) {
            found.push((usize::MAX, Device::Net(NetConfig::default())));
        }
        let asked = matches.get_one::<BalloonSize>(BALLOON).copied();
        if let Some(bytes) = asked.map_or(BALLOON_DEFAULT, |asked| asked.0) {
            // Behind all others, whose slots do not depend on it.
            found.push((usize::MAX, Device::Balloon(bytes)));
        }
        found.sort_by_key(|(at, _)| *at);
        Ok(Devices(found.into_iter().map(|(_, d)| d).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices(arguments: &str) -> Devices {
        let command = Devices::augment_args(Command::new("test").no_binary_name(true));
        let matches = command.get_matches_from(arguments.split_whitespace());
        Devices::from_arg_matches(&matches).unwrap()
    }

    #[test]
    fn devices_keep_their_order() {
        let disk = |name: &str| Device::Disk(DiskSpec::new(name));
        let card = Device::Net(NetConfig::default());
        assert_eq!(devices(""), Devices(vec![card, Device::Balloon(0)]));
        assert_eq!(devices("--net none --balloon off"), Devices(vec![]));
        let balloon = Device::Balloon(1 << 20);
        assert_eq!(
            devices("--balloon 1M --net none --rng"),
            Devices(vec![Device::Rng, balloon])
        );
        let all = devices("--disk a --net none --balloon off --rng --disk b");
        assert_eq!(all, Devices(vec![disk("a"), Device::Rng, disk("b")]));
        let console = |to, at_once| Device::Console(ConsoleSpec { to, at_once });
        assert_eq!(
            devices(
                "--console stdio --rng --net none --balloon off --console none --console file=a,b,at-once=off"
            ),
            Devices(vec![
                console(Serial::Stdio, true),
                Device::Rng,
                console(Serial::File("a,b".into()), false)
            ])
        );
        let all_options = devices("--rng --vsock a,b,cid=17 --net none --balloon off");
        let spec = VsockSpec {
            path: "a,b".into(),
            cid: 17,
        };
        assert_eq!(all_options, Devices(vec![Device::Rng, Device::Vsock(spec)]));
        for text in ["a,cid=2", "a,cid=x", ",cid=3", "", "a,cid=4294967295"] {
            assert!(vsock(text).is_err(), "{text}");
        }
        let names: Vec<_> = all.disks().map(|spec| spec.path.clone()).collect();
        assert_eq!(names, ["a", "b"].map(std::path::PathBuf::from));
    }
}
