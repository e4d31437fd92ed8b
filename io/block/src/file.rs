//! A host file or block device, read and written at offsets by any thread.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use doppel_memory::GuestSlice;
use rustix::fs::{FallocateFlags, OFlags};
use rustix::io::Errno;

use crate::error::BlockError;
use crate::guest::{Pieces, guest_len, zero};
use crate::lock::lock;

/// Zeros are written so many bytes at a time where the host has no call for it.
const ZEROS: &[u8] = &[0; 64 << 10];
/// Slices that the host takes at a time (UIO_MAXIOV is 1024).
const SLICES_MAX: usize = 1024;

/// An open file that is locked against other virtual machines.
#[derive(Debug)]
pub(crate) struct HostFile {
    file: File,
    path: PathBuf,
    len: u64,
    writable: bool,
}

impl HostFile {
    /// Opens and locks a file or block device.
    pub fn open(path: &Path, writable: bool) -> Result<HostFile, BlockError> {
        let mut options = OpenOptions::new();
        // Without O_NONBLOCK, opening a FIFO waits for a writer.
        let flags = (OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
        options.read(true).write(writable).custom_flags(flags);
        match options.open(path) {
            Ok(file) => HostFile::new(file, path, writable),
            Err(source) if writable && is_read_only(&source) => {
                let path = path.to_owned();
                Err(BlockError::NotWritable { path, source })
            }
            Err(source) => Err(BlockError::io(path)(source)),
        }
    }

    /// Makes a file that was not there.
    pub fn create(path: &Path) -> Result<HostFile, BlockError> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).open(path);
        HostFile::new(file.map_err(BlockError::io(path))?, path, true)
    }

    fn new(mut file: File, path: &Path, writable: bool) -> Result<HostFile, BlockError> {
        let kind = file.metadata().map_err(BlockError::io(path))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(BlockError::NotADisk(path.to_owned()));
        }
        if !lock(&file, writable).map_err(BlockError::io(path))? {
            return Err(BlockError::InUse(path.to_owned()));
        }
        let len = file.seek(SeekFrom::End(0)).map_err(BlockError::io(path))?;
        Ok(HostFile {
            file,
            path: path.to_owned(),
            len,
            writable,
        })
    }

    /// Bytes in the file when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it was opened for writing.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// Makes the file longer or shorter.
    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    /// The first bytes of the file, as many as there are up to `max`.
    pub fn head(&self, max: usize) -> Result<Vec<u8>, BlockError> {
        let mut head = vec![0; max];
        let n = self
            .read_at(0, vec![IoSliceMut::new(&mut head)])
            .map_err(BlockError::io(&self.path))?;
        head.truncate(n as usize);
        Ok(head)
    }

    /// Fills `into` from `offset` as far as the file goes; what comes after its end is zeros. How many bytes were in the file.
    pub fn read_at(&self, offset: u64, mut into: Vec<IoSliceMut<'_>>) -> io::Result<u64> {
        let mut rest = into.as_mut_slice();
        IoSliceMut::advance_slices(&mut rest, 0);
        let mut done = 0;
        while !rest.is_empty() {
            let count = rest.len().min(SLICES_MAX);
            match rustix::io::preadv(&self.file, &mut rest[..count], offset + done) {
                Ok(0) => break,
                Ok(n) => {
                    IoSliceMut::advance_slices(&mut rest, n);
                    done += n as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        rest.iter_mut().for_each(|slice| slice.fill(0));
        Ok(done)
    }

    /// Writes all of `from` at `offset`.
    pub fn write_at(&self, mut offset: u64, mut from: Vec<IoSlice<'_>>) -> io::Result<()> {
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

    /// As [`HostFile::read_at`], into guest RAM. With `at_once` an error of kind `WouldBlock` where the host would wait for its disk.
    pub fn read_to_guest(
        &self,
        offset: u64,
        into: &[GuestSlice<'_>],
        at_once: bool,
    ) -> io::Result<u64> {
        let done = doppel_memory::read_file_at(self.file.as_fd(), offset, into, at_once)?;
        if done == guest_len(into) {
            return Ok(done);
        }
        let mut pieces = Pieces::new(into);
        pieces.take(done);
        zero(&pieces.take(u64::MAX));
        Ok(done)
    }

    /// As [`HostFile::write_at`], from guest RAM.
    pub fn write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        match doppel_memory::write_file_at(self.file.as_fd(), offset, from)? {
            n if n == guest_len(from) => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Makes what was written durable.
    pub fn sync(&self) -> io::Result<()> {
        Ok(rustix::io::retry_on_intr(|| {
            rustix::fs::fdatasync(&self.file)
        })?)
    }

    /// Makes a range a hole; false where the host cannot.
    pub fn punch_hole(&self, offset: u64, len: u64) -> io::Result<bool> {
        self.allocate(FallocateFlags::PUNCH_HOLE, offset, len)
    }

    /// Makes a range zeros that keep their storage, by a call to the host if it has one for that.
    pub fn write_zeroes(&self, mut offset: u64, len: u64) -> io::Result<()> {
        if self.allocate(FallocateFlags::ZERO_RANGE, offset, len)? {
            return Ok(());
        }
        let end = offset + len;
        while offset < end {
            let n = (end - offset).min(ZEROS.len() as u64);
            self.write_at(offset, vec![IoSlice::new(&ZEROS[..n as usize])])?;
            offset += n;
        }
        Ok(())
    }

    fn allocate(&self, what: FallocateFlags, offset: u64, len: u64) -> io::Result<bool> {
        if len == 0 {
            return Ok(true);
        }
        let flags = what | FallocateFlags::KEEP_SIZE;
        match rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, offset, len)) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::INVAL) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

fn is_read_only(error: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
    matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem)
}
