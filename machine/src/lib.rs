//! One virtual machine: wiring, boot loaders, vCPU threads, lifecycle.
//!
//! ```no_run
//! # fn main() -> Result<(), doppel_machine::MachineError> {
//! use doppel_machine::{Ending, Machine, MachineConfig};
//!
//! let mut config = MachineConfig::new("/boot/vmlinuz");
//! config.cmdline = "console=ttyS0".into();
//! let mut machine = Machine::new(config)?;
//! eprintln!("{}", machine.engine());
//! if let Ending::Died(death) = machine.run()? {
//!     eprintln!("the guest died: {}\n{}", death.cause, death.registers);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Reading order: `machine` (a machine from start to end), `instance` (one boot of it), `pc` (the wiring diagram),
//! `cpu_bus` and `vcpu` (how an engine meets the chips), `boot` and `acpi` (what the guest finds in memory).

mod acpi;
mod attention;
pub mod boot;
mod clock_pages;
mod config;
mod control;
mod cpu_bus;
mod death;
mod doorbell;
mod engine;
#[cfg(feature = "testing")]
pub mod hostile;
mod instance;
mod layout;
mod machine;
mod panic_watch;
mod pc;
mod probe;
mod run_delay;
mod serial;
mod slice_unsafe;
mod smbios;
mod spare;
mod stats;
mod vcpu;
mod virtio;

pub use boot::{BootDisk, BootError, KernelSource, is_multiboot};
pub use config::MachineConfig;
pub use control::StopHandle;
pub use death::{Death, DeathCause};
pub use doppel_block as block;
pub use doppel_bootdisk as bootdisk;
pub use doppel_device::{Backed, CharSink, CharSource, HostClock, InputQueue, OutputQueue};
pub use doppel_direct::DirectOptions;
pub use doppel_footprint::Footprint;
pub use doppel_memory::{Backing, GuestRam, GuestSlice};
pub use doppel_net as net;
pub use doppel_net::NetConfig;
pub use doppel_share as share;
pub use doppel_translate::{Switch, TranslateOptions, explain};
pub use doppel_virtio::{
    BalloonControl, ConsoleBackend, GuestMemoryStats, VSOCK_CID, VsockSocket, WindowSize,
};
pub use doppel_x86::{CpuChoice, CpuFeatures, CpuModel};
pub use engine::{EngineChoice, EngineError, EngineKind, Selection};
pub use machine::{Ending, Machine, MachineError};
pub use serial::{CharLink, SerialBackend};
pub use stats::{
    BalloonStats, ConsoleStats, DiskStats, Exits, NetStats, Seconds, Stats, VsockStats,
};
pub use virtio::{DeviceConfig, VirtioTransport};
