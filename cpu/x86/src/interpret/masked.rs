//! Instructions whose memory operand is many elements, each selected by a mask: AVX-512 masking, masked moves, gathers, scatters.
//!
//! An element that is not selected is neither accessed nor may it fault. Loads first try the whole operand, for that
//! rarely faults, and only then go element by element.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::availability::Unit;
use super::native::{host_has, host_layout};
use super::operand::{
    implied_segment, linear, linear_displaced, linear_in, load, segment_of, store,
};
use super::register::{read_gpr, read_register, sign_extend};
use super::vector::{self, Layout};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, CpuMode, Exception, FpuArea, Gpr, Rflags};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    Some(match i.mnemonic() {
        Maskmovq | Maskmovdqu | Vmaskmovdqu => mask_move_bytes,
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => mask_move,
        Vgatherdps | Vgatherdpd | Vgatherqps | Vgatherqpd | Vpgatherdd | Vpgatherdq
        | Vpgatherqd | Vpgatherqq => gather,
        Vscatterdps | Vscatterdpd | Vscatterqps | Vscatterqpd | Vpscatterdd | Vpscatterdq
        | Vpscatterqd | Vpscatterqq => scatter,
        _ => return None,
    })
}

/// The elements of a memory operand under an AVX-512 mask.
pub(super) struct Elements {
    /// Bytes of one.
    size: usize,
    count: usize,
    /// Which of them are accessed, a bit each.
    selected: u64,
    /// A fault on one that is not selected is none.
    suppresses: bool,
}

impl Elements {
    pub fn of(i: &Instruction, fpu: &FpuArea, layout: &Layout, bytes: usize) -> Self {
        let size = mask_granularity(i).clamp(1, bytes);
        let count = (bytes / size).min(64);
        let mask = vector::read_mask(fpu, layout, mask_number(i.op_mask()));
        Elements {
            size,
            count,
            selected: selected(i, mask, count, size),
            suppresses: !(shuffles(i.mnemonic()) || shifts_by_memory(i)),
        }
    }

    /// True where nothing is accessed, and so nothing can fault.
    pub fn none(&self) -> bool {
        self.suppresses && self.selected == 0
    }

    fn each(&self) -> impl Iterator<Item = usize> + use<> {
        let selected = self.selected;
        (0..self.count).filter(move |n| selected >> n & 1 != 0)
    }

    /// The address of an operand that may not be accessed as a whole (which led to `fault`), where its selected elements may.
    pub fn address(
        &self,
        cpu: &Cpu,
        i: &Instruction,
        write: bool,
        fault: Exception,
    ) -> Result<u64, Exception> {
        if !self.suppresses {
            return Err(fault);
        }
        if fault == Exception::AC {
            // Of elements that are repeated, or are pairs, the last byte is looked at first.
            let pairs = mask_granularity(i) != i.memory_size().element_size();
            if i.is_broadcast() || pairs {
                linear_displaced(cpu, i, (self.count * self.size) as u64 - 1, 1, write)?;
            }
            return Err(fault);
        }
        self.each().try_fold(0, |_, n| {
            let from = (n * self.size) as u64;
            linear_displaced(cpu, i, from, self.size, write).map(|at| at.wrapping_sub(from))
        })
    }

    /// Loads the selected elements; the others are zero. `fault` is what loading everything led to.
    pub fn load(
        &self,
        cpu: &mut Cpu,
        bus: &mut dyn Bus,
        at: u64,
        out: &mut [u8],
        fault: Exception,
    ) -> Result<(), Exception> {
        if !self.suppresses {
            return Err(fault);
        }
        let privilege = cpu.privilege();
        out.fill(0);
        for n in self.each() {
            let bytes = &mut out[n * self.size..][..self.size];
            cpu.load_bytes(
                bus,
                at.wrapping_add((n * self.size) as u64),
                privilege,
                bytes,
            )?;
        }
        Ok(())
    }

    pub fn check_writable(&self, cpu: &mut Cpu, at: u64) -> Result<(), Exception> {
        let privilege = cpu.privilege();
        if !self.suppresses {
            return cpu.check_writable(at, self.size * self.count, privilege);
        }
        self.each().try_for_each(|n| {
            cpu.check_writable(
                at.wrapping_add((n * self.size) as u64),
                self.size,
                privilege,
            )
        })
    }

