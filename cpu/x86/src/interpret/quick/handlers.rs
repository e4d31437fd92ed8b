//! The functions of predecoded instructions, generic in operation, operand size `S` in bytes, and operand places: `r` a
//! register, `i` an immediate, `m` memory; the destination comes first.

use super::operand::{effective, linear, load, modify, read, register, store, write};
use super::{Context, Go, Op};
use crate::interpret::flags::{self, ALL, CF};
use crate::interpret::register::{mask, sign_extend};
use crate::interpret::{multiply_divide, shift};
use crate::{Cpu, Gpr, Rflags};

const RSP: u8 = Gpr::Rsp as u8;
const RBP: u8 = Gpr::Rbp as u8;

/// Unwraps what the TLB gave; without it the instruction is not for us.
macro_rules! known {
    ($e:expr) => {
        match $e {
            Some(v) => v,
            None => return Go::Bail,
        }
    };
}

// ---- two operands ----

/// An operation on two operands that sets all arithmetic flags.
pub(super) trait Alu {
    /// The result is dropped.
    const COMPARES: bool = false;
    /// The result and the flags.
    fn of(a: u64, b: u64, carry: u64, size: usize) -> (u64, u64);
}

macro_rules! alu {
    ($($name:ident $compares:literal |$a:ident, $b:ident, $c:pat_param, $size:ident| $e:expr;)*) => {$(
        pub(super) struct $name;
        impl Alu for $name {
            const COMPARES: bool = $compares;
            #[inline(always)]
            fn of($a: u64, $b: u64, $c: u64, $size: usize) -> (u64, u64) {
                $e
            }
        }
    )*};
}
alu! {
    Add false |a, b, _, size| flags::add(a, b, 0, size);
    Adc false |a, b, c, size| flags::add(a, b, c, size);
    Sub false |a, b, _, size| flags::sub(a, b, 0, size);
    Sbb false |a, b, c, size| flags::sub(a, b, c, size);
    Cmp true |a, b, _, size| flags::sub(a, b, 0, size);
    And false |a, b, _, size| flags::logic(a & b, size);
    Or false |a, b, _, size| flags::logic(a | b, size);
    Xor false |a, b, _, size| flags::logic(a ^ b, size);
    Test true |a, b, _, size| flags::logic(a & b, size);
}

fn immediate<const S: usize>(op: &Op) -> u64 {
    op.immediate as u64 & mask(S)
}

#[inline(always)]
fn alu_register<O: Alu, const S: usize>(cpu: &mut Cpu, op: &Op, b: u64) -> Go {
    let (r, new) = O::of(read::<S>(cpu, op.target), b, flags::carry(cpu), S);
    if !O::COMPARES {
        write::<S>(cpu, op.target, r);
    }
    flags::set(cpu, new);
    Go::Next
}

#[inline(always)]
fn alu_memory<O: Alu, const S: usize>(cpu: &mut Cpu, c: &Context, op: &Op, b: u64) -> Go {
    let (at, carry) = (linear(cpu, op), flags::carry(cpu));
    let (go, new) = if O::COMPARES {
        let a = known!(load::<S>(cpu, c, at));
        (Go::Next, O::of(a, b, carry, S).1)
    } else {
        known!(modify::<S, _>(cpu, c, at, |a| O::of(a, b, carry, S)))
    };
    flags::set(cpu, new);
    go
}

pub(super) fn alu_rr<O: Alu, const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let b = read::<S>(cpu, op.source);
    alu_register::<O, S>(cpu, op, b)
}

pub(super) fn alu_ri<O: Alu, const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    alu_register::<O, S>(cpu, op, immediate::<S>(op))
}

pub(super) fn alu_rm<O: Alu, const S: usize>(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let b = known!(load::<S>(cpu, c, linear(cpu, op)));
    alu_register::<O, S>(cpu, op, b)
}

pub(super) fn alu_mr<O: Alu, const S: usize>(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let b = read::<S>(cpu, op.source);
    alu_memory::<O, S>(cpu, c, op, b)
}

pub(super) fn alu_mi<O: Alu, const S: usize>(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    alu_memory::<O, S>(cpu, c, op, immediate::<S>(op))
}

// ---- one operand ----

