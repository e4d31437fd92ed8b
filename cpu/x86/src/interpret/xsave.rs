//! Saving and loading the extended state: FXSAVE, the XSAVE family, MXCSR (Intel SDM vol. 1, chapter 13).
//!
//! The CPU's state already lies in memory in the standard format, so these are copies between it and guest memory,
//! a component at a time; only the compacted format places the components elsewhere. XSAVES and XRSTORS are not offered: there are no
//! supervisor components. PKRU is a register of the CPU's own, which is in its initial state where it is 0: its place in the state
//! is filled in before a save and read after a restore, and XSTATE_BV of the state never has its bit.

use doppel_memory::AccessKind;
use iced_x86::{Instruction, Mnemonic};

use super::availability::{check_not_emulated, check_switched};
use super::native::host_layout;
use super::operand::{linear, linear_of_part, read_operand, write_operand};
use super::vector::{self, EXTENDED, HEADER, Layout, XMM, component};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, CpuMode, Cr0, Cr4, Efer, Exception, FpuArea, Gpr, Rflags};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    Some(match i.mnemonic() {
        Fxsave | Fxsave64 => fxsave,
        Fxrstor | Fxrstor64 => fxrstor,
        Ldmxcsr | Vldmxcsr => ldmxcsr,
        Stmxcsr | Vstmxcsr => stmxcsr,
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 => xsave,
        Xsavec | Xsavec64 => xsave_compacted,
        Xrstor | Xrstor64 => xrstor,
        _ => return None,
    })
}

/// Where the x87 registers end and the XMM registers begin is [`XMM`]; MXCSR and its mask are within.
const MXCSR: std::ops::Range<usize> = 24..32;
const MXCSR_INITIAL: u32 = 0x1f80;
const FXSAVE_END: usize = 416;
/// Bytes that FXSAVE and FXRSTOR ask for.
const FX_SIZE: usize = 512;
/// XCOMP_BV's bit that says that the area is compacted.
const COMPACTED: u64 = 1 << 63;
/// The second word of the header.
const XCOMP_BV: usize = HEADER + 8;

fn check_mxcsr(v: u32, mask: u32) -> Result<(), Exception> {
    if v & !mask == 0 {
        Ok(())
    } else {
        Err(Exception::gp(0))
    }
}

fn check_mxcsr_access(cpu: &Cpu, i: &Instruction) -> Result<(), Exception> {
    let vex = i.mnemonic() == Mnemonic::Vldmxcsr || i.mnemonic() == Mnemonic::Vstmxcsr;
    let on = if vex {
        let avx = component::SSE | component::AVX;
        cpu.cr4.contains(Cr4::OSXSAVE) && cpu.xcr0 & avx == avx
    } else {
        cpu.cr4.contains(Cr4::OSFXSR)
    };
    if !on {
        return Err(Exception::UD);
    }
    if !vex {
        check_not_emulated(cpu)?;
    }
    check_switched(cpu)
}

fn ldmxcsr(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    check_mxcsr_access(cpu, i)?;
    let (_, mask) = host_layout(cpu)?;
    let v = read_operand(cpu, bus, i, 0)? as u32;
    check_mxcsr(v, mask)?;
    vector::set_mxcsr(&mut cpu.fpu, v);
    Ok(Flow::Next)
}

fn stmxcsr(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    check_mxcsr_access(cpu, i)?;
    let v = cpu.fpu.mxcsr();
    write_operand(cpu, bus, i, 0, v.into())?;
    Ok(Flow::Next)
}

/// The REX.W forms keep 64-bit instruction and data pointers.
fn wide_pointers(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        i.mnemonic(),
        Fxsave64 | Fxrstor64 | Xsave64 | Xsaveopt64 | Xsavec64 | Xrstor64
    )
}

/// The upper halves of FIP and FDP, selectors in the narrow forms.
const POINTER_TOPS: [std::ops::Range<usize>; 2] = [12..16, 20..24];

/// Bytes of the XMM registers that the mode has, from the beginning of an area.
fn xmm_end(cpu: &Cpu) -> usize {
    if cpu.mode() == CpuMode::Bits64 {
        FXSAVE_END
    } else {
        XMM + 8 * 16
    }
}

