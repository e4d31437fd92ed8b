//! Addition, subtraction and comparison.

use iced_x86::{Instruction, Mnemonic};

use super::flags::{self, CF, OF};
use super::operand::{modify, operand_size, read_operand};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Add => add,
        Mnemonic::Adc => adc,
        Mnemonic::Sub => sub,
        Mnemonic::Sbb => sbb,
        Mnemonic::Cmp => cmp,
        Mnemonic::Inc => inc,
        Mnemonic::Dec => dec,
        Mnemonic::Neg => neg,
        Mnemonic::Adcx => adcx,
        Mnemonic::Adox => adox,
        _ => return None,
    })
}

/// op0 ← f(op0, op1), setting the arithmetic flags. `f` takes the size in bytes last.
#[inline]
pub(super) fn binary(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    f: impl Fn(u64, u64, usize) -> (u64, u64),
) -> Step {
    let b = read_operand(cpu, bus, i, 1)?;
    let size = operand_size(i, 0);
    let new = modify(cpu, bus, i, 0, |a| f(a, b, size))?;
    flags::set(cpu, new);
    Ok(Flow::Next)
}

/// Sets the flags of f(op0, op1) and drops the result.
#[inline]
pub(super) fn compare(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    f: impl Fn(u64, u64, usize) -> (u64, u64),
) -> Step {
    let a = read_operand(cpu, bus, i, 0)?;
    let b = read_operand(cpu, bus, i, 1)?;
    flags::set(cpu, f(a, b, operand_size(i, 0)).1);
    Ok(Flow::Next)
}

fn add(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    binary(cpu, bus, i, |a, b, size| flags::add(a, b, 0, size))
}

fn adc(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let c = flags::carry(cpu);
    binary(cpu, bus, i, |a, b, size| flags::add(a, b, c, size))
}

fn sub(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    binary(cpu, bus, i, |a, b, size| flags::sub(a, b, 0, size))
}

fn sbb(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let c = flags::carry(cpu);
    binary(cpu, bus, i, |a, b, size| flags::sub(a, b, c, size))
}

fn cmp(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    compare(cpu, bus, i, |a, b, size| flags::sub(a, b, 0, size))
}

fn inc(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let new = modify(cpu, bus, i, 0, |a| flags::add(a, 1, 0, size))?;
    flags::set(cpu, new & !CF | flags::carry(cpu));
    Ok(Flow::Next)
}

fn dec(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let new = modify(cpu, bus, i, 0, |a| flags::sub(a, 1, 0, size))?;
    flags::set(cpu, new & !CF | flags::carry(cpu));
    Ok(Flow::Next)
}

fn neg(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let new = modify(cpu, bus, i, 0, |a| flags::sub(0, a, 0, size))?;
    flags::set(cpu, new);
    Ok(Flow::Next)
}

/// Adds with the carry in the flag `which`, and changes no other flag.
fn add_with(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction, which: u64) -> Step {
    let b = read_operand(cpu, bus, i, 1)?;
    let size = operand_size(i, 0);
    let c = u64::from(cpu.rflags.bits() & which != 0);
    let carry = modify(cpu, bus, i, 0, |a| flags::add(a, b, c, size))? & CF;
    flags::set_some(cpu, which, carry * which);
    Ok(Flow::Next)
}

fn adcx(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    add_with(cpu, bus, i, CF)
}

fn adox(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    add_with(cpu, bus, i, OF)
}
