//! The line of memory that a CPU monitors (MONITOR and MWAIT): whoever stores to it is noticed.
//!
//! Problem: a CPU sleeps until another, or a device, stores to a line, be it the value that was there. Who looks at the line now and then misses such a store, wakes an idle
//! host for nothing, and is late by the time between two looks.
//! Idea: the page counts as one that holds translated code in that line ([`crate::PageTracker`]). So no TLB and no child process lets anybody write there without asking, stores beside the line
//! go on in translated code, and one to the line ends where the writer tells those whom it concerns, which sounds the alarm of the CPU.
//! Invariants:
//! * from the end of [`PageTracker::watch`](crate::PageTracker::watch) and the answers to what is asked then, until another line is watched, every store to the line is told after it was made;
//! * who tells takes the arming away, and sounds the alarm only where it was there: at most once for each MONITOR.
//!
//! Cost: kernels monitor the same line again and again, so the watch stays after the MWAIT, and MONITOR is an atomic exchange from the second time on. Stores to the page take the way of those beside
//! code; the page is that of an idle task, to which hardly anybody else writes.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::peer::{Nudge, Peer};
use crate::track::{CodeGranules, PageTracker};
use crate::{PAGE_MASK, PAGE_SIZE};

/// Bytes of a monitored line: those of a granule of code, and of a line of the cache.
pub const MONITOR_LINE: u64 = 64;

const NOWHERE: u64 = u64::MAX;

/// What one CPU monitors.
pub(crate) struct Watch {
    /// Where the line begins.
    line: AtomicU64,
    /// There was no store since MONITOR.
    armed: AtomicBool,
    /// What wakes the CPU.
    alarm: OnceLock<Nudge>,
}

impl Default for Watch {
    fn default() -> Self {
        Watch {
            line: AtomicU64::new(NOWHERE),
            armed: AtomicBool::new(false),
            alarm: OnceLock::new(),
        }
    }
}

impl Watch {
    fn line(&self) -> Option<u64> {
        let line = self.line.load(Ordering::SeqCst);
        (line != NOWHERE).then_some(line)
    }

    /// The page of the line.
    pub fn page(&self) -> Option<u64> {
        self.line().map(|line| line & !PAGE_MASK)
    }

    /// True where the line lies in the page of this address.
    pub fn is_on(&self, gpa: u64) -> bool {
        self.page() == Some(gpa & !PAGE_MASK)
    }

    /// True where the line is among these granules of the page.
    pub fn covers(&self, gpa: u64, granules: CodeGranules) -> bool {
        let line = self.line().filter(|_| self.is_on(gpa));
        line.is_some_and(|line| PageTracker::granules(line, 1) & granules != 0)
    }

    /// Takes another line; the one before, and whether they differ.
    pub fn moves_to(&self, line: u64) -> (Option<u64>, bool) {
        let before = self.line();
        self.line.store(line, Ordering::SeqCst);
        (before, before != Some(line))
    }

    /// These granules of the page were written.
    pub fn stored(&self, gpa: u64, granules: CodeGranules) {
        if self.covers(gpa, granules)
            && self.armed.swap(false, Ordering::SeqCst)
            && let Some(alarm) = self.alarm.get()
        {
            alarm();
        }
    }
}

impl Peer {
    /// What wakes the CPU when there is a store to the line that it monitors, called from any thread and under any lock. The first to be set stays.
    pub fn set_alarm(&self, alarm: impl Fn() + Send + Sync + 'static) {
        let _ = self.watch.alarm.set(Box::new(alarm));
    }

    /// From here on a store to the watched line is noted.
    pub fn arm(&self) {
        self.watch.armed.swap(true, Ordering::SeqCst);
    }

    /// There was no store to the watched line since [`Self::arm`], and no [`Self::disarm`].
    #[inline]
    pub fn is_armed(&self) -> bool {
        self.watch.armed.load(Ordering::SeqCst)
    }

    /// Nothing is monitored any more.
    #[inline]
    pub fn disarm(&self) {
        if self.watch.armed.load(Ordering::Relaxed) {
            self.watch.armed.store(false, Ordering::SeqCst);
        }
    }