    pub fn store(
        &self,
        cpu: &mut Cpu,
        bus: &mut dyn Bus,
        at: u64,
        bytes: &[u8],
    ) -> Result<(), Exception> {
        let privilege = cpu.privilege();
        self.each().try_for_each(|n| {
            let element = &bytes[n * self.size..][..self.size];
            cpu.store_bytes(
                bus,
                at.wrapping_add((n * self.size) as u64),
                privilege,
                element,
            )
        })
    }
}

fn mask_number(r: Register) -> usize {
    (r as usize).wrapping_sub(Register::K0 as usize) & 7
}

/// The bits of the lowest `n` elements.
fn lowest(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// Which elements in memory the mask selects.
fn selected(i: &Instruction, mask: u64, count: usize, size: usize) -> u64 {
    use Mnemonic::*;
    let repeated = i.is_broadcast()
        || matches!(
            i.mnemonic(),
            Vbroadcastss
                | Vbroadcastsd
                | Vbroadcastf32x2
                | Vbroadcasti32x2
                | Vbroadcastf32x4
                | Vbroadcasti32x4
                | Vbroadcastf32x8
                | Vbroadcasti32x8
                | Vbroadcastf64x2
                | Vbroadcasti64x2
                | Vbroadcastf64x4
                | Vbroadcasti64x4
                | Vpbroadcastb
                | Vpbroadcastw
                | Vpbroadcastd
                | Vpbroadcastq
        );
    let packed = matches!(
        i.mnemonic(),
        Vcompressps
            | Vcompresspd
            | Vpcompressb
            | Vpcompressw
            | Vpcompressd
            | Vpcompressq
            | Vexpandps
            | Vexpandpd
            | Vpexpandb
            | Vpexpandw
            | Vpexpandd
            | Vpexpandq
    );
    if packed {
        return lowest((mask & lowest(count)).count_ones() as usize);
    }
    if !repeated {
        return mask & lowest(count);
    }
    let total = if i.is_broadcast() {
        whole_operand(i)
    } else {
        vector_length(i)
    } / size.max(1);
    let wanted = mask & lowest(total);
    (0..total.min(64))
        .filter(|n| wanted >> n & 1 != 0)
        .fold(0, |s, n| s | 1 << (n % count.max(1)))
}

/// Bytes that a bit of the mask stands for.
fn mask_granularity(i: &Instruction) -> usize {
    use Mnemonic::*;
    match i.mnemonic() {
        // Pairs of half-precision numbers, groups of bytes or words that go into one sum.
        Vpdpbusd | Vpdpbusds | Vpdpwssd | Vpdpwssds | Vdpbf16ps | Vfmaddcph | Vfcmaddcph
        | Vfmulcph | Vfcmulcph | Vfmaddcsh | Vfcmaddcsh | Vfmulcsh | Vfcmulcsh => 4,
        Vpmuldq | Vpmuludq => 8,
        _ => i.memory_size().element_size(),
    }
}

/// Bytes of the memory operand if nothing were broadcast.
fn whole_operand(i: &Instruction) -> usize {
    let mut whole = *i;
    whole.set_is_broadcast(false);
    whole.memory_size().size()
}

/// Bytes of the largest vector operand.
fn vector_length(i: &Instruction) -> usize {
    let registers = (0..i.op_count()).filter(|n| i.op_kind(*n) == OpKind::Register);
    registers
        .map(|n| i.op_register(n).size())
        .max()
        .unwrap_or(16)
}

/// Instructions that use elements of their source wherever they land: all of it is loaded whatever the mask says.
fn shuffles(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Valignd
            | Valignq
            | Vdbpsadbw
            | Vmovddup
            | Vmovshdup
            | Vmovsldup
            | Vpackssdw
            | Vpacksswb
            | Vpackusdw
            | Vpackuswb
            | Vcvtne2ps2bf16
            | Vpmaddubsw
            | Vpmaddwd
            | Vgf2p8affineqb
            | Vgf2p8affineinvqb
            | Vextractf32x4
            | Vextractf32x8
            | Vextractf64x2
            | Vextractf64x4
            | Vextracti32x4
            | Vextracti32x8
            | Vextracti64x2
            | Vextracti64x4
            | Vinsertf32x4
            | Vinsertf32x8
            | Vinsertf64x2
            | Vinsertf64x4
            | Vinserti32x4
            | Vinserti32x8
            | Vinserti64x2
            | Vinserti64x4
            | Vpalignr
            | Vpconflictd
            | Vpconflictq
            | Vpermb
            | Vpermd
            | Vpermi2b
            | Vpermi2d
            | Vpermi2pd
            | Vpermi2ps
            | Vpermi2q
            | Vpermi2w
            | Vpermilpd
            | Vpermilps
            | Vpermpd
            | Vpermps
            | Vpermq
            | Vpermt2b
            | Vpermt2d
            | Vpermt2pd
            | Vpermt2ps
            | Vpermt2q
            | Vpermt2w
            | Vpermw
            | Vpmultishiftqb
            | Vpshufb
            | Vpshufd
            | Vpshufhw
            | Vpshuflw
            | Vpunpckhbw
            | Vpunpckhdq
            | Vpunpckhqdq
            | Vpunpckhwd
            | Vpunpcklbw
            | Vpunpckldq
            | Vpunpcklqdq
            | Vpunpcklwd
            | Vshuff32x4
            | Vshuff64x2
            | Vshufi32x4
            | Vshufi64x2
            | Vshufpd
            | Vshufps
            | Vunpckhpd
            | Vunpckhps
            | Vunpcklpd
            | Vunpcklps
    )
}

