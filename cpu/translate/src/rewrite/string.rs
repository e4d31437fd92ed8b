//! REP MOVS and REP STOS, page by page.
//!
//! The processor's own instruction runs on host addresses, over as many elements as fit into the page on either side; then
//! the guest's registers move on and it goes round again, as if an interrupt had come in between, which it may. Downwards (DF set) and
//! where an element straddles two pages the interpreter takes over.

use super::*;

/// Elements of this turn.
const NOW: i32 = ctx::SPILL;
const SOURCE: i32 = ctx::SPILL + 8;
const NEXT_RSI: i32 = ctx::SPILL + 16;
const NEXT_RDI: i32 = ctx::SPILL + 24;

impl Work<'_> {
    pub(super) fn repeat(&mut self, i: &GuestInstruction, size: u8, source: bool) {
        self.before_check(i);
        self.asm().test_gs_imm32(ctx::RFLAGS, DF);
        self.leave_if(CC_NE, i);
        if i.is_narrow() {
            for r in [RCX, RSI, RDI] {
                self.asm().mov32(r, r);
            }
        }
        self.asm().test64(RCX, RCX);
        let nothing = self.asm().jcc(CC_E);
        let again = self.r.asm.pos();
        self.asm().store(NOW, RCX);
        if source {
            self.shorten(i, RSI, size, false);
            self.asm().store(SOURCE, S0);
        }
        self.shorten(i, RDI, size, true);
        let narrow = self.is_narrow();
        let a = self.asm();
        a.load(S1, NOW);
        a.sub64(RCX, S1);
        a.xchg(RCX, S1);
        for (r, slot) in [(RDI, NEXT_RDI), (RSI, NEXT_RSI)] {
            if r == RSI && !source {
                continue;
            }
            a.lea_index(r, r, RCX, size);
            if narrow {
                a.mov32(r, r);
            }
            a.store(slot, r);
        }
        if source {
            a.load(RSI, SOURCE);
        }
        a.mov(RDI, S0);
        let from = usize::from(i.offset - self.block.start);
        let bytes = &self.block.bytes[from..from + i.decoded.len()];
        self.r.asm.raw(bytes);
        let a = self.asm();
        a.mov(RCX, S1);
        a.load(RDI, NEXT_RDI);
        if source {
            a.load(RSI, NEXT_RSI);
        }
        self.poll();
        let a = self.asm();
        a.test64(RCX, RCX);
        let more = a.jcc(CC_NE);
        a.bind_at(more, again);
        a.bind(nothing);
    }

    /// S0 = host address of `pointer`; NOW becomes the number of elements that fit into its page, if that is less.
    fn shorten(&mut self, i: &GuestInstruction, pointer: Reg, size: u8, write: bool) {
        self.asm().mov(S0, pointer);
        self.check(i, 1, write);
        let a = self.asm();
        a.mov32(S1, S0);
        a.alu_imm32(Alu::Or, S1, -4096);
        a.neg32(S1);
        if size > 1 {
            a.shr32(S1, size.trailing_zeros() as u8);
            // Not one whole element.
            self.leave_if(CC_E, i);
        }
        let a = self.asm();
        a.cmp_gs(S1, NOW);
        let longer = a.jcc(CC_A);
        a.store(NOW, S1);
        a.bind(longer);
    }
}
