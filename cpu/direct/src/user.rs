//! User code of one vCPU, executed by children: the shadow page tables of its address spaces, and what happens at each stop.
//!
//! Problem: the processor executes user code under the host kernel's rules, in a process whose mappings stand in for the guest's page tables. Each trap has to
//! become what the guest would have seen.
//! Idea: a trap hardly ever becomes an exception here ([`transfer::raised`]). Either it means that the shadow lacks a page, then that is mapped and the code goes on; or the
//! instruction at RIP is left to the interpreter, which raises whatever it raises, by the one implementation there is.
//! Invariants:
//! * user code runs in a child only where its whole state is what the child's can be ([`eligible`]);
//! * a page is executable in a child only while this CPU has claimed it as code ([`doppel_memory::PageTracker::claim_code`]) and no sensitive instruction
//!   was found in it, and never while it may be written there;
//! * what is asked of this CPU (permissions to give up, flushes) reaches a child before its next instruction, since it runs only within [`Direct::run`].
//!
//! Cost: see docs/direct.md.

mod page_fault;
mod shadow_paging;

use std::collections::BTreeMap;
use std::sync::Arc;

use doppel_memory::{AccessKind, PAGE_MASK, probe};
use doppel_x86::{
    Cpu, CpuMode, Cr0, Cr4, EngineStats, Exception, Flushed, Kick, Left, Rflags, Seg, Segment,
    UserCode, host_tsc,
};
use rustc_hash::FxHashMap;

use crate::Change;
use crate::counts::{Counts, nanoseconds};
use crate::hazard::{Hazards, Verdict};
use crate::patched::PatchedPage;
use crate::pin::Pin;
use crate::policy::{Account, Explorer, Look, Looks, Scout, Stretch, Times};
use crate::prices::{self, Again};
use crate::shadow::{Entry, Revoked};
use crate::space::Space;
use crate::spent::{self, Spent};
use crate::state::{self, UserState};
use crate::transfer;
use crate::{DirectError, DirectHost, KickFlag, Stop};

/// Address spaces with a child, for one vCPU.
const MOST_SPACES: usize = 32;
/// Mappings that one page fault makes at most: at first, and where faults follow each other.
const MAPPINGS: (usize, usize) = (16, 128);
/// Times that a page changes between written and executed before it is executed no more.
const MOST_TURNS: u32 = 20;

/// Pages of which it is kept where CPUIDs were executed, and CPUIDs of a page.
const MOST_ASKING: usize = 1024;

/// A page that was claimed as code.
#[derive(Debug)]
struct Claim {
    /// Of the page, or of its copy.
    verdict: Verdict,
    /// A copy that is executed in its place.
    patched: Option<PatchedPage>,
    /// The program that came to it first: [`Space::life`].
    life: u64,
}

/// Where CPUIDs were executed in a page.
#[derive(Debug, Default)]
struct Asked {
    /// A digest of the page as it was: of another nothing is known.
    code: u64,
    at: Vec<u16>,
}

/// How user code is executed directly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DirectOptions {
    /// Always, whether that is faster or not: for tests.
    pub always: bool,
    /// Pages with sensitive code are not executed, even where a patched copy could be.
    pub unpatched: bool,
}

impl DirectOptions {
    /// Always, with all that direct execution has.
    pub fn always() -> Self {
        DirectOptions {
            always: true,
            unpatched: false,
        }
    }
}

/// Has the engine come by after a time: whoever keeps it calls the engine, as an interrupt does.
pub trait Reminder: Send + Sync {
    /// In so many nanoseconds, and no longer at an earlier time that was asked for.
    fn after(&self, nanoseconds: u64);
    /// Whether it has called since this was last asked.
    fn take_rung(&self) -> bool;
}

