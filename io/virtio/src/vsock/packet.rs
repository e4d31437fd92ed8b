//! The header of a packet (virtio 1.2, 5.10.6).

/// Bytes of `struct virtio_vsock_hdr`.
pub const HEADER_LEN: usize = 44;
/// The host's address.
pub const HOST: u64 = 2;
/// The kind of socket that there is here.
pub const STREAM: u16 = 1;
/// Of a SHUTDOWN: its sender receives no more.
pub const NO_RECEIVE: u32 = 1;
/// Of a SHUTDOWN: its sender sends no more.
pub const NO_SEND: u32 = 2;

/// What packets are for, by number.
#[allow(missing_docs)]
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// What stands before the bytes of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes behind the header.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Bytes that the sender keeps for the connection until they are taken.
    pub buf_alloc: u32,
    /// Bytes that were taken there so far, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// As it stands in memory.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Self {
        let word = |at: usize| {
            let four = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
            u32::from_le_bytes(four)
        };
        let long = |at| u64::from(word(at + 4)) << 32 | u64::from(word(at));
        Header {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: word(28) as u16,
            op: (word(28) >> 16) as u16,
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }

    /// As it stands in memory.
    pub fn bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        let words = [
            self.src_port,
            self.dst_port,
            self.len,
            u32::from(self.op) << 16 | u32::from(self.kind),
            self.flags,
            self.buf_alloc,
            self.fwd_cnt,
        ];
        for (to, word) in bytes[16..].chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_where_the_specification_has_them() {
        let bytes = std::array::from_fn(|n| n as u8);
        let header = Header::parse(&bytes);
        assert_eq!(header.bytes(), bytes);
        assert_eq!(header.dst_cid, 0x0f0e_0d0c_0b0a_0908);
        assert_eq!(
            (header.src_port, header.dst_port),
            (0x1312_1110, 0x1716_1514)
        );
        assert_eq!(
            (header.len, header.kind, header.op),
            (0x1b1a_1918, 0x1d1c, 0x1f1e)
        );
        assert_eq!((header.flags, header.fwd_cnt), (0x2322_2120, 0x2b2a_2928));
    }
}
