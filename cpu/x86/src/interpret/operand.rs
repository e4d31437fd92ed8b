//! Operands: effective and linear addresses, loads, stores and read-modify-writes with all their checks.
//!
//! Nothing here changes the CPU's state before its last check has passed, so that an instruction is free to
//! give up at any `?`.

use doppel_memory::HostPtr;
use iced_x86::{Instruction, OpKind, Register};

use super::register::{mask, read_register, register_size, write_register};
use crate::{Bus, Cpu, CpuMode, Cr0, Exception, Rflags, Seg, Segment};

/// The offset that the memory operand names, truncated to the address size.
pub(crate) fn effective_address(cpu: &Cpu, i: &Instruction) -> u64 {
    let base = i.memory_base();
    let displacement = i.memory_displacement64();
    match base {
        // The decoder has added the address of the next instruction already.
        Register::RIP => return displacement,
        Register::EIP => return displacement & 0xffff_ffff,
        _ => {}
    }
    let index = i.memory_index();
    let offset = read_register(cpu, base)
        .wrapping_add(read_register(cpu, index).wrapping_mul(u64::from(i.memory_index_scale())))
        .wrapping_add(displacement);
    offset & mask(address_size(i))
}

/// Bytes of the memory operand's addresses: 2, 4 or 8.
pub(crate) fn address_size(i: &Instruction) -> usize {
    match (i.memory_base(), i.memory_index()) {
        (Register::None, index) if index == Register::None || index.is_vector_register() => {
            match i.memory_displ_size() {
                2 => 2,
                8 => 8,
                _ => 4,
            }
        }
        (Register::None, index) => register_size(index),
        (Register::RIP, _) => 8,
        (Register::EIP, _) => 4,
        (base, _) => register_size(base),
    }
}

/// The linear address of the memory operand; `size` bytes from there may be accessed as far as segmentation,
/// canonicality and alignment checks go (paging is for the access itself).
#[inline]
pub(crate) fn linear(
    cpu: &Cpu,
    i: &Instruction,
    size: usize,
    write: bool,
) -> Result<u64, Exception> {
    linear_of(cpu, i, effective_address(cpu, i), size, write)
}

/// The linear address of the memory operand, whether it may be accessed or not.
pub(crate) fn linear_unchecked(cpu: &Cpu, i: &Instruction) -> u64 {
    let offset = effective_address(cpu, i);
    if cpu.mode() != CpuMode::Bits64 {
        let base = cpu.seg[segment_of(i.memory_segment()) as usize].base;
        return base.wrapping_add(offset) & 0xffff_ffff;
    }
    long_base(cpu, i).0.wrapping_add(offset)
}

/// [`linear`] for what lies `delta` bytes (modulo the address size) from the memory operand.
pub(crate) fn linear_displaced(
    cpu: &Cpu,
    i: &Instruction,
    delta: u64,
    size: usize,
    write: bool,
) -> Result<u64, Exception> {
    let offset = effective_address(cpu, i).wrapping_add(delta) & mask(address_size(i));
    linear_of(cpu, i, offset, size, write)
}

/// [`linear`] for a part of the memory operand that begins `delta` bytes from its beginning, whose size was not known there. As in one
/// access, addresses do not begin anew in between.
pub(crate) fn linear_of_part(
    cpu: &Cpu,
    i: &Instruction,
    delta: u64,
    size: usize,
    write: bool,
) -> Result<u64, Exception> {
    let offset = effective_address(cpu, i).wrapping_add(delta);
    linear_of(cpu, i, offset, size, write)
}

#[inline]
fn linear_of(
    cpu: &Cpu,
    i: &Instruction,
    offset: u64,
    size: usize,
    write: bool,
) -> Result<u64, Exception> {
    if cpu.mode() != CpuMode::Bits64 {
        return segmented(cpu, segment_of(i.memory_segment()), offset, size, write);
    }
    let (base, stack) = long_base(cpu, i);
    flat(cpu, base.wrapping_add(offset), size, stack)
}

/// In 64-bit mode: the base of the memory operand's segment, and whether that is the stack's.
#[inline]
fn long_base(cpu: &Cpu, i: &Instruction) -> (u64, bool) {
    match i.segment_prefix() {
        Register::FS => (cpu.seg[Seg::Fs as usize].base, false),
        Register::GS => (cpu.seg[Seg::Gs as usize].base, false),
        // The other prefixes are ignored.
        _ => (0, uses_stack(i.memory_base())),
    }
}

fn uses_stack(base: Register) -> bool {
    matches!(
        base,
        Register::RSP | Register::RBP | Register::ESP | Register::EBP
    )
}

/// The segment of an operand whose address the instruction implies: a prefix that 64-bit mode ignores does not make it an access to the stack.
pub(crate) fn implied_segment(cpu: &Cpu, named: Seg) -> Seg {
    match named {
        Seg::Ss if cpu.mode() == CpuMode::Bits64 => Seg::Ds,
        segment => segment,
    }
}

