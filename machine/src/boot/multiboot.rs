//! Kernels with a Multiboot 1 header (Multiboot Specification 0.6.96): 32-bit entry with an information structure.
//!
//! The kernel is a 32-bit ELF file, or any file whose header says where it belongs. As in QEMU, command lines begin with the name of the
//! file, which kernels skip.

use std::ops::Range;

use super::bios;
use super::elf::{self, Elf, u32_at};
use super::entry::Entry;
use super::image::{Image, place};
use super::params::{
    self, CMDLINE_AT, CMDLINE_ROOM, LOWEST_LOAD, MEMMAP_AT, MODULES_AT, START_INFO_AT,
};
use super::{Boot, BootError};

const MAGIC: u32 = 0x1bad_b002;
/// The header lies within so many bytes, and its fields take so many.
const SEARCHED: usize = 8192;
const HEADER_SIZE: usize = 32;
/// Flags of the header: modules on page boundaries, memory information, video mode; addresses in the header.
const KNOWN_REQUESTS: u32 = 0b111;
const REQUESTS: u32 = 0xffff;
const HAS_ADDRESSES: u32 = 1 << 16;

/// Flags of the information structure: memory sizes, command line, modules, memory map, name of the loader.
const INFO_FLAGS: u32 = 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const INFO_SIZE: usize = 88;
const LOADER_NAME_AT: u64 = START_INFO_AT + 0x80;
const LOADER_NAME: &[u8] = b"doppel\0";

/// The header, and where in the file it is.
pub(crate) struct Header {
    at: u64,
    flags: u32,
    /// Physical addresses: of the header, of the first byte to load, behind the last, behind the zeros that follow, of the entry.
    addresses: [u32; 5],
}

/// The header of a kernel that is to be booted so: a 32-bit ELF file, or one that is no ELF file and has the addresses.
pub(crate) fn header(kernel: &Image) -> Result<Option<Header>, BootError> {
    let len = (kernel.len() as usize).min(SEARCHED);
    let mut bytes = vec![0; len];
    kernel.read_at(0, &mut bytes)?;
    let is_elf = bytes.starts_with(b"\x7fELF");
    if is_elf && bytes.get(4) != Some(&1) {
        return Ok(None);
    }
    let found = (0..len.saturating_sub(12)).step_by(4).find(|&at| {
        let sum = [4, 8].iter().map(|n| u32_at(&bytes, at + n));
        let magic = u32_at(&bytes, at);
        magic == MAGIC && sum.fold(magic, u32::wrapping_add) == 0
    });
    let Some(at) = found else { return Ok(None) };
    bytes.resize(bytes.len().max(at + HEADER_SIZE), 0);
    let header = Header {
        at: at as u64,
        flags: u32_at(&bytes, at + 4),
        addresses: [12, 16, 20, 24, 28].map(|n| u32_at(&bytes, at + n)),
    };
    Ok(Some(header).filter(|h| is_elf || h.flags & HAS_ADDRESSES != 0))
}

/// Loads the kernel and everything that goes with it.
pub(crate) fn load(boot: &Boot, header: &Header) -> Result<Entry, BootError> {
    if header.flags & REQUESTS & !KNOWN_REQUESTS != 0 {
        return Err(BootError::Unsupported {
            path: boot.kernel.path().to_owned(),
            what: format!(
                "its Multiboot header asks for what is unknown, {:#x}",
                header.flags
            ),
        });
    }
    let (kernel, entry) = match header.flags & HAS_ADDRESSES {
        0 => {
            let elf = Elf::read(boot.kernel)?;
            (elf.load(boot)?, elf.physical_entry())
        }
        _ => load_by_addresses(boot, header)?,
    };
    if !kernel.contains(&entry) {
        return Err(boot.kernel.damaged("its entry is outside of it"));
    }
    let named = |image: &Image, cmdline: &[u8]| {
        let name = image.path().as_os_str().as_encoded_bytes();
        [name, b" ", cmdline].concat().trim_ascii_end().to_vec()
    };
    params::place_cmdline(
        boot.ram,
        &named(boot.kernel, boot.cmdline),
        CMDLINE_ROOM - 1,
    )?;
    let modules = params::place_modules(boot, &kernel, named)?;
    place_info(boot, &modules)?;
    let entry = Entry::Multiboot {
        eip: entry as u32,
        info: START_INFO_AT as u32,
    };
    entry.place_tables(boot.ram)?;
    Ok(entry)
}

fn load_by_addresses(boot: &Boot, header: &Header) -> Result<(Range<u64>, u64), BootError> {
    let damaged = || boot.kernel.damaged("its Multiboot addresses make no sense");
    let [at, load, load_end, bss_end, entry] = header.addresses.map(u64::from);
    let before = at.checked_sub(load).ok_or_else(damaged)?;
    let offset = header.at.checked_sub(before).ok_or_else(damaged)?;
    let len = match load_end {
        0 => boot.kernel.len().saturating_sub(offset),
        end => end.checked_sub(load).ok_or_else(damaged)?,
    };
    let end = bss_end.max(load + len);
    if len == 0 || !params::is_free(&(load..end)) {
        return Err(damaged());
    }
    elf::fits(boot, end)?;
    boot.kernel.copy_to(boot.ram, offset, load, len)?;
    Ok((load..end, entry))
}

fn place_info(boot: &Boot, modules: &[params::Placed]) -> Result<(), BootError> {
    let map = params::memory_map(boot.ram);
    let mut entries = Vec::new();
    for m in &map {
        // The size does not count itself.
        entries.extend(20u32.to_le_bytes());
        entries.extend(m.range.start.to_le_bytes());
        entries.extend((m.range.end - m.range.start).to_le_bytes());
        entries.extend((m.kind as u32).to_le_bytes());
    }
    let mut list = Vec::new();
    for m in modules {
        let fields = [m.range.start, m.range.end, m.cmdline, 0];
        list.extend(fields.iter().flat_map(|f| (*f as u32).to_le_bytes()));
    }
    let upper = (params::low_end(boot.ram) - LOWEST_LOAD) >> 10;
    let mut info = [0; INFO_SIZE];
    for (at, value) in [
        (0, INFO_FLAGS),
        (4, u32::from(bios::CONVENTIONAL_KIB)),
        (8, upper as u32),
        (16, CMDLINE_AT as u32),
        (20, modules.len() as u32),
        (24, MODULES_AT as u32),
        (44, entries.len() as u32),
        (48, MEMMAP_AT as u32),
        (64, LOADER_NAME_AT as u32),
    ] {
        info[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
    place(boot.ram, START_INFO_AT, &info)?;
    place(boot.ram, LOADER_NAME_AT, LOADER_NAME)?;
    place(boot.ram, MEMMAP_AT, &entries)?;
    place(boot.ram, MODULES_AT, &list)
}
