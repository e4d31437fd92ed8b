//! System instructions: every one that is privileged, that changes mode or control state, or that must not be left to the
//! bare processor because it would tell of the host. [`execute`] is the list of them.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::exception::{self, Event, Source};
use crate::interpret::Flow;
use crate::interpret::{operand, stack};
use crate::transfer::FarPointer;
use crate::{
    Bus, Cpu, CpuMode, Cr0, Cr4, Exception, Gpr, Rflags, Seg, control, flags, iret, monitor_wait,
    msr, pmu, port, rights, segment, syscall, table, transfer,
};

const GP0: Exception = Exception::gp(0);

type Step = Result<Flow, Exception>;

/// Executes a system instruction; `None` for one that is none of them.
///
/// `cpu.rip` is the instruction's address. On `Err` nothing has changed.
pub(crate) fn execute(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Option<Step> {
    use Mnemonic as M;
    let next = |r: Result<(), Exception>| r.map(|()| Flow::Next);
    let done = |r: Result<(), Exception>| r.map(|()| Flow::Done);
    Some(match i.mnemonic() {
        M::Mov => next(mov(cpu, bus, i)?),
        M::Push => next(push_segment(cpu, bus, i)?),
        M::Pop => next(pop_segment(cpu, bus, i)?),
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => next(load_far_pointer(cpu, bus, i)),

        M::Jmp | M::Call => done(far_transfer(cpu, bus, i)?),
        M::Retf => done(far_return(cpu, bus, i)),
        M::Iret => done(iret::execute(cpu, bus, 2, next_rip(cpu, i))),
        M::Iretd => done(iret::execute(cpu, bus, 4, next_rip(cpu, i))),
        M::Iretq => done(iret::execute(cpu, bus, 8, next_rip(cpu, i))),
        M::Int | M::Int1 | M::Int3 | M::Into => software_interrupt(cpu, bus, i),

        M::Syscall => done(syscall::syscall(cpu, next_rip(cpu, i))),
        M::Sysret => done(syscall::sysret(cpu, false)),
        M::Sysretq => done(syscall::sysret(cpu, true)),
        M::Sysenter => done(syscall::sysenter(cpu)),
        M::Sysexit => done(syscall::sysexit(cpu, false)),
        M::Sysexitq => done(syscall::sysexit(cpu, true)),

        M::Pushf | M::Pushfd | M::Pushfq => next(flags::pushf(cpu, bus, i)),
        M::Popf | M::Popfd | M::Popfq => next(flags::popf(cpu, bus, i)),
        M::Cli => next(flags::cli(cpu)),
        M::Sti => next(flags::sti(cpu)),
        M::Clac | M::Stac => next(set_ac(cpu, i.mnemonic() == M::Stac)),

        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => {
            port::execute(cpu, bus, i)
        }
        M::Hlt => privileged(cpu).map(|()| {
            cpu.counters.halts += 1;
            Flow::Halt
        }),
        M::Monitor => next(monitor_wait::monitor(cpu, i)),
        M::Mwait => monitor_wait::mwait(cpu),

        M::Clts => next(clts(cpu, bus)),
        M::Lmsw => next(lmsw(cpu, bus, i)),
        M::Smsw => next(table::store_word(cpu, bus, i, cpu.cr0.bits())),
        M::Lgdt | M::Lidt => next(load_dtr(cpu, bus, i)),
        M::Sgdt => next(table::store_dtr(cpu, bus, i, cpu.gdtr)),
        M::Sidt => next(table::store_dtr(cpu, bus, i, cpu.idtr)),
        M::Lldt => next(table::load_ldtr(cpu, bus, i)),
        M::Ltr => next(table::load_tr(cpu, bus, i)),
        M::Sldt => next(store_selector(cpu, bus, i, cpu.ldtr.selector)),
        M::Str => next(store_selector(cpu, bus, i, cpu.tr.selector)),
        M::Lar => next(rights::lar(cpu, bus, i)),
        M::Lsl => next(rights::lsl(cpu, bus, i)),
        M::Verr => next(rights::verify(cpu, bus, i, false)),
        M::Verw => next(rights::verify(cpu, bus, i, true)),
        M::Arpl => next(rights::arpl(cpu, bus, i)),

        M::Rdmsr => next(rdmsr(cpu, bus)),
        M::Wrmsr => next(wrmsr(cpu, bus)),
        M::Cpuid => next(cpuid(cpu)),
        M::Rdtsc => next(rdtsc(cpu)),
        M::Rdtscp => next(rdtsc(cpu).map(|()| cpu.gpr[Gpr::Rcx as usize] = cpu.msr.tsc_aux)),
        M::Rdpid => {
            let aux = cpu.msr.tsc_aux;
            next(operand::write_operand(cpu, bus, i, 0, aux))
        }
        M::Rdpmc => next(pmu::rdpmc(cpu)),
        M::Xgetbv => next(xgetbv(cpu)),
        M::Xsetbv => next(xsetbv(cpu)),
        M::Rdpkru => next(read_pkru(cpu)),
        M::Wrpkru => next(write_pkru(cpu)),
        M::Swapgs => next(swapgs(cpu)),
        M::Rdfsbase | M::Rdgsbase => next(read_base(cpu, bus, i)),
        M::Wrfsbase | M::Wrgsbase => next(write_base(cpu, bus, i)),

        M::Invlpg => next(privileged(cpu).map(|()| {
            let at = invlpg_address(cpu, i);
            cpu.flush_tlb_page(at);
        })),
        M::Invpcid => next(invpcid(cpu, bus, i)),
        // Guest memory is coherent with everything that looks at it.
        M::Invd | M::Wbinvd | M::Wbnoinvd => next(privileged(cpu)),
        M::Vmcall | M::Vmmcall => {
            cpu.hypercall(bus);
            Ok(Flow::Next)
        }
        _ => return None,
    })
}

/// The address of the instruction that follows, as an offset in CS.
pub(crate) fn next_rip(cpu: &Cpu, i: &Instruction) -> u64 {
    let next = cpu.rip.wrapping_add(i.len() as u64);
    if cpu.mode() == CpuMode::Bits64 {
        next
    } else {
        next & 0xffff_ffff
    }
}

fn privileged(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cpl == 0 { Ok(()) } else { Err(GP0) }
}

/// MOV to or from a control, debug or segment register; `None` for any other.
fn mov(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Option<Result<(), Exception>> {
    let first = register_operand(i, 0);
    let second = register_operand(i, 1);
    if first.is_segment_register() {
        Some(mov_to_segment(cpu, bus, i, first))
    } else if second.is_segment_register() {
        Some(mov_from_segment(cpu, bus, i, second))
    } else if first.is_cr() || first.is_dr() {
        Some(mov_to_system(cpu, bus, first, second))
    } else if second.is_cr() || second.is_dr() {
        Some(mov_from_system(cpu, bus, i, second))
    } else {
        None
    }
}

fn register_operand(i: &Instruction, op: u32) -> Register {
    if i.op_count() > op && i.op_kind(op) == OpKind::Register {
        i.op_register(op)
    } else {
        Register::None
    }
}

fn mov_to_system(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    to: Register,
    from: Register,
) -> Result<(), Exception> {
    let v = crate::interpret::register::read_register(cpu, from);
    if to.is_dr() {
        return control::write_debug(cpu, to.number(), v);
    }
    check_cr(to.number())?;
    privileged(cpu)?;
    control::write(cpu, bus, to.number(), v)
}

fn mov_from_system(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    from: Register,
) -> Result<(), Exception> {
    let v = if from.is_dr() {
        control::read_debug(cpu, from.number())?
    } else {
        check_cr(from.number())?;
        privileged(cpu)?;
        control::read(cpu, bus, from.number())?
    };
    operand::write_operand(cpu, bus, i, 0, v)
}

fn check_cr(n: usize) -> Result<(), Exception> {
    if matches!(n, 0 | 2 | 3 | 4 | 8) {
        Ok(())
    } else {
        Err(Exception::UD)
    }
}

fn load_segment(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    seg: Seg,
    selector: u16,
) -> Result<(), Exception> {
    segment::load(cpu, bus, seg, selector)?;
    if seg == Seg::Ss {
        cpu.mov_ss_shadow = true;
    }
    Ok(())
}

fn mov_to_segment(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    to: Register,
) -> Result<(), Exception> {
    if to == Register::CS {
        return Err(Exception::UD);
    }
    let selector = table::selector_operand(cpu, bus, i, 1)?;
    load_segment(cpu, bus, operand::segment_of(to), selector)
}

fn mov_from_segment(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    from: Register,
) -> Result<(), Exception> {
    let selector = cpu.segment(operand::segment_of(from)).selector;
    if i.op0_kind() == OpKind::Register {
        return operand::write_operand(cpu, bus, i, 0, selector.into());
    }
    let at = operand::linear(cpu, i, 2, true)?;
    operand::store(cpu, bus, at, 2, selector.into())
}

/// Bytes that PUSH and POP of a segment register move.
fn segment_operand_size(i: &Instruction) -> usize {
    use Code::{
        Popq_FS, Popq_GS, Popw_DS, Popw_ES, Popw_FS, Popw_GS, Popw_SS, Pushq_FS, Pushq_GS,
        Pushw_CS, Pushw_DS, Pushw_ES, Pushw_FS, Pushw_GS, Pushw_SS,
    };
    match i.code() {
        Popw_DS | Popw_ES | Popw_FS | Popw_GS | Popw_SS | Pushw_CS | Pushw_DS | Pushw_ES
        | Pushw_FS | Pushw_GS | Pushw_SS => 2,
        Popq_FS | Popq_GS | Pushq_FS | Pushq_GS => 8,
        _ => 4,
    }
}

fn push_segment(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
) -> Option<Result<(), Exception>> {
    let r = register_operand(i, 0);
    if !r.is_segment_register() {
        return None;
    }
    let size = segment_operand_size(i);
    let selector = cpu.segment(operand::segment_of(r)).selector;
    if size != 4 {
        return Some(stack::push(cpu, bus, size, selector.into()));
    }
    // With a 32-bit operand processors write the low 16 bits alone.
    let sp = stack::stack_pointer(cpu).wrapping_sub(4);
    let push = stack::stack_linear(cpu, sp, 4, true)
        .and_then(|at| operand::store(cpu, bus, at, 2, selector.into()));
    Some(push.map(|()| stack::set_stack_pointer(cpu, sp)))
}

fn pop_segment(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Option<Result<(), Exception>> {
    let r = register_operand(i, 0);
    if !r.is_segment_register() {
        return None;
    }
    let size = segment_operand_size(i);
    let seg = operand::segment_of(r);
    // The stack pointer moves by the old SS, so it moves first and comes back on a fault.
    let old = cpu.reg(Gpr::Rsp);
    let popped = stack::pop(cpu, bus, size)
        .and_then(|selector| load_segment(cpu, bus, seg, selector as u16));
    Some(popped.inspect_err(|_| cpu.gpr[Gpr::Rsp as usize] = old))
}

/// The offset and selector of a far pointer in memory: `size` is that of the offset.
fn far_pointer_operand(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    size: usize,
) -> Result<FarPointer, Exception> {
    // Each part is aligned by itself: the offset to its size, as measured.
    let at = operand::linear(cpu, i, size, false)?;
    operand::linear_of_part(cpu, i, size as u64, 2, false)?;
    let mut image = [0; 10];
    let privilege = cpu.privilege();
    cpu.load_bytes(bus, at, privilege, &mut image[..size + 2])?;
    let mut offset = [0; 8];
    offset[..size].copy_from_slice(&image[..size]);
    Ok(FarPointer {
        selector: u16::from_le_bytes([image[size], image[size + 1]]),
        offset: u64::from_le_bytes(offset),
        size: size as u64,
    })
}

/// LDS, LES, LFS, LGS, LSS.
fn load_far_pointer(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    let seg = match i.mnemonic() {
        Mnemonic::Lds => Seg::Ds,
        Mnemonic::Les => Seg::Es,
        Mnemonic::Lfs => Seg::Fs,
        Mnemonic::Lgs => Seg::Gs,
        _ => Seg::Ss,
    };
    let size = operand::operand_size(i, 0);
    let p = far_pointer_operand(cpu, bus, i, size)?;
    // Unlike MOV SS, LSS does not hold interrupts back.
    segment::load(cpu, bus, seg, p.selector)?;
    operand::write_operand(cpu, bus, i, 0, p.offset)
}

/// Far JMP and CALL; `None` for near ones.
fn far_transfer(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
) -> Option<Result<(), Exception>> {
    let pointer = match i.code() {
        Code::Jmp_ptr1616 | Code::Call_ptr1616 => Ok(FarPointer {
            selector: i.far_branch_selector(),
            offset: i.far_branch16().into(),
            size: 2,
        }),
        Code::Jmp_ptr1632 | Code::Call_ptr1632 => Ok(FarPointer {
            selector: i.far_branch_selector(),
            offset: i.far_branch32().into(),
            size: 4,
        }),
        Code::Jmp_m1616 | Code::Call_m1616 => far_pointer_operand(cpu, bus, i, 2),
        Code::Jmp_m1632 | Code::Call_m1632 => far_pointer_operand(cpu, bus, i, 4),
        Code::Jmp_m1664 | Code::Call_m1664 => far_pointer_operand(cpu, bus, i, 8),
        _ => return None,
    };
    let next = next_rip(cpu, i);
    Some(pointer.and_then(|p| {
        if i.mnemonic() == Mnemonic::Call {
            transfer::call(cpu, bus, p, next)
        } else {
            transfer::jump(cpu, bus, p, next)
        }
    }))
}

fn far_return(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    let size = match i.code() {
        Code::Retfw | Code::Retfw_imm16 => 2,
        Code::Retfd | Code::Retfd_imm16 => 4,
        _ => 8,
    };
    let released = if i.op_count() > 0 { i.immediate16() } else { 0 };
    transfer::far_return(cpu, bus, size, released.into())
}

fn software_interrupt(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let (vector, source) = match i.mnemonic() {
        Mnemonic::Int1 => (1, Source::PrivilegedSoftware),
        Mnemonic::Int3 => (3, Source::SoftwareException),
        Mnemonic::Into if !cpu.rflags.contains(Rflags::OF) => return Ok(Flow::Next),
        Mnemonic::Into => (4, Source::SoftwareException),
        _ => (i.immediate8(), Source::SoftwareInterrupt),
    };
    let event = Event::software(vector, source, next_rip(cpu, i));
    exception::deliver(cpu, bus, &event)?;
    if source == Source::PrivilegedSoftware {
        // The #DB that MOV SS has put off does not come after this one, which processors raise in its place.
        cpu.breakpoint_hits = 0;
    }
    if source != Source::SoftwareInterrupt
        && let Some(n) = cpu.counters.exceptions.get_mut(usize::from(vector))
    {
        *n += 1;
    }
    Ok(Flow::Done)
}

fn set_ac(cpu: &mut Cpu, on: bool) -> Result<(), Exception> {
    if cpu.cpl != 0 {
        return Err(Exception::UD);
    }
    cpu.rflags.set(Rflags::AC, on);
    Ok(())
}

fn clts(cpu: &mut Cpu, bus: &mut dyn Bus) -> Result<(), Exception> {
    privileged(cpu)?;
    let v = cpu.cr0 & !Cr0::TS;
    control::write_cr0(cpu, bus, v.bits())
}

fn lmsw(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    privileged(cpu)?;
    let v = table::selector_operand(cpu, bus, i, 0)?;
    control::load_machine_status_word(cpu, bus, v)
}

fn load_dtr(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    privileged(cpu)?;
    let dtr = table::load_dtr(cpu, bus, i)?;
    if i.mnemonic() == Mnemonic::Lgdt {
        cpu.gdtr = dtr;
    } else {
        cpu.idtr = dtr;
    }
    Ok(())
}

fn store_selector(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    selector: u16,
) -> Result<(), Exception> {
    table::check_protected(cpu)?;
    table::store_word(cpu, bus, i, selector.into())
}

/// EDX:EAX of the instructions that return 64 bits so.
fn set_edx_eax(cpu: &mut Cpu, v: u64) {
    cpu.gpr[Gpr::Rax as usize] = v & 0xffff_ffff;
    cpu.gpr[Gpr::Rdx as usize] = v >> 32;
}

fn edx_eax(cpu: &Cpu) -> u64 {
    (cpu.reg(Gpr::Rdx) << 32) | (cpu.reg(Gpr::Rax) & 0xffff_ffff)
}

fn ecx(cpu: &Cpu) -> u32 {
    cpu.reg(Gpr::Rcx) as u32
}

fn rdmsr(cpu: &mut Cpu, bus: &mut dyn Bus) -> Result<(), Exception> {
    privileged(cpu)?;
    let v = msr::read(cpu, bus, ecx(cpu))?;
    set_edx_eax(cpu, v);
    Ok(())
}

fn wrmsr(cpu: &mut Cpu, bus: &mut dyn Bus) -> Result<(), Exception> {
    privileged(cpu)?;
    msr::write(cpu, bus, ecx(cpu), edx_eax(cpu))
}

fn cpuid(cpu: &mut Cpu) -> Result<(), Exception> {
    const SIGNATURE: u32 = 1;
    cpu.asked_cpuid |= cpu.cpl == 3;
    let n = cpu.reg(Gpr::Rax) as u32;
    if n == SIGNATURE {
        msr::load_microcode_revision(cpu);
    }
    let leaf = cpu.cpuid(n, ecx(cpu));
    cpu.gpr[Gpr::Rax as usize] = leaf.eax.into();
    cpu.gpr[Gpr::Rbx as usize] = leaf.ebx.into();
    cpu.gpr[Gpr::Rcx as usize] = leaf.ecx.into();
    cpu.gpr[Gpr::Rdx as usize] = leaf.edx.into();
    Ok(())
}

fn rdtsc(cpu: &mut Cpu) -> Result<(), Exception> {
    let disabled = cpu.cr4.contains(Cr4::TSD) && cpu.cr0.contains(Cr0::PE);
    if disabled && cpu.cpl > 0 {
        return Err(GP0);
    }
    let now = cpu.tsc_now();
    set_edx_eax(cpu, now);
    Ok(())
}

fn check_xsave(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cr4.contains(Cr4::OSXSAVE) {
        Ok(())
    } else {
        Err(Exception::UD)
    }
}

fn xgetbv(cpu: &mut Cpu) -> Result<(), Exception> {
    check_xsave(cpu)?;
    let v = msr::read_xcr(cpu, ecx(cpu).into())?;
    set_edx_eax(cpu, v);
    Ok(())
}

fn xsetbv(cpu: &mut Cpu) -> Result<(), Exception> {
    check_xsave(cpu)?;
    privileged(cpu)?;
    msr::write_xcr(cpu, ecx(cpu).into(), edx_eax(cpu))
}

fn check_protection_keys(cpu: &Cpu, zero: u64) -> Result<(), Exception> {
    if !cpu.cr4.contains(Cr4::PKE) {
        return Err(Exception::UD);
    }
    if zero as u32 == 0 { Ok(()) } else { Err(GP0) }
}

fn read_pkru(cpu: &mut Cpu) -> Result<(), Exception> {
    check_protection_keys(cpu, cpu.reg(Gpr::Rcx))?;
    set_edx_eax(cpu, cpu.pkru.into());
    Ok(())
}

fn write_pkru(cpu: &mut Cpu) -> Result<(), Exception> {
    check_protection_keys(cpu, cpu.reg(Gpr::Rcx) | cpu.reg(Gpr::Rdx))?;
    cpu.set_pkru(cpu.reg(Gpr::Rax) as u32);
    Ok(())
}

fn swapgs(cpu: &mut Cpu) -> Result<(), Exception> {
    if cpu.mode() != CpuMode::Bits64 {
        return Err(Exception::UD);
    }
    privileged(cpu)?;
    msr::swap_gs(cpu);
    Ok(())
}

fn base_register(cpu: &Cpu, i: &Instruction) -> Result<Seg, Exception> {
    if cpu.mode() != CpuMode::Bits64 || !cpu.cr4.contains(Cr4::FSGSBASE) {
        return Err(Exception::UD);
    }
    Ok(match i.mnemonic() {
        Mnemonic::Rdfsbase | Mnemonic::Wrfsbase => Seg::Fs,
        _ => Seg::Gs,
    })
}

fn read_base(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    let seg = base_register(cpu, i)?;
    let base = cpu.segment(seg).base;
    operand::write_operand(cpu, bus, i, 0, base)
}

fn write_base(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    let seg = base_register(cpu, i)?;
    let base = operand::read_operand(cpu, bus, i, 0)?;
    if !cpu.canonical_in_register(base) {
        return Err(GP0);
    }
    cpu.seg[seg as usize].base = base;
    Ok(())
}

/// The linear address that INVLPG names; one that is not canonical is no error and names nothing.
fn invlpg_address(cpu: &Cpu, i: &Instruction) -> u64 {
    let offset = operand::effective_address(cpu, i);
    let seg = operand::segment_of(i.memory_segment());
    let based = cpu.mode() != CpuMode::Bits64 || matches!(seg, Seg::Fs | Seg::Gs);
    let base = if based { cpu.segment(seg).base } else { 0 };
    cpu.table_linear(base.wrapping_add(offset))
}

fn invpcid(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    if matches!(cpu.mode(), CpuMode::V86) {
        return Err(GP0);
    }
    privileged(cpu)?;
    let kind = operand::read_operand(cpu, bus, i, 0)?;
    let at = operand::linear(cpu, i, 16, false)?;
    let mut image = [0; 16];
    let privilege = cpu.privilege();
    cpu.load_bytes(bus, at, privilege, &mut image)?;
    let image = u128::from_le_bytes(image);
    control::invalidate_pcid(cpu, kind, [image as u64, (image >> 64) as u64])
}

#[cfg(test)]
#[path = "system_tests.rs"]
mod tests;
