//! What goes between a monitor and the process that has a network: records of a Unix socket, the first byte of which says what it is.

use std::io;

use crate::header::HEADER;
use crate::link::{Accepts, FRAME_MAX, Offload};

const FRAME: u8 = 1;
const ACCEPTS: u8 = 2;

/// Bytes before a frame: what the record is, and what is left undone.
pub const PREFIX: usize = 1 + HEADER;
/// Bytes of a record at most.
pub const RECORD_MAX: usize = PREFIX + FRAME_MAX;

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A frame, from the guest or for it.
    Frame(Offload, &'a [u8]),
    /// The unfinished frames that the guest takes; the monitor alone says so.
    Accepts(Accepts),
}

impl<'a> Message<'a> {
    /// `None` where the record makes no sense.
    pub fn decode(record: &'a [u8]) -> Option<Self> {
        let (kind, rest) = record.split_first()?;
        match (*kind, rest) {
            (FRAME, rest) => {
                let (header, frame) = rest.split_first_chunk()?;
                let offload = Offload::decode(header, frame.len())?;
                (frame.len() <= FRAME_MAX).then_some(Message::Frame(offload, frame))
            }
            (ACCEPTS, [bits]) => Accepts::decode(*bits).map(Message::Accepts),
            _ => None,
        }
    }
}

/// What comes before a frame.
pub fn prefix(offload: Offload) -> [u8; PREFIX] {
    let mut bytes = [FRAME; PREFIX];
    bytes[1..].copy_from_slice(&offload.encode());
    bytes
}

/// The record that says what the guest takes.
pub fn accepts(accepts: Accepts) -> [u8; 2] {
    [ACCEPTS, accepts.encode()]
}

const CHECKSUM: u8 = 1;
const TCP4: u8 = 2;
const TCP6: u8 = 4;

impl Accepts {
    fn encode(self) -> u8 {
        let bit = |wanted: bool, bit: u8| if wanted { bit } else { 0 };
        bit(self.checksum, CHECKSUM) | bit(self.tcp4, TCP4) | bit(self.tcp6, TCP6)
    }

    fn decode(bits: u8) -> Option<Self> {
        let accepts = Accepts {
            checksum: bits & CHECKSUM != 0,
            tcp4: bits & TCP4 != 0,
            tcp6: bits & TCP6 != 0,
        };
        (accepts.encode() == bits).then_some(accepts)
    }
}

/// What a process says first of the network that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Unfinished frames that it takes.
    pub accepts: Accepts,
    /// The card's address.
    pub mac: [u8; 6],
}

impl Hello {
    pub fn encode(self) -> Vec<u8> {
        let mut bytes = vec![self.accepts.encode()];
        bytes.extend(self.mac);
        bytes
    }

    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        let decode = || {
            let (bits, mac) = bytes.split_first()?;
            let accepts = Accepts::decode(*bits)?;
            let mac = mac.try_into().ok()?;
            Some(Hello { accepts, mac })
        };
        decode().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::PartialChecksum;

    #[test]
    fn records_are_read_as_they_were_written() {
        let offload = Offload {
            checksum: Some(PartialChecksum {
                start: 4,
                offset: 2,
            }),
            segmentation: None,
        };
        let record = [&prefix(offload)[..], &[7; 60]].concat();
        let frame = Message::Frame(offload, &[7; 60]);
        assert_eq!(Message::decode(&record), Some(frame));
        let some = Accepts {
            tcp6: false,
            ..Accepts::ALL
        };
        let record = accepts(some);
        assert_eq!(Message::decode(&record), Some(Message::Accepts(some)));
        let hello = Hello {
            accepts: some,
            mac: [2, 3, 4, 5, 6, 7],
        };
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
    }

    #[test]
    fn nonsense_is_refused() {
        for record in [
            &[][..],
            &[0; 80],
            &[3; 80],
            &[FRAME; 5],
            &[ACCEPTS],
            &[ACCEPTS, 1, 1],
            &[ACCEPTS, 0x80],
        ] {
            assert_eq!(Message::decode(record), None, "{record:?}");
        }
        assert!(Hello::decode(&[0; 6]).is_err() && Hello::decode(&[0xff; 7]).is_err());
        let mut long = vec![0; RECORD_MAX + 1];
        long[0] = FRAME;
        assert_eq!(Message::decode(&long), None);
    }
}
