//! Sensitive instructions emitted as code on the virtual RFLAGS.
//!
//! The arithmetic bits of the virtual RFLAGS in the context are stale while translated code runs.

use super::*;

impl Work<'_> {
    pub(super) fn cli(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.asm().alu_gs_imm32(Alu::And, ctx::RFLAGS, !IF);
    }

    pub(super) fn sti(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.leave_if_interrupt_waits(i);
        self.asm().alu_gs_imm32(Alu::Or, ctx::RFLAGS, IF);
    }

    pub(super) fn leave_if_interrupt_waits(&mut self, i: &GuestInstruction) {
        self.asm().alu_gs_imm32(Alu::Cmp, ctx::INTERRUPT_WAITS, 0);
        self.leave_if(CC_NE, i);
    }

    /// The mode that a block is keyed by tells what AC is now, so that no flag is needed to change it.
    pub(super) fn alignment_flag(&mut self, i: &GuestInstruction) {
        let on = self.s.privilege == Privilege::SupervisorAc as u8;
        let set = i.decoded.code() == Code::Stac;
        if on != set {
            let a = self.asm();
            a.load(S0, ctx::RFLAGS);
            a.lea(S0, S0, if set { AC } else { -AC });
            a.store(ctx::RFLAGS, S0);
        }
        self.direct_exit(i64::from(i.offset) + i.decoded.len() as i64);
        if let Some(e) = self.out.exits.last_mut() {
            e.changes_mode = true;
        }
    }

    pub(super) fn pushf(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        let a = self.asm();
        a.load32(S1, ctx::FLAGS);
        a.mov32(S0, S1);
        a.shr32(S0, 8);
        a.alu_imm32(Alu::And, S0, 0xd5);
        a.alu_imm32(Alu::And, S1, 1);
        a.shl32(S1, 11);
        a.or64(S0, S1);
        a.load32(S1, ctx::RFLAGS);
        a.alu_imm32(Alu::And, S1, !(ARITHMETIC | RF_VM));
        a.or64(S0, S1);
        a.store(ctx::SPILL, S0);
        a.lea(S0, RSP, -8);
        self.check(i, 8, true);
        let a = self.asm();
        a.load(S1, ctx::SPILL);
        a.store_mem(S0, 0, S1);
        a.lea(RSP, RSP, -8);
    }

    /// POPFQ at CPL 0 that changes nothing but IF and the arithmetic flags; anything else is interpreted.
    pub(super) fn popf(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.asm().mov(S0, RSP);
        self.check(i, 8, false);
        let a = self.asm();
        a.load_mem(S0, S0, 0);
        a.load(S1, ctx::RFLAGS);
        a.xor64(S1, S0);
        a.test_imm32(S1, !(ARITHMETIC | IF));
        self.leave_if(CC_NE, i);
        self.asm().test_imm32(S0, IF);
        let masked = self.asm().jcc(CC_E);
        self.leave_if_interrupt_waits(i);
        let a = self.asm();
        a.bind(masked);
        a.store(ctx::RFLAGS, S0);
        a.mov32(S1, S0);
        a.alu_imm32(Alu::And, S1, 0xd5);
        a.shl32(S1, 8);
        a.shr32(S0, 11);
        a.alu_imm32(Alu::And, S0, 1);
        a.or64(S1, S0);
        a.store32(ctx::FLAGS, S1);
        a.lea(RSP, RSP, 8);
        self.place = FlagPlace::Saved;
    }
}
