//! A driver for tests: the guest's half of a split driver, honest unless a test has it lie.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use doppel_device::{Bus, MsiTarget, Pin};
use doppel_memory::GuestRam;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use crate::{
    FEATURES_OK, Interrupt, Notifier, PciWiring, Queue, QueueState, VERSION_1, VirtioDevice,
    VirtioPci,
};

/// Where a test's function has its BAR.
pub const BAR_AT: u64 = 0xd000_0000;
/// Guest RAM of a rig.
pub const RAM_SIZE: u64 = 16 << 20;
/// How long a test waits for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(20);

const COMMON_STATUS: u64 = 0x14;

/// Messages that arrived: address and data.
#[derive(Default)]
pub struct Messages {
    seen: Mutex<Vec<(u64, u32)>>,
    came: Condvar,
}

impl MsiTarget for Messages {
    fn send(&self, address: u64, data: u32) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push((address, data));
        self.came.notify_all();
    }
}

impl Messages {
    /// Waits until there are messages, and takes them.
    pub fn wait(&self) -> Vec<(u64, u32)> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let empty = |seen: &mut Vec<_>| seen.is_empty();
        let (mut seen, _) = self
            .came
            .wait_timeout_while(seen, PATIENCE, empty)
            .unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut seen)
    }

    /// Takes those that are there.
    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A function on a bus, with RAM and an interrupt controller.
pub struct Rig {
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// Device memory.
    pub bus: Arc<Bus>,
    /// The function.
    pub pci: Arc<VirtioPci>,
    /// Where its messages go.
    pub messages: Arc<Messages>,
    /// Its INTA.
    pub pin: Pin,
}

