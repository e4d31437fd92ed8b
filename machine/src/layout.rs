//! The physical address map of the machine, in one place. docs/machine.md shows it as a table.

use std::ops::Range;

/// Extended BIOS data area: reserved, empty.
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
/// Local APIC after reset.
pub const LOCAL_APIC: u64 = 0xfee0_0000;
