//! Buses: which device answers at an address.
//!
//! The same map serves I/O ports and device memory. The map's lock is dropped before the device is called, so that a
//! device may change the map (a PCI BAR that moves) while it handles an access.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

/// A device as a bus sees it. It locks itself; no call may panic or block for long, whatever the guest asks for.
pub trait BusDevice: Send + Sync {
    /// The widest access in bytes that the device decodes as one (1, 2, 4 or 8); the bus splits wider ones.
    fn width(&self) -> u8 {
        8
    }
    /// A load of `size` bytes (1, 2, 4 or 8, at most [`BusDevice::width`]) from `offset` of the device.
    fn read(&self, offset: u64, size: u8) -> u64;
    /// A store.
    fn write(&self, offset: u64, size: u8, value: u64);
}

/// Addresses `start..start + len` of a bus, which the device sees as its offsets from `offset` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// First address.
    pub start: u64,
    /// Number of addresses, at least 1.
    pub len: u64,
    /// What the device calls the first address.
    pub offset: u64,
}

impl Region {
    /// A region that starts at the device's offset 0.
    pub const fn new(start: u64, len: u64) -> Self {
        Region {
            start,
            len,
            offset: 0,
        }
    }

    /// The same addresses at another offset of the device (a chip with several register blocks).
    pub const fn at_offset(self, offset: u64) -> Self {
        Region { offset, ..self }
    }

    fn addresses(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.len)
    }
}

/// Why a device could not be attached.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Something else answers there.
    #[error("addresses {0:#x?} overlap those of another device at {1:#x?}")]
    Overlap(Range<u64>, Range<u64>),
    /// A region without addresses.
    #[error("a region at {0:#x} has no addresses")]
    Empty(u64),
}

/// What a load reads where nothing answers.
pub const fn all_ones(size: u8) -> u64 {
    match size {
        0..8 => (1 << (size * 8)) - 1,
        _ => u64::MAX,
    }
}

type Entry = (Region, Arc<dyn BusDevice>);
/// A device and an offset of it.
type Place = (u64, Arc<dyn BusDevice>);

/// An address map of devices: the I/O ports of a machine, or its device memory.
#[derive(Default)]
pub struct Bus {
    map: RwLock<BTreeMap<u64, Entry>>,
    /// How often the map has changed.
    changes: AtomicU64,
}

/// One who loads and stores on a bus, and mostly goes where it went before: there it needs neither the map nor its lock.
pub struct BusMaster {
    bus: Arc<Bus>,
    last: Option<Entry>,
    /// How often the map had changed when that was found.
    changes: u64,
}

impl Bus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes `device` answer at `region`.
    pub fn attach(&self, region: Region, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let new = region.addresses();
        if new.is_empty() {
            return Err(BusError::Empty(region.start));
        }
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, (old, _))) = map.range(..new.end).next_back()
            && old.addresses().end > new.start
        {
            return Err(BusError::Overlap(new, old.addresses()));
        }
        map.insert(region.start, (region, device));
        self.changes.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Takes away what starts at `start`; says whether something did.
    pub fn detach(&self, start: u64) -> bool {
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        self.changes.fetch_add(1, Ordering::Release);
        map.remove(&start).is_some()
    }

    fn find(&self, address: u64) -> Option<Entry> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        let (_, (region, device)) = map.range(..=address).next_back()?;
        region
            .addresses()
            .contains(&address)
            .then(|| (*region, device.clone()))
    }

    /// A load of 1 to 8 bytes; bytes that no device answers for read as ones.
    pub fn read(&self, address: u64, size: u8) -> u64 {
        let size = size.clamp(1, 8);
        let (step, found) = self.step(address, size);
        let low = match found {
            Some((offset, device)) => device.read(offset, step) & all_ones(step),
            None => all_ones(step),
        };
        if step == size {
            return low;
        }
        low | self.read(address.wrapping_add(step.into()), size - step) << (step * 8)
    }

    /// A store of 1 to 8 bytes; bytes that no device answers for are lost.
    pub fn write(&self, address: u64, size: u8, value: u64) {
        let size = size.clamp(1, 8);
        let (step, found) = self.step(address, size);
        if let Some((offset, device)) = found {
            device.write(offset, step, value & all_ones(step));
        }
        if step < size {
            let rest = address.wrapping_add(step.into());
            self.write(rest, size - step, value >> (step * 8));
        }
    }

    /// How many bytes of an access go together, and to whom: all of them where the device decodes them as one,
    /// else as many as it does.
    fn step(&self, address: u64, size: u8) -> (u8, Option<Place>) {
        let Some((region, device)) = self.find(address) else {
            return (1, None);
        };
        let within = address - region.start;
        let room = (region.len - within).min(8) as u8;
        let widest = size.min(device.width()).min(room).max(1);
        let step = 1 << widest.ilog2();
        (step, Some((region.offset.wrapping_add(within), device)))
    }
}

