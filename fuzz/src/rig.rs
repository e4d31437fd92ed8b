//! The oracle and every engine side by side.

use std::sync::Arc;

use anyhow::Result;
use doppel_translate::TranslateOptions;
use doppel_x86::CpuidModel;
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::catalogue::Catalogue;
use crate::compare::{Strictness, differences};
use crate::guest::{Interpreted, Translated, cpu};
use crate::native_unsafe::Native;
use crate::program::decode;
use crate::state::{Ending, Outcome, State};
use crate::xsave::XsaveLayout;

/// An engine that is compared with the processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EngineName {
    Interpret,
    /// The translator with options of this name.
    Translate(&'static str),
}

impl EngineName {
    /// As in arguments and reports.
    pub fn text(&self) -> &'static str {
        match self {
            EngineName::Interpret => "interpret",
            EngineName::Translate(name) => name,
        }
    }
}

/// The translator with its defaults, and user code on the processor itself.
const DIRECT: &str = "direct";

/// The translator's sets of options: the defaults, also with direct execution; and, all with exact flags at faults, each switch off, all off, and a
/// cache that is often full.
pub fn variants() -> Vec<(&'static str, TranslateOptions)> {
    let default = TranslateOptions {
        cache_size: 8 << 20,
        ..TranslateOptions::default()
    };
    let d = TranslateOptions {
        entry_flags: true,
        ..default
    };
    let small = TranslateOptions {
        cache_size: 256 << 10,
        count: true,
        ..d
    };
    let plain = TranslateOptions::SWITCHES
        .iter()
        .fold(d, |o, s| o.without(s));
    let fixed = [
        ("translate", default),
        (DIRECT, default),
        ("translate-entry-flags", d),
        ("translate-plain", plain),
        ("translate-small-cache", small),
    ];
    let each = TranslateOptions::SWITCHES
        .iter()
        .map(|switch| (switch.without, d.without(switch)));
    fixed.into_iter().chain(each).collect()
}

/// What came of a case.
pub struct Verdict {
    /// Forms executed, in order.
    pub codes: Vec<Code>,
    /// Not compared: it did not end in time, or its outcome is not specified.
    pub discarded: bool,
    /// It ended in another exception than the last instruction's.
    pub faulted: bool,
    /// What differs, by engine.
    pub failures: Vec<(EngineName, Vec<String>)>,
}

/// This process's program, libraries, heap and stack are above; what cases are given is below.
const HOST_FROM: u64 = 0x5000_0000_0000;

