//! LAR, LSL, VERR, VERW and ARPL: what a selector would give, without a fault.

use iced_x86::{Instruction, OpKind};

use crate::interpret::operand;
use crate::segment::{self, Descriptor, rpl, system_type};
use crate::table::{check_protected, selector_operand};
use crate::{Bus, Cpu, Exception, Rflags};

/// The descriptor, where the selector is in its table and the CPL and RPL may see it.
fn visible(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    selector: u16,
) -> Result<Option<Descriptor>, Exception> {
    let Some(found) = segment::find(cpu, bus, selector)? else {
        return Ok(None);
    };
    let d = found.descriptor;
    let seen = d.is_conforming() || (d.dpl() >= cpu.cpl && d.dpl() >= rpl(selector));
    Ok(seen.then_some(d))
}

fn set_zf(cpu: &mut Cpu, on: bool) {
    cpu.rflags.set(Rflags::ZF, on);
}

/// System descriptor types that LAR and LSL accept.
fn has_rights(cpu: &Cpu, kind: u32) -> bool {
    use system_type::{CALL_GATE, CALL_GATE16, LDT, TASK_GATE, TSS, TSS_BUSY, TSS16, TSS16_BUSY};
    match kind {
        LDT | TSS | TSS_BUSY | CALL_GATE => true,
        TSS16 | TSS16_BUSY | CALL_GATE16 | TASK_GATE => !cpu.long_mode(),
        _ => false,
    }
}

fn has_limit(cpu: &Cpu, kind: u32) -> bool {
    use system_type::{LDT, TSS, TSS_BUSY, TSS16, TSS16_BUSY};
    matches!(kind, LDT | TSS | TSS_BUSY | TSS16 | TSS16_BUSY) && has_rights(cpu, kind)
}

/// LAR: the access rights bytes of the descriptor.
pub(crate) fn lar(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    check_protected(cpu)?;
    let selector = selector_operand(cpu, bus, i, 1)?;
    let rights = visible(cpu, bus, selector)?
        .filter(|d| !d.is_system() || has_rights(cpu, d.kind()))
        .map(|d| d.low >> 32 & 0x00ff_ff00);
    set_zf(cpu, rights.is_some());
    match rights {
        Some(v) => operand::write_operand(cpu, bus, i, 0, v),
        None => Ok(()),
    }
}

/// LSL: the limit of the segment in bytes.
pub(crate) fn lsl(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    check_protected(cpu)?;
    let selector = selector_operand(cpu, bus, i, 1)?;
    let limit = visible(cpu, bus, selector)?
        .filter(|d| !d.is_system() || has_limit(cpu, d.kind()))
        .map(Descriptor::limit);
    set_zf(cpu, limit.is_some());
    match limit {
        Some(v) => operand::write_operand(cpu, bus, i, 0, v.into()),
        None => Ok(()),
    }
}

/// VERR or VERW (`write`).
pub(crate) fn verify(
    cpu: &mut Cpu,
    bus: &mut dyn Bus,
    i: &Instruction,
    write: bool,
) -> Result<(), Exception> {
    check_protected(cpu)?;
    let selector = selector_operand(cpu, bus, i, 0)?;
    let usable = visible(cpu, bus, selector)?.is_some_and(|d| {
        if write {
            d.is_writable_data()
        } else {
            d.is_readable()
        }
    });
    set_zf(cpu, usable);
    Ok(())
}

/// ARPL: raises the RPL of a selector to that of another.
pub(crate) fn arpl(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Result<(), Exception> {
    check_protected(cpu)?;
    let least = operand::read_operand(cpu, bus, i, 1)? & 3;
    if i.op_kind(0) == OpKind::Register {
        let selector = operand::read_operand(cpu, bus, i, 0)?;
        let raised = selector & 3 < least;
        if raised {
            operand::write_operand(cpu, bus, i, 0, selector & !3 | least)?;
        }
        set_zf(cpu, raised);
        return Ok(());
    }
    let raised = operand::modify(cpu, bus, i, 0, |selector| {
        let raised = selector & 3 < least;
        let new = if raised {
            selector & !3 | least
        } else {
            selector
        };
        (new, raised)
    })?;
    set_zf(cpu, raised);
    Ok(())
}
