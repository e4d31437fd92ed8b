//! How much of a processor a process got: on a busy host less than one, and its times are then longer than they should be.

use anyhow::Result;
use doppel_footprint::family::{family, time_of_the_gone};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use std::time::{Duration, Instant};

/// A moment in the life of a process.
#[derive(Clone, Copy)]
pub struct Mark {
    at: Instant,
    used: Duration,
}

impl Mark {
    /// Now, by the processor time of the process `pid`, of all its threads, and of the processes that it started.
    pub fn now(pid: u32) -> Result<Mark> {
        let mut used = time_of_the_gone(pid)?;
        for pid in family(pid)? {
            // Whoever ends meanwhile is among the gone next time.
            used += time_of(pid).unwrap_or_default();
        }
        let at = Instant::now();
        Ok(Mark { at, used })
    }

    /// When a process said what it had used.
    pub fn told(at: Instant, used: Duration) -> Mark {
        Mark { at, used }
    }

    /// Processor time since the process began.
    pub fn used(&self) -> Duration {
        self.used
    }

    /// The share of a processor that the process had from `earlier` until now.
    pub fn share_since(&self, earlier: &Mark) -> f64 {
        let passed = self.at - earlier.at;
        self.used.saturating_sub(earlier.used).as_secs_f64() / passed.as_secs_f64()
    }
}

fn time_of(pid: u32) -> Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid as i32))?;
    Ok(clock.now()?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_works_has_a_share_and_who_sleeps_has_none() {
        let mut child = std::process::Command::new("sleep")
            .arg("10")
            .spawn()
            .unwrap();
        let marks = || [std::process::id(), child.id()].map(|pid| Mark::now(pid).unwrap());
        let before = marks();
        while before[0].at.elapsed().as_millis() < 200 {}
        let after = marks();
        assert!(after[0].share_since(&before[0]) > 0.02);
        assert!(after[1].share_since(&before[1]) < 0.02);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
