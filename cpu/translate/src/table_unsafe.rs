//! An array that grows at its end, in memory of its own, and never moves.
//!
//! Problem: tables of translations grow to megabytes and are emptied at once. A vector is copied whenever it is full, and what it leaves behind
//! in the heap fits nothing else; what is freed in the middle of the heap the host does not get back.
//! Idea: each table has addresses for the most that it may ever hold. The host gives memory as it grows, and has all of it back when it is emptied.
//! A page of a file without bytes lies before each, whose name tells in /proc/PID/smaps what is behind it (`doppel-records`).
//! Invariant: the first `len` entries were written; they are no more than `capacity`, which are those that fit
//! in the first `given` bytes of the reservation; these may be read and written.
//! Cost: a system call for every 32 KiB, in place of eight page faults, and less than that of memory that is not used yet.

use std::alloc::{Layout, handle_alloc_error};
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::{NonNull, null_mut};

/// So many bytes are asked of the host at a time.
const BATCH: usize = 32 << 10;
/// So many are made accessible at a time.
const STRETCH: usize = 1 << 20;
/// Bytes of the page that has the name.
pub(crate) const NAMED: usize = 4096;

pub(crate) struct Table<T> {
    at: NonNull<T>,
    len: usize,
    /// Entries that there is memory for.
    capacity: usize,
    /// Bytes that the host was asked for.
    given: usize,
    /// Bytes that may be accessed.
    accessible: usize,
    /// Bytes of addresses, that page not counted.
    reserved: usize,
}

// SAFETY: the memory belongs to the table alone and is only reached through it.
unsafe impl<T: Send> Send for Table<T> {}
// SAFETY: as for Send: a shared table gives out nothing but shared entries.
unsafe impl<T: Sync> Sync for Table<T> {}

impl<T: Copy> Table<T> {
    /// For entries of so many bytes in all, at least.
    pub fn new(most: usize) -> io::Result<Self> {
        const { assert!(size_of::<T>() > 0 && align_of::<T>() <= 4096) };
        let reserved = most.max(1).next_multiple_of(STRETCH);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let (none, len) = (libc::PROT_NONE, NAMED + reserved);
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
        let begin = unsafe { libc::mmap(null_mut(), len, none, flags, -1, 0) };
        if begin == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: within the reservation, which is not at address 0.
        let at = unsafe { NonNull::new_unchecked(begin.cast::<u8>().add(NAMED)) };
        let table = Table {
            at: at.cast(),
            len: 0,
            capacity: 0,
            given: 0,
            accessible: 0,
            reserved,
        };
        // SAFETY: the first page of the reservation, which the table does not use.
        unsafe { name_page(begin.cast())? };
        Ok(table)
    }

    /// Bytes of its entries.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// Bytes that it takes of the host's memory.
    pub fn memory(&self) -> usize {
        self.given
    }

    pub fn push(&mut self, entry: T) {
        if self.len == self.capacity {
            self.grow();
        }
        // SAFETY: within the bytes that may be written, behind all entries.
        unsafe { self.at.add(self.len).write(entry) };
        self.len += 1;
    }

    /// Has the host give memory for one entry more and to the end of its batch.
    #[cold]
    fn grow(&mut self) {
        let end = self.bytes() + size_of::<T>();
        let given = end.next_multiple_of(BATCH);
        assert!(given <= self.reserved, "a table is larger than its cache");
        let base: *mut u8 = self.at.as_ptr().cast();
        while given > self.accessible {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: within the reservation, behind all that is in use.
            let done = unsafe { libc::mprotect(base.add(self.accessible).cast(), STRETCH, access) };
            if done != 0 {
                handle_alloc_error(Layout::new::<[u8; STRETCH]>());
            }
            self.accessible += STRETCH;
        }
        // SAFETY: the same. Where the host does not know how, the pages come when they are written.
        unsafe {
            let len = given - self.given;
            libc::madvise(base.add(self.given).cast(), len, libc::MADV_POPULATE_WRITE);
        }
        self.given = given;
        self.capacity = given / size_of::<T>();
    }

