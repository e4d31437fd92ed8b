//! The software TLB: linear page → host page, direct mapped, one per privilege.
//!
//! Problem: translated code makes a memory access every few instructions; each must be checked against
//! the guest's page tables and land in this guest's RAM.
//! Idea: an entry keeps the linear page once per permission (`read_tag`, `write_tag`) and the host page.
//! For an address `a` in slot `i`, `x = a ^ tag` is the offset in the page exactly when the tag matches,
//! so that one compare, `x > 4096 - size`, catches a miss, a missing permission and an access that
//! crosses the page; `x + host` is then the host address.
//! Invariant: a tag that is not [invalid](INVALID_TAG_XOR) names a page whose `host` is mapped guest RAM and
//! for which the permission was granted by a walk with the accessed (and for `write_tag` the dirty) bit set.
//! `write_tag` is valid only where the RAM page is marked dirty and holds no translated code.
//! Invalid tags: no address in slot `i` can match `!(i << 12)`, because its index bits differ.
//! Where two pages that are used in turn fall into one slot, translated code would ask for each of them again and again, so the entry that was
//! driven out of a slot is kept beside it as its *victim*; code that finds no match lets the two change places where the victim matches.
//! Cost of a flush: an operating system flushes often and fills little in between, so each TLB lists the slots that it filled, and a
//! flush goes over the list instead of the table.

use crate::{GuestRam, HostPtr, PAGE_MASK, PageRights, Peer, Translation};

/// Entries of one TLB; a power of two.
pub const TLB_ENTRIES: usize = 2048;
/// log2 of the bytes of a slot in each of a TLB's arrays.
pub const TLB_SLOT_SHIFT: u32 = 3;
/// The invalid tag of slot `i` is `(i << 12) ^ INVALID_TAG_XOR`.
pub const INVALID_TAG_XOR: u64 = u64::MAX;

/// One entry.
#[derive(Clone, Copy, Debug)]
pub struct TlbEntry {
    /// Linear page that may be read, or the invalid tag.
    read_tag: u64,
    /// Linear page that may be written, or the invalid tag.
    write_tag: u64,
    /// Host address of the page.
    host: u64,
    /// Guest physical address of the page; bit 0 is set where the translation is global.
    gpa: u64,
}

impl TlbEntry {
    fn is_valid(&self) -> bool {
        self.host != 0
    }

    /// True for an entry of this linear page.
    fn is_of(&self, page: u64) -> bool {
        self.read_tag == page || self.write_tag == page
    }

    /// The linear page, if it gives any right.
    fn page(&self, slot: usize) -> Option<u64> {
        let invalid = TlbEntry::invalid(slot).read_tag;
        let mut tags = [self.read_tag, self.write_tag].into_iter();
        tags.find(|tag| *tag != invalid)
    }

    fn is_global(&self) -> bool {
        self.gpa & 1 != 0
    }

    const fn invalid(slot: usize) -> Self {
        let tag = ((slot as u64) << 12) ^ INVALID_TAG_XOR;
        TlbEntry {
            read_tag: tag,
            write_tag: tag,
            host: 0,
            gpa: 0,
        }
    }
}

/// An entry for each slot, in an array for each fact: what a check does not look at takes no room in the processor's cache.
#[repr(C, align(64))]
#[derive(Debug)]
struct Entries {
    read_tag: [u64; TLB_ENTRIES],
    write_tag: [u64; TLB_ENTRIES],
    host: [u64; TLB_ENTRIES],
    gpa: [u64; TLB_ENTRIES],
}

impl Entries {
    fn empty() -> Self {
        let tags = std::array::from_fn(|slot| TlbEntry::invalid(slot).read_tag);
        Entries {
            read_tag: tags,
            write_tag: tags,
            host: [0; TLB_ENTRIES],
            gpa: [0; TLB_ENTRIES],
        }
    }

    fn get(&self, slot: usize) -> TlbEntry {
        TlbEntry {
            read_tag: self.read_tag[slot],
            write_tag: self.write_tag[slot],
            host: self.host[slot],
            gpa: self.gpa[slot],
        }
    }

    fn set(&mut self, slot: usize, e: TlbEntry) {
        self.read_tag[slot] = e.read_tag;
        self.write_tag[slot] = e.write_tag;
        self.host[slot] = e.host;
        self.gpa[slot] = e.gpa;
    }

