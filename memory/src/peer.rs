//! The CPUs that share one RAM, as they see each other: who runs guest code now, and what is asked of whom.
//!
//! Problem: a CPU keeps things that another's doings make wrong. Its software TLB lets it write to a page that another is
//! about to translate code from; its translations were made from bytes that another overwrites. A processor's caches are told
//! of such things by the bus.
//! Idea: each CPU has a [`Peer`], which the others can reach: a list of requests (drop write permission for these pages;
//! these bytes of code were written) and a mode, *in guest* or not. Who asks puts the request on the list, calls the CPU back
//! from translated code ([`Peer::set_nudge`]) and waits for the answer, but only where the CPU is in guest: outside (halted, in a
//! device, waiting for another's answer) it uses nothing of what it remembers, and it follows its requests before it is in guest again.
//! Invariants:
//! * mode and list are written and then read crosswise with sequential consistency, so that either the one who asks sees that
//!   the CPU is outside, or the CPU sees the request when it comes in;
//! * who waits is outside itself and holds no lock, so that two CPUs that ask each other both go on; a device, which may hold
//!   locks, asks but never waits;
//! * a CPU has its bit among the writers of a page before it may write there without asking, and only it takes the bit away
//!   ([`crate::PageTracker::may_write`]), so that a page that nobody else writes to costs no round trip.
//!
//! Cost: two atomic stores around each call of a device where there are several CPUs, nothing where code runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak};
use std::time::Duration;

use crate::track::{CodeGranules, Granules, PageSet};
use crate::watch::Watch;

/// CPUs that can share one RAM at most: each has a bit in the masks of a page.
pub const MOST_CPUS: usize = 64;

pub(crate) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What others ask of a CPU.
#[derive(Debug, Default)]
pub struct Requests {
    /// These pages must leave its TLBs as far as they may be written.
    pub protect: BTreeSet<u64>,
    /// Every page must.
    pub protect_all: bool,
    /// Granules of pages that were written where it has translations. Where it shares these ([`Peer::share_code`]), which are to be thrown
    /// away stands with the one whose record of them is used ([`Peer::take_written`]).
    pub code: BTreeMap<u64, CodeGranules>,
}

#[derive(Debug, Default)]
struct Inbox {
    requests: Requests,
    /// Requests put here so far.
    posted: u64,
}

pub(crate) type Nudge = Box<dyn Fn() + Send + Sync>;

