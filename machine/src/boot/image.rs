//! Files that are loaded into guest RAM: kernels and initial RAM disks.
//!
//! Nothing in such a file is trusted: every read and every placement is checked. The host reads a file of its own straight into guest
//! RAM, so that its size costs no monitor memory and no second copy; what comes from a disk of the guest is in memory already.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use doppel_memory::{GuestRam, PAGE_SIZE, read_file_at};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::BootError;

/// Threads that copy a file, the caller's counted: with more they wait for one another in the host's kernel.
const THREADS: u64 = 2;
/// Bytes that are worth a thread of their own: half a millisecond.
const SHORTEST_PART: u64 = 2 << 20;
/// Bytes that are asked for and read at a time: they stay in the processor's cache between, and who wants to change the mappings of the
/// process gets its turn.
const STEP: u64 = 512 << 10;

/// Where such a file is.
#[derive(Clone, PartialEq, Eq)]
pub enum BootFile {
    /// On the host.
    Host(PathBuf),
    /// In memory, with a name for messages.
    Memory(PathBuf, Vec<u8>),
}

impl Default for BootFile {
    fn default() -> Self {
        BootFile::Host(PathBuf::new())
    }
}

impl<P: Into<PathBuf>> From<P> for BootFile {
    fn from(path: P) -> Self {
        BootFile::Host(path.into())
    }
}

/// An open file of known size.
pub struct Image<'a> {
    content: Content<'a>,
    path: PathBuf,
    len: u64,
}

enum Content<'a> {
    File(File),
    Bytes(&'a [u8]),
}

impl<'a> Image<'a> {
    /// Opens a file for reading.
    pub fn open(file: &'a BootFile) -> Result<Self, BootError> {
        match file {
            BootFile::Host(path) => Image::open_host(path),
            BootFile::Memory(name, bytes) => Ok(Image {
                content: Content::Bytes(bytes),
                path: name.clone(),
                len: bytes.len() as u64,
            }),
        }
    }

    /// Opens a regular file of the host.
    fn open_host(path: &Path) -> Result<Self, BootError> {
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
            content: Content::File(file),
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
        let file = match &self.content {
            Content::File(file) => file,
            Content::Bytes(bytes) => {
                out.copy_from_slice(&bytes[offset as usize..][..out.len()]);
                return Ok(());
            }
        };
        file.read_exact_at(out, offset)
            .map_err(|source| match source.kind() {
                // The file became shorter since it was opened.
                io::ErrorKind::UnexpectedEof => self.truncated(),
                _ => self.io_error(source),
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
        let end = gpa.saturating_add(len);
        if !(ram.ranges().iter()).any(|r| r.start <= gpa && end <= r.end) {
            return Err(BootError::NoRam(gpa));
        }
        let file = match &self.content {
            Content::File(file) => file,
            Content::Bytes(bytes) => {
                return place(ram, gpa, &bytes[offset as usize..][..len as usize]);
            }
        };
        let copy = |part: Range<u64>| {
            steps(&part, STEP).try_for_each(|step| {
                let (from, to) = (offset + step.start, gpa + step.start);
                self.copy_step(file, from, ram, to, step.end - step.start)
            })
        };
        let part = len
            .div_ceil(THREADS)
            .next_multiple_of(PAGE_SIZE)
            .max(SHORTEST_PART);
        let mut parts = steps(&(0..len), part);
        let own = parts.next();
        thread::scope(|scope| {
            let copies = parts.map(|part| {
                let copy = thread::Builder::new().spawn_scoped(scope, move || copy(part));
                copy.map_err(|e| self.io_error(e))
            });
            let copies = copies.collect::<Result<Vec<_>, _>>()?;
            own.map_or(Ok(()), copy)?;
            let copied = copies.into_iter().map(|copy| match copy.join() {
                Ok(copied) => copied,
                Err(panic) => resume_unwind(panic),
            });
            copied.collect()
        })
    }

    fn copy_step(
        &self,
        file: &File,
        offset: u64,
        ram: &GuestRam,
        gpa: u64,
        len: u64,
    ) -> Result<(), BootError> {
        ram.populate(gpa, len);
        let slices = (ram.view()).get_slices(GuestAddress(gpa), len as usize, Permissions::Write);
        let into = slices
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|_| BootError::NoRam(gpa))?;
        match read_file_at(file.as_fd(), offset, &into, false) {
            Ok(n) if n == len => Ok(()),
            // The file became shorter since it was opened.
            Ok(_) => Err(self.truncated()),
            Err(e) => Err(self.io_error(e)),
        }
    }

    fn io_error(&self, source: io::Error) -> BootError {
        BootError::Io {
            path: self.path.clone(),
            source,
        }
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

/// A range in steps of so many bytes.
fn steps(range: &Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> + use<> {
    let Range { start, end } = *range;
    let begin = (start..end).step_by(step as usize);
    begin.map(move |begin| begin..end.min(begin + step))
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
