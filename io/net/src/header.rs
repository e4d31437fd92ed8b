//! `struct virtio_net_hdr`: what is left undone in a frame, as virtio, tap devices and our own switch write it before it
//! (virtio 1.2, 5.1.6).

use crate::link::{Offload, PartialChecksum, Segment, Segmentation};

/// Bytes of the header without the number of buffers.
pub const HEADER: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCP4: u8 = 1;
const GSO_TCP6: u8 = 4;
const GSO_ECN: u8 = 0x80;

impl Offload {
    /// The header of a frame.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        if let Some(segmentation) = self.segmentation {
            bytes[1] = match segmentation.kind {
                Segment::Tcp4 => GSO_TCP4,
                Segment::Tcp6 => GSO_TCP6,
            };
            bytes[2..4].copy_from_slice(&segmentation.header.to_le_bytes());
            bytes[4..6].copy_from_slice(&segmentation.size.to_le_bytes());
        }
        if let Some(checksum) = self.checksum {
            bytes[0] = NEEDS_CHECKSUM;
            bytes[6..8].copy_from_slice(&checksum.start.to_le_bytes());
            bytes[8..10].copy_from_slice(&checksum.offset.to_le_bytes());
        }
        bytes
    }

    /// Reads the header of a frame of `len` bytes; `None` where it makes no sense.
    pub fn decode(bytes: &[u8; HEADER], len: usize) -> Option<Offload> {
        let word = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let checksum = (bytes[0] & NEEDS_CHECKSUM != 0).then(|| PartialChecksum {
            start: word(6),
            offset: word(8),
        });
        let kind = match bytes[1] & !GSO_ECN {
            GSO_NONE => None,
            GSO_TCP4 => Some(Segment::Tcp4),
            GSO_TCP6 => Some(Segment::Tcp6),
            _ => return None,
        };
        let segmentation = kind.map(|kind| Segmentation {
            kind,
            size: word(4),
            header: word(2),
        });
        let field = checksum.map_or(0, |c| usize::from(c.start) + usize::from(c.offset) + 2);
        let cut = segmentation.is_none_or(|s| s.size > 0 && checksum.is_some());
        (field <= len && cut).then_some(Offload {
            checksum,
            segmentation,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_read_as_it_was_written() {
        let checksum = Some(PartialChecksum {
            start: 34,
            offset: 16,
        });
        for kind in [None, Some(Segment::Tcp4), Some(Segment::Tcp6)] {
            let segmentation = kind.map(|kind| Segmentation {
                kind,
                size: 1460,
                header: 54,
            });
            let offload = Offload {
                checksum,
                segmentation,
            };
            assert_eq!(Offload::decode(&offload.encode(), 60), Some(offload));
        }
        let none = Offload::default();
        assert_eq!(Offload::decode(&none.encode(), 0), Some(none));
    }

    #[test]
    fn nonsense_is_refused() {
        let header = |flags, gso, size: u16, start: u16, offset: u16| {
            let mut bytes = [flags, gso, 0, 0, 0, 0, 0, 0, 0, 0];
            bytes[4..6].copy_from_slice(&size.to_le_bytes());
            bytes[6..8].copy_from_slice(&start.to_le_bytes());
            bytes[8..10].copy_from_slice(&offset.to_le_bytes());
            Offload::decode(&bytes, 100)
        };
        assert!(header(1, 1, 1460, 34, 16).is_some());
        assert!(header(1, 0x81, 1460, 34, 16).is_some(), "with ECN");
        assert_eq!(header(1, 0, 0, 99, 0), None, "behind the end");
        assert_eq!(header(1, 0, 0, 0xffff, 0xffff), None);
        assert_eq!(header(1, 1, 0, 34, 16), None, "pieces of nothing");
        assert_eq!(header(0, 1, 1460, 0, 0), None, "a segment with its sum");
        assert_eq!(header(0, 3, 1460, 0, 0), None, "UDP");
    }
}