/// The linear address of `offset` in a segment, checked for an access of `size` bytes in any mode.
pub(crate) fn linear_in(
    cpu: &Cpu,
    seg: Seg,
    offset: u64,
    size: usize,
    write: bool,
) -> Result<u64, Exception> {
    if cpu.mode() != CpuMode::Bits64 {
        return segmented(cpu, seg, offset, size, write);
    }
    let base = match seg {
        Seg::Fs | Seg::Gs => cpu.seg[seg as usize].base,
        _ => 0,
    };
    flat(cpu, base.wrapping_add(offset), size, seg == Seg::Ss)
}

#[inline]
fn flat(cpu: &Cpu, linear: u64, size: usize, stack: bool) -> Result<u64, Exception> {
    let last = linear.wrapping_add(size as u64).wrapping_sub(1);
    if cpu.canonical(linear) {
        let whole = cpu.canonical(last);
        if whole || cpu.cpuid.traits().alignment_before_last_address {
            check_alignment(cpu, linear, size)?;
        }
        if whole {
            return Ok(linear);
        }
    }
    Err(if stack {
        Exception::ss(0)
    } else {
        Exception::gp(0)
    })
}

/// #AC(0) for a misaligned access at CPL 3 where the guest asked for alignment checks.
#[inline]
fn check_alignment(cpu: &Cpu, linear: u64, size: usize) -> Result<(), Exception> {
    if cpu.cpl == 3 && cpu.rflags.contains(Rflags::AC) {
        return alignment_checked(cpu, linear, size);
    }
    Ok(())
}

/// The same where CPL and AC ask for it.
#[cold]
pub(crate) fn alignment_checked(cpu: &Cpu, linear: u64, size: usize) -> Result<(), Exception> {
    let unit = match size {
        1 | 2 | 4 | 8 => size,
        // An x87 number.
        10 => 8,
        // Its environment and its state.
        28 | 108 => 4,
        14 | 94 => 2,
        // Those of 32 bytes are two of 16.
        16 | 32 if cpu.cpuid.traits().vectors_checked_for_alignment => 16,
        // Larger operands have rules of their own.
        _ => 1,
    };
    if cpu.cr0.contains(Cr0::AM) && linear & (unit as u64 - 1) != 0 {
        return Err(Exception::AC);
    }
    Ok(())
}

fn segmented(cpu: &Cpu, seg: Seg, offset: u64, size: usize, write: bool) -> Result<u64, Exception> {
    let s = &cpu.seg[seg as usize];
    let protected = !matches!(cpu.mode(), CpuMode::Real | CpuMode::V86);
    if !in_limit(s, offset, size) || (protected && !allows(s, write)) {
        return Err(if seg == Seg::Ss {
            Exception::ss(0)
        } else {
            Exception::gp(0)
        });
    }
    let linear = s.base.wrapping_add(offset) & 0xffff_ffff;
    check_alignment(cpu, linear, size)?;
    Ok(linear)
}

/// True where the segment may be read (or written): present, and of a type with that right.
fn allows(s: &Segment, write: bool) -> bool {
    let code = s.kind() & 8 != 0;
    let read_or_write = s.kind() & 2 != 0;
    !s.unusable()
        && if write {
            !code && read_or_write
        } else {
            !code || read_or_write
        }
}

fn in_limit(s: &Segment, offset: u64, size: usize) -> bool {
    let last = offset + size.max(1) as u64 - 1;
    let limit = u64::from(s.limit);
    let expand_down = s.kind() & 0b1100 == 0b0100;
    if expand_down {
        let top = if s.big() { 0xffff_ffff } else { 0xffff };
        offset > limit && last <= top
    } else {
        last <= limit
    }
}

/// The [`Seg`] that a decoded segment register stands for.
pub(crate) fn segment_of(r: Register) -> Seg {
    match r {
        Register::ES => Seg::Es,
        Register::CS => Seg::Cs,
        Register::SS => Seg::Ss,
        Register::FS => Seg::Fs,
        Register::GS => Seg::Gs,
        _ => Seg::Ds,
    }
}

/// Loads `size` bytes (1, 2, 4 or 8) at a linear address with the current privilege.
#[inline]
pub(crate) fn load(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    linear: u64,
    size: usize,
) -> Result<u64, Exception> {
    let p = cpu.privilege();
    Ok(match size {
        1 => cpu.load::<u8>(bus, linear, p)?.into(),
        2 => cpu.load::<u16>(bus, linear, p)?.into(),
        4 => cpu.load::<u32>(bus, linear, p)?.into(),
        _ => cpu.load::<u64>(bus, linear, p)?,
    })
}

/// Stores `size` bytes (1, 2, 4 or 8) at a linear address with the current privilege.
#[inline]
pub(crate) fn store(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    linear: u64,
    size: usize,
    v: u64,
) -> Result<(), Exception> {
    let p = cpu.privilege();
    match size {
        1 => cpu.store(bus, linear, p, v as u8),
        2 => cpu.store(bus, linear, p, v as u16),
        4 => cpu.store(bus, linear, p, v as u32),
        _ => cpu.store(bus, linear, p, v),
    }
}

