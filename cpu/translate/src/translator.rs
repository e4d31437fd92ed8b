//! The loop: find a block, run it, see why it came back.
//!
//! The monitor's part of every instruction that is not translated is the interpreter of `doppel-x86`. A memory access that the
//! TLB cannot serve (a fault, a device, a page with code, an access across pages) and a fault that the processor raised are
//! handled in one way: go back to the beginning of the guest instruction and interpret it, which gives the exact outcome.

use std::ops::Range;
use std::time::Instant;

use doppel_memory::{InGuest, PAGE_MASK, PAGE_SIZE, Privilege};
use doppel_x86::{
    Activity, Bus, Cpu, Exception, Exit, Gpr, Left, Outcome, Rflags, UserCode, event, exception,
    interpret,
};
use rustc_hash::FxHashMap;

use crate::access::KnownSites;
use crate::blocks::{BlockId, Blocks};
use crate::cache_unsafe::slots;
use crate::code_pages::CodePages;
use crate::context::Context;
use crate::context_unsafe::ContextBox;
use crate::engine::{TranslateError, TranslateOptions};
use crate::enter_unsafe::enter;
use crate::explain::Observers;
use crate::flags::{FlagPlace, pack, unpack};
use crate::frontend::{GuestBlock, Simd};
use crate::interrupt_return::DescriptorPage;
use crate::narrow::Mode;
use crate::recipes::Lost;
use crate::rewrite::{Base, Rewriter};
use crate::shared::{Code, Held, SharedCode};
use crate::slot_links::SlotLinks;
use crate::spaces::Spaces;
use crate::stats::Counts;
use crate::thunk::{EXIT_ACCESS, EXIT_FAULT, EXIT_INDIRECT, Thunks};

/// What [`crate::Translate`] owns; generated code calls back into it.
pub(crate) struct Translator {
    pub context: ContextBox,
    pub code: Held,
    /// Host addresses of the code.
    pub range: Range<u64>,
    /// What is followed of that which was thrown away: how often it was all, and how many blocks since.
    pub followed: (u64, usize),
    pub slot_links: SlotLinks,
    pub known_sites: KnownSites,
    pub rewriter: Rewriter,
    /// A decoded block that is done with, for its buffers.
    pub spare: GuestBlock,
    pub thunks: Thunks,
    pub options: TranslateOptions,
    pub code_pages: CodePages,
    pub spaces: Spaces,
    /// An exit that the next block found is to be linked to.
    pub link_from: Option<u32>,
    /// What the blocks in the jump caches were translated for.
    pub simd: Simd,
    /// The CPU's mode when a translation was looked for last.
    pub mode: Mode,
    /// That of the blocks in the kernel's jump caches, and in that of user code outside of 64-bit mode.
    pub kernel_mode: Mode,
    pub user_mode: Mode,
    pub counts: Counts,
    recent: Recent,
    pub observers: Observers,
    /// Writes beside the code of pages: how many, and how many it takes until the code is thrown away.
    pub besides: FxHashMap<u64, (u32, u32)>,
    pub descriptor_pages: [DescriptorPage; 2],
    /// Who executes user code that is left to it.
    pub user_code: Option<Box<dyn UserCode>>,
}

/// Where translated code was entered lately.
#[derive(Default)]
struct Recent {
    rip: [u64; Recent::SIZE],
    entered: usize,
}

impl Recent {
    const SIZE: usize = 16;

    fn add(&mut self, rip: u64) {
        self.rip[self.entered % Recent::SIZE] = rip;
        self.entered += 1;
    }
}

/// More than one block can take.
pub(crate) const CACHE_MARGIN: usize = 64 << 10;

