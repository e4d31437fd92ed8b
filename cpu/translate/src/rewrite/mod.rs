//! From a decoded block to host code: what is copied, what is rewritten, and how.
//!
//! Problem: guest and host are the same ISA, but a guest address is not a host address, control must not leave the cache, and
//! the machine's state is not the host's.
//! Idea: everything that names neither is emitted as it is. A memory operand is computed into S0, checked against the
//! software TLB and replaced by `[S0]`. Branches become jumps to other blocks. What remains ends the block and is interpreted.
//! Invariant: up to the point where the guest's own instruction runs, nothing of the guest's state has changed: a check
//! that fails, a fault that the processor raises and a kick at a back edge all find the state of the instruction's beginning,
//! and the monitor starts it again, translated or interpreted.
//! S0 and S1 are r10 and r11; the guest's values of these two live in their slots.

mod control;
mod share;
mod stack;
mod string;
mod system;

use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

use doppel_memory::{Privilege, TLB_ENTRIES, TLB_ENTRY_SHIFT, TlbEntry};

use crate::asm::*;
use crate::blocks::Form;
use crate::context as ctx;
use crate::flags::FlagPlace;
use crate::frontend::{Class, GuestBlock, GuestInstruction};
use crate::thunk::{Thunks, load_simd};
use share::Run;

/// What `rip` is relative to in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Base {
    /// The block runs at this linear page only (kernel code): addresses are constants.
    Fixed(u64),
    /// The linear page stands in the context (user code, shared by processes at different addresses).
    Dynamic,
}

/// What a block's code depends on besides its bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setting {
    pub base: Base,
    pub form: Form,
    /// Index of the TLB and of the jump cache: [`doppel_memory::Privilege`].
    pub privilege: u8,
    pub count: bool,
    pub share_checks: bool,
    /// Host address of the first slot that is free.
    pub slots: u64,
    pub thunks: Thunks,
}

/// A way out of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExitSite {
    /// Where it goes, relative to the block's page.
    pub target: i64,
    /// Position of the displacement that linking patches; `None` where the exit is never linked.
    pub patch: Option<u32>,
    /// Position of the code that leaves to the monitor.
    pub stub: u32,
    pub flags: FlagPlace,
    /// The instruction at the target is to be interpreted.
    pub interpret: bool,
    /// It jumps through this slot (host address), and has turned the page when it does: `target` counts from the new page.
    pub slot: Option<u64>,
    /// The next block is of another privilege (EFLAGS.AC changed); which, is known from this one.
    pub changes_mode: bool,
}

/// A TLB check.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AccessSite {
    /// Offset of the guest instruction in its page.
    pub offset: u16,
    /// What the check is for, from the address that it was given on.
    pub span: u16,
    pub write: bool,
    /// What the instruction itself accesses: so far from that address, and so many bytes.
    pub own: Part,
    /// The exit to the careful form, where others share the check.
    pub careful: Option<u32>,
    /// It is the explicit memory operand of an ordinary instruction.
    pub own_operand: bool,
    /// Position of the check.
    pub retry: u32,
    /// Position behind the check, where S0 is a host address.
    pub done: u32,
    pub flags: FlagPlace,
}

/// A part of the bytes that a check is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub from: u16,
    pub size: u8,
    pub write: bool,
}

/// From here on, host code belongs to this guest instruction and its flags are there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boundary {
    pub host: u32,
    pub guest: u16,
    pub flags: FlagPlace,
}

/// The outcome of translating one block. Positions are relative to its first byte.
#[derive(Default, Debug)]
pub(crate) struct Translated {
    pub entry_registers: u32,
    pub entry_saved: u32,
    /// Where blocks enter that have the vector state loaded: past the question for it (see `thunk`).
    pub entry_simd: u32,
    /// It uses the vector state.
    pub simd: bool,
    pub exits: Vec<ExitSite>,
    pub accesses: Vec<AccessSite>,
    /// Slots taken.
    pub slots: usize,
    /// Instructions that could not be encoded with another operand, so that they are interpreted.
    pub unencodable: u32,
    /// Accesses that needed no check of their own.
    pub shared: u32,
    pub boundaries: Vec<Boundary>,
}

