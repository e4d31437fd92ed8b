//! What tests with random code have in common: what is compared at the end.

use doppel_translate::Translate;
use doppel_x86::{Engine, Exit};

/// What is compared.
#[derive(PartialEq)]
pub struct Outcome {
    pub exit: Exit,
    gpr: [u64; 8],
    pub rip: u64,
    flags: u64,
    cr2: u64,
    memory: Vec<u64>,
}

impl Outcome {
    /// Of an engine that ended so; `end` is that of the memory which is compared.
    pub fn of(engine: &Translate, exit: Exit, end: u64) -> Self {
        let cpu = engine.cpu();
        let mut gpr = [0; 8];
        for (to, from) in gpr.iter_mut().zip(cpu.gpr) {
            *to = from & 0xffff_ffff;
        }
        let memory = (0..end)
            .step_by(8)
            .map(|at| cpu.ram.load::<u64>(at).unwrap());
        Outcome {
            exit,
            gpr,
            rip: cpu.rip,
            flags: cpu.rflags.bits(),
            cr2: cpu.cr2,
            memory: memory.collect(),
        }
    }
}

/// What differs, as text.
pub fn difference(ours: &Outcome, theirs: &Outcome) -> String {
    let mut text = format!(
        "{:?} {:x?} rip {:x} flags {:x}\n{:?} {:x?} rip {:x} flags {:x}\n",
        ours.exit,
        ours.gpr,
        ours.rip,
        ours.flags,
        theirs.exit,
        theirs.gpr,
        theirs.rip,
        theirs.flags
    );
    for (n, (a, b)) in ours.memory.iter().zip(&theirs.memory).enumerate() {
        if a != b {
            text += &format!("[{:x}] {a:x} {b:x}\n", 8 * n);
        }
    }
    text
}
