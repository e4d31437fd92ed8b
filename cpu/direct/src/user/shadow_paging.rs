//! How the pages of a shadow follow the guest's page tables: what a page may be mapped with, which are mapped, and what is taken from them again.

use std::hash::Hasher;

use doppel_memory::{
    AccessKind, Leaf, PAGE_MASK, PAGE_SIZE, Paging, REGION_PAGES, REGION_SHIFT, Survey, probe,
};
use doppel_x86::{Cpu, Gpr, UserCode};
use rustc_hash::FxHasher;

use super::{Asked, Claim, Direct, MAPPINGS, MOST_ASKING, MOST_TURNS};
use crate::hazard::{self, Verdict};
use crate::patch::Patch;
use crate::patched::{Code, PatchedPage};
use crate::shadow::{Entry, Revoked};
use crate::space::Space;

/// Pages before the faulting one that are mapped along with it.
const PAGES_BEFORE: usize = 16;
/// Pages of code, before the faulting one and from it on, that are looked through along with it: to look through one that is then not executed takes
/// longer than a stop for one that is.
const CODE_AROUND: (usize, usize) = (2, 8);

impl Direct {
    /// How a page is to be mapped at an address, for this access and others like it.
    pub(super) fn entry_at(
        &mut self,
        cpu: &mut Cpu,
        root: u64,
        linear: u64,
        leaf: &Leaf,
        kind: AccessKind,
    ) -> Entry {
        let entry = self.entry_for(cpu, linear, leaf, kind);
        self.beside_others(cpu, root, linear, entry)
    }

    /// The same, whatever is mapped beside it.
    fn entry_for(&mut self, cpu: &mut Cpu, linear: u64, leaf: &Leaf, kind: AccessKind) -> Entry {
        let entry = Entry::new(leaf.gpa);
        let asked = kind == AccessKind::Execute;
        if leaf.execute && (asked || !leaf.writable) {
            let sensitive = match self.verdict(cpu, leaf.gpa) {
                Verdict::Harmless => false,
                Verdict::Early => self.begins_sensitive(cpu, linear, leaf.gpa),
                Verdict::Sensitive => true,
            };
            let patched = self.patched(leaf.gpa).is_some();
            return match sensitive {
                true => entry.sensitive(),
                // It cannot be read then: not before somebody executes it.
                false if patched && !asked => entry,
                false if patched => entry.patched(),
                false => entry.execute(true),
            };
        }
        let tracker = cpu.ram.tracker();
        let write = leaf.write && tracker.may_write(leaf.gpa, &cpu.peer);
        if write {
            tracker.mark_dirty(leaf.gpa);
        }
        entry.write(write)
    }

    /// The same, without permission to execute where a sensitive instruction lies across the border to a page beside it.
    fn beside_others(&self, cpu: &Cpu, root: u64, linear: u64, entry: Entry) -> Entry {
        let Some(space) = self.spaces.get(&root).filter(|_| entry.may_execute()) else {
            return entry;
        };
        let before = space.shadow.get(linear.wrapping_sub(PAGE_SIZE));
        let after = space.shadow.get(linear + PAGE_SIZE);
        let across = |first: u64, second: u64| self.is_sensitive_across(cpu, first, second);
        let sensitive = before.may_execute() && across(before.gpa(), entry.gpa())
            || after.may_execute() && across(entry.gpa(), after.gpa());
        match sensitive {
            true => entry.execute(false).sensitive(),
            false => entry,
        }
    }

    /// Whether the code at the beginning of a page is a sensitive instruction, as the page before tells; it is where there is none.
    fn begins_sensitive(&self, cpu: &Cpu, linear: u64, gpa: u64) -> bool {
        let before = probe(&cpu.ram, &cpu.paging(), linear.wrapping_sub(PAGE_SIZE));
        before.is_none_or(|t| {
            let border = border(cpu, t.gpa & !PAGE_MASK, gpa);
            border.is_none_or(|border| hazard::begins_sensitive(&border, self.hazards))
        })
    }

    fn is_sensitive_across(&self, cpu: &Cpu, first: u64, second: u64) -> bool {
        let border = border(cpu, first, second);
        border.is_none_or(|border| hazard::is_sensitive_across(&border, self.hazards))
    }

