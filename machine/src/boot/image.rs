//! Files that are loaded into guest RAM: kernels and initial RAM disks.
//!
//! Nothing in such a file is trusted: every read and every placement is checked, and a file is copied
//! piece by piece, so that its size costs no monitor memory.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use doppel_memory::{GuestRam, PAGE_MASK, PAGE_SIZE};

use super::BootError;

/// An open file of known size.
#[derive(Debug)]
pub struct Image {
    file: File,
    path: PathBuf,
    len: u64,
}

impl Image {
    /// Opens a regular file for reading.
    pub fn open(path: &Path) -> Result<Self, BootError> {
        let io_error = |source| BootError::Io {
            path: path.to_owned(),
            source,
        };
        // Without O_NONBLOCK, opening a FIFO waits for a writer.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(io_error)?;
        let meta = file.metadata().map_err(io_error)?;
        if !meta.is_file() {
            return Err(BootError::NotAFile(path.to_owned()));
        }
        Ok(Image {
            file,
            path: path.to_owned(),
            len: meta.len(),
        })
    }

    /// Bytes in the file when it was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), BootError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(self.truncated()),
        }
    }

    /// Fills `out` from `offset`.
    pub fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<(), BootError> {
        self.check(offset, out.len() as u64)?;
        self.file
            .read_exact_at(out, offset)
            .map_err(|source| match source.kind() {
                // The file became shorter since it was opened.
                io::ErrorKind::UnexpectedEof => self.truncated(),
                _ => BootError::Io {
                    path: self.path.clone(),
                    source,
                },
            })
    }

    /// Copies `len` bytes at `offset` to guest physical address `gpa`.
    pub fn copy_to(
        &self,
        ram: &GuestRam,
        offset: u64,
        gpa: u64,
        len: u64,
    ) -> Result<(), BootError> {
        self.check(offset, len)?;
        let mut page = [0; PAGE_SIZE as usize];
        let mut done = 0;
        while done < len {
            let at = gpa.saturating_add(done);
            let n = (PAGE_SIZE - (at & PAGE_MASK)).min(len - done) as usize;
            self.read_at(offset + done, &mut page[..n])?;
            place(ram, at, &page[..n])?;
            done += n as u64;
        }
        Ok(())
    }

    /// The error for a file that ends too early.
    pub fn truncated(&self) -> BootError {
        BootError::Truncated(self.path.clone())
    }

    /// The error for a file whose content makes no sense.
    pub fn damaged(&self, what: &'static str) -> BootError {
        BootError::Damaged {
            path: self.path.clone(),
            what,
        }
    }
}

/// Copies bytes into guest RAM, however many pages they cover.
pub fn place(ram: &GuestRam, gpa: u64, bytes: &[u8]) -> Result<(), BootError> {
    let mut at = gpa;
    let mut rest = bytes;
    while !rest.is_empty() {
        let to = ram.ptr(at).ok_or(BootError::NoRam(at))?;
        let (now, later) = rest.split_at(rest.len().min(to.room()));
        to.write(now);
        ram.tracker().mark_dirty(at);
        at = at.saturating_add(now.len() as u64);
        rest = later;
    }
    Ok(())
}
