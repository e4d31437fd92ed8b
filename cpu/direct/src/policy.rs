//! When user code is left to the processor, and when not.
//!
//! Problem: direct execution runs at native speed, but each time that user code is left (a system call, a page fault, an interrupt) costs some
//! microseconds more than under translation. Which is cheaper depends on how long user code runs in between, and only trying tells.
//! Idea: two tests. *In*: two interrupts in a row find user code running in the same address space, none finds the kernel between them, and the kernel was
//! entered so rarely meanwhile that a stretch of user code was long ([`Times::stretch`]) on average. *Out*: an address space has an account. Each stretch
//! pays in a part of its length (up to a bound, and without what was a wait for the host's processor), each stop and each change of a mapping takes out its price; when the account is overdrawn, the address space is translated again, and for
//! twice as long as the last time before it is tried once more.
//! Invariant: what is lost to trying is at most the overdraft in the time until the next try, whatever the guest does.
//! Cost: one reading of the TSC per stop; one of processor time per long stretch, and per interrupt that finds translated user code.

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
    /// The account of an address space that is tried.
    pub advance: i64,
    /// A stretch from which on it is asked what of it was a wait for the host's processor.
    pub long: u64,
    /// How much of a stretch counts.
    pub longest: u64,
    /// What an account holds at most.
    pub most: i64,
    /// The first time away, and the longest.
    pub away: (u64, u64),
    /// Two looks at user code count as one stretch of looks if no further apart.
    pub apart: (u64, u64),
}

impl Times {
    /// For a TSC of this frequency.
    pub fn new(tsc_hz: u64) -> Self {
        let us = (tsc_hz / 1_000_000).max(1);
        Times {
            stretch: 25 * us,
            stop: 7 * us as i64,
            change: us + us / 2,
            advance: 1500 * us as i64,
            long: 60 * us,
            longest: 4000 * us,
            most: 4000 * us as i64,
            away: (8_000 * us, 1_000_000 * us),
            apart: (1_500 * us, 20_000 * us),
        }
    }

    /// As if direct execution cost nothing.
    pub fn free() -> Self {
        Times {
            stretch: 0,
            stop: 0,
            change: 0,
            advance: 1,
            long: u64::MAX,
            longest: 1,
            most: 1,
            away: (0, 0),
            apart: (0, u64::MAX),
        }
    }
}

/// User code from one stop to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stretch {
    /// How long it ran, with the changes of mappings before it, in TSC ticks.
    pub ticks: u64,
    /// How many these were.
    pub changes: u64,
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
}

/// The test on the way in, for one CPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Scout(Look);

impl Scout {
    /// The kernel was found running: what was seen of user code before tells nothing of the time since.
    pub fn kernel(&mut self) {
        self.0 = Look::default();
    }

    /// Whether it pays to try, as far as this look and the one before can tell.
    pub fn promising(&mut self, times: &Times, look: Look) -> bool {
        let since = look.tsc.saturating_sub(self.0.tsc);
        let same = look.root == self.0.root && since <= times.apart.1;
        if same && since < times.apart.0 {
            return false;
        }
        let before = std::mem::replace(&mut self.0, look);
        let spent = look.spent.saturating_sub(before.spent);
        same && spent / (look.entries.saturating_sub(before.entries) + 1) >= times.stretch
    }
}

/// The account of one address space.
#[derive(Clone, Copy, Debug)]
pub struct Account {
    /// `None` while it is translated.
    credit: Option<i64>,
    /// How long it is translated the next time, and until when it is now.
    away: u64,
    until: u64,
}

impl Account {
    /// Of an address space that is translated.
    pub fn new(times: &Times) -> Self {
        Account {
            credit: None,
            away: times.away.0,
            until: 0,
        }
    }

    /// True while it is executed directly.
    pub fn is_direct(&self) -> bool {
        self.credit.is_some()
    }

    /// Executes it directly from now on, unless that was tried in vain too lately.
    pub fn open(&mut self, times: &Times, now: u64) -> bool {
        if now < self.until || self.is_direct() {
            return false;
        }
        self.credit = Some(times.advance);
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
        let credit = credit
            .saturating_add(gain)
            .saturating_sub(times.stop)
            .min(times.most);
        self.credit = Some(credit);
        if credit >= times.most {
            self.away = times.away.0;
        }
        if credit < 0 {
            self.close(times, now);
        }
        credit >= 0
    }

    /// Has it translated for a time, which doubles with each time.
    pub fn close(&mut self, times: &Times, now: u64) {
        self.credit = None;
        self.until = now + self.away;
        self.away = (self.away * 2).min(times.away.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times() -> Times {
        Times::new(1_000_000_000)
    }
    const MS: u64 = 1_000_000;

    fn ran(ticks: u64) -> Stretch {
        Stretch { ticks, changes: 0 }
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
        };
        scout.promising(&times, look(100 * MS, 0));
        assert!(!scout.promising(&times, look(101 * MS, 500)));
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
        assert!(lost.iter().all(|n| *n <= 250), "{lost:?}");
        assert_eq!(account.away, times.away.0 * 16);
    }

    #[test]
    fn mappings_are_paid_for() {
        let times = times();
        let mut account = Account::new(&times);
        account.open(&times, 0);
        let long = Stretch {
            ticks: 300_000,
            changes: 128,
        };
        let stops = (0..1000).take_while(|_| account.stopped(&times, long, 0));
        assert!(stops.count() < 50, "all of it went into mappings");
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
        assert_eq!(
            account.away, times.away.0,
            "what was tried in vain is forgotten"
        );
        assert!(account.is_direct());
    }
}
