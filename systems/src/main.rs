//! `cargo xtask boots --systems`: real operating systems, each booted in Doppel, and in QEMU's TCG beside it, until it has passed a check.
//!
//! `table` says which and what they must say, `parts` makes files of packages, `monitor` makes commands, `watch` runs one,
//! `report` shows what came out. A system whose parts cannot be had is skipped aloud; one that does not pass in Doppel is a failure.

mod monitor;
mod parts;
mod report;
mod table;
mod watch;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use monitor::Monitor;
use parts::{Machine, Workshop};
use report::{Outcome, Report, Row};
use std::fs;
use std::path::{Path, PathBuf};
use table::{SYSTEMS, System};

/// Boots real operating systems, and tells how long they take.
#[derive(Parser)]
#[command(name = "cargo xtask boots --systems")]
struct Args {
    /// Only this system, or one of its rows (686-pae/2); may be given several times. `--list` names them.
    #[arg(long, value_name = "SYSTEM[/CPUS]")]
    only: Vec<String>,
    /// Name the rows.
    #[arg(long)]
    list: bool,
    /// How often each is booted, in turns; the least time counts.
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Which of Doppel's engines.
    #[arg(long, default_value = "auto")]
    engine: String,
    /// Without QEMU.
    #[arg(long)]
    no_qemu: bool,
    /// Seconds after which a boot has failed, instead of the row's own number.
    #[arg(long)]
    timeout: Option<u64>,
    /// Another build of Doppel.
    #[arg(long, value_name = "PATH")]
    doppel: Option<PathBuf>,
    /// The JSON file; bench/results/systems.json where all rows are run.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let chosen = chosen(&args.only)?;
    if args.list {
        chosen
            .iter()
            .for_each(|(system, cpus)| println!("{}", label(system, *cpus)));
        return Ok(());
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("no workspace")?;
    let own = workspace.join("target/release/doppel");
    let doppel = args.doppel.clone().unwrap_or(own);
    let directory = workspace.join("target/systems");
    fs::create_dir_all(&directory)?;
    let run = Run {
        monitors: monitors(&args, &doppel),
        workshop: Workshop {
            directory: directory.clone(),
            doppel,
        },
        logs: directory,
        args: &args,
    };
    let mut report = Report::new();
    for (system, cpus) in chosen {
        let row = run.row(system, cpus);
        eprintln!("{}", row.line());
        report.rows.push(row);
    }
    println!("{}", report.table());
    let whole = args
        .only
        .is_empty()
        .then(|| workspace.join("bench/results/systems.json"));
    if let Some(file) = args.output.clone().or(whole) {
        fs::write(&file, serde_json::to_string_pretty(&report)? + "\n")?;
    }
    match report.failures() {
        0 => Ok(()),
        n => bail!(
            "{n} rows failed; what they said is in {}",
            run.logs.display()
        ),
    }
}

fn label(system: &System, cpus: u32) -> String {
    format!("{}/{cpus}", system.name)
}

/// The rows that are asked for: systems with a number of CPUs.
fn chosen(only: &[String]) -> Result<Vec<(&'static System, u32)>> {
    let all: Vec<_> = SYSTEMS
        .iter()
        .flat_map(|system| system.cpus.iter().map(move |cpus| (system, *cpus)))
        .collect();
    let is = |name: &str, (system, cpus): &(&System, u32)| {
        name == system.name || name == label(system, *cpus)
    };
    for name in only {
        let known = all.iter().any(|row| is(name, row));
        ensure!(known, "no system {name}; --list names them");
    }
    let wanted = |row: &&(&System, u32)| only.is_empty() || only.iter().any(|name| is(name, row));
    Ok(all.iter().filter(wanted).copied().collect())
}

fn monitors(args: &Args, doppel: &Path) -> Vec<Monitor> {
    let mut monitors = vec![Monitor::Doppel {
        program: doppel.to_owned(),
        engine: args.engine.clone(),
    }];
    if args.no_qemu {
        return monitors;
    }
    match monitor::qemu_version() {
        Some(_) => monitors.push(Monitor::Qemu),
        None => eprintln!(
            "SKIPPED: this host has no {} to compare with",
            monitor::QEMU
        ),
    }
    monitors
}

/// What all rows share.
struct Run<'a> {
    monitors: Vec<Monitor>,
    workshop: Workshop,
    logs: PathBuf,
    args: &'a Args,
}

impl Run<'_> {
    fn row(&self, system: &'static System, cpus: u32) -> Row {
        let mut row = Row::new(system, cpus);
        let machine = match self.workshop.prepare(system, cpus) {
            Ok(machine) => machine,
            Err(error) => {
                row.skipped = Some(format!("{error:#}"));
                return row;
            }
        };
        for _ in 0..self.args.rounds {
            for monitor in &self.monitors {
                let outcome = self.boot(system, &machine, monitor, &label(system, cpus));
                row.add(monitor, outcome);
            }
        }
        row
    }

    fn boot(
        &self,
        system: &System,
        machine: &Machine,
        monitor: &Monitor,
        label: &str,
    ) -> Result<Outcome, String> {
        let name = format!("{}.{}.log", label.replace('/', "-"), monitor.name());
        let limit = self.args.timeout.unwrap_or(system.timeout);
        let watched = watch::watch(monitor.command(machine), system, limit);
        let (said, result) = match watched {
            Ok(watched) => watched,
            Err(error) => return Err(format!("{error:#}")),
        };
        let kept = fs::write(self.logs.join(name), &said);
        kept.map_err(|error| error.to_string())?;
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_chosen_by_system_and_number_of_cpus() {
        let labels = |only: &[&str]| -> Vec<String> {
            let only: Vec<String> = only.iter().map(|name| name.to_string()).collect();
            let rows = chosen(&only).unwrap();
            rows.iter()
                .map(|(system, cpus)| label(system, *cpus))
                .collect()
        };
        assert_eq!(labels(&["686"]), ["686/1", "686/2", "686/4"]);
        assert_eq!(labels(&["686-pae/2", "nested"]), ["686-pae/2", "nested/1"]);
        assert!(labels(&[]).len() > 30);
        assert!(chosen(&["686/3".to_owned()]).is_err());
    }
}
