//! String instructions and their repetition.
//!
//! Problem: `rep movs` and `rep stos` move whole pages; a unit at a time they would take most of a boot.
//! Idea: a repetition runs unit by unit, and wherever it stands on pages of RAM, as many units as stay on
//! them go in one copy, fill or comparison, up or down. Invariant: after every unit the registers are exact, so
//! that a fault or an interrupt finds the instruction restartable. One step is bounded: a long repetition
//! returns [`Flow::Repeat`] after [`BATCH`] units or bytes and goes on with the next step.

use doppel_memory::HostPtr;
use iced_x86::{Code, Instruction, OpKind};

use super::flags;
use super::operand::{implied_segment, linear_in, load, segment_of, store};
use super::register::{mask, read_gpr, write_gpr};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, Exception, Gpr, Rflags, Seg};

/// Units that a repeated instruction does in one step at most (a bulk copy counts as one).
const BATCH: u32 = 64;
const DR7_ENABLES: u64 = 0xff;
const PAGE: u64 = doppel_memory::PAGE_SIZE;
/// Bytes that a bulk comparison looks at: most end early.
const CHUNK: usize = 128;

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
        let segment = implied_segment(cpu, self.segment);
        linear_in(cpu, segment, offset, self.unit, false)
    }

    fn destination(&self, cpu: &Cpu, write: bool) -> Result<u64, Exception> {
        let offset = read_gpr(cpu, RDI, self.address);
        linear_in(cpu, Seg::Es, offset, self.unit, write)
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
    let before = cpu.rflags;
    let flow = repeat_batch(cpu, bus, shape, batch, one);
    let done = matches!(flow, Ok(Flow::Next));
    if !done && cpu.cpuid.traits().repetition_sets_flags_at_end {
        cpu.rflags = before;
    }
    flow
}

fn repeat_batch(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    shape: Shape,
    batch: u32,
    one: impl Fn(&mut Cpu, &mut dyn Bus, Shape, u64) -> Result<(u64, bool), Exception>,
) -> Step {
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
        if cpu.breakpoint_hits != 0 {
            break;
        }
    }
    Ok(if left == 0 { Flow::Next } else { Flow::Repeat })
}

/// One side of a bulk operation.
#[derive(Clone, Copy)]
struct Side {
    seg: Seg,
    /// The index register.
    register: usize,
    /// Where the next unit lies.
    linear: u64,
    write: bool,
}

impl Side {
    fn source(shape: Shape, linear: u64) -> Self {
        Side {
            seg: shape.segment,
            register: RSI,
            linear,
            write: false,
        }
    }

    fn destination(linear: u64, write: bool) -> Self {
        Side {
            seg: Seg::Es,
            register: RDI,
            linear,
            write,
        }
    }

    /// Units from here on, in the direction of DF, that lie on this page and before the index register wraps.
    fn units(&self, cpu: &Cpu, shape: Shape) -> u64 {
        let (unit, in_page) = (shape.unit as u64, self.linear % PAGE);
        let index = read_gpr(cpu, self.register, shape.address);
        if !cpu.rflags.contains(Rflags::DF) {
            return ((PAGE - in_page) / unit).min((mask(shape.address) - index) / unit);
        }
        if in_page + unit > PAGE {
            return 0;
        }
        (in_page / unit + 1).min(index / unit + 1)
    }

    /// The lowest byte of `units` units, where the page is RAM and all of them may be accessed. A write is noted already.
    fn open(&self, cpu: &mut Cpu, shape: Shape, units: u64) -> Option<HostPtr> {
        if cpu.dr[7] & DR7_ENABLES != 0 {
            return None; // a data breakpoint stops at its unit
        }
        let len = units as usize * shape.unit;
        let down = if cpu.rflags.contains(Rflags::DF) {
            (len - shape.unit) as u64
        } else {
            0
        };
        let lowest = read_gpr(cpu, self.register, shape.address).wrapping_sub(down);
        linear_in(cpu, self.seg, lowest, len, self.write).ok()?;
        let (at, privilege) = (self.linear - down, cpu.privilege());
        if self.write {
            return cpu.rmw_ptr(at, len, privilege).ok()?;
        }
        cpu.read_ptr(at, len, privilege).ok()?
    }
}

/// Units that a bulk operation on these sides may do; 0 where it does not pay or a unit crosses pages.
fn bulk_units(cpu: &Cpu, shape: Shape, left: u64, sides: &[Side]) -> u64 {
    if left < 2 {
        return 0;
    }
    sides
        .iter()
        .fold(left, |n, side| n.min(side.units(cpu, shape)))
}

