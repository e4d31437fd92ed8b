//! CPU virtualization: the x86-64 architecture.
//!
//! State, faults, system instructions and the reference interpreter, the oracle that every other engine is
//! compared with. Reading order: [`Cpu`], [`Bus`] and [`Engine`] (the contracts), `mmu`, `exception` and `event`, `system` (the
//! system instructions and what they need), `cpuid` and `msr`, `interpret`.

mod address_space;
mod arch_host;
mod breakpoint;
mod bus;
mod control;
mod cpu_model;
mod cpuid;
mod engine;
pub mod event;
pub mod exception;
mod fault;
mod flags;
mod instruction_set;
pub mod interpret;
mod iret;
mod kvm;
mod mmu;
mod monitor_wait;
mod msr;
mod mtrr;
pub mod patch;
mod peers;
mod pmu;
mod port;
#[cfg(test)]
mod program_tests;
mod rights;
mod segment;
mod stack;
mod state;
mod steal_time;
mod syscall;
mod system;
mod table;
mod task;
#[cfg(test)]
mod testing;
mod transfer;
mod tsc;
mod user_code;
mod vendor;

pub use address_space::{AddressSpaces, MOST_KEPT};
pub use arch_host::{tsc as host_tsc, xcr0 as host_xcr0};
pub use bus::{Bus, EmptyBus, Start};
pub use cpu_model::{CpuChoice, CpuFeatures, CpuModel, CpuModelError};
pub use cpuid::{APIC_BUS_HZ, CpuidLeaf, CpuidModel, XCR0_MASK, XCR0_PKRU};
pub use engine::{Engine, EngineStats, Exit, Kick, Outcome};
pub use fault::{Exception, Vector};
pub use instruction_set::{HiddenInstructions, may_be_offered};
pub use kvm::write_clock_stopped;
pub use pmu::Pmu;
pub use segment::flat_attributes;
pub use state::{
    Activity, Counters, Cpu, CpuMode, Cr0, Cr4, Dtr, Efer, Flushed, FpuArea, Gpr, Msrs, Rflags,
    Seg, Segment,
};
pub use tsc::{TscFrequency, TscMeasurement};
pub use user_code::{GivenUp, Left, UserCode};
pub use vendor::Vendor;
