//! The configuration space of a block device (virtio 1.2, 5.2.4), and the limits that it tells.

use doppel_block::SECTOR;

/// Bytes of a logical block.
const BLOCK: u32 = 512;
/// Buffers of a request beside header and status. Two fit into the queue with them.
const SEGMENTS: u32 = 510;
/// A host page is the unit that a host's cache likes: 2^3 blocks.
const PHYSICAL_EXPONENT: u8 = 3;
/// Most sectors of a discard: 1 GiB.
pub const DISCARD_SECTORS_MAX: u32 = (1 << 30) / SECTOR as u32;
/// Most sectors of a write of zeros, for which the host may have to write: 64 MiB.
pub const ZEROES_SECTORS_MAX: u32 = (64 << 20) / SECTOR as u32;
/// Most ranges in one such request.
pub const RANGES_MAX: u32 = 32;

/// Where the driver switches the cache.
pub const WRITEBACK: u64 = 32;

/// `struct virtio_blk_config`.
pub fn bytes(len: u64, queues: u16, writeback: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(60);
    bytes.extend((len / SECTOR).to_le_bytes());
    bytes.extend(0u32.to_le_bytes()); // size_max, not offered
    bytes.extend(SEGMENTS.to_le_bytes());
    bytes.extend([0; 4]); // geometry, not offered
    bytes.extend(BLOCK.to_le_bytes());
    bytes.extend([PHYSICAL_EXPONENT, 0]); // alignment offset 0
    bytes.extend(1u16.to_le_bytes()); // min_io_size
    bytes.extend(0u32.to_le_bytes()); // opt_io_size
    bytes.extend([u8::from(writeback), 0]);
    bytes.extend(queues.to_le_bytes());
    bytes.extend(DISCARD_SECTORS_MAX.to_le_bytes());
    bytes.extend(RANGES_MAX.to_le_bytes());
    bytes.extend((1u32 << PHYSICAL_EXPONENT).to_le_bytes()); // discard alignment
    bytes.extend(ZEROES_SECTORS_MAX.to_le_bytes());
    bytes.extend(RANGES_MAX.to_le_bytes());
    bytes.extend([1, 0, 0, 0]); // write zeroes may unmap
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_where_the_specification_has_them() {
        let bytes = bytes(5 << 30, 3, true);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_eq!(bytes.len(), 60);
        assert_eq!((word(0), word(12), word(20)), (10 << 20, SEGMENTS, 512));
        assert_eq!((bytes[24], bytes[WRITEBACK as usize]), (3, 1));
        assert_eq!(&bytes[34..36], [3, 0]);
        assert_eq!(
            (word(36), word(48)),
            (DISCARD_SECTORS_MAX, ZEROES_SECTORS_MAX)
        );
        assert_eq!(bytes[56], 1);
    }
}
