//! Case after case on the interpreter and on other engines, and what is to be told of those that differ.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use doppel_x86::{Cpu, CpuFeatures, CpuidModel};
use iced_x86::{Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, Register};

use super::case::{BY_REQUEST, Case, Kept};
use super::compare::{comparable, differences};
use super::coverage::Coverage;
use super::image::{Image, Supervisors, places};
use super::kvm_unsafe::KvmRunner;
use super::layout::is_supervisors;
use super::machine::{Ending, Final, Kind, Runner};
use super::trace::{Trace, Tracer};
use super::write::Offered;
use crate::gadfly::Gadfly;
use crate::limits::Limits;
use crate::rig::variants;

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    /// The first case.
    pub first: u64,
    pub limits: Limits,
    /// `None`: the translator with its defaults, direct execution, and one other set of options each time, in turn.
    pub engine: Option<String>,
    /// Tell each case before it runs.
    pub announce: bool,
    /// Note what each case reaches, which takes another run.
    pub coverage: bool,
}

/// One of the failures that look alike.
pub struct Failure {
    pub report: String,
    /// How many others looked like it.
    pub more: u64,
}

/// What a campaign came to.
#[derive(Default)]
pub struct Summary {
    pub cases: u64,
    /// Of them with what only some kernels have, by name.
    pub with: BTreeMap<&'static str, u64>,
    /// Cases that did not end.
    pub endless: u64,
    /// Exceptions, interrupts and system calls that the kernels noted.
    pub records: u64,
    pub failures: Vec<Failure>,
    /// Cases on an engine that came out otherwise, but after an instruction whose outcome nobody specifies.
    pub unspecified: u64,
    /// Cases that an engine did not end in time.
    pub too_slow: u64,
    pub coverage: Coverage,
}

/// What came of a case on an engine.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Same,
    /// In these things.
    Different(Vec<String>),
    /// It differs in these things, but after something whose outcome nobody specifies, which the first line names.
    Unspecified(Vec<String>),
    /// It ends on the interpreter, but on this engine not within seconds, as where code changes itself at each instruction.
    TooSlow,
    /// It does not end, or it is not for this engine.
    NotCompared,
}

/// Engines by name and by what their processor has by request; they are made when they are first needed.
pub struct Rig {
    supervisors: Supervisors,
    /// Their processors have by request what these bits say.
    tracers: BTreeMap<u8, Tracer>,
    model: CpuidModel,
    kinds: Vec<(&'static str, Kind)>,
    runners: BTreeMap<(&'static str, u8), Runner>,
    gadfly: Option<Arc<Gadfly>>,
    kvm: Option<KvmRunner>,
    /// Cases that KVM ran to their end, and those in which it met with what it cannot do.
    pub kvm_runs: u64,
    pub kvm_refused: u64,
    offered: Offered,
    /// Engines that this host has not, which was said.
    missing: Vec<&'static str>,
}

/// Time after which a failing case is told as small as it is by then.
const MOST_MINIMIZING: Duration = Duration::from_secs(40);
const DEFAULTS: &str = "translate";
const EXACT: &str = "translate-entry-flags";
const DIRECT: &str = "direct";
const ORACLE: &str = "interpret";
/// Only when it is asked for.
const KVM: &str = "kvm";

fn kinds() -> Vec<(&'static str, Kind)> {
    let interpreters = [
        (ORACLE, Kind::Interpret { quick: true }),
        ("interpret-one-by-one", Kind::Interpret { quick: false }),
        (DIRECT, Kind::Direct),
    ];
    let translators = variants().into_iter().filter(|(name, _)| *name != DIRECT);
    interpreters
        .into_iter()
        .chain(translators.map(|(name, options)| (name, Kind::Translate(options))))
        .collect()
}

/// The names of all engines.
pub fn names() -> Vec<&'static str> {
    kinds()
        .into_iter()
        .map(|(name, _)| name)
        .chain([KVM])
        .collect()
}

impl Rig {
    /// No engine yet.
    pub fn new() -> Result<Self> {
        let model = CpuidModel::host(1);
        let offered = offered(&model);
        let mut rig = Rig {
            supervisors: Supervisors::new()?,
            tracers: BTreeMap::new(),
            offered,
            model,
            kinds: kinds(),
            runners: BTreeMap::new(),
            gadfly: None,
            kvm: None,
            kvm_runs: 0,
            kvm_refused: 0,
            missing: Vec::new(),
        };
        rig.tracer(offered.features)?;
        Ok(rig)
    }

