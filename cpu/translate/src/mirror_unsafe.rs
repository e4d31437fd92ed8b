//! Shared memory at two addresses without a file, for perf: it looks up names in a perf map only for code in mappings that it takes
//! for anonymous, which those of a memfd are not. (Not the rule, since valgrind cannot do this.)

use std::io;
use std::ptr::null_mut;

/// Makes `len` bytes of memory that can be written at the address returned and executed at `execute`, which the caller
/// has reserved.
pub(crate) fn mirrored(execute: *mut u8, len: usize) -> io::Result<*mut u8> {
    let (data, code) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::PROT_READ | libc::PROT_EXEC,
    );
    let shared = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing of ours.
    let write = checked(unsafe { libc::mmap(null_mut(), len, data, shared, -1, 0) })?;
    let fixed = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: an old length of 0 maps the shared memory once more; the new place is reserved and nobody uses it.
    checked(unsafe { libc::mremap(write, 0, len, fixed, execute) })?;
    // SAFETY: what was mapped just now; nothing has been written or executed there.
    if unsafe { libc::mprotect(execute.cast(), len, code) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(write.cast())
}

fn checked(p: *mut libc::c_void) -> io::Result<*mut libc::c_void> {
    match p {
        libc::MAP_FAILED => Err(io::Error::last_os_error()),
        p => Ok(p),
    }
}
