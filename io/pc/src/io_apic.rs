//! The I/O APIC: 24 inputs, each with a redirection entry that says which message it becomes.
//!
//! Inputs are logical (true is asserted): the polarity bit of an entry reads back and changes nothing, as whoever wires
//! the machine also writes the tables that tell the guest the polarity.
//!
//! Source: Intel 82093AA data sheet; the EOI register (version 0x20) from Intel's I/O controller hub data sheets.

use crate::{DeliveryMode, Destination, InterruptMessage};

/// Inputs of the chip.
pub const IO_APIC_PINS: usize = 24;
/// Where the chip's register window is.
pub const IO_APIC_BASE: u64 = 0xfec0_0000;

const VERSION: u32 = 0x20;
const IOREGSEL: u64 = 0x00;
const IOWIN: u64 = 0x10;
const EOI: u64 = 0x40;

const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL_TRIGGERED: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Delivery status and remote IRR are read-only, the rest up to the destination reserved.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// The chip. Its output is a stream of messages: call [`IoApic::send`] after each other call.
#[derive(Clone, Debug)]
pub struct IoApic {
    id: u32,
    select: u8,
    entries: [u64; IO_APIC_PINS],
    /// Inputs that are asserted.
    lines: u32,
    /// Edges that no message was sent for yet.
    edges: u32,
    /// Levels that nobody accepted, until the entry is written or the input falls.
    refused: u32,
}

impl IoApic {
    /// A chip after reset: everything masked.
    pub fn new(id: u8) -> Self {
        IoApic {
            id: u32::from(id & 0xf) << 24,
            select: 0,
            entries: [MASKED; IO_APIC_PINS],
            lines: 0,
            edges: 0,
            refused: 0,
        }
    }

    /// A load of up to 4 bytes from the register window.
    pub fn read(&self, offset: u64, size: u8) -> u64 {
        let value = match offset & !3 {
            IOREGSEL => self.select.into(),
            IOWIN => self.register(self.select),
            _ => 0,
        };
        u64::from(value) >> (8 * (offset & 3)) & doppel_device::all_ones(size)
    }

    /// A store to the register window.
    pub fn write(&mut self, offset: u64, value: u32) {
        match offset {
            IOREGSEL => self.select = value as u8,
            IOWIN => self.set_register(self.select, value),
            EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }

    fn register(&self, index: u8) -> u32 {
        match index {
            0 | 2 => self.id,
            1 => VERSION | (IO_APIC_PINS as u32 - 1) << 16,
            0x10.. => {
                let entry = self.entries.get(usize::from(index - 0x10) / 2);
                let shift = 32 * u32::from(index & 1);
                entry.map_or(0, |entry| (entry >> shift) as u32)
            }
            _ => 0,
        }
    }

    fn set_register(&mut self, index: u8, value: u32) {
        if index == 0 {
            self.id = value & 0x0f00_0000;
        }
        let pin = usize::from(index.wrapping_sub(0x10)) / 2;
        if let Some(entry) = self.entries.get_mut(pin) {
            let shift = 32 * u32::from(index & 1);
            let writable = WRITABLE & 0xffff_ffff << shift;
            *entry = *entry & !writable | u64::from(value) << shift & writable;
            if !is_level(*entry) {
                *entry &= !REMOTE_IRR;
            }
            self.refused &= !(1 << pin);
        }
    }

    /// Input `pin` is asserted or not. An edge at a masked input is lost, as in the real chip.
    pub fn set_input(&mut self, pin: u32, asserted: bool) {
        let Some(entry) = self.entries.get(pin as usize) else {
            return;
        };
        let bit = 1 << pin;
        if !asserted {
            self.lines &= !bit;
            self.refused &= !bit;
        } else if self.lines & bit == 0 {
            self.lines |= bit;
            if entry & MASKED == 0 && !is_level(*entry) {
                self.edges |= bit;
            }
        }
    }

    /// A local APIC (or the guest, by the EOI register) says that the level-triggered interrupt `vector` is handled.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for entry in &mut self.entries {
            if *entry as u8 == vector && is_level(*entry) {
                *entry &= !REMOTE_IRR;
            }
        }
    }

    /// Hands the messages that are due to `deliver`, which says whether a local APIC accepted.
    pub fn send(&mut self, deliver: impl Fn(InterruptMessage) -> bool) {
        while let Some((pin, message)) = self.next_message() {
            let accepted = deliver(message);
            if message.level_triggered && !accepted {
                self.refused(pin);
            }
        }
    }

    /// The next message to send, if any, and the input that it comes from.
    fn next_message(&mut self) -> Option<(usize, InterruptMessage)> {
        while let Some(pin) = (0..IO_APIC_PINS).find(|&pin| self.wants_to_send(pin)) {
            self.edges &= !(1 << pin);
            let entry = &mut self.entries[pin];
            if is_level(*entry) {
                *entry |= REMOTE_IRR;
            }
            if let Some(message) = message(*entry) {
                return Some((pin, message));
            }
        }
        None
    }

    /// Remote IRR means that a local APIC has accepted (82093AA, 3.2.4, bit 14). The chip would try again for ever; here it does when
    /// something has changed.
    fn refused(&mut self, pin: usize) {
        self.entries[pin] &= !REMOTE_IRR;
        self.refused |= 1 << pin;
    }

    fn wants_to_send(&self, pin: usize) -> bool {
        let entry = self.entries[pin];
        let pending = if is_level(entry) {
            (self.lines & !self.refused) >> pin & 1 != 0 && entry & REMOTE_IRR == 0
        } else {
            self.edges >> pin & 1 != 0
        };
        pending && entry & MASKED == 0
    }

    /// An input may yet send what ends a halt with interrupts off.
    pub fn ends_any_halt(&self) -> bool {
        let mut open = self.entries.iter().filter(|entry| *entry & MASKED == 0);
        open.any(|entry| {
            DeliveryMode::from_register(*entry as u32).is_some_and(DeliveryMode::ends_any_halt)
        })
    }

    /// Back to the state after reset; the inputs stay as they are.
    pub fn reset(&mut self) {
        *self = IoApic {
            lines: self.lines,
            ..IoApic::new((self.id >> 24) as u8)
        };
    }
}

