//! Performance counters through perf_event_open: instructions are exact, cycles are those of the clock, sampling has its overflows, and user code reads its counters itself.

use std::arch::asm;
use std::ffi::{c_long, c_void};
use std::io::{Error, Read};
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};

// SAFETY: the C library's functions, as their manual pages have them.
unsafe extern "C" {
    fn syscall(number: c_long, ...) -> c_long;
    fn ioctl(fd: i32, request: u64, ...) -> i32;
    fn mmap(at: *mut c_void, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
}

const PERF_EVENT_OPEN: c_long = 298;
const ENABLE: u64 = 0x2400;
const DISABLE: u64 = 0x2401;
const RESET: u64 = 0x2403;
const CYCLES: u64 = 0;
const INSTRUCTIONS: u64 = 1;
/// Flags of the attributes: disabled at first, without the kernel.
const DISABLED: u64 = 1;
const EXCLUDE_KERNEL: u64 = 1 << 5;
const SAMPLE_IP: u64 = 1;

/// perf_event_attr, version 0.
#[repr(C)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    breakpoint: u32,
    config1: u64,
}

fn open(config: u64, flags: u64, period: u64) -> File {
    let attributes = Attributes {
        kind: 0,
        size: 64,
        config,
        period,
        sample_type: SAMPLE_IP * u64::from(period != 0),
        read_format: 0,
        flags: DISABLED | flags,
        wakeup: 0,
        breakpoint: 0,
        config1: 0,
    };
    // SAFETY: the attributes outlive the call; this process, every CPU, no group.
    let fd = unsafe { syscall(PERF_EVENT_OPEN, &attributes, 0, -1, -1, 0) };
    assert!(fd >= 0, "perf_event_open: {}", Error::last_os_error());
    // SAFETY: a descriptor that nobody else has.
    unsafe { File::from_raw_fd(fd as i32) }
}

fn control(event: &File, request: u64) {
    // SAFETY: it concerns the event alone.
    assert_eq!(unsafe { ioctl(event.as_raw_fd(), request, 0) }, 0);
}

fn count(mut event: &File) -> u64 {
    let mut bytes = [0; 8];
    event.read_exact(&mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// 2 `rounds` instructions and one.
fn work(rounds: u64) {
    // SAFETY: registers alone.
    unsafe { asm!("2: dec {0}", "jnz 2b", inout(reg) rounds => _, options(nomem, nostack)) };
}

fn tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: it reads the clock.
    unsafe { asm!("rdtsc", out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

fn counted(event: &File, rounds: u64) -> u64 {
    control(event, RESET);
    control(event, ENABLE);
    work(rounds);
    control(event, DISABLE);
    count(event)
}

fn main() {
    let instructions = open(INSTRUCTIONS, EXCLUDE_KERNEL, 0);
    counted(&instructions, 1);
    // What is around the loop is the same each time, whatever interrupts.
    let around = counted(&instructions, 1) - 3;
    for rounds in [1, 1000, 300_000] {
        assert_eq!(counted(&instructions, rounds), around + 2 * rounds + 1, "{rounds} rounds");
    }
    assert!(around < 200, "{around} instructions of two system calls");
    let (all, kernel) = (open(INSTRUCTIONS, 0, 0), open(INSTRUCTIONS, 1 << 4, 0));
    control(&all, ENABLE);
    control(&kernel, ENABLE);
    control(&instructions, RESET);
    control(&instructions, ENABLE);
    work(100_000);
    [&instructions, &kernel, &all].iter().for_each(|event| control(event, DISABLE));
    let (user, kernel, all) = (count(&instructions), count(&kernel), count(&all));
    assert!(user >= 200_000 && kernel > 0 && all > user + kernel / 2, "{user} {kernel} {all}");

    let cycles = open(CYCLES, 0, 0);
    let begin = tsc();
    let counted_cycles = counted(&cycles, 20_000_000);
    let passed = tsc() - begin;
    assert!(counted_cycles > passed / 20 && counted_cycles <= passed, "{counted_cycles} of {passed}");
    let user_cycles = counted(&open(CYCLES, EXCLUDE_KERNEL, 0), 100_000);
    assert!(user_cycles > 1000);

    const PERIOD: u64 = 50_000;
    for (what, config) in [("instructions", INSTRUCTIONS), ("cycles", CYCLES)] {
        let event = open(config, EXCLUDE_KERNEL, PERIOD);
        let page = map(&event);
        counted(&event, 1_000_000);
        // SAFETY: data_head of the mapped page (perf_event_open(2)).
        let head = unsafe { page.add(1024 / 8).read_volatile() };
        println!("counters: {} bytes of samples of {what}", head);
        assert!(head >= 10 * 16, "{head} bytes of samples of {what}");
    }
    read_directly();
    println!("counters: passed");
}

/// The page that describes an event, and one for samples.
fn map(event: &File) -> *mut u64 {
    // SAFETY: a new mapping.
    let at = unsafe { mmap(std::ptr::null_mut(), 9 * 4096, 3, 1, event.as_raw_fd(), 0) };
    assert!(at as isize > 0, "mmap: {}", Error::last_os_error());
    at.cast()
}

fn read_directly() {
    const USER_RDPMC: u64 = 1 << 2;
    let event = open(INSTRUCTIONS, EXCLUDE_KERNEL, 0);
    let page = map(&event);
    control(&event, ENABLE);
    // SAFETY: lock and index, then capabilities of the mapped page (perf_event_open(2)).
    let (index, capabilities) = unsafe { ((page.add(1).read_volatile() >> 32) as u32, page.add(5).read_volatile()) };
    assert!(index > 0 && capabilities & USER_RDPMC != 0, "{index} {capabilities:x}");
    let rdpmc = || {
        let (low, high): (u32, u32);
        // SAFETY: the kernel lets it.
        unsafe { asm!("rdpmc", in("ecx") index - 1, out("eax") low, out("edx") high, options(nomem, nostack)) };
        (u64::from(high) << 32 | u64::from(low)) & ((1 << 48) - 1)
    };
    let begin = rdpmc();
    work(10_000);
    let passed = rdpmc().wrapping_sub(begin) & ((1 << 48) - 1);
    assert!((20_001..20_100).contains(&passed), "{passed}");
    control(&event, DISABLE);
}
