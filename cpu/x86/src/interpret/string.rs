//! String instructions and their repetition.
//!
//! Problem: `rep movs` and `rep stos` move whole pages; a unit at a time they would take most of a boot.
//! Idea: a repetition runs unit by unit, and wherever it stands on pages that the TLB knows, as
//! many units as stay on them go in one copy. Invariant: after every unit the registers are exact, so
//! that a fault or an interrupt finds the instruction restartable. One step is bounded: a long repetition
//! returns [`Flow::Repeat`] after [`BATCH`] units or bytes and goes on with the next step.

use doppel_memory::HostPtr;
use iced_x86::{Code, Instruction, OpKind};

use super::flags;
use super::operand::{linear_in, load, segment_of, store};
use super::register::{mask, read_gpr, write_gpr};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, CpuMode, Exception, Gpr, Rflags, Seg};

/// Units that a repeated instruction does in one step at most (a bulk copy counts as one).
const BATCH: u32 = 64;
const PAGE: u64 = doppel_memory::PAGE_SIZE;

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match i.code() {
        Movsb_m8_m8 | Movsw_m16_m16 | Movsd_m32_m32 | Movsq_m64_m64 => movs,
        Stosb_m8_AL | Stosw_m16_AX | Stosd_m32_EAX | Stosq_m64_RAX => stos,
        Lodsb_AL_m8 | Lodsw_AX_m16 | Lodsd_EAX_m32 | Lodsq_RAX_m64 => lods,
        Cmpsb_m8_m8 | Cmpsw_m16_m16 | Cmpsd_m32_m32 | Cmpsq_m64_m64 => cmps,
        Scasb_AL_m8 | Scasw_AX_m16 | Scasd_EAX_m32 | Scasq_RAX_m64 => scas,
        _ => return None,
    })
}

const RAX: usize = Gpr::Rax as usize;
const RCX: usize = Gpr::Rcx as usize;
const RSI: usize = Gpr::Rsi as usize;
const RDI: usize = Gpr::Rdi as usize;

/// What the encoding says about a string instruction.
#[derive(Clone, Copy)]
struct Shape {
    /// Bytes of a unit.
    unit: usize,
    /// Bytes of the index registers and of the counter.
    address: usize,
    /// Segment of the source.
    segment: Seg,
}

impl Shape {
    fn of(i: &Instruction) -> Self {
        let address = [i.op0_kind(), i.op1_kind()]
            .into_iter()
            .find_map(|k| match k {
                OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
                OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
                OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
                _ => None,
            })
            .unwrap_or(8);
        Shape {
            unit: i.memory_size().size(),
            address,
            segment: segment_of(i.memory_segment()),
        }
    }

    fn source(&self, cpu: &Cpu) -> Result<u64, Exception> {
        let offset = read_gpr(cpu, RSI, self.address);
        linear_in(cpu, self.segment, offset, self.unit, false)
    }

    fn destination(&self, cpu: &Cpu, write: bool) -> Result<u64, Exception> {
        linear_in(
            cpu,
            Seg::Es,
            read_gpr(cpu, RDI, self.address),
            self.unit,
            write,
        )
    }

    /// Moves an index register by `units` in the direction of DF.
    fn advance(&self, cpu: &mut Cpu, register: usize, units: u64) {
        let bytes = units.wrapping_mul(self.unit as u64);
        let old = read_gpr(cpu, register, self.address);
        let new = if cpu.rflags.contains(Rflags::DF) {
            old.wrapping_sub(bytes)
        } else {
            old.wrapping_add(bytes)
        };
        write_gpr(cpu, register, self.address, new & mask(self.address));
    }

    fn count(&self, cpu: &Cpu) -> u64 {
        read_gpr(cpu, RCX, self.address)
    }

    fn set_count(&self, cpu: &mut Cpu, n: u64) {
        write_gpr(cpu, RCX, self.address, n);
    }
}

fn repeats(i: &Instruction) -> bool {
    i.has_rep_prefix() || i.has_repne_prefix()
}

/// Runs `one` once, or as often as the repetition and [`BATCH`] say. `one` returns how many units it did (at
/// most as many as it is told remain) and whether the repetition goes on.
fn repeat(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    one: impl Fn(&mut Cpu, &mut dyn Bus, Shape, u64) -> Result<(u64, bool), Exception>,
) -> Step {
    let shape = Shape::of(i);
    if !repeats(i) {
        one(cpu, bus, shape, 1)?;
        return Ok(Flow::Next);
    }
    let batch = if cpu.rflags.contains(Rflags::TF) {
        1
    } else {
        BATCH
    };
    let mut left = shape.count(cpu);
    for _ in 0..batch {
        if left == 0 {
            return Ok(Flow::Next);
        }
        let limit = if batch == 1 { 1 } else { left };
        let (done, more) = one(cpu, bus, shape, limit)?;
        left = left.saturating_sub(done);
        shape.set_count(cpu, left);
        if !more {
            return Ok(Flow::Next);
        }
    }
    Ok(if left == 0 { Flow::Next } else { Flow::Repeat })
}

