//! What the pages of guest RAM hold: which were written, which hold translated code.
//!
//! Both facts are enforced by the software TLB, which gives write permission only to a page that is
//! dirty already and holds no code, so that every other first write takes a slow path that looks here.
//! Who else has to know of a write to code (other CPUs; every CPU, of a device's write) is the business of [`crate::peer`].
//!
//! A CPU that translates notes the bytes first ([`PageTracker::add_code`]), has the others give up their permission to write there
//! ([`PageTracker::protect`]) and then looks at the bytes again. Who writes without permission writes first and looks for code
//! then. So of two that meet, one sees the other.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use crate::peer::{Asked, Peer, Peers, lock};
use crate::{PAGE_MASK, PAGE_SIZE};

const DIRTY: u8 = 1;
const CODE: u8 = 2;
/// Bits of a page.
const FLAGS: u64 = 2;
/// Pages whose bits are in a byte.
const PAGES_A_BYTE: u64 = 8 / FLAGS;

/// The 64-byte granules of one page that hold translated code, a bit each.
pub type CodeGranules = u64;

const GRANULE_SHIFT: u64 = 6;

/// Pages whose words are allocated together, when the first of them is set.
const REGION: usize = 64;
/// Regions that are entered together.
const REGIONS: usize = 64;
type Region = [AtomicU64; REGION];
type Stretch = [OnceLock<Box<Region>>; REGIONS];

/// A word a page, most of them 0: those of pages that lie together, and nearly no memory for the others.
#[derive(Debug)]
pub(crate) struct Granules {
    stretches: Vec<OnceLock<Box<Stretch>>>,
    pages: u64,
}

/// Where a page's word is: stretch, region, word.
fn place(gpa: u64) -> (usize, usize, usize) {
    let page = (gpa / PAGE_SIZE) as usize;
    let region = page / REGION;
    (region / REGIONS, region % REGIONS, page % REGION)
}

impl Granules {
    pub fn new(pages: u64) -> Self {
        let stretches = pages.div_ceil((REGION * REGIONS) as u64);
        Granules {
            stretches: (0..stretches).map(|_| OnceLock::new()).collect(),
            pages,
        }
    }

    pub fn pages(&self) -> u64 {
        self.pages
    }

    pub fn get(&self, gpa: u64) -> u64 {
        let (stretch, region, word) = place(gpa);
        let stretch = self.stretches.get(stretch).and_then(OnceLock::get);
        let region = stretch.and_then(|regions| regions[region].get());
        region.map_or(0, |words| words[word].load(Ordering::SeqCst))
    }

    fn word(&self, gpa: u64) -> Option<&AtomicU64> {
        let (stretch, region, word) = place(gpa);
        let stretch = self.stretches.get(stretch)?;
        let regions = stretch.get_or_init(|| Box::new([const { OnceLock::new() }; REGIONS]));
        let empty = || Box::new([const { AtomicU64::new(0) }; REGION]);
        Some(&regions[region].get_or_init(empty)[word])
    }

    pub fn add(&self, gpa: u64, bits: u64) {
        if let Some(word) = self.word(gpa) {
            word.fetch_or(bits, Ordering::SeqCst);
        }
    }

    pub fn remove(&self, gpa: u64, bits: u64) {
        if self.get(gpa) & bits != 0
            && let Some(word) = self.word(gpa)
        {
            word.fetch_and(!bits, Ordering::SeqCst);
        }
    }

    fn set(&self, gpa: u64, bits: u64) {
        if let Some(word) = self.word(gpa) {
            word.store(bits, Ordering::SeqCst);
        }
    }

    /// The pages whose words are not 0.
    pub fn used(&self) -> impl Iterator<Item = u64> {
        let stretches = self.stretches.iter().enumerate();
        let regions = stretches.flat_map(|(n, stretch)| {
            let regions = stretch.get().into_iter().flat_map(|s| s.iter().enumerate());
            regions.filter_map(move |(m, region)| Some((n * REGIONS + m, region.get()?)))
        });
        regions.flat_map(|(n, region)| {
            let set = |at: &usize| region[*at].load(Ordering::SeqCst) != 0;
            let pages = (0..REGION).filter(set);
            pages.map(move |at| (n * REGION + at) as u64 * PAGE_SIZE)
        })
    }
}

/// A set of pages.
#[derive(Debug)]
pub(crate) struct PageSet(Granules);

