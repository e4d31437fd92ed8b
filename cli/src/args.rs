//! The command line.

use crate::devices::{Devices, parse_transport};
use crate::domain::{Backend, Domain};
use crate::image::args::Image;
use crate::size;
use clap::{ArgAction, Args, Parser, Subcommand};
use doppel_machine::{
    Backing, CpuChoice, DirectOptions, EngineChoice, Switch, TranslateOptions, VirtioTransport,
};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

const EXIT_STATUS: &str = "\
Exit status:
  0  the guest powered off or halted, or was left by the escape key (Ctrl-A x)
  1  an error of the host or of usage, or a signal ended the machine
  2  the guest died: triple fault, kernel panic
  (v << 1) | 1  the guest wrote v to the debug-exit port";

/// Runs unmodified operating systems in virtual machines, with or without hardware virtualization.
#[derive(Debug, Parser)]
#[command(name = "doppel", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine in this process until it ends. Of an option given twice, the last counts.
    #[command(after_help = EXIT_STATUS, args_override_self = true)]
    Run(Run),
    /// Show guest code and its translation side by side, with reasons: the hottest blocks of a run, or any bytes.
    #[command(after_help = EXIT_STATUS)]
    Explain(Explain),
    /// Assemble the default guest, or one of another Debian kernel, and print its files.
    Guest(Guest),
    /// Make, show and copy images of disks; build one that boots Debian.
    #[command(subcommand)]
    Image(Image),
    /// Serve a disk to the monitor that started this process, through standard input.
    #[command(hide = true, name = crate::domain::COMMAND)]
    Backend(Backend),
    /// Wait for the parent to die and give the terminal its settings back.
    #[command(hide = true, name = crate::terminal::WATCHDOG)]
    Watchdog,
}

