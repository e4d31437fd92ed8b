//! Protection keys of Linux: what a key forbids is a SIGSEGV that names it, or EFAULT where the kernel looks; each thread has its own rights, and what
//! may only be executed is kept from reads by a key.

use std::arch::asm;
use std::ffi::c_void;
use std::io::{Error, Write, pipe};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering::SeqCst};

// SAFETY: the C library's functions, as their manual pages have them.
unsafe extern "C" {
    fn mmap(at: *mut c_void, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
    fn mprotect(at: *mut c_void, len: usize, prot: i32) -> i32;
    fn pkey_alloc(flags: u32, rights: u32) -> i32;
    fn pkey_mprotect(at: *mut c_void, len: usize, prot: i32, key: i32) -> i32;
    fn pkey_free(key: i32) -> i32;
    fn sigaction(signal: i32, new: *const Action, old: *mut Action) -> i32;
    fn sched_yield() -> i32;
}

const PAGE: usize = 4096;
const READ: i32 = 1;
const WRITE: i32 = 2;
const EXECUTE: i32 = 4;
const PRIVATE_ANONYMOUS: i32 = 0x22;
const SIGSEGV: i32 = 11;
const SIGINFO: i32 = 4;
const SEGV_PKUERR: i32 = 4;
const EFAULT: i32 = 14;
const NO_ACCESS: u32 = 1;
const NO_WRITE: u32 = 2;

#[repr(C)]
struct Action {
    handler: usize,
    mask: [u64; 16],
    flags: i32,
    restorer: usize,
}

static CODE: AtomicI32 = AtomicI32::new(0);
static KEY: AtomicI32 = AtomicI32::new(0);
static ADDRESS: AtomicUsize = AtomicUsize::new(0);

/// Notes a SIGSEGV and goes on after the instruction, which has two bytes.
extern "C" fn note(_: i32, info: *const u8, context: *mut u8) {
    const RIP: usize = 168;
    // SAFETY: siginfo_t and ucontext_t, as Linux lays them out on x86-64.
    unsafe {
        CODE.store(info.add(8).cast::<i32>().read(), SeqCst);
        ADDRESS.store(info.add(16).cast::<usize>().read(), SeqCst);
        KEY.store(info.add(32).cast::<i32>().read(), SeqCst);
        *context.add(RIP).cast::<u64>() += 2;
    }
}

fn pkru() -> u32 {
    let v;
    // SAFETY: it reads PKRU, which Linux has enabled: pkey_alloc has said so.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") v, out("edx") _, options(nomem, nostack)) };
    v
}

/// Sets this thread's rights for a key.
fn set_rights(key: i32, rights: u32) {
    let v = pkru() & !(3 << (2 * key)) | rights << (2 * key);
    // SAFETY: it changes the rights for a page that is touched by the functions below alone.
    unsafe { asm!("wrpkru", in("eax") v, in("ecx") 0, in("edx") 0, options(nostack)) };
}

/// The fault of a read or write, if there was one: its code, key and whether the address was told.
fn fault(at: *mut u32, write: bool) -> Option<(i32, i32, bool)> {
    CODE.store(0, SeqCst);
    // SAFETY: mapped memory that nobody has a reference to; a fault goes on after the instruction.
    unsafe {
        match write {
            true => asm!("mov [rdi], eax", in("rdi") at, in("eax") 7, options(nostack)),
            false => asm!("mov eax, [rdi]", in("rdi") at, out("eax") _, options(nostack)),
        }
    }
    let told = (CODE.load(SeqCst), KEY.load(SeqCst), ADDRESS.load(SeqCst) == at as usize);
    (told.0 != 0).then_some(told)
}

fn page(prot: i32) -> *mut u32 {
    // SAFETY: a new mapping.
    let at = unsafe { mmap(std::ptr::null_mut(), PAGE, prot, PRIVATE_ANONYMOUS, -1, 0) };
    assert!(at as isize > 0, "mmap: {}", Error::last_os_error());
    at.cast()
}

fn main() {
    let action = Action { handler: note as *const () as usize, mask: [0; 16], flags: SIGINFO, restorer: 0 };
    // SAFETY: a handler that touches atomics and its own frame.
    assert_eq!(unsafe { sigaction(SIGSEGV, &action, std::ptr::null_mut()) }, 0);
    // SAFETY: no memory is concerned.
    let key = unsafe { pkey_alloc(0, 0) };
    assert!(key > 0, "pkey_alloc: {}", Error::last_os_error());
    let at = page(READ | WRITE);
    // SAFETY: the mapping, which nobody has a reference to.
    assert_eq!(unsafe { pkey_mprotect(at.cast(), PAGE, READ | WRITE, key) }, 0);

    let forbidden = Some((SEGV_PKUERR, key, true));
    for turn in 0..100 {
        for rights in [0, NO_WRITE, NO_ACCESS, NO_ACCESS | NO_WRITE] {
            set_rights(key, 0);
            assert_eq!((fault(at, false), fault(at, true)), (None, None));
            set_rights(key, rights);
            let read = forbidden.filter(|_| rights & NO_ACCESS != 0);
            let write = forbidden.filter(|_| rights != 0);
            assert_eq!((fault(at, false), fault(at, true)), (read, write), "turn {turn}, {rights}");
        }
    }
    the_kernel_minds(at, key);
    threads_have_their_own(key);
    what_may_be_executed_alone();
    // SAFETY: no memory is concerned.
    assert_eq!(unsafe { pkey_free(key) }, 0);
    println!("keys: passed");
}

/// Its own accesses for a system call are the thread's.
fn the_kernel_minds(at: *mut u32, key: i32) {
    let (_reader, mut writer) = pipe().unwrap();
    // SAFETY: the mapping is as long, and stays.
    let bytes = unsafe { std::slice::from_raw_parts(at.cast::<u8>(), 16) };
    set_rights(key, NO_ACCESS);
    assert_eq!(writer.write(bytes).unwrap_err().raw_os_error(), Some(EFAULT));
    set_rights(key, NO_WRITE);
    assert_eq!(writer.write(bytes).unwrap(), 16);
}

fn threads_have_their_own(key: i32) {
    let threads = [0, 1, 2, 3].map(|rights| {
        std::thread::spawn(move || {
            set_rights(key, rights);
            let mine = pkru();
            for _ in 0..2000 {
                // SAFETY: it takes nothing.
                unsafe { sched_yield() };
                assert_eq!(pkru(), mine);
            }
        })
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Linux takes a key of its own for it.
fn what_may_be_executed_alone() {
    let at = page(READ | WRITE);
    // SAFETY: the mapping, which nobody has a reference to: RET; then it is executed, which does nothing.
    unsafe {
        at.cast::<u8>().write(0xc3);
        assert_eq!(mprotect(at.cast(), PAGE, EXECUTE), 0);
        std::mem::transmute::<*mut u32, extern "C" fn()>(at)();
    }
    let (code, _, told) = fault(at, false).expect("it cannot be read");
    assert_eq!((code, told), (SEGV_PKUERR, true));
}