/// One CPU as the others see it.
pub struct Peer {
    bit: u64,
    peers: Arc<Peers>,
    in_guest: AtomicBool,
    /// The inbox holds something, or somebody wants to be alone.
    any: AtomicBool,
    inbox: Mutex<Inbox>,
    /// So many requests were followed.
    answered: AtomicU64,
    /// Those who sleep on `changed`.
    waiting: AtomicU32,
    changed: Condvar,
    nudge: OnceLock<Nudge>,
    /// Who has the record of the translations that it shares.
    leader: OnceLock<Weak<Peer>>,
    /// All who share the translations that stand in its record.
    sharers: AtomicU64,
    /// Granules of these that were written, and not thrown away yet.
    written: Mutex<BTreeMap<u64, CodeGranules>>,
    /// What it has translated, where it translates.
    pub(crate) code: Granules,
    /// What of that the processor executes as it is.
    pub(crate) claimed: PageSet,
    /// What it monitors.
    pub(crate) watch: Watch,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Peer {{ bit: {:#x} }}", self.bit)
    }
}

/// All of them.
#[derive(Debug)]
pub(crate) struct Peers {
    seats: RwLock<Vec<Weak<Peer>>>,
    /// There is, or was, more than one.
    shared: AtomicBool,
    /// Held by the one that runs alone.
    alone: Mutex<()>,
    /// It wants to, or does.
    alone_wanted: AtomicBool,
    /// Which CPUs may write to a page without asking, a bit each.
    pub writers: Granules,
    /// Which CPUs have translations of a page, where there is, or was, more than one.
    owners: Granules,
    /// Held while the owners of a page and its CODE flag change.
    pub changes: Mutex<()>,
}

/// A request on its way: who has to answer, and the number of the request there.
#[derive(Default)]
#[must_use = "the writer goes on only after the answers"]
pub struct Asked(Vec<(Arc<Peer>, u64)>);

impl Asked {
    /// True where nobody has to answer.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Waits for the answers. The caller is [outside](Peer::leave) and holds no lock.
    pub fn wait(self) {
        for (peer, number) in self.0 {
            peer.wait_for(|p| p.answered.load(Ordering::SeqCst) >= number);
        }
    }
}

impl Peers {
    pub fn new(pages: u64) -> Arc<Self> {
        Arc::new(Peers {
            seats: RwLock::default(),
            shared: AtomicBool::new(false),
            alone: Mutex::default(),
            alone_wanted: AtomicBool::new(false),
            writers: Granules::new(pages),
            owners: Granules::new(pages),
            changes: Mutex::default(),
        })
    }

    /// Makes a peer. Those there are forget what they may write, which they did not have to say while they were alone.
    pub fn join(self: &Arc<Self>) -> Arc<Peer> {
        let mut seats = self.seats.write().unwrap_or_else(PoisonError::into_inner);
        let free = seats.iter().position(|s| s.strong_count() == 0);
        let seat = free.unwrap_or(seats.len());
        assert!(seat < MOST_CPUS, "{MOST_CPUS} CPUs share the RAM already");
        let peer = Arc::new(Peer::new(1 << seat, self.clone()));
        let others: Vec<_> = seats.iter().filter_map(Weak::upgrade).collect();
        match free {
            Some(seat) => seats[seat] = Arc::downgrade(&peer),
            None => seats.push(Arc::downgrade(&peer)),
        }
        drop(seats);
        if !others.is_empty() && self.begin_to_share(&others) {
            let asked = others
                .iter()
                .filter_map(|p| p.ask(|r| r.protect_all = true));
            Asked(asked.collect()).wait();
        }
        peer
    }

    /// Notes what those there own, which they did not have to say while they were alone; true where nobody has done so.
    fn begin_to_share(&self, others: &[Arc<Peer>]) -> bool {
        let _changes = lock(&self.changes);
        if self.is_shared() {
            return false;
        }
        for peer in others {
            peer.owned()
                .for_each(|page| self.owners.add(page, peer.bit));
        }
        self.shared.store(true, Ordering::SeqCst);
        true
    }

    pub fn is_shared(&self) -> bool {
        self.shared.load(Ordering::Relaxed)
    }

    /// The CPUs that may have translations of a page, a bit each. A CPU that is alone may have some of every page: [`Peer::has_code`] knows.
    pub fn owners(&self, gpa: u64) -> u64 {
        match self.shared.load(Ordering::SeqCst) {
            true => self.owners.get(gpa),
            false => u64::MAX,
        }
    }

    /// Makes a CPU an owner of a page, or one no more. `changes` is held. True where the page has owners.
    pub fn set_owner(&self, gpa: u64, by: &Peer, owns: bool) -> bool {
        if !self.is_shared() {
            return owns;
        }
        match owns {
            true => self.owners.add(gpa, by.bit),
            false => self.owners.remove(gpa, by.bit),
        }
        self.owners.get(gpa) != 0
    }

    /// The peers whose bits are set.
    pub fn of(&self, mask: u64) -> Vec<Arc<Peer>> {
        if mask == 0 {
            return Vec::new();
        }
        let seats = self.seats.read().unwrap_or_else(PoisonError::into_inner);
        let wanted = |n: &usize| mask >> n & 1 != 0;
        (0..seats.len())
            .filter(wanted)
            .filter_map(|n| seats[n].upgrade())
            .collect()
    }
}

impl Peer {
    fn new(bit: u64, peers: Arc<Peers>) -> Self {
        Peer {
            bit,
            code: Granules::new(peers.writers.pages()),
            claimed: PageSet::new(peers.writers.pages()),
            peers,
            in_guest: AtomicBool::new(false),
            any: AtomicBool::new(false),
            inbox: Mutex::default(),
            answered: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            changed: Condvar::new(),
            nudge: OnceLock::new(),
            leader: OnceLock::new(),
            sharers: AtomicU64::new(bit),
            written: Mutex::default(),
            watch: Watch::default(),
        }
    }

    /// The pages whose owner it is.
    fn owned(&self) -> impl Iterator<Item = u64> {
        let pages = self.code.used().chain(self.claimed.iter());
        pages.chain(self.watch.page())
    }

    /// True where any of these granules of the page hold code that it has translated or claimed.
    pub(crate) fn has_code(&self, gpa: u64, granules: CodeGranules) -> bool {
        self.code.get(gpa) & granules != 0 || (granules != 0 && self.claimed.contains(gpa))
    }

    /// From now on its translations are those of `leader`, who has the record of them (itself, at
    /// first) and outlives them.
    pub fn share_code(&self, leader: &Arc<Peer>) {
        leader.sharers.fetch_or(self.bit, Ordering::SeqCst);
        let _ = self.leader.set(Arc::downgrade(leader));
    }

    /// The bits of those who share translations with it, and its own. They are told of its writes in any case: another write may have had the
    /// translations thrown away, and not all know yet.
    pub(crate) fn group(&self) -> u64 {
        let leader = self.leader.get().and_then(Weak::upgrade);
        leader.map_or(self.bit, |l| l.sharers.load(Ordering::SeqCst))
    }

    /// Its translations of these granules are to be thrown away, by the first of those who share them; the bits of all of these.
    pub(crate) fn note_written(&self, page: u64, granules: CodeGranules) -> u64 {
        let leader = self.leader.get().map(Weak::as_ptr);
        if leader.is_some_and(|l| std::ptr::eq(l, self)) {
            *lock(&self.written).entry(page).or_default() |= granules;
        }
        self.sharers.load(Ordering::SeqCst)
    }

    /// Takes the granules whose translations are to be thrown away, of those that stand in its record. The caller lets nobody else look at the
    /// translations until that is done.
    pub fn take_written(&self) -> BTreeMap<u64, CodeGranules> {
        std::mem::take(&mut *lock(&self.written))
    }

    /// Its bit in the masks of pages.
    pub(crate) fn bit(&self) -> u64 {
        self.bit
    }

    /// True where others share the RAM.
    #[inline]
    pub fn is_shared(&self) -> bool {
        self.peers.is_shared()
    }

    /// What makes its engine look at the requests soon, called from any thread. The first to be set stays.
    pub fn set_nudge(&self, nudge: impl Fn() + Send + Sync + 'static) {
        let _ = self.nudge.set(Box::new(nudge));
    }

    fn nudge(&self) {
        if let Some(nudge) = self.nudge.get() {
            nudge();
        }
    }

    /// The CPU is in guest from here on; the requests are for it to follow first. Waits while another runs alone.
    pub fn enter(&self) {
        loop {
            self.in_guest.store(true, Ordering::SeqCst);
            if !self.peers.alone_wanted.load(Ordering::SeqCst) {
                return;
            }
            self.leave();
            drop(lock(&self.peers.alone));
        }
    }

    /// The CPU is outside from here on.
    pub fn leave(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.inbox));
            self.changed.notify_all();
        }
    }

    /// True where there are requests to follow.
    #[inline]
    pub fn has_requests(&self) -> bool {
        self.any.load(Ordering::SeqCst)
    }

    /// Takes the requests and, where another wants to be alone, waits for that. They count as followed only after
    /// [`Self::answer`] with the number that comes with them.
    pub fn take_requests(&self) -> (Requests, u64) {
        self.any.store(false, Ordering::SeqCst);
        if self.peers.alone_wanted.load(Ordering::SeqCst) {
            self.leave();
            self.enter();
        }
        let mut inbox = lock(&self.inbox);
        (std::mem::take(&mut inbox.requests), inbox.posted)
    }

    /// Takes what concerns the TLBs alone; the rest stays a request.
    pub fn take_protects(&self) -> Requests {
        let mut inbox = lock(&self.inbox);
        let requests = &mut inbox.requests;
        Requests {
            protect: std::mem::take(&mut requests.protect),
            protect_all: std::mem::take(&mut requests.protect_all),
            code: BTreeMap::new(),
        }
    }

    /// The requests up to this number have been followed.
    pub fn answer(&self, number: u64) {
        self.answered.store(number, Ordering::SeqCst);
        self.wake();
    }

    /// Puts a request into the inbox; the number to wait for, where it is in guest.
    fn post(self: &Arc<Self>, request: impl FnOnce(&mut Requests)) -> u64 {
        let mut inbox = lock(&self.inbox);
        request(&mut inbox.requests);
        inbox.posted += 1;
        self.any.store(true, Ordering::SeqCst);
        inbox.posted
    }

    /// Asks, and says whom to wait for.
    pub(crate) fn ask(
        self: &Arc<Self>,
        request: impl FnOnce(&mut Requests),
    ) -> Option<(Arc<Peer>, u64)> {
        let number = self.post(request);
        if !self.in_guest.load(Ordering::SeqCst) {
            return None;
        }
        self.nudge();
        Some((self.clone(), number))
    }

    /// Asks all whose bits are set but this one.
    pub(crate) fn ask_others(&self, mask: u64, request: impl Fn(&mut Requests)) -> Asked {
        let others = self.peers.of(mask & !self.bit);
        Asked(others.iter().filter_map(|p| p.ask(&request)).collect())
    }

    /// Waits until something holds, or the CPU is outside.
    fn wait_for(&self, holds: impl Fn(&Self) -> bool) {
        /// About as long as a thread that runs takes to answer.
        const SPINS: usize = 200;
        const LOOK_AGAIN: Duration = Duration::from_millis(10);
        let done = || !self.in_guest.load(Ordering::SeqCst) || holds(self);
        for _ in 0..SPINS {
            if done() {
                return;
            }
            std::hint::spin_loop();
        }
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let mut inbox = lock(&self.inbox);
        while !done() {
            let woken = self.changed.wait_timeout(inbox, LOOK_AGAIN);
            inbox = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(inbox);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }

    /// Runs `f` while every other CPU is outside. The caller is in guest, and is so in `f`; what it remembered before has to
    /// be looked at again there.
    pub fn alone<R>(&self, f: impl FnOnce() -> R) -> R {
        self.leave();
        let guard = lock(&self.peers.alone);
        self.peers.alone_wanted.store(true, Ordering::SeqCst);
        for other in self.peers.of(!self.bit) {
            other.any.store(true, Ordering::SeqCst);
            other.nudge();
            other.wait_for(|_| false);
        }
        self.in_guest.store(true, Ordering::SeqCst);
        let result = f();
        self.peers.alone_wanted.store(false, Ordering::SeqCst);
        drop(guard);
        result
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        for page in self.owned() {
            self.peers.owners.remove(page, self.bit);
        }
    }
}

