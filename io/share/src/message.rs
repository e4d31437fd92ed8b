//! FUSE messages: what a request is made of, and what comes back.

use std::ffi::CStr;

use doppel_memory::GuestSlice;
use fuse_abi::linux::{fuse_in_header, fuse_out_header};
use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of a request's header.
pub const HEADER_LEN: usize = size_of::<fuse_in_header>();
/// Bytes of an answer's header.
pub const REPLY_LEN: usize = size_of::<fuse_out_header>();
/// Bytes of a name at most, as on Linux (NAME_MAX).
const NAME_MAX: usize = 255;
/// Bytes of a symbolic link's content at most (PATH_MAX without the end).
const LINK_MAX: usize = 4095;

/// The opcodes that are served.
pub mod opcode {
    #![allow(missing_docs)]
    use fuse_abi::linux::fuse_opcode as code;

    pub const LOOKUP: u32 = code::FUSE_LOOKUP as u32;
    pub const FORGET: u32 = code::FUSE_FORGET as u32;
    pub const GETATTR: u32 = code::FUSE_GETATTR as u32;
    pub const SETATTR: u32 = code::FUSE_SETATTR as u32;
    pub const READLINK: u32 = code::FUSE_READLINK as u32;
    pub const SYMLINK: u32 = code::FUSE_SYMLINK as u32;
    pub const MKNOD: u32 = code::FUSE_MKNOD as u32;
    pub const MKDIR: u32 = code::FUSE_MKDIR as u32;
    pub const UNLINK: u32 = code::FUSE_UNLINK as u32;
    pub const RMDIR: u32 = code::FUSE_RMDIR as u32;
    pub const RENAME: u32 = code::FUSE_RENAME as u32;
    pub const LINK: u32 = code::FUSE_LINK as u32;
    pub const OPEN: u32 = code::FUSE_OPEN as u32;
    pub const READ: u32 = code::FUSE_READ as u32;
    pub const WRITE: u32 = code::FUSE_WRITE as u32;
    pub const STATFS: u32 = code::FUSE_STATFS as u32;
    pub const RELEASE: u32 = code::FUSE_RELEASE as u32;
    pub const FSYNC: u32 = code::FUSE_FSYNC as u32;
    pub const FLUSH: u32 = code::FUSE_FLUSH as u32;
    pub const INIT: u32 = code::FUSE_INIT as u32;
    pub const OPENDIR: u32 = code::FUSE_OPENDIR as u32;
    pub const READDIR: u32 = code::FUSE_READDIR as u32;
    pub const RELEASEDIR: u32 = code::FUSE_RELEASEDIR as u32;
    pub const FSYNCDIR: u32 = code::FUSE_FSYNCDIR as u32;
    pub const CREATE: u32 = code::FUSE_CREATE as u32;
    pub const INTERRUPT: u32 = code::FUSE_INTERRUPT as u32;
    pub const DESTROY: u32 = code::FUSE_DESTROY as u32;
    pub const BATCH_FORGET: u32 = code::FUSE_BATCH_FORGET as u32;
    pub const FALLOCATE: u32 = code::FUSE_FALLOCATE as u32;
    pub const READDIRPLUS: u32 = code::FUSE_READDIRPLUS as u32;
    pub const RENAME2: u32 = code::FUSE_RENAME2 as u32;
    pub const LSEEK: u32 = code::FUSE_LSEEK as u32;
    pub const COPY_FILE_RANGE: u32 = code::FUSE_COPY_FILE_RANGE as u32;
    pub const SYNCFS: u32 = code::FUSE_SYNCFS as u32;
}

/// What of a request's header matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// One of [`opcode`], or something else.
    pub opcode: u32,
    /// What tells the answer to this request from others.
    pub unique: u64,
    /// The node that it is about.
    pub node: u64,
}

impl Header {
    /// Reads a header.
    pub fn parse(bytes: &[u8; HEADER_LEN]) -> Option<Self> {
        let header = fuse_in_header::read_from_bytes(bytes).ok()?;
        Some(Header {
            opcode: header.opcode,
            unique: header.unique,
            node: header.nodeid,
        })
    }

    /// False for messages that are never answered.
    pub fn wants_answer(&self) -> bool {
        use opcode::{BATCH_FORGET, FORGET, INTERRUPT};
        ![FORGET, BATCH_FORGET, INTERRUPT].contains(&self.opcode)
    }

    /// Bytes of fixed size at the front of what follows the header, where bulk data comes after them.
    pub fn arguments_len(&self) -> Option<usize> {
        (self.opcode == opcode::WRITE).then_some(size_of::<fuse_abi::linux::fuse_write_in>())
    }
}