/// Where a page's bit is.
fn bit_of(gpa: u64) -> (u64, u64) {
    let page = gpa / PAGE_SIZE;
    (page / 64 * PAGE_SIZE, 1 << (page % 64))
}

impl PageSet {
    pub fn new(pages: u64) -> Self {
        PageSet(Granules::new(pages.div_ceil(64)))
    }

    pub fn contains(&self, gpa: u64) -> bool {
        let (word, bit) = bit_of(gpa);
        self.0.get(word) & bit != 0
    }

    pub fn insert(&self, gpa: u64) {
        let (word, bit) = bit_of(gpa);
        self.0.add(word, bit);
    }

    pub fn remove(&self, gpa: u64) {
        let (word, bit) = bit_of(gpa);
        self.0.remove(word, bit);
    }

    pub fn iter(&self) -> impl Iterator<Item = u64> {
        self.0.used().flat_map(|word| {
            let (bits, first) = (self.0.get(word), word * 64);
            let set = (0..64).filter(move |n| bits >> n & 1 != 0);
            set.map(move |n| first + n * PAGE_SIZE)
        })
    }
}

/// Per-page facts about guest RAM. All methods may be called from any thread.
#[derive(Debug)]
pub struct PageTracker {
    /// Those of several pages in a byte.
    flags: Vec<AtomicU8>,
    pages: u64,
    pub(crate) peers: Arc<Peers>,
}

impl PageTracker {
    /// A tracker for `pages` pages from guest physical address 0, all clean.
    pub fn new(pages: u64) -> Self {
        let mut flags = Vec::new();
        flags.resize_with(pages.div_ceil(PAGES_A_BYTE) as usize, AtomicU8::default);
        PageTracker {
            flags,
            pages,
            peers: Peers::new(pages),
        }
    }

    /// Pages from guest physical address 0 on.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// A CPU more that shares the RAM.
    ///
    /// # Panics
    /// Where [`crate::MOST_CPUS`] share it.
    pub fn join(&self) -> Arc<Peer> {
        self.peers.join()
    }

    /// The byte with the bits of a page, and how far these are from its low end.
    #[inline]
    fn place(&self, gpa: u64) -> Option<(&AtomicU8, u64)> {
        let page = gpa / PAGE_SIZE;
        if page >= self.pages {
            return None;
        }
        let byte = self.flags.get((page / PAGES_A_BYTE) as usize)?;
        Some((byte, page % PAGES_A_BYTE * FLAGS))
    }

    #[inline]
    fn flag(&self, gpa: u64) -> u8 {
        self.place(gpa)
            .map_or(0, |(f, at)| f.load(Ordering::SeqCst) >> at)
    }

    fn set(&self, gpa: u64, flag: u8) {
        if let Some((f, at)) = self.place(gpa) {
            f.fetch_or(flag << at, Ordering::SeqCst);
        }
    }

    /// Clears a flag; whether it was set.
    fn take(&self, gpa: u64, flag: u8, order: Ordering) -> bool {
        self.place(gpa)
            .is_some_and(|(f, at)| f.fetch_and(!(flag << at), order) & flag << at != 0)
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
        for (page, _) in pages(gpa, len, self.pages) {
            self.mark_dirty(page);
        }
    }

    /// Returns whether the page was dirty and makes it clean. Software TLBs must be flushed afterwards.
    pub fn take_dirty(&self, gpa: u64) -> bool {
        self.take(gpa, DIRTY, Ordering::AcqRel)
    }

    // ---- code ----

    /// True where some block of translated code was made from bytes of the page.
    #[inline]
    pub fn has_code(&self, gpa: u64) -> bool {
        self.flag(gpa) & CODE != 0
    }

    /// Notes that a CPU translates `len` bytes at `gpa` (within one page). [`Self::protect`] is to follow.
    pub fn add_code(&self, gpa: u64, len: u64, by: &Peer) {
        let bits = granules(gpa, len);
        if by.code.get(gpa) & bits == bits {
            return;
        }
        let _changes = lock(&self.peers.changes);
        by.code.add(gpa, bits);
        self.own(gpa, by);
    }

    /// Notes that the processor itself executes the page as code of a CPU: all of it counts as translated until [`Self::release_code`].
    /// [`Self::protect`] is to follow.
    pub fn claim_code(&self, gpa: u64, by: &Peer) {
        let _changes = lock(&self.peers.changes);
        by.claimed.insert(gpa);
        self.own(gpa, by);
    }

