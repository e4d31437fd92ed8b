//! Virtio devices on the command line: options of several kinds, in the order in which they were written.

use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, parser::ValueSource};
use doppel_machine::DeviceConfig;

const RNG: &str = "rng";

/// The devices that were asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices(Vec<Device>);

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Device {
    Rng,
}

impl Devices {
    /// What the machine is to have.
    pub fn configurations(&self) -> Vec<DeviceConfig> {
        let configuration = |device: &Device| match device {
            Device::Rng => DeviceConfig::Rng,
        };
        self.0.iter().map(configuration).collect()
    }
}

impl Args for Devices {
    fn augment_args(command: Command) -> Command {
        command.arg(
            Arg::new(RNG)
                .long(RNG)
                .action(ArgAction::SetTrue)
                .help("A virtio entropy device, fed by the host's random number generator"),
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
        found.sort_by_key(|(at, _)| *at);
        Ok(Devices(found.into_iter().map(|(_, d)| d).collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}
