//! Raw images: a host file or block device, byte for byte the disk of the guest.
//!
//! Files are sparse: what is discarded becomes a hole. A file that ends within a sector is read as if zeros filled that sector.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::{Mutex, PoisonError};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::backend::{BlockBackend, SECTOR, check_range, check_writable};
use crate::format::{Look, look};

/// Zeros are written so many bytes at a time where the host has no call for it.
const ZEROS: &[u8] = &[0; 64 << 10];
/// Slices that the host takes at a time (UIO_MAXIOV is 1024).
const SLICES_MAX: usize = 1024;

/// A raw image.
#[derive(Debug)]
pub struct Raw {
    file: File,
    /// Bytes in the file when it was opened.
    file_len: u64,
    read_only: bool,
    /// Held while the first sector is written, where it must not come to look like another format.
    guard: Option<Mutex<()>>,
}

impl Raw {
    /// The disk in `file`, open for reading and, unless `read_only`, for writing, of `file_len` bytes.
    pub(crate) fn new(file: File, file_len: u64, read_only: bool) -> Raw {
        Raw {
            file,
            file_len,
            read_only,
            guard: None,
        }
    }

    /// The same, but writes that would make it look like another format are refused.
    pub(crate) fn guarded(self) -> Raw {
        Raw {
            guard: Some(Mutex::default()),
            ..self
        }
    }

    /// Writes to a disk whose format was guessed.
    fn write_guarded(
        &self,
        guard: &Mutex<()>,
        offset: u64,
        from: &[IoSlice<'_>],
    ) -> io::Result<()> {
        let _one_at_a_time = guard.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sector = [0; SECTOR as usize];
        self.read_at(0, &mut [IoSliceMut::new(&mut sector)])?;
        let mut bytes = from.iter().flat_map(|slice| slice.iter());
        for (to, byte) in sector[offset as usize..].iter_mut().zip(&mut bytes) {
            *to = *byte;
        }
        if look(&sector) != Look::Raw {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "this write would make the raw image look like one of another format; it needs `,format=raw`",
            ));
        }
        self.write_all(offset, from)
    }

    fn write_all(&self, mut offset: u64, from: &[IoSlice<'_>]) -> io::Result<()> {
        let mut from = from.to_vec();
        let mut rest = from.as_mut_slice();
        IoSlice::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let now = &rest[..rest.len().min(SLICES_MAX)];
            let n = rustix::io::retry_on_intr(|| rustix::io::pwritev(&self.file, now, offset))?;
            if n == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            IoSlice::advance_slices(&mut rest, n);
            offset += n as u64;
        }
        Ok(())
    }

    /// Tells the host's file system about a range; false where it does not know how.
    fn allocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, offset, len)) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        self.allocate(flags, offset, len)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<bool> {
        let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        self.allocate(flags, offset, len)
    }
}

impl BlockBackend for Raw {
    fn len(&self) -> u64 {
        self.file_len.next_multiple_of(SECTOR)
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, mut offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        let len = into.iter().map(|slice| slice.len() as u64).sum();
        check_range(offset, len, self.len())?;
        let mut rest: Vec<_> = into.iter_mut().map(|s| IoSliceMut::new(s)).collect();
        let mut rest = rest.as_mut_slice();
        IoSliceMut::advance_slices(&mut rest, 0);
        while !rest.is_empty() {
            let count = rest.len().min(SLICES_MAX);
            let now = &mut rest[..count];
            let n = rustix::io::preadv(&self.file, now, offset);
            match n {
                Ok(0) if offset >= self.file_len => {
                    rest.iter_mut().for_each(|slice| slice.fill(0));
                    return Ok(());
                }
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    IoSliceMut::advance_slices(&mut rest, n);
                    offset += n as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[IoSlice<'_>]) -> io::Result<()> {
        check_writable(self)?;
        let len = from.iter().map(|slice| slice.len() as u64).sum();
        check_range(offset, len, self.len())?;
        match &self.guard {
            Some(guard) if offset < SECTOR && len > 0 => self.write_guarded(guard, offset, from),
            _ => self.write_all(offset, from),
        }
    }

    fn flush(&self) -> io::Result<()> {
        if !self.read_only {
            rustix::io::retry_on_intr(|| rustix::fs::fdatasync(&self.file))?;
        }
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, len, self.len())?;
        self.punch_hole(offset, len).map(|_| ())
    }

    fn write_zeroes(&self, mut offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, len, self.len())?;
        if (may_unmap && self.punch_hole(offset, len)?) || self.zero_range(offset, len)? {
            return Ok(());
        }
        let end = offset + len;
        while offset < end {
            let n = (end - offset).min(ZEROS.len() as u64);
            self.write_all(offset, &[IoSlice::new(&ZEROS[..n as usize])])?;
            offset += n;
        }
        Ok(())
    }
}
