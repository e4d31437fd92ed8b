//! Where a case lies: the same linear addresses on the host and in the guest, all below 2 GiB so that every form of
//! addressing reaches them, each region with nothing mapped before and after it.

/// A run of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Linear address.
    pub base: u64,
    /// Bytes.
    pub len: u64,
    pub write: bool,
    pub execute: bool,
}

impl Region {
    /// Whether the region holds an address.
    pub fn contains(&self, linear: u64) -> bool {
        (self.base..self.base + self.len).contains(&linear)
    }
}

/// The code, and in its last page the [`LANDING`].
pub const CODE: Region = Region {
    base: 0x1000_0000,
    len: 0x3000,
    write: false,
    execute: true,
};
/// What the code reads and writes.
pub const DATA: Region = Region {
    base: 0x1020_0000,
    len: 0x3000,
    write: true,
    execute: false,
};
/// What the code may only read.
pub const CONSTANT: Region = Region {
    base: 0x1040_0000,
    len: 0x1000,
    write: false,
    execute: false,
};
/// The stack.
pub const STACK: Region = Region {
    base: 0x1060_0000,
    len: 0x2000,
    write: true,
    execute: false,
};

/// All of them, in the order in which [`crate::state::Memory`] has them.
pub const REGIONS: [Region; 4] = [CODE, DATA, CONSTANT, STACK];

/// Bytes that a program may have from its start on.
pub const CODE_ROOM: u64 = 0x1000 - 0x40;
/// UD2 at every even address from here to the end of [`CODE`]: where code pointers in memory lead.
pub const LANDING: u64 = CODE.base + 0x2000;
/// Where RSP points at the start.
pub const STACK_START: u64 = STACK.base + 0x1000;
/// A word that counts the iterations of loops; nothing else is likely to write it.
pub const LOOP_COUNTERS: u64 = STACK.base + 0x40;
/// What ends a case.
pub const UD2: [u8; 2] = [0x0f, 0x0b];