/// An operation on one operand.
pub(super) trait Unary {
    /// The flags that it changes.
    const FLAGS: u64;
    /// The result and the flags.
    fn of(a: u64, size: usize) -> (u64, u64);
}

macro_rules! unary {
    ($($name:ident $flags:expr, |$a:ident, $size:ident| $e:expr;)*) => {$(
        pub(super) struct $name;
        impl Unary for $name {
            const FLAGS: u64 = $flags;
            #[inline(always)]
            fn of($a: u64, $size: usize) -> (u64, u64) {
                $e
            }
        }
    )*};
}
unary! {
    Inc ALL & !CF, |a, size| flags::add(a, 1, 0, size);
    Dec ALL & !CF, |a, size| flags::sub(a, 1, 0, size);
    Neg ALL, |a, size| flags::sub(0, a, 0, size);
    Not 0, |a, size| (!a & mask(size), 0);
}

pub(super) fn unary_r<O: Unary, const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let (r, new) = O::of(read::<S>(cpu, op.target), S);
    write::<S>(cpu, op.target, r);
    flags::set_some(cpu, O::FLAGS, new);
    Go::Next
}

pub(super) fn unary_m<O: Unary, const S: usize>(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let at = linear(cpu, op);
    let (go, new) = known!(modify::<S, _>(cpu, c, at, |a| O::of(a, S)));
    flags::set_some(cpu, O::FLAGS, new);
    go
}

// ---- shifts ----

/// A shift or a rotation.
pub(super) trait Shift {
    /// The flags that it changes.
    const FLAGS: u64;
    /// The result and the flags, for a count of at least 1.
    fn of(a: u64, n: u32, size: usize) -> (u64, u64);
}

macro_rules! shifts {
    ($($name:ident $flags:expr, $f:path;)*) => {$(
        pub(super) struct $name;
        impl Shift for $name {
            const FLAGS: u64 = $flags;
            #[inline(always)]
            fn of(a: u64, n: u32, size: usize) -> (u64, u64) {
                $f(a, n, size)
            }
        }
    )*};
}
shifts! {
    Shl ALL, shift::left;
    Shr ALL, shift::right;
    Sar ALL, shift::right_signed;
    Rol shift::ROTATE, shift::turn_left;
    Ror shift::ROTATE, shift::turn_right;
}

#[inline(always)]
fn shifted<O: Shift, const S: usize>(cpu: &mut Cpu, op: &Op, count: u64) -> Go {
    let a = read::<S>(cpu, op.target);
    let n = count as u32 & if S == 8 { 0x3f } else { 0x1f };
    if n == 0 {
        write::<S>(cpu, op.target, a);
        return Go::Next;
    }
    let (r, new) = O::of(a, n, S);
    write::<S>(cpu, op.target, r);
    flags::set_some(cpu, O::FLAGS, new);
    Go::Next
}

pub(super) fn shift_ri<O: Shift, const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    shifted::<O, S>(cpu, op, op.immediate as u64)
}

/// By CL.
pub(super) fn shift_rc<O: Shift, const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let count = register(cpu, Gpr::Rcx as u8);
    shifted::<O, S>(cpu, op, count)
}

// ---- multiplication ----

#[inline(always)]
fn product<const S: usize>(cpu: &mut Cpu, op: &Op, a: u64, b: u64) -> Go {
    let (product, overflow) = multiply_divide::signed_product(a, b, S);
    write::<S>(cpu, op.target, product as u64 & mask(S));
    multiply_divide::set_product_flags(cpu, overflow);
    Go::Next
}

pub(super) fn imul_rr<const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let (a, b) = (read::<S>(cpu, op.target), read::<S>(cpu, op.source));
    product::<S>(cpu, op, a, b)
}

pub(super) fn imul_rm<const S: usize>(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let b = known!(load::<S>(cpu, c, linear(cpu, op)));
    let a = read::<S>(cpu, op.target);
    product::<S>(cpu, op, a, b)
}

pub(super) fn imul_rri<const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let a = read::<S>(cpu, op.source);
    product::<S>(cpu, op, a, immediate::<S>(op))
}

// ---- moves ----

pub(super) fn mov_rr<const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let v = read::<S>(cpu, op.source);
    write::<S>(cpu, op.target, v);
    Go::Next
}

pub(super) fn mov_ri<const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    write::<S>(cpu, op.target, immediate::<S>(op));
    Go::Next
}

