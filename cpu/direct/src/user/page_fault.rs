//! Page faults of a child: the shadow lacks what the guest's page tables have, or the guest has to see to the access.

use doppel_memory::{
    AccessKind, Leaf, PAGE_MASK, PAGE_SIZE, Privilege, REGION_PAGES, Survey, walk,
};
use doppel_x86::{Cpu, Left, host_tsc};

use super::Direct;
use crate::shadow::Entry;
use crate::unexplained::Remedy;

impl Direct {
    /// The child has no mapping for an access.
    pub(super) fn fault(
        &mut self,
        cpu: &mut Cpu,
        root: u64,
        address: u64,
        error: u32,
    ) -> Option<Left> {
        const WRITE: u32 = 1 << 1;
        const FETCH: u32 = 1 << 4;
        let kind = match (error & FETCH != 0, error & WRITE != 0) {
            (true, _) => AccessKind::Execute,
            (_, true) => AccessKind::Write,
            _ => AccessKind::Read,
        };
        let linear = address & !PAGE_MASK;
        if !self.host.can_map(linear) {
            return Some(Left::Interpret);
        }
        let paging = cpu.paging();
        let Ok(t) = walk(&cpu.ram, &paging, address, kind, Privilege::User) else {
            self.missed = Some((root, linear, kind));
            return Some(Left::Interpret);
        };
        cpu.global_user_pages |= t.global;
        if t.page_shift > 12 {
            self.space(root)?.shadow.note_large(linear);
        }
        if cpu.ram.file_offset(t.gpa).is_none() {
            return Some(Left::Interpret);
        }
        let leaf = Leaf {
            gpa: t.gpa & !PAGE_MASK,
            write: t.rights_write && t.dirty,
            writable: t.rights_write,
            execute: t.rights_execute,
        };
        if kind == AccessKind::Write && cpu.ram.tracker().has_code(leaf.gpa) {
            return Some(match cpu.ram.tracker().is_watched(leaf.gpa) {
                // It becomes no page of data by being written to.
                true => Left::Interpret,
                false => self.write_to_code(leaf.gpa),
            });
        }
        let old = self.space(root)?.shadow.get(linear);
        if old.is_patched() && old.gpa() == leaf.gpa && kind == AccessKind::Read {
            self.read_patched(leaf.gpa);
            // Code that reads its own page would come by for ever.
            if cpu.rip & !PAGE_MASK == linear {
                return Some(Left::Interpret);
            }
        }
        let entry = self.entry_at(cpu, root, linear, &leaf, kind);
        let sensitive = entry.is_sensitive() && kind == AccessKind::Execute;
        if old != entry || !old.is_mapped() {
            self.space(root)?.unexplained.forget(linear);
            self.map(cpu, root, linear, entry);
            self.map_neighbours(cpu, root, linear, &paging);
        } else if !sensitive {
            return self.unexplained(cpu, root, linear, entry);
        }
        sensitive.then(|| self.sensitive(root))
    }

    /// The page is mapped as it should be, as far as anybody knows.
    fn unexplained(&mut self, cpu: &Cpu, root: u64, linear: u64, entry: Entry) -> Option<Left> {
        self.counts.unexplained += 1;
        let times = self.times;
        let space = self.space(root)?;
        match space.unexplained.again(linear) {
            Remedy::Interpret => Some(Left::Interpret),
            Remedy::MapAfresh => {
                space.shadow.unmap(linear, &mut space.changes);
                self.map(cpu, root, linear, entry);
                None
            }
            Remedy::Translate => {
                space.account.give_up(&times, host_tsc());
                Some(Left::Declined)
            }
        }
    }

    /// Maps the page of an access that the guest's kernel has seen to, since it is about to be made again.
    pub(super) fn map_missed(&mut self, cpu: &mut Cpu, here: u64) {
        let Some((root, linear, kind)) = self.missed.take() else {
            return;
        };
        let serves = |entry: Entry| match kind {
            AccessKind::Write => entry.may_write(),
            _ => entry.is_mapped(),
        };
        let mapped = self
            .space(root)
            .is_none_or(|s| serves(s.shadow.get(linear)));
        if root != here || mapped {
            return;
        }
        let ram = cpu.ram.clone();
        let survey = Survey::of(&ram, &cpu.paging(), linear);
        let leaf = survey.page((linear / PAGE_SIZE) as usize % REGION_PAGES);
        if let Some(leaf) = leaf.filter(|l| ram.is_ram(l.gpa)) {
            if survey.is_large()
                && let Some(space) = self.space(root)
            {
                space.shadow.note_large(linear);
            }
            let entry = self.entry_at(cpu, root, linear, &leaf, kind);
            self.map(cpu, root, linear, entry);
        }
    }

    /// User code reads a page of which it executes a copy: the page itself is mapped until it executes it again. One for which that goes on and on is not executed any more.
    fn read_patched(&mut self, gpa: u64) {
        self.counts.patched_reads += 1;
        *self.turns.entry(gpa).or_default() += 1;
        if self.has_turned_often(gpa) {
            self.give_up_patched(gpa);
        }
    }

    /// User code writes to a page that holds code, its own or some that was translated: the page changes its role, unless it does so
    /// again and again.
    fn write_to_code(&mut self, gpa: u64) -> Left {
        *self.turns.entry(gpa).or_default() += 1;
        match self.has_turned_often(gpa) {
            true => Left::Interpret,
            false => Left::Writes(gpa),
        }
    }
}
