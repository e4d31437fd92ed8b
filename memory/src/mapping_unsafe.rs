//! The host mapping behind guest RAM, made so that `host = base + guest physical`.
//!
//! Problem: a guest touches most of its memory once soon after it starts, and each first touch of a page is a page fault of the
//! host, which costs more than the page.
//! Idea: anonymous memory, whose faults are cheaper than a file's, and [`Mapping::populate`], by which `GuestRam` has the host give
//! pages in small batches. Where the host gives pages of 2 MiB at a good price, [`Backing::HugePages`] saves nearly all faults, and
//! misses of the host's TLB besides. A memfd can be mapped by other processes.
//! Cost: a batch of which the guest touches one page only costs all of them (docs/machine.md has figures).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::dma::DmaBitmap;
use crate::{Backing, GuestView, HostPtr, PageTracker};

const HUGE_PAGE: usize = 2 << 20;
const NAME: &std::ffi::CStr = c"doppel-guest-ram";

/// A reservation of address space with pieces of memory mapped into it.
///
/// Only what is touched costs memory: the mappings are `MAP_NORESERVE`.
#[derive(Debug)]
pub(crate) struct Mapping {
    /// Of a huge page.
    base: NonNull<u8>,
    len: usize,
    /// What is unmapped in the end.
    reserved: (NonNull<u8>, usize),
    backing: Backing,
    file: Option<File>,
}