impl Translator {
    /// With code of its own, or that of others.
    pub fn new(
        mut cpu: Box<Cpu>,
        options: TranslateOptions,
        with: Option<&SharedCode>,
    ) -> Result<Self, TranslateError> {
        let peer = cpu.peer.clone();
        cpu.spaces.keep = options.keep_spaces;
        let size = Code::size(&options);
        let context =
            ContextBox::new(cpu, slots(size)).map_err(|e| TranslateError::Cache(size, e))?;
        peer.set_nudge(context.nudge());
        let blocks = |cache| Blocks::new(cache, peer.clone());
        let mut code = match with {
            None => Held::own(&options, blocks)?,
            Some(with) => Held::shared(with, &options, blocks)?,
        };
        if code.is_shared() {
            peer.share_code(code.blocks.peer());
        }
        code.blocks.add_slots(context.slots());
        let mut t = Self::with(context, code, options);
        t.context.forms = t.code.cache.forms();
        let base = t.range.start;
        for cache in &mut t.context.jump_cache {
            cache.set_base(base);
        }
        t.context.code_map.set_base(base);
        t.context.code_before = base.wrapping_neg();
        t.context.code_len = t.range.end - base;
        t.code.put_back();
        Ok(t)
    }

    fn with(context: ContextBox, code: Held, options: TranslateOptions) -> Self {
        Translator {
            slot_links: SlotLinks::new(context.slots()),
            known_sites: KnownSites::default(),
            range: code.cache.range(),
            followed: (code.blocks.generation, code.blocks.removed.len()),
            thunks: code.thunks,
            context,
            code,
            rewriter: Rewriter::new(),
            spare: GuestBlock::default(),
            options,
            code_pages: CodePages::default(),
            spaces: Spaces::default(),
            link_from: None,
            simd: Simd::None,
            mode: Mode::LONG,
            kernel_mode: Mode::LONG,
            user_mode: Mode::FLAT,
            counts: Counts::default(),
            recent: Recent::default(),
            observers: Observers::default(),
            besides: FxHashMap::default(),
            descriptor_pages: Default::default(),
            user_code: None,
        }
    }

    pub fn run(&mut self, bus: &mut dyn Bus) -> Exit {
        let _in_guest = InGuest::new(&self.context.cpu.peer);
        self.context.cpu.begin_counting();
        let exit = self.run_until_exit(bus);
        self.context.cpu.end_counting();
        self.code.put_back();
        exit
    }

    fn run_until_exit(&mut self, bus: &mut dyn Bus) -> Exit {
        loop {
            self.code.put_back();
            // First: a request that comes after it is looked for leaves a new kick.
            let kicked = self.context.take_kick();
            self.follow_memory_changes();
            if kicked {
                self.counts.kicks += 1;
                self.link_from = None;
                self.interrupted();
                return Exit::Kicked;
            }
            let cpu = &mut self.context.cpu;
            if event::deliver_pending(cpu, bus) {
                self.link_from = None;
                // The frame may have been pushed onto code.
                self.follow_memory_changes();
            }
            let masked = !self.context.cpu.rflags.contains(Rflags::IF);
            self.context.interrupt_waits = u32::from(masked && bus.interrupt_pending());
            match self.context.cpu.activity {
                Activity::Active => {}
                Activity::Shutdown => return Exit::Shutdown,
                Activity::Halted | Activity::Waiting { .. } | Activity::WaitForSipi => {
                    return Exit::Halted;
                }
            }
            if self.context.cpu.pmu.steps() {
                self.count_steps(bus);
                continue;
            }
            if self.run_user_code(bus) {
                continue;
            }
            match self.find_translation() {
                // They may take the block away, and came while other CPUs were waited for.
                Some(_) if self.context.cpu.peer.has_requests() => {}
                Some(host) => self.run_translation(host, bus),
                None => {
                    self.take_back_branch();
                    self.step(bus);
                }
            }
        }
    }

    /// Where translated code was entered lately, the latest last.
    pub fn recent(&self) -> impl Iterator<Item = u64> {
        let r = &self.recent;
        let first = r.entered.saturating_sub(Recent::SIZE);
        (first..r.entered).map(|n| r.rip[n % Recent::SIZE])
    }

    /// Asks whether the user code that was interrupted, if any was, is to be left to somebody else.
    fn interrupted(&mut self) {
        let Some(user_code) = &mut self.user_code else {
            return;
        };
        if user_code.interrupted(&self.context.cpu, entries(&self.context)) {
            self.forget_user_jumps();
        }
    }

    /// Whether the user code of this page, which has not been translated yet, is left to somebody else from now on.
    pub fn leaves_untranslated(&mut self, page: u64) -> bool {
        let cpu = &self.context.cpu;
        let Some(user_code) = self.user_code.as_mut().filter(|_| cpu.cpl == 3) else {
            return false;
        };
        let leaves = user_code.untranslated(cpu, page, entries(&self.context));
        if leaves {
            self.forget_user_jumps();
        }
        leaves
    }