/// Direct execution for one vCPU.
pub struct Direct {
    host: Arc<DirectHost>,
    hazards: Hazards,
    options: DirectOptions,
    times: Times,
    again: Again,
    scout: Scout,
    explorer: Explorer,
    /// Pages of code that nobody had executed, since the last stop.
    explored: u64,
    reminder: Option<Arc<dyn Reminder>>,
    looks: Looks,
    /// How often user code had been entered when it was last left to this.
    entries: u64,
    spaces: BTreeMap<u64, Space>,
    claims: FxHashMap<u64, Claim>,
    /// Where in pages of code CPUIDs were executed, whether they are claimed yet or not.
    asked_cpuid: FxHashMap<u64, Asked>,
    /// The program that runs, and how many there were.
    life: u64,
    lives: u64,
    /// The CPU's number as RDTSCP tells it, which some copies of pages have in them.
    number: u64,
    /// How often pages that were executed were written.
    turns: FxHashMap<u64, u32>,
    /// Guest physical pages that may be in some shadow, a bit each.
    mapped: Vec<u64>,
    user: Box<UserState>,
    kicker: Arc<Kicker>,
    /// The id of the CPU's translations, when it was last told.
    current: u64,
    /// Mappings that the next page fault may make.
    ambition: usize,
    /// An access that the guest's kernel has to see to first: which address space, where, what.
    missed: Option<(u64, u64, AccessKind)>,
    pin: Pin,
    /// A child was kicked while it ran, and the engine has not heard of it yet.
    kicked: bool,
    /// Children that could not be had.
    failures: u32,
    counts: Counts,
    tsc_hz: u64,
}

impl Direct {
    /// For one vCPU with this CPU's RAM.
    pub fn new(host: Arc<DirectHost>, cpu: &Cpu, options: DirectOptions) -> Self {
        let pages = cpu.ram.tracker().pages();
        let times = match options.always {
            true => Times::free(),
            false => Times::new(cpu.tsc_hz, host.prices()),
        };
        Direct {
            hazards: host.hazards(&cpu.cpuid),
            host,
            options,
            times,
            again: Again::default(),
            scout: Scout::default(),
            explorer: Explorer::default(),
            explored: 0,
            reminder: None,
            looks: Looks::default(),
            entries: 0,
            spaces: BTreeMap::new(),
            claims: FxHashMap::default(),
            asked_cpuid: FxHashMap::default(),
            number: cpu.msr.tsc_aux,
            life: 0,
            lives: 0,
            turns: FxHashMap::default(),
            mapped: vec![0; pages.div_ceil(64) as usize],
            user: Box::new(UserState::new(0)),
            kicker: Arc::default(),
            current: 0,
            ambition: MAPPINGS.0,
            missed: None,
            pin: Pin::default(),
            kicked: false,
            failures: 0,
            counts: Counts::default(),
            tsc_hz: cpu.tsc_hz,
        }
    }

    /// With somebody who has the engine come by between the guest's own interrupts.
    pub fn reminded_by(self, reminder: Arc<dyn Reminder>) -> Self {
        Direct {
            reminder: Some(reminder),
            ..self
        }
    }

    /// Has the engine come by soon for another look.
    fn look_again(&mut self) {
        if let Some(reminder) = &self.reminder
            && let Some(after) = self.looks.next(&self.times, host_tsc())
        {
            reminder.after(nanoseconds(after, self.tsc_hz));
        }
    }

    fn look(&self, cpu: &Cpu, entries: u64, asked: bool) -> Look {
        Look {
            root: root(cpu),
            tsc: host_tsc(),
            spent: spent::of_this_thread(self.tsc_hz),
            entries,
            asked,
        }
    }

    /// The address space is translated from now on, after it was executed directly.
    fn closed(&mut self, cpu: &Cpu) {
        self.counts.closed += 1;
        let account = self.spaces.get(&root(cpu)).map(|s| s.account);
        if let Some(account) = account.filter(Account::has_paid) {
            let look = self.look(cpu, self.entries, false);
            self.scout.begin(look);
            self.looks.begin(look.tsc, account.has_computed());
            self.look_again();
        }
    }

