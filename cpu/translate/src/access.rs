//! Memory accesses that the inline check turned away.
//!
//! A miss is filled from the guest's page tables and the check tried again. An access that crosses into another page goes on
//! behind the check: at the host's address where the two pages lie side by side in the host too (they do wherever the guest has
//! them side by side in its physical memory), else at a copy of its bytes; a write then goes through a translation of its own of
//! the one instruction ([`Form::TwoPages`]), which copies back. A write to a page with translated code, but beside that, is made as it is: kernels
//! patch themselves in many small steps. Everything else (a fault, a device, a page with code, an atomic
//! access) is left to the interpreter.

use doppel_memory::{AccessKind, HostPtr, PAGE_MASK, PAGE_SIZE, Privilege, Translation};
use doppel_x86::Cpu;

use crate::blocks::{Access, BlockId, Form, Key};
use crate::flags::{FlagPlace, pack, unpack};
use crate::rewrite::AccessSite;
use crate::thunk::EXIT_ACCESS;
use crate::translator::{CACHE_MARGIN, PRIVILEGES, Translator};

/// Pages that are counted at a time.
const MOST_BESIDES: usize = 4096;

/// What a slow path has to know of its check.
#[derive(Clone, Copy)]
pub(crate) struct Site {
    access: Access,
    /// Host address of the block.
    host: u64,
    narrow: bool,
    privilege: Privilege,
}

/// Sites whose checks failed lately, with their numbers.
#[derive(Default)]
pub(crate) struct KnownSites(Vec<(u32, Site)>);

impl KnownSites {
    const SIZE: usize = 1024;

    fn note(&mut self, number: u32, site: Site) {
        self.0.resize(Self::SIZE, (number, site));
        self.0[number as usize % Self::SIZE] = (number, site);
    }

    /// The numbers stand for others from now on.
    pub fn clear(&mut self) {
        self.0.clear();
    }
}

impl Translator {
    /// Called by generated code: returns where to go on, or 0 to leave and interpret the instruction.
    pub fn access(&mut self, linear: u64, site: u32) -> u64 {
        self.counts.tlb_misses += 1;
        let site_of = self.site(site);
        let on = self.go_on(linear, site_of, site);
        self.code.put_back();
        on.unwrap_or_else(|| {
            self.context.exit = EXIT_ACCESS;
            self.context.fault_pc = u64::from(site);
            0
        })
    }

    /// What there is to know of a site. Where the code is shared it is kept, so that a miss takes no lock.
    fn site(&mut self, number: u32) -> Site {
        let place = number as usize % KnownSites::SIZE;
        let shared = self.code.is_shared();
        if shared
            && let Some((n, site)) = self.known_sites.0.get(place)
            && *n == number
        {
            return *site;
        }
        self.hold();
        let blocks = &self.code.blocks;
        let access = blocks.access(number);
        let site = Site {
            access,
            host: blocks.host(access.block),
            narrow: blocks.mode(access.block).is_narrow(),
            privilege: PRIVILEGES[usize::from(blocks.privilege(access.block))],
        };
        if shared {
            self.known_sites.note(number, site);
            self.code.put_back();
        }
        site
    }

    fn go_on(&mut self, linear: u64, at: Site, number: u32) -> Option<u64> {
        let (access, host, privilege) = (at.access, at.host, at.privilege);
        let site = access.site;
        if at.narrow && linear + u64::from(site.span) > 1 << 32 {
            // It goes on at address 0.
            return None;
        }
        if site.own.size == 0 {
            return self.whole_span(linear, &site, privilege, host);
        }
        let own = linear.wrapping_add(u64::from(site.own.from));
        if site.careful.is_some()
            && let Some(at) = self.stretch(linear, &site, privilege)
        {
            self.context.slow_linear = at;
            return Some(host + u64::from(site.done));
        }
        if room(own) >= u64::from(site.own.size) {
            if let Err(t) = self.page(own, site.own.write, privilege) {
                self.context.slow_linear = self.beside_code(linear, &site, t?)?;
                return Some(host + u64::from(site.done));
            }
            if self.covers(linear, &site, privilege) {
                return Some(host + u64::from(site.retry));
            }
            return self.careful_form(access);
        }
        if site.careful.is_some() {
            return self.careful_form(access);
        }
        self.counts.page_crossings += 1;
        self.two_pages(linear, at, number)
    }

