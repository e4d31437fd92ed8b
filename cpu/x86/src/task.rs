//! The task-state segment: stacks for inner privilege levels, the I/O permission and redirection bitmaps and hardware task switches
//! (Intel SDM vol. 3A, chapter 9).
//!
//! A task switch saves and loads the CPU field by field and may fault on its way. Up to its commit point (section 9.3: the new task's registers are
//! loaded) a fault is the old task's, which is restored. From then on, while descriptors are loaded, it is the new task's: it is raised
//! at the new task's first instruction, and the handler sees the selectors, with nothing behind those that were not loaded yet.

use crate::exception::Event;
use crate::segment::{self, Found, code, is_null, rpl, system_type};
use crate::stack::Stack;
use crate::{Bus, Cpu, Cr0, Exception, Rflags, Seg, Segment};

const BUSY_LIMIT32: u32 = 0x67;
const BUSY_LIMIT16: u32 = 0x2b;

/// RSP0 to RSP2 or an interrupt stack table entry of a 64-bit TSS.
pub(crate) fn long_stack_pointer(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    offset: u32,
    ext: u32,
) -> Result<u64, Exception> {
    if offset + 7 > cpu.tr.limit {
        return Err(Exception::ts(code(cpu.tr.selector) | ext));
    }
    let rsp = cpu.load_table(bus, cpu.tr.base.wrapping_add(offset.into()))?;
    if cpu.canonical(rsp) {
        Ok(rsp)
    } else {
        Err(Exception::ss(ext))
    }
}

/// The stack that a 16- or 32-bit TSS names for privilege level `cpl` (0 to 2), checked.
pub(crate) fn inner_stack(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    cpl: u8,
    ext: u32,
) -> Result<Stack, Exception> {
    let wide = cpu.tr.kind() & 8 != 0;
    let (offset, size) = if wide {
        (4 + 8 * u32::from(cpl), 6)
    } else {
        (2 + 4 * u32::from(cpl), 4)
    };
    if offset + size - 1 > cpu.tr.limit {
        return Err(Exception::ts(code(cpu.tr.selector) | ext));
    }
    let at = cpu.tr.base.wrapping_add(offset.into());
    let (sp, selector): (u64, u16) = if wide {
        (
            cpu.load_table::<u32>(bus, at)?.into(),
            cpu.load_table(bus, at.wrapping_add(4))?,
        )
    } else {
        (
            cpu.load_table::<u16>(bus, at)?.into(),
            cpu.load_table(bus, at.wrapping_add(2))?,
        )
    };
    let ss = stack_segment(cpu, bus, selector, cpl, ext)?;
    Ok(Stack::new(cpu, ss, sp, cpl, false).with_code(code(selector) | ext))
}

/// A stack segment out of a TSS: its failures are #TS, or #SS where it is not present.
fn stack_segment(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    cpl: u8,
    ext: u32,
) -> Result<Segment, Exception> {
    let refused = Exception::ts(code(selector) | ext);
    let found = segment::find(cpu, bus, selector)?.ok_or(refused)?;
    let d = found.descriptor;
    if rpl(selector) != cpl || d.dpl() != cpl || !d.is_writable_data() {
        return Err(refused);
    }
    if !d.present() {
        return Err(Exception::ss(code(selector) | ext));
    }
    Ok(segment::mark_accessed(cpu, bus, found)?.segment(selector))
}

/// #GP(0) unless the current code may access `size` bytes of ports at `port`: by IOPL, or by the TSS's bitmap.
pub(crate) fn check_io(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    port: u16,
    size: u8,
) -> Result<(), Exception> {
    if !cpu.cr0.contains(Cr0::PE) || (cpu.io_privileged() && !cpu.rflags.contains(Rflags::VM)) {
        return Ok(());
    }
    let refused = Exception::gp(0);
    let offset = io_map(cpu, bus)? + u32::from(port / 8);
    // Two bytes are always read, since an access may straddle two.
    if offset + 1 > cpu.tr.limit {
        return Err(refused);
    }
    let bits: u16 = cpu.load_table(bus, cpu.tr.base.wrapping_add(offset.into()))?;
    let wanted = ((1u32 << size) - 1) << (port % 8);
    if u32::from(bits) & wanted == 0 {
        Ok(())
    } else {
        Err(refused)
    }
}

/// Where the I/O permission bitmap begins in the TSS; #GP(0) where it is no 32-bit TSS, or too short.
fn io_map(cpu: &mut Cpu, bus: &mut dyn Bus) -> Result<u32, Exception> {
    if cpu.tr.unusable() || cpu.tr.kind() & 8 == 0 || cpu.tr.limit < BUSY_LIMIT32 {
        return Err(Exception::gp(0));
    }
    let map: u16 = cpu.load_table(bus, cpu.tr.base.wrapping_add(0x66))?;
    Ok(map.into())
}

