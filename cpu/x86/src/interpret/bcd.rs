//! Decimal adjustment, invalid in 64-bit mode (where the decoder refuses it).

use iced_x86::{Instruction, Mnemonic, Register};

use super::flags::{self, AF, CF};
use super::register::{read_register, write_register};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, Exception, Rflags};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Aaa => aaa,
        Mnemonic::Aas => aas,
        Mnemonic::Aad => aad,
        Mnemonic::Aam => aam,
        Mnemonic::Daa => daa,
        Mnemonic::Das => das,
        _ => return None,
    })
}

fn al(cpu: &Cpu) -> u64 {
    read_register(cpu, Register::AL)
}

/// Digit corrections are due where a digit exceeds 9 or has carried.
fn low_digit_overflows(cpu: &Cpu) -> bool {
    al(cpu) & 0xf > 9 || cpu.rflags.contains(Rflags::AF)
}

/// aaa and aas: `f` corrects AX.
fn ascii_adjust(cpu: &mut Cpu, f: impl Fn(u64) -> u64) -> Step {
    let ax = read_register(cpu, Register::AX);
    let adjust = low_digit_overflows(cpu);
    let r = if adjust { f(ax) } else { ax } & 0xff0f;
    write_register(cpu, Register::AX, r);
    let carries = if adjust { AF | CF } else { 0 };
    flags::set(cpu, flags::of_result(r, 1) | carries);
    Ok(Flow::Next)
}

fn aaa(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    ascii_adjust(cpu, |ax| ax.wrapping_add(0x106))
}

fn aas(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    ascii_adjust(cpu, |ax| ax.wrapping_sub(0x106))
}

fn aad(cpu: &mut Cpu, _: &mut dyn Bus, i: &Instruction) -> Step {
    let ah = read_register(cpu, Register::AH);
    let high = ah.wrapping_mul(i.immediate8().into()) & 0xff;
    let (r, new) = flags::add(al(cpu), high, 0, 1);
    write_register(cpu, Register::AX, r);
    flags::set(cpu, new);
    Ok(Flow::Next)
}

fn aam(cpu: &mut Cpu, _: &mut dyn Bus, i: &Instruction) -> Step {
    let base = u64::from(i.immediate8());
    let al = al(cpu);
    let high = al.checked_div(base).ok_or(Exception::DE)?;
    let low = al % base;
    write_register(cpu, Register::AX, high << 8 | low);
    flags::set(cpu, flags::of_result(low, 1));
    Ok(Flow::Next)
}

/// daa and das: `f` adds or subtracts a correction.
fn decimal_adjust(cpu: &mut Cpu, f: impl Fn(u64, u64) -> u64) -> Step {
    let al = al(cpu);
    let low = low_digit_overflows(cpu);
    let high = al > 0x99 || cpu.rflags.contains(Rflags::CF);
    let correction = if low { 0x06 } else { 0 } + if high { 0x60 } else { 0 };
    let r = f(al, correction) & 0xff;
    write_register(cpu, Register::AL, r);
    let carries = if low { AF } else { 0 } | if high { CF } else { 0 };
    flags::set(cpu, flags::of_result(r, 1) | carries);
    Ok(Flow::Next)
}

fn daa(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    decimal_adjust(cpu, u64::wrapping_add)
}

fn das(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    let borrow = al(cpu) < 6 && low_digit_overflows(cpu);
    decimal_adjust(cpu, u64::wrapping_sub)?;
    if borrow {
        cpu.rflags |= Rflags::CF;
    }
    Ok(Flow::Next)
}