/// Bytes of operand `op`, where it is a register, an immediate or the (explicit) memory operand.
#[inline]
pub(crate) fn operand_size(i: &Instruction, op: u32) -> usize {
    match i.op_kind(op) {
        OpKind::Register => register_size(i.op_register(op)),
        OpKind::Memory => i.memory_size().size().clamp(1, 8),
        OpKind::Immediate8 | OpKind::Immediate8_2nd => 1,
        OpKind::Immediate16 | OpKind::Immediate8to16 => 2,
        OpKind::Immediate32 | OpKind::Immediate8to32 => 4,
        _ => 8,
    }
}

/// The value of operand `op` (register, immediate or memory), zero extended; immediates come sign extended
/// where the encoding says so.
#[inline]
pub(crate) fn read_operand(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    op: u32,
) -> Result<u64, Exception> {
    match i.op_kind(op) {
        OpKind::Register => Ok(read_register(cpu, i.op_register(op))),
        OpKind::Memory => {
            let size = operand_size(i, op);
            let at = linear(cpu, i, size, false)?;
            load(cpu, bus, at, size)
        }
        _ => Ok(i.try_immediate(op).unwrap_or(0)),
    }
}

/// Writes operand `op`, a register or memory. On `Err` nothing has changed.
#[inline]
pub(crate) fn write_operand(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    op: u32,
    v: u64,
) -> Result<(), Exception> {
    if i.op_kind(op) == OpKind::Register {
        write_register(cpu, i.op_register(op), v);
        return Ok(());
    }
    let size = operand_size(i, op);
    let at = linear(cpu, i, size, true)?;
    store(cpu, bus, at, size, v)
}

/// Reads operand `op`, and writes what `f` makes of it; `f` also returns a value for the caller. With a `lock` prefix the
/// exchange is atomic, and `f` may be called more than once. On `Err` nothing has changed.
#[inline]
pub(crate) fn modify<R>(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    op: u32,
    f: impl FnMut(u64) -> (u64, R),
) -> Result<R, Exception> {
    let mut f = f;
    if i.op_kind(op) == OpKind::Register {
        let r = i.op_register(op);
        let (new, out) = f(read_register(cpu, r));
        write_register(cpu, r, new);
        return Ok(out);
    }
    let size = operand_size(i, op);
    let at = linear(cpu, i, size, true)?;
    modify_linear(cpu, bus, at, size, i.has_lock_prefix(), f)
}

/// [`modify`] for `size` bytes (1, 2, 4 or 8) at a linear address.
pub(crate) fn modify_linear<R>(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    at: u64,
    size: usize,
    atomic: bool,
    mut f: impl FnMut(u64) -> (u64, R),
) -> Result<R, Exception> {
    let privilege = cpu.privilege();
    if atomic && crosses_lines(at, size) {
        let lone = |bytes: u64| f(bytes);
        if let Some(out) = cpu.modify_alone(at, size, privilege, lone)? {
            return Ok(out);
        }
    }
    let Some(p) = cpu.rmw_ptr(at, size, privilege)? else {
        // A device, or two pages: the second must be writable before the first is read.
        cpu.check_writable(at, size, privilege)?;
        let (new, out) = f(load(cpu, bus, at, size)?);
        store(cpu, bus, at, size, new)?;
        return Ok(out);
    };
    if atomic {
        return Ok(exchange_loop(p, size, f));
    }
    let (new, out) = f(load_ptr(p, size));
    store_ptr(p, size, new);
    Ok(out)
}

/// True where a locked access is one to two lines of the cache, for which a processor locks its bus.
fn crosses_lines(at: u64, size: usize) -> bool {
    const LINE: u64 = 64;
    at % LINE + size as u64 > LINE
}

fn exchange_loop<R>(p: HostPtr, size: usize, mut f: impl FnMut(u64) -> (u64, R)) -> R {
    let mut old = load_ptr(p, size);
    loop {
        let (new, out) = f(old);
        match compare_exchange(p, size, old, new) {
            Ok(()) => return out,
            Err(seen) => old = seen,
        }
    }
}

fn compare_exchange(p: HostPtr, size: usize, old: u64, new: u64) -> Result<(), u64> {
    match size {
        1 => p
            .compare_exchange(old as u8, new as u8)
            .map_err(u64::from)
            .map(drop),
        2 => p
            .compare_exchange(old as u16, new as u16)
            .map_err(u64::from)
            .map(drop),
        4 => p
            .compare_exchange(old as u32, new as u32)
            .map_err(u64::from)
            .map(drop),
        _ => p.compare_exchange(old, new).map(drop),
    }
}

#[inline]
fn load_ptr(p: HostPtr, size: usize) -> u64 {
    match size {
        1 => p.load::<u8>().into(),
        2 => p.load::<u16>().into(),
        4 => p.load::<u32>().into(),
        _ => p.load::<u64>(),
    }
}

#[inline]
fn store_ptr(p: HostPtr, size: usize, v: u64) {
    match size {
        1 => p.store(v as u8),
        2 => p.store(v as u16),
        4 => p.store(v as u32),
        _ => p.store(v),
    }
}
