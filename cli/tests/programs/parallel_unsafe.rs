//! A program for guests of several processors: threads that compute, wait for each other, remap memory and write code for each other.
//! Prints a line for each part that passed, and "parallel: passed". An argument names the parts to run.

use std::ffi::c_void;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Barrier, Condvar, Mutex};
use std::thread;
use std::time::Instant;

unsafe extern "C" {
    fn mmap(at: *mut c_void, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
    fn munmap(at: *mut c_void, len: usize) -> i32;
    fn mprotect(at: *mut c_void, len: usize, prot: i32) -> i32;
    fn memfd_create(name: *const i8, flags: u32) -> i32;
    fn ftruncate(fd: i32, len: i64) -> i32;
}

const READ: i32 = 1;
const WRITE: i32 = 2;
const EXECUTE: i32 = 4;
const SHARED: i32 = 1;
const PRIVATE: i32 = 2;
const FIXED: i32 = 0x10;
const ANONYMOUS: i32 = 0x20;
const PAGE: usize = 4096;

fn map(at: usize, len: usize, prot: i32, flags: i32, fd: i32) -> usize {
    // SAFETY: a new mapping, or one over what this program has mapped for that.
    let p = unsafe { mmap(at as *mut c_void, len, prot, flags, fd, 0) } as usize;
    assert!(p as isize > 0, "mmap: {}", std::io::Error::last_os_error());
    p
}

fn word(at: usize) -> &'static AtomicU64 {
    // SAFETY: callers pass aligned addresses of mapped memory that stays.
    unsafe { AtomicU64::from_ptr(at as *mut u64) }
}

fn checksum(seed: u64) -> u64 {
    let mut data = vec![0u8; 1 << 16];
    let mut x = seed;
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    for _ in 0..8 {
        for b in &mut data {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *b = (x >> 56) as u8;
        }
        for b in &data {
            sum = (sum ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3);
        }
    }
    sum
}

fn checksums(threads: u64) {
    let expected: Vec<_> = (0..threads).map(checksum).collect();
    thread::scope(|s| {
        for (n, expected) in expected.iter().enumerate() {
            s.spawn(move || (0..4).for_each(|_| assert_eq!(checksum(n as u64), *expected)));
        }
    });
}

fn counters(threads: u64) {
    let rounds = 40_000 / threads;
    let (atomic, locked) = (AtomicU64::new(0), Mutex::new(0u64));
    thread::scope(|s| {
        for _ in 0..threads {
            s.spawn(|| {
                for n in 0..rounds {
                    atomic.fetch_add(1, Ordering::Relaxed);
                    if n % 8 == 0 {
                        *locked.lock().unwrap() += 1;
                    }
                }
            });
        }
    });
    assert_eq!(atomic.into_inner(), threads * rounds);
    assert_eq!(locked.into_inner().unwrap(), threads * rounds.div_ceil(8));
}

/// A token goes round: each hand-over is a futex call to wait and one to wake.
fn tokens(threads: u64) {
    let rounds = 200 / threads;
    let (turn, changed) = (Mutex::new(0u64), Condvar::new());
    let barrier = Barrier::new(threads as usize);
    thread::scope(|s| {
        for me in 0..threads {
            let (turn, changed, barrier) = (&turn, &changed, &barrier);
            s.spawn(move || {
                for _ in 0..rounds {
                    let mut now = turn.lock().unwrap();
                    while *now % threads != me {
                        now = changed.wait(now).unwrap();
                    }
                    *now += 1;
                    changed.notify_all();
                }
                barrier.wait();
            });
        }
    });
    assert_eq!(turn.into_inner().unwrap(), threads * rounds);
}

/// Each thread takes and gives back permissions of its own pages, which drops translations on all processors.
fn protections(threads: u64) {
    thread::scope(|s| {
        for me in 0..threads {
            s.spawn(move || {
                for round in 0..200 / threads {
                    let len = 4 * PAGE;
                    let at = map(0, len, READ | WRITE, PRIVATE | ANONYMOUS, -1);
                    for page in 0..4 {
                        word(at + page * PAGE).store(me << 32 | round, Ordering::Relaxed);
                    }
                    // SAFETY: the mapping of this round, which nobody else knows.
                    unsafe {
                        assert_eq!(mprotect(at as *mut c_void, len, READ), 0);
                        assert_eq!(word(at + PAGE).load(Ordering::Relaxed), me << 32 | round);
                        assert_eq!(mprotect(at as *mut c_void, len, READ | WRITE), 0);
                        word(at + PAGE).fetch_add(1, Ordering::Relaxed);
                        assert_eq!(word(at + PAGE).load(Ordering::Relaxed), (me << 32 | round) + 1);
                        assert_eq!(munmap(at as *mut c_void, len), 0);
                    }
                }
            });
        }
    });
}

