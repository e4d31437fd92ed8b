//! The sixteen conditions of jcc, setcc and cmovcc.

use iced_x86::{ConditionCode, Instruction};

use crate::{Cpu, Rflags};

/// True where the instruction's condition holds.
#[inline]
pub(super) fn holds(cpu: &Cpu, i: &Instruction) -> bool {
    let f = cpu.rflags;
    let less = f.contains(Rflags::SF) != f.contains(Rflags::OF);
    let zero = f.contains(Rflags::ZF);
    let carry = f.contains(Rflags::CF);
    match i.condition_code() {
        ConditionCode::o => f.contains(Rflags::OF),
        ConditionCode::no => !f.contains(Rflags::OF),
        ConditionCode::b => carry,
        ConditionCode::ae => !carry,
        ConditionCode::e => zero,
        ConditionCode::ne => !zero,
        ConditionCode::be => carry || zero,
        ConditionCode::a => !carry && !zero,
        ConditionCode::s => f.contains(Rflags::SF),
        ConditionCode::ns => !f.contains(Rflags::SF),
        ConditionCode::p => f.contains(Rflags::PF),
        ConditionCode::np => !f.contains(Rflags::PF),
        ConditionCode::l => less,
        ConditionCode::ge => !less,
        ConditionCode::le => less || zero,
        ConditionCode::g => !less && !zero,
        ConditionCode::None => true,
    }
}
