//! From a guest address to its translation, and what happens when the memory below changes.

use doppel_memory::{AccessKind, PAGE_MASK, PAGE_SIZE, PageTracker, Privilege};
use doppel_x86::{Cpu, Cr0, Cr4, Rflags};

use crate::blocks::{BlockId, Form, Key, Made, NARROW_USER, jump_cache_of};
use crate::code_map::CROSSINGS_A_LINK;
use crate::context::JUMP_CACHES;
use crate::engine::TranslateOptions;
use crate::frontend::{Decoding, GuestBlock, MOST_BYTES, Simd};
use crate::narrow::{self, Mode};
use crate::records::MAX_CODE;
use crate::rewrite::{Base, Setting};
use crate::translator::{CACHE_MARGIN, Translator};

/// Bytes that are read for a block, unless they turn out to be too few.
const USUAL_BYTES: usize = 96;

/// The last page of a 32-bit address space.
const LAST_NARROW_PAGE: u64 = 0xffff_f000;

impl Translator {
    /// Host address of the translation at the CPU's RIP; `None` where the instruction there has to be interpreted.
    pub fn find_translation(&mut self) -> Option<u64> {
        let Some(mode) = translatable(&self.context.cpu, &self.options) else {
            self.counts.untranslatable += 1;
            return None;
        };
        self.follow_simd();
        self.follow_mode(mode);
        let cpu = &self.context.cpu;
        let (rip, privilege) = (cpu.rip, cpu.privilege());
        let cache = usize::from(jump_cache_of(privilege as u8, mode));
        if self.link_from.is_none()
            && let Some(host) = self.context.jump_cache[cache].find(rip)
        {
            return Some(host);
        }
        let block = self.find_block(rip)?;
        if !self.link(block) {
            let host = self.blocks.entry_saved(block);
            self.context.jump_cache[cache].insert(rip, host, block);
        }
        Some(self.blocks.entry_saved(block))
    }

    fn find_block(&mut self, rip: u64) -> Option<BlockId> {
        if self.mode.is_narrow() && rip >= LAST_NARROW_PAGE {
            // Its code goes on at address 0.
            return None;
        }
        let gpa = self.code_page(rip)? | (rip & PAGE_MASK);
        let key = self.key(gpa, rip);
        let found = self.blocks.find(&key);
        let block = found
            .filter(|b| self.still_straddles(*b, rip))
            .or_else(|| self.translate_block(key, rip))?;
        if self.blocks.second_page(block).is_none() {
            let host = self.blocks.entry_saved(block);
            self.context.code_map.note_block(&key, host);
        }
        Some(block)
    }

    /// Jump caches do not tell blocks of different [`Simd`] apart: they are emptied when it changes.
    fn follow_simd(&mut self) {
        let simd = simd_of(&self.context.cpu);
        if self.simd != simd {
            self.simd = simd;
            self.empty_jump_caches(0..JUMP_CACHES);
        }
    }

    /// Neither do they tell modes apart: those are emptied that hold another mode's and that code of this one may look into.
    fn follow_mode(&mut self, mode: Mode) {
        self.mode = mode;
        if mode == Mode::Long && self.kernel_mode == Mode::Long {
            return;
        }
        let cpu = &self.context.cpu;
        let ends = [false, true].map(|write| cpu.seg.map(|s| narrow::last(&s, write)));
        let user = cpu.cpl == 3;
        self.context.segment_ends = ends;
        if mode.is_narrow() && user {
            self.follow_user_mode(mode);
        } else if self.kernel_mode != mode {
            self.kernel_mode = mode;
            self.empty_jump_caches(1..3);
        }
    }

    fn follow_user_mode(&mut self, mode: Mode) {
        if self.user_mode != mode {
            self.user_mode = mode;
            self.empty_jump_caches(NARROW_USER.into()..JUMP_CACHES);
        }
    }

    fn key(&self, gpa: u64, rip: u64) -> Key {
        let privilege = self.context.cpu.privilege();
        let base = match privilege {
            Privilege::User => Base::Dynamic,
            _ => Base::Fixed(rip & !PAGE_MASK),
        };
        Key {
            gpa,
            privilege: privilege as u8,
            simd: self.simd,
            base,
            form: Form::Normal,
            mode: self.mode,
        }
    }

