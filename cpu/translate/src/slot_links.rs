//! Links through slots, which are the CPU's own: those of user code to other pages, and all to other pages where several CPUs share the code.
//!
//! Such a link assumes how the CPU's page tables map the other page. So it is cut when these may have changed, and other CPUs neither see
//! nor need it.
//! Invariant: a slot that does not lead to its exit's stub stands in the list, with the block that it leads to, which is alive as far as
//! the CPU has followed.

use crate::blocks::{BlockId, Blocks, Link};
use crate::context_unsafe::Slots;

/// The slots of a CPU and what leads through them.
pub(crate) struct SlotLinks {
    slots: Slots,
    /// From kernel and from user code.
    links: [Vec<Link>; 2],
}

impl SlotLinks {
    pub fn new(slots: Slots) -> Self {
        SlotLinks {
            slots,
            links: [Vec::new(), Vec::new()],
        }
    }

    /// Where a slot leads.
    pub fn target(&self, slot: u32) -> u64 {
        self.slots.get(slot)
    }

    /// Lets an exit through this slot lead to a block.
    pub fn link(&mut self, slot: u32, (exit, to): Link, user: bool, blocks: &Blocks) {
        self.slots.set(slot, blocks.entry_for(exit, to));
        self.links[usize::from(user)].push((exit, to));
    }

    fn set_back(slots: &Slots, exit: u32, blocks: &Blocks) {
        if let Some(slot) = blocks.exit(exit).site.slot {
            slots.set(slot, blocks.stub(exit));
        }
    }

    /// Cuts every link of user or of kernel code.
    pub fn cut(&mut self, user: bool, blocks: &Blocks) {
        for (exit, _) in self.links[usize::from(user)].drain(..) {
            Self::set_back(&self.slots, exit, blocks);
        }
    }

    /// The same for user code; notes the latest `most` of the links in `taken`.
    pub fn take(&mut self, taken: &mut Vec<Link>, most: usize, blocks: &Blocks) {
        let links = &self.links[1];
        taken.extend_from_slice(&links[links.len().saturating_sub(most)..]);
        self.cut(true, blocks);
    }

    /// Cuts the links to blocks that were thrown away.
    pub fn cut_to(&mut self, removed: &[BlockId], blocks: &Blocks) {
        let SlotLinks { slots, links } = self;
        let gone = |to: BlockId| match removed {
            [one] => *one == to,
            _ => !blocks.is_alive(to),
        };
        for links in links {
            links.retain(|(exit, to)| {
                let gone = gone(*to);
                if gone {
                    Self::set_back(slots, *exit, blocks);
                }
                !gone
            });
        }
    }

    /// All blocks are gone.
    pub fn forget(&mut self) {
        self.links = [Vec::new(), Vec::new()];
    }
}