/// Whether INT n of virtual-8086 mode goes to the 8086 program's own handler: its bit in the 32 bytes below the I/O permission bitmap is clear.
pub(crate) fn redirects(cpu: &mut Cpu, bus: &mut dyn Bus, vector: u8) -> Result<bool, Exception> {
    const BYTES: u32 = 32;
    let begin = io_map(cpu, bus)?.wrapping_sub(BYTES);
    let offset = begin.wrapping_add(u32::from(vector / 8));
    if offset > cpu.tr.limit {
        return Err(Exception::gp(0));
    }
    let bits: u8 = cpu.load_table(bus, cpu.tr.base.wrapping_add(offset.into()))?;
    Ok(bits >> (vector % 8) & 1 == 0)
}

/// What starts a task switch.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    Jump,
    /// CALL, or an event: the new task is nested in the old one.
    Nest,
    /// IRET with NT set.
    Return,
}

/// Where a task switch goes.
#[derive(Clone, Copy)]
struct To {
    selector: u16,
    found: Found,
    reason: Reason,
    /// EXT in the error codes of its faults.
    ext: u32,
}

/// Delivers an event through a task gate.
pub(crate) fn interrupt(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    event: &Event,
) -> Result<(), Exception> {
    let ext = event.ext();
    let to = To {
        selector,
        found: target(cpu, bus, selector, ext)?,
        reason: Reason::Nest,
        ext,
    };
    let left = Left {
        rip: event.return_rip,
        flags: event.flags_image(cpu),
    };
    let traps = switch(cpu, bus, to, left)?;
    if let Some(e) = event.error_code {
        let size = if cpu.tr.kind() & 8 != 0 { 4 } else { 2 };
        let mut stack = Stack::current(cpu).with_code(ext);
        stack.push(cpu, bus, size, e.into())?;
        stack.commit(cpu);
    }
    cpu.note_task_switch(traps);
    Ok(())
}

/// The TSS that a task gate names: global, present and not busy.
fn target(cpu: &mut Cpu, bus: &mut dyn Bus, selector: u16, ext: u32) -> Result<Found, Exception> {
    let refused = Exception::gp(code(selector) | ext);
    if selector & 4 != 0 {
        return Err(refused);
    }
    let found = segment::find(cpu, bus, selector)?.ok_or(refused)?;
    let d = found.descriptor;
    if !d.is_system() || !matches!(d.kind(), system_type::TSS16 | system_type::TSS) {
        return Err(refused);
    }
    if !d.present() {
        return Err(Exception::np(code(selector) | ext));
    }
    Ok(found)
}

/// CALL or JMP to a task gate's TSS selector or to a TSS directly (whose privilege the caller has checked).
pub(crate) fn far_switch(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    reason: Reason,
    next_rip: u64,
) -> Result<(), Exception> {
    let to = To {
        selector,
        found: target(cpu, bus, selector, 0)?,
        reason,
        ext: 0,
    };
    let left = Left {
        rip: next_rip,
        flags: cpu.rflags,
    };
    let traps = switch(cpu, bus, to, left)?;
    cpu.note_task_switch(traps);
    Ok(())
}

/// IRET with NT set: back to the task that the current TSS links to.
pub(crate) fn task_return(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    next_rip: u64,
) -> Result<(), Exception> {
    let selector: u16 = cpu.load_table(bus, cpu.tr.base)?;
    let refused = Exception::ts(code(selector));
    if selector & 4 != 0 {
        return Err(refused);
    }
    let found = segment::find(cpu, bus, selector)?.ok_or(refused)?;
    let d = found.descriptor;
    if !d.is_system() || !matches!(d.kind(), system_type::TSS16_BUSY | system_type::TSS_BUSY) {
        return Err(refused);
    }
    if !d.present() {
        return Err(Exception::np(code(selector)));
    }
    let to = To {
        selector,
        found,
        reason: Reason::Return,
        ext: 0,
    };
    let left = Left {
        rip: next_rip,
        flags: cpu.rflags & !Rflags::NT,
    };
    let traps = switch(cpu, bus, to, left)?;
    cpu.note_task_switch(traps);
    Ok(())
}