    /// The CPU itself, which has the RAM for itself, has stored `len` bytes at `gpa` (within one page).
    pub fn note_own_store(&self, gpa: u64, len: u64) {
        self.watch.stored(gpa, PageTracker::granules(gpa, len));
    }
}

impl PageTracker {
    /// A CPU watches the line of this address from now on, and none other. True where it did not before: its own TLBs are to give up their permission to write to the page
    /// then, and [`Self::protect`] is to follow.
    pub fn watch(&self, gpa: u64, by: &Peer) -> bool {
        let _changes = crate::peer::lock(&self.peers.changes);
        let (before, other) = by.watch.moves_to(gpa & !(MONITOR_LINE - 1));
        if other {
            before.into_iter().for_each(|gpa| self.own(gpa, by));
            self.own(gpa, by);
        }
        other
    }

    /// True where some CPU watches a line of the page.
    pub fn is_watched(&self, gpa: u64) -> bool {
        self.has_code(gpa) && {
            let owners = self.peers.of(self.peers.owners(gpa));
            owners.iter().any(|o| o.watch.is_on(gpa))
        }
    }
}

const _: () = assert!(MONITOR_LINE * 64 == PAGE_SIZE, "a granule of code each");

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU32;

    const PAGE: u64 = 0x3000;
    const LINE: u64 = PAGE + 0x140;

    fn counting(peer: &Peer) -> Arc<AtomicU32> {
        let alarms = Arc::<AtomicU32>::default();
        let sounded = alarms.clone();
        peer.set_alarm(move || {
            sounded.fetch_add(1, Ordering::SeqCst);
        });
        alarms
    }

    #[test]
    fn a_store_to_the_line_sounds_the_alarm_once() {
        let t = PageTracker::new(16);
        let [a, b] = [(); 2].map(|()| t.join());
        let alarms = counting(&a);
        let sounded = || alarms.load(Ordering::SeqCst);
        assert!(t.watch(LINE + 3, &a) && !t.watch(LINE + 63, &a));
        a.arm();
        for beside in [LINE - 1, LINE + 64, LINE + PAGE_SIZE] {
            assert!(!t.touches_code(beside, 1), "{beside:x}");
            t.note_device_write(beside, 1);
        }
        assert!(a.is_armed() && t.touches_code(LINE - 1, 2));
        assert!(t.tell_others(LINE + 63, 1, &b).is_empty(), "it has no code");
        assert_eq!((a.is_armed(), sounded()), (false, 1));
        t.note_device_write(LINE, 8);
        assert_eq!(sounded(), 1, "nobody armed it");
        a.arm();
        t.note_device_write(LINE - 0x100, 0x200);
        assert_eq!((a.is_armed(), sounded()), (false, 2));
    }

    #[test]
    fn one_that_is_alone_hears_of_devices_and_of_itself() {
        let t = PageTracker::new(16);
        let a = t.join();
        let alarms = counting(&a);
        t.watch(LINE, &a);
        a.arm();
        t.note_device_write(LINE, 8);
        a.arm();
        a.note_own_store(LINE + 8, 4);
        assert_eq!(alarms.load(Ordering::SeqCst), 2);
        // The page is no other when a second CPU comes.
        let b = t.join();
        a.arm();
        let _ = t.tell_others(LINE, 1, &b);
        assert!(!a.is_armed());
    }

    #[test]
    fn who_may_write_is_asked_and_nobody_may_until_another_line_is_watched() {
        let t = PageTracker::new(16);
        let [a, b] = [(); 2].map(|()| t.join());
        b.enter();
        assert!(t.may_write(LINE, &b));
        assert!(t.watch(LINE, &a));
        assert!(!t.protect(LINE, &a).is_empty());
        assert!(!t.may_write(LINE, &b) && t.is_watched(LINE));
        t.add_code(LINE, 8, &b);
        t.set_code(LINE, 0, &b);
        assert!(!t.may_write(LINE, &b), "translations come and go");
        assert!(t.watch(LINE + PAGE_SIZE, &a));
        assert!(t.may_write(LINE, &b) && !t.is_watched(LINE));
        assert!(!t.may_write(LINE + PAGE_SIZE, &b));
    }
}