    /// A child for the current address space, where it has none yet.
    fn give_child(&mut self, root: u64) -> Result<(), DirectError> {
        if self.spaces.get(&root).is_some_and(|s| s.child.is_some()) {
            return Ok(());
        }
        let with_child = self.spaces.iter().filter(|(_, s)| s.child.is_some());
        let child = if with_child.clone().count() < MOST_SPACES {
            self.host.spawn()?
        } else {
            let oldest = with_child.min_by_key(|(_, s)| s.used).map(|(r, _)| *r);
            let oldest = oldest.and_then(|r| self.spaces.get_mut(&r));
            match oldest.and_then(Space::give_up_child) {
                Some(child) => child,
                None => self.host.spawn()?,
            }
        };
        if let Some(space) = self.spaces.get_mut(&root) {
            space.spent = Some(Spent::of(child.pid()));
            space.child = Some(child);
            space.empty();
        }
        Ok(())
    }

    /// Measures what a stop takes by now, if it is time. A kick meanwhile is not lost: the next run finds it.
    fn measure_stops(&mut self, root: u64) {
        let Some(space) = self.spaces.get_mut(&root) else {
            return;
        };
        let Some(child) = space.child.as_mut().filter(|_| !self.options.always) else {
            return;
        };
        if !self.again.is_due(host_tsc(), self.tsc_hz) {
            return;
        }
        self.pin.here();
        if let Some(stop) = prices::of_stop(child, &self.kicker.0) {
            self.times.set_stop(self.tsc_hz, stop);
        }
        // What the child has run by now was not the guest's.
        space.spent = Some(Spent::of(child.pid()));
    }

    /// Runs the child until it stops, with all changes made.
    fn run_child(&mut self, cpu: &mut Cpu, root: u64) -> Result<(Stop, Stretch), DirectError> {
        self.give_child(root)?;
        let Direct {
            spaces,
            user,
            kicker,
            counts,
            ..
        } = self;
        transfer::load(user, cpu);
        // Before anything is counted: the changes are still to be made then.
        if !user.is_runnable() {
            return Err(DirectError::State);
        }
        let space = spaces.get_mut(&root).ok_or(DirectError::Gone)?;
        if space.mappings > self.host.most_mappings() {
            counts.emptied += 1;
            space.empty();
        }
        space.follow_flushes(cpu, counts);
        let changes = space.changes.list().iter();
        space.mappings += changes.map(most_new_mappings).sum::<usize>();
        space.used = counts.runs;
        counts.runs += 1;
        let child = space.child.as_mut().ok_or(DirectError::Gone)?;
        self.pin.here();
        let began = host_tsc();
        let stop = child.run(user, space.changes.list(), &kicker.0);
        let stretch = host_tsc() - began;
        counts.ticks += stretch;
        let stretch = Stretch {
            ticks: stretch,
            changes: space.changes.list().len() as u64,
            pages: 0,
        };
        space.changes.clear();
        match stop {
            Ok(Stop::Gone { .. }) | Err(_) => {
                counts.gone += 1;
                space.child = None;
                space.empty();
                if matches!(stop, Err(DirectError::Memory)) {
                    // Code was run, up to the access for which the host had no memory.
                    transfer::store(user, cpu);
                }
            }
            Ok(_) => {
                transfer::store(user, cpu);
                self.complete_number(cpu, root);
            }
        }
        Ok((stop?, stretch))
    }

    /// Does what the stop asks for; `None` where user code goes on at once.
    fn stopped(&mut self, cpu: &mut Cpu, root: u64, stop: Stop) -> Option<Left> {
        match stop {
            Stop::Kicked => {
                self.counts.calls += 1;
                self.kicked = true;
                Some(Left::Called)
            }
            Stop::SystemCall(_) => {
                self.counts.system_calls += 1;
                Some(Left::Interpret)
            }
            Stop::Trap {
                vector: 14,
                error,
                address,
            } => {
                self.counts.page_faults += 1;
                self.fault(cpu, root, address, error)
            }
            Stop::Trap {
                vector, address, ..
            } => {
                self.counts.other_traps += 1;
                let raised = transfer::raised(cpu, &self.user, vector, address);
                Some(raised.map_or(Left::Interpret, Left::Raise))
            }
            Stop::Gone { lost: false } => Some(Left::Called),
            // What user code has done since it was entered is done, and its registers are lost.
            Stop::Gone { lost: true } => {
                tracing::warn!(
                    "a process in which the processor ran user code of the guest was killed; the guest's program gets a general protection fault, and the guest goes on"
                );
                Some(Left::Raise(Exception::gp(0)))
            }
        }
    }

