//! Virtio devices on the command line: options of several kinds, in the order in which they were written.

use std::sync::Arc;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};
use doppel_machine::DeviceConfig;
use doppel_machine::block::{BlockBackend, DiskSpec};

const RNG: &str = "rng";
const DISK: &str = "disk";

/// The devices that were asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices(Vec<Device>);

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Device {
    Rng,
    Disk(DiskSpec),
}

impl Devices {
    /// The disks among them.
    pub fn disks(&self) -> impl Iterator<Item = &DiskSpec> {
        self.0.iter().filter_map(|device| match device {
            Device::Disk(spec) => Some(spec),
            _ => None,
        })
    }

    /// What the machine is to have; `disks` are the open images of [`Devices::disks`].
    pub fn configurations(&self, disks: &[Arc<dyn BlockBackend>]) -> Vec<DeviceConfig> {
        let mut disks = disks.iter().cloned().enumerate();
        let configuration = |device: &Device| match device {
            Device::Rng => Some(DeviceConfig::Rng),
            Device::Disk(_) => disks.next().map(|(n, backend)| DeviceConfig::Disk {
                backend,
                serial: format!("disk{n}"),
            }),
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
        assert_eq!(devices(""), Devices(vec![]));
        let all = devices("--disk a --rng --disk b");
        assert_eq!(all, Devices(vec![disk("a"), Device::Rng, disk("b")]));
        let names: Vec<_> = all.disks().map(|spec| spec.path.clone()).collect();
        assert_eq!(names, ["a", "b"].map(std::path::PathBuf::from));
    }
}
