//! Push, pop, leave and the return address of calls.

use super::*;

impl Work<'_> {
    pub(super) fn push(&mut self, i: &GuestInstruction) {
        let d = &i.decoded;
        let (mut base, mut at) = (S0, 0);
        let word = i32::from(self.word());
        if d.op0_kind() == OpKind::Memory {
            self.before_check(i);
            self.linear_address(i, 0, (self.word(), false));
            self.check(i, self.word().into(), false);
            self.load_word(S0, S0, 0);
            self.asm().store(ctx::SPILL, S0);
            self.stack_address(i, -word, true);
            self.check(i, self.word().into(), true);
        } else {
            (base, at) = self.operand(i, self.word(), true);
        }
        match d.op0_kind() {
            OpKind::Register if is_scratch(d.op0_register()) => {
                let n = d.op0_register().number() as Reg;
                self.asm().load(S1, ctx::gpr(n));
                self.store_word(base, at, S1);
            }
            OpKind::Register => {
                let n = d.op0_register().number() as Reg;
                self.store_word(base, at, n);
            }
            OpKind::Memory => {
                self.asm().load(S1, ctx::SPILL);
                self.store_word(base, at, S1);
            }
            _ => {
                let imm = d.immediate(0) as i64 as i32;
                self.store_word_imm(base, at, imm);
            }
        }
        self.lea_word(RSP, RSP, -word);
    }

    pub(super) fn pop(&mut self, i: &GuestInstruction) {
        let (base, at) = self.operand(i, self.word(), false);
        let to = i.decoded.op0_register();
        let n = to.number() as Reg;
        if is_scratch(to) {
            self.asm().load_mem(S1, base, at);
            self.asm().store(ctx::gpr(n), S1);
        } else {
            self.load_word(n, base, at);
        }
        if n != RSP {
            let word = i32::from(self.word());
            self.lea_word(RSP, RSP, word);
        }
    }

    pub(super) fn leave(&mut self, i: &GuestInstruction) {
        let (base, at) = self.operand(i, self.word(), false);
        let word = i32::from(self.word());
        self.lea_word(RSP, RBP, word);
        self.load_word(RBP, base, at);
    }

    pub(super) fn push_return_address(&mut self, i: &GuestInstruction) {
        let next = i64::from(i.offset) + i.decoded.len() as i64;
        let (base, at) = self.operand(i, self.word(), true);
        self.guest_address(S1, next);
        self.store_word(base, at, S1);
        let word = i32::from(self.word());
        self.lea_word(RSP, RSP, -word);
    }
}