/// Units that fit on the pages of these linear addresses, going up; 0 where a bulk operation is not possible.
fn bulk_units(cpu: &Cpu, shape: Shape, left: u64, places: &[(u64, usize)]) -> u64 {
    if left < 8 || cpu.rflags.contains(Rflags::DF) || cpu.mode() != CpuMode::Bits64 {
        return 0;
    }
    let in_page = |linear: u64| (PAGE - linear % PAGE) / shape.unit as u64;
    let unwrapped = |register| {
        (mask(shape.address) - read_gpr(cpu, register, shape.address)) / shape.unit as u64
    };
    places.iter().fold(left, |n, &(linear, register)| {
        n.min(in_page(linear)).min(unwrapped(register))
    })
}

fn movs(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    repeat(cpu, bus, i, |cpu, bus, shape, left| {
        let from = shape.source(cpu)?;
        let to = shape.destination(cpu, true)?;
        let bulk = bulk_units(cpu, shape, left, &[(from, RSI), (to, RDI)]);
        let units = if copy_bulk(cpu, from, to, bulk as usize * shape.unit) {
            bulk
        } else {
            let v = load(cpu, bus, from, shape.unit)?;
            store(cpu, bus, to, shape.unit, v)?;
            1
        };
        shape.advance(cpu, RSI, units);
        shape.advance(cpu, RDI, units);
        Ok((units, true))
    })
}

/// Copies up to a page between pages that the TLB knows, unless they overlap.
fn copy_bulk(cpu: &Cpu, from: u64, to: u64, len: usize) -> bool {
    if len == 0 {
        return false;
    }
    let tlb = &cpu.tlb[cpu.privilege() as usize];
    let (Some(source), Some(target)) = (tlb.lookup_read(from, len), tlb.lookup_write(to, len))
    else {
        return false;
    };
    if source.addr().abs_diff(target.addr()) < len as u64 {
        return false;
    }
    let mut page = [0; PAGE as usize];
    let bytes = &mut page[..len];
    source.read(bytes);
    target.write(bytes);
    true
}

fn stos(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    repeat(cpu, bus, i, |cpu, bus, shape, left| {
        let to = shape.destination(cpu, true)?;
        let v = read_gpr(cpu, RAX, shape.unit);
        let bulk = bulk_units(cpu, shape, left, &[(to, RDI)]);
        let tlb = &cpu.tlb[cpu.privilege() as usize];
        let target = tlb.lookup_write(to, bulk as usize * shape.unit);
        let units = match target.filter(|_| bulk > 0) {
            Some(p) => {
                fill(p, bulk as usize * shape.unit, v, shape.unit);
                bulk
            }
            None => {
                store(cpu, bus, to, shape.unit, v)?;
                1
            }
        };
        shape.advance(cpu, RDI, units);
        Ok((units, true))
    })
}

fn fill(p: HostPtr, len: usize, v: u64, unit: usize) {
    let mut page = [0; PAGE as usize];
    let bytes = &mut page[..len];
    let pattern = v.to_le_bytes();
    for (n, b) in bytes.iter_mut().enumerate() {
        *b = pattern[n % unit];
    }
    p.write(bytes);
}

fn lods(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    repeat(cpu, bus, i, |cpu, bus, shape, _| {
        let from = shape.source(cpu)?;
        let v = load(cpu, bus, from, shape.unit)?;
        write_gpr(cpu, RAX, shape.unit, v);
        shape.advance(cpu, RSI, 1);
        Ok((1, true))
    })
}

/// True where a repetition goes on after a comparison that set ZF as it is now.
fn goes_on(cpu: &Cpu, i: &Instruction) -> bool {
    cpu.rflags.contains(Rflags::ZF) != i.has_repne_prefix()
}

fn cmps(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    repeat(cpu, bus, i, |cpu, bus, shape, _| {
        let from = shape.source(cpu)?;
        let to = shape.destination(cpu, false)?;
        let a = load(cpu, bus, from, shape.unit)?;
        let b = load(cpu, bus, to, shape.unit)?;
        flags::set(cpu, flags::sub(a, b, 0, shape.unit).1);
        shape.advance(cpu, RSI, 1);
        shape.advance(cpu, RDI, 1);
        Ok((1, goes_on(cpu, i)))
    })
}

fn scas(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    repeat(cpu, bus, i, |cpu, bus, shape, _| {
        let to = shape.destination(cpu, false)?;
        let b = load(cpu, bus, to, shape.unit)?;
        let a = read_gpr(cpu, RAX, shape.unit);
        flags::set(cpu, flags::sub(a, b, 0, shape.unit).1);
        shape.advance(cpu, RDI, 1);
        Ok((1, goes_on(cpu, i)))
    })
}
