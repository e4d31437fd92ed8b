//! KVM's paravirtual interface, which unmodified Linux speaks: the clock and hypercalls
//! (Linux Documentation/virt/kvm/x86/msr.rst and hypercalls.rst).
//!
//! The clock page says: at TSC `t` it was `s` nanoseconds after the machine's start, and the TSC ticks at this rate.
//! Every CPU's page is made from the same line through (TSC, time), so that the clocks of all CPUs agree and the guest
//! is told so (the "stable" flag).

use doppel_memory::GuestRam;

use crate::arch_host;
use crate::{Bus, Cpu, CpuMode, Gpr};

/// Bit 0 of the system-time MSR.
const ENABLE: u64 = 1;
const TSC_STABLE: u8 = 1;
/// The host has stopped the machine for a while: the guest takes it back when it has heard of it.
const GUEST_STOPPED: u8 = 2;
/// Where the clock page has these.
const FLAGS: u64 = 29;
const NANOSECONDS: u64 = 1_000_000_000;

const HC_VAPIC_POLL_IRQ: u64 = 1;
const HC_KICK_CPU: u64 = 5;
const HC_SEND_IPI: u64 = 10;
const HC_SCHED_YIELD: u64 = 11;
/// KVM_ENOSYS and KVM_EPERM, negated.
const ENOSYS: u64 = -1000i64 as u64;
const EPERM: u64 = -1i64 as u64;

/// How nanoseconds follow from ticks: shifted left by `shift` (right where negative), times `multiplier`, over 2^32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Scale {
    pub multiplier: u32,
    pub shift: i8,
}

impl Scale {
    /// The most exact scale for a TSC frequency in Hz.
    pub fn new(tsc_hz: u64) -> Self {
        let mut hz = tsc_hz.max(1);
        let mut shift = 0i8;
        while hz > NANOSECONDS * 2 {
            hz >>= 1;
            shift -= 1;
        }
        while hz <= NANOSECONDS {
            hz <<= 1;
            shift += 1;
        }
        let shifted = if shift < 0 {
            (u128::from(NANOSECONDS) << 32) << -shift
        } else {
            (u128::from(NANOSECONDS) << 32) >> shift
        };
        Scale {
            multiplier: (shifted / u128::from(tsc_hz.max(1))) as u32,
            shift,
        }
    }

    /// As the guest computes it.
    pub fn nanoseconds(self, ticks: u64) -> u64 {
        let shifted = if self.shift < 0 {
            ticks >> -self.shift
        } else {
            ticks << self.shift
        };
        ((u128::from(shifted) * u128::from(self.multiplier)) >> 32) as u64
    }
}

/// Tells the guest, in the clock page of one of its CPUs, that the host had stopped it. From any thread.
pub fn write_clock_stopped(ram: &GuestRam, page: u64) {
    let at = page.wrapping_add(FLAGS);
    if let Some(flags) = ram.load::<u8>(at) {
        ram.write_from_device(at, &[flags | GUEST_STOPPED]);
    }
}

impl Cpu {
    /// Nanoseconds since the machine's start, as every CPU's clock page tells them, and the guest's TSC at that time.
    fn kvm_time(&self) -> (u64, u64) {
        let host = arch_host::tsc();
        let since_start = host.wrapping_sub(self.tsc_origin);
        let scale = Scale::new(self.tsc_hz);
        (
            scale.nanoseconds(since_start),
            host.wrapping_add(self.tsc_offset),
        )
    }

    /// Writes where there is RAM within one page: the guest's structures are aligned.
    fn write_physical(&mut self, bus: &mut dyn Bus, gpa: u64, data: &[u8]) {
        let fits = self.ram.ptr(gpa).is_some_and(|p| p.room() >= data.len());
        if fits {
            self.store_physical(bus, gpa, data);
        }
    }

    /// WRMSR to the system-time MSR: fills the `pvclock_vcpu_time_info` that it points to.
    pub(crate) fn write_kvm_system_time(&mut self, bus: &mut dyn Bus, v: u64) {
        self.msr.kvm_system_time = v;
        bus.set_clock_page((v & ENABLE != 0).then_some(v & !3));
        self.refresh_kvm_clock(bus);
    }