pub(super) fn mov_rm<const S: usize>(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let v = known!(load::<S>(cpu, c, linear(cpu, op)));
    write::<S>(cpu, op.target, v);
    Go::Next
}

pub(super) fn mov_mr<const S: usize>(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    store::<S>(cpu, c, linear(cpu, op), register(cpu, op.source))
}

pub(super) fn mov_mi<const S: usize>(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    store::<S>(cpu, c, linear(cpu, op), op.immediate as u64)
}

/// MOVZX, and MOVSX where `SIGNED`, from `F` bytes.
pub(super) fn extend_rr<const F: usize, const S: usize, const SIGNED: bool>(
    cpu: &mut Cpu,
    op: &Op,
    _: &Context,
) -> Go {
    let v = read::<F>(cpu, op.source);
    write::<S>(cpu, op.target, extended::<F, S, SIGNED>(v));
    Go::Next
}

pub(super) fn extend_rm<const F: usize, const S: usize, const SIGNED: bool>(
    cpu: &mut Cpu,
    op: &Op,
    c: &Context,
) -> Go {
    let v = known!(load::<F>(cpu, c, linear(cpu, op)));
    write::<S>(cpu, op.target, extended::<F, S, SIGNED>(v));
    Go::Next
}

#[inline(always)]
fn extended<const F: usize, const S: usize, const SIGNED: bool>(v: u64) -> u64 {
    if SIGNED {
        sign_extend(v, F) & mask(S)
    } else {
        v
    }
}

pub(super) fn lea<const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let v = effective(cpu, op);
    write::<S>(cpu, op.target, v & mask(S));
    Go::Next
}

pub(super) fn xchg_rr<const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let (a, b) = (read::<S>(cpu, op.target), read::<S>(cpu, op.source));
    write::<S>(cpu, op.source, a);
    write::<S>(cpu, op.target, b);
    Go::Next
}

/// CDQE, CWDE, CBW: the lower half of rAX sign extended.
pub(super) fn widen<const S: usize>(cpu: &mut Cpu, _: &Op, _: &Context) -> Go {
    let v = sign_extend(register(cpu, 0) & mask(S / 2), S / 2);
    write::<S>(cpu, 0, v & mask(S));
    Go::Next
}

/// CQO, CDQ, CWD: the sign of rAX in all of rDX.
pub(super) fn spread_sign<const S: usize>(cpu: &mut Cpu, _: &Op, _: &Context) -> Go {
    let sign = sign_extend(read::<S>(cpu, 0), S) as i64 >> 63;
    write::<S>(cpu, Gpr::Rdx as u8, sign as u64 & mask(S));
    Go::Next
}

pub(super) fn nop(_: &mut Cpu, _: &Op, _: &Context) -> Go {
    Go::Next
}

/// BT with a bit number in an immediate or a register, on a register.
#[inline(always)]
fn bit_test<const S: usize>(cpu: &mut Cpu, op: &Op, bit: u64) -> Go {
    let v = read::<S>(cpu, op.target) >> (bit & (8 * S as u64 - 1));
    flags::set_some(cpu, CF, v & 1);
    Go::Next
}

pub(super) fn bt_ri<const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    bit_test::<S>(cpu, op, op.immediate as u64)
}

pub(super) fn bt_rr<const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let bit = register(cpu, op.source);
    bit_test::<S>(cpu, op, bit)
}

// ---- the stack ----

#[inline(always)]
fn push(cpu: &mut Cpu, c: &Context, v: u64) -> Go {
    let sp = register(cpu, RSP).wrapping_sub(8);
    let go = store::<8>(cpu, c, sp, v);
    if go != Go::Bail {
        write::<8>(cpu, RSP, sp);
    }
    go
}

#[inline(always)]
fn pop(cpu: &mut Cpu, c: &Context) -> Option<u64> {
    let sp = register(cpu, RSP);
    let v = load::<8>(cpu, c, sp)?;
    write::<8>(cpu, RSP, sp.wrapping_add(8));
    Some(v)
}

pub(super) fn push_r(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let v = register(cpu, op.target);
    push(cpu, c, v)
}

pub(super) fn push_i(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    push(cpu, c, op.immediate as u64)
}

