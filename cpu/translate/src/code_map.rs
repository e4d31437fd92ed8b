//! The code map: where the look-up thunk finds user code that the jump cache does not know.
//!
//! Problem: the jump cache is keyed by linear addresses, so it is empty for each new address space, though the programs that begin there
//! (a shell script's commands, say) share their code with those before them, and that is translated.
//! Idea: the thunk does what the monitor would. A small table takes the linear page to the physical page, as the guest's page tables said
//! when the monitor last asked; a larger one takes the physical address to the translation. Both keep the latest of what shares
//! a slot; what they do not know the monitor is asked.
//! Invariants: a page stands in the first only while it stands in [`crate::code_pages`] for the current address space; a block in the second is
//! alive, of 64-bit user code, in one page, and begins at that address. The tag of a physical address holds the [`Simd`] that
//! the block is for.
//! Cost: 22 instructions where the jump cache misses; two stores where the monitor was asked.

use std::mem::offset_of;

use doppel_memory::Privilege;

use crate::blocks::{Form, Key};
use crate::frontend::Simd;
use crate::narrow::Mode;

/// Entries of the table of pages, a power of two.
const PAGES: usize = 256;
/// log2 of the entries of the table of blocks.
const BLOCKS_BITS: u32 = 14;
const BLOCKS: usize = 1 << BLOCKS_BITS;
/// The linear address shifted right by so much and masked with [`PAGE_INDEX_MASK`] and scaled by 8 is the place of its page.
pub(crate) const PAGE_SHIFT: u8 = 11;
pub(crate) const PAGE_INDEX_MASK: i32 = 2 * (PAGES as i32 - 1);
/// The number of a block's entry is the top bits of the 32-bit product of its tag and this.
pub(crate) const FACTOR: i32 = 0x61c8_8647;
pub(crate) const SHIFT: u8 = (32 - BLOCKS_BITS) as u8;
/// Of the direct branches to another page that are not linked, one in so many is linked when it is taken.
pub(crate) const CROSSINGS_A_LINK: u32 = 32;
/// No page begins there.
const NO_PAGE: u64 = 1;
/// In every tag, so that zero is none.
const TAG: u64 = 1 << 63;
const SIMD_SHIFT: u32 = 56;

/// The layout is relied on by generated code.
#[repr(C)]
pub(crate) struct CodeMap {
    pages: [Page; PAGES],
    /// Of the first bytes of blocks.
    tags: [u64; BLOCKS],
    /// Where callers enter them that saved their flags: bytes from the beginning of the code cache.
    offsets: [u32; BLOCKS],
    /// Host address of the code cache.
    base: u64,
}

/// A linear page, and the tag of its first byte.
#[repr(C)]
#[derive(Clone, Copy)]
struct Page {
    linear: u64,
    tag: u64,
}

/// Displacements in [`CodeMap`] of the tables.
pub(crate) const PAGES_AT: usize = offset_of!(CodeMap, pages);
pub(crate) const TAGS_AT: usize = offset_of!(CodeMap, tags);
pub(crate) const OFFSETS_AT: usize = offset_of!(CodeMap, offsets);

const _: () = assert!(size_of::<Page>() == 16);

fn tag(gpa: u64, simd: Simd) -> u64 {
    TAG | (simd as u64) << SIMD_SHIFT | gpa
}

fn page_slot(linear: u64) -> usize {
    (linear >> 12) as usize % PAGES
}

fn block_slot(tag: u64) -> usize {
    ((tag as u32).wrapping_mul(FACTOR as u32) >> SHIFT) as usize
}

impl CodeMap {
    /// Makes a zeroed map an empty one.
    pub fn initialize(&mut self) {
        self.forget_pages();
    }

    /// Tells an empty map where the code cache begins, which is smaller than 4 GiB.
    pub fn set_base(&mut self, base: u64) {
        self.base = base;
    }

    /// The monitor looked a page of user code up.
    pub fn note_page(&mut self, linear: u64, gpa: u64, simd: Simd) {
        self.pages[page_slot(linear)] = Page {
            linear,
            tag: tag(gpa, simd),
        };
    }

