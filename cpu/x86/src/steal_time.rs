//! KVM's steal time: a structure in guest memory that tells how long the CPU was ready and had no processor of the host, and
//! whether it has one now (Linux Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME).
//!
//! A halted CPU is marked as preempted, as KVM does it. Who wants it to flush its TLB then need not wake it: it asks in the same byte, by
//! compare and exchange, and the CPU flushes before it runs again (KVM_FEATURE_PV_TLB_FLUSH).

use crate::{Bus, Cpu};

const ENABLE: u64 = 1;
/// Bits of the MSR that must be 0; the structure is aligned to 64 bytes.
const RESERVED: u64 = 0x3e;

/// Offsets in the structure.
const STEAL: u64 = 0;
const VERSION: u64 = 8;
const PREEMPTED_BYTE: u64 = 16;

const PREEMPTED: u8 = 1;
const FLUSH_TLB: u8 = 1 << 1;

impl Cpu {
    /// WRMSR; `None` is #GP(0).
    pub(crate) fn write_steal_time_msr(&mut self, v: u64) -> Option<()> {
        if v & RESERVED != 0 {
            return None;
        }
        self.msr.kvm_steal_time = v;
        Some(())
    }

    fn steal_time_area(&self) -> Option<u64> {
        let msr = self.msr.kvm_steal_time;
        let gpa = msr & !(RESERVED | ENABLE);
        (msr & ENABLE != 0 && self.ram.is_ram(gpa)).then_some(gpa)
    }

    /// Tells the guest how long (in nanoseconds, since the machine's start) this CPU has waited for a processor.
    pub fn tell_steal_time(&mut self, bus: &mut dyn Bus, nanoseconds: u64) {
        let Some(gpa) = self.steal_time_area() else {
            return;
        };
        let version: u32 = self.ram.load(gpa + VERSION).unwrap_or(0);
        // Odd while it changes.
        let changing = version | 1;
        self.store_physical(bus, gpa + VERSION, &changing.to_le_bytes());
        self.store_physical(bus, gpa + STEAL, &nanoseconds.to_le_bytes());
        let changed = changing.wrapping_add(1);
        self.store_physical(bus, gpa + VERSION, &changed.to_le_bytes());
    }

    /// Marks the CPU as preempted: it is about to sleep.
    pub fn mark_preempted(&mut self, bus: &mut dyn Bus) {
        if let Some(gpa) = self.steal_time_area() {
            self.store_physical(bus, gpa + PREEMPTED_BYTE, &[PREEMPTED]);
        }
    }

    /// Takes the mark away, and does what was asked for meanwhile.
    pub fn mark_running(&mut self) {
        let Some(gpa) = self.steal_time_area() else {
            return;
        };
        let Some(p) = self.ram.ptr(gpa + PREEMPTED_BYTE) else {
            return;
        };
        let mut seen: u8 = p.load();
        while let Err(now) = p.compare_exchange(seen, 0) {
            seen = now;
        }
        self.note_write(gpa + PREEMPTED_BYTE, 1);
        if seen & FLUSH_TLB != 0 {
            self.counters.deferred_flushes += 1;
            self.flush_tlb(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::msr;
    use crate::testing::{AMD, TestBus, long_mode};

    const MSR: u32 = 0x4b56_4d03;
    const AREA: u64 = 0x1_8040;

    #[test]
    fn the_time_is_told_with_an_even_version() {
        let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
        cpu.tell_steal_time(&mut bus, 7);
        assert_eq!(cpu.ram.load(AREA), Some(0u64), "nobody asked");
        msr::write(&mut cpu, &mut bus, MSR, AREA | 1).unwrap();
        cpu.tell_steal_time(&mut bus, 1234);
        assert_eq!(cpu.ram.load(AREA), Some(1234u64));
        assert_eq!(cpu.ram.load(AREA + VERSION), Some(2u32));
        assert_eq!(msr::read(&mut cpu, &mut bus, MSR), Ok(AREA | 1));
        assert!(msr::write(&mut cpu, &mut bus, MSR, AREA | 3).is_err());
        for gpa in [1 << 45, !63u64] {
            msr::write(&mut cpu, &mut bus, MSR, gpa | 1).unwrap();
            cpu.tell_steal_time(&mut bus, 1);
            cpu.mark_preempted(&mut bus);
            cpu.mark_running();
        }
    }

    #[test]
    fn a_flush_that_was_asked_for_comes_before_the_cpu_runs() {
        let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
        msr::write(&mut cpu, &mut bus, MSR, AREA | 1).unwrap();
        cpu.mark_preempted(&mut bus);
        let byte = |cpu: &Cpu| cpu.ram.load::<u8>(AREA + PREEMPTED_BYTE).unwrap();
        assert_eq!(byte(&cpu), PREEMPTED);
        let flushes = cpu.counters.tlb_flushes;
        cpu.mark_running();
        assert_eq!((byte(&cpu), cpu.counters.tlb_flushes), (0, flushes));
        cpu.mark_preempted(&mut bus);
        let asked = PREEMPTED | FLUSH_TLB;
        cpu.ram.store(AREA + PREEMPTED_BYTE, asked).unwrap();
        cpu.mark_running();
        assert_eq!((byte(&cpu), cpu.counters.tlb_flushes), (0, flushes + 1));
    }
}