/// Numbers of the first exit and access site of the block that is about to be translated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FirstSites {
    pub exit: u32,
    pub access: u32,
}

struct SlowJump {
    from: Fixup,
    tag: i32,
    write: bool,
    /// Position behind the check.
    done: usize,
    site: u32,
    /// Index of the exit to the careful form.
    careful: Option<usize>,
}

/// Translates blocks; keeps its buffers from one to the next.
pub(crate) struct Rewriter {
    pub asm: Asm,
    encoder: Encoder,
    info: InstructionInfoFactory,
}

impl Rewriter {
    pub fn new() -> Self {
        Rewriter {
            asm: Asm::default(),
            encoder: Encoder::new(64),
            info: InstructionInfoFactory::new(),
        }
    }

    pub fn info(&mut self) -> &mut InstructionInfoFactory {
        &mut self.info
    }

    /// Translates `block` for the host address `base`; the code is left in `self.asm`.
    pub fn translate(
        &mut self,
        block: &GuestBlock,
        setting: Setting,
        base: u64,
        first: FirstSites,
    ) -> Translated {
        self.asm.reset(base);
        let mut work = Work {
            r: self,
            block,
            s: setting,
            first,
            out: Translated::default(),
            place: FlagPlace::Saved,
            slow: Vec::new(),
            simd_missing: None,
            run: None,
            at: 0,
            stubs: Vec::new(),
            slot_stubs: Vec::new(),
        };
        work.run();
        work.out
    }
}

struct Work<'a> {
    r: &'a mut Rewriter,
    block: &'a GuestBlock,
    s: Setting,
    first: FirstSites,
    out: Translated,
    place: FlagPlace,
    slow: Vec<SlowJump>,
    simd_missing: Option<Fixup>,
    /// What S0 reaches (see `share`).
    run: Option<Run>,
    /// Which instruction is being translated.
    at: usize,
    /// Jumps to the exit stubs, which are emitted last.
    stubs: Vec<(Fixup, Stub)>,
    /// Exits through slots whose code to leave is still to be emitted.
    slot_stubs: Vec<usize>,
}

#[derive(Clone, Copy)]
enum Stub {
    /// Leaves to the monitor with this exit.
    Leave(usize),
    /// Goes on at this offset from the page, which is in another page.
    OtherPage(i64, FlagPlace),
}

const IF: i32 = 1 << 9;
const DF: i32 = 1 << 10;
const AC: i32 = 1 << 18;
const RF_VM: i32 = 3 << 16;
const ARITHMETIC: i32 = 0x8d5;
/// What an address shifted to entries of the TLB is masked with.
pub(crate) const TLB_INDEX_MASK: i32 = ((TLB_ENTRIES - 1) << TLB_ENTRY_SHIFT) as i32;

fn is_scratch(r: Register) -> bool {
    matches!(r.full_register(), Register::R10 | Register::R11)
}

