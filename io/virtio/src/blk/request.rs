//! A request to a block device (virtio 1.2, 5.2.6): a header, data, a status byte.

use std::io;
use std::sync::atomic::Ordering;

use doppel_block::SECTOR;
use virtio_bindings::virtio_blk as code;

use super::Disk;
use super::config::{DISCARD_SECTORS_MAX, RANGES_MAX, ZEROES_SECTORS_MAX};
use crate::worker::Stop;
use crate::{Broken, Buffers, Chain};

/// Bytes of a request's header.
pub const HEADER_LEN: usize = 16;
/// Bytes of a range to discard: sector, number of sectors, flags.
const RANGE_LEN: usize = 16;

/// No more bytes are read, written, discarded or made zeros without a look at the wish to stop. A multiple of what back-ends give
/// storage back by.
const PIECE: u64 = 16 << 20;

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

    /// What identifies it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Carries it out if that needs no waiting; else gives it back.
    pub fn try_now(self, disk: &Disk) -> Result<Done, Self> {
        let (backend, data) = (&disk.backend, self.data().slices());
        let result = match (self.kind, self.range(self.data())) {
            (Kind::Serial | Kind::Unknown, _) => self.answer(disk),
            (Kind::Read | Kind::Write, Err(e)) => Some(Err(e)),
            (Kind::Read | Kind::Write, Ok(_)) if self.data().len() as u64 > PIECE => None,
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

    /// What the host's disk has no part in; `None` where it has.
    fn answer(&self, disk: &Disk) -> Option<io::Result<()>> {
        match self.kind {
            Kind::Serial => {
                self.writable.write(&disk.serial);
                Some(Ok(()))
            }
            Kind::Unknown => Some(Err(io::ErrorKind::Unsupported.into())),
            _ => None,
        }
    }

    /// Carries it out, however long that takes. `None` where `stop` was wanted before its end: it may be done in part, and to do it
    /// again does no harm.
    pub fn carry_out(self, disk: &Disk, stop: &Stop) -> Option<Done> {
        if stop.is_wanted() {
            return None;
        }
        match self.do_all(disk, stop) {
            Ok(()) => Some(self.finish(Ok(()))),
            Err(End::Failed(e)) => Some(self.finish(Err(e))),
            Err(End::Stopped) => None,
        }
    }

    fn do_all(&self, disk: &Disk, stop: &Stop) -> Result<(), End> {
        let backend = &disk.backend;
        let pieces = Pieces { disk, stop };
        match self.kind {
            Kind::Read => {
                pieces.each_of(self.range(&self.writable)?, &self.writable, |at, to| {
                    backend.read_to_guest(at, to.slices())
                })?
            }
            Kind::Write => {
                pieces.each_of(self.range(&self.readable)?, &self.readable, |at, from| {
                    backend.write_from_guest(at, from.slices())
                })?;
                disk.settle()?;
            }
            Kind::Flush => backend.flush()?,
            Kind::Discard => self.each_range(DISCARD_SECTORS_MAX, |offset, len, flags| {
                if flags != 0 {
                    return Err(io::Error::from(io::ErrorKind::Unsupported).into());
                }
                pieces.each(offset, len, |at, len| backend.discard(at, len))
            })?,
            Kind::WriteZeroes => {
                self.each_range(ZEROES_SECTORS_MAX, |offset, len, flags| {
                    if flags > 1 {
                        return Err(io::Error::from(io::ErrorKind::Unsupported).into());
                    }
                    pieces.each(offset, len, |at, len| {
                        backend.write_zeroes(at, len, flags == 1)
                    })
                })?;
                disk.settle()?;
            }
            Kind::Serial | Kind::Unknown => self.answer(disk).unwrap_or(Ok(()))?,
        }
        Ok(())
    }

    /// Where on the disk the data belongs, in bytes; the back-end checks where it ends.
    fn range(&self, data: &Buffers<'_>) -> io::Result<u64> {
        if !(data.len() as u64).is_multiple_of(SECTOR) {
            return Err(invalid());
        }
        bytes(self.sector)
    }

    fn each_range(
        &self,
        sectors_max: u32,
        mut each: impl FnMut(u64, u64, u32) -> Result<(), End>,
    ) -> Result<(), End> {
        let len = self.readable.len();
        if !len.is_multiple_of(RANGE_LEN) || len > RANGES_MAX as usize * RANGE_LEN {
            return Err(invalid().into());
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
                return Err(invalid().into());
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

/// Why a request is not done.
enum End {
    Failed(io::Error),
    Stopped,
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        End::Failed(error)
    }
}

/// Cuts ranges of the disk into pieces, until it is told to stop.
#[derive(Clone, Copy)]
struct Pieces<'a> {
    disk: &'a Disk,
    stop: &'a Stop,
}

impl Pieces<'_> {
    /// Calls `each` with offset and length of each piece, which ends where a multiple of [`PIECE`] is; of an empty range too.
    fn each(
        self,
        offset: u64,
        len: u64,
        mut each: impl FnMut(u64, u64) -> io::Result<()>,
    ) -> Result<(), End> {
        let end = offset.checked_add(len);
        let end = end.filter(|end| *end <= self.disk.backend.len());
        let (mut at, end) = (offset, end.ok_or_else(invalid)?);
        while !self.stop.is_wanted() {
            let next = (at / PIECE + 1).saturating_mul(PIECE).min(end);
            each(at, next - at)?;
            if next == end {
                return Ok(());
            }
            at = next;
        }
        Err(End::Stopped)
    }

    /// Calls `each` with the offset of each piece and the buffers that belong there.
    fn each_of(
        self,
        offset: u64,
        data: &Buffers<'_>,
        mut each: impl FnMut(u64, &Buffers<'_>) -> io::Result<()>,
    ) -> Result<(), End> {
        let mut rest = data.clone();
        self.each(offset, data.len() as u64, |at, len| {
            each(at, &rest.split_off_front(len as usize))
        })
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
    bytes.ok_or_else(invalid)
}

fn invalid() -> io::Error {
    io::ErrorKind::InvalidInput.into()
}
