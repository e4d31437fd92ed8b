//! Messages between a monitor and the process that has its disk: records of a Unix socket (SOCK_SEQPACKET), little endian.

use std::io;

use rustix::io::Errno;

/// Bytes of data that one message carries at most; requests of the guest carry none.
pub const DATA_MAX: usize = 64 << 10;
/// Pieces of guest RAM in a request at most.
pub const PIECES_MAX: usize = 1024;
/// Bytes of a message at most.
pub const MESSAGE_MAX: usize = HEAD_LEN
    + if 16 * PIECES_MAX > DATA_MAX {
        16 * PIECES_MAX
    } else {
        DATA_MAX
    };
const HEAD_LEN: usize = 32;

/// What a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// To guest RAM.
    ReadToGuest = 1,
    /// From guest RAM.
    WriteFromGuest = 2,
    /// Into the answer.
    Read = 3,
    /// From the message.
    Write = 4,
    Flush = 5,
    Discard = 6,
    WriteZeroes = 7,
    /// As [`Kind::WriteZeroes`]; the storage may be given back.
    Unmap = 8,
    /// The memory that is the guest's RAM from now on comes with the message; or there is none any more.
    Memory = 9,
}

const KINDS: [Kind; 9] = [
    Kind::ReadToGuest,
    Kind::WriteFromGuest,
    Kind::Read,
    Kind::Write,
    Kind::Flush,
    Kind::Discard,
    Kind::WriteZeroes,
    Kind::Unmap,
    Kind::Memory,
];

/// A request, or with status and data its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// What tells it from others that are under way.
    pub id: u64,
    /// Of a request.
    pub kind: Kind,
    /// 0, or the errno of what went wrong.
    pub status: u32,
    /// Bytes on the disk.
    pub offset: u64,
    pub len: u64,
    /// Data, or the pieces of guest RAM: address and length each.
    pub data: Vec<u8>,
}

impl Message {
    pub fn new(kind: Kind, offset: u64, len: u64) -> Self {
        Message {
            id: 0,
            kind,
            status: 0,
            offset,
            len,
            data: Vec::new(),
        }
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_LEN + self.data.len());
        bytes.extend(self.id.to_le_bytes());
        bytes.extend((self.kind as u32).to_le_bytes());
        bytes.extend(self.status.to_le_bytes());
        bytes.extend(self.offset.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(&self.data);
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, data) = bytes.split_at_checked(HEAD_LEN)?;
        let word = |at: usize| head[at..at + 4].try_into().map(u32::from_le_bytes).ok();
        let long = |at: usize| head[at..at + 8].try_into().map(u64::from_le_bytes).ok();
        let kind = word(8)? as usize;
        Some(Message {
            id: long(0)?,
            kind: *KINDS.get(kind.checked_sub(1)?)?,
            status: word(12)?,
            offset: long(16)?,
            len: long(24)?,
            data: data.to_vec(),
        })
    }

    /// Adds pieces of guest RAM.
    pub fn with_pieces(mut self, pieces: impl Iterator<Item = (u64, u64)>) -> Self {
        for (address, len) in pieces {
            self.data.extend(address.to_le_bytes());
            self.data.extend(len.to_le_bytes());
        }
        self
    }

    /// The pieces of guest RAM.
    pub fn pieces(&self) -> impl Iterator<Item = (u64, u64)> {
        let long = |bytes: &[u8]| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b));
        let pieces = self.data.chunks_exact(16);
        pieces.map(move |piece| (long(&piece[..8]), long(&piece[8..])))
    }
}

/// What a process says first of the disk that it opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Bytes on it.
    pub len: u64,
    pub read_only: bool,
}

impl Hello {
    pub fn encode(self) -> Vec<u8> {
        let mut bytes = self.len.to_le_bytes().to_vec();
        bytes.push(self.read_only.into());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> io::Result<Self> {
        match bytes.split_first_chunk() {
            Some((len, [read_only])) => Ok(Hello {
                len: u64::from_le_bytes(*len),
                read_only: *read_only != 0,
            }),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// The errno that says what went wrong.
pub fn status(result: &io::Result<()>) -> u32 {
    let Err(error) = result else {
        return 0;
    };
    let errno = match (error.raw_os_error(), error.kind()) {
        (Some(errno), _) => errno,
        (_, io::ErrorKind::InvalidInput) => Errno::INVAL.raw_os_error(),
        (_, io::ErrorKind::PermissionDenied) => Errno::ACCESS.raw_os_error(),
        (_, io::ErrorKind::Unsupported) => Errno::OPNOTSUPP.raw_os_error(),
        (_, io::ErrorKind::StorageFull) => Errno::NOSPC.raw_os_error(),
        _ => Errno::IO.raw_os_error(),
    };
    errno.unsigned_abs()
}

/// What a status says.
pub fn result(status: u32) -> io::Result<()> {
    match i32::try_from(status) {
        Ok(0) => Ok(()),
        Ok(errno) => Err(io::Error::from_raw_os_error(errno)),
        Err(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_come_out_as_they_went_in() {
        for kind in KINDS {
            let mut message = Message::new(kind, 1 << 40, 7);
            (message.id, message.status) = (u64::MAX - 1, 5);
            let message = message.with_pieces([(1, 2), (1 << 33, 4096)].into_iter());
            let back = Message::decode(&message.encode()).unwrap();
            assert_eq!(back, message);
            assert!(back.pieces().eq([(1, 2), (1 << 33, 4096)]));
        }
        let hello = Hello {
            len: 1 << 40,
            read_only: true,
        };
        assert_eq!(Hello::decode(&hello.encode()).unwrap(), hello);
        assert!(Hello::decode(&[0; 8]).is_err());
        assert_eq!(Message::decode(&[0; 31]), None);
        assert_eq!(Message::decode(&[0; 40]), None, "no such kind");
    }

    #[test]
    fn errors_keep_what_a_guest_is_told_of_them() {
        for kind in [
            io::ErrorKind::InvalidInput,
            io::ErrorKind::PermissionDenied,
            io::ErrorKind::Unsupported,
            io::ErrorKind::StorageFull,
        ] {
            let back = result(status(&Err(kind.into()))).unwrap_err();
            assert_eq!(back.kind(), kind);
        }
        assert!(result(status(&Ok(()))).is_ok());
        assert!(result(status(&Err(io::ErrorKind::Other.into()))).is_err());
    }
}