// SAFETY: the mapping is plain shared memory owned by this value; all access goes through
// volatile or atomic operations in `access_unsafe`, which are sound from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as for Send.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Reserves `len` bytes and maps fresh memory at each `(offset, size)` piece; in a file, pieces follow one another.
    pub fn new(len: usize, pieces: &[(usize, usize)], backing: Backing) -> io::Result<Self> {
        let file = match backing {
            Backing::Anonymous | Backing::HugePages => None,
            Backing::Memfd => Some(memfd(total(pieces))?),
        };
        Self::with(len, pieces, backing, file)
    }

    /// The same with the pieces of a memfd that is there.
    pub fn of_file(len: usize, pieces: &[(usize, usize)], file: File) -> io::Result<Self> {
        if file.metadata()?.len() < total(pieces) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Self::with(len, pieces, Backing::Memfd, Some(file))
    }

    fn with(
        len: usize,
        pieces: &[(usize, usize)],
        backing: Backing,
        file: Option<File>,
    ) -> io::Result<Self> {
        let reserved = (reserve(len + HUGE_PAGE)?, len + HUGE_PAGE);
        let skip = reserved.0.as_ptr().align_offset(HUGE_PAGE);
        assert!(skip < HUGE_PAGE);
        // SAFETY: the sum lies inside the reservation, which is longer than `skip`.
        let base = unsafe { reserved.0.add(skip) };
        let mapping = Mapping {
            base,
            len,
            reserved,
            backing,
            file,
        };
        let mut offset_in_file = 0;
        for &(at, size) in pieces {
            mapping.map_piece(at, size, offset_in_file)?;
            offset_in_file += size as i64;
        }
        Ok(mapping)
    }

    fn map_piece(&self, at: usize, size: usize, file_offset: i64) -> io::Result<()> {
        assert!(at + size <= self.len);
        let (kind, fd, offset) = match &self.file {
            Some(file) => (libc::MAP_SHARED, file.as_raw_fd(), file_offset),
            None => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0),
        };
        // SAFETY: the target range lies inside our own reservation (asserted), so MAP_FIXED
        // replaces nothing but it.
        let p = unsafe {
            libc::mmap(
                self.base.as_ptr().add(at).cast(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                kind | libc::MAP_FIXED | libc::MAP_NORESERVE,
                fd,
                offset,
            )
        };
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        advise(p, size, self.backing);
        Ok(())
    }

    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// Has the host give the memory of a range now, which changes nothing else. A host that does not know how gives each page when it
    /// is touched.
    pub fn populate(&self, offset: usize, len: usize) {
        assert!(offset + len <= self.len);
        // SAFETY: in bounds of the reservation (asserted), whose content stays as it is.
        unsafe {
            libc::madvise(
                self.base.as_ptr().add(offset).cast(),
                len,
                libc::MADV_POPULATE_WRITE,
            )
        };
    }

    /// Gives the memory of whole pages back to the host; they read as zeros from then on.
    pub fn discard(&self, offset: usize, len: usize) -> io::Result<()> {
        assert!(offset + len <= self.len);
        let advice = match self.backing {
            Backing::Anonymous | Backing::HugePages => libc::MADV_DONTNEED,
            // DONTNEED would leave it in the file, for all that map it.
            Backing::Memfd => libc::MADV_REMOVE,
        };
        // SAFETY: in bounds of the reservation (asserted). The content changes to zeros, as it may by any store of the guest; no Rust
        // reference to guest memory exists.
        let done = unsafe { libc::madvise(self.base.as_ptr().add(offset).cast(), len, advice) };
        match done {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
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

    pub fn file(&self) -> Option<&File> {
        self.file.as_ref()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: we own the reservation and nothing borrowed from it outlives us.
        unsafe { libc::munmap(self.reserved.0.as_ptr().cast(), self.reserved.1) };
    }
}

/// Says what the host should know of a piece. A host that cannot heed some of it goes on without.
fn advise(at: *mut libc::c_void, size: usize, backing: Backing) {
    let huge = match backing {
        Backing::HugePages => libc::MADV_HUGEPAGE,
        _ => libc::MADV_NOHUGEPAGE,
    };
    // SAFETY: advice about a mapping that was just made and holds nothing yet; none of it changes what the memory reads as.
    unsafe {
        libc::madvise(at, size, huge);
        // A name in /proc/PID/smaps; a memfd has its own.
        libc::prctl(
            libc::PR_SET_VMA,
            libc::PR_SET_VMA_ANON_NAME,
            at,
            size,
            NAME.as_ptr(),
        );
    }
}

fn total(pieces: &[(usize, usize)]) -> u64 {
    pieces.iter().map(|piece| piece.1 as u64).sum()
}

fn memfd(size: u64) -> io::Result<File> {
    // SAFETY: a valid C string and flags; the returned descriptor is ours alone.
    let file = unsafe {
        let fd = libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    file.set_len(size)?;
    Ok(file)
}

pub(crate) fn reserve(len: usize) -> io::Result<NonNull<u8>> {
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

/// Wraps pieces of the mapping as `vm-memory` regions, for the crates of that family: `(guest address, offset in the mapping, size)`
/// each. The regions keep the mapping alive, and `tracker` hears of every write through them.
pub(crate) fn vm_memory_view(
    mapping: &Arc<Mapping>,
    pieces: &[(u64, usize, usize)],
    tracker: &Arc<PageTracker>,
) -> Result<GuestView, String> {
    let mut regions = Vec::new();
    for &(guest, offset, size) in pieces {
        assert!(offset + size <= mapping.len);
        let bitmap = DmaBitmap {
            tracker: tracker.clone(),
            start: guest,
            _mapping: mapping.clone(),
        };
        let region = vm_memory::mmap::MmapRegionBuilder::new_with_bitmap(size, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_NORESERVE);
        // SAFETY: the range lies inside the mapping (asserted), which is readable and writable there, and lives as long as
        // the region, which owns the bitmap.
        let region = unsafe { region.with_raw_mmap_pointer(mapping.base.as_ptr().add(offset)) };
        let region = region.build().map_err(|e| e.to_string())?;
        regions.push(
            vm_memory::GuestRegionMmap::new(region, vm_memory::GuestAddress(guest))
                .ok_or("a region of guest RAM wraps around the address space")?,
        );
    }
    GuestView::from_regions(regions).map_err(|e| e.to_string())
}