    /// Ends a claim; translated code stays noted.
    pub fn release_code(&self, gpa: u64, by: &Peer) {
        let _changes = lock(&self.peers.changes);
        by.claimed.remove(gpa);
        self.own(gpa, by);
    }

    /// Sets which granules of the page still hold code of a CPU, after it threw blocks away.
    pub fn set_code(&self, gpa: u64, granules: CodeGranules, by: &Peer) {
        let _changes = lock(&self.peers.changes);
        by.code.set(gpa, granules);
        self.own(gpa, by);
    }

    /// Makes a CPU an owner of the page where it has code there, or watches a line of it.
    pub(crate) fn own(&self, gpa: u64, by: &Peer) {
        let owns = by.has_code(gpa, CodeGranules::MAX) || by.watch.is_on(gpa);
        if self.peers.set_owner(gpa, by, owns) {
            self.set(gpa, CODE);
        } else {
            self.take(gpa, CODE, Ordering::SeqCst);
        }
    }

    /// True where a write of `len` bytes at `gpa` (within one page) may change translated code of any CPU, or is to a line that one monitors.
    pub fn touches_code(&self, gpa: u64, len: u64) -> bool {
        self.has_code(gpa) && {
            let owners = self.peers.of(self.peers.owners(gpa));
            let bits = granules(gpa, len);
            let concerns = |o: &Arc<Peer>| o.has_code(gpa, bits) || o.watch.covers(gpa, bits);
            owners.iter().any(concerns)
        }
    }

    /// The same just after the write was made, so that a CPU that translates at the same time is not missed.
    pub fn touched_code(&self, gpa: u64, len: u64) -> bool {
        fence(Ordering::SeqCst);
        self.touches_code(gpa, len)
    }

    /// The granules that `len` bytes at `gpa` (within one page) lie in.
    pub fn granules(gpa: u64, len: u64) -> CodeGranules {
        granules(gpa, len)
    }

    /// Where the first of some granules of a page begins, and the bytes to the end of the last.
    pub fn extent(bits: CodeGranules) -> (u64, u64) {
        let (first, end) = (bits.trailing_zeros().min(63), 64 - bits.leading_zeros());
        let at = |granule: u32| u64::from(granule) << GRANULE_SHIFT;
        (at(first), at(end.max(first)) - at(first))
    }

    // ---- between CPUs ----

    /// True where a CPU may write to the page without asking; then it is among its writers from now on.
    #[inline]
    pub fn may_write(&self, gpa: u64, by: &Peer) -> bool {
        if self.has_code(gpa) {
            return false;
        }
        if !by.is_shared() {
            return true;
        }
        self.add_writer(gpa, by);
        !self.has_code(gpa)
    }

    /// Lets whoever translates from the page wait for this CPU.
    pub fn add_writer(&self, gpa: u64, by: &Peer) {
        if by.is_shared() && self.peers.writers.get(gpa) & by.bit() == 0 {
            self.peers.writers.add(gpa, by.bit());
        }
    }

    /// True where whoever translates from the page waits for this CPU.
    pub fn is_writer(&self, gpa: u64, cpu: &Peer) -> bool {
        self.peers.writers.get(gpa) & cpu.bit() != 0
    }

    /// A CPU has given up its permission to write to the page.
    pub fn remove_writer(&self, gpa: u64, by: &Peer) {
        self.peers.writers.remove(gpa, by.bit());
    }

    /// Asks all other CPUs that may write to the page to give that up.
    pub fn protect(&self, gpa: u64, by: &Peer) -> Asked {
        if !by.is_shared() {
            return Asked::default();
        }
        let page = gpa & !PAGE_MASK;
        by.ask_others(self.peers.writers.get(gpa), |r| {
            r.protect.insert(page);
        })
    }

    /// Tells all other CPUs that have translated any of `len` bytes at `gpa` (within one page) of a write to them, and wakes those that monitor them.
    pub fn tell_others(&self, gpa: u64, len: u64, by: &Peer) -> Asked {
        let (page, bits) = (gpa & !PAGE_MASK, granules(gpa, len));
        let concerned = concerned(&self.peers, self.peers.owners(gpa), page, bits);
        by.ask_others(concerned | by.group(), |r| {
            *r.code.entry(page).or_default() |= bits;
        })
    }