pub(super) fn pop_r(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let v = known!(pop(cpu, c));
    write::<8>(cpu, op.target, v);
    Go::Next
}

pub(super) fn leave(cpu: &mut Cpu, _: &Op, c: &Context) -> Go {
    let frame = register(cpu, RBP);
    let v = known!(load::<8>(cpu, c, frame));
    write::<8>(cpu, RSP, frame.wrapping_add(8));
    write::<8>(cpu, RBP, v);
    Go::Next
}

// ---- control transfer ----

#[inline(always)]
fn jump(cpu: &mut Cpu, to: u64) -> Go {
    if !cpu.canonical(to) {
        return Go::Bail;
    }
    cpu.rip = to;
    Go::Jump
}

fn branch_target(cpu: &Cpu, op: &Op) -> u64 {
    cpu.rip.wrapping_add(op.immediate as u64)
}

pub(super) fn jmp(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    jump(cpu, branch_target(cpu, op))
}

pub(super) fn jmp_r(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let to = register(cpu, op.target);
    jump(cpu, to)
}

pub(super) fn jmp_m(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let to = known!(load::<8>(cpu, c, linear(cpu, op)));
    jump(cpu, to)
}

#[inline(always)]
fn call_to(cpu: &mut Cpu, op: &Op, c: &Context, to: u64) -> Go {
    let back = cpu.rip.wrapping_add(op.end.into());
    if !cpu.canonical(to) || push(cpu, c, back) == Go::Bail {
        return Go::Bail;
    }
    jump(cpu, to)
}

pub(super) fn call(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let to = branch_target(cpu, op);
    call_to(cpu, op, c, to)
}

pub(super) fn call_r(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let to = register(cpu, op.target);
    call_to(cpu, op, c, to)
}

pub(super) fn call_m(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let to = known!(load::<8>(cpu, c, linear(cpu, op)));
    call_to(cpu, op, c, to)
}

pub(super) fn ret(cpu: &mut Cpu, _: &Op, c: &Context) -> Go {
    let to = known!(load::<8>(cpu, c, register(cpu, RSP)));
    let go = jump(cpu, to);
    if go == Go::Jump {
        cpu.gpr[usize::from(RSP)] = register(cpu, RSP).wrapping_add(8);
    }
    go
}

// ---- conditions ----

/// True where the condition with this encoding holds.
#[inline(always)]
fn holds<const CC: u8>(cpu: &Cpu) -> bool {
    let f = cpu.rflags;
    let positive = match CC >> 1 {
        0 => f.contains(Rflags::OF),
        1 => f.contains(Rflags::CF),
        2 => f.contains(Rflags::ZF),
        3 => f.intersects(Rflags::CF | Rflags::ZF),
        4 => f.contains(Rflags::SF),
        5 => f.contains(Rflags::PF),
        6 => f.contains(Rflags::SF) != f.contains(Rflags::OF),
        _ => f.contains(Rflags::ZF) || f.contains(Rflags::SF) != f.contains(Rflags::OF),
    };
    positive != (CC & 1 != 0)
}

pub(super) fn jcc<const CC: u8>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    if holds::<CC>(cpu) {
        return jump(cpu, branch_target(cpu, op));
    }
    Go::Next
}

pub(super) fn set_r<const CC: u8>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let v = holds::<CC>(cpu).into();
    write::<1>(cpu, op.target, v);
    Go::Next
}

pub(super) fn set_m<const CC: u8>(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    store::<1>(cpu, c, linear(cpu, op), holds::<CC>(cpu).into())
}

pub(super) fn cmov_rr<const CC: u8, const S: usize>(cpu: &mut Cpu, op: &Op, _: &Context) -> Go {
    let from = if holds::<CC>(cpu) {
        op.source
    } else {
        op.target
    };
    let v = read::<S>(cpu, from);
    write::<S>(cpu, op.target, v);
    Go::Next
}

pub(super) fn cmov_rm<const CC: u8, const S: usize>(cpu: &mut Cpu, op: &Op, c: &Context) -> Go {
    let loaded = known!(load::<S>(cpu, c, linear(cpu, op)));
    let v = if holds::<CC>(cpu) {
        loaded
    } else {
        read::<S>(cpu, op.target)
    };
    write::<S>(cpu, op.target, v);
    Go::Next
}
