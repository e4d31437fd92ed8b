//! Linear pages of code → physical pages, as the guest's page tables said when they were last asked.
//!
//! A TLB for instruction fetches without a bound on its size: translations, links and jump caches assume what stands here, so whatever
//! leaves it takes them along.
//!
//! User code is translated once for all linear addresses of its page, and a link of it to another page is right for one of them. A physical page that
//! user code fetches from at two linear addresses of an address space (*twice mapped*) therefore gets no such links.

use rustc_hash::FxHashMap;

use doppel_memory::{PAGE_MASK, Translation};
use doppel_x86::Flushed;

/// Linear page → physical page.
type Pages = FxHashMap<u64, u64>;

/// Code pages by who fetches from them; for the kernel apart by whether the translation is global.
#[derive(Default)]
pub(crate) struct CodePages {
    user: UserPages,
    kernel: Pages,
    kernel_global: Pages,
}

/// The user code pages of an address space.
#[derive(Default)]
pub(crate) struct UserPages {
    pages: Pages,
    /// Which physical pages there are, as a hash of them says: a page whose bit is not set has not been entered.
    filter: Filter,
    twice: Vec<u64>,
}

/// 4,096 bits: of an address space of 200 pages of code, one page in twenty is looked for in vain.
struct Filter([u64; 64]);

impl Default for Filter {
    fn default() -> Self {
        Filter([0; 64])
    }
}

impl Filter {
    /// Sets the bit of a page; true where it was.
    fn set(&mut self, gpa: u64) -> bool {
        let hash = (gpa >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
        let (word, bit) = (&mut self.0[hash as usize / 64], 1 << (hash % 64));
        let was = *word & bit != 0;
        *word |= bit;
        was
    }
}

impl UserPages {
    /// True where the physical page has another linear page, and that was not known.
    fn insert(&mut self, page: u64, gpa: u64) -> bool {
        let maybe = self.filter.set(gpa);
        let news = maybe
            && !self.twice.contains(&gpa)
            && (self.pages.iter()).any(|(other, to)| *to == gpa && *other != page);
        if news {
            self.twice.push(gpa);
        }
        self.pages.insert(page, gpa);
        news
    }

    fn clear(&mut self) {
        self.pages.clear();
        self.filter = Filter::default();
        self.twice.clear();
    }
}

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
            self.user.pages.get(&page).copied()
        } else {
            let global = self.kernel_global.get(&page);
            global.or_else(|| self.kernel.get(&page)).copied()
        }
    }

    /// Enters what a walk for a fetch by the kernel found.
    pub fn insert_kernel(&mut self, page: u64, t: &Translation) {
        let pages = match t.global {
            false => &mut self.kernel,
            true => &mut self.kernel_global,
        };
        pages.insert(page, t.gpa & !PAGE_MASK);
    }

    /// Enters what a walk for a fetch by user code finds. True where the physical page turns out to be mapped twice.
    #[must_use]
    pub fn insert_user(&mut self, page: u64, gpa: u64) -> bool {
        self.user.insert(page, gpa)
    }

    /// Whether user code fetches from a physical page at two linear ones.
    pub fn is_mapped_twice(&self, gpa: u64) -> bool {
        self.user.twice.contains(&gpa)
    }

    /// How many user pages are known.
    pub fn user_pages(&self) -> usize {
        self.user.pages.len()
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
            self.user.pages.remove(page);
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
        (std::mem::replace(&mut self.user, user), lost)
    }

    fn count(&self) -> (usize, usize) {
        (
            self.user.pages.len(),
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
            key: 0,
        }
    }

    #[test]
    fn flushes_take_what_they_name() {
        let mut pages = CodePages::default();
        assert!(!pages.insert_user(0x1000, 0x5000));
        pages.insert_kernel(0x2000, &page(0x6123, true));
        pages.insert_kernel(0x3000, &page(0x7000, false));
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

    #[test]
    fn a_page_at_two_addresses_is_found_and_forgotten_with_its_address_space() {
        let mut pages = CodePages::default();
        for n in 0..300 {
            assert!(!pages.insert_user(n << 12, (n + 7) << 12));
        }
        assert!(!pages.insert_user(5 << 12, 12 << 12), "entered again");
        assert!(pages.insert_user(1000 << 12, 12 << 12));
        assert!(!pages.insert_user(1001 << 12, 12 << 12), "known");
        assert!(pages.is_mapped_twice(12 << 12) && !pages.is_mapped_twice(13 << 12));
        let (away, _) = pages.switch(UserPages::default());
        assert!(!pages.is_mapped_twice(12 << 12));
        pages.switch(away);
        assert!(pages.is_mapped_twice(12 << 12));
        let non_global = true;
        pages.flush(&Flushed {
            non_global,
            ..Flushed::default()
        });
        assert!(!pages.is_mapped_twice(12 << 12));
        assert!(!pages.insert_user(1000 << 12, 12 << 12));
    }
}
