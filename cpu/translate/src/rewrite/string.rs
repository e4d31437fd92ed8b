//! String instructions: REP MOVS and REP STOS page by page, and those without a prefix.
//!
//! Of a repeated one the processor's own instruction runs on host addresses, over as many elements as fit into the page on either side; then
//! the guest's registers move on and it goes round again, as if an interrupt had come in between, which it may. Downwards (DF set) and
//! where an element straddles two pages the interpreter takes over. One without a prefix is a move or a comparison on one or two
//! host addresses, and a step of the registers that point (i386's kernel compares strings by LODSB and SCASB).

use super::*;

/// Elements of this turn.
const NOW: i32 = ctx::SPILL;
const SOURCE: i32 = ctx::SPILL + 8;
const NEXT_RSI: i32 = ctx::SPILL + 16;
const NEXT_RDI: i32 = ctx::SPILL + 24;

/// Opcodes of moves from memory and to it, and of comparisons of a register with memory and the reverse, for bytes; the next ones are
/// for larger operands.
const FROM_MEMORY: u8 = 0x8a;
const TO_MEMORY: u8 = 0x88;
const COMPARE: u8 = 0x3a;
const COMPARE_MEMORY: u8 = 0x38;

impl Work<'_> {
    /// A string instruction without a prefix. Nothing of the guest's changes before the last check.
    pub(super) fn element(&mut self, i: &GuestInstruction, size: u8, element: Element) {
        self.before_check(i);
        self.asm().test_gs_imm32(ctx::RFLAGS, DF);
        self.leave_if(CC_NE, i);
        let (first, last) = element.pointers();
        if let Some(first) = first {
            self.pointed(i, first, size, false);
            self.at_s0(FROM_MEMORY, S1, size);
            self.asm().store(ctx::SPILL, S1);
        }
        self.pointed(i, last, size, element.writes());
        self.before_own(i);
        let value = if first.is_some() { S1 } else { RAX };
        if first.is_some() {
            self.asm().load(S1, ctx::SPILL);
        }
        self.at_s0(element.opcode(), value, size);
        self.after_own(i);
        for pointer in first.into_iter().chain([last]) {
            self.lea_word(pointer, pointer, size.into());
        }
    }

    /// S0 = host address of the element at `pointer`.
    fn pointed(&mut self, i: &GuestInstruction, pointer: Reg, size: u8, write: bool) {
        self.mov_word(S0, pointer);
        self.check(i, size.into(), write);
    }

    /// One of the instructions above with a register and `[S0]`. The flags stay unless it is a comparison.
    fn at_s0(&mut self, opcode: u8, register: Reg, size: u8) {
        if size == 2 {
            self.asm().raw(&[0x66]);
        }
        let rex = 0x40 | u8::from(size == 8) << 3 | register >> 3 << 2 | S0 >> 3;
        let opcode = opcode | u8::from(size > 1);
        let modrm = (register & 7) << 3 | (S0 & 7);
        self.asm().raw(&[rex, opcode, modrm]);
    }

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

impl Element {
    /// The register whose element is read first, where there are two, and the one that is accessed last. Where both elements of a
    /// comparison fault, processors name the destination.
    fn pointers(self) -> (Option<Reg>, Reg) {
        match self {
            Element::Load => (None, RSI),
            Element::Store | Element::Scan => (None, RDI),
            Element::Move => (Some(RSI), RDI),
            Element::Compare => (Some(RDI), RSI),
        }
    }

    fn writes(self) -> bool {
        matches!(self, Element::Store | Element::Move)
    }

    /// What is done at the last address that was checked.
    fn opcode(self) -> u8 {
        match self {
            Element::Load => FROM_MEMORY,
            Element::Store | Element::Move => TO_MEMORY,
            Element::Scan => COMPARE,
            Element::Compare => COMPARE_MEMORY,
        }
    }
}
