//! How much of a processor a process got: on a busy host less than one, and its times are then longer than they should be.

use anyhow::{Context, Result};

/// Linux's USER_HZ, which is the same on every x86 kernel.
const TICKS_PER_SECOND: f64 = 100.0;
/// Places of utime, stime, cutime and cstime among the fields that follow the command's name in /proc/PID/stat.
const TIMES: std::ops::Range<usize> = 11..15;

/// Seconds of processor time of the process `pid` and of its children that have ended.
pub fn seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    parse(&text).with_context(|| format!("{path} has another form"))
}

fn parse(stat: &str) -> Option<f64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    let times = fields.get(TIMES)?.iter().map(|field| field.parse::<u64>());
    let ticks: u64 = times.sum::<Result<u64, _>>().ok()?;
    Some(ticks as f64 / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_times_are_added() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 100 0 0 0 100 20 3 1 20 0 1 0 5 6 7";
        assert_eq!(parse(stat), Some(1.24));
        assert_eq!(parse("7 (a) S 1"), None);
    }

    #[test]
    fn this_process_has_used_some() {
        let start = std::time::Instant::now();
        while start.elapsed().as_millis() < 100 {}
        assert!(seconds(std::process::id()).unwrap() > 0.0);
    }
}
