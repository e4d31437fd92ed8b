//! r10 and r11 for a moment where the guest has them.
//!
//! Problem: the guest's values of the two scratch registers live in memory, so that code which computes with them pays a load and a
//! store for each instruction.
//! Idea: in a stretch of instructions that need no scratch register and cannot fault, the first that reads one loads it, and it is
//! stored once, at the end of the stretch.
//! Invariant: outside of such a stretch the slots are right and the registers are scratch.

use super::*;

/// What a scratch register holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Resident {
    /// The guest's value.
    loaded: bool,
    /// A value that its slot has not.
    dirty: bool,
}

/// True for what computes in general registers only and cannot fault. [`GuestInstruction::cannot_fault`] holds it.
pub(crate) fn cannot_fault(i: &GuestInstruction) -> bool {
    let class = match i.class {
        Class::Copy => true,
        Class::Lea => copied_lea(&i.decoded),
        Class::Nothing => return true,
        _ => false,
    };
    class && computes(i.decoded.mnemonic()) && !i.simd
}

fn computes(m: iced_x86::Mnemonic) -> bool {
    use iced_x86::Mnemonic::*;
    matches!(
        m,
        Mov | Movzx
            | Movsx
            | Movsxd
            | Lea
            | Add
            | Adc
            | Sub
            | Sbb
            | And
            | Or
            | Xor
            | Not
            | Neg
            | Inc
            | Dec
            | Cmp
            | Test
            | Imul
            | Mul
            | Shl
            | Shr
            | Sar
            | Rol
            | Ror
            | Shld
            | Shrd
            | Xchg
            | Bswap
            | Bt
    )
}

impl Work<'_> {
    /// Emits an instruction as it is, its scratch registers resident.
    pub(super) fn copy_resident(&mut self, i: &GuestInstruction) {
        let scratch = self.scratch_use(i);
        for (r, access) in scratch.into_iter().flatten() {
            let state = &mut self.resident[usize::from(r - S0)];
            let load = access != Use::WritesAll && !state.loaded;
            state.loaded = true;
            state.dirty |= access != Use::Reads;
            if load {
                self.asm().load(r, ctx::gpr(r));
            }
        }
        self.own_bytes(i);
    }

    /// Ends a stretch: the slots are right again. No flag changes.
    pub(super) fn end_residence(&mut self) {
        for r in [S0, S1] {
            let state = std::mem::take(&mut self.resident[usize::from(r - S0)]);
            if state.dirty {
                self.asm().store(ctx::gpr(r), r);
            }
        }
    }
}
