//! Far control transfers: CALL, JMP and RET to another code segment, through call gates and task gates
//! (Intel SDM vol. 3A, section 5.8).

use crate::segment::{self, Found, code, is_null, rpl, system_type};
use crate::stack::Stack;
use crate::task::{self, Reason};
use crate::{Bus, Cpu, CpuMode, Exception, Gpr, Seg, Segment, iret};

const GP0: Exception = Exception::gp(0);

/// Where a far transfer goes. The checks of its code segment have passed; those of its address are [`Target::enter`]'s.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target {
    selector: u16,
    found: Found,
    pub cpl: u8,
    rip: u64,
    /// 64-bit code.
    pub long: bool,
}

impl Target {
    /// The checks of a code segment that every transfer makes last: a sane L and D, present.
    /// The caller checked the type and the privilege.
    pub fn checked(
        cpu: &Cpu,
        selector: u16,
        found: Found,
        cpl: u8,
        rip: u64,
    ) -> Result<Self, Exception> {
        const BOTH: u32 = Segment::L | Segment::DB;
        let d = found.descriptor;
        if cpu.long_mode() && d.attributes() & BOTH == BOTH {
            return Err(Exception::gp(code(selector)));
        }
        if !d.present() {
            return Err(Exception::np(code(selector)));
        }
        Ok(Target {
            selector,
            found,
            cpl,
            rip,
            long: cpu.long_mode() && d.attributes() & Segment::L != 0,
        })
    }

    /// Goes there, or finds that the address is not within the segment. Whatever the transfer pushes or pops comes before, and faults before.
    pub fn enter(&self, cpu: &mut Cpu, bus: &mut dyn Bus) -> Result<(), Exception> {
        let (rip, reachable) = if self.long {
            (self.rip, cpu.canonical(self.rip))
        } else {
            // An operand of 64 bits has no more for such code.
            let eip = self.rip & 0xffff_ffff;
            (eip, eip <= self.found.descriptor.limit().into())
        };
        if !reachable {
            return Err(GP0);
        }
        let d = segment::mark_accessed(cpu, bus, self.found)?;
        let selector = self.selector & !3 | u16::from(self.cpl);
        cpu.seg[Seg::Cs as usize] = d.segment(selector);
        cpu.cpl = self.cpl;
        cpu.rip = rip;
        Ok(())
    }
}

/// Loads CS as real and virtual-8086 mode do.
pub(crate) fn set_real_cs(cpu: &mut Cpu, selector: u16) {
    let cs = &mut cpu.seg[Seg::Cs as usize];
    cs.selector = selector;
    cs.base = u64::from(selector) << 4;
}

fn in_real_style(cpu: &Cpu) -> bool {
    matches!(cpu.mode(), CpuMode::Real | CpuMode::V86)
}

/// A far pointer, as an operand gives it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FarPointer {
    pub selector: u16,
    pub offset: u64,
    /// Operand size: 2, 4 or 8.
    pub size: u64,
}

/// The checks of a direct far JMP or CALL to a code segment.
fn direct_target(cpu: &Cpu, p: FarPointer, found: Found) -> Result<Target, Exception> {
    let d = found.descriptor;
    let allowed = if d.is_conforming() {
        d.dpl() <= cpu.cpl
    } else {
        rpl(p.selector) <= cpu.cpl && d.dpl() == cpu.cpl
    };
    if !allowed {
        return Err(Exception::gp(code(p.selector)));
    }
    Target::checked(cpu, p.selector, found, cpu.cpl, p.offset)
}

fn find(cpu: &mut Cpu, bus: &mut dyn Bus, selector: u16) -> Result<Found, Exception> {
    if is_null(selector) {
        return Err(GP0);
    }
    segment::find(cpu, bus, selector)?.ok_or(Exception::gp(code(selector)))
}

/// Far JMP.
pub(crate) fn jump(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    p: FarPointer,
    next_rip: u64,
) -> Result<(), Exception> {
    if in_real_style(cpu) {
        return jump_real(cpu, p);
    }
    let found = find(cpu, bus, p.selector)?;
    if found.descriptor.is_system() {
        return through_system(cpu, bus, p, found, Reason::Jump, next_rip);
    }
    if !found.descriptor.is_code() {
        return Err(Exception::gp(code(p.selector)));
    }
    direct_target(cpu, p, found)?.enter(cpu, bus)
}

fn jump_real(cpu: &mut Cpu, p: FarPointer) -> Result<(), Exception> {
    if p.offset > cpu.segment(Seg::Cs).limit.into() {
        return Err(GP0);
    }
    set_real_cs(cpu, p.selector);
    cpu.rip = p.offset;
    Ok(())
}

/// Far CALL.
pub(crate) fn call(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    p: FarPointer,
    next_rip: u64,
) -> Result<(), Exception> {
    if in_real_style(cpu) {
        let stack = push_return(cpu, bus, Stack::current(cpu), p.size, next_rip)?;
        jump_real(cpu, p)?;
        stack.commit(cpu);
        return Ok(());
    }
    let found = find(cpu, bus, p.selector)?;
    if found.descriptor.is_system() {
        return through_system(cpu, bus, p, found, Reason::Nest, next_rip);
    }
    if !found.descriptor.is_code() {
        return Err(Exception::gp(code(p.selector)));
    }
    let target = direct_target(cpu, p, found)?;
    let stack = push_return(cpu, bus, Stack::current(cpu), p.size, next_rip)?;
    target.enter(cpu, bus)?;
    stack.commit(cpu);
    Ok(())
}

