//! The 8259A interrupt controllers: the PC's cascaded pair and its edge/level control registers.
//!
//! Register blocks as offsets: 0 and 1 the master (ports 0x20, 0x21), 2 and 3 the slave (0xa0, 0xa1), 4 and 5 the ELCR
//! (0x4d0, 0x4d1). Inputs 0 to 15 are the ISA interrupts (2 is the cascade); output 0 is INTR.
//!
//! Source: Intel 8259A data sheet; the ELCR from the 82371SB (PIIX3) data sheet.

use doppel_device::{Chip, Nanos, Outputs};

/// The input of the master that the slave's output drives.
const CASCADE: u8 = 2;
/// What an 8259 answers an INTA cycle with when the request has gone.
const SPURIOUS: u8 = 7;
/// ELCR bits that exist: interrupts 0, 1, 2, 8 and 13 are always edge triggered.
const ELCR_WRITABLE: [u8; 2] = [0xf8, 0xde];

/// Which initialization word the data port takes next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Expect {
    /// None: it is the mask register.
    #[default]
    Mask,
    Icw2,
    Icw3,
    Icw4,
}

/// One 8259A.
#[derive(Clone, Debug, Default)]
struct Half {
    master: bool,
    irr: u8,
    isr: u8,
    imr: u8,
    /// Levels of the inputs, for edges.
    lines: u8,
    /// Inputs that are level triggered.
    elcr: u8,
    vector_base: u8,
    /// The input with the highest priority.
    top: u8,
    expect: Expect,
    icw4_follows: bool,
    single: bool,
    all_level: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    special_fully_nested: bool,
    read_isr: bool,
    poll: bool,
}

impl Half {
    fn level_triggered(&self) -> u8 {
        if self.all_level { 0xff } else { self.elcr }
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        let rises = level && self.lines & bit == 0;
        self.lines = if level {
            self.lines | bit
        } else {
            self.lines & !bit
        };
        if self.level_triggered() & bit != 0 {
            self.irr = self.irr & !bit | self.lines & bit;
        } else if rises {
            self.irr |= bit;
        }
    }

    /// An input that becomes level triggered, or is, requests what its line says.
    fn set_elcr(&mut self, value: u8) {
        self.elcr = value;
        self.irr = self.irr & !value | self.lines & value;
    }

    /// The cascade follows the slave's output, whatever the trigger mode: the slave takes its request back
    /// and renews it at each INTA cycle.
    fn set_cascade(&mut self, level: bool) {
        let bit = 1 << CASCADE;
        self.irr = if level {
            self.irr | bit
        } else {
            self.irr & !bit
        };
    }

    /// 0 for the highest priority of `inputs`, 8 for none.
    fn priority(&self, inputs: u8) -> u32 {
        inputs.rotate_right(self.top.into()).trailing_zeros()
    }

    fn input_of(&self, priority: u32) -> u8 {
        (priority as u8 + self.top) & 7
    }

