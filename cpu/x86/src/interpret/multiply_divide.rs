//! Multiplication and division.

use iced_x86::{Instruction, Mnemonic};

use super::flags::{self, AF, ALL, CF, OF};
use super::operand::{operand_size, read_operand};
use super::register::{mask, read_gpr, sign_extend, write_gpr, write_register};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, Exception, Gpr};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Mul => mul,
        Mnemonic::Imul if i.op_count() == 1 => imul_wide,
        Mnemonic::Imul => imul,
        Mnemonic::Mulx => mulx,
        Mnemonic::Div => div,
        Mnemonic::Idiv => idiv,
        _ => return None,
    })
}

const RAX: usize = Gpr::Rax as usize;
const RDX: usize = Gpr::Rdx as usize;

/// Writes a product or a pair of quotient and remainder: AX for bytes, else rDX:rAX.
fn write_pair(cpu: &mut Cpu, size: usize, high: u64, low: u64) {
    if size == 1 {
        write_gpr(cpu, RAX, 2, high << 8 | low & 0xff);
    } else {
        write_gpr(cpu, RAX, size, low);
        write_gpr(cpu, RDX, size, high);
    }
}

/// CF and OF say that the product does not fit its lower half. The other flags are undefined: they stay.
pub(super) fn set_product_flags(cpu: &mut Cpu, overflow: bool) {
    flags::set_some(cpu, CF | OF, if overflow { CF | OF } else { 0 });
}

fn mul(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let b = read_operand(cpu, bus, i, 0)?;
    let product = u128::from(read_gpr(cpu, RAX, size)) * u128::from(b);
    let high = (product >> (8 * size)) as u64;
    write_pair(cpu, size, high, product as u64);
    set_product_flags(cpu, high != 0);
    Ok(Flow::Next)
}

/// The signed product, as 128 bits, and whether it overflows `size` bytes.
pub(super) fn signed_product(a: u64, b: u64, size: usize) -> (i128, bool) {
    let wide = |v| i128::from(sign_extend(v, size) as i64);
    let product = wide(a) * wide(b);
    (product, product != wide(product as u64 & mask(size)))
}

fn imul_wide(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let b = read_operand(cpu, bus, i, 0)?;
    let (product, overflow) = signed_product(read_gpr(cpu, RAX, size), b, size);
    write_pair(cpu, size, (product >> (8 * size)) as u64, product as u64);
    set_product_flags(cpu, overflow);
    Ok(Flow::Next)
}

/// The forms with two and three operands.
fn imul(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let first = i.op_count() - 2;
    let a = read_operand(cpu, bus, i, first)?;
    let b = read_operand(cpu, bus, i, first + 1)?;
    let (product, overflow) = signed_product(a, b, size);
    write_register(cpu, i.op0_register(), product as u64);
    set_product_flags(cpu, overflow);
    Ok(Flow::Next)
}

fn mulx(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let b = read_operand(cpu, bus, i, 2)?;
    let product = u128::from(read_gpr(cpu, RDX, size)) * u128::from(b);
    write_register(cpu, i.op1_register(), product as u64);
    write_register(cpu, i.op0_register(), (product >> (8 * size)) as u64);
    Ok(Flow::Next)
}

/// The dividend: AX for bytes, else rDX:rAX.
fn dividend(cpu: &Cpu, size: usize) -> u128 {
    if size == 1 {
        return read_gpr(cpu, RAX, 2).into();
    }
    u128::from(read_gpr(cpu, RDX, size)) << (8 * size) | u128::from(read_gpr(cpu, RAX, size))
}

/// Division leaves the flags undefined: what AMD's processors do.
fn set_quotient_flags(cpu: &mut Cpu) {
    flags::set_some(cpu, ALL & !(CF | OF), AF);
}

fn div(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let b = u128::from(read_operand(cpu, bus, i, 0)?);
    let a = dividend(cpu, size);
    let quotient = a.checked_div(b).ok_or(Exception::DE)?;
    if quotient > mask(size).into() {
        return Err(Exception::DE);
    }
    write_pair(cpu, size, (a % b) as u64, quotient as u64);
    set_quotient_flags(cpu);
    Ok(Flow::Next)
}

fn idiv(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = operand_size(i, 0);
    let b = i128::from(sign_extend(read_operand(cpu, bus, i, 0)?, size) as i64);
    let unused = 128 - 16 * size as u32;
    let a = (dividend(cpu, size) << unused) as i128 >> unused;
    // The quotient of the most negative dividend and -1 fits nowhere: #DE as for zero.
    let quotient = a.checked_div(b).ok_or(Exception::DE)?;
    if quotient != i128::from(sign_extend(quotient as u64, size) as i64) {
        return Err(Exception::DE);
    }
    write_pair(cpu, size, a.wrapping_rem(b) as u64, quotient as u64);
    set_quotient_flags(cpu);
    Ok(Flow::Next)
}
