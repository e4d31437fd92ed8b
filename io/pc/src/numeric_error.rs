//! The PC AT's way of telling of x87 errors, for processors with CR0.NE clear: FERR# leads to ISA interrupt 13, and a write to port 0xf0 to IGNNE#.
//!
//! FERR# is a wired OR of the processors' pins. As it rises it sets a latch, which is output 0. A write of whatever value to the port clears the latch and, while
//! there is an error, asserts IGNNE#: with it the handler may execute x87 instructions, which would freeze the processor otherwise, until it has cleared the error.
//!
//! Source: Intel SDM vol. 1, appendix D.2 (figure D-1); IBM PC AT technical reference.

use doppel_device::{Chip, Nanos, Outputs};

/// The flip-flops.
#[derive(Debug, Default)]
pub struct NumericError {
    /// Processors whose FERR# is asserted, a bit each.
    errors: u64,
    latched: bool,
    ignored: bool,
}

impl NumericError {
    /// FERR# of a processor (0 to 63) is now so; returns whether IGNNE# is asserted.
    pub fn set_error(&mut self, cpu: u32, error: bool) -> bool {
        let bit = 1 << (cpu % u64::BITS);
        let before = self.errors;
        self.errors = match error {
            true => before | bit,
            false => before & !bit,
        };
        self.latched |= before == 0 && self.errors != 0;
        self.ignored &= self.errors != 0;
        self.ignored
    }
}

impl Chip for NumericError {
    fn read(&mut self, _offset: u64, _size: u8, _now: Nanos) -> u64 {
        0xff
    }

    fn write(&mut self, _offset: u64, _size: u8, _value: u64, _now: Nanos) {
        self.latched = false;
        self.ignored = self.errors != 0;
    }

    fn outputs(&mut self) -> Outputs {
        Outputs {
            level: self.latched.into(),
            rose: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interrupts(chip: &mut NumericError) -> bool {
        chip.outputs().level == 1
    }

    #[test]
    fn an_error_interrupts_until_the_port_is_written_and_is_ignored_until_it_is_gone() {
        let mut chip = NumericError::default();
        assert!(!interrupts(&mut chip));
        assert!(!chip.set_error(0, true));
        assert!(interrupts(&mut chip));
        chip.write(0, 1, 0, 0);
        assert!(!interrupts(&mut chip));
        assert!(chip.set_error(0, true), "the same error");
        assert!(!interrupts(&mut chip));
        assert!(!chip.set_error(0, false));
        assert!(!chip.set_error(0, true), "the next error");
        assert!(interrupts(&mut chip));
    }

    #[test]
    fn without_an_error_the_port_only_ends_the_interrupt() {
        let mut chip = NumericError::default();
        chip.set_error(0, true);
        chip.set_error(0, false);
        assert!(interrupts(&mut chip), "the latch stays");
        chip.write(0, 1, 0xff, 0);
        assert!(!interrupts(&mut chip));
        assert!(!chip.set_error(0, true));
    }

    #[test]
    fn the_pins_of_all_processors_are_one() {
        let mut chip = NumericError::default();
        chip.set_error(0, true);
        chip.write(0, 1, 0, 0);
        assert!(chip.set_error(63, true));
        assert!(!interrupts(&mut chip), "it did not rise");
        assert!(chip.set_error(0, false));
        assert!(!chip.set_error(63, false));
    }
}
