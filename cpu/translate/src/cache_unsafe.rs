//! The code cache: one memfd mapped twice, once to write and once to execute.
//!
//! Problem: translated code must be written and executed, but no mapping may allow both.
//! Idea: two mappings of the same memory; code runs at its address in the executable one, and the translator
//! writes through the other.
//! Invariant: only bytes that the translator emitted stand in the cache; it is filled from the bottom and emptied
//! as a whole when it is full. A displacement that several threads execute is patched by one store within eight aligned bytes
//! (`Asm::align_link`), so that nobody fetches half of it; where one thread translates, patches and executes, it may stand anywhere.
//! Behind the executable mapping lies the table of *forms*, ordinary data that cannot be executed: by the number of an access, where
//! its translation for two pages begins. All threads read it, so it never moves.
//! Cost: both mappings share the host's page cache; a part beyond the code costs nothing, but for at most two batches.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::huge_unsafe::{HUGE_PAGE, HugePages};
use crate::mirror_unsafe::mirrored;

/// Memory for translated code.
pub(crate) struct CodeCache {
    write: *mut u8,
    execute: *mut u8,
    /// What the executable mapping and the table of forms lie in.
    reserved: (*mut u8, usize),
    /// Where the host is asked for huge pages.
    huge: Option<HugePages>,
    /// Those that it gave.
    pub huge_pages: u64,
    len: usize,
    used: usize,
    slots_used: usize,
    forms_used: usize,
    /// The accesses that have forms.
    formed: Vec<u32>,
    /// So much of both mappings has memory; whole batches, so whole pages.
    populated: usize,
    /// The part at the start that survives [`Self::clear`].
    pinned: usize,
}

// SAFETY: the two mappings are owned by this value and only reached through it.
unsafe impl Send for CodeCache {}

impl CodeCache {
    /// With `for_perf`, memory that perf takes for anonymous.
    pub fn new(len: usize, for_perf: bool, huge: bool) -> io::Result<Self> {
        let (execute, reserved) = reserve_aligned(len + forms_len(len))?;
        let write = match for_perf {
            true => mirrored(execute, len)?,
            false => map_twice(execute, len)?,
        };
        let data = libc::PROT_READ | libc::PROT_WRITE;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: within the reservation.
        let forms = unsafe { execute.add(len) };
        map_at(forms, forms_len(len), data, private, -1)?;
        Ok(CodeCache {
            write,
            execute,
            reserved,
            huge: huge.then(|| HugePages::new(write, execute)),
            huge_pages: 0,
            len,
            used: 0,
            slots_used: 0,
            forms_used: 0,
            formed: Vec::new(),
            populated: 0,
            pinned: 0,
        })
    }

    /// Host address at which the next code will run.
    pub fn cursor(&self) -> u64 {
        self.execute as u64 + self.used as u64
    }

