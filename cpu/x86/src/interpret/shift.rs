//! Shifts and rotates.
//!
//! What the manuals leave undefined (OF for counts other than 1, AF, double shifts of 16 bits by more than 16)
//! is what AMD's processors do: the second operand of such a double shift follows itself.

use iced_x86::{Instruction, Mnemonic};

use super::flags::{self, AF, ALL, CF, OF};
use super::operand::{modify, operand_size, read_operand};
use super::register::{mask, sign_extend, write_register};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Shl | Mnemonic::Sal => shl,
        Mnemonic::Shr => shr,
        Mnemonic::Sar => sar,
        Mnemonic::Rol => rol,
        Mnemonic::Ror => ror,
        Mnemonic::Rcl => rcl,
        Mnemonic::Rcr => rcr,
        Mnemonic::Shld => shld,
        Mnemonic::Shrd => shrd,
        Mnemonic::Shlx => shlx,
        Mnemonic::Shrx => shrx,
        Mnemonic::Sarx => sarx,
        Mnemonic::Rorx => rorx,
        _ => return None,
    })
}

/// The count, masked to 5 bits (6 for 64-bit operands).
fn count(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    op: u32,
) -> Result<u32, crate::Exception> {
    let bits = if operand_size(i, 0) == 8 { 0x3f } else { 0x1f };
    Ok(read_operand(cpu, bus, i, op)? as u32 & bits)
}

/// op0 ← f(op0, count, size); the flags in `which` become those that `f` returns, unless the count is 0.
#[inline]
fn shift(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    which: u64,
    f: impl Fn(u64, u32, usize) -> (u64, u64),
) -> Step {
    let size = operand_size(i, 0);
    let n = count(cpu, bus, i, 1)?;
    if n == 0 {
        modify(cpu, bus, i, 0, |a| (a, ()))?;
        return Ok(Flow::Next);
    }
    let new = modify(cpu, bus, i, 0, |a| f(a, n, size))?;
    flags::set_some(cpu, which, new);
    Ok(Flow::Next)
}

/// The flags that rotations change.
pub(super) const ROTATE: u64 = CF | OF;

fn shl(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    shift(cpu, bus, i, ALL, left)
}

fn shr(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    shift(cpu, bus, i, ALL, right)
}

fn sar(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    shift(cpu, bus, i, ALL, right_signed)
}

/// `a << n` for a count of at least 1, and the flags.
#[inline]
pub(super) fn left(a: u64, n: u32, size: usize) -> (u64, u64) {
    let wide = u128::from(a) << n;
    let r = wide as u64 & mask(size);
    let carry = (wide >> (8 * size)) as u64 & 1;
    let overflow = flags::overflow_if(flags::sign(r, size) != carry);
    (r, flags::of_result(r, size) | carry | overflow | SHIFT_AF)
}

/// `a >> n` for a count of at least 1, and the flags.
#[inline]
pub(super) fn right(a: u64, n: u32, size: usize) -> (u64, u64) {
    let r = a >> n;
    let carry = a >> (n - 1) & 1;
    let overflow = flags::overflow_if(flags::sign(r << 1 ^ r, size) != 0);
    (r, flags::of_result(r, size) | carry | overflow | SHIFT_AF)
}

/// `a >> n` with the sign moving in, for a count of at least 1, and the flags.
#[inline]
pub(super) fn right_signed(a: u64, n: u32, size: usize) -> (u64, u64) {
    let wide = sign_extend(a, size) as i64;
    let r = (wide >> n) as u64 & mask(size);
    let carry = (wide >> (n - 1)) as u64 & 1;
    (r, flags::of_result(r, size) | carry | SHIFT_AF)
}

/// AF after a shift.
const SHIFT_AF: u64 = AF;

fn rotate_left(a: u64, n: u32, size: usize) -> u64 {
    let bits = 8 * size as u32;
    let n = n % bits;
    (a << n | a.checked_shr(bits - n).unwrap_or(0)) & mask(size)
}

fn rol(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    shift(cpu, bus, i, ROTATE, turn_left)
}

fn ror(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    shift(cpu, bus, i, ROTATE, turn_right)
}

/// `a` rotated left, and the flags of [`ROTATE`].
#[inline]
pub(super) fn turn_left(a: u64, n: u32, size: usize) -> (u64, u64) {
    let r = rotate_left(a, n, size);
    let carry = r & 1;
    (r, carry | flags::overflow_if(flags::sign(r, size) != carry))
}

