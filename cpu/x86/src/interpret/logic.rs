//! Bitwise logic.

use iced_x86::{Instruction, Mnemonic};

use super::arithmetic::{binary, compare};
use super::flags;
use super::operand::{modify, operand_size, read_operand};
use super::register::write_register;
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::And => and,
        Mnemonic::Or => or,
        Mnemonic::Xor => xor,
        Mnemonic::Test => test,
        Mnemonic::Not => not,
        Mnemonic::Andn => andn,
        _ => return None,
    })
}

fn and(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    binary(cpu, bus, i, |a, b, size| flags::logic(a & b, size))
}

fn or(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    binary(cpu, bus, i, |a, b, size| flags::logic(a | b, size))
}

fn xor(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    binary(cpu, bus, i, |a, b, size| flags::logic(a ^ b, size))
}

fn test(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    compare(cpu, bus, i, |a, b, size| flags::logic(a & b, size))
}

fn not(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    modify(cpu, bus, i, 0, |a| (!a, ()))?;
    Ok(Flow::Next)
}

fn andn(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let a = read_operand(cpu, bus, i, 1)?;
    let b = read_operand(cpu, bus, i, 2)?;
    let (r, new) = flags::logic(!a & b, operand_size(i, 0));
    write_register(cpu, i.op0_register(), r);
    flags::set(cpu, new);
    Ok(Flow::Next)
}