/// The header of an answer with so many bytes behind it.
pub fn reply(unique: u64, result: Result<usize, Errno>) -> [u8; REPLY_LEN] {
    let header = fuse_out_header {
        len: (REPLY_LEN + result.unwrap_or(0)) as u32,
        error: result.err().map_or(0, |errno| -errno.raw_os_error()),
        unique,
    };
    let mut bytes = [0; REPLY_LEN];
    bytes.copy_from_slice(header.as_bytes());
    bytes
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a, 'r> {
    /// What is wanted.
    pub header: Header,
    /// What follows the header, without bulk data.
    pub arguments: &'a [u8],
    /// Data to write.
    pub data: &'a [GuestSlice<'r>],
    /// Room for the answer, behind its header.
    pub room: &'a [GuestSlice<'r>],
    /// False where the caller would rather be told that it takes longer.
    pub may_wait: bool,
}

impl Call<'_, '_> {
    /// Bytes of [`Call::room`].
    pub(crate) fn room_len(&self) -> usize {
        self.room.iter().map(|slice| slice.len()).sum()
    }
}

/// What comes of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// These bytes.
    Bytes(Vec<u8>),
    /// So many bytes, which are in the room already.
    Data(usize),
    /// Nothing was done; it has to wait for the host's disk.
    Later,
}

impl Answer {
    /// Success without anything to say.
    pub(crate) fn done() -> Result<Answer, Errno> {
        Ok(Answer::Bytes(Vec::new()))
    }

    /// A structure.
    pub(crate) fn of(value: &(impl IntoBytes + Immutable)) -> Result<Answer, Errno> {
        Ok(Answer::Bytes(value.as_bytes().to_vec()))
    }
}

/// What follows a header, read from the front.
pub(crate) struct Arguments<'a>(pub &'a [u8]);

impl<'a> Arguments<'a> {
    /// A structure.
    pub fn take<T: FromBytes>(&mut self) -> Result<T, Errno> {
        let (value, rest) = T::read_from_prefix(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = rest;
        Ok(value)
    }

    fn string(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = &self.0[text.to_bytes_with_nul().len()..];
        Ok(text)
    }

    /// A name that is one component, and leads down.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.string()?;
        match is_component(name.to_bytes()) {
            true => Ok(name),
            false if name.count_bytes() > NAME_MAX => Err(Errno::NAMETOOLONG),
            false => Err(Errno::INVAL),
        }
    }

    /// The content of a symbolic link, which is nothing to the host.
    pub fn link(&mut self) -> Result<&'a CStr, Errno> {
        let text = self.string()?;
        match text.count_bytes() {
            0 => Err(Errno::NOENT),
            1..=LINK_MAX => Ok(text),
            _ => Err(Errno::NAMETOOLONG),
        }
    }
}

/// True for a name that a directory can have, but for the two that lead elsewhere.
pub(crate) fn is_component(name: &[u8]) -> bool {
    !matches!(name, b"" | b"." | b"..")
        && name.len() <= NAME_MAX
        && !name.contains(&b'/')
        && !name.contains(&0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_single_components_that_lead_down_are_names() {
        for bad in ["", ".", "..", "/", "a/b", "/etc", "../x", "x/", "a/../b"] {
            let bytes = [bad.as_bytes(), b"\0"].concat();
            assert_eq!(
                Arguments(&bytes).name().unwrap_err(),
                Errno::INVAL,
                "{bad:?}"
            );
        }
        for good in ["a", "...", "..a", ".x", "\u{e9}", "\n"] {
            let bytes = [good.as_bytes(), b"\0rest"].concat();
            assert_eq!(
                Arguments(&bytes).name().unwrap().to_bytes(),
                good.as_bytes()
            );
        }
        let long = [vec![b'x'; 256], vec![0]].concat();
        assert_eq!(Arguments(&long).name().unwrap_err(), Errno::NAMETOOLONG);
        assert_eq!(Arguments(&long[1..]).name().unwrap().count_bytes(), 255);
        assert_eq!(Arguments(b"no end").name().unwrap_err(), Errno::INVAL);
    }

    #[test]
    fn headers_are_laid_out_as_linux_has_them() {
        let mut bytes = [0; HEADER_LEN];
        bytes[4] = 15;
        bytes[8..16].copy_from_slice(&7u64.to_le_bytes());
        bytes[16..24].copy_from_slice(&9u64.to_le_bytes());
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(
            (header.opcode, header.unique, header.node),
            (opcode::READ, 7, 9)
        );
        let answer = reply(7, Err(Errno::NOENT));
        assert_eq!(answer[..8], [16, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff]);
        assert_eq!(reply(7, Ok(8))[..8], [24, 0, 0, 0, 0, 0, 0, 0]);
    }
}
