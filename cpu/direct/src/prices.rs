//! What a stop costs on this host.
//!
//! Problem: whether it pays to execute user code directly depends on what a stop costs, and that is 3 µs on one host and 15 on another: what the host's kernel does
//! between two processes differs with the processor and what it is mitigated against.
//! Idea: a child is stopped a few times before the guest starts, by fetches from where nothing is mapped, for which it needs no code.
//! The least counts, since the host is at work for others now and then.
//! A host does not stay as it was: stops take several times as long while somebody looks on (perf), or while other programs take the caches. With the old price each of them would look like
//! gain, and an address space that does nothing but stop would never be translated. So what a stop takes is measured again, every so many stops and each second, in whatever child runs then
//! and in processor time, for on a busy host a turn may have to wait ([`Again`]).
//! Cost: some 20 stops with a change of a mapping, and as many without; they are made while the guest's kernel is loaded. Later one stop of 256 (none of them where a program hardly stops).

use std::time::{Duration, Instant};

use crate::pin::Pin;
use crate::space::END_OF_USER;
use crate::spent;
use crate::{Change, Child, DirectError, KickFlag, Stop, UserState, Zygote};

/// How a stop is timed: the mean of so many at a time, of which the least of so many counts.
struct Rounds {
    means: u32,
    stops: u32,
}

/// By the clock, whose steps are nanoseconds.
const AT_FIRST: Rounds = Rounds {
    means: 20,
    stops: 1,
};
/// In processor time, of which the host's kernel keeps an account at some cost.
const AGAIN: Rounds = Rounds { means: 4, stops: 4 };
/// After so many stops, or so long.
const MOST_STOPS: u32 = 4096;
const MOST_TIME: Duration = Duration::from_secs(1);
const PAGE: u64 = 4096;

/// What the policy reckons with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prices {
    /// From user code to the monitor and back.
    pub stop: Duration,
    /// The change of a mapping on the way.
    pub change: Duration,
}

impl Prices {
    /// On the hosts by which the policy was made.
    pub const USUAL: Prices = Prices {
        stop: Duration::from_nanos(3_000),
        change: Duration::from_nanos(1_500),
    };
    const LEAST: Prices = Prices {
        stop: Duration::from_nanos(1_000),
        change: Duration::from_nanos(500),
    };
    /// A price that is no obstacle to trying at all.
    const MOST: Prices = Prices {
        stop: Duration::from_micros(100),
        change: Duration::from_micros(100),
    };

    /// Of this host.
    pub fn measure(zygote: &Zygote) -> Result<Self, DirectError> {
        // A child on another processor would have to be woken there, which takes longer.
        let mut pin = Pin::default();
        pin.here();
        let prices = Self::measure_here(zygote);
        pin.release();
        prices
    }

    fn measure_here(zygote: &Zygote) -> Result<Self, DirectError> {
        let mut child = zygote.spawn()?;
        let map = Change::Map {
            at: child.reserved().end,
            offset: 0,
            len: PAGE,
            write: false,
            execute: false,
            populate: false,
        };
        let (kick, start) = (KickFlag::new(), Instant::now());
        let mut least = |changes: &[Change]| {
            least(&mut child, changes, &kick, &AT_FIRST, |_| start.elapsed())
                .ok_or(DirectError::Gone)
        };
        let stop = least(&[])?;
        let changed = least(&[map])?;
        let change = changed.saturating_sub(stop);
        Ok(Prices {
            stop: stop.clamp(Self::LEAST.stop, Self::MOST.stop),
            change: change.clamp(Self::LEAST.change, Self::MOST.change),
        })
    }
}

/// When to measure again what a stop takes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Again {
    stops: u32,
    /// The TSC at the last time.
    last: u64,
}

impl Again {
    /// One more stop, at this time of a TSC of `hz`. True where it is time.
    pub fn is_due(&mut self, now: u64, hz: u64) -> bool {
        self.stops += 1;
        let long = MOST_TIME.as_secs() * hz;
        let due = self.stops >= MOST_STOPS || now.saturating_sub(self.last) >= long;
        if due {
            (self.stops, self.last) = (0, now);
        }
        due
    }
}

/// What a stop of this child takes now, in processor time; `None` where the child is kicked meanwhile, or gone. Its registers have to be loaded anew afterwards, as for each run.
pub fn of_stop(child: &mut Child, kick: &KickFlag) -> Option<Duration> {
    let least = least(child, &[], kick, &AGAIN, |child| {
        spent::together(child.pid())
    })?;
    Some(least.clamp(Prices::LEAST.stop, Prices::MOST.stop))
}

/// The least time from entering a child to its stop, with these changes on the way; `None` where it stops for anything but the fetch from where nothing can be mapped.
fn least(
    child: &mut Child,
    changes: &[Change],
    kick: &KickFlag,
    rounds: &Rounds,
    now: impl Fn(&Child) -> Duration,
) -> Option<Duration> {
    let mut user = UserState::new(END_OF_USER);
    let mut least = Duration::MAX;
    for _ in 0..rounds.means {
        let before = now(child);
        for _ in 0..rounds.stops {
            user.rip = END_OF_USER;
            let stop = child.run(&mut user, changes, kick);
            let Ok(Stop::Trap { .. }) = stop else {
                return None;
            };
        }
        let spent = now(child).saturating_sub(before);
        least = least.min(spent / rounds.stops);
    }
    Some(least)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::thread::sched_getaffinity;

    #[test]
    fn this_host_has_prices() {
        let ram = std::fs::File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&ram, PAGE).unwrap();
        let zygote = match Zygote::new(&ram, PAGE) {
            Ok(zygote) => zygote,
            Err(e) => return eprintln!("SKIPPED: no direct execution here: {e}"),
        };
        let affinity = sched_getaffinity(None).unwrap();
        let prices = Prices::measure(&zygote).unwrap();
        assert!(prices.stop > Prices::LEAST.stop, "{prices:?}");
        assert!(prices.change > Prices::LEAST.change / 2, "{prices:?}");
        assert_eq!(sched_getaffinity(None).unwrap(), affinity);
        let mut child = zygote.spawn().unwrap();
        let again = of_stop(&mut child, &KickFlag::new()).unwrap();
        assert!(again > Prices::LEAST.stop, "{again:?}");
        let kicked = KickFlag::new();
        kicked.kick();
        assert_eq!(of_stop(&mut child, &kicked), None);
        assert!(kicked.is_set(), "somebody else is to see it");
    }

    #[test]
    fn stops_and_time_make_another_look_due() {
        const HZ: u64 = 1_000_000;
        let mut again = Again::default();
        let stops = 1..=2 * u64::from(MOST_STOPS) + 1;
        let due: Vec<_> = stops.filter(|n| again.is_due(HZ / 2 + n, HZ)).collect();
        assert_eq!(due, [4096, 8192]);
        assert!(!again.is_due(HZ, HZ) && again.is_due(2 * HZ, HZ));
        assert!(!again.is_due(2 * HZ + 1, HZ));
    }
}