    /// Takes the entry away, if it is one of this kind.
    fn take(&mut self, slot: usize, global: bool) -> Option<TlbEntry> {
        let e = self.get(slot);
        let taken = e.is_valid() && e.is_global() == global;
        taken.then(|| {
            self.set(slot, TlbEntry::invalid(slot));
            e
        })
    }

    /// Takes write permission from an entry of this page.
    fn protect(&mut self, slot: usize, gpa: u64) {
        if self.gpa[slot] & !1 == gpa & !PAGE_MASK {
            self.write_tag[slot] = TlbEntry::invalid(slot).write_tag;
        }
    }
}

/// A direct-mapped TLB of [`TLB_ENTRIES`] entries, and as many victims. The layout is relied on by generated code.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Tlb {
    entries: Entries,
    /// What was driven out of each slot last; not of the page that is there.
    victims: Entries,
    /// Of translations that are not global, and of global ones.
    filled: [FilledSlots; 2],
}

/// Entries of an address space that [`TakenEntries`] holds at most.
pub const MOST_TAKEN: usize = 512;

/// Entries that are not in their TLB for now, with their slots.
#[derive(Debug, Default)]
pub struct TakenEntries {
    entries: Vec<(u16, TlbEntry)>,
}

impl TakenEntries {
    /// As [`Tlb::protect`].
    pub fn protect(&mut self, gpa: u64) {
        for (slot, e) in &mut self.entries {
            if e.gpa & !1 == gpa & !PAGE_MASK {
                e.write_tag = TlbEntry::invalid(usize::from(*slot)).write_tag;
            }
        }
    }
}

/// Slots that were filled since they were last flushed; each valid entry stands in the list of its kind.
#[derive(Debug)]
struct FilledSlots {
    slots: [u16; TLB_ENTRIES],
    /// Past the length of `slots`, any slot may be filled.
    len: usize,
}

impl FilledSlots {
    const fn new() -> Self {
        FilledSlots {
            slots: [0; TLB_ENTRIES],
            len: 0,
        }
    }

    fn add(&mut self, slot: usize) {
        if let Some(place) = self.slots.get_mut(self.len) {
            *place = slot as u16;
        }
        self.len = (self.len + 1).min(TLB_ENTRIES + 1);
    }

    /// Calls `f` with every slot of the list.
    fn for_each(&self, mut f: impl FnMut(usize)) {
        match self.slots.get(..self.len) {
            Some(listed) => listed.iter().for_each(|slot| f(usize::from(*slot))),
            None => (0..TLB_ENTRIES).for_each(f),
        }
    }

    /// Calls `f` with every slot of the list, which is empty afterwards.
    fn drain(&mut self, f: impl FnMut(usize)) {
        self.for_each(f);
        self.len = 0;
    }
}

impl Default for Tlb {
    fn default() -> Self {
        Tlb {
            entries: Entries::empty(),
            victims: Entries::empty(),
            filled: [const { FilledSlots::new() }; 2],
        }
    }
}

#[inline]
fn slot_of(linear: u64) -> usize {
    (linear >> 12) as usize & (TLB_ENTRIES - 1)
}

impl Tlb {
    /// Offset of the tags for reads, 8 bytes a slot.
    pub const READ_TAG: usize = std::mem::offset_of!(Tlb, entries.read_tag);
    /// Offset of the tags for writes.
    pub const WRITE_TAG: usize = std::mem::offset_of!(Tlb, entries.write_tag);
    /// Offset of the host pages.
    pub const HOST: usize = std::mem::offset_of!(Tlb, entries.host);
    /// Offsets of all that an entry consists of.
    pub const ENTRY: [usize; 4] = [
        Self::READ_TAG,
        Self::WRITE_TAG,
        Self::HOST,
        std::mem::offset_of!(Tlb, entries.gpa),
    ];
    /// Offset of the victims from the entries.
    pub const VICTIMS: usize = std::mem::offset_of!(Tlb, victims);

    /// Offset of the tags for reads or for writes.
    pub const fn tag(write: bool) -> usize {
        if write {
            Self::WRITE_TAG
        } else {
            Self::READ_TAG
        }
    }