    /// Bytes that there are in all.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn used(&self) -> usize {
        self.used
    }

    /// The host addresses that code may run at.
    pub fn range(&self) -> std::ops::Range<u64> {
        self.execute as u64..self.execute as u64 + self.len as u64
    }

    /// Bytes that are left, counting the slots and forms that go with them.
    pub fn room(&self) -> usize {
        let slots = slots(self.len) - self.slots_used;
        let forms = forms_len(self.len) / 8 - self.forms_used;
        let room = (self.len - self.used).min(slots * BYTES_A_SLOT);
        room.min(forms * BYTES_A_FORM)
    }

    /// Slots that are taken.
    pub fn slots_used(&self) -> usize {
        self.slots_used
    }

    /// Takes the next slots, and the next forms.
    pub fn take(&mut self, slots_taken: usize, forms_taken: usize) {
        self.slots_used += slots_taken;
        self.forms_used += forms_taken;
        assert!(self.slots_used <= slots(self.len) && 8 * self.forms_used <= forms_len(self.len));
    }

    fn form(&self, n: usize) -> &AtomicU64 {
        assert!(n < self.forms_used);
        // SAFETY: in bounds of the table (asserted in `take`) and aligned, since the code is whole pages; everybody, translated code
        // too, accesses it atomically.
        unsafe { &*self.execute.add(self.len).cast::<AtomicU64>().add(n) }
    }

    /// Address of the table of forms.
    pub fn forms(&self) -> u64 {
        self.execute as u64 + self.len as u64
    }

    /// Lets the form of an access begin at host address `at`; 0 where it has none.
    pub fn set_form(&mut self, access: u32, at: u64) {
        assert!(at == 0 || self.range().contains(&at));
        if self.form(access as usize).swap(at, Ordering::AcqRel) == 0 {
            self.formed.push(access);
        }
    }

    /// Bytes of the table of forms that may be in use.
    pub fn form_bytes(&self) -> usize {
        8 * self.forms_used
    }

    /// No access has a form any more.
    pub fn clear_forms(&mut self) {
        for n in std::mem::take(&mut self.formed) {
            self.form(n as usize).store(0, Ordering::Release);
        }
    }

    /// Has the host give both mappings their memory up to some way beyond `end`, so that it need not page by page.
    fn populate(&mut self, end: usize) {
        while end > self.populated && self.populate_huge() {}
        if end > self.populated {
            let to = (end.next_multiple_of(BATCH) + BATCH).min(self.len);
            self.populate_to(to);
        }
        let next = self.populated;
        if let Some(huge) = &mut self.huge
            && end + HUGE_PAGE / 2 > next
            && next.is_multiple_of(HUGE_PAGE)
            && next + HUGE_PAGE <= self.len
        {
            huge.ask(next);
        }
    }

    /// The same with one huge page, if the host has one.
    fn populate_huge(&mut self) -> bool {
        let at = self.populated;
        if !at.is_multiple_of(HUGE_PAGE) || at + HUGE_PAGE > self.len {
            return false;
        }
        let made = self.huge.as_mut().is_some_and(|huge| huge.take(at));
        if made {
            self.huge_pages += 1;
            self.populated += HUGE_PAGE;
        }
        made
    }

    fn populate_to(&mut self, to: usize) {
        for (mapping, advice) in [
            (self.write, libc::MADV_POPULATE_WRITE),
            (self.execute, libc::MADV_POPULATE_READ),
        ] {
            // SAFETY: within the mapping, whose content stays as it is. Where the host does not know how, nothing happens.
            unsafe {
                let at = mapping.add(self.populated).cast();
                libc::madvise(at, to - self.populated, advice);
            }
        }
        self.populated = to;
    }

    /// Appends code; returns its host address.
    pub fn append(&mut self, code: &[u8]) -> u64 {
        assert!(code.len() <= self.room());
        self.populate(self.used + code.len());
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
        self.clear_forms();
        // SAFETY: within the reservation; a page that is read again is all zeros, as it is now.
        unsafe {
            libc::madvise(
                self.forms() as *mut _,
                self.form_bytes(),
                libc::MADV_DONTNEED,
            )
        };
        self.used = self.pinned;
        self.slots_used = 0;
        self.forms_used = 0;
    }

    /// Where the displacement that stands at host address `at` leads.
    pub fn target(&self, at: u64) -> u64 {
        let offset = (at - self.execute as u64) as usize;
        assert!(offset + 4 <= self.used);
        // SAFETY: in bounds (asserted); only `patch` writes there, on this thread.
        let rel = unsafe { self.write.add(offset).cast::<u32>().read_unaligned() };
        (at + 4).wrapping_add_signed(i64::from(rel as i32))
    }

    /// Sets the displacement that stands at host address `at` so that it leads to `target`.
    pub fn patch(&mut self, at: u64, target: u64) {
        let offset = (at - self.execute as u64) as usize;
        assert!(offset + 4 <= self.used);
        let rel = target.wrapping_sub(at + 4) as i32;
        if offset % 8 > 4 {
            // SAFETY: in bounds (asserted). Nobody else executes it: see the invariant.
            unsafe {
                self.write
                    .add(offset)
                    .cast::<u32>()
                    .write_unaligned(rel as u32)
            };
            return;
        }
        let shift = 8 * (offset % 8);
        // SAFETY: in bounds, for the length is a multiple of 8, and aligned. Only the owner of this value writes there.
        let around = unsafe { &*self.write.add(offset - offset % 8).cast::<AtomicU64>() };
        let others = around.load(Ordering::Relaxed) & !(u64::from(u32::MAX) << shift);
        around.store(others | u64::from(rel as u32) << shift, Ordering::Release);
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // Its thread works in the mappings.
        self.huge = None;
        // SAFETY: we own both mappings, and no code runs in them once their owner goes.
        unsafe {
            libc::munmap(self.write.cast(), self.len);
            libc::munmap(self.reserved.0.cast(), self.reserved.1);
        }
    }
}

/// So much memory is asked of the host at a time.
const BATCH: usize = 64 << 10;

/// Code bytes for which there is one slot.
const BYTES_A_SLOT: usize = 32;

/// Slots for that much code.
pub(crate) fn slots(len: usize) -> usize {
    len / BYTES_A_SLOT
}

/// Code bytes for which there is one form: a check takes more.
const BYTES_A_FORM: usize = 32;

fn forms_len(len: usize) -> usize {
    (len / BYTES_A_FORM * 8).next_multiple_of(4096)
}

/// Maps a memfd at `execute` and, to be written, elsewhere.
fn map_twice(execute: *mut u8, len: usize) -> io::Result<*mut u8> {
    let file = memfd(len)?;
    let code = libc::PROT_READ | libc::PROT_EXEC;
    map_at(execute, len, code, libc::MAP_SHARED, file.as_raw_fd())?;
    map(&file, len, libc::PROT_READ | libc::PROT_WRITE)
}

/// Address space with nothing in it.
fn reserve(len: usize) -> io::Result<*mut u8> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
    let p = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
    mapped(p)
}

/// The same at a multiple of [`HUGE_PAGE`]; and what has to be given back.
fn reserve_aligned(len: usize) -> io::Result<(*mut u8, (*mut u8, usize))> {
    let all = len + HUGE_PAGE;
    let begin = reserve(all)?;
    let skip = begin.align_offset(HUGE_PAGE);
    assert!(skip < HUGE_PAGE);
    // SAFETY: within the reservation.
    Ok((unsafe { begin.add(skip) }, (begin, all)))
}

/// Maps over a part of a reservation.
fn map_at(at: *mut u8, len: usize, protection: i32, flags: i32, fd: i32) -> io::Result<*mut u8> {
    // SAFETY: callers pass a range of an address space that they have just reserved and nobody uses.
    let p = unsafe { libc::mmap(at.cast(), len, protection, flags | libc::MAP_FIXED, fd, 0) };
    mapped(p)
}

fn mapped(p: *mut libc::c_void) -> io::Result<*mut u8> {
    if p == libc::MAP_FAILED {
        Err(io::Error::last_os_error())
    } else {
        Ok(p.cast())
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
    mapped(p)
}
