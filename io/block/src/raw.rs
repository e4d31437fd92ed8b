//! Raw images: a host file or block device, byte for byte the disk of the guest.
//!
//! Files are sparse: what is discarded becomes a hole. A file that ends within a sector is read as if zeros filled that sector.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::sync::{Mutex, PoisonError};

use doppel_memory::GuestSlice;

use crate::backend::{
    BlockBackend, SECTOR, check_range, check_writable, reads_len, unless_it_waits, writes_len,
};
use crate::file::HostFile;
use crate::format::{Look, look};
use crate::guest::{Pieces, gather, guest_len};

/// A raw image.
#[derive(Debug)]
pub struct Raw {
    file: HostFile,
    /// Held while the first sector is written, where it must not come to look like another format.
    guard: Option<Mutex<()>>,
}

impl Raw {
    /// The disk in `file`, as it was opened.
    pub(crate) fn new(file: HostFile) -> Raw {
        Raw { file, guard: None }
    }

    /// The same, but writes that would make it look like another format are refused.
    pub(crate) fn guarded(self) -> Raw {
        Raw {
            guard: Some(Mutex::default()),
            ..self
        }
    }

    /// Writes to the first sector of a disk whose format was guessed.
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
        self.file.write_at(offset, from.to_vec())
    }

    /// The same from guest RAM. What is looked at is copied first, since the guest may change it until it is written; the rest may be gigabytes
    /// and is not.
    fn write_guest_guarded(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        let mut pieces = Pieces::new(from);
        let first = pieces.take(SECTOR - offset);
        let mut bytes = vec![0; guest_len(&first) as usize];
        gather(&first, &mut bytes);
        self.write_at(offset, &[IoSlice::new(&bytes)])?;
        let rest = pieces.take(u64::MAX);
        self.file
            .write_from_guest(offset + bytes.len() as u64, &rest)
    }

    fn read_guest(&self, offset: u64, into: &[GuestSlice<'_>], at_once: bool) -> io::Result<()> {
        let len = guest_len(into);
        check_range(offset, len, self.len())?;
        let end = offset + self.file.read_to_guest(offset, into, at_once)?;
        match end < (offset + len).min(self.file.len()) {
            true => Err(ErrorKind::UnexpectedEof.into()),
            false => Ok(()),
        }
    }
}

impl BlockBackend for Raw {
    fn len(&self) -> u64 {
        self.file.len().next_multiple_of(SECTOR)
    }

    fn read_only(&self) -> bool {
        !self.file.writable()
    }

    fn read_at(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        let len = reads_len(into);
        check_range(offset, len, self.len())?;
        let slices = into.iter_mut().map(|s| IoSliceMut::new(s)).collect();
        let end = offset + self.file.read_at(offset, slices)?;
        match end < (offset + len).min(self.file.len()) {
            true => Err(io::ErrorKind::UnexpectedEof.into()),
            false => Ok(()),
        }
    }

    fn write_at(&self, offset: u64, from: &[IoSlice<'_>]) -> io::Result<()> {
        check_writable(self)?;
        let len = writes_len(from);
        check_range(offset, len, self.len())?;
        match &self.guard {
            Some(guard) if offset < SECTOR && len > 0 => self.write_guarded(guard, offset, from),
            _ => self.file.write_at(offset, from.to_vec()),
        }
    }

    fn read_to_guest(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
        self.read_guest(offset, into, false)
    }

    fn try_read_to_guest(&self, offset: u64, into: &[GuestSlice<'_>]) -> Option<io::Result<()>> {
        unless_it_waits(self.read_guest(offset, into, true))
    }

    fn write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, guest_len(from), self.len())?;
        if self.guard.is_some() && offset < SECTOR {
            return self.write_guest_guarded(offset, from);
        }
        self.file.write_from_guest(offset, from)
    }

    /// It goes to the host's cache.
    fn try_write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> Option<io::Result<()>> {
        Some(self.write_from_guest(offset, from))
    }

    fn flush(&self) -> io::Result<()> {
        match self.read_only() {
            true => Ok(()),
            false => self.file.sync(),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, len, self.len())?;
        self.file.punch_hole(offset, len).map(|_| ())
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, len, self.len())?;
        if may_unmap && self.file.punch_hole(offset, len)? {
            return Ok(());
        }
        self.file.write_zeroes(offset, len)
    }
}
