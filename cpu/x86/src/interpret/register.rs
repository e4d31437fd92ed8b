//! General registers by the names that instructions use: parts of registers, zero extension.

use iced_x86::Register;

use crate::Cpu;

const LOW8: usize = Register::AL as usize;
const HIGH8: usize = Register::AH as usize;
const REX8: usize = Register::SPL as usize;
const WORD: usize = Register::AX as usize;
const DWORD: usize = Register::EAX as usize;
const QWORD: usize = Register::RAX as usize;
const END: usize = Register::R15 as usize;

/// Bits that an operand of `size` bytes (1, 2, 4 or 8) has.
#[inline]
pub(crate) fn mask(size: usize) -> u64 {
    u64::MAX >> (64 - 8 * size)
}

/// `v`, an operand of `size` bytes, sign extended to 64 bits.
#[inline]
pub(crate) fn sign_extend(v: u64, size: usize) -> u64 {
    let unused = 64 - 8 * size as u32;
    ((v << unused) as i64 >> unused) as u64
}

/// The 64-bit register that `r` is a part of, by its encoding; `None` for other kinds of registers.
#[inline]
pub(crate) fn gpr_index(r: Register) -> Option<usize> {
    match r as usize {
        n @ QWORD..=END => Some(n - QWORD),
        n @ DWORD..QWORD => Some(n - DWORD),
        n @ WORD..DWORD => Some(n - WORD),
        n @ REX8..WORD => Some(n - REX8 + 4),
        n @ HIGH8..REX8 => Some(n - HIGH8),
        n @ LOW8..HIGH8 => Some(n - LOW8),
        _ => None,
    }
}

/// Bytes of a general or segment register.
#[inline]
pub(crate) fn register_size(r: Register) -> usize {
    match r as usize {
        QWORD..=END => 8,
        DWORD..QWORD => 4,
        WORD..DWORD => 2,
        LOW8..WORD => 1,
        _ => 2,
    }
}

/// A general register, or a part of one, zero extended; the selector of a segment register.
#[inline]
pub(crate) fn read_register(cpu: &Cpu, r: Register) -> u64 {
    match r as usize {
        n @ QWORD..=END => cpu.gpr[n - QWORD],
        n @ DWORD..QWORD => cpu.gpr[n - DWORD] & 0xffff_ffff,
        n @ WORD..DWORD => cpu.gpr[n - WORD] & 0xffff,
        n @ REX8..WORD => cpu.gpr[n - REX8 + 4] & 0xff,
        n @ HIGH8..REX8 => cpu.gpr[n - HIGH8] >> 8 & 0xff,
        n @ LOW8..HIGH8 => cpu.gpr[n - LOW8] & 0xff,
        n if r.is_segment_register() => u64::from(cpu.seg[n - Register::ES as usize].selector),
        _ => 0,
    }
}

/// Writes a general register or a part of one; a 32-bit write clears the upper half. Bits of `v` above the
/// register's size are ignored. Other kinds of registers are left alone.
#[inline]
pub(crate) fn write_register(cpu: &mut Cpu, r: Register, v: u64) {
    match r as usize {
        n @ QWORD..=END => cpu.gpr[n - QWORD] = v,
        n @ DWORD..QWORD => cpu.gpr[n - DWORD] = v & 0xffff_ffff,
        n @ WORD..DWORD => merge(&mut cpu.gpr[n - WORD], v, 0xffff, 0),
        n @ REX8..WORD => merge(&mut cpu.gpr[n - REX8 + 4], v, 0xff, 0),
        n @ HIGH8..REX8 => merge(&mut cpu.gpr[n - HIGH8], v, 0xff, 8),
        n @ LOW8..HIGH8 => merge(&mut cpu.gpr[n - LOW8], v, 0xff, 0),
        _ => {}
    }
}

#[inline]
fn merge(register: &mut u64, v: u64, mask: u64, shift: u32) {
    *register = *register & !(mask << shift) | (v & mask) << shift;
}

/// The low `size` bytes of general register number `n` (0 to 15).
#[inline]
pub(crate) fn read_gpr(cpu: &Cpu, n: usize, size: usize) -> u64 {
    cpu.gpr[n & 15] & mask(size)
}

/// Writes the low `size` bytes of general register number `n`, as an instruction of that operand size does.
#[inline]
pub(crate) fn write_gpr(cpu: &mut Cpu, n: usize, size: usize, v: u64) {
    let r = &mut cpu.gpr[n & 15];
    match size {
        8 => *r = v,
        4 => *r = v & 0xffff_ffff,
        _ => merge(r, v, mask(size), 0),
    }
}
