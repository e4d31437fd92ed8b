//! PCI functions: what the host bridge sees of a device, and the configuration space that all of them have.
//!
//! Source: PCI Local Bus Specification 3.0, chapter 6.

use std::ops::Range;

/// A function of a PCI device. It locks itself.
pub trait PciFunction: Send + Sync {
    /// A load of 1, 2 or 4 bytes from the configuration space (`offset` below 4096).
    fn config_read(&self, offset: u16, size: u8) -> u32;
    /// A store to it. A function whose BARs moved changes the buses itself, before this returns.
    fn config_write(&self, offset: u16, size: u8, value: u32);
}

/// What identifies a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PciIds {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Base class, subclass and programming interface, from the top.
    pub class: u32,
    /// Revision.
    pub revision: u8,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// What a base address register leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two registers.
    Memory64,
}

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// What it leads to.
    pub kind: BarKind,
    /// How much; a power of two, at least 16.
    pub size: u64,
}

/// What a write to the configuration space changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ConfigChange {
    /// A BAR or the decoding of BARs: ask [`ConfigSpace::bar`] again.
    pub bars: bool,
    /// Something in a capability or beyond.
    pub capabilities: bool,
}

const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: Range<usize> = 0x10..0x28;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const HEADER: usize = 0x40;

const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTERRUPT_DISABLE: u16 = 1 << 10;
/// Those three, parity and SERR.
const COMMAND_WRITABLE: u16 = 0x0547;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// The 256 bytes of a function: values, and which bits a guest can write.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SIZE],
    writable: [u8; SIZE],
    bars: [Option<Bar>; 6],
    next_capability: usize,
    last_capability: usize,
}

