//! The entropy device behind virtio-mmio, as a driver goes through its registers.

use std::sync::Arc;

use doppel_device::{BusDevice, Pin};
use doppel_memory::GuestRam;
use doppel_virtio::testing::{DriverQueue, PATIENCE, Piece};
use doppel_virtio::{FEATURES_OK, NEEDS_RESET, Rng, VirtioMmio};

const RINGS: u64 = 0x1_0000;
const BUFFER: u64 = 0x20_0000;

struct Rig {
    ram: Arc<GuestRam>,
    pin: Pin,
    mmio: Arc<VirtioMmio>,
}

fn rig() -> Rig {
    let ram = Arc::new(GuestRam::new(16 << 20).unwrap());
    let pin = Pin::unconnected();
    let mmio = VirtioMmio::new(Box::new(Rng::new()), ram.clone(), pin.clone()).unwrap();
    Rig { ram, pin, mmio }
}

impl Rig {
    fn write(&self, offset: u64, value: u64) {
        self.mmio.write(offset, 4, value);
    }

    fn read(&self, offset: u64) -> u64 {
        self.mmio.read(offset, 4)
    }

    /// The steps of Linux's virtio_mmio.
    fn start(&self) -> DriverQueue {
        assert_eq!(
            (self.read(0), self.read(4), self.read(8)),
            (0x7472_6976, 2, 4)
        );
        for status in [0, 1, 3] {
            self.write(0x70, status);
        }
        for half in [1, 0] {
            self.write(0x14, half);
            let features = self.read(0x10);
            self.write(0x24, half);
            self.write(0x20, features);
        }
        self.write(0x70, 3 | u64::from(FEATURES_OK));
        assert_eq!(self.read(0x70), 11);
        self.write(0x30, 0);
        assert_eq!((self.read(0x44), self.read(0x34)), (0, 64));
        self.write(0x38, 16);
        let queue = DriverQueue::new(0, 16, RINGS);
        self.ram.write_from_device(RINGS, &[0; 0x1000]);
        for (register, at) in [(0x80, RINGS), (0x90, queue.avail()), (0xa0, queue.used())] {
            self.write(register, at);
            self.write(register + 4, 0);
        }
        self.write(0x44, 1);
        self.write(0x70, 15);
        queue
    }

    fn wait_for_pin(&self) {
        let end = std::time::Instant::now() + PATIENCE;
        while !self.pin.level() {
            assert!(std::time::Instant::now() < end, "no interrupt");
            std::thread::yield_now();
        }
    }
}

#[test]
fn a_request_is_served_and_its_interrupt_acknowledged() {
    let rig = rig();
    let mut queue = rig.start();
    queue.submit(&rig.ram, &[Piece::In(BUFFER, 100)]);
    rig.write(0x50, 0);
    assert_eq!(queue.wait(&rig.ram), Some((0, 100)));
    rig.wait_for_pin();
    assert_eq!(rig.read(0x60), 1);
    rig.write(0x64, 1);
    assert!(!rig.pin.level());
}

#[test]
fn a_queue_and_a_device_are_reset() {
    let rig = rig();
    rig.start();
    rig.write(0x44, 0);
    assert_eq!(rig.read(0x44), 0);
    let mut queue = rig.start();
    queue.offer(&rig.ram, 99);
    rig.write(0x50, 0);
    rig.wait_for_pin();
    assert_eq!(rig.read(0x70), 15 | u64::from(NEEDS_RESET));
    assert_eq!(rig.read(0x60), 2);
    rig.write(0x70, 0);
    assert_eq!(
        (rig.read(0x70), rig.read(0x60), rig.pin.level()),
        (0, 0, false)
    );
}

#[test]
fn a_saved_device_is_the_same_in_another() {
    let rig = rig();
    rig.start();
    let state = rig.mmio.save();
    let other = self::rig();
    assert!(other.mmio.restore(&state));
    assert_eq!(other.mmio.save(), state);
    assert!(!other.mmio.restore(&doppel_virtio::MmioState {
        version: 0,
        ..state
    }));
}

#[test]
fn nothing_written_breaks_it() {
    let rig = rig();
    let mut seed = 7u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        seed >> 33
    };
    for n in 0..20_000 {
        if n % 500 == 0 {
            rig.start();
        }
        let (offset, size) = (next() % 0x140, 1 << (next() % 3));
        let value = next() >> (next() % 33);
        rig.mmio.write(offset, size, value);
        rig.mmio.read(offset, size);
    }
    let mut queue = rig.start();
    queue.submit(&rig.ram, &[Piece::In(BUFFER, 8)]);
    rig.write(0x50, 0);
    assert_eq!(queue.wait(&rig.ram).map(|used| used.1), Some(8));
}