    fn space(&mut self, root: u64) -> Option<&mut Space> {
        self.spaces.get_mut(&root)
    }

    /// Executes an address space directly from now on, unless that was found not to pay or not to work.
    fn open(&mut self, root: u64) -> bool {
        if self.failures >= MOST_FAILURES {
            return false;
        }
        if self.spaces.len() > 4 * MOST_SPACES {
            self.spaces.retain(|_, s| s.child.is_some());
        }
        let times = self.times;
        let space = self.spaces.entry(root);
        let space = space.or_insert_with(|| {
            self.lives += 1;
            Space::new(&times, self.lives)
        });
        let opened = space.account.open(&times, host_tsc());
        self.counts.opened += u64::from(opened);
        if opened {
            space.unexplained.clear();
            self.turns.clear();
        }
        opened
    }

    /// A page that must not be executed is the engine's, until it comes by with code of another.
    fn sensitive(&mut self, root: u64) -> Left {
        self.counts.sensitive += 1;
        let times = self.times;
        if let Some(space) = self.space(root) {
            space.account.left(&times);
        }
        Left::Declined
    }

    /// Whether the user code at RIP is executed directly. Where it is and was not called out, none of it ran: the kernel just returned, or a stop was seen to.
    fn goes_directly(&self, cpu: &Cpu) -> bool {
        let space = self.spaces.get(&root(cpu));
        space.is_some_and(|s| {
            s.account.is_direct() && !s.shadow.get(cpu.rip & !PAGE_MASK).is_sensitive()
        })
    }

    fn close(&mut self, root: u64) {
        let times = self.times;
        if let Some(space) = self.spaces.get_mut(&root)
            && space.account.is_direct()
        {
            self.counts.closed += 1;
            space.account.close(&times, host_tsc());
        }
    }
}

impl UserCode for Direct {
    fn interrupted(&mut self, cpu: &Cpu, entries: u64) -> bool {
        let reminded = self.reminder.as_ref().is_some_and(|r| r.take_rung());
        self.counts.looks += u64::from(reminded);
        let worth = self.scout.seldom(&self.times, host_tsc(), entries)
            || reminded && self.looks.are_patient();
        if cpu.cpl != 3 {
            self.scout.kernel();
            if reminded && worth {
                self.look_again();
            }
            return false;
        }
        let translated = !std::mem::take(&mut self.kicked);
        if !reminded {
            self.pin.tick();
            if !translated || !self.goes_directly(cpu) {
                self.counts.found[usize::from(translated)] += 1;
            }
        }
        let space = self.spaces.get(&root(cpu));
        if space.is_some_and(|s| s.account.is_direct()) {
            return false;
        }
        let look = self.look(cpu, entries, reminded);
        let promising = self.scout.promising(&self.times, look);
        if promising && eligible(cpu) && self.open(root(cpu)) {
            return true;
        }
        let space = self.spaces.get(&root(cpu));
        let may_open = translated && space.is_none_or(|s| s.account.may_open(look.tsc));
        if may_open && worth {
            if !reminded {
                self.looks.one();
            }
            self.look_again();
        }
        false
    }

