//! The machine around the CPU under test: an interrupt line, an NMI line and a few ports that act on them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use doppel_memory::GuestRam;
use doppel_x86::{Bus, Kick};

/// Writing a vector here raises that interrupt at once.
pub const PORT_INTERRUPT: u16 = 0x80;
/// Any write here raises an NMI at once.
pub const PORT_NMI: u16 = 0x81;
/// Any write here makes the device write [`TestBus::device_write`] into RAM.
pub const PORT_DEVICE_WRITE: u16 = 0x82;
/// A write of `CPU << 8 | vector` interrupts another CPU.
pub const PORT_IPI: u16 = 0x84;
/// The interrupt that a performance counter raises when it overflows.
pub const COUNTER_VECTOR: u8 = 0x61;
/// A page of device memory: no RAM is there.
pub const DEVICE_PAGE: u64 = 0xfed0_0000;

/// Lines that any thread may raise.
#[derive(Default)]
pub struct Lines {
    vector: Mutex<Option<u8>>,
    pending: AtomicBool,
    nmi: AtomicBool,
}

impl Lines {
    /// Raises the interrupt line; whoever does so from another thread kicks the engine afterwards.
    pub fn interrupt(&self, vector: u8) {
        *self.vector.lock().expect("not poisoned") = Some(vector);
        self.pending.store(true, Ordering::SeqCst);
    }
    /// Raises the NMI line.
    pub fn nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
    }
    /// True until the interrupt has been taken.
    pub fn interrupt_waits(&self) -> bool {
        self.pending.load(Ordering::SeqCst)
    }
}

/// What the CPU sees.
pub struct TestBus {
    /// The lines.
    pub lines: Arc<Lines>,
    /// `(port, value)` of every other port write, the first thousand.
    pub written: Vec<(u16, u32)>,
    /// `(address, size, value)` of every store to a device.
    pub device_stores: Vec<(u64, u8, u64)>,
    /// The guest's TSC each time that it was set.
    pub tsc_moves: Vec<u64>,
    /// What [`PORT_DEVICE_WRITE`] writes: an address and bytes.
    pub device_write: (u64, Vec<u8>),
    /// Every CPU of a crowd, by its number.
    pub others: Vec<(Arc<Lines>, Arc<dyn Kick>)>,
    /// The engine of the CPU.
    pub kick: Option<Arc<dyn Kick>>,
    apic_base: u64,
    ram: Arc<GuestRam>,
}

impl TestBus {
    /// Quiet lines.
    pub fn new(ram: Arc<GuestRam>) -> Self {
        TestBus {
            lines: Arc::default(),
            written: Vec::new(),
            device_stores: Vec::new(),
            tsc_moves: Vec::new(),
            device_write: (0, Vec::new()),
            others: Vec::new(),
            kick: None,
            apic_base: 0xfee0_0900,
            ram,
        }
    }
}

const MOST_NOTED: usize = 1000;
const APIC_BASE: u32 = 0x1b;

impl Bus for TestBus {
    fn port_read(&mut self, port: u16, size: u8) -> u32 {
        (u32::from(port) * 0x0101) & (u32::MAX >> (32 - 8 * u32::from(size)))
    }
    fn port_write(&mut self, port: u16, _size: u8, value: u32) {
        match port {
            PORT_INTERRUPT => self.lines.interrupt(value as u8),
            PORT_IPI => {
                if let Some((lines, kick)) = self.others.get(value as usize >> 8) {
                    lines.interrupt(value as u8);
                    kick.kick();
                }
            }
            PORT_NMI => self.lines.nmi(),
            PORT_DEVICE_WRITE => {
                let (gpa, bytes) = &self.device_write;
                self.ram.write_from_device(*gpa, bytes);
            }
            _ if self.written.len() < MOST_NOTED => self.written.push((port, value)),
            _ => {}
        }
    }
    fn mmio_read(&mut self, gpa: u64, size: u8) -> u64 {
        ((gpa & 0xff) * 0x0101_0101_0101_0101) & (u64::MAX >> (64 - 8 * u32::from(size)))
    }
    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) {
        if self.device_stores.len() < MOST_NOTED {
            self.device_stores.push((gpa, size, value));
        }
    }
    fn apic_msr_read(&mut self, msr: u32) -> Option<u64> {
        (msr == APIC_BASE).then_some(self.apic_base)
    }
    fn apic_msr_write(&mut self, msr: u32, value: u64, _: u64) -> Option<()> {
        let fine = msr == APIC_BASE && value & 0xff == 0;
        fine.then(|| self.apic_base = value)
    }
    fn tsc_moved(&mut self, tsc_now: u64) {
        if self.tsc_moves.len() < MOST_NOTED {
            self.tsc_moves.push(tsc_now);
        }
    }
    fn cr8(&mut self) -> u64 {
        0
    }
    fn set_cr8(&mut self, _: u64) {}
    fn interrupt_pending(&mut self) -> bool {
        self.lines.interrupt_waits()
    }
    fn interrupt_acknowledge(&mut self) -> Option<u8> {
        self.lines.pending.store(false, Ordering::SeqCst);
        self.lines.vector.lock().expect("not poisoned").take()
    }
    fn spinning(&mut self) {
        std::thread::yield_now();
    }
    fn counter_interrupt(&mut self, _masks: bool) {
        self.lines.interrupt(COUNTER_VECTOR);
    }
    fn set_counter_alarm(&mut self, nanoseconds: u64) {
        if let Some(kick) = self.kick.clone() {
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_nanos(nanoseconds));
                kick.kick();
            });
        }
    }
    fn take_nmi(&mut self) -> bool {
        self.lines.nmi.swap(false, Ordering::SeqCst)
    }
}