/// Everything that runs cases.
pub struct Rig {
    native: Native,
    interpreted: Interpreted,
    translated: Vec<(&'static str, TranslateOptions, Option<Translated>)>,
    model: Arc<CpuidModel>,
    layout: XsaveLayout,
    pub catalogue: Catalogue,
    /// Compare the arithmetic flags at faults also where the translator does not keep those that a block is entered with.
    pub fault_flags: bool,
}

/// True where the case ends at an address that holds nothing in a guest, but something of this process: the bare processor
/// would go on there.
fn reaches_the_host(ending: &Ending) -> bool {
    let &Ending::Exception {
        address: Some(address),
        ..
    } = ending
    else {
        return false;
    };
    if address < HOST_FROM {
        return false;
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let holds = |line: &str| {
        let (from, to) = line.split_once(' ')?.0.split_once('-')?;
        let at = |text| u64::from_str_radix(text, 16).ok();
        Some((at(from)?..at(to)?).contains(&address))
    };
    maps.lines().any(|line| holds(line) == Some(true))
}

/// Whether an instruction of the program locks an operand in memory.
fn locks_the_bus(code: &[u8]) -> bool {
    let locks = |i: &Instruction| {
        i.has_lock_prefix() || i.mnemonic() == Mnemonic::Xchg && i.op0_kind() == OpKind::Memory
    };
    decode(code, 0).iter().any(locks)
}

impl Rig {
    /// For this host.
    pub fn new() -> Result<Self> {
        let model = Arc::new(CpuidModel::host(1));
        let layout = XsaveLayout::new(model.xcr0());
        let native = Native::new(layout)?;
        let all = variants();
        Ok(Rig {
            native,
            interpreted: Interpreted::new(&model, layout)?,
            translated: all.into_iter().map(|(n, o)| (n, o, None)).collect(),
            catalogue: Catalogue::new(&*cpu(&model)?),
            model,
            layout,
            fault_flags: false,
        })
    }

    /// Whether all instructions of a program are tested on this processor, and the branches and moves between them.
    pub fn offers(&self, code: &[u8], rip: u64) -> bool {
        let known = |i: &Instruction| i.is_invalid() || self.catalogue.all.contains(&i.code());
        decode(code, rip).iter().all(known)
    }

    /// Runs a case on the processor, the interpreter and some of the translators.
    pub fn check(&mut self, state: &State, code: &[u8], engines: &[EngineName]) -> Result<Verdict> {
        let (interpreted, trace) = self.interpreted.run(state, code);
        let mut verdict = Verdict {
            discarded: interpreted.ending == Ending::TimedOut || trace.unspecified,
            faulted: true,
            failures: Vec::new(),
            codes: Vec::new(),
        };
        let mut how = Strictness {
            ignored_flags: trace.undefined_flags(),
            flags_at_faults: true,
            page_of_address: trace.vague_address(),
            early_state: trace.changes_state_early(),
            return_address: trace.calls(),
            partial_store: trace.stores_in_parts(),
        };
        verdict.codes = trace.codes;
        verdict.discarded |= reaches_the_host(&interpreted.ending);
        if verdict.discarded {
            return Ok(verdict);
        }
        let native = self.run_natively(state, code);
        if native.ending == Ending::TimedOut && locks_the_bus(code) {
            verdict.discarded = true;
            return Ok(verdict);
        }
        verdict.faulted = !matches!(native.ending, Ending::Exception { vector: 6, .. });
        for engine in engines {
            let EngineName::Translate(name) = engine else {
                note(
                    &mut verdict,
                    engine,
                    differences(&interpreted, &native, how),
                );
                continue;
            };
            let (translated, exact) = self.translated(name)?;
            how.flags_at_faults = exact;
            let first = differences(&translated.run(state, code), &native, how);
            let again = differences(&translated.run_again(state), &native, how);
            let differ = match first.is_empty() {
                true => again,
                false => first,
            };
            note(&mut verdict, engine, differ);
        }
        Ok(verdict)
    }

    /// The interpreter has ended the case, so the processor does too. Where it had no time for it, the host's kernel needed that for itself: one
    /// that detects bus locks (LOCK on an operand in two cache lines) writes a line about each to its console, which may be slow. A program
    /// with such an operand that never has the time is not compared; another is.
    fn run_natively(&mut self, state: &State, code: &[u8]) -> Outcome {
        const TRIES: u32 = 5;
        let mut run = self.native.run(state, code);
        for _ in 1..TRIES {
            if run.ending != Ending::TimedOut {
                break;
            }
            run = self.native.run(state, code);
        }
        run
    }

    /// The translator of a name, made when it is first needed, and whether it keeps flags at faults.
    fn translated(&mut self, name: &str) -> Result<(&mut Translated, bool)> {
        let place = self
            .translated
            .iter_mut()
            .find(|(n, ..)| *n == name)
            .ok_or_else(|| anyhow::anyhow!("there is no engine {name}"))?;
        let directly = name == DIRECT;
        let exact = directly || self.fault_flags || !place.1.flag_liveness || place.1.entry_flags;
        if place.2.is_none() {
            place.2 = Some(match directly {
                true => Translated::directly(&self.model, self.layout)?,
                false => Translated::new(&self.model, self.layout, place.1)?,
            });
        }
        place
            .2
            .as_mut()
            .map(|t| (t, exact))
            .ok_or_else(|| anyhow::anyhow!("{name} was not made"))
    }

    /// Blocks translated and so on, summed over the translators.
    pub fn counter(&self, name: &str) -> u64 {
        let stats = self.translated.iter().filter_map(|(_, _, t)| t.as_ref());
        stats.filter_map(|t| t.stats().get(name).copied()).sum()
    }
}

fn note(verdict: &mut Verdict, engine: &EngineName, differences: Vec<String>) {
    if !differences.is_empty() {
        verdict.failures.push((engine.clone(), differences));
    }
}
