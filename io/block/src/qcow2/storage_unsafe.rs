//! A host file as the crate `imago` wants it.
//!
//! The crate has a driver for files of its own, but that one locks out all other requests during a sync, and reads beyond the end of a
//! file as zeros, so that a truncated image would lose data silently. Here a read that starts beyond the cluster that the file ends in
//! is an error (`qemu-img check` calls such an image corrupt too).
//!
//! The tables of a hostile image may lead its guest to the header: the block of counts can be a piece of the disk, and a cluster whose count is 0 is taken
//! for the next write. A header names a backing file, which the next start opens with the user's rights. So the first cluster is sealed when the
//! image has been opened: nothing is written there but the numbers that the crate itself changes. What else such an image overwrites is its own.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use doppel_memory::GuestSlice;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;
use imago::storage::{PreallocateMode, Storage};

use crate::file::HostFile;
use crate::guest::guest_len;
use crate::qcow2::header::LEN_V2;

/// The file of an image.
#[derive(Debug)]
pub(crate) struct ImageFile {
    file: Arc<HostFile>,
    /// Where it ends by now; it only grows.
    end: AtomicU64,
    /// Reads may go beyond the end up to a multiple of this.
    grain: u64,
    seal: Seal,
    helper: CommonStorageHelper,
}

/// Bytes at the start of an image that are not written to any more.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seal(Arc<AtomicU64>);

impl Seal {
    /// From now on, the first `len` bytes are the header's alone.
    pub fn close(&self, len: u64) {
        self.0.store(len, Ordering::Relaxed);
    }

    /// Whether `len` bytes may be written at `offset`. Of the header the crate writes what version 2 has, and no guest writes so few bytes.
    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        let of_crate = offset == 0 && len == LEN_V2 as u64;
        if offset < self.0.load(Ordering::Relaxed) && len > 0 && !of_crate {
            return Err(io::Error::other(
                "the image leads to its own header; repair it: qemu-img check -r all",
            ));
        }
        Ok(())
    }
}

impl ImageFile {
    /// `grain` is the cluster size of the image, or 512 for raw ones.
    pub fn new(file: Arc<HostFile>, grain: u64) -> ImageFile {
        ImageFile {
            end: AtomicU64::new(file.len()),
            file,
            grain,
            seal: Seal::default(),
            helper: CommonStorageHelper::default(),
        }
    }

    /// What seals the header.
    pub fn seal(&self) -> Seal {
        self.seal.clone()
    }

    fn grown(&self, end: u64) {
        self.end.fetch_max(end, Ordering::Relaxed);
    }

    /// Fills guest RAM from `offset`; with `at_once` an error of kind `WouldBlock` where the host would wait for its disk.
    pub fn read_to_guest(
        &self,
        offset: u64,
        into: &[GuestSlice<'_>],
        at_once: bool,
    ) -> io::Result<()> {
        self.check_end(offset, guest_len(into))?;
        self.file.read_to_guest(offset, into, at_once).map(|_| ())
    }

    /// Writes guest RAM at `offset`.
    pub fn write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        self.seal.check(offset, guest_len(from))?;
        self.file.write_from_guest(offset, from)?;
        self.grown(offset.saturating_add(guest_len(from)));
        Ok(())
    }

    fn check_end(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.readable_end()) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the image refers to what is beyond the end of its file",
            ));
        }
        Ok(())
    }

    fn readable_end(&self) -> u64 {
        self.end
            .load(Ordering::Relaxed)
            .saturating_add(self.grain - 1)
            / self.grain
            * self.grain
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.path().display().fmt(f)
    }
}

impl Storage for ImageFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.end.load(Ordering::Relaxed))
    }

    fn get_filename(&self) -> Option<PathBuf> {
        Some(self.file.path().to_owned())
    }

    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        self.check_end(offset, bufv.len())?;
        self.file.read_at(offset, bufv.into_inner()).map(|_| ())
    }

    unsafe fn pure_writev(&self, bufv: IoVector<'_>, offset: u64) -> io::Result<()> {
        self.seal.check(offset, bufv.len())?;
        let end = offset.saturating_add(bufv.len());
        self.file.write_at(offset, bufv.into_inner())?;
        self.grown(end);
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.seal.check(offset, length)?;
        // Not a hole: the image must not run out of storage where it was given some.
        self.file.write_zeroes(offset, length)?;
        let end = offset.saturating_add(length);
        if end > self.end.load(Ordering::Relaxed) {
            self.file.write_at(end - 1, vec![io::IoSlice::new(&[0])])?;
            self.grown(end);
        }
        Ok(())
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.seal.check(offset, length)?;
        self.file.punch_hole(offset, length).map(|_| ())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, new_size: u64, _mode: PreallocateMode) -> io::Result<()> {
        self.file.set_len(new_size)?;
        self.end.store(new_size, Ordering::Relaxed);
        Ok(())
    }
}