impl Work<'_> {
    fn asm(&mut self) -> &mut Asm {
        &mut self.r.asm
    }

    fn run(&mut self) {
        self.entries();
        self.need_simd();
        if self.s.count {
            self.count_block();
        }
        let block = self.block;
        for (at, i) in block.instructions.iter().enumerate() {
            self.at = at;
            self.boundary(i);
            self.instruction(i);
            self.run = self.run.take().and_then(|run| run.after(i));
        }
        if block
            .instructions
            .last()
            .is_some_and(|last| !last.class.ends_block())
        {
            self.fall_through(i64::from(block.end));
        }
        self.exit_stubs();
        self.slow_stubs();
        self.simd_stub();
    }

    /// Asks for the vector state at the start of a block that uses it. The flags are saved or dead here.
    fn need_simd(&mut self) {
        self.out.simd = self.block.simd;
        if self.block.simd {
            let a = self.asm();
            a.alu_gs_imm32(Alu::Cmp, ctx::SIMD_LIVE, 0);
            self.simd_missing = Some(a.jcc(CC_E));
        }
        // A block that does not use it is entered as ever: what stands here may be beyond the conversion of the flags.
        self.out.entry_simd = if self.block.simd {
            self.r.asm.pos() as u32
        } else {
            self.out.entry_saved
        };
    }

    fn simd_stub(&mut self) {
        let Some(missing) = self.simd_missing.take() else {
            return;
        };
        let back = self.out.entry_simd as usize;
        let a = self.asm();
        a.bind(missing);
        a.mov(S0, RAX);
        a.mov(S1, RDX);
        load_simd(a);
        a.mov(RAX, S0);
        a.mov(RDX, S1);
        let again = a.jmp();
        a.bind_at(again, back);
    }

    /// Emits the conversions that the block's two entries need; see `flags`.
    fn entries(&mut self) {
        match self.preferred() {
            None => self.place = FlagPlace::Registers,
            Some(FlagPlace::Saved) => {
                self.save_flags();
                self.out.entry_saved = self.asm().pos() as u32;
                self.place = FlagPlace::Saved;
            }
            Some(FlagPlace::Registers) => {
                self.restore_flags();
                self.out.entry_registers = self.asm().pos() as u32;
                self.place = FlagPlace::Registers;
            }
        }
    }

    /// Which place the first flag event wants; `None` where the flags are overwritten first.
    fn preferred(&self) -> Option<FlagPlace> {
        let first = self.block.instructions.first()?;
        if self.block.simd && first.live_before != 0 {
            return Some(FlagPlace::Saved);
        }
        for i in &self.block.instructions {
            if i.live_before == 0 {
                return None;
            }
            if i.class.checks() || i.class == Class::Interpret {
                return Some(FlagPlace::Saved);
            }
            if i.flags.needs_registers(i.live_after) {
                return Some(FlagPlace::Registers);
            }
        }
        Some(FlagPlace::Saved)
    }

    fn count_block(&mut self) {
        self.add_to(ctx::BLOCKS_RUN, 1);
        self.count_instructions();
    }

    /// Counts the instructions up to the next branch.
    fn count_instructions(&mut self) {
        let rest = &self.block.instructions[self.at..];
        let rest = if self.at == 0 { rest } else { &rest[1..] };
        let to_branch = rest.iter().position(|i| i.class == Class::Conditional);
        let n = to_branch.map_or(rest.len(), |n| n + 1);
        self.add_to(ctx::INSTRUCTIONS_RUN, n as i32);
    }

    fn add_to(&mut self, counter: i32, by: i32) {
        self.run = None;
        let a = self.asm();
        a.load(S0, counter);
        a.lea(S0, S0, by);
        a.store(counter, S0);
    }

    fn boundary(&mut self, i: &GuestInstruction) {
        let host = self.r.asm.pos() as u32;
        self.out.boundaries.push(Boundary {
            host,
            guest: i.offset,
            flags: self.place,
        });
    }

    /// As its reverse, this uses S1, since S0 may hold a host address.
    fn save_flags(&mut self) {
        let a = self.asm();
        a.mov(S1, RAX);
        a.flags_to_ax();
        a.store32(ctx::FLAGS, RAX);
        a.mov(RAX, S1);
    }

    fn restore_flags(&mut self) {
        let a = self.asm();
        a.mov(S1, RAX);
        a.load32(RAX, ctx::FLAGS);
        a.flags_from_ax();
        a.mov(RAX, S1);
    }

    /// Before code that destroys the host's flags.
    fn before_check(&mut self, i: &GuestInstruction) {
        if i.live_before != 0 && self.place == FlagPlace::Registers {
            self.save_flags();
            self.place = FlagPlace::Saved;
            self.boundary(i);
        }
    }

    /// Before the guest's own instruction runs.
    fn before_own(&mut self, i: &GuestInstruction) {
        if self.place == FlagPlace::Saved && i.flags.needs_registers(i.live_after) {
            self.restore_flags();
            self.place = FlagPlace::Registers;
        }
    }

    /// After the guest's own instruction ran.
    fn after_own(&mut self, i: &GuestInstruction) {
        if i.flags.writes != 0 {
            self.place = FlagPlace::Registers;
        }
    }

    fn instruction(&mut self, i: &GuestInstruction) {
        match i.class {
            Class::Copy => self.copy(i),
            Class::Memory { size, write } => self.memory(i, size, write),
            Class::BitString => self.bit_string(i),
            Class::Lea => self.lea(i),
            Class::Nothing => {}
            Class::Push => self.push(i),
            Class::Pop => self.pop(i),
            Class::Leave => self.leave(i),
            Class::Jump => self.jump(i),
            Class::JumpIndirect => self.jump_indirect(i),
            Class::Conditional | Class::Counted => self.conditional(i),
            Class::Call => self.call(i),
            Class::CallIndirect => self.call_indirect(i),
            Class::Return => self.ret(i),
            Class::Swapgs => self.swapgs(),
            Class::Rdtsc => self.rdtsc(i),
            Class::Rdpid => self.rdpid(i),
            Class::ReadSelector => self.read_selector(i),
            Class::SegmentBase { segment, write } => self.segment_base(i, segment, write),
            Class::Syscall => self.syscall(i),
            Class::Sysret => self.sysret(i),
            Class::Serialize => self.asm().raw(&[0x0f, 0xae, 0xf0]), // mfence
            Class::Cli => self.cli(i),
            Class::Sti => self.sti(i),
            Class::AlignmentFlag => self.alignment_flag(i),
            Class::Pushf => self.pushf(i),
            Class::Popf => self.popf(i),
            Class::Repeat { size, source } => self.repeat(i, size, source),
            Class::Interpret => self.interpret(i),
        }
    }

    // ---- instructions without memory ----

    fn copy(&mut self, i: &GuestInstruction) {
        self.before_own(i);
        let scratch = self.scratch_use(&i.decoded);
        for (r, access) in scratch.into_iter().flatten() {
            if access != Use::WritesAll {
                self.asm().load(r, ctx::gpr(r));
            }
        }
        let from = usize::from(i.offset - self.block.start);
        let bytes = &self.block.bytes[from..from + i.decoded.len()];
        self.r.asm.raw(bytes);
        for (r, access) in scratch.into_iter().flatten() {
            if access != Use::Reads {
                self.asm().store(ctx::gpr(r), r);
            }
        }
        self.after_own(i);
    }

    /// How the instruction uses r10 and r11.
    fn scratch_use(&mut self, i: &Instruction) -> [Option<(Reg, Use)>; 2] {
        let mut found = [None, None];
        if !(0..i.op_count())
            .any(|op| i.op_kind(op) == OpKind::Register && is_scratch(i.op_register(op)))
        {
            return found;
        }
        for used in self.r.info.info(i).used_registers() {
            let r = used.register();
            if !is_scratch(r) {
                continue;
            }
            let n = if r.full_register() == Register::R10 {
                S0
            } else {
                S1
            };
            let this = Use::of(used.access(), r.size());
            let slot = &mut found[usize::from(n - S0)];
            *slot = Some((n, slot.map_or(this, |(_, before)| this.and(before))));
        }
        found
    }

    fn lea(&mut self, i: &GuestInstruction) {
        let d = &i.decoded;
        if plain_lea(d) {
            return self.copy(i);
        }
        self.address(d, false);
        let to = d.op0_register();
        if is_scratch(to) {
            let n = if to.full_register() == Register::R10 {
                S0
            } else {
                S1
            };
            match to.size() {
                8 => self.asm().store(ctx::gpr(n), S0),
                4 => {
                    let a = self.asm();
                    a.mov32(S0, S0);
                    a.store(ctx::gpr(n), S0);
                }
                _ => self.asm().store16(ctx::gpr(n), S0),
            }
            return;
        }
        let n = to.number() as Reg;
        match to.size() {
            8 => self.asm().mov(n, S0),
            4 => self.asm().mov32(n, S0),
            _ => self.mov16(n, S0),
        }
    }

    fn mov16(&mut self, dst: Reg, src: Reg) {
        let rex = 0x40 | (src >> 3) << 2 | dst >> 3;
        self.asm()
            .raw(&[0x66, rex, 0x89, 0xc0 | (src & 7) << 3 | (dst & 7)]);
    }

    fn swapgs(&mut self) {
        let base = ctx::segment_base(5);
        let a = self.asm();
        a.load(S0, base);
        a.load(S1, ctx::KERNEL_GS_BASE);
        a.store(base, S1);
        a.store(ctx::KERNEL_GS_BASE, S0);
    }

    // ---- addresses and checks ----

    /// `dst` = linear address of an offset from the block's page.
    fn guest_address(&mut self, dst: Reg, offset: i64) {
        match self.s.base {
            Base::Fixed(page) => self.asm().mov_imm(dst, page.wrapping_add(offset as u64)),
            Base::Dynamic => {
                self.asm().load(dst, ctx::PAGE_BASE);
                self.add_constant(dst, offset);
            }
        }
    }

    fn add_constant(&mut self, r: Reg, v: i64) {
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

    /// S0 = the address that the memory operand names; with `segment`, the FS or GS base is added (which
    /// destroys the host's flags).
    fn address(&mut self, i: &Instruction, segment: bool) {
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

    fn base_index_address(&mut self, i: &Instruction) {
        let (base, index) = (i.memory_base(), i.memory_index());
        let disp = i.memory_displacement64();
        if base == Register::None && index == Register::None {
            self.asm().mov_imm(S0, disp);
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
                0 => self.asm().mov(S0, n),
                d => self.asm().lea(S0, n, d),
            }
            return;
        }
        let code = if base.size() == 4 || index.size() == 4 {
            Code::Lea_r32_m
        } else {
            Code::Lea_r64_m
        };
        let mut operand = Instruction::default();
        operand.set_code(code);
        operand.set_op0_register(if code == Code::Lea_r32_m {
            Register::R10D
        } else {
            Register::R10
        });
        operand.set_op1_kind(OpKind::Memory);
        operand.set_memory_base(base);
        operand.set_memory_index(index);
        operand.set_memory_index_scale(i.memory_index_scale());
        operand.set_memory_displacement64(disp);
        operand.set_memory_displ_size(match (disp, code) {
            (0, _) if base != Register::None => 0,
            (_, Code::Lea_r32_m) => 4,
            _ => 8,
        });
        self.encode(&operand);
    }

    fn encode(&mut self, i: &Instruction) {
        let r = &mut *self.r;
        let ip = r.asm.base + r.asm.bytes.len() as u64;
        let mut buffer = std::mem::take(&mut r.asm.bytes);
        r.encoder.set_buffer(Vec::new());
        // Every instruction that comes here was decoded and had only operands replaced by ones that fit.
        match r.encoder.encode(i, ip) {
            Ok(_) => buffer.append(&mut r.encoder.take_buffer()),
            Err(e) => {
                debug_assert!(false, "cannot encode {i:?}: {e}");
                self.out.unencodable += 1;
                buffer.extend_from_slice(&[0x0f, 0x0b]); // ud2: the monitor will interpret the instruction
            }
        }
        r.asm.bytes = buffer;
    }

    /// Where the instruction's own memory access finds its bytes: displacement from S0. The flags may be destroyed.
    fn operand(&mut self, i: &GuestInstruction, size: u8, write: bool) -> i32 {
        let reference = share::reference(i).filter(|_| self.s.share_checks);
        if let (Some(run), Some(r)) = (&self.run, &reference)
            && let Some(disp) = run.find(r)
        {
            self.out.shared += 1;
            return disp;
        }
        self.before_check(i);
        let plan = reference.and_then(|r| {
            let stretch = share::plan(&self.block.instructions[self.at..])?;
            (self.s.form == Form::Normal).then_some((r, stretch))
        });
        let Some((r, stretch)) = plan else {
            self.own_address(i, 0);
            self.check(i, size.into(), write);
            return 0;
        };
        let from = r.disp - stretch.low;
        self.own_address(i, -from);
        let part = Part {
            from: from as u16,
            size,
            write,
        };
        self.check_stretch(i, (stretch.high - stretch.low) as u16, stretch.write, part);
        self.run = Some(Run::new(&r, stretch));
        from as i32
    }

    /// S0 = linear address of the instruction's one memory access, explicit or on the stack, plus a constant.
    fn own_address(&mut self, i: &GuestInstruction, plus: i64) {
        let d = &i.decoded;
        match i.class {
            Class::Memory { .. } | Class::JumpIndirect => self.address(&moved(d, plus), true),
            Class::Pop | Class::Return => self.asm().lea(S0, RSP, plus as i32),
            Class::Leave => self.asm().lea(S0, RBP, plus as i32),
            _ => self.asm().lea(S0, RSP, plus as i32 - 8),
        }
    }

    /// S0 (linear) becomes a host address, or the monitor is asked.
    fn check(&mut self, i: &GuestInstruction, size: u16, write: bool) {
        let own = Part {
            from: 0,
            size: size as u8,
            write,
        };
        self.check_stretch(i, size, write, own);
    }

    /// The same for a stretch of which the instruction accesses a part.
    fn check_stretch(&mut self, i: &GuestInstruction, size: u16, write: bool, own: Part) {
        self.run = None;
        let tlb = ctx::tlb(self.s.privilege);
        let tag = tlb + TlbEntry::tag(write) as i32;
        let retry = self.asm().pos() as u32;
        let a = self.asm();
        a.mov32(S1, S0);
        a.shr32(S1, (12 - TLB_ENTRY_SHIFT) as u8);
        a.alu_imm32(Alu::And, S1, TLB_INDEX_MASK);
        a.xor_indexed(S0, S1, tag);
        a.alu_imm64(Alu::Cmp, S0, 4096 - i32::from(size));
        let from = a.jcc(CC_A);
        a.add_indexed(S0, S1, tlb + TlbEntry::HOST as i32);
        let site = self.first.access + self.out.accesses.len() as u32;
        let alone = own.from == 0 && u16::from(own.size) == size && own.write == write;
        let careful = (!alone).then_some(self.out.exits.len());
        if !alone {
            self.careful_exit(i);
        }
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
        });
        self.slow.push(SlowJump {
            from,
            tag,
            write,
            done: self.r.asm.pos(),
            site,
            careful,
        });
    }

    /// An exit that the slow path of a shared check takes once it is linked.
    fn careful_exit(&mut self, i: &GuestInstruction) {
        self.out.exits.push(ExitSite {
            target: i64::from(i.offset),
            patch: None,
            stub: 0,
            flags: self.place,
            interpret: false,
            slot: None,
            changes_mode: false,
        });
    }

    fn slow_stubs(&mut self) {
        let thunks = self.s.thunks;
        for s in std::mem::take(&mut self.slow) {
            self.asm().bind(s.from);
            if let Some(n) = s.careful {
                self.asm().align_displacement(1);
                let patched = self.asm().jmp();
                self.asm().bind(patched);
                self.out.exits[n].patch = Some(patched.0 as u32);
                self.out.exits[n].stub = self.r.asm.pos() as u32;
            }
            let thunk = thunks.slow(self.block.simd, self.s.privilege, s.write);
            let a = self.asm();
            a.xor_indexed(S0, S1, s.tag);
            a.store_imm32(ctx::SLOW_SITE, s.site);
            a.lea_pos(S1, s.done);
            a.jmp_to(thunk);
        }
    }

    // ---- instructions with memory ----

    fn memory(&mut self, i: &GuestInstruction, size: u8, write: bool) {
        let disp = if self.s.form == Form::TwoPages {
            self.before_check(i);
            self.asm().load(S0, ctx::SLOW_LINEAR);
            0
        } else {
            self.operand(i, size, write)
        };
        self.before_own(i);
        let mut own = i.decoded;
        let operand = self.replace_scratch_operand(&mut own);
        if let Some((n, access)) = operand
            && access != Use::WritesAll
        {
            self.asm().load(S1, ctx::gpr(n));
        }
        self.emit_with_host_address(&mut own, disp);
        if let Some((n, access)) = operand
            && access != Use::Reads
        {
            self.asm().store(ctx::gpr(n), S1);
        }
        if self.s.form == Form::TwoPages {
            self.copy_out();
        }
        self.after_own(i);
    }

    /// Moves what the instruction has written at `bounce` to the two pages where it belongs. No flag changes.
    fn copy_out(&mut self) {
        let saved = [
            (RCX, ctx::SPILL),
            (RSI, ctx::SPILL + 8),
            (RDI, ctx::SPILL + 16),
        ];
        let a = self.asm();
        for (r, slot) in saved {
            a.store(slot, r);
        }
        a.load(RSI, ctx::SLOW_LINEAR);
        for part in 0..2 {
            a.load(RDI, ctx::COPY_TO + 8 * part);
            a.load(RCX, ctx::COPY_LEN + 8 * part);
            a.raw(&[0xf3, 0xa4]); // rep movsb
        }
        for (r, slot) in saved {
            a.load(r, slot);
        }
    }

    /// A register operand r10 or r11 becomes S1; tells which it was and how it is used.
    fn replace_scratch_operand(&mut self, own: &mut Instruction) -> Option<(Reg, Use)> {
        let mut found: Option<(Reg, Use)> = None;
        for op in 0..own.op_count() {
            if own.op_kind(op) != OpKind::Register || !is_scratch(own.op_register(op)) {
                continue;
            }
            let r = own.op_register(op);
            let n = if r.full_register() == Register::R10 {
                S0
            } else {
                S1
            };
            let access = Use::of(self.r.info.info(own).op_access(op), r.size());
            found = Some((n, found.map_or(access, |(_, before)| access.and(before))));
            own.set_op_register(op, scratch_one(r));
        }
        found
    }

    /// Emits the instruction with `[S0 + disp]` for its memory operand.
    fn emit_with_host_address(&mut self, own: &mut Instruction, disp: i32) {
        explicit_form(own);
        if !(0..own.op_count())
            .any(|op| own.op_kind(op) == OpKind::Register && is_high_byte(own.op_register(op)))
        {
            set_host_operand(own, Register::R10, disp);
            self.encode(own);
            return;
        }
        // AH to BH cannot be named together with S0, which needs a REX prefix: RBP stands in for it.
        self.asm().store(ctx::SPILL, RBP);
        self.asm().mov(RBP, S0);
        set_host_operand(own, Register::RBP, disp);
        self.encode(own);
        self.asm().load(RBP, ctx::SPILL);
    }

    /// `bt m, r` and its family: the register is a signed bit offset from the operand's address.
    fn bit_string(&mut self, i: &GuestInstruction) {
        let d = &i.decoded;
        let bit = d.op1_register();
        let n = bit.full_register().number() as Reg;
        self.before_check(i);
        self.address(d, true);
        let shift = match bit.size() {
            8 => 6,
            4 => 5,
            _ => 4,
        };
        let a = self.asm();
        match bit.size() {
            8 => a.mov(S1, n),
            4 => a.raw(&[0x4c | n >> 3, 0x63, 0xc0 | (S1 & 7) << 3 | (n & 7)]), // movsxd
            _ => a.raw(&[0x4c | n >> 3, 0x0f, 0xbf, 0xc0 | (S1 & 7) << 3 | (n & 7)]), // movsx
        }
        a.sar64(S1, shift);
        let scale = bit.size().trailing_zeros() as u8;
        a.shl64(S1, scale);
        a.add64(S0, S1);
        let write = d.mnemonic() != iced_x86::Mnemonic::Bt;
        self.check(i, bit.size() as u16, write);
        // Flags first: the mask destroys them, so it goes through the spill slot's copy in S1.
        let bits = bit.size() as i32 * 8 - 1;
        self.asm().mov(S1, n);
        self.asm().alu_imm32(Alu::And, S1, bits);
        if self.place == FlagPlace::Saved && i.flags.needs_registers(i.live_after) {
            self.asm().store(ctx::SPILL, S1);
            self.restore_flags();
            self.asm().load(S1, ctx::SPILL);
            self.place = FlagPlace::Registers;
        }
        let mut own = *d;
        own.set_op1_register(scratch_one(bit));
        set_host_operand(&mut own, Register::R10, 0);
        self.encode(&own);
        self.after_own(i);
    }

    /// Leaves to the interpreter on a condition.
    fn leave_if(&mut self, cc: u8, i: &GuestInstruction) {
        let jump = self.asm().jcc(cc);
        self.leave_exit(i64::from(i.offset), jump, None, true);
    }
}

