//! The parts of ELF files for x86 that a loader needs, of either class (System V ABI, chapters 4 and 5).
//!
//! Nothing in the file is trusted: offsets are checked against its length, addresses against RAM.

use std::ops::Range;

use super::image::Image;
use super::params::{self, mib};
use super::{Boot, BootError};

pub const PT_LOAD: u32 = 1;
pub const PT_NOTE: u32 = 4;

const ELFDATA2LSB: u8 = 1;
const EHDR_SIZE: usize = 64;

/// Where the fields of a class are.
struct Layout {
    machine: u16,
    /// In the header of the file: offset, size and number of program headers.
    phoff: usize,
    phentsize: usize,
    phnum: usize,
    /// In a program header, and its size.
    offset: usize,
    vaddr: usize,
    paddr: usize,
    filesz: usize,
    memsz: usize,
    size: usize,
    wide: bool,
}

const CLASS32: Layout = Layout {
    machine: 3, // EM_386
    phoff: 28,
    phentsize: 42,
    phnum: 44,
    offset: 4,
    vaddr: 8,
    paddr: 12,
    filesz: 16,
    memsz: 20,
    size: 32,
    wide: false,
};

const CLASS64: Layout = Layout {
    machine: 62, // EM_X86_64
    phoff: 32,
    phentsize: 54,
    phnum: 56,
    offset: 8,
    vaddr: 16,
    paddr: 24,
    filesz: 32,
    memsz: 40,
    size: 56,
    wide: true,
};

impl Layout {
    /// A field of the class's address size.
    fn address(&self, b: &[u8], at: usize) -> u64 {
        match self.wide {
            true => u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32,
            false => u32_at(b, at).into(),
        }
    }
}

/// An ELF file's headers.
pub struct Elf {
    pub segments: Vec<Segment>,
    /// Virtual address of the first instruction.
    pub entry: u64,
}

/// What a program header says.
pub struct Segment {
    pub kind: u32,
    pub offset: u64,
    pub vaddr: u64,
    pub paddr: u64,
    pub filesz: u64,
    pub memsz: u64,
}

impl Elf {
    /// Reads the headers.
    pub fn read(kernel: &Image) -> Result<Self, BootError> {
        let mut ehdr = [0; EHDR_SIZE];
        kernel.read_at(0, &mut ehdr)?;
        let layout = match (ehdr[4], ehdr[5], u16_at(&ehdr, 18)) {
            (1, ELFDATA2LSB, machine) if machine == CLASS32.machine => CLASS32,
            (2, ELFDATA2LSB, machine) if machine == CLASS64.machine => CLASS64,
            _ => {
                return Err(BootError::Unsupported {
                    path: kernel.path().to_owned(),
                    what: "it is an ELF file, but not one for x86".into(),
                });
            }
        };
        if usize::from(u16_at(&ehdr, layout.phentsize)) != layout.size {
            return Err(kernel.damaged("its program headers have an odd size"));
        }
        let offset = layout.address(&ehdr, layout.phoff);
        let count = u16_at(&ehdr, layout.phnum);
        let mut table = vec![0; usize::from(count) * layout.size];
        kernel.read_at(offset, &mut table)?;
        let segment = |p: &[u8]| Segment {
            kind: u32_at(p, 0),
            offset: layout.address(p, layout.offset),
            vaddr: layout.address(p, layout.vaddr),
            paddr: layout.address(p, layout.paddr),
            filesz: layout.address(p, layout.filesz),
            memsz: layout.address(p, layout.memsz),
        };
        Ok(Elf {
            segments: table.chunks_exact(layout.size).map(segment).collect(),
            entry: layout.address(&ehdr, 24),
        })
    }

    /// Copies the segments to their physical addresses; returns what they cover together.
    pub fn load(&self, boot: &Boot) -> Result<Range<u64>, BootError> {
        let (mut low, mut high) = (u64::MAX, 0);
        let mut room = params::low_end(boot.ram);
        let loaded = |s: &&Segment| s.kind == PT_LOAD && s.memsz > 0;
        for s in self.segments.iter().filter(loaded) {
            let end = s.paddr.checked_add(s.memsz);
            let Some(end) =
                end.filter(|&end| s.filesz <= s.memsz && params::is_free(&(s.paddr..end)))
            else {
                return Err(boot.kernel.damaged("a segment has an impossible address"));
            };
            fits(boot, end)?;
            // Segments that fit and do not overlap fit together. Of those that do, a file can name 65,535.
            let Some(left) = room.checked_sub(s.filesz) else {
                return Err(boot.kernel.damaged("its segments overlap"));
            };
            room = left;
            boot.kernel.copy_to(boot.ram, s.offset, s.paddr, s.filesz)?;
            (low, high) = (low.min(s.paddr), high.max(end));
        }
        if low >= high {
            return Err(boot.kernel.damaged("it has nothing to load"));
        }
        Ok(low..high)
    }

    /// Physical address of the first instruction.
    pub fn physical_entry(&self) -> u64 {
        let holds = |s: &&Segment| {
            s.kind == PT_LOAD && (s.vaddr..s.vaddr.saturating_add(s.memsz)).contains(&self.entry)
        };
        let found = self.segments.iter().find(holds);
        found.map_or(self.entry, |s| s.paddr.wrapping_add(self.entry - s.vaddr))
    }
}

/// An error where RAM below the device hole ends before `end`.
pub fn fits(boot: &Boot, end: u64) -> Result<(), BootError> {
    if end <= params::low_end(boot.ram) {
        return Ok(());
    }
    Err(BootError::TooBig {
        path: boot.kernel.path().to_owned(),
        need_mib: mib(end),
    })
}

pub fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

pub fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}
