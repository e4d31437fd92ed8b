//! The physical address map of the machine, in one place. docs/machine.md shows it as a table.

use std::ops::Range;

/// Extended BIOS data area: reserved; the code behind the interrupt vectors of real mode is in it.
pub const EBDA: Range<u64> = 0x9_fc00..0xa_0000;
/// ACPI and SMBIOS tables.
pub const FIRMWARE_TABLES: Range<u64> = 0xe_0000..0x10_0000;
/// Where SMBIOS begins; its entry point must be at a multiple of 16 above 0xf0000.
pub const SMBIOS: u64 = 0xf_0000;

/// PCI memory below the ECAM window.
pub const PCI_MMIO_LOW: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI configuration space, 1 MiB a bus.
pub const ECAM: Range<u64> = 0xe000_0000..0xf000_0000;
/// PCI memory above the ECAM window.
pub const PCI_MMIO_HIGH: Range<u64> = 0xf000_0000..0xfec0_0000;
/// I/O APIC.
pub const IO_APIC: u64 = 0xfec0_0000;
/// High precision event timer.
pub const HPET: u64 = 0xfed0_0000;
/// Pages of virtio devices without PCI.
pub const VIRTIO_MMIO: Range<u64> = 0xfed1_0000..0xfee0_0000;
/// Local APIC after reset.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// ID of the I/O APIC; CPUs have those from 0 on, which may be the same since the buses of old are gone.
pub const IO_APIC_ID: u8 = 0;

/// First port of the power management block.
pub const PM_BASE: u16 = 0x600;
/// Its number of ports.
pub const PM_LEN: u8 = 0x10;
/// PM1a status and enable registers.
pub const PM1_EVENT: u16 = PM_BASE;
/// PM1a control register.
pub const PM1_CONTROL: u16 = PM_BASE + 4;
/// ACPI PM timer.
pub const PM_TIMER: u16 = PM_BASE + 8;
/// PM2 control: apart from the others, at ISA Plug and Play's write data port. Nothing of that is here, and a guest whose ACPI
/// driver holds this port does not look for it, which takes a Linux for i386 half a second of delays (docs/machine.md).
pub const PM2_CONTROL: u16 = 0xa79;
/// General-purpose events 0 to 15: status and enable.
pub const GPE0: u16 = PM_BASE + 12;
/// SLP_TYP of soft off.
pub const SLEEP_TYPE_S5: u8 = 5;
/// SMI command port, and what turns ACPI mode on and off there.
pub const SMI_COMMAND: u16 = 0xb2;
/// Written to [`SMI_COMMAND`] to enter ACPI mode.
pub const SMI_ACPI_ENABLE: u8 = 2;
/// Written to [`SMI_COMMAND`] to leave it.
pub const SMI_ACPI_DISABLE: u8 = 3;
/// Reset control register of the chip set.
pub const RESET_CONTROL: u16 = 0xcf9;
/// Written there for a hard reset.
pub const RESET_VALUE: u8 = 6;

/// First serial port.
pub const COM1: u16 = 0x3f8;
/// Its ISA interrupt.
pub const COM1_IRQ: u8 = 4;
/// CMOS RTC index port; the data port follows.
pub const RTC: u16 = 0x70;
/// Its ISA interrupt.
pub const RTC_IRQ: u8 = 8;
/// System control interrupt of ACPI: level triggered, active high.
pub const SCI: u8 = 9;
/// ISA interrupt of the 8254.
pub const PIT_IRQ: u8 = 0;
/// I/O APIC input of the 8254, whose ISA interrupt is 0.
pub const PIT_GSI: u32 = 2;

/// I/O APIC input of a PCI interrupt pin (0 is INTA), spread over the four inputs from 16 on.
pub const fn pci_gsi(device: u32, pin: u32) -> u32 {
    16 + (device + pin) % 4
}

/// I/O APIC input of virtio device `n` without PCI: the eight from 16 on, in turn.
pub const fn virtio_gsi(n: u32) -> u32 {
    16 + n % 8
}