/// The count of a shift of all elements is no element.
fn shifts_by_memory(i: &Instruction) -> bool {
    use Mnemonic::*;
    let shift = matches!(
        i.mnemonic(),
        Vpslld | Vpsllq | Vpsllw | Vpsrad | Vpsraq | Vpsraw | Vpsrld | Vpsrlq | Vpsrlw
    );
    shift && i.op2_kind() == OpKind::Memory
}

/// What a handler here begins with: the host has the instruction, and the unit is there and switched on.
pub(super) fn begin(cpu: &mut Cpu, i: &Instruction) -> Result<Layout, Exception> {
    host_has(cpu, i)?;
    Unit::of(i).ok_or(Exception::UD)?.check(cpu)?;
    Ok(host_layout(cpu)?.0)
}

fn vector_number(r: Register) -> usize {
    r.number() & 31
}

fn element(v: &[u8; 64], n: usize, size: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes[..size].copy_from_slice(&v[n * size..][..size]);
    u64::from_le_bytes(bytes)
}

fn set_element(v: &mut [u8; 64], n: usize, size: usize, value: u64) {
    v[n * size..][..size].copy_from_slice(&value.to_le_bytes()[..size]);
}

/// A bit for each element whose top bit is set.
fn sign_mask(v: &[u8; 64], count: usize, size: usize) -> u64 {
    (0..count)
        .filter(|n| v[n * size + size - 1] & 0x80 != 0)
        .fold(0, |mask, n| mask | 1 << n)
}

/// maskmovq and maskmovdqu: stores bytes to [rDI].
fn mask_move_bytes(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let layout = begin(cpu, i)?;
    let mmx = i.mnemonic() == Mnemonic::Maskmovq;
    let mut fpu = cpu.fpu.clone();
    if mmx {
        vector::enter_mmx(&mut fpu);
    }
    let read = |r: Register| {
        if mmx {
            let mut v = [0; 64];
            v[..8].copy_from_slice(&vector::read_mmx(&fpu, r.number()).to_le_bytes());
            v
        } else {
            vector::read(&fpu, &layout, vector_number(r))
        }
    };
    let (data, mask) = (read(i.op1_register()), read(i.op2_register()));
    let count = if mmx { 8 } else { 16 };
    let address = match i.op0_kind() {
        OpKind::MemorySegDI => 2,
        OpKind::MemorySegEDI => 4,
        _ => 8,
    };
    let offset = read_gpr(cpu, Gpr::Rdi as usize, address);
    let segment = implied_segment(cpu, segment_of(i.memory_segment()));
    // The alignment that is checked for (#AC) is that of eight bytes, by AMD's processors too.
    let at = linear_in(cpu, segment, offset, 8, true)?;
    linear_in(cpu, segment, offset + (count as u64 - 8), 8, true)?;
    let elements = Elements {
        size: 1,
        count,
        selected: sign_mask(&mask, count, 1),
        suppresses: true,
    };
    elements.check_writable(cpu, at)?;
    elements.store(cpu, bus, at, &data[..count])?;
    cpu.fpu = fpu;
    Ok(Flow::Next)
}

