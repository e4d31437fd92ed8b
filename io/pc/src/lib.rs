//! The chips of a PC, one file each, named by part number or standard.
//!
//! Each is a [`doppel_device::Chip`] (or, where several vCPUs meet, a state machine with an adapter beside it) and
//! knows nothing of the others: the machine connects them by buses, pins and messages.

mod acpi_pm;
mod apic_bus;
mod apic_timer;
mod calendar;
mod debug_exit;
mod fw_cfg;
mod hpet;
mod i8042;
mod i8254;
mod i8259;
mod io_apic;
mod local_apic;
mod mc146818;
mod message;
mod numeric_error;
mod pc_testdev;
mod pci_host;
mod port92;
mod reset_control;
#[cfg(test)]
mod torture;
mod uart16550;
mod vector_set;

pub use acpi_pm::{AcpiPm, AcpiPmConfig, PM_TIMER_HZ};
pub use apic_bus::{ApicBus, CpuApic, Kick};
pub use debug_exit::DebugExit;
pub use fw_cfg::FwCfg;
pub use hpet::{HPET_ID, HPET_LEGACY, HPET_LEN, HPET_REPLACES, HPET_ROUTES, Hpet};
pub use i8042::I8042;
pub use i8254::{I8254, PIT_HZ};
pub use i8259::I8259;
pub use io_apic::{IO_APIC_BASE, IO_APIC_PINS, IoApic};
pub use local_apic::{
    Acknowledged, Effect, LOCAL_APIC_BASE, LocalApic, LocalApicConfig, Requests, Start,
};
pub use mc146818::{Mc146818, RTC_CENTURY};
pub use message::{DeliveryMode, Destination, InterruptMessage};
pub use numeric_error::NumericError;
pub use pc_testdev::{
    LINES as TEST_LINES, MEMORY as TEST_MEMORY_LEN, TestLines, TestMemory, TestPorts,
};
pub use pci_host::{Ecam, HostBridge, PciBus, PciConfigPorts, PciSlotTaken};
pub use port92::Port92;
pub use uart16550::Uart16550;
