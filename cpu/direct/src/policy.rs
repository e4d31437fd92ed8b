//! When user code is left to the processor, and when not.
//!
//! Problem: direct execution runs at native speed, but each time that user code is left (a system call, a page fault, an interrupt) costs some
//! microseconds more than under translation. Which is cheaper depends on how long user code runs in between, and only trying tells.
//! Idea: tests on the way in and one on the way out. *In* ([`Scout`]): two looks in a row find user code running in the same address space, none finds the kernel between them, and the kernel was
//! entered so rarely meanwhile that a stretch of user code was long ([`Times::stretch`]) on average. *In* ([`Explorer`]): code is executed for the first time, so that its translation would take longer than the stops. *Out* ([`Account`]): each stretch
//! pays in a part of its length (up to a bound, and without what was a wait for the host's processor), each page of code that need not be translated its price, each stop and each change of a mapping takes out its price; when the account is overdrawn, the address space is translated again. Where
//! that was the first thing it did, it is so for twice as long as the last time before it is tried once more; where direct execution had paid, only until the tests on the way in say otherwise.
//! Invariant: what is lost to trying is at most the overdraft in the time until the next try, whatever the guest does.
//! Cost: one reading of the TSC per stop; one of processor time per long stretch, and per interrupt that finds translated user code.

use std::time::Duration;

use crate::Prices;

/// The part of a stretch that it is reckoned to save, as a fraction.
const GAIN: (u64, u64) = (5, 8);

/// The prices, in TSC ticks.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// Mean length of a stretch of user code from which on it pays to try.
    pub stretch: u64,
    /// What a stop costs more than under translation.
    pub stop: i64,
    /// What the change of a mapping costs.
    pub change: u64,
    /// The account of an address space that is tried, for the first time and again.
    pub advance: (i64, i64),
    /// The same right after long stretches have paid: what has been mapped meanwhile is mapped in the child at once, which costs a change for each page.
    pub advance_computed: i64,
    /// What a page of code is worth that need not be translated.
    pub page: u64,
    /// What it costs to translate the first of a page that nobody has executed, with what is likely to follow, and a block of one that only this address space has.
    pub translation: (u64, u64),
    /// Translations follow each other no further apart, and cost so much together, where it pays to try.
    pub unknown: (u64, u64),
    /// A stretch from which on it is asked what of it was a wait for the host's processor.
    pub long: u64,
    /// How much of a stretch counts.
    pub longest: u64,
    /// What an account holds at most, and what it may hold by pages of code.
    pub most: (i64, i64),
    /// The first time away, and the longest.
    pub away: (u64, u64),
    /// From one look at user code to the next where it may be worth a second one soon: right after direct execution paid no longer, and at most.
    pub look: (u64, u64),
    /// Two looks at user code count as one stretch of looks if no further apart.
    pub apart: (u64, u64),
}

impl Times {
    /// For a TSC of this frequency, on a host with these prices.
    pub fn new(tsc_hz: u64, prices: Prices) -> Self {
        let us = microsecond(tsc_hz);
        let (stretch, stop) = of_stop(ticks(prices.stop, us));
        Times {
            stretch,
            stop,
            change: ticks(prices.change, us),
            advance: (1500 * us as i64, 1000 * us as i64),
            advance_computed: 2500 * us as i64,
            page: 70 * us,
            translation: (60 * us, 5 * us / 2),
            unknown: (5_000 * us, 1_500 * us),
            long: 60 * us,
            longest: 4000 * us,
            most: (700 * us as i64, 4000 * us as i64),
            away: (4_000 * us, 1_000_000 * us),
            look: (400 * us, 1_000 * us),
            apart: (700 * us, 20_000 * us),
        }
    }

    /// A stop takes so long by now.
    pub fn set_stop(&mut self, tsc_hz: u64, stop: Duration) {
        (self.stretch, self.stop) = of_stop(ticks(stop, microsecond(tsc_hz)));
    }