impl Rig {
    /// A rig around `device`.
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let ram = Arc::new(GuestRam::new(RAM_SIZE).expect("16 MiB of RAM"));
        let bus = Arc::new(Bus::new());
        let messages = Arc::new(Messages::default());
        let pin = Pin::unconnected();
        let wiring = PciWiring {
            ram: ram.clone(),
            bus: Arc::downgrade(&bus),
            msi: messages.clone(),
            pin: pin.clone(),
        };
        let pci = VirtioPci::new(device, wiring).expect("descriptors");
        let rig = Rig {
            ram,
            bus,
            pci,
            messages,
            pin,
        };
        rig.place();
        rig
    }

    /// Places the BAR and makes the function a bus master.
    pub fn place(&self) {
        use doppel_device::PciFunction;
        self.pci.place(BAR_AT as u32);
        self.pci.config_write(4, 2, 0x0006);
    }

    /// A load from the BAR.
    pub fn read(&self, offset: u64, size: u8) -> u64 {
        self.bus.read(BAR_AT + offset, size)
    }

    /// A store to it.
    pub fn write(&self, offset: u64, size: u8, value: u64) {
        self.bus.write(BAR_AT + offset, size, value);
    }

    /// The device status.
    pub fn status(&self) -> u8 {
        self.read(COMMON_STATUS, 1) as u8
    }

    /// A store to the device status.
    pub fn set_status(&self, status: u8) {
        self.write(COMMON_STATUS, 1, status.into());
    }

    /// Everything the device offers.
    pub fn offered(&self) -> u64 {
        let half = |n| {
            self.write(0, 4, n);
            self.read(4, 4)
        };
        half(0) | half(1) << 32
    }

    /// The steps of a driver up to FEATURES_OK (virtio 1.2, 3.1.1). Says whether the device agrees.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        for half in [0, 1] {
            self.write(8, 4, half);
            self.write(0xc, 4, (features | VERSION_1) >> (32 * half) & 0xffff_ffff);
        }
        self.set_status(3 | FEATURES_OK);
        self.status() & FEATURES_OK != 0
    }

    /// Places queue `index` at `base` (64 KiB each are enough) and enables it.
    pub fn enable_queue(&self, index: u16, base: u64) -> DriverQueue {
        self.write(0x16, 2, index.into());
        let queue = DriverQueue::new(index, self.read(0x18, 2) as u16, base);
        // Rings of an earlier life may be there.
        for ring in [queue.avail(), queue.used()] {
            self.ram.write_from_device(ring, &[0; 4]);
        }
        self.place_queue(&queue);
        self.write(0x1c, 2, 1);
        queue
    }

    fn place_queue(&self, queue: &DriverQueue) {
        for (register, address) in [
            (0x20, queue.base),
            (0x28, queue.avail()),
            (0x30, queue.used()),
        ] {
            self.write(register, 4, address & 0xffff_ffff);
            self.write(register + 4, 4, address >> 32);
        }
    }

    /// Negotiates, enables all queues from `base` on and says that the driver is ready.
    pub fn start(&self, features: u64, base: u64) -> Vec<DriverQueue> {
        assert!(self.negotiate(features), "features {features:#x}");
        let count = self.read(0x12, 2) as u16;
        let queues = (0..count)
            .map(|n| self.enable_queue(n, base + 0x1_0000 * u64::from(n)))
            .collect();
        self.set_status(3 | FEATURES_OK | 4);
        queues
    }

    /// Vectors: message n has data 0x40 + n, the configuration has vector 0, queue n has n + 1; no mask.
    pub fn use_msix(&self, queues: u16) {
        for vector in 0..=u64::from(queues) {
            for (word, value) in [0xfee0_0000, 0, 0x40 + vector, 0].into_iter().enumerate() {
                self.write(0x4000 + 16 * vector + 4 * word as u64, 4, value);
            }
        }
        self.write(0x10, 2, 0);
        for queue in 0..u64::from(queues) {
            self.write(0x16, 2, queue);
            self.write(0x1a, 2, queue + 1);
        }
        self.set_msix_control(0x8000);
    }

    /// Writes the message control of the MSI-X capability.
    pub fn set_msix_control(&self, control: u32) {
        use doppel_device::PciFunction;
        let mut at = self.pci.config_read(0x34, 1) as u16;
        while self.pci.config_read(at, 1) != 0x11 {
            at = self.pci.config_read(at + 1, 1) as u16;
        }
        self.pci.config_write(at + 2, 2, control);
    }

    /// Notifies a queue.
    pub fn notify(&self, queue: &DriverQueue) {
        let offset = 0x3000 + 4 * u64::from(queue.index);
        self.write(offset, 2, queue.index.into());
    }

    /// Notifies, and waits for the next used buffer: head and length.
    pub fn complete(&self, queue: &mut DriverQueue) -> (u32, u32) {
        self.notify(queue);
        queue.wait(&self.ram).expect("a used buffer in time")
    }
}

/// A driver that is never told.
struct Nobody;

impl Interrupt for Nobody {
    fn queue(&self, _: u16) {}
    fn config(&self) {}
    fn needs_reset(&self, _: &str) {}
}

/// A buffer of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece {
    /// The device reads: address and length.
    Out(u64, u32),
    /// The device writes.
    In(u64, u32),
}

/// The driver's half of a queue.
#[derive(Debug)]
pub struct DriverQueue {
    /// Which one.
    pub index: u16,
    /// Number of descriptors.
    pub size: u16,
    /// Where its descriptors are; the rings follow.
    pub base: u64,
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

impl DriverQueue {
    /// A queue of so many descriptors, from `base` on.
    pub fn new(index: u16, size: u16, base: u64) -> Self {
        DriverQueue {
            index,
            size,
            base,
            next_descriptor: 0,
            available: 0,
            seen: 0,
        }
    }

    /// The device's half of it, without a device.
    pub fn device_half(&self, ram: &Arc<GuestRam>, event_idx: bool) -> Queue {
        let state = QueueState {
            enabled: true,
            size: self.size,
            descriptors: self.base,
            driver: self.avail(),
            device: self.used(),
            ..QueueState::default()
        };
        let notifier = Arc::new(Notifier::new().expect("a descriptor"));
        let queue = Queue::new(
            self.index,
            &state,
            event_idx,
            ram.clone(),
            notifier,
            Arc::new(Nobody),
        );
        queue.expect("rings in memory")
    }

