//! The code cache: one memfd mapped twice, once to write and once to execute.
//!
//! Problem: translated code must be written and executed, but no mapping may allow both.
//! Idea: two mappings of the same memory; code runs at its address in the executable one, and the translator
//! writes through the other.
//! Invariant: only bytes that the translator emitted stand in the cache; it is filled from the bottom and emptied
//! as a whole when it is full. A displacement is patched with one aligned 4-byte store.
//! Cost: both mappings share the host's page cache; an untouched part costs nothing.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

/// Memory for translated code.
pub(crate) struct CodeCache {
    write: *mut u8,
    execute: *mut u8,
    len: usize,
    used: usize,
    /// The part at the start that survives [`Self::clear`].
    pinned: usize,
}

// SAFETY: the two mappings are owned by this value and only reached through it.
unsafe impl Send for CodeCache {}

impl CodeCache {
    pub fn new(len: usize) -> io::Result<Self> {
        let file = memfd(len)?;
        let write = map(&file, len, libc::PROT_READ | libc::PROT_WRITE)?;
        let execute = map(&file, len, libc::PROT_READ | libc::PROT_EXEC)?;
        Ok(CodeCache {
            write,
            execute,
            len,
            used: 0,
            pinned: 0,
        })
    }

    /// Host address at which the next code will run.
    pub fn cursor(&self) -> u64 {
        self.execute as u64 + self.used as u64
    }

    pub fn used(&self) -> usize {
        self.used
    }

    /// The host addresses that code may run at.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.execute as u64..self.execute as u64 + self.len as u64
    }

    pub fn room(&self) -> usize {
        self.len - self.used
    }

    /// Appends code; returns its host address.
    pub fn append(&mut self, code: &[u8]) -> u64 {
        assert!(code.len() <= self.room());
        let at = self.cursor();
        // SAFETY: in bounds of the writable mapping (asserted); nothing executes there yet.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.write.add(self.used), code.len())
        };
        self.used += code.len();
        at
    }

    /// Keeps what is there now for ever.
    pub fn pin(&mut self) {
        self.pinned = self.used;
    }

    /// Throws away everything that is not pinned.
    pub fn clear(&mut self) {
        self.used = self.pinned;
    }

    /// Sets the displacement that stands at host address `at` so that it leads to `target`.
    pub fn patch(&mut self, at: u64, target: u64) {
        let offset = (at - self.execute as u64) as usize;
        assert!(offset + 4 <= self.used && at.is_multiple_of(4));
        let rel = target.wrapping_sub(at + 4) as i32;
        // SAFETY: in bounds (asserted) and aligned, so that a processor that executes there sees the
        // old or the new displacement, both of which lead to valid code.
        unsafe {
            (*self
                .write
                .add(offset)
                .cast::<std::sync::atomic::AtomicU32>())
            .store(rel as u32, std::sync::atomic::Ordering::Release)
        };
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: we own both mappings, and no code runs in them once their owner goes.
        unsafe {
            libc::munmap(self.write.cast(), self.len);
            libc::munmap(self.execute.cast(), self.len);
        }
    }
}

fn memfd(len: usize) -> io::Result<File> {
    // SAFETY: a valid C string and flags; the returned descriptor is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"doppel-code".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(len as u64)?;
    Ok(file)
}

fn map(file: &File, len: usize, protection: i32) -> io::Result<*mut u8> {
    // SAFETY: a new shared mapping at an address of the kernel's choice touches nothing of ours.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            protection,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    if p == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(p.cast())
    }
}
