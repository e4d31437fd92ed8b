//! I/O virtualization: the two seams of every device.
//!
//! Towards the guest a device is a [`Chip`]: a state machine without locks or threads that is told the time,
//! answers register accesses and says how its output pins stand. [`Wired`] ties a chip to the [`Bus`], to its
//! [`Pin`]s and to the [`Timers`]. Towards the host it speaks to a back-end trait: [`CharSink`] and
//! [`CharSource`] for bytes (block and net back-ends get theirs beside them).
//!
//! Lock order, for the whole of I/O (docs/devices.md says why): device chip, then pin line, then 8259 or I/O APIC,
//! then local APIC, then back-end, timers and CPU kicks. A lock is taken only while locks left of it are held.

mod bus;
mod chardev;
mod chip;
mod clock;
mod gate;
mod msix;
mod pci;
mod pin;
mod power;
mod timers;

pub use bus::{Bus, BusDevice, BusError, BusMaster, Region, all_ones};
pub use chardev::{Backed, CharSink, CharSource, Disconnected, InputQueue, OutputQueue};
pub use chip::{Chip, Outputs, Wired};
pub use clock::{Clock, FakeClock, HostClock, NANOS_PER_SECOND, Nanos, periods, ticks};
pub use gate::Gate;
pub use msix::{MSIX_CAPABILITY, MSIX_ENABLE, MSIX_ENTRY, MSIX_FUNCTION_MASK, MsiMessage, Msix};
pub use pci::{Bar, BarKind, ConfigChange, ConfigSpace, PciFunction, PciIds};
pub use pin::{InterruptInput, Line, MsiTarget, Pin};
pub use power::{PowerControl, PowerRequest};
pub use timers::{Alarm, OnAlarm, Timers};