/// How an instruction uses a register that lives in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Use {
    Reads,
    /// The whole register is written without being read.
    WritesAll,
    Both,
}

impl Use {
    fn of(access: OpAccess, size: usize) -> Self {
        match access {
            OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess => {
                Use::Reads
            }
            OpAccess::Write if size >= 4 => Use::WritesAll,
            _ => Use::Both,
        }
    }

    fn and(self, other: Self) -> Self {
        if self == other { self } else { Use::Both }
    }
}

/// The register of r11's family with the size of `r`.
fn scratch_one(r: Register) -> Register {
    match r.size() {
        8 => Register::R11,
        4 => Register::R11D,
        2 => Register::R11W,
        _ => Register::R11L,
    }
}

fn is_high_byte(r: Register) -> bool {
    matches!(r, Register::AH | Register::BH | Register::CH | Register::DH)
}

fn set_host_operand(i: &mut Instruction, base: Register, disp: i32) {
    i.set_segment_prefix(Register::None);
    i.set_memory_base(base);
    i.set_memory_index(Register::None);
    i.set_memory_index_scale(1);
    i.set_memory_displacement64(disp as i64 as u64);
    i.set_memory_displ_size(match i8::try_from(disp) {
        Ok(0) => 0,
        Ok(_) => 1,
        Err(_) => 8,
    });
}

/// The instruction with a constant added to the address of its memory operand.
fn moved(d: &Instruction, plus: i64) -> Instruction {
    let mut d = *d;
    let disp = d.memory_displacement64().wrapping_add(plus as u64);
    d.set_memory_displacement64(disp);
    d
}

/// True where an operand is this register or a part of it.
fn names(d: &Instruction, r: Register) -> bool {
    (0..d.op_count())
        .any(|op| d.op_kind(op) == OpKind::Register && d.op_register(op).full_register() == r)
}

/// LEA that can be copied: it names neither RIP nor a register that lives in memory.
fn plain_lea(d: &Instruction) -> bool {
    let fine = |r: Register| r == Register::None || (r.is_gpr() && !is_scratch(r));
    [d.op0_register(), d.memory_base(), d.memory_index()]
        .into_iter()
        .all(fine)
}

/// The accumulator forms with a 64-bit absolute address have no ModRM byte to put a register into.
fn explicit_form(i: &mut Instruction) {
    let code = match i.code() {
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        _ => return,
    };
    i.set_code(code);
}
