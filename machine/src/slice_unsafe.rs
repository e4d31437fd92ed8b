//! Short time slices for vCPU threads.
//!
//! Problem: CPUs of a guest wait for each other (an IPI is to be answered, a lock released), and with more vCPUs than processors of the
//! host the one waited for often has none: it gets one when another's slice of some milliseconds ends, and that for every single
//! round of waiting.
//! Idea: Linux lets each thread say how long its slices are to be (6.12 and later; older ones ignore it). It gets the
//! same share of the processor in smaller pieces.
//! Cost: more switches where threads compete, at a microsecond or two each; nothing where they do not.

use std::time::Duration;

/// What vCPU threads ask for.
const SLICE: Duration = Duration::from_micros(250);

/// `struct sched_attr` (Linux include/uapi/linux/sched/types.h), first version.
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Asks for short slices of the calling thread. Where the host gives none, nothing changes.
pub fn ask_for_short_slices() {
    let size = size_of::<SchedAttr>() as u32;
    let mut attr = SchedAttr::default();
    // SAFETY: the kernel writes at most `size` bytes to a structure of that size.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, size, 0) };
    if got != 0 || attr.policy != libc::SCHED_OTHER as u32 {
        return;
    }
    (attr.size, attr.runtime) = (size, SLICE.as_nanos() as u64);
    // SAFETY: the kernel reads `size` bytes of a structure of that size.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attr, 0) };
}
