//! The time-stamp counter: the host's frequency, and the guest's view of the counter.
//!
//! The guest reads the host's TSC plus an offset, so that code that the processor runs directly and code that is emulated
//! agree. Its frequency is what the host's CPUID says, or else what a measurement against the unadjusted monotonic clock
//! gives. The measurement reads the counter before and after the clock and keeps the closest such bracket of many, so that
//! an interruption between the two costs nothing. It lasts milliseconds, in which its caller can do something else.

use crate::Cpu;
use crate::arch_host;

/// How long a measurement takes at least.
const MEASURED_NANOSECONDS: u64 = 8_000_000;
/// Brackets tried at each end of it.
const BRACKETS: usize = 40;
/// What a CPUID answer must lie in to be believed, in Hz.
const PLAUSIBLE: std::ops::RangeInclusive<u64> = 100_000_000..=20_000_000_000;

/// The frequency of the host's TSC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscFrequency {
    hz: u64,
    measured: bool,
}

/// A frequency on the way.
#[derive(Debug)]
pub struct TscMeasurement(Begun);

#[derive(Debug)]
enum Begun {
    Announced(u64),
    Since(Sample),
}

impl TscMeasurement {
    /// Starts to measure, where CPUID does not say the frequency.
    pub fn start() -> Self {
        TscMeasurement(match announced(&arch_host::cpuid) {
            Some(hz) => Begun::Announced(hz),
            None => Begun::Since(sample()),
        })
    }

    /// The frequency, to a few parts per million. Waits where the start is less than some milliseconds ago.
    pub fn finish(self) -> TscFrequency {
        match self.0 {
            Begun::Announced(hz) => TscFrequency {
                hz,
                measured: false,
            },
            Begun::Since(start) => TscFrequency {
                hz: measure_since(&start),
                measured: true,
            },
        }
    }
}

impl TscFrequency {
    /// The host's, which takes some milliseconds where CPUID does not say it.
    pub fn of_host() -> Self {
        TscMeasurement::start().finish()
    }

    /// In Hz.
    pub fn hz(self) -> u64 {
        self.hz
    }

    /// True where it was measured, and not announced by the host.
    pub fn is_measured(self) -> bool {
        self.measured
    }
}

/// The frequency that CPUID announces: leaf 0x15, or a hypervisor's timing leaf.
fn announced(read: &dyn Fn(u32, u32) -> crate::CpuidLeaf) -> Option<u64> {
    const HYPERVISOR_BIT: u32 = 1 << 31;
    if read(0, 0).eax >= 0x15 {
        let l = read(0x15, 0);
        if l.eax != 0 && l.ebx != 0 && l.ecx != 0 {
            let hz = u128::from(l.ecx) * u128::from(l.ebx) / u128::from(l.eax);
            return plausible(hz as u64);
        }
    }
    let hypervisor = read(1, 0).ecx & HYPERVISOR_BIT != 0;
    if hypervisor && read(0x4000_0000, 0).eax >= 0x4000_0010 {
        return plausible(u64::from(read(0x4000_0010, 0).eax) * 1000);
    }
    None
}

fn plausible(hz: u64) -> Option<u64> {
    PLAUSIBLE.contains(&hz).then_some(hz)
}

/// A TSC value and the clock's at the same time, as nearly as can be told.
#[derive(Debug)]
struct Sample {
    tsc: u64,
    nanoseconds: u64,
}

fn sample() -> Sample {
    let mut best = (
        u64::MAX,
        Sample {
            tsc: 0,
            nanoseconds: 0,
        },
    );
    for _ in 0..BRACKETS {
        let before = arch_host::tsc();
        let nanoseconds = arch_host::monotonic_nanoseconds();
        let width = arch_host::tsc().wrapping_sub(before);
        if width < best.0 {
            let tsc = before.wrapping_add(width / 2);
            best = (width, Sample { tsc, nanoseconds });
        }
    }
    best.1
}

fn measure_since(start: &Sample) -> u64 {
    let passed = arch_host::monotonic_nanoseconds().wrapping_sub(start.nanoseconds);
    let left = MEASURED_NANOSECONDS.saturating_sub(passed);
    std::thread::sleep(std::time::Duration::from_nanos(left));
    let end = sample();
    let nanoseconds = end.nanoseconds.wrapping_sub(start.nanoseconds).max(1);
    let ticks = end.tsc.wrapping_sub(start.tsc);
    (u128::from(ticks) * 1_000_000_000 / u128::from(nanoseconds)) as u64
}

impl Cpu {
    /// The guest's TSC now.
    #[inline]
    pub fn tsc_now(&self) -> u64 {
        arch_host::tsc().wrapping_add(self.tsc_offset)
    }

    /// WRMSR to IA32_TIME_STAMP_COUNTER: IA32_TSC_ADJUST moves along.
    pub(crate) fn write_tsc(&mut self, v: u64) {
        let delta = v.wrapping_sub(self.tsc_now());
        self.move_tsc(delta);
    }

    /// WRMSR to IA32_TSC_ADJUST: the TSC moves along.
    pub(crate) fn write_tsc_adjust(&mut self, v: u64) {
        self.move_tsc(v.wrapping_sub(self.msr.tsc_adjust));
    }

    fn move_tsc(&mut self, delta: u64) {
        self.tsc_offset = self.tsc_offset.wrapping_add(delta);
        self.msr.tsc_adjust = self.msr.tsc_adjust.wrapping_add(delta);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::CpuidLeaf;

    #[test]
    fn announced_frequencies_are_taken_where_they_are_plausible() {
        let leaf = |eax, ebx, ecx| CpuidLeaf {
            eax,
            ebx,
            ecx,
            edx: 0,
        };
        let intel = |l, _| match l {
            0 => leaf(0x16, 0, 0),
            0x15 => leaf(2, 168, 25_000_000),
            _ => CpuidLeaf::default(),
        };
        assert_eq!(announced(&intel), Some(2_100_000_000));
        let kvm = |l, _| match l {
            0 => leaf(0xd, 0, 0),
            1 => leaf(0, 0, 1 << 31),
            0x4000_0000 => leaf(0x4000_0010, 0, 0),
            0x4000_0010 => leaf(2_596_136, 0, 0),
            _ => CpuidLeaf::default(),
        };
        assert_eq!(announced(&kvm), Some(2_596_136_000));
        let silly = |l, _| match l {
            0 => leaf(0x15, 0, 0),
            0x15 => leaf(1, 1, 1),
            _ => CpuidLeaf::default(),
        };
        assert_eq!(announced(&silly), None);
        assert_eq!(announced(&|_, _| CpuidLeaf::default()), None);
    }

    #[test]
    fn two_measurements_agree() {
        let start = sample();
        let (a, b) = (measure_since(&sample()), measure_since(&start));
        assert!(PLAUSIBLE.contains(&a));
        // The hosts that run tests may be busy: a hundred parts per million.
        assert!(a.abs_diff(b) < a / 10_000, "{a} {b}");
    }
}
