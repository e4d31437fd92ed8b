//! Which function executes an instruction.

use iced_x86::{EncodingKind, Instruction};

use super::{
    Handler, Step, arithmetic, atomic, bcd, bit, bmi, control, data_transfer, hint, logic, masked,
    multiply_divide, native, push_pop, shift, string, xsave, zero_vectors,
};
use crate::{Bus, Cpu, CpuMode, Exception};

const INTEGER: [fn(&Instruction) -> Option<Handler>; 12] = [
    data_transfer::lookup,
    arithmetic::lookup,
    logic::lookup,
    shift::lookup,
    control::lookup,
    push_pop::lookup,
    string::lookup,
    bit::lookup,
    multiply_divide::lookup,
    atomic::lookup,
    bmi::lookup,
    bcd::lookup,
];

/// Hints, and instructions on the extended state that the host does not execute as they are.
const STATE: [fn(&Instruction) -> Option<Handler>; 4] = [
    hint::lookup,
    xsave::lookup,
    masked::lookup,
    zero_vectors::lookup,
];

/// The function that executes the instruction, and whether it may make an interrupt deliverable.
pub(super) fn resolve(i: &Instruction, mode: CpuMode) -> (Handler, bool) {
    // XOP and TBM are not offered; some of their instructions have the names of others.
    if i.encoding() == EncodingKind::XOP {
        return (hint::undefined, false);
    }
    let vex = i.encoding() != EncodingKind::Legacy;
    if vex && matches!(mode, CpuMode::Real | CpuMode::V86) {
        return (hint::undefined, false);
    }
    INTEGER
        .iter()
        .chain(&STATE)
        .find_map(|lookup| lookup(i))
        .or_else(|| native::lookup(i))
        .map_or((system, true), |h| (h, false))
}

/// Privileged and system instructions.
fn system(cpu: &mut Cpu, bus: &mut dyn Bus, i: &Instruction) -> Step {
    crate::system::execute(cpu, bus, i).unwrap_or(Err(Exception::UD))
}

/// True for integer instructions, which change general registers, memory and flags only.
#[cfg(test)]
pub(super) fn is_integer(i: &Instruction) -> bool {
    INTEGER.iter().any(|lookup| lookup(i).is_some())
}