    /// The input whose request goes out now.
    fn request(&self) -> Option<u8> {
        let mut in_service = self.isr;
        if self.special_mask {
            in_service &= !self.imr;
        }
        let wanted = self.priority(self.irr & !self.imr);
        let current = self.priority(in_service);
        // The slave asks only for what is above what it has in service.
        let nests = self.special_fully_nested && self.master && wanted == current;
        let within_slave = nests && wanted < 8 && self.input_of(wanted) == CASCADE;
        (wanted < current || within_slave).then(|| self.input_of(wanted))
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.level_triggered() & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.top = (input + 1) & 7;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.initialize(value);
        } else if value & 0x08 != 0 {
            self.write_ocw3(value);
        } else {
            self.write_ocw2(value);
        }
    }

    fn initialize(&mut self, icw1: u8) {
        *self = Half {
            master: self.master,
            elcr: self.elcr,
            lines: self.lines,
            vector_base: self.vector_base,
            irr: self.irr & self.elcr,
            expect: Expect::Icw2,
            icw4_follows: icw1 & 0x01 != 0,
            single: icw1 & 0x02 != 0,
            all_level: icw1 & 0x08 != 0,
            ..Half::default()
        };
    }

    fn write_ocw3(&mut self, value: u8) {
        self.poll = value & 0x04 != 0;
        if value & 0x02 != 0 {
            self.read_isr = value & 0x01 != 0;
        }
        if value & 0x40 != 0 {
            self.special_mask = value & 0x20 != 0;
        }
    }

    fn write_ocw2(&mut self, value: u8) {
        let named = value & 7;
        match value >> 5 {
            0 | 4 => self.rotate_on_auto_eoi = value & 0x80 != 0,
            command @ (1 | 5) => {
                // What is masked is left, in special mask mode.
                let kept = if self.special_mask { self.imr } else { 0 };
                let highest = self.priority(self.isr & !kept);
                if highest < 8 {
                    self.end(self.input_of(highest), command == 5);
                }
            }
            command @ (3 | 7) => self.end(named, command == 7),
            6 => self.top = (named + 1) & 7,
            _ => {}
        }
    }

    fn end(&mut self, input: u8, rotate: bool) {
        self.isr &= !(1 << input);
        if rotate {
            self.top = (input + 1) & 7;
        }
    }

    fn write_data(&mut self, value: u8) {
        let after_icw3 = if self.icw4_follows {
            Expect::Icw4
        } else {
            Expect::Mask
        };
        self.expect = match self.expect {
            Expect::Mask => {
                self.imr = value;
                Expect::Mask
            }
            Expect::Icw2 => {
                self.vector_base = value & 0xf8;
                if self.single {
                    after_icw3
                } else {
                    Expect::Icw3
                }
            }
            Expect::Icw3 => after_icw3,
            Expect::Icw4 => {
                self.special_fully_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                Expect::Mask
            }
        };
    }

    fn read_poll(&mut self) -> u8 {
        self.poll = false;
        match self.request() {
            Some(input) => {
                self.acknowledge(input);
                0x80 | input
            }
            None => 0,
        }
    }

    fn read(&mut self, data_port: bool) -> u8 {
        match (data_port, self.read_isr) {
            _ if self.poll => self.read_poll(),
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }
}

/// The pair.
#[derive(Clone, Debug)]
pub struct I8259 {
    master: Half,
    slave: Half,
}

impl Default for I8259 {
    fn default() -> Self {
        I8259 {
            master: Half {
                master: true,
                ..Half::default()
            },
            slave: Half::default(),
        }
    }
}

impl I8259 {
    /// The pair as it is after power-on: nothing masked, no vectors set.
    pub fn new() -> Self {
        Self::default()
    }

    /// The INTA cycle: the vector of the interrupt that is delivered now. Where the request has gone the answer is
    /// the vector of input 7, without its in-service bit.
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.request() {
            None => self.master.vector_base + SPURIOUS,
            Some(CASCADE) => {
                self.master.acknowledge(CASCADE);
                let input = self.slave.request();
                if let Some(input) = input {
                    self.slave.acknowledge(input);
                }
                self.slave.vector_base + input.unwrap_or(SPURIOUS)
            }
            Some(input) => {
                self.master.acknowledge(input);
                self.master.vector_base + input
            }
        };
        self.cascade();
        vector
    }

    /// How INTR stands.
    pub fn intr(&self) -> bool {
        self.master.request().is_some()
    }

    fn cascade(&mut self) {
        let request = self.slave.request().is_some();
        self.master.set_cascade(request);
    }
}

impl Chip for I8259 {
    fn read(&mut self, offset: u64, _size: u8, _now: Nanos) -> u64 {
        let value = match offset {
            0 | 1 => self.master.read(offset == 1),
            2 | 3 => self.slave.read(offset == 3),
            4 => self.master.elcr,
            5 => self.slave.elcr,
            _ => 0xff,
        };
        self.cascade();
        value.into()
    }

