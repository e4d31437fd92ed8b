//! From a guest address to its translation, and what happens when the memory below changes.

use doppel_memory::{
    AccessKind, CodeGranules, PAGE_MASK, PAGE_SIZE, PageTracker, Privilege, code_neighbours,
};
use doppel_x86::{Cpu, Cr0, Cr4, Rflags};

use crate::blocks::{BlockId, Form, Key, Link, Made, NARROW_USER, jump_cache_of};
use crate::code_map::CROSSINGS_A_LINK;
use crate::context::JUMP_CACHES;
use crate::engine::TranslateOptions;
use crate::frontend::{Decoding, GuestBlock, MOST_BYTES, Processor, Simd};
use crate::narrow::{self, LAST_NARROW_PAGE, Mode};
use crate::records::{MAX_CODE, NARROW_GPA_BITS};
use crate::rewrite::{Base, Setting};
use crate::translator::{CACHE_MARGIN, Translator};

/// Bytes that are read for a block, unless they turn out to be too few.
const USUAL_BYTES: usize = 96;

/// Blocks that leave the jump caches one by one: more cost more than the caches are worth.
const MOST_ONE_BY_ONE: usize = 64;

/// So many pages of user code may be no more than a process touches that runs for a moment.
const FEW_PAGES: usize = 8;

impl Translator {
    /// Host address of the translation at the CPU's RIP; `None` where the instruction there has to be interpreted.
    pub fn find_translation(&mut self) -> Option<u64> {
        let Some(mode) = translatable(&self.context.cpu, &self.options) else {
            self.counts.untranslatable += 1;
            return None;
        };
        let mode = self.with_window(mode);
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
        self.hold();
        let block = self.find_block(rip)?;
        if !self.link(block) {
            let host = self.code.blocks.entry_saved(block);
            self.context.jump_cache[cache].insert(rip, host, block);
        }
        Some(self.code.blocks.entry_saved(block))
    }

