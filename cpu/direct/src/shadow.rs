//! Shadow page tables: which pages of a guest address space are mapped in the child, and how.
//!
//! Problem: the child's page tables are the host kernel's, which can be asked to change but not be read. The guest changes its own
//! tables without a word and says later, by a flush, that the processor should look again.
//! Idea: the shadow is a TLB without a bound: it notes what was mapped, page by page, in tables shaped like the lowest level of the guest's.
//! A flush of everything does not throw it away. It is compared with the guest's tables before user code runs again, which costs one load a page,
//! and only what differs is unmapped: to the guest that is the same as a flush.
//! Invariant: an entry names what is mapped in the child once the changes that came with it are made. It has write permission only where the
//! CPU [may write](doppel_memory::PageTracker::may_write) to the page, and never along with permission to execute.
//! Cost: 8 bytes a page, for 16 pages that lie together; some 10 ns a page and flush.

use std::collections::BTreeMap;

use doppel_memory::{
    GuestRam, LargePages, PAGE_MASK, PAGE_SIZE, Paging, REGION_PAGES, REGION_SHIFT, Survey,
};

use crate::changes::Changes;

/// What is mapped at a page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Entry(u64);

impl Entry {
    /// Nothing is.
    pub const NONE: Entry = Entry(0);
    const MAPPED: u64 = 1;
    const WRITE: u64 = 2;
    const EXECUTE: u64 = 4;
    const SENSITIVE: u64 = 8;
    const PATCHED: u64 = 16;

    /// A guest physical page for reading.
    pub fn new(gpa: u64) -> Self {
        Entry(gpa & !PAGE_MASK | Self::MAPPED)
    }

    /// With permission to write, or without.
    pub fn write(self, write: bool) -> Self {
        Entry(self.0 & !Self::WRITE | if write { Self::WRITE } else { 0 })
    }

    /// With permission to execute, or without.
    pub fn execute(self, execute: bool) -> Self {
        let others = self.0 & !(Self::EXECUTE | Self::PATCHED);
        Entry(others | if execute { Self::EXECUTE } else { 0 })
    }

    /// To be executed, but from a patched copy, and not to be read.
    pub fn patched(self) -> Self {
        Entry(self.0 | Self::EXECUTE | Self::PATCHED)
    }

    /// The guest may execute it, but the processor must not.
    pub fn sensitive(self) -> Self {
        Entry(self.0 | Self::SENSITIVE)
    }

    /// Something is mapped.
    pub fn is_mapped(self) -> bool {
        self.0 & Self::MAPPED != 0
    }

    /// With permission to write.
    pub fn may_write(self) -> bool {
        self.0 & Self::WRITE != 0
    }

    /// With permission to execute.
    pub fn may_execute(self) -> bool {
        self.0 & Self::EXECUTE != 0
    }

    /// See [`Self::sensitive`].
    pub fn is_sensitive(self) -> bool {
        self.0 & Self::SENSITIVE != 0
    }

    /// See [`Self::patched`].
    pub fn is_patched(self) -> bool {
        self.0 & Self::PATCHED != 0
    }

    /// The guest physical page.
    pub fn gpa(self) -> u64 {
        self.0 & !PAGE_MASK
    }
}

/// A permission that is taken away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Revoked {
    /// To write.
    Write,
    /// To execute; and the page is looked at anew before it is executed again.
    Execute,
}

/// Pages whose entries are allocated together: most programs map few pages of a region.
const PIECE: usize = 16;
const PIECES: usize = REGION_PAGES / PIECE;

#[derive(Default)]
struct Pieces([Option<Box<[Entry; PIECE]>>; PIECES]);

impl Pieces {
    fn get(&self, n: usize) -> Entry {
        let piece = self.0[n / PIECE].as_ref();
        piece.map_or(Entry::NONE, |entries| entries[n % PIECE])
    }

    /// Sets an entry; what was there.
    fn replace(&mut self, n: usize, entry: Entry) -> Entry {
        let empty = || Box::new([Entry::NONE; PIECE]);
        let piece = self.0[n / PIECE].get_or_insert_with(empty);
        std::mem::replace(&mut piece[n % PIECE], entry)
    }

