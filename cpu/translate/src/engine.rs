//! The engine: look a block up, run it, see why it came back.
//!
//! The monitor's part of every instruction that is not translated is the interpreter of `doppel-x86`. A memory access that the
//! TLB cannot serve (a fault, a device, a page with code, an access across pages) and a fault that the processor raised are
//! handled in one way: go back to the beginning of the guest instruction and interpret it, which gives the exact outcome.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use rustc_hash::FxHashMap;

use doppel_memory::{AccessKind, PAGE_MASK, PAGE_SIZE, Privilege};
use doppel_x86::{
    Activity, Bus, Cpu, CpuMode, Cr0, Cr4, Engine, EngineStats, Exit, Kick, Outcome, Rflags, event,
    interpret,
};

use crate::asm::Asm;
use crate::blocks::{BlockId, Blocks, Key, Made};
use crate::cache_unsafe::CodeCache;
use crate::context::{JumpEntry, NO_LINEAR};
use crate::context_unsafe::ContextBox;
use crate::enter_unsafe::{ThreadSetup, enter, host_features};
use crate::flags::{FlagPlace, pack, unpack};
use crate::frontend::{Decoding, GuestBlock, Simd, decode};
use crate::rewrite::{Base, Rewriter, Setting, jump_index};
use crate::thunk::{self, EXIT_ACCESS, EXIT_FAULT, EXIT_INDIRECT, Thunks};

/// Switches and bounds of the translator.
#[derive(Clone, Copy, Debug)]
pub struct TranslateOptions {
    /// Bytes of the code cache; when it is full, everything is translated anew.
    pub cache_size: usize,
    /// Translate only the first so many blocks and interpret the rest: finds a bad block by halving.
    pub translate_limit: Option<u64>,
    /// Link blocks to one another.
    pub link: bool,
    /// Do not save flags that are dead; see `flags`.
    pub flag_liveness: bool,
    /// Emit CLI, STI, PUSHF, POPF, STAC, CLAC and SWAPGS as code instead of interpreting them.
    pub inline_system: bool,
    /// Emit REP MOVS and REP STOS as code where they stay within a page.
    pub inline_strings: bool,
    /// Count the blocks and instructions that run (costs six instructions a block) and the time spent in translated code.
    pub count: bool,
}

impl Default for TranslateOptions {
    fn default() -> Self {
        TranslateOptions {
            cache_size: 64 << 20,
            translate_limit: None,
            link: true,
            flag_liveness: true,
            inline_system: true,
            inline_strings: true,
            count: false,
        }
    }
}

/// Why the engine cannot run here.
#[derive(Debug, thiserror::Error)]
pub enum TranslateError {
    /// The processor lacks something that the translator emits.
    #[error("the processor lacks {0}, which the translator needs")]
    Processor(&'static str),
    /// No memory for the code cache.
    #[error("the host gives no memory for {0} bytes of code cache: {1}")]
    Cache(usize, std::io::Error),
}

/// Whether the engine can run on this host.
pub fn supported() -> Result<(), TranslateError> {
    let (xsave, _) = host_features();
    if !xsave {
        return Err(TranslateError::Processor("XSAVE"));
    }
    if !std::is_x86_feature_detected!("cmpxchg16b") {
        return Err(TranslateError::Processor("CMPXCHG16B"));
    }
    Ok(())
}

#[derive(Clone, Copy, Debug)]
struct CodePage {
    gpa: u64,
    global: bool,
}

#[derive(Default)]
struct Counts {
    translations: u64,
    translated_instructions: u64,
    cache_flushes: u64,
    dispatches: u64,
    exit_direct: u64,
    exit_indirect: u64,
    exit_interpret: u64,
    exit_access: u64,
    exit_fault: u64,
    tlb_misses: u64,
    kicks: u64,
    untranslatable: u64,
    translated_nanoseconds: u64,
}

/// What [`Translate`] owns; generated code calls back into it.
pub(crate) struct Translator {
    pub context: ContextBox,
    cache: CodeCache,
    blocks: Blocks,
    rewriter: Rewriter,
    thunks: Thunks,
    options: TranslateOptions,
    /// Linear page → physical page of code, for user and for supervisor fetches.
    code_pages: [FxHashMap<u64, CodePage>; 2],
    /// An exit that the next block found is to be linked to.
    link_from: Option<u32>,
    /// The next block found goes into the jump cache.
    enter_in_jump_cache: bool,
    /// What the blocks in the jump caches were translated for.
    simd: Simd,
    counts: Counts,
    recent: VecDeque<u64>,
}

/// The engine that translates 64-bit guest code to host code; other modes are interpreted.
pub struct Translate {
    t: Box<Translator>,
}

const RECENT: usize = 16;
/// More than one block can take.
const CACHE_MARGIN: usize = 64 << 10;

impl Translate {
    /// An engine that runs `cpu`.
    pub fn new(cpu: Box<Cpu>, options: TranslateOptions) -> Result<Self, TranslateError> {
        supported()?;
        let size = options.cache_size.clamp(4 * CACHE_MARGIN, 1 << 30);
        let mut cache = CodeCache::new(size).map_err(|e| TranslateError::Cache(size, e))?;
        let mut asm = Asm::default();
        let thunks = thunk::assemble(&mut asm, cache.cursor(), host_features().1);
        cache.append(&asm.bytes);
        cache.pin();
        let t = Translator {
            context: ContextBox::new(cpu),
            cache,
            blocks: Blocks::default(),
            rewriter: Rewriter::new(),
            thunks,
            options,
            code_pages: Default::default(),
            link_from: None,
            enter_in_jump_cache: false,
            simd: Simd::None,
            counts: Counts::default(),
            recent: VecDeque::new(),
        };
        Ok(Translate { t: Box::new(t) })
    }
}

impl Engine for Translate {
    fn run(&mut self, bus: &mut dyn Bus) -> Exit {
        let t = &mut *self.t;
        let _setup = ThreadSetup::new(&t.context, t.cache.range(), t.thunks.exit);
        t.run(bus)
    }