    fn find_block(&mut self, rip: u64) -> Option<BlockId> {
        let linear = self.mode.linear(rip);
        if self.mode.is_narrow()
            && (linear.max(rip) >= LAST_NARROW_PAGE || self.mode.room(rip) == 0)
        {
            // Its code goes on at address 0, or is outside of its segment.
            return None;
        }
        let gpa = self.code_page(linear)? | (linear & PAGE_MASK);
        if self.mode.is_narrow() && gpa >> NARROW_GPA_BITS != 0 {
            return None;
        }
        let key = self.key(gpa, rip);
        let found = self.code.blocks.find(&key);
        let found = found.filter(|b| self.still_straddles(*b, linear));
        if found.is_none() && self.leaves_untranslated(gpa & !PAGE_MASK) {
            return None;
        }
        let block = found.or_else(|| self.translate_block(key, rip))?;
        if self.code.blocks.second_page(block).is_none() {
            let host = self.code.blocks.entry_saved(block);
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
        if mode == Mode::LONG && self.kernel_mode == Mode::LONG {
            return;
        }
        let cpu = &self.context.cpu;
        let rights = !mode.paragraphs;
        let ends = [false, true].map(|write| cpu.seg.map(|s| narrow::last(&s, write, rights)));
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
            Privilege::User if !self.mode.is_placed() => Base::Dynamic,
            _ => Base::Fixed(self.mode.origin(rip)),
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

    /// Physical page of the code at a linear address, from the guest's page tables.
    pub fn code_page(&mut self, linear: u64) -> Option<u64> {
        let cpu = &mut self.context.cpu;
        let user = cpu.cpl == 3;
        let page = linear & !PAGE_MASK;
        if let Some(gpa) = self.code_pages.get(user, page) {
            self.note_page(user, page, gpa);
            return Some(gpa);
        }
        if !cpu.canonical(linear) {
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
        match user {
            true => self.enter_user_page(page, gpa),
            false => self.code_pages.insert_kernel(page, &t),
        }
        if user && self.options.code_neighbours && self.code_pages.user_pages() > FEW_PAGES {
            self.enter_neighbours(page);
        }
        Some(gpa)
    }

    /// Enters the pages around one of user code that was just found, as far as code of theirs is translated: a program that begins would ask
    /// for each of them.
    fn enter_neighbours(&mut self, page: u64) {
        let cpu = &self.context.cpu;
        let (ram, paging) = (cpu.ram.clone(), cpu.paging());
        for (linear, gpa) in code_neighbours(&ram, &paging, page) {
            if ram.tracker().has_code(gpa) && self.code_pages.get(true, linear).is_none() {
                self.counts.neighbours += 1;
                self.enter_user_page(linear, gpa);
            }
        }
    }

    fn enter_user_page(&mut self, page: u64, gpa: u64) {
        if self.code_pages.insert_user(page, gpa) {
            self.counts.pages_mapped_twice += 1;
            self.unlink_cross_page(true);
        }
        self.note_page(true, page, gpa);
    }

    fn note_page(&mut self, user: bool, linear: u64, gpa: u64) {
        if user && self.mode == Mode::LONG {
            self.context.code_map.note_page(linear, gpa, self.simd);
        }
    }

    fn still_straddles(&mut self, block: BlockId, linear: u64) -> bool {
        match self.code.blocks.second_page(block) {
            None => true,
            Some(second) => self.code_page((linear | PAGE_MASK).wrapping_add(1)) == Some(second),
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
        if self.code.room() < CACHE_MARGIN && !self.make_room() {
            return None;
        }
        let counters = self.observers.counters(guest);
        let setting = Setting {
            base: key.base,
            form: key.form,
            privilege: key.privilege,
            options: self.options,
            counters: counters.as_ref().map(|c| c.as_ptr() as u64),
            slots: self.code.cache.slots_used() as u32,
            shared: self.code.is_shared(),
            thunks: self.thunks,
            simd: key.simd,
            mode: key.mode,
        };
        let first = self.code.blocks.first_sites();
        let translated = self
            .rewriter
            .translate(guest, setting, self.code.cache.cursor(), first);
        if self.rewriter.asm.bytes.len() > MAX_CODE {
            return None;
        }
        let host = self.code.cache.append(&self.rewriter.asm.bytes);
        (self.code.cache).take(translated.slots, translated.accesses.len());
        self.counts.translations += 1;
        self.counts.narrow += u64::from(key.mode.is_narrow());
        self.counts.short += u64::from(!key.mode.is_usual());
        self.counts.unencodable += u64::from(translated.unencodable);
        self.counts.encoded += u64::from(translated.encoded);
        self.counts.pins += u64::from(translated.pins);
        self.counts.holds += u64::from(translated.holds);
        self.counts.shared_checks += u64::from(translated.shared);
        self.counts.windowed += u64::from(translated.windowed);
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
        let id = self.code.blocks.insert(key, made, tracker);
        self.rewriter.recycle(translated);
        let generation = self.code.blocks.generation;
        for page in fresh.into_iter().flatten() {
            self.context.cpu.give_up_writing_to(page);
        }
        for page in pages.into_iter().flatten() {
            self.protect_elsewhere(page);
        }
        self.hold();
        let code = &mut *self.code;
        if code.blocks.generation != generation || !code.blocks.is_alive(id) {
            return None;
        }
        if !self.stands(guest, key.gpa, second_page) {
            let tracker = self.context.cpu.ram.tracker();
            let code = &mut *self.code;
            code.blocks.discard(id, &mut code.cache, tracker);
            return None;
        }
        self.code.blocks.publish(id);
        self.observe(id, rip, guest, counters);
        Some(id)
    }

    /// Waits until no other CPU may write to the page without asking.
    fn protect_elsewhere(&mut self, page: u64) {
        let cpu = &mut self.context.cpu;
        let asked = cpu.ram.tracker().protect(page, &cpu.peer);
        if !asked.is_empty() {
            self.code.put_back();
            cpu.wait_for_peers(asked);
        }
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
        let processor = Processor::of(&self.context.cpu.cpuid);
        let how = Decoding::new(processor, key.simd, key.mode, key.privilege, &self.options);
        let how = how.placed(key.base);
        let start = (key.gpa & PAGE_MASK) as u16;
        let allowed = key.mode.room(rip).min((MOST_BYTES + 15) as u64) as usize;
        let len = ((PAGE_SIZE - u64::from(start)) as usize).min(MOST_BYTES);
        let (whole_page, len) = (len <= allowed, len.min(allowed));
        let code = self.context.cpu.ram.ptr(key.gpa)?;
        let info = self.rewriter.info();
        // Few blocks are long.
        let mut usual = [0; USUAL_BYTES];
        let usual = &mut usual[..len.min(USUAL_BYTES)];
        code.read(usual);
        let mut whole = guest.decode(info, usual, start, how);
        if len > usual.len() && (!whole || guest.ran_out(usual.len())) {
            let mut bytes = [0; MOST_BYTES];
            code.read(&mut bytes[..len]);
            whole = guest.decode(info, &bytes[..len], start, how);
        }
        if whole {
            if key.form == Form::TwoPages {
                guest.keep_first(how.flag_liveness);
            }
            return (key.form != Form::TwoPages || !guest.must_write_in_place()).then_some(None);
        }
        if !whole_page {
            return None;
        }
        let linear = key.mode.linear(rip);
        let second = self.code_page((linear | PAGE_MASK).wrapping_add(1))?;
        let rest = self.context.cpu.ram.ptr(second)?;
        let mut bytes = [0; MOST_BYTES + 15];
        code.read(&mut bytes[..len]);
        rest.read(&mut bytes[len..len + 15]);
        let both = (len + 15).min(allowed);
        let info = self.rewriter.info();
        guest
            .decode(info, &bytes[..both], start, how)
            .then(|| guest.keep_first(how.flag_liveness))?;
        Some(Some(second))
    }

    /// Links the exit that led here to the block; true where that is done, or was.
    fn link(&mut self, block: BlockId) -> bool {
        let Some(exit) = self.link_from.take() else {
            return false;
        };
        let e = self.code.blocks.exit(exit);
        let (from, to) = (self.code.blocks.get(e.block), self.code.blocks.get(block));
        let beyond = !(0..PAGE_SIZE as i64).contains(&e.site.target);
        let across = e.site.slot.is_some() || beyond || to.second_page.is_some();
        let same_mode = from.key.simd == to.key.simd
            && from.key.mode == to.key.mode
            && (e.site.changes_mode || from.key.privilege == to.key.privilege);
        let known = !(across
            && from.key.base == Base::Dynamic
            && self.code_pages.is_mapped_twice(from.key.gpa & !PAGE_MASK));
        let may = self.options.link && from.alive && same_mode && known;
        let linked = may && self.connect((exit, block), across);
        if linked {
            self.context.crossings_to_link = CROSSINGS_A_LINK - 1;
        }
        linked
    }

    /// Links an exit to a block, in the code or through the exit's slot. A link that assumes where other pages are is in no code that several
    /// CPUs run.
    pub fn connect(&mut self, (exit, to): Link, across: bool) -> bool {
        let shared = self.code.is_shared();
        let code = &mut *self.code;
        let e = code.blocks.exit(exit);
        if let Some(slot) = e.site.slot {
            let user = code.blocks.privilege(e.block) == Privilege::User as u8;
            (self.slot_links).link(slot, (exit, to), user, &code.blocks);
            code.blocks.links += 1;
            return true;
        }
        if across && shared {
            return false;
        }
        code.blocks.link(exit, to, across, &mut code.cache);
        true
    }

    /// Cuts every link of user or of kernel code that leads to another page.
    fn unlink_cross_page(&mut self, user: bool) {
        self.hold();
        let code = &mut *self.code;
        code.blocks.unlink_cross_page(user, &mut code.cache);
        self.slot_links.cut(user, &code.blocks);
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
        self.code.put_back();
    }

    fn follow_code_writes(&mut self) {
        self.code.put_back();
        let writes = self.context.cpu.publish_code_writes();
        let writes = writes.into_iter().map(|(gpa, len)| (gpa, u64::from(len)));
        self.throw_away(writes.collect());
    }

    /// Does what other CPUs ask for.
    fn follow_requests(&mut self) {
        self.code.put_back();
        let (requests, number) = self.context.cpu.peer.take_requests();
        self.context.cpu.give_up_writing(&requests);
        self.throw_away(requests.code.into_iter().map(extent).collect());
        self.context.cpu.peer.answer(number);
    }

    /// Throws the blocks away that were made from any of these bytes. Where CPUs share them, the first of those who are told does.
    fn throw_away(&mut self, mut writes: Vec<(u64, u64)>) {
        if let Some(user_code) = &mut self.user_code {
            for (gpa, _) in &writes {
                user_code.written(&self.context.cpu, gpa & !PAGE_MASK);
            }
        }
        self.hold();
        if self.code.is_shared() {
            if self.context.cpu.peer.is_shared() {
                // All that was told stands there, unless another did it already.
                writes.clear();
            }
            let written = self.code.blocks.peer().take_written();
            writes.extend(written.into_iter().map(extent));
        }
        let tracker = self.context.cpu.ram.tracker();
        let code = &mut *self.code;
        for (gpa, len) in writes {
            code.blocks.invalidate(gpa, len, &mut code.cache, tracker);
        }
        self.follow_removed();
    }

    /// Takes the code, and follows what others have thrown away since.
    #[inline]
    pub fn hold(&mut self) {
        if self.code.take() {
            self.follow_removed();
        }
    }

    /// Forgets every way to blocks that were thrown away.
    fn follow_removed(&mut self) {
        let (generation, followed) = self.followed;
        if self.code.blocks.generation != generation {
            return self.forget_all();
        }
        let removed = self.code.blocks.removed.len();
        if removed == followed {
            return;
        }
        self.followed.1 = removed;
        if removed - followed > MOST_ONE_BY_ONE {
            self.empty_jump_caches(0..JUMP_CACHES);
            self.context.code_map.clear();
        } else {
            for n in followed..removed {
                self.forget_jumps_to(self.code.blocks.removed[n]);
            }
        }
        let blocks = &self.code.blocks;
        let removed = &blocks.removed[followed..];
        self.slot_links.cut_to(removed, blocks);
    }

    fn forget_jumps_to(&mut self, block: BlockId) {
        let b = self.code.blocks.get(block);
        let cache = jump_cache_of(b.key.privilege, b.key.mode);
        let cache = &mut self.context.jump_cache[usize::from(cache)];
        match b.key.base {
            Base::Fixed(origin) => {
                let rip = origin.wrapping_add(b.key.gpa & PAGE_MASK);
                cache.forget(b.key.mode.cut(rip));
            }
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
        self.forget_returns(&flushed);
        let lost = self.code_pages.flush(&flushed);
        if lost.user {
            self.forget_user_jumps();
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
        self.unlink_cross_page(false);
    }

    /// Has every entry into user code come by the loop.
    pub fn forget_user_jumps(&mut self) {
        self.empty_user_jump_caches();
        self.unlink_cross_page(true);
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

    /// Empties the full cache; false where that has to wait. Where CPUs share it, all others are outside meanwhile.
    fn make_room(&mut self) -> bool {
        if !self.code.is_shared() {
            self.empty_cache();
            return true;
        }
        let full = self.followed.0;
        self.code.put_back();
        let peer = self.context.cpu.peer.clone();
        peer.alone(|| {
            self.hold();
            if self.followed.0 == full && self.code.busy == 0 {
                self.empty_cache();
            }
        });
        self.code.room() >= CACHE_MARGIN
    }

    fn empty_cache(&mut self) {
        self.counts.cache_flushes += 1;
        let tracker = self.context.cpu.ram.tracker();
        let code = &mut *self.code;
        code.blocks.clear(tracker);
        code.cache.clear();
        self.forget_all();
        self.observe_emptying();
    }

    /// All blocks are gone.
    fn forget_all(&mut self) {
        self.followed = (self.code.blocks.generation, self.code.blocks.removed.len());
        self.link_from = None;
        self.empty_jump_caches(0..JUMP_CACHES);
        self.slot_links.forget();
        self.context.code_map.clear();
        self.known_sites.clear();
        self.spaces.clear();
    }
}

/// The bytes that granules of a page stand for: where they begin, and how many.
fn extent((page, granules): (u64, CodeGranules)) -> (u64, u64) {
    let (from, len) = PageTracker::extent(granules);
    (page + from, len)
}

/// The mode for which the code at RIP may be translated in the CPU's present state, if it may.
fn translatable(cpu: &Cpu, options: &TranslateOptions) -> Option<Mode> {
    let stepping = cpu.rflags.contains(Rflags::TF) || cpu.has_instruction_breakpoints();
    let shadow = cpu.interrupt_shadow || cpu.mov_ss_shadow;
    let checks = cpu.cpl != 0 && needs_checks(cpu);
    if stepping || shadow || checks || cpu.virtual_interrupt_waits() {
        return None;
    }
    let allowed = |mode: &Mode| match mode.is_narrow() {
        true => options.narrow_modes && (options.short_modes || mode.is_usual()),
        false => options.short_modes || mode.is_usual(),
    };
    Mode::of(cpu).filter(allowed)
}

/// Code whose RDTSC, or user code whose unaligned accesses, are to fault.
fn needs_checks(cpu: &Cpu) -> bool {
    cpu.cr4.contains(Cr4::TSD)
        || (cpu.cpl == 3 && cpu.rflags.contains(Rflags::AC) && cpu.cr0.contains(Cr0::AM))
}

fn simd_of(cpu: &Cpu) -> Simd {
    // With NE clear an x87 error is told of by a pin, which the interpreter sees to.
    let switched_off = cpu.cr0.intersects(Cr0::EM | Cr0::TS) || !cpu.cr0.contains(Cr0::NE);
    if switched_off || !cpu.cr4.contains(Cr4::OSFXSR) {
        return Simd::None;
    }
    match cpu.xcr0 {
        x if !cpu.cr4.contains(Cr4::OSXSAVE) || x & 6 != 6 => Simd::Sse,
        x if x & 0xe0 == 0xe0 => Simd::Avx512,
        _ => Simd::Avx,
    }
}
