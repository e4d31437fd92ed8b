//! What the campaign has reached on each engine: instruction forms by code size and privilege, exceptions by their causes, and
//! what it has not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use doppel_x86::Cpu;
use iced_x86::{Code, Mnemonic};

use super::trace::{Cause, Reached};
use crate::catalogue::why_not;
use crate::features::offered;

/// By engine.
#[derive(Default)]
pub struct Coverage(BTreeMap<&'static str, Reached>);

const EXCEPTIONS: [(u8, &str); 19] = [
    (0, "#DE"),
    (1, "#DB"),
    (2, "NMI"),
    (3, "#BP"),
    (4, "#OF"),
    (5, "#BR"),
    (6, "#UD"),
    (7, "#NM"),
    (8, "#DF"),
    (10, "#TS"),
    (11, "#NP"),
    (12, "#SS"),
    (13, "#GP"),
    (14, "#PF"),
    (16, "#MF"),
    (17, "#AC"),
    (18, "#MC"),
    (19, "#XM"),
    (21, "#CP"),
];

impl Coverage {
    /// A case gave on this engine what it gives on the interpreter, which did this.
    pub fn note(&mut self, engine: &'static str, reached: &Reached) {
        self.0.entry(engine).or_default().add(reached);
    }

    /// A summary for each engine, then all that was reached and how often, then what was not.
    pub fn report(&self, cpu: &Cpu) -> String {
        let mut text = String::new();
        for (engine, reached) in &self.0 {
            let _ = writeln!(text, "{engine}: {}", summary(reached));
        }
        let mut all = Reached::default();
        self.0.values().for_each(|r| all.add(r));
        text += "\nExceptions: vector, error code, instruction, how often\n";
        for (cause, count) in &all.causes {
            let _ = writeln!(text, "  {} {count}", name(cause));
        }
        text += "\nInstructions: code size, CPL, form, how often\n";
        for ((bits, cpl, code), count) in &all.instructions {
            let _ = writeln!(text, "  {bits} {cpl} {code:?} {count}");
        }
        text + &never(&all, cpu)
    }
}

fn name(cause: &Cause) -> String {
    let vector = EXCEPTIONS.iter().find(|(v, _)| *v == cause.vector);
    let vector = vector.map_or("?", |(_, name)| name);
    match cause.error.is_empty() {
        true => format!("{vector} by {}", cause.by),
        false => format!("{vector}({}) by {}", cause.error, cause.by),
    }
}

fn summary(reached: &Reached) -> String {
    let forms: BTreeSet<Code> = reached.instructions.keys().map(|k| k.2).collect();
    let system = forms.iter().filter(|c| is_system(**c)).count();
    let classes: BTreeSet<_> = reached
        .causes
        .keys()
        .map(|c| (c.vector, &c.error))
        .collect();
    let count: u64 = reached.instructions.values().sum();
    let exceptions: u64 = reached.causes.values().sum();
    format!(
        "{count} instructions of {} forms, {system} of them the system's; {exceptions} exceptions, {} kinds by vector and error code, {} by instruction too",
        forms.len(),
        classes.len(),
        reached.causes.len()
    )
}

/// Forms that the campaign of user code leaves out, and privileged ones: they are this campaign's business.
fn is_system(code: Code) -> bool {
    why_not(code).is_some() || code.op_code().is_privileged()
}

/// Those of them of which something is to be expected.
fn is_wanted(code: Code) -> bool {
    const FOR_NOBODY: [&str; 3] = [
        "makers differ",
        "undefined",
        "an assembler's name for WAIT and another instruction",
    ];
    let wait = ["Fstenv", "Fsave"]
        .iter()
        .any(|name| format!("{code:?}").starts_with(name));
    is_system(code) && !wait && why_not(code).is_none_or(|reason| !FOR_NOBODY.contains(&reason))
}

fn never(all: &Reached, cpu: &Cpu) -> String {
    let mut text = String::new();
    for bits in [64u32, 32] {
        let reached: BTreeSet<Code> = all
            .instructions
            .keys()
            .filter(|k| k.0 == bits || bits == 32 && k.0 == 16)
            .map(|k| k.2)
            .collect();
        let missing: Vec<_> = Code::values()
            .filter(|c| exists(*c, bits, cpu) && is_wanted(*c) && !reached.contains(c))
            .map(|c| format!("{c:?}"))
            .collect();
        let of = if bits == 64 {
            "64-bit"
        } else {
            "32-bit and 16-bit"
        };
        let _ = writeln!(
            text,
            "\nSystem instructions of {of} code that were not reached ({}): {}",
            missing.len(),
            missing.join(" ")
        );
    }
    let vectors: BTreeSet<u8> = all.causes.keys().map(|c| c.vector).collect();
    let missing: Vec<_> = EXCEPTIONS
        .iter()
        .filter(|(v, _)| !vectors.contains(v) && *v != 2)
        .map(|(_, name)| *name)
        .collect();
    let _ = writeln!(
        text,
        "Exceptions that were not reached: {}",
        missing.join(" ")
    );
    text
}

fn exists(code: Code, bits: u32, cpu: &Cpu) -> bool {
    let op = code.op_code();
    let here = if bits == 64 { op.mode64() } else { op.mode32() };
    here && op.is_instruction()
        && !matches!(code.mnemonic(), Mnemonic::INVALID)
        && code.cpuid_features().iter().all(|f| offered(cpu, *f))
}
