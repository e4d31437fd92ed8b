//! Linear pages of code → physical pages, as the guest's page tables said when they were last asked.
//!
//! A TLB for instruction fetches without a bound on its size: translations, links and jump caches assume what stands here, so whatever
//! leaves it takes them along.

use rustc_hash::FxHashMap;

use doppel_memory::{PAGE_MASK, Translation};
use doppel_x86::Flushed;

/// Linear page → physical page.
type Pages = FxHashMap<u64, u64>;

/// Code pages by who fetches from them; for the kernel apart by whether the translation is global.
#[derive(Default)]
pub(crate) struct CodePages {
    user: Pages,
    kernel: Pages,
    kernel_global: Pages,
}

/// The user code pages of an address space that is not current.
#[derive(Default)]
pub(crate) struct UserPages(Pages);

/// What a flush took away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    pub user: bool,
    pub kernel: bool,
}

impl CodePages {
    /// The physical page of a linear page.
    pub fn get(&self, user: bool, page: u64) -> Option<u64> {
        if user {
            self.user.get(&page).copied()
        } else {
            let global = self.kernel_global.get(&page);
            global.or_else(|| self.kernel.get(&page)).copied()
        }
    }

    /// Enters what a walk for a fetch found.
    pub fn insert(&mut self, user: bool, page: u64, t: &Translation) {
        let pages = match (user, t.global) {
            (true, _) => &mut self.user,
            (false, false) => &mut self.kernel,
            (false, true) => &mut self.kernel_global,
        };
        pages.insert(page, t.gpa & !PAGE_MASK);
    }

    /// Enters a user page that such a walk would find.
    pub fn insert_user(&mut self, page: u64, gpa: u64) {
        self.user.insert(page, gpa);
    }

    /// How many user pages are known.
    pub fn user_pages(&self) -> usize {
        self.user.len()
    }

    /// Follows a flush of the CPU's TLBs. User pages count as not global.
    pub fn flush(&mut self, flushed: &Flushed) -> Lost {
        let before = self.count();
        if flushed.global {
            self.kernel_global.clear();
        }
        if flushed.global || flushed.non_global {
            self.user.clear();
            self.kernel.clear();
        }
        for page in &flushed.pages {
            self.user.remove(page);
            self.kernel.remove(page);
            self.kernel_global.remove(page);
        }
        let after = self.count();
        Lost {
            user: before.0 != after.0,
            kernel: before.1 != after.1,
        }
    }

    /// Another address space became current: its user pages come, and the others' are returned. Tells whether any of the kernel's
    /// were lost.
    pub fn switch(&mut self, user: UserPages) -> (UserPages, bool) {
        let lost = !self.kernel.is_empty();
        self.kernel.clear();
        (UserPages(std::mem::replace(&mut self.user, user.0)), lost)
    }

    fn count(&self) -> (usize, usize) {
        (
            self.user.len(),
            self.kernel.len() + self.kernel_global.len(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(gpa: u64, global: bool) -> Translation {
        Translation {
            gpa,
            page_shift: 12,
            rights_user: false,
            rights_write: false,
            rights_execute: true,
            global,
            dirty: false,
        }
    }

    #[test]
    fn flushes_take_what_they_name() {
        let mut pages = CodePages::default();
        pages.insert(true, 0x1000, &page(0x5123, true));
        pages.insert(false, 0x2000, &page(0x6000, true));
        pages.insert(false, 0x3000, &page(0x7000, false));
        assert_eq!(pages.get(true, 0x1000), Some(0x5000));
        assert_eq!(pages.get(false, 0x1000), None);
        let mut flushed = Flushed {
            non_global: true,
            ..Flushed::default()
        };
        let lost = pages.flush(&flushed);
        assert!(lost.user && lost.kernel);
        assert_eq!(pages.get(false, 0x2000), Some(0x6000));
        assert_eq!(pages.get(false, 0x3000), None);
        let lost = pages.flush(&flushed);
        assert!(!lost.user && !lost.kernel);
        flushed = Flushed {
            pages: vec![0x2000],
            ..Flushed::default()
        };
        assert!(pages.flush(&flushed).kernel);
        assert_eq!(pages.get(false, 0x2000), None);
    }
}
