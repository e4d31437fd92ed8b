//! What the pages of guest RAM hold: which were written, which hold translated code.
//!
//! Both facts are enforced by the software TLB, which gives write permission only to a page that is
//! dirty already and holds no code, so that every other first write takes a slow path that looks here.
//! Writes that do not go through a CPU (a device's) are told to every [`CodeWatch`]: a translator owns one.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use crate::{PAGE_MASK, PAGE_SIZE};

const DIRTY: u8 = 1;
const CODE: u8 = 2;

/// The 64-byte granules of one page that hold translated code, a bit each.
pub type CodeGranules = u64;

const GRANULE_SHIFT: u64 = 6;

/// Pages whose granules are allocated together, when the first of them holds code.
const REGION: usize = 512;
type Region = [AtomicU64; REGION];

/// Per-page facts about guest RAM. All methods may be called from any thread.
#[derive(Debug)]
pub struct PageTracker {
    flags: Vec<AtomicU8>,
    /// The granules of each page, by region; not zero only where the page has the CODE flag.
    code: Vec<OnceLock<Box<Region>>>,
    /// Held while the granules of a page and its CODE flag change.
    changes: Mutex<()>,
    watches: Mutex<Vec<Weak<CodeWatch>>>,
}

/// Pages with translated code that a device wrote to since the owner last looked.
#[derive(Debug, Default)]
pub struct CodeWatch {
    any: AtomicBool,
    // At most as many as there are pages of RAM.
    pages: Mutex<BTreeSet<u64>>,
}

impl CodeWatch {
    /// The pages, which are forgotten here.
    pub fn take(&self) -> BTreeSet<u64> {
        if !self.any.load(Ordering::Acquire) {
            return BTreeSet::new();
        }
        let mut pages = lock(&self.pages);
        self.any.store(false, Ordering::Release);
        std::mem::take(&mut pages)
    }

    fn note(&self, page: u64) {
        let mut pages = lock(&self.pages);
        pages.insert(page);
        self.any.store(true, Ordering::Release);
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PageTracker {
    /// A tracker for `pages` pages from guest physical address 0, all clean.
    pub fn new(pages: u64) -> Self {
        let mut flags = Vec::new();
        flags.resize_with(pages as usize, AtomicU8::default);
        PageTracker {
            flags,
            code: (0..pages.div_ceil(REGION as u64))
                .map(|_| OnceLock::new())
                .collect(),
            changes: Mutex::default(),
            watches: Mutex::default(),
        }
    }

    /// From now on the owner learns of devices' writes to translated code.
    pub fn watch(&self) -> Arc<CodeWatch> {
        let watch = Arc::new(CodeWatch::default());
        let mut watches = lock(&self.watches);
        watches.retain(|w| w.strong_count() > 0);
        watches.push(Arc::downgrade(&watch));
        watch
    }

    /// Notes a write within one page that no CPU made, after it was made. Returns true where it touched translated code:
    /// the engines follow when they next come back to the monitor, which a kick makes them do.
    pub fn note_device_write(&self, gpa: u64, len: u64) -> bool {
        self.mark_dirty(gpa);
        let touched = self.touches_code(gpa, len);
        if touched {
            for watch in lock(&self.watches).iter().filter_map(Weak::upgrade) {
                watch.note(gpa & !PAGE_MASK);
            }
        }
        touched
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

    /// Notes a write to `len` bytes.
    pub fn mark_range_dirty(&self, gpa: u64, len: u64) {
        let end = gpa.saturating_add(len);
        let mut page = gpa & !PAGE_MASK;
        while page < end && (page / PAGE_SIZE) < self.flags.len() as u64 {
            self.mark_dirty(page);
            page += PAGE_SIZE;
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
        let Some(code) = self.granules_at(gpa) else {
            return false;
        };
        let _changes = lock(&self.changes);
        code.fetch_or(granules(gpa, len), Ordering::AcqRel);
        let fresh = self.flag(gpa) & CODE == 0;
        if fresh {
            self.set(gpa, CODE);
        }
        fresh
    }

    /// The granules of a page of RAM.
    fn granules_at(&self, gpa: u64) -> Option<&AtomicU64> {
        let page = (gpa / PAGE_SIZE) as usize;
        let region = self.code.get(page / REGION)?;
        let region = region.get_or_init(|| Box::new([const { AtomicU64::new(0) }; REGION]));
        Some(&region[page % REGION])
    }

    /// True where a write of `len` bytes at `gpa` (within one page) may change translated code.
    pub fn touches_code(&self, gpa: u64, len: u64) -> bool {
        self.has_code(gpa) && {
            let code = self.granules_at(gpa);
            code.is_some_and(|c| c.load(Ordering::Acquire) & granules(gpa, len) != 0)
        }
    }

    /// Sets which granules of the page still hold code, after blocks were thrown away.
    pub fn set_code(&self, gpa: u64, granules: CodeGranules) {
        let Some(code) = self.granules_at(gpa) else {
            return;
        };
        let _changes = lock(&self.changes);
        code.store(granules, Ordering::Release);
        if granules != 0 {
            self.set(gpa, CODE);
        } else if let Some(f) = self.flags.get((gpa / PAGE_SIZE) as usize) {
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
        assert!(!t.touches_code(0x2104, 4));
        t.set_code(0x2000, 1 << 4);
        assert!(t.touches_code(0x2104, 4) && !t.touches_code(0x2140, 4));
    }

    #[test]
    fn what_is_beyond_the_end_holds_no_code() {
        let t = PageTracker::new(16);
        assert!(!t.add_code(600 << 12, 8) && !t.touches_code(600 << 12, 8));
        t.set_code(u64::MAX, 1);
        assert!(!t.has_code(u64::MAX));
    }

    #[test]
    fn a_device_that_writes_to_code_is_noticed_by_every_watch() {
        let t = PageTracker::new(16);
        let (a, b) = (t.watch(), t.watch());
        assert!(!t.note_device_write(0x2100, 8) && t.is_dirty(0x2100));
        t.add_code(0x2100, 10);
        assert!(!t.note_device_write(0x2000, 8));
        assert!(t.note_device_write(0x2104, 1));
        drop(b);
        assert!(t.note_device_write(0x2104, 1));
        assert_eq!(a.take(), BTreeSet::from([0x2000]));
        assert!(a.take().is_empty());
    }

    #[test]
    fn dirt_is_taken_once() {
        let t = PageTracker::new(16);
        t.mark_range_dirty(0x4fff, 2);
        assert!(t.take_dirty(0x4000) && t.take_dirty(0x5000) && !t.is_dirty(0x6000));
        t.mark_range_dirty(0xf000, u64::MAX);
        assert!(t.is_dirty(0xf000));
        t.mark_dirty(0x3fff);
        assert!(t.is_dirty(0x3000) && t.take_dirty(0x3000) && !t.take_dirty(0x3000));
    }
}
