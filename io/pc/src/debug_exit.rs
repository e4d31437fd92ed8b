//! The debug-exit port: a test guest ends its machine with a status.
//!
//! A write of v ends with status `v << 1 | 1`, as QEMU's isa-debug-exit does (so that 0 stays what a poweroff gives).
//! Four ports, wherever the machine puts them; they read as 0.

use std::sync::Arc;

use doppel_device::{Chip, Nanos, PowerControl, PowerRequest};

/// The device.
pub struct DebugExit {
    power: Arc<dyn PowerControl>,
}

impl DebugExit {
    /// Ends are asked of `power`.
    pub fn new(power: Arc<dyn PowerControl>) -> Self {
        DebugExit { power }
    }
}

impl Chip for DebugExit {
    const WIDTH: u8 = 4;

    fn read(&mut self, _offset: u64, _size: u8, _now: Nanos) -> u64 {
        0
    }

    fn write(&mut self, _offset: u64, _size: u8, value: u64, _now: Nanos) {
        let status = (value as u8) << 1 | 1;
        self.power.request(PowerRequest::Exit(status));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::Requests;

    #[test]
    fn a_write_ends_the_machine_with_an_odd_status() {
        let requests = Arc::new(Requests::default());
        let mut port = DebugExit::new(requests.clone());
        assert_eq!(port.read(0, 4, 0), 0);
        for (value, status) in [(0, 1), (0x10, 0x21), (0x31, 0x63), (0xffff_ffff, 0xff)] {
            port.write(0, 4, value, 0);
            assert_eq!(requests.take(), [PowerRequest::Exit(status)]);
        }
    }
}
