//! What both boot protocols pass to the kernel: memory map, command line, initial RAM disk.
//!
//! Low memory at entry (all below 640 KiB, none of it needed once the kernel has read it):
//!
//! | at | what |
//! |---|---|
//! | 0x5000 | GDT |
//! | 0x6000 | PVH start info, then its memory map and module list |
//! | 0x7000 | `boot_params` (the zero page) |
//! | 0x9000 | page tables that map the first 4 GiB to themselves |
//! | 0x20000 | command line |

use std::ops::Range;

use doppel_memory::{GuestRam, PAGE_MASK, PAGE_SIZE};

use super::image::place;
use super::{Boot, BootError};
use crate::layout;

/// Where the command line goes.
pub const CMDLINE_AT: u64 = 0x2_0000;
/// Room for it, with its NUL.
pub const CMDLINE_ROOM: usize = 0x1_0000;

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
pub fn place_cmdline(boot: &Boot, max: usize) -> Result<(), BootError> {
    let max = max.min(CMDLINE_ROOM - 1);
    if boot.cmdline.len() > max {
        let len = boot.cmdline.len();
        return Err(BootError::CmdlineTooLong { len, max });
    }
    place(boot.ram, CMDLINE_AT, boot.cmdline)?;
    place(boot.ram, CMDLINE_AT + boot.cmdline.len() as u64, &[0])
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
    let top = low_end(boot.ram).min(limit);
    let at = top
        .checked_sub(initrd.len())
        .map(|at| at & !PAGE_MASK)
        .filter(|&at| at >= kernel.end)
        .ok_or_else(|| BootError::TooBig {
            path: initrd.path().to_owned(),
            need_mib: mib(kernel.end.saturating_add(initrd.len()) + PAGE_SIZE),
        })?;
    initrd.copy_to(boot.ram, 0, at, initrd.len())?;
    Ok(at..at + initrd.len())
}

/// Bytes as MiB, rounded up.
pub fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}