fn message(entry: u64) -> Option<InterruptMessage> {
    Some(InterruptMessage {
        destination: Destination::from_8_bits((entry >> 56) as u8, entry & LOGICAL != 0),
        mode: DeliveryMode::from_register(entry as u32)?,
        vector: entry as u8,
        level_triggered: is_level(entry),
    })
}

/// What is no vector is an edge, even if it is programmed as a level: nothing would end it (82093AA, 3.2.4, delivery mode).
fn is_level(entry: u64) -> bool {
    use DeliveryMode::{Fixed, LowestPriority};
    let mode = DeliveryMode::from_register(entry as u32);
    entry & LEVEL_TRIGGERED != 0 && matches!(mode, Some(Fixed | LowestPriority))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::every_register_takes_everything;
    use doppel_device::Nanos;

    impl doppel_device::Chip for IoApic {
        const WIDTH: u8 = 4;
        fn read(&mut self, offset: u64, size: u8, _: Nanos) -> u64 {
            IoApic::read(self, offset, size)
        }
        fn write(&mut self, offset: u64, _: u8, value: u64, _: Nanos) {
            IoApic::write(self, offset, value as u32);
        }
    }

    fn next(chip: &mut IoApic) -> Option<InterruptMessage> {
        chip.next_message().map(|(_, message)| message)
    }

    fn redirect(chip: &mut IoApic, pin: u32, entry: u64) {
        for (half, value) in [(1, (entry >> 32) as u32), (0, entry as u32)] {
            chip.write(IOREGSEL, 0x10 + 2 * pin + half);
            chip.write(IOWIN, value);
        }
    }

    fn entry(chip: &mut IoApic, pin: u32) -> u64 {
        chip.write(IOREGSEL, 0x10 + 2 * pin);
        let low = chip.read(IOWIN, 4);
        chip.write(IOREGSEL, 0x11 + 2 * pin);
        low | chip.read(IOWIN, 4) << 32
    }

    #[test]
    fn it_says_what_it_is() {
        let mut chip = IoApic::new(2);
        chip.write(IOREGSEL, 0);
        assert_eq!(chip.read(IOWIN, 4), 0x0200_0000);
        chip.write(IOREGSEL, 1);
        assert_eq!(chip.read(IOWIN, 4), 0x0017_0020);
        assert_eq!(entry(&mut chip, 23), MASKED);
    }

    #[test]
    fn an_edge_becomes_one_message() {
        let mut chip = IoApic::new(0);
        redirect(&mut chip, 4, 0x0100_0000_0000_0834);
        chip.set_input(4, true);
        let message = next(&mut chip).unwrap();
        assert_eq!(message.destination, Destination::Logical(1));
        assert_eq!((message.mode, message.vector), (DeliveryMode::Fixed, 0x34));
        assert_eq!(next(&mut chip), None);
        chip.set_input(4, true);
        assert_eq!(next(&mut chip), None);
        chip.set_input(4, false);
        chip.set_input(4, true);
        assert!(next(&mut chip).is_some());
    }

    #[test]
    fn an_edge_at_a_masked_input_is_lost_and_a_level_is_not() {
        let mut chip = IoApic::new(0);
        for (level, messages) in [(0, 0), (LEVEL_TRIGGERED, 1)] {
            redirect(&mut chip, 9, MASKED | level | 0x39);
            chip.set_input(9, true);
            assert_eq!(next(&mut chip), None);
            redirect(&mut chip, 9, level | 0x39);
            assert_eq!(next(&mut chip).into_iter().count(), messages);
            chip.set_input(9, false);
        }
    }

    #[test]
    fn a_level_is_sent_again_after_its_end_while_it_lasts() {
        let mut chip = IoApic::new(0);
        redirect(&mut chip, 10, LEVEL_TRIGGERED | 0x5a);
        chip.set_input(10, true);
        assert!(next(&mut chip).unwrap().level_triggered);
        assert_eq!(next(&mut chip), None);
        assert_eq!(entry(&mut chip, 10), LEVEL_TRIGGERED | REMOTE_IRR | 0x5a);
        chip.end_of_interrupt(0x5b);
        assert_eq!(next(&mut chip), None);
        chip.write(EOI, 0x5a);
        assert!(next(&mut chip).is_some());
        chip.set_input(10, false);
        chip.end_of_interrupt(0x5a);
        assert_eq!(next(&mut chip), None);
        assert_eq!(entry(&mut chip, 10), LEVEL_TRIGGERED | 0x5a);
    }

    #[test]
    fn an_nmi_is_an_edge_even_as_a_level() {
        let mut chip = IoApic::new(0);
        redirect(&mut chip, 5, LEVEL_TRIGGERED | 0x400);
        for _ in 0..3 {
            chip.set_input(5, true);
            let message = next(&mut chip).unwrap();
            assert_eq!(message.mode, DeliveryMode::Nmi);
            assert_eq!(next(&mut chip), None);
            chip.set_input(5, false);
            assert_eq!(entry(&mut chip, 5), LEVEL_TRIGGERED | 0x400);
        }
    }

    #[test]
    fn status_bits_are_read_only_and_edge_mode_clears_remote_irr() {
        let mut chip = IoApic::new(0);
        redirect(&mut chip, 3, u64::MAX);
        assert_eq!(entry(&mut chip, 3), WRITABLE);
        redirect(&mut chip, 3, LEVEL_TRIGGERED | 0x40);
        chip.set_input(3, true);
        next(&mut chip).unwrap();
        redirect(&mut chip, 3, MASKED | 0x40);
        assert_eq!(entry(&mut chip, 3), MASKED | 0x40);
    }

    #[test]
    fn a_reserved_delivery_mode_sends_nothing() {
        let mut chip = IoApic::new(0);
        redirect(&mut chip, 1, 0x331);
        redirect(&mut chip, 2, 0x032);
        chip.set_input(1, true);
        chip.set_input(2, true);
        assert_eq!(next(&mut chip).unwrap().vector, 0x32);
        assert_eq!(next(&mut chip), None);
    }

    #[test]
    fn nothing_written_breaks_it() {
        let mut chip = IoApic::new(0);
        every_register_takes_everything(&mut chip, 0x50, |chip, random| {
            chip.set_input(random as u32 % 32, random & 0x100 != 0);
            chip.end_of_interrupt((random >> 16) as u8);
            for _ in 0..=IO_APIC_PINS {
                if next(chip).is_none() {
                    return;
                }
            }
            panic!("messages without end");
        });
    }
}
