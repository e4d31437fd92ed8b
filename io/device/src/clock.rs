//! Time as devices see it.
//!
//! Chips never ask the host for the time: they are told it. What tells them is a [`Clock`], real in a machine and
//! moved by hand in a test.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Nanoseconds since the machine started; enough for 584 years.
pub type Nanos = u64;

/// Nanoseconds in a second.
pub const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// Ticks of an oscillator of `hz` in the first `elapsed` nanoseconds.
pub fn ticks(elapsed: Nanos, hz: u64) -> u64 {
    (u128::from(elapsed) * u128::from(hz) / u128::from(NANOS_PER_SECOND)) as u64
}

/// Nanoseconds after which an oscillator of `hz` (not 0) has made `count` ticks, rounded up, so that
/// `ticks(periods(n, hz), hz) >= n`.
pub fn periods(count: u64, hz: u64) -> Nanos {
    let nanos = (u128::from(count) * u128::from(NANOS_PER_SECOND)).div_ceil(hz.max(1).into());
    u64::try_from(nanos).unwrap_or(u64::MAX)
}

/// Where a machine's time comes from.
pub trait Clock: Send + Sync {
    /// Nanoseconds since the machine started. Never goes back.
    fn now(&self) -> Nanos;
    /// The wall clock, UTC, since 1970.
    fn wall(&self) -> Duration;
}

/// The host's clocks.
#[derive(Clone, Debug)]
pub struct HostClock {
    start: Instant,
}

impl HostClock {
    /// A clock that starts at 0 now.
    pub fn new() -> Self {
        HostClock {
            start: Instant::now(),
        }
    }
}

impl Default for HostClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for HostClock {
    fn now(&self) -> Nanos {
        self.start.elapsed().as_nanos() as u64
    }

    fn wall(&self) -> Duration {
        SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
    }
}

/// A clock that stands still until a test moves it.
#[derive(Debug, Default)]
pub struct FakeClock {
    now: AtomicU64,
    wall_at_zero: Duration,
}

impl FakeClock {
    /// A clock at 0, where the wall clock shows `wall_at_zero`.
    pub fn new(wall_at_zero: Duration) -> Self {
        FakeClock {
            now: AtomicU64::new(0),
            wall_at_zero,
        }
    }

    /// Moves time forward.
    pub fn advance(&self, by: Nanos) {
        self.now.fetch_add(by, Ordering::SeqCst);
    }
}

impl Clock for FakeClock {
    fn now(&self) -> Nanos {
        self.now.load(Ordering::SeqCst)
    }

    fn wall(&self) -> Duration {
        self.wall_at_zero + Duration::from_nanos(self.now())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_of_periods_lasts_until_its_last_tick() {
        for hz in [1, 3, 1_193_182, 3_579_545, 1_000_000_000] {
            for count in [0, 1, 2, 65_536, 1 << 32] {
                let nanos = periods(count, hz);
                assert_eq!(ticks(nanos, hz), count.max(ticks(nanos, hz)));
                assert!(ticks(nanos, hz) >= count);
                assert!(nanos == 0 || ticks(nanos - 1, hz) < count);
            }
        }
        assert_eq!(periods(u64::MAX, 1), u64::MAX);
        assert_eq!(ticks(u64::MAX, NANOS_PER_SECOND), u64::MAX);
    }

    #[test]
    fn a_fake_clock_moves_only_by_hand() {
        let clock = FakeClock::new(Duration::from_secs(100));
        assert_eq!((clock.now(), clock.wall()), (0, Duration::from_secs(100)));
        clock.advance(NANOS_PER_SECOND);
        assert_eq!(clock.wall(), Duration::from_secs(101));
    }

    #[test]
    fn the_host_clock_starts_at_zero_and_runs() {
        let clock = HostClock::new();
        let first = clock.now();
        while clock.now() == first {}
        assert!(clock.now() > first);
    }
}
