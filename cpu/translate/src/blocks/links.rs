//! Links: exits that lead to another block and not to the monitor.
//!
//! The exits that lead to a block are a list through their records, so that a block can be thrown away with all ways to it.

use doppel_memory::Privilege;

use super::{BlockId, Blocks, Link};
use crate::cache_unsafe::CodeCache;
use crate::records::{Before, NONE};

impl Blocks {
    /// Where an exit leads that is linked to a block.
    pub fn entry_for(&self, exit: u32, to: BlockId) -> u64 {
        let e = self.exit(exit);
        let simd = self.record(e.block).simd;
        self.get(to).entry(e.site.flags, simd)
    }

    /// Links an exit without a slot to a block, so that the monitor is not asked again.
    pub fn link(&mut self, exit: u32, to: BlockId, across_pages: bool, cache: &mut CodeCache) {
        let e = self.exit(exit);
        let entry = self.entry_for(exit, to);
        self.leave_list(exit);
        self.enter_list(exit, to);
        self.lead(exit, entry, cache);
        self.links += 1;
        if across_pages {
            let user = usize::from(self.privilege(e.block) == Privilege::User as u8);
            self.cross_page[user].push((exit, to));
        }
    }

    /// Hangs the exit into the list of those that lead to a block.
    fn enter_list(&mut self, exit: u32, to: BlockId) {
        let first = std::mem::replace(&mut self.blocks[to as usize].incoming, exit);
        if first != NONE {
            self.exits[first as usize].set_before(Before::Exit(exit));
        }
        let e = &mut self.exits[exit as usize];
        e.set_before(Before::Block(to));
        e.next = first;
    }

    pub(super) fn leave_list(&mut self, exit: u32) {
        let e = &mut self.exits[exit as usize];
        let (before, next) = (e.before(), std::mem::replace(&mut e.next, NONE));
        e.set_before(Before::Nothing);
        match before {
            Before::Nothing => return,
            Before::Block(block) => self.blocks[block as usize].incoming = next,
            Before::Exit(other) => self.exits[other as usize].next = next,
        }
        if next != NONE {
            self.exits[next as usize].set_before(before);
        }
    }

    /// Lets an exit lead to a host address.
    fn lead(&self, exit: u32, to: u64, cache: &mut CodeCache) {
        let e = self.exit(exit);
        let Some(at) = e.site.patch else {
            return;
        };
        let host = self.host(e.block);
        cache.patch(host + u64::from(at), to);
        if let Some((gate, open)) = e.site.gate {
            let shut = host + u64::from(e.site.stub);
            let on = if to == shut {
                shut
            } else {
                host + u64::from(open)
            };
            cache.patch(host + u64::from(gate), on);
        }
    }

    pub(super) fn unlink(&mut self, exit: u32, cache: &mut CodeCache) {
        let stub = self.stub(exit);
        self.leave_list(exit);
        self.lead(exit, stub, cache);
    }

    /// Cuts every link of user or of kernel code that leads to another page.
    pub fn unlink_cross_page(&mut self, user: bool, cache: &mut CodeCache) {
        let mut exits = std::mem::take(&mut self.cross_page[usize::from(user)]);
        for (exit, _) in exits.drain(..) {
            self.unlink(exit, cache);
        }
        self.cross_page[usize::from(user)] = exits;
    }

    /// The same for user code; notes the latest `most` of the links in `taken`.
    pub fn take_cross_page(&mut self, taken: &mut Vec<Link>, most: usize, cache: &mut CodeCache) {
        let links = &self.cross_page[1];
        taken.extend_from_slice(&links[links.len().saturating_sub(most)..]);
        self.unlink_cross_page(true, cache);
    }
}