/// Bytes of an extended component that the mode has: outside 64-bit mode the halves of registers 0 to 7 alone (Intel SDM vol. 1, 13.5.3
/// and 13.5.5; measured).
fn used(cpu: &Cpu, n: usize, size: usize) -> usize {
    match 1 << n {
        _ if cpu.mode() == CpuMode::Bits64 => size,
        component::AVX | component::ZMM_HIGH => size / 2,
        component::HIGH_ZMM => 0,
        _ => size,
    }
}

/// The components of which outside 64-bit mode some registers stay as they are.
const PARTIAL: u64 = component::SSE | component::AVX | component::ZMM_HIGH | component::HIGH_ZMM;

/// The legacy region as the guest sees it saved.
fn legacy_image(fpu: &FpuArea, i: &Instruction, mxcsr_mask: u32) -> [u8; FXSAVE_END] {
    let mut image = [0; FXSAVE_END];
    image.copy_from_slice(&fpu.bytes[..FXSAVE_END]);
    image[28..32].copy_from_slice(&mxcsr_mask.to_le_bytes());
    if !wide_pointers(i) {
        POINTER_TOPS.into_iter().for_each(|r| image[r].fill(0));
    }
    image
}

fn fast_fxsave(cpu: &Cpu) -> bool {
    cpu.efer.contains(Efer::FFXSR) && cpu.cpl == 0 && cpu.mode() == CpuMode::Bits64
}

fn fx_address(cpu: &Cpu, i: &Instruction, write: bool) -> Result<u64, Exception> {
    check_not_emulated(cpu)?;
    check_switched(cpu)?;
    let at = linear(cpu, i, FX_SIZE, write)?;
    if at.is_multiple_of(16) {
        return Ok(at);
    }
    // Either is allowed where the guest asks for alignment checks; the processor looks at the first four bytes first.
    let misaligned = !at.is_multiple_of(4);
    let checks = cpu.cpl == 3 && cpu.rflags.contains(Rflags::AC) && cpu.cr0.contains(Cr0::AM);
    Err(if checks && misaligned {
        Exception::AC
    } else {
        Exception::gp(0)
    })
}

fn fxsave(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let at = fx_address(cpu, i, true)?;
    let (layout, mask) = host_layout(cpu)?;
    vector::settle(&mut cpu.fpu, &layout);
    let image = legacy_image(&cpu.fpu, i, mask);
    let end = if fast_fxsave(cpu) { XMM } else { xmm_end(cpu) };
    let privilege = cpu.privilege();
    // All 512 bytes have to be there, though the last are left alone.
    for byte in fx_ends(cpu, at) {
        cpu.check_writable(byte, 1, privilege)?;
    }
    cpu.store_bytes(bus, at, privilege, &image[..end])?;
    Ok(Flow::Next)
}

fn fxrstor(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let at = fx_address(cpu, i, false)?;
    let (layout, mask) = host_layout(cpu)?;
    vector::settle(&mut cpu.fpu, &layout);
    let mut image = [0; FX_SIZE];
    let privilege = cpu.privilege();
    if cpu.cpuid.traits().state_end_first {
        let [last, _] = fx_ends(cpu, at);
        cpu.translate(last, AccessKind::Read, privilege)?;
    }
    cpu.load_bytes(bus, at, privilege, &mut image)?;
    check_mxcsr(image_mxcsr(&image), mask)?;
    let end = if fast_fxsave(cpu) { XMM } else { xmm_end(cpu) };
    load_legacy(&mut cpu.fpu, i, &image, 0..end);
    let in_use = vector::in_use(&cpu.fpu) | component::X87 | component::SSE;
    vector::set_in_use(&mut cpu.fpu, in_use);
    Ok(Flow::Next)
}

/// The first and the last byte of an area, in the order in which the processor looks at them.
fn fx_ends(cpu: &Cpu, at: u64) -> [u64; 2] {
    let last = at.wrapping_add(FX_SIZE as u64 - 1);
    match cpu.cpuid.traits().state_end_first {
        true => [last, at],
        false => [at, last],
    }
}

fn image_mxcsr(image: &[u8]) -> u32 {
    u32::from_le_bytes([image[24], image[25], image[26], image[27]])
}

