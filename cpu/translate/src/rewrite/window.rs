//! Accesses through a window instead of a TLB check (see `crate::window`).

use super::memory::is_high_byte;
use super::share::Run;
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
        let high = (0..d.op_count())
            .any(|op| d.op_kind(op) == OpKind::Register && is_high_byte(d.op_register(op)));
        !explicit || !based && !high
    }

    /// Where the access finds its bytes in the window, and those that follow off the same base.
    pub(super) fn in_window(&mut self, i: &GuestInstruction, size: u8, write: bool) -> (Reg, i32) {
        let shares = self.s.options.share_checks;
        let plan = i.reference.filter(|_| shares).and_then(|r| {
            let rest = &self.block.instructions[self.at..];
            let stretch = self.pinned_stretch().or_else(|| share::plan(rest))?;
            Some((r, stretch))
        });
        self.run = None;
        let from = plan.map_or(0, |(r, stretch)| r.disp - stretch.low);
        self.own_address(i, -from, (size, write));
        match self.place {
            // No flag changes.
            FlagPlace::Registers => {
                let a = self.asm();
                a.load(S1, ctx::WINDOW);
                a.lea_index(S0, S0, S1, 1);
            }
            FlagPlace::Saved => self.asm().add_gs(S0, ctx::WINDOW),
        }
        self.out.windowed += 1;
        if let Some((r, stretch)) = plan {
            let run = Run::new(&r, stretch);
            self.run = Some(run);
            self.begin_pin(run);
        }
        (S0, from as i32)
    }
}
