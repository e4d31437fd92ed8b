//! ELF kernels with the Xen PVH note (xen/docs/misc/pvh.pandoc): 32-bit entry with a start info.
//!
//! The file is read here rather than by `linux-loader`, whose loader takes the last note segment for
//! the only one, adds offsets from the file unchecked, and places segments over the tables below 1 MiB.

use linux_loader::loader::elf::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::elf::{Elf, PT_NOTE, Segment, u32_at};
use super::entry::Entry;
use super::image::{Image, place};
use super::params::{self, CMDLINE_AT, CMDLINE_ROOM, MEMMAP_AT, MODULES_AT, START_INFO_AT};
use super::{Boot, BootError};

const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// More of notes than any kernel has, in all its segments of them.
const NOTES_MAX: u64 = 1 << 20;

/// Loads the kernel and everything that goes with it.
pub(crate) fn load(boot: &Boot) -> Result<Entry, BootError> {
    let elf = Elf::read(boot.kernel)?;
    let eip = pvh_entry(boot.kernel, &elf.segments)?;
    let kernel = elf.load(boot)?;
    if !kernel.contains(&u64::from(eip)) {
        return Err(boot.kernel.damaged("its PVH entry is outside of it"));
    }
    params::place_cmdline(boot.ram, boot.cmdline, CMDLINE_ROOM - 1)?;
    let modules = params::place_modules(boot, &kernel, |_, cmdline| cmdline.to_vec())?;
    place_start_info(boot, &modules)?;
    let entry = Entry::Pvh {
        eip,
        start_info: START_INFO_AT as u32,
    };
    entry.place_tables(boot.ram)?;
    Ok(entry)
}

/// The entry that the first PVH note names.
fn pvh_entry(kernel: &Image, segments: &[Segment]) -> Result<u32, BootError> {
    let mut room = NOTES_MAX;
    for s in segments.iter().filter(|s| s.kind == PT_NOTE) {
        let Some(left) = room.checked_sub(s.filesz) else {
            return Err(kernel.damaged("its notes are too long"));
        };
        room = left;
        let mut notes = vec![0; s.filesz as usize];
        kernel.read_at(s.offset, &mut notes)?;
        if let Some(eip) = find_pvh_note(&notes) {
            return Ok(eip);
        }
    }
    Err(BootError::Unsupported {
        path: kernel.path().to_owned(),
        what: "it is an ELF file without a PVH entry (a kernel built without CONFIG_PVH?) and without a Multiboot header".into(),
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

fn place_start_info(boot: &Boot, modules: &[params::Placed]) -> Result<(), BootError> {
    let map = params::memory_map(boot.ram);
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        nr_modules: modules.len() as u32,
        modlist_paddr: MODULES_AT,
        cmdline_paddr: CMDLINE_AT,
        rsdp_paddr: boot.rsdp,
        memmap_paddr: MEMMAP_AT,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    place(boot.ram, START_INFO_AT, info.as_slice())?;
    let mut at = MODULES_AT;
    for m in modules {
        let module = hvm_modlist_entry {
            paddr: m.range.start,
            size: m.range.end - m.range.start,
            cmdline_paddr: m.cmdline,
            ..hvm_modlist_entry::default()
        };
        place(boot.ram, at, module.as_slice())?;
        at += size_of::<hvm_modlist_entry>() as u64;
    }
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
