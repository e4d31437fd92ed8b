//! Push, pop, leave and the return address of calls.

use super::*;

impl Work<'_> {
    pub(super) fn push(&mut self, i: &GuestInstruction) {
        let (d, word) = (&i.decoded, i.word);
        let mut at = (S0, 0);
        if d.op0_kind() == OpKind::Memory {
            self.before_check(i);
            self.linear_address(i, 0, (word, false));
            self.check(i, word.into(), false);
            self.load_word(word, S0, (S0, 0));
            self.asm().store(ctx::SPILL, S0);
            self.stack_address(i, -i32::from(word), true);
            self.check(i, word.into(), true);
        } else {
            at = self.operand(i, word, true);
        }
        match d.op0_kind() {
            OpKind::Register if is_scratch(d.op0_register()) => {
                let n = d.op0_register().number() as Reg;
                self.asm().load(S1, ctx::gpr(n));
                self.store_word(word, at, S1);
            }
            OpKind::Register => {
                let n = d.op0_register().number() as Reg;
                self.store_word(word, at, n);
            }
            OpKind::Memory => {
                self.asm().load(S1, ctx::SPILL);
                self.store_word(word, at, S1);
            }
            _ => {
                let imm = d.immediate(0) as i64 as i32;
                self.store_word_imm(word, at, imm);
            }
        }
        self.move_stack(RSP, -i32::from(word));
    }

    pub(super) fn pop(&mut self, i: &GuestInstruction) {
        let (base, at) = self.operand(i, i.word, false);
        let to = i.decoded.op0_register();
        let n = to.number() as Reg;
        if is_scratch(to) {
            self.asm().load_mem(S1, base, at);
            self.asm().store(ctx::gpr(n), S1);
        } else {
            self.load_register(i.word, n, (base, at));
        }
        if n != RSP {
            self.move_stack(RSP, i.word.into());
        }
    }

    pub(super) fn leave(&mut self, i: &GuestInstruction) {
        let at = self.operand(i, i.word, false);
        // First what may fault.
        self.load_word(i.word, S1, at);
        self.move_stack(RBP, i.word.into());
        match i.word {
            2 => self.asm().mov16(RBP, S1),
            _ => self.mov_word(RBP, S1),
        }
    }

    pub(super) fn push_return_address(&mut self, i: &GuestInstruction) {
        let next = i64::from(i.offset) + i.decoded.len() as i64;
        let at = self.operand(i, i.word, true);
        self.guest_address(S1, next);
        self.store_word(i.word, at, S1);
        self.move_stack(RSP, -i32::from(i.word));
    }
}
