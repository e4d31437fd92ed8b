//! `cargo xtask guided`: the doors of `fuzz/guided`, with libFuzzer, each for about as long as one likes.
//!
//! It is what `DOPPEL_DOOR=frames cargo fuzz run --fuzz-dir fuzz/guided door` does, without that program and with a stable compiler: the same instrumentation, overflow checks
//! and debug assertions, but no address sanitizer, of which code without `unsafe` has little. Findings, and the inputs that reached something new, stay in
//! `target/guided`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

/// Which, and for how long.
#[derive(Args)]
pub struct Guided {
    /// For each door.
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// In place of seconds: inputs for each door, from the seeds on, so that it comes out the same each time.
    #[arg(long)]
    runs: Option<u64>,
    /// What random numbers start from.
    #[arg(long, default_value_t = 1)]
    seed: u32,
    /// One door alone.
    #[arg(long)]
    door: Option<String>,
}

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What cargo-fuzz says to the compiler.
const FLAGS: &[&str] = &[
    "--cfg fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// Crates of others that wrap where they should not (of a damaged volume, `fatfs` subtracts 2 from the number of a cluster below it), and
/// then read somewhere in the volume, or beyond its end, which is an error: as in the monitor.
const AS_RELEASED: &[&str] = &["fatfs"];
/// Seconds that an input may take.
const SLOWEST: u64 = 25;
/// The door whose inputs each run a kernel four times: one counts for ten.
const SLOW: (&str, u64) = ("kernels", 10);
/// MiB that the fuzzer may come to.
const LARGEST: u64 = 2048;

struct Lab {
    folder: PathBuf,
    /// A network namespace of its own, where the host lets a user make one.
    alone: bool,
}

/// A door's name, and the longest of its inputs.
struct Door {
    name: String,
    longest: String,
}

/// Builds the fuzzer, runs it on each door, and says which had a finding.
pub fn guided(cargo: &str, root: &Path, args: &Guided) -> Result<()> {
    let lab = Lab {
        folder: root.join("target/guided"),
        alone: is_possible(Command::new("unshare").args(["--map-root-user", "--net", "true"])),
    };
    if !is_possible(Command::new("c++").arg("--version")) {
        println!("SKIPPED: libFuzzer needs a C++ compiler (apt-get install g++)");
        return Ok(());
    }
    if !lab.alone {
        println!(
            "no network namespace for a user here: frames stay with the host's loopback and 10.0.2.0/24 by the door's own rule alone"
        );
    }
    let mut doors = lab.prepare(cargo, root)?;
    if let Some(name) = &args.door {
        let all: Vec<_> = doors.iter().map(|door| door.name.clone()).collect();
        doors.retain(|door| door.name == *name);
        if doors.is_empty() {
            bail!("--door: one of {}", all.join(", "));
        }
    }
    let fuzzer = lab.build(cargo, root)?;
    let mut failed = Vec::new();
    println!("door                 executions   edges  inputs kept");
    for door in doors {
        if !lab.run(&fuzzer, &door, args)? {
            failed.push(door.name);
        }
    }
    match failed.is_empty() {
        true => Ok(()),
        false => bail!(
            "findings of {} in {}; `cargo run --release -p doppel-guided -- DOOR FILE` shows one again",
            failed.join(", "),
            lab.folder.join("findings").display()
        ),
    }
}

fn is_possible(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}

impl Lab {
    /// Seeds and dictionaries.
    fn prepare(&self, cargo: &str, root: &Path) -> Result<Vec<Door>> {
        let mut command = Command::new(cargo);
        command.args(["run", "--release", "--quiet", "--package", "doppel-guided"]);
        command
            .args(["--", "--prepare"])
            .arg(self.folder.join("seeds"));
        let output = command
            .current_dir(root)
            .output()
            .context("running cargo")?;
        if !output.status.success() {
            bail!("no seeds: {}", String::from_utf8_lossy(&output.stderr));
        }
        let text = String::from_utf8(output.stdout)?;
        let doors = text.lines().filter_map(|line| {
            let (name, longest) = line.split_once(' ')?;
            let longest = longest.parse::<u64>().ok()?.to_string();
            let name = name.to_owned();
            Some(Door { name, longest })
        });
        Ok(doors.collect())
    }

    fn build(&self, cargo: &str, root: &Path) -> Result<PathBuf> {
        let mut command = Command::new(cargo);
        command.args([
            "build",
            "--release",
            "--quiet",
            "--package",
            "doppel-guided",
        ]);
        command.args(["--bin", "door", "--target", TARGET, "--target-dir"]);
        command.arg(&self.folder).current_dir(root);
        command.env("RUSTFLAGS", FLAGS.join(" "));
        for checks in ["DEBUG_ASSERTIONS", "OVERFLOW_CHECKS"] {
            command.env(format!("CARGO_PROFILE_RELEASE_{checks}"), "true");
        }
        for package in AS_RELEASED {
            for checks in ["debug-assertions", "overflow-checks"] {
                let profile = format!("profile.release.package.{package}.{checks}=false");
                command.args(["--config", &profile]);
            }
        }
        let status = command.status().context("running cargo")?;
        if !status.success() {
            bail!("the fuzzer was not built");
        }
        Ok(self.folder.join(TARGET).join("release/door"))
    }

    /// One door; false where it had a finding.
    fn run(&self, fuzzer: &Path, door: &Door, args: &Guided) -> Result<bool> {
        let name = &door.name;
        let inputs = match args.runs {
            None => "corpus",
            // Which begins empty each time.
            Some(_) => "corpus-of-runs",
        };
        let (corpus, findings) = (
            self.folder.join(inputs).join(name),
            self.folder.join("findings"),
        );
        if args.runs.is_some() && corpus.exists() {
            fs::remove_dir_all(&corpus).with_context(|| corpus.display().to_string())?;
        }
        for folder in [&corpus, &findings] {
            fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        let log = self.folder.join(format!("{name}.log"));
        let mut command = match self.alone {
            true => {
                let mut command = Command::new("unshare");
                command.args(["--map-root-user", "--net"]).arg(fuzzer);
                command
            }
            false => Command::new(fuzzer),
        };
        let seeds = self.folder.join("seeds");
        let (limit, most) = match args.runs {
            None => ("max_total_time", args.seconds),
            Some(runs) if name == SLOW.0 => ("runs", runs / SLOW.1),
            Some(runs) => ("runs", runs),
        };
        command.arg(&corpus).arg(seeds.join(name));
        let dictionary = seeds.join(format!("{name}.dict"));
        // One without words is an error to libFuzzer.
        if fs::metadata(&dictionary).is_ok_and(|file| file.len() > 0) {
            command.arg(format!("-dict={}", dictionary.display()));
        }
        for (option, value) in [
            ("max_len", door.longest.clone()),
            (limit, most.to_string()),
            ("seed", args.seed.to_string()),
            ("timeout", SLOWEST.to_string()),
            ("rss_limit_mb", LARGEST.to_string()),
            ("artifact_prefix", format!("{}/{name}-", findings.display())),
            ("print_final_stats", "1".to_owned()),
        ] {
            command.arg(format!("-{option}={value}"));
        }
        command.env("DOPPEL_DOOR", name);
        let into = File::create(&log).with_context(|| log.display().to_string())?;
        command.stdout(into.try_clone()?).stderr(into);
        let status = command.status().context("running the fuzzer")?;
        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        println!(
            "{name:20} {:>10} {:>7} {:>12}",
            last(&text, "stat::number_of_executed_units: "),
            last(&text, "cov: "),
            kept(&corpus)?
        );
        if !status.success() {
            let lines: Vec<_> = text.lines().rev().take(40).collect();
            println!("{name}: {status}");
            lines.iter().rev().for_each(|line| println!("  {line}"));
        }
        Ok(status.success())
    }
}

/// The number behind the last of such words.
fn last<'a>(text: &'a str, word: &str) -> &'a str {
    let found = text
        .rfind(word)
        .map(|at| text[at + word.len()..].trim_start());
    let found = found.and_then(|rest| rest.split_whitespace().next());
    found.unwrap_or("?")
}

fn kept(corpus: &Path) -> Result<usize> {
    Ok(fs::read_dir(corpus)?.count())
}