    /// The monitor found the block of a key, all of it in one page.
    pub fn note_block(&mut self, key: &Key, host: u64) {
        if let Some(tag) = CodeMap::tag_of(key) {
            let slot = block_slot(tag);
            self.tags[slot] = tag;
            self.offsets[slot] = (host - self.base) as u32;
        }
    }

    /// The tag of a block that may stand here.
    fn tag_of(key: &Key) -> Option<u64> {
        let user = key.privilege == Privilege::User as u8 && key.mode == Mode::LONG;
        (user && key.form == Form::Normal).then(|| tag(key.gpa, key.simd))
    }

    /// The block of a key was thrown away.
    pub fn forget_block(&mut self, key: &Key) {
        let Some(tag) = CodeMap::tag_of(key) else {
            return;
        };
        let known = &mut self.tags[block_slot(tag)];
        if *known == tag {
            *known = 0;
        }
    }

    /// The address space is another, or its code pages are.
    pub fn forget_pages(&mut self) {
        self.pages.fill(Page {
            linear: NO_PAGE,
            tag: 0,
        });
    }

    /// All blocks are gone.
    pub fn clear(&mut self) {
        self.forget_pages();
        self.tags.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rewrite::Base;
    use doppel_memory::PAGE_MASK;

    impl CodeMap {
        /// What the thunk finds.
        fn find(&self, linear: u64) -> Option<u64> {
            let page = self.pages[page_slot(linear)];
            let tag = page.tag + (linear & PAGE_MASK);
            let slot = block_slot(tag);
            let known = page.linear == linear & !PAGE_MASK && self.tags[slot] == tag;
            known.then(|| self.base + u64::from(self.offsets[slot]))
        }
    }

    /// Where the code cache lies.
    const BASE: u64 = 0x7f00_0000_0000;

    fn key(gpa: u64) -> Key {
        Key {
            gpa,
            privilege: Privilege::User as u8,
            simd: Simd::Avx,
            base: Base::Dynamic,
            form: Form::Normal,
            mode: Mode::LONG,
        }
    }

    fn empty() -> Box<CodeMap> {
        let mut map = Box::new(CodeMap {
            pages: [Page { linear: 0, tag: 0 }; PAGES],
            tags: [0; BLOCKS],
            offsets: [0; BLOCKS],
            base: 0,
        });
        map.initialize();
        map.set_base(BASE);
        map
    }

    #[test]
    fn a_block_is_found_wherever_its_page_is_mapped() {
        let mut map = empty();
        assert_eq!(map.find(0), None);
        map.note_block(&key(0x5123), BASE + 77);
        assert_eq!(map.find(0x40_0123), None);
        for linear in [0, 0x40_0000, 0x7fff_1234_5000] {
            map.note_page(linear, 0x5000, Simd::Avx);
            assert_eq!(map.find(linear + 0x123), Some(BASE + 77));
            assert_eq!(map.find(linear + 0x124), None);
            map.note_page(linear, 0x5000, Simd::Avx512);
            assert_eq!(map.find(linear + 0x123), None);
            map.note_page(linear, 0x5000, Simd::Avx);
        }
        map.forget_pages();
        assert_eq!(map.find(0x40_0123), None);
        map.note_page(0x40_0000, 0x5000, Simd::Avx);
        map.forget_block(&key(0x5123));
        assert_eq!(map.find(0x40_0123), None);
    }

    #[test]
    fn what_is_not_plain_user_code_is_not_noted() {
        let mut map = empty();
        map.note_page(0x1000, 0x5000, Simd::Avx);
        let mut others = [key(0x5010); 3];
        others[0].privilege = Privilege::Supervisor as u8;
        others[1].form = Form::Careful;
        others[2].mode = Mode::FLAT;
        for other in &others {
            map.note_block(other, BASE + 77);
            assert_eq!(map.find(0x1010), None);
            map.note_block(&key(0x5010), BASE + 78);
            map.forget_block(other);
            assert_eq!(map.find(0x1010), Some(BASE + 78));
            map.forget_block(&key(0x5010));
        }
    }
}