/// Reserved bits of FCW read as the processor has them; ES and B of FSW follow from its flags and the masks.
fn normalize_x87(fpu: &mut FpuArea) {
    const FCW: [u8; 2] = [0x3f, 0x1f];
    const FCW_ONE: u8 = 0x40;
    const FLAGS: u8 = 0x3f;
    let b = &mut fpu.bytes;
    b[0] = b[0] & FCW[0] | FCW_ONE;
    b[1] &= FCW[1];
    let pending = b[2] & !b[0] & FLAGS != 0;
    b[2] = b[2] & 0x7f | u8::from(pending) << 7;
    b[3] = b[3] & 0x7f | u8::from(pending) << 7;
}

/// Copies a part of a legacy region into the CPU's state.
fn load_legacy(fpu: &mut FpuArea, i: &Instruction, image: &[u8], part: std::ops::Range<usize>) {
    let x87 = part.start == 0;
    fpu.bytes[part.clone()].copy_from_slice(&image[part]);
    if x87 {
        normalize_x87(fpu);
    }
    if x87 && !wide_pointers(i) {
        POINTER_TOPS.into_iter().for_each(|r| fpu.bytes[r].fill(0));
    }
}

/// Where PKRU lies in an area that has it.
fn pkru_of<'a>(fpu: &'a mut FpuArea, layout: &Layout) -> &'a mut [u8] {
    let at = layout.place(component::PKRU.trailing_zeros() as usize).0;
    &mut fpu.bytes[at..at + 4]
}

/// A component that the mode has nothing of, and that is in its initial state there (13.6).
fn hidden(cpu: &Cpu) -> u64 {
    match cpu.mode() {
        CpuMode::Bits64 => 0,
        _ => component::HIGH_ZMM,
    }
}

/// The components that are not in their initial state.
fn in_use(cpu: &Cpu) -> u64 {
    let pkru = if cpu.pkru == 0 { 0 } else { component::PKRU };
    vector::in_use(&cpu.fpu) & !hidden(cpu) | pkru
}

/// The same for the compacted format and XGETBV, to which MXCSR belongs to SSE (Intel SDM vol. 1, 13.6).
pub(crate) fn in_use_with_mxcsr(cpu: &Cpu) -> u64 {
    let mxcsr = cpu.fpu.mxcsr() != MXCSR_INITIAL;
    in_use(cpu) | if mxcsr { component::SSE } else { 0 }
}

/// What every instruction of the XSAVE family begins with: its area, and the components that it is asked for.
struct Request {
    at: u64,
    components: u64,
    layout: Layout,
    mxcsr_mask: u32,
}

impl Request {
    fn of(cpu: &mut Cpu, i: &Instruction, write: bool) -> Result<Self, Exception> {
        if !cpu.cr4.contains(Cr4::OSXSAVE) {
            return Err(Exception::UD);
        }
        check_switched(cpu)?;
        let at = linear(cpu, i, EXTENDED, write)?;
        if !at.is_multiple_of(64) {
            return Err(Exception::gp(0));
        }
        let (layout, mxcsr_mask) = host_layout(cpu)?;
        vector::settle(&mut cpu.fpu, &layout);
        if cpu.xcr0 & layout.supported & component::PKRU != 0 {
            let pkru = cpu.pkru;
            pkru_of(&mut cpu.fpu, &layout).copy_from_slice(&pkru.to_le_bytes());
        }
        let mask = cpu.reg(Gpr::Rdx) << 32 | cpu.reg(Gpr::Rax) & 0xffff_ffff;
        Ok(Request {
            at,
            components: cpu.xcr0 & layout.supported & mask,
            layout,
            mxcsr_mask,
        })
    }

    fn asks(&self, component: u64) -> bool {
        self.components & component != 0
    }

    /// Numbers of the extended components (2 and up) among `components`.
    fn extended(components: u64) -> impl Iterator<Item = usize> {
        (2..63).filter(move |n| components >> n & 1 != 0)
    }

    /// Where component `n` lies in the guest's area, from its beginning.
    fn place(&self, n: usize, compaction: Option<u64>) -> usize {
        match compaction {
            Some(c) => self.layout.compacted(n, c),
            None => self.layout.place(n).0,
        }
    }
}

