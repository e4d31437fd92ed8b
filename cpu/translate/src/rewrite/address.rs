//! Linear addresses, and the checks that turn them into host addresses.

use super::rebuild::LINEAR;
use super::*;

/// How far an address is shifted right so that the page's number stands where the mask keeps it.
const TO_TLB_INDEX: u8 = (12 - TLB_SLOT_SHIFT) as u8;

/// Bytes of a check, with RORX or without.
pub(crate) const fn check_len(rorx: bool) -> usize {
    if rorx { 42 } else { 43 }
}

impl Work<'_> {
    /// `dst` = linear address of an offset from the block's page.
    pub(super) fn guest_address(&mut self, dst: Reg, offset: i64) {
        match self.s.base {
            Base::Fixed(page) => {
                let at = self.s.mode.cut(page.wrapping_add(offset as u64));
                self.asm().mov_imm(dst, at);
            }
            Base::Dynamic if self.is_narrow() => {
                let a = self.asm();
                a.load32(dst, ctx::PAGE_BASE);
                a.lea32(dst, dst, offset as i32);
            }
            Base::Dynamic => {
                self.asm().load(dst, ctx::PAGE_BASE);
                self.add_constant(dst, offset);
            }
        }
    }

    pub(super) fn add_constant(&mut self, r: Reg, v: i64) {
        match i32::try_from(v) {
            Ok(v) => self.asm().lea(r, r, v),
            // Only S0 comes here, from far RIP-relative operands: they are within 2 GiB and a page.
            Err(_) => {
                let half = (v / 2) as i32;
                self.asm().lea(r, r, half);
                self.asm().lea(r, r, (v - i64::from(half)) as i32);
            }
        }
    }

    /// S0 = the linear address of the memory operand plus a constant, for an access of so many bytes that may write.
    pub(super) fn linear_address(&mut self, i: &GuestInstruction, plus: i64, access: (u8, bool)) {
        let d = moved(&i.decoded, plus);
        if self.is_narrow() {
            self.base_index_address(&d);
            if i.short {
                self.asm().movzx16(S0, S0);
            }
            self.segment(i, d.memory_segment(), access);
        } else {
            self.address(&d, true);
        }
    }

    /// S0 = the address that the memory operand names; with `segment`, the FS or GS base is added (which
    /// destroys the host's flags).
    pub(super) fn address(&mut self, i: &Instruction, segment: bool) {
        if i.is_ip_rel_memory_operand() {
            let offset = i.ip_rel_memory_address() as i64;
            self.guest_address(S0, offset);
            if i.memory_base() == Register::EIP {
                self.asm().mov32(S0, S0);
            }
        } else {
            self.base_index_address(i);
        }
        if segment {
            match i.memory_segment() {
                Register::FS => self.asm().add_gs(S0, ctx::segment_base(4)),
                Register::GS => self.asm().add_gs(S0, ctx::segment_base(5)),
                _ => {}
            }
        }
    }

    pub(super) fn base_index_address(&mut self, i: &Instruction) {
        let (base, index) = (i.memory_base(), i.memory_index());
        let disp = i.memory_displacement64();
        if base == Register::None && index == Register::None {
            let at = if self.is_narrow() {
                disp & 0xffff_ffff
            } else {
                disp
            };
            self.asm().mov_imm(S0, at);
            return;
        }
        for r in [base, index] {
            if r != Register::None && is_scratch(r) {
                let n = if r.full_register() == Register::R10 {
                    S0
                } else {
                    S1
                };
                self.asm().load(n, ctx::gpr(n));
            }
        }
        if index == Register::None && base.size() == 8 {
            let n = base.number() as Reg;
            match disp as i32 {
                0 if n == S0 => {}
                0 => self.mov_word(S0, n),
                d => self.lea_word(S0, n, d),
            }
            return;
        }
        let narrow = self.is_narrow();
        if !narrow && [base, index].into_iter().any(|r| r.size() == 4) {
            return self.short_address(i);
        }
        let number = |r: Register| (r != Register::None).then(|| r.number() as Reg);
        let at = Address {
            base: number(base),
            index: number(index).map(|n| (n, i.memory_index_scale() as u8)),
            disp: disp as i32,
        };
        self.asm().lea_address(!narrow, S0, at);
    }

    /// An address of 32 bits in 64-bit mode.
    fn short_address(&mut self, i: &Instruction) {
        let disp = i.memory_displacement64();
        let mut operand = Instruction::default();
        operand.set_code(Code::Lea_r32_m);
        operand.set_op0_register(Register::R10D);
        operand.set_op1_kind(OpKind::Memory);
        operand.set_memory_base(i.memory_base());
        operand.set_memory_index(i.memory_index());
        operand.set_memory_index_scale(i.memory_index_scale());
        operand.set_memory_displacement64(disp);
        let none = disp == 0 && i.memory_base() != Register::None;
        operand.set_memory_displ_size(if none { 0 } else { 4 });
        self.encode(&operand);
    }

    pub(super) fn encode(&mut self, i: &Instruction) {
        let r = &mut *self.r;
        let ip = r.asm.base + r.asm.bytes.len() as u64;
        let before = r.asm.bytes.len();
        let encoder = r.encoder.get_or_insert_with(|| Encoder::new(64));
        encoder.set_buffer(std::mem::take(&mut r.asm.bytes));
        // Every instruction that comes here was decoded and had only operands replaced by ones that fit.
        let result = encoder.encode(i, ip);
        r.asm.bytes = encoder.take_buffer();
        self.out.encoded += 1;
        if let Err(e) = result {
            debug_assert!(false, "cannot encode {i:?}: {e}");
            self.out.unencodable += 1;
            r.asm.bytes.truncate(before);
            r.asm.bytes.extend_from_slice(&[0x0f, 0x0b]); // ud2: the monitor will interpret the instruction
        }
    }

    /// Where the instruction's own memory access finds its bytes: a register and a displacement. The flags may be destroyed.
    pub(super) fn operand(&mut self, i: &GuestInstruction, size: u8, write: bool) -> (Reg, i32) {
        let window = self.through_window(i);
        let shares = self.s.options.share_checks && window == self.s.mode.window;
        let reference = i.reference.filter(|_| shares);
        let known = reference.and_then(|r| self.known(&r).or_else(|| self.recall(&r)));
        if let Some(known) = known {
            self.out.shared += 1;
            return known;
        }
        if !window {
            self.before_check(i);
        }
        let normal = reference.filter(|_| self.s.form == Form::Normal);
        // To come back to a base is as dear as to work it out anew where there is no check.
        let hold = normal.filter(|_| !window).and_then(|r| self.plan_hold(&r));
        let plan = normal.and_then(|r| {
            let rest = &self.block.instructions[self.at..];
            let held = self.pinned_stretch().or(hold.map(|plan| plan.stretch));
            Some((r, held.or_else(|| share::plan(rest))?))
        });
        let from = plan.map_or(0, |(r, stretch)| r.disp - stretch.low);
        self.own_address(i, -from, (size, write));
        match plan {
            _ if window => self.enter_window(),
            None => self.check(i, size.into(), write),
            Some((_, stretch)) => {
                let part = Part {
                    from: from as u16,
                    size,
                    write,
                    repeats: false,
                };
                let held = self.pinned_stretch().is_some() || hold.is_some();
                let size = (stretch.high - stretch.low) as u16;
                self.check_stretch(i, size, stretch.write, part, held);
            }
        }
        if let Some((r, stretch)) = plan {
            let run = Run::new(&r, stretch);
            self.run = Some(run);
            self.begin_pin(run);
            if let Some(plan) = hold {
                self.begin_hold(run, plan);
            }
        }
        (S0, from as i32)
    }

    /// Where a reference finds its bytes without a check.
    fn known(&self, r: &Reference) -> Option<(Reg, i32)> {
        let in_s0 = self.run.and_then(|run| Some((S0, run.find(r)?)));
        in_s0.or_else(|| {
            let pinned = self.pinned?;
            Some((pinned.register, pinned.run.find(r)?))
        })
    }

    /// S0 = linear address of the instruction's one memory access, explicit or on the stack, plus a constant.
    pub(super) fn own_address(&mut self, i: &GuestInstruction, plus: i64, access: (u8, bool)) {
        match i.class {
            Class::Memory { .. } | Class::JumpIndirect => {
                return self.linear_address(i, plus, access);
            }
            Class::Pop | Class::Return => self.stack_offset(RSP, plus as i32),
            Class::Leave => self.stack_offset(RBP, plus as i32),
            _ => self.stack_offset(RSP, plus as i32 - i32::from(i.word)),
        }
        if self.is_narrow() {
            self.segment(i, Register::SS, access);
        }
    }

    /// S0 (linear) becomes a host address, or the monitor is asked.
    pub(super) fn check(&mut self, i: &GuestInstruction, size: u16, write: bool) {
        let own = Part {
            from: 0,
            size: size as u8,
            write,
            repeats: false,
        };
        self.check_stretch(i, size, write, own, false);
    }

    /// A check for a byte and those behind it in the page, as a repeated string instruction accesses them: S0 as for [`Work::check`].
    pub(super) fn check_rest_of_page(&mut self, i: &GuestInstruction, write: bool) {
        let own = Part {
            from: 0,
            size: 1,
            write,
            repeats: true,
        };
        self.check_stretch(i, 1, write, own, false);
    }

    /// The same for a stretch of which the instruction accesses a part; `held` where its address is kept for others.
    pub(super) fn check_stretch(
        &mut self,
        i: &GuestInstruction,
        size: u16,
        write: bool,
        own: Part,
        held: bool,
    ) {
        self.run = None;
        let tlb = ctx::tlb(self.s.privilege);
        let tag = tlb + Tlb::tag(write) as i32;
        if self.s.options.count {
            // S1 and the host's flags are free here.
            let a = self.asm();
            a.load(S1, ctx::TLB_LOOKUPS);
            a.lea(S1, S1, 1);
            a.store(ctx::TLB_LOOKUPS, S1);
        }
        let retry = self.asm().pos() as u32;
        let rorx = self.s.options.rorx;
        self.out.rorx += u32::from(rorx);
        let a = self.asm();
        let begin = a.pos();
        if rorx {
            a.rorx32(S1, S0, TO_TLB_INDEX);
        } else {
            a.mov32(S1, S0);
            a.shr32(S1, TO_TLB_INDEX);
        }
        a.alu_imm32(Alu::And, S1, TLB_INDEX_MASK);
        a.xor_indexed(S0, S1, tag);
        a.alu_imm64(Alu::Cmp, S0, 4096 - i32::from(size));
        let from = a.jcc(CC_A);
        a.add_indexed(S0, S1, tlb + Tlb::HOST as i32);
        debug_assert_eq!(a.pos() - begin, check_len(rorx));
        let site = self.first.access + self.out.accesses.len() as u32;
        // What is held for others must not be a copy of bytes in two pages: something may be written in between.
        let whole = own.from == 0 && u16::from(own.size) == size && own.write == write;
        let all = own.size == 0;
        let alone = all || whole && !held;
        // An exit that the slow path of a shared check takes once it is linked.
        let careful = (!alone).then(|| self.careful_exit(i));
        self.out.accesses.push(AccessSite {
            offset: i.offset,
            span: size,
            write,
            own,
            careful: careful.map(|n| self.first.exit + n as u32),
            own_operand: matches!(i.class, Class::Memory { .. }),
            retry,
            done: self.r.asm.pos() as u32,
            flags: self.place,
            borrowed: self.borrowed(),
        });
        self.slow.push(SlowJump {
            from,
            tag,
            check: Check {
                privilege: self.s.privilege,
                write,
                alone: alone && matches!(i.class, Class::Memory { .. }),
            },
            done: self.r.asm.pos(),
            site,
            careful,
            pinned: self.pinned,
            // Where other code may follow than what this checks for.
            lost: match all || alone && !write {
                true => Vec::new(),
                false => self.lost.clone(),
            },
        });
    }

    /// The exit to the careful form. What is lost is saved on the way.
    fn careful_exit(&mut self, i: &GuestInstruction) -> usize {
        let n = self.new_exit(i64::from(i.offset));
        if !self.lost.is_empty() {
            self.out.exits[n].flags = FlagPlace::Saved;
        }
        n
    }

    /// A jump to what follows, which linking makes one to the careful form.
    fn careful_gate(&mut self, n: usize, pinned: Option<Pinned>) {
        let gate = self.link_jump();
        if pinned.is_none() {
            self.out.exits[n].patch = Some(gate.0 as u32);
        } else {
            // The careful form has not borrowed anything.
            let open = self.asm().pos() as u32;
            self.pinned = pinned;
            self.unpin();
            let on = self.link_jump();
            self.asm().bind(on);
            self.out.exits[n].patch = Some(on.0 as u32);
            self.out.exits[n].gate = Some((gate.0 as u32, open));
        }
        self.asm().bind(gate);
        self.out.exits[n].stub = self.r.asm.pos() as u32;
    }

    pub(super) fn slow_stubs(&mut self) {
        let thunks = self.s.thunks;
        let mut slow = std::mem::take(&mut self.slow);
        for s in slow.drain(..) {
            self.asm().bind(s.from);
            let linear = !s.lost.is_empty();
            if linear {
                self.asm().xor_indexed(S0, S1, s.tag);
                self.rebuild_beside_s0(&s.lost);
            }
            if let Some(n) = s.careful {
                self.careful_gate(n, s.pinned);
            }
            if linear {
                self.asm().load(S0, LINEAR);
            } else {
                self.asm().xor_indexed(S0, S1, s.tag);
            }
            let thunk = thunks.slow(self.block.simd, s.check);
            let narrow = self.is_narrow();
            let ask = thunks.ask(self.block.simd);
            let a = self.asm();
            a.store_imm32(ctx::SLOW_SITE, s.site);
            if narrow {
                // What follows the last page is the first, which the thunk does not know.
                a.alu_imm32(Alu::Cmp, S0, -4096);
                let last = a.jcc(CC_AE);
                a.bind_to(last, ask);
            }
            a.lea_pos(S1, s.done);
            a.jmp_to(thunk);
        }
        self.slow = slow;
    }
}

/// The instruction with a constant added to the address of its memory operand.
fn moved(d: &Instruction, plus: i64) -> Instruction {
    let mut d = *d;
    let disp = d.memory_displacement64().wrapping_add(plus as u64);
    d.set_memory_displacement64(disp);
    d
}