impl ConfigSpace {
    /// The type 0 header of a function with no BARs and no capabilities.
    pub fn new(ids: PciIds) -> Self {
        let mut space = ConfigSpace {
            bytes: [0; SIZE],
            writable: [0; SIZE],
            bars: [None; 6],
            next_capability: HEADER,
            last_capability: CAPABILITIES,
        };
        space.put(0x00, &ids.vendor.to_le_bytes());
        space.put(0x02, &ids.device.to_le_bytes());
        space.put(
            0x08,
            &(ids.class << 8 | u32::from(ids.revision)).to_le_bytes(),
        );
        space.put(0x2c, &ids.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &ids.subsystem.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds the BAR `index` (0 to 5; the device's author knows that a 64-bit one needs the next as well).
    ///
    /// # Panics
    /// Where there is no such register, or the size is no power of two of at least 16.
    pub fn add_bar(&mut self, index: usize, bar: Bar) {
        assert!(bar.size.is_power_of_two() && bar.size >= 16);
        let at = BARS.start + 4 * index;
        let mask = !(bar.size - 1);
        let (flags, bytes) = match bar.kind {
            BarKind::Io => (1, 4),
            BarKind::Memory32 => (0, 4),
            BarKind::Memory64 => (4, 8),
        };
        self.put(at, &[flags]);
        self.writable[at..at + bytes].copy_from_slice(&mask.to_le_bytes()[..bytes]);
        self.bars[index] = Some(bar);
    }

    /// Adds a capability: its body (what follows ID and link) and which bits of the body can be written. Says at
    /// which offset the capability begins.
    ///
    /// # Panics
    /// Where the bodies differ in length or the space is full.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        assert_eq!(body.len(), writable.len());
        let at = self.next_capability;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + body.len()].copy_from_slice(writable);
        self.bytes[self.last_capability] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_capability = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at as u16
    }

    /// Says which interrupt pin the function uses (1 is INTA), as a guest reads it.
    pub fn set_interrupt_pin(&mut self, pin: u8) {
        self.bytes[INTERRUPT_PIN] = pin;
    }

    /// Shows in the status register whether the function asserts its pin.
    pub fn set_interrupt_status(&mut self, asserted: bool) {
        let status = self.bytes[STATUS] & !STATUS_INTERRUPT;
        self.bytes[STATUS] = status | if asserted { STATUS_INTERRUPT } else { 0 };
    }

    /// A load of 1, 2 or 4 bytes; beyond the space all ones.
    pub fn read(&self, offset: u16, size: u8) -> u32 {
        (0..u32::from(size.min(4))).rev().fold(0, |value, n| {
            let byte = self.bytes.get(usize::from(offset) + n as usize);
            value << 8 | u32::from(*byte.unwrap_or(&0xff))
        })
    }

    /// A store of 1, 2 or 4 bytes.
    pub fn write(&mut self, offset: u16, size: u8, value: u32) -> ConfigChange {
        let start = usize::from(offset);
        let end = start + usize::from(size.min(4));
        let bytes = self.bytes.iter_mut().zip(&self.writable);
        for (n, (byte, writable)) in bytes.enumerate().take(end).skip(start) {
            let new = (value >> (8 * (n - start))) as u8;
            *byte = *byte & !writable | new & writable;
        }
        ConfigChange {
            bars: start < BARS.end && end > BARS.start || start < STATUS && end > COMMAND,
            capabilities: end > HEADER,
        }
    }

    /// All 256 bytes, to be saved.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes back what [`ConfigSpace::bytes`] gave: of it, what a guest can write.
    pub fn restore(&mut self, bytes: &[u8]) {
        for (offset, byte) in bytes.iter().enumerate().take(SIZE) {
            self.write(offset as u16, 1, u32::from(*byte));
        }
    }

    fn command(&self) -> u16 {
        self.read(COMMAND as u16, 2) as u16
    }

    /// The function may reach memory.
    pub fn bus_master(&self) -> bool {
        self.command() & COMMAND_BUS_MASTER != 0
    }

    /// The function must not use its interrupt pin.
    pub fn pin_disabled(&self) -> bool {
        self.command() & COMMAND_INTERRUPT_DISABLE != 0
    }

    /// The addresses that BAR `index` decodes now: ports or memory. `None` while decoding is off or the
    /// guest has not placed it.
    pub fn bar(&self, index: usize) -> Option<Range<u64>> {
        let bar = (*self.bars.get(index)?)?;
        let at = (BARS.start + 4 * index) as u16;
        let low = u64::from(self.read(at, 4));
        let (start, enable) = match bar.kind {
            BarKind::Io => (low & 0xfffc, COMMAND_IO),
            BarKind::Memory32 => (low & !0xf, COMMAND_MEMORY),
            BarKind::Memory64 => {
                let high = u64::from(self.read(at + 4, 4));
                (high << 32 | low & !0xf, COMMAND_MEMORY)
            }
        };
        let end = start.checked_add(bar.size)?;
        (self.command() & enable != 0 && start != 0).then_some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(PciIds {
            vendor: 0x1af4,
            device: 0x1042,
            class: 0x01_80_00,
            revision: 1,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        })
    }

    #[test]
    fn the_header_says_what_it_is() {
        let space = space();
        assert_eq!(space.read(0, 4), 0x1042_1af4);
        assert_eq!(space.read(8, 4), 0x0180_0001);
        assert_eq!(space.read(0x2c, 4), 0x1100_1af4);
        assert_eq!(space.read(0x100, 4), u32::MAX);
        assert_eq!(space.read(0xfe, 4), 0xffff_0000);
    }

    #[test]
    fn only_writable_bits_change() {
        let mut space = space();
        for offset in (0..256).step_by(4) {
            space.write(offset, 4, u32::MAX);
        }
        assert_eq!(space.read(0, 4), 0x1042_1af4);
        assert_eq!(space.read(4, 4), COMMAND_WRITABLE.into());
        assert_eq!(space.read(0x10, 4), 0, "no BAR");
        assert_eq!(space.read(0x3c, 4), 0xff);
        assert!(space.bus_master() && space.pin_disabled());
        space.write(0xff, 4, 0);
        space.write(0xfff, 4, 0);
    }

    #[test]
    fn bars_are_sized_placed_and_switched_on() {
        let mut space = space();
        let size = 0x4000;
        space.add_bar(
            0,
            Bar {
                kind: BarKind::Io,
                size: 0x20,
            },
        );
        space.add_bar(
            1,
            Bar {
                kind: BarKind::Memory32,
                size,
            },
        );
        space.add_bar(
            2,
            Bar {
                kind: BarKind::Memory64,
                size,
            },
        );
        for (offset, mask) in [
            (0x10, 0xffff_ffe1),
            (0x14, 0xffff_c000),
            (0x18, 0xffff_c004),
            (0x1c, u32::MAX),
        ] {
            assert!(space.write(offset, 4, u32::MAX).bars);
            assert_eq!(space.read(offset, 4), mask);
        }
        space.write(0x10, 4, 0xc041);
        space.write(0x14, 4, 0xd000_0000);
        space.write(0x18, 4, 0x0000_4000);
        space.write(0x1c, 4, 0x0000_0008);
        assert_eq!(space.bar(1), None);
        assert!(space.write(4, 1, 3).bars);
        assert_eq!(space.bar(0), Some(0xc040..0xc060));
        assert_eq!(space.bar(1), Some(0xd000_0000..0xd000_4000));
        assert_eq!(space.bar(2), Some(0x8_0000_4000..0x8_0000_8000));
        assert_eq!((space.bar(3), space.bar(9)), (None, None));
        space.write(0x18, 4, u32::MAX);
        space.write(0x1c, 4, u32::MAX);
        assert_eq!(space.bar(2), None, "beyond the end of memory");
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = space();
        assert_eq!(space.read(6, 2), 0);
        let first = space.add_capability(0x11, &[7, 0, 1, 2, 3, 4], &[0, 0xc0, 0, 0, 0, 0]);
        let second = space.add_capability(9, &[0x55], &[0xff]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.read(6, 2), 0x10);
        assert_eq!(space.read(0x34, 1), 0x40);
        assert_eq!(space.read(0x40, 2), 0x4811);
        assert_eq!(space.read(0x48, 4), 0x55_0009);
        assert!(space.write(0x42, 2, 0xffff).capabilities);
        assert_eq!(space.read(0x42, 2), 0xc007);
    }

    #[test]
    fn the_interrupt_status_shows() {
        let mut space = space();
        space.set_interrupt_pin(1);
        assert_eq!(space.read(0x3d, 1), 1);
        space.set_interrupt_status(true);
        assert_eq!(space.read(6, 1), 8);
        space.set_interrupt_status(false);
        assert_eq!(space.read(6, 1), 0);
    }
}