fn movs(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    repeat(cpu, bus, i, |cpu, bus, shape, left| {
        let from = shape.source(cpu)?;
        let to = match shape.destination(cpu, true) {
            Ok(to) => to,
            // The source's faults come first.
            Err(e) => return load(cpu, bus, from, shape.unit).and(Err(e)),
        };
        let sides = [Side::source(shape, from), Side::destination(to, true)];
        let bulk = bulk_units(cpu, shape, left, &sides);
        let units = match copy_bulk(cpu, shape, bulk, sides) {
            Some(()) => bulk,
            None => {
                let v = load(cpu, bus, from, shape.unit)?;
                store(cpu, bus, to, shape.unit, v)?;
                1
            }
        };
        shape.advance(cpu, RSI, units);
        shape.advance(cpu, RDI, units);
        Ok((units, true))
    })
}

/// Copies up to a page, unless the units that are written are read later in the same copy.
fn copy_bulk(cpu: &mut Cpu, shape: Shape, units: u64, [source, target]: [Side; 2]) -> Option<()> {
    if units < 2 {
        return None;
    }
    // The source first: a fault on it comes before the target's page turns dirty.
    let from = source.open(cpu, shape, units)?;
    let to = target.open(cpu, shape, units)?;
    let len = units as usize * shape.unit;
    let ahead = if cpu.rflags.contains(Rflags::DF) {
        from.addr().wrapping_sub(to.addr())
    } else {
        to.addr().wrapping_sub(from.addr())
    };
    if ahead != 0 && ahead < len as u64 {
        return None;
    }
    to.copy_from(from, len);
    Some(())
}

fn stos(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    repeat(cpu, bus, i, |cpu, bus, shape, left| {
        let to = shape.destination(cpu, true)?;
        let v = read_gpr(cpu, RAX, shape.unit);
        let side = Side::destination(to, true);
        let bulk = bulk_units(cpu, shape, left, &[side]);
        let target = (bulk > 0).then(|| side.open(cpu, shape, bulk)).flatten();
        let units = match target {
            Some(p) => {
                p.fill(bulk as usize * shape.unit, v, shape.unit);
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
    repeat(cpu, bus, i, |cpu, bus, shape, left| {
        let to = shape.destination(cpu, false)?;
        // Where both fault, processors name the destination.
        let from = match shape.source(cpu) {
            Err(fault) => {
                load(cpu, bus, to, shape.unit)?;
                return Err(fault);
            }
            from => from?,
        };
        let sides = [Side::source(shape, from), Side::destination(to, false)];
        let bulk = compare_bulk(cpu, shape, left, i, sides, None);
        let (units, a, b) = match bulk {
            Some(found) => found,
            None => {
                let b = load(cpu, bus, to, shape.unit)?;
                (1, load(cpu, bus, from, shape.unit)?, b)
            }
        };
        flags::set(cpu, flags::sub(a, b, 0, shape.unit).1);
        shape.advance(cpu, RSI, units);
        shape.advance(cpu, RDI, units);
        Ok((units, goes_on(cpu, i)))
    })
}

fn scas(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    repeat(cpu, bus, i, |cpu, bus, shape, left| {
        let to = shape.destination(cpu, false)?;
        let a = read_gpr(cpu, RAX, shape.unit);
        let sides = [Side::destination(to, false)];
        let bulk = compare_bulk(cpu, shape, left, i, sides, Some(a));
        let (units, a, b) = match bulk {
            Some(found) => found,
            None => (1, a, load(cpu, bus, to, shape.unit)?),
        };
        flags::set(cpu, flags::sub(a, b, 0, shape.unit).1);
        shape.advance(cpu, RDI, units);
        Ok((units, goes_on(cpu, i)))
    })
}

/// Compares the units of two sides, or of one with `value`, up to the one that ends the repetition. Returns how many were
/// compared, and the operands of the last comparison.
fn compare_bulk<const N: usize>(
    cpu: &mut Cpu,
    shape: Shape,
    left: u64,
    i: &Instruction,
    sides: [Side; N],
    value: Option<u64>,
) -> Option<(u64, u64, u64)> {
    let units = bulk_units(cpu, shape, left, &sides).min((CHUNK / shape.unit) as u64);
    if units < 2 {
        return None;
    }
    let mut bytes = [[0; CHUNK]; N];
    let len = units as usize * shape.unit;
    for (side, bytes) in sides.iter().zip(&mut bytes) {
        side.open(cpu, shape, units)?.read(&mut bytes[..len]);
    }
    let down = cpu.rflags.contains(Rflags::DF);
    let operands = |n: u64| {
        let n = if down { units - 1 - n } else { n };
        let at = n as usize * shape.unit;
        let a = value.unwrap_or_else(|| unit_at(&bytes[0], at, shape.unit));
        (a, unit_at(&bytes[N - 1], at, shape.unit))
    };
    let while_equal = !i.has_repne_prefix();
    let end = (0..units).find(|n| {
        let (a, b) = operands(*n);
        (a == b) != while_equal
    });
    let last = end.unwrap_or(units - 1);
    let (a, b) = operands(last);
    Some((last + 1, a, b))
}

/// The unit at an offset.
fn unit_at(bytes: &[u8; CHUNK], at: usize, unit: usize) -> u64 {
    let mut v = [0; 8];
    v[..unit].copy_from_slice(&bytes[at..at + unit]);
    u64::from_le_bytes(v)
}
