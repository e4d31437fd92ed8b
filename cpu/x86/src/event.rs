//! Events between instructions: NMI and maskable interrupts, and the signals that reset a CPU (INIT, start-up IPI).

use crate::exception::{self, Event};
use crate::{Activity, Bus, Cpu, Cr0, Cr4, Dtr, Efer, Outcome, Rflags, Seg, Segment, Vector};

/// True where [`deliver_pending`] would deliver a maskable interrupt now. (An NMI shows only when it is taken.)
pub fn deliverable(cpu: &Cpu, bus: &mut dyn Bus) -> bool {
    interruptible(cpu) && bus.interrupt_pending()
}

/// True while the CPU takes maskable interrupts.
pub fn interruptible(cpu: &Cpu) -> bool {
    cpu.rflags.contains(Rflags::IF) && !in_shadow(cpu) && runs(cpu)
}

fn in_shadow(cpu: &Cpu) -> bool {
    cpu.interrupt_shadow || cpu.mov_ss_shadow
}

fn runs(cpu: &Cpu) -> bool {
    !matches!(cpu.activity, Activity::WaitForSipi | Activity::Shutdown)
}

/// Delivers a pending NMI, or else a pending maskable interrupt where the CPU takes one; either ends a halt and an MWAIT, which other things end before.
/// Returns whether something was delivered. Delivery may end in [`Activity::Shutdown`].
pub fn deliver_pending(cpu: &mut Cpu, bus: &mut dyn Bus) -> bool {
    cpu.follow_monitor(bus);
    cpu.follow_counters(bus);
    if runs(cpu) && !cpu.nmi_blocked && !in_shadow(cpu) && bus.take_nmi() {
        cpu.nmi_blocked = true;
        return deliver(cpu, bus, Vector::Nmi as u8);
    }
    if !deliverable(cpu, bus) {
        return false;
    }
    match bus.interrupt_acknowledge() {
        Some(vector) => {
            cpu.counters.interrupts += 1;
            deliver(cpu, bus, vector)
        }
        None => false,
    }
}

fn deliver(cpu: &mut Cpu, bus: &mut dyn Bus, vector: u8) -> bool {
    cpu.activity = Activity::Active;
    // The handler may store to the line before it returns to an MWAIT.
    cpu.peer.disarm();
    let event = Event::external(cpu, vector);
    let _: Outcome = exception::deliver_or_fault(cpu, bus, event);
    true
}

impl Cpu {
    /// INIT: the reset state, but FPU state, MSRs, the TSC and CR0's cache bits stay; then waits for a start-up IPI
    /// unless this is the bootstrap processor (CPU 0).
    pub fn init(&mut self) {
        let data = Segment {
            base: 0,
            limit: 0xffff,
            attributes: 0x93,
            selector: 0,
        };
        self.gpr = [0; 16];
        self.gpr[crate::Gpr::Rdx as usize] = u64::from(self.cpuid.signature());
        self.rflags = Rflags::ONE;
        self.seg = [data; 6];
        self.seg[Seg::Cs as usize] = Segment {
            base: 0xffff_0000,
            attributes: 0x9b,
            selector: 0xf000,
            ..data
        };
        self.rip = 0xfff0;
        self.ldtr = Segment {
            attributes: 0x82,
            ..data
        };
        self.tr = Segment {
            attributes: 0x8b,
            ..data
        };
        self.gdtr = Dtr {
            base: 0,
            limit: 0xffff,
        };
        self.idtr = self.gdtr;
        self.cr0 = Cr0::ET | (self.cr0 & (Cr0::NW | Cr0::CD));
        (self.cr2, self.cr3) = (0, 0);
        self.cr4 = Cr4::empty();
        self.efer = Efer::empty();
        self.dr = [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400];
        self.cpl = 0;
        self.interrupt_shadow = false;
        self.mov_ss_shadow = false;
        self.nmi_blocked = false;
        self.breakpoint_hits = 0;
        self.msr.kvm_pv_eoi = 0;
        self.msr.kvm_steal_time = 0;
        self.msr.kvm_system_time = 0;
        self.flush_tlb(true);
        self.peer.disarm();
        self.activity = if self.id == 0 {
            Activity::Active
        } else {
            Activity::WaitForSipi
        };
    }

    /// Start-up IPI: runs from physical address `vector << 12` in real mode. Ignored unless the CPU waits for it.
    pub fn start_up(&mut self, vector: u8) {
        if self.activity != Activity::WaitForSipi {
            return;
        }
        let selector = u16::from(vector) << 8;
        self.seg[Seg::Cs as usize] = Segment {
            base: u64::from(vector) << 12,
            limit: 0xffff,
            attributes: 0x9b,
            selector,
        };
        self.rip = 0;
        self.activity = Activity::Active;
    }

    /// I/O privilege level.
    pub(crate) fn iopl(&self) -> u8 {
        (self.rflags.bits() >> 12 & 3) as u8
    }

    /// True where CLI, STI and the like are allowed by IOPL.
    pub(crate) fn io_privileged(&self) -> bool {
        self.cpl <= self.iopl()
    }
}