    /// Has user code run by who it is left to; false where it is left to nobody.
    fn run_user_code(&mut self, bus: &mut dyn Bus) -> bool {
        let Some(user_code) = &mut self.user_code else {
            return false;
        };
        if self.context.cpu.cpl != 3 || !user_code.takes(&self.context.cpu) {
            return false;
        }
        let from = self.context.cpu.rip;
        let entries = entries(&self.context);
        let (cpu, called) = self.context.cpu_and_call();
        let left = user_code.run(cpu, &called, entries);
        if self.context.cpu.rip != from {
            // The exit that led here does not lead to where user code has come by now.
            self.link_from = None;
        }
        if left == Left::Declined {
            return false;
        }
        self.link_from = None;
        let cpu = &mut self.context.cpu;
        match left {
            Left::Interpret => self.step(bus),
            Left::Raise(e) => self.raise(e, bus),
            Left::Called | Left::Declined => {}
            Left::Writes(page) => cpu.code_writes.push((page, PAGE_SIZE as u32)),
        }
        true
    }

    /// Interprets for a while, since each instruction is counted, or where it is executed matters.
    fn count_steps(&mut self, bus: &mut dyn Bus) {
        self.link_from = None;
        self.code.put_back();
        let (cpu, called) = self.context.cpu_and_call();
        interpret::steps(cpu, bus, &called);
    }

    /// Interprets one instruction.
    fn step(&mut self, bus: &mut dyn Bus) {
        self.link_from = None;
        self.code.put_back();
        let cpu = &mut self.context.cpu;
        let rip = cpu.rip;
        cpu.asked_cpuid = false;
        // The outcome shows in `activity`, which the loop looks at.
        let _: Outcome = interpret::step(cpu, bus);
        if cpu.asked_cpuid
            && let Some(user_code) = &mut self.user_code
        {
            user_code.asked_cpuid(cpu, rip);
        }
    }

    /// Raises a fault of the instruction at RIP. As after a step, the outcome shows in `activity`.
    fn raise(&mut self, e: Exception, bus: &mut dyn Bus) {
        let cpu = &mut self.context.cpu;
        let rip = cpu.rip;
        let _: Outcome = exception::raise(cpu, bus, e, rip);
    }

    /// Runs translated code from its host address on, until it leaves.
    fn run_translation(&mut self, host: u64, bus: &mut dyn Bus) {
        self.counts.dispatches += 1;
        let ctx = &mut *self.context;
        self.recent.add(ctx.cpu.rip);
        ctx.entry = host;
        ctx.page_base = ctx.cpu.rip & !PAGE_MASK;
        ctx.flags = pack(ctx.cpu.rflags.bits());
        ctx.cpu.rflags.remove(Rflags::RF);
        self.code.put_back();
        let began = self.options.count.then(Instant::now);
        enter(self, self.thunks.enter);
        if let Some(began) = began {
            self.counts.translated_nanoseconds += began.elapsed().as_nanos() as u64;
        }
        self.left(bus);
    }

    /// Brings the CPU's state up to date after translated code was left, and does what it was left for.
    fn left(&mut self, bus: &mut dyn Bus) {
        self.settle_x87_pointers();
        match self.context.exit {
            EXIT_INDIRECT => {
                self.counts.exit_indirect += 1;
                self.set_flags(FlagPlace::Saved);
                self.branched(self.context.spill[1], bus);
            }
            EXIT_ACCESS => {
                self.counts.exit_access += 1;
                self.hold();
                let access = self.code.blocks.access(self.context.fault_pc as u32);
                self.set_flags(access.site.flags);
                self.give_back(access.site.borrowed);
                self.rebuild_flags(self.code.blocks.lost_at(&access));
                self.context.cpu.rip = self.rip_in(access.block, i64::from(access.site.offset));
                self.step(bus);
            }
            EXIT_FAULT => self.faulted(bus),
            n => {
                self.hold();
                let e = self.code.blocks.exit(n);
                self.set_flags(e.site.flags);
                self.context.cpu.rip = self.rip_in(e.block, e.site.target);
                if e.site.interpret {
                    self.counts.exit_interpret += 1;
                    self.rebuild_flags(self.code.blocks.recipes().at_exit(n));
                    let kernel = self.context.cpu.cpl == 0;
                    let asked = std::mem::take(&mut self.context.asks_return) != 0;
                    self.step(bus);
                    match self.context.cpu.cpl {
                        3 if kernel => self.note_user_return(),
                        0 if asked => self.note_kernel_return(),
                        _ => {}
                    }
                } else {
                    self.counts.exit_direct += 1;
                    self.link_from = Some(n);
                }
            }
        }
    }