    /// All entries that may be mapped, with their numbers.
    fn iter_mut(&mut self) -> impl Iterator<Item = (usize, &mut Entry)> {
        let pieces = self.0.iter_mut().enumerate();
        let there = pieces.filter_map(|(m, piece)| Some((m, piece.as_mut()?)));
        there.flat_map(|(m, piece)| {
            let entries = piece.iter_mut().enumerate();
            entries.map(move |(n, entry)| (m * PIECE + n, entry))
        })
    }
}

#[derive(Default)]
struct Region {
    entries: Pieces,
    used: usize,
}

/// The shadow of one address space.
#[derive(Default)]
pub struct Shadow {
    regions: BTreeMap<u64, Region>,
    pages: usize,
    /// Where pieces of large pages are mapped.
    large: LargePages,
}

fn index(linear: u64) -> usize {
    (linear / PAGE_SIZE) as usize % REGION_PAGES
}

impl Shadow {
    /// What is mapped at a linear address.
    pub fn get(&self, linear: u64) -> Entry {
        let region = self.regions.get(&(linear >> REGION_SHIFT));
        region.map_or(Entry::NONE, |r| r.entries.get(index(linear)))
    }

    /// Notes what is mapped at a linear address from now on.
    pub fn set(&mut self, linear: u64, entry: Entry) {
        let region = self.regions.entry(linear >> REGION_SHIFT);
        let region = region.or_default();
        let old = region.entries.replace(index(linear), entry);
        let (old, new) = (usize::from(old.is_mapped()), usize::from(entry.is_mapped()));
        region.used = region.used + new - old;
        self.pages = self.pages + new - old;
    }

    /// Pages that are mapped.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Nothing is mapped any more.
    pub fn clear(&mut self) {
        self.regions.clear();
        self.pages = 0;
        self.large.clear();
    }

    /// A piece of a large page is mapped from now on.
    pub fn note_large(&mut self, linear: u64) {
        self.large.note(linear);
    }

    /// False where no piece of a large page near this address can be mapped.
    pub fn may_hold_large(&self, linear: u64) -> bool {
        self.large.may_hold(linear)
    }

    /// Unmaps a page.
    pub fn unmap(&mut self, linear: u64, changes: &mut Changes) {
        if self.get(linear).is_mapped() {
            self.set(linear, Entry::NONE);
            changes.unmap(linear & !PAGE_MASK);
        }
    }

    /// Takes a permission for a guest physical page away wherever it is mapped.
    pub fn revoke(&mut self, gpa: u64, what: Revoked, changes: &mut Changes) {
        for (number, region) in &mut self.regions {
            for (n, entry) in region.entries.iter_mut() {
                if entry.gpa() != gpa || !entry.is_mapped() {
                    continue;
                }
                let linear = (number << REGION_SHIFT) + n as u64 * PAGE_SIZE;
                match what {
                    Revoked::Execute if entry.is_patched() => {
                        *entry = Entry::NONE;
                        region.used -= 1;
                        self.pages -= 1;
                        changes.unmap(linear);
                    }
                    Revoked::Write if entry.may_write() => {
                        *entry = entry.write(false);
                        changes.protect(linear, *entry);
                    }
                    Revoked::Execute if entry.may_execute() || entry.is_sensitive() => {
                        *entry = Entry::new(gpa);
                        changes.protect(linear, *entry);
                    }
                    _ => {}
                }
            }
        }
    }

    /// Compares everything with the guest's page tables and unmaps or protects what a processor that has just flushed its TLB would
    /// not use as it is here.
    pub fn revise(&mut self, ram: &GuestRam, paging: &Paging, changes: &mut Changes) -> Revision {
        let mut revision = Revision::default();
        self.large.clear();
        for (number, region) in &mut self.regions {
            let start = number << REGION_SHIFT;
            let survey = Survey::of(ram, paging, start);
            if survey.is_large() {
                self.large.note(start);
            }
            for (n, entry) in region.entries.iter_mut() {
                if !entry.is_mapped() {
                    continue;
                }
                let linear = start + n as u64 * PAGE_SIZE;
                let leaf = survey.page(n).filter(|l| l.gpa == entry.gpa());
                let leaf = leaf.filter(|l| l.execute || !entry.is_patched());
                if entry.may_write() {
                    revision.written += 1;
                    revision.kept += usize::from(leaf.is_some());
                }
                match leaf {
                    Some(l) if entry.may_execute() && !l.execute => {
                        *entry = entry.execute(false);
                        changes.protect(linear, *entry);
                    }
                    Some(l) if entry.may_write() && !l.write => {
                        *entry = entry.write(false);
                        changes.protect(linear, *entry);
                    }
                    Some(_) => {}
                    None => {
                        *entry = Entry::NONE;
                        region.used -= 1;
                        self.pages -= 1;
                        changes.unmap(linear);
                    }
                }
            }
        }
        self.regions.retain(|_, r| r.used > 0);
        revision
    }
}

