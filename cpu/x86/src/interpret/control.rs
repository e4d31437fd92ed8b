//! Near control transfer: jumps, calls, returns, loops.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::condition;
use super::operand::{operand_size, read_operand};
use super::register::{mask, read_gpr, write_gpr};
use super::stack::{peek, push, release};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, CpuMode, Exception, Gpr, Rflags, Seg};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Jmp if is_near(i) => jmp,
        Mnemonic::Call if is_near(i) => call,
        Mnemonic::Ret => ret,
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => looped,
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => jrcxz,
        Mnemonic::Bound => bound,
        _ if i.code().is_jcc_short_or_near() => jcc,
        _ => return None,
    })
}

fn is_near(i: &Instruction) -> bool {
    let c = i.code();
    c.is_jmp_short_or_near()
        || c.is_call_near()
        || c.is_jmp_near_indirect()
        || c.is_call_near_indirect()
}

/// Sets RIP; #GP(0) where the target is outside of the code segment or not canonical.
pub(crate) fn jump(cpu: &mut Cpu, target: u64) -> Step {
    check_target(cpu, target)?;
    cpu.rip = target;
    Ok(Flow::Done)
}

fn check_target(cpu: &Cpu, target: u64) -> Result<(), Exception> {
    let good = if cpu.mode() == CpuMode::Bits64 {
        cpu.canonical(target)
    } else {
        target <= cpu.seg[Seg::Cs as usize].limit.into()
    };
    if good { Ok(()) } else { Err(Exception::gp(0)) }
}

/// Bytes of the instruction pointer that the branch writes: its operand size.
fn branch_size(i: &Instruction) -> usize {
    match i.op0_kind() {
        OpKind::NearBranch16 => 2,
        OpKind::NearBranch32 => 4,
        OpKind::NearBranch64 => 8,
        _ => operand_size(i, 0),
    }
}

fn target(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<u64, Exception> {
    match i.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
            Ok(i.near_branch_target())
        }
        _ => read_operand(cpu, bus, i, 0),
    }
}

fn jmp(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let to = target(cpu, bus, i)?;
    jump(cpu, to)
}

fn jcc(cpu: &mut Cpu, _: &mut dyn Bus, i: &Instruction) -> Step {
    if !condition::holds(cpu, i) {
        return Ok(Flow::Next);
    }
    jump(cpu, i.near_branch_target())
}

fn call(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let to = target(cpu, bus, i)?;
    check_target(cpu, to)?;
    let size = branch_size(i);
    push(cpu, bus, size, i.next_ip() & mask(size))?;
    cpu.rip = to;
    Ok(Flow::Done)
}

fn ret(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = match i.code() {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    };
    let to = peek(cpu, bus, size, 0)?;
    check_target(cpu, to)?;
    let parameters = if i.op_count() == 1 {
        i.immediate16()
    } else {
        0
    };
    release(cpu, size as u64 + u64::from(parameters));
    cpu.rip = to;
    Ok(Flow::Done)
}

/// Bytes of the count register.
fn counter_size(i: &Instruction) -> usize {
    use Code::*;
    match i.code() {
        Loop_rel8_16_CX | Loop_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX
        | Loopne_rel8_16_CX | Loopne_rel8_32_CX | Jcxz_rel8_16 | Jcxz_rel8_32 => 2,
        Loop_rel8_16_RCX | Loop_rel8_64_RCX | Loope_rel8_16_RCX | Loope_rel8_64_RCX
        | Loopne_rel8_16_RCX | Loopne_rel8_64_RCX | Jrcxz_rel8_16 | Jrcxz_rel8_64 => 8,
        _ => 4,
    }
}

const RCX: usize = Gpr::Rcx as usize;

fn looped(cpu: &mut Cpu, _: &mut dyn Bus, i: &Instruction) -> Step {
    let size = counter_size(i);
    let count = read_gpr(cpu, RCX, size).wrapping_sub(1) & mask(size);
    let zero = cpu.rflags.contains(Rflags::ZF);
    let go = count != 0
        && match i.mnemonic() {
            Mnemonic::Loope => zero,
            Mnemonic::Loopne => !zero,
            _ => true,
        };
    if go {
        check_target(cpu, i.near_branch_target())?;
    }
    write_gpr(cpu, RCX, size, count);
    if go {
        jump(cpu, i.near_branch_target())
    } else {
        Ok(Flow::Next)
    }
}

fn jrcxz(cpu: &mut Cpu, _: &mut dyn Bus, i: &Instruction) -> Step {
    if read_gpr(cpu, RCX, counter_size(i)) != 0 {
        return Ok(Flow::Next);
    }
    jump(cpu, i.near_branch_target())
}

/// #BR where a signed index is outside of the pair of bounds in memory.
fn bound(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    use super::operand::{linear, load};
    use super::register::{read_register, sign_extend};
    let size = operand_size(i, 0);
    let at = linear(cpu, i, 2 * size, false)?;
    let signed = |v| sign_extend(v, size) as i64;
    let lower = signed(load(cpu, bus, at, size)?);
    let upper = signed(load(
        cpu,
        bus,
        at.wrapping_add(size as u64) & 0xffff_ffff,
        size,
    )?);
    let index = signed(read_register(cpu, i.op0_register()));
    if index < lower || index > upper {
        return Err(Exception::BR);
    }
    Ok(Flow::Next)
}