/// Runs `f` and restores what a task switch changes where it fails.
fn with_rollback<T>(
    cpu: &mut Cpu,
    f: impl FnOnce(&mut Cpu) -> Result<T, Exception>,
) -> Result<T, Exception> {
    let (gpr, seg, rip, rflags, cpl) = (cpu.gpr, cpu.seg, cpu.rip, cpu.rflags, cpu.cpl);
    let (ldtr, tr, cr0, cr3, dr7, pdpte) =
        (cpu.ldtr, cpu.tr, cpu.cr0, cpu.cr3, cpu.dr[7], cpu.pdpte);
    let outcome = f(cpu);
    if outcome.is_err() {
        (cpu.gpr, cpu.seg, cpu.rip, cpu.rflags, cpu.cpl) = (gpr, seg, rip, rflags, cpl);
        (cpu.ldtr, cpu.tr, cpu.cr0, cpu.dr[7], cpu.pdpte) = (ldtr, tr, cr0, dr7, pdpte);
        if cpu.cr3 != cr3 {
            cpu.cr3 = cr3;
            cpu.flush_tlb(false);
        }
    }
    outcome
}

/// The dynamic fields of a TSS.
struct Image {
    cr3: u32,
    eip: u64,
    eflags: u64,
    gpr: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    /// T: #DB before the task's first instruction.
    traps: bool,
}

/// What is saved of the old task that the CPU does not hold.
#[derive(Clone, Copy)]
struct Left {
    rip: u64,
    flags: Rflags,
}

/// Tells whether the new task is one with T set.
fn switch(cpu: &mut Cpu, bus: &mut dyn Bus, to: To, left: Left) -> Result<bool, Exception> {
    let image = with_rollback(cpu, |cpu| {
        let image = leave_old(cpu, bus, to, left)?;
        load_registers(cpu, bus, to, &image)?;
        Ok(image)
    })?;
    load_ldt(cpu, bus, image.ldt, to.ext)?;
    load_segments(cpu, bus, &image.selectors, to.ext)?;
    Ok(image.traps)
}

/// Reads the new task's state and saves the old one's.
fn leave_old(cpu: &mut Cpu, bus: &mut dyn Bus, to: To, left: Left) -> Result<Image, Exception> {
    let wide = to.found.descriptor.kind() & 8 != 0;
    let least = if wide { BUSY_LIMIT32 } else { BUSY_LIMIT16 };
    if to.found.descriptor.limit() < least {
        return Err(Exception::ts(code(to.selector) | to.ext));
    }
    let base = to.found.descriptor.base();
    let image = read_image(cpu, bus, base, wide)?;
    save_image(cpu, bus, left)?;
    if to.reason == Reason::Nest {
        let old = cpu.tr.selector;
        cpu.store_table(bus, base, old)?;
    }
    set_busy_bits(cpu, bus, to.found, to.reason)?;
    Ok(image)
}

fn read_image(cpu: &mut Cpu, bus: &mut dyn Bus, base: u64, wide: bool) -> Result<Image, Exception> {
    let mut field = |offset: u64| -> Result<u64, Exception> {
        let at = base.wrapping_add(offset);
        Ok(if wide {
            cpu.load_table::<u32>(bus, at)?.into()
        } else {
            cpu.load_table::<u16>(bus, at)?.into()
        })
    };
    let (first, step, first_selector) = if wide {
        (0x20, 4, 0x48)
    } else {
        (0x0e, 2, 0x22)
    };
    let mut image = Image {
        cr3: if wide { field(0x1c)? as u32 } else { 0 },
        eip: field(first)?,
        eflags: field(first + step)?,
        gpr: [0; 8],
        selectors: [0; 6],
        ldt: 0,
        traps: wide && field(0x64)? & 1 != 0,
    };
    for (n, r) in image.gpr.iter_mut().enumerate() {
        *r = field(first + step * (2 + n as u64))?;
    }
    // A 16-bit TSS holds ES, CS, SS and DS only.
    let held = if wide { 6 } else { 4 };
    for n in 0..held {
        image.selectors[n as usize] = field(first_selector + step * n)? as u16;
    }
    image.ldt = field(first_selector + step * held)? as u16;
    Ok(image)
}

/// Saves the old task into its TSS.
fn save_image(cpu: &mut Cpu, bus: &mut dyn Bus, left: Left) -> Result<(), Exception> {
    let wide = cpu.tr.kind() & 8 != 0;
    let (first, step, first_selector) = if wide {
        (0x20, 4, 0x48)
    } else {
        (0x0e, 2, 0x22)
    };
    let mut fields = vec![(first, left.rip), (first + step, left.flags.bits())];
    fields.extend((0..8).map(|n| (first + step * (2 + n), cpu.gpr[n as usize])));
    let held = if wide { 6 } else { 4 };
    fields.extend((0..held).map(|n| {
        let selector = cpu.seg[n as usize].selector;
        (first_selector + step * n, selector.into())
    }));
    for (offset, v) in fields {
        let at = cpu.tr.base.wrapping_add(offset);
        if wide {
            cpu.store_table(bus, at, v as u32)?;
        } else {
            cpu.store_table(bus, at, v as u16)?;
        }
    }
    Ok(())
}