/// One thread puts fresh pages to one address; what the others read there is never older than what it has announced.
fn remapped(threads: u64) {
    let rounds = 100 / threads;
    let at = map(0, PAGE, READ | WRITE, PRIVATE | ANONYMOUS, -1);
    let announced = AtomicU64::new(0);
    thread::scope(|s| {
        for _ in 1..threads {
            s.spawn(|| loop {
                let least = announced.load(Ordering::Acquire);
                // A fresh page is 0 until it is written.
                let seen = word(at).load(Ordering::Acquire);
                assert!(seen == 0 || seen >= least, "{seen} after {least}");
                if least == rounds {
                    break;
                }
                thread::yield_now();
            });
        }
        for round in 1..=rounds {
            map(at, PAGE, READ | WRITE, PRIVATE | ANONYMOUS | FIXED, -1);
            word(at).store(round, Ordering::Release);
            announced.store(round, Ordering::Release);
            if round % 16 == 0 {
                thread::yield_now();
            }
        }
    });
}

/// One thread writes `mov eax, n; ret` and announces n; the others call it and get n or later.
fn code(threads: u64, write: usize, execute: usize) {
    let rounds = 400 / threads as u32;
    let announced = AtomicU32::new(0);
    let emit = |n: u32| {
        let mut bytes = [0xc3u8; 8];
        bytes[0] = 0xb8;
        bytes[1..5].copy_from_slice(&n.to_le_bytes());
        word(write).store(u64::from_le_bytes(bytes), Ordering::Release);
    };
    emit(0);
    // SAFETY: a function that takes nothing and returns a number stands there from now on.
    let function: extern "C" fn() -> u32 = unsafe { std::mem::transmute(execute) };
    thread::scope(|s| {
        for _ in 1..threads {
            s.spawn(|| {
                let mut calls = 0u64;
                loop {
                    let least = announced.load(Ordering::Acquire);
                    let seen = function();
                    assert!(seen >= least && seen <= rounds, "{seen} after {least}");
                    calls += 1;
                    if least == rounds {
                        return calls;
                    }
                }
            });
        }
        for n in 1..=rounds {
            emit(n);
            announced.store(n, Ordering::Release);
            if n % 64 == 0 {
                thread::yield_now();
            }
        }
    });
}

fn code_in_one_mapping(threads: u64) {
    let at = map(0, PAGE, READ | WRITE | EXECUTE, PRIVATE | ANONYMOUS, -1);
    code(threads, at, at);
    code(threads, at + 0xff8, at + 0xff8);
}

fn code_in_two_mappings(threads: u64) {
    // SAFETY: a valid name; the descriptor is ours.
    let fd = unsafe { memfd_create(c"code".as_ptr(), 0) };
    // SAFETY: as above.
    assert_eq!(unsafe { ftruncate(fd, PAGE as i64) }, 0);
    let write = map(0, PAGE, READ | WRITE, SHARED, fd);
    let execute = map(0, PAGE, READ | EXECUTE, SHARED, fd);
    code(threads, write + 0x100, execute + 0x100);
}

fn main() {
    let threads = thread::available_parallelism().unwrap().get() as u64;
    println!("threads: {threads}");
    let parts: [(&str, fn(u64)); 7] = [
        ("checksums", checksums),
        ("counters", counters),
        ("tokens", tokens),
        ("protections", protections),
        ("remapped", remapped),
        ("code in one mapping", code_in_one_mapping),
        ("code in two mappings", code_in_two_mappings),
    ];
    let only = std::env::args().nth(1);
    let wanted = |name: &str| only.as_ref().is_none_or(|only| name.contains(only));
    for (name, part) in parts.into_iter().filter(|(name, _)| wanted(name)) {
        let start = Instant::now();
        part(threads.max(2));
        println!("{name}: passed in {} ms", start.elapsed().as_millis());
    }
    println!("parallel: passed");
}