/// `a` rotated right, and the flags of [`ROTATE`].
#[inline]
pub(super) fn turn_right(a: u64, n: u32, size: usize) -> (u64, u64) {
    let bits = 8 * size as u32;
    let r = rotate_left(a, bits - n % bits, size);
    let carry = flags::sign(r, size);
    let overflow = flags::overflow_if(flags::sign(r << 1 ^ r, size) != 0);
    (r, carry | overflow)
}

/// Rotates `size * 8 + 1` bits, the carry on top, left by `n`.
fn rotate_with_carry(a: u64, carry: u64, n: u32, size: usize) -> (u64, u64) {
    let bits = 8 * size as u32 + 1;
    let n = n % bits;
    let v = u128::from(carry) << (bits - 1) | u128::from(a);
    let r = v << n | v >> (bits - n);
    (r as u64 & mask(size), (r >> (bits - 1)) as u64 & 1)
}

fn rcl(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let c = flags::carry(cpu);
    shift(cpu, bus, i, ROTATE, |a, n, size| {
        let (r, carry) = rotate_with_carry(a, c, n, size);
        (r, carry | flags::overflow_if(flags::sign(r, size) != carry))
    })
}

fn rcr(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let c = flags::carry(cpu);
    shift(cpu, bus, i, ROTATE, |a, n, size| {
        let bits = 8 * size as u32 + 1;
        let (r, carry) = rotate_with_carry(a, c, bits - n % bits, size);
        (
            r,
            carry | flags::overflow_if(flags::sign(r << 1 ^ r, size) != 0),
        )
    })
}

/// shld and shrd: `f` shifts (op0, op1, count, size).
#[inline]
fn double_shift(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    f: impl Fn(u64, u64, u32, usize) -> (u64, u64),
) -> Step {
    let size = operand_size(i, 0);
    let n = count(cpu, bus, i, 2)?;
    let b = read_operand(cpu, bus, i, 1)?;
    if n == 0 {
        modify(cpu, bus, i, 0, |a| (a, ()))?;
        return Ok(Flow::Next);
    }
    let new = modify(cpu, bus, i, 0, |a| f(a, b, n, size))?;
    flags::set(cpu, new);
    Ok(Flow::Next)
}

fn shld(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    double_shift(cpu, bus, i, |a, b, n, size| {
        let bits = 8 * size as u32;
        let r = if n < bits {
            a << n | b >> (bits - n)
        } else {
            rotate_left(b, n, size)
        } & mask(size);
        let carry = a.checked_shr(bits.wrapping_sub(n)).unwrap_or(0) & 1;
        let overflow = flags::overflow_if(n < bits && flags::sign(r, size) != carry);
        (r, flags::of_result(r, size) | carry | overflow | SHIFT_AF)
    })
}

fn shrd(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    double_shift(cpu, bus, i, |a, b, n, size| {
        let bits = 8 * size as u32;
        let r = if n < bits {
            a >> n | b << (bits - n)
        } else {
            rotate_left(b, 2 * bits - n, size)
        } & mask(size);
        let carry = a >> (n - 1) & 1;
        let overflow = flags::overflow_if(flags::sign(r << 1 ^ r, size) != 0);
        (r, flags::of_result(r, size) | carry | overflow | SHIFT_AF)
    })
}

/// The three-operand shifts of BMI2, which leave the flags alone.
#[inline]
fn flagless(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    f: impl Fn(u64, u32, usize) -> u64,
) -> Step {
    let a = read_operand(cpu, bus, i, 1)?;
    let n = count(cpu, bus, i, 2)?;
    write_register(cpu, i.op0_register(), f(a, n, operand_size(i, 0)));
    Ok(Flow::Next)
}

fn shlx(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    flagless(cpu, bus, i, |a, n, _| a << n)
}

fn shrx(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    flagless(cpu, bus, i, |a, n, _| a >> n)
}

fn sarx(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    flagless(cpu, bus, i, |a, n, size| {
        (sign_extend(a, size) as i64 >> n) as u64
    })
}

fn rorx(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    flagless(cpu, bus, i, |a, n, size| {
        let bits = 8 * size as u32;
        rotate_left(a, bits - n % bits, size)
    })
}