    /// As if direct execution cost nothing.
    pub fn free() -> Self {
        Times {
            stretch: 0,
            stop: 0,
            change: 0,
            advance: (1, 1),
            advance_computed: 1,
            page: 0,
            translation: (1, 1),
            unknown: (u64::MAX, 1),
            long: u64::MAX,
            longest: 1,
            most: (1, 1),
            away: (0, 0),
            look: (u64::MAX, u64::MAX),
            apart: (0, u64::MAX),
        }
    }
}

fn microsecond(tsc_hz: u64) -> u64 {
    (tsc_hz / 1_000_000).max(1)
}

fn ticks(price: Duration, microsecond: u64) -> u64 {
    price.as_nanos() as u64 * microsecond / 1_000
}

/// From what a stop takes: the mean stretch from which on it pays to try, and what a stop is charged. The stop itself looks like a stretch of user code, of which a part is
/// reckoned as saved.
fn of_stop(stop: u64) -> (u64, i64) {
    (stop * 25 / 3, (stop * 5 / 3) as i64)
}

/// User code from one stop to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    /// How long it ran, with the changes of mappings before it, in TSC ticks.
    pub ticks: u64,
    /// How many these were.
    pub changes: u64,
    /// Pages of code that it came to, and that nobody had executed yet.
    pub pages: u64,
}

/// A look at user code when it was interrupted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// Which address space.
    pub root: u64,
    /// When.
    pub tsc: u64,
    /// What the CPU's thread had run by then, in TSC ticks.
    pub spent: u64,
    /// How often user code had been entered by then.
    pub entries: u64,
    /// It was asked for.
    pub asked: bool,
}

/// The test on the way in, for one CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scout {
    /// The last look at user code, unless the kernel was found since.
    user: Look,
    /// When the last was, at whatever, and how often user code had been entered.
    last: (u64, u64),
}

impl Scout {
    /// The kernel was found running: what was seen of user code before tells nothing of the time since.
    pub fn kernel(&mut self) {
        self.user = Look::default();
    }

    /// User code is translated from now on; that is as good as a look.
    pub fn begin(&mut self, look: Look) {
        self.user = look;
        self.last = (look.tsc, look.entries);
    }

    /// Whether user code was entered seldom enough since the last look that another one soon may be worth its cost.
    pub fn seldom(&mut self, times: &Times, tsc: u64, entries: u64) -> bool {
        let before = std::mem::replace(&mut self.last, (tsc, entries));
        let entered = entries.saturating_sub(before.1) + 1;
        tsc.saturating_sub(before.0) / entered >= times.stretch / 2
    }

    /// Whether it pays to try, as far as this look and the one before can tell.
    pub fn promising(&mut self, times: &Times, look: Look) -> bool {
        let since = look.tsc.saturating_sub(self.user.tsc);
        let same = look.root == self.user.root && since <= times.apart.1;
        let least = if look.asked {
            times.look.0 / 2
        } else {
            u64::MAX
        };
        if same && since < times.apart.0.min(least) {
            return false;
        }
        let before = std::mem::replace(&mut self.user, look);
        let spent = look.spent.saturating_sub(before.spent);
        same && spent / (look.entries.saturating_sub(before.entries) + 1) >= times.stretch
    }
}

/// Looks at user code that are asked for between the guest's interrupts.
#[derive(Clone, Copy, Debug, Default)]
pub struct Looks {
    left: u32,
    /// When the first was asked for, if they go on whatever they find.
    since: Option<u64>,
}

impl Looks {
    /// Direct execution has paid until now, by long stretches or by what code it need not translate. Code that is translated
    /// for the first time looks like a long stretch, so looks at it are rarer.
    pub fn begin(&mut self, now: u64, computed: bool) {
        (self.left, self.since) = match computed {
            true => (16, Some(now)),
            false => (4, None),
        };
    }

