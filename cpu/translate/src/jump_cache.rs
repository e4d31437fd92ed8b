//! The jump cache: guest linear address → translation, for branches whose target is known only when they run.
//!
//! Two levels, one pair per privilege. Generated code looks a target up in the first, indexed by its low bits, in five instructions;
//! return addresses collide there, so a thunk then looks into the second, which is larger, hashes all bits, has two ways, and
//! brings what it finds into the first. Only what is in neither asks the monitor. (With one way, some pair of hot return addresses
//! shared a slot in every workload, and each use of one drove the other out.)
//! Invariants: an entry's address leads to a block that is alive and that the guest's page tables give for its linear address.
//! Whatever is in the first level is in the second or was brought from the code map; the second lists the slots it uses, and a
//! bit for each slot of the first says that such was brought there, so that emptying both (each change of
//! address space does) costs what was entered since. The first two slots of the first level are always empty: a kick leaves one bit
//! of the mask, so that every look-up ends in one of them, and the thunk looks for kicks. What stands in either is an address that belongs in the other,
//! under the whole mask as under that bit, so that no branch finds it. An unused entry is all zeros but in the slots where address 0 belongs.

use std::ops::Range;

use crate::blocks::BlockId;

/// Entries of the first level; a power of two.
const FIRST: usize = 8192;
/// log2 of the entries of the second level.
const SECOND_BITS: u32 = 14;
const SECOND: usize = 1 << SECOND_BITS;
/// log2 of the addresses that share a slot of the first level: targets of branches are hardly ever nearer to one another.
pub(crate) const FIRST_SHIFT: u8 = 2;
/// Generated code ands a linear address with this and scales by 4 to reach its entry in the first level.
pub(crate) const FIRST_INDEX_MASK: i32 = (FIRST as i32 - 1) << FIRST_SHIFT;
/// The mask while a kick waits.
pub(crate) const KICKED_MASK: u32 = 1 << FIRST_SHIFT;
/// What stands in the slots of the first level that a look-up under that mask ends in.
const ALWAYS_EMPTY: [u64; 2] = [KICKED_MASK as u64, 0];
/// Slots of the second level where an address may be.
const WAYS: usize = 2;
/// The number of a pair of slots of the second level is the top bits of the 32-bit product of the linear address and this.
pub(crate) const SECOND_FACTOR: i32 = 0x61c8_8647;
/// How far the product is shifted right to become the number of a pair.
pub(crate) const SECOND_SHIFT: u8 = (32 - (SECOND_BITS - 1)) as u8;

/// A guest linear address and where its translation begins.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct JumpEntry {
    pub linear: u64,
    pub host: u64,
}

/// An address that belongs in another slot of the second level than address 0. (One that is not canonical would not do: a guest may jump
/// to any.)
const NOT_IN_SLOT_0: u64 = 8;
/// No block begins there.
const FORGOTTEN: u32 = 1;

impl JumpEntry {
    /// An entry that no address finds, since its own belongs in another slot.
    fn empty(slot: usize) -> JumpEntry {
        let linear = ALWAYS_EMPTY.get(slot).copied().unwrap_or(0);
        JumpEntry { linear, host: 0 }
    }
}

/// An entry of the second level: 16 bytes with the block, since it says where in the code cache that begins.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct SecondEntry {
    pub linear: u64,
    /// Bytes from the beginning of the cache, where a thunk is.
    pub offset: u32,
    block: BlockId,
}

impl SecondEntry {
    /// An entry that no address finds.
    fn empty(slot: usize) -> SecondEntry {
        let linear = if slot < WAYS { NOT_IN_SLOT_0 } else { 0 };
        SecondEntry {
            linear,
            offset: 0,
            block: 0,
        }
    }

    /// Empty, but in the list of filled slots.
    fn forgotten(slot: usize) -> SecondEntry {
        SecondEntry {
            offset: FORGOTTEN,
            ..SecondEntry::empty(slot)
        }
    }

    fn is_vacant(&self) -> bool {
        self.offset <= FORGOTTEN
    }
}

/// The layout is relied on by generated code.
#[repr(C)]
pub(crate) struct JumpCache {
    pub first: [JumpEntry; FIRST],
    pub second: [SecondEntry; SECOND],
    /// Host address of the code cache.
    base: u64,
    filled: [u16; SECOND],
    len: usize,
    /// A bit for each slot of the first level that the thunk filled with what the second does not have; set by generated code.
    pub brought: [u64; FIRST / 64],
}