    fn model(&self, features: CpuFeatures) -> Result<Arc<CpuidModel>> {
        Ok(Arc::new(self.model.clone().requesting(features)?))
    }

    fn tracer(&mut self, features: CpuFeatures) -> Result<&mut Tracer> {
        if !self.tracers.contains_key(&features.bits()) {
            let tracer = Tracer::new(&self.model(features)?)?;
            self.tracers.insert(features.bits(), tracer);
        }
        let found = self.tracers.get_mut(&features.bits());
        found.context("a tracer")
    }

    fn trace(&mut self, case: &Case, image: &Image) -> Result<Trace> {
        let tracer = self.tracer(case.traits.features)?;
        Ok(tracer.run(image, &case.dma))
    }

    /// The case of a number.
    pub fn case(&self, seed: u64, number: u64) -> Result<Case> {
        Case::random(&self.supervisors, seed, number, self.offered)
    }

    /// The case of these words (see [`Case::of_words`]).
    pub fn case_of_words(&self, kernel: u64, steps: &[u64]) -> Result<Case> {
        Case::of_words(&self.supervisors, kernel, steps, self.offered)
    }

    /// Has all engines that are made from now on kicked while they run.
    pub fn pester(&mut self, period: Duration) {
        self.gadfly = Some(Arc::new(Gadfly::new(period)));
    }

    /// What has run: engine, cases, instructions where they are counted, processor time.
    pub fn runners(&self) -> impl Iterator<Item = &Runner> {
        self.runners.values()
    }

