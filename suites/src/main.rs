//! `cargo xtask suites`: test suites that others wrote, run in a guest and where their right outcome is known, and compared.
//!
//! `table` says which, `selftests` and `glibc` build those that are source, `files` makes a guest's files of packages, `guest` runs a suite in a monitor and
//! `host` on the host, `outcome` reads what was said, `report` compares. A test that passes there and not in Doppel is a failure.

mod files;
mod glibc;
mod guest;
mod host;
mod outcome;
mod report;
mod selftests;
mod table;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use doppel_cli::guest::cpio::Archive;
use guest::{Files, Monitor, Results};
use host::Place;
use report::Table;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use table::{MATH, Reference, SUITES, Suite, Test, What};

const RUNNER: &str = include_str!("runner.sh");
const KERNEL: &str = "linux-image-amd64";

/// Runs test suites of Linux, Python and others in a guest, and beside it.
#[derive(Parser)]
#[command(name = "cargo xtask suites")]
struct Args {
    /// Only this suite, or its tests whose line contains a text (x86/fsgsbase); may be given several times. `--list` names them.
    #[arg(long, value_name = "SUITE[/TEXT]")]
    only: Vec<String>,
    /// Name the tests.
    #[arg(long)]
    list: bool,
    /// Which of Doppel's engines; may be given several times.
    #[arg(long, default_values_t = ["auto".to_owned()])]
    engine: Vec<String>,
    /// Without the reference, QEMU or the host: all tests have to pass.
    #[arg(long)]
    no_reference: bool,
    /// QEMU too where the host is the reference, for its time.
    #[arg(long)]
    qemu: bool,
    /// Another build of Doppel.
    #[arg(long, value_name = "PATH")]
    doppel: Option<PathBuf>,
    /// The JSON file. Suites that it has already and that are not run stay in it. bench/results/suites.json where whole suites are run.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let chosen = chosen(&args.only)?;
    if args.list {
        for (suite, tests) in &chosen {
            tests
                .iter()
                .for_each(|t| println!("{}/{}", suite.name, t.line));
        }
        return Ok(());
    }
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("no workspace")?;
    let own = workspace.join("target/release/doppel");
    let run = Run {
        doppel: args.doppel.clone().unwrap_or(own),
        directory: workspace.join("target/suites"),
        args: &args,
    };
    fs::create_dir_all(&run.directory)?;
    let whole = chosen.iter().all(|(s, tests)| tests.len() == s.tests.len());
    let whole = whole.then(|| workspace.join("bench/results/suites.json"));
    let output = args.output.clone().or(whole);
    let mut tables = Vec::new();
    for (suite, tests) in chosen {
        let table = run.suite(suite, &tests);
        eprint!("{}", table.text());
        if let Some(file) = &output {
            report::write(file, &table)?;
        }
        tables.push(table);
    }
    conclude(&tables, &run.directory)
}

fn conclude(tables: &[Table], logs: &Path) -> Result<()> {
    tables.iter().for_each(|table| print!("{}", table.text()));
    let failures: Vec<String> = tables.iter().flat_map(Table::failures).collect();
    failures.iter().for_each(|failure| println!("{failure}"));
    match failures.len() {
        0 => Ok(()),
        n => bail!("{n} failures; what was said is in {}", logs.display()),
    }
}

/// The tests that are asked for.
fn chosen(only: &[String]) -> Result<Vec<(&'static Suite, Vec<&'static Test>)>> {
    let is = |wanted: &str, suite: &Suite, test: &Test| match wanted.split_once('/') {
        Some((name, text)) => name == suite.name && test.line.contains(text),
        None => wanted == suite.name,
    };
    for wanted in only {
        let known = SUITES
            .iter()
            .any(|suite| suite.tests.iter().any(|test| is(wanted, suite, test)));
        ensure!(known, "no test {wanted}; --list names them");
    }
    let tests = |suite: &'static Suite| -> Vec<&'static Test> {
        let wanted = |t: &&Test| only.is_empty() || only.iter().any(|name| is(name, suite, t));
        suite.tests.iter().filter(wanted).collect()
    };
    let all = SUITES.iter().map(|suite| (suite, tests(suite)));
    Ok(all.filter(|(_, tests)| !tests.is_empty()).collect())
}

/// What all suites share.
struct Run<'a> {
    doppel: PathBuf,
    directory: PathBuf,
    args: &'a Args,
}