fn first_slot(linear: u64) -> usize {
    (linear as i32 & FIRST_INDEX_MASK) as usize >> FIRST_SHIFT
}

/// The slots of the second level where an address may be.
fn second_slots(linear: u64) -> Range<usize> {
    let pair = ((linear as u32).wrapping_mul(SECOND_FACTOR as u32) >> SECOND_SHIFT) as usize;
    WAYS * pair..WAYS * (pair + 1)
}

impl JumpCache {
    /// Makes a zeroed cache an empty one.
    pub fn initialize(&mut self) {
        for slot in 0..ALWAYS_EMPTY.len() {
            self.first[slot] = JumpEntry::empty(slot);
        }
        for slot in 0..WAYS {
            self.second[slot] = SecondEntry::empty(slot);
        }
    }

    /// Tells an empty cache where the code cache begins, which is smaller than 4 GiB.
    pub fn set_base(&mut self, base: u64) {
        self.base = base;
    }

    /// The slot of the second level that holds a linear address.
    fn slot_of(&self, linear: u64) -> Option<usize> {
        let mut slots = second_slots(linear);
        slots.find(|slot| self.second[*slot].linear == linear)
    }

    /// The translation of a linear address.
    pub fn find(&self, linear: u64) -> Option<u64> {
        let entry = self.second[self.slot_of(linear)?];
        Some(self.base + u64::from(entry.offset))
    }

    /// Enters a translation.
    pub fn insert(&mut self, linear: u64, host: u64, block: BlockId) {
        let offset = (host - self.base) as u32;
        let slot = self
            .slot_of(linear)
            .unwrap_or_else(|| self.make_room(linear));
        let entry = SecondEntry {
            linear,
            offset,
            block,
        };
        self.put(slot, entry);
        let slot = first_slot(linear);
        if slot >= ALWAYS_EMPTY.len() {
            self.first[slot] = JumpEntry { linear, host };
        }
    }

    /// The slot for an address that is in none. The one that was entered last moves on to the second way.
    fn make_room(&mut self, linear: u64) -> usize {
        let slot = second_slots(linear).start;
        let last = self.second[slot];
        if !last.is_vacant() {
            self.put(slot + 1, last);
            self.second[slot] = SecondEntry::forgotten(slot);
        }
        slot
    }

    fn put(&mut self, slot: usize, entry: SecondEntry) {
        let old = std::mem::replace(&mut self.second[slot], entry);
        if old.offset == 0 {
            // A slot leaves the list only with its entry, so the list has room for all.
            self.filled[self.len] = slot as u16;
            self.len += 1;
        }
        if old.linear != entry.linear {
            self.forget_first(old.linear);
        }
    }

    fn forget_first(&mut self, linear: u64) {
        let slot = first_slot(linear);
        if self.first[slot].linear == linear {
            self.first[slot] = JumpEntry::empty(slot);
        }
    }

    /// Takes everything out, into `taken`: linear addresses and their blocks, the latest `most` of them.
    pub fn take(&mut self, taken: &mut Vec<(u64, BlockId)>, most: usize) {
        let filled = &self.filled[self.len.saturating_sub(most)..self.len];
        taken.extend(filled.iter().filter_map(|slot| {
            let e = self.second[usize::from(*slot)];
            (!e.is_vacant()).then_some((e.linear, e.block))
        }));
        self.clear();
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for n in 0..self.len {
            self.empty_second(usize::from(self.filled[n]));
        }
        self.len = 0;
        self.forget_brought(|_| true);
    }