    /// Physical page of the code at `rip`, from the guest's page tables.
    fn code_page(&mut self, rip: u64) -> Option<u64> {
        let cpu = &mut self.context.cpu;
        let user = cpu.cpl == 3;
        let page = rip & !PAGE_MASK;
        if let Some(gpa) = self.code_pages.get(user, page) {
            self.note_page(user, page, gpa);
            return Some(gpa);
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
        self.code_pages.insert(user, page, &t);
        self.note_page(user, page, gpa);
        Some(gpa)
    }

    fn note_page(&mut self, user: bool, linear: u64, gpa: u64) {
        if user && self.mode == Mode::Long {
            self.context.code_map.note_page(linear, gpa, self.simd);
        }
    }

    fn still_straddles(&mut self, block: BlockId, rip: u64) -> bool {
        match self.blocks.second_page(block) {
            None => true,
            Some(second) => self.code_page((rip | PAGE_MASK).wrapping_add(1)) == Some(second),
        }
    }

    pub fn translate_block(&mut self, key: Key, rip: u64) -> Option<BlockId> {
        if self
            .options
            .translate_limit
            .is_some_and(|limit| self.counts.translations >= limit)
        {
            return None;
        }
        let mut guest = std::mem::take(&mut self.spare);
        let second_page = self.read_block(&mut guest, &key, rip);
        let id = second_page.and_then(|second| self.translate_decoded(key, rip, &guest, second));
        self.spare = guest;
        id
    }

    fn translate_decoded(
        &mut self,
        key: Key,
        rip: u64,
        guest: &GuestBlock,
        second_page: Option<u64>,
    ) -> Option<BlockId> {
        if self.room() < CACHE_MARGIN {
            self.empty_cache();
        }
        let counters = self.observers.counters(guest);
        let setting = Setting {
            base: key.base,
            form: key.form,
            privilege: key.privilege,
            options: self.options,
            counters: counters.as_ref().map(|c| c.as_ptr() as u64),
            slots: self.cache.slot_cursor(),
            thunks: self.thunks,
            simd: key.simd,
            mode: key.mode,
        };
        let first = self.blocks.first_sites();
        let translated = self
            .rewriter
            .translate(guest, setting, self.cache.cursor(), first);
        if self.rewriter.asm.bytes.len() > MAX_CODE {
            return None;
        }
        let host = self.cache.append(&self.rewriter.asm.bytes);
        self.cache.take_slots(translated.slots);
        self.counts.translations += 1;
        self.counts.narrow += u64::from(key.mode.is_narrow());
        self.counts.unencodable += u64::from(translated.unencodable);
        self.counts.pins += u64::from(translated.pins);
        self.counts.holds += u64::from(translated.holds);
        self.counts.shared_checks += u64::from(translated.shared);
        self.counts.rorx_checks += u64::from(translated.rorx);
        self.counts.fused += u64::from(translated.fused);
        self.counts.state_moves += u64::from(translated.state_moves);
        self.counts.translated_instructions += guest.instructions.len() as u64;
        let made = Made {
            second_page,
            guest_len: guest.end - guest.start,
            host,
            len: self.rewriter.asm.bytes.len() as u32,
            code: &translated,
        };
        let tracker = self.context.cpu.ram.tracker();
        let peer = &self.context.cpu.peer;
        let mine = |page: u64| !tracker.has_code(page) || tracker.is_writer(page, peer);
        let pages = [Some(key.gpa), second_page];
        let fresh = pages.map(|page| page.filter(|p| mine(*p)));
        let id = self.blocks.insert(key, made, tracker, &mut self.cache);
        self.rewriter.recycle(translated);
        self.context.forms = self.blocks.forms();
        for page in fresh.into_iter().flatten() {
            self.context.cpu.give_up_writing_to(page);
        }
        for page in pages.into_iter().flatten() {
            self.protect_elsewhere(page);
        }
        if !self.stands(guest, key.gpa, second_page) {
            self.throw_away(key.gpa, 1);
            return None;
        }
        self.observe(id, rip, guest, counters);
        Some(id)
    }

    /// Waits until no other CPU may write to the page without asking.
    fn protect_elsewhere(&mut self, page: u64) {
        let cpu = &mut self.context.cpu;
        let asked = cpu.ram.tracker().protect(page, &cpu.peer);
        cpu.wait_for_peers(asked);
    }

    /// True where memory still holds what the block was made from.
    fn stands(&self, block: &GuestBlock, gpa: u64, second: Option<u64>) -> bool {
        let ram = &self.context.cpu.ram;
        let room = ((PAGE_SIZE - (gpa & PAGE_MASK)) as usize).min(block.bytes.len());
        let (first, rest) = block.bytes.split_at(room);
        let holds = |gpa: u64, bytes: &[u8]| ram.ptr(gpa).is_some_and(|p| p.equals(bytes));
        holds(gpa, first) && (rest.is_empty() || second.is_some_and(|page| holds(page, rest)))
    }

    /// Decodes the block at `rip`, from its page alone or one instruction from two pages; tells the second page.
    fn read_block(&mut self, guest: &mut GuestBlock, key: &Key, rip: u64) -> Option<Option<u64>> {
        let how = Decoding::new(key.simd, key.mode, key.privilege, &self.options);
        let mut bytes = [0u8; MOST_BYTES + 15];
        let start = (rip & PAGE_MASK) as u16;
        let len = ((PAGE_SIZE - (rip & PAGE_MASK)) as usize).min(MOST_BYTES);
        let code = self.context.cpu.ram.ptr(key.gpa)?;
        // Few blocks are long.
        let some = len.min(USUAL_BYTES);
        code.read(&mut bytes[..some]);
        let info = self.rewriter.info();
        let mut whole = guest.decode(info, &bytes[..some], start, how);
        if len > some && (!whole || guest.ran_out(some)) {
            code.read(&mut bytes[..len]);
            whole = guest.decode(info, &bytes[..len], start, how);
        }
        if whole {
            if key.form == Form::TwoPages {
                guest.keep_first(how.flag_liveness);
            }
            return (key.form != Form::TwoPages || !guest.is_atomic()).then_some(None);
        }
        let second = self.code_page((rip | PAGE_MASK).wrapping_add(1))?;
        let rest = self.context.cpu.ram.ptr(second)?;
        rest.read(&mut bytes[len..len + 15]);
        let info = self.rewriter.info();
        guest
            .decode(info, &bytes[..len + 15], start, how)
            .then(|| guest.keep_first(how.flag_liveness))?;
        Some(Some(second))
    }

    /// Links the exit that led here to the block; true where that is done, or was.
    fn link(&mut self, block: BlockId) -> bool {
        let Some(exit) = self.link_from.take() else {
            return false;
        };
        let e = self.blocks.exit(exit);
        let (from, to) = (self.blocks.get(e.block), self.blocks.get(block));
        let beyond = !(0..PAGE_SIZE as i64).contains(&e.site.target);
        let across = e.site.slot.is_some() || beyond || to.second_page.is_some();
        let same_mode = from.key.simd == to.key.simd
            && from.key.mode == to.key.mode
            && (e.site.changes_mode || from.key.privilege == to.key.privilege);
        let may = self.options.link && from.alive && same_mode;
        if may {
            self.blocks.link(exit, block, across, &mut self.cache);
            self.context.crossings_to_link = CROSSINGS_A_LINK - 1;
        }
        may
    }

    // ---- what changes under the translations ----

    /// Takes notice of writes to translated code, this CPU's own and others', and of flushes.
    pub fn follow_memory_changes(&mut self) {
        if !self.context.cpu.code_writes.is_empty() {
            self.follow_code_writes();
        }
        if self.context.cpu.peer.has_requests() {
            self.follow_requests();
        }
        if !self.context.cpu.flushed.is_empty() {
            self.follow_flushes();
        }
    }

    fn follow_code_writes(&mut self) {
        for (gpa, len) in self.context.cpu.publish_code_writes() {
            self.throw_away(gpa, u64::from(len));
        }
    }

    /// Does what other CPUs ask for.
    fn follow_requests(&mut self) {
        let (requests, number) = self.context.cpu.peer.take_requests();
        self.context.cpu.give_up_writing(&requests);
        for (page, granules) in requests.code {
            let (from, len) = PageTracker::extent(granules);
            self.throw_away(page + from, len);
        }
        self.context.cpu.peer.answer(number);
    }

    /// Throws the blocks away that were made from any of these bytes.
    pub fn throw_away(&mut self, gpa: u64, len: u64) {
        if let Some(user_code) = &mut self.user_code {
            user_code.written(&self.context.cpu, gpa & !PAGE_MASK);
        }
        let tracker = self.context.cpu.ram.tracker();
        let gone = self.blocks.invalidate(gpa, len, &mut self.cache, tracker);
        for block in gone {
            self.forget_jumps_to(block);
        }
    }

    fn forget_jumps_to(&mut self, block: BlockId) {
        let b = self.blocks.get(block);
        let cache = jump_cache_of(b.key.privilege, b.key.mode);
        let cache = &mut self.context.jump_cache[usize::from(cache)];
        match b.key.base {
            Base::Fixed(page) => cache.forget(page | (b.key.gpa & PAGE_MASK)),
            Base::Dynamic => {
                cache.remove(&b.host_range());
                self.context.code_map.forget_block(&b.key);
            }
        }
    }

    fn follow_flushes(&mut self) {
        let flushed = std::mem::take(&mut self.context.cpu.flushed);
        if let Some(user_code) = &mut self.user_code {
            user_code.flushed(&self.context.cpu, &flushed);
        }
        self.forget_user_return(&flushed);
        let lost = self.code_pages.flush(&flushed);
        if lost.user {
            self.empty_user_jump_caches();
            self.blocks.unlink_cross_page(true, &mut self.cache);
        }
        if lost.kernel {
            self.lost_kernel_code();
        }
        if flushed.switched {
            self.switch_space();
        }
        self.spaces.current = self.context.cpu.spaces.id();
    }

    pub fn lost_kernel_code(&mut self) {
        self.empty_jump_caches(1..3);
        self.blocks.unlink_cross_page(false, &mut self.cache);
    }

    /// Has every entry into user code come by the loop.
    pub fn forget_user_jumps(&mut self) {
        self.empty_user_jump_caches();
        self.blocks.unlink_cross_page(true, &mut self.cache);
    }

    fn empty_user_jump_caches(&mut self) {
        self.empty_jump_caches(0..1);
        self.empty_jump_caches(NARROW_USER.into()..JUMP_CACHES);
    }

    fn empty_jump_caches(&mut self, which: std::ops::Range<usize>) {
        if which.contains(&(Privilege::User as usize)) {
            self.context.code_map.forget_pages();
        }
        for cache in &mut self.context.jump_cache[which] {
            cache.clear();
        }
    }

    fn empty_cache(&mut self) {
        self.counts.cache_flushes += 1;
        let tracker = self.context.cpu.ram.tracker();
        self.blocks.clear(tracker);
        self.context.forms = self.blocks.forms();
        self.cache.clear();
        self.link_from = None;
        self.empty_jump_caches(0..JUMP_CACHES);
        self.context.code_map.clear();
        self.spaces.clear();
        self.observe_emptying();
    }
}

/// The mode for which the code at RIP may be translated in the CPU's present state, if it may.
fn translatable(cpu: &Cpu, options: &TranslateOptions) -> Option<Mode> {
    let stepping = cpu.rflags.contains(Rflags::TF) || cpu.has_instruction_breakpoints();
    let shadow = cpu.interrupt_shadow || cpu.mov_ss_shadow;
    let checks = cpu.cpl == 3 && needs_checks(cpu);
    if stepping || shadow || checks {
        return None;
    }
    Mode::of(cpu).filter(|mode| options.narrow_modes || !mode.is_narrow())
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
