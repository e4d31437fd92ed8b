//! `cargo xtask bench`: the same work natively, in QEMU's TCG and in Doppel, interleaved on one machine.
//!
//! `docs/bench.md` tells how it measures. `guest` assembles what is booted, `contestant` makes the commands, `session` runs
//! one, `results` keeps what came out, `table`, `chart` and `readme` show it, `qemu` sees to QEMU.

mod chart;
mod contestant;
mod guest;
mod memory;
mod qemu;
mod readme;
mod results;
mod root;
mod session;
mod table;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use contestant::{Contestant, Kind, Order};
use guest::Guest;
use results::Results;
use root::Root;
use session::{Measured, Run};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Boot to init has no row in the guest's program: it is timed from outside.
pub const BOOT: &str = "boot";

/// Runs the same work natively, in QEMU's TCG and in Doppel, in turns, and compares.
#[derive(Parser)]
#[command(name = "cargo xtask bench")]
struct Args {
    /// How often everybody does everything.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Only this row or group; may be given several times. `--list` names them.
    #[arg(long, value_name = "ROW|GROUP")]
    only: Vec<String>,
    /// Name the rows and their groups.
    #[arg(long)]
    list: bool,
    /// How often a row of the groups compute and kernel is done in one boot; the median of these times counts.
    #[arg(long, default_value_t = 3)]
    passes: usize,
    /// On a busy host: count only the share of time in which a process had a processor.
    #[arg(long)]
    cpu_time: bool,
    /// Without QEMU.
    #[arg(long)]
    no_qemu: bool,
    /// Without the host itself.
    #[arg(long)]
    no_native: bool,
    /// Which of Doppel's engines; given several times, the n-th is the n-th Doppel's.
    #[arg(long, default_value = "auto")]
    engine: Vec<String>,
    /// Another build of Doppel; given several times, they are compared with the first.
    #[arg(long, value_name = "PATH")]
    doppel: Vec<PathBuf>,
    /// More arguments for `doppel run`; the n-th occurrence is for the n-th Doppel.
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    doppel_args: Vec<String>,
    /// Seconds after which one boot has failed.
    #[arg(long, default_value_t = 900)]
    timeout: u64,
    /// Install the newest QEMU that apt offers first (as root).
    #[arg(long)]
    install_qemu: bool,
    /// Assemble the guest, print how to boot it by hand, and end.
    #[arg(long)]
    prepare: bool,
    /// Put the table into README.md.
    #[arg(long)]
    readme: bool,
    /// The files written are DIRECTORY/NAME.json and DIRECTORY/NAME.svg.
    #[arg(long, default_value = "bench/results/latest")]
    output: PathBuf,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let is_whole = args.only.is_empty() && !args.no_native && !args.no_qemu;
    ensure!(is_whole || !args.readme, "--readme is for the whole table");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .context("no workspace")?;
    if args.install_qemu {
        qemu::install()?;
    }
    let directory = workspace.join("target/bench");
    fs::create_dir_all(&directory)?;
    let guest = Guest::assemble(workspace, &directory)?;
    let known = guest.rows()?;
    if args.list {
        known
            .iter()
            .for_each(|(group, row)| println!("{group:8} {row}"));
        return Ok(());
    }
    if args.prepare {
        return explain(&guest, workspace, &args);
    }
    let root = Root::unpack(&guest)?;
    let bench = Bench {
        contestants: contestants(&args, workspace)?,
        selection: Selection::of(&args.only, &known)?,
        guest,
        root,
        directory,
        args,
    };
    let results = bench.run(&known)?;
    show(&results, &bench.args, workspace)
}

fn show(results: &Results, args: &Args, workspace: &Path) -> Result<()> {
    let text = table::text(results);
    println!("{text}");
    let output = workspace.join(&args.output);
    let file = |extension: &str| output.with_extension(extension);
    fs::create_dir_all(output.parent().context("no directory")?)?;
    fs::write(file("json"), serde_json::to_string_pretty(results)? + "\n")?;
    fs::write(file("svg"), chart::svg(results))?;
    if args.readme {
        readme::update(&workspace.join("README.md"), &table::markdown(results))?;
    }
    Ok(())
}

/// What is to be done: all, or some.
struct Selection {
    /// For the guest's program; `None` where nothing of it is wanted.
    rows: Option<Vec<String>>,
    boot: bool,
}

impl Selection {
    fn of(only: &[String], known: &[(String, String)]) -> Result<Selection> {
        for name in only {
            let is_known = name == BOOT || known.iter().any(|(g, r)| g == name || r == name);
            ensure!(is_known, "no row or group {name}; --list names them");
        }
        let rows: Vec<String> = match only {
            [] => known.iter().map(|(_, row)| row.clone()).collect(),
            _ => only.iter().filter(|name| *name != BOOT).cloned().collect(),
        };
        Ok(Selection {
            rows: (!rows.is_empty()).then_some(rows),
            boot: only.is_empty() || only.iter().any(|name| name == BOOT),
        })
    }
}