#[derive(Clone, Debug, Args)]
pub struct Run {
    /// What executes the guest's instructions: interpret, translate, direct, kvm, or auto, the fastest that works here.
    #[arg(long, value_name = "ENGINE", default_value = "auto", value_parser = str::parse::<EngineChoice>)]
    pub engine: EngineChoice,
    /// The processor that the guest sees: host (the host's, without what does not work here), or x86-64-v1 to x86-64-v4, the levels of the psABI,
    /// which are the same on every host that can carry them. host,+pku has protection keys for user pages as well, which keep user code that may
    /// use them from the processor; host,+la57 5-level paging; host,+monitor MONITOR and MWAIT; host,+pmu
    /// performance counters.
    #[arg(long, value_name = "MODEL[,+FEATURE]", default_value = "host", value_parser = str::parse::<CpuChoice>)]
    pub cpu: CpuChoice,
    /// Number of processors.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub cpus: u32,
    /// Size of the guest's memory, with suffix K, M, G or T; only what the guest touches costs host memory.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = size::parse)]
    pub memory: u64,
    /// What guest memory is made of on the host: anonymous, huge (pages of 2 MiB where there are any) or memfd (what direct needs);
    /// by default what serves the engine best.
    #[arg(long, value_name = "WHAT", value_parser = parse_backing)]
    pub memory_backing: Option<Backing>,
    /// Whether a thread asks the host for memory that the guest is likely to touch next: on or off.
    #[arg(long, value_name = "on|off", default_value = "on", action = ArgAction::Set, value_parser = on_or_off)]
    pub memory_ahead: bool,
    /// Kernel: a bzImage, an ELF file with a PVH entry, or one with a Multiboot header. Without one and without a disk, the default guest.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk; without --kernel it takes the place of the disk's or the default guest's.
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// A module for a kernel that takes them (PVH, Multiboot), after the initial RAM disk, with its command line: "FILE[ WORDS]".
    #[arg(long, value_name = "FILE[ WORDS]", value_parser = module)]
    pub module: Vec<(PathBuf, String)>,
    /// The kernel's command line: "console=ttyS0" unless given, nothing for a Multiboot kernel, or what the disk says.
    #[arg(long, value_name = "STRING")]
    pub cmdline: Option<String>,
    /// Added to the kernel's command line, whatever it is.
    #[arg(long, value_name = "STRING", default_value = "")]
    pub append: String,
    /// Where the first serial port leads: stdio, none or file=PATH; stdio unless a console does.
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<Serial>,
    #[command(flatten)]
    pub devices: Devices,
    /// Back-ends in processes of their own, whose crash the guest outlives: disk (guest memory is a memfd then), net, or both.
    #[arg(long, value_name = "WHAT,...", value_delimiter = ',', value_parser = str::parse::<Domain>)]
    pub driver_domain: Vec<Domain>,
    /// How the guest reaches its virtio devices: pci, or mmio for a guest without PCI.
    #[arg(long, value_name = "HOW", default_value = "pci", value_parser = parse_transport)]
    pub virtio: VirtioTransport,
    /// Whether the monitor gives up, before the guest starts, what it does not need of the host: on or off.
    #[arg(long, value_name = "on|off", default_value = "on", action = ArgAction::Set, value_parser = on_or_off)]
    pub sandbox: bool,
    /// Enter the sandbox that the other options ask for, say what is in force there, and end.
    #[arg(long)]
    pub print_sandbox: bool,
    /// End (with status 0) when the guest asks for a reboot, instead of rebooting it.
    #[arg(long)]
    pub no_reboot: bool,
    /// A write of v to I/O port 0xf4 ends the machine with status (v << 1) | 1.
    #[arg(long)]
    pub debug_exit: bool,
    /// QEMU's devices for programs that test a processor: isa-debug-exit (as --debug-exit), pc-testdev and fw_cfg.
    #[arg(long)]
    pub test_devices: bool,
    /// Write counters to this file at the end, as JSON.
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
    /// With --stats: translated code counts its blocks and instructions too, and time is measured; the machine is slower for it.
    #[arg(long, requires = "stats")]
    pub count_code: bool,
    /// Translate only the first N blocks and interpret the others, to find a bad translation by halving.
    #[arg(long, value_name = "N")]
    pub translate_limit: Option<u64>,
    /// When the engine direct has the processor run user code: where that is faster, or always (for tests). With ",unpatched" pages of code in which
    /// an instruction stands that would tell of the host are translated, always.
    #[arg(long, value_name = "WHEN[,unpatched]", default_value = "faster", value_parser = parse_direct)]
    pub direct: DirectOptions,
    /// Bound of the translated code that is kept and of the records of it, with suffix K, M or G: from 256K to 1G.
    #[arg(long, value_name = "SIZE", default_value = "96M", value_parser = code_cache)]
    pub code_cache: u64,
    #[arg(long, value_name = "NAME,...", value_delimiter = ',', value_parser = switch, help = switches_help())]
    pub translate_without: Vec<&'static str>,
    /// Write /tmp/perf-PID.map, in which perf finds names for translated code.
    #[arg(long)]
    pub perf_map: bool,
    /// Names of the guest kernel's addresses: its System.map, or what root reads in its /proc/kallsyms.
    #[arg(long, value_name = "FILE")]
    pub symbols: Option<PathBuf>,
}

/// Without --bytes it takes the options of `run`, runs the guest likewise, and shows blocks when it has ended.
#[derive(Clone, Debug, Args)]
pub struct Explain {
    /// Show the N blocks that executed the most instructions; 10 unless something else is asked for.
    #[arg(long, value_name = "N")]
    pub hottest: Option<usize>,
    /// Show the blocks that ran with code at this linear address (hexadecimal) or symbol.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "hottest")]
    pub at: Option<String>,
    /// End the guest after so many seconds.
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub seconds: Option<Duration>,
    /// No guest: show these bytes of code (hexadecimal).
    #[arg(long, value_name = "HEX", value_parser = bytes, conflicts_with_all = ["hottest", "at", "seconds"])]
    pub bytes: Option<Code>,
    /// The privilege that the bytes run with: 0 or 3.
    #[arg(long, value_name = "CPL", requires = "bytes", default_value_t = 0, value_parser = cpl)]
    pub cpl: u8,
    /// The linear address at which they stand (hexadecimal).
    #[arg(long, value_name = "ADDRESS", requires = "bytes", default_value = "1000", value_parser = address)]
    pub address: u64,
    /// Write the listing to this file, not to standard output.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// How to run the guest.
    #[command(flatten)]
    pub run: Run,
}

