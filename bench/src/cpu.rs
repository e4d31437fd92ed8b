//! How much of a processor a process got: on a busy host less than one, and its times are then longer than they should be.

use anyhow::{Context, Result};
use nix::time::clock_getcpuclockid;
use nix::unistd::Pid;
use std::time::{Duration, Instant};

/// Linux's USER_HZ, which is the same on every x86 kernel.
const TICKS_PER_SECOND: u64 = 100;
/// Places of cutime and cstime among the fields that follow the command's name in /proc/PID/stat.
const TIMES: std::ops::Range<usize> = 13..15;

/// A moment in the life of a process.
#[derive(Clone, Copy)]
pub struct Mark {
    at: Instant,
    used: Duration,
}

impl Mark {
    /// Now, of the process `pid`.
    pub fn new(pid: u32) -> Result<Mark> {
        let used = own(pid)? + of_children(pid)?;
        let at = Instant::now();
        Ok(Mark { at, used })
    }

    /// The share of a processor that the process had from `earlier` until now.
    pub fn share_since(&self, earlier: &Mark) -> f64 {
        let passed = self.at - earlier.at;
        self.used.saturating_sub(earlier.used).as_secs_f64() / passed.as_secs_f64()
    }
}

/// Processor time of the process and all its threads, to the nanosecond.
fn own(pid: u32) -> Result<Duration> {
    let clock = clock_getcpuclockid(Pid::from_raw(pid as i32))?;
    Ok(clock.now()?.into())
}

/// Processor time of the children that it has waited for, to the tick.
fn of_children(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let ticks = ticks(&text).with_context(|| format!("{path} has another form"))?;
    Ok(Duration::from_millis(ticks * 1000 / TICKS_PER_SECOND))
}

fn ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let times = fields.get(TIMES)?.iter().map(|field| field.parse::<u64>());
    times.sum::<Result<u64, _>>().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_children_are_added() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 100 20 3 1 20 0 1 0 5 6 7";
        assert_eq!(ticks(stat), Some(4));
        assert_eq!(ticks("7 (a) S 1"), None);
    }

    #[test]
    fn who_works_has_a_share_and_who_sleeps_has_none() {
        let mut child = std::process::Command::new("sleep")
            .arg("10")
            .spawn()
            .unwrap();
        let marks = || [std::process::id(), child.id()].map(|pid| Mark::new(pid).unwrap());
        let before = marks();
        while before[0].at.elapsed().as_millis() < 200 {}
        let after = marks();
        assert!(after[0].share_since(&before[0]) > 0.02);
        assert!(after[1].share_since(&before[1]) < 0.02);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