    /// Goes on with an access to all of the check's span.
    fn whole_span(
        &mut self,
        linear: u64,
        site: &AccessSite,
        privilege: Privilege,
        host: u64,
    ) -> Option<u64> {
        let at = match room(linear) >= u64::from(site.span) {
            false => self.stretch(linear, site, privilege)?,
            true => match self.page(linear, site.write, privilege) {
                Ok(_) => return Some(host + u64::from(site.retry)),
                Err(t) => self.beside_code(linear, site, t?)?,
            },
        };
        self.context.slow_linear = at;
        Some(host + u64::from(site.done))
    }

    /// Host address of a shared check's stretch that lies in two pages, where these are neighbours in the host. They are only
    /// read by the walk: a write that the stretch may end in marks its page as dirty when it happens.
    fn stretch(&mut self, linear: u64, site: &AccessSite, privilege: Privilege) -> Option<u64> {
        if room(linear) >= u64::from(site.span) {
            return None;
        }
        let next = (linear | PAGE_MASK).wrapping_add(1);
        let [first, second] = [linear, next].map(|at| {
            self.page(at, false, privilege).ok()?;
            lookup(&self.context.cpu, at, site.write, privilege)
        });
        let (first, second) = (first?, second?);
        (first.addr() + first.room() as u64 == second.addr()).then_some(first.addr())
    }

    /// True where the check will pass now.
    fn covers(&self, linear: u64, site: &AccessSite, privilege: Privilege) -> bool {
        let known = lookup(&self.context.cpu, linear, site.write, privilege);
        room(linear) >= u64::from(site.span) && known.is_some()
    }

    /// The block from the instruction of a shared check on, with a check for each access; the slow path leads there from now on.
    fn careful_form(&mut self, access: Access) -> Option<u64> {
        self.counts.careful += 1;
        let exit = access.site.careful?;
        let block = self.form(access, Form::Careful)?;
        let from = self.code.blocks.get(access.block);
        let (alive, simd) = (from.alive, from.simd);
        self.give_back(access.site.borrowed);
        if alive {
            self.connect((exit, block), false);
        }
        Some(self.enter_form(block, access, simd))
    }

    /// Where another form of the block is entered; flags that are worked out are saved.
    fn enter_form(&mut self, block: BlockId, from: Access, simd: bool) -> u64 {
        let mut place = from.site.flags;
        let lost = self.code.blocks.lost_at(&from);
        if lost.is_some() {
            let saved = unpack(self.context.flags);
            self.context.flags = pack(self.rebuilt(lost, saved));
            place = FlagPlace::Saved;
        }
        self.code.blocks.get(block).entry(place, simd)
    }

    /// Enters the page into the TLB; its host address at `linear`, where translated code may access it, or else the translation if
    /// there is one.
    fn page(
        &mut self,
        linear: u64,
        write: bool,
        privilege: Privilege,
    ) -> Result<HostPtr, Option<Translation>> {
        if !self.context.cpu.canonical(linear) {
            return Err(None);
        }
        let cpu = &mut self.context.cpu;
        if let Some(known) = lookup(cpu, linear, write, privilege) {
            return Ok(known);
        }
        let kind = if write {
            AccessKind::Write
        } else {
            AccessKind::Read
        };
        let t = cpu.translate(linear, kind, privilege).map_err(|_| None)?;
        lookup(cpu, linear, write, privilege).ok_or(Some(t))
    }

    /// Host address of what a check is for, where it lies in a page with translated code but beside that. The page is entered into no
    /// TLB, so that the next write to it comes here too. Whoever translates from it meanwhile waits for this CPU to leave.
    fn beside_code(&mut self, linear: u64, site: &AccessSite, t: Translation) -> Option<u64> {
        let cpu = &self.context.cpu;
        let gpa = (t.gpa & !PAGE_MASK) | (linear & PAGE_MASK);
        let len = match site.own.repeats {
            true => room(linear),
            false => site.span.into(),
        };
        let tracker = cpu.ram.tracker();
        let may = self.options.write_beside_code
            && site.write
            && room(linear) >= len
            && !cpu.page_is_watched(linear)
            && tracker.has_code(gpa);
        let at = may.then(|| cpu.ram.ptr(gpa)).flatten()?;
        tracker.add_writer(gpa, &cpu.peer);
        if tracker.touched_code(gpa, len) {
            return None;
        }
        self.counts.beside_code += 1;
        self.note_write_beside_code(gpa & !PAGE_MASK);
        Some(at.addr())
    }