    /// Claims a page as code and looks for sensitive instructions in it, once.
    fn verdict(&mut self, cpu: &mut Cpu, gpa: u64) -> Verdict {
        if let Some(claim) = self.claims.get(&gpa) {
            return claim.verdict;
        }
        if self.has_turned_often(gpa) {
            return Verdict::Sensitive;
        }
        self.explored += u64::from(!cpu.ram.tracker().has_code(gpa));
        cpu.ram.tracker().claim_code(gpa, &cpu.peer);
        cpu.give_up_writing_to(gpa);
        let asked = cpu.ram.tracker().protect(gpa, &cpu.peer);
        cpu.wait_for_peers(asked);
        let (verdict, patched) = self.look_through(cpu, gpa);
        let claim = Claim {
            verdict,
            patched,
            life: self.life,
        };
        self.claims.insert(gpa, claim);
        self.follow_given_up(cpu);
        verdict
    }

    /// What a page that is claimed holds, or else a copy that can be executed in its place.
    fn look_through(&mut self, cpu: &Cpu, gpa: u64) -> (Verdict, Option<PatchedPage>) {
        let page = code(cpu, gpa);
        let verdict = hazard::verdict(&page, self.hazards);
        if verdict == Verdict::Harmless || self.options.unpatched {
            return (verdict, None);
        }
        let known = self.asked_cpuid.get(&gpa);
        let known = known.filter(|k| k.code == digest(&page));
        let executed: &[u16] = known.map_or(&[], |k| &k.at);
        if verdict == Verdict::Early && executed.is_empty() {
            return (verdict, None);
        }
        let number = self.host.number_in_copies(cpu);
        let patch = Patch::of(&page, executed, self.hazards, number);
        let patched = patch.and_then(|p| Some((p.verdict, self.host.patched_page(p)?)));
        match patched {
            Some((verdict, patched)) => {
                self.counts.patched += 1;
                (verdict, Some(patched))
            }
            None => (verdict, None),
        }
    }

    /// Gives up the copies that have the number of a processor in them, if that is another now.
    pub(super) fn follow_number(&mut self, cpu: &Cpu) {
        let number = cpu.msr.tsc_aux;
        if std::mem::replace(&mut self.number, number) == number {
            return;
        }
        let has_number = |claim: &Claim| claim.patched.as_ref().is_some_and(|p| p.counters.any());
        let with = self.claims.iter().filter(|(_, claim)| has_number(claim));
        let pages: Vec<_> = with.map(|(page, _)| *page).collect();
        pages.into_iter().for_each(|page| self.written(cpu, page));
    }

    /// Gives ECX the number of the guest's processor, where the child stopped before it did so itself.
    pub(super) fn complete_number(&mut self, cpu: &mut Cpu, root: u64) {
        let Some(space) = self.spaces.get(&root) else {
            return;
        };
        let entry = space.shadow.get(cpu.rip & !PAGE_MASK);
        if !entry.is_patched() {
            return;
        }
        let at = (cpu.rip & PAGE_MASK) as u16;
        let page = self.patched(entry.gpa());
        if page.is_some_and(|page| page.counters.is_before_number(at)) {
            cpu.gpr[Gpr::Rcx as usize] = cpu.msr.tsc_aux;
        }
    }

    fn patched(&self, gpa: u64) -> Option<&PatchedPage> {
        self.claims.get(&gpa)?.patched.as_ref()
    }

    pub(super) fn has_turned_often(&self, gpa: u64) -> bool {
        self.turns.get(&gpa).is_some_and(|n| *n > MOST_TURNS)
    }

    /// A CPUID was executed here: the page may be one that a patched copy serves for.
    pub(super) fn note_cpuid(&mut self, cpu: &Cpu, at: u64) {
        if !self.hazards.cpuid || self.options.unpatched {
            return;
        }
        if self.asked_cpuid.len() >= MOST_ASKING {
            self.asked_cpuid.clear();
        }
        let (page, offset) = (at & !PAGE_MASK, (at & PAGE_MASK) as u16);
        let code = digest(&code(cpu, page));
        let known = self.asked_cpuid.entry(page).or_default();
        if known.code != code {
            *known = Asked {
                code,
                at: Vec::new(),
            };
        }
        if known.at.contains(&offset) || known.at.len() >= MOST_ASKING {
            return;
        }
        known.at.push(offset);
        let claimed = self.claims.get(&page);
        if claimed.is_none_or(|c| c.verdict == Verdict::Harmless) || self.has_turned_often(page) {
            return;
        }
        let (verdict, patched) = self.look_through(cpu, page);
        if let Some(claim) = self.claims.get_mut(&page).filter(|_| patched.is_some()) {
            (claim.verdict, claim.patched) = (verdict, patched);
            self.revoke(page, Revoked::Execute);
        }
    }

    /// The copy is executed no more, and the page is not either.
    pub(super) fn give_up_patched(&mut self, gpa: u64) {
        if let Some(claim) = self.claims.get_mut(&gpa) {
            (claim.verdict, claim.patched) = (Verdict::Sensitive, None);
            self.revoke(gpa, Revoked::Execute);
        }
    }

