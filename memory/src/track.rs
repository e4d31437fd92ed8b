//! What the pages of guest RAM hold: which were written, which hold translated code.
//!
//! Both facts are enforced by the software TLB, which gives write permission only to a page that is
//! dirty already and holds no code, so that every other first write takes a slow path that looks here.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::{PAGE_MASK, PAGE_SIZE};

const DIRTY: u8 = 1;
const CODE: u8 = 2;

/// The 64-byte granules of one page that hold translated code, a bit each.
pub type CodeGranules = u64;

const GRANULE_SHIFT: u64 = 6;

/// Per-page facts about guest RAM. All methods may be called from any thread.
#[derive(Debug)]
pub struct PageTracker {
    flags: Vec<AtomicU8>,
    // Only pages with the CODE flag have an entry.
    code: Mutex<HashMap<u64, CodeGranules>>,
}

impl PageTracker {
    /// A tracker for `pages` pages from guest physical address 0, all clean.
    pub fn new(pages: u64) -> Self {
        let mut flags = Vec::new();
        flags.resize_with(pages as usize, AtomicU8::default);
        PageTracker {
            flags,
            code: Mutex::new(HashMap::new()),
        }
    }

    #[inline]
    fn flag(&self, gpa: u64) -> u8 {
        self.flags
            .get((gpa / PAGE_SIZE) as usize)
            .map_or(0, |f| f.load(Ordering::Acquire))
    }

    fn set(&self, gpa: u64, flag: u8) {
        if let Some(f) = self.flags.get((gpa / PAGE_SIZE) as usize) {
            f.fetch_or(flag, Ordering::AcqRel);
        }
    }

    /// True where the page was written since the start or the last [`Self::take_dirty`].
    #[inline]
    pub fn is_dirty(&self, gpa: u64) -> bool {
        self.flag(gpa) & DIRTY != 0
    }

    /// Notes a write to the page.
    #[inline]
    pub fn mark_dirty(&self, gpa: u64) {
        if self.flag(gpa) & DIRTY == 0 {
            self.set(gpa, DIRTY);
        }
    }

    /// Returns whether the page was dirty and makes it clean. Software TLBs must be flushed afterwards.
    pub fn take_dirty(&self, gpa: u64) -> bool {
        self.flags
            .get((gpa / PAGE_SIZE) as usize)
            .is_some_and(|f| f.fetch_and(!DIRTY, Ordering::AcqRel) & DIRTY != 0)
    }

    /// True where some block of translated code was made from bytes of the page.
    #[inline]
    pub fn has_code(&self, gpa: u64) -> bool {
        self.flag(gpa) & CODE != 0
    }

    /// Notes that `len` bytes at `gpa` (within one page) were translated. Returns true where the page
    /// held no code before: its write permission must then leave every TLB.
    pub fn add_code(&self, gpa: u64, len: u64) -> bool {
        let mut code = self.code.lock().unwrap_or_else(|e| e.into_inner());
        *code.entry(gpa & !PAGE_MASK).or_default() |= granules(gpa, len);
        let fresh = self.flag(gpa) & CODE == 0;
        self.set(gpa, CODE);
        fresh
    }

    /// True where a write of `len` bytes at `gpa` (within one page) may change translated code.
    pub fn touches_code(&self, gpa: u64, len: u64) -> bool {
        self.has_code(gpa) && {
            let code = self.code.lock().unwrap_or_else(|e| e.into_inner());
            code.get(&(gpa & !PAGE_MASK))
                .is_some_and(|c| c & granules(gpa, len) != 0)
        }
    }

    /// Sets which granules of the page still hold code, after blocks were thrown away.
    pub fn set_code(&self, gpa: u64, granules: CodeGranules) {
        let mut code = self.code.lock().unwrap_or_else(|e| e.into_inner());
        if granules != 0 {
            code.insert(gpa & !PAGE_MASK, granules);
            self.set(gpa, CODE);
            return;
        }
        code.remove(&(gpa & !PAGE_MASK));
        if let Some(f) = self.flags.get((gpa / PAGE_SIZE) as usize) {
            f.fetch_and(!CODE, Ordering::AcqRel);
        }
    }

    /// The granules that `len` bytes at `gpa` (within one page) lie in.
    pub fn granules(gpa: u64, len: u64) -> CodeGranules {
        granules(gpa, len)
    }
}

fn granules(gpa: u64, len: u64) -> CodeGranules {
    let first = (gpa & PAGE_MASK) >> GRANULE_SHIFT;
    let last = ((gpa & PAGE_MASK) + len.max(1) - 1).min(PAGE_MASK) >> GRANULE_SHIFT;
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_cover_the_bytes() {
        assert_eq!(granules(0x1000, 1), 1);
        assert_eq!(granules(0x103f, 2), 0b11);
        assert_eq!(granules(0x1fff, 9), 1 << 63);
        assert_eq!(granules(0x1000, 4096), u64::MAX);
    }

    #[test]
    fn code_is_found_where_it_was_put() {
        let t = PageTracker::new(16);
        assert!(t.add_code(0x2100, 10));
        assert!(!t.add_code(0x2200, 10));
        assert!(t.touches_code(0x2104, 4));
        assert!(!t.touches_code(0x2000, 8));
        t.set_code(0x2000, 0);
        assert!(!t.has_code(0x2100));
    }

    #[test]
    fn dirt_is_taken_once() {
        let t = PageTracker::new(16);
        t.mark_dirty(0x3fff);
        assert!(t.is_dirty(0x3000) && t.take_dirty(0x3000) && !t.take_dirty(0x3000));
    }
}
