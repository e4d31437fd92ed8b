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

mod address;
mod branch;
mod control;
pub(crate) mod counter;
mod extended_state;
mod fuse;
pub(crate) mod hold;
mod iret;
mod lost;
mod memory;
mod narrow;
mod pin;
mod rebuild;
mod resident;
mod share;
mod sites;
mod stack;
mod string;
mod system;
mod window;

use iced_x86::{Code, Encoder, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register};

use doppel_memory::{Privilege, TLB_ENTRIES, TLB_SLOT_SHIFT, Tlb};

use crate::asm::*;
use crate::blocks::Form;
use crate::context as ctx;
use crate::engine::TranslateOptions;
use crate::flags::{ALL, FlagPlace, FlagSet};
use crate::frontend::{Class, Element, GuestBlock, GuestInstruction, Simd};
use crate::narrow::{Mode, Width};
use crate::recipe::Recipe;
use crate::thunk::{Check, Thunks, load_simd};
pub(crate) use address::check_len;
pub(crate) use branch::BranchSite;
pub(crate) use lost::{Chained, IN_PLACE, RecipeId};
pub(crate) use resident::cannot_fault;
pub(crate) use share::{Reference, constant_move, leaves_s0, reference};
pub(crate) use sites::{AccessSite, Boundary, ExitSite, FirstSites, Part, Translated};

use extended_state::Areas;
use hold::Held;
use pin::{Pin, Pinned};
use resident::Resident;
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
    pub options: TranslateOptions,
    /// Where each part of the block counts its runs; see `counter`.
    pub counters: Option<u64>,
    /// Number of the first slot that is free.
    pub slots: u32,
    /// Other CPUs run the block too.
    pub shared: bool,
    pub thunks: Thunks,
    /// What the block is keyed by.
    pub simd: Simd,
    pub mode: Mode,
}

struct SlowJump {
    from: Fixup,
    tag: i32,
    check: Check,
    /// Position behind the check.
    done: usize,
    site: u32,
    /// Index of the exit to the careful form.
    careful: Option<usize>,
    /// What is borrowed there.
    pinned: Option<Pinned>,
    /// What is lost there, where others share the check.
    lost: Vec<Recipe>,
}

/// Translates blocks; keeps its buffers from one to the next.
pub(crate) struct Rewriter {
    pub asm: Asm,
    /// Made when it is first needed: it has large tables.
    encoder: Option<Encoder>,
    info: InstructionInfoFactory,
    /// An outcome that is done with, for its buffers.
    spare: Option<Box<Translated>>,
    /// The memory accesses of the block, with the numbers of their instructions.
    references: Vec<(usize, Reference)>,
    buffers: Buffers,
    areas: Areas,
}

/// Lists that a translation fills, kept from one to the next.
#[derive(Default)]
struct Buffers {
    lost: Vec<Recipe>,
    slow: Vec<SlowJump>,
    stubs: Vec<(Fixup, Stub)>,
    slot_stubs: Vec<usize>,
}

impl Rewriter {
    pub fn new() -> Self {
        Rewriter {
            asm: Asm::default(),
            encoder: None,
            info: InstructionInfoFactory::new(),
            spare: None,
            references: Vec::new(),
            buffers: Buffers::default(),
            areas: Areas::of_host(),
        }
    }

    /// Takes an outcome back that is done with.
    pub fn recycle(&mut self, mut done: Box<Translated>) {
        done.clear();
        self.spare = Some(done);
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
    ) -> Box<Translated> {
        self.asm.reset(base);
        let out = self.spare.take().unwrap_or_default();
        let buffers = std::mem::take(&mut self.buffers);
        let mut work = Work {
            r: self,
            block,
            s: setting,
            first,
            out,
            place: FlagPlace::Saved,
            lost: buffers.lost,
            recipe: IN_PLACE,
            entry_unknown: false,
            slow: buffers.slow,
            simd_missing: None,
            run: None,
            pin: None,
            pinned: None,
            held: Vec::new(),
            resident: Default::default(),
            at: 0,
            polled: None,
            stubs: buffers.stubs,
            slot_stubs: buffers.slot_stubs,
        };
        work.run();
        // Taken apart where it stands: it is large.
        let Work {
            out,
            mut lost,
            mut slow,
            mut stubs,
            mut slot_stubs,
            ..
        } = work;
        lost.clear();
        slow.clear();
        stubs.clear();
        slot_stubs.clear();
        self.buffers = Buffers {
            lost,
            slow,
            stubs,
            slot_stubs,
        };
        out
    }
}