/// vmaskmovps and its kin: the top bit of each element of the mask register selects.
fn mask_move(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let layout = begin(cpu, i)?;
    let bytes = i.memory_size().size().clamp(1, 64);
    let size = i.memory_size().element_size().clamp(1, bytes);
    let is_store = i.op0_kind() == OpKind::Memory;
    let mask = vector::read(&cpu.fpu, &layout, vector_number(i.op1_register()));
    let selected = sign_mask(&mask, bytes / size, size);
    let elements = Elements {
        size,
        count: bytes / size,
        selected,
        suppresses: true,
    };
    // Nobody checks these for alignment.
    let whole = linear(cpu, i, 1, is_store)
        .and_then(|at| linear_displaced(cpu, i, bytes as u64 - 1, 1, is_store).map(|_| at));
    let at = match whole {
        // What is not accessed does not fault.
        Err(_) if elements.none() => 0,
        Err(fault) => elements.address(cpu, i, is_store, fault)?,
        Ok(at) => at,
    };
    if is_store {
        let data = vector::read(&cpu.fpu, &layout, vector_number(i.op2_register()));
        elements.check_writable(cpu, at)?;
        elements.store(cpu, bus, at, &data[..bytes])?;
    } else {
        let mut data = [0; 64];
        elements.load(cpu, bus, at, &mut data[..bytes], Exception::UD)?;
        vector::write(
            &mut cpu.fpu,
            &layout,
            vector_number(i.op0_register()),
            &data,
        );
    }
    Ok(Flow::Next)
}

/// The addresses of a gather or scatter.
struct Indexed {
    indices: [u8; 64],
    index_size: usize,
    element_size: usize,
    count: usize,
}

impl Indexed {
    fn of(i: &Instruction, fpu: &FpuArea, layout: &Layout, data: Register) -> Self {
        use Mnemonic::*;
        let index_size = match i.mnemonic() {
            Vgatherdps | Vgatherdpd | Vpgatherdd | Vpgatherdq | Vscatterdps | Vscatterdpd
            | Vpscatterdd | Vpscatterdq => 4,
            _ => 8,
        };
        let element_size = i.memory_size().element_size().clamp(4, 8);
        let index = i.memory_index();
        let count = (data.size() / element_size).min(index.size() / index_size);
        Indexed {
            indices: vector::read(fpu, layout, vector_number(index)),
            index_size,
            element_size,
            count,
        }
    }

    /// The linear address of element `n`.
    fn at(&self, cpu: &Cpu, i: &Instruction, n: usize, write: bool) -> Result<u64, Exception> {
        let index = sign_extend(element(&self.indices, n, self.index_size), self.index_size);
        let offset = read_register(cpu, i.memory_base())
            .wrapping_add(index.wrapping_mul(i.memory_index_scale().into()))
            .wrapping_add(i.memory_displacement64());
        let narrow = cpu.mode() != CpuMode::Bits64 || i.memory_base().size() == 4;
        let offset = if narrow { offset & 0xffff_ffff } else { offset };
        // The vector index contributes nothing of its own to the effective address.
        let base = super::operand::effective_address(cpu, i);
        // Elements are not checked for alignment: a byte never is misaligned.
        linear_displaced(cpu, i, offset.wrapping_sub(base), 1, write)
    }
}

