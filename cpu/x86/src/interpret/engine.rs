//! The interpreter as an engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use doppel_memory::InGuest;
use iced_x86::{Formatter, IntelFormatter};

use super::{execute_one, run_quick};
use crate::{Activity, Bus, Cpu, Engine, EngineStats, Exit, Kick, Outcome, event};

/// Runs a CPU by interpretation alone.
pub struct Interpret {
    cpu: Box<Cpu>,
    kick: Arc<KickFlag>,
    quick: bool,
}

#[derive(Default)]
struct KickFlag(AtomicBool);

impl Kick for KickFlag {
    fn kick(&self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Interpret {
    /// An engine for this CPU.
    pub fn new(mut cpu: Box<Cpu>) -> Self {
        cpu.code.expect_all();
        let kick = Arc::<KickFlag>::default();
        let nudged = kick.clone();
        cpu.peer.set_nudge(move || nudged.kick());
        Interpret {
            cpu,
            kick,
            quick: true,
        }
    }

    /// Whether common instructions of 64-bit code run in predecoded blocks (as they do at first), or one by one as all others.
    pub fn set_quick(&mut self, on: bool) {
        self.quick = on;
    }

    /// Does what other CPUs ask for, and tells them of what this one wrote.
    fn follow_peers(&mut self) {
        if !self.cpu.code_writes.is_empty() {
            self.cpu.publish_code_writes();
        }
        if self.cpu.peer.has_requests() {
            let (requests, number) = self.cpu.peer.take_requests();
            self.cpu.give_up_writing(&requests);
            self.cpu.peer.answer(number);
        }
    }

    /// Executes until an interrupt may have become deliverable; `Some` ends the run.
    fn burst(&mut self, bus: &mut dyn Bus) -> Option<Exit> {
        loop {
            if self.kick.0.load(Ordering::Relaxed) {
                self.kick.0.store(false, Ordering::Release);
                return Some(Exit::Kicked);
            }
            if self.quick {
                run_quick(&mut self.cpu, &self.kick.0, u64::MAX);
            }
            match execute_one(&mut self.cpu, bus) {
                (Outcome::Continue, false) => {}
                (Outcome::Continue | Outcome::Halted, _) => return None,
                (Outcome::Shutdown, _) => return Some(Exit::Shutdown),
            }
            self.follow_peers();
        }
    }

    fn run_until_exit(&mut self, bus: &mut dyn Bus) -> Exit {
        loop {
            self.follow_peers();
            if self.kick.0.swap(false, Ordering::Acquire) {
                return Exit::Kicked;
            }
            event::deliver_pending(&mut self.cpu, bus);
            match self.cpu.activity {
                Activity::Active => {}
                Activity::Halted | Activity::Waiting { .. } | Activity::WaitForSipi => {
                    return Exit::Halted;
                }
                Activity::Shutdown => return Exit::Shutdown,
            }
            if let Some(exit) = self.burst(bus) {
                return exit;
            }
        }
    }
}

impl Engine for Interpret {
    fn run(&mut self, bus: &mut dyn Bus) -> Exit {
        let _in_guest = InGuest::new(&self.cpu.peer);
        self.cpu.begin_counting();
        let exit = self.run_until_exit(bus);
        self.cpu.end_counting();
        exit
    }

    fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.kick.clone()
    }

    fn stats(&self) -> EngineStats {
        let c = &self.cpu.counters;
        EngineStats::from([
            ("interpreted_instructions", c.interpreted_instructions),
            ("quick_instructions", c.quick_instructions),
            ("predecoded_blocks", c.predecoded_blocks),
            ("exceptions", c.exceptions.iter().sum()),
            ("page_faults", c.exceptions[14]),
            ("interrupts", c.interrupts),
            ("page_walks", c.page_walks),
            ("tlb_flushes", c.tlb_flushes),
            ("port_accesses", c.port_accesses),
            ("mmio_accesses", c.mmio_accesses),
            ("msr_accesses", c.msr_accesses),
            ("halts", c.halts),
            ("monitor_waits", c.monitor_waits),
            ("counter_interrupts", c.counter_interrupts),
            ("page_crossings", c.page_crossings),
        ])
    }

    fn trace(&self) -> Vec<String> {
        let mut formatter = IntelFormatter::new();
        let history = self.cpu.code.history();
        history
            .iter()
            .map(|i| {
                let mut text = format!("{:#018x}  ", i.ip());
                formatter.format(i, &mut text);
                text
            })
            .collect()
    }
}
