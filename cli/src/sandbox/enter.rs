//! The way in, from the command line: `doppel run`, and `--print-sandbox`, which goes no further.

use super::{Enforced, Plan};
use crate::args::{Run, Serial};
use anyhow::Result;
use doppel_machine::NetConfig;
use doppel_machine::net::{Network, switch_root};
use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::PathBuf;

/// Confines this thread, and so all that it starts; `boot` is read at each boot of the machine.
/// A disk's process has files of its own, which would have to be known here: with one, only privileges are given up.
///
/// # Errors
/// The kernel has Landlock but refuses the rules.
pub fn enter(args: &Run, boot: &[PathBuf]) -> Result<()> {
    super::give_up_privileges();
    if !args.driver_domain.is_empty() {
        eprintln!("doppel: sandbox: with --driver-domain, no Landlock in this version");
        return Ok(());
    }
    make_what_is_written(args);
    let enforced = super::confine(&Plan::new(args, boot))?;
    if enforced == Enforced::None {
        eprintln!("doppel: sandbox: {enforced}");
    }
    Ok(())
}

/// Landlock knows files that are there. What cannot be made is told of by who opens it.
fn make_what_is_written(args: &Run) {
    let consoles = args.devices.consoles().map(|spec| &spec.to);
    for to in consoles.chain([&args.serial()]) {
        if let Serial::File(path) = to {
            let _ = File::create_new(path);
        }
    }
    let switch = |card: &NetConfig| matches!(card.network, Network::Switch(_));
    if args.devices.cards().any(switch) {
        let _ = DirBuilder::new().mode(0o700).create(switch_root());
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
    super::give_up_privileges();
    if !args.driver_domain.is_empty() {
        println!(
            "every thread and process: no new privileges, no core file; no Landlock with --driver-domain"
        );
        return Ok(0);
    }
    let given = [&args.kernel, &args.initrd].into_iter().flatten();
    let plan = Plan::new(args, &given.cloned().collect::<Vec<_>>());
    let enforced = super::confine(&plan)?;
    print!("{}", super::describe(&plan, enforced));
    Ok(0)
}
