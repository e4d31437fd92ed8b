//! Segmentation: descriptors, and the checks of a segment register load (Intel SDM vol. 3A, chapters 3 and 5).
//!
//! Descriptor tables are read with supervisor privilege whatever the CPL is. A load that passes its checks
//! sets the descriptor's accessed bit, but writes only where it is clear: Linux maps its GDT read-only.

use doppel_memory::Privilege;

use crate::{Bus, Cpu, CpuMode, Efer, Exception, Seg, Segment};

/// Bits of a selector that go into an error code: the index and the table indicator.
const SELECTOR_CODE: u16 = 0xfffc;

/// A segment or system descriptor; `high` is the second half of a 16-byte one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub low: u64,
    pub high: u64,
}

/// Types of system descriptors.
pub(crate) mod system_type {
    pub const TSS16: u32 = 1;
    pub const LDT: u32 = 2;
    pub const TSS16_BUSY: u32 = 3;
    pub const CALL_GATE16: u32 = 4;
    pub const TASK_GATE: u32 = 5;
    pub const INTERRUPT_GATE16: u32 = 6;
    pub const TRAP_GATE16: u32 = 7;
    pub const TSS: u32 = 9;
    pub const TSS_BUSY: u32 = 11;
    pub const CALL_GATE: u32 = 12;
    pub const INTERRUPT_GATE: u32 = 14;
    pub const TRAP_GATE: u32 = 15;
}

impl Descriptor {
    pub fn base(self) -> u64 {
        (self.low >> 16 & 0xff_ffff) | (self.low >> 32 & 0xff00_0000) | self.high << 32
    }
    /// In bytes.
    pub fn limit(self) -> u32 {
        let raw = (self.low & 0xffff) as u32 | (self.low >> 32 & 0xf_0000) as u32;
        if self.low >> 55 & 1 != 0 {
            raw << 12 | 0xfff
        } else {
            raw
        }
    }
    /// As in [`Segment::attributes`].
    pub fn attributes(self) -> u32 {
        (self.low >> 40 & 0xf0ff) as u32
    }
    pub fn kind(self) -> u32 {
        self.attributes() & 0xf
    }
    /// Not a code or data segment.
    pub fn is_system(self) -> bool {
        self.attributes() & 0x10 == 0
    }
    pub fn is_code(self) -> bool {
        self.attributes() & 0x18 == 0x18
    }
    pub fn is_conforming(self) -> bool {
        self.attributes() & 0x1c == 0x1c
    }
    pub fn is_writable_data(self) -> bool {
        self.attributes() & 0x1a == 0x12
    }
    pub fn is_readable(self) -> bool {
        !self.is_system() && (!self.is_code() || self.attributes() & 2 != 0)
    }
    pub fn dpl(self) -> u8 {
        (self.attributes() >> 5 & 3) as u8
    }
    pub fn present(self) -> bool {
        self.attributes() & 0x80 != 0
    }
    pub fn segment(self, selector: u16) -> Segment {
        Segment {
            base: self.base(),
            limit: self.limit(),
            attributes: self.attributes(),
            selector,
        }
    }

    // Gates.
    pub fn gate_selector(self) -> u16 {
        (self.low >> 16) as u16
    }
    pub fn gate_offset(self) -> u64 {
        (self.low & 0xffff) | (self.low >> 32 & 0xffff_0000) | self.high << 32
    }
    /// Interrupt stack table index of a 64-bit gate, or the parameter count of a call gate (5 bits).
    pub fn gate_ist(self) -> u8 {
        (self.low >> 32 & 7) as u8
    }
    pub fn gate_parameters(self) -> u32 {
        (self.low >> 32 & 0x1f) as u32
    }
}

/// A descriptor and the linear address that it was read from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Found {
    pub at: u64,
    pub descriptor: Descriptor,
}

/// The error code that names a selector.
pub(crate) fn code(selector: u16) -> u32 {
    u32::from(selector & SELECTOR_CODE)
}

/// True for the four selectors that name no descriptor.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & SELECTOR_CODE == 0
}

pub(crate) fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

impl Segment {
    /// What a null selector leaves in a register.
    pub(crate) fn null(selector: u16, dpl: u8) -> Self {
        Segment {
            base: 0,
            limit: 0,
            attributes: Segment::UNUSABLE | u32::from(dpl) << 5,
            selector,
        }
    }

