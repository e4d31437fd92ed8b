//! The stack: push and pop in every mode.

use super::operand;
use super::register::{mask, read_gpr, write_gpr};
use crate::{Bus, Cpu, CpuMode, Exception, Gpr, Seg};

/// Bytes of the stack pointer in use: RSP, ESP or SP.
#[inline]
pub(crate) fn stack_size(cpu: &Cpu) -> usize {
    match cpu.mode() {
        CpuMode::Bits64 => 8,
        CpuMode::V86 => 2,
        _ if cpu.seg[Seg::Ss as usize].big() => 4,
        _ => 2,
    }
}

/// The stack pointer, truncated to its size.
#[inline]
pub(crate) fn stack_pointer(cpu: &Cpu) -> u64 {
    read_gpr(cpu, Gpr::Rsp as usize, stack_size(cpu))
}

/// Sets the stack pointer; bits above its size stay (RSP's upper half is cleared where ESP is the stack pointer).
#[inline]
pub(crate) fn set_stack_pointer(cpu: &mut Cpu, v: u64) {
    let size = stack_size(cpu);
    write_gpr(cpu, Gpr::Rsp as usize, size, v);
}

/// The linear address of `size` bytes at offset `sp` of the stack; #SS(0) where they are not in it.
#[inline]
pub(crate) fn stack_linear(cpu: &Cpu, sp: u64, size: usize, write: bool) -> Result<u64, Exception> {
    operand::linear_in(cpu, Seg::Ss, sp & mask(stack_size(cpu)), size, write)
}

/// Pushes `size` bytes (2, 4 or 8). On `Err` nothing has changed.
#[inline]
pub(crate) fn push(cpu: &mut Cpu, bus: &mut dyn Bus, size: usize, v: u64) -> Result<(), Exception> {
    let sp = stack_pointer(cpu).wrapping_sub(size as u64);
    let at = stack_linear(cpu, sp, size, true)?;
    operand::store(cpu, bus, at, size, v)?;
    set_stack_pointer(cpu, sp);
    Ok(())
}

/// Loads the item of `size` bytes that lies `offset` bytes above the stack pointer.
#[inline]
pub(crate) fn peek(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    size: usize,
    offset: u64,
) -> Result<u64, Exception> {
    let sp = stack_pointer(cpu).wrapping_add(offset);
    let at = stack_linear(cpu, sp, size, false)?;
    operand::load(cpu, bus, at, size)
}

/// Adds `bytes` to the stack pointer.
#[inline]
pub(crate) fn release(cpu: &mut Cpu, bytes: u64) {
    let sp = stack_pointer(cpu).wrapping_add(bytes);
    set_stack_pointer(cpu, sp);
}

/// Pops `size` bytes (2, 4 or 8). On `Err` nothing has changed.
#[inline]
pub(crate) fn pop(cpu: &mut Cpu, bus: &mut dyn Bus, size: usize) -> Result<u64, Exception> {
    let v = peek(cpu, bus, size, 0)?;
    release(cpu, size as u64);
    Ok(v)
}
