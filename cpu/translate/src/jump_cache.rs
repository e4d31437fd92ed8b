//! The jump cache: guest linear address → translation, for branches whose target is known only when they run.
//!
//! Direct mapped, one per privilege; generated code looks a target up in five instructions. Only the monitor enters anything, so
//! it lists the slots it used, and emptying the cache (each change of address space does) costs what was entered since.
//! Invariant: an entry's address leads to a block that is alive and that the guest's page tables give for its linear address.

/// Entries; a power of two.
pub(crate) const JUMP_CACHE_ENTRIES: usize = 4096;
/// Generated code ands a linear address with this and scales by 8 to reach its entry: bit 0 does not count.
pub(crate) const JUMP_INDEX_MASK: i32 = 2 * (JUMP_CACHE_ENTRIES as i32 - 1);

/// A guest linear address and where its translation begins.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct JumpEntry {
    pub linear: u64,
    pub host: u64,
}

/// Not canonical, so no branch leads there.
const NO_LINEAR: u64 = 0x8000_0000_0000_0000;

impl JumpEntry {
    const EMPTY: JumpEntry = JumpEntry {
        linear: NO_LINEAR,
        host: 0,
    };
    /// Empty, but in the list of filled slots.
    const FORGOTTEN: JumpEntry = JumpEntry {
        linear: NO_LINEAR,
        host: 1,
    };
}

/// The layout is relied on by generated code.
#[repr(C)]
pub(crate) struct JumpCache {
    entries: [JumpEntry; JUMP_CACHE_ENTRIES],
    filled: [u16; JUMP_CACHE_ENTRIES],
    len: usize,
}

fn index(linear: u64) -> usize {
    (linear as i32 & JUMP_INDEX_MASK) as usize / 2
}

impl JumpCache {
    /// Makes a zeroed cache an empty one.
    pub fn initialize(&mut self) {
        self.entries.fill(JumpEntry::EMPTY);
        self.len = 0;
    }

    /// The translation of a linear address.
    pub fn find(&self, linear: u64) -> Option<u64> {
        let entry = &self.entries[index(linear)];
        (entry.linear == linear).then_some(entry.host)
    }

    /// Enters a translation.
    pub fn insert(&mut self, linear: u64, host: u64) {
        let slot = index(linear);
        if self.entries[slot].host == 0 {
            // A slot leaves the list only with its entry, so the list has room for all.
            self.filled[self.len] = slot as u16;
            self.len += 1;
        }
        self.entries[slot] = JumpEntry { linear, host };
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for slot in &self.filled[..self.len] {
            self.entries[usize::from(*slot)] = JumpEntry::EMPTY;
        }
        self.len = 0;
    }

    /// Forgets one linear address.
    pub fn forget(&mut self, linear: u64) {
        let entry = &mut self.entries[index(linear)];
        if entry.linear == linear {
            *entry = JumpEntry::FORGOTTEN;
        }
    }

    /// Forgets the entries whose translations lie in a range of host addresses.
    pub fn remove(&mut self, host: &std::ops::Range<u64>) {
        let mut kept = 0;
        for n in 0..self.len {
            let slot = self.filled[n];
            if host.contains(&self.entries[usize::from(slot)].host) {
                self.entries[usize::from(slot)] = JumpEntry::EMPTY;
            } else {
                self.filled[kept] = slot;
                kept += 1;
            }
        }
        self.len = kept;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty() -> Box<JumpCache> {
        let mut cache = Box::new(JumpCache {
            entries: [JumpEntry::EMPTY; JUMP_CACHE_ENTRIES],
            filled: [0; JUMP_CACHE_ENTRIES],
            len: 0,
        });
        cache.initialize();
        cache
    }

    #[test]
    fn entries_are_found_until_they_are_forgotten() {
        let mut cache = empty();
        for turn in 0..3u64 {
            for n in 0..2 * JUMP_CACHE_ENTRIES as u64 {
                cache.insert(n, 0x1000 + n + turn);
            }
            assert_eq!(cache.find(8191), Some(0x1000 + 8191 + turn));
            assert_eq!(cache.find(8190), None, "displaced by 8191");
        }
        cache.remove(&(0x1000 + 8192..0x1000 + 8194));
        assert_eq!(cache.find(8191), None);
        assert!(cache.find(8189).is_some());
        cache.insert(8191, 7);
        cache.forget(8191);
        assert_eq!(cache.find(8191), None);
        cache.insert(8191, 7);
        cache.clear();
        assert!((0..1 << 13).all(|n| cache.find(n).is_none()));
    }

    #[test]
    fn no_address_is_found_in_an_empty_cache() {
        let cache = empty();
        assert_eq!(cache.find(0), None);
        assert_eq!(cache.find(u64::MAX), None);
    }
}
