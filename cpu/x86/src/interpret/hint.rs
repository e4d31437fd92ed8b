//! Instructions without an architectural effect here: no-ops, hints, fences, cache control; and those that
//! only touch a flag.

use std::sync::atomic::{Ordering, fence};

use doppel_memory::AccessKind;
use iced_x86::{Code, Instruction, Mnemonic};

use super::operand::linear;
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, Exception, Rflags};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    Some(match i.mnemonic() {
        Pause => pause,
        Reservednop if is_prefetch_of_register(i) => no_prefetch,
        Nop | Endbr32 | Endbr64 | Reservednop | Prefetchw | Prefetcht0 | Prefetcht1
        | Prefetcht2 | Prefetchnta | Prefetchit0 | Prefetchit1 | Prefetchwt1 | Prefetch
        | Cldemote => nop,
        // No-ops while the shadow stack is off, which it always is.
        Rdsspd | Rdsspq => nop,
        Lfence | Sfence | Mfence | Serialize => fences,
        Clflush | Clflushopt | Clwb => flush_line,
        Clc => clc,
        Stc => stc,
        Cmc => cmc,
        Cld => cld,
        Std => std,
        Ud0 | Ud1 | Ud2 => undefined,
        _ => return None,
    })
}

fn nop(_: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    Ok(Flow::Next)
}

/// PREFETCHW and its kin, with a register where memory is to be named.
fn is_prefetch_of_register(i: &Instruction) -> bool {
    use Code::{Reservednop_rm16_r16_0F0D, Reservednop_rm32_r32_0F0D, Reservednop_rm64_r64_0F0D};
    matches!(
        i.code(),
        Reservednop_rm16_r16_0F0D | Reservednop_rm32_r32_0F0D | Reservednop_rm64_r64_0F0D
    )
}

/// A no-op of some processors.
fn no_prefetch(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    match cpu.cpuid.traits().prefetch_of_register {
        true => Ok(Flow::Next),
        false => Err(Exception::UD),
    }
}

/// PAUSEs that a CPU may execute before the machine is told: some microseconds of a spin loop.
const PAUSES: i32 = 50;

/// A CPU that spins may wait for one that has no processor of the host: every so often it offers its own.
fn pause(cpu: &mut Cpu, bus: &mut dyn Bus, _: &Instruction) -> Step {
    cpu.pauses_left -= 1;
    if cpu.pauses_left < 0 && cpu.peer.is_shared() {
        cpu.pauses_left = PAUSES;
        cpu.counters.spin_yields += 1;
        cpu.outside(|| bus.spinning());
    }
    Ok(Flow::Next)
}

/// #UD
pub(super) fn undefined(_: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    Err(Exception::UD)
}

fn fences(_: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    fence(Ordering::SeqCst);
    Ok(Flow::Next)
}

/// Guest memory is coherent: only the faults of the access remain.
fn flush_line(cpu: &mut Cpu, _: &mut dyn Bus, i: &Instruction) -> Step {
    let at = linear(cpu, i, 1, false)?;
    let privilege = cpu.privilege();
    cpu.translate(at, AccessKind::Read, privilege)?;
    Ok(Flow::Next)
}

fn clc(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    cpu.rflags.remove(Rflags::CF);
    Ok(Flow::Next)
}

fn stc(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    cpu.rflags.insert(Rflags::CF);
    Ok(Flow::Next)
}

fn cmc(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    cpu.rflags.toggle(Rflags::CF);
    Ok(Flow::Next)
}

fn cld(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    cpu.rflags.remove(Rflags::DF);
    Ok(Flow::Next)
}

fn std(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    cpu.rflags.insert(Rflags::DF);
    Ok(Flow::Next)
}