/// While it lives, its CPU is in guest.
pub struct InGuest(Arc<Peer>);

impl InGuest {
    /// [Enters](Peer::enter).
    pub fn new(peer: &Arc<Peer>) -> Self {
        peer.enter();
        InGuest(peer.clone())
    }
}

impl Drop for InGuest {
    fn drop(&mut self) {
        self.0.leave();
    }
}

#[cfg(test)]
mod tests {
    use crate::PageTracker;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    const PAGE: u64 = 0x3000;

    #[test]
    fn only_those_who_may_write_are_asked_and_only_in_guest() {
        let t = PageTracker::new(16);
        let [a, b, c] = [(); 3].map(|()| t.join());
        assert!(t.may_write(PAGE, &b));
        c.enter();
        t.add_code(PAGE, 4, &a);
        assert!(
            t.protect(PAGE, &a).is_empty(),
            "one is outside, the other no writer"
        );
        assert!(b.has_requests() && !c.has_requests());
        b.enter();
        assert!(!t.protect(PAGE, &a).is_empty());
        let (requests, number) = b.take_requests();
        assert!(requests.protect.contains(&PAGE));
        t.remove_writer(PAGE, &b);
        b.answer(number);
        assert!(t.protect(PAGE, &a).is_empty());
        assert!(!t.may_write(PAGE, &b), "there is code");
    }