struct Work<'a> {
    r: &'a mut Rewriter,
    block: &'a GuestBlock,
    s: Setting,
    first: FirstSites,
    out: Box<Translated>,
    place: FlagPlace,
    /// What is not in `place` (see `lost`).
    lost: Vec<Recipe>,
    /// The same where the instruction being translated begins.
    recipe: RecipeId,
    /// Nobody knows where the flags were when the block was entered.
    entry_unknown: bool,
    slow: Vec<SlowJump>,
    simd_missing: Option<Fixup>,
    /// What S0 reaches (see `share`).
    run: Option<Run>,
    /// Which base is to be held in a register of its own, and the one that is (see `pin`).
    pin: Option<Pin>,
    pinned: Option<Pinned>,
    /// Bases that are kept in memory (see `hold`).
    held: Vec<Held>,
    /// Of S0 and S1.
    resident: [Resident; 2],
    /// Which instruction is being translated.
    at: usize,
    /// The branch whose poll is done (see `fuse`).
    polled: Option<usize>,
    /// Jumps to the exit stubs, which are emitted last.
    stubs: Vec<(Fixup, Stub)>,
    /// Exits through slots whose code to leave is still to be emitted.
    slot_stubs: Vec<usize>,
}

#[derive(Clone, Copy)]
enum Stub {
    /// Leaves to the monitor with this exit.
    Leave(usize, Option<Pinned>),
    /// Looks the target of this indirect branch up.
    Lookup { site: usize, cache: u8 },
    /// Goes on at this offset from the page, which is in another page.
    OtherPage(i64, FlagPlace, Option<Pinned>),
    /// Goes on in this page with an exit, once the borrowed register is given back.
    GiveBack(usize, Pinned),
}

