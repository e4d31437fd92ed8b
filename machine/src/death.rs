//! What is shown of a guest that died.

use std::fmt::Write;

use doppel_x86::{Cpu, Engine, Segment};

/// Why a guest died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeathCause {
    /// A fault while a double fault was delivered.
    TripleFault,
    /// Its kernel panicked and was told neither to reboot nor to power off.
    Panic,
    /// Every CPU executed HLT with interrupts off, and the kernel did not announce it.
    Halted,
}

impl std::fmt::Display for DeathCause {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            DeathCause::TripleFault => "triple fault",
            DeathCause::Panic => "kernel panic",
            DeathCause::Halted => "halted with interrupts off",
        })
    }
}

/// A dead guest, as far as it can be told.
#[derive(Clone, Debug)]
pub struct Death {
    /// Why.
    pub cause: DeathCause,
    /// The registers of each CPU, as text.
    pub registers: String,
    /// The last instructions of the first CPU, oldest first, where the engine can tell.
    pub trace: Vec<String>,
}

impl Death {
    /// Reads the engines of all vCPUs.
    pub fn new<'a>(cause: DeathCause, engines: impl Iterator<Item = &'a dyn Engine>) -> Self {
        let mut death = Death {
            cause,
            registers: String::new(),
            trace: Vec::new(),
        };
        for engine in engines {
            death.registers += &registers(engine.cpu());
            if death.trace.is_empty() {
                death.trace = engine.trace();
            }
        }
        death
    }
}

const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8 ", "r9 ", "r10", "r11", "r12",
    "r13", "r14", "r15",
];
const SEGMENT_NAMES: [&str; 6] = ["es", "cs", "ss", "ds", "fs", "gs"];

/// The registers of one CPU, several lines.
pub fn registers(cpu: &Cpu) -> String {
    let mut out = format!(
        "cpu {} {:?} cpl {} rip {:016x} rflags {:08x}\n",
        cpu.id,
        cpu.mode(),
        cpu.cpl,
        cpu.rip,
        cpu.rflags.bits()
    );
    for (names, values) in GPR_NAMES.chunks(4).zip(cpu.gpr.chunks(4)) {
        let line: Vec<_> = names
            .iter()
            .zip(values)
            .map(|(name, value)| format!("{name} {value:016x}"))
            .collect();
        out += &line.join("  ");
        out.push('\n');
    }
    for (name, s) in SEGMENT_NAMES.iter().zip(&cpu.seg) {
        segment(&mut out, name, s);
    }
    segment(&mut out, "ldtr", &cpu.ldtr);
    segment(&mut out, "tr", &cpu.tr);
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        "gdtr {:016x} {:04x}  idtr {:016x} {:04x}",
        cpu.gdtr.base, cpu.gdtr.limit, cpu.idtr.base, cpu.idtr.limit
    );
    let _ = writeln!(
        out,
        "cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {:04x}  xcr0 {:x}",
        cpu.cr0.bits(),
        cpu.cr2,
        cpu.cr3,
        cpu.cr4.bits(),
        cpu.efer.bits(),
        cpu.xcr0
    );
    out
}

fn segment(out: &mut String, name: &str, s: &Segment) {
    let _ = writeln!(
        out,
        "{name:4} {:04x} base {:016x} limit {:08x} attributes {:05x}",
        s.selector, s.base, s.limit, s.attributes
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use doppel_memory::GuestRam;
    use std::sync::Arc;

    #[test]
    fn every_register_shows() {
        let mut cpu = Cpu::new(3, Arc::new(GuestRam::new(1 << 20).unwrap()));
        cpu.gpr = std::array::from_fn(|i| 0x1111_0000 + i as u64);
        cpu.cr2 = 0xdead_beef;
        let text = registers(&cpu);
        for i in 0..16 {
            assert!(text.contains(&format!("{:016x}", 0x1111_0000 + i)), "{i}");
        }
        assert!(text.starts_with("cpu 3 Real cpl 0 rip 000000000000fff0"));
        assert!(text.contains("00000000deadbeef"));
    }
}
