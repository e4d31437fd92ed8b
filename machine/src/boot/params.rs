//! What both boot protocols pass to the kernel: memory map, command line, initial RAM disk.
//!
//! Low memory at entry (all below 640 KiB, none of it needed once the kernel has read it):
//!
//! | at | what |
//! |---|---|
//! | 0x0 | interrupt vectors of real mode and BIOS data area, [`super::bios`] |
//! | 0x5000 | GDT |
//! | 0x6000 | PVH start info or Multiboot information, at 0x6200 its memory map, at 0x6800 its module list |
//! | 0x7000 | `boot_params` (the zero page) |
//! | 0x9000 | page tables that map the first 4 GiB to themselves |
//! | 0x20000 | command line |
//! | 0x30000 | command lines of modules |

use std::ops::Range;

use doppel_memory::{GuestRam, PAGE_MASK, PAGE_SIZE};

use super::image::{Image, place};
use super::{Boot, BootError};
use crate::layout;

/// Where the command line goes.
pub const CMDLINE_AT: u64 = 0x2_0000;
/// Room for it, with its NUL.
pub const CMDLINE_ROOM: usize = 0x1_0000;
/// Command lines of modules, which have as much room together.
const MODULE_CMDLINES_AT: u64 = CMDLINE_AT + CMDLINE_ROOM as u64;
/// What PVH and Multiboot pass, each with structures of its own.
pub const START_INFO_AT: u64 = 0x6000;
pub const MEMMAP_AT: u64 = 0x6200;
pub const MODULES_AT: u64 = 0x6800;
/// So many have room in the list.
pub const MOST_MODULES: usize = 32;

/// Kernels live above 1 MiB; what is below belongs to the machine.
pub const LOWEST_LOAD: u64 = 0x10_0000;
/// But for this: nothing that a kernel without `boot_params` and page tables is told lies here. Small kernels that go to real mode want it.
const FREE_LOW: Range<u64> = 0x7000..CMDLINE_AT;

/// True where a kernel may be loaded, as far as the machine and its boot information are concerned.
pub fn is_free(kernel: &Range<u64>) -> bool {
    kernel.start >= LOWEST_LOAD || (FREE_LOW.start <= kernel.start && kernel.end <= FREE_LOW.end)
}

/// Kinds of memory, with the numbers that e820 and PVH share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// One entry of the memory map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// Guest physical addresses.
    pub range: Range<u64>,
    /// What is there.
    pub kind: MemoryKind,
}

/// The memory map that the guest is told, in order of addresses.
///
/// RAM between the VGA window and 1 MiB is kept back for the ACPI and SMBIOS tables, and the last KiB of
/// conventional memory for an extended BIOS data area, as PC firmware does.
pub fn memory_map(ram: &GuestRam) -> Vec<MemoryRange> {
    let ranges = ram.ranges();
    let reserved = |range: Range<u64>| MemoryRange {
        range,
        kind: MemoryKind::Reserved,
    };
    let mut map = vec![
        ram_range(0..layout::EBDA.start),
        reserved(layout::EBDA),
        reserved(layout::FIRMWARE_TABLES),
    ];
    for r in &ranges {
        let start = r.start.max(layout::FIRMWARE_TABLES.end);
        if start < r.end {
            map.push(ram_range(start..r.end));
        }
    }
    map.push(reserved(layout::ECAM));
    map.sort_by_key(|m| m.range.start);
    map
}

fn ram_range(range: Range<u64>) -> MemoryRange {
    MemoryRange {
        range,
        kind: MemoryKind::Ram,
    }
}

/// Writes the command line with its NUL; `max` is what the kernel reads, without the NUL.
pub fn place_cmdline(ram: &GuestRam, cmdline: &[u8], max: usize) -> Result<(), BootError> {
    let (len, max) = (cmdline.len(), max.min(CMDLINE_ROOM - 1));
    if len > max {
        return Err(BootError::CmdlineTooLong { len, max });
    }
    place_text(ram, CMDLINE_AT, cmdline)
}

/// End of the RAM below 4 GiB.
pub fn low_end(ram: &GuestRam) -> u64 {
    ram.ranges().get(1).map_or(0, |r| r.end)
}

/// Copies the initial RAM disk to the highest place below 4 GiB that leaves `kernel` alone and does
/// not go beyond `limit` (exclusive). The range is empty where there is none.
pub fn place_initrd(boot: &Boot, kernel: &Range<u64>, limit: u64) -> Result<Range<u64>, BootError> {
    let Some(initrd) = boot.initrd else {
        return Ok(0..0);
    };
    place_high(boot, initrd, kernel, low_end(boot.ram).min(limit))
}

fn place_high(
    boot: &Boot,
    image: &Image,
    kernel: &Range<u64>,
    top: u64,
) -> Result<Range<u64>, BootError> {
    let at = top
        .checked_sub(image.len())
        .map(|at| at & !PAGE_MASK)
        .filter(|&at| at >= kernel.end)
        .ok_or_else(|| BootError::TooBig {
            path: image.path().to_owned(),
            need_mib: mib(kernel.end.saturating_add(image.len()) + PAGE_SIZE),
        })?;
    image.copy_to(boot.ram, 0, at, image.len())?;
    Ok(at..at + image.len())
}

/// A module in guest RAM.
pub struct Placed {
    /// Where it is.
    pub range: Range<u64>,
    /// Address of its command line; 0 where it has none.
    pub cmdline: u64,
}

/// Copies the initial RAM disk and the modules to the highest pages below 4 GiB that leave `kernel` alone, the first one highest, and
/// their command lines, which `text` makes.
pub fn place_modules(
    boot: &Boot,
    kernel: &Range<u64>,
    text: impl Fn(&Image, &[u8]) -> Vec<u8>,
) -> Result<Vec<Placed>, BootError> {
    let initrd = boot.initrd.map(|image| (image, &b""[..]));
    let given = boot
        .modules
        .iter()
        .map(|(image, cmdline)| (image, *cmdline));
    let (mut limit, mut text_at) = (low_end(boot.ram), MODULE_CMDLINES_AT);
    let mut placed = Vec::new();
    for (image, cmdline) in initrd.into_iter().chain(given) {
        if placed.len() == MOST_MODULES {
            return Err(BootError::TooManyModules(MOST_MODULES));
        }
        let range = place_high(boot, image, kernel, limit)?;
        limit = range.start;
        let text = text(image, cmdline);
        let cmdline = if text.is_empty() { 0 } else { text_at };
        if !text.is_empty() {
            let (len, max) = (text.len(), CMDLINE_ROOM - 1);
            if text_at + len as u64 > MODULE_CMDLINES_AT + max as u64 {
                return Err(BootError::CmdlineTooLong { len, max });
            }
            place_text(boot.ram, text_at, &text)?;
            text_at += len as u64 + 1;
        }
        placed.push(Placed { range, cmdline });
    }
    Ok(placed)
}

/// Writes a text with its NUL.
fn place_text(ram: &GuestRam, at: u64, text: &[u8]) -> Result<(), BootError> {
    place(ram, at, text)?;
    place(ram, at + text.len() as u64, &[0])
}

/// Bytes as MiB, rounded up.
pub fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
