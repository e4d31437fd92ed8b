//! Control flow: direct exits, the jump cache, polls at back edges.
//!
//! A kick must end every cycle of linked blocks. A cycle has a direct branch backwards, which polls, or an indirect branch, which a
//! kick makes miss the jump cache. In flat 32-bit code three branches forwards may come back by 4 GiB, so those that leave their page poll too.
//! (What falls through goes no further than the last page, which is not translated.)

use doppel_memory::PAGE_MASK;

use super::*;
use crate::blocks::{NARROW_USER, jump_cache_of};

impl Work<'_> {
    /// A load that faults once the engine was kicked; every cycle of linked blocks passes one.
    pub(super) fn poll(&mut self) {
        let a = self.asm();
        a.load(S1, ctx::POLL);
        a.load_mem(S1, S1, 0);
    }

    /// Polls where that is needed, and says where a direct branch leads, from the beginning of the page.
    fn polled_target(&mut self, i: &GuestInstruction) -> i64 {
        if self.may_close_cycle(i) && !self.has_polled() {
            self.poll();
        }
        i.decoded.near_branch64() as i64
    }

    /// A direct branch that no cycle of other direct branches is without.
    pub(super) fn may_close_cycle(&self, i: &GuestInstruction) -> bool {
        let target = i.decoded.near_branch64() as i64;
        let wraps = self.is_narrow() && !self.s.mode.is_placed();
        target <= i64::from(i.offset) || wraps && target > PAGE_MASK as i64
    }

    pub(super) fn jump(&mut self, i: &GuestInstruction) {
        let target = self.polled_target(i);
        self.direct_exit(target);
    }

    pub(super) fn conditional(&mut self, i: &GuestInstruction) {
        let target = self.polled_target(i);
        self.before_own(i);
        if matches!(i.class, Class::Conditional) {
            // iced-x86 counts conditions in the order of their encoding, from 1.
            let cc = i.decoded.condition_code() as u8 - 1;
            self.align_link(2);
            let taken = self.asm().jcc(cc);
            self.exit(target, taken);
        } else {
            self.counted(i, target);
        }
        if self.at + 1 == self.block.instructions.len() {
            self.direct_exit(i64::from(i.offset) + i.decoded.len() as i64);
        } else if self.s.options.count {
            self.count_instructions(self.at + 1);
        }
        if self.at + 1 < self.block.instructions.len() {
            self.count_part(self.at + 1);
        }
    }

    /// LOOP and JRCXZ reach only 127 bytes: the original jumps over a jump.
    pub(super) fn counted(&mut self, i: &GuestInstruction, target: i64) {
        if i.short {
            return self.counted_by_cx(i, target);
        }
        if i.narrow {
            self.r.asm.raw(&[0x67, counted_opcode(i)]); // ECX, not RCX
        } else {
            let from = usize::from(i.offset - self.block.start);
            let opcode = &self.block.bytes[from..from + i.decoded.len() - 1];
            self.r.asm.raw(opcode);
        }
        self.asm().raw(&[2, 0xeb, 0]); // to the next but one; jmp short to the end
        let short = self.asm().pos();
        let taken = self.link_jump();
        self.exit(target, taken);
        self.end_short_jump(short);
    }

    /// The same where CX counts, which 64-bit mode has not: ECX is CX for a moment, and RCX stands in S0. No flag changes.
    fn counted_by_cx(&mut self, i: &GuestInstruction, target: i64) {
        let a = self.asm();
        a.mov(S0, RCX);
        a.movzx16(RCX, RCX);
        a.raw(&[0x67, counted_opcode(i), 2, 0xeb, 0]);
        let short = a.pos();
        a.mov16(S0, RCX);
        a.mov(RCX, S0);
        let taken = self.link_jump();
        self.exit(target, taken);
        self.end_short_jump(short);
        let a = self.asm();
        a.mov16(S0, RCX);
        a.mov(RCX, S0);
    }

    /// A short jump whose displacement ends at `from` leads here.
    fn end_short_jump(&mut self, from: usize) {
        let skip = (self.asm().pos() - from) as u8;
        self.asm().bytes[from - 1] = skip;
    }

    pub(super) fn direct_exit(&mut self, target: i64) {
        self.unpin();
        match self.turn(target) {
            Some(turned) => self.slot_exit(turned),
            None if self.leaves_page(target) => self.slot_exit(target),
            None => {
                let jump = self.link_jump();
                self.exit(target, jump);
            }
        }
    }

    /// On to the instruction after the block, which may be one that straddles the end of the page.
    pub(super) fn fall_through(&mut self, target: i64) {
        if (self.s.base == Base::Dynamic || self.s.shared) && self.block.straddler_follows {
            // A link within the page would outlive a change of the next one.
            self.slot_exit(target);
        } else {
            self.direct_exit(target);
        }
    }

    pub(super) fn exit(&mut self, target: i64, jump: Fixup) {
        if self.leaves_page(target) {
            let stub = Stub::OtherPage(target, self.place, self.pinned);
            self.stubs.push((jump, stub));
        } else if let Some(pinned) = self.pinned {
            let n = self.new_exit(target);
            self.stubs.push((jump, Stub::GiveBack(n, pinned)));
        } else {
            self.leave_exit(target, jump, Some(jump.0 as u32), false);
        }
    }

    /// A link there would assume where another page is, so it goes through a slot. Of a kernel that one CPU alone executes it need not, since
    /// such links are few to cut. (An instruction at the very end of the page may go on in the next.)
    fn leaves_page(&self, target: i64) -> bool {
        match self.s.shared {
            true => !(0..4096 - 14).contains(&target),
            false => self.s.base == Base::Dynamic && !(0..4096).contains(&target),
        }
    }

    /// Has the displacement of a jump that comes next lie where it can be patched while other CPUs execute it.
    pub(super) fn align_link(&mut self, opcode: u64) {
        if self.s.shared {
            self.asm().align_link(opcode);
        }
    }

    /// A jump that can be linked.
    pub(super) fn link_jump(&mut self) -> Fixup {
        self.align_link(1);
        self.asm().jmp()
    }

    /// Makes `page_base` that of a target in another page; the target then counts from there. Blocks that run at one
    /// address only have no need of it. The flags stay as they are.
    fn turn(&mut self, target: i64) -> Option<i64> {
        let by = target & !(PAGE_MASK as i64);
        if self.s.base != Base::Dynamic || by == 0 {
            return None;
        }
        self.guest_address(S0, by);
        self.asm().store(ctx::PAGE_BASE, S0);
        Some(target - by)
    }

    /// An exit to another page: through a slot, which is the CPU's own, and cheap to set back.
    fn slot_exit(&mut self, target: i64) {
        let slot = self.s.slots + self.out.slots as u32;
        self.out.slots += 1;
        self.asm().jmp_gs(ctx::slot(slot));
        let n = self.new_exit(target);
        self.out.exits[n].slot = Some(slot);
        self.slot_stubs.push(n);
    }

    pub(super) fn leave_exit(
        &mut self,
        target: i64,
        jump: Fixup,
        patch: Option<u32>,
        interpret: bool,
    ) {
        let n = self.new_exit(target);
        self.stubs.push((jump, Stub::Leave(n, self.pinned)));
        if interpret && self.recipe != IN_PLACE {
            self.out.lost_at_exits.push((n as u32, self.recipe));
        }
        let exit = &mut self.out.exits[n];
        (exit.patch, exit.interpret) = (patch, interpret);
    }

    /// An exit that leads there with the flags where they are now.
    pub(super) fn new_exit(&mut self, target: i64) -> usize {
        self.out.exits.push(ExitSite {
            target,
            patch: None,
            stub: 0,
            gate: None,
            flags: self.place,
            interpret: false,
            slot: None,
            changes_mode: false,
        });
        self.out.exits.len() - 1
    }

    pub(super) fn interpret(&mut self, i: &GuestInstruction) {
        let jump = self.asm().jmp();
        self.leave_exit(i64::from(i.offset), jump, None, true);
    }

    pub(super) fn exit_stubs(&mut self) {
        let mut stubs = std::mem::take(&mut self.stubs);
        for (jump, stub) in stubs.drain(..) {
            let at = self.asm().pos() as u32;
            self.asm().bind(jump);
            match stub {
                Stub::Lookup { site, cache } => self.lookup_stub(site, cache),
                Stub::Leave(n, pinned) => {
                    self.pinned = pinned;
                    self.leave_stub(n, at);
                }
                Stub::GiveBack(n, pinned) => {
                    self.pinned = Some(pinned);
                    self.unpin();
                    let on = self.link_jump();
                    self.out.exits[n].patch = Some(on.0 as u32);
                    self.asm().bind(on);
                    let at = self.asm().pos() as u32;
                    self.leave_stub(n, at);
                }
                Stub::OtherPage(target, place, pinned) => {
                    self.pinned = pinned;
                    self.unpin();
                    self.place = place;
                    let turned = self.turn(target).unwrap_or(target);
                    self.slot_exit(turned);
                }
            }
        }
        let mut slot_stubs = std::mem::take(&mut self.slot_stubs);
        for n in slot_stubs.drain(..) {
            self.slot_stub(n);
        }
        (self.stubs, self.slot_stubs) = (stubs, slot_stubs);
    }

    /// Leaves to the monitor with an exit.
    fn leave_stub(&mut self, n: usize, at: u32) {
        let id = self.first.exit + n as u32;
        let thunk = self.s.thunks.exit;
        self.unpin();
        self.asm().store_imm32(ctx::EXIT, id);
        self.asm().jmp_to(thunk);
        self.out.exits[n].stub = at;
    }

    /// Goes on in another page without a link where that is possible, else leaves to the monitor.
    fn slot_stub(&mut self, n: usize) {
        let at = self.asm().pos() as u32;
        let exit = &self.out.exits[n];
        let long = self.s.mode == Mode::LONG && self.s.base == Base::Dynamic;
        let (cross, target) = (
            self.s.thunks.cross(exit.flags).filter(|_| long),
            exit.target,
        );
        let Some(cross) = cross else {
            return self.leave_stub(n, at);
        };
        let id = self.first.exit + n as u32;
        let a = self.asm();
        a.mov_imm(S0, target as u64);
        a.store_imm32(ctx::EXIT, id);
        a.jmp_to(cross);
        self.out.exits[n].stub = at;
    }

    pub(super) fn call(&mut self, i: &GuestInstruction) {
        let target = self.polled_target(i);
        self.push_return_address(i);
        self.direct_exit(target);
    }

    pub(super) fn call_indirect(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        if i.decoded.op0_kind() == OpKind::Memory {
            self.branch_target(i);
            self.check_target(i);
            self.asm().store(ctx::SPILL, S0);
        } else {
            // Not through S0, which may reach the stack.
            if self.s.mode.is_placed() {
                self.branch_target(i);
                self.check_target(i);
            }
            let mut r = self.source(i.decoded.op0_register(), S1);
            if i.narrow {
                match i.word {
                    2 => self.asm().movzx16(S1, r),
                    _ => self.asm().mov32(S1, r),
                }
                r = S1;
            }
            self.asm().store(ctx::SPILL, r);
        }
        self.push_return_address(i);
        self.asm().load(S0, ctx::SPILL);
        self.indirect(i);
    }

    pub(super) fn jump_indirect(&mut self, i: &GuestInstruction) {
        self.before_check(i);
        self.branch_target(i);
        self.check_target(i);
        self.indirect(i);
    }

    /// S0 = the target that an indirect branch names.
    pub(super) fn branch_target(&mut self, i: &GuestInstruction) {
        let d = &i.decoded;
        if d.op0_kind() == OpKind::Memory {
            if matches!(i.class, Class::JumpIndirect) {
                let at = self.operand(i, i.word, false);
                self.load_word(i.word, S0, at);
            } else {
                self.linear_address(i, 0, (i.word, false));
                self.check(i, i.word.into(), false);
                self.load_word(i.word, S0, (S0, 0));
            }
            return;
        }
        match self.source(d.op0_register(), S0) {
            S0 => {}
            n if i.word == 2 => self.asm().movzx16(S0, n),
            n => self.mov_word(S0, n),
        }
    }

    /// The register itself, or `scratch` with its value where it lives in memory.
    fn source(&mut self, r: Register, scratch: Reg) -> Reg {
        let n = r.number() as Reg;
        if !is_scratch(r) {
            return n;
        }
        self.asm().load(scratch, ctx::gpr(n));
        scratch
    }

    pub(super) fn ret(&mut self, i: &GuestInstruction) {
        let at = self.operand(i, i.word, false);
        self.before_check(i);
        self.load_word(i.word, S0, at);
        self.check_target(i);
        let extra = if i.decoded.op_count() > 0 {
            i.decoded.immediate16()
        } else {
            0
        };
        self.move_stack(RSP, i32::from(i.word) + i32::from(extra));
        self.indirect(i);
    }

    /// Goes on at the guest address in S0, through the jump cache. The flags are saved here.
    pub(super) fn indirect(&mut self, i: &GuestInstruction) {
        self.indirect_at(jump_cache_of(self.s.privilege, self.s.mode), i);
    }

    /// The same into code of any jump cache.
    pub(super) fn indirect_at(&mut self, number: u8, i: &GuestInstruction) {
        self.unpin();
        let cache = ctx::jump_cache(number);
        let dynamic = number == Privilege::User as u8 || number == NARROW_USER;
        let a = self.asm();
        a.mov32(S1, S0);
        a.and_gs32(S1, ctx::JUMP_MASK);
        a.cmp_indexed4(S0, S1, cache);
        let miss = a.jcc(CC_NE);
        if dynamic {
            a.alu_imm64(Alu::And, S0, -4096);
            a.store(ctx::PAGE_BASE, S0);
        }
        a.jmp_indexed4(S1, cache + 8);
        self.miss(miss, number, i);
    }
}

/// The opcode of a branch on a counter.
fn counted_opcode(i: &GuestInstruction) -> u8 {
    use iced_x86::Mnemonic::*;
    match i.decoded.mnemonic() {
        Loopne => 0xe0,
        Loope => 0xe1,
        Loop => 0xe2,
        _ => 0xe3,
    }
}
