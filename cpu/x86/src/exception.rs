//! Delivery of exceptions and interrupts through the IVT or IDT (Intel SDM vol. 3A, chapter 7).
//!
//! Problem: delivery itself reads tables and writes a stack, any of which may fault, and the fault must then see the
//! machine as if the first event had not been delivered.
//! Idea: each form of delivery computes everything into locals, writes the new stack (memory below a stack pointer is
//! nobody's), and changes the CPU only in its last few lines, after which nothing can fail. A task switch, which must
//! change the CPU on its way, restores a copy, up to where its faults are the new task's.
//! A fault during delivery is combined with the first event by [`combine`]: delivered instead of it, or as a double
//! fault, or the CPU shuts down.

use crate::segment::{self, Descriptor, Found, code, system_type};
use crate::stack::Stack;
use crate::{
    Activity, Bus, Cpu, CpuMode, Cr4, Dtr, Exception, Outcome, Rflags, Seg, Segment, Vector, flags,
    task, transfer,
};

/// Where an event comes from: it decides the checks of the gate and the EXT bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// An exception that the processor raised.
    Exception,
    /// INT n.
    SoftwareInterrupt,
    /// INT3 and INTO: the gate's DPL is checked, IOPL in virtual-8086 mode is not.
    SoftwareException,
    /// INT1: no check.
    PrivilegedSoftware,
    /// An interrupt or NMI.
    External,
}

/// Something to be delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Event {
    pub vector: u8,
    pub error_code: Option<u32>,
    pub source: Source,
    /// The RIP that is saved.
    pub return_rip: u64,
    /// RF in the saved flags: set by faults, so that the restarted instruction skips its instruction breakpoint.
    pub resume_flag: bool,
}

impl Event {
    /// An interrupt between two instructions.
    pub fn external(cpu: &Cpu, vector: u8) -> Self {
        Event {
            vector,
            error_code: None,
            source: Source::External,
            return_rip: cpu.rip,
            resume_flag: false,
        }
    }

    /// INT n, INT3, INTO or INT1.
    pub fn software(vector: u8, source: Source, next_rip: u64) -> Self {
        Event {
            vector,
            error_code: None,
            source,
            return_rip: next_rip,
            resume_flag: false,
        }
    }

    fn exception(cpu: &Cpu, e: &Exception, next_rip: u64) -> Self {
        let source = match e.vector {
            Vector::Breakpoint | Vector::Overflow => Source::SoftwareException,
            _ => Source::Exception,
        };
        Event {
            vector: e.vector as u8,
            error_code: e.error_code,
            source,
            return_rip: if e.trap { next_rip } else { cpu.rip },
            resume_flag: !e.trap && !is_instruction_breakpoint(e),
        }
    }

    /// EXT in the error codes of faults during delivery.
    pub fn ext(&self) -> u32 {
        u32::from(!self.is_software())
    }

    fn is_software(&self) -> bool {
        matches!(
            self.source,
            Source::SoftwareInterrupt | Source::SoftwareException
        )
    }

    /// The error code that names the IDT entry.
    fn idt_code(&self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.ext()
    }

    /// The flags that are saved.
    pub fn flags_image(&self, cpu: &Cpu) -> Rflags {
        let rf = if self.resume_flag {
            Rflags::RF
        } else {
            Rflags::empty()
        };
        cpu.rflags | rf
    }
}

/// The fault whose frame has RF as it was: the handler decides whether the instruction then runs.
fn is_instruction_breakpoint(e: &Exception) -> bool {
    e.vector == Vector::Debug && e.dr6 & 0xf != 0
}

/// What a second exception during the delivery of a first one leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Combined {
    /// It is delivered in place of the first; the first recurs when its instruction is run again.
    Serial,
    /// #DF is delivered.
    Double,
    /// The CPU shuts down.
    Triple,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

fn class(vector: u8) -> Class {
    match vector {
        0 | 10..=13 | 21 => Class::Contributory,
        14 => Class::PageFault,
        8 => Class::DoubleFault,
        _ => Class::Benign,
    }
}

/// Intel SDM vol. 3A, table 7-5. `first` is `None` for interrupts and INT n, which are benign whatever their vector.
pub(crate) fn combine(first: Option<u8>, second: u8) -> Combined {
    let first = first.map_or(Class::Benign, class);
    match (first, class(second)) {
        (Class::DoubleFault, Class::Contributory | Class::PageFault) => Combined::Triple,
        (Class::Contributory, Class::Contributory)
        | (Class::PageFault, Class::Contributory | Class::PageFault) => Combined::Double,
        _ => Combined::Serial,
    }
}

