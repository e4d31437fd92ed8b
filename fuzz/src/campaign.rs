//! Case after case, and what is to be told of those that fail.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;
use iced_x86::Mnemonic;

use crate::coverage::Coverage;
use crate::generate::{Shape, program};
use crate::limits::Limits;
use crate::minimize::minimize;
use crate::program::{Program, decode, disassemble};
use crate::random::Random;
use crate::rig::{EngineName, Rig, variants};
use crate::state::State;

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    /// The first case.
    pub first: u64,
    pub limits: Limits,
    pub engines: Engines,
    /// `None`: every second case.
    pub shape: Option<Shape>,
    /// Tell each case before it runs, so that a crash can be found.
    pub announce: bool,
}

/// Which engines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engines {
    Interpret,
    /// The translator, with one set of options after the other.
    Translate,
    /// The translator with one set of options.
    Variant(&'static str),
    All,
}

/// One of the failures that look alike.
pub struct Failure {
    pub case: u64,
    pub engine: EngineName,
    pub report: String,
    /// How many others looked like it.
    pub more: u64,
}

/// What a campaign came to.
#[derive(Default)]
pub struct Summary {
    pub cases: u64,
    pub discarded: u64,
    pub faults: u64,
    pub instructions: u64,
    pub blocks: u64,
    pub failures: Vec<Failure>,
    pub coverage: Coverage,
}

/// What failures that look alike have in common: the engine and the instructions of the least program.
type Kind = (&'static str, Vec<Mnemonic>);

impl Engines {
    /// Those of one case: one translator each, in turn.
    fn of_case(self, case: u64) -> Vec<EngineName> {
        let variants = variants();
        let turn = (case / 2) % (2 * variants.len() as u64);
        // The defaults every second time.
        let turn = if turn.is_multiple_of(2) { 0 } else { turn / 2 };
        let translate = EngineName::Translate(variants[turn as usize].0);
        match self {
            Engines::Interpret => vec![EngineName::Interpret],
            Engines::Translate => vec![translate],
            Engines::Variant(name) => vec![EngineName::Translate(name)],
            Engines::All => vec![EngineName::Interpret, translate],
        }
    }
}

/// The state and the program of a case.
pub fn case(rig: &Rig, plan: &Plan, n: u64) -> (State, Program) {
    let state = State::random(&mut Random::of(plan.seed, n, 0));
    let alternate = [Shape::Enumerated, Shape::Sequence][(n % 2) as usize];
    let shape = plan.shape.unwrap_or(alternate);
    let number = if plan.shape.is_some() { n } else { n / 2 };
    let r = Random::of(plan.seed, n, 1);
    let program = program(&rig.catalogue, shape, number, &state, r);
    (state, program)
}

/// Runs a campaign.
pub fn run(rig: &mut Rig, plan: &Plan) -> Result<Summary> {
    let began = Instant::now();
    let mut summary = Summary::default();
    let mut kinds: BTreeMap<Kind, usize> = BTreeMap::new();
    for n in plan.first.. {
        let failures = summary.failures.len();
        if plan.limits.are_reached(began, summary.cases, failures) {
            break;
        }
        run_case(rig, plan, n, &mut summary, &mut kinds)?;
    }
    summary.blocks = rig.counter("translations");
    Ok(summary)
}

fn run_case(
    rig: &mut Rig,
    plan: &Plan,
    n: u64,
    summary: &mut Summary,
    kinds: &mut BTreeMap<Kind, usize>,
) -> Result<()> {
    let (state, program) = case(rig, plan, n);
    let Some(code) = program.assemble(state.rip) else {
        return Ok(());
    };
    let engines = plan.engines.of_case(n);
    if plan.announce {
        let names: Vec<_> = engines.iter().map(EngineName::text).collect();
        eprintln!("case {n} {}", names.join(" "));
    }
    let verdict = rig.check(&state, &code, &engines)?;
    summary.cases += 1;
    summary.discarded += u64::from(verdict.discarded);
    summary.faults += u64::from(verdict.faulted && !verdict.discarded);
    summary.instructions += verdict.codes.len() as u64;
    for engine in &engines {
        let failed = verdict.failures.iter().any(|(e, _)| e == engine);
        if !failed && !verdict.discarded {
            let name = match engine {
                EngineName::Interpret => "interpret",
                EngineName::Translate(_) => "translate",
            };
            summary.coverage.note(name, &verdict.codes);
        }
    }
    for (engine, differences) in verdict.failures {
        failed(rig, plan, n, (engine, &differences), summary, kinds)?;
    }
    Ok(())
}

fn failed(
    rig: &mut Rig,
    plan: &Plan,
    n: u64,
    (engine, differences): (EngineName, &[String]),
    summary: &mut Summary,
    kinds: &mut BTreeMap<Kind, usize>,
) -> Result<()> {
    let (state, program) = case(rig, plan, n);
    let engines = [engine.clone()];
    let least = minimize(&program, |p| {
        let code = p.assemble(state.rip);
        code.is_some_and(|code| {
            rig.check(&state, &code, &engines)
                .is_ok_and(|v| !v.failures.is_empty())
        })
    });
    let code = least.assemble(state.rip).unwrap_or_default();
    let mnemonics = decode(&code, state.rip)
        .iter()
        .map(|i| i.mnemonic())
        .filter(|m| *m != Mnemonic::Mov)
        .collect();
    let kind = (engine.text(), mnemonics);
    if let Some(known) = kinds.get(&kind) {
        summary.failures[*known].more += 1;
        return Ok(());
    }
    kinds.insert(kind, summary.failures.len());
    let again = report(rig, plan.seed, n, &engine, &state, &code)?;
    let report = format!(
        "{again}  when it was first run: {}\n",
        differences.join("; ")
    );
    summary.failures.push(Failure {
        case: n,
        engine,
        report,
        more: 0,
    });
    Ok(())
}

/// What differs, the code, and the command that shows it again.
pub fn report(
    rig: &mut Rig,
    seed: u64,
    n: u64,
    engine: &EngineName,
    state: &State,
    code: &[u8],
) -> Result<String> {
    let verdict = rig.check(state, code, std::slice::from_ref(engine))?;
    let differences = match verdict.failures.first() {
        Some((_, differences)) => differences.join("\n  "),
        None if verdict.discarded => "not compared: endless, or not specified".to_owned(),
        None => "no difference".to_owned(),
    };
    let hex: String = code.iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!(
        "{}, case {n}\n{}  {differences}\n  registers {:x?} flags {:#x}\n  \
         cargo xtask fuzz --seed {seed} --case {n} --engine {} --code {hex}\n",
        engine.text(),
        disassemble(code, state.rip),
        state.gpr,
        state.flags,
        engine.text(),
    ))
}
