//! What only instructions of the host tell: its CPUID, XCR0, TSC, and a clock beside it.

use crate::CpuidLeaf;

/// The host's CPUID.
pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> CpuidLeaf {
    let r = raw_cpuid::native_cpuid::cpuid_count(leaf, subleaf);
    CpuidLeaf {
        eax: r.eax,
        ebx: r.ebx,
        ecx: r.ecx,
        edx: r.edx,
    }
}

/// The host's XCR0, or 0 where its operating system has no XSAVE.
pub fn xcr0() -> u64 {
    if !std::arch::is_x86_feature_detected!("xsave") {
        return 0;
    }
    // SAFETY: the feature test covers OSXSAVE, so XGETBV of register 0 cannot fault.
    unsafe { xgetbv0() }
}

#[target_feature(enable = "xsave")]
fn xgetbv0() -> u64 {
    // SAFETY: XCR0 exists wherever XGETBV does; the instruction touches no memory.
    unsafe { core::arch::x86_64::_xgetbv(0) }
}

/// The host's time-stamp counter.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: RDTSC is available to user programs on Linux unless they forbid it to themselves.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Nanoseconds of a clock; `clock` is one of libc's CLOCK_ constants.
fn clock_nanoseconds(clock: libc::clockid_t) -> u64 {
    let mut t = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `t` is valid for the write; a failure leaves it zero.
    unsafe { libc::clock_gettime(clock, &mut t) };
    (t.tv_sec as u64)
        .wrapping_mul(1_000_000_000)
        .wrapping_add(t.tv_nsec as u64)
}

/// Nanoseconds that no one adjusts.
pub(crate) fn monotonic_nanoseconds() -> u64 {
    clock_nanoseconds(libc::CLOCK_MONOTONIC_RAW)
}

/// Nanoseconds since 1970 (UTC).
pub(crate) fn wall_clock_nanoseconds() -> u64 {
    clock_nanoseconds(libc::CLOCK_REALTIME)
}
