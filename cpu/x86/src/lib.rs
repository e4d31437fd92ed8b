//! CPU virtualization: the x86-64 architecture.
//!
//! State, faults, system instructions and the reference interpreter, the oracle that every other engine is
//! compared with. Reading order: [`Cpu`], [`Bus`] and [`Engine`] (the contracts), `mmu`, `interpret`.

mod bus;
mod engine;
mod fault;
#[allow(dead_code)]
mod interpret;
mod mmu;
mod state;

pub use bus::Bus;
pub use engine::{Engine, EngineStats, Exit, Kick, Outcome};
pub use fault::{Exception, Vector};
pub use state::{
    Activity, Counters, Cpu, CpuMode, Cr0, Cr4, Dtr, Efer, Flushed, FpuArea, Gpr, Msrs, Rflags,
    Seg, Segment,
};
