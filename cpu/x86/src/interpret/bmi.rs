//! Bit manipulation instructions (BMI1, BMI2). Those named after a textbook concept stand with it: andn in
//! `logic`, the shifts in `shift`, mulx in `multiply_divide`.

use iced_x86::{Instruction, Mnemonic};

use super::flags::{self, CF};
use super::operand::{operand_size, read_operand};
use super::register::{mask, write_register};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Bextr => bextr,
        Mnemonic::Blsi => blsi,
        Mnemonic::Blsmsk => blsmsk,
        Mnemonic::Blsr => blsr,
        Mnemonic::Bzhi => bzhi,
        Mnemonic::Pdep => pdep,
        Mnemonic::Pext => pext,
        _ => return None,
    })
}

fn bextr(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let v = read_operand(cpu, bus, i, 1)?;
    let control = read_operand(cpu, bus, i, 2)?;
    let (start, len) = (control as u8, (control >> 8) as u8);
    let shifted = v.checked_shr(start.into()).unwrap_or(0);
    let r = shifted & low_bits(len);
    write_register(cpu, i.op0_register(), r);
    flags::set(cpu, flags::of_result(r, 8) & !flags::SF | UNDEFINED);
    Ok(Flow::Next)
}

/// AF, SF and PF are undefined after bextr: AMD's processors set AF, clear SF, and compute PF.
const UNDEFINED: u64 = flags::AF;

fn low_bits(n: u8) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// The three instructions on the lowest set bit; `carry` says from the source whether CF is set.
fn lowest(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    f: impl Fn(u64) -> u64,
    carry: impl Fn(u64) -> bool,
) -> Step {
    let size = operand_size(i, 0);
    let v = read_operand(cpu, bus, i, 1)?;
    let r = f(v) & mask(size);
    write_register(cpu, i.op0_register(), r);
    flags::set(cpu, flags::of_result(r, size) | u64::from(carry(v)));
    Ok(Flow::Next)
}

fn blsi(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    lowest(cpu, bus, i, |v| v & v.wrapping_neg(), |v| v != 0)
}

fn blsmsk(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    lowest(cpu, bus, i, |v| v ^ v.wrapping_sub(1), |v| v == 0)
}

fn blsr(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    lowest(cpu, bus, i, |v| v & v.wrapping_sub(1), |v| v == 0)
}

fn bzhi(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let v = read_operand(cpu, bus, i, 1)?;
    let n = read_operand(cpu, bus, i, 2)? as u8;
    let r = v & low_bits(n);
    write_register(cpu, i.op0_register(), r);
    let carry = if usize::from(n) >= 8 * size { CF } else { 0 };
    flags::set(cpu, flags::of_result(r, size) | carry);
    Ok(Flow::Next)
}

fn pdep(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let mut source = read_operand(cpu, bus, i, 1)?;
    let mut left = read_operand(cpu, bus, i, 2)?;
    let mut r = 0;
    while left != 0 {
        let lowest = left & left.wrapping_neg();
        r |= lowest * (source & 1);
        source >>= 1;
        left ^= lowest;
    }
    write_register(cpu, i.op0_register(), r);
    Ok(Flow::Next)
}

fn pext(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let source = read_operand(cpu, bus, i, 1)?;
    let mut left = read_operand(cpu, bus, i, 2)?;
    let (mut r, mut at) = (0, 0);
    while left != 0 {
        r |= (source >> left.trailing_zeros() & 1) << at;
        at += 1;
        left &= left - 1;
    }
    write_register(cpu, i.op0_register(), r);
    Ok(Flow::Next)
}
