//! Operands of predecoded instructions: registers by number, memory that the TLB knows.

use doppel_memory::{HostPtr, PAGE_MASK};

use super::{Context, Go, Op};
use crate::interpret::register::mask;
use crate::{Cpu, Seg};

/// How an effective address is made; addresses are 64 bits wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// base + displacement
    Base,
    /// base + index × scale + displacement
    BaseIndex,
    /// index × scale + displacement
    Index,
    /// displacement
    Absolute,
    /// RIP + displacement
    Rip,
    /// The base of FS + displacement, with or without a base register.
    Fs,
    FsBase,
    /// The same for GS.
    Gs,
    GsBase,
}

#[inline(always)]
pub(super) fn register(cpu: &Cpu, n: u8) -> u64 {
    cpu.gpr[usize::from(n & 15)]
}

/// The low `S` bytes of a register.
#[inline(always)]
pub(super) fn read<const S: usize>(cpu: &Cpu, n: u8) -> u64 {
    register(cpu, n) & mask(S)
}

/// Writes the low `S` bytes of a register as instructions do; `v` has no bits above them.
#[inline(always)]
pub(super) fn write<const S: usize>(cpu: &mut Cpu, n: u8, v: u64) {
    let r = &mut cpu.gpr[usize::from(n & 15)];
    *r = if S < 4 { *r & !mask(S) | v } else { v };
}

/// The effective address without the segment's base.
#[inline(always)]
pub(super) fn effective(cpu: &Cpu, op: &Op) -> u64 {
    let displacement = op.displacement as u64;
    let index = || register(cpu, op.index) << (op.shift & 3);
    match op.address {
        Address::Base | Address::FsBase | Address::GsBase => {
            register(cpu, op.base).wrapping_add(displacement)
        }
        Address::BaseIndex => register(cpu, op.base)
            .wrapping_add(index())
            .wrapping_add(displacement),
        Address::Index => index().wrapping_add(displacement),
        Address::Rip => cpu.rip.wrapping_add(displacement),
        Address::Absolute | Address::Fs | Address::Gs => displacement,
    }
}

#[inline(always)]
pub(super) fn linear(cpu: &Cpu, op: &Op) -> u64 {
    let base = match op.address {
        Address::Fs | Address::FsBase => cpu.seg[Seg::Fs as usize].base,
        Address::Gs | Address::GsBase => cpu.seg[Seg::Gs as usize].base,
        _ => 0,
    };
    effective(cpu, op).wrapping_add(base)
}

#[inline(always)]
fn value<const S: usize>(p: HostPtr) -> u64 {
    match S {
        1 => p.load::<u8>().into(),
        2 => p.load::<u16>().into(),
        4 => p.load::<u32>().into(),
        _ => p.load::<u64>(),
    }
}

#[inline(always)]
fn put<const S: usize>(p: HostPtr, v: u64) {
    match S {
        1 => p.store(v as u8),
        2 => p.store(v as u16),
        4 => p.store(v as u32),
        _ => p.store(v),
    }
}

/// Loads `S` bytes where the TLB knows the page. (It knows canonical addresses alone.)
#[inline(always)]
pub(super) fn load<const S: usize>(cpu: &Cpu, c: &Context, linear: u64) -> Option<u64> {
    let p = cpu.tlb[c.privilege as usize].lookup_read(linear, S)?;
    Some(value::<S>(p))
}

/// Stores the low `S` bytes of `v` where the TLB knows the page.
#[inline(always)]
pub(super) fn store<const S: usize>(cpu: &Cpu, c: &Context, linear: u64, v: u64) -> Go {
    match cpu.tlb[c.privilege as usize].lookup_write(linear, S) {
        Some(p) => {
            put::<S>(p, v);
            stored(c, p)
        }
        None => Go::Bail,
    }
}

/// Replaces the `S` bytes at `linear` by what `f` makes of them, and hands on what else it returns.
#[inline(always)]
pub(super) fn modify<const S: usize, R>(
    cpu: &Cpu,
    c: &Context,
    linear: u64,
    f: impl FnOnce(u64) -> (u64, R),
) -> Option<(Go, R)> {
    let p = cpu.tlb[c.privilege as usize].lookup_write(linear, S)?;
    let (new, out) = f(value::<S>(p));
    put::<S>(p, new);
    Some((stored(c, p), out))
}

/// After a store to the page that the block lies on, its bytes have to be compared again.
#[inline(always)]
fn stored(c: &Context, p: HostPtr) -> Go {
    if p.addr() & !PAGE_MASK == c.page.host.addr() {
        Go::Stop
    } else {
        Go::Next
    }
}
