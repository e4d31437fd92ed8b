//! Memory virtualization: guest RAM, what its pages hold, the page walk and the software TLB.
//!
//! The one more level of indirection that a monitor adds: a guest *linear* address is walked through
//! the guest's own page tables ([`walk`]) to a guest *physical* address, which [`GuestRam`] maps to
//! host memory. [`Tlb`] remembers the outcome, so that the common access costs a compare and an add.
//!
//! Invariant of the whole crate: a host address that leaves it (as [`HostPtr`] or inside a [`Tlb`] entry)
//! lies inside the mapping of some [`GuestRam`], with the access that was asked for in bounds.

mod access_unsafe;
mod ahead;
mod dma;
mod dma_unsafe;
mod large;
mod mapping_unsafe;
mod peer;
mod ram;
mod survey;
mod tlb;
mod track;
mod walk;
mod watch;
mod window;
mod window_unsafe;

pub use access_unsafe::{HostPtr, Word};
pub use dma::{DmaBitmap, DmaSlice, GuestSlice, GuestView};
pub use dma_unsafe::{append_to_file, read_file_at, write_file_at, write_some_at};
pub use large::LargePages;
pub use peer::{Asked, InGuest, MOST_CPUS, Peer, Requests};
pub use ram::{Backing, GuestRam, HIGH_START, HOLE_START, RamError, VGA_HOLE};
pub use survey::{Leaf, REGION_PAGES, REGION_SHIFT, Survey};
pub use tlb::{INVALID_TAG_XOR, MOST_TAKEN, TLB_ENTRIES, TLB_SLOT_SHIFT, TakenEntries, Tlb};
pub use track::{CodeGranules, PageTracker};
pub use walk::{
    AccessKind, PageFault, PageRights, Paging, PagingMode, Privilege, Translation, code_neighbours,
    probe, walk,
};
pub use watch::MONITOR_LINE;
pub use window::Window;

/// Bytes in the smallest page.
pub const PAGE_SIZE: u64 = 4096;
/// Mask of the page-offset bits.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;
