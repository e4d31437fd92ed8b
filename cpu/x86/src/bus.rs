//! What a CPU sees of the machine around it: ports, device memory, its local APIC's interrupt line.
//!
//! The machine implements it; no CPU crate knows a device. Calls come from the vCPU's own thread.

/// What an INIT or start-up IPI asks of a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// [`crate::Cpu::init`].
    Init,
    /// [`crate::Cpu::start_up`] at this page.
    StartUp(u8),
}

/// The machine as one vCPU sees it. No call may panic or block for long, whatever the guest asks for.
pub trait Bus {
    /// `in`: `size` is 1, 2 or 4 bytes. What is not there reads as all ones.
    fn port_read(&mut self, port: u16, size: u8) -> u32;
    /// `out`: `size` is 1, 2 or 4 bytes.
    fn port_write(&mut self, port: u16, size: u8, value: u32);
    /// A load from a physical address that is not RAM; `size` is 1, 2, 4 or 8 and the access is within one page.
    fn mmio_read(&mut self, gpa: u64, size: u8) -> u64;
    /// A store to a physical address that is not RAM.
    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64);

    /// RDMSR of a local APIC register: IA32_APIC_BASE (0x1b), the x2APIC range (0x800..=0x8ff) or
    /// IA32_TSC_DEADLINE (0x6e0). `None` raises #GP(0).
    fn apic_msr_read(&mut self, msr: u32) -> Option<u64>;
    /// WRMSR of one of them. `None` raises #GP(0). `tsc_now` is the guest's TSC at the write.
    fn apic_msr_write(&mut self, msr: u32, value: u64, tsc_now: u64) -> Option<()>;
    /// The guest has set its TSC, which is `tsc_now`: IA32_TSC_DEADLINE waits for that counter.
    fn tsc_moved(&mut self, _tsc_now: u64) {}
    /// CR8: bits 7:4 of the local APIC's task priority register.
    fn cr8(&mut self) -> u64;
    /// A write to CR8 (0 to 15).
    fn set_cr8(&mut self, value: u64);

    /// True while the local APIC or the 8259 requests a maskable interrupt that the task priority allows.
    fn interrupt_pending(&mut self) -> bool;
    /// The INTA cycle: the vector of the interrupt that is delivered now.
    fn interrupt_acknowledge(&mut self) -> Option<u8>;
    /// Takes a pending non-maskable interrupt.
    fn take_nmi(&mut self) -> bool;
    /// NMIs are open again after one was taken: IRET was executed.
    fn nmi_ends(&mut self) {}
    /// FERR#: whether an x87 error waits that no exception tells of (CR0.NE is clear). Returns IGNNE#: x87 instructions are executed all the same.
    fn numeric_error(&mut self, _error: bool) -> bool {
        false
    }
    /// The CPU waits in a loop: another thread of the host may have better use for the processor.
    fn spinning(&mut self) {}
    /// KVM's paravirtual EOI: the machine may set bit 0 of the word at this physical address where an interrupt that it delivers needs
    /// no EOI; the guest clears it instead. `None`: no more of that.
    fn set_pv_eoi(&mut self, _word: Option<u64>) {}
    /// KVM's clock page (`pvclock_vcpu_time_info`) of this CPU is at this physical address from now on.
    fn set_clock_page(&mut self, _page: Option<u64>) {}
    /// KVM_HC_KICK_CPU: the CPU with this APIC ID leaves its present halt or its next, whatever its interrupt flag.
    fn wake(&mut self, _id: u32) {}
    /// A performance counter has overflowed: the local APIC interrupts as its entry for that says, and masks the entry then where `masks` says so.
    fn counter_interrupt(&mut self, _masks: bool) {}
    /// The engine is to be called back after so many nanoseconds, instead of when it was to be called before: a performance counter overflows then.
    fn set_counter_alarm(&mut self, _nanoseconds: u64) {}
    /// A halt of this CPU is over.
    fn halt_ends(&mut self) {}
    /// Takes a [`Bus::wake`] of this CPU. Engines do not: the machine does, when the CPU halts.
    fn take_wake(&mut self) -> bool {
        false
    }
    /// KVM_HC_SEND_IPI: an interrupt as the ICR describes it to the CPUs whose IDs have a bit set, the first of which stands for
    /// `first`. Returns to how many it went.
    fn send_ipis(&mut self, _ids: u128, _first: u32, _icr: u32) -> u64 {
        0
    }
    /// A device may yet send an NMI or INIT, which end a halt with interrupts off. Engines do not ask: the machine does, when the CPU halts.
    fn device_ends_any_halt(&mut self) -> bool {
        false
    }
    /// Takes a pending INIT or start-up IPI. Engines do not: the machine does, between two runs.
    fn take_start(&mut self) -> Option<Start> {
        None
    }
}

/// A machine with nothing in it: reads give all ones, nothing interrupts.
#[derive(Clone, Copy, Debug, Default)]
pub struct EmptyBus;

impl Bus for EmptyBus {
    fn port_read(&mut self, _: u16, size: u8) -> u32 {
        u32::MAX >> (32 - 8 * u32::from(size))
    }
    fn port_write(&mut self, _: u16, _: u8, _: u32) {}
    fn mmio_read(&mut self, _: u64, _: u8) -> u64 {
        u64::MAX
    }
    fn mmio_write(&mut self, _: u64, _: u8, _: u64) {}
    fn apic_msr_read(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn apic_msr_write(&mut self, _: u32, _: u64, _: u64) -> Option<()> {
        None
    }
    fn cr8(&mut self) -> u64 {
        0
    }
    fn set_cr8(&mut self, _: u64) {}
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    fn interrupt_acknowledge(&mut self) -> Option<u8> {
        None
    }
    fn take_nmi(&mut self) -> bool {
        false
    }
}