    fn runner(&mut self, name: &str, features: CpuFeatures) -> Result<Option<&mut Runner>> {
        let found = self.kinds.iter().find(|(n, _)| *n == name);
        let (name, kind) = *found.with_context(|| format!("there is no engine {name}"))?;
        if self.missing.contains(&name) {
            return Ok(None);
        }
        let key = (name, features.bits());
        if !self.runners.contains_key(&key) {
            match Runner::new(name, kind, &self.model(features)?) {
                Ok(mut runner) => {
                    runner.pester(self.gadfly.clone());
                    self.runners.insert(key, runner);
                }
                Err(e) if name == DIRECT => {
                    eprintln!("SKIPPED: this host has no direct execution: {e:#}");
                    self.missing.push(name);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(self.runners.get_mut(&key))
    }

    /// Runs a case on the interpreter and on an engine.
    pub fn check(&mut self, case: &Case, engine: &str) -> Result<Verdict> {
        let Some(image) = case.image() else {
            return Ok(Verdict::NotCompared);
        };
        let oracle = self
            .runner(ORACLE, case.traits.features)?
            .context("an interpreter")?;
        let expected = oracle.run(&image, &case.dma, None);
        match comparable(&expected) {
            true => self.check_against(case, &image, &expected, engine),
            false => Ok(Verdict::NotCompared),
        }
    }

    /// An engine runs it twice, for the second time with the translations of the first.
    fn check_against(
        &mut self,
        case: &Case,
        image: &Image,
        expected: &Final,
        engine: &str,
    ) -> Result<Verdict> {
        if engine == KVM && !case.traits.features.is_empty() {
            return Ok(Verdict::NotCompared);
        }
        if engine == KVM {
            return self.check_against_kvm(case, image, expected);
        }
        let Some(runner) = self.runner(engine, case.traits.features)? else {
            return Ok(Verdict::NotCompared);
        };
        if case.flags && !runner.exact_flags {
            return Ok(Verdict::NotCompared);
        }
        for _ in 0..2 {
            let last = runner.run(image, &case.dma, Some(expected));
            if last.ending == Ending::TimedOut {
                return Ok(Verdict::TooSlow);
            }
            let found = differences(&last, expected, case.flags);
            if !found.is_empty() {
                let trace = self.trace(case, image)?;
                let known = engine == DIRECT && trace.reached.user_asks_the_host();
                let why = known.then(|| "user code asks the host".to_owned());
                return Ok(judged(found, why.or_else(|| trace.why_unspecified())));
            }
        }
        Ok(Verdict::Same)
    }

    fn check_against_kvm(
        &mut self,
        case: &Case,
        image: &Image,
        expected: &Final,
    ) -> Result<Verdict> {
        if self.kvm.is_none() && !self.missing.contains(&KVM) {
            match KvmRunner::new(&Arc::new(self.model.clone())) {
                Ok(runner) => self.kvm = Some(runner),
                Err(e) => {
                    eprintln!("SKIPPED: this host has no KVM that serves here: {e:#}");
                    self.missing.push(KVM);
                }
            }
        }
        let Some(kvm) = &mut self.kvm else {
            return Ok(Verdict::NotCompared);
        };
        let Ok(last) = kvm.run(image, &case.dma, expected) else {
            // It says what it cannot do; the CPU is of no use after that.
            self.kvm = None;
            self.kvm_refused += 1;
            return Ok(Verdict::NotCompared);
        };
        self.kvm_runs += 1;
        let found = differences(&last, expected, case.flags);
        if found.is_empty() {
            return Ok(Verdict::Same);
        }
        let trace = self.trace(case, image)?;
        Ok(judged(found, trace.why_unspecified()))
    }

    /// The engines of a case.
    fn engines(&self, plan: &Plan, case: &Case, number: u64) -> Vec<&'static str> {
        let names = self.kinds.iter().map(|(name, _)| *name);
        if plan.engine.as_deref() == Some(KVM) {
            return vec![KVM];
        }
        if let Some(wanted) = &plan.engine {
            return names.filter(|name| name == wanted).collect();
        }
        let others: Vec<_> = names
            .filter(|n| ![ORACLE, DEFAULTS, DIRECT, EXACT].contains(n))
            .collect();
        vec![
            translator_of(case),
            DIRECT,
            others[number as usize % others.len()],
        ]
    }

    /// Why the manual does not say what comes out of a case, unless it does.
    pub fn why_unspecified(&mut self, case: &Case) -> Result<Option<String>> {
        Ok(match case.image() {
            Some(image) => self.trace(case, &image)?.why_unspecified(),
            None => Some("its code does not fit".to_owned()),
        })
    }

    /// Every instruction of a case on the interpreter but the supervisor's own, each with the registers that the one before changed.
    pub fn steps(&mut self, case: &Case) -> Result<String> {
        let image = case.image().context("the case has no image")?;
        let (mut text, mut before) = (String::new(), [0; 16]);
        let tracer = self.tracer(case.traits.features)?;
        tracer.watched(&image, &case.dma, &mut |cpu, i| {
            if i.is_some_and(|i| is_supervisors(i.ip())) {
                return;
            }
            for (n, (old, new)) in before.iter().zip(cpu.gpr).enumerate() {
                if *old != new {
                    text += &format!("      {:?} = {new:x}\n", Register::RAX + n as u32);
                }
            }
            before = cpu.gpr;
            let what = i.map_or("cannot be fetched".to_owned(), Instruction::to_string);
            let (cpl, rip, flags) = (cpu.cpl, cpu.rip, cpu.rflags.bits());
            text += &format!("{cpl} {rip:x}  {what}  (flags {flags:x})\n");
        });
        Ok(text)
    }

    /// A CPU with everything that some kernel has.
    pub fn cpu(&mut self) -> Result<&Cpu> {
        Ok(self.tracer(self.offered.features)?.cpu())
    }
}

/// What this host lets guests have.
fn offered(model: &CpuidModel) -> Offered {
    let features = BY_REQUEST.map(|(feature, _)| feature);
    let is_offered = |f: &CpuFeatures| model.clone().requesting(*f).is_ok();
    Offered {
        physical_bits: model.physical_bits(),
        features: features.into_iter().filter(is_offered).collect(),
    }
}

/// Of differences, and of why they may be.
fn judged(mut found: Vec<String>, why: Option<String>) -> Verdict {
    match why {
        None => Verdict::Different(found),
        Some(why) => {
            found.insert(0, format!("nobody specifies what comes out: {why}"));
            Verdict::Unspecified(found)
        }
    }
}

/// Runs a campaign.
pub fn run(rig: &mut Rig, plan: &Plan) -> Result<Summary> {
    if let Some(name) = &plan.engine
        && !names().contains(&name.as_str())
    {
        bail!("there is no engine {name}; --list-engines tells which there are");
    }
    let began = Instant::now();
    let mut summary = Summary::default();
    let mut kinds = BTreeMap::new();
    for number in plan.first.. {
        let failures = summary.failures.len();
        if plan.limits.are_reached(began, summary.cases, failures) {
            break;
        }
        run_case(rig, plan, number, &mut summary, &mut kinds)?;
    }
    Ok(summary)
}

/// What failures that look alike have in common: the names of the items that are left.
type Likeness = Vec<&'static str>;

fn run_case(
    rig: &mut Rig,
    plan: &Plan,
    number: u64,
    summary: &mut Summary,
    kinds: &mut BTreeMap<Likeness, usize>,
) -> Result<()> {
    let case = rig.case(plan.seed, number)?;
    if plan.announce {
        eprintln!("case {number}");
    }
    let Some(image) = case.image() else {
        return Ok(());
    };
    summary.cases += 1;
    for name in case.traits.names() {
        *summary.with.entry(name).or_default() += 1;
    }
    let oracle = rig
        .runner(ORACLE, case.traits.features)?
        .context("an interpreter")?;
    let expected = oracle.run(&image, &case.dma, None);
    if plan.announce {
        let records = super::compare::records(&expected.ram);
        eprintln!(
            "  {:?}: {:?}, {} instructions, {records} records",
            case.traits, expected.ending, expected.instructions
        );
    }
    if !comparable(&expected) {
        summary.endless += 1;
        return Ok(());
    }
    summary.records += super::compare::records(&expected.ram);
    let reached = match plan.coverage {
        true => Some(rig.trace(&case, &image)?.reached),
        false => None,
    };
    for engine in rig.engines(plan, &case, number) {
        if plan.announce {
            eprintln!("  {engine}");
        }
        let began = Instant::now();
        let verdict = rig.check_against(&case, &image, &expected, engine)?;
        if plan.announce {
            eprintln!("  in {:?}", began.elapsed());
        }
        match verdict {
            Verdict::Same => {
                if let Some(reached) = &reached {
                    summary.coverage.note(engine, reached);
                }
            }
            Verdict::NotCompared => {}
            Verdict::TooSlow => summary.too_slow += 1,
            Verdict::Unspecified(why) => {
                if plan.announce {
                    eprintln!("  not specified on {engine}: {}", why.join("; "));
                }
                summary.unspecified += 1;
            }
            Verdict::Different(found) => {
                let failed = Failed {
                    plan,
                    number,
                    case: &case,
                    engine,
                    found,
                };
                // Others most often fail alike.
                return failed.note(rig, summary, kinds);
            }
        }
    }
    if let Some(reached) = &reached {
        summary.coverage.note(ORACLE, reached);
    }
    Ok(())
}

/// A case on an engine that came out otherwise.
struct Failed<'a> {
    plan: &'a Plan,
    number: u64,
    case: &'a Case,
    engine: &'static str,
    found: Vec<String>,
}

impl Failed<'_> {
    fn note(
        &self,
        rig: &mut Rig,
        summary: &mut Summary,
        kinds: &mut BTreeMap<Likeness, usize>,
    ) -> Result<()> {
        let (case, engine) = (self.case, self.engine);
        let kept = least(rig, case, case.everything(), engine, |verdict| {
            matches!(verdict, Verdict::Different(_))
        });
        let names = kept
            .items
            .iter()
            .map(|(s, i)| case.steps[*s].items[*i].name);
        let likeness = names.collect();
        if let Some(known) = kinds.get(&likeness) {
            summary.failures[*known].more += 1;
            return Ok(());
        }
        kinds.insert(likeness, summary.failures.len());
        let seed = self.plan.seed;
        let mut report = report(rig, seed, self.number, case, &kept, engine)?;
        report += &format!("  of all of it: {}\n", self.found.join("\n  "));
        eprintln!("{report}");
        summary.failures.push(Failure { report, more: 0 });
        Ok(())
    }
}

/// The set of the translator's options that keeps what the case looks at.
pub fn translator_of(case: &Case) -> &'static str {
    if case.flags { EXACT } else { DEFAULTS }
}

