//! Stack instructions: push, pop, pusha, popa, enter, leave. (Those of flags and segments are system instructions.)

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::operand::{operand_size, read_operand, write_operand};
use super::register::{mask, read_gpr, register_size, write_gpr, write_register};
use super::stack::{
    peek, pop, push, release, set_stack_pointer, stack_linear, stack_pointer, stack_size,
};
use super::{Flow, Handler, Step};
use crate::{Bus, Cpu, Exception, Gpr};

pub(super) fn lookup(i: &Instruction) -> Option<Handler> {
    let segment = i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register();
    Some(match i.mnemonic() {
        Mnemonic::Push if !segment => push_operand,
        Mnemonic::Pop if !segment => pop_operand,
        Mnemonic::Pusha => pusha16,
        Mnemonic::Pushad => pusha32,
        Mnemonic::Popa => popa16,
        Mnemonic::Popad => popa32,
        Mnemonic::Enter => enter,
        Mnemonic::Leave => leave,
        _ => return None,
    })
}

const RSP: usize = Gpr::Rsp as usize;
const RBP: usize = Gpr::Rbp as usize;

fn push_operand(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let v = read_operand(cpu, bus, i, 0)?;
    push(cpu, bus, operand_size(i, 0), v)?;
    Ok(Flow::Next)
}

fn pop_operand(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    if i.op0_kind() == OpKind::Register {
        let r = i.op0_register();
        let v = pop(cpu, bus, register_size(r))?;
        write_register(cpu, r, v);
        return Ok(Flow::Next);
    }
    // A destination addressed through the stack pointer sees it incremented.
    let before = cpu.gpr[RSP];
    let v = pop(cpu, bus, operand_size(i, 0))?;
    write_operand(cpu, bus, i, 0, v).inspect_err(|_| cpu.gpr[RSP] = before)?;
    Ok(Flow::Next)
}

fn pusha(cpu: &mut Cpu, bus: &mut dyn Bus, size: usize) -> Step {
    let (top, privilege) = (stack_pointer(cpu), cpu.privilege());
    let item = |n: u64| top.wrapping_sub((n + 1) * size as u64);
    for n in 0..8 {
        let at = stack_linear(cpu, item(n), size, true)?;
        cpu.check_writable(at, size, privilege)?;
    }
    for n in 0..8 {
        let at = stack_linear(cpu, item(n), size, true)?;
        let v = read_gpr(cpu, n as usize, size);
        super::operand::store(cpu, bus, at, size, v)?;
    }
    set_stack_pointer(cpu, item(7));
    Ok(Flow::Next)
}

fn pusha16(cpu: &mut Cpu, bus: &mut dyn Bus, _: &Instruction) -> Step {
    pusha(cpu, bus, 2)
}

fn pusha32(cpu: &mut Cpu, bus: &mut dyn Bus, _: &Instruction) -> Step {
    pusha(cpu, bus, 4)
}

fn popa(cpu: &mut Cpu, bus: &mut dyn Bus, size: usize) -> Step {
    let mut values = [0; 8];
    for (n, v) in values.iter_mut().rev().enumerate() {
        *v = peek(cpu, bus, size, n as u64 * size as u64)?;
    }
    for (n, v) in values.iter().enumerate().filter(|(n, _)| *n != RSP) {
        write_gpr(cpu, n, size, *v);
    }
    release(cpu, 8 * size as u64);
    Ok(Flow::Next)
}

fn popa16(cpu: &mut Cpu, bus: &mut dyn Bus, _: &Instruction) -> Step {
    popa(cpu, bus, 2)
}

fn popa32(cpu: &mut Cpu, bus: &mut dyn Bus, _: &Instruction) -> Step {
    popa(cpu, bus, 4)
}

fn enter(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = match i.code() {
        Code::Enterw_imm16_imm8 => 2,
        Code::Enterd_imm16_imm8 => 4,
        _ => 8,
    };
    let before = (cpu.gpr[RSP], cpu.gpr[RBP]);
    let level = i.immediate8_2nd() & 0x1f;
    enter_frame(cpu, bus, size, i.immediate16(), level)
        .inspect_err(|_| (cpu.gpr[RSP], cpu.gpr[RBP]) = before)?;
    Ok(Flow::Next)
}

fn enter_frame(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    size: usize,
    locals: u16,
    level: u8,
) -> Result<(), Exception> {
    let mut display = read_gpr(cpu, RBP, stack_size(cpu));
    push(cpu, bus, size, read_gpr(cpu, RBP, size))?;
    // All of ESP, though the stack may be one of SP.
    let frame = read_gpr(cpu, RSP, size);
    for _ in 1..level {
        display = display.wrapping_sub(size as u64) & mask(stack_size(cpu));
        let at = stack_linear(cpu, display, size, false)?;
        let v = super::operand::load(cpu, bus, at, size)?;
        push(cpu, bus, size, v)?;
    }
    if level > 0 {
        push(cpu, bus, size, frame)?;
    }
    let top = stack_pointer(cpu).wrapping_sub(locals.into());
    let privilege = cpu.privilege();
    let at = stack_linear(cpu, top, size, true)?;
    cpu.check_writable(at, size, privilege)?;
    write_gpr(cpu, RBP, size, frame);
    set_stack_pointer(cpu, top);
    Ok(())
}

fn leave(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    let size = match i.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let frame = read_gpr(cpu, RBP, stack_size(cpu));
    let at = stack_linear(cpu, frame, size, false)?;
    let v = super::operand::load(cpu, bus, at, size)?;
    set_stack_pointer(cpu, frame.wrapping_add(size as u64));
    write_gpr(cpu, RBP, size, v);
    Ok(Flow::Next)
}
