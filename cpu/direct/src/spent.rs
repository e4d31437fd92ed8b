//! Processor time: what a stretch of user code really ran, on a host that may have had other things to do meanwhile.
//!
//! Problem: the time from a child's start to its stop is cheap to read, but on a busy host much of it may have been others'. A program that is stopped every few microseconds
//! then looks like one that computes for milliseconds.
//! Idea: the host's kernel knows what a process has run. It is asked at long stretches alone, which are few; what short ones since the last question took is taken off.
//! Cost: a system call for each long stretch.

use nix::time::ClockId;
use std::time::Duration;

/// What a child has run.
#[derive(Debug)]
pub struct Spent {
    clock: ClockId,
    /// When it was last asked.
    last: Duration,
    /// What short stretches have taken since, in TSC ticks.
    short: u64,
}

impl Spent {
    /// Of the process `pid`, from now on.
    pub fn of(pid: u32) -> Self {
        let clock = clock_of(pid);
        Spent {
            clock,
            last: now(clock),
            short: 0,
        }
    }

    /// How much of a stretch (in ticks of a TSC of `hz`) the child ran, if it was one of `long` ticks; else all of it.
    pub fn of_stretch(&mut self, stretch: u64, long: u64, hz: u64) -> u64 {
        if stretch < long {
            self.short += stretch;
            return stretch;
        }
        let now = now(self.clock);
        let since = ticks(now.saturating_sub(self.last), hz);
        self.last = now;
        let short = std::mem::take(&mut self.short);
        stretch.min(since.saturating_sub(short))
    }
}

/// Linux's clock of a process's processor time, from its number.
fn clock_of(pid: u32) -> ClockId {
    const CPUCLOCK_SCHED: i32 = 2;
    ClockId::from_raw(!(pid as i32) << 3 | CPUCLOCK_SCHED)
}

/// What the calling thread and a process have run together.
pub fn together(pid: u32) -> Duration {
    now(ClockId::CLOCK_THREAD_CPUTIME_ID) + now(clock_of(pid))
}

/// What the calling thread has run, in ticks of a TSC of `hz`.
pub fn of_this_thread(hz: u64) -> u64 {
    ticks(now(ClockId::CLOCK_THREAD_CPUTIME_ID), hz)
}

/// Nothing where the kernel does not tell.
fn now(clock: ClockId) -> Duration {
    clock.now().map(Duration::from).unwrap_or_default()
}

fn ticks(time: Duration, hz: u64) -> u64 {
    (time.as_nanos() * u128::from(hz) / 1_000_000_000) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};
    use std::thread::sleep;

    /// A TSC of nanoseconds.
    const HZ: u64 = 1_000_000_000;
    const MS: u64 = 1_000_000;

    /// A process that ends with its owner.
    struct Other(Child);

    impl Other {
        fn that_runs(script: &str) -> Other {
            Other(Command::new("sh").args(["-c", script]).spawn().unwrap())
        }
    }

    impl Drop for Other {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn sleep_is_no_time_spent_and_work_is() {
        let sleeper = Other::that_runs("exec sleep 60");
        // It has to become what it is first.
        sleep(Duration::from_millis(50));
        let mut spent = Spent::of(sleeper.0.id());
        sleep(Duration::from_millis(50));
        assert!(spent.of_stretch(50 * MS, MS, HZ) < 40 * MS);

        let worker = Other::that_runs("while :; do :; done");
        let mut spent = Spent::of(worker.0.id());
        let mut sum = 0;
        // On a busy host it takes as long as it takes.
        for _ in 0..1000 {
            sleep(Duration::from_millis(10));
            sum += spent.of_stretch(1000 * MS, MS, HZ);
            if sum > 30 * MS {
                return;
            }
        }
        panic!("{sum} ns in ten seconds");
    }

    #[test]
    fn a_thread_that_sleeps_spends_no_time() {
        let before = of_this_thread(HZ);
        sleep(Duration::from_millis(50));
        assert!(of_this_thread(HZ) - before < 20 * MS);
    }

    #[test]
    fn short_stretches_count_as_they_are_and_are_taken_off_the_next_long_one() {
        let sleeper = Other::that_runs("exec sleep 60");
        let mut spent = Spent::of(sleeper.0.id());
        assert_eq!(spent.of_stretch(10, 100, HZ), 10);
        assert_eq!(spent.of_stretch(99 * MS, 100 * MS, HZ), 99 * MS);
        assert_eq!(spent.of_stretch(200 * MS, 100 * MS, HZ), 0);
    }
}