    #[test]
    fn a_second_cpu_makes_the_first_forget_what_it_may_write() {
        let t = PageTracker::new(16);
        let a = t.join();
        assert!(t.may_write(PAGE, &a));
        let _b = t.join();
        assert!(a.take_protects().protect_all);
    }

    #[test]
    fn who_shares_translations_is_told_of_every_write_and_one_throws_away() {
        let t = PageTracker::new(16);
        let [a, b, other] = [(); 3].map(|()| t.join());
        let _ = a.take_requests();
        a.share_code(&a);
        b.share_code(&a);
        b.enter();
        t.add_code(PAGE, 64, &a);
        assert!(!t.tell_others(PAGE, 8, &a).is_empty(), "the one in guest");
        assert!(!other.has_requests());
        let (requests, number) = b.take_requests();
        assert_eq!(requests.code, [(PAGE, 1)].into());
        assert_eq!(a.take_written(), [(PAGE, 1)].into());
        assert!(b.take_written().is_empty() && a.take_written().is_empty());
        t.set_code(PAGE, 0, &a);
        assert!(
            !t.tell_others(PAGE, 8, &a).is_empty(),
            "it has not followed the first write yet"
        );
        b.answer(number + 1);
        t.add_code(PAGE, 64, &a);
        t.note_device_write(PAGE, 8);
        assert!(a.has_requests() && b.has_requests() && !other.has_requests());
        assert!(!t.tell_others(PAGE, 8, &other).is_empty());
    }

