//! Direct execution: the processor itself runs the guest's user code (docs/direct.md).
//!
//! Problem: translated user code is one and a half to five times slower than the processor could be, and without hardware
//! virtualization or a module in the host's kernel nothing stands between a process and its own page tables.
//! Idea: a *child* process of the host for each guest address space holds nothing but guest pages, mapped where the guest's page tables have
//! them. Its host page tables are the guest's shadow page tables; every system call and every fault stops it.
//!
//! Reading order: `changes` and `shadow` (what is mapped), `policy` (when it pays), `state`, `user` (what happens at each stop), then `child` and
//! what is below it (how a process becomes a sandbox), `hazard` and `hidden` (what must not be executed).

mod arch_stub;
mod change;
mod changes;
mod child;
mod counts;
mod elf;
mod exchange;
mod filter;
mod frame;
mod hazard;
mod hidden;
mod host;
mod kick_unsafe;
mod length;
mod patch;
mod patched;
mod pin;
mod policy;
mod prices;
mod process;
mod shadow;
mod signals;
mod space;
mod spent;
mod state;
mod transfer;
mod unexplained;
mod user;
mod ways;
mod zygote;

pub use change::Change;
pub use child::{Child, Entry, Stop};
pub use host::DirectHost;
pub use kick_unsafe::KickFlag;
pub use prices::Prices;
pub use state::{CODE_32, CODE_64, STACK, UserState};
pub use user::{Direct, DirectOptions, Reminder};
pub use zygote::{CpuidFaults, MOST_CHILDREN, Zygote};

/// Why user code cannot be run in a child.
#[derive(Debug, thiserror::Error)]
pub enum DirectError {
    /// A system call failed.
    #[error(
        "{0} failed on the host, so that no process can be made for user code; use --engine translate: {1}"
    )]
    Host(&'static str, std::io::Error),
    /// The processor or its kernel is too old.
    #[error(
        "user code cannot run directly without FSGSBASE, which needs Linux 5.9 and a processor that has it; use --engine translate"
    )]
    Fsgsbase,
    /// The zygote is dead or does as it likes.
    #[error(
        "the process that makes others for user code died; start the machine again, or use --engine translate"
    )]
    Zygote,
    /// The kernel's signal frames are not known here.
    #[error("this host's signal frames are not as expected; use --engine translate")]
    Frame,
    /// There are [`MOST_CHILDREN`] already.
    #[error("there are too many processes for user code already")]
    TooMany,
    /// A change that must not be made.
    #[error("change {index} is out of bounds: {change:?}")]
    Invalid {
        /// Its place in the list.
        index: usize,
        /// The change.
        change: Change,
    },
    /// The host refused a change.
    #[error("the host refused change {index} of a process's mappings: {source}")]
    Change {
        /// Its place in the list.
        index: usize,
        /// What the host said; ENOMEM at the limit vm.max_map_count.
        source: std::io::Error,
    },
    /// A state that a child cannot run.
    #[error("this state cannot run directly")]
    State,
    /// The host has no memory for the guest's RAM, or it failed.
    #[error(
        "the host has no memory for a page of guest RAM, or the memory failed; give the machine less with --memory"
    )]
    Memory,
    /// Guest RAM is memory of the monitor alone.
    #[error("guest memory cannot be mapped in another process: --memory-backing memfd")]
    NotShared,
    /// The child is dead.
    #[error("the process for user code died")]
    Gone,
}
