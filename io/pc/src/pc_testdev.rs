//! QEMU's pc-testdev: what programs that test a processor need of a machine.
//!
//! Source: QEMU, hw/misc/pc-testdev.c. Four bytes of storage behind ports, the same bytes at other ports that decode single bytes; ports
//! that set interrupt lines; a page of memory that is a device's. The ports that have QEMU forget a page's mapping (0xe4) do nothing
//! here, where loads and stores find pages anew by themselves.

use doppel_device::{Chip, Nanos, Outputs};

/// Interrupt lines.
pub const LINES: u32 = 24;
/// Bytes of the memory.
pub const MEMORY: u64 = 0x1_0000;

/// The storage behind the ports.
#[derive(Default)]
pub struct TestPorts {
    data: u32,
}

impl Chip for TestPorts {
    const WIDTH: u8 = 4;

    fn read(&mut self, offset: u64, size: u8, _now: Nanos) -> u64 {
        let (mask, shift) = part(offset, size);
        u64::from((self.data & mask) >> shift)
    }

    fn write(&mut self, offset: u64, size: u8, value: u64, _now: Nanos) {
        let (mask, shift) = part(offset, size);
        self.data = self.data & !mask | (value as u32) << shift & mask;
    }
}

/// The bits of the storage that an access means, and where they begin.
fn part(offset: u64, size: u8) -> (u32, u32) {
    let shift = (offset as u32 & 3) * 8;
    let bits = u32::from(size.clamp(1, 4)) * 8;
    (u32::MAX >> (32 - bits) << shift, shift)
}

/// The interrupt lines: a store of anything but 0 to port n raises line n, of 0 lowers it.
#[derive(Default)]
pub struct TestLines {
    outputs: Outputs,
}

impl Chip for TestLines {
    const WIDTH: u8 = 4;

    fn read(&mut self, _offset: u64, _size: u8, _now: Nanos) -> u64 {
        0
    }

    fn write(&mut self, offset: u64, _size: u8, value: u64, _now: Nanos) {
        if offset >= u64::from(LINES) {
            return;
        }
        let bit = 1 << offset;
        if value == 0 {
            self.outputs.level &= !bit;
        } else if self.outputs.level & bit == 0 {
            self.outputs.level |= bit;
            self.outputs.rose |= bit;
        }
    }

    fn outputs(&mut self) -> Outputs {
        let outputs = self.outputs;
        self.outputs.rose = 0;
        outputs
    }
}

/// The memory.
pub struct TestMemory {
    bytes: Vec<u8>,
}

impl Default for TestMemory {
    fn default() -> Self {
        TestMemory {
            bytes: vec![0; MEMORY as usize],
        }
    }
}

impl Chip for TestMemory {
    const WIDTH: u8 = 8;

    fn read(&mut self, offset: u64, size: u8, _now: Nanos) -> u64 {
        let mut value = [0; 8];
        for (n, byte) in value.iter_mut().take(size.into()).enumerate() {
            let at = offset.saturating_add(n as u64) as usize;
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
        u64::from_le_bytes(value)
    }

    fn write(&mut self, offset: u64, size: u8, value: u64, _now: Nanos) {
        for (n, byte) in value.to_le_bytes().iter().take(size.into()).enumerate() {
            let at = offset.saturating_add(n as u64) as usize;
            if let Some(place) = self.bytes.get_mut(at) {
                *place = *byte;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_keep_what_was_written_to_each_byte() {
        let mut ports = TestPorts::default();
        ports.write(0, 4, 0x4433_2211, 0);
        ports.write(1, 1, 0xaa, 0);
        assert_eq!(ports.read(0, 4, 0), 0x4433_aa11);
        assert_eq!(ports.read(2, 2, 0), 0x4433);
        ports.write(3, 4, 0x1234, 0);
        assert_eq!(ports.read(0, 4, 0), 0x3433_aa11, "what lies beyond is lost");
        assert_eq!(ports.read(3, 1, 0), 0x34);
    }

    #[test]
    fn lines_rise_and_fall() {
        let mut lines = TestLines::default();
        lines.write(3, 1, 1, 0);
        lines.write(3, 1, 2, 0);
        assert_eq!(lines.outputs(), Outputs { level: 8, rose: 8 });
        assert_eq!(lines.outputs(), Outputs { level: 8, rose: 0 });
        lines.write(3, 1, 0, 0);
        lines.write(23, 1, 1, 0);
        lines.write(23, 1, 0, 0);
        let pulse = Outputs {
            level: 0,
            rose: 1 << 23,
        };
        assert_eq!(lines.outputs(), pulse);
        lines.write(24, 1, 1, 0);
        assert_eq!(lines.outputs(), Outputs::default());
    }

    #[test]
    fn memory_ends_where_it_ends() {
        let mut memory = TestMemory::default();
        memory.write(MEMORY - 4, 8, 0x8877_6655_4433_2211, 0);
        assert_eq!(memory.read(MEMORY - 4, 8, 0), 0x4433_2211);
        assert_eq!(memory.read(MEMORY - 3, 2, 0), 0x3322);
        assert_eq!(memory.read(u64::MAX, 8, 0), 0);
    }
}