    /// A register in virtual-8086 mode.
    pub(crate) fn v86(selector: u16) -> Self {
        Segment {
            base: u64::from(selector) << 4,
            limit: 0xffff,
            attributes: 0xf3,
            selector,
        }
    }
}

impl Cpu {
    /// True while in IA-32e mode (64-bit or compatibility).
    pub(crate) fn long_mode(&self) -> bool {
        self.efer.contains(Efer::LMA)
    }

    /// A linear address as the processor forms it for its own tables.
    pub(crate) fn table_linear(&self, linear: u64) -> u64 {
        if self.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    /// A base may be an address that can be used with CR4.LA57 alone.
    fn check_table(&self, at: u64) -> Result<(), Exception> {
        match self.long_mode() && !self.canonical(at) {
            true => Err(Exception::gp(0)),
            false => Ok(()),
        }
    }

    /// Reads a table (GDT, LDT, IDT, TSS) with implicit supervisor privilege.
    pub(crate) fn load_table<T: doppel_memory::Word>(
        &mut self,
        bus: &mut dyn Bus,
        linear: u64,
    ) -> Result<T, Exception> {
        let at = self.table_linear(linear);
        self.check_table(at)?;
        self.load(bus, at, Privilege::Supervisor)
    }

    /// Writes a table with implicit supervisor privilege.
    pub(crate) fn store_table<T: doppel_memory::Word>(
        &mut self,
        bus: &mut dyn Bus,
        linear: u64,
        v: T,
    ) -> Result<(), Exception> {
        let at = self.table_linear(linear);
        self.check_table(at)?;
        self.store(bus, at, Privilege::Supervisor, v)
    }
}

/// Linear address of `size` bytes of the descriptor that a selector names; `None` beyond the table's limit.
fn descriptor_address(cpu: &Cpu, selector: u16, size: u32) -> Option<u64> {
    let (base, limit) = if selector & 4 == 0 {
        (cpu.gdtr.base, u32::from(cpu.gdtr.limit))
    } else if cpu.ldtr.unusable() {
        return None;
    } else {
        (cpu.ldtr.base, cpu.ldtr.limit)
    };
    let offset = u32::from(selector & 0xfff8);
    (offset + size - 1 <= limit).then(|| base.wrapping_add(u64::from(offset)))
}

/// Reads the descriptor that a selector names; `None` where the selector is null or beyond its table's limit.
pub(crate) fn find(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
) -> Result<Option<Found>, Exception> {
    if is_null(selector) {
        return Ok(None);
    }
    let Some(at) = descriptor_address(cpu, selector, 8) else {
        return Ok(None);
    };
    let low = cpu.load_table(bus, at)?;
    let descriptor = Descriptor { low, high: 0 };
    Ok(Some(Found { at, descriptor }))
}

/// Completes a system descriptor that takes 16 bytes in long mode (LDT, TSS, call gate). `None` where the second
/// half is beyond the table or its type field is not zero.
pub(crate) fn find_high(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    found: Found,
) -> Result<Option<Found>, Exception> {
    if !cpu.long_mode() {
        return Ok(Some(found));
    }
    if descriptor_address(cpu, selector, 16).is_none() {
        return Ok(None);
    }
    let high: u64 = cpu.load_table(bus, found.at.wrapping_add(8))?;
    let low = found.descriptor.low;
    Ok((high >> 40 & 0x1f == 0).then_some(Found {
        descriptor: Descriptor {
            low,
            high: high & 0xffff_ffff,
        },
        ..found
    }))
}

/// Sets the accessed bit of a code or data descriptor in memory where it is clear; returns the descriptor with it set.
pub(crate) fn mark_accessed(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    f: Found,
) -> Result<Descriptor, Exception> {
    const ACCESSED: u64 = 1 << 40;
    let low = f.descriptor.low | ACCESSED;
    if low != f.descriptor.low {
        cpu.store_table(bus, f.at.wrapping_add(5), (low >> 40) as u8)?;
    }
    Ok(Descriptor {
        low,
        ..f.descriptor
    })
}

/// Sets or clears the busy bit of a TSS descriptor in memory.
pub(crate) fn mark_busy(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    f: Found,
    busy: bool,
) -> Result<(), Exception> {
    let byte = (f.descriptor.low >> 40) as u8 & !2 | u8::from(busy) << 1;
    cpu.store_table(bus, f.at.wrapping_add(5), byte)
}

/// What MOV or POP to a segment register other than CS leaves in it, or why it faults.
pub(crate) fn resolve(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    seg: Seg,
    selector: u16,
) -> Result<Segment, Exception> {
    match cpu.mode() {
        CpuMode::Real => Ok(Segment {
            base: u64::from(selector) << 4,
            selector,
            // A limit that protected mode set stays ("unreal mode").
            limit: cpu.segment(seg).limit,
            attributes: 0x93,
        }),
        CpuMode::V86 => Ok(Segment::v86(selector)),
        _ if seg == Seg::Ss => resolve_stack(cpu, bus, selector, cpu.cpl, Exception::gp),
        _ => resolve_data(cpu, bus, selector),
    }
}

/// Loads a segment register other than CS as MOV does.
pub(crate) fn load(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    seg: Seg,
    selector: u16,
) -> Result<(), Exception> {
    let s = resolve(cpu, bus, seg, selector)?;
    cpu.seg[seg as usize] = s;
    Ok(())
}

fn resolve_data(cpu: &mut Cpu, bus: &mut dyn Bus, selector: u16) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Ok(Segment::null(selector, 0));
    }
    let refused = Exception::gp(code(selector));
    let found = find(cpu, bus, selector)?.ok_or(refused)?;
    let d = found.descriptor;
    let visible = d.is_conforming() || (rpl(selector) <= d.dpl() && cpu.cpl <= d.dpl());
    if !d.is_readable() || !visible {
        return Err(refused);
    }
    if !d.present() {
        return Err(Exception::np(code(selector)));
    }
    Ok(mark_accessed(cpu, bus, found)?.segment(selector))
}