    fn cpu(&self) -> &Cpu {
        &self.t.context.cpu
    }

    fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.t.context.cpu
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.t.context.kicker()
    }

    fn stats(&self) -> EngineStats {
        self.t.stats()
    }

    fn trace(&self) -> Vec<String> {
        self.t
            .recent
            .iter()
            .map(|rip| format!("block at {rip:#x}"))
            .collect()
    }
}

impl Translator {
    fn run(&mut self, bus: &mut dyn Bus) -> Exit {
        loop {
            self.follow_memory_changes();
            if self.context.take_kick() {
                self.counts.kicks += 1;
                self.forget_origin();
                return Exit::Kicked;
            }
            let cpu = &mut self.context.cpu;
            if event::deliver_pending(cpu, bus) {
                self.forget_origin();
            }
            let masked = !self.context.cpu.rflags.contains(Rflags::IF);
            self.context.interrupt_waits = u32::from(masked && bus.interrupt_pending());
            match self.context.cpu.activity {
                Activity::Active => {}
                Activity::Shutdown => return Exit::Shutdown,
                Activity::Halted | Activity::WaitForSipi => return Exit::Halted,
            }
            match self.find_block() {
                Some(block) => self.run_block(block, bus),
                None => self.step(bus),
            }
        }
    }

    /// The next block does not follow from the one that ran last.
    fn forget_origin(&mut self) {
        self.link_from = None;
        self.enter_in_jump_cache = false;
    }

    /// Interprets one instruction.
    fn step(&mut self, bus: &mut dyn Bus) {
        self.forget_origin();
        // The outcome shows in `activity`, which the loop looks at.
        let _: Outcome = interpret::step(&mut self.context.cpu, bus);
    }

    fn run_block(&mut self, block: BlockId, bus: &mut dyn Bus) {
        self.counts.dispatches += 1;
        let b = self.blocks.get(block);
        let entry = b.entry_saved;
        let ctx = &mut *self.context;
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(ctx.cpu.rip);
        ctx.entry = entry;
        ctx.page_base = ctx.cpu.rip & !PAGE_MASK;
        ctx.flags = pack(ctx.cpu.rflags.bits());
        ctx.cpu.rflags.remove(Rflags::RF);
        let began = self.options.count.then(Instant::now);
        enter(self, self.thunks.enter);
        if let Some(began) = began {
            self.counts.translated_nanoseconds += began.elapsed().as_nanos() as u64;
        }
        self.left(bus);
    }

