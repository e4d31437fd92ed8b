//! Push, pop, leave and the return address of calls.

use super::*;

impl Work<'_> {
    pub(super) fn push(&mut self, i: &GuestInstruction) {
        let d = &i.decoded;
        let (mut base, mut at) = (S0, 0);
        if d.op0_kind() == OpKind::Memory {
            self.before_check(i);
            self.address(d, true);
            self.check(i, 8, false);
            self.asm().load_mem(S0, S0, 0);
            self.asm().store(ctx::SPILL, S0);
            self.asm().lea(S0, RSP, -8);
            self.check(i, 8, true);
        } else {
            (base, at) = self.operand(i, 8, true);
        }
        match d.op0_kind() {
            OpKind::Register if is_scratch(d.op0_register()) => {
                let n = d.op0_register().number() as Reg;
                self.asm().load(S1, ctx::gpr(n));
                self.asm().store_mem(base, at, S1);
            }
            OpKind::Register => {
                let n = d.op0_register().number() as Reg;
                self.asm().store_mem(base, at, n);
            }
            OpKind::Memory => {
                self.asm().load(S1, ctx::SPILL);
                self.asm().store_mem(base, at, S1);
            }
            _ => {
                let imm = d.immediate(0) as i64 as i32;
                self.asm().store_mem_imm(base, at, imm);
            }
        }
        self.asm().lea(RSP, RSP, -8);
    }

    pub(super) fn pop(&mut self, i: &GuestInstruction) {
        let (base, at) = self.operand(i, 8, false);
        let to = i.decoded.op0_register();
        let n = to.number() as Reg;
        if is_scratch(to) {
            self.asm().load_mem(S1, base, at);
            self.asm().store(ctx::gpr(n), S1);
        } else {
            self.asm().load_mem(n, base, at);
        }
        if n != RSP {
            self.asm().lea(RSP, RSP, 8);
        }
    }

    pub(super) fn leave(&mut self, i: &GuestInstruction) {
        let (base, at) = self.operand(i, 8, false);
        self.asm().lea(RSP, RBP, 8);
        self.asm().load_mem(RBP, base, at);
    }

    pub(super) fn push_return_address(&mut self, i: &GuestInstruction) {
        let next = i64::from(i.offset) + i.decoded.len() as i64;
        let (base, at) = self.operand(i, 8, true);
        self.guest_address(S1, next);
        self.asm().store_mem(base, at, S1);
        self.asm().lea(RSP, RSP, -8);
    }
}
