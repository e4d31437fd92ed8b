//! x87 errors with CR0.NE clear: no exception but a pin tells of them (Intel SDM vol. 1, 8.7.2 and appendix D.2).
//!
//! An x87 instruction whose error is not masked leaves it pending. The next one that waits for errors raises #MF with CR0.NE set. With NE clear it asserts FERR#
//! and freezes before it does anything, until an interrupt comes: of a PC that pin leads to interrupt 13. The handler asserts IGNNE#, by which x87 instructions are executed
//! whatever is pending, and clears the error, which ends both.
//!
//! Invariant: FERR# as the bus knows it ([`Cpu::numeric_error`]) is looked at before and after each x87 instruction, so all of them are interpreted while NE is clear. An error that
//! FXRSTOR or XRSTOR takes away is seen to have gone at the next.
//! Cost: nothing with NE set, which all of today's systems do.

use iced_x86::{Instruction, Mnemonic};

use super::vector::{self, component};
use super::{Flow, Step};
use crate::{Bus, Cpu};

const EXCEPTIONS: u16 = 0x3f;
const SUMMARY: u16 = 1 << 7;
/// A copy of it.
const BUSY: u16 = 1 << 15;

const CONTROL: usize = 0;
const STATUS: usize = 2;

fn word(cpu: &Cpu, at: usize) -> u16 {
    u16::from_le_bytes([cpu.fpu.bytes[at], cpu.fpu.bytes[at + 1]])
}

fn set_status(cpu: &mut Cpu, status: u16) {
    cpu.fpu.bytes[STATUS..STATUS + 2].copy_from_slice(&status.to_le_bytes());
}

/// An error that is not masked waits.
pub(super) fn is_pending(cpu: &Cpu) -> bool {
    let in_use = vector::in_use(&cpu.fpu) & component::X87 != 0;
    in_use && word(cpu, STATUS) & SUMMARY != 0
}

/// Tells of the error that an instruction has come to: it waits, or is executed by `execute` where the error is to be ignored.
pub(super) fn report(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    execute: impl FnOnce(&mut Cpu, &mut dyn Bus) -> Step,
) -> Step {
    cpu.numeric_error = true;
    if !bus.numeric_error(true) {
        return Ok(Flow::Freeze);
    }
    // The host's processor heeds what it sees.
    let ignored = word(cpu, STATUS) & EXCEPTIONS;
    set_status(cpu, word(cpu, STATUS) & !(EXCEPTIONS | SUMMARY | BUSY));
    let step = execute(cpu, bus);
    let loads_status = matches!(i.mnemonic(), Mnemonic::Fldenv | Mnemonic::Frstor);
    if step.is_err() || !loads_status {
        let status = word(cpu, STATUS) | ignored;
        let unmasked = status & EXCEPTIONS & !word(cpu, CONTROL);
        let summary = if unmasked != 0 { SUMMARY | BUSY } else { 0 };
        set_status(cpu, status | summary);
    }
    step
}

/// FERR# falls where the error has been cleared.
pub(super) fn settle(cpu: &mut Cpu, bus: &mut dyn Bus) {
    if cpu.numeric_error && !is_pending(cpu) {
        cpu.numeric_error = false;
        bus.numeric_error(false);
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{INTEL, TestBus, long_mode, put};
    use crate::{Activity, Cpu, Cr0, Outcome, Rflags, interpret};

    /// fld1; fldz; fdivp (a division by zero), fwait, fld1, fnclex, fwait: with zero divide unmasked by the state that it begins with.
    const CODE: [u8; 13] = [
        0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0x9b, 0xd9, 0xe8, 0xdb, 0xe2, 0x9b, 0x90,
    ];
    const FWAIT: u64 = 6;
    const CLEARED: u64 = 11;

    fn program() -> Box<Cpu> {
        let mut cpu = long_mode(INTEL);
        cpu.cr0.remove(Cr0::NE);
        for (n, byte) in CODE.into_iter().enumerate() {
            put(&cpu, cpu.rip + n as u64, byte);
        }
        cpu.fpu.bytes[..2].copy_from_slice(&0x37bu16.to_le_bytes());
        // The x87 component is in use.
        cpu.fpu.bytes[512] = 1;
        cpu
    }

    fn steps(cpu: &mut Cpu, bus: &mut TestBus, n: usize) -> Outcome {
        (0..n).fold(Outcome::Continue, |_, _| interpret::step(cpu, bus))
    }

    #[test]
    fn an_error_freezes_the_processor_before_the_next_instruction_that_waits() {
        let (mut cpu, mut bus) = (program(), TestBus::default());
        let start = cpu.rip;
        assert_eq!(steps(&mut cpu, &mut bus, 3), Outcome::Continue);
        assert!(bus.numeric_errors.is_empty(), "not before it is waited for");
        cpu.rflags |= Rflags::RF;
        assert_eq!(steps(&mut cpu, &mut bus, 1), Outcome::Halted);
        assert_eq!((cpu.rip, cpu.activity), (start + FWAIT, Activity::Halted));
        assert!(cpu.rflags.contains(Rflags::RF));
        assert_eq!(bus.numeric_errors, [true]);
        cpu.activity = Activity::Active;
        assert_eq!(steps(&mut cpu, &mut bus, 1), Outcome::Halted, "still there");
        assert_eq!(cpu.rip, start + FWAIT);
    }

    #[test]
    fn an_error_that_is_ignored_stays_until_it_is_cleared() {
        let (mut cpu, mut bus) = (program(), TestBus::default());
        let start = cpu.rip;
        steps(&mut cpu, &mut bus, 4);
        (cpu.activity, bus.ignores_numeric_errors) = (Activity::Active, true);
        let before = cpu.fpu.bytes[2..4].to_vec();
        assert_eq!(steps(&mut cpu, &mut bus, 1), Outcome::Continue);
        assert_eq!(cpu.rip, start + FWAIT + 1);
        assert_eq!(cpu.fpu.bytes[2..4], before);
        steps(&mut cpu, &mut bus, 1);
        assert_eq!(
            cpu.fpu.bytes[2] & 0x84,
            0x84,
            "FLD1 has left ES and ZE alone"
        );
        assert!(!bus.numeric_errors.contains(&false));
        steps(&mut cpu, &mut bus, 1);
        assert_eq!(cpu.rip, start + CLEARED);
        assert_eq!(bus.numeric_errors.last(), Some(&false), "FNCLEX");
        bus.ignores_numeric_errors = false;
        assert_eq!(steps(&mut cpu, &mut bus, 2), Outcome::Continue);
    }

    #[test]
    fn with_ne_it_is_an_exception() {
        let (mut cpu, mut bus) = (program(), TestBus::default());
        cpu.cr0 |= Cr0::NE;
        crate::testing::gate(&cpu, 16, 0x2_0000, 0xe, 0, 0);
        steps(&mut cpu, &mut bus, 4);
        assert_eq!(cpu.rip, 0x2_0000);
        assert!(bus.numeric_errors.is_empty());
    }
}