    /// The ring that the driver writes.
    pub fn avail(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    /// The ring that the device writes.
    pub fn used(&self) -> u64 {
        (self.avail() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// Writes a descriptor at `table`.
    pub fn put_descriptor(ram: &GuestRam, table: u64, n: u16, descriptor: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = descriptor;
        let at = table + 16 * u64::from(n);
        ram.write_from_device(at, &address.to_le_bytes());
        ram.write_from_device(at + 8, &len.to_le_bytes());
        ram.write_from_device(at + 12, &flags.to_le_bytes());
        ram.write_from_device(at + 14, &next.to_le_bytes());
    }

    /// Makes descriptor `head` available.
    pub fn offer(&mut self, ram: &GuestRam, head: u16) {
        let slot = u64::from(self.available % self.size);
        ram.write_from_device(self.avail() + 4 + 2 * slot, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        ram.store(self.avail() + 2, self.available);
    }

    fn put_chain(ram: &GuestRam, table: u64, numbers: &[u16], pieces: &[Piece]) {
        for (n, piece) in pieces.iter().enumerate() {
            let (address, len, mut flags) = match *piece {
                Piece::Out(address, len) => (address, len, 0),
                Piece::In(address, len) => (address, len, VRING_DESC_F_WRITE as u16),
            };
            let next = numbers.get(n + 1).copied();
            flags |= next.map_or(0, |_| VRING_DESC_F_NEXT as u16);
            let descriptor = (address, len, flags, next.unwrap_or(0));
            Self::put_descriptor(ram, table, numbers[n], descriptor);
        }
    }

    /// Makes a request available; its head. The driver has no more requests under way than there are descriptors.
    pub fn submit(&mut self, ram: &GuestRam, pieces: &[Piece]) -> u16 {
        let numbers: Vec<_> = (0..pieces.len() as u16)
            .map(|n| self.next_descriptor.wrapping_add(n) % self.size)
            .collect();
        Self::put_chain(ram, self.base, &numbers, pieces);
        self.next_descriptor = self.next_descriptor.wrapping_add(pieces.len() as u16) % self.size;
        self.offer(ram, numbers[0]);
        numbers[0]
    }

    /// The same with an indirect table at `table`.
    pub fn submit_indirect(&mut self, ram: &GuestRam, table: u64, pieces: &[Piece]) -> u16 {
        let numbers: Vec<_> = (0..pieces.len() as u16).collect();
        Self::put_chain(ram, table, &numbers, pieces);
        let head = self.next_descriptor;
        let indirect = VRING_DESC_F_INDIRECT as u16;
        let descriptor = (table, 16 * pieces.len() as u32, indirect, 0);
        Self::put_descriptor(ram, self.base, head, descriptor);
        self.next_descriptor = (head + 1) % self.size;
        self.offer(ram, head);
        head
    }

    /// Asks for an interrupt after the next `more` used buffers (VIRTIO_F_EVENT_IDX).
    pub fn interrupt_after(&self, ram: &GuestRam, more: u16) {
        let event = self.seen.wrapping_add(more).wrapping_sub(1);
        ram.store(self.avail() + 4 + 2 * u64::from(self.size), event);
    }

    /// The next used buffer, head and length, if there is one.
    pub fn take(&mut self, ram: &GuestRam) -> Option<(u32, u32)> {
        if ram.load::<u16>(self.used() + 2)? == self.seen {
            return None;
        }
        let at = self.used() + 4 + 8 * u64::from(self.seen % self.size);
        self.seen = self.seen.wrapping_add(1);
        Some((ram.load(at)?, ram.load(at + 4)?))
    }

    /// Waits for it.
    pub fn wait(&mut self, ram: &GuestRam) -> Option<(u32, u32)> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if let Some(used) = self.take(ram) {
                return Some(used);
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        None
    }
}
