//! Accesses through a window instead of a TLB check (see `crate::window`).

use super::memory::names_high_byte;
use super::*;
use doppel_memory::Window;

/// Most bytes of an operand.
const OPERAND: i64 = 64;
const _: () = assert!(share::LONGEST + OPERAND <= Window::GUARD as i64);

impl Work<'_> {
    /// True where the instruction's own access goes through the window: a fault of it has to find the guest's state as it was.
    pub(super) fn through_window(&self, i: &GuestInstruction) -> bool {
        if !self.s.mode.window || self.s.form != Form::Normal || i.short {
            return false;
        }
        let d = &i.decoded;
        let explicit = match i.class {
            Class::Memory { .. } => true,
            Class::JumpIndirect => d.op0_kind() == OpKind::Memory,
            Class::Push | Class::CallIndirect => {
                return d.op0_kind() != OpKind::Memory;
            }
            Class::Pop | Class::Leave | Class::Return | Class::Call => false,
            _ => return false,
        };
        let based = matches!(d.memory_segment(), Register::FS | Register::GS);
        // RBP stands in for a base that cannot be named beside AH to BH.
        !explicit || !based && !names_high_byte(d)
    }

    /// S0 (linear) becomes an address in the window.
    pub(super) fn enter_window(&mut self) {
        self.run = None;
        self.out.windowed += 1;
        match self.place {
            // No flag changes.
            FlagPlace::Registers => {
                let a = self.asm();
                a.load(S1, ctx::WINDOW);
                a.lea_index(S0, S0, S1, 1);
            }
            FlagPlace::Saved => self.asm().add_gs(S0, ctx::WINDOW),
        }
    }
}
