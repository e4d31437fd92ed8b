//! What a process and its children take of the host: processor time, and memory by kind of mapping (proc(5), smaps).

use anyhow::{Context, Result};
use std::fmt;
use std::fs;

/// Name of guest RAM that several processes map.
const RAM: &str = "doppel-guest-ram";
/// Name of the memory of translated code.
const CODE: &str = "doppel-code";
/// Jiffies in a second of /proc/PID/stat: USER_HZ, which is 100 on x86-64.
const USER_HZ: f64 = 100.0;

/// KiB that are resident, by what they are; a page that is mapped twice counts once (proportional set size).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// The guest's memory: a mapping at least as large.
    pub guest: u64,
    /// Translated code, which is mapped to be written and to be run, and what it jumps through.
    pub code: u64,
    /// Pages of program and libraries, which all processes share and the host can drop.
    pub program: u64,
    /// The main thread's stack and the heap of malloc's first arena.
    pub heap: u64,
    /// All other anonymous memory: other arenas and stacks, tables.
    pub other: u64,
}

impl Footprint {
    /// Of the process `pid`, whose guest has `ram` KiB, with its children.
    pub fn of(pid: u32, ram: u64) -> Result<Footprint> {
        let mut sum = Footprint::default();
        for (pid, _) in family(pid)? {
            // A child may have ended meanwhile.
            if let Ok(smaps) = fs::read_to_string(format!("/proc/{pid}/smaps")) {
                sum.add(&Footprint::parse(&smaps, ram));
            }
        }
        Ok(sum)
    }

    fn add(&mut self, other: &Footprint) {
        for (sum, n) in [
            (&mut self.guest, other.guest),
            (&mut self.code, other.code),
            (&mut self.program, other.program),
            (&mut self.heap, other.heap),
            (&mut self.other, other.other),
        ] {
            *sum += n;
        }
    }

    /// What the monitor takes beyond the guest and its translations.
    pub fn monitor(&self) -> u64 {
        self.program + self.heap + self.other
    }

    fn parse(smaps: &str, ram: u64) -> Footprint {
        let mut footprint = Footprint::default();
        let mut mapping = Mapping::default();
        for line in smaps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["Size:", size, "kB"] => mapping.size = number(size),
                ["Pss:", size, "kB"] => *mapping.place(&mut footprint, ram) += number(size),
                [range, _, _, _, _, ref name @ ..] if !range.ends_with(':') => {
                    mapping = mapping.next(name.join(" "));
                }
                _ => {}
            }
        }
        footprint
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |kib: u64| kib as f64 / 1024.0;
        write!(
            f,
            "guest {:.1} MiB, code {:.1}, program {:.1}, heap and stack {:.1}, other {:.1}",
            mib(self.guest),
            mib(self.code),
            mib(self.program),
            mib(self.heap),
            mib(self.other)
        )
    }
}

#[derive(Default)]
struct Mapping {
    size: u64,
    name: String,
    /// Right behind translated code: what that jumps through.
    behind_code: bool,
}

impl Mapping {
    fn next(&self, name: String) -> Mapping {
        Mapping {
            size: 0,
            behind_code: name.is_empty() && self.name.contains(CODE),
            name,
        }
    }

    fn place<'a>(&self, footprint: &'a mut Footprint, ram: u64) -> &'a mut u64 {
        match self.name.as_str() {
            _ if self.behind_code => &mut footprint.code,
            name if self.size >= ram || name.contains(RAM) => &mut footprint.guest,
            "[heap]" | "[stack]" => &mut footprint.heap,
            name if name.contains(CODE) => &mut footprint.code,
            name if name.starts_with('/') && !name.contains("memfd") => &mut footprint.program,
            "[vdso]" => &mut footprint.program,
            _ => &mut footprint.other,
        }
    }
}

fn number(word: &str) -> u64 {
    word.parse().unwrap_or_default()
}

/// Seconds of processor time that a process has had, with its children, those that have ended included.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let ticks: u64 = family(pid)?.iter().map(|(_, ticks)| ticks).sum();
    Ok(ticks as f64 / USER_HZ)
}

/// A process and all below it: number, and ticks that it and its children that were waited for have had.
fn family(pid: u32) -> Result<Vec<(u32, u64)>> {
    let own = fs::read_to_string(format!("/proc/{pid}/stat"));
    let own = own.with_context(|| format!("process {pid} is not there"))?;
    let mut family = vec![(pid, ticks(&own))];
    let mut others = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let pid = entry.file_name().to_string_lossy().parse::<u32>();
        let stat = fs::read_to_string(entry.path().join("stat"));
        if let (Ok(pid), Ok(stat)) = (pid, stat) {
            others.push((pid, parent(&stat), ticks(&stat)));
        }
    }
    let mut at = 0;
    while let Some((above, _)) = family.get(at).copied() {
        let children = others.iter().filter(|(_, parent, _)| *parent == above);
        family.extend(children.map(|(pid, _, ticks)| (*pid, *ticks)));
        at += 1;
    }
    Ok(family)
}

/// Fields of /proc/PID/stat behind the name, which may have anything in it but ends at the last parenthesis.
fn fields(stat: &str) -> impl Iterator<Item = u64> {
    let behind = stat.rsplit(')').next().unwrap_or_default();
    behind.split_whitespace().map(number)
}

fn parent(stat: &str) -> u32 {
    fields(stat).nth(1).unwrap_or_default() as u32
}

fn ticks(stat: &str) -> u64 {
    fields(stat).skip(11).take(4).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_told_apart() {
        let smaps = "\
7f00-7f01 rw-p 00000000 00:00 0
Size:  1024 kB
Pss:  100 kB
7f02-7f03 r-xs 00000000 00:01 17 /memfd:doppel-code (deleted)
Size:  64 kB
Pss:  20 kB
Pss_Dirty:  19 kB
7f03-7f04 rw-p 00000000 00:00 0
Size:  16 kB
Pss:  2 kB
7f04-7f05 r-xp 00000000 fe:00 17   /usr/bin/doppel
Size:  50 kB
Pss:  3 kB
7f06-7f07 rw-p 00000000 00:00 0 [heap]
Size:  50 kB
Pss:  4 kB
7f08-7f09 rw-p 00000000 00:00 0
Size:  50 kB
Pss:  5 kB
VmFlags: rd wr
";
        let footprint = Footprint::parse(smaps, 1024);
        let expected = Footprint {
            guest: 100,
            code: 22,
            program: 3,
            heap: 4,
            other: 5,
        };
        assert_eq!(footprint, expected);
        assert_eq!(footprint.monitor(), 12);
    }

    #[test]
    fn children_count_while_they_run_and_afterwards() {
        let burn = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";
        let mut child = std::process::Command::new("sh")
            .args(["-c", &format!("{burn}; read x")])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let me = std::process::id();
        while cpu_seconds(child.id()).unwrap() < 0.02 {
            std::thread::yield_now();
        }
        assert!(
            family(me)
                .unwrap()
                .iter()
                .any(|(pid, _)| *pid == child.id())
        );
        drop(child.stdin.take());
        child.wait().unwrap();
        assert!(cpu_seconds(me).unwrap() >= 0.02);
        assert!(cpu_seconds(child.id()).is_err());
    }

    #[test]
    fn this_process_has_had_some_processor_time() {
        let mut x = 1u64;
        while cpu_seconds(std::process::id()).unwrap() < 0.02 {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
    }
}
