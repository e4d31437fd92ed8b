//! The mapping behind a window.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;

use crate::mapping_unsafe::reserve;

/// A reservation of address space into which pieces of a file are mapped, to be read, or to be written too.
#[derive(Debug)]
pub(crate) struct View {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: the mapping belongs to this value alone, which gives no reference into it away.
unsafe impl Send for View {}
// SAFETY: as for Send; what `&self` does are system calls.
unsafe impl Sync for View {}

impl View {
    pub fn new(len: usize) -> io::Result<Self> {
        let base = reserve(len)?;
        Ok(View { base, len })
    }

    /// Maps the bytes of the file from `offset` on to this range, to be read.
    pub fn map(&self, file: &File, range: Range<u64>, offset: u64) -> io::Result<()> {
        assert!(range.start <= range.end && range.end <= self.len as u64);
        // SAFETY: the target lies inside our own reservation (asserted), so MAP_FIXED replaces nothing but it.
        let p = unsafe {
            libc::mmap(
                self.base.as_ptr().add(range.start as usize).cast(),
                (range.end - range.start) as usize,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset as i64,
            )
        };
        match p == libc::MAP_FAILED {
            true => Err(io::Error::last_os_error()),
            false => Ok(()),
        }
    }

    /// Has a range of what is mapped be written to, or only read; false where the host does not do so.
    pub fn protect(&self, at: u64, len: u64, writable: bool) -> bool {
        assert!(at + len <= self.len as u64);
        let write = if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: the range lies inside our own reservation (asserted), into which no Rust reference exists.
        let done = unsafe {
            let from = self.base.as_ptr().add(at as usize).cast();
            libc::mprotect(from, len as usize, libc::PROT_READ | write)
        };
        done == 0
    }

    pub fn base(&self) -> u64 {
        self.base.as_ptr() as u64
    }
}

impl Drop for View {
    fn drop(&mut self) {
        // SAFETY: we own the reservation, and nothing borrowed from it outlives us.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