    /// The processor raised a fault: the load of the poll after a kick, or the guest's instruction.
    fn faulted(&mut self, bus: &mut dyn Bus) {
        self.counts.exit_fault += 1;
        self.hold();
        // The handler only sends faults inside the cache here, and every block has a boundary at its start; the
        // entry conversions before the first boundary cannot fault.
        let Some(place) = self.code.blocks.at_host(self.context.fault_pc) else {
            self.context.cpu.activity = Activity::Shutdown;
            return;
        };
        let at = place.boundary;
        self.set_flags(at.flags);
        self.give_back(at.borrowed);
        self.rebuild_flags(place.lost);
        self.context.cpu.rip = self.rip_in(place.block, i64::from(at.guest));
        if !self.context.is_kicked() {
            let window = self.code.blocks.mode(place.block).window;
            self.step(bus);
            if window {
                self.window_fault();
            }
        }
    }

    /// The guest's value of a register that its block had borrowed.
    pub fn give_back(&mut self, register: Option<u8>) {
        if let Some(r) = register {
            self.context.cpu.gpr[usize::from(r)] = self.context.pinned;
        }
    }

    /// Works out the flags that are not where the place says.
    fn rebuild_flags(&mut self, lost: Lost) {
        let flags = self.rebuilt(lost, self.context.cpu.rflags.bits());
        self.context.cpu.rflags = Rflags::from_bits_retain(flags);
    }

    /// RFLAGS with the flags that recipes give.
    pub fn rebuilt(&mut self, lost: Lost, rflags: u64) -> u64 {
        self.counts.rebuilt_flags += u64::from(lost.is_some());
        let recipes = self.code.blocks.recipes();
        recipes.apply(lost, rflags, &self.context.cpu.gpr)
    }

    /// An indirect branch left for a target without a translation, or one that is not canonical: then it faults.
    fn branched(&mut self, target: u64, bus: &mut dyn Bus) {
        if self.context.cpu.canonical(target) {
            self.context.cpu.rip = target;
            return;
        }
        self.hold();
        let branch = self.code.blocks.branch(self.context.branch);
        self.context.cpu.rip = self.rip_in(branch.block, branch.offset().into());
        let rsp = &mut self.context.cpu.gpr[Gpr::Rsp as usize];
        *rsp = rsp.wrapping_sub(branch.moves_rsp() as u64);
        self.raise(Exception::gp(0), bus);
    }

    fn set_flags(&mut self, place: FlagPlace) {
        let ctx = &mut *self.context;
        let arithmetic = match place {
            FlagPlace::Registers => ctx.exit_flags & Rflags::ARITHMETIC.bits(),
            FlagPlace::Saved => unpack(ctx.flags),
        };
        let others = ctx.cpu.rflags.bits() & !Rflags::ARITHMETIC.bits();
        ctx.cpu.rflags = Rflags::from_bits_retain(others | arithmetic);
    }

    pub fn rip_in(&self, block: BlockId, offset: i64) -> u64 {
        let page = match self.code.blocks.base(block) {
            Base::Fixed(page) => page,
            Base::Dynamic => self.context.page_base,
        };
        let rip = page.wrapping_add(offset as u64);
        self.code.blocks.mode(block).cut(rip)
    }
}

/// How often user code was entered so far.
fn entries(context: &Context) -> u64 {
    let counters = &context.cpu.counters;
    context.user_entries + counters.exceptions.iter().sum::<u64>() + counters.interrupts
}

pub(crate) const PRIVILEGES: [Privilege; 3] = [
    Privilege::User,
    Privilege::Supervisor,
    Privilege::SupervisorAc,
];
