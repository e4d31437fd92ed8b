//! `cargo xtask debian`: a Debian is built, booted from its disk, used, killed, upgraded, measured and looked at from outside.

mod boots;
mod fio;
mod idle;
mod kills;
mod lab;
mod processors;
mod ssh;
mod work;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};
use std::path::Path;
use std::time::Duration;

pub use lab::{Lab, Start};
pub use ssh::Ssh;

#[derive(Args)]
pub struct Debian {
    /// Which release.
    #[arg(long, default_value = "bookworm")]
    release: String,
    /// What is done, in this order.
    #[arg(long, value_name = "PART,...", value_delimiter = ',', default_values_t = [Part::Boots, Part::Upgrade, Part::Ssh, Part::Kills])]
    only: Vec<Part>,
    /// How often, for boots, fio, work and processors; in turn with QEMU if that is wanted.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Compare with qemu-system-x86_64 -accel tcg -cpu max.
    #[arg(long)]
    qemu: bool,
    /// Rounds of SIGKILL while the guest writes and syncs.
    #[arg(long, default_value_t = 5)]
    kills: usize,
    /// What is killed: doppel or qemu.
    #[arg(long, default_value = "doppel")]
    killed: String,
    /// The engines that are reached by ssh.
    #[arg(long, value_name = "ENGINE,...", value_delimiter = ',', default_values_t = ["translate", "direct", "kvm", "interpret"].map(str::to_owned))]
    engines: Vec<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Boots to the login prompt.
    Boots,
    /// A kernel upgrade that takes effect.
    Upgrade,
    /// On each engine: a login by key through a forwarded port, a package installed, an end, a clean disk.
    Ssh,
    /// SIGKILL of the monitor while the guest writes.
    Kills,
    /// Disk throughput by fio, raw and qcow2, beside the host's own.
    Fio,
    /// apt-get install of a compiler and what it needs, then make -j2 with it.
    Work,
    /// Two programs that compute, on one processor and on two.
    Processors,
    /// Processor time and memory of an idle guest.
    Idle,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("", |v| v.get_name()))
    }
}

/// A boot is slower than this only where something is wrong.
const BOOT: Duration = Duration::from_secs(180);
const STEP: Duration = Duration::from_secs(120);
/// Makes the shell at the console one that only answers.
const QUIET: &str = "stty -echo; PS1=; bind \"set enable-bracketed-paste off\"";

/// Does so.
pub fn debian(root: &Path, args: &Debian) -> Result<()> {
    ensure!(args.rounds > 0, "--rounds: at least one");
    let lab = Lab::new(root, &args.release)?;
    let monitors: &[&str] = match args.qemu {
        true => &["qemu", "doppel"],
        false => &["doppel"],
    };
    for part in &args.only {
        match part {
            Part::Boots => boots::boots(&lab, args.rounds, args.qemu)?,
            Part::Upgrade => boots::upgrade(&lab)?,
            Part::Ssh => ssh::engines(&lab, &args.engines)?,
            Part::Kills => kills::kills(&lab, args.kills, &args.killed)?,
            Part::Fio => fio::compare(&lab, args.rounds, monitors)?,
            Part::Work => work::work(&lab, args.rounds, monitors)?,
            Part::Processors => processors::processors(&lab, args.rounds)?,
            Part::Idle => idle::idle(&lab)?,
        }
    }
    Ok(())
}

/// The least of some numbers.
fn least(of: &[f64]) -> f64 {
    of.iter().copied().fold(f64::INFINITY, f64::min)
}

/// The middle one of some numbers.
fn median(of: &[f64]) -> f64 {
    let mut sorted = of.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
