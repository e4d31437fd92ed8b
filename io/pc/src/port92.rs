//! System control port A (0x92): fast reset and the A20 gate.
//!
//! The A20 gate reads back as written and changes nothing: address line 20 is always on, as on machines of today.
//!
//! Source: IBM PS/2 hardware interface technical reference.

use std::sync::Arc;

use doppel_device::{Chip, Nanos, PowerControl, PowerRequest};

const FAST_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;

/// The port.
pub struct Port92 {
    value: u8,
    power: Arc<dyn PowerControl>,
}

impl Port92 {
    /// A port with A20 on.
    pub fn new(power: Arc<dyn PowerControl>) -> Self {
        Port92 { value: A20, power }
    }
}

impl Chip for Port92 {
    fn read(&mut self, _offset: u64, _size: u8, _now: Nanos) -> u64 {
        self.value.into()
    }

    fn write(&mut self, _offset: u64, _size: u8, value: u64, _now: Nanos) {
        let value = value as u8;
        if value & !self.value & FAST_RESET != 0 {
            self.power.request(PowerRequest::Reset);
        }
        self.value = value & (FAST_RESET | A20);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::Requests;

    #[test]
    fn the_reset_bit_resets_when_it_rises() {
        let requests = Arc::new(Requests::default());
        let mut port = Port92::new(requests.clone());
        assert_eq!(port.read(0, 1, 0), 2);
        port.write(0, 1, 0x00, 0);
        assert_eq!(requests.take(), []);
        port.write(0, 1, 0xff, 0);
        assert_eq!(requests.take(), [PowerRequest::Reset]);
        port.write(0, 1, 0x03, 0);
        assert_eq!(requests.take(), []);
        assert_eq!(port.read(0, 1, 0), 3);
    }
}