const IF: i32 = 1 << 9;
const DF: i32 = 1 << 10;
const AC: i32 = 1 << 18;
const RF_VM: i32 = 3 << 16;
const ARITHMETIC: i32 = 0x8d5;
/// What an address shifted to the slots of a TLB is masked with.
pub(crate) const TLB_INDEX_MASK: i32 = ((TLB_ENTRIES - 1) << TLB_SLOT_SHIFT) as i32;

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
        if self.s.options.count {
            self.count_block();
        }
        self.plan_pin();
        self.count_part(0);
        let block = self.block;
        for (at, i) in block.instructions.iter().enumerate() {
            self.at = at;
            let resident = self.s.options.resident && i.cannot_fault;
            if !resident {
                self.end_residence();
            }
            self.boundary(i);
            self.poll_early();
            self.instruction(i);
            if let Some(run) = &mut self.run
                && !run.outlives(i)
            {
                self.run = None;
            }
            self.follow_pin(i);
            if !self.held.is_empty() {
                self.follow_held(i);
            }
            if !self.lost.is_empty() {
                self.follow_lost(i);
            }
        }
        self.end_residence();
        if block
            .instructions
            .last()
            .is_some_and(|last| !last.class.ends_block())
        {
            self.fall_through(i64::from(block.end));
        }
        self.out.body = self.r.asm.pos() as u32;
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
            None => {
                self.place = FlagPlace::Registers;
                self.entry_unknown = true;
            }
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
                return self.entry_watched().then_some(FlagPlace::Saved);
            }
            if i.class.checks() && !self.through_window(i) || matches!(i.class, Class::Interpret) {
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
        self.count_instructions(0);
    }

    /// Counts the instructions from this one up to the next branch.
    fn count_instructions(&mut self, from: usize) {
        let rest = &self.block.instructions[from..];
        let to_branch = rest
            .iter()
            .position(|i| matches!(i.class, Class::Conditional));
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

    #[inline]
    fn boundary(&mut self, i: &GuestInstruction) {
        self.boundary_with(i, self.borrowed());
    }

    #[inline]
    fn boundary_with(&mut self, i: &GuestInstruction, borrowed: Option<Reg>) {
        self.recipe = IN_PLACE;
        if !self.lost.is_empty() {
            self.record_lost(i);
        }
        let host = self.r.asm.pos() as u32;
        self.out.boundaries.push(Boundary {
            host,
            guest: i.offset,
            flags: self.place,
            borrowed,
        });
    }

    /// As its reverse, this uses S1, since S0 may hold a host address.
    fn save_flags(&mut self) {
        self.end_residence();
        let a = self.asm();
        a.mov(S1, RAX);
        a.flags_to_ax();
        a.store32(ctx::FLAGS, RAX);
        a.mov(RAX, S1);
    }

    fn restore_flags(&mut self) {
        self.end_residence();
        let a = self.asm();
        a.mov(S1, RAX);
        a.load32(RAX, ctx::FLAGS);
        a.flags_from_ax();
        a.mov(RAX, S1);
    }

    /// Before code that destroys the host's flags.
    fn before_check(&mut self, i: &GuestInstruction) {
        if self.place != FlagPlace::Registers {
            return;
        }
        if i.live_before != 0 || !self.give_up() {
            self.save_flags();
            self.place = FlagPlace::Saved;
        }
        self.boundary(i);
    }

    /// Before the guest's own instruction runs.
    fn before_own(&mut self, i: &GuestInstruction) {
        if self.place == FlagPlace::Saved && self.wants_registers(i) {
            self.restore_flags();
            self.place = FlagPlace::Registers;
        }
    }

    /// True where the guest's own instruction has to find saved flags in the registers.
    fn wants_registers(&self, i: &GuestInstruction) -> bool {
        i.flags.needs_registers(i.live_after) || self.leaves_saved_flags(i)
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
            Class::ExtendedState { write } => self.extended_state(i, write),
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
            Class::Iret => self.iret(i),
            Class::Serialize => self.serialize(),
            Class::Pause => self.pause(i),
            Class::DirectionFlag => self.direction_flag(i),
            Class::ReadControl => self.read_control(i),
            Class::Cli => self.cli(i),
            Class::Sti => self.sti(i),
            Class::AlignmentFlag => self.alignment_flag(i),
            Class::Pushf => self.pushf(i),
            Class::Popf => self.popf(i),
            Class::Repeat { size, source } => self.repeat(i, size, source),
            Class::Element { size, element } => self.element(i, size, element),
            Class::Interpret => self.interpret(i),
        }
    }

    // ---- instructions without memory ----

    fn copy(&mut self, i: &GuestInstruction) {
        self.before_own(i);
        if i.uses & (1 << S0 | 1 << S1) == 0 {
            self.own_bytes(i);
        } else {
            self.copy_resident(i);
        }
        if !(self.s.options.resident && i.cannot_fault) {
            self.end_residence();
        }
        self.after_own(i);
    }

    /// The instruction as the guest has it.
    fn own_bytes(&mut self, i: &GuestInstruction) {
        if i.encode {
            return self.encode(&i.decoded);
        }
        let bytes = self.block.bytes_of(i);
        self.r.asm.raw(bytes);
    }

    /// How the instruction uses r10 and r11.
    fn scratch_use(&mut self, i: &GuestInstruction) -> [Option<(Reg, Use)>; 2] {
        let mut found = [None, None];
        for used in self.r.info.info(&i.decoded).used_registers() {
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
        if copied_lea(d) {
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
            _ => self.asm().mov16(n, S0),
        }
    }

    fn swapgs(&mut self) {
        let base = ctx::segment_base(5);
        let a = self.asm();
        a.load(S0, base);
        a.load(S1, ctx::KERNEL_GS_BASE);
        a.store(base, S1);
        a.store(ctx::KERNEL_GS_BASE, S0);
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

/// LEA that can be copied: it does not name RIP.
fn copied_lea(d: &Instruction) -> bool {
    [d.memory_base(), d.memory_index()]
        .into_iter()
        .all(|r| r == Register::None || r.is_gpr())
}
