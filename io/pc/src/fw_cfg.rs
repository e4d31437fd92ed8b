//! QEMU's firmware configuration device, as far as test programs ask it: what machine this is.
//!
//! Source: QEMU, docs/specs/fw_cfg.rst. A 16-bit store to the first port selects an item, byte loads from the second read it from its
//! beginning and give 0 beyond its end. Items are little endian. Nothing can be written, and there is no DMA interface and no file.

use doppel_device::{Chip, Nanos};

/// The items by their selectors.
const SIGNATURE: u16 = 0;
const INTERFACES: u16 = 1;
const RAM_SIZE: u16 = 3;
const CPUS: u16 = 5;
const MOST_CPUS: u16 = 0xf;
/// A directory of files: their number, big endian, and here none.
const FILES: u16 = 0x19;

/// Ports alone, without DMA.
const TRADITIONAL: u32 = 1;

/// The device: port 0 selects, port 1 is data.
pub struct FwCfg {
    cpus: u16,
    /// Bytes of RAM.
    ram: u64,
    selected: u16,
    at: usize,
}

impl FwCfg {
    /// Of a machine with so many processors and bytes of RAM.
    pub fn new(cpus: u16, ram: u64) -> Self {
        FwCfg {
            cpus,
            ram,
            selected: SIGNATURE,
            at: 0,
        }
    }

    fn item(&self) -> Vec<u8> {
        match self.selected {
            SIGNATURE => b"QEMU".to_vec(),
            INTERFACES => TRADITIONAL.to_le_bytes().to_vec(),
            RAM_SIZE => self.ram.to_le_bytes().to_vec(),
            CPUS | MOST_CPUS => self.cpus.to_le_bytes().to_vec(),
            FILES => 0u32.to_be_bytes().to_vec(),
            _ => Vec::new(),
        }
    }
}

impl Chip for FwCfg {
    const WIDTH: u8 = 2;

    fn read(&mut self, offset: u64, size: u8, _now: Nanos) -> u64 {
        if (offset, size) != (1, 1) {
            return 0;
        }
        let byte = self.item().get(self.at).copied().unwrap_or(0);
        self.at = self.at.saturating_add(1);
        byte.into()
    }

    fn write(&mut self, offset: u64, size: u8, value: u64, _now: Nanos) {
        if (offset, size) == (0, 2) {
            (self.selected, self.at) = (value as u16, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(device: &mut FwCfg, selector: u16, len: usize) -> Vec<u8> {
        device.write(0, 2, selector.into(), 0);
        (0..len).map(|_| device.read(1, 1, 0) as u8).collect()
    }

    #[test]
    fn items_tell_what_machine_it_is() {
        let mut device = FwCfg::new(3, 5 << 30);
        assert_eq!(device.read(1, 1, 0), u64::from(b'Q'), "selected at reset");
        assert_eq!(item(&mut device, 0, 6), b"QEMU\0\0", "zeros beyond the end");
        assert_eq!(item(&mut device, 1, 4), [1, 0, 0, 0]);
        assert_eq!(item(&mut device, 3, 8), (5u64 << 30).to_le_bytes());
        assert_eq!(item(&mut device, 5, 2), [3, 0]);
        assert_eq!(item(&mut device, 0xf, 2), [3, 0]);
        assert_eq!(item(&mut device, 0x19, 4), [0; 4]);
        assert_eq!(item(&mut device, 0xffff, 2), [0; 2], "no such item");
    }

    #[test]
    fn only_a_word_selects() {
        let mut device = FwCfg::new(3, 1 << 30);
        item(&mut device, 5, 1);
        device.write(0, 1, 0, 0);
        device.write(1, 1, 0, 0);
        assert_eq!(device.read(1, 1, 0), 0, "the second byte of the item");
        assert_eq!(device.read(0, 2, 0), 0);
    }
}