/// Raises an exception: delivers it, or what its delivery leads to.
///
/// `cpu.rip` is the address of the instruction that raised it and `next_rip` that of the following one, which traps save.
pub fn raise(cpu: &mut Cpu, bus: &mut dyn Bus, e: Exception, next_rip: u64) -> Outcome {
    note(cpu, &e);
    let event = Event::exception(cpu, &e, next_rip);
    if event.source == Source::Exception && e.trap {
        // The instruction is complete: a fault in delivery must not restart it.
        cpu.rip = next_rip;
    }
    deliver_or_fault(cpu, bus, event)
}

/// Delivers an event, and the faults that come of it, to the end.
///
/// #AC may meet #AC without end, where its handler is user code with a misaligned stack; a processor then does nothing else any more. Here what is delivered is given
/// up after a while, so that whoever has to can stop the CPU: an instruction that faults does so again at once.
pub(crate) fn deliver_or_fault(cpu: &mut Cpu, bus: &mut dyn Bus, mut event: Event) -> Outcome {
    const MOST_TRAPS: u32 = 4;
    /// Without #AC a chain of faults has a few.
    const MOST_FAULTS: u32 = 16;
    let (mut traps, mut faults) = (0, 0);
    loop {
        let Err(second) = deliver(cpu, bus, &event) else {
            // What was pushed is watched, or the task's TSS has T set. So may #DB's own be: what is left then waits for an instruction.
            if traps == MOST_TRAPS || !cpu.has_hits() {
                return Outcome::Continue;
            }
            let hits = cpu.take_hits();
            if hits == 0 {
                return Outcome::Continue;
            }
            traps += 1;
            let trap = Exception::db(hits, true);
            note(cpu, &trap);
            event = Event::exception(cpu, &trap, cpu.rip);
            continue;
        };
        note(cpu, &second);
        faults += 1;
        if faults == MOST_FAULTS {
            return Outcome::Continue;
        }
        let first = (event.source == Source::Exception).then_some(event.vector);
        let e = match combine(first, second.vector as u8) {
            Combined::Serial => second,
            Combined::Double => Exception::DF,
            Combined::Triple => {
                cpu.activity = Activity::Shutdown;
                return Outcome::Shutdown;
            }
        };
        event = Event::exception(cpu, &e, cpu.rip);
    }
}

/// The side effects of an exception that happen whether or not it can be delivered.
fn note(cpu: &mut Cpu, e: &Exception) {
    const TRAP_BITS: u64 = 0xf;
    const GENERAL_DETECT: u64 = 1 << 13;
    if let Some(n) = cpu.counters.exceptions.get_mut(e.vector as usize) {
        *n += 1;
    }
    match e.vector {
        Vector::PageFault => cpu.cr2 = e.address,
        Vector::Debug => {
            cpu.dr[6] = (cpu.dr[6] & !TRAP_BITS) | e.dr6;
            cpu.dr[7] &= !GENERAL_DETECT;
            cpu.end_branch_steps();
        }
        _ => {}
    }
}

/// Delivers one event, or leaves the state as it was and says why it cannot be delivered.
pub(crate) fn deliver(cpu: &mut Cpu, bus: &mut dyn Bus, event: &Event) -> Result<(), Exception> {
    match cpu.mode() {
        CpuMode::Real => deliver_real(cpu, bus, event),
        _ if cpu.long_mode() => deliver_long(cpu, bus, event),
        _ => deliver_protected(cpu, bus, event),
    }?;
    cpu.interrupt_shadow = false;
    cpu.mov_ss_shadow = false;
    Ok(())
}

/// Linear address of an IDT entry of `size` bytes.
fn gate_address(idtr: &Dtr, vector: u8, size: u64) -> Option<u64> {
    let offset = u64::from(vector) * size;
    (offset + size - 1 <= u64::from(idtr.limit)).then(|| idtr.base.wrapping_add(offset))
}

fn deliver_real(cpu: &mut Cpu, bus: &mut dyn Bus, event: &Event) -> Result<(), Exception> {
    // Error codes are not pushed, and faults name no selector.
    let at = gate_address(&cpu.idtr, event.vector, 4).ok_or(Exception::gp(0))?;
    through_vector_table(cpu, bus, event, at, cpu.rflags)?;
    cpu.rflags
        .remove(Rflags::IF | Rflags::TF | Rflags::AC | Rflags::RF);
    Ok(())
}

