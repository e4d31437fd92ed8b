//! The host mapping behind guest RAM: one memfd, mapped so that `host = base + guest physical`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;

use crate::HostPtr;

/// A reservation of address space with pieces of one memfd mapped into it.
///
/// Only touched pages cost memory: the memfd is sparse and the mapping `MAP_NORESERVE`.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    file: File,
}

// SAFETY: the mapping is plain shared memory owned by this value; all access goes through
// volatile or atomic operations in `access_unsafe`, which are sound from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `len` bytes and maps each `(offset, size)` piece of a fresh memfd at its place;
    /// pieces follow one another in the file.
    pub fn new(len: usize, pieces: &[(usize, usize)]) -> io::Result<Self> {
        let file = memfd(pieces.iter().map(|p| p.1 as u64).sum())?;
        let base = reserve(len)?;
        let mapping = Mapping { base, len, file };
        let mut offset_in_file = 0;
        for &(at, size) in pieces {
            mapping.map_piece(at, size, offset_in_file)?;
            offset_in_file += size as i64;
        }
        Ok(mapping)
    }

    fn map_piece(&self, at: usize, size: usize, file_offset: i64) -> io::Result<()> {
        assert!(at + size <= self.len);
        // SAFETY: the target range lies inside our own reservation (asserted), so MAP_FIXED
        // replaces nothing but it.
        let p = unsafe {
            libc::mmap(
                self.base.as_ptr().add(at).cast(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                self.file.as_raw_fd(),
                file_offset,
            )
        };
        if p == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(())
        }
    }

    pub fn base(&self) -> NonNull<u8> {
        self.base
    }

    /// A pointer `offset` into the mapping; the caller names a range that is RAM.
    #[inline]
    pub fn host_ptr(&self, offset: usize, room: usize) -> HostPtr {
        assert!(offset + room <= self.len);
        // SAFETY: in bounds of the reservation (asserted); `GuestRam` asks only for mapped pieces.
        unsafe { HostPtr::new(self.base.add(offset), room) }
    }

    pub fn file(&self) -> &File {
        &self.file
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: we own the reservation and nothing borrowed from it outlives us.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

fn memfd(size: u64) -> io::Result<File> {
    // SAFETY: a valid C string and flags; the returned descriptor is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(c"doppel-guest-ram".as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(size)?;
    Ok(file)
}

fn reserve(len: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: an anonymous mapping at an address of the kernel's choice touches nothing of ours.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_NONE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if p == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    NonNull::new(p.cast()).ok_or_else(|| io::Error::other("mmap returned null"))
}

/// Wraps pieces of the mapping as `vm-memory` regions, for the crates of that family.
///
/// `(guest address, offset in the mapping, size)` each; the caller keeps `mapping` alive longer.
pub(crate) fn vm_memory_view(
    mapping: &Mapping,
    pieces: &[(u64, usize, usize)],
) -> Result<vm_memory::GuestMemoryMmap, String> {
    let mut regions = Vec::new();
    for &(guest, offset, size) in pieces {
        assert!(offset + size <= mapping.len);
        // SAFETY: the range lies inside the mapping (asserted), which is readable and writable
        // there, and `GuestRam` drops the view before the mapping (field order).
        let region = unsafe {
            vm_memory::MmapRegion::build_raw(
                mapping.base.as_ptr().add(offset),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
            )
        }
        .map_err(|e| e.to_string())?;
        regions.push(
            vm_memory::GuestRegionMmap::new(region, vm_memory::GuestAddress(guest))
                .ok_or("a region of guest RAM wraps around the address space")?,
        );
    }
    vm_memory::GuestMemoryMmap::from_regions(regions).map_err(|e| e.to_string())
}
