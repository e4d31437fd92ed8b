//! What happens when the host gives no memory: a sentence and status 1.
//!
//! The standard library ends the process with a signal then, after a look at files that a sandbox does not have. No caller of the allocator
//! here can do better than to end, so it is done in the one place where all of them pass: nothing is allocated, no lock is taken, and what the
//! guest has flushed is on its disks already.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;

#[global_allocator]
static ALLOCATOR: Telling = Telling;

/// The C library's allocator, which never says no.
struct Telling;

// SAFETY: every call goes to `System`, which keeps the contract, with what it was called with; where it has no memory, none returns.
unsafe impl GlobalAlloc for Telling {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of this very function.
        told(unsafe { System.alloc(layout) }, layout.size())
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as in `alloc`.
        told(unsafe { System.alloc_zeroed(layout) }, layout.size())
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as in `alloc`; the block came from `System` with this layout.
        told(unsafe { System.realloc(block, layout, size) }, size)
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as in `realloc`.
        unsafe { System.dealloc(block, layout) }
    }
}

#[inline]
fn told(block: *mut u8, size: usize) -> *mut u8 {
    if block.is_null() {
        end(size);
    }
    block
}

#[cold]
fn end(size: usize) -> ! {
    let mut text = [0; 320];
    let mut rest = &mut text[..];
    let _ = writeln!(
        rest,
        "doppel: the host gives no memory for {size} bytes more, so this ends here; what a guest has flushed is on its disks. \
         Ask for less with --memory or --code-cache, or raise the limit (ulimit -v, the control group)"
    );
    let left = rest.len();
    let _ = rustix::io::write(rustix::stdio::stderr(), &text[..320 - left]);
    // SAFETY: ends the process and runs nothing of it; the terminal's watchdog sees to the terminal.
    unsafe { libc::_exit(1) }
}