    fn untranslated(&mut self, cpu: &Cpu, page: u64, entries: u64) -> bool {
        let (root, (first, block)) = (root(cpu), self.times.translation);
        // Where the tables were flushed since, they may be another program's.
        let same = self.spaces.get(&root).filter(|s| s.id == cpu.spaces.id());
        let own = self.claims.get(&page).zip(same);
        let own = own.is_some_and(|(claim, space)| claim.life == space.life);
        let cost = match (own, cpu.ram.tracker().has_code(page)) {
            (true, _) => block,
            (false, false) => first,
            (false, true) => return false,
        };
        let look = Look {
            root,
            tsc: host_tsc(),
            entries,
            ..Look::default()
        };
        let account = self.spaces.get(&root).map(|s| s.account);
        let doubt = account.map_or(1, |a| a.doubt(&self.times));
        let promising = self.explorer.promising(&self.times, look, cost, doubt);
        if !promising || !eligible(cpu) {
            return false;
        }
        if let Some(space) = self.space(root) {
            space.account.forgive();
        }
        let opened = self.open(root);
        self.counts.opened_unknown += u64::from(opened);
        opened
    }

    fn takes(&mut self, cpu: &Cpu) -> bool {
        let space = self.spaces.get_mut(&root(cpu));
        let direct = space.is_some_and(|s| {
            let is_direct = s.account.is_direct();
            if is_direct && s.follow_flushes(cpu, &mut self.counts) {
                self.counts.replaced += 1;
                s.account = Account::new(&self.times);
                self.lives += 1;
                s.life = self.lives;
            }
            s.account.is_direct()
        });
        if !direct && !self.options.always {
            return false;
        }
        eligible(cpu) && (direct || self.open(root(cpu)))
    }

    fn run(&mut self, cpu: &mut Cpu, called: &dyn Fn() -> bool, entries: u64) -> Left {
        let root = root(cpu);
        self.entries = entries;
        self.life = self.spaces.get(&root).map_or(0, |s| s.life);
        self.kicked = false;
        self.ambition = MAPPINGS.0;
        self.follow_number(cpu);
        self.map_missed(cpu, root);
        let mut crowded = false;
        loop {
            self.kicker.0.clear();
            self.measure_stops(root);
            self.follow_given_up(cpu);
            if called() || cpu.peer.has_requests() {
                return Left::Called;
            }
            let here = self.space(root).map(|s| s.shadow.get(cpu.rip));
            if here.is_some_and(Entry::is_sensitive) {
                return self.sensitive(root);
            }
            let (stop, stretch) = match self.run_child(cpu, root) {
                Ok(done) => {
                    self.failures = 0;
                    done
                }
                // User code may load selectors, and the guest's kernel go to addresses, that a child is not let run with.
                Err(DirectError::State) => return Left::Declined,
                // More mappings than were counted: it begins again with none.
                Err(DirectError::Change { source, .. })
                    if source.raw_os_error() == Some(ENOMEM) && !crowded =>
                {
                    crowded = true;
                    continue;
                }
                Err(e) => {
                    self.failures += 1;
                    if self.failures == MOST_FAILURES {
                        tracing::warn!(
                            "the guest's user code is not executed directly any more, for the host refuses it ({e}); it is translated"
                        );
                    }
                    self.close(root);
                    return Left::Declined;
                }
            };
            let left = self.stopped(cpu, root, stop);
            let stretch = Stretch {
                pages: std::mem::take(&mut self.explored),
                ..stretch
            };
            self.counts.explored += stretch.pages;
            let (times, hz) = (self.times, self.tsc_hz);
            if let Some(space) = self.space(root)
                && !space.stopped(&times, stretch, hz)
            {
                self.closed(cpu);
                return left.unwrap_or(Left::Declined);
            }
            if let Some(left) = left {
                return left;
            }
        }
    }

    fn flushed(&mut self, cpu: &Cpu, flushed: &Flushed) {
        let id = cpu.spaces.id();
        let before = std::mem::replace(&mut self.current, id);
        if flushed.non_global || flushed.global || flushed.switched {
            return;
        }
        // Pages of the address space that was and is current.
        if let Some(space) = self.spaces.get_mut(&root(cpu)) {
            // Of large pages all goes, which the next comparison finds.
            let large = |page: &u64| space.shadow.may_hold_large(*page);
            let of_large = flushed.pages.iter().any(large);
            for page in &flushed.pages {
                space.shadow.unmap(*page, &mut space.changes);
            }
            if space.id == before && !of_large {
                space.id = id;
            }
        }
    }

