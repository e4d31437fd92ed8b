//! The 8042 keyboard controller, with nothing plugged in: guests use it to reset the machine.
//!
//! Offset 0 is the data port (0x60), offset 1 status and command (0x64). The controller itself answers (self-test,
//! command byte, interface tests); what is sent to the keyboard or the mouse is not answered, and the second port does not
//! exist. Output 0 is the keyboard's interrupt, ISA 1.
//!
//! Source: IBM PC AT technical reference; the command set as Linux's and SeaBIOS's drivers use it.

use std::sync::Arc;

use doppel_device::{Chip, Nanos, Outputs, PowerControl, PowerRequest};

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;

/// Bits of the command byte.
const KEYBOARD_INTERRUPT: u8 = 1 << 0;
const SYSTEM_FLAG: u8 = 1 << 2;
const KEYBOARD_DISABLED: u8 = 1 << 4;
const AUX_DISABLED: u8 = 1 << 5;

/// Bits of the output port.
const NO_RESET: u8 = 1 << 0;
const A20: u8 = 1 << 1;
const OUTPUT_FULL: u8 = 1 << 4;
const OUTPUT_PORT_AFTER_RESET: u8 = 0xcf;

const SELF_TEST_PASSED: u8 = 0x55;
const INTERFACE_TEST_PASSED: u8 = 0;

/// The chip.
pub struct I8042 {
    power: Arc<dyn PowerControl>,
    ram: [u8; 32],
    output: Option<u8>,
    output_port: u8,
    /// The command that waits for a byte at the data port.
    waiting: Option<u8>,
    last_was_command: bool,
}

impl I8042 {
    /// A controller after reset; resets are asked of `power`.
    pub fn new(power: Arc<dyn PowerControl>) -> Self {
        let mut ram = [0; 32];
        ram[0] = KEYBOARD_DISABLED | AUX_DISABLED | SYSTEM_FLAG;
        I8042 {
            power,
            ram,
            output: None,
            output_port: OUTPUT_PORT_AFTER_RESET,
            waiting: None,
            last_was_command: false,
        }
    }

    fn status(&self) -> u8 {
        let mut status = STATUS_UNLOCKED;
        if self.output.is_some() {
            status |= STATUS_OUTPUT_FULL;
        }
        if self.ram[0] & SYSTEM_FLAG != 0 {
            status |= STATUS_SYSTEM;
        }
        if self.last_was_command {
            status |= STATUS_COMMAND;
        }
        status
    }

    fn command(&mut self, command: u8) {
        self.waiting = None;
        match command {
            0x20..=0x3f => self.output = Some(self.ram[usize::from(command & 0x1f)]),
            0x60..=0x7f | 0xd1..=0xd4 => self.waiting = Some(command),
            0xa7 => self.ram[0] |= AUX_DISABLED,
            // There is no second port to enable: the bit that says so stays set.
            0xa8 => {}
            0xaa => {
                self.ram[0] |= SYSTEM_FLAG;
                self.output = Some(SELF_TEST_PASSED);
            }
            0xab => self.output = Some(INTERFACE_TEST_PASSED),
            0xad => self.ram[0] |= KEYBOARD_DISABLED,
            0xae => self.ram[0] &= !KEYBOARD_DISABLED,
            0xc0 => self.output = Some(0x80),
            0xd0 => self.output = Some(self.read_output_port()),
            // Pulses the low lines of the output port that are 0; the first is reset.
            0xf0..=0xff if command & 1 == 0 => self.power.request(PowerRequest::Reset),
            _ => {}
        }
    }

    fn read_output_port(&self) -> u8 {
        let full = if self.output.is_some() {
            OUTPUT_FULL
        } else {
            0
        };
        self.output_port & !OUTPUT_FULL | full
    }

    fn data(&mut self, value: u8) {
        match self.waiting.take() {
            Some(0x60) => self.ram[0] = value | AUX_DISABLED,
            Some(command @ 0x61..=0x7f) => self.ram[usize::from(command & 0x1f)] = value,
            Some(0xd1) => self.write_output_port(value),
            Some(0xd2) => self.output = Some(value),
            // For the mouse, or for the keyboard: nobody there.
            _ => {}
        }
    }

