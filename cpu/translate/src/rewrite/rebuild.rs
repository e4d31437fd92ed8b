//! Recipes as code: what a shared check that fails does before it goes on in the careful form.
//!
//! That way is linked, so that the monitor is not there to work the flags out (see `lost` and `share`). The code stands out of line
//! and saves them; it may use S0 and S1.

use super::*;
use crate::flags::{bits, pack};
use crate::recipe::{Kind, Source};

/// Arithmetic of a register and S1, by its opcode for bytes.
#[derive(Clone, Copy)]
enum Operation {
    Add = 0x00,
    Sub = 0x28,
    Cmp = 0x38,
    Test = 0x84,
}

/// Packed, without the bit that is always set.
const PACKED_ONE: u64 = 2 << 8;

/// Where S0 is meanwhile.
pub(super) const LINEAR: i32 = ctx::SPILL + 24;

impl Work<'_> {
    /// Brings `FLAGS` up to date; S0 is in `LINEAR` afterwards.
    pub(super) fn rebuild_beside_s0(&mut self, recipes: &[Recipe]) {
        self.asm().store(LINEAR, S0);
        self.rebuild(recipes);
    }

    fn rebuild(&mut self, recipes: &[Recipe]) {
        for recipe in recipes {
            self.value_then(S0, recipe.left);
            self.value_then(S1, recipe.right);
            let steps: &[Operation] = match recipe.kind {
                Kind::Compare => &[Operation::Cmp],
                Kind::Difference => &[Operation::Add, Operation::Cmp],
                Kind::Sum => &[Operation::Sub, Operation::Add],
                Kind::And => &[Operation::Test],
            };
            for step in steps {
                self.operate(*step, recipe.size);
            }
            self.merge(recipe.flags);
        }
    }

    fn value_then(&mut self, to: Reg, source: Source) {
        let a = self.asm();
        match source {
            Source::Constant(v) => a.mov_imm(to, v as u64),
            Source::Register { number, moved } => {
                match number {
                    S0 | S1 => a.load(to, ctx::gpr(number)),
                    n => a.mov(to, n),
                }
                if moved != 0 {
                    a.lea(to, to, -moved);
                }
            }
        }
    }

    /// `operation S0, S1` of so many bytes.
    fn operate(&mut self, operation: Operation, size: u8) {
        if size == 2 {
            self.asm().raw(&[0x66]);
        }
        let rex = 0x40 | u8::from(size == 8) << 3 | (S1 >> 3) << 2 | (S0 >> 3);
        let opcode = operation as u8 | u8::from(size != 1);
        self.asm()
            .raw(&[rex, opcode, 0xc0 | (S1 & 7) << 3 | (S0 & 7)]);
    }

    /// Some of the saved flags become those in the registers.
    fn merge(&mut self, flags: FlagSet) {
        let mask = (pack(bits(flags)) & !PACKED_ONE) as i32;
        let a = self.asm();
        a.mov(S1, RAX);
        a.flags_to_ax();
        a.alu_imm32(Alu::And, RAX, mask);
        a.load32(S0, ctx::FLAGS);
        a.alu_imm32(Alu::And, S0, !mask);
        a.or64(S0, RAX);
        a.store32(ctx::FLAGS, S0);
        a.mov(RAX, S1);
    }
}
