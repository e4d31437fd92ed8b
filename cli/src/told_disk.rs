//! A disk whose host's errors are told to the user too.
//!
//! The guest sees an I/O error and nothing of its cause: a file system of the host that is full, a limit on the size of files, a medium that fails. The
//! first error of each operation is told, and what to do; the others are the guest's business.

use crate::terminal::say;
use doppel_machine::block::BlockBackend;
use doppel_machine::{GuestRam, GuestSlice};
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What a disk can fail at.
#[derive(Clone, Copy)]
enum At {
    Reading,
    Writing,
    Flushing,
}

/// The disk, and what was told of it.
pub struct ToldDisk {
    disk: Arc<dyn BlockBackend>,
    path: PathBuf,
    told: [AtomicBool; 3],
}

impl ToldDisk {
    /// `disk`, which is `path` on the host.
    pub fn new(disk: Arc<dyn BlockBackend>, path: PathBuf) -> Self {
        let told = Default::default();
        ToldDisk { disk, path, told }
    }

    fn tell<T>(&self, at: At, result: io::Result<T>) -> io::Result<T> {
        if let Err(error) = &result {
            self.tell_of(at, error);
        }
        result
    }

    #[cold]
    fn tell_of(&self, at: At, error: &io::Error) {
        // What a guest asks for that no disk has is not the host's fault.
        let mine = [
            ErrorKind::InvalidInput,
            ErrorKind::PermissionDenied,
            ErrorKind::Interrupted,
        ];
        if mine.contains(&error.kind()) || self.told[at as usize].swap(true, Ordering::Relaxed) {
            return;
        }
        let what = match at {
            At::Reading => "be read",
            At::Writing => "be written",
            At::Flushing => "be flushed",
        };
        let advice = match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                "make room there, and it can write again"
            }
            ErrorKind::FileTooLarge => {
                "raise the limit on the size of files (ulimit -f) for the next run"
            }
            _ => "see to the file and what it is on",
        };
        say(&format!(
            "doppel: {} cannot {what} ({error}); the guest sees an I/O error, and what it flushed before is there: {advice}",
            self.path.display()
        ));
    }
}

impl BlockBackend for ToldDisk {
    fn len(&self) -> u64 {
        self.disk.len()
    }

    fn restarts(&self) -> Arc<AtomicU64> {
        self.disk.restarts()
    }

    fn read_only(&self) -> bool {
        self.disk.read_only()
    }

    fn read_at(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        self.tell(At::Reading, self.disk.read_at(offset, into))
    }

    fn write_at(&self, offset: u64, from: &[IoSlice<'_>]) -> io::Result<()> {
        self.tell(At::Writing, self.disk.write_at(offset, from))
    }

    fn read_to_guest(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
        self.tell(At::Reading, self.disk.read_to_guest(offset, into))
    }

    fn try_read_to_guest(&self, offset: u64, into: &[GuestSlice<'_>]) -> Option<io::Result<()>> {
        let result = self.disk.try_read_to_guest(offset, into)?;
        Some(self.tell(At::Reading, result))
    }

    fn write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        self.tell(At::Writing, self.disk.write_from_guest(offset, from))
    }

    fn try_write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> Option<io::Result<()>> {
        let result = self.disk.try_write_from_guest(offset, from)?;
        Some(self.tell(At::Writing, result))
    }

    fn settle(&self) -> io::Result<()> {
        self.tell(At::Flushing, self.disk.settle())
    }

    fn use_memory(&self, ram: Option<&GuestRam>) -> io::Result<()> {
        self.disk.use_memory(ram)
    }

    fn flush(&self) -> io::Result<()> {
        self.tell(At::Flushing, self.disk.flush())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.disk.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let result = self.disk.write_zeroes(offset, len, may_unmap);
        self.tell(At::Writing, result)
    }
}
