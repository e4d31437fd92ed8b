//! Single bits, bit scans and counts. Undefined flags are as AMD's processors leave them.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::flags::{self, CF, OF, PF, ZF};
use super::operand::{linear_displaced, load, modify, modify_linear, operand_size, read_operand};
use super::register::{mask, read_register, sign_extend, write_register};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, Exception};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Bt => bt,
        Mnemonic::Bts => bts,
        Mnemonic::Btr => btr,
        Mnemonic::Btc => btc,
        Mnemonic::Bsf => bsf,
        Mnemonic::Bsr => bsr,
        Mnemonic::Popcnt => popcnt,
        Mnemonic::Lzcnt => lzcnt,
        Mnemonic::Tzcnt => tzcnt,
        Mnemonic::Crc32 => crc32,
        _ => return None,
    })
}

/// A bit of a bit string: where the unit that holds it lies (`None` for a register), and its number in there.
struct BitPlace {
    at: Option<u64>,
    bit: u32,
}

/// A register as bit offset reaches bytes far from the memory operand; an immediate only within it.
fn place(cpu: &Cpu, i: &Instruction, write: bool) -> Result<BitPlace, Exception> {
    let size = operand_size(i, 0);
    let register = i.op1_kind() == OpKind::Register;
    let offset = if register {
        sign_extend(read_register(cpu, i.op1_register()), size)
    } else {
        u64::from(i.immediate8())
    };
    let bit = offset as u32 & (8 * size as u32 - 1);
    if i.op0_kind() == OpKind::Register {
        return Ok(BitPlace { at: None, bit });
    }
    let units = offset as i64 >> (8 * size).trailing_zeros();
    let delta = if register {
        units.wrapping_mul(size as i64)
    } else {
        0
    };
    let at = linear_displaced(cpu, i, delta as u64, size, write)?;
    Ok(BitPlace { at: Some(at), bit })
}

fn bt(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let place = place(cpu, i, false)?;
    let v = match place.at {
        Some(at) => load(cpu, bus, at, operand_size(i, 0))?,
        None => read_register(cpu, i.op0_register()),
    };
    flags::set_some(cpu, CF, v >> place.bit);
    Ok(Flow::Next)
}

#[inline]
fn change(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction, f: impl Fn(u64, u64) -> u64) -> Step {
    let place = place(cpu, i, true)?;
    let change = |v| (f(v, 1 << place.bit), v >> place.bit);
    let old = match place.at {
        Some(at) => {
            let size = operand_size(i, 0);
            modify_linear(cpu, bus, at, size, i.has_lock_prefix(), change)?
        }
        None => modify(cpu, bus, i, 0, change)?,
    };
    flags::set_some(cpu, CF, old);
    Ok(Flow::Next)
}

fn bts(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    change(cpu, bus, i, |v, bit| v | bit)
}

fn btr(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    change(cpu, bus, i, |v, bit| v & !bit)
}

fn btc(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    change(cpu, bus, i, |v, bit| v ^ bit)
}

/// bsf and bsr: a zero source leaves the destination alone.
fn scan(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction, f: impl Fn(u64) -> u32) -> Step {
    let v = read_operand(cpu, bus, i, 1)?;
    if v == 0 {
        flags::set(cpu, ZF | PF);
        return Ok(Flow::Next);
    }
    let n = u64::from(f(v));
    write_register(cpu, i.op0_register(), n);
    flags::set(cpu, flags::of_result(n, 8) & PF);
    Ok(Flow::Next)
}

fn bsf(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    scan(cpu, bus, i, u64::trailing_zeros)
}

fn bsr(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    scan(cpu, bus, i, |v| 63 - v.leading_zeros())
}

fn popcnt(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let v = read_operand(cpu, bus, i, 1)?;
    write_register(cpu, i.op0_register(), v.count_ones().into());
    flags::set(cpu, flags::zero_if(v == 0));
    Ok(Flow::Next)
}

/// lzcnt and tzcnt: ZF for a zero result, CF for a zero source.
fn count(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction, f: impl Fn(u64, u32) -> u32) -> Step {
    let bits = 8 * operand_size(i, 0) as u32;
    let v = read_operand(cpu, bus, i, 1)?;
    let n = if v == 0 { bits } else { f(v, bits) };
    write_register(cpu, i.op0_register(), n.into());
    flags::set_some(
        cpu,
        flags::ALL & !OF,
        flags::zero_if(n == 0) | u64::from(v == 0),
    );
    Ok(Flow::Next)
}

fn lzcnt(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    count(cpu, bus, i, |v, bits| v.leading_zeros() + bits - 64)
}

fn tzcnt(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    count(cpu, bus, i, |v, _| v.trailing_zeros())
}

/// CRC-32C (polynomial 0x11edc6f41, bit reflected).
fn crc32(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 1);
    let v = read_operand(cpu, bus, i, 1)? & mask(size);
    let mut crc = read_register(cpu, i.op0_register()) as u32;
    for byte in &v.to_le_bytes()[..size] {
        crc = crc32c_byte(crc ^ u32::from(*byte));
    }
    write_register(cpu, i.op0_register(), crc.into());
    Ok(Flow::Next)
}

fn crc32c_byte(crc: u32) -> u32 {
    (0..8).fold(crc, |c, _| c >> 1 ^ (0x82f6_3b78 * (c & 1)))
}
