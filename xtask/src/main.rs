//! The project's own tasks: `tidy`, `test`, `boots`, `bench`, `fuzz`, `disks`, `hostile`, `guided`, `debian`, `soak`, `stress`, `suites`; `cargo xtask --help` says what each does.

mod boots;
mod console;
mod debian;
mod guided;
mod hostile;
mod soak;
mod source;
mod tidy;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check the rules of ARCHITECTURE.md that no compiler checks.
    Tidy,
    /// Do all that CI does: format, lints, tidy, every test.
    Test,
    /// Boot the default guest again and again, or real operating systems (--systems); tell how long it takes.
    Boots(boots::Boots),
    /// Do the same work natively, in QEMU and in Doppel, and compare; the arguments go to the bench crate (try --help).
    #[command(disable_help_flag = true)]
    Bench {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Kill writers to disks and damage disks and images, many times.
    Disks {
        /// How often a writer is killed, for each kind of image.
        #[arg(long, default_value_t = 50)]
        rounds: u32,
        /// Damaged images, and damaged disks.
        #[arg(long, default_value_t = 20_000)]
        damaged: u32,
    },
    /// Hostile guests, images and peers at each door of SECURITY.md, for as long as one likes.
    Hostile(hostile::Hostile),
    /// The same with inputs that libFuzzer makes, guided by what they reach, for files, packets, messages and code.
    Guided(guided::Guided),
    /// Build a Debian, boot it from its disk, use it, kill it, and look at the image.
    Debian(debian::Debian),
    /// Load a Debian with stress-ng for long, and see that neither it nor the monitor takes harm.
    Soak(soak::Soak),
    /// Load a small guest of two processors with stressors of processor, memory, processes and signals, under the engine `direct`.
    Stress {
        /// Seconds for each of the five groups of stressors.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Run test suites of Linux, Python and others in a guest, and compare; the arguments go to the suites crate (try --help).
    #[command(disable_help_flag = true)]
    Suites {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Run a long differential campaign; the arguments go to the fuzz crate (try --help).
    #[command(disable_help_flag = true)]
    Fuzz {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

fn main() -> Result<()> {
    match Cli::parse().task {
        Task::Tidy => tidy(),
        Task::Test => test(),
        Task::Boots(args) => {
            cargo("build", &["--release", "--package", "doppel"])?;
            match &args.systems {
                Some(arguments) => run("doppel-systems", arguments),
                None => boots::boots(&root()?, &args),
            }
        }
        Task::Bench { arguments } => {
            cargo("build", &["--release", "--package", "doppel"])?;
            run("doppel-bench", &arguments)
        }
        Task::Disks { rounds, damaged } => disks(rounds, damaged),
        Task::Hostile(args) => hostile::hostile(&cargo_program(), &root()?, &args),
        Task::Guided(args) => guided::guided(&cargo_program(), &root()?, &args),
        Task::Debian(args) => {
            cargo("build", &["--release", "--package", "doppel"])?;
            debian::debian(&root()?, &args)
        }
        Task::Soak(args) => {
            cargo("build", &["--release", "--package", "doppel"])?;
            soak::soak(&root()?, &args)
        }
        Task::Stress { seconds } => stress(seconds),
        Task::Suites { arguments } => {
            cargo("build", &["--release", "--package", "doppel"])?;
            run("doppel-suites", &arguments)
        }
        Task::Fuzz { arguments } => run("doppel-fuzz", &arguments),
    }
}

/// The workspace: the folder above this crate's.
fn root() -> Result<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(here
        .parent()
        .context("no workspace above xtask")?
        .to_owned())
}

fn tidy() -> Result<()> {
    let tree = tidy::Tree::read(&root()?)?;
    let complaints = tidy::check(&tree);
    for complaint in &complaints {
        eprintln!("{complaint}");
    }
    match complaints.len() {
        0 => println!("tidy: {} files in order", tree.len()),
        n => bail!("tidy: {n} complaints"),
    }
    Ok(())
}

fn test() -> Result<()> {
    if has("fmt") {
        cargo("fmt", &["--all", "--check"])?;
    }
    if has("clippy") {
        cargo(
            "clippy",
            &[
                "--release",
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "-D",
                "warnings",
            ],
        )?;
    }
    tidy()?;
    cargo("test", &["--release", "--workspace"])
}

/// The tests of disks that take their length from the environment.
fn disks(rounds: u32, damaged: u32) -> Result<()> {
    let tests = [
        ("doppel-block", "crash", "what_was_flushed"),
        ("doppel-block", "hostile", "damaged"),
        ("doppel-bootdisk", "find", "damaged"),
    ];
    for (package, file, name) in tests {
        let status = Command::new(cargo_program())
            .args(["test", "--release", "--package", package, "--test", file])
            .args([name, "--", "--nocapture"])
            .env("DOPPEL_CRASH_ROUNDS", rounds.to_string())
            .env("DOPPEL_DISK_FUZZ", damaged.to_string())
            .current_dir(root()?)
            .status()
            .context("running cargo")?;
        if !status.success() {
            bail!("{package}, {file}: failed");
        }
    }
    Ok(())
}

/// The tests with stress-ng take their length from the environment.
fn stress(seconds: u32) -> Result<()> {
    let status = Command::new(cargo_program())
        .args([
            "test",
            "--release",
            "--package",
            "doppel",
            "--test",
            "stress",
        ])
        .args(["--", "--test-threads=1", "--nocapture"])
        .env("DOPPEL_STRESS_SECONDS", seconds.to_string())
        .current_dir(root()?)
        .status()
        .context("running cargo")?;
    match status.success() {
        true => Ok(()),
        false => bail!("a stressor failed"),
    }
}

/// Whether the toolchain has a cargo subcommand; says so where it has not.
fn has(subcommand: &str) -> bool {
    let output = Command::new(cargo_program())
        .args([subcommand, "--version"])
        .output();
    let has = output.is_ok_and(|o| o.status.success());
    if !has {
        eprintln!("SKIPPED: this toolchain has no cargo {subcommand}");
    }
    has
}

/// Runs the program of another crate of the workspace, which xtask itself does not depend on.
fn run(package: &str, arguments: &[String]) -> Result<()> {
    let fixed = ["--release", "--quiet", "--package", package, "--"];
    let all: Vec<&str> = fixed
        .into_iter()
        .chain(arguments.iter().map(String::as_str))
        .collect();
    cargo("run", &all)
}

fn cargo_program() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

fn cargo(subcommand: &str, arguments: &[&str]) -> Result<()> {
    eprintln!("$ cargo {subcommand} {}", arguments.join(" "));
    let status = Command::new(cargo_program())
        .arg(subcommand)
        .args(arguments)
        .current_dir(root()?)
        .status()
        .context("running cargo")?;
    if !status.success() {
        bail!("cargo {subcommand} failed ({status})");
    }
    Ok(())
}
