//! The arithmetic flags, computed from operands and results.
//!
//! Functions return `(result, flags)`, where `flags` holds exactly the bits of [`Rflags::ARITHMETIC`]. Operand bits
//! above the size are ignored on the way in and zero on the way out.

use super::register::mask;
use crate::{Cpu, Rflags};

pub(super) const CF: u64 = Rflags::CF.bits();
pub(super) const PF: u64 = Rflags::PF.bits();
pub(super) const AF: u64 = Rflags::AF.bits();
pub(super) const ZF: u64 = Rflags::ZF.bits();
pub(super) const SF: u64 = Rflags::SF.bits();
pub(super) const OF: u64 = Rflags::OF.bits();
/// The six arithmetic flags.
pub(super) const ALL: u64 = Rflags::ARITHMETIC.bits();
const OF_SHIFT: u32 = OF.trailing_zeros();
const SF_SHIFT: u32 = SF.trailing_zeros();
const ZF_SHIFT: u32 = ZF.trailing_zeros();
const PF_SHIFT: u32 = PF.trailing_zeros();

/// The carry flag as 0 or 1.
#[inline]
pub(super) fn carry(cpu: &Cpu) -> u64 {
    cpu.rflags.bits() & CF
}

/// Replaces the six arithmetic flags.
#[inline]
pub(super) fn set(cpu: &mut Cpu, flags: u64) {
    set_some(cpu, ALL, flags);
}

/// Replaces the flags in `which` by those of `flags`.
#[inline]
pub(super) fn set_some(cpu: &mut Cpu, which: u64, flags: u64) {
    cpu.rflags = Rflags::from_bits_retain(cpu.rflags.bits() & !which | flags & which);
}

/// Bit `size * 8 - 1` of `v`, as 0 or 1.
#[inline]
pub(super) fn sign(v: u64, size: usize) -> u64 {
    v >> (8 * size - 1) & 1
}

/// SF, ZF and PF of a result.
#[inline]
pub(super) fn of_result(r: u64, size: usize) -> u64 {
    let parity = u64::from((r as u8).count_ones() & 1 == 0);
    sign(r, size) << SF_SHIFT | u64::from(r & mask(size) == 0) << ZF_SHIFT | parity << PF_SHIFT
}

/// `a + b + carry`
#[inline]
pub fn add(a: u64, b: u64, carry: u64, size: usize) -> (u64, u64) {
    let r = a.wrapping_add(b).wrapping_add(carry);
    let carries = a & b | (a | b) & !r;
    let overflow = (a ^ r) & (b ^ r);
    let flags = of_result(r, size)
        | sign(carries, size)
        | (a ^ b ^ r) & AF
        | sign(overflow, size) << OF_SHIFT;
    (r & mask(size), flags)
}

/// `a - b - borrow`
#[inline]
pub fn sub(a: u64, b: u64, borrow: u64, size: usize) -> (u64, u64) {
    let r = a.wrapping_sub(b).wrapping_sub(borrow);
    let borrows = !a & b | !(a ^ b) & r;
    let overflow = (a ^ b) & (a ^ r);
    let flags = of_result(r, size)
        | sign(borrows, size)
        | (a ^ b ^ r) & AF
        | sign(overflow, size) << OF_SHIFT;
    (r & mask(size), flags)
}

/// The flags of and, or, xor and test: CF, OF and AF clear.
#[inline]
pub fn logic(r: u64, size: usize) -> (u64, u64) {
    (r & mask(size), of_result(r, size))
}

/// OF where `b` is set.
#[inline]
pub(super) fn overflow_if(b: bool) -> u64 {
    u64::from(b) << OF_SHIFT
}

/// ZF where `b` is set.
#[inline]
pub(super) fn zero_if(b: bool) -> u64 {
    u64::from(b) << ZF_SHIFT
}