    /// Writes the clock page anew; needed after the guest moved its TSC.
    pub(crate) fn refresh_kvm_clock(&mut self, bus: &mut dyn Bus) {
        let msr = self.msr.kvm_system_time;
        if msr & ENABLE == 0 {
            return;
        }
        let gpa = msr & !3;
        let old: u32 = self.ram.load(gpa).unwrap_or(0);
        // Odd while it changes.
        let version = (old | 1).wrapping_add(2);
        let (time, tsc) = self.kvm_time();
        let scale = Scale::new(self.tsc_hz);
        let mut page = [0u8; 32];
        page[0..4].copy_from_slice(&version.to_le_bytes());
        page[8..16].copy_from_slice(&tsc.to_le_bytes());
        page[16..24].copy_from_slice(&time.to_le_bytes());
        page[24..28].copy_from_slice(&scale.multiplier.to_le_bytes());
        page[28] = scale.shift as u8;
        page[FLAGS as usize] = TSC_STABLE;
        self.write_physical(bus, gpa, &page);
        self.write_physical(bus, gpa, &version.wrapping_add(1).to_le_bytes());
    }

    /// WRMSR to the wall-clock MSR: fills the `pvclock_wall_clock` that it points to with the time of the start.
    pub(crate) fn write_kvm_wall_clock(&mut self, bus: &mut dyn Bus, v: u64) {
        self.msr.kvm_wall_clock = v;
        let version = self.ram.load::<u32>(v).unwrap_or(0) | 1;
        let start = arch_host::wall_clock_nanoseconds().saturating_sub(self.kvm_time().0);
        let mut page = [0u8; 12];
        page[0..4].copy_from_slice(&version.wrapping_add(1).to_le_bytes());
        page[4..8].copy_from_slice(&((start / NANOSECONDS) as u32).to_le_bytes());
        page[8..12].copy_from_slice(&((start % NANOSECONDS) as u32).to_le_bytes());
        self.write_physical(bus, v, &page);
    }

    /// WRMSR to the paravirtual EOI's MSR; `None` is #GP(0).
    pub(crate) fn write_kvm_pv_eoi(&mut self, bus: &mut dyn Bus, v: u64) -> Option<()> {
        const RESERVED: u64 = 2;
        if v & RESERVED != 0 {
            return None;
        }
        self.msr.kvm_pv_eoi = v;
        bus.set_pv_eoi((v & ENABLE != 0).then_some(v & !3));
        Some(())
    }

    /// VMCALL or VMMCALL: the number in RAX, arguments in RBX, RCX, RDX and RSI, the answer in RAX.
    pub(crate) fn hypercall(&mut self, bus: &mut dyn Bus) {
        let wide = self.mode() == CpuMode::Bits64;
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        let [a, b, c, d] = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi].map(|r| self.reg(r) & mask);
        self.counters.hypercalls += 1;
        let several = self.cpuid.cpus() > 1;
        let answer = match self.reg(Gpr::Rax) & mask {
            _ if self.cpl != 0 => EPERM,
            HC_VAPIC_POLL_IRQ => 0,
            // Flags, which are 0, and whom to wake.
            HC_KICK_CPU if several => {
                bus.wake(b as u32);
                0
            }
            // Whom: a bit each from an ID on; in 32-bit code the halves of the mask are narrower.
            HC_SEND_IPI if several => {
                let bits = if wide { 64 } else { 32 };
                let ids = u128::from(a) | u128::from(b) << bits;
                bus.send_ipis(ids, c as u32, d as u32)
            }
            HC_SCHED_YIELD if several => {
                self.outside(|| bus.spinning());
                0
            }
            _ => ENOSYS,
        };
        self.gpr[Gpr::Rax as usize] = answer & mask;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::msr;
    use crate::testing::{AMD, TestBus, long_mode};

    /// What the guest computes from its clock page (Linux `__pvclock_read_cycles`).
    fn guest_time(cpu: &Cpu, page: u64, tsc: u64) -> u64 {
        let word = |offset| cpu.ram.load::<u64>(page + offset).unwrap();
        let multiplier = cpu.ram.load::<u32>(page + 24).unwrap();
        let shift = cpu.ram.load::<u8>(page + 28).unwrap() as i8;
        let scale = Scale { multiplier, shift };
        word(16) + scale.nanoseconds(tsc - word(8))
    }

    #[test]
    fn scales_are_exact_to_parts_per_billion() {
        for hz in [
            1_000_000_000u64,
            999_999_999,
            2_000_000_001,
            2_596_136_000,
            800_000_000,
            5_700_000_123,
        ] {
            let scale = Scale::new(hz);
            let hour = scale.nanoseconds(hz * 3600);
            assert!(hour.abs_diff(3_600_000_000_000) < 4_000, "{hz}: {hour}");
        }
    }