fn contestants(args: &Args, workspace: &Path) -> Result<Vec<Contestant>> {
    let mut all = Vec::new();
    let mut add = |name: String, kind| all.push(Contestant { name, kind });
    if !args.no_native {
        add("native".to_owned(), Kind::Native);
    }
    if !args.no_qemu {
        qemu::check()?;
        add("TCG".to_owned(), Kind::Qemu);
    }
    let own = [workspace.join("target/release/doppel")];
    let programs = if args.doppel.is_empty() {
        &own[..]
    } else {
        &args.doppel
    };
    let several = [programs.len(), args.doppel_args.len(), args.engine.len()];
    let count = several.into_iter().max().unwrap_or(1);
    for n in 0..count {
        let program = programs.get(n).unwrap_or(&programs[programs.len() - 1]);
        ensure!(program.is_file(), "{} is no program", program.display());
        let engine = &args.engine[n.min(args.engine.len() - 1)];
        let mut flags = vec!["--engine".to_owned(), engine.clone()];
        if contestant::knows_networks(program)? {
            flags.extend(["--net".to_owned(), "none".to_owned()]);
        }
        if let Some(more) = args.doppel_args.get(n) {
            flags.extend(more.split_whitespace().map(str::to_owned));
        }
        let name = match n {
            0 => "Doppel".to_owned(),
            n => format!("Doppel {}", n + 1),
        };
        add(
            name,
            Kind::Doppel {
                program: program.clone(),
                flags,
            },
        );
    }
    Ok(all)
}

struct Bench {
    args: Args,
    contestants: Vec<Contestant>,
    selection: Selection,
    guest: Guest,
    root: Root,
    /// For files of its own.
    directory: PathBuf,
}

impl Bench {
    fn run(&self, known: &[(String, String)]) -> Result<Results> {
        let mut results = Results::new(&self.contestants, known);
        results.corrected = self.args.cpu_time;
        for round in 0..self.args.rounds {
            for turn in 0..self.contestants.len() {
                // Each round begins with another one.
                let which = (turn + round) % self.contestants.len();
                let name = &self.contestants[which].name;
                eprintln!("bench: round {} of {}: {name}", round + 1, self.args.rounds);
                let run = self
                    .turn(&self.contestants[which])
                    .with_context(|| name.clone())?;
                results.add(which, run);
            }
        }
        results.finish()?;
        Ok(results)
    }

    /// All that one contestant does in one round.
    fn turn(&self, contestant: &Contestant) -> Result<Run> {
        let limit = Duration::from_secs(self.args.timeout);
        let mut run = match &self.selection.rows {
            Some(rows) => {
                let order = Order {
                    rows,
                    passes: self.args.passes,
                };
                let mut command = contestant.command(&self.guest, self.root.path(), &order)?;
                let stats = self.directory.join("stats.json");
                if contestant.is_doppel() {
                    command.arg("--stats").arg(&stats);
                }
                let mut run = session::run(command, contestant.cpu_time(), limit)?;
                if contestant.is_doppel() {
                    run.user_direct_share = session::user_direct_share(&stats)?;
                }
                run
            }
            None => Run::default(),
        };
        if self.args.cpu_time {
            run.correct();
        }
        if self.selection.boot && contestant.boots() {
            let (kernel, initrd) = (&self.guest.kernel, &self.guest.boot_initrd);
            let seconds = session::boot(contestant.boot(kernel, initrd, "console=ttyS0"), limit)?;
            let measured = Measured {
                checksum: String::new(),
                passes: vec![seconds],
                cpu_share: None,
            };
            run.rows.insert(BOOT.to_owned(), measured);
        }
        Ok(run)
    }
}

/// How to do by hand what the benchmark does.
fn explain(guest: &Guest, workspace: &Path, args: &Args) -> Result<()> {
    let rows = match args.only.is_empty() {
        true => vec!["sort".to_owned(), "fork".to_owned()],
        false => args.only.clone(),
    };
    let order = Order {
        rows: &rows,
        passes: args.passes,
    };
    let rows = rows.join(" ");
    println!(
        "natively:\n  {} --passes {} {rows}",
        guest.program.display(),
        args.passes
    );
    for contestant in contestants(args, workspace)? {
        if contestant.boots() {
            let command = contestant.command(guest, Path::new("/"), &order)?;
            println!("{}:\n  {}", contestant.name, shell(&command)?);
        }
    }
    Ok(())
}

fn shell(command: &std::process::Command) -> Result<String> {
    let mut words = vec![command.get_program()];
    words.extend(command.get_args());
    let quoted = words.into_iter().map(|word| {
        let word = word.to_str().context("a word that is no text")?;
        Ok(if word.contains(' ') {
            format!("'{word}'")
        } else {
            word.to_owned()
        })
    });
    Ok(quoted.collect::<Result<Vec<_>>>()?.join(" "))
}
