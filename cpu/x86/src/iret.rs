//! IRET in all its forms (Intel SDM vol. 2A): to the same and to lesser privilege, to virtual-8086 mode, to a nested task.

use crate::segment::{self, code, is_null, rpl};
use crate::stack::Stack;
use crate::transfer::{self, Target};
use crate::{Bus, Cpu, CpuMode, Exception, Gpr, Rflags, Seg, Segment, flags, task};

const GP0: Exception = Exception::gp(0);
/// Of every segment of virtual-8086 mode.
const V86_LIMIT: u64 = 0xffff;

/// Executes IRET, IRETD or IRETQ: `size` is 2, 4 or 8. `next_rip` is what a task switch saves.
pub(crate) fn execute(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    size: u64,
    next_rip: u64,
) -> Result<(), Exception> {
    // NMIs are open again even if IRET faults.
    if std::mem::take(&mut cpu.nmi_blocked) {
        bus.nmi_ends();
    }
    match cpu.mode() {
        CpuMode::Real | CpuMode::V86 => to_real(cpu, bus, size),
        _ if cpu.rflags.contains(Rflags::NT) && cpu.long_mode() => Err(GP0),
        _ if cpu.rflags.contains(Rflags::NT) => task::task_return(cpu, bus, next_rip),
        _ => to_protected(cpu, bus, size),
    }
}

fn to_real(cpu: &mut Cpu, bus: &mut dyn Bus, size: u64) -> Result<(), Exception> {
    let vif = flags::shows_vif(cpu, size)?;
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, bus, size)?;
    let selector = stack.pop(cpu, bus, size)? as u16;
    let flags = stack.pop(cpu, bus, size)?;
    if rip > u64::from(cpu.segment(Seg::Cs).limit) {
        return Err(GP0);
    }
    if vif {
        let popped = Rflags::from_bits_truncate(flags);
        flags::check_vif(cpu, popped)?;
        cpu.rflags.set(Rflags::VIF, popped.contains(Rflags::IF));
    }
    stack.commit(cpu);
    transfer::set_real_cs(cpu, selector);
    cpu.rip = rip;
    let mut writable = returned_flags(size);
    writable.set(Rflags::IF, !vif);
    if cpu.mode() == CpuMode::Real {
        writable |= Rflags::IOPL;
    }
    set_flags(cpu, flags, writable);
    Ok(())
}

/// The flags that every IRET of this operand size sets.
fn returned_flags(size: u64) -> Rflags {
    let low = Rflags::ARITHMETIC | Rflags::TF | Rflags::DF | Rflags::NT;
    if size == 2 {
        low
    } else {
        low | Rflags::RF | Rflags::AC | Rflags::ID
    }
}

/// The flags that IRET at this CPL may set.
fn writable_flags(cpu: &Cpu, size: u64) -> Rflags {
    let mut writable = returned_flags(size);
    writable.set(Rflags::IF, cpu.io_privileged());
    if cpu.cpl == 0 {
        writable |= Rflags::IOPL;
        if size != 2 {
            writable |= Rflags::VIF | Rflags::VIP;
        }
    }
    writable
}

/// Takes the `writable` ones of the popped flags.
pub(crate) fn set_flags(cpu: &mut Cpu, popped: u64, writable: Rflags) {
    let popped = Rflags::from_bits_truncate(popped);
    cpu.rflags = (cpu.rflags & !writable) | (popped & writable) | Rflags::ONE;
}

fn to_protected(cpu: &mut Cpu, bus: &mut dyn Bus, size: u64) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu);
    let rip = stack.pop(cpu, bus, size)?;
    let selector = stack.pop(cpu, bus, size)? as u16;
    let flags = stack.pop(cpu, bus, size)?;
    let to_v86 = size == 4 && flags & Rflags::VM.bits() != 0 && cpu.cpl == 0;
    if to_v86 && !cpu.long_mode() {
        return to_v86_mode(cpu, bus, stack, rip, selector, flags);
    }
    let target = return_target(cpu, bus, selector, rip)?;
    let writable = writable_flags(cpu, size);
    let from_long = cpu.mode() == CpuMode::Bits64;
    let outwards = target.cpl != cpu.cpl;
    let stack = match outwards || from_long {
        true => outer_stack(cpu, bus, stack, size, &target)?,
        false => stack,
    };
    target.enter(cpu, bus)?;
    stack.commit(cpu);
    set_flags(cpu, flags, writable);
    if outwards {
        segment::drop_privileged_data(cpu);
    }
    Ok(())
}

/// Where IRET or a far RET goes, its code segment checked.
pub(crate) fn return_target(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    rip: u64,
) -> Result<Target, Exception> {
    if is_null(selector) {
        return Err(GP0);
    }
    let refused = Exception::gp(code(selector));
    let found = segment::find(cpu, bus, selector)?.ok_or(refused)?;
    let d = found.descriptor;
    let cpl = rpl(selector);
    let privileged = if d.is_conforming() {
        d.dpl() <= cpl
    } else {
        d.dpl() == cpl
    };
    if !d.is_code() || cpl < cpu.cpl || !privileged {
        return Err(refused);
    }
    Target::checked(cpu, selector, found, cpl, rip)
}

/// Pops SS:RSP and checks them for the code that is returned to.
pub(crate) fn outer_stack(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    mut stack: Stack,
    size: u64,
    target: &Target,
) -> Result<Stack, Exception> {
    let rsp = stack.pop(cpu, bus, size)?;
    let selector = stack.pop(cpu, bus, size)? as u16;
    let ss = if is_null(selector) {
        let allowed = target.long && target.cpl != 3 && rpl(selector) == target.cpl;
        if !allowed {
            return Err(GP0);
        }
        Segment::null(selector, target.cpl)
    } else {
        segment::resolve_stack(cpu, bus, selector, target.cpl, Exception::gp)?
    };
    Ok(Stack::new(cpu, ss, rsp, target.cpl, target.long))
}

fn to_v86_mode(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    mut stack: Stack,
    rip: u64,
    cs: u16,
    flags: u64,
) -> Result<(), Exception> {
    let rsp = stack.pop(cpu, bus, 4)?;
    let mut selectors = [0u16; 6];
    selectors[Seg::Cs as usize] = cs;
    for seg in [Seg::Ss, Seg::Es, Seg::Ds, Seg::Fs, Seg::Gs] {
        selectors[seg as usize] = stack.pop(cpu, bus, 4)? as u16;
    }
    if rip > V86_LIMIT {
        return Err(GP0);
    }
    for (s, selector) in cpu.seg.iter_mut().zip(selectors) {
        *s = Segment::v86(selector);
    }
    cpu.gpr[Gpr::Rsp as usize] = rsp;
    cpu.rip = rip;
    cpu.cpl = 3;
    cpu.rflags = Rflags::from_bits_truncate(flags) | Rflags::ONE;
    Ok(())
}
