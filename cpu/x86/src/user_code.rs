//! The seam between an engine and somebody who executes the guest's user code by other means (docs/direct.md).
//!
//! The engine executes everything, until [`UserCode::interrupted`] says that an address space is to be left to the other. From then on
//! it asks [`UserCode::takes`] whenever it comes by at CPL 3, and calls [`UserCode::run`], which comes back where
//! the engine has to go on: for one instruction, or for what else it has to do. What the other remembers of memory (mappings, code) it
//! is told of: flushes and writes by calls, lost write permission through [`GivenUp`].

use std::sync::Arc;

use crate::{Cpu, EngineStats, Exception, Flushed, Kick};

/// Why user code is the engine's again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The instruction at RIP has to be interpreted: it traps, or is none that the processor may execute by itself.
    Interpret,
    /// This exception is to be delivered, as a trap.
    Raise(Exception),
    /// The engine was called, or the CPU has requests to follow.
    Called,
    /// The page (guest physical) holds code of some CPU and is to be written: that code is to be thrown away, here and by all others.
    Writes(u64),
    /// The engine is to execute what is at RIP, and to come by again when it leaves the page.
    Declined,
}

/// Executes user code where an engine leaves it to it.
pub trait UserCode: Send {
    /// The engine was called out of code of this CPU's address space, the kernel's or the user's. `entries` counts how often user code was entered so far.
    /// True where the address space is left to the other from now on: the engine forgets what would lead it past [`Self::takes`].
    fn interrupted(&mut self, cpu: &Cpu, entries: u64) -> bool;

    /// The engine has come to user code of this page (guest physical) that it has no translation of. True as for [`Self::interrupted`]: it is not translated.
    fn untranslated(&mut self, _cpu: &Cpu, _page: u64, _entries: u64) -> bool {
        false
    }

    /// Whether [`Self::run`] is to run this CPU's user code.
    fn takes(&mut self, cpu: &Cpu) -> bool;

    /// Runs it, until `called` is true (whoever makes it true calls [`Self::kicker`] afterwards) or there is another reason. `entries` is as for [`Self::interrupted`].
    fn run(&mut self, cpu: &mut Cpu, called: &dyn Fn() -> bool, entries: u64) -> Left;

    /// Follows a flush of the CPU's TLBs, or a change of the address space.
    fn flushed(&mut self, cpu: &Cpu, flushed: &Flushed);

    /// Some of this page (guest physical) was written, or is about to be: what is executed of it has to be looked at anew.
    fn written(&mut self, cpu: &Cpu, page: u64);

    /// The engine has executed a CPUID of user code, the instruction at this linear address.
    fn asked_cpuid(&mut self, _cpu: &Cpu, _rip: u64) {}

    /// Makes a run come back, from any thread.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// What was counted.
    fn stats(&self) -> EngineStats;
}

/// Permissions to write that the CPU's TLBs lost, for who keeps mappings beside them.
#[derive(Clone, Debug, Default)]
pub struct GivenUp {
    /// Somebody does. Nothing is noted otherwise.
    pub wanted: bool,
    /// For these guest physical pages.
    pub pages: Vec<u64>,
    /// For all.
    pub all: bool,
}

impl GivenUp {
    /// Pages listed one by one.
    const MOST_PAGES: usize = 256;

    pub(crate) fn page(&mut self, gpa: u64) {
        if !self.wanted || self.all {
            return;
        }
        if self.pages.len() < Self::MOST_PAGES {
            self.pages.push(gpa);
        } else {
            self.all();
        }
    }

    pub(crate) fn all(&mut self) {
        self.all = self.wanted;
        self.pages.clear();
    }

    /// True where there is nothing to follow.
    pub fn is_empty(&self) -> bool {
        !self.all && self.pages.is_empty()
    }

    /// Takes what is to be followed.
    pub fn take(&mut self) -> Self {
        std::mem::replace(
            self,
            GivenUp {
                wanted: self.wanted,
                ..GivenUp::default()
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_list_becomes_all() {
        let mut g = GivenUp::default();
        g.page(0x1000);
        g.all();
        assert!(g.is_empty(), "nobody wants to know");
        g.wanted = true;
        for page in 0..GivenUp::MOST_PAGES as u64 {
            g.page(page << 12);
        }
        assert!(!g.all && g.pages.len() == GivenUp::MOST_PAGES);
        g.page(0);
        assert!(g.take().all);
        assert!(g.is_empty() && g.wanted);
    }
}