/// What a revision found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Revision {
    /// Pages that could be written.
    written: usize,
    /// How many of them are still where they were.
    kept: usize,
}

impl Revision {
    /// True where the page tables are another program's by now: of what one has written, its stack at least stays where it is.
    pub fn is_another_program(&self) -> bool {
        const FEW: usize = 3;
        self.written >= FEW && self.kept == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::change::Change;
    use doppel_memory::PagingMode;

    const GPA: u64 = 0x5000;

    fn changes() -> Changes {
        Changes::default()
    }

    #[test]
    fn permissions_are_taken_away_wherever_a_page_is_mapped() {
        let mut s = Shadow::default();
        s.set(0x1000, Entry::new(GPA).write(true));
        s.set(0x4000_0000, Entry::new(GPA).write(true));
        s.set(0x2000, Entry::new(GPA).execute(true));
        s.set(0x3000, Entry::new(0x6000).write(true));
        let mut c = changes();
        s.revoke(GPA, Revoked::Write, &mut c);
        assert_eq!(c.list().len(), 2);
        assert!(!s.get(0x1fff).may_write() && s.get(0x3000).may_write());
        let mut c = changes();
        s.revoke(GPA, Revoked::Execute, &mut c);
        assert_eq!(c.list().len(), 1);
        assert!(s.get(0x2000).is_mapped() && !s.get(0x2000).may_execute());
    }

    #[test]
    fn a_revision_leaves_what_the_tables_say() {
        const ALL: u64 = 0x67;
        let ram = GuestRam::new(1 << 20).unwrap();
        let paging = Paging {
            mode: PagingMode::Level4,
            root: 0x1000,
            write_protect: true,
            no_execute: true,
            smep: false,
            smap: false,
            global_pages: false,
            pkru: None,
            physical_bits: 46,
            upper_global_reserved: false,
        };
        for (at, to) in [(0x1000u64, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000)] {
            ram.store(at, to | ALL).unwrap();
        }
        let mut s = Shadow::default();
        let pte = |n: u64, v: u64| ram.store(0x4000 + 8 * n, v).unwrap();
        for n in 0..5 {
            pte(n, (0x1_0000 + (n << 12)) | ALL);
            s.set(n << 12, Entry::new(0x1_0000 + (n << 12)).write(true));
        }
        s.set(4 << 12, Entry::new(0x1_4000).execute(true));
        let mut c = changes();
        s.revise(&ram, &paging, &mut c);
        assert!(c.list().is_empty(), "nothing has changed");
        pte(0, 0x1_0000 | ALL & !0x40); // clean
        pte(1, 0x2_0000 | ALL); // elsewhere
        pte(2, 0);
        pte(4, 0x1_4000 | ALL | 1 << 63);
        s.revise(&ram, &paging, &mut c);
        assert!(s.get(0).is_mapped() && !s.get(0).may_write());
        assert!(!s.get(0x1000).is_mapped() && !s.get(0x2000).is_mapped());
        assert!(s.get(0x3000).may_write());
        assert!(s.get(0x4000).is_mapped() && !s.get(0x4000).may_execute());
        assert_eq!(s.pages(), 3);
        let unmapped = |c: &Change| {
            matches!(
                c,
                Change::Unmap {
                    at: 0x1000,
                    len: 0x2000
                }
            )
        };
        assert!(c.list().iter().any(unmapped), "one change for two pages");
        s.set(5 << 12, Entry::new(0x1_5000).write(true));
        s.set(6 << 12, Entry::new(0x1_6000).write(true));
        let some = s.revise(&ram, &paging, &mut c);
        assert!(!some.is_another_program(), "one page is kept");
        s.set(5 << 12, Entry::new(0x1_5000).write(true));
        s.set(6 << 12, Entry::new(0x1_6000).write(true));
        ram.store(0x3000u64, 0u64).unwrap();
        let all = s.revise(&ram, &paging, &mut c);
        assert!(all.is_another_program());
        assert_eq!((s.pages(), s.regions.len()), (0, 0));
    }
}