/// The checks of a load of SS for code that runs at `cpl`. `refuse` makes the exception of a failed check.
pub(crate) fn resolve_stack(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    cpl: u8,
    refuse: fn(u32) -> Exception,
) -> Result<Segment, Exception> {
    if is_null(selector) {
        let allowed = cpu.mode() == CpuMode::Bits64 && cpl != 3 && rpl(selector) == cpl;
        return if allowed {
            Ok(Segment::null(selector, cpl))
        } else {
            Err(refuse(0))
        };
    }
    let refused = refuse(code(selector));
    let found = find(cpu, bus, selector)?.ok_or(refused)?;
    let d = found.descriptor;
    if rpl(selector) != cpl || d.dpl() != cpl || !d.is_writable_data() {
        return Err(refused);
    }
    if !d.present() {
        return Err(Exception::ss(code(selector)));
    }
    Ok(mark_accessed(cpu, bus, found)?.segment(selector))
}

/// Null every data segment register that code of the new, lesser privilege may not use (far return, IRET). One that is null
/// already loses its RPL.
pub(crate) fn drop_privileged_data(cpu: &mut Cpu) {
    let cpl = cpu.cpl;
    for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
        let s = &mut cpu.seg[seg as usize];
        let conforming_code = s.attributes & 0x1c == 0x1c;
        if s.unusable() {
            s.selector = 0;
        } else if s.dpl() < cpl && !conforming_code {
            *s = Segment {
                base: s.base,
                ..Segment::null(0, 0)
            };
        }
    }
}

/// A flat segment of privilege `dpl`: code where `attributes` says so. Base 0, limit 4 GiB.
pub(crate) fn flat(selector: u16, attributes: u32, dpl: u8) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        attributes: attributes | u32::from(dpl) << 5,
        selector,
    }
}

/// Attributes of a present, flat segment with its accessed bit set, for [`flat`].
/// Attributes (see [`Segment`]) of the flat segments of DPL 0 that SYSCALL, SYSRET and their kin load.
pub mod flat_attributes {
    /// 64-bit code, execute/read.
    pub const CODE64: u32 = 0xa09b;
    /// 32-bit code, execute/read.
    pub const CODE32: u32 = 0xc09b;
    /// Data, read/write.
    pub const DATA: u32 = 0xc093;
}
