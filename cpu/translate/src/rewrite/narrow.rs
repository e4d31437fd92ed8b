//! What differs where code is not of 64-bit mode: the width of the stack and of addresses, and segments (see [`crate::narrow`]).

use super::*;

impl Work<'_> {
    pub(super) fn is_narrow(&self) -> bool {
        self.s.mode.is_narrow()
    }

    /// Bytes of what is pushed and popped, and of near addresses.
    pub(super) fn word(&self) -> u8 {
        if self.is_narrow() { 4 } else { 8 }
    }

    /// `dst = base + disp`, cut as addresses are.
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

    pub(super) fn load_word(&mut self, dst: Reg, base: Reg, disp: i32) {
        match self.is_narrow() {
            true => self.asm().load_mem32(dst, base, disp),
            false => self.asm().load_mem(dst, base, disp),
        }
    }

    pub(super) fn store_word(&mut self, base: Reg, disp: i32, src: Reg) {
        match self.is_narrow() {
            true => self.asm().store_mem32(base, disp, src),
            false => self.asm().store_mem(base, disp, src),
        }
    }

    pub(super) fn store_word_imm(&mut self, base: Reg, disp: i32, imm: i32) {
        match self.is_narrow() {
            true => self.asm().store_mem_imm32(base, disp, imm),
            false => self.asm().store_mem_imm(base, disp, imm),
        }
    }

    /// S0, an offset in a segment, becomes a linear address, or the interpreter is asked. Destroys the host's flags and S1.
    pub(super) fn segment(&mut self, i: &GuestInstruction, segment: Register, access: (u8, bool)) {
        let based = matches!(segment, Register::FS | Register::GS);
        if self.s.mode == Mode::Flat && !based {
            return;
        }
        let ((size, write), n) = (access, segment.number() as u8);
        let a = self.asm();
        a.lea(S1, S0, i32::from(size) - 1);
        a.cmp_gs(S1, ctx::segment_end(n, write));
        self.leave_if(CC_G, i);
        self.asm().add_gs32(S0, ctx::segment_base(n));
    }

    /// S0 = linear address of so many bytes on the stack, at an offset from RSP.
    pub(super) fn stack_address(&mut self, i: &GuestInstruction, disp: i32, write: bool) {
        match disp {
            0 => self.mov_word(S0, RSP),
            _ => self.lea_word(S0, RSP, disp),
        }
        if self.is_narrow() {
            self.segment(i, Register::SS, (self.word(), write));
        }
    }
}
