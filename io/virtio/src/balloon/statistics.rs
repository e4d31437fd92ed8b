//! What a guest says of its memory (virtio 1.2, 5.5.6.3).

use serde::Serialize;

use crate::Buffers;

/// A tag of 16 bits and a value of 64.
const ENTRY: usize = 10;
/// More entries than there are tags are not read.
const ENTRIES_MAX: usize = 64;

/// Statistics of the guest; bytes, except where they count. What it did not say is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[allow(missing_docs)]
pub struct GuestMemoryStats {
    pub swapped_in: Option<u64>,
    pub swapped_out: Option<u64>,
    /// Number of page faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Number of those that did not.
    pub minor_faults: Option<u64>,
    pub free: Option<u64>,
    pub total: Option<u64>,
    /// What programs could get without swapping.
    pub available: Option<u64>,
    pub disk_caches: Option<u64>,
    /// Number of huge pages given to programs.
    pub huge_pages_allocated: Option<u64>,
    /// Number of those that could not be.
    pub huge_pages_failed: Option<u64>,
}

impl GuestMemoryStats {
    /// Reads what a driver wrote. Unknown tags are passed over.
    pub fn parse(buffers: &Buffers<'_>) -> Self {
        let mut bytes = vec![0; buffers.len().min(ENTRY * ENTRIES_MAX)];
        let n = buffers.read(&mut bytes);
        let mut stats = GuestMemoryStats::default();
        for entry in bytes[..n].chunks_exact(ENTRY) {
            let (tag, value) = entry.split_at(2);
            let value = value.try_into().map_or(0, u64::from_le_bytes);
            if let Some(of) = stats.of(u16::from_le_bytes([tag[0], tag[1]])) {
                *of = Some(value);
            }
        }
        stats
    }

    fn of(&mut self, tag: u16) -> Option<&mut Option<u64>> {
        Some(match tag {
            0 => &mut self.swapped_in,
            1 => &mut self.swapped_out,
            2 => &mut self.major_faults,
            3 => &mut self.minor_faults,
            4 => &mut self.free,
            5 => &mut self.total,
            6 => &mut self.available,
            7 => &mut self.disk_caches,
            8 => &mut self.huge_pages_allocated,
            9 => &mut self.huge_pages_failed,
            _ => return None,
        })
    }
}
