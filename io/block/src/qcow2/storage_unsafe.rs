//! A host file as the crate `imago` wants it.
//!
//! The crate has a driver for files of its own, but that one locks out all other requests during a sync, and reads beyond the end of a
//! file as zeros, so that a truncated image would lose data silently. Here a read that starts beyond the cluster that the file ends in
//! is an error (`qemu-img check` calls such an image corrupt too).

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
use crate::qcow2::gate::{Gate, Write};

/// The file of an image.
#[derive(Debug)]
pub(crate) struct ImageFile {
    file: Arc<HostFile>,
    /// Where it ends by now; it only grows.
    end: AtomicU64,
    /// Reads may go beyond the end up to a multiple of this.
    grain: u64,
    gate: Gate,
    helper: CommonStorageHelper,
}

impl ImageFile {
    /// `grain` is the cluster size of the image, or 512 for raw ones.
    pub fn new(file: Arc<HostFile>, grain: u64) -> ImageFile {
        ImageFile {
            end: AtomicU64::new(file.len()),
            file,
            grain,
            gate: Gate::default(),
            helper: CommonStorageHelper::default(),
        }
    }

    /// What decides about writes to header and tables.
    pub(super) fn gate(&self) -> Gate {
        self.gate.clone()
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
        self.gate.ask(offset, guest_len(from))?;
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

/// A few bytes in one piece.
fn whole(bytes: IoVector<'_>) -> Vec<u8> {
    let pieces = bytes.into_inner();
    pieces
        .iter()
        .flat_map(|piece| piece.iter().copied())
        .collect()
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
        match self.gate.ask(offset, bufv.len())? {
            Write::Now => {}
            Write::Later => {
                self.gate.hold(offset, &whole(bufv));
                return Ok(());
            }
            Write::OfHeader => {
                let head = whole(bufv);
                self.gate.follow_header(&head);
                return self.file.write_at(offset, vec![io::IoSlice::new(&head)]);
            }
        }
        let end = offset.saturating_add(bufv.len());
        self.file.write_at(offset, bufv.into_inner())?;
        self.grown(end);
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.gate.ask(offset, length)?;
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
        self.gate.ask(offset, length)?;
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