/// Looks at the end of the area where the processor does so before it stores.
fn check_end(
    cpu: &mut Cpu,
    i: &Instruction,
    r: &Request,
    compaction: Option<u64>,
) -> Result<(), Exception> {
    if !cpu.cpuid.traits().state_end_first {
        return Ok(());
    }
    let end = |n: usize| r.place(n, compaction) + r.layout.place(n).1;
    let ends = Request::extended(r.components).map(end);
    let last = ends.max().unwrap_or(EXTENDED) - 1;
    let last = linear_of_part(cpu, i, last as u64, 1, true)?;
    let privilege = cpu.privilege();
    cpu.check_writable(last, 1, privilege)
}

/// The pieces of a save, in the order in which they are stored: `(offset in the area, bytes)`.
type Pieces = Vec<(usize, Vec<u8>)>;

/// What saving `stored` (a subset of what was requested) writes to the legacy region and the components.
fn pieces(cpu: &Cpu, i: &Instruction, r: &Request, stored: u64, compaction: Option<u64>) -> Pieces {
    let image = legacy_image(&cpu.fpu, i, r.mxcsr_mask);
    let mut pieces = Vec::new();
    let mut legacy = |part: std::ops::Range<usize>| {
        pieces.push((part.start, image[part].to_vec()));
    };
    if stored & component::X87 != 0 {
        legacy(0..MXCSR.start);
        legacy(MXCSR.end..XMM);
    }
    let mxcsr = match compaction {
        Some(_) => stored & component::SSE != 0,
        None => r.asks(component::SSE | component::AVX),
    };
    if mxcsr {
        legacy(MXCSR);
    }
    if stored & component::SSE != 0 {
        legacy(XMM..xmm_end(cpu));
    }
    for n in Request::extended(stored) {
        let (at, size) = r.layout.place(n);
        let bytes = &cpu.fpu.bytes[at..at + used(cpu, n, size)];
        if !bytes.is_empty() {
            pieces.push((r.place(n, compaction), bytes.to_vec()));
        }
    }
    pieces
}

/// Stores all the pieces, or faults before the first. How far the area reaches is known only now, so that segmentation and
/// canonicality are looked at here.
fn store(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction, pieces: &Pieces) -> Step {
    let privilege = cpu.privilege();
    let mut addresses = Vec::with_capacity(pieces.len());
    for (from, bytes) in pieces {
        addresses.push(linear_of_part(cpu, i, *from as u64, bytes.len(), true)?);
    }
    for (at, (_, bytes)) in addresses.iter().zip(pieces) {
        cpu.check_writable(*at, bytes.len(), privilege)?;
    }
    for (at, (_, bytes)) in addresses.iter().zip(pieces) {
        cpu.store_bytes(bus, *at, privilege, bytes)?;
    }
    Ok(Flow::Next)
}

fn xsave(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let r = Request::of(cpu, i, true)?;
    check_end(cpu, i, &r, None)?;
    let in_use = in_use(cpu);
    let optimized = matches!(i.mnemonic(), Mnemonic::Xsaveopt | Mnemonic::Xsaveopt64);
    let stored = if optimized {
        r.components & in_use
    } else {
        r.components
    };
    let mut pieces = pieces(cpu, i, &r, stored, None);
    let header = r.at.wrapping_add(HEADER as u64);
    // Read in order to be written: where that is not allowed, the fault is that of a write.
    let privilege = cpu.privilege();
    cpu.check_writable(header, 8, privilege)?;
    let old = super::operand::load(cpu, bus, header, 8)?;
    let xstate_bv = old & !r.components | in_use & r.components;
    pieces.push((HEADER, xstate_bv.to_le_bytes().to_vec()));
    store(cpu, bus, i, &pieces)
}

fn xsave_compacted(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let r = Request::of(cpu, i, true)?;
    check_end(cpu, i, &r, Some(r.components))?;
    let stored = r.components & in_use_with_mxcsr(cpu);
    let mut pieces = pieces(cpu, i, &r, stored, Some(r.components));
    // XSTATE_BV and XCOMP_BV; the rest of the header stays as it is (Intel SDM vol. 1, 13.10 and 13.11).
    for (n, word) in [stored, r.components | COMPACTED].into_iter().enumerate() {
        pieces.push((HEADER + 8 * n, word.to_le_bytes().to_vec()));
    }
    store(cpu, bus, i, &pieces)
}

/// The header of a guest's area: which components it holds, and in the compacted format which have a place.
struct Header {
    present: u64,
    compaction: Option<u64>,
}