    fn write_output_port(&mut self, value: u8) {
        self.output_port = value | A20;
        if value & NO_RESET == 0 {
            self.power.request(PowerRequest::Reset);
        }
    }
}

impl Chip for I8042 {
    fn read(&mut self, offset: u64, _size: u8, _now: Nanos) -> u64 {
        let value = match offset {
            0 => self.output.take().unwrap_or(0),
            _ => self.status(),
        };
        value.into()
    }

    fn write(&mut self, offset: u64, _size: u8, value: u64, _now: Nanos) {
        self.last_was_command = offset != 0;
        match offset {
            0 => self.data(value as u8),
            _ => self.command(value as u8),
        }
    }

    fn outputs(&mut self) -> Outputs {
        let on = self.ram[0] & KEYBOARD_INTERRUPT != 0;
        Outputs {
            level: (on && self.output.is_some()).into(),
            rose: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::{Requests, every_register_takes_everything};

    fn chip() -> (I8042, Arc<Requests>) {
        let requests = Arc::new(Requests::default());
        (I8042::new(requests.clone()), requests)
    }

    fn ask(chip: &mut I8042, command: u64) -> Option<u64> {
        chip.write(1, 1, command, 0);
        let full = chip.read(1, 1, 0) as u8 & STATUS_OUTPUT_FULL != 0;
        full.then(|| chip.read(0, 1, 0))
    }

    #[test]
    fn the_controller_answers_and_nobody_else() {
        let (mut chip, _) = chip();
        assert_eq!(ask(&mut chip, 0xaa), Some(0x55));
        assert_eq!(ask(&mut chip, 0xab), Some(0));
        assert_eq!(ask(&mut chip, 0xa9), None, "no second port");
        chip.write(0, 1, 0xf2, 0);
        assert_eq!(chip.read(1, 1, 0) & 1, 0, "no keyboard");
        chip.write(1, 1, 0xd3, 0);
        chip.write(0, 1, 0x5a, 0);
        assert_eq!(chip.read(1, 1, 0) & 1, 0, "no loop through the second port");
    }

    #[test]
    fn the_command_byte_can_be_changed_but_not_grow_a_mouse() {
        let (mut chip, _) = chip();
        assert_eq!(ask(&mut chip, 0x20), Some(0x34));
        chip.write(1, 1, 0x60, 0);
        assert_eq!(chip.read(1, 1, 0) as u8 & STATUS_COMMAND, STATUS_COMMAND);
        chip.write(0, 1, 0x45, 0);
        assert_eq!(ask(&mut chip, 0x20), Some(0x65));
        ask(&mut chip, 0xa8);
        assert_eq!(ask(&mut chip, 0x20), Some(0x65));
    }

    #[test]
    fn every_way_to_reset_resets() {
        let (mut chip, requests) = chip();
        chip.write(1, 1, 0xff, 0);
        assert_eq!(requests.take(), []);
        chip.write(1, 1, 0xfe, 0);
        assert_eq!(requests.take(), [PowerRequest::Reset]);
        chip.write(1, 1, 0xd1, 0);
        chip.write(0, 1, 0xdf, 0);
        assert_eq!(requests.take(), []);
        chip.write(1, 1, 0xd1, 0);
        chip.write(0, 1, 0xde, 0);
        assert_eq!(requests.take(), [PowerRequest::Reset]);
    }

    #[test]
    fn an_answer_interrupts_until_it_is_read() {
        let (mut chip, _) = chip();
        chip.write(1, 1, 0x60, 0);
        chip.write(0, 1, KEYBOARD_INTERRUPT.into(), 0);
        assert_eq!(chip.outputs().level, 0);
        chip.write(1, 1, 0xd2, 0);
        chip.write(0, 1, 0x1c, 0);
        assert_eq!(chip.outputs().level, 1);
        assert_eq!(chip.read(0, 1, 0), 0x1c);
        assert_eq!(chip.outputs().level, 0);
    }

    #[test]
    fn nothing_written_breaks_it() {
        let (mut chip, requests) = chip();
        every_register_takes_everything(&mut chip, 3, |_, _| drop(requests.take()));
    }
}