    #[test]
    fn a_claim_ends_without_the_translations_of_its_page() {
        let t = PageTracker::new(16);
        let a = t.join();
        t.add_code(PAGE, 64, &a);
        t.claim_code(PAGE, &a);
        t.set_code(PAGE, 1, &a);
        assert!(t.touches_code(PAGE + 0x800, 1));
        t.release_code(PAGE, &a);
        assert!(t.touches_code(PAGE, 1) && !t.touches_code(PAGE + 0x800, 1));
        t.set_code(PAGE, 0, &a);
        assert!(!t.has_code(PAGE));
    }

    #[test]
    fn cpus_that_ask_each_other_both_go_on() {
        const ROUNDS: u64 = 20_000;
        let t = Arc::new(PageTracker::new(16));
        let cpus = [t.join(), t.join(), t.join()];
        let answers = AtomicU64::new(0);
        let start = std::sync::Barrier::new(cpus.len());
        std::thread::scope(|scope| {
            for (n, me) in cpus.iter().enumerate() {
                let (t, answers, start) = (&t, &answers, &start);
                scope.spawn(move || {
                    start.wait();
                    me.enter();
                    for round in 0..ROUNDS {
                        if round % 64 == 0 {
                            // A busy host would let one after the other run to its end.
                            std::thread::yield_now();
                        }
                        let page = (round + n as u64) % 16 * 4096;
                        if round % 3 == 0 {
                            t.add_writer(page, me);
                        }
                        let asked = t.protect(page, me);
                        me.leave();
                        asked.wait();
                        me.enter();
                        if me.has_requests() {
                            let (requests, number) = me.take_requests();
                            for page in requests.protect {
                                t.remove_writer(page, me);
                                answers.fetch_add(1, Ordering::Relaxed);
                            }
                            me.answer(number);
                        }
                    }
                    me.leave();
                });
            }
        });
        assert!(answers.into_inner() > 0);
    }

    #[test]
    fn one_that_is_alone_is_alone() {
        let t = PageTracker::new(16);
        let cpus = [t.join(), t.join(), t.join()];
        let busy = AtomicBool::new(false);
        let mut sums = [0u64; 3];
        std::thread::scope(|scope| {
            for (me, sum) in cpus.iter().zip(&mut sums) {
                let busy = &busy;
                scope.spawn(move || {
                    me.enter();
                    for round in 0..3000 {
                        assert!(!busy.load(Ordering::SeqCst));
                        if round % 8 == 0 {
                            me.alone(|| {
                                assert!(!busy.swap(true, Ordering::SeqCst));
                                *sum += 1;
                                busy.store(false, Ordering::SeqCst);
                            });
                        }
                        if me.has_requests() {
                            let (_, number) = me.take_requests();
                            me.answer(number);
                        }
                    }
                    me.leave();
                });
            }
        });
        assert_eq!(sums, [375; 3]);
    }
}