fn code_cache(text: &str) -> Result<u64, String> {
    let range = 256 << 10..=1 << 30;
    let bytes = size::parse(text)?;
    let fits = range.contains(&bytes).then_some(bytes);
    fits.ok_or_else(|| "the code cache takes 256K to 1G".to_owned())
}

fn switch_names() -> String {
    let names: Vec<_> = TranslateOptions::SWITCHES.iter().map(|s| s.name).collect();
    names.join(", ")
}

fn switches_help() -> String {
    let what =
        "Turn accelerators of the translator off, to find which of them is wrong or what it gains";
    format!("{what}: {}", switch_names())
}

fn switch(name: &str) -> Result<&'static str, String> {
    match Switch::named(name) {
        Some(switch) => Ok(switch.name),
        None => Err(format!("the accelerators are {}", switch_names())),
    }
}

/// Bytes of machine code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code(pub Vec<u8>);

fn bytes(text: &str) -> Result<Code, String> {
    let digits: String = text.split_whitespace().collect();
    let byte = |at: usize| {
        let pair = digits.get(at..at + 2)?;
        let pair = Some(pair).filter(|p| !p.contains('+'))?;
        u8::from_str_radix(pair, 16).ok()
    };
    let bytes: Option<Vec<_>> = (0..digits.len()).step_by(2).map(byte).collect();
    bytes
        .map(Code)
        .ok_or_else(|| "write pairs of hexadecimal digits, as in '48 8b 03'".to_owned())
}

/// A linear address in hexadecimal, with or without 0x.
pub fn address(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    u64::from_str_radix(digits, 16).map_err(|_| "write an address in hexadecimal".to_owned())
}

fn cpl(text: &str) -> Result<u8, String> {
    match text {
        "0" => Ok(0),
        "3" => Ok(3),
        _ => Err("write 0 or 3".to_owned()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: Option<f64> = text.parse().ok();
    seconds
        .and_then(|s| Duration::try_from_secs_f64(s).ok())
        .ok_or_else(|| "write a number of seconds".to_owned())
}

#[derive(Clone, Debug, Args)]
pub struct Guest {
    /// The Debian package that has the kernel.
    #[arg(long, default_value = crate::guest::KERNEL_PACKAGE)]
    pub package: String,
    /// Write an initial RAM disk that runs this script instead of a shell (needs --output).
    #[arg(long, value_name = "FILE", requires = "output")]
    pub script: Option<PathBuf>,
    /// Where to write it.
    #[arg(long, value_name = "FILE", requires = "script")]
    pub output: Option<PathBuf>,
}

impl Run {
    /// Where the first serial port leads.
    pub fn serial(&self) -> Serial {
        let given = self.serial.clone();
        given.unwrap_or(match self.devices.has_console_on_stdio() {
            true => Serial::None,
            false => Serial::Stdio,
        })
    }
}

fn module(text: &str) -> Result<(PathBuf, String), String> {
    let (file, words) = text.split_once(' ').unwrap_or((text, ""));
    match file {
        "" => Err("it begins with the name of a file".to_owned()),
        _ => Ok((file.into(), words.trim().to_owned())),
    }
}

pub(crate) fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("it is on or off".to_owned()),
    }
}

