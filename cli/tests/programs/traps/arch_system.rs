//! What the programs need of the C library and of Linux.

use std::ffi::{c_int, c_long, c_void};

pub const SIGILL: c_int = 4;
pub const SIGTRAP: c_int = 5;
pub const SIGBUS: c_int = 7;
pub const SIGFPE: c_int = 8;
pub const SIGSEGV: c_int = 11;
pub const SIGALRM: c_int = 14;
pub const SIGSTOP: c_int = 19;

pub const NONE: c_int = 0;
pub const READ: c_int = 1;
pub const WRITE: c_int = 2;
pub const EXECUTE: c_int = 4;

pub const PRIVATE: c_int = 2;
const FIXED: c_int = 0x10;
const ANONYMOUS: c_int = 0x20;
const SA_SIGINFO: c_int = 4;
const SA_ONSTACK: c_int = 0x0800_0000;

// SAFETY: the C library's functions, as their manual pages have them.
unsafe extern "C" {
    fn mmap(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    fn mprotect(at: *mut c_void, len: usize, prot: c_int) -> c_int;
    fn sigaction(signal: c_int, new: *const Action, old: *mut Action) -> c_int;
    fn sigaltstack(new: *const AlternateStack, old: *mut AlternateStack) -> c_int;
    fn setitimer(which: c_int, new: *const [i64; 4], old: *mut [i64; 4]) -> c_int;
    fn ptrace(request: c_int, pid: c_int, at: usize, data: usize) -> c_long;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

/// A signal handler with SA_SIGINFO.
pub type Handler = extern "C" fn(c_int, *mut SignalInfo, *mut Context);

/// `struct sigaction` of the C library.
#[repr(C)]
struct Action {
    handler: usize,
    mask: [u64; 16],
    flags: c_int,
    restorer: usize,
}

#[repr(C)]
struct AlternateStack {
    start: *mut c_void,
    flags: c_int,
    size: usize,
}

/// `siginfo_t`, as far as it is looked at.
#[repr(C)]
pub struct SignalInfo {
    pub signal: c_int,
    pub errno: c_int,
    pub code: c_int,
    pub padding: c_int,
    pub address: u64,
}

/// `ucontext_t` up to the pointer to the floating-point state.
#[repr(C)]
pub struct Context {
    pub flags: u64,
    pub link: u64,
    pub stack: [u64; 3],
    pub registers: [u64; 23],
    pub floating: *mut u8,
}

/// Where in [`Context::registers`] what lies, beyond the general registers.
pub mod place {
    pub const RSP: usize = 15;
    pub const RIP: usize = 16;
    pub const FLAGS: usize = 17;
    pub const SELECTORS: usize = 18;
    pub const ERROR: usize = 19;
    pub const TRAP: usize = 20;
    pub const CR2: usize = 22;
    /// The general registers in the order of their encoding.
    pub const GENERAL: [usize; 16] = [13, 14, 12, 11, 15, 10, 9, 8, 0, 1, 2, 3, 4, 5, 6, 7];
}

/// Maps `pages` fresh pages at an address where nothing is.
pub fn map(at: u64, pages: usize, rights: c_int) {
    map_file(at, pages, rights, PRIVATE | ANONYMOUS, -1);
}

/// Maps `pages` pages of a file, or fresh ones.
pub fn map_file(at: u64, pages: usize, rights: c_int, flags: c_int, fd: c_int) {
    // SAFETY: the addresses that the programs map are far from what the C library has mapped.
    let mapped = unsafe { mmap(at as *mut c_void, pages << 12, rights, FIXED | flags, fd, 0) };
    assert_eq!(mapped as u64, at, "mmap: {}", std::io::Error::last_os_error());
}

/// Changes the rights of pages that the programs have mapped.
pub fn protect(at: u64, pages: usize, rights: c_int) {
    // SAFETY: nothing that Rust knows of lies there.
    let done = unsafe { mprotect(at as *mut c_void, pages << 12, rights) };
    assert_eq!(done, 0, "mprotect: {}", std::io::Error::last_os_error());
}

/// Has a handler called for a signal, on the alternate stack.
pub fn handle(signal: c_int, handler: Handler) {
    let action = Action { handler: handler as usize, mask: [0; 16], flags: SA_SIGINFO | SA_ONSTACK, restorer: 0 };
    // SAFETY: the structure is what the function takes.
    assert_eq!(unsafe { sigaction(signal, &action, std::ptr::null_mut()) }, 0);
}

/// Gives this thread an alternate stack of 64 KiB, for ever.
pub fn alternate_stack() {
    const SIZE: usize = 1 << 16;
    let start = Vec::leak(vec![0u8; SIZE]).as_mut_ptr().cast();
    let stack = AlternateStack { start, flags: 0, size: SIZE };
    // SAFETY: the memory is never freed nor used otherwise.
    assert_eq!(unsafe { sigaltstack(&stack, std::ptr::null_mut()) }, 0);
}

/// SIGALRM every so many microseconds; none with 0.
pub fn timer(microseconds: i64) {
    let value = [0, microseconds, 0, microseconds];
    // SAFETY: the structure is what the function takes.
    assert_eq!(unsafe { setitimer(0, &value, std::ptr::null_mut()) }, 0);
}

/// A system call that touches no memory of Rust's but what the caller names.
pub fn call(number: i64, arguments: [u64; 4]) -> i64 {
    let [a, b, c, d] = arguments;
    // SAFETY: the callers pass numbers and addresses of their own memory.
    unsafe { syscall(number, a, b, c, d) }
}

/// `ptrace`.
pub fn trace(request: c_int, process: c_int, at: u64, data: u64) -> i64 {
    // SAFETY: what is read or written is the other process's, or `data`'s, which the callers own.
    unsafe { ptrace(request, process, at as usize, data as usize) }
}

/// Waits for a process; its status.
pub fn wait(process: c_int) -> c_int {
    let mut status = 0;
    // SAFETY: a place for the status.
    assert_eq!(unsafe { waitpid(process, &mut status, 0) }, process);
    status
}
