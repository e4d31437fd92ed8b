//! `cargo xtask fuzz kernels`: generated kernels.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use doppel_fuzz::kernel::campaign::{self, Plan, Rig, Summary, Verdict};
use doppel_fuzz::kernel::case::Kept;
use doppel_fuzz::limits::Limits;

/// See [`doppel_fuzz::kernel`].
#[derive(Args)]
pub struct Kernels {
    /// Decides every case.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Stop after so many seconds (60, unless --cases is given).
    #[arg(long)]
    seconds: Option<u64>,
    /// Stop after so many cases.
    #[arg(long)]
    cases: Option<u64>,
    /// Begin with this case.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// One engine, compared with the interpreter; otherwise the translator, direct execution and another one in turn. `kvm` is the
    /// host's.
    #[arg(long)]
    engine: Option<String>,
    /// Run one case and show it.
    #[arg(long)]
    case: Option<u64>,
    /// Of that case only these places of its schedule, with commas.
    #[arg(long, requires = "case")]
    schedule: Option<String>,
    /// Of that case only these items (step.item), with commas.
    #[arg(long, requires = "case")]
    items: Option<String>,
    /// Of that case each instruction too, as the interpreter executes it, with the registers that change.
    #[arg(long, requires = "case")]
    trace: bool,
    /// Cut that case down to what differs, also where nobody specifies what comes out.
    #[arg(long, requires = "case")]
    least: bool,
    /// Stop after so many different failures.
    #[arg(long, default_value_t = 20)]
    failures: usize,
    /// Tell each case on standard error before it runs: shows where an engine crashes.
    #[arg(long)]
    announce: bool,
    /// Kick the engines after each of so many microseconds, which must change nothing.
    #[arg(long, value_name = "MICROSECONDS")]
    kicks: Option<u64>,
    /// Write into this file which instructions and exceptions were reached on which engine, and which were not.
    #[arg(long)]
    coverage: Option<PathBuf>,
    /// The names for --engine.
    #[arg(long)]
    list_engines: bool,
}

impl Kernels {
    /// Does what the arguments say.
    pub fn run(&self) -> Result<ExitCode> {
        if self.list_engines {
            campaign::names().iter().for_each(|name| println!("{name}"));
            return Ok(ExitCode::SUCCESS);
        }
        let mut rig = Rig::new()?;
        if let Some(period) = self.kicks {
            rig.pester(Duration::from_micros(period));
        }
        match self.case {
            Some(number) => self.one(&mut rig, number),
            None => self.many(&mut rig),
        }
    }

    fn one(&self, rig: &mut Rig, number: u64) -> Result<ExitCode> {
        let case = rig.case(self.seed, number)?;
        let mut kept = case.everything();
        let (schedule, items) = kept.text();
        kept = Kept::parse(
            self.schedule.as_ref().unwrap_or(&schedule),
            self.items.as_ref().unwrap_or(&items),
        )?;
        let engine = self.engine.as_deref().unwrap_or("translate");
        if self.least {
            kept = campaign::least(rig, &case, kept, engine, |v| {
                matches!(v, Verdict::Different(_) | Verdict::Unspecified(_))
            });
        }
        let report = campaign::report(rig, self.seed, number, &case, &kept, engine)?;
        println!("{report}");
        if self.trace {
            println!("{}", rig.steps(&case.only(&kept))?);
        }
        Ok(ExitCode::SUCCESS)
    }

    fn many(&self, rig: &mut Rig) -> Result<ExitCode> {
        let plan = Plan {
            seed: self.seed,
            first: self.first,
            limits: Limits::asked(self.cases, self.seconds, self.failures),
            engine: self.engine.clone(),
            announce: self.announce,
            coverage: self.coverage.is_some(),
        };
        let summary = campaign::run(rig, &plan)?;
        show(rig, &summary);
        if let Some(file) = &self.coverage {
            let report = summary.coverage.report(rig.cpu()?);
            std::fs::write(file, report).with_context(|| format!("writing {}", file.display()))?;
        }
        Ok(match summary.failures.len() {
            0 => ExitCode::SUCCESS,
            _ => ExitCode::FAILURE,
        })
    }
}

fn show(rig: &Rig, summary: &Summary) {
    for f in &summary.failures {
        println!("{}  and {} like it\n", f.report, f.more);
    }
    println!(
        "{} kernels, of which {} did not end and {} were not compared on an engine (not specified), {} took it too long; {} exceptions, interrupts and system calls; {} different failures",
        summary.cases,
        summary.endless,
        summary.unspecified,
        summary.too_slow,
        summary.records,
        summary.failures.len()
    );
    for (name, kernels) in &summary.with {
        println!("{kernels} of them have {name}");
    }
    println!("engine                           runs    instructions   processor seconds");
    if rig.kvm_runs + rig.kvm_refused > 0 {
        let (runs, refused) = (rig.kvm_runs, rig.kvm_refused);
        println!("{:28} {runs:8} runs, and {refused} that it refused", "kvm");
    }
    let mut engines = BTreeMap::<_, (u64, u64, Duration)>::new();
    for runner in rig.runners() {
        let sums = engines.entry(runner.name).or_default();
        sums.0 += runner.runs;
        sums.1 += runner.instructions;
        sums.2 += runner.spent;
    }
    for (name, (runs, instructions, spent)) in engines {
        let seconds = spent.as_secs_f64();
        println!("{name:28} {runs:8} {instructions:15} {seconds:19.1}");
    }
}