    /// The host address of a read of `size` bytes, where it is known and within one page.
    #[inline]
    pub fn lookup_read(&self, linear: u64, size: usize) -> Option<HostPtr> {
        let slot = slot_of(linear);
        resolve(
            self.entries.host[slot],
            linear ^ self.entries.read_tag[slot],
            size,
        )
    }

    /// The host address of a write of `size` bytes, where it is known and within one page.
    #[inline]
    pub fn lookup_write(&self, linear: u64, size: usize) -> Option<HostPtr> {
        let slot = slot_of(linear);
        resolve(
            self.entries.host[slot],
            linear ^ self.entries.write_tag[slot],
            size,
        )
    }

    /// Enters the page of `linear` with these rights, for the CPU that is `peer`. Pages that are not RAM are not entered.
    pub fn fill(
        &mut self,
        linear: u64,
        t: &Translation,
        rights: PageRights,
        ram: &GuestRam,
        peer: &Peer,
    ) {
        let gpa = t.gpa & !PAGE_MASK;
        let Some(host) = ram.ptr(gpa) else { return };
        ram.will_access(gpa);
        let slot = slot_of(linear);
        let mut e = TlbEntry::invalid(slot);
        let page = linear & !PAGE_MASK;
        if rights.read {
            e.read_tag = page;
        }
        let tracker = ram.tracker();
        if rights.write && t.dirty && tracker.is_dirty(gpa) && tracker.may_write(gpa, peer) {
            e.write_tag = page;
        }
        e.host = host.addr();
        e.gpa = gpa | u64::from(t.global);
        let old = self.entries.get(slot);
        self.entries.set(slot, e);
        if self.victims.get(slot).is_of(page) {
            self.victims.set(slot, TlbEntry::invalid(slot));
        }
        if old.is_valid() && !old.is_of(page) {
            self.victims.set(slot, old);
        }
        if !old.is_valid() || old.is_global() != t.global {
            self.filled[usize::from(t.global)].add(slot);
        }
    }

    /// Forgets everything.
    pub fn flush(&mut self) {
        self.flush_non_global();
        self.flush_of_kind(true);
    }

    /// Forgets what is not global.
    pub fn flush_non_global(&mut self) {
        self.flush_of_kind(false);
    }

    fn flush_of_kind(&mut self, global: bool) {
        let Tlb {
            entries,
            victims,
            filled,
        } = self;
        filled[usize::from(global)].drain(|slot| {
            entries.take(slot, global);
            victims.take(slot, global);
        });
    }

    /// Takes what is not global out, into `taken`; the latest [`MOST_TAKEN`] of it.
    pub fn take_non_global(&mut self, taken: &mut TakenEntries) {
        taken.entries.clear();
        let Tlb {
            entries,
            victims,
            filled,
        } = self;
        filled[0].drain(|slot| {
            let both = [entries.take(slot, false), victims.take(slot, false)];
            let both = both.into_iter().flatten();
            taken.entries.extend(both.map(|e| (slot as u16, e)));
        });
        let early = taken.entries.len().saturating_sub(MOST_TAKEN);
        taken.entries.drain(..early);
    }

    /// Puts entries back into a TLB that holds nothing but global ones; `taken` is empty afterwards.
    pub fn put_back(&mut self, taken: &mut TakenEntries) {
        for (slot, e) in taken.entries.drain(..) {
            let slot = usize::from(slot);
            let page = e.page(slot);
            let there = self.entries.get(slot);
            let place = match there.is_valid() {
                false => &mut self.entries,
                true => &mut self.victims,
            };
            let twice = page.is_none_or(|page| there.is_of(page));
            if !twice && !place.get(slot).is_valid() {
                place.set(slot, e);
                self.filled[0].add(slot);
            }
        }
    }

    /// Forgets the page of one linear address.
    pub fn flush_page(&mut self, linear: u64) {
        let slot = slot_of(linear);
        self.entries.set(slot, TlbEntry::invalid(slot));
        self.victims.set(slot, TlbEntry::invalid(slot));
    }

    /// Takes write permission from every entry of a guest physical page (it now holds translated code).
    pub fn protect(&mut self, gpa: u64) {
        let Tlb {
            entries,
            victims,
            filled,
        } = self;
        for filled in filled {
            filled.for_each(|slot| {
                entries.protect(slot, gpa);
                victims.protect(slot, gpa);
            });
        }
    }
}