impl BusMaster {
    /// On this bus.
    pub fn new(bus: Arc<Bus>) -> Self {
        BusMaster {
            bus,
            last: None,
            changes: 0,
        }
    }

    /// As [`Bus::read`].
    pub fn read(&mut self, address: u64, size: u8) -> u64 {
        match self.whole(address, size) {
            Some((offset, device)) => device.read(offset, size) & all_ones(size),
            None => self.bus.read(address, size),
        }
    }

    /// As [`Bus::write`].
    pub fn write(&mut self, address: u64, size: u8, value: u64) {
        match self.whole(address, size) {
            Some((offset, device)) => device.write(offset, size, value & all_ones(size)),
            None => self.bus.write(address, size, value),
        }
    }

    /// The device that takes all of this access at once, if there is one.
    #[inline]
    fn whole(&mut self, address: u64, size: u8) -> Option<(u64, &dyn BusDevice)> {
        if self.same(address, size).is_none() {
            self.changes = self.bus.changes.load(Ordering::Acquire);
            self.last = self.bus.find(address);
        }
        self.same(address, size)
    }

    /// The device found last, where it takes all of this access at once.
    #[inline]
    fn same(&self, address: u64, size: u8) -> Option<(u64, &dyn BusDevice)> {
        let (region, device) = self.last.as_ref()?;
        let within = address.wrapping_sub(region.start);
        let inside = within < region.len && region.len - within >= size.into();
        let whole = size.is_power_of_two() && size <= device.width();
        let stands = self.changes == self.bus.changes.load(Ordering::Acquire);
        let offset = region.offset.wrapping_add(within);
        (inside && whole && stands).then_some((offset, &**device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Recorder(u8, Mutex<Vec<(u64, u8, u64)>>);
    impl BusDevice for Recorder {
        fn width(&self) -> u8 {
            self.0
        }
        fn read(&self, offset: u64, _size: u8) -> u64 {
            0x1111_1111_1111_1110 + offset
        }
        fn write(&self, offset: u64, size: u8, value: u64) {
            self.1.lock().unwrap().push((offset, size, value));
        }
    }

    fn bus(width: u8, region: Region) -> (Bus, Arc<Recorder>) {
        let device = Arc::new(Recorder(width, Mutex::default()));
        let bus = Bus::new();
        bus.attach(region, device.clone()).unwrap();
        (bus, device)
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let (bus, device) = bus(4, Region::new(0xcf8, 8).at_offset(0x100));
        bus.write(0xcfc, 4, 0x8000_0001);
        assert_eq!(*device.1.lock().unwrap(), [(0x104, 4, 0x8000_0001)]);
        assert_eq!(bus.read(0xcf8, 2), 0x1210);
    }

    #[test]
    fn an_access_wider_than_the_device_is_split() {
        let (bus, device) = bus(1, Region::new(0x20, 2));
        bus.write(0x20, 2, 0x2211);
        assert_eq!(*device.1.lock().unwrap(), [(0, 1, 0x11), (1, 1, 0x22)]);
        assert_eq!(bus.read(0x20, 2), 0x1110);
    }

    #[test]
    fn bytes_that_nobody_answers_for_read_as_ones() {
        let (bus, device) = bus(4, Region::new(0x60, 1));
        assert_eq!(bus.read(0x60, 4), 0xffff_ff10);
        assert_eq!(bus.read(0x5f, 2), 0x10ff);
        assert_eq!(bus.read(u64::MAX, 8), u64::MAX);
        bus.write(0x5f, 4, 0xddcc_bbaa);
        assert_eq!(*device.1.lock().unwrap(), [(0, 1, 0xbb)]);
    }

    #[test]
    fn overlapping_and_empty_regions_are_refused() {
        let (bus, device) = bus(4, Region::new(0x60, 4));
        for (start, len) in [(0x5f, 2), (0x60, 1), (0x63, 9), (0, 0x1000)] {
            let refused = bus.attach(Region::new(start, len), device.clone());
            assert!(
                matches!(refused, Err(BusError::Overlap(..))),
                "{start:#x} {len}"
            );
        }
        let empty = bus.attach(Region::new(5, 0), device.clone());
        assert_eq!(empty, Err(BusError::Empty(5)));
        bus.attach(Region::new(0x64, 1), device.clone()).unwrap();
        assert!(bus.detach(0x60) && !bus.detach(0x60));
        assert_eq!(bus.read(0x60, 1), 0xff);
    }

    #[test]
    fn a_master_finds_what_the_bus_finds() {
        let bus = Arc::new(Bus::new());
        let device = |width| Arc::new(Recorder(width, Mutex::default()));
        let attach = |start, len, width| {
            let region = Region::new(start, len).at_offset(start);
            bus.attach(region, device(width)).unwrap();
        };
        attach(0x60, 6, 2);
        attach(0x70, 1, 1);
        let mut master = BusMaster::new(bus.clone());
        let mut agree = || {
            for address in 0x5c..0x74 {
                for size in [1, 2, 4, 8] {
                    for _ in 0..2 {
                        let alone = bus.read(address, size);
                        assert_eq!(master.read(address, size), alone, "{address:#x} {size}");
                    }
                }
            }
        };
        agree();
        attach(0x68, 4, 4);
        assert!(bus.detach(0x70));
        agree();
    }

    #[test]
    fn a_master_writes_where_the_device_is_now() {
        let (bus, device) = bus(4, Region::new(0x60, 4));
        let bus = Arc::new(bus);
        let mut master = BusMaster::new(bus.clone());
        master.write(0x60, 4, 1);
        master.write(0x62, 2, 0x12_3456);
        bus.detach(0x60);
        master.write(0x60, 4, 3);
        bus.attach(Region::new(0x50, 0x20), device.clone()).unwrap();
        master.write(0x60, 4, 4);
        let written = [(0, 4, 1), (2, 2, 0x3456), (0x10, 4, 4)];
        assert_eq!(*device.1.lock().unwrap(), written);
    }

    struct Detacher(std::sync::Weak<Bus>);
    impl BusDevice for Detacher {
        fn read(&self, _: u64, _: u8) -> u64 {
            self.0.upgrade().is_some_and(|bus| bus.detach(0)).into()
        }
        fn write(&self, _: u64, _: u8, _: u64) {}
    }

    #[test]
    fn a_device_may_change_the_map_while_it_is_called() {
        let bus = Arc::new(Bus::new());
        let device = Arc::new(Detacher(Arc::downgrade(&bus)));
        bus.attach(Region::new(0, 1), device).unwrap();
        assert_eq!(bus.read(0, 1), 1);
        assert_eq!(bus.read(0, 1), 0xff);
    }
}
