//! Port I/O: IN, OUT, INS and OUTS, one item at a time.

use doppel_memory::{AccessKind, PAGE_MASK};
use iced_x86::{Code, Instruction, Mnemonic, Register};

use crate::interpret::Flow;
use crate::interpret::operand;
use crate::{Bus, Cpu, Exception, Gpr, Rflags, Seg, task};

/// Executes an instruction of the family.
pub(crate) fn execute(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
) -> Result<Flow, Exception> {
    match i.mnemonic() {
        Mnemonic::In => input(cpu, bus, i).map(|()| Flow::Next),
        Mnemonic::Out => output(cpu, bus, i).map(|()| Flow::Next),
        _ => string(cpu, bus, i),
    }
}

fn port_of(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction, op: u32) -> Result<u16, Exception> {
    Ok(operand::read_operand(cpu, bus, i, op)? as u16)
}

fn input(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    let port = port_of(cpu, bus, i, 1)?;
    let size = operand::operand_size(i, 0) as u8;
    task::check_io(cpu, bus, port, size)?;
    cpu.counters.port_accesses += 1;
    let v = cpu.outside(|| bus.port_read(port, size));
    cpu.note_port_access(port, size);
    operand::write_operand(cpu, bus, i, 0, v.into())
}

fn output(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    let port = port_of(cpu, bus, i, 0)?;
    let size = operand::operand_size(i, 1) as u8;
    task::check_io(cpu, bus, port, size)?;
    let v = operand::read_operand(cpu, bus, i, 1)?;
    cpu.counters.port_accesses += 1;
    cpu.outside(|| bus.port_write(port, size, v as u32));
    cpu.note_port_access(port, size);
    Ok(())
}

/// What the string forms differ in.
struct StringForm {
    /// Bytes per item.
    size: u8,
    /// Bytes of the addresses: 2, 4 or 8.
    address_size: usize,
    segment: Seg,
    /// INS.
    input: bool,
}

fn string_form(i: &Instruction) -> StringForm {
    let (size, input) = match i.code() {
        Code::Insb_m8_DX => (1, true),
        Code::Insw_m16_DX => (2, true),
        Code::Insd_m32_DX => (4, true),
        Code::Outsb_DX_m8 => (1, false),
        Code::Outsw_DX_m16 => (2, false),
        _ => (4, false),
    };
    use iced_x86::OpKind::{MemoryESDI, MemoryESEDI, MemorySegESI, MemorySegSI};
    let address_size = match i.op_kind(u32::from(!input)) {
        MemoryESDI | MemorySegSI => 2,
        MemoryESEDI | MemorySegESI => 4,
        _ => 8,
    };
    let segment = if input {
        Seg::Es
    } else {
        operand::segment_of(i.memory_segment())
    };
    StringForm {
        size,
        address_size,
        segment,
        input,
    }
}

fn string(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<Flow, Exception> {
    let form = string_form(i);
    let repeated = i.has_rep_prefix() || i.has_repne_prefix();
    let mask = u64::MAX >> (64 - 8 * form.address_size as u32);
    let port = cpu.reg(Gpr::Rdx) as u16;
    task::check_io(cpu, bus, port, form.size)?;
    if repeated && cpu.reg(Gpr::Rcx) & mask == 0 {
        return Ok(Flow::Next);
    }
    transfer_item(cpu, bus, port, &form, mask)?;
    if !repeated {
        return Ok(Flow::Next);
    }
    let left = (cpu.reg(Gpr::Rcx) & mask).wrapping_sub(1) & mask;
    set_address_register(cpu, Gpr::Rcx, left, form.address_size);
    Ok(if left == 0 { Flow::Next } else { Flow::Repeat })
}

fn transfer_item(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    port: u16,
    form: &StringForm,
    mask: u64,
) -> Result<(), Exception> {
    let pointer = if form.input { Gpr::Rdi } else { Gpr::Rsi };
    let offset = cpu.reg(pointer) & mask;
    let size = usize::from(form.size);
    let segment = operand::implied_segment(cpu, form.segment);
    let at = operand::linear_in(cpu, segment, offset, size, form.input)?;
    cpu.counters.port_accesses += 1;
    if form.input {
        check_writable(cpu, at, size as u64)?;
        let v = cpu.outside(|| bus.port_read(port, form.size));
        operand::store(cpu, bus, at, size, v.into())?;
    } else {
        let v = operand::load(cpu, bus, at, size)?;
        cpu.outside(|| bus.port_write(port, form.size, v as u32));
    }
    cpu.note_port_access(port, form.size);
    let step = if cpu.rflags.contains(Rflags::DF) {
        (size as u64).wrapping_neg()
    } else {
        size as u64
    };
    set_address_register(cpu, pointer, offset.wrapping_add(step), form.address_size);
    Ok(())
}

/// Reading a port may have an effect, so the destination must be known to take it.
fn check_writable(cpu: &mut Cpu, linear: u64, size: u64) -> Result<(), Exception> {
    let privilege = cpu.privilege();
    cpu.translate(linear, AccessKind::Write, privilege)?;
    let last = linear.wrapping_add(size - 1);
    if last & !PAGE_MASK != linear & !PAGE_MASK {
        cpu.translate(last, AccessKind::Write, privilege)?;
    }
    Ok(())
}

/// A write to a count or index register of this address size: a 32-bit one clears the upper half.
fn set_address_register(cpu: &mut Cpu, r: Gpr, v: u64, size: usize) {
    let register = match size {
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    crate::interpret::register::write_register(cpu, register + r as u32, v);
}