    /// Forgets all entries; the host has their memory back.
    pub fn clear(&mut self) {
        self.len = 0;
        // SAFETY: no entry is there any more, and the next are written before they are read.
        unsafe { libc::madvise(self.at.as_ptr().cast(), self.given, libc::MADV_DONTNEED) };
        (self.given, self.capacity) = (0, 0);
    }

    /// The first number in `range` whose entry does not have a property that entries have up to some number; else its end.
    pub fn partition_point(&self, range: Range<usize>, has: impl FnMut(&T) -> bool) -> usize {
        range.start + self[range].partition_point(has)
    }
}

/// Has the page at `at` tell that records lie behind it. It cannot be accessed any more.
///
/// # Safety
/// The page is mapped, and nobody uses it.
pub(crate) unsafe fn name_page(at: *mut u8) -> io::Result<()> {
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    // SAFETY: a valid C string and flags, and a descriptor that is ours alone; the page is nobody's, as the caller promises.
    let named = unsafe {
        let file = match libc::memfd_create(c"doppel-records".as_ptr(), libc::MFD_CLOEXEC) {
            -1 => return Err(io::Error::last_os_error()),
            fd => File::from_raw_fd(fd),
        };
        let fd = file.as_raw_fd();
        libc::mmap(at.cast(), NAMED, libc::PROT_NONE, flags, fd, 0)
    };
    match named {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

impl<T> Drop for Table<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, and nobody has it any more; entries need no drop, since they can be copied.
        unsafe {
            let at = self.at.as_ptr().cast::<u8>().sub(NAMED);
            libc::munmap(at.cast(), NAMED + self.reserved);
        }
    }
}

impl<T> Deref for Table<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: so many entries were written.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Table<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: so many entries were written, and they belong to the table alone.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.len) }
    }
}

impl<T: Copy> Extend<T> for Table<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, entries: I) {
        entries.into_iter().for_each(|entry| self.push(entry));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of a table that are in memory (proc(5), pagemap).
    fn resident(table: &Table<u64>) -> usize {
        let mut pages = vec![0u8; table.reserved / 4096];
        // SAFETY: a byte a page of the reservation is written to `pages`.
        let done = unsafe {
            let at = table.at.as_ptr().cast();
            libc::mincore(at, table.reserved, pages.as_mut_ptr())
        };
        assert_eq!(done, 0);
        pages.iter().filter(|page| **page & 1 != 0).count()
    }

    #[test]
    fn entries_are_found_by_number_and_stay_where_they_are() {
        let len = 3 * STRETCH / 8 + 7;
        let mut table = Table::new(8 * len).unwrap();
        table.push(0);
        let at = std::ptr::from_ref(&table[0]);
        table.extend(1..len as u64);
        assert!(std::ptr::eq(at, &table[0]));
        assert_eq!((table.len(), table.bytes()), (len, 8 * len));
        assert!((0..len).all(|n| table[n] == n as u64));
        assert_eq!(table.get(len), None);
        for bound in [0, 1, len / 3, len] {
            let point = table.partition_point(0..len, |n| *n < bound as u64);
            assert_eq!(point, bound);
            let point = table.partition_point(len / 2..len, |n| *n < bound as u64);
            assert_eq!(point, bound.clamp(len / 2, len));
        }
    }

    #[test]
    fn it_takes_what_it_holds_and_gives_it_back() {
        let mut table = Table::new(4 * STRETCH).unwrap();
        assert_eq!((table.memory(), resident(&table)), (0, 0));
        for _ in 0..2 {
            table.extend(0..(STRETCH / 8) as u64 + 1);
            assert_eq!(table.memory(), STRETCH + BATCH);
            assert!(resident(&table) <= (STRETCH + BATCH) / 4096);
            assert!(resident(&table) > STRETCH / 4096);
            table.clear();
            assert_eq!((table.len(), resident(&table)), (0, 0));
        }
    }

    #[test]
    #[should_panic = "larger than its cache"]
    fn it_does_not_grow_beyond_its_reservation() {
        let mut table = Table::new(1).unwrap();
        table.extend(0..=(STRETCH / 8) as u64);
    }
}
