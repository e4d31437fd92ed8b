//! A process and those that it started: a monitor may be several.

use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

/// What /proc/PID/stat (proc_pid_stat(5)) says of a process.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    pid: u32,
    parent: u32,
    /// User and system time of children that are gone and were waited for, in clock ticks.
    children_ticks: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Stat> {
        // The name, in parentheses, may hold anything.
        let (pid, rest) = (text.split(' ').next()?, text.rsplit_once(") ")?.1);
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |n: usize| fields.get(n)?.parse::<u64>().ok();
        Some(Stat {
            pid: pid.parse().ok()?,
            parent: number(1)? as u32,
            children_ticks: number(13)? + number(14)?,
        })
    }
}

/// A process and all its descendants that live, itself first.
pub fn family(pid: u32) -> Result<Vec<u32>> {
    Ok(stats(pid)?.into_iter().map(|s| s.pid).collect())
}

/// Processor time of those of the family that are gone, so far as they were waited for.
pub fn time_of_the_gone(pid: u32) -> Result<Duration> {
    let ticks: u64 = stats(pid)?.iter().map(|s| s.children_ticks).sum();
    let a_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs_f64(ticks as f64 / a_second as f64))
}

fn stats(pid: u32) -> Result<Vec<Stat>> {
    let mut all: BTreeMap<u32, Stat> = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let path = entry?.path().join("stat");
        // Processes end meanwhile.
        if let Some(stat) = fs::read_to_string(path).ok().and_then(|t| Stat::parse(&t)) {
            all.insert(stat.pid, stat);
        }
    }
    let mut found: Vec<Stat> = all.remove(&pid).into_iter().collect();
    let mut next = 0;
    while next < found.len() {
        let parent = found[next].pid;
        let children: Vec<u32> = all
            .values()
            .filter(|s| s.parent == parent)
            .map(|s| s.pid)
            .collect();
        found.extend(children.iter().filter_map(|pid| all.remove(pid)));
        next += 1;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let text = "7 (a) b (c) S 3 7 7 0 -1 4194304 1 2 0 0 11 12 130 14 20 0 1 0";
        let (pid, parent, children_ticks) = (7, 3, 144);
        assert_eq!(
            Stat::parse(text),
            Some(Stat {
                pid,
                parent,
                children_ticks
            })
        );
        assert_eq!(Stat::parse("7 (a"), None);
    }

    #[test]
    fn a_family_has_grandchildren_but_no_strangers() {
        let mut stranger = std::process::Command::new("sleep")
            .arg("20")
            .spawn()
            .unwrap();
        let mut shell = std::process::Command::new("sh")
            .args(["-c", "sleep 20 & wait"])
            .spawn()
            .unwrap();
        let grown = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            family(shell.id()).unwrap().len() == 2
        });
        let found = family(shell.id()).unwrap();
        for pid in found.iter().chain([&stranger.id()]) {
            let pid = nix::unistd::Pid::from_raw(*pid as i32);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        }
        shell.wait().unwrap();
        stranger.wait().unwrap();
        assert!(grown, "{found:?}");
        assert!(!found.contains(&stranger.id()));
    }
}
