//! How much of the host's memory a monitor takes.

use anyhow::{Context, Result};
use doppel_bench::family::family;
use serde::Serialize;

/// Doppel's guest RAM is a memfd of this name.
const GUEST_RAM: &str = "doppel-guest-ram";

/// Kibibytes of a process, by what /proc/PID/smaps says (proportional set size: a page that is mapped twice counts once).
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Footprint {
    /// Guest RAM that was touched.
    pub guest: u64,
    /// Everything else: the monitor's own.
    pub monitor: u64,
}

/// Of the process `pid`, whose guest has `mebibytes` of RAM, and of those that it started.
pub fn footprint(pid: u32, mebibytes: u64) -> Result<Footprint> {
    let mut sum = Footprint::default();
    for member in family(pid)? {
        let path = format!("/proc/{member}/smaps");
        match std::fs::read_to_string(&path) {
            Ok(text) => sum.add(parse(&text, mebibytes * 1024)),
            // It ended meanwhile.
            Err(_) if member != pid => {}
            Err(e) => return Err(e).with_context(|| format!("reading {path}")),
        }
    }
    Ok(sum)
}

impl Footprint {
    fn add(&mut self, other: Footprint) {
        self.guest += other.guest;
        self.monitor += other.monitor;
    }
}

fn parse(smaps: &str, ram: u64) -> Footprint {
    let mut footprint = Footprint::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["Size:", size, "kB"] => is_guest |= number(size) >= ram,
            ["Pss:", size, "kB"] if is_guest => footprint.guest += number(size),
            ["Pss:", size, "kB"] => footprint.monitor += number(size),
            [range, ..] if !range.ends_with(':') => is_guest = line.contains(GUEST_RAM),
            _ => {}
        }
    }
    footprint
}

fn number(word: &str) -> u64 {
    word.parse().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_ram_is_told_from_the_rest_by_its_name_or_size() {
        let smaps = "\
7f00-7f01 rw-s 00000000 00:01 1 /memfd:doppel-guest-ram (deleted)
Size:  100 kB
Pss:  10 kB
7f02-7f03 rw-p 00000000 00:00 0
Size:  2048 kB
Pss:  20 kB
Pss_Dirty:  20 kB
7f04-7f05 r-xp 00000000 00:00 0 [heap]
Size:  50 kB
Pss:  3 kB
";
        let footprint = parse(smaps, 2048);
        assert_eq!((footprint.guest, footprint.monitor), (30, 3));
    }
}
