//! `cargo xtask hostile`: the campaigns of SECURITY.md's doors, each for about as long as one likes.

use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

/// Which, and for how long.
#[derive(Args)]
pub struct Hostile {
    /// For each door, about, on a processor of 2021.
    #[arg(long, default_value_t = 1)]
    minutes: u64,
    /// What random numbers start from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// One door alone.
    #[arg(long)]
    door: Option<String>,
}

/// How a campaign is started.
enum Form {
    /// A test that takes its length and its seed from the environment: file, name, the variables, the length that takes a minute.
    Test {
        file: Option<&'static str>,
        name: &'static str,
        length: &'static str,
        seed: &'static str,
        a_minute: u64,
    },
    /// A program that takes seconds and a seed.
    Program(fn(seconds: u64, seed: u64) -> Vec<String>),
}

struct Door {
    name: &'static str,
    package: &'static str,
    form: Form,
}

const fn test(
    name: &'static str,
    package: &'static str,
    (file, test): (Option<&'static str>, &'static str),
    (length, seed): (&'static str, &'static str),
    a_minute: u64,
) -> Door {
    let form = Form::Test {
        file,
        name: test,
        length,
        seed,
        a_minute,
    };
    Door {
        name,
        package,
        form,
    }
}

const fn program(
    name: &'static str,
    package: &'static str,
    arguments: fn(u64, u64) -> Vec<String>,
) -> Door {
    Door {
        name,
        package,
        form: Form::Program(arguments),
    }
}

const DOORS: &[Door] = &[
    test(
        "walk",
        "doppel-memory",
        (Some("hostile"), "random_page_tables"),
        ("DOPPEL_WALK_ROUNDS", "DOPPEL_WALK_SEED"),
        150_000,
    ),
    test(
        "registers",
        "doppel-machine",
        (None, "hostile_register_accesses"),
        ("DOPPEL_BUS_ACCESSES", "DOPPEL_BUS_SEED"),
        20_000_000,
    ),
    test(
        "boot",
        "doppel-machine",
        (None, "damaged_kernels"),
        ("DOPPEL_BOOT_FUZZ", "DOPPEL_BOOT_SEED"),
        20_000,
    ),
    test(
        "images",
        "doppel-block",
        (Some("hostile"), "damaged"),
        ("DOPPEL_DISK_FUZZ", "DOPPEL_DISK_SEED"),
        20_000,
    ),
    test(
        "boot-disks",
        "doppel-bootdisk",
        (Some("find"), "damaged_disks"),
        ("DOPPEL_DISK_FUZZ", "DOPPEL_DISK_SEED"),
        20_000,
    ),
    test(
        "disk-process",
        "doppel-block",
        (Some("messages"), "takes_any"),
        ("DOPPEL_DISK_MESSAGES", "DOPPEL_DISK_SEED"),
        60_000,
    ),
    test(
        "frames",
        "doppel-net",
        (Some("hostile"), "damaged_frames"),
        ("DOPPEL_NET_FRAMES", "DOPPEL_NET_SEED"),
        10_000_000,
    ),
    test(
        "net-rings",
        "doppel-virtio",
        (Some("net"), "hostile"),
        ("DOPPEL_NET_RINGS", "DOPPEL_NET_SEED"),
        30_000,
    ),
    test(
        "share",
        "doppel-share",
        (Some("hostile"), "whatever"),
        ("DOPPEL_SHARE_REQUESTS", "DOPPEL_SHARE_SEED"),
        1_000_000,
    ),
    program("rings", "doppel-virtio", |seconds, seed| {
        let words = ["--example", "hostile", "--", "--seconds"].map(str::to_owned);
        let numbers = [seconds.to_string(), "--seed".to_owned(), seed.to_string()];
        words.into_iter().chain(numbers).collect()
    }),
    program("guests", "doppel-conformance", |seconds, seed| {
        vec!["--".to_owned(), seconds.to_string(), seed.to_string()]
    }),
    program("user-code", "doppel-fuzz", |seconds, seed| {
        let seconds = ["--".to_owned(), "--seconds".to_owned(), seconds.to_string()];
        let seed = ["--seed".to_owned(), seed.to_string()];
        seconds.into_iter().chain(seed).collect()
    }),
];

/// Runs them one after the other, and says which failed.
pub fn hostile(cargo: &str, root: &Path, args: &Hostile) -> Result<()> {
    let named = |door: &&Door| args.door.as_ref().is_none_or(|name| *name == door.name);
    let doors: Vec<_> = DOORS.iter().filter(named).collect();
    if doors.is_empty() {
        let names: Vec<_> = DOORS.iter().map(|door| door.name).collect();
        bail!("--door: one of {}", names.join(", "));
    }
    let mut failed = Vec::new();
    for door in doors {
        let start = Instant::now();
        let status = command(cargo, door, args)
            .current_dir(root)
            .status()
            .context("running cargo")?;
        let took = start.elapsed().as_secs();
        println!("hostile: {}: {status}, {took} s", door.name);
        if !status.success() {
            failed.push(door.name);
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("hostile: failed: {}", failed.join(", ")),
    }
}

fn command(cargo: &str, door: &Door, args: &Hostile) -> Command {
    let mut command = Command::new(cargo);
    match &door.form {
        Form::Test {
            file,
            name,
            length,
            seed,
            a_minute,
        } => {
            command.args(["test", "--release", "--package", door.package]);
            match file {
                Some(file) => command.args(["--test", file]),
                None => command.arg("--lib"),
            };
            command.args([name, "--", "--nocapture"]);
            command.env(length, (a_minute * args.minutes).to_string());
            command.env(seed, args.seed.to_string());
        }
        Form::Program(arguments) => {
            command.args(["run", "--release", "--quiet", "--package", door.package]);
            command.args(arguments(60 * args.minutes, args.seed));
        }
    }
    command
}