fn gather(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let layout = begin(cpu, i)?;
    let target = i.op0_register();
    let g = Indexed::of(i, &cpu.fpu, &layout, target);
    let masked_by_vector = i.op_mask() == Register::None;
    let mask_register = if masked_by_vector {
        i.op2_register()
    } else {
        i.op_mask()
    };
    let (t, x, m) = (target, i.memory_index(), mask_register);
    let number = vector_number;
    if number(t) == number(x)
        || masked_by_vector && (number(t) == number(m) || number(x) == number(m))
    {
        return Err(Exception::UD);
    }
    if !masked_by_vector && mask_number(m) == 0 {
        return Err(Exception::UD);
    }
    let whole_mask = vector::read_mask(&cpu.fpu, &layout, mask_number(m));
    let mut mask = if masked_by_vector {
        let v = vector::read(&cpu.fpu, &layout, number(m));
        sign_mask(&v, g.count, g.element_size)
    } else {
        whole_mask & lowest(g.count)
    };
    let mut data = vector::read(&cpu.fpu, &layout, number(t));
    let asked = mask;
    let (done, fault) = gather_elements(cpu, bus, i, &g, &mut mask, &mut data);
    let progress = mask != asked;
    let keeps_rest = masked_by_vector && cpu.cpuid.traits().faulting_gather_keeps_rest;
    if fault.is_some() && keeps_rest {
        let mut left = vector::read(&cpu.fpu, &layout, number(m));
        left[..done * g.element_size].fill(0);
        vector::write(&mut cpu.fpu, &layout, number(t), &data);
        vector::write(&mut cpu.fpu, &layout, number(m), &left);
        return interrupted(cpu, fault, progress);
    }
    if let Some(fault) = fault.filter(|_| !progress && !masked_by_vector) {
        return Err(fault);
    }
    if fault.is_none() || progress {
        let end = match fault {
            None => g.count * g.element_size,
            Some(_) => target.size().max(i.memory_index().size()),
        };
        data[end..].fill(0);
        vector::write(&mut cpu.fpu, &layout, number(t), &data);
    }
    if masked_by_vector {
        let lanes = target.size().max(i.memory_index().size()) / g.element_size;
        let v = vector::read(&cpu.fpu, &layout, number(m));
        let beyond = sign_mask(&v, lanes, g.element_size) & !lowest(g.count);
        let left = match fault {
            None => 0,
            Some(_) => mask | beyond,
        };
        let left = vector_mask(left, lanes, g.element_size);
        vector::write(&mut cpu.fpu, &layout, number(m), &left);
    } else {
        let mask = mask_left(whole_mask, mask, g.count, fault.is_some());
        vector::write_mask(&mut cpu.fpu, &layout, mask_number(m), mask);
    }
    interrupted(cpu, fault, progress)
}

/// Gathers element by element, and clears the mask bit of each that is done: how many of the first are done, and what stopped it.
fn gather_elements(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    g: &Indexed,
    mask: &mut u64,
    data: &mut [u8; 64],
) -> (usize, Option<Exception>) {
    for n in 0..g.count {
        if *mask >> n & 1 != 0 {
            let loaded = g
                .at(cpu, i, n, false)
                .and_then(|at| load(cpu, bus, at, g.element_size));
            match loaded {
                Ok(v) => set_element(data, n, g.element_size, v),
                Err(fault) => return (n, Some(fault)),
            }
            *mask &= !(1 << n);
        }
    }
    (g.count, None)
}

/// The mask register afterwards: zero, or where a fault came in between with the elements that are left to do.
fn mask_left(before: u64, left: u64, count: usize, faulted: bool) -> u64 {
    if faulted {
        before & !lowest(count) | left
    } else {
        0
    }
}

/// A vector with all bits of the elements in `mask` set.
fn vector_mask(mask: u64, count: usize, size: usize) -> [u8; 64] {
    let mut v = [0; 64];
    for n in (0..count).filter(|n| mask >> n & 1 != 0) {
        set_element(&mut v, n, size, u64::MAX);
    }
    v
}

fn scatter(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let layout = begin(cpu, i)?;
    let source = i.op1_register();
    let s = Indexed::of(i, &cpu.fpu, &layout, source);
    let k = mask_number(i.op_mask());
    if k == 0 || i.op_mask() == Register::None {
        return Err(Exception::UD);
    }
    let data = vector::read(&cpu.fpu, &layout, vector_number(source));
    let whole_mask = vector::read_mask(&cpu.fpu, &layout, k);
    let mut mask = whole_mask & lowest(s.count);
    let asked = mask;
    let mut fault = None;
    for n in (0..s.count)
        .filter(|n| mask >> n & 1 != 0)
        .collect::<Vec<_>>()
    {
        let v = element(&data, n, s.element_size);
        let done = s
            .at(cpu, i, n, true)
            .and_then(|at| store(cpu, bus, at, s.element_size, v));
        if let Err(e) = done {
            fault = Some(e);
            break;
        }
        mask &= !(1 << n);
    }
    if let Some(fault) = fault.filter(|_| mask == asked) {
        return Err(fault);
    }
    let mask = mask_left(whole_mask, mask, s.count, fault.is_some());
    vector::write_mask(&mut cpu.fpu, &layout, k, mask);
    interrupted(cpu, fault, true)
}

/// What a gather or scatter ends in: traps that the elements have led to which are done come before the fault of the next.
fn interrupted(cpu: &Cpu, fault: Option<Exception>, progress: bool) -> Step {
    let trapped = progress && (cpu.rflags.contains(Rflags::TF) || cpu.breakpoint_hits != 0);
    match fault {
        None => Ok(Flow::Next),
        Some(_) if trapped => Ok(Flow::Repeat),
        Some(fault) => Err(fault),
    }
}
