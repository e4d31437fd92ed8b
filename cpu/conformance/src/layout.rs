//! Where things are in the test machine. Linear is physical below 16 MiB; the first 2 MiB are 4 KiB pages, of which
//! those from [`USER`] on are the user's.

/// Bytes of RAM.
pub const RAM: u64 = 16 << 20;

/// Page tables of the identity map: PML4, PDPT, page directory, page table of the first 2 MiB.
pub const PML4: u64 = 0x1000;
/// See [`PML4`].
pub const PDPT: u64 = 0x2000;
/// See [`PML4`].
pub const PD: u64 = 0x3000;
/// See [`PML4`].
pub const PT: u64 = 0x4000;
/// Tables of the region at [`X`].
pub const X_PDPT: u64 = 0x5000;
/// See [`X_PDPT`].
pub const X_PD: u64 = 0x6000;
/// See [`X_PDPT`].
pub const X_PT: u64 = 0x7000;
/// A linear region to experiment with: its first 2 MiB are 4 KiB pages, none present, under tables that allow everything.
pub const X: u64 = 0x80_0000_0000;

/// The GDT.
pub const GDT: u64 = 0x8000;
/// The 64-bit TSS.
pub const TSS: u64 = 0x9000;
/// The IDT, 256 gates.
pub const IDT: u64 = 0xa000;
/// The handlers that note and return.
pub const HANDLERS: u64 = 0x1_0000;
/// Where [`crate::Record`]s are kept.
pub const LOG: u64 = 0x1_8000;
/// Words of the handlers: the next record's place, then an action for each vector.
pub const HANDLER_DATA: u64 = 0x1_7000;
/// Top of the kernel's stack, which is also RSP0.
pub const KERNEL_STACK: u64 = 0x2_8000;
/// Top of the stack of IST 1; that of IST n is 0x2000 further on each.
pub const IST1: u64 = 0x2_a000;
/// Kernel code.
pub const CODE: u64 = 0x4_0000;
/// Kernel data.
pub const DATA: u64 = 0x6_0000;
/// Page tables that a test makes itself.
pub const TABLES: u64 = 0x7_0000;
/// The user's pages.
pub const USER: u64 = 0x10_0000;
/// User code.
pub const USER_CODE: u64 = USER;
/// User data.
pub const USER_DATA: u64 = 0x14_0000;
/// Top of the user's stack.
pub const USER_STACK: u64 = 0x18_0000;
/// Physical memory for pages that a test maps; 2 MiB aligned, in 2 MiB pages of the supervisor's.
pub const SPARE: u64 = 0x40_0000;

/// Selectors, in the order that SYSCALL and SYSENTER need.
pub const KERNEL_CS: u64 = 0x10;
/// See [`KERNEL_CS`].
pub const KERNEL_DS: u64 = 0x18;
/// See [`KERNEL_CS`].
pub const USER_CS32: u64 = 0x23;
/// See [`KERNEL_CS`].
pub const USER_DS: u64 = 0x2b;
/// See [`KERNEL_CS`].
pub const USER_CS: u64 = 0x33;
/// See [`KERNEL_CS`].
pub const TSS_SELECTOR: u64 = 0x40;
/// A data segment that is not present.
pub const ABSENT_DS: u64 = 0x50;

/// `int` with this vector ends a guest, whatever its privilege.
pub const STOP: u8 = 0x81;
/// Where a stopped guest is.
pub const STOPPED_AT: u64 = HANDLERS + 0x1000;