    /// Notes a write that no CPU made to `len` bytes, after it was made: the pages are dirty, and every CPU that has translated from
    /// these bytes is told and called back. Nobody is waited for, so any lock may be held: a CPU that
    /// executes a serializing instruction, as it must before it executes what a device has written, has followed by then.
    pub fn note_device_write(&self, gpa: u64, len: u64) {
        self.note_device_writes([(gpa, len)]);
    }

    /// The same for several ranges, address and length each.
    pub fn note_device_writes(&self, ranges: impl IntoIterator<Item = (u64, u64)>) {
        fence(Ordering::SeqCst);
        let end = self.pages;
        for (at, len) in ranges.into_iter().flat_map(|(at, len)| pages(at, len, end)) {
            self.mark_dirty(at);
            if !self.has_code(at) {
                continue;
            }
            let (page, bits) = (at & !PAGE_MASK, granules(at, len));
            let concerned = concerned(&self.peers, self.peers.owners(at), page, bits);
            for peer in self.peers.of(concerned) {
                let _ = peer.ask(|r| *r.code.entry(page).or_default() |= bits);
            }
        }
    }
}

/// Notes a write to granules of a page for those of `owners` that monitor a line of them, and for those that have translated them; the bits of all CPUs that use the translations.
fn concerned(peers: &Peers, owners: u64, page: u64, bits: CodeGranules) -> u64 {
    let owners = peers.of(owners);
    owners.iter().for_each(|o| o.watch.stored(page, bits));
    let hit = owners.iter().filter(|o| o.has_code(page, bits));
    hit.fold(0, |all, owner| all | owner.note_written(page, bits))
}

