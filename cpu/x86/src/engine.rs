//! The contract of every engine: run until there is a reason to come back.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::{Bus, Cpu};

/// Why an engine came back to the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// [`Kick::kick`] was called (perhaps before this run began). Run again when nothing else is to be done.
    Kicked,
    /// The CPU executed HLT and no interrupt is pending that would wake it. The machine waits until one may be,
    /// then runs again; `run` leaves the halt by itself when it delivers an interrupt or NMI.
    Halted,
    /// Triple fault: the CPU is in shutdown and can only be reset.
    Shutdown,
}

/// What one step of guest execution led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Go on.
    Continue,
    /// HLT was executed ([`crate::Activity::Halted`]).
    Halted,
    /// Triple fault ([`crate::Activity::Shutdown`]).
    Shutdown,
}

/// Calls a running engine back, from any thread; also async-signal-safe.
pub trait Kick: Send + Sync {
    /// Makes the engine's current or next `run` return [`Exit::Kicked`] within microseconds.
    fn kick(&self);
}

/// An engine executes one vCPU. It owns the [`Cpu`]; the machine reaches in between two runs.
///
/// `run` first delivers what is pending on the [`Bus`] and deliverable (NMI, interrupt) and looks again after each
/// instruction that may make an interrupt deliverable and after each kick; the machine kicks when a line rises.
pub trait Engine: Send {
    /// Runs the guest.
    fn run(&mut self, bus: &mut dyn Bus) -> Exit;
    /// The CPU's state, exact between two runs.
    fn cpu(&self) -> &Cpu;
    /// The CPU's state, to set it up or restore it.
    fn cpu_mut(&mut self) -> &mut Cpu;
    /// A handle that calls this engine back.
    fn kicker(&self) -> Arc<dyn Kick>;
    /// What was counted so far, for `--stats`: flat names in snake case.
    fn stats(&self) -> EngineStats;
    /// The last instructions executed, oldest first, as text, where the engine can tell.
    fn trace(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Counters by name; `BTreeMap` so that the order in files is stable.
pub type EngineStats = BTreeMap<&'static str, u64>;