/// What is needed of a case for such a verdict.
pub fn least(
    rig: &mut Rig,
    case: &Case,
    kept: Kept,
    engine: &str,
    wanted: impl Fn(&Verdict) -> bool,
) -> Kept {
    let began = Instant::now();
    kept.least(|kept| {
        if began.elapsed() > MOST_MINIMIZING {
            return false;
        }
        let verdict = rig.check(&case.only(kept), engine);
        verdict.is_ok_and(|verdict| wanted(&verdict))
    })
}

/// What differs, the code of the steps, and the command that shows it again.
pub fn report(
    rig: &mut Rig,
    seed: u64,
    number: u64,
    case: &Case,
    kept: &Kept,
    engine: &str,
) -> Result<String> {
    let (schedule, items) = kept.text();
    let shown = shown(rig, case, kept, engine)?;
    Ok(format!(
        "case {number}, {shown}  \
         cargo xtask fuzz kernels --seed {seed} --case {number} --engine {engine} --schedule {schedule} --items {items}\n",
    ))
}

/// What differs, and the code of the steps.
pub fn shown(rig: &mut Rig, case: &Case, kept: &Kept, engine: &str) -> Result<String> {
    let least = case.only(kept);
    let differences = match rig.check(&least, engine)? {
        Verdict::NotCompared => "not compared: endless, or not for this engine".to_owned(),
        Verdict::TooSlow => "not compared: it takes seconds".to_owned(),
        Verdict::Unspecified(found) => format!("not compared: {}", found.join("\n  ")),
        Verdict::Same => "no difference".to_owned(),
        Verdict::Different(found) => found.join("\n  "),
    };
    Ok(format!(
        "{engine}, {:?}\n{}  {differences}\n",
        case.traits,
        disassemble(&least),
    ))
}

fn disassemble(case: &Case) -> String {
    let mut formatter = IntelFormatter::new();
    let mut text = format!("  steps in the order {:?}\n", case.schedule);
    for (n, (step, at)) in case.steps.iter().zip(places(&case.steps)).enumerate() {
        if !case.schedule.contains(&(n as u16)) {
            continue;
        }
        let c = &step.context;
        text += &format!(
            "  step {n}: {:?} at CPL {}, RSP {:#x}, flags {:#x}, CR3 {:#x}, restores {}, registers {:x?}\n",
            c.mode, c.cpl, c.rsp, c.flags, c.cr3, c.restores, c.registers
        );
        let mut at = at;
        for item in &step.items {
            text += &format!("   {}\n", item.name);
            let decoder = Decoder::with_ip(c.mode.bits(), &item.bytes, at, DecoderOptions::NONE);
            for i in decoder {
                let mut line = String::new();
                formatter.format(&i, &mut line);
                text += &format!("    {:#x}  {line}\n", i.ip());
            }
            at += item.bytes.len() as u64;
        }
    }
    text
}
