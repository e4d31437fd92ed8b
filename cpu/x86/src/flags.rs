//! PUSHF, POPF, CLI and STI: the flags that IOPL guards.

use iced_x86::{Code, Instruction};

use crate::interpret::stack::{peek, push, release};
use crate::{Bus, Cpu, CpuMode, Exception, Rflags};

const GP0: Exception = Exception::gp(0);

fn operand_size(i: &Instruction) -> usize {
    match i.code() {
        Code::Pushfw | Code::Popfw => 2,
        Code::Pushfd | Code::Popfd => 4,
        _ => 8,
    }
}

fn check_v86(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.mode() == CpuMode::V86 && cpu.iopl() < 3 {
        Err(GP0)
    } else {
        Ok(())
    }
}

/// PUSHF, PUSHFD, PUSHFQ: VM and RF are stored as 0.
pub(crate) fn pushf(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    check_v86(cpu)?;
    let image = cpu.rflags & !(Rflags::VM | Rflags::RF);
    push(cpu, bus, operand_size(i), image.bits())
}

/// POPF, POPFD, POPFQ: IOPL changes at CPL 0 only, IF only where IOPL allows; the rest of what it may not change stays
/// without a fault.
pub(crate) fn popf(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    check_v86(cpu)?;
    let size = operand_size(i);
    let popped = Rflags::from_bits_truncate(peek(cpu, bus, size, 0)?);
    release(cpu, size as u64);
    let mut writable = Rflags::ARITHMETIC | Rflags::TF | Rflags::DF | Rflags::NT;
    if size != 2 {
        writable |= Rflags::AC | Rflags::ID;
    }
    let v86 = cpu.mode() == CpuMode::V86;
    writable.set(Rflags::IF, v86 || cpu.io_privileged());
    writable.set(Rflags::IOPL, cpu.cpl == 0);
    cpu.rflags = (cpu.rflags & !(writable | Rflags::RF)) | (popped & writable) | Rflags::ONE;
    Ok(())
}

fn check_iopl(cpu: &Cpu) -> Result<(), Exception> {
    let allowed = if cpu.mode() == CpuMode::V86 {
        cpu.iopl() == 3
    } else {
        cpu.io_privileged()
    };
    if allowed { Ok(()) } else { Err(GP0) }
}

/// CLI.
pub(crate) fn cli(cpu: &mut Cpu) -> Result<(), Exception> {
    check_iopl(cpu)?;
    cpu.rflags.remove(Rflags::IF);
    Ok(())
}

/// STI: where it sets IF, the next instruction still runs undisturbed.
pub(crate) fn sti(cpu: &mut Cpu) -> Result<(), Exception> {
    check_iopl(cpu)?;
    cpu.interrupt_shadow = !cpu.rflags.contains(Rflags::IF);
    cpu.rflags.insert(Rflags::IF);
    Ok(())
}
