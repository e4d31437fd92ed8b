//! Virtio devices on the command line: options of several kinds, in the order in which they were written.

use std::sync::Arc;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use doppel_machine::block::{BlockBackend, DiskSpec};
use doppel_machine::share::{Share, ShareSpec};
use doppel_machine::{DeviceConfig, NetConfig, VirtioTransport};

const RNG: &str = "rng";
const DISK: &str = "disk";
const NET: &str = "net";
const SHARE: &str = "share";
const NO_NET: &str = "none";

const NET_HELP: &str = "\
A network card, plugged into: user (a network of its own that reaches the host's, with \
[,hostfwd=tcp|udp:[ADDRESS]:PORT-[ADDRESS]:PORT]... [,restrict] [,dns=ADDRESS[:PORT]]... [,mtu=N]), switch=NAME (shared with other \
machines of yours), tap=NAME (a tap device); each with [,mac=MAC] [,at-once=on|off]; or none. \
One that is plugged into \"user\" where nothing is said";

const SHARE_HELP: &str = "\
A directory of the host, which the guest mounts by its tag (mount -t virtiofs TAG /mnt): \
TAG=DIR[,ro][,owner=UID[:GID]]; what is yours is the owner's to the guest, root's where nothing is said";

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

    /// What the machine is to have; `disks` are the open images of [`Devices::disks`], `shares` those of [`Devices::shares`].
    pub fn configurations(
        &self,
        disks: &[Arc<dyn BlockBackend>],
        shares: &[Arc<Share>],
    ) -> Vec<DeviceConfig> {
        let mut disks = disks.iter().cloned().enumerate();
        let mut shares = shares.iter().cloned();
        let configuration = |device: &Device| match device {
            Device::Rng => Some(DeviceConfig::Rng),
            Device::Disk(_) => disks.next().map(|(n, backend)| DeviceConfig::Disk {
                backend,
                serial: format!("disk{n}"),
            }),
            Device::Net(config) => Some(DeviceConfig::Net(config.clone())),
            Device::Share(_) => shares.next().map(DeviceConfig::Share),
        };
        self.0.iter().filter_map(configuration).collect()
    }
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
        let cards = matches.get_many::<Card>(NET).into_iter().flatten();
        let places = matches.indices_of(NET).into_iter().flatten();
        let asked = places.zip(cards);
        found.extend(asked.filter_map(|(at, card)| Some((at, Device::Net(card.0.clone()?)))));
        if !matches.contains_id(NET) {
            found.push((usize::MAX, Device::Net(NetConfig::default())));
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
        assert_eq!(devices(""), Devices(vec![card]));
        assert_eq!(devices("--net none"), Devices(vec![]));
        let all = devices("--disk a --net none --rng --disk b");
        assert_eq!(all, Devices(vec![disk("a"), Device::Rng, disk("b")]));
        let names: Vec<_> = all.disks().map(|spec| spec.path.clone()).collect();
        assert_eq!(names, ["a", "b"].map(std::path::PathBuf::from));
    }
}
