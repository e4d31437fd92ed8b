//! The task-state segment: stacks for inner privilege levels, the I/O permission and redirection bitmaps and hardware task switches
//! (Intel SDM vol. 3A, chapter 9).
//!
//! A task switch saves and loads the CPU field by field and may fault on its way. Up to the point where the new
//! state is all read, nothing of the CPU has changed; faults of the selector loads that follow belong to the new task by
//! the manual, but here, too, the old task is restored: no guest we know depends on it, and delivery stays atomic. The debug trap flag of a TSS is not honoured.

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

/// Delivers an event through a task gate.
pub(crate) fn interrupt(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    ext: u32,
    return_rip: u64,
    error_code: Option<u32>,
) -> Result<(), Exception> {
    let found = target(cpu, bus, selector, ext)?;
    with_rollback(cpu, |cpu| {
        switch(cpu, bus, selector, found, Reason::Nest, return_rip)?;
        let Some(e) = error_code else { return Ok(()) };
        let size = if cpu.tr.kind() & 8 != 0 { 4 } else { 2 };
        let mut stack = Stack::current(cpu).with_code(ext);
        stack.push(cpu, bus, size, e.into())?;
        stack.commit(cpu);
        Ok(())
    })
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
    let found = target(cpu, bus, selector, 0)?;
    with_rollback(cpu, |cpu| {
        switch(cpu, bus, selector, found, reason, next_rip)
    })
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
    with_rollback(cpu, |cpu| {
        switch(cpu, bus, selector, found, Reason::Return, next_rip)
    })
}

/// Runs `f` and restores what a task switch changes where it fails.
fn with_rollback(
    cpu: &mut Cpu,
    f: impl FnOnce(&mut Cpu) -> Result<(), Exception>,
) -> Result<(), Exception> {
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
}

fn switch(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    new: Found,
    reason: Reason,
    return_rip: u64,
) -> Result<(), Exception> {
    let wide = new.descriptor.kind() & 8 != 0;
    let least = if wide { BUSY_LIMIT32 } else { BUSY_LIMIT16 };
    if new.descriptor.limit() < least {
        return Err(Exception::ts(code(selector)));
    }
    let base = new.descriptor.base();
    let image = read_image(cpu, bus, base, wide)?;
    save_image(cpu, bus, reason, return_rip)?;
    if reason == Reason::Nest {
        let old = cpu.tr.selector;
        cpu.store_table(bus, base, old)?;
    }
    set_busy_bits(cpu, bus, new, reason)?;
    load_image(cpu, bus, selector, new, reason, &image)
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
fn save_image(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    reason: Reason,
    return_rip: u64,
) -> Result<(), Exception> {
    let wide = cpu.tr.kind() & 8 != 0;
    let mut flags = cpu.rflags;
    if reason == Reason::Return {
        flags.remove(Rflags::NT);
    }
    let (first, step, first_selector) = if wide {
        (0x20, 4, 0x48)
    } else {
        (0x0e, 2, 0x22)
    };
    let mut fields = vec![(first, return_rip), (first + step, flags.bits())];
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

fn load_image(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    new: Found,
    reason: Reason,
    image: &Image,
) -> Result<(), Exception> {
    const LOCAL_BREAKPOINTS: u64 = 0x155;
    cpu.tr = new.descriptor.segment(selector);
    cpu.tr.attributes |= 2;
    cpu.cr0 |= Cr0::TS;
    cpu.dr[7] &= !LOCAL_BREAKPOINTS;
    if cpu.cr0.contains(Cr0::PG) && cpu.tr.kind() & 8 != 0 {
        crate::control::load_cr3(cpu, bus, image.cr3.into())?;
    }
    cpu.gpr[..8].copy_from_slice(&image.gpr);
    let mut flags = Rflags::from_bits_truncate(image.eflags) | Rflags::ONE;
    if reason == Reason::Nest {
        flags |= Rflags::NT;
    }
    cpu.rflags = flags;
    cpu.rip = image.eip;
    load_ldt(cpu, bus, image.ldt)?;
    load_segments(cpu, bus, &image.selectors)
}

fn load_ldt(cpu: &mut Cpu, bus: &mut dyn Bus, selector: u16) -> Result<(), Exception> {
    if is_null(selector) {
        cpu.ldtr = Segment::null(selector, 0);
        return Ok(());
    }
    let refused = Exception::ts(code(selector));
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

fn load_segments(cpu: &mut Cpu, bus: &mut dyn Bus, selectors: &[u16; 6]) -> Result<(), Exception> {
    if cpu.rflags.contains(Rflags::VM) {
        cpu.cpl = 3;
        for (s, selector) in cpu.seg.iter_mut().zip(selectors) {
            *s = Segment::v86(*selector);
        }
        return Ok(());
    }
    let cs = selectors[Seg::Cs as usize];
    cpu.cpl = rpl(cs);
    let refused = Exception::ts(code(cs));
    let found = segment::find(cpu, bus, cs)?.ok_or(refused)?;
    let d = found.descriptor;
    let privileged = if d.is_conforming() {
        d.dpl() <= cpu.cpl
    } else {
        d.dpl() == cpu.cpl
    };
    if !d.is_code() || !privileged {
        return Err(refused);
    }
    if !d.present() {
        return Err(Exception::np(code(cs)));
    }
    cpu.seg[Seg::Cs as usize] = segment::mark_accessed(cpu, bus, found)?.segment(cs);
    let cpl = cpu.cpl;
    let ss = stack_segment(cpu, bus, selectors[Seg::Ss as usize], cpl, 0)?;
    cpu.seg[Seg::Ss as usize] = ss;
    for seg in [Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
        segment::load(cpu, bus, seg, selectors[seg as usize]).map_err(as_task_fault)?;
    }
    Ok(())
}

/// A #GP of a selector load during a task switch is a #TS.
fn as_task_fault(e: Exception) -> Exception {
    match (e.vector, e.error_code) {
        (crate::Vector::GeneralProtection, Some(c)) => Exception::ts(c),
        _ => e,
    }
}