impl Header {
    /// #GP(0) for what the manual reserves.
    fn parse(image: &[u8], enabled: u64) -> Result<Self, Exception> {
        let word = |n: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&image[HEADER + 8 * n..][..8]);
            u64::from_le_bytes(bytes)
        };
        let (present, xcomp_bv) = (word(0), word(1));
        let zero = |words: std::ops::Range<usize>| words.into_iter().all(|n| word(n) == 0);
        let compacted = xcomp_bv & COMPACTED != 0;
        let places = xcomp_bv & !COMPACTED;
        let good = if compacted {
            places & !enabled == 0 && present & !places == 0 && zero(2..8)
        } else {
            present & !enabled == 0 && zero(1..3)
        };
        if !good {
            return Err(Exception::gp(0));
        }
        Ok(Header {
            present,
            compaction: compacted.then_some(places),
        })
    }
}

fn xrstor(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let r = Request::of(cpu, i, false)?;
    let privilege = cpu.privilege();
    let mut image = [0; EXTENDED];
    if cpu.cpuid.traits().state_end_first {
        let header = r.at.wrapping_add(XCOMP_BV as u64);
        cpu.translate(header, AccessKind::Read, privilege)?;
    }
    cpu.load_bytes(bus, r.at, privilege, &mut image)?;
    let header = Header::parse(&image, cpu.xcr0)?;
    let loaded = r.components & header.present;
    let mxcsr = new_mxcsr(&r, &header, &image);
    if let Some(v) = mxcsr {
        check_mxcsr(v, r.mxcsr_mask)?;
    }
    // All of the guest's memory is read before any state changes.
    let mut fpu = cpu.fpu.clone();
    for n in Request::extended(loaded) {
        let (at, size) = r.layout.place(n);
        let size = used(cpu, n, size);
        if size == 0 {
            continue;
        }
        let from = r.place(n, header.compaction) as u64;
        let from = linear_of_part(cpu, i, from, size, false)?;
        cpu.load_bytes(bus, from, privilege, &mut fpu.bytes[at..at + size])?;
    }
    restore_legacy(&mut fpu, i, &image, r.components, loaded, xmm_end(cpu));
    for n in Request::extended(r.components & !loaded) {
        let (at, size) = r.layout.place(n);
        fpu.bytes[at..at + used(cpu, n, size)].fill(0);
    }
    if let Some(v) = mxcsr {
        vector::set_mxcsr(&mut fpu, v);
    }
    let kept = match cpu.mode() {
        CpuMode::Bits64 => !r.components,
        _ => !r.components | PARTIAL,
    };
    let in_use = vector::in_use(&fpu) & kept | loaded & !hidden(cpu);
    vector::set_in_use(&mut fpu, in_use & !component::PKRU);
    if r.asks(component::PKRU) {
        let mut pkru = [0; 4];
        pkru.copy_from_slice(pkru_of(&mut fpu, &r.layout));
        cpu.set_pkru(u32::from_le_bytes(pkru));
    }
    cpu.fpu = fpu;
    Ok(Flow::Next)
}

/// MXCSR after the restore, where it changes.
fn new_mxcsr(r: &Request, header: &Header, image: &[u8]) -> Option<u32> {
    match header.compaction {
        None => r
            .asks(component::SSE | component::AVX)
            .then(|| image_mxcsr(image)),
        Some(_) if !r.asks(component::SSE) => None,
        Some(_) if header.present & component::SSE != 0 => Some(image_mxcsr(image)),
        Some(_) => Some(MXCSR_INITIAL),
    }
}

/// Loads or initializes the x87 and XMM registers among `asked`.
fn restore_legacy(
    fpu: &mut FpuArea,
    i: &Instruction,
    image: &[u8],
    asked: u64,
    loaded: u64,
    xmm_end: usize,
) {
    let initial = FpuArea::reset();
    let mut part = |component, part: std::ops::Range<usize>| {
        if loaded & component != 0 {
            load_legacy(fpu, i, image, part);
        } else if asked & component != 0 {
            fpu.bytes[part.clone()].copy_from_slice(&initial.bytes[part]);
        }
    };
    part(component::X87, 0..MXCSR.start);
    part(component::X87, MXCSR.end..XMM);
    part(component::SSE, XMM..xmm_end);
}