#[inline]
fn resolve(host: u64, offset: u64, size: usize) -> Option<HostPtr> {
    (offset <= (PAGE_MASK + 1).wrapping_sub(size as u64) && size <= 4096)
        .then(|| HostPtr::from_tlb(host, offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn translation(gpa: u64, global: bool) -> Translation {
        Translation {
            gpa,
            page_shift: 12,
            rights_user: true,
            rights_write: true,
            rights_execute: true,
            global,
            dirty: true,
            key: 0,
        }
    }

    const ALL: PageRights = PageRights {
        read: true,
        write: true,
        execute: true,
    };

    #[test]
    fn an_empty_tlb_matches_no_address() {
        let tlb = Tlb::default();
        for a in [
            0,
            0xfff,
            0x8000_0000_0000_0000,
            u64::MAX,
            0xffff_ffff_ffc0_0000,
            !0u64 << 22,
        ] {
            assert!(tlb.lookup_read(a, 1).is_none());
            assert!(tlb.lookup_write(a, 8).is_none());
        }
    }

    #[test]
    fn hits_need_the_page_the_right_and_the_room() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let (mut tlb, cpu) = (Tlb::default(), ram.tracker().join());
        tlb.fill(0x40_0123, &translation(0x5000, false), ALL, &ram, &cpu);
        assert!(tlb.lookup_read(0x40_0ff8, 8).is_some());
        assert!(tlb.lookup_read(0x40_0ff9, 8).is_none());
        assert!(tlb.lookup_read(0x80_0ff8, 8).is_none());
        // A clean page gives no write permission.
        assert!(tlb.lookup_write(0x40_0000, 1).is_none());
        ram.tracker().mark_dirty(0x5000);
        tlb.fill(0x40_0123, &translation(0x5000, false), ALL, &ram, &cpu);
        assert!(tlb.lookup_write(0x40_0000, 1).is_some());
        tlb.protect(0x5008);
        assert!(tlb.lookup_write(0x40_0000, 1).is_none());
        assert!(tlb.lookup_read(0x40_0000, 1).is_some());
    }

    #[test]
    fn a_slot_that_changes_its_kind_is_flushed_as_what_it_is() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let (mut tlb, cpu) = (Tlb::default(), ram.tracker().join());
        for turn in 0..2000 {
            tlb.fill(0x1000, &translation(0x1000, turn % 2 == 0), ALL, &ram, &cpu);
        }
        tlb.fill(0x1000, &translation(0x1000, true), ALL, &ram, &cpu);
        tlb.flush_non_global();
        assert!(tlb.lookup_read(0x1000, 8).is_some());
        tlb.flush();
        assert!(tlb.lookup_read(0x1000, 8).is_none());
        tlb.fill(0x1000, &translation(0x1000, true), ALL, &ram, &cpu);
        tlb.fill(0x1000, &translation(0x1000, false), ALL, &ram, &cpu);
        tlb.flush_non_global();
        assert!(tlb.lookup_read(0x1000, 8).is_none());
    }

    /// What a slot and its victim hold, by the tags for reads.
    fn pages(tlb: &Tlb, linear: u64) -> [Option<u64>; 2] {
        let slot = slot_of(linear);
        [tlb.entries.get(slot), tlb.victims.get(slot)].map(|e| e.is_valid().then_some(e.read_tag))
    }

    #[test]
    fn what_is_driven_out_is_the_victim() {
        const STEP: u64 = (TLB_ENTRIES as u64) << 12;
        let ram = GuestRam::new(1 << 20).unwrap();
        let (mut tlb, peer) = (Tlb::default(), ram.tracker().join());
        let fill = |tlb: &mut Tlb, n: u64, global| {
            let t = translation(0x1000 * (n + 1), global);
            tlb.fill(0x3000 + n * STEP, &t, ALL, &ram, &peer);
        };
        let at = |n: u64| Some(0x3000 + n * STEP);
        fill(&mut tlb, 0, true);
        fill(&mut tlb, 0, true);
        assert_eq!(pages(&tlb, 0x3000), [at(0), None], "not of its own page");
        fill(&mut tlb, 1, false);
        assert_eq!(pages(&tlb, 0x3000), [at(1), at(0)]);
        fill(&mut tlb, 0, true);
        assert_eq!(pages(&tlb, 0x3000), [at(0), at(1)]);
        tlb.flush_non_global();
        assert_eq!(pages(&tlb, 0x3000), [at(0), None]);
        fill(&mut tlb, 2, false);
        ram.tracker().mark_dirty(0x1000);
        tlb.flush_of_kind(true);
        assert_eq!(pages(&tlb, 0x3000), [at(2), None], "a victim is flushed");
        fill(&mut tlb, 0, true);
        fill(&mut tlb, 1, true);
        let writable = |tlb: &Tlb| tlb.victims.get(slot_of(0x3000)).write_tag == 0x3000;
        assert!(writable(&tlb));
        tlb.protect(0x1000);
        assert!(!writable(&tlb));
        tlb.flush_page(0x3000);
        assert_eq!(pages(&tlb, 0x3000), [None, None]);
    }

    #[test]
    fn what_is_taken_out_comes_back_without_what_it_lost() {
        const STEP: u64 = (TLB_ENTRIES as u64) << 12;
        let ram = GuestRam::new(1 << 20).unwrap();
        let (mut tlb, peer) = (Tlb::default(), ram.tracker().join());
        let fill = |tlb: &mut Tlb, linear: u64, gpa: u64, global| {
            ram.tracker().mark_dirty(gpa);
            tlb.fill(linear, &translation(gpa, global), ALL, &ram, &peer);
        };
        fill(&mut tlb, 0x1000, 0x1000, false);
        fill(&mut tlb, 0x1000 + STEP, 0x2000, false);
        fill(&mut tlb, 0x3000, 0x3000, true);
        fill(&mut tlb, 0x4000, 0x4000, false);
        let mut taken = TakenEntries::default();
        tlb.take_non_global(&mut taken);
        let read = |tlb: &Tlb, at| tlb.lookup_read(at, 8).is_some();
        assert!(!read(&tlb, 0x1000 + STEP) && !read(&tlb, 0x4000) && read(&tlb, 0x3000));
        assert_eq!(pages(&tlb, 0x1000), [None, None]);
        taken.protect(0x4008);
        // A global page drives one of them to the victim's place.
        fill(&mut tlb, 0x4000 + STEP, 0x5000, true);
        tlb.put_back(&mut taken);
        assert_eq!(pages(&tlb, 0x1000), [Some(0x1000 + STEP), Some(0x1000)]);
        assert_eq!(pages(&tlb, 0x4000), [Some(0x4000 + STEP), Some(0x4000)]);
        fill(&mut tlb, 0x5000, 0x6000, false);
        assert!(tlb.lookup_write(0x1000 + STEP, 8).is_some());
        let victim = tlb.victims.get(slot_of(0x4000));
        assert_ne!(victim.write_tag, 0x4000, "it was taken away");
        tlb.flush_non_global();
        assert_eq!(pages(&tlb, 0x4000), [Some(0x4000 + STEP), None]);
        assert_eq!(pages(&tlb, 0x1000), [None, None]);
    }

    #[test]
    fn of_many_entries_the_latest_are_taken() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let (mut tlb, peer) = (Tlb::default(), ram.tracker().join());
        for n in 0..2 * MOST_TAKEN as u64 {
            tlb.fill(n << 12, &translation(0x1000, false), ALL, &ram, &peer);
        }
        let mut taken = TakenEntries::default();
        tlb.take_non_global(&mut taken);
        tlb.put_back(&mut taken);
        let held = |n: usize| tlb.lookup_read((n as u64) << 12, 8).is_some();
        assert!((0..MOST_TAKEN).all(|n| !held(n)));
        assert!((MOST_TAKEN..2 * MOST_TAKEN).all(held));
    }

    #[test]
    fn flushes_spare_what_is_global() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let (mut tlb, cpu) = (Tlb::default(), ram.tracker().join());
        tlb.fill(0x1000, &translation(0x1000, true), ALL, &ram, &cpu);
        tlb.fill(0x2000, &translation(0x2000, false), ALL, &ram, &cpu);
        tlb.flush_non_global();
        assert!(tlb.lookup_read(0x1000, 8).is_some());
        assert!(tlb.lookup_read(0x2000, 8).is_none());
        tlb.flush_page(0x1fff);
        assert!(tlb.lookup_read(0x1000, 8).is_none());
    }
}
