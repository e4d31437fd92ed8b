//! The machine as one vCPU sees it: ports, device memory, its local APIC.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use doppel_device::{Alarm, BusMaster, OnAlarm, Timers, Wired};
use doppel_memory::{GuestRam, PAGE_MASK};
use doppel_pc::{Acknowledged, CpuApic, I8259, NumericError, Requests};
use doppel_x86::{Bus, Start};

use crate::attention::Attention;
use crate::clock_pages::ClockPages;
use crate::doorbell::Doorbell;
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

/// Calls the vCPU out of whatever it does.
struct CounterAlarm {
    alarm: Alarm,
    _rings: Arc<Rings>,
}

struct Rings(Arc<Doorbell>);

impl OnAlarm for Rings {
    fn on_alarm(&self) {
        self.0.ring();
    }
}

/// One vCPU's [`Bus`].
pub struct CpuBus {
    ports: BusMaster,
    memory: BusMaster,
    pic: Arc<Wired<I8259>>,
    numeric_error: Arc<Wired<NumericError>>,
    apic: CpuApic,
    /// Its number.
    cpu: u32,
    clock_pages: Arc<ClockPages>,
    timers: Arc<Timers>,
    /// Of the thread that runs the vCPU, once it does.
    attention: Option<Attention>,
    ram: Arc<GuestRam>,
    /// Where the guest is told that an interrupt needs no EOI, and whether it was for the one in service.
    pv_eoi: Option<u64>,
    end_lent: bool,
    /// Rings when a performance counter overflows.
    counter_alarm: Option<CounterAlarm>,
    /// Time is measured, which costs more than many an access.
    timing: bool,
    /// What was counted.
    pub exits: BusExits,
}

impl CpuBus {
    /// For the vCPU that `apic` belongs to.
    pub fn new(pc: &Pc, cpu: u32, apic: CpuApic, ram: Arc<GuestRam>, timing: bool) -> Self {
        CpuBus {
            ports: BusMaster::new(pc.ports.clone()),
            memory: BusMaster::new(pc.memory.clone()),
            pic: pc.pic.clone(),
            numeric_error: pc.numeric_error.clone(),
            apic,
            cpu,
            clock_pages: pc.clock_pages.clone(),
            timers: pc.timers.clone(),
            attention: None,
            ram,
            pv_eoi: None,
            end_lent: false,
            counter_alarm: None,
            timing,
            exits: BusExits::default(),
        }
    }

    /// The vCPU has performance counters: their alarm rings its doorbell.
    pub fn call_for_counters(&mut self, doorbell: Arc<Doorbell>) {
        let rings = Arc::new(Rings(doorbell));
        let target: Weak<dyn OnAlarm> = Arc::<Rings>::downgrade(&rings);
        let alarm = self.timers.alarm(target);
        self.counter_alarm = Some(CounterAlarm {
            alarm,
            _rings: rings,
        });
    }

    fn timed<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        if !self.timing {
            return f(self);
        }
        let start = Instant::now();
        let result = f(self);
        self.exits.time += start.elapsed();
        result
    }

    /// Tells the guest that the interrupt that it is about to take needs no EOI, where that is so.
    fn lend_end(&mut self) {
        let Some(word) = self.pv_eoi else { return };
        let old: Option<u32> = self.ram.load(word);
        if let Some(old) = old.filter(|_| self.apic.lend_end()) {
            self.end_lent = true;
            let told = old | PV_EOI_PENDING;
            self.ram.write_from_device(word, &told.to_le_bytes());
        }
    }

    /// Sees whether the guest has ended the interrupt meanwhile; from now on it has to tell. What that lets through is the
    /// caller's where it `looks` at the requests next.
    fn settle_end(&mut self, looks: bool) {
        if !std::mem::take(&mut self.end_lent) {
            return;
        }
        let word = self.pv_eoi.unwrap_or(u64::MAX);
        let flags: u32 = self.ram.load(word).unwrap_or(0);
        let over = flags & PV_EOI_PENDING == 0;
        if !over {
            let told = flags & !PV_EOI_PENDING;
            self.ram.write_from_device(word, &told.to_le_bytes());
        }
        self.apic.return_end(over, looks);
    }

    fn settle_end_for(&mut self, gpa: u64) {
        if self.end_lent && self.apic_offset(gpa).is_some() {
            self.settle_end(false);
        }
    }

    fn apic_offset(&self, gpa: u64) -> Option<u64> {
        (self.apic.page() == Some(gpa & !PAGE_MASK)).then_some(gpa & PAGE_MASK)
    }
}