impl Run<'_> {
    fn suite(&self, suite: &'static Suite, tests: &[&'static Test]) -> Table {
        let mut table = Table::new(suite.name, tests.iter().map(|test| test.line));
        if let Err(error) = self.fill(&mut table, suite, tests) {
            table.skipped = Some(format!("{error:#}"));
        }
        table
    }

    fn fill(&self, table: &mut Table, suite: &Suite, tests: &[&Test]) -> Result<()> {
        let files = self.files(suite, tests)?;
        for monitor in self.monitors(suite) {
            eprintln!("suites: {} in {}", suite.name, monitor.name());
            let log = self.log(suite, monitor.name());
            table.add(monitor.name(), guest::run(&monitor, &files, tests, &log)?);
        }
        if self.args.no_reference {
            return Ok(());
        }
        match suite.reference {
            Reference::Qemu if qemu_is_here() => table.reference = Some("qemu".to_owned()),
            Reference::Qemu => {}
            Reference::Host => {
                let (outcomes, complaints) = (self.on_the_host(suite, tests)?, Vec::new());
                table.add(
                    "host",
                    Results {
                        outcomes,
                        complaints,
                    },
                );
                table.reference = Some("host".to_owned());
            }
        }
        Ok(())
    }

    fn log(&self, suite: &Suite, who: &str) -> PathBuf {
        self.directory.join(format!("{}.{who}.log", suite.name))
    }

    fn monitors(&self, suite: &Suite) -> Vec<Monitor> {
        let engine = |engine: &String| Monitor::Doppel {
            program: self.doppel.clone(),
            engine: engine.clone(),
        };
        let mut monitors: Vec<Monitor> = self.args.engine.iter().map(engine).collect();
        let wanted = suite.reference == Reference::Qemu && !self.args.no_reference;
        match (wanted || self.args.qemu, qemu_is_here()) {
            (true, true) => monitors.push(Monitor::Qemu),
            (true, false) => eprintln!("SKIPPED: this host has no {}", guest::QEMU),
            _ => {}
        }
        monitors
    }

    /// Kernel and initial RAM disk with all that the suite needs.
    fn files(&self, suite: &Suite, tests: &[&Test]) -> Result<Files> {
        let guest = doppel_cli::guest::debian(KERNEL, &files::progress)?;
        let mut archive = Archive::new();
        let base = match suite.what {
            What::SelfTests { folders } => {
                let (built, libraries) = selftests::build(&self.directory, folders)?;
                files::add_packages(&mut archive, &libraries)?;
                for folder in folders {
                    let name = format!("suites/{folder}");
                    files::add_folder(&mut archive, &name, &built.join(folder))?;
                }
                let own = built.join("rseq/librseq.so");
                if own.exists() {
                    archive.file("suites/lib/librseq.so", 0o755, &fs::read(own)?);
                }
                "suites/"
            }
            What::Glibc => {
                let (built, library) = glibc::build(&self.directory, MATH)?;
                files::add_packages(&mut archive, &library)?;
                files::add_folder(&mut archive, "suites", &built)?;
                "suites/"
            }
            What::Packages { set, names } => {
                let debs = doppel_cli::guest::packages(set, names, &files::progress)?;
                files::add_packages(&mut archive, &debs)?;
                ""
            }
        };
        archive.file("doppel/script", 0o755, RUNNER.as_bytes());
        archive.file("suites/list", 0o644, guest::list(tests, base).as_bytes());
        let mut bytes = fs::read(&guest.initrd)?;
        bytes.extend(archive.finish());
        let initrd = self.directory.join(format!("{}.initrd", suite.name));
        fs::write(&initrd, bytes)?;
        let kernel = guest.kernel;
        Ok(Files { kernel, initrd })
    }

    fn on_the_host(&self, suite: &Suite, tests: &[&Test]) -> Result<Vec<outcome::Outcome>> {
        let scratch = self.directory.join("tmp");
        fs::create_dir_all(&scratch)?;
        let place = match suite.what {
            What::SelfTests { .. } => bail!("what tests a kernel is not run on the host"),
            What::Glibc => Place {
                root: self.directory.clone(),
                base: glibc::build(&self.directory, MATH)?.0,
                scratch,
            },
            What::Packages { set, names } => Place {
                root: self.unpacked(set, names)?,
                base: self.directory.clone(),
                scratch,
            },
        };
        eprintln!("suites: {} on the host", suite.name);
        host::run(&place, tests, &self.log(suite, "host"))
    }

    /// Packages as files, but for the C library: the host's loader goes with the host's own.
    fn unpacked(&self, set: &str, names: &[&str]) -> Result<PathBuf> {
        let debs = doppel_cli::guest::packages(set, names, &files::progress)?;
        let others = debs.into_iter().filter(|deb| !deb.ends_with("libc6.deb"));
        let debs: Vec<PathBuf> = others.collect();
        let root = self.directory.join(set);
        let recipe = files::recipe(&[&debs]);
        if !files::is_of(&root, &recipe) {
            files::remove(&root)?;
            files::unpack(&debs, &root)?;
            files::mark(&root, &recipe)?;
        }
        Ok(root)
    }
}

fn qemu_is_here() -> bool {
    Command::new(guest::QEMU)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}