    fn asked_cpuid(&mut self, cpu: &Cpu, rip: u64) {
        if let Some(at) = probe(&cpu.ram, &cpu.paging(), rip) {
            self.note_cpuid(cpu, at.gpa);
        }
    }

    fn written(&mut self, cpu: &Cpu, page: u64) {
        if self.claims.remove(&page).is_some() {
            cpu.ram.tracker().release_code(page, &cpu.peer);
            self.revoke(page, Revoked::Execute);
        }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kicker.clone()
    }

    fn stats(&self) -> EngineStats {
        let with_child = self.spaces.values().filter(|s| s.child.is_some());
        let pages: usize = self.spaces.values().map(|s| s.shadow.pages()).sum();
        let mut stats = self.counts.stats(self.tsc_hz);
        stats.extend([
            ("direct_children", with_child.count() as u64),
            ("direct_shadow_pages", pages as u64),
            (
                "direct_price_stop_nanoseconds",
                nanoseconds(self.times.stop as u64, self.tsc_hz),
            ),
            (
                "direct_price_change_nanoseconds",
                nanoseconds(self.times.change, self.tsc_hz),
            ),
        ]);
        stats
    }
}

/// Kicks the children of a vCPU.
#[derive(Default)]
struct Kicker(KickFlag);

impl Kick for Kicker {
    fn kick(&self) {
        self.0.kick();
    }
}

/// Children that cannot be had until no more are tried.
const MOST_FAILURES: u32 = 8;
const ENOMEM: i32 = rustix::io::Errno::NOMEM.raw_os_error();

/// Mappings of the host that a change adds, at most about: a piece within a longer one makes three of it.
fn most_new_mappings(change: &Change) -> usize {
    match change {
        Change::Protect { .. } => 2,
        _ => 1,
    }
}

/// What tells address spaces apart: where their page tables are. (Linux gives one of them different PCIDs over time.)
fn root(cpu: &Cpu) -> u64 {
    cpu.paging().root
}

/// A data segment that a process of the host can have as well.
fn usual(s: &Segment) -> bool {
    match s.selector {
        0 => true,
        state::STACK => s.limit == u32::MAX && s.attributes & 0xc0f2 == 0xc0f2,
        _ => false,
    }
}

/// True where the CPU's state is one that a process of the host can have, and what user code may do is what the CPU would let it do.
fn eligible(cpu: &Cpu) -> bool {
    /// What XCR0 has after reset, and for good where there is no XSAVE.
    const X87: u64 = 1;
    let flags = cpu.rflags;
    let aligned = !flags.contains(Rflags::AC) || cpu.cr0.contains(Cr0::AM);
    let mut needed = Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::FSGSBASE;
    needed.set(Cr4::OSXSAVE, cpu.cpuid.has_xsave());
    let selectors = |s: Seg| cpu.segment(s).selector;
    cpu.mode() == CpuMode::Bits64
        && cpu.cpl == 3
        && selectors(Seg::Cs) == state::CODE_64
        && selectors(Seg::Ss) == state::STACK
        && [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs]
            .into_iter()
            .all(|s| usual(cpu.segment(s)))
        && flags.contains(Rflags::IF)
        && !flags.intersects(Rflags::TF | Rflags::IOPL | Rflags::NT | Rflags::VIF | Rflags::VIP)
        && aligned
        && !cpu.steps_on_branches()
        && cpu.dr[7] & 0xff == 0
        && !cpu.cr0.intersects(Cr0::TS | Cr0::EM)
        && cpu.cr0.contains(Cr0::NE)
        && cpu.cr4.contains(needed)
        && !cpu.cr4.intersects(Cr4::TSD | Cr4::PKE)
        && cpu.xcr0 == cpu.cpuid.xcr0().max(X87)
        && cpu.tsc_offset == 0
        && !cpu.interrupt_shadow
        && !cpu.mov_ss_shadow
}

#[cfg(test)]
mod tests;