/// Cuts a range at the ends of pages, as far as there are pages.
fn pages(gpa: u64, len: u64, pages: u64) -> impl Iterator<Item = (u64, u64)> {
    let end = gpa.saturating_add(len).min(pages * PAGE_SIZE);
    let mut at = gpa;
    std::iter::from_fn(move || {
        let now = (end.saturating_sub(at)).min(PAGE_SIZE - (at & PAGE_MASK));
        let from = at;
        at = at.saturating_add(now);
        (now > 0).then_some((from, now))
    })
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
    fn each_page_has_a_word_of_its_own() {
        let pages = 2 * (REGION * REGIONS) as u64 + 5;
        let words = Granules::new(pages);
        let some = [0, 1, 63, 64, 4095, 4096, 4161, pages - 1];
        for page in some {
            words.add(page * PAGE_SIZE + 7, page + 1);
        }
        assert!(some.iter().all(|p| words.get(p * PAGE_SIZE) == p + 1));
        assert_eq!([2, 62, 65, 4097].map(|p| words.get(p * PAGE_SIZE)), [0; 4]);
        assert!(words.used().eq(some.map(|page| page * PAGE_SIZE)));
        words.remove(4096 * PAGE_SIZE, u64::MAX);
        words.set(PAGE_SIZE, 0);
        assert_eq!(words.used().count(), some.len() - 2);
        assert_eq!(words.get(u64::MAX), 0);
    }

    #[test]
    fn a_set_has_the_pages_that_were_put_in() {
        let set = PageSet::new(5000);
        let pages = [0, 1, 63, 64, 4095, 4999].map(|page| page * PAGE_SIZE);
        pages.iter().for_each(|page| set.insert(page + 9));
        assert!(pages.iter().all(|page| set.contains(*page)));
        assert!(!set.contains(2 * PAGE_SIZE) && !set.contains(u64::MAX));
        assert!(set.iter().eq(pages));
        set.remove(PAGE_SIZE);
        assert_eq!(set.iter().nth(1), Some(63 * PAGE_SIZE));
    }

    #[test]
    fn granules_cover_the_bytes() {
        assert_eq!(granules(0x1000, 1), 1);
        assert_eq!(granules(0x103f, 2), 0b11);
        assert_eq!(granules(0x1fff, 9), 1 << 63);
        assert_eq!(granules(0x1000, 4096), u64::MAX);
        assert_eq!(PageTracker::extent(0b0110), (64, 128));
        assert_eq!(PageTracker::extent(u64::MAX), (0, 4096));
        assert_eq!(PageTracker::extent(0).1, 0);
    }

    #[test]
    fn code_is_found_where_it_was_put() {
        let t = PageTracker::new(16);
        let (cpu, other) = (t.join(), t.join());
        t.add_code(0x2100, 10, &cpu);
        t.add_code(0x2200, 10, &other);
        assert!(t.touches_code(0x2104, 4) && t.touches_code(0x2208, 8));
        assert!(!t.touches_code(0x2000, 8));
        t.set_code(0x2000, 0, &cpu);
        assert!(t.has_code(0x2100) && !t.touches_code(0x2104, 4));
        t.set_code(0x2000, 0, &other);
        assert!(!t.has_code(0x2100));
        t.set_code(0x2000, 1 << 4, &cpu);
        assert!(t.touches_code(0x2104, 4) && !t.touches_code(0x2140, 4));
    }

    #[test]
    fn a_cpu_that_was_alone_owns_what_it_translated() {
        let t = PageTracker::new(16);
        let first = t.join();
        t.add_code(0x2100, 10, &first);
        t.claim_code(0x3000, &first);
        t.add_code(0x4100, 10, &first);
        t.set_code(0x4000, 0, &first);
        assert!(t.touches_code(0x2104, 4) && !t.touches_code(0x2000, 8));
        assert!(t.has_code(0x3000) && !t.has_code(0x4000));
        let second = t.join();
        let _ = first.take_requests();
        t.add_code(0x2200, 10, &second);
        assert!(t.touches_code(0x2104, 4) && t.touches_code(0x3abc, 1));
        t.note_device_write(0x2100, 4);
        assert!(first.has_requests() && !second.has_requests());
        t.set_code(0x2000, 0, &second);
        assert!(t.has_code(0x2000), "the first has code there");
        t.set_code(0x2000, 0, &first);
        t.release_code(0x3000, &first);
        assert!(!t.has_code(0x2000) && !t.has_code(0x3000));
    }

    #[test]
    fn what_is_beyond_the_end_holds_no_code() {
        let t = PageTracker::new(16);
        let cpu = t.join();
        t.add_code(600 << 12, 8, &cpu);
        assert!(!t.touches_code(600 << 12, 8));
        t.set_code(u64::MAX, 1, &cpu);
        assert!(!t.has_code(u64::MAX));
        t.note_device_write(u64::MAX - 8, 100);
        t.note_device_write(0xfff8, 100);
        assert!(t.is_dirty(0xf000));
    }

    #[test]
    fn a_device_that_writes_to_code_is_noticed_by_every_cpu_that_has_it() {
        let t = PageTracker::new(16);
        let (a, b) = (t.join(), t.join());
        t.note_device_write(0x2100, 8);
        let (first, _) = a.take_requests();
        assert!(t.is_dirty(0x2100) && first.protect_all && first.code.is_empty());
        t.add_code(0x2100, 10, &a);
        t.note_device_write(0x2000, 8);
        assert!(!a.has_requests());
        t.note_device_write(0x1fff, 0x102);
        assert!(a.has_requests() && !b.has_requests());
        let (requests, _) = a.take_requests();
        assert_eq!(requests.code, [(0x2000, 0b1_1111)].into());
        assert!(!a.has_requests());
        drop(a);
        assert!(!t.touches_code(0x2100, 8), "it is forgotten with its CPU");
    }

    #[test]
    fn pages_that_share_a_byte_are_told_apart() {
        let t = PageTracker::new(6);
        let cpu = t.join();
        t.add_code(0x2000, 4, &cpu);
        for page in [0, 1, 3, 5] {
            t.mark_dirty(page << 12);
        }
        let all = |has: &dyn Fn(u64) -> bool| (0..8).filter(|p| has(p << 12)).collect::<Vec<_>>();
        assert_eq!(all(&|gpa| t.is_dirty(gpa)), [0, 1, 3, 5]);
        assert_eq!(all(&|gpa| t.has_code(gpa)), [2]);
        t.mark_dirty(0x2000);
        assert!(t.take_dirty(0x1000) && t.take_dirty(0x2000));
        t.mark_dirty(0x7000);
        assert_eq!(all(&|gpa| t.is_dirty(gpa)), [0, 3, 5]);
        assert_eq!(all(&|gpa| t.has_code(gpa)), [2]);
        t.set_code(0x2000, 0, &cpu);
        assert!(all(&|gpa| t.has_code(gpa)).is_empty());
        assert_eq!(all(&|gpa| t.is_dirty(gpa)), [0, 3, 5]);
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
