//! Sensitive instructions emitted as code on the virtual state.
//!
//! The arithmetic bits of the virtual RFLAGS in the context are stale while translated code runs; they are in the registers
//! or in `FLAGS` (see `flags`). What is rare or may fault leaves to the interpreter before anything has changed.

use doppel_x86::flat_attributes;

use super::*;

const RF: i32 = 1 << 16;
pub(super) const TF: i32 = 1 << 8;
/// What SYSRET takes from R11.
const SYSRET_FLAGS: i32 = 0x3c_7fd7;
const EFER_SCE: i32 = 1;
pub(super) const VIF_VIP: i32 = 3 << 19;
const CR4_FSGSBASE: i32 = 1 << 16;
pub(super) const CR4_TSD: i32 = 1 << 2;
pub(super) const CS: u8 = 1;
pub(super) const SS: u8 = 2;

impl Work<'_> {
    pub(super) fn cli(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.asm().alu_gs_imm32(Alu::And, ctx::RFLAGS, !IF);
    }

    pub(super) fn direction_flag(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        let a = self.asm();
        match i.decoded.code() {
            Code::Std => a.alu_gs_imm32(Alu::Or, ctx::RFLAGS, DF),
            _ => a.alu_gs_imm32(Alu::And, ctx::RFLAGS, !DF),
        }
    }

    /// A fence; and what others have written to the code before is followed, since that comes with a kick.
    pub(super) fn serialize(&mut self) {
        self.asm().raw(&[0x0f, 0xae, 0xf0]); // mfence
        self.poll();
    }

    /// As it is, but for one in many.
    pub(super) fn pause(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.asm().alu_gs_imm32(Alu::Sub, ctx::PAUSES_LEFT, 1);
        self.leave_if(CC_S, i);
        self.asm().raw(&[0xf3, 0x90]);
    }

    /// Interrupts wait until the instruction behind it is done. What polls does so at its beginning, and there a kick would let them in: then the
    /// interpreter executes it.
    pub(super) fn sti(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        if self.polls_first(self.at + 1) {
            return self.interpret(i);
        }
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

    /// S0 = the guest's RFLAGS without RF and VM. The flags are saved here.
    fn whole_flags(&mut self) {
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
    }

    /// The arithmetic flags become those of an RFLAGS value in S0, which is destroyed, as is S1.
    pub(super) fn set_arithmetic_flags(&mut self) {
        let a = self.asm();
        a.mov32(S1, S0);
        a.alu_imm32(Alu::And, S1, 0xd5);
        a.shl32(S1, 8);
        a.shr32(S0, 11);
        a.alu_imm32(Alu::And, S0, 1);
        a.or64(S1, S0);
        a.store32(ctx::FLAGS, S1);
        self.place = FlagPlace::Saved;
    }

    pub(super) fn pushf(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.whole_flags();
        let a = self.asm();
        a.store(ctx::SPILL, S0);
        let word = i32::from(i.word);
        self.stack_address(i, -word, true);
        self.check(i, i.word.into(), true);
        self.asm().load(S1, ctx::SPILL);
        self.store_word(i.word, (S0, 0), S1);
        self.move_stack(RSP, -word);
    }

    /// POPFQ at CPL 0 that changes nothing but IF and the arithmetic flags; anything else is interpreted.
    pub(super) fn popf(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.stack_address(i, 0, false);
        self.check(i, i.word.into(), false);
        self.load_word(i.word, S0, (S0, 0));
        let a = self.asm();
        a.load(S1, ctx::RFLAGS);
        if i.word == 2 {
            // The others stay.
            a.alu_imm32(Alu::And, S1, !0xffff);
            a.or64(S0, S1);
            a.load(S1, ctx::RFLAGS);
        }
        a.xor64(S1, S0);
        // The upper half of what is popped, too: it means nothing, and is not to be kept.
        a.test_imm64(S1, !(ARITHMETIC | IF));
        self.leave_if(CC_NE, i);
        self.asm().test_imm32(S0, IF);
        let masked = self.asm().jcc(CC_E);
        self.leave_if_interrupt_waits(i);
        let a = self.asm();
        a.bind(masked);
        a.store(ctx::RFLAGS, S0);
        self.set_arithmetic_flags();
        self.move_stack(RSP, i.word.into());
    }

    pub(super) fn rdtsc(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        let a = self.asm();
        a.raw(&[0x0f, 0x31]);
        a.shl64(RDX, 32);
        a.or64(RAX, RDX);
        a.add_gs(RAX, ctx::TSC_OFFSET);
        a.mov(RDX, RAX);
        a.shr64(RDX, 32);
        a.mov32(RAX, RAX);
        if i.decoded.code() == Code::Rdtscp {
            // What RDTSCP waits for.
            a.raw(&[0x0f, 0xae, 0xe8]); // lfence
            a.load32(RCX, ctx::TSC_AUX);
        }
    }

    /// A general register becomes what stands in a slot of the context; the upper half is zero where `wide` is not set.
    fn load_slot(&mut self, to: Register, slot: i32, wide: bool) {
        let n = to.number() as Reg;
        let r = if is_scratch(to) { S0 } else { n };
        let a = self.asm();
        if wide {
            a.load(r, slot);
        } else {
            a.load32(r, slot);
        }
        if is_scratch(to) {
            a.store(ctx::gpr(n), S0);
        }
    }

    pub(super) fn rdpid(&mut self, i: &GuestInstruction) {
        self.load_slot(i.decoded.op0_register(), ctx::TSC_AUX, false);
    }

    pub(super) fn read_control(&mut self, i: &GuestInstruction) {
        let slot = match i.decoded.op1_register() {
            Register::CR2 => ctx::CR2,
            _ => ctx::CR3,
        };
        self.load_slot(i.decoded.op0_register(), slot, true);
    }

    /// `mov r, sreg`: the selector, zero extended where the register has more than 16 bits.
    pub(super) fn read_selector(&mut self, i: &GuestInstruction) {
        let selector = ctx::segment_selector(i.decoded.op1_register().number() as u8);
        let to = i.decoded.op0_register();
        let n = to.full_register().number() as Reg;
        if to.size() == 2 {
            self.asm().load16(S0, selector);
            if is_scratch(to) {
                self.asm().store16(ctx::gpr(n), S0);
            } else {
                self.asm().mov16(n, S0);
            }
            return;
        }
        let r = if is_scratch(to) { S0 } else { n };
        self.asm().load16(r, selector);
        if is_scratch(to) {
            self.asm().store(ctx::gpr(n), S0);
        }
    }

    /// RDFSBASE, RDGSBASE, WRFSBASE and WRGSBASE.
    pub(super) fn segment_base(&mut self, i: &GuestInstruction, segment: u8, write: bool) {
        self.before_check(i);
        self.asm().test_gs_imm32(ctx::CR4, CR4_FSGSBASE);
        self.leave_if(CC_E, i);
        let r = i.decoded.op0_register();
        let (wide, base) = (r.size() == 8, ctx::segment_base(segment));
        if !write {
            self.load_slot(r, base, wide);
            return;
        }
        let n = r.number() as Reg;
        let a = self.asm();
        if is_scratch(r) {
            a.load(S0, ctx::gpr(n));
        } else {
            a.mov(S0, n);
        }
        if wide {
            self.leave_unless_canonical(S0, i);
        } else {
            a.mov32(S0, S0);
        }
        self.asm().store(base, S0);
    }

    /// Destroys S1.
    fn leave_unless_canonical(&mut self, r: Reg, i: &GuestInstruction) {
        let a = self.asm();
        a.mov(S1, r);
        a.shl64(S1, 16);
        a.sar64(S1, 16);
        a.xor64(S1, r);
        self.leave_if(CC_NE, i);
    }

    /// SYSCALL from 64-bit code where the kernel masks the arithmetic flags, IF, TF and AC.
    pub(super) fn syscall(&mut self, i: &GuestInstruction) {
        const MASKED: i32 = ARITHMETIC | IF | TF | AC;
        self.before_check(i);
        let a = self.asm();
        a.test_gs_imm32(ctx::EFER, EFER_SCE);
        self.leave_if(CC_E, i);
        let a = self.asm();
        a.load32(S0, ctx::SFMASK);
        a.alu_imm32(Alu::And, S0, MASKED);
        a.alu_imm32(Alu::Cmp, S0, MASKED);
        self.leave_if(CC_NE, i);
        self.whole_flags();
        let next = i64::from(i.offset) + i.decoded.len() as i64;
        let a = self.asm();
        a.store(ctx::gpr(11), S0);
        a.load32(S1, ctx::SFMASK);
        a.not32(S1);
        a.and64(S0, S1);
        a.alu_imm64(Alu::Or, S0, 2);
        a.store(ctx::RFLAGS, S0);
        a.store_imm32(ctx::FLAGS, 2 << 8);
        self.guest_address(RCX, next);
        let a = self.asm();
        a.load32(S0, ctx::STAR + 4);
        a.alu_imm32(Alu::And, S0, 0xfffc);
        self.flat_segments(flat_attributes::CODE64, flat_attributes::DATA, 0);
        let a = self.asm();
        a.load(S0, ctx::LSTAR);
        self.place = FlagPlace::Saved;
        self.indirect_at(Privilege::Supervisor as u8, i);
    }

    /// SYSRET to 64-bit code that may be translated; anything else is interpreted.
    pub(super) fn sysret(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.asm().test_gs_imm32(ctx::EFER, EFER_SCE);
        self.leave_if(CC_E, i);
        self.asm().test_gs_imm32(ctx::CR4, CR4_TSD);
        self.leave_if(CC_NE, i);
        self.leave_unless_canonical(RCX, i);
        let a = self.asm();
        a.load(S0, ctx::gpr(11));
        a.test_imm32(S0, TF | AC | VIF_VIP);
        self.leave_if(CC_NE, i);
        self.asm().test_imm32(S0, IF);
        let masked = self.asm().jcc(CC_E);
        self.leave_if_interrupt_waits(i);
        let a = self.asm();
        a.bind(masked);
        a.alu_imm32(Alu::And, S0, SYSRET_FLAGS & !RF);
        a.alu_imm32(Alu::Or, S0, 2);
        a.store(ctx::RFLAGS, S0);
        a.alu_gs_imm32(Alu::Add, ctx::USER_ENTRIES, 1);
        self.set_arithmetic_flags();
        let a = self.asm();
        a.load32(S0, ctx::STAR + 4);
        a.shr32(S0, 16);
        a.lea(S0, S0, 16);
        a.alu_imm32(Alu::Or, S0, 3);
        let user = 3 << 5;
        self.flat_segments(
            flat_attributes::CODE64 | user,
            flat_attributes::DATA | user,
            3,
        );
        self.asm().mov(S0, RCX);
        self.indirect_at(Privilege::User as u8, i);
    }

    /// CS and SS become flat segments of a privilege. The selector of CS stands in S0; that of SS is 8 more on the way into
    /// the kernel and 8 less on the way out.
    pub(super) fn flat_segments(&mut self, code: u32, data: u32, cpl: u8) {
        let to_ss = if cpl == 0 { 8 } else { -8 };
        for (segment, attributes, step) in [(CS, code, 0), (SS, data, to_ss)] {
            let a = self.asm();
            a.lea(S1, S0, step);
            a.store16(ctx::segment_selector(segment), S1);
            self.flat_segment(segment, attributes);
        }
        self.asm().store_imm8(ctx::CPL, cpl);
    }

    /// A segment becomes a flat one, but for its selector.
    pub(super) fn flat_segment(&mut self, segment: u8, attributes: u32) {
        let a = self.asm();
        a.store_imm64(ctx::segment_base(segment), 0);
        a.store_imm32(ctx::segment_limit(segment), u32::MAX);
        a.store_imm32(ctx::segment_attributes(segment), attributes);
    }
}