    pub(super) fn map(&mut self, cpu: &Cpu, root: u64, linear: u64, entry: Entry) {
        let Some(offset) = cpu.ram.file_offset(entry.gpa()) else {
            return;
        };
        let page = entry.gpa() / PAGE_SIZE;
        if let Some(word) = self.mapped.get_mut((page / 64) as usize) {
            *word |= 1 << (page % 64);
        }
        self.counts.pages_mapped += 1;
        let patched = self.patched(entry.gpa()).map(PatchedPage::offset);
        if let Some(space) = self.spaces.get_mut(&root) {
            let old = space.shadow.get(linear);
            space.shadow.set(linear, entry);
            let same = old.is_mapped() && old.gpa() == entry.gpa() && !old.is_patched();
            match patched.filter(|_| entry.is_patched()) {
                Some(offset) => space.changes.map_patched(linear, offset),
                None if same => space.changes.protect(linear, entry),
                None => space.changes.map(linear, offset, entry),
            }
        }
    }

    /// Maps pages around one that was missing, as far as the guest's processor could have them in its TLB already.
    pub(super) fn map_neighbours(
        &mut self,
        cpu: &mut Cpu,
        root: u64,
        linear: u64,
        paging: &Paging,
    ) {
        let ram = cpu.ram.clone();
        let survey = Survey::of(&ram, paging, linear);
        let start = linear >> REGION_SHIFT << REGION_SHIFT;
        let here = (linear / PAGE_SIZE) as usize % REGION_PAGES;
        let limit = self.changes(root) + self.ambition;
        self.ambition = (2 * self.ambition).min(MAPPINGS.1);
        let after = here + 1..REGION_PAGES;
        let before = here.saturating_sub(PAGES_BEFORE)..here;
        for n in after.chain(before) {
            let at = start + n as u64 * PAGE_SIZE;
            if self.changes(root) >= limit {
                return;
            }
            let Some(leaf) = survey.page(n) else { continue };
            let mapped = self
                .space(root)
                .is_none_or(|s| s.shadow.get(at).is_mapped());
            if mapped || !self.host.can_map(at) || !ram.is_ram(leaf.gpa) {
                continue;
            }
            let near = n + CODE_AROUND.0 >= here && n < here + CODE_AROUND.1;
            let code = leaf.execute && !leaf.writable;
            if code && !near && !self.claims.contains_key(&leaf.gpa) {
                continue;
            }
            let entry = self.entry_at(cpu, root, at, &leaf, AccessKind::Read);
            self.map(cpu, root, at, entry);
        }
    }

    fn changes(&self, root: u64) -> usize {
        self.spaces.get(&root).map_or(0, |s| s.changes.list().len())
    }

    /// Takes permission to write from the shadows as it was taken from the TLBs.
    pub(super) fn follow_given_up(&mut self, cpu: &mut Cpu) {
        if cpu.given_up.is_empty() {
            return;
        }
        let given_up = cpu.given_up.take();
        if given_up.all {
            self.spaces.values_mut().for_each(Space::empty);
        }
        for page in given_up.pages {
            self.revoke(page, Revoked::Write);
        }
    }

    pub(super) fn revoke(&mut self, gpa: u64, what: Revoked) {
        let page = gpa / PAGE_SIZE;
        let word = self.mapped.get((page / 64) as usize).copied();
        if word.is_none_or(|w| w >> (page % 64) & 1 == 0) {
            return;
        }
        for space in self.spaces.values_mut() {
            space.shadow.revoke(gpa, what, &mut space.changes);
        }
    }
}

/// What a page of RAM holds.
fn code(cpu: &Cpu, gpa: u64) -> Code {
    let mut page = [0; PAGE_SIZE as usize];
    if let Some(p) = cpu.ram.ptr(gpa) {
        p.read(&mut page);
    }
    page
}

/// The end of a page and the beginning of another.
fn border(cpu: &Cpu, first: u64, second: u64) -> Option<hazard::Border> {
    let (mut end, mut beginning) = ([0; hazard::AROUND.0], [0; hazard::AROUND.1]);
    let end_at = first + PAGE_SIZE - end.len() as u64;
    cpu.ram.ptr(end_at)?.read(&mut end);
    cpu.ram.ptr(second)?.read(&mut beginning);
    Some((end, beginning))
}

fn digest(page: &Code) -> u64 {
    let mut hasher = FxHasher::default();
    hasher.write(page);
    hasher.finish()
}
