//! Changes of a child's mappings, and the system calls that make them.

use crate::filter::RAM_FD;
use crate::patched;

const PAGE: u64 = 4096;
const USER_END: u64 = 1 << 47;
const MMAP: u64 = 9;
const MPROTECT: u64 = 10;
const MUNMAP: u64 = 11;
const MAP_SHARED_FIXED: u64 = 0x11;
const MAP_POPULATE: u64 = 0x8000;
const EXECUTE_ONLY: u64 = 4;

/// A change of a child's mappings. Addresses, offsets and lengths are in bytes and multiples of 4096; a length is not 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Maps `len` bytes of guest RAM from `offset` of its file at the linear address `at`, over whatever is there. Always readable.
    Map {
        /// Linear address.
        at: u64,
        /// Offset in the file of guest RAM.
        offset: u64,
        /// Bytes.
        len: u64,
        /// Writable.
        write: bool,
        /// Executable.
        execute: bool,
        /// Has the host enter the pages into its page tables now and not one by one when they are touched.
        populate: bool,
    },
    /// Maps a patched copy of a page of code, from this offset of the file of guest RAM, for execution alone: it cannot be read.
    MapPatched {
        /// Linear address.
        at: u64,
        /// Offset in the file.
        offset: u64,
    },
    /// Unmaps what is mapped in a range.
    Unmap {
        /// Linear address.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// Changes what may be done with a range that is mapped as a whole.
    Protect {
        /// Linear address.
        at: u64,
        /// Bytes.
        len: u64,
        /// Writable.
        write: bool,
        /// Executable.
        execute: bool,
    },
}

/// A system call: number and arguments.
pub(crate) type Call = [u64; 7];

fn protection(write: bool, execute: bool) -> u64 {
    1 | u64::from(write) << 1 | u64::from(execute) << 2
}

impl Change {
    fn range(&self) -> (u64, u64) {
        match *self {
            Change::Map { at, len, .. }
            | Change::Unmap { at, len }
            | Change::Protect { at, len, .. } => (at, len),
            Change::MapPatched { at, .. } => (at, PAGE),
        }
    }

    /// Whether it keeps to user addresses, pages, and the RAM, and leaves `reserved` alone.
    pub(crate) fn is_valid(&self, ram_size: u64, reserved: &std::ops::Range<u64>) -> bool {
        let (at, len) = self.range();
        let pages = |n: u64| n.is_multiple_of(PAGE);
        let fits = |at: u64, end: u64| at.checked_add(len).is_some_and(|e| e <= end);
        let in_ram = match *self {
            Change::Map { offset, .. } => pages(offset) && fits(offset, ram_size),
            Change::MapPatched { offset, .. } => {
                pages(offset) && patched::range(ram_size).contains(&offset)
            }
            _ => true,
        };
        let apart = at >= reserved.end || at + len <= reserved.start;
        len != 0 && pages(at) && pages(len) && fits(at, USER_END) && in_ram && apart
    }

    pub(crate) fn call(&self) -> Call {
        match *self {
            Change::Map {
                at,
                offset,
                len,
                write,
                execute,
                populate,
            } => {
                let flags = MAP_SHARED_FIXED | if populate { MAP_POPULATE } else { 0 };
                let protection = protection(write, execute);
                [MMAP, at, len, protection, flags, RAM_FD.into(), offset]
            }
            Change::MapPatched { at, offset } => {
                let fd = RAM_FD.into();
                [MMAP, at, PAGE, EXECUTE_ONLY, MAP_SHARED_FIXED, fd, offset]
            }
            Change::Unmap { at, len } => [MUNMAP, at, len, 0, 0, 0, 0],
            Change::Protect {
                at,
                len,
                write,
                execute,
            } => [MPROTECT, at, len, protection(write, execute), 0, 0, 0],
        }
    }
}
