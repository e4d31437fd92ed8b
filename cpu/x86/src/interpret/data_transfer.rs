//! Moves between general registers and memory, extensions, exchanges, conditional moves.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::condition;
use super::operand::{
    self, effective_address, linear, load, modify, modify_linear, operand_size, read_operand,
    write_operand,
};
use super::register::{read_gpr, read_register, sign_extend, write_gpr, write_register};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, Gpr, Rflags};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Mov if !names_system_register(i) => mov,
        Mnemonic::Movzx | Mnemonic::Movnti => mov,
        Mnemonic::Movsxd if i.code() == Code::Movsxd_r16_rm16 => movsxd_to_word,
        Mnemonic::Movsx | Mnemonic::Movsxd => movsx,
        Mnemonic::Lea => lea,
        Mnemonic::Xchg => xchg,
        Mnemonic::Bswap => bswap,
        Mnemonic::Movbe => movbe,
        Mnemonic::Xlatb => xlat,
        Mnemonic::Cbw => cbw,
        Mnemonic::Cwde => cwde,
        Mnemonic::Cdqe => cdqe,
        Mnemonic::Cwd => cwd,
        Mnemonic::Cdq => cdq,
        Mnemonic::Cqo => cqo,
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Salc => salc,
        _ => return conditional(i),
    })
}

fn conditional(i: &Instruction) -> Option<Handler> {
    use Mnemonic::*;
    Some(match i.mnemonic() {
        Seto | Setno | Setb | Setae | Sete | Setne | Setbe | Seta | Sets | Setns | Setp | Setnp
        | Setl | Setge | Setle | Setg => setcc,
        Cmovo | Cmovno | Cmovb | Cmovae | Cmove | Cmovne | Cmovbe | Cmova | Cmovs | Cmovns
        | Cmovp | Cmovnp | Cmovl | Cmovge | Cmovle | Cmovg => cmovcc,
        _ => return None,
    })
}

/// True for moves to and from segment, control, debug and test registers.
fn names_system_register(i: &Instruction) -> bool {
    let system = |r: Register| r != Register::None && super::register::gpr_index(r).is_none();
    (i.op0_kind() == OpKind::Register && system(i.op0_register()))
        || (i.op1_kind() == OpKind::Register && system(i.op1_register()))
}

fn mov(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let v = read_operand(cpu, bus, i, 1)?;
    write_operand(cpu, bus, i, 0, v)?;
    Ok(Flow::Next)
}

/// MOVSXD to 16 bits: some processors load 32, of which they drop the upper half.
fn movsxd_to_word(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    if i.op1_kind() != OpKind::Memory {
        return movsx(cpu, bus, i);
    }
    let size = cpu.cpuid.traits().movsxd_to_word_loads;
    let at = linear(cpu, i, size, false)?;
    let v = load(cpu, bus, at, size)?;
    write_register(cpu, i.op0_register(), v);
    Ok(Flow::Next)
}

fn movsx(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let v = read_operand(cpu, bus, i, 1)?;
    write_register(cpu, i.op0_register(), sign_extend(v, operand_size(i, 1)));
    Ok(Flow::Next)
}

fn lea(cpu: &mut Cpu, _: &mut dyn Bus, i: &Instruction) -> Step {
    let v = effective_address(cpu, i);
    write_register(cpu, i.op0_register(), v);
    Ok(Flow::Next)
}

/// Always atomic on memory, with a `lock` prefix or without.
fn xchg(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let (place, register) = if i.op0_kind() == OpKind::Memory {
        (0, 1)
    } else {
        (1, 0)
    };
    let new = read_register(cpu, i.op_register(register));
    let old = if i.op_kind(place) == OpKind::Memory {
        let size = operand_size(i, place);
        let at = operand::linear(cpu, i, size, true)?;
        modify_linear(cpu, bus, at, size, true, |old| (new, old))?
    } else {
        modify(cpu, bus, i, place, |old| (new, old))?
    };
    write_register(cpu, i.op_register(register), old);
    Ok(Flow::Next)
}

fn byte_swap(v: u64, size: usize) -> u64 {
    v.swap_bytes() >> (64 - 8 * size)
}

fn bswap(cpu: &mut Cpu, _: &mut dyn Bus, i: &Instruction) -> Step {
    let r = i.op0_register();
    let swapped = match operand_size(i, 0) {
        // Undefined; processors clear the register.
        2 => 0,
        size => byte_swap(read_register(cpu, r), size),
    };
    write_register(cpu, r, swapped);
    Ok(Flow::Next)
}

fn movbe(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let v = read_operand(cpu, bus, i, 1)?;
    write_operand(cpu, bus, i, 0, byte_swap(v, operand_size(i, 0)))?;
    Ok(Flow::Next)
}

fn xlat(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let v = read_operand(cpu, bus, i, 0)?;
    write_register(cpu, Register::AL, v);
    Ok(Flow::Next)
}

const RAX: usize = Gpr::Rax as usize;
const RDX: usize = Gpr::Rdx as usize;

/// Sign extends the lower half of rAX into all of it.
fn widen(cpu: &mut Cpu, to: usize) -> Step {
    let v = sign_extend(read_gpr(cpu, RAX, to / 2), to / 2);
    write_gpr(cpu, RAX, to, v);
    Ok(Flow::Next)
}

fn cbw(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    widen(cpu, 2)
}

fn cwde(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    widen(cpu, 4)
}

fn cdqe(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    widen(cpu, 8)
}

/// Fills rDX with the sign of rAX.
fn spread_sign(cpu: &mut Cpu, size: usize) -> Step {
    let sign = sign_extend(read_gpr(cpu, RAX, size), size) as i64 >> 63;
    write_gpr(cpu, RDX, size, sign as u64);
    Ok(Flow::Next)
}

fn cwd(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    spread_sign(cpu, 2)
}

fn cdq(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    spread_sign(cpu, 4)
}

fn cqo(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    spread_sign(cpu, 8)
}

/// SF, ZF, AF, PF and CF.
const AH_FLAGS: u64 = 0xd5;

fn lahf(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    let v = cpu.rflags.bits() & AH_FLAGS | Rflags::ONE.bits();
    write_register(cpu, Register::AH, v);
    Ok(Flow::Next)
}

fn sahf(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    let v = read_register(cpu, Register::AH);
    super::flags::set_some(cpu, AH_FLAGS, v);
    Ok(Flow::Next)
}

fn salc(cpu: &mut Cpu, _: &mut dyn Bus, _: &Instruction) -> Step {
    let v = super::flags::carry(cpu).wrapping_neg();
    write_register(cpu, Register::AL, v);
    Ok(Flow::Next)
}

fn setcc(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let v = u64::from(condition::holds(cpu, i));
    write_operand(cpu, bus, i, 0, v)?;
    Ok(Flow::Next)
}

/// Reads its source, and clears the upper half of a 32-bit destination, whether the condition holds or not.
fn cmovcc(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let v = read_operand(cpu, bus, i, 1)?;
    let r = i.op0_register();
    let v = if condition::holds(cpu, i) {
        v
    } else {
        read_register(cpu, r)
    };
    write_register(cpu, r, v);
    Ok(Flow::Next)
}
