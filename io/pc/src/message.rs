//! Interrupt messages: what I/O APICs, MSI devices and local APICs (IPIs) send to local APICs.
//!
//! Source: Intel SDM volume 3, 11.6 (ICR), 11.10 (message address and data formats); 82093AA data sheet.

/// What the interrupt does at its destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// The vector, at every destination.
    Fixed,
    /// The vector, at the one destination with the lowest priority.
    LowestPriority,
    /// A system management interrupt.
    Smi,
    /// A non-maskable interrupt.
    Nmi,
    /// Reset of the processor.
    Init,
    /// Start-up of a processor that waits after INIT, at page `vector`.
    Startup,
    /// As from an 8259, which is asked for the vector.
    ExtInt,
}

impl DeliveryMode {
    /// The mode field (bits 10:8) of an ICR, a redirection entry, message data or an LVT entry; 3 is reserved.
    pub fn from_register(register: u32) -> Option<Self> {
        match register >> 8 & 7 {
            0 => Some(DeliveryMode::Fixed),
            1 => Some(DeliveryMode::LowestPriority),
            2 => Some(DeliveryMode::Smi),
            4 => Some(DeliveryMode::Nmi),
            5 => Some(DeliveryMode::Init),
            6 => Some(DeliveryMode::Startup),
            7 => Some(DeliveryMode::ExtInt),
            _ => None,
        }
    }

    /// True where it ends a halt of a processor whose interrupts are off.
    pub fn ends_any_halt(self) -> bool {
        matches!(self, DeliveryMode::Nmi | DeliveryMode::Init)
    }
}

/// Which local APICs a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// The one with this ID.
    Physical(u32),
    /// Those whose logical destination register matches.
    Logical(u32),
    /// All of them.
    All,
    /// All but the one with this ID.
    AllBut(u32),
}

impl Destination {
    /// From an 8-bit destination field, where all ones is everybody.
    pub fn from_8_bits(field: u8, logical: bool) -> Self {
        match (field, logical) {
            (0xff, _) => Destination::All,
            (_, false) => Destination::Physical(field.into()),
            (_, true) => Destination::Logical(field.into()),
        }
    }

    /// From the 32-bit destination field of an x2APIC's ICR.
    pub fn from_32_bits(field: u32, logical: bool) -> Self {
        match (field, logical) {
            (u32::MAX, _) => Destination::All,
            (_, false) => Destination::Physical(field),
            (_, true) => Destination::Logical(field),
        }
    }
}

/// An interrupt on its way to local APICs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InterruptMessage {
    /// For whom.
    pub destination: Destination,
    /// What it does there.
    pub mode: DeliveryMode,
    /// The vector, or a start-up page.
    pub vector: u8,
    /// Level triggered: its end is told to the I/O APICs.
    pub level_triggered: bool,
}

impl InterruptMessage {
    /// What a write of `data` to `address` (0xfee0_0000..0xfef0_0000) means. `None` for a reserved delivery mode.
    pub fn from_msi(address: u64, data: u32) -> Option<Self> {
        const LOGICAL: u64 = 1 << 2;
        const REDIRECTION_HINT: u64 = 1 << 3;
        let logical = address & LOGICAL != 0;
        let mode = match DeliveryMode::from_register(data)? {
            // 11.11.1: with the hint a logical destination is a set, of which one processor is interrupted.
            DeliveryMode::Fixed if logical && address & REDIRECTION_HINT != 0 => {
                DeliveryMode::LowestPriority
            }
            mode => mode,
        };
        Some(InterruptMessage {
            destination: Destination::from_8_bits((address >> 12) as u8, logical),
            mode,
            vector: data as u8,
            level_triggered: data & 0x8000 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_msi_is_read_as_the_manual_lays_it_out() {
        let message = InterruptMessage::from_msi(0xfee0_3000, 0x0041).unwrap();
        assert_eq!(message.destination, Destination::Physical(3));
        assert_eq!((message.mode, message.vector), (DeliveryMode::Fixed, 0x41));
        assert!(!message.level_triggered);

        let message = InterruptMessage::from_msi(0xfee0_500c, 0xc123).unwrap();
        assert_eq!(message.destination, Destination::Logical(5));
        assert_eq!(message.mode, DeliveryMode::LowestPriority);
        assert!(message.level_triggered);

        for (address, mode) in [
            (0xfee0_500c, DeliveryMode::LowestPriority),
            (0xfee0_5004, DeliveryMode::Fixed),
            (0xfee0_5008, DeliveryMode::Fixed),
        ] {
            let message = InterruptMessage::from_msi(address, 0x0041).unwrap();
            assert_eq!(message.mode, mode, "{address:#x}");
        }

        assert_eq!(InterruptMessage::from_msi(0xfee0_0000, 0x0341), None);
    }

    #[test]
    fn all_ones_is_everybody() {
        assert_eq!(Destination::from_8_bits(0xff, false), Destination::All);
        assert_eq!(
            Destination::from_32_bits(0xff, false),
            Destination::Physical(255)
        );
        assert_eq!(Destination::from_32_bits(u32::MAX, true), Destination::All);
    }
}
