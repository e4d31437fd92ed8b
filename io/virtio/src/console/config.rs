//! The configuration space of a console (virtio 1.2, 5.3.4), and the size of the window that it tells of.

use std::sync::atomic::{AtomicU32, Ordering};

/// Where the driver writes a character without a queue.
pub const EMERGENCY_WRITE: u64 = 8;

/// The size of the terminal on the host, which may change at any time.
#[derive(Debug, Default)]
pub struct WindowSize(AtomicU32);

impl WindowSize {
    /// A window of so many rows and columns.
    pub fn new(rows: u16, columns: u16) -> Self {
        let size = WindowSize::default();
        size.set(rows, columns);
        size
    }

    /// Changes it. Whoever does calls the device's [`doppel_device::Backed::backend_ready`] afterwards.
    pub fn set(&self, rows: u16, columns: u16) {
        let word = u32::from(rows) << 16 | u32::from(columns);
        self.0.store(word, Ordering::Release);
    }

    /// Rows and columns, as the configuration space has them: columns in the low half.
    pub(super) fn word(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }
}

/// `struct virtio_console_config`.
pub fn bytes(size: u32) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&size.to_le_bytes());
    bytes[4..8].copy_from_slice(&1u32.to_le_bytes()); // max_nr_ports
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_are_where_the_specification_has_them() {
        let size = WindowSize::new(25, 80);
        assert_eq!(bytes(size.word()), [80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        size.set(0x1234, 0x5678);
        assert_eq!(bytes(size.word())[..4], [0x78, 0x56, 0x34, 0x12]);
    }
}
