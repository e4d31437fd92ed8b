//! Page table entries for the region at [`X`](crate::X).

use crate::{Machine, X, X_PD, X_PDPT, X_PT};

/// Present.
pub const P: u64 = 1;
/// Writable.
pub const RW: u64 = 1 << 1;
/// User.
pub const US: u64 = 1 << 2;
/// Accessed.
pub const A: u64 = 1 << 5;
/// Dirty.
pub const D: u64 = 1 << 6;
/// Large page.
pub const PS: u64 = 1 << 7;
/// Global.
pub const G: u64 = 1 << 8;
/// Execute disable.
pub const XD: u64 = 1 << 63;

/// Bits of a page fault's error code.
pub mod error {
    /// The page was present.
    pub const P: u64 = 1;
    /// A write.
    pub const W: u64 = 2;
    /// At CPL 3.
    pub const U: u64 = 4;
    /// A reserved bit was set.
    pub const RSVD: u64 = 8;
    /// An instruction fetch.
    pub const I: u64 = 16;
    /// The page's protection key.
    pub const PK: u64 = 32;
}

impl Machine {
    /// Maps 4 KiB page `n` of [`X`] to `gpa` with these bits; returns its linear address.
    pub fn map(&self, n: u64, gpa: u64, bits: u64) -> u64 {
        self.put(X_PT + 8 * n, gpa | bits);
        X + (n << 12)
    }
    /// The entry of 4 KiB page `n`.
    pub fn entry(&self, n: u64) -> u64 {
        self.get(X_PT + 8 * n)
    }
    /// Maps 2 MiB page `n` of [`X`]; 0 replaces the page table.
    pub fn map_2m(&self, n: u64, gpa: u64, bits: u64) -> u64 {
        self.put(X_PD + 8 * n, gpa | bits | PS);
        X + (n << 21)
    }
    /// Maps 1 GiB page `n` of [`X`]; 0 replaces the page directory.
    pub fn map_1g(&self, n: u64, gpa: u64, bits: u64) -> u64 {
        self.put(X_PDPT + 8 * n, gpa | bits | PS);
        X + (n << 30)
    }
}
