//! What the translator knows of address spaces that are not current.
//!
//! Problem: where user code lies, which jumps lead where and which exits lead to another page is right for one address space only. Without it,
//! each branch of a process that runs again asks the monitor.
//! Idea: when the guest changes its address space and says that translations stay ([`doppel_x86::AddressSpaces`]), these are put
//! away, and come back with it.
//! Invariant: what stands under an id was right when that id was the current one, and the CPU makes it current again only where nothing
//! of it was flushed since. Blocks that were thrown away meanwhile are left out when it comes back.
//! Cost: a change of the address space takes the time of writing down, at most [`MOST_JUMPS`] jumps and [`MOST_LINKS`] links.

use doppel_x86::MOST_KEPT;

use crate::blocks::{BlockId, Link, NARROW_USER};
use crate::code_pages::UserPages;
use crate::frontend::Simd;
use crate::jump_cache::JumpCache;
use crate::narrow::Mode;
use crate::translator::Translator;

const MOST_JUMPS: usize = 512;
const MOST_LINKS: usize = 256;

/// Those that are not current, the one left last at the end.
#[derive(Default)]
pub(crate) struct Spaces {
    /// The id of the one that is.
    pub current: u64,
    away: Vec<Away>,
    /// One that is done with, for its buffers.
    spare: Away,
}

#[derive(Default)]
struct Away {
    id: u64,
    simd: Simd,
    /// Of the jumps outside of 64-bit mode.
    mode: Mode,
    pages: UserPages,
    jumps: Vec<(u64, BlockId)>,
    narrow_jumps: Vec<(u64, BlockId)>,
    links: Vec<Link>,
}

impl Spaces {
    /// All blocks are gone.
    pub fn clear(&mut self) {
        self.away.clear();
    }

    fn take(&mut self, id: u64) -> Option<Away> {
        let at = self.away.iter().position(|away| away.id == id)?;
        Some(self.away.remove(at))
    }

    fn put(&mut self, away: Away) {
        if self.away.len() == MOST_KEPT {
            self.away.remove(0);
        }
        self.away.push(away);
    }
}

impl Translator {
    /// Follows the CPU to another address space.
    pub fn switch_space(&mut self) {
        let id = self.context.cpu.spaces.id();
        if id == self.spaces.current {
            return;
        }
        let mut there = self.spaces.take(id).unwrap_or_default();
        let mut leaving = std::mem::take(&mut self.spaces.spare);
        (leaving.id, leaving.simd) = (self.spaces.current, self.simd);
        leaving.mode = self.user_mode;
        let pages = std::mem::take(&mut there.pages);
        let (pages, lost_kernel) = self.code_pages.switch(pages);
        leaving.pages = pages;
        if lost_kernel {
            self.lost_kernel_code();
        }
        self.context.code_map.forget_pages();
        self.context.jump_cache[0].take(&mut leaving.jumps, MOST_JUMPS);
        let narrow = &mut self.context.jump_cache[usize::from(NARROW_USER)];
        narrow.take(&mut leaving.narrow_jumps, MOST_JUMPS);
        self.hold();
        let code = &mut *self.code;
        (code.blocks).take_cross_page(&mut leaving.links, MOST_LINKS, &mut code.cache);
        (self.slot_links).take(&mut leaving.links, MOST_LINKS, &code.blocks);
        self.spaces.put(leaving);
        self.come_back_to(&mut there);
        self.spaces.spare = there;
    }

    fn come_back_to(&mut self, there: &mut Away) {
        for (exit, to) in there.links.drain(..) {
            let blocks = &self.code.blocks;
            if blocks.is_alive(blocks.exit(exit).block) && blocks.is_alive(to) {
                self.connect((exit, to), true);
            }
        }
        let same_simd = there.simd == self.simd;
        let same_mode = there.mode == self.user_mode;
        for (jumps, number, may) in [
            (&mut there.jumps, 0, same_simd),
            (
                &mut there.narrow_jumps,
                NARROW_USER.into(),
                same_simd && same_mode,
            ),
        ] {
            let cache: &mut JumpCache = &mut self.context.jump_cache[number];
            for (linear, block) in jumps.drain(..).filter(|_| may) {
                if let Some(host) = self.code.blocks.entry_of_alive(block) {
                    cache.insert(linear, host, block);
                }
            }
        }
    }
}
