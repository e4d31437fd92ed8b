//! What differs where code is not of 64-bit mode: the width of the stack and of addresses, and segments (see [`crate::narrow`]).

use super::*;

impl Work<'_> {
    pub(super) fn is_narrow(&self) -> bool {
        self.s.mode.is_narrow()
    }

    /// `dst = base + disp`, cut to 32 bits where addresses are.
    pub(super) fn lea_word(&mut self, dst: Reg, base: Reg, disp: i32) {
        match self.is_narrow() {
            true => self.asm().lea32(dst, base, disp),
            false => self.asm().lea(dst, base, disp),
        }
    }

    pub(super) fn mov_word(&mut self, dst: Reg, src: Reg) {
        match self.is_narrow() {
            true => self.asm().mov32(dst, src),
            false => self.asm().mov(dst, src),
        }
    }

    /// Loads so many bytes; a register's upper bits become 0.
    pub(super) fn load_word(&mut self, size: u8, dst: Reg, (base, disp): (Reg, i32)) {
        match size {
            2 => self.asm().load_mem_zx16(dst, base, disp),
            4 => self.asm().load_mem32(dst, base, disp),
            _ => self.asm().load_mem(dst, base, disp),
        }
    }

    /// Loads so many bytes as the guest does: 2 leave the rest of the register as it is.
    pub(super) fn load_register(&mut self, size: u8, dst: Reg, (base, disp): (Reg, i32)) {
        match size {
            2 => self.asm().load_mem16(dst, base, disp),
            _ => self.load_word(size, dst, (base, disp)),
        }
    }

    pub(super) fn store_word(&mut self, size: u8, (base, disp): (Reg, i32), src: Reg) {
        match size {
            2 => self.asm().store_mem16(base, disp, src),
            4 => self.asm().store_mem32(base, disp, src),
            _ => self.asm().store_mem(base, disp, src),
        }
    }

    pub(super) fn store_word_imm(&mut self, size: u8, (base, disp): (Reg, i32), imm: i32) {
        match size {
            2 => self.asm().store_mem_imm16(base, disp, imm),
            4 => self.asm().store_mem_imm32(base, disp, imm),
            _ => self.asm().store_mem_imm(base, disp, imm),
        }
    }

    /// The stack pointer becomes `base + by`; above SP nothing changes where that is it.
    pub(super) fn move_stack(&mut self, base: Reg, by: i32) {
        match self.s.mode.stack() {
            2 => self.asm().lea16(RSP, base, by),
            4 => self.asm().lea32(RSP, base, by),
            _ => self.asm().lea(RSP, base, by),
        }
    }

    /// S0, an offset in a segment, becomes a linear address, or the interpreter is asked. Destroys the host's flags and S1.
    pub(super) fn segment(&mut self, i: &GuestInstruction, segment: Register, access: (u8, bool)) {
        let based = matches!(segment, Register::FS | Register::GS);
        if self.s.mode.flat && !based {
            return;
        }
        let ((size, write), n) = (access, segment.number() as u8);
        let a = self.asm();
        a.lea(S1, S0, i32::from(size) - 1);
        a.cmp_gs(S1, ctx::segment_end(n, write));
        self.leave_if(CC_G, i);
        self.asm().add_gs32(S0, ctx::segment_base(n));
    }

    /// S0 = offset in the stack segment.
    pub(super) fn stack_offset(&mut self, base: Reg, disp: i32) {
        match disp {
            0 if self.s.mode.stack() == 2 => return self.asm().movzx16(S0, base),
            0 => self.mov_word(S0, base),
            _ => self.lea_word(S0, base, disp),
        }
        if self.s.mode.stack() == 2 {
            self.asm().movzx16(S0, S0);
        }
    }

    /// S0 = linear address of so many bytes on the stack, at an offset from RSP.
    pub(super) fn stack_address(&mut self, i: &GuestInstruction, disp: i32, write: bool) {
        self.stack_offset(RSP, disp);
        if self.is_narrow() {
            self.segment(i, Register::SS, (i.word, write));
        }
    }

    /// Leaves to the interpreter where S0, the target of an indirect branch, is beyond the code segment. Destroys the host's flags.
    pub(super) fn check_target(&mut self, i: &GuestInstruction) {
        let limit = self.s.mode.limit;
        let most = if i.word == 2 { 0xffff } else { u32::MAX };
        if !self.s.mode.is_placed() || limit >= most {
            return;
        }
        let a = self.asm();
        a.mov_imm(S1, limit.into());
        a.cmp64(S0, S1);
        self.leave_if(CC_A, i);
    }
}