    /// Forgets those entries that came from the code map and lead to such a host address.
    fn forget_brought(&mut self, leads: impl Fn(u64) -> bool) {
        for (n, word) in self.brought.iter_mut().enumerate() {
            let mut left = *word;
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                let slot = 64 * n + bit as usize;
                if leads(self.first[slot].host) {
                    self.first[slot] = JumpEntry::empty(slot);
                    *word &= !(1 << bit);
                }
            }
        }
    }

    fn empty_second(&mut self, slot: usize) {
        self.forget_first(self.second[slot].linear);
        self.second[slot] = SecondEntry::empty(slot);
    }

    /// Forgets one linear address.
    pub fn forget(&mut self, linear: u64) {
        self.forget_first(linear);
        if let Some(slot) = self.slot_of(linear) {
            self.second[slot] = SecondEntry::forgotten(slot);
        }
    }

    /// Forgets the entries whose translations lie in a range of host addresses.
    pub fn remove(&mut self, host: &Range<u64>) {
        let mut kept = 0;
        for n in 0..self.len {
            let slot = self.filled[n];
            let offset = self.second[usize::from(slot)].offset;
            if host.contains(&(self.base + u64::from(offset))) {
                self.empty_second(usize::from(slot));
            } else {
                self.filled[kept] = slot;
                kept += 1;
            }
        }
        self.len = kept;
        self.forget_brought(|at| host.contains(&at));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x7f00_0000_0000;

    fn empty() -> Box<JumpCache> {
        let zeros = JumpEntry { linear: 0, host: 0 };
        let mut cache = Box::new(JumpCache {
            first: [zeros; FIRST],
            second: [SecondEntry::empty(WAYS); SECOND],
            base: 0,
            filled: [0; SECOND],
            len: 0,
            brought: [0; FIRST / 64],
        });
        cache.initialize();
        cache.set_base(BASE);
        cache
    }

    /// The first level holds nothing that the second does not.
    fn check(cache: &JumpCache) {
        for (slot, e) in cache.first.iter().enumerate() {
            let vacant = JumpEntry::empty(slot).linear;
            assert!(e.linear == vacant || cache.find(e.linear) == Some(e.host));
        }
    }

    #[test]
    fn entries_are_found_until_they_are_forgotten() {
        let mut cache = empty();
        for n in 0..40_000u64 {
            let linear = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 17;
            cache.insert(linear, BASE + 0x1000 + n, n as BlockId);
            assert_eq!(cache.find(linear), Some(BASE + 0x1000 + n));
        }
        check(&cache);
        cache.insert(0, BASE + 77, 1);
        assert_eq!(cache.find(0), Some(BASE + 77));
        cache.forget(0);
        assert_eq!(cache.find(0), None);
        cache.insert(0, BASE + 78, 1);
        cache.remove(&(BASE + 0x1000 + 30_000..BASE + 0x1000 + 40_000));
        check(&cache);
        assert!(cache.second.iter().all(|e| e.offset < 0x1000 + 30_000));
        assert_eq!(cache.find(0), Some(BASE + 78));
        cache.clear();
        check(&cache);
        assert_eq!(cache.len, 0);
        assert!(cache.first.iter().all(|e| e.host == 0));
    }

    #[test]
    fn what_was_brought_goes_with_the_rest() {
        let mut cache = empty();
        let mut bring = |linear: u64, host| {
            let slot = first_slot(linear);
            cache.first[slot] = JumpEntry { linear, host };
            cache.brought[slot / 64] |= 1 << (slot % 64);
        };
        bring(0x1234, 100);
        bring(0x5678, 200);
        cache.remove(&(150..250));
        assert_eq!(cache.first[first_slot(0x1234)].host, 100);
        assert_eq!(cache.first[first_slot(0x5678)].host, 0);
        cache.clear();
        assert!(cache.first.iter().all(|e| e.host == 0));
        assert_eq!(cache.brought, [0; FIRST / 64]);
    }

    #[test]
    fn no_address_is_found_in_an_empty_cache() {
        let cache = empty();
        assert_eq!(cache.find(0), None);
        assert_eq!(cache.find(u64::MAX), None);
    }

    /// Where generated code looks while a kick waits.
    fn kicked_slot(linear: u64) -> usize {
        (linear as u32 & KICKED_MASK) as usize >> FIRST_SHIFT
    }

    #[test]
    fn a_vacant_entry_is_found_by_no_address() {
        assert!(second_slots(NOT_IN_SLOT_0).start >= WAYS);
        let mut cache = empty();
        for _ in 0..2 {
            for linear in (0..256).chain([1 << 63, u64::MAX, 1 << 47]) {
                assert_eq!(cache.find(linear), None);
                assert_ne!(cache.first[first_slot(linear)].linear, linear);
                assert_ne!(cache.first[kicked_slot(linear)].linear, linear);
                cache.insert(linear, BASE + 7, 1);
                cache.forget(linear);
            }
        }
    }
}