    #[test]
    fn the_clock_page_tells_the_time_and_survives_a_write_to_the_tsc() {
        const PAGE: u64 = 0x1_8000;
        let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
        msr::write(&mut cpu, &mut bus, 0x4b56_4d01, PAGE | 1).unwrap();
        let version = cpu.ram.load::<u32>(PAGE).unwrap();
        assert!(version != 0 && version % 2 == 0);
        assert_eq!(cpu.ram.load::<u8>(PAGE + 29), Some(TSC_STABLE));
        let real = |cpu: &Cpu| {
            let ticks = arch_host::tsc() - cpu.tsc_origin;
            (u128::from(ticks) * 1_000_000_000 / u128::from(cpu.tsc_hz)) as u64
        };
        let told = guest_time(&cpu, PAGE, cpu.tsc_now());
        assert!(told <= real(&cpu) + 10 && real(&cpu) - told < 1_000_000_000);
        // The guest sets its TSC back: its time goes on.
        msr::write(&mut cpu, &mut bus, 0x10, 0).unwrap();
        assert!(cpu.ram.load::<u32>(PAGE).unwrap() > version);
        let later = guest_time(&cpu, PAGE, cpu.tsc_now());
        assert!(later >= told && later <= real(&cpu) + 10);
        // Off: the page is left alone.
        msr::write(&mut cpu, &mut bus, 0x4b56_4d01, 0).unwrap();
        cpu.ram.store(PAGE, 0u32).unwrap();
        msr::write(&mut cpu, &mut bus, 0x10, 5).unwrap();
        assert_eq!(cpu.ram.load::<u32>(PAGE), Some(0));
    }

    #[test]
    fn the_wall_clock_is_that_of_the_start() {
        const AT: u64 = 0x1_8040;
        let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
        msr::write(&mut cpu, &mut bus, 0x4b56_4d00, AT).unwrap();
        assert_eq!(cpu.ram.load::<u32>(AT).unwrap() % 2, 0);
        let seconds = u64::from(cpu.ram.load::<u32>(AT + 4).unwrap());
        let now = arch_host::wall_clock_nanoseconds() / NANOSECONDS;
        assert!(seconds <= now && now - seconds < 60);
    }

    /// The answer to a hypercall, and what the machine heard of it.
    fn call(cpu: &mut Cpu, number: u64, arguments: [u64; 4]) -> (i64, Vec<String>) {
        let mut bus = TestBus::default();
        cpu.gpr[Gpr::Rax as usize] = number;
        let registers = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx, Gpr::Rsi];
        for (r, v) in registers.into_iter().zip(arguments) {
            cpu.gpr[r as usize] = v;
        }
        cpu.hypercall(&mut bus);
        (cpu.reg(Gpr::Rax) as i64, bus.calls)
    }

    #[test]
    fn hypercalls_reach_the_machine_from_the_kernel_only() {
        let mut cpu = long_mode(AMD);
        let alone = call(&mut cpu, HC_SEND_IPI, [1; 4]);
        assert_eq!(alone, (ENOSYS as i64, vec![]), "there is one CPU");
        cpu.cpuid = std::sync::Arc::new(crate::testing::model(AMD, 4));
        let heard = |text: &str| vec![text.to_owned()];
        let sent = heard("ipis 0x20000000000000001 from 3: 0xfd");
        assert_eq!(call(&mut cpu, HC_SEND_IPI, [1, 2, 3, 0xfd]), (1, sent));
        let woken = call(&mut cpu, HC_KICK_CPU, [0, 3, 0, 0]);
        assert_eq!(woken, (0, heard("wake 3")));
        let yielded = call(&mut cpu, HC_SCHED_YIELD, [0; 4]);
        assert_eq!(yielded, (0, heard("spinning")));
        assert_eq!(call(&mut cpu, 99, [0; 4]), (ENOSYS as i64, vec![]));
        cpu.cpl = 3;
        let denied = call(&mut cpu, HC_KICK_CPU, [0, 3, 0, 0]);
        assert_eq!(denied, (EPERM as i64, vec![]));
    }

    #[test]
    fn pages_outside_ram_or_at_an_edge_are_no_trouble() {
        let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
        for gpa in [u64::MAX, 1 << 45, 0xffc, (2 << 20) - 4, 0xa_0000] {
            msr::write(&mut cpu, &mut bus, 0x4b56_4d01, gpa | 1).unwrap();
            msr::write(&mut cpu, &mut bus, 0x4b56_4d00, gpa).unwrap();
        }
    }
}
