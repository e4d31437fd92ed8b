//! Memory accesses that the inline check turned away.
//!
//! A miss is filled from the guest's page tables and the check tried again. An access that crosses into another page goes on
//! behind the check: at the host's address where the two pages lie side by side in the host too (they do wherever the guest has
//! them side by side in its physical memory), else, if it only reads, at a copy of its bytes. Everything else (a fault, a device, a
//! page with code) is left to the interpreter.

use doppel_memory::{AccessKind, HostPtr, PAGE_MASK, PAGE_SIZE, Privilege};
use doppel_x86::Cpu;

use crate::rewrite::AccessSite;
use crate::thunk::EXIT_ACCESS;
use crate::translator::{PRIVILEGES, Translator};

impl Translator {
    /// Called by generated code: returns where to go on, or 0 to leave and interpret the instruction.
    pub fn access(&mut self, linear: u64, site: u32) -> u64 {
        self.counts.tlb_misses += 1;
        let access = self.blocks.access(site);
        let block = self.blocks.get(access.block);
        let (privilege, host) = (PRIVILEGES[usize::from(block.key.privilege)], block.host);
        let room = PAGE_SIZE - (linear & PAGE_MASK);
        if u64::from(access.site.size) <= room {
            if self.page(linear, access.site.write, privilege).is_some() {
                return host + u64::from(access.site.retry);
            }
        } else if let Some(at) = self.two_pages(linear, access.site, privilege) {
            self.counts.page_crossings += 1;
            self.context.slow_linear = at;
            return host + u64::from(access.site.done);
        }
        self.context.exit = EXIT_ACCESS;
        self.context.fault_pc = u64::from(site);
        0
    }

    /// Enters the page into the TLB; its host address at `linear`, where translated code may access it.
    fn page(&mut self, linear: u64, write: bool, privilege: Privilege) -> Option<HostPtr> {
        if !Cpu::canonical(linear) {
            return None;
        }
        let cpu = &mut self.context.cpu;
        if let Some(known) = lookup(cpu, linear, write, privilege) {
            return Some(known);
        }
        let kind = if write {
            AccessKind::Write
        } else {
            AccessKind::Read
        };
        cpu.translate(linear, kind, privilege).ok()?;
        lookup(cpu, linear, write, privilege)
    }

    /// A host address that stands for an access to two pages.
    fn two_pages(&mut self, linear: u64, site: AccessSite, privilege: Privilege) -> Option<u64> {
        let first = self.page(linear, site.write, privilege)?;
        let next = (linear | PAGE_MASK).wrapping_add(1);
        let second = self.page(next, site.write, privilege)?;
        if first.addr() + first.room() as u64 == second.addr() {
            return Some(first.addr());
        }
        if site.write {
            return None;
        }
        let at = (linear & 63) as usize;
        let bounce = &mut self.context.bounce.0;
        let (low, high) = bounce[at..at + usize::from(site.size)].split_at_mut(first.room());
        first.read(low);
        second.read(high);
        Some(bounce[at..].as_ptr() as u64)
    }
}

fn lookup(cpu: &Cpu, linear: u64, write: bool, privilege: Privilege) -> Option<HostPtr> {
    let tlb = &cpu.tlb[privilege as usize];
    if write {
        tlb.lookup_write(linear, 1)
    } else {
        tlb.lookup_read(linear, 1)
    }
}
