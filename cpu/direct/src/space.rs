//! An address space of the guest, as one vCPU executes it directly: its shadow page tables, the child that has them, and the account that says whether it pays.

use doppel_x86::{Cpu, host_tsc};

use crate::Child;
use crate::changes::Changes;
use crate::counts::Counts;
use crate::policy::{Account, Stretch, Times};
use crate::shadow::Shadow;
use crate::spent::Spent;
use crate::unexplained::Unexplained;

/// Linear addresses that user code of a process can have.
pub const END_OF_USER: u64 = 0x7fff_ffff_f000;

/// An address space of the guest.
pub struct Space {
    pub shadow: Shadow,
    pub account: Account,
    pub child: Option<Child>,
    /// What the child has run.
    pub spent: Option<Spent>,
    /// What is to be changed in the child.
    pub changes: Changes,
    pub unexplained: Unexplained,
    /// The [`doppel_x86::AddressSpaces::id`] of the translations that the shadow is a part of.
    pub id: u64,
    /// Host mappings that the child can have, about.
    pub mappings: usize,
    pub used: u64,
    /// Tells programs apart that have had this address space one after the other.
    pub life: u64,
}

impl Space {
    pub fn new(times: &Times, life: u64) -> Self {
        Space {
            shadow: Shadow::default(),
            account: Account::new(times),
            child: None,
            spent: None,
            changes: Changes::default(),
            unexplained: Unexplained::default(),
            id: u64::MAX,
            mappings: 0,
            used: 0,
            life,
        }
    }

    /// Settles the account after a stretch of user code. False where it is translated from now on.
    pub fn stopped(&mut self, times: &Times, stretch: Stretch, hz: u64) -> bool {
        let ticks = match &mut self.spent {
            Some(spent) => spent.of_stretch(stretch.ticks, times.long, hz),
            None => stretch.ticks,
        };
        let ran = Stretch { ticks, ..stretch };
        self.account.stopped(times, ran, host_tsc())
    }

    /// Compares the shadow with the guest's page tables, if they may have changed since. True where they are another program's by now.
    pub fn follow_flushes(&mut self, cpu: &Cpu, counts: &mut Counts) -> bool {
        if std::mem::replace(&mut self.id, cpu.spaces.id()) == cpu.spaces.id() {
            return false;
        }
        counts.revisions += 1;
        let paging = cpu.paging();
        let revision = self.shadow.revise(&cpu.ram, &paging, &mut self.changes);
        revision.is_another_program()
    }

    pub fn give_up_child(&mut self) -> Option<Child> {
        self.empty();
        self.changes.clear();
        self.child.take()
    }

    /// Unmaps everything.
    pub fn empty(&mut self) {
        self.shadow.clear();
        self.changes.clear();
        self.mappings = 0;
        if let Some(child) = &self.child {
            let reserved = child.reserved();
            self.changes.unmap_range(0, reserved.start);
            self.changes
                .unmap_range(reserved.end, END_OF_USER - reserved.end);
        }
    }
}
