//! The page tables of 2 MiB of linear addresses, looked at together, for who mirrors them (shadow page tables).
//!
//! A survey goes down the upper levels once; each page then costs one load. It changes nothing: what it tells of are pages that a
//! processor could hold in its TLB already, since all their accessed bits are set, and writable ones where the dirty bit is.

use crate::walk::{A, D, FORMAT_64, G, P, PS, RW, US, Walk, XD};
use crate::{GuestRam, PAGE_SIZE, Paging, Privilege};

/// Pages in one survey.
pub const REGION_PAGES: usize = 512;
/// log2 of the bytes in one survey.
pub const REGION_SHIFT: u32 = 21;

/// A page that user code may access, with the accessed bits of all levels set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Guest physical address of the page.
    pub gpa: u64,
    /// Stores are allowed, and the dirty bit is set.
    pub write: bool,
    /// Stores are allowed, whatever the dirty bit.
    pub writable: bool,
    /// Instruction fetches are allowed.
    pub execute: bool,
}

/// The upper levels of the tables for one region, in long mode.
#[derive(Clone, Copy, Debug)]
pub struct Survey<'a> {
    ram: &'a GuestRam,
    paging: Paging,
    linear: u64,
    lowest: Lowest,
}

#[derive(Clone, Copy, Debug)]
enum Lowest {
    Nothing,
    /// A page table, and R/W, U/S and XD of the levels above.
    Table(u64, u64),
    /// The region lies in a large page: where, and its entry with the rights of the levels above.
    Large(u64, u64),
}

impl<'a> Survey<'a> {
    /// Of the region that `linear` lies in.
    pub fn of(ram: &'a GuestRam, paging: &Paging, linear: u64) -> Self {
        let linear = linear >> REGION_SHIFT << REGION_SHIFT;
        let mut survey = Survey {
            ram,
            paging: *paging,
            linear,
            lowest: Lowest::Nothing,
        };
        if let Some(levels) = paging.mode.long_levels() {
            survey.lowest = survey.descend(levels);
        }
        survey
    }

    fn walk(&self) -> Walk<'_> {
        Walk {
            ram: self.ram,
            p: &self.paging,
            linear: self.linear,
            kind: None,
            privilege: Privilege::User,
        }
    }

    fn descend(&self, levels: u32) -> Lowest {
        let walk = self.walk();
        let (mut table, mut rights) = (self.paging.root, RW | US);
        for level in (2..=levels).rev() {
            let shift = 12 + 9 * (level - 1);
            let entry = walk.load(&FORMAT_64, table + (self.linear >> shift & 511) * 8);
            let leaf = level < 4 && entry & PS != 0;
            if entry & (P | A) != P | A || entry & walk.reserved(&FORMAT_64, level, leaf) != 0 {
                return Lowest::Nothing;
            }
            rights = combine(rights, entry);
            if leaf {
                let within = (1u64 << shift) - 1;
                let at = entry & walk.address_mask() & !within | self.linear & within;
                return Lowest::Large(at, entry & !(RW | US | XD) | rights);
            }
            table = entry & walk.address_mask();
        }
        Lowest::Table(table, rights)
    }

    /// The region lies in a large page, of which each INVLPG within drops all.
    pub fn is_large(&self) -> bool {
        matches!(self.lowest, Lowest::Large(..))
    }

    /// The page with this number in the region.
    pub fn page(&self, index: usize) -> Option<Leaf> {
        let (gpa, entry) = match self.lowest {
            Lowest::Nothing => return None,
            Lowest::Large(at, entry) => (at + index as u64 * PAGE_SIZE, entry),
            Lowest::Table(table, rights) => {
                let walk = self.walk();
                let entry = walk.load(&FORMAT_64, table + index as u64 * 8);
                let reserved = walk.reserved(&FORMAT_64, 1, true);
                if entry & (P | A) != P | A || entry & reserved != 0 {
                    return None;
                }
                let gpa = entry & walk.address_mask();
                (gpa, entry & !(RW | US | XD) | combine(rights, entry))
            }
        };
        // Who has walked to a page that is global has noted that.
        let global = self.paging.global_pages && entry & G != 0;
        (entry & US != 0 && !global).then_some(Leaf {
            gpa,
            write: entry & (RW | D) == RW | D,
            writable: entry & RW != 0,
            execute: entry & XD == 0 || !self.paging.no_execute,
        })
    }
}

