//! The reset control register (port 0xcf9), which lies within the PCI configuration address port.
//!
//! Source: Intel ICH9 data sheet, 13.7.5 (RST_CNT).

/// What writes do.
const SYSTEM_RESET: u8 = 1 << 1;
const RESET_CPU: u8 = 1 << 2;
const FULL_RESET: u8 = 1 << 3;

/// The register.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ResetControl(u8);

impl ResetControl {
    pub fn read(self) -> u8 {
        self.0
    }

    /// True where the write resets the machine: the reset bit rises.
    #[must_use]
    pub fn write(&mut self, value: u8) -> bool {
        let resets = value & !self.0 & RESET_CPU != 0;
        self.0 = value & (SYSTEM_RESET | RESET_CPU | FULL_RESET);
        resets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rising_reset_bit_resets() {
        let mut register = ResetControl::default();
        assert!(!register.write(0x02));
        assert!(register.write(0x06));
        assert!(!register.write(0x06));
        assert_eq!(register.read(), 0x06);
        assert!(!register.write(0xf0));
        assert_eq!(register.read(), 0);
    }
}