    /// One is worth it, unless more are under way.
    pub fn one(&mut self) {
        if self.left == 0 {
            (self.left, self.since) = (1, None);
        }
    }

    /// True where they go on whatever they find.
    pub fn are_patient(&self) -> bool {
        self.since.is_some()
    }

    /// How long it is until the next, if there is any: the longer they have been in vain, the longer.
    pub fn next(&mut self, times: &Times, now: u64) -> Option<u64> {
        self.left = self.left.checked_sub(1)?;
        let (first, most) = times.look;
        let since = self.since.map_or(u64::MAX, |s| now.saturating_sub(s));
        Some((since / 4).clamp(first, most))
    }
}

/// The other test on the way in, for code that is executed for the first time: to translate it takes longer than to run it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Explorer {
    /// When its first block was come to.
    first: Look,
    /// The last.
    last: u64,
    /// What it would cost to translate them.
    cost: u64,
}

impl Explorer {
    /// User code came to a block that would have to be translated for so much. True where it pays to try: that was more often
    /// the case lately than it left its code.
    /// It takes `doubt` times as much as usual.
    pub fn promising(&mut self, times: &Times, look: Look, cost: u64, doubt: u64) -> bool {
        let (apart, enough) = times.unknown;
        if look.root != self.first.root || look.tsc.saturating_sub(self.last) > apart {
            *self = Explorer {
                first: look,
                ..Explorer::default()
            };
        }
        self.last = look.tsc;
        self.cost += cost;
        let entries = look.entries.saturating_sub(self.first.entries);
        let promising =
            self.cost >= enough.saturating_mul(doubt) && entries * times.stop as u64 <= self.cost;
        if promising {
            *self = Explorer::default();
        }
        promising
    }
}

/// The account of one address space.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    /// `None` while it is translated.
    credit: Option<i64>,
    /// What has been paid in since it was opened, stops and changes taken off.
    earned: i64,
    /// That was as much as an account can hold, at some time.
    paid: bool,
    /// The same, by stretches alone.
    ran: i64,
    computed: bool,
    /// It was tried before.
    tried: bool,
    /// How long it is translated the next time, and until when it is now.
    away: u64,
    until: u64,
}

impl Account {
    /// Of an address space that is translated.
    pub fn new(times: &Times) -> Self {
        Account {
            credit: None,
            earned: 0,
            paid: false,
            ran: 0,
            computed: false,
            tried: false,
            away: times.away.0,
            until: 0,
        }
    }

    /// True while it is executed directly.
    pub fn is_direct(&self) -> bool {
        self.credit.is_some()
    }

    /// What has been tried in vain before says nothing of now.
    pub fn forgive(&mut self) {
        self.until = 0;
    }

    /// Twice as much for each time that it was tried in vain.
    pub fn doubt(&self, times: &Times) -> u64 {
        self.away.checked_div(times.away.0).unwrap_or(1)
    }

    /// True where it may be opened.
    pub fn may_open(&self, now: u64) -> bool {
        now >= self.until && !self.is_direct()
    }

    /// Executes it directly from now on, unless that was tried in vain too lately.
    pub fn open(&mut self, times: &Times, now: u64) -> bool {
        if !self.may_open(now) {
            return false;
        }
        let (first, again) = times.advance;
        self.credit = Some(match (self.tried, self.computed) {
            (false, _) => first,
            (true, false) => again,
            (true, true) => times.advance_computed,
        });
        (self.earned, self.paid) = (0, false);
        (self.ran, self.computed) = (0, false);
        self.tried = true;
        true
    }