    /// Brings the CPU's state up to date after translated code was left, and does what it was left for.
    fn left(&mut self, bus: &mut dyn Bus) {
        match self.context.exit {
            EXIT_INDIRECT => {
                self.counts.exit_indirect += 1;
                self.set_flags(FlagPlace::Saved);
                self.context.cpu.rip = self.context.spill[1];
                self.enter_in_jump_cache = true;
            }
            EXIT_ACCESS => {
                self.counts.exit_access += 1;
                let access = self.blocks.access(self.context.fault_pc as u32);
                self.set_flags(access.site.flags);
                self.context.cpu.rip = self.rip_in(access.block, i64::from(access.site.offset));
                self.step(bus);
            }
            EXIT_FAULT => self.faulted(bus),
            n => {
                let e = self.blocks.exit(n);
                self.set_flags(e.site.flags);
                self.context.cpu.rip = self.rip_in(e.block, e.site.target);
                if e.site.interpret {
                    self.counts.exit_interpret += 1;
                    self.step(bus);
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
        // The handler only sends faults inside the cache here, and every block has a boundary at its start; the
        // entry conversions before the first boundary cannot fault.
        let Some((block, at)) = self.blocks.at_host(self.context.fault_pc) else {
            self.context.cpu.activity = Activity::Shutdown;
            return;
        };
        self.set_flags(at.flags);
        self.context.cpu.rip = self.rip_in(block, i64::from(at.guest));
        if !self.context.is_kicked() {
            self.step(bus);
        }
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

    fn rip_in(&self, block: BlockId, offset: i64) -> u64 {
        let page = match self.blocks.get(block).key.base {
            Base::Fixed(page) => page,
            Base::Dynamic => self.context.page_base,
        };
        page.wrapping_add(offset as u64)
    }

    /// The block at the CPU's RIP; `None` where the instruction there has to be interpreted.
    fn find_block(&mut self) -> Option<BlockId> {
        if !translatable(&self.context.cpu) {
            self.counts.untranslatable += 1;
            return None;
        }
        self.follow_simd();
        let rip = self.context.cpu.rip;
        let gpa = self.code_page(rip)? | (rip & PAGE_MASK);
        let key = self.key(gpa, rip);
        let block = match self
            .blocks
            .find(&key)
            .filter(|b| self.still_straddles(*b, rip))
        {
            Some(block) => block,
            None => self.translate_block(key, rip)?,
        };
        self.link(block, rip);
        Some(block)
    }

    /// Jump caches do not tell blocks of different [`Simd`] apart: they are emptied when it changes.
    fn follow_simd(&mut self) {
        let simd = simd_of(&self.context.cpu);
        if self.simd != simd {
            self.simd = simd;
            self.empty_jump_caches(0..3);
        }
    }

    fn key(&self, gpa: u64, rip: u64) -> Key {
        let cpu = &self.context.cpu;
        let privilege = cpu.privilege();
        let base = match privilege {
            Privilege::User => Base::Dynamic,
            _ => Base::Fixed(rip & !PAGE_MASK),
        };
        Key {
            gpa,
            privilege: privilege as u8,
            simd: self.simd,
            base,
        }
    }

    /// Physical page of the code at `rip`, from the guest's page tables.
    fn code_page(&mut self, rip: u64) -> Option<u64> {
        let cpu = &mut self.context.cpu;
        let user = cpu.cpl == 3;
        let page = rip & !PAGE_MASK;
        if let Some(p) = self.code_pages[usize::from(!user)].get(&page) {
            return Some(p.gpa);
        }
        if !Cpu::canonical(rip) {
            return None;
        }
        let privilege = if user {
            Privilege::User
        } else {
            Privilege::Supervisor
        };
        let t = cpu.translate(page, AccessKind::Execute, privilege).ok()?;
        let gpa = t.gpa & !PAGE_MASK;
        if !cpu.ram.is_ram(gpa) {
            return None;
        }
        self.code_pages[usize::from(!user)].insert(
            page,
            CodePage {
                gpa,
                global: t.global,
            },
        );
        Some(gpa)
    }

    fn still_straddles(&mut self, block: BlockId, rip: u64) -> bool {
        match self.blocks.get(block).second_page {
            None => true,
            Some(second) => self.code_page((rip | PAGE_MASK).wrapping_add(1)) == Some(second),
        }
    }

    fn translate_block(&mut self, key: Key, rip: u64) -> Option<BlockId> {
        if self
            .options
            .translate_limit
            .is_some_and(|limit| self.counts.translations >= limit)
        {
            return None;
        }
        let (guest, second_page) = self.read_block(&key, rip)?;
        if self.cache.room() < CACHE_MARGIN {
            self.empty_cache();
        }
        let setting = Setting {
            base: key.base,
            privilege: key.privilege,
            count: self.options.count,
            thunks: self.thunks,
        };
        let first = self.blocks.first_sites();
        let translated = self
            .rewriter
            .translate(&guest, setting, self.cache.cursor(), first);
        let host = self.cache.append(&self.rewriter.asm.bytes);
        self.counts.translations += 1;
        self.counts.translated_instructions += guest.instructions.len() as u64;
        let cpu = &mut self.context.cpu;
        for page in [Some(key.gpa), second_page].into_iter().flatten() {
            if !cpu.ram.tracker().has_code(page) {
                for tlb in &mut cpu.tlb {
                    tlb.protect(page);
                }
            }
        }
        let made = Made {
            second_page,
            guest_len: guest.end - guest.start,
            host,
            len: self.rewriter.asm.bytes.len() as u32,
            code: translated,
        };
        Some(self.blocks.insert(key, made, cpu.ram.tracker()))
    }

    /// Decodes the block at `rip`: from its page alone, or one instruction from two pages.
    fn read_block(&mut self, key: &Key, rip: u64) -> Option<(GuestBlock, Option<u64>)> {
        let how = Decoding {
            simd: key.simd,
            user: key.privilege == Privilege::User as u8,
            flag_liveness: self.options.flag_liveness,
            inline_system: self.options.inline_system,
            inline_strings: self.options.inline_strings,
        };
        let mut bytes = [0u8; PAGE_SIZE as usize + 15];
        let start = (rip & PAGE_MASK) as u16;
        let len = (PAGE_SIZE - (rip & PAGE_MASK)) as usize;
        self.context.cpu.ram.ptr(key.gpa)?.read(&mut bytes[..len]);
        let info = self.rewriter.info();
        if let Some(block) = decode(info, &bytes[..len], start, how) {
            return Some((block, None));
        }
        let second = self.code_page((rip | PAGE_MASK).wrapping_add(1))?;
        self.context
            .cpu
            .ram
            .ptr(second)?
            .read(&mut bytes[len..len + 15]);
        let mut block = decode(self.rewriter.info(), &bytes[..len + 15], start, how)?;
        block.keep_first();
        Some((block, Some(second)))
    }

    /// Links the exit that led here, or enters the block in the jump cache.
    fn link(&mut self, block: BlockId, rip: u64) {
        if std::mem::take(&mut self.enter_in_jump_cache) {
            let b = self.blocks.get(block);
            let entry = JumpEntry {
                linear: rip,
                host: b.entry_saved,
            };
            let cache = usize::from(b.key.privilege);
            self.context.jump_cache[cache][jump_index(rip)] = entry;
        }
        let Some(exit) = self.link_from.take() else {
            return;
        };
        let e = self.blocks.exit(exit);
        let (from, to) = (self.blocks.get(e.block), self.blocks.get(block));
        let across = !(0..PAGE_SIZE as i64).contains(&e.site.target) || to.second_page.is_some();
        let fixed = from.key.base != Base::Dynamic;
        let same_mode = from.key.simd == to.key.simd
            && (e.site.changes_mode || from.key.privilege == to.key.privilege);
        if self.options.link && from.alive && same_mode && (fixed || !across) {
            self.blocks.link(exit, block, across, &mut self.cache);
        }
    }

    /// A memory access missed the TLB: returns where to go on, or 0 to leave and interpret the instruction.
    pub fn access(&mut self, linear: u64, site: u32) -> u64 {
        self.counts.tlb_misses += 1;
        let access = self.blocks.access(site);
        let block = self.blocks.get(access.block);
        let (privilege, host) = (PRIVILEGES[usize::from(block.key.privilege)], block.host);
        if self.fill(linear, access.site.size, access.site.write, privilege) {
            return host + u64::from(access.site.retry);
        }
        self.context.exit = EXIT_ACCESS;
        self.context.fault_pc = u64::from(site);
        0
    }

    fn fill(&mut self, linear: u64, size: u8, write: bool, privilege: Privilege) -> bool {
        let crosses = (linear & PAGE_MASK) + u64::from(size) > PAGE_SIZE;
        if crosses || !Cpu::canonical(linear) {
            return false;
        }
        let kind = if write {
            AccessKind::Write
        } else {
            AccessKind::Read
        };
        let cpu = &mut self.context.cpu;
        if cpu.translate(linear, kind, privilege).is_err() {
            return false;
        }
        let tlb = &cpu.tlb[privilege as usize];
        let size = usize::from(size);
        if write {
            tlb.lookup_write(linear, size)
        } else {
            tlb.lookup_read(linear, size)
        }
        .is_some()
    }

    // ---- what changes under the translations ----

    fn follow_memory_changes(&mut self) {
        if !self.context.cpu.code_writes.is_empty() {
            self.follow_code_writes();
        }
        if !self.context.cpu.flushed.is_empty() {
            self.follow_flushes();
        }
    }

    fn follow_code_writes(&mut self) {
        let mut any = false;
        for (gpa, len) in std::mem::take(&mut self.context.cpu.code_writes) {
            let tracker = self.context.cpu.ram.tracker();
            any |= self
                .blocks
                .invalidate(gpa, u64::from(len), &mut self.cache, tracker);
        }
        if any {
            self.empty_jump_caches(0..3);
        }
    }

    fn follow_flushes(&mut self) {
        let flushed = std::mem::take(&mut self.context.cpu.flushed);
        let [user, kernel] = &mut self.code_pages;
        let (users, kernels) = (user.len(), kernel.len());
        if flushed.global {
            user.clear();
            kernel.clear();
        } else if flushed.non_global {
            user.clear();
            kernel.retain(|_, page| page.global);
        }
        for page in flushed.pages {
            user.remove(&page);
            kernel.remove(&page);
        }
        let (user_lost, kernel_lost) = (user.len() != users, kernel.len() != kernels);
        if user_lost {
            self.empty_jump_caches(0..1);
        }
        if kernel_lost {
            self.empty_jump_caches(1..3);
            self.blocks.unlink_cross_page(&mut self.cache);
        }
    }

    fn empty_jump_caches(&mut self, which: std::ops::Range<usize>) {
        for cache in &mut self.context.jump_cache[which] {
            cache.fill(JumpEntry {
                linear: NO_LINEAR,
                host: 0,
            });
        }
    }

    fn empty_cache(&mut self) {
        self.counts.cache_flushes += 1;
        let tracker = self.context.cpu.ram.tracker();
        self.blocks.clear(tracker);
        self.cache.clear();
        self.link_from = None;
        self.empty_jump_caches(0..3);
    }

    fn stats(&self) -> EngineStats {
        let c = &self.counts;
        let cpu = &self.context.cpu.counters;
        EngineStats::from([
            ("translations", c.translations),
            ("instructions_translated", c.translated_instructions),
            ("code_cache_bytes", self.cache.used() as u64),
            ("code_cache_flushes", c.cache_flushes),
            ("translation_metadata_bytes", self.blocks.metadata_bytes()),
            ("blocks_invalidated", self.blocks.invalidated),
            ("block_links", self.blocks.links),
            ("translated_blocks_run", self.context.blocks_run),
            ("translated_instructions_run", self.context.instructions_run),
            ("translated_code_nanoseconds", c.translated_nanoseconds),
            ("dispatches", c.dispatches),
            ("exits_unlinked_branch", c.exit_direct),
            ("exits_jump_cache_miss", c.exit_indirect),
            ("exits_sensitive_instruction", c.exit_interpret),
            ("exits_memory_access", c.exit_access),
            ("exits_fault", c.exit_fault),
            ("exits_kick", c.kicks),
            ("untranslatable_instructions", c.untranslatable),
            ("tlb_misses", c.tlb_misses),
            ("tlb_flushes", cpu.tlb_flushes),
            ("page_walks", cpu.page_walks),
            ("interpreted_instructions", cpu.interpreted_instructions),
            ("exceptions", cpu.exceptions.iter().sum()),
            ("page_faults", cpu.exceptions[14]),
            ("interrupts", cpu.interrupts),
            ("port_accesses", cpu.port_accesses),
            ("mmio_accesses", cpu.mmio_accesses),
            ("msr_accesses", cpu.msr_accesses),
            ("code_writes", cpu.code_writes),
        ])
    }
}

const PRIVILEGES: [Privilege; 3] = [
    Privilege::User,
    Privilege::Supervisor,
    Privilege::SupervisorAc,
];

/// True where the code at RIP may be translated in the CPU's present state.
fn translatable(cpu: &Cpu) -> bool {
    let stepping = cpu.rflags.contains(Rflags::TF) || cpu.dr[7] & 0xff != 0;
    let shadow = cpu.interrupt_shadow || cpu.mov_ss_shadow;
    let checks = cpu.cpl == 3 && needs_checks(cpu);
    cpu.mode() == CpuMode::Bits64 && !stepping && !shadow && !checks
}

/// User code whose RDTSC or unaligned accesses are to fault.
fn needs_checks(cpu: &Cpu) -> bool {
    cpu.cr4.contains(Cr4::TSD) || (cpu.rflags.contains(Rflags::AC) && cpu.cr0.contains(Cr0::AM))
}

fn simd_of(cpu: &Cpu) -> Simd {
    if cpu.cr0.intersects(Cr0::EM | Cr0::TS) || !cpu.cr4.contains(Cr4::OSFXSR) {
        return Simd::None;
    }
    match cpu.xcr0 {
        x if !cpu.cr4.contains(Cr4::OSXSAVE) || x & 6 != 6 => Simd::Sse,
        x if x & 0xe0 == 0xe0 => Simd::Avx512,
        _ => Simd::Avx,
    }
}
