//! A request to a block device (virtio 1.2, 5.2.6): a header, data, a status byte.

use std::io;
use std::sync::atomic::Ordering;

use doppel_block::SECTOR;
use virtio_bindings::virtio_blk as code;

use super::Disk;
use super::config::{DISCARD_SECTORS_MAX, RANGES_MAX, ZEROES_SECTORS_MAX};
use crate::{Broken, Buffers, Chain};

/// Bytes of a request's header.
pub const HEADER_LEN: usize = 16;
/// Bytes of a range to discard: sector, number of sectors, flags.
const RANGE_LEN: usize = 16;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Serial,
    Discard,
    WriteZeroes,
    Unknown,
}

/// How it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Ok = code::VIRTIO_BLK_S_OK as isize,
    IoError = code::VIRTIO_BLK_S_IOERR as isize,
    Unsupported = code::VIRTIO_BLK_S_UNSUPP as isize,
}

/// A request that was read from a queue.
pub struct Request<'r> {
    head: u16,
    kind: Kind,
    sector: u64,
    readable: Buffers<'r>,
    writable: Buffers<'r>,
    status: Buffers<'r>,
}

/// A request that is over: its head, and how many bytes were written.
pub type Done = (u16, u32);

impl<'r> Request<'r> {
    /// Takes header and status off a chain. A chain without room for them breaks the queue.
    pub fn parse(chain: Chain<'r>) -> Result<Self, Broken> {
        let Chain {
            head,
            mut readable,
            mut writable,
        } = chain;
        let header = readable.split_off_front(HEADER_LEN);
        let mut bytes = [0; HEADER_LEN];
        if header.read(&mut bytes) < HEADER_LEN {
            return Err(Broken("a block request without a header"));
        }
        let data = writable.len().checked_sub(1);
        let data = data.ok_or(Broken("a block request without a status"))?;
        let [a, b, c, d, _, _, _, _, sector @ ..] = bytes;
        let data = writable.split_off_front(data);
        Ok(Request {
            head,
            kind: Kind::of(u32::from_le_bytes([a, b, c, d])),
            sector: u64::from_le_bytes(sector),
            readable,
            writable: data,
            status: writable,
        })
    }

    /// Carries it out if that needs no waiting; else gives it back.
    pub fn try_now(self, disk: &Disk) -> Result<Done, Self> {
        let (backend, data) = (&disk.backend, self.data().slices());
        let result = match (self.kind, self.range(self.data())) {
            (Kind::Serial | Kind::Unknown, _) => return Ok(self.carry_out(disk)),
            (Kind::Read | Kind::Write, Err(e)) => Some(Err(e)),
            (Kind::Read, Ok(offset)) => backend.try_read_to_guest(offset, data),
            (Kind::Write, Ok(offset)) if disk.caches() => {
                backend.try_write_from_guest(offset, data)
            }
            _ => None,
        };
        match result {
            Some(result) => Ok(self.finish(result)),
            None => Err(self),
        }
    }

    /// What is read or written.
    fn data(&self) -> &Buffers<'r> {
        match self.kind {
            Kind::Read => &self.writable,
            _ => &self.readable,
        }
    }

    /// Carries it out, however long that takes.
    pub fn carry_out(self, disk: &Disk) -> Done {
        let result = match self.kind {
            Kind::Read => self
                .range(&self.writable)
                .and_then(|at| disk.backend.read_to_guest(at, self.writable.slices())),
            Kind::Write => self
                .range(&self.readable)
                .and_then(|at| disk.backend.write_from_guest(at, self.readable.slices()))
                .and_then(|()| disk.settle()),
            Kind::Flush => disk.backend.flush(),
            Kind::Serial => {
                self.writable.write(&disk.serial);
                Ok(())
            }
            Kind::Discard => {
                self.each_range(DISCARD_SECTORS_MAX, |offset, len, flags| match flags {
                    0 => disk.backend.discard(offset, len),
                    _ => Err(io::ErrorKind::Unsupported.into()),
                })
            }
            Kind::WriteZeroes => self
                .each_range(ZEROES_SECTORS_MAX, |offset, len, flags| match flags {
                    0 | 1 => disk.backend.write_zeroes(offset, len, flags == 1),
                    _ => Err(io::ErrorKind::Unsupported.into()),
                })
                .and_then(|()| disk.settle()),
            Kind::Unknown => Err(io::ErrorKind::Unsupported.into()),
        };
        self.finish(result)
    }

    /// Where on the disk the data belongs, in bytes; the back-end checks where it ends.
    fn range(&self, data: &Buffers<'_>) -> io::Result<u64> {
        if !(data.len() as u64).is_multiple_of(SECTOR) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        bytes(self.sector)
    }

    fn each_range(
        &self,
        sectors_max: u32,
        mut each: impl FnMut(u64, u64, u32) -> io::Result<()>,
    ) -> io::Result<()> {
        let len = self.readable.len();
        if !len.is_multiple_of(RANGE_LEN) || len > RANGES_MAX as usize * RANGE_LEN {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut ranges = vec![0; len];
        self.readable.read(&mut ranges);
        for range in ranges.chunks_exact(RANGE_LEN) {
            let word = |at: usize| {
                u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]])
            };
            let sector = u64::from(word(4)) << 32 | u64::from(word(0));
            let (sectors, flags) = (word(8), word(12));
            if sectors > sectors_max {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            each(bytes(sector)?, u64::from(sectors) * SECTOR, flags)?;
        }
        Ok(())
    }

    fn finish(self, result: io::Result<()>) -> Done {
        let status = match &result {
            Ok(()) => Status::Ok,
            Err(e) if e.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
            Err(e) => {
                tracing::debug!("{:?} at sector {}: {e}", self.kind, self.sector);
                Status::IoError
            }
        };
        self.status.write(&[status as u8]);
        let data = match self.kind {
            Kind::Read if result.is_ok() => self.writable.len(),
            Kind::Serial => self.writable.len().min(super::SERIAL_LEN),
            _ => 0,
        };
        // The status counts where all before it was written.
        let whole = data == self.writable.len();
        (self.head, (data + usize::from(whole)) as u32)
    }
}

impl Kind {
    fn of(code: u32) -> Self {
        match code {
            code::VIRTIO_BLK_T_IN => Kind::Read,
            code::VIRTIO_BLK_T_OUT => Kind::Write,
            code::VIRTIO_BLK_T_FLUSH => Kind::Flush,
            code::VIRTIO_BLK_T_GET_ID => Kind::Serial,
            code::VIRTIO_BLK_T_DISCARD => Kind::Discard,
            code::VIRTIO_BLK_T_WRITE_ZEROES => Kind::WriteZeroes,
            _ => Kind::Unknown,
        }
    }
}

impl Disk {
    fn caches(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// What follows each write where nothing is cached.
    fn settle(&self) -> io::Result<()> {
        match self.caches() {
            true => Ok(()),
            false => self.backend.flush(),
        }
    }
}

fn bytes(sector: u64) -> io::Result<u64> {
    let bytes = sector.checked_mul(SECTOR);
    bytes.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}
