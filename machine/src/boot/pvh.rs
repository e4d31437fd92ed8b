//! ELF kernels with the Xen PVH note (xen/docs/misc/pvh.pandoc): 32-bit entry with a start info.
//!
//! The file is read here rather than by `linux-loader`, whose loader takes the last note segment for
//! the only one, adds offsets from the file unchecked, and places segments over the tables below 1 MiB.

use std::ops::Range;

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::entry::Entry;
use super::image::{Image, place};
use super::params::{self, CMDLINE_AT, CMDLINE_ROOM, mib};
use super::{Boot, BootError};

const START_INFO_AT: u64 = 0x6000;
const MODULES_AT: u64 = 0x6100;
const MEMMAP_AT: u64 = 0x6200;
/// Kernels live above 1 MiB; what is below belongs to the machine.
const LOWEST_LOAD: u64 = 0x10_0000;

const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const EM_X86_64: u16 = 62;
const EHDR_SIZE: usize = 64;
const PHDR_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// More of notes than any kernel has.
const NOTES_MAX: u64 = 1 << 20;

/// Loads the kernel and everything that goes with it.
pub(crate) fn load(boot: &Boot) -> Result<Entry, BootError> {
    let segments = program_headers(boot.kernel)?;
    let eip = pvh_entry(boot.kernel, &segments)?;
    let kernel = load_segments(boot, &segments)?;
    if !kernel.contains(&u64::from(eip)) {
        return Err(boot.kernel.damaged("its PVH entry is outside of it"));
    }
    params::place_cmdline(boot, CMDLINE_ROOM - 1)?;
    let initrd = params::place_initrd(boot, &kernel, params::low_end(boot.ram))?;
    place_start_info(boot, &initrd)?;
    let entry = Entry::Pvh {
        eip,
        start_info: START_INFO_AT as u32,
    };
    entry.place_tables(boot.ram)?;
    Ok(entry)
}

/// The fields of a program header that matter here.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

fn program_headers(kernel: &Image) -> Result<Vec<ProgramHeader>, BootError> {
    let mut ehdr = [0; EHDR_SIZE];
    kernel.read_at(0, &mut ehdr)?;
    if ehdr[4] != ELFCLASS64 || ehdr[5] != ELFDATA2LSB || u16_at(&ehdr, 18) != EM_X86_64 {
        return Err(BootError::Unsupported {
            path: kernel.path().to_owned(),
            what: "it is an ELF file, but not one for x86-64".into(),
        });
    }
    if usize::from(u16_at(&ehdr, 54)) != PHDR_SIZE {
        return Err(kernel.damaged("its program headers have an odd size"));
    }
    let (offset, count) = (u64_at(&ehdr, 32), u16_at(&ehdr, 56));
    let mut table = vec![0; usize::from(count) * PHDR_SIZE];
    kernel.read_at(offset, &mut table)?;
    Ok(table
        .chunks_exact(PHDR_SIZE)
        .map(|p| ProgramHeader {
            kind: u32_at(p, 0),
            offset: u64_at(p, 8),
            paddr: u64_at(p, 24),
            filesz: u64_at(p, 32),
            memsz: u64_at(p, 40),
        })
        .collect())
}

/// Copies the segments to their physical addresses; returns what they cover together.
fn load_segments(boot: &Boot, segments: &[ProgramHeader]) -> Result<Range<u64>, BootError> {
    let (mut low, mut high) = (u64::MAX, 0);
    for s in segments.iter().filter(|s| s.kind == PT_LOAD && s.memsz > 0) {
        let end = s.paddr.checked_add(s.memsz);
        let Some(end) = end.filter(|_| s.filesz <= s.memsz && s.paddr >= LOWEST_LOAD) else {
            return Err(boot.kernel.damaged("a segment has an impossible address"));
        };
        if end > params::low_end(boot.ram) {
            return Err(BootError::TooBig {
                path: boot.kernel.path().to_owned(),
                need_mib: mib(end),
            });
        }
        boot.kernel.copy_to(boot.ram, s.offset, s.paddr, s.filesz)?;
        (low, high) = (low.min(s.paddr), high.max(end));
    }
    if low >= high {
        return Err(boot.kernel.damaged("it has nothing to load"));
    }
    Ok(low..high)
}

/// The entry that the first PVH note names.
fn pvh_entry(kernel: &Image, segments: &[ProgramHeader]) -> Result<u32, BootError> {
    for s in segments.iter().filter(|s| s.kind == PT_NOTE) {
        if s.filesz > NOTES_MAX {
            return Err(kernel.damaged("its notes are too long"));
        }
        let mut notes = vec![0; s.filesz as usize];
        kernel.read_at(s.offset, &mut notes)?;
        if let Some(eip) = find_pvh_note(&notes) {
            return Ok(eip);
        }
    }
    Err(BootError::Unsupported {
        path: kernel.path().to_owned(),
        what: "it is an ELF file without a PVH entry (a kernel built without CONFIG_PVH?)".into(),
    })
}

fn find_pvh_note(mut notes: &[u8]) -> Option<u32> {
    while notes.len() >= 12 {
        let name_len = u32_at(notes, 0) as usize;
        let desc_len = u32_at(notes, 4) as usize;
        let kind = u32_at(notes, 8);
        let rest = &notes[12..];
        let name = rest.get(..name_len)?;
        let rest = rest.get(name_len.checked_next_multiple_of(4)?..)?;
        let desc = rest.get(..desc_len)?;
        if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" && desc.len() >= 4 {
            return Some(u32_at(desc, 0));
        }
        notes = rest.get(desc_len.checked_next_multiple_of(4)?..)?;
    }
    None
}

fn place_start_info(boot: &Boot, initrd: &Range<u64>) -> Result<(), BootError> {
    let map = params::memory_map(boot.ram);
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: u32::from(!initrd.is_empty()),
        modlist_paddr: MODULES_AT,
        cmdline_paddr: CMDLINE_AT,
        rsdp_paddr: boot.rsdp,
        memmap_paddr: MEMMAP_AT,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let module = hvm_modlist_entry {
        paddr: initrd.start,
        size: initrd.end - initrd.start,
        ..hvm_modlist_entry::default()
    };
    place(boot.ram, START_INFO_AT, info.as_slice())?;
    place(boot.ram, MODULES_AT, module.as_slice())?;
    let mut at = MEMMAP_AT;
    for m in &map {
        let entry = hvm_memmap_table_entry {
            addr: m.range.start,
            size: m.range.end - m.range.start,
            type_: m.kind as u32,
            reserved: 0,
        };
        place(boot.ram, at, entry.as_slice())?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}

fn u16_at(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    u64::from(u32_at(b, at)) | u64::from(u32_at(b, at + 4)) << 32
}
