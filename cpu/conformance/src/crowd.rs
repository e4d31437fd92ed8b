//! Several CPUs on one RAM, each in a thread of its own.
//!
//! All run the kernel's address space of [`Machine`]. A CPU finds its number in RDI and has a stack of its own; interrupts come from other
//! CPUs by way of [`crate::bus::PORT_IPI`]. HLT waits for the next of them; `stop` ends a CPU's thread.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use doppel_x86::{CpuidModel, Exit, Gpr};

use crate::engines::Row;
use crate::layout::*;
use crate::machine::Machine;
use crate::watchdog::Watchdog;

/// The CPUs.
pub struct Crowd {
    /// By their number.
    pub cpus: Vec<Machine>,
}

/// How long a crowd may run: its CPUs wait for each other, perhaps on one processor that others want too.
const LIMIT: Duration = Duration::from_secs(30);

/// Bytes between the stacks.
const STACK: u64 = 0x800;

impl Crowd {
    /// `n` CPUs in kernel mode, which share RAM, page tables and handlers.
    pub fn new(row: &Row, n: u32) -> Self {
        Self::with_model(row, Arc::new(CpuidModel::host(n)))
    }

    /// As many as this processor's machine has.
    fn with_model(row: &Row, model: Arc<CpuidModel>) -> Self {
        let n = model.cpus();
        let mut cpus = vec![Machine::with_model(row, model)];
        for id in 1..n {
            let next = cpus[0].beside(row, id);
            cpus.push(next);
        }
        let ends: Vec<_> = cpus
            .iter()
            .map(|m| (m.bus.lines.clone(), m.kicker()))
            .collect();
        cpus.iter_mut().for_each(|m| m.bus.others = ends.clone());
        let mut crowd = Crowd { cpus };
        crowd.to_kernel();
        crowd
    }

    /// Puts every CPU to kernel mode, on its stack.
    pub fn to_kernel(&mut self) {
        for (id, m) in self.cpus.iter_mut().enumerate() {
            m.to_kernel();
            m.set_reg(Gpr::Rdi, id as u64);
            m.set_reg(Gpr::Rsp, KERNEL_STACK - STACK * (1 + id as u64));
        }
    }

    /// The first, to prepare memory with.
    pub fn first(&self) -> &Machine {
        &self.cpus[0]
    }

    /// Sends every CPU to the address for it, and runs all until they stop.
    pub fn run(&mut self, from: impl Fn(usize) -> u64) {
        thread::scope(|scope| {
            for (id, m) in self.cpus.iter_mut().enumerate() {
                m.go(from(id));
                scope.spawn(move || m.run_in_crowd());
            }
        });
    }
}

impl Machine {
    /// Runs to its stop; a HLT elsewhere waits for an interrupt.
    fn run_in_crowd(&mut self) {
        let watchdog = Watchdog::with_limit(self.kicker(), LIMIT);
        loop {
            let exit = self.run_once_unwatched();
            let rip = self.cpu().rip;
            match exit {
                Exit::Halted if (STOPPED_AT..STOPPED_AT + 0x10).contains(&rip) => return,
                Exit::Halted if self.bus.lines.interrupt_waits() => {}
                Exit::Halted | Exit::Kicked if !watchdog.has_bitten() => thread::yield_now(),
                exit => panic!("CPU {}: {exit:?} at {rip:#x}", self.cpu().id),
            }
        }
    }
}

/// Rows with an engine of each kind; the accelerators that matter between CPUs have one of their own.
const ROWS: [&str; 7] = [
    "interpret",
    "translate",
    "translate, link off",
    "translate, smallest cache, counting",
    "translate, shared cache",
    "translate, shared cache, link off",
    "translate, smallest shared cache, counting",
];

/// Runs a test with `n` CPUs on engines of every kind.
pub fn each_crowd(n: u32, test: impl Fn(&mut Crowd)) {
    for row in crate::ENGINES.iter().filter(|r| ROWS.contains(&r.name)) {
        println!("on {}", row.name);
        test(&mut Crowd::new(row, n));
    }
}

/// Runs a test with CPUs of this processor, on the same engines and on those that leave user code to the host's processor.
pub fn each_crowd_with(model: &Arc<CpuidModel>, test: impl Fn(&mut Crowd)) {
    let wanted = |r: &&Row| ROWS.contains(&r.name) || r.name == "direct";
    for row in crate::ENGINES.iter().filter(wanted) {
        println!("on {}", row.name);
        test(&mut Crowd::with_model(row, model.clone()));
    }
}
