//! `cargo xtask fuzz`: a campaign of any length, or one case again; `cargo xtask fuzz kernels` the same at system level.

mod kernels;

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use doppel_fuzz::campaign::{self, Engines, Plan, Summary};
use doppel_fuzz::generate::Shape;
use doppel_fuzz::limits::Limits;
use doppel_fuzz::program::disassemble;
use doppel_fuzz::rig::{EngineName, Rig, variants};

/// Run user code on the processor and on Doppel's engines, and compare everything that it can see.
#[derive(Parser)]
#[command(name = "cargo xtask fuzz", args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    level: Option<Level>,
    /// Decides every case.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Stop after so many seconds.
    #[arg(long)]
    seconds: Option<u64>,
    /// Stop after so many cases.
    #[arg(long)]
    cases: Option<u64>,
    /// `all`, `interpret`, `translate` (every set of options in turn), or one of its sets (see --list-engines).
    #[arg(long, default_value = "all")]
    engine: String,
    /// Only one instruction form a case.
    #[arg(long, conflicts_with = "sequences")]
    enumerated: bool,
    /// Only sequences.
    #[arg(long)]
    sequences: bool,
    /// Run one case and show it.
    #[arg(long)]
    case: Option<u64>,
    /// The case's code, as hexadecimal digits, in place of the one that the seed decides.
    #[arg(long, requires = "case")]
    code: Option<String>,
    /// Compare arithmetic flags at faults also where the translator does not keep those that a block is entered with.
    #[arg(long)]
    fault_flags: bool,
    /// Stop after so many different failures.
    #[arg(long, default_value_t = 20)]
    failures: usize,
    /// Tell each case on standard error before it runs: shows where an engine crashes.
    #[arg(long)]
    announce: bool,
    /// Begin with this case.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Tell which instruction forms ran, which did not, and which are left out.
    #[arg(long)]
    coverage: bool,
    /// The names for --engine.
    #[arg(long)]
    list_engines: bool,
}

#[derive(Subcommand)]
enum Level {
    /// Run small generated kernels on the engines, and compare the whole machine.
    Kernels(kernels::Kernels),
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    if let Some(Level::Kernels(kernels)) = &cli.level {
        return kernels.run();
    }
    if cli.list_engines {
        println!("all\ninterpret");
        variants().iter().for_each(|(name, _)| println!("{name}"));
        return Ok(ExitCode::SUCCESS);
    }
    let mut rig = Rig::new()?;
    rig.fault_flags = cli.fault_flags;
    let plan = plan(&cli)?;
    match cli.case {
        Some(n) => one(&mut rig, &cli, &plan, n),
        None => many(&mut rig, &cli, &plan),
    }
}

fn plan(cli: &Cli) -> Result<Plan> {
    let shape = match (cli.enumerated, cli.sequences) {
        (true, _) => Some(Shape::Enumerated),
        (_, true) => Some(Shape::Sequence),
        _ => None,
    };
    Ok(Plan {
        seed: cli.seed,
        first: cli.first,
        limits: Limits::asked(cli.cases, cli.seconds, cli.failures),
        engines: engines(&cli.engine)?,
        shape,
        announce: cli.announce,
    })
}

fn engines(name: &str) -> Result<Engines> {
    Ok(match name {
        "all" => Engines::All,
        "interpret" => Engines::Interpret,
        "translate" => Engines::Translate,
        name => Engines::Variant(variant(name)?),
    })
}

fn variant(name: &str) -> Result<&'static str> {
    let all = variants();
    let found = all.iter().map(|(n, _)| *n).find(|n| *n == name);
    found.with_context(|| format!("there is no engine {name} (see --list-engines)"))
}

fn one(rig: &mut Rig, cli: &Cli, plan: &Plan, n: u64) -> Result<ExitCode> {
    let (state, program) = campaign::case(rig, plan, n);
    let code = match &cli.code {
        Some(hex) => bytes(hex)?,
        None => program.assemble(state.rip).context("too long")?,
    };
    let names = match cli.engine.as_str() {
        "all" => vec![EngineName::Interpret, EngineName::Translate("translate")],
        "interpret" => vec![EngineName::Interpret],
        name => vec![EngineName::Translate(variant(name)?)],
    };
    println!("{}", disassemble(&code, state.rip));
    for engine in names {
        println!(
            "{}",
            campaign::report(rig, cli.seed, n, &engine, &state, &code)?
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn bytes(hex: &str) -> Result<Vec<u8>> {
    let digits = hex.as_bytes().chunks(2);
    digits
        .map(|d| Ok(u8::from_str_radix(std::str::from_utf8(d)?, 16)?))
        .collect()
}

fn many(rig: &mut Rig, cli: &Cli, plan: &Plan) -> Result<ExitCode> {
    let summary = campaign::run(rig, plan)?;
    show(&summary);
    if cli.coverage {
        print!("{}", summary.coverage.report(&rig.catalogue));
    }
    Ok(match summary.failures.len() {
        0 => ExitCode::SUCCESS,
        n => {
            println!("{n} different failures");
            ExitCode::FAILURE
        }
    })
}

fn show(summary: &Summary) {
    for f in &summary.failures {
        println!("{}  and {} like it\n", f.report, f.more);
    }
    println!(
        "{} cases, of which {} end in a fault and {} are not compared (endless, or not specified); {} instructions, {} blocks",
        summary.cases, summary.faults, summary.discarded, summary.instructions, summary.blocks
    );
}
