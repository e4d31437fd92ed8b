//! The machine as one vCPU sees it: ports, device memory, its local APIC.

use std::sync::Arc;
use std::time::{Duration, Instant};

use doppel_device::Wired;
use doppel_memory::PAGE_MASK;
use doppel_pc::{Acknowledged, CpuApic, I8259, Requests};
use doppel_x86::{Bus, Start};

use crate::pc::Pc;

/// How often the vCPU went to a device, and for how long.
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)]
pub struct BusExits {
    pub port_read: u64,
    pub port_write: u64,
    pub mmio_read: u64,
    pub mmio_write: u64,
    pub apic_msr: u64,
    pub interrupt: u64,
    pub nmi: u64,
    /// In devices, where it is measured.
    pub time: Duration,
}

/// One vCPU's [`Bus`].
pub struct CpuBus {
    ports: Arc<doppel_device::Bus>,
    memory: Arc<doppel_device::Bus>,
    pic: Arc<Wired<I8259>>,
    apic: CpuApic,
    /// Time is measured, which costs more than many an access.
    timing: bool,
    /// What was counted.
    pub exits: BusExits,
}

impl CpuBus {
    /// For the vCPU that `apic` belongs to.
    pub fn new(pc: &Pc, apic: CpuApic, timing: bool) -> Self {
        CpuBus {
            ports: pc.ports.clone(),
            memory: pc.memory.clone(),
            pic: pc.pic.clone(),
            apic,
            timing,
            exits: BusExits::default(),
        }
    }

    fn timed<R>(&mut self, f: impl FnOnce(&Self) -> R) -> R {
        if !self.timing {
            return f(self);
        }
        let start = Instant::now();
        let result = f(self);
        self.exits.time += start.elapsed();
        result
    }

    fn apic_offset(&self, gpa: u64) -> Option<u64> {
        (self.apic.page() == Some(gpa & !PAGE_MASK)).then_some(gpa & PAGE_MASK)
    }
}

impl Bus for CpuBus {
    fn port_read(&mut self, port: u16, size: u8) -> u32 {
        self.exits.port_read += 1;
        self.timed(|b| b.ports.read(port.into(), size)) as u32
    }

    fn port_write(&mut self, port: u16, size: u8, value: u32) {
        self.exits.port_write += 1;
        self.timed(|b| b.ports.write(port.into(), size, value.into()));
    }

    fn mmio_read(&mut self, gpa: u64, size: u8) -> u64 {
        self.exits.mmio_read += 1;
        self.timed(|b| match b.apic_offset(gpa) {
            Some(offset) => b.apic.read(offset, size),
            None => b.memory.read(gpa, size),
        })
    }

    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) {
        self.exits.mmio_write += 1;
        self.timed(|b| match b.apic_offset(gpa) {
            Some(offset) => b.apic.write(offset, size, value),
            None => b.memory.write(gpa, size, value),
        });
    }

    fn apic_msr_read(&mut self, msr: u32) -> Option<u64> {
        self.exits.apic_msr += 1;
        self.timed(|b| b.apic.read_msr(msr))
    }

    fn apic_msr_write(&mut self, msr: u32, value: u64, tsc_now: u64) -> Option<()> {
        self.exits.apic_msr += 1;
        self.timed(|b| b.apic.write_msr(msr, value, tsc_now))
    }

    fn cr8(&mut self) -> u64 {
        self.apic.cr8()
    }

    fn set_cr8(&mut self, value: u64) {
        self.apic.set_cr8(value);
    }

    fn interrupt_pending(&mut self) -> bool {
        let maskable = Requests::INTERRUPT | Requests::EXTERNAL;
        self.apic.requests().intersects(maskable)
    }

    fn interrupt_acknowledge(&mut self) -> Option<u8> {
        let vector = self.timed(|b| match b.apic.acknowledge()? {
            Acknowledged::Vector(vector) => Some(vector),
            Acknowledged::External => Some(b.pic.with(|pic, _| pic.acknowledge())),
        });
        self.exits.interrupt += u64::from(vector.is_some());
        vector
    }

    fn take_nmi(&mut self) -> bool {
        let taken = self.apic.take_nmi();
        self.exits.nmi += u64::from(taken);
        taken
    }

    fn spinning(&mut self) {
        std::thread::yield_now();
    }

    fn wake(&mut self, id: u32) {
        self.apic.wake(id);
    }

    fn take_wake(&mut self) -> bool {
        self.apic.take_wake()
    }

    fn send_ipis(&mut self, ids: u128, first: u32, icr: u32) -> u64 {
        self.apic.send_to(ids, first, icr)
    }

    fn take_start(&mut self) -> Option<Start> {
        Some(match self.apic.take_start()? {
            doppel_pc::Start::Init => Start::Init,
            doppel_pc::Start::Startup(page) => Start::StartUp(page),
        })
    }
}