/// Bit 0 of the paravirtual EOI's word.
const PV_EOI_PENDING: u32 = 1;

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
        self.settle_end_for(gpa);
        self.timed(|b| match b.apic_offset(gpa) {
            Some(offset) => b.apic.read(offset, size),
            None => b.memory.read(gpa, size),
        })
    }

    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) {
        self.exits.mmio_write += 1;
        self.settle_end_for(gpa);
        self.timed(|b| match b.apic_offset(gpa) {
            Some(offset) => b.apic.write(offset, size, value),
            None => b.memory.write(gpa, size, value),
        });
    }

    fn apic_msr_read(&mut self, msr: u32) -> Option<u64> {
        self.exits.apic_msr += 1;
        self.settle_end(false);
        self.timed(|b| b.apic.read_msr(msr))
    }

    fn apic_msr_write(&mut self, msr: u32, value: u64, tsc_now: u64) -> Option<()> {
        self.exits.apic_msr += 1;
        self.settle_end(false);
        self.timed(|b| b.apic.write_msr(msr, value, tsc_now))
    }

    fn tsc_moved(&mut self, tsc_now: u64) {
        self.timed(|b| b.apic.tsc_moved(tsc_now));
    }

    fn cr8(&mut self) -> u64 {
        self.apic.cr8()
    }

    fn set_cr8(&mut self, value: u64) {
        self.apic.set_cr8(value);
    }

    fn interrupt_pending(&mut self) -> bool {
        if self.end_lent && self.apic.requests().contains(Requests::END) {
            self.settle_end(true);
        }
        let maskable = Requests::INTERRUPT | Requests::EXTERNAL;
        self.apic.requests().intersects(maskable)
    }

    fn interrupt_acknowledge(&mut self) -> Option<u8> {
        // After a stop of the whole process this thread may be the first to run.
        self.timers.tell_lateness();
        let attention = self.attention.get_or_insert_with(Attention::new);
        if attention.was_stopped() {
            self.clock_pages.tell_of_stop();
        }
        self.settle_end(true);
        let vector = match self.timed(|b| b.apic.acknowledge())? {
            Acknowledged::Vector(vector) => {
                self.lend_end();
                Some(vector)
            }
            Acknowledged::External => Some(self.timed(|b| b.pic.with(|pic, _| pic.acknowledge()))),
        };
        self.exits.interrupt += u64::from(vector.is_some());
        vector
    }

    fn take_nmi(&mut self) -> bool {
        let taken = self.apic.take_nmi();
        self.exits.nmi += u64::from(taken);
        taken
    }

    fn nmi_ends(&mut self) {
        self.apic.nmi_ends();
    }

    fn numeric_error(&mut self, error: bool) -> bool {
        let cpu = self.cpu;
        self.numeric_error
            .with(|chip, _| chip.set_error(cpu, error))
    }

    fn spinning(&mut self) {
        std::thread::yield_now();
    }

    fn set_pv_eoi(&mut self, word: Option<u64>) {
        self.settle_end(false);
        self.pv_eoi = word;
    }

    fn set_clock_page(&mut self, page: Option<u64>) {
        self.clock_pages.set(self.cpu, page);
    }

    fn counter_interrupt(&mut self, masks: bool) {
        self.apic.overflow(masks);
    }

    fn set_counter_alarm(&mut self, nanoseconds: u64) {
        if let Some(on) = &self.counter_alarm {
            on.alarm.set(Some(self.timers.clock().now() + nanoseconds));
        }
    }

    fn halt_ends(&mut self) {
        if let Some(attention) = &mut self.attention {
            attention.slept();
        }
    }

    fn device_ends_any_halt(&mut self) -> bool {
        self.apic.device_ends_any_halt()
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
            doppel_pc::Start::Init => {
                (self.pv_eoi, self.end_lent) = (None, false);
                self.clock_pages.set(self.cpu, None);
                Start::Init
            }
            doppel_pc::Start::Startup(page) => Start::StartUp(page),
        })
    }
}