/// Pushes FLAGS, CS and IP, and goes where an entry of the vector table says.
fn through_vector_table(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    event: &Event,
    at: u64,
    flags: Rflags,
) -> Result<(), Exception> {
    let entry: u32 = cpu.load_table(bus, at)?;
    let mut stack = Stack::current(cpu);
    let cs = cpu.segment(Seg::Cs).selector;
    stack.push(cpu, bus, 2, flags.bits())?;
    stack.push(cpu, bus, 2, cs.into())?;
    stack.push(cpu, bus, 2, event.return_rip)?;
    stack.commit(cpu);
    transfer::set_real_cs(cpu, (entry >> 16) as u16);
    cpu.rip = u64::from(entry & 0xffff);
    Ok(())
}

/// INT n that the redirection bitmap leaves to the 8086 program, whose vector table begins at linear address 0 (Intel SDM vol. 3B, table 22-2, methods 5
/// and 6).
fn deliver_redirected(cpu: &mut Cpu, bus: &mut dyn Bus, event: &Event) -> Result<(), Exception> {
    let (shown, masked) = match cpu.iopl() {
        3 => (cpu.rflags, Rflags::IF),
        _ => (flags::with_vif(cpu.rflags), Rflags::VIF),
    };
    through_vector_table(cpu, bus, event, 4 * u64::from(event.vector), shown)?;
    cpu.rflags.remove(masked | Rflags::TF | Rflags::RF);
    Ok(())
}

/// The handler's code segment, checked as far as every gate checks it.
fn handler_code(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    ext: u32,
) -> Result<Found, Exception> {
    let refused = Exception::gp(code(selector) | ext);
    let found = segment::find(cpu, bus, selector)?.ok_or(refused)?;
    let d = found.descriptor;
    if !d.is_code() || d.dpl() > cpu.cpl {
        return Err(refused);
    }
    if !d.present() {
        return Err(Exception::np(code(selector) | ext));
    }
    Ok(found)
}

/// The checks of a gate itself.
fn check_gate(cpu: &Cpu, event: &Event, gate: Descriptor, kinds: &[u32]) -> Result<(), Exception> {
    let known = gate.is_system() && kinds.contains(&gate.kind());
    if !known || (event.is_software() && gate.dpl() < cpu.cpl) {
        return Err(Exception::gp(event.idt_code()));
    }
    if !gate.present() {
        return Err(Exception::np(event.idt_code()));
    }
    Ok(())
}

/// The flags that a handler starts with.
fn handler_flags(flags: Rflags, gate: Descriptor) -> Rflags {
    let mut cleared = Rflags::TF | Rflags::NT | Rflags::RF | Rflags::VM;
    if gate.kind() & 1 == 0 {
        cleared |= Rflags::IF;
    }
    flags & !cleared
}

/// CPL of the handler: conforming code keeps the CPL.
fn handler_cpl(cpu: &Cpu, d: Descriptor) -> u8 {
    if d.is_conforming() { cpu.cpl } else { d.dpl() }
}

fn deliver_long(cpu: &mut Cpu, bus: &mut dyn Bus, event: &Event) -> Result<(), Exception> {
    use system_type::{INTERRUPT_GATE, TRAP_GATE};
    let ext = event.ext();
    let at = gate_address(&cpu.idtr, event.vector, 16).ok_or(Exception::gp(event.idt_code()))?;
    let gate = Descriptor {
        low: cpu.load_table(bus, at)?,
        high: cpu.load_table::<u64>(bus, at.wrapping_add(8))? & 0xffff_ffff,
    };
    check_gate(cpu, event, gate, &[INTERRUPT_GATE, TRAP_GATE])?;
    let selector = gate.gate_selector();
    let found = handler_code(cpu, bus, selector, ext)?;
    let attributes = found.descriptor.attributes();
    if attributes & (Segment::L | Segment::DB) != Segment::L {
        return Err(Exception::gp(code(selector) | ext));
    }
    let cpl = handler_cpl(cpu, found.descriptor);
    let mut stack = long_stack(cpu, bus, cpl, gate.gate_ist(), ext)?;
    push_frame(cpu, bus, &mut stack, event, 8, true)?;
    if !cpu.canonical(gate.gate_offset()) {
        return Err(Exception::gp(ext));
    }
    let descriptor = segment::mark_accessed(cpu, bus, found)?;

    stack.commit(cpu);
    cpu.seg[Seg::Cs as usize] = descriptor.segment(selector & !3 | u16::from(cpl));
    cpu.cpl = cpl;
    cpu.rip = gate.gate_offset();
    cpu.rflags = handler_flags(cpu.rflags, gate);
    Ok(())
}

