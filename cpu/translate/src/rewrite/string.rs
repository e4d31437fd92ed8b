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
const COUNT: i32 = ctx::SPILL + 32;

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
            match i.short {
                true => self.asm().lea16(pointer, pointer, size.into()),
                false => self.lea_word(pointer, pointer, size.into()),
            }
        }
    }

    /// S0 = host address of the element at `pointer`.
    fn pointed(&mut self, i: &GuestInstruction, pointer: Reg, size: u8, write: bool) {
        self.pointer(i, S0, pointer);
        if self.is_segmented() {
            self.segment(i, pointed_segment(i, pointer), (size, write));
        }
        self.check(i, size.into(), write);
    }

    /// `to` = what a register that points, or counts, has in its bits that do.
    fn pointer(&mut self, i: &GuestInstruction, to: Reg, register: Reg) {
        match i.short {
            true => self.asm().movzx16(to, register),
            false => self.mov_word(to, register),
        }
    }

    fn is_segmented(&self) -> bool {
        self.is_narrow() && !self.s.mode.flat
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
        if self.is_segmented() {
            return self.repeat_segmented(i, size, source);
        }
        let again = self.r.asm.pos();
        self.mov_word(S0, RCX);
        self.asm().test64(S0, S0);
        let nothing = self.asm().jcc(CC_E);
        self.asm().store(NOW, S0);
        if source {
            self.mov_word(S0, RSI);
            self.shorten(i, size, false);
            self.asm().store(SOURCE, S0);
        }
        self.mov_word(S0, RDI);
        self.shorten(i, size, true);
        let narrow = self.is_narrow();
        let a = self.asm();
        if narrow {
            // Upper halves go with the first elements, and not before.
            a.mov32(RCX, RCX);
        }
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

    /// The same through segments, at addresses of 32 or 16 bits. Each turn begins anew, with what the registers are by then; their upper bits stay.
    fn repeat_segmented(&mut self, i: &GuestInstruction, size: u8, source: bool) {
        let again = self.r.asm.pos();
        self.pointer(i, S0, RCX);
        let a = self.asm();
        a.test64(S0, S0);
        let nothing = a.jcc(CC_E);
        a.store(NOW, S0);
        if source {
            self.stretch(i, RSI, size, false);
            self.shorten(i, size, false);
            self.asm().store(SOURCE, S0);
        }
        self.stretch(i, RDI, size, true);
        self.shorten(i, size, true);
        let pointers = [(RDI, NEXT_RDI), (RSI, NEXT_RSI)];
        let pointers = &pointers[..1 + usize::from(source)];
        let a = self.asm();
        a.store(COUNT, RCX);
        for (r, slot) in pointers {
            a.store(*slot, *r);
        }
        a.load(RCX, NOW);
        if source {
            a.load(RSI, SOURCE);
        }
        a.mov(RDI, S0);
        if size == 2 {
            a.raw(&[0x66]);
        }
        let opcode = if source { 0xa4 } else { 0xaa };
        a.raw(&[0xf3, opcode | u8::from(size > 1)]);
        a.load(RCX, COUNT);
        a.load(S1, NOW);
        for (r, slot) in pointers {
            a.load(*r, *slot);
            a.lea_index(S0, *r, S1, size);
            set_pointer(a, i.short, *r);
        }
        a.mov(S0, RCX);
        a.sub64(S0, S1);
        set_pointer(a, i.short, RCX);
        self.poll();
        let more = self.asm().jmp();
        let a = self.asm();
        a.bind_at(more, again);
        a.bind(nothing);
    }

    /// S0 = linear address of the elements of this turn, if all of them lie within the segment and below where the pointer wraps.
    fn stretch(&mut self, i: &GuestInstruction, pointer: Reg, size: u8, write: bool) {
        let segment = pointed_segment(i, pointer);
        let n = segment.number() as u8;
        self.pointer(i, S0, pointer);
        let a = self.asm();
        a.load(S1, NOW);
        a.lea_index(S1, S0, S1, size);
        a.lea(S1, S1, -1);
        a.cmp_gs(S1, ctx::segment_end(n, write));
        self.leave_if(CC_G, i);
        if i.short {
            self.asm().alu_imm64(Alu::Cmp, S1, 0xffff);
            self.leave_if(CC_A, i);
        }
        self.asm().add_gs32(S0, ctx::segment_base(n));
    }

    /// S0, a linear address, becomes a host address; NOW becomes the number of elements that fit into its page, if that is less.
    fn shorten(&mut self, i: &GuestInstruction, size: u8, write: bool) {
        self.check_rest_of_page(i, write);
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

/// The register becomes S0, in its bits that point or count.
fn set_pointer(a: &mut Asm, short: bool, register: Reg) {
    match short {
        true => a.mov16(register, S0),
        false => a.mov32(register, S0),
    }
}

/// The segment of what a register points to.
fn pointed_segment(i: &GuestInstruction, pointer: Reg) -> Register {
    match (pointer, i.decoded.segment_prefix()) {
        (RDI, _) => Register::ES,
        (_, Register::None) => Register::DS,
        (_, segment) => segment,
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