fn push_return(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    mut stack: Stack,
    size: u64,
    next_rip: u64,
) -> Result<Stack, Exception> {
    let cs = cpu.segment(Seg::Cs).selector;
    stack.push(cpu, bus, size, cs.into())?;
    stack.push(cpu, bus, size, next_rip)?;
    Ok(stack)
}

/// A selector that names a call gate, a task gate or a TSS.
fn through_system(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    p: FarPointer,
    found: Found,
    reason: Reason,
    next_rip: u64,
) -> Result<(), Exception> {
    use system_type::{CALL_GATE, CALL_GATE16, TASK_GATE, TSS, TSS16};
    let d = found.descriptor;
    let refused = Exception::gp(code(p.selector));
    let legacy_only = matches!(d.kind(), TSS16 | TSS | TASK_GATE | CALL_GATE16);
    // In long mode type 9 is a TSS as well, which no transfer may name.
    if !matches!(d.kind(), TSS16 | TSS | TASK_GATE | CALL_GATE16 | CALL_GATE)
        || (cpu.long_mode() && legacy_only)
        || d.dpl() < cpu.cpl
        || d.dpl() < rpl(p.selector)
    {
        return Err(refused);
    }
    if !d.present() {
        return Err(Exception::np(code(p.selector)));
    }
    match d.kind() {
        TASK_GATE => task::far_switch(cpu, bus, d.gate_selector(), reason, next_rip),
        TSS16 | TSS => task::far_switch(cpu, bus, p.selector, reason, next_rip),
        _ => through_gate(cpu, bus, p.selector, found, reason, next_rip),
    }
}

fn through_gate(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    gate_selector: u16,
    found: Found,
    reason: Reason,
    next_rip: u64,
) -> Result<(), Exception> {
    let refused = Exception::gp(code(gate_selector));
    let gate = segment::find_high(cpu, bus, gate_selector, found)?
        .ok_or(refused)?
        .descriptor;
    let long = cpu.long_mode();
    let size = match (long, gate.kind() == system_type::CALL_GATE) {
        (true, _) => 8,
        (false, true) => 4,
        (false, false) => 2,
    };
    let selector = gate.gate_selector();
    let found = find(cpu, bus, selector)?;
    let d = found.descriptor;
    let needs_long = Segment::L | Segment::DB;
    if !d.is_code()
        || d.dpl() > cpu.cpl
        || (long && d.attributes() & needs_long != Segment::L)
        || (reason == Reason::Jump && !d.is_conforming() && d.dpl() != cpu.cpl)
    {
        return Err(Exception::gp(code(selector)));
    }
    let cpl = if d.is_conforming() { cpu.cpl } else { d.dpl() };
    let mask = if size == 2 { 0xffff } else { u64::MAX };
    let target = Target::checked(cpu, selector, found, cpl, gate.gate_offset() & mask)?;
    if reason == Reason::Jump {
        return target.enter(cpu, bus);
    }
    let stack = gate_stack(cpu, bus, &target, size, gate.gate_parameters())?;
    let stack = push_return(cpu, bus, stack, size, next_rip)?;
    target.enter(cpu, bus)?;
    stack.commit(cpu);
    Ok(())
}

/// The stack that a call through a gate runs on: with the old stack's address and the parameters where privilege changes.
fn gate_stack(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    target: &Target,
    size: u64,
    parameters: u32,
) -> Result<Stack, Exception> {
    let old = Stack::current(cpu);
    if target.cpl == cpu.cpl {
        return Ok(old);
    }
    let mut stack = if size == 8 {
        let offset = 4 + 8 * u32::from(target.cpl);
        let rsp = task::long_stack_pointer(cpu, bus, offset, 0)?;
        let ss = Segment::null(target.cpl.into(), target.cpl);
        Stack::new(cpu, ss, rsp, target.cpl, true)
    } else {
        task::inner_stack(cpu, bus, target.cpl, 0)?
    };
    let ss = old.segment().selector;
    stack.push(cpu, bus, size, ss.into())?;
    stack.push(cpu, bus, size, cpu.gpr[Gpr::Rsp as usize])?;
    if size != 8 {
        copy_parameters(cpu, bus, old, &mut stack, size, parameters)?;
    }
    Ok(stack)
}

fn copy_parameters(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    mut old: Stack,
    stack: &mut Stack,
    size: u64,
    count: u32,
) -> Result<(), Exception> {
    let mut values = Vec::with_capacity(count as usize);
    for _ in 0..count {
        values.push(old.pop(cpu, bus, size)?);
    }
    for v in values.into_iter().rev() {
        stack.push(cpu, bus, size, v)?;
    }
    Ok(())
}

/// Far RET: `released` is the number of parameter bytes that it removes.
pub(crate) fn far_return(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    size: u64,
    released: u64,
) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, bus, size)?;
    let selector = stack.pop(cpu, bus, size)? as u16;
    if in_real_style(cpu) {
        let p = FarPointer {
            selector,
            offset: rip,
            size,
        };
        jump_real(cpu, p)?;
        stack.skip(released);
        stack.commit(cpu);
        return Ok(());
    }
    let target = iret::return_target(cpu, bus, selector, rip)?;
    stack.skip(released);
    if target.cpl == cpu.cpl {
        target.enter(cpu, bus)?;
        stack.commit(cpu);
        return Ok(());
    }
    let mut outer = iret::outer_stack(cpu, bus, stack, size, &target)?;
    target.enter(cpu, bus)?;
    outer.skip(released);
    outer.commit(cpu);
    segment::drop_privileged_data(cpu);
    Ok(())
}
