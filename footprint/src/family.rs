//! A process and those that it started: a monitor may be several.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::time::Duration;

/// What /proc/PID/stat (proc_pid_stat(5)) says of a process.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    pid: u32,
    parent: u32,
    /// User and system time of its own, in clock ticks.
    ticks: u64,
    /// The same of children that are gone and were waited for.
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
            ticks: number(11)? + number(12)?,
            children_ticks: number(13)? + number(14)?,
        })
    }
}

/// A process and all its descendants that live, itself first.
///
/// # Errors
/// Where there is no such process.
pub fn family(pid: u32) -> io::Result<Vec<u32>> {
    Ok(stats(pid)?.into_iter().map(|s| s.pid).collect())
}

/// Processor time of those of the family that are gone, so far as they were waited for.
///
/// # Errors
/// Where there is no such process.
pub fn time_of_the_gone(pid: u32) -> io::Result<Duration> {
    Ok(time(stats(pid)?.iter().map(|s| s.children_ticks).sum()))
}

/// Processor time of the family, those that are gone included, to a tick of the host's clock.
///
/// # Errors
/// Where there is no such process.
pub fn time_of_all(pid: u32) -> io::Result<Duration> {
    let stats = stats(pid)?;
    let ticks = stats.iter().map(|s| s.ticks + s.children_ticks);
    Ok(time(ticks.sum()))
}

fn time(ticks: u64) -> Duration {
    let a_second = rustix::param::clock_ticks_per_second();
    Duration::from_secs_f64(ticks as f64 / a_second as f64)
}

fn stats(pid: u32) -> io::Result<Vec<Stat>> {
    let mut all: BTreeMap<u32, Stat> = BTreeMap::new();
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path().join("stat");
        // Processes end meanwhile.
        if let Some(stat) = fs::read_to_string(path).ok().and_then(|t| Stat::parse(&t)) {
            all.insert(stat.pid, stat);
        }
    }
    let first = all.remove(&pid);
    let mut found = vec![first.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?];
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
    use std::process::{Child, Command, Stdio};

    #[test]
    fn a_name_may_hold_anything() {
        let text = "7 (a) b (c) S 3 7 7 0 -1 4194304 1 2 0 0 11 12 130 14 20 0 1 0";
        let expected = Stat {
            pid: 7,
            parent: 3,
            ticks: 23,
            children_ticks: 144,
        };
        assert_eq!(Stat::parse(text), Some(expected));
        assert_eq!(Stat::parse("7 (a"), None);
    }

    /// A shell that ends when its input does.
    fn shell(script: &str) -> Child {
        let mut shell = Command::new("sh");
        let shell = shell.args(["-c", script]).stdin(Stdio::piped());
        shell.spawn().unwrap()
    }

    #[test]
    fn a_family_has_grandchildren_but_no_strangers() {
        let mut stranger = shell("read x");
        let mut parent = shell("exec 3<&0; (read x <&3) & wait");
        let grown = (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            family(parent.id()).unwrap().len() == 2
        });
        let found = family(parent.id()).unwrap();
        for child in [&mut stranger, &mut parent] {
            drop(child.stdin.take());
            child.wait().unwrap();
        }
        assert!(grown, "{found:?}");
        assert!(!found.contains(&stranger.id()));
    }

    #[test]
    fn children_count_while_they_run_and_afterwards() {
        let burn = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
        let mut child = shell(&format!("{burn}; read x"));
        let least = Duration::from_millis(20);
        let me = std::process::id();
        while time_of_all(child.id()).unwrap() < least {
            std::thread::yield_now();
        }
        assert!(family(me).unwrap().contains(&child.id()));
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(time_of_the_gone(me).unwrap() >= least);
        assert!(time_of_all(me).unwrap() >= least);
        assert!(time_of_all(child.id()).is_err());
    }
}
