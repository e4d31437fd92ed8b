//! What a process takes of the host: processor time, and memory by kind of mapping (proc(5), smaps).

use anyhow::{Context, Result};
use std::fmt;
use std::fs;

/// Name of the memory of translated code.
const CODE: &str = "doppel-code";
/// Jiffies in a second of /proc/PID/stat: USER_HZ, which is 100 on x86-64.
const USER_HZ: f64 = 100.0;

/// KiB that are resident, by what they are; a page that is mapped twice counts once (proportional set size).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// The guest's memory: a mapping at least as large.
    pub guest: u64,
    /// Translated code, which is mapped to be written and to be run.
    pub code: u64,
    /// Pages of program and libraries, which all processes share and the host can drop.
    pub program: u64,
    /// The main thread's stack and the heap of malloc's first arena.
    pub heap: u64,
    /// All other anonymous memory: other arenas and stacks, tables.
    pub other: u64,
}

impl Footprint {
    /// Of the process `pid`, whose guest has `ram` KiB.
    pub fn of(pid: u32, ram: u64) -> Result<Footprint> {
        let path = format!("/proc/{pid}/smaps");
        Ok(Footprint::parse(
            &fs::read_to_string(&path).context(path)?,
            ram,
        ))
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
                    mapping = Mapping {
                        size: 0,
                        name: name.join(" "),
                    };
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
}

impl Mapping {
    fn place<'a>(&self, footprint: &'a mut Footprint, ram: u64) -> &'a mut u64 {
        match self.name.as_str() {
            _ if self.size >= ram => &mut footprint.guest,
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

/// Seconds of processor time that a process has had.
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).context(path)?;
    // The name may have anything in it but ends at the last parenthesis.
    let fields = text.rsplit(')').next().unwrap_or_default();
    let mut numbers = fields.split_whitespace().skip(11).map(number);
    let (user, system) = (numbers.next(), numbers.next());
    Ok((user.unwrap_or_default() + system.unwrap_or_default()) as f64 / USER_HZ)
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
            code: 20,
            program: 3,
            heap: 4,
            other: 5,
        };
        assert_eq!(footprint, expected);
        assert_eq!(footprint.monitor(), 12);
    }

    #[test]
    fn this_process_has_had_some_processor_time() {
        let mut x = 1u64;
        while cpu_seconds(std::process::id()).unwrap() < 0.02 {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
    }
}