    fn write(&mut self, offset: u64, _size: u8, value: u64, _now: Nanos) {
        let value = value as u8;
        match offset {
            0 => self.master.write_command(value),
            1 => self.master.write_data(value),
            2 => self.slave.write_command(value),
            3 => self.slave.write_data(value),
            4 => self.master.set_elcr(value & ELCR_WRITABLE[0]),
            5 => self.slave.set_elcr(value & ELCR_WRITABLE[1]),
            _ => {}
        }
        self.cascade();
    }

    fn set_input(&mut self, input: u32, level: bool, _now: Nanos) {
        match input {
            2 => {}
            0..8 => self.master.set_line(input as u8, level),
            8..16 => self.slave.set_line(input as u8 - 8, level),
            _ => {}
        }
        self.cascade();
    }

    fn outputs(&mut self) -> Outputs {
        Outputs {
            level: self.intr().into(),
            rose: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::every_register_takes_everything;

    /// As Linux sets it up: vectors 0x30 and 0x38, nothing masked.
    fn initialized() -> I8259 {
        let mut pic = I8259::new();
        for (offset, value) in [
            (0, 0x11),
            (1, 0x30),
            (1, 0x04),
            (1, 0x01),
            (2, 0x11),
            (3, 0x38),
            (3, 0x02),
            (3, 0x01),
        ] {
            pic.write(offset, 1, value, 0);
        }
        pic
    }

    fn pulse(pic: &mut I8259, input: u32) {
        pic.set_input(input, true, 0);
        pic.set_input(input, false, 0);
    }

    #[test]
    fn the_highest_priority_comes_first_and_blocks_the_rest_until_its_end() {
        let mut pic = initialized();
        pulse(&mut pic, 4);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31);
        assert!(!pic.intr());
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x30);
        pic.write(0, 1, 0x20, 0);
        assert!(!pic.intr());
        pic.write(0, 1, 0x20, 0);
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn the_slave_goes_through_the_cascade() {
        let mut pic = initialized();
        pulse(&mut pic, 12);
        pulse(&mut pic, 8);
        assert_eq!(pic.acknowledge(), 0x38);
        assert!(!pic.intr());
        pic.write(2, 1, 0x20, 0);
        pic.write(0, 1, 0x62, 0);
        assert_eq!(pic.acknowledge(), 0x3c);
    }

    #[test]
    fn a_request_that_went_away_is_spurious() {
        let mut pic = initialized();
        pic.write(4, 1, 0xff, 0);
        pic.write(5, 1, 0xff, 0);
        assert_eq!((pic.read(4, 1, 0), pic.read(5, 1, 0)), (0xf8, 0xde));
        pic.set_input(5, true, 0);
        assert!(pic.intr());
        pic.set_input(5, false, 0);
        assert!(!pic.intr());
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(0, 1, 0x0b, 0);
        assert_eq!(pic.read(0, 1, 0), 0, "no in-service bit");
    }

    #[test]
    fn a_level_interrupt_comes_again_after_its_end_while_the_line_is_high() {
        let mut pic = initialized();
        pic.write(5, 1, 0x04, 0);
        pic.set_input(10, true, 0);
        for _ in 0..2 {
            assert_eq!(pic.acknowledge(), 0x3a);
            assert!(!pic.intr());
            pic.write(2, 1, 0x62, 0);
            pic.write(0, 1, 0x62, 0);
        }
        pic.set_input(10, false, 0);
        assert!(!pic.intr());
    }

    #[test]
    fn an_input_that_becomes_level_triggered_follows_its_line() {
        let mut pic = initialized();
        pic.set_input(10, true, 0);
        assert_eq!(pic.acknowledge(), 0x3a);
        pic.write(2, 1, 0x62, 0);
        pic.write(0, 1, 0x62, 0);
        assert!(!pic.intr(), "no edge");
        pic.write(5, 1, 0x04, 0);
        assert_eq!(pic.acknowledge(), 0x3a);
        pic.write(2, 1, 0x62, 0);
        pic.write(0, 1, 0x62, 0);
        pic.set_input(10, false, 0);
        pulse(&mut pic, 5);
        pulse(&mut pic, 6);
        pic.write(4, 1, 0x20, 0);
        assert_eq!(pic.acknowledge(), 0x36, "the line of 5 is low");
        assert!(!pic.intr());
    }

    #[test]
    fn an_edge_interrupt_comes_once() {
        let mut pic = initialized();
        pic.set_input(4, true, 0);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.write(0, 1, 0x64, 0);
        assert!(!pic.intr());
    }

    #[test]
    fn masks_hide_requests_and_read_back() {
        let mut pic = initialized();
        pic.write(1, 1, 0xef, 0);
        assert_eq!(pic.read(1, 1, 0), 0xef);
        pulse(&mut pic, 3);
        assert!(!pic.intr());
        assert_eq!(pic.read(0, 1, 0), 0x08, "requested all the same");
        pic.write(1, 1, 0, 0);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn automatic_end_of_interrupt_leaves_nothing_in_service() {
        let mut pic = initialized();
        for (offset, value) in [(0, 0x11), (1, 0x30), (1, 0x04), (1, 0x03)] {
            pic.write(offset, 1, value, 0);
        }
        pulse(&mut pic, 0);
        assert_eq!(pic.acknowledge(), 0x30);
        pulse(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x34);
    }

    #[test]
    fn priorities_rotate() {
        let mut pic = initialized();
        pic.write(0, 1, 0xc0 | 3, 0);
        pulse(&mut pic, 3);
        pulse(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(0, 1, 0xa0, 0);
        pulse(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x33, "5 went to the end");
    }

    #[test]
    fn special_mask_mode_lets_lower_priorities_in() {
        let mut pic = initialized();
        pulse(&mut pic, 0);
        pic.acknowledge();
        pulse(&mut pic, 6);
        assert!(!pic.intr());
        pic.write(1, 1, 0x01, 0);
        pic.write(0, 1, 0x68, 0);
        assert_eq!(pic.acknowledge(), 0x36);
    }

    #[test]
    fn special_mask_mode_ends_what_is_not_masked() {
        let mut pic = initialized();
        pulse(&mut pic, 3);
        assert_eq!(pic.acknowledge(), 0x33);
        pic.write(1, 1, 0x08, 0);
        pic.write(0, 1, 0x68, 0);
        pulse(&mut pic, 5);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.write(0, 1, 0x20, 0);
        pic.write(0, 1, 0x0b, 0);
        assert_eq!(pic.read(0, 1, 0), 0x08, "in service");
        pulse(&mut pic, 6);
        assert_eq!(pic.acknowledge(), 0x36);
    }

    #[test]
    fn special_fully_nested_the_slave_alone_nests() {
        let mut pic = initialized();
        for (offset, value) in [(0, 0x11), (1, 0x30), (1, 0x04), (1, 0x11)] {
            pic.write(offset, 1, value, 0);
        }
        pulse(&mut pic, 10);
        assert_eq!(pic.acknowledge(), 0x3a);
        pulse(&mut pic, 4);
        pulse(&mut pic, 12);
        assert!(!pic.intr(), "both are lower");
        pulse(&mut pic, 9);
        assert_eq!(pic.acknowledge(), 0x39);
        pulse(&mut pic, 1);
        assert_eq!(pic.acknowledge(), 0x31);
    }

    #[test]
    fn polling_acknowledges() {
        let mut pic = initialized();
        pulse(&mut pic, 6);
        pic.write(0, 1, 0x0c, 0);
        assert_eq!(pic.read(0, 1, 0), 0x86);
        assert!(!pic.intr());
        pic.write(0, 1, 0x0c, 0);
        assert_eq!(pic.read(0, 1, 0), 0);
    }

    #[test]
    fn nothing_written_breaks_it() {
        let mut pic = I8259::new();
        every_register_takes_everything(&mut pic, 7, |pic, random| {
            pic.set_input(random as u32 % 20, random & 0x100 != 0, 0);
            pic.acknowledge();
        });
    }
}