    /// A stretch of user code ended with a stop. False where the address space is translated from now on.
    pub fn stopped(&mut self, times: &Times, stretch: Stretch, now: u64) -> bool {
        let Some(credit) = self.credit else {
            return false;
        };
        let changes = stretch.changes * times.change;
        let ran = stretch.ticks.saturating_sub(changes).min(times.longest);
        let gain = (ran * GAIN.0 / GAIN.1) as i64 - changes as i64;
        let gain = gain.saturating_sub(times.stop);
        let pages = (stretch.pages * times.page) as i64;
        self.earned = self.earned.saturating_add(gain + pages);
        self.paid |= self.earned >= times.most.0;
        self.ran = self.ran.saturating_add(gain);
        self.computed |= self.ran >= times.most.0;
        let (most, most_pages) = times.most;
        let credit = credit.saturating_add(gain).min(credit.max(most));
        let credit = (credit + pages).min(credit.max(most_pages));
        self.credit = Some(credit);
        if credit < 0 {
            self.close(times, now);
        }
        credit >= 0
    }

    /// The stop led to a page that is translated, from which another way leads back.
    pub fn left(&mut self, times: &Times) {
        self.credit = self.credit.map(|credit| credit - times.stop);
    }

    /// It does not work here: what it has earned says nothing of the next time.
    pub fn give_up(&mut self, times: &Times, now: u64) {
        (self.paid, self.computed) = (false, false);
        self.close(times, now);
    }

    /// True where direct execution paid, until it was closed: what the program does has changed, and may change back soon.
    pub fn has_paid(&self) -> bool {
        self.paid
    }

    /// True where it paid by long stretches of user code.
    pub fn has_computed(&self) -> bool {
        self.computed
    }

