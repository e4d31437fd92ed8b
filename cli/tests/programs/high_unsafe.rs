//! Memory above what 4 levels of page tables reach: it is written, read, shared with a child, executed, and handed to the kernel.

use std::ffi::c_void;
use std::io::{Error, Read, Write, pipe};

// SAFETY: the C library's functions, as their manual pages have them.
unsafe extern "C" {
    fn mmap(at: *mut c_void, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
    fn mprotect(at: *mut c_void, len: usize, prot: i32) -> i32;
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(status: i32) -> !;
}

const PAGE: usize = 4096;
const PAGES: usize = 600;
const READ_WRITE: i32 = 3;
const READ_EXECUTE: i32 = 5;
const PRIVATE_ANONYMOUS: i32 = 0x22;
/// Linux gives addresses above 47 bits to who names one (Documentation/arch/x86/x86_64/5level-paging.rst).
const HINTS: [usize; 3] = [1 << 47, 1 << 52, (1 << 56) - (8 << 20)];

fn map(hint: usize) -> &'static mut [u64] {
    let len = PAGES * PAGE;
    // SAFETY: a new mapping, at an address where nothing is.
    let at = unsafe { mmap(hint as *mut c_void, len, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0) };
    assert!(at as isize > 0, "mmap: {}", Error::last_os_error());
    assert_eq!(at as usize, hint, "the kernel has no such addresses");
    // SAFETY: mapped above, zeroed, and never unmapped.
    unsafe { std::slice::from_raw_parts_mut(at.cast(), len / 8) }
}

fn main() {
    for hint in HINTS {
        let words = map(hint);
        for round in 1..20u64 {
            for (n, word) in words.iter_mut().enumerate() {
                *word = word.wrapping_add(round ^ n as u64);
            }
        }
        let sum = |words: &[u64]| words.iter().fold(0u64, |sum, word| sum.wrapping_mul(31) ^ word);
        let expected = sum(words);
        a_child_has_its_own(words);
        assert_eq!(sum(words), expected);
        the_kernel_takes_it(words);
        it_is_executed(words);
    }
    println!("high: passed");
}

/// Copy on write.
fn a_child_has_its_own(words: &mut [u64]) {
    // SAFETY: this program has one thread.
    let child = unsafe { fork() };
    assert!(child >= 0, "fork: {}", Error::last_os_error());
    if child == 0 {
        let before = words[700];
        words.fill(before);
        let whole = words.iter().all(|word| *word == before);
        // SAFETY: it ends the child.
        unsafe { _exit(if whole { 7 } else { 1 }) };
    }
    let mut status = 0;
    // SAFETY: status outlives the call.
    assert_eq!(unsafe { waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 7 << 8);
}

fn the_kernel_takes_it(words: &mut [u64]) {
    let (mut reader, mut writer) = pipe().unwrap();
    let first = words[0];
    // SAFETY: the first eight of the mapping's bytes, of which nobody else has a reference meanwhile; any bytes are a number.
    let bytes = unsafe { &mut *words.as_mut_ptr().cast::<[u8; 8]>() };
    writer.write_all(bytes).unwrap();
    bytes.fill(0);
    reader.read_exact(bytes).unwrap();
    assert_eq!(words[0], first);
}

/// Code that returns its argument and the upper half of its own address.
fn it_is_executed(words: &mut [u64]) {
    const CODE: [u8; 16] = [
        0x89, 0xf8, // mov eax, edi
        0xe8, 0, 0, 0, 0, // call next
        0x5a, // pop rdx
        0x48, 0xc1, 0xea, 0x20, // shr rdx, 32
        0x01, 0xd0, // add eax, edx
        0xc3, 0x90, // ret; nop
    ];
    let at = words.as_mut_ptr();
    // SAFETY: the mapping is as long; it becomes code, which nobody writes to any more.
    let function = unsafe {
        at.cast::<[u8; 16]>().write(CODE);
        assert_eq!(mprotect(at.cast(), PAGE, READ_EXECUTE), 0);
        std::mem::transmute::<*mut u64, extern "C" fn(u32) -> u32>(at)
    };
    for n in 0..1000 {
        assert_eq!(function(n), n + (at as usize >> 32) as u32);
    }
}
