//! What the monitor takes of the host's memory, by kind of mapping (proc(5), smaps).

use std::io;

use serde::Serialize;

/// Bytes that are resident in the monitor's own process; what several processes map counts in parts (proportional set size).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Guest RAM.
    pub guest_bytes: u64,
    /// Translated code, which is mapped to be written and to be run, and what it jumps through.
    pub code_bytes: u64,
    /// Records of translations, as the engines count them.
    pub record_bytes: u64,
    /// Pages of program and libraries, which all processes share and the host can drop.
    pub program_bytes: u64,
    /// Everything else: heap, stacks, buffers.
    pub other_bytes: u64,
    /// The monitor beyond guest and translations: `program_bytes` and `other_bytes`.
    pub monitor_bytes: u64,
}

/// Name of guest RAM that several processes map.
const RAM: &str = "doppel-guest-ram";
/// Name of the memory of translated code.
const CODE: &str = "doppel-code";

impl Footprint {
    /// Of this process, whose guest has `ram` bytes.
    pub(crate) fn own(ram: u64) -> io::Result<Footprint> {
        Ok(Footprint::parse(
            &std::fs::read_to_string("/proc/self/smaps")?,
            ram,
        ))
    }

    /// Tells the records, which lie among all else, apart from it.
    pub(crate) fn with_records(self, bytes: u64) -> Footprint {
        let other_bytes = self.other_bytes.saturating_sub(bytes);
        Footprint {
            record_bytes: bytes,
            other_bytes,
            monitor_bytes: self.program_bytes + other_bytes,
            ..self
        }
    }

    fn parse(smaps: &str, ram: u64) -> Footprint {
        let mut footprint = Footprint::default();
        let (mut name, mut size, mut is_code) = (String::new(), 0, false);
        for line in smaps.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["Size:", kib, "kB"] => size = bytes(kib),
                ["Pss:", kib, "kB"] => {
                    *footprint.place(&name, size >= ram, is_code) += bytes(kib);
                }
                [range, _, _, _, _, ref rest @ ..] if !range.ends_with(':') => {
                    // What code jumps through lies right behind it and has no name.
                    let is_behind = rest.is_empty() && name.contains(CODE);
                    name = rest.join(" ");
                    is_code = is_behind || name.contains(CODE);
                }
                _ => {}
            }
        }
        footprint.with_records(0)
    }

    fn place(&mut self, name: &str, as_large_as_ram: bool, is_code: bool) -> &mut u64 {
        match name {
            _ if is_code => &mut self.code_bytes,
            _ if as_large_as_ram || name.contains(RAM) => &mut self.guest_bytes,
            _ if name.starts_with('/') && !name.contains("memfd") => &mut self.program_bytes,
            "[vdso]" => &mut self.program_bytes,
            _ => &mut self.other_bytes,
        }
    }
}

fn bytes(kib: &str) -> u64 {
    kib.parse::<u64>().unwrap_or_default() << 10
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
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
7f04-7f05 rw-p 00000000 00:00 0
Size:  16 kB
Pss:  7 kB
7f06-7f07 r-xp 00000000 fe:00 17   /usr/bin/doppel
Size:  50 kB
Pss:  3 kB
7f08-7f09 rw-p 00000000 00:00 0 [heap]
Size:  50 kB
Pss:  40 kB
VmFlags: rd wr
";

    #[test]
    fn mappings_are_told_apart() {
        let expected = Footprint {
            guest_bytes: 100 << 10,
            code_bytes: 22 << 10,
            record_bytes: 30 << 10,
            program_bytes: 3 << 10,
            other_bytes: 17 << 10,
            monitor_bytes: 20 << 10,
        };
        let footprint = Footprint::parse(SMAPS, 1 << 20);
        assert_eq!(footprint.with_records(30 << 10), expected);
        assert_eq!(footprint.with_records(1 << 30).other_bytes, 0);
    }

    #[test]
    fn this_process_takes_memory() {
        let footprint = Footprint::own(u64::MAX).unwrap();
        assert!(footprint.program_bytes > 0 && footprint.other_bytes > 0);
        assert_eq!(footprint.guest_bytes, 0);
    }
}