    /// Has it translated: where it was tried in vain for a time, which doubles with each time.
    pub fn close(&mut self, times: &Times, now: u64) {
        self.credit = None;
        if self.paid {
            self.away = times.away.0;
            self.until = now;
            return;
        }
        self.until = now + self.away;
        self.away = (self.away * 2).min(times.away.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times() -> Times {
        Times::new(1_000_000_000, Prices::USUAL)
    }
    const MS: u64 = 1_000_000;

    fn ran(ticks: u64) -> Stretch {
        Stretch {
            ticks,
            ..Stretch::default()
        }
    }

    #[test]
    fn what_stops_cost_here_decides_what_pays() {
        for us in [1, 3, 15, 60] {
            let prices = Prices {
                stop: Duration::from_micros(us),
                ..Prices::USUAL
            };
            let times = Times::new(1_000_000_000, prices);
            let stop = us * 1_000;
            let earned = |ticks| {
                let mut account = Account::new(&times);
                assert!(account.open(&times, 0));
                account.stopped(&times, ran(ticks), 0);
                account.earned
            };
            assert!(earned(stop) < -9 * stop as i64 / 10, "a stop alone");
            assert!(earned(2 * stop) < 0);
            assert!(earned(4 * stop) > 0);
            assert!(times.stretch > 4 * stop);
        }
    }

    #[test]
    fn stops_that_have_become_dearer_do_not_pay() {
        const US: u64 = 1_000;
        let mut times = times();
        let mut account = Account::new(&times);
        assert!(account.open(&times, 0));
        let mut until_closed = |times: &Times| {
            let stops = (0..1_000).map(|_| account.stopped(times, ran(15 * US), 0));
            stops.take_while(|open| *open).count()
        };
        assert_eq!(
            until_closed(&times),
            1_000,
            "what was cheap looks like gain"
        );
        times.set_stop(1_000_000_000, Duration::from_micros(15));
        assert!(until_closed(&times) < 200);
    }

    #[test]
    fn what_does_not_work_is_not_tried_again_at_once() {
        let times = times();
        let mut account = Account::new(&times);
        assert!(account.open(&times, 0));
        account.stopped(&times, ran(4 * MS), 0);
        assert!(account.has_paid());
        account.give_up(&times, 0);
        assert!(!account.has_paid() && !account.may_open(times.away.0 - 1));
        assert!(account.may_open(times.away.0));
    }

    #[test]
    fn looks_become_rarer_and_end() {
        let times = times();
        let mut looks = Looks::default();
        assert_eq!(looks.next(&times, MS), None);
        looks.one();
        assert_eq!(looks.next(&times, 100 * MS), Some(MS));
        assert_eq!(looks.next(&times, 100 * MS), None);
        looks.begin(MS, false);
        assert_eq!(looks.next(&times, MS), Some(MS));
        assert!(!looks.are_patient());
        looks.begin(100 * MS, true);
        let mut now = 100 * MS;
        let mut after = Vec::new();
        for _ in 0..16 {
            looks.one();
            assert!(looks.are_patient());
            let look = looks.next(&times, now).unwrap();
            after.push(look);
            now += look;
        }
        assert_eq!(looks.next(&times, now), None);
        assert_eq!((after[0], after[15]), (MS * 2 / 5, MS));
        assert!(after.is_sorted());
    }

    #[test]
    fn what_was_mapped_in_a_storm_may_be_mapped_when_it_is_over() {
        let times = times();
        let refill = Stretch {
            ticks: MS * 6 / 5,
            changes: 800,
            pages: 0,
        };
        let storm = || ran(MS / 200);
        for (computed, open) in [(false, false), (true, true)] {
            let mut account = Account::new(&times);
            assert!(account.open(&times, 0));
            account.stopped(&times, ran(if computed { 4 * MS } else { 0 }), 0);
            assert_eq!(account.has_computed(), computed);
            while account.stopped(&times, storm(), 0) {}
            assert!(account.open(&times, account.until));
            assert_eq!(account.stopped(&times, refill, 0), open);
        }
    }

    #[test]
    fn the_first_look_after_direct_execution_may_open_it() {
        let times = times();
        let look = |tsc, asked| Look {
            root: 1,
            tsc,
            spent: tsc,
            asked,
            ..Look::default()
        };
        let mut scout = Scout::default();
        scout.begin(look(MS, false));
        assert!(!scout.promising(&times, look(MS + MS / 10, true)));
        assert!(!scout.promising(&times, look(MS + times.look.0, false)));
        assert!(scout.promising(&times, look(MS + times.look.0, true)));
    }

    #[test]
    fn long_stretches_are_promising_and_short_ones_are_not() {
        let times = times();
        for (entries, promising) in [(0, true), (50, true), (1000, false)] {
            let mut scout = Scout::default();
            let at = |n: u64, root| Look {
                root,
                tsc: MS * 100 + n * 4 * MS,
                spent: n * 4 * MS,
                entries: n * entries,
                ..Look::default()
            };
            assert!(
                !scout.promising(&times, at(0, 1)),
                "nothing to compare with"
            );
            assert_eq!(scout.promising(&times, at(1, 1)), promising);
            assert!(!scout.promising(&times, at(2, 2)), "another address space");
            assert!(!scout.promising(&times, at(12, 2)), "long ago");
        }
    }

    #[test]
    fn a_look_at_the_kernel_makes_what_was_seen_before_worthless() {
        let times = times();
        let mut scout = Scout::default();
        let look = |tsc| Look {
            root: 1,
            tsc,
            spent: tsc,
            entries: 0,
            ..Look::default()
        };
        scout.promising(&times, look(100 * MS));
        scout.kernel();
        assert!(!scout.promising(&times, look(104 * MS)));
        assert!(scout.promising(&times, look(108 * MS)));
    }

    #[test]
    fn what_the_host_did_meanwhile_does_not_count() {
        let times = times();
        let mut scout = Scout::default();
        let look = |n: u64, share| Look {
            root: 1,
            tsc: MS * 100 + n * 4 * MS,
            spent: n * 4 * MS / share,
            entries: n * 100,
            ..Look::default()
        };
        for (share, promising) in [(1, true), (4, false)] {
            scout.promising(&times, look(0, share));
            assert_eq!(scout.promising(&times, look(1, share)), promising);
        }
    }

    #[test]
    fn looks_that_follow_at_once_change_nothing() {
        let times = times();
        let mut scout = Scout::default();
        let look = |tsc, entries| Look {
            root: 1,
            tsc,
            spent: tsc,
            entries,
            ..Look::default()
        };
        scout.promising(&times, look(100 * MS, 0));
        assert!(!scout.promising(&times, look(100 * MS + MS / 2, 500)));
        assert!(!scout.promising(&times, look(104 * MS, 600)));
    }

    #[test]
    fn an_account_that_is_overdrawn_is_closed_for_longer_and_longer() {
        let times = times();
        let (mut account, mut now) = (Account::new(&times), 0);
        let mut lost = Vec::new();
        for _ in 0..4 {
            assert!(account.open(&times, now));
            let mut stops = 0;
            while account.stopped(&times, ran(1000), now) {
                stops += 1;
            }
            lost.push(stops);
            assert!(!account.open(&times, now + times.away.0 / 2));
            now = account.until;
        }
        assert!(
            lost[0] <= 350 && lost[1..].iter().all(|n| *n <= 230),
            "{lost:?}"
        );
        assert_eq!(account.away, times.away.0 * 16);
    }

    #[test]
    fn code_that_nobody_has_executed_is_promising_unless_it_is_left_often() {
        let times = times();
        let cost = times.unknown.1 / 6;
        for (entries, promising) in [(1, true), (100, false)] {
            let mut explorer = Explorer::default();
            let look = |n: u64, root| Look {
                root,
                tsc: n * MS / 10,
                spent: 0,
                entries: n * entries,
                ..Look::default()
            };
            let mut page = |n, root| explorer.promising(&times, look(n, root), cost, 1);
            assert!((1..6).all(|n| !page(n, 1)));
            assert_eq!(page(6, 1), promising);
            assert!(!page(7, 2), "another address space");
            assert!((1..6).all(|n| !page(200 + n * 100, 2)), "long ago");
        }
    }

    #[test]
    fn pages_that_need_not_be_translated_pay() {
        let times = times();
        let mut account = Account::new(&times);
        account.open(&times, 0);
        let first = Stretch {
            pages: 1,
            ..ran(3000)
        };
        let mut stops = (0..1000).take_while(|_| account.stopped(&times, first, 0));
        assert_eq!(stops.by_ref().count(), 1000);
    }

    #[test]
    fn mappings_are_paid_for() {
        let times = times();
        let mut account = Account::new(&times);
        account.open(&times, 0);
        let long = Stretch {
            ticks: 300_000,
            changes: 128,
            ..Stretch::default()
        };
        let stops = (0..1000).take_while(|_| account.stopped(&times, long, 0));
        assert!(stops.count() < 50, "all of it went into mappings");
    }

    #[test]
    fn visits_to_sensitive_pages_cost_twice() {
        let times = times();
        let last = |visits: bool| {
            let mut account = Account::new(&times);
            account.open(&times, 0);
            let stops = (0..1000).take_while(|_| {
                if visits {
                    account.left(&times);
                }
                account.stopped(&times, ran(0), 0)
            });
            stops.count()
        };
        assert!(
            last(true) * 2 <= last(false),
            "{} {}",
            last(true),
            last(false)
        );
    }

    #[test]
    fn an_account_that_pays_stays_open() {
        let times = times();
        let mut account = Account::new(&times);
        account.open(&times, 0);
        account.away *= 8;
        for _ in 0..1000 {
            assert!(account.stopped(&times, ran(50_000), 0));
        }
        assert!(account.is_direct());
        let stops = (0..1000).take_while(|_| account.stopped(&times, ran(1000), 0));
        assert!(stops.count() < 350, "what was earned long ago is forgotten");
        assert!(account.has_paid() && account.may_open(0));
        assert_eq!(
            account.away, times.away.0,
            "what was tried in vain is forgotten"
        );
    }
}