fn parse_backing(text: &str) -> Result<Backing, String> {
    match text {
        "anonymous" => Ok(Backing::Anonymous),
        "huge" => Ok(Backing::HugePages),
        "memfd" => Ok(Backing::Memfd),
        _ => Err("write anonymous, huge or memfd".to_owned()),
    }
}

fn parse_direct(text: &str) -> Result<DirectOptions, String> {
    let (when, unpatched) = match text.split_once(',') {
        None => (text, false),
        Some((when, "unpatched")) => (when, true),
        Some(_) => ("", false),
    };
    let always = match when {
        "faster" => false,
        "always" => true,
        _ => return Err("write faster or always, and ,unpatched behind it if wanted".to_owned()),
    };
    Ok(DirectOptions { always, unpatched })
}

/// Where a serial port or a console leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    /// Standard input and output.
    Stdio,
    /// Nowhere.
    None,
    /// Output to a file, made or emptied; no input.
    File(PathBuf),
}

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Serial, String> {
        match (text, text.strip_prefix("file=")) {
            ("stdio", _) => Ok(Serial::Stdio),
            ("none", _) => Ok(Serial::None),
            (_, Some(path)) if !path.is_empty() => Ok(Serial::File(path.into())),
            _ => Err("write stdio, none or file=PATH".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use doppel_machine::MachineConfig;

    fn run(arguments: &str) -> Result<Run, clap::Error> {
        let words = ["doppel", "run"]
            .into_iter()
            .chain(arguments.split_whitespace());
        Cli::try_parse_from(words).map(|cli| match cli.command {
            Command::Run(run) => run,
            other => panic!("{other:?}"),
        })
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_has_a_default() {
        let run = run("").unwrap();
        assert_eq!(run.engine, EngineChoice::Auto);
        assert_eq!((run.cpus, run.memory), (1, MachineConfig::MEMORY));
        assert_eq!((run.memory_backing, run.driver_domain.len()), (None, 0));
        assert_eq!(run.serial(), Serial::Stdio);
        assert!(run.kernel.is_none() && !run.no_reboot && !run.debug_exit);
    }

    #[test]
    fn every_flag_of_the_contract_is_taken() {
        let run = run(
            "--engine translate --cpus 2 --memory 1G --kernel K --initrd I --cmdline quiet --serial file=F \
             --no-reboot --debug-exit --stats S.json --translate-limit 17",
        )
        .unwrap();
        assert_eq!(run.engine, EngineChoice::Translate);
        assert_eq!(run.serial(), Serial::File("F".into()));
        assert_eq!(run.translate_limit, Some(17));
        assert!(run.no_reboot && run.debug_exit);
    }

    #[test]
    fn of_an_option_given_twice_the_last_counts_and_devices_add_up() {
        let run = run("--memory 2G --disk A --memory 3G --disk B").unwrap();
        assert_eq!((run.memory, run.devices.disks().count()), (3 << 30, 2));
    }

    #[test]
    fn a_bad_value_is_refused_with_what_to_write() {
        let message = run("--memory lots").unwrap_err().to_string();
        assert!(message.contains("512M"), "{message}");
        let message = run("--serial tcp").unwrap_err().to_string();
        assert!(message.contains("file=PATH"), "{message}");
        assert!(run("--engine magic").is_err());
        let message = run("--memory-backing disk").unwrap_err().to_string();
        assert!(message.contains("memfd"), "{message}");
    }

    #[test]
    fn a_console_takes_the_terminal_from_the_serial_port() {
        let serial = |arguments| run(arguments).unwrap().serial();
        assert_eq!(serial("--console stdio"), Serial::None);
        assert_eq!(serial("--console file=F"), Serial::Stdio);
        assert_eq!(
            serial("--console stdio --serial file=F"),
            Serial::File("F".into())
        );
    }

    #[test]
    fn code_is_written_in_hexadecimal() {
        assert_eq!(bytes("48 8b03\n90"), Ok(Code(vec![0x48, 0x8b, 0x03, 0x90])));
        for text in ["4", "4g", "é1", "48 8", "+1"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
