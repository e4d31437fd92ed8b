//! The registers that locate descriptor tables and the current task: GDTR, IDTR, LDTR, TR, and their loads and stores.

use iced_x86::{Code, Instruction, OpKind};

use crate::interpret::operand;
use crate::segment::{self, code, is_null, system_type};
use crate::{Bus, Cpu, CpuMode, Cr4, Dtr, Exception, Segment};

const GP0: Exception = Exception::gp(0);

fn real_style(cpu: &Cpu) -> bool {
    matches!(cpu.mode(), CpuMode::Real | CpuMode::V86)
}

/// UMIP: user code may not read where the tables are.
pub(crate) fn check_umip(cpu: &Cpu) -> Result<(), Exception> {
    if cpu.cr4.contains(Cr4::UMIP) && cpu.cpl > 0 {
        Err(GP0)
    } else {
        Ok(())
    }
}

/// SGDT or SIDT: the limit, and a base of 8 bytes in 64-bit mode, 4 elsewhere.
pub(crate) fn store_dtr(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    dtr: Dtr,
) -> Result<(), Exception> {
    check_umip(cpu)?;
    let mut image = [0; 10];
    image[..2].copy_from_slice(&dtr.limit.to_le_bytes());
    image[2..].copy_from_slice(&dtr.base.to_le_bytes());
    let len = if cpu.mode() == CpuMode::Bits64 { 10 } else { 6 };
    let at = operand::linear(cpu, i, len, true)?;
    let privilege = cpu.privilege();
    cpu.store_bytes(bus, at, privilege, &image[..len])
}

/// The memory operand of LGDT or LIDT. The caller checked the CPL.
pub(crate) fn load_dtr(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
) -> Result<Dtr, Exception> {
    let long = cpu.mode() == CpuMode::Bits64;
    let len = if long { 10 } else { 6 };
    let mut image = [0; 10];
    let at = operand::linear(cpu, i, len, false)?;
    let privilege = cpu.privilege();
    cpu.load_bytes(bus, at, privilege, &mut image[..len])?;
    let limit = u16::from_le_bytes([image[0], image[1]]);
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&image[2..]);
    let mut base = u64::from_le_bytes(bytes);
    if matches!(i.code(), Code::Lgdt_m1632_16 | Code::Lidt_m1632_16) {
        base &= 0xff_ffff;
    }
    if long && !cpu.canonical_in_register(base) {
        return Err(GP0);
    }
    Ok(Dtr { base, limit })
}

/// SLDT, STR and SMSW: 16 bits to memory, the operand's size (zero extended) to a register.
pub(crate) fn store_word(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    v: u64,
) -> Result<(), Exception> {
    check_umip(cpu)?;
    if i.op_kind(0) == OpKind::Register {
        return operand::write_operand(cpu, bus, i, 0, v);
    }
    let at = operand::linear(cpu, i, 2, true)?;
    operand::store(cpu, bus, at, 2, v & 0xffff)
}

/// The selector operand (a register or 16 bits of memory) of LLDT, LTR, LAR, LSL, VERR, VERW, MOV to a segment register.
pub(crate) fn selector_operand(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    op: u32,
) -> Result<u16, Exception> {
    if i.op_kind(op) == OpKind::Register {
        return Ok(operand::read_operand(cpu, bus, i, op)? as u16);
    }
    let at = operand::linear(cpu, i, 2, false)?;
    Ok(operand::load(cpu, bus, at, 2)? as u16)
}

/// A 16-byte (in long mode) system descriptor of one of `kinds` out of the GDT, for LLDT and LTR.
fn system_descriptor(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
    kinds: &[u32],
) -> Result<segment::Found, Exception> {
    let refused = Exception::gp(code(selector));
    if selector & 4 != 0 {
        return Err(refused);
    }
    let found = segment::find(cpu, bus, selector)?.ok_or(refused)?;
    let d = found.descriptor;
    if !d.is_system() || !kinds.contains(&d.kind()) {
        return Err(refused);
    }
    if !d.present() {
        return Err(Exception::np(code(selector)));
    }
    let found = segment::find_high(cpu, bus, selector, found)?.ok_or(refused)?;
    if cpu.long_mode() && !cpu.canonical_in_register(found.descriptor.base()) {
        return Err(refused);
    }
    Ok(found)
}

/// LLDT.
pub(crate) fn load_ldtr(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
) -> Result<(), Exception> {
    check_loadable(cpu)?;
    let selector = selector_operand(cpu, bus, i, 0)?;
    if is_null(selector) {
        cpu.ldtr = Segment::null(selector, 0);
        return Ok(());
    }
    let found = system_descriptor(cpu, bus, selector, &[system_type::LDT])?;
    cpu.ldtr = found.descriptor.segment(selector);
    Ok(())
}

/// LTR: the TSS becomes busy.
pub(crate) fn load_tr(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    check_loadable(cpu)?;
    let selector = selector_operand(cpu, bus, i, 0)?;
    if is_null(selector) {
        return Err(GP0);
    }
    let kinds: &[u32] = if cpu.long_mode() {
        &[system_type::TSS]
    } else {
        &[system_type::TSS16, system_type::TSS]
    };
    let found = system_descriptor(cpu, bus, selector, kinds)?;
    segment::mark_busy(cpu, bus, found, true)?;
    let mut tr = found.descriptor.segment(selector);
    tr.attributes |= 2;
    cpu.tr = tr;
    Ok(())
}

fn check_loadable(cpu: &Cpu) -> Result<(), Exception> {
    if real_style(cpu) {
        Err(Exception::UD)
    } else if cpu.cpl != 0 {
        Err(GP0)
    } else {
        Ok(())
    }
}

/// #UD for the instructions that real and virtual-8086 mode do not have.
pub(crate) fn check_protected(cpu: &Cpu) -> Result<(), Exception> {
    if real_style(cpu) {
        Err(Exception::UD)
    } else {
        Ok(())
    }
}