    /// A page with code that is written to again and again is a page of data now: its code is thrown away. If that is executed all the same, many
    /// more writes are needed for the next time.
    fn note_write_beside_code(&mut self, page: u64) {
        const FIRST: u32 = 1000;
        if self.besides.len() >= MOST_BESIDES {
            self.besides.clear();
        }
        let (writes, limit) = self.besides.entry(page).or_insert((0, FIRST));
        *writes += 1;
        if *writes >= *limit {
            (*writes, *limit) = (0, limit.saturating_mul(8));
            self.counts.pages_turned_to_data += 1;
            self.context.cpu.code_writes.push((page, PAGE_SIZE as u32));
            self.context.call_out();
        }
    }

    /// Where to go on with an access to two pages; what it is to access instead is left in `slow_linear`.
    fn two_pages(&mut self, linear: u64, at: Site, number: u32) -> Option<u64> {
        let (access, privilege) = (at.access, at.privilege);
        let site = access.site;
        let first = self.page(linear, site.write, privilege).ok()?;
        let next = (linear | PAGE_MASK).wrapping_add(1);
        let second = self.page(next, site.write, privilege).ok()?;
        let behind = at.host + u64::from(site.done);
        if first.addr() + first.room() as u64 == second.addr() {
            self.context.slow_linear = first.addr();
            return Some(behind);
        }
        let at = if site.write {
            let at = self.two_page_form(access, number)?;
            self.give_back(site.borrowed);
            at
        } else {
            behind
        };
        let ctx = &mut *self.context;
        let (low, high) = ctx.bounce.0.split_at_mut(64);
        first.read(&mut low[64 - first.room()..]);
        second.read(high);
        ctx.copy_to = [first.addr(), second.addr()];
        ctx.slow_linear = ctx.bounce_at + (linear & 63);
        Some(at)
    }

    /// Where the instruction of the access begins in its translation that copies back.
    fn two_page_form(&mut self, access: Access, site: u32) -> Option<u64> {
        if !access.site.own_operand {
            return None;
        }
        self.hold();
        let simd = self.code.blocks.get(access.block).simd;
        let block = self.form(access, Form::TwoPages)?;
        let at = self.enter_form(block, access, simd);
        // A register has to be given back first where one is borrowed: only the monitor can.
        if access.site.borrowed.is_none() {
            self.code.cache.set_form(site, at);
        }
        Some(at)
    }

    /// The block from the instruction of the access on, in another form.
    fn form(&mut self, access: Access, form: Form) -> Option<BlockId> {
        self.hold();
        let from = self.code.blocks.get(access.block);
        if from.second_page.is_some() {
            return None;
        }
        let key = Key {
            gpa: (from.key.gpa & !PAGE_MASK) | u64::from(access.site.offset),
            form,
            ..from.key
        };
        match self.code.blocks.find(&key) {
            Some(block) => Some(block),
            // An emptied cache would leave nothing to go back to.
            None if self.code.room() < 2 * CACHE_MARGIN => None,
            None => {
                // Translated code is gone back to even where others are waited for, so it stays.
                self.code.busy += 1;
                let block = self.translate_block(key, u64::from(access.site.offset));
                self.code.busy -= 1;
                // What came while other CPUs were waited for is followed first, outside of translated code.
                block.filter(|_| !self.context.cpu.peer.has_requests())
            }
        }
    }
}

fn room(linear: u64) -> u64 {
    PAGE_SIZE - (linear & PAGE_MASK)
}

fn lookup(cpu: &Cpu, linear: u64, write: bool, privilege: Privilege) -> Option<HostPtr> {
    let tlb = &cpu.tlb[privilege as usize];
    if write {
        tlb.lookup_write(linear, 1)
    } else {
        tlb.lookup_read(linear, 1)
    }
}
