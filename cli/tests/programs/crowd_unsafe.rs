//! Many processes, many mappings, more memory than there is: each checks what it computes and what it finds in memory, and the time is told.
//!
//! Arguments: `processes NUMBER TURNS`, `mappings PAGES` or `pressure MEGABYTES TURNS`.

use std::ffi::c_void;
use std::process::Command;
use std::time::Instant;

// SAFETY: the C library's functions, as their manual pages have them.
unsafe extern "C" {
    fn mmap(at: *mut c_void, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
    fn mprotect(at: *mut c_void, len: usize, prot: i32) -> i32;
    fn madvise(at: *mut c_void, len: usize, advice: i32) -> i32;
}

const PAGE: usize = 4096;
const READ: i32 = 1;
const WRITE: i32 = 2;
const PRIVATE_ANONYMOUS_NORESERVE: i32 = 0x4022;
const NOHUGEPAGE: i32 = 15;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |n: usize| -> usize { arguments[n].parse().expect("a number") };
    let start = Instant::now();
    match arguments[1].as_str() {
        "processes" => processes(number(2), number(3)),
        "one" => one(number(2) as u64, number(3)),
        "mappings" => mappings(number(2)),
        "pressure" => pressure(number(2), number(3)),
        other => panic!("{other}?"),
    }
    if arguments[1] != "one" {
        println!("crowd: {} passed in {} ms", arguments[1], start.elapsed().as_millis());
    }
}

fn processes(count: usize, turns: usize) {
    let start = |seed: usize| Command::new("/proc/self/exe").args(["one", &seed.to_string(), &turns.to_string()]).spawn();
    let children: Vec<_> = (1..=count).map(|seed| start(seed).unwrap()).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
}

fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 16
}

/// Writes numbers all over its memory in some order, and finds them again.
fn one(seed: u64, turns: usize) {
    const WORDS: usize = 1 << 15;
    let mut memory = vec![0u64; WORDS];
    for turn in 0..turns as u64 {
        let mut state = seed << 32 | turn;
        (0..WORDS).for_each(|n| memory[n * 7 % WORDS] = next(&mut state));
        let mut state = seed << 32 | turn;
        for n in 0..WORDS {
            assert_eq!(memory[n * 7 % WORDS], next(&mut state), "process {seed}, turn {turn}, word {n}");
        }
    }
}

/// Memory of so many pages that nothing has touched, in small ones.
fn fresh(pages: usize) -> *mut u64 {
    // SAFETY: a new mapping, wherever there is room.
    let at = unsafe { mmap(std::ptr::null_mut(), pages * PAGE, READ | WRITE, PRIVATE_ANONYMOUS_NORESERVE, -1, 0) };
    assert!(at as isize > 0, "mmap: {}", std::io::Error::last_os_error());
    // SAFETY: the mapping. A kernel without huge pages refuses, which is as well.
    let _ = unsafe { madvise(at, pages * PAGE, NOHUGEPAGE) };
    at.cast()
}

fn word(memory: *mut u64, page: usize) -> *mut u64 {
    // SAFETY: the callers' pages are within their mappings.
    unsafe { memory.add(page * (PAGE / 8) + page % (PAGE / 8)) }
}

/// Ever more pages that cannot share a mapping of the host's: each is the same page of zeros, until it is written; then every other one loses and gets back the
/// right to be written.
fn mappings(pages: usize) {
    let memory = fresh(pages);
    let read = |page: usize| {
        // SAFETY: within the mapping, which this thread alone uses.
        unsafe { word(memory, page).read_volatile() }
    };
    (0..pages).for_each(|page| assert_eq!(read(page), 0, "page {page}"));
    let written = (0..pages).step_by(16);
    for page in written.clone() {
        // SAFETY: as above.
        unsafe { word(memory, page).write_volatile(page as u64 + 1) };
    }
    for rights in [READ, READ | WRITE] {
        for page in written.clone().step_by(4) {
            let at = memory.wrapping_add(page * (PAGE / 8));
            // SAFETY: a page of the mapping, of which there is no reference.
            assert_eq!(unsafe { mprotect(at.cast(), PAGE, rights) }, 0, "{}", std::io::Error::last_os_error());
        }
        for page in 0..pages {
            let expected = if page % 16 == 0 { page as u64 + 1 } else { 0 };
            assert_eq!(read(page), expected, "page {page}");
        }
    }
}

/// More than there is memory for: what was written comes back, in whatever order.
fn pressure(megabytes: usize, turns: usize) {
    let pages = megabytes << 8;
    let memory = fresh(pages);
    for turn in 0..turns as u64 {
        for page in 0..pages {
            let value = (turn << 32) + page as u64;
            // SAFETY: within the mapping, which this thread alone uses.
            unsafe { word(memory, page).write_volatile(value) };
        }
        let mut state = turn;
        for n in 0..pages {
            let page = if n % 2 == 0 { n } else { next(&mut state) as usize % pages };
            // SAFETY: as above.
            let found = unsafe { word(memory, page).read_volatile() };
            assert_eq!(found, (turn << 32) + page as u64, "page {page}");
        }
    }
}
