//! The way in, from the command line: `doppel run`, the process of a disk, and `--print-sandbox`, which goes no further.

use super::calls::of_network;
use super::{Enforced, Need, Place, Plan, filters, needs, permitted};
use crate::args::{Run, Serial};
use crate::domain::{Domain, OpenFile};
use anyhow::{Result, bail};
use doppel_machine::NetConfig;
use doppel_machine::net::{Network, make_switch_folder};
use doppel_seccomp::{Kind, SeccompError};
use std::fs::File;
use std::path::PathBuf;

/// What comes before the first process of the machine.
///
/// # Errors
/// The kernel has Landlock but refuses the rules.
pub fn begin() -> Result<()> {
    super::give_up_privileges();
    // What a kernel lacks, `enter` tells.
    super::keep_apart().map(drop)
}

/// Confines this thread, and so all that it starts; `boot` is read at each boot of the machine, `disks` when a disk's process is
/// started anew.
///
/// # Errors
/// The kernel has Landlock or seccomp but refuses the rules.
pub fn enter(args: &Run, boot: &[PathBuf], disks: &[OpenFile]) -> Result<()> {
    make_what_is_written(args);
    let enforced = super::confine(&Plan::new(args, boot, disks))?;
    if enforced == Enforced::None {
        eprintln!("doppel: sandbox: {enforced}");
    }
    if !filter(Kind::Control, &needs(args))? {
        eprintln!("doppel: sandbox: {NO_FILTERS}");
    }
    Ok(())
}

/// Confines the process of a disk, which has all open that it needs.
///
/// # Errors
/// As for [`enter`].
pub fn enter_disk_process() -> Result<()> {
    begin()?;
    super::confine(&Plan::default())?;
    filter(Kind::DiskServer, &[Need::Always]).map(drop)
}

/// Confines the process of a card's network, which is open.
///
/// # Errors
/// As for [`enter`].
pub fn enter_network_process(card: &NetConfig) -> Result<()> {
    begin()?;
    super::confine(&Plan::of_network(card))?;
    let needs = [Need::Always, of_network(card, Place::Apart)];
    filter(Kind::NetServer, &needs).map(drop)
}

const NO_FILTERS: &str =
    "no seccomp: this kernel has none, so that threads may make every system call";

/// False where the kernel has no filters.
fn filter(kind: Kind, needs: &[Need]) -> Result<bool> {
    match filters(needs)?.confine(kind) {
        Ok(()) => Ok(true),
        Err(SeccompError::Unsupported) => Ok(false),
        Err(error) => bail!("{error}; --sandbox off does without"),
    }
}

/// Landlock knows files that are there. What cannot be made is told of by who opens it.
fn make_what_is_written(args: &Run) {
    let consoles = args.devices.consoles().map(|spec| &spec.to);
    for to in consoles.chain([&args.serial()]) {
        if let Serial::File(path) = to {
            let _ = File::create_new(path);
        }
    }
    for card in args.devices.cards() {
        if let Network::Switch(name) = &card.network {
            let _ = make_switch_folder(name);
        }
    }
}

/// `--print-sandbox`: what holds for a machine of these options.
///
/// # Errors
/// As for [`enter`].
pub fn print(args: &Run) -> Result<u8> {
    if !args.sandbox {
        println!("no sandbox (--sandbox off)");
        return Ok(0);
    }
    begin()?;
    let given = [&args.kernel, &args.initrd].into_iter().flatten();
    let disks = args.devices.disks().map(|spec| OpenFile {
        path: spec.path.clone(),
        writable: !spec.read_only,
    });
    let disks: Vec<_> = match args.driver_domain.contains(&Domain::Disk) {
        true => disks.collect(),
        false => Vec::new(),
    };
    let plan = Plan::new(args, &given.cloned().collect::<Vec<_>>(), &disks);
    let enforced = super::confine(&plan)?;
    print!("{}", super::describe(&plan, enforced));
    let needs = needs(args);
    match filter(Kind::Control, &needs)? {
        true => print!("{}", describe_filters(&needs, !disks.is_empty())),
        false => println!("{NO_FILTERS}"),
    }
    Ok(0)
}

/// A line for each kind of thread.
fn describe_filters(needs: &[Need], disks_apart: bool) -> String {
    let mut text = "seccomp: these system calls and no others\n".to_owned();
    let apart = [Need::Inet, Need::Unix, Need::Tap].map(|need| need(Place::Apart));
    let networks_apart = needs.iter().any(|need| apart.contains(need));
    let there = |kind: &Kind| match kind {
        Kind::Supervisor => disks_apart || networks_apart,
        Kind::DiskServer => disks_apart,
        Kind::NetServer => networks_apart,
        Kind::Zygote => needs.contains(&Need::Programs),
        Kind::Share => needs.contains(&Need::Share),
        _ => true,
    };
    for kind in Kind::ALL.into_iter().filter(there) {
        let needs = match kind {
            Kind::DiskServer => &[Need::Always],
            _ => needs,
        };
        let calls: Vec<_> = permitted(kind, needs)
            .into_iter()
            .map(|(call, tests)| match tests.is_empty() {
                true => call.name().to_owned(),
                false => format!("{}(*)", call.name()),
            })
            .collect();
        text += &format!("  {} ({}): {}\n", kind.name(), calls.len(), calls.join(" "));
    }
    text + "  (*) with some arguments only\n"
}