/// The stack of a 64-bit handler: from the interrupt stack table, from RSP0 to RSP2, or the current one.
fn long_stack(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    cpl: u8,
    ist: u8,
    ext: u32,
) -> Result<Stack, Exception> {
    let changes = cpl != cpu.cpl;
    let rsp = match (ist, changes) {
        (0, false) => cpu.gpr[crate::Gpr::Rsp as usize],
        (0, true) => task::long_stack_pointer(cpu, bus, 4 + 8 * u32::from(cpl), ext)?,
        (ist, _) => task::long_stack_pointer(cpu, bus, 0x1c + 8 * u32::from(ist), ext)?,
    };
    let ss = if changes {
        Segment::null(cpl.into(), cpl)
    } else {
        *cpu.segment(Seg::Ss)
    };
    Ok(Stack::new(cpu, ss, rsp & !0xf, cpl, true).with_code(ext))
}

/// Pushes SS and RSP (where `with_stack`), RFLAGS, CS, RIP and the error code.
fn push_frame(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    stack: &mut Stack,
    event: &Event,
    size: u64,
    with_stack: bool,
) -> Result<(), Exception> {
    let flags = event.flags_image(cpu).bits();
    let frame = [
        cpu.segment(Seg::Ss).selector.into(),
        cpu.gpr[crate::Gpr::Rsp as usize],
        flags,
        cpu.segment(Seg::Cs).selector.into(),
        event.return_rip,
    ];
    let skipped = if with_stack { 0 } else { 2 };
    for v in &frame[skipped..] {
        stack.push(cpu, bus, size, *v)?;
    }
    if let Some(e) = event.error_code {
        stack.push(cpu, bus, size, e.into())?;
    }
    Ok(())
}

fn deliver_protected(cpu: &mut Cpu, bus: &mut dyn Bus, event: &Event) -> Result<(), Exception> {
    use system_type::{INTERRUPT_GATE, INTERRUPT_GATE16, TASK_GATE, TRAP_GATE, TRAP_GATE16};
    if cpu.mode() == CpuMode::V86 && event.source == Source::SoftwareInterrupt {
        if cpu.cr4.contains(Cr4::VME) && task::redirects(cpu, bus, event.vector)? {
            return deliver_redirected(cpu, bus, event);
        }
        if cpu.iopl() < 3 {
            return Err(Exception::gp(0));
        }
    }
    let at = gate_address(&cpu.idtr, event.vector, 8).ok_or(Exception::gp(event.idt_code()))?;
    let gate = Descriptor {
        low: cpu.load_table(bus, at)?,
        high: 0,
    };
    let kinds = [
        TASK_GATE,
        INTERRUPT_GATE16,
        TRAP_GATE16,
        INTERRUPT_GATE,
        TRAP_GATE,
    ];
    check_gate(cpu, event, gate, &kinds)?;
    if gate.kind() == TASK_GATE {
        return task::interrupt(cpu, bus, gate.gate_selector(), event);
    }
    deliver_gate(cpu, bus, event, gate)
}

fn deliver_gate(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    event: &Event,
    gate: Descriptor,
) -> Result<(), Exception> {
    let ext = event.ext();
    let v86 = cpu.mode() == CpuMode::V86;
    let size = if gate.kind() & 8 != 0 { 4 } else { 2 };
    let selector = gate.gate_selector();
    let found = handler_code(cpu, bus, selector, ext)?;
    let cpl = handler_cpl(cpu, found.descriptor);
    if v86 && cpl != 0 {
        return Err(Exception::gp(code(selector) | ext));
    }
    let changes = cpl != cpu.cpl;
    let mut stack = if changes {
        task::inner_stack(cpu, bus, cpl, ext)?
    } else {
        Stack::current(cpu).with_code(ext)
    };
    if v86 {
        for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
            let selector = cpu.segment(seg).selector;
            stack.push(cpu, bus, size, selector.into())?;
        }
    }
    push_frame(cpu, bus, &mut stack, event, size, changes)?;
    let offset = gate.gate_offset() & if size == 2 { 0xffff } else { 0xffff_ffff };
    if offset > found.descriptor.limit().into() {
        return Err(Exception::gp(ext));
    }
    let descriptor = segment::mark_accessed(cpu, bus, found)?;

    stack.commit(cpu);
    if v86 {
        for seg in [Seg::Gs, Seg::Fs, Seg::Ds, Seg::Es] {
            cpu.seg[seg as usize] = Segment::null(0, 0);
        }
    }
    cpu.seg[Seg::Cs as usize] = descriptor.segment(selector & !3 | u16::from(cpl));
    cpu.cpl = cpl;
    cpu.rip = offset;
    cpu.rflags = handler_flags(cpu.rflags, gate);
    Ok(())
}

#[cfg(test)]
#[path = "exception_tests.rs"]
mod tests;
