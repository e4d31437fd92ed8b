//! System calls as somebody makes them who has taken over a thread: by number, with any arguments, by any entry.

use std::arch::asm;
use std::sync::atomic::{AtomicU32, Ordering};

static REFUSALS: AtomicU32 = AtomicU32::new(0);

/// Has refused calls of this process counted and come back, in place of its end.
pub fn count_refusals() {
    // SAFETY: a zeroed sigaction is valid, and the handler only adds to an atomic.
    let set = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_refusal as *const () as usize;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut())
    };
    assert_eq!(set, 0);
}

extern "C" fn on_refusal(_: i32) {
    REFUSALS.fetch_add(1, Ordering::Relaxed);
}

/// Makes a call. `None` where it was refused, else what the kernel returned.
pub fn call(number: i64, arguments: [u64; 6]) -> Option<i64> {
    let [a, b, c, d, e, f] = arguments;
    let before = REFUSALS.load(Ordering::Relaxed);
    // SAFETY: the callers' arguments are numbers, or null pointers, which the kernel refuses to follow; what would end or stop this
    // process if it were permitted is what the test is to find.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    let error = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
    let refused = REFUSALS.load(Ordering::Relaxed) != before;
    let result = match result {
        -1 => -i64::from(error),
        result => result,
    };
    (!refused).then_some(result)
}

/// Makes a call by the entry for 32-bit programs; true where it was refused.
pub fn is_refused_by_int_0x80(number: u32) -> bool {
    let before = REFUSALS.load(Ordering::Relaxed);
    // SAFETY: RBX is put back; the arguments are zero. The entry clobbers nothing else than RAX and R8 to R11.
    unsafe {
        asm!(
            "xchg {saved}, rbx",
            "int 0x80",
            "xchg {saved}, rbx",
            saved = inout(reg) 0u64 => _,
            inout("rax") u64::from(number) => _,
            inout("rcx") 0u64 => _,
            inout("rdx") 0u64 => _,
            inout("rsi") 0u64 => _,
            inout("rdi") 0u64 => _,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    REFUSALS.load(Ordering::Relaxed) != before
}