fn set_busy_bits(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    new: Found,
    reason: Reason,
) -> Result<(), Exception> {
    if reason != Reason::Nest {
        let selector = cpu.tr.selector;
        if let Some(old) = segment::find(cpu, bus, selector)? {
            segment::mark_busy(cpu, bus, old, false)?;
        }
    }
    if reason != Reason::Return {
        segment::mark_busy(cpu, bus, new, true)?;
    }
    Ok(())
}

/// What has no descriptor behind it. The commit point is behind this.
fn load_registers(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    to: To,
    image: &Image,
) -> Result<(), Exception> {
    const LOCAL_BREAKPOINTS: u64 = 0x155;
    cpu.tr = to.found.descriptor.segment(to.selector);
    cpu.tr.attributes |= 2;
    cpu.cr0 |= Cr0::TS;
    cpu.dr[7] &= !LOCAL_BREAKPOINTS;
    if cpu.cr0.contains(Cr0::PG) && cpu.tr.kind() & 8 != 0 {
        crate::control::load_cr3(cpu, bus, image.cr3.into())?;
    }
    cpu.gpr[..8].copy_from_slice(&image.gpr);
    let mut flags = Rflags::from_bits_truncate(image.eflags) | Rflags::ONE;
    if to.reason == Reason::Nest {
        flags |= Rflags::NT;
    }
    cpu.rflags = flags;
    cpu.rip = image.eip;
    cpu.ldtr = Segment::null(image.ldt, 0);
    for (s, selector) in cpu.seg.iter_mut().zip(&image.selectors) {
        *s = Segment::null(*selector, 0);
    }
    // A handler of what fails before there is a stack has to switch to one.
    cpu.cpl = 3;
    Ok(())
}

fn load_ldt(cpu: &mut Cpu, bus: &mut dyn Bus, selector: u16, ext: u32) -> Result<(), Exception> {
    if is_null(selector) {
        return Ok(());
    }
    let refused = Exception::ts(code(selector) | ext);
    if selector & 4 != 0 {
        return Err(refused);
    }
    let found = segment::find(cpu, bus, selector)?.ok_or(refused)?;
    let d = found.descriptor;
    if !d.is_system() || d.kind() != system_type::LDT || !d.present() {
        return Err(refused);
    }
    cpu.ldtr = d.segment(selector);
    Ok(())
}

fn load_segments(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selectors: &[u16; 6],
    ext: u32,
) -> Result<(), Exception> {
    if cpu.rflags.contains(Rflags::VM) {
        for (s, selector) in cpu.seg.iter_mut().zip(selectors) {
            *s = Segment::v86(*selector);
        }
        return Ok(());
    }
    let cs = selectors[Seg::Cs as usize];
    let cpl = rpl(cs);
    cpu.seg[Seg::Cs as usize] = code_segment(cpu, bus, cs, ext)?;
    let ss = stack_segment(cpu, bus, selectors[Seg::Ss as usize], cpl, ext)?;
    cpu.seg[Seg::Ss as usize] = ss;
    cpu.cpl = cpl;
    for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
        segment::load(cpu, bus, seg, selectors[seg as usize]).map_err(|e| as_task_fault(e, ext))?;
    }
    Ok(())
}

/// The code segment of a TSS, which its RPL makes the CPL.
fn code_segment(cpu: &mut Cpu, bus: &mut dyn Bus, cs: u16, ext: u32) -> Result<Segment, Exception> {
    let cpl = rpl(cs);
    let refused = Exception::ts(code(cs) | ext);
    let found = segment::find(cpu, bus, cs)?.ok_or(refused)?;
    let d = found.descriptor;
    let privileged = if d.is_conforming() {
        d.dpl() <= cpl
    } else {
        d.dpl() == cpl
    };
    if !d.is_code() || !privileged {
        return Err(refused);
    }
    if !d.present() {
        return Err(Exception::np(code(cs) | ext));
    }
    Ok(segment::mark_accessed(cpu, bus, found)?.segment(cs))
}

/// A #GP of a selector load during a task switch is a #TS.
fn as_task_fault(e: Exception, ext: u32) -> Exception {
    match (e.vector, e.error_code) {
        (crate::Vector::GeneralProtection, Some(c)) => Exception::ts(c | ext),
        (crate::Vector::SegmentNotPresent, Some(c)) => Exception::np(c | ext),
        _ => e,
    }
}