/// R/W and U/S of all levels, XD of any.
fn combine(rights: u64, entry: u64) -> u64 {
    (rights & entry & (RW | US)) | ((rights | entry) & XD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AccessKind, PagingMode, probe, walk};

    const ROOT: u64 = 0x1000;
    const ALL: u64 = P | RW | US | A;

    fn paging() -> Paging {
        Paging {
            mode: PagingMode::Level4,
            root: ROOT,
            write_protect: true,
            no_execute: true,
            smep: false,
            smap: false,
            global_pages: false,
            pkru: None,
            physical_bits: 46,
            upper_global_reserved: false,
        }
    }

    /// Tables for linear addresses from 0: a page table for the first 2 MiB, a large page for the second.
    fn ram() -> GuestRam {
        let ram = GuestRam::new(8 << 20).unwrap();
        let set = |at: u64, entry: u64| ram.store(at, entry).unwrap();
        set(ROOT, 0x2000 | ALL);
        set(0x2000, 0x3000 | ALL);
        set(0x3000, 0x4000 | ALL);
        set(0x3008, 0x40_0000 | ALL | D | PS | XD);
        for (n, bits) in [
            ALL,
            ALL | D,
            ALL & !A,
            ALL & !US,
            ALL & !RW | D,
            ALL | XD,
            0,
            ALL | 1 << 51,
        ]
        .into_iter()
        .enumerate()
        {
            set(
                0x4000 + 8 * n as u64,
                (0x10_0000 + 0x1000 * n as u64) | bits,
            );
        }
        ram
    }

    #[test]
    fn a_survey_tells_what_a_tlb_may_hold() {
        let ram = ram();
        let s = Survey::of(&ram, &paging(), 0x5123);
        let told = |n| s.page(n).map(|l| (l.gpa, l.write, l.writable, l.execute));
        assert_eq!(told(0), Some((0x10_0000, false, true, true)));
        assert_eq!(told(1), Some((0x10_1000, true, true, true)));
        assert_eq!(told(2), None, "not accessed");
        assert_eq!(told(3), None, "the kernel's");
        assert_eq!(told(4), Some((0x10_4000, false, false, true)));
        assert_eq!(told(5), Some((0x10_5000, false, true, false)));
        assert_eq!(told(6), None, "not present");
        assert_eq!(told(7), None, "reserved bits");
    }

    #[test]
    fn a_large_page_counts_as_its_small_ones() {
        let ram = ram();
        let s = Survey::of(&ram, &paging(), 0x20_0000);
        let last = s.page(511).unwrap();
        assert_eq!(last.gpa, 0x5f_f000);
        assert!(last.write && !last.execute);
    }

    #[test]
    fn an_upper_level_takes_rights_away() {
        let ram = ram();
        ram.store(0x2000u64, 0x3000 | P | A | US | XD).unwrap();
        let leaf = Survey::of(&ram, &paging(), 0).page(1).unwrap();
        assert!(!leaf.write && !leaf.writable && !leaf.execute);
        ram.store(0x2000u64, 0x3000 | P | RW | US).unwrap();
        assert_eq!(Survey::of(&ram, &paging(), 0).page(1), None);
    }

    #[test]
    fn a_survey_agrees_with_walks() {
        let ram = ram();
        for n in 0..1024u64 {
            let linear = n * PAGE_SIZE;
            let leaf = Survey::of(&ram, &paging(), linear).page(n as usize % 512);
            let Some(leaf) = leaf else { continue };
            let found = probe(&ram, &paging(), linear).unwrap();
            assert_eq!(leaf.gpa, found.gpa);
            for (kind, allowed) in [
                (AccessKind::Read, true),
                (AccessKind::Execute, leaf.execute),
                (AccessKind::Write, leaf.writable),
            ] {
                let walked = walk(&ram, &paging(), linear, kind, Privilege::User);
                assert_eq!(walked.is_ok(), allowed, "{linear:#x} {kind:?}");
            }
        }
    }
}
