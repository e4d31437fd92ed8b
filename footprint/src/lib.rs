//! What a monitor takes of the host: memory by kind of mapping, and processor time; of its own process, or with all that it started.

pub mod family;
pub mod smaps;

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader};

use serde::Serialize;
use smaps::Mapping;

/// Bytes that are resident; what several processes map, or one process twice, counts in parts (proportional set size, proc(5)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Footprint {
    /// Guest RAM.
    pub guest_bytes: u64,
    /// Translated code, which is mapped to be written and to be run, and what it jumps through.
    pub code_bytes: u64,
    /// Records of translations: what the host tells of them, and what the engines do of those that lie among all else.
    pub record_bytes: u64,
    /// Pages of program and libraries, which all processes share and the host can drop.
    pub program_bytes: u64,
    /// Everything else: heap, stacks, tables, buffers.
    pub other_bytes: u64,
    /// The monitor beyond guest and translations: `program_bytes` and `other_bytes`.
    pub monitor_bytes: u64,
}

/// Name of guest RAM that several processes map.
const RAM: &str = "doppel-guest-ram";
/// Name of the memory of translated code.
const CODE: &str = "doppel-code";
/// Name of a page right before a table of records of translations.
const RECORDS: &str = "doppel-records";

impl Footprint {
    /// Of this process, whose guest has `ram` bytes.
    ///
    /// # Errors
    /// Where the host does not let it read /proc/self/smaps.
    pub fn own(ram: u64) -> io::Result<Footprint> {
        let mut sum = Sum::new(ram);
        sum.add("/proc/self/smaps")?;
        Ok(sum.footprint)
    }

    /// Of the process `pid`, whose guest has `ram` bytes, and of those that it started.
    ///
    /// # Errors
    /// Where there is no such process, or its memory is not ours to read.
    pub fn of_family(pid: u32, ram: u64) -> io::Result<Footprint> {
        let mut sum = Sum::new(ram);
        for member in family::family(pid)? {
            match sum.add(&format!("/proc/{member}/smaps")) {
                // It ended meanwhile.
                Err(e) if member == pid => return Err(e),
                _ => {}
            }
        }
        Ok(sum.footprint)
    }

    /// Tells records apart from all else, where there are so many bytes of them and not all have a name.
    #[must_use]
    pub fn with_records(self, bytes: u64) -> Footprint {
        let unnamed = bytes.saturating_sub(self.record_bytes);
        let other_bytes = self.other_bytes.saturating_sub(unnamed);
        Footprint {
            record_bytes: self.record_bytes + unnamed,
            other_bytes,
            monitor_bytes: self.program_bytes + other_bytes,
            ..self
        }
    }

    fn place(&mut self, name: &str, is_as_large_as_ram: bool) -> &mut u64 {
        match name {
            _ if name.contains(CODE) => &mut self.code_bytes,
            _ if name.contains(RECORDS) => &mut self.record_bytes,
            _ if is_as_large_as_ram || name.contains(RAM) => &mut self.guest_bytes,
            _ if name.starts_with('/') && !name.contains("memfd") => &mut self.program_bytes,
            "[vdso]" => &mut self.program_bytes,
            _ => &mut self.other_bytes,
        }
    }
}

/// Mappings are added up.
struct Sum {
    footprint: Footprint,
    ram: u64,
    /// Name of the last one, and where it ends.
    before: (String, usize),
}

impl Sum {
    fn new(ram: u64) -> Sum {
        Sum {
            footprint: Footprint::default(),
            ram,
            before: Default::default(),
        }
    }

    /// Adds those of a process.
    fn add(&mut self, file: &str) -> io::Result<()> {
        let smaps = BufReader::new(File::open(file)?);
        self.before = Default::default();
        smaps::each(smaps, |mapping| self.mapping(mapping))
    }

    fn mapping(&mut self, mapping: &Mapping) {
        let (before, end) = &self.before;
        // What code jumps through lies right behind it and has no name, and so do records behind their named page.
        let follows = mapping.name.is_empty() && mapping.range.start == *end;
        let name = if follows { before } else { &mapping.name };
        let is_as_large_as_ram = mapping.size >= self.ram;
        *self.footprint.place(name, is_as_large_as_ram) += mapping.pss;
        self.before = (mapping.name.clone(), mapping.range.end);
        self.footprint.monitor_bytes = self.footprint.program_bytes + self.footprint.other_bytes;
    }
}

impl fmt::Display for Footprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        write!(
            f,
            "guest {:.1} MiB, code {:.1}, records {:.1}, program {:.1}, other {:.1}",
            mib(self.guest_bytes),
            mib(self.code_bytes),
            mib(self.record_bytes),
            mib(self.program_bytes),
            mib(self.other_bytes)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f00-7f01 rw-p 00000000 00:00 0
Size:  1024 kB
Pss:  100 kB
7f02-7f03 r-xs 00000000 00:01 17 /memfd:doppel-code (deleted)
Size:  2048 kB
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
7f09-7f0a ---p 00000000 00:01 1 /memfd:doppel-records (deleted)
Size:  4 kB
Pss:  0 kB
7f0a-7f0b rw-p 00000000 00:00 0
Size:  1024 kB
Pss:  5 kB
7f0b-7f0c ---p 00000000 00:00 0
Size:  2048 kB
Pss:  0 kB
7f0d-7f0e rw-s 00000000 00:01 1 /memfd:doppel-guest-ram (deleted)
Size:  100 kB
Pss:  10 kB
VmFlags: rd wr
";

    #[test]
    fn mappings_are_told_apart() {
        let expected = Footprint {
            guest_bytes: 110 << 10,
            code_bytes: 22 << 10,
            record_bytes: 35 << 10,
            program_bytes: 3 << 10,
            other_bytes: 17 << 10,
            monitor_bytes: 20 << 10,
        };
        let mut sum = Sum::new(1 << 20);
        smaps::each(SMAPS.as_bytes(), |mapping| sum.mapping(mapping)).unwrap();
        let footprint = sum.footprint;
        assert_eq!(footprint.record_bytes, 5 << 10);
        assert_eq!(footprint.with_records(35 << 10), expected);
        assert_eq!(footprint.with_records(4 << 10), footprint);
        assert_eq!(footprint.with_records(1 << 30).other_bytes, 0);
        assert_eq!(
            footprint.to_string(),
            "guest 0.1 MiB, code 0.0, records 0.0, program 0.0, other 0.0"
        );
    }

    #[test]
    fn this_process_takes_memory() {
        let own = Footprint::own(u64::MAX).unwrap();
        assert!(own.program_bytes > 0 && own.other_bytes > 0);
        assert_eq!(own.guest_bytes, 0);
        let family = Footprint::of_family(std::process::id(), u64::MAX).unwrap();
        assert!(family.monitor_bytes > 0);
        assert!(Footprint::of_family(u32::MAX, 1).is_err());
    }
}
