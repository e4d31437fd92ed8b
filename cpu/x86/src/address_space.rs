//! What cached translations a CPU forgets, and when: flushes, and changes of the address space with PCIDs (Intel SDM vol. 3A, 4.10).
//!
//! Problem: with CR4.PCIDE a guest loads CR3 with bit 63 set when it comes back to an address space, so that its translations are
//! still there; but translated code looks into one TLB, at one place.
//! Idea: the TLBs hold the current PCID's translations and the global ones. A change of the PCID takes the former out of the slots
//! that were filled, and puts those of the other PCID back, which costs what an address space used and not what the TLBs hold.
//! Invariant: a set that is kept loses whatever the TLBs would: the right to write to pages with translated code, and all of it where
//! everything is flushed. It is dropped where the guest invalidates any of it.
//! A translator keeps what it knows of an address space by [`AddressSpaces::id`], which is another after each flush: what it put
//! away under an id is right whenever that id is the current one again.
//! Cost: the copying, and [`MOST_KEPT`] sets of [`doppel_memory::MOST_TAKEN`] entries of each TLB.

use doppel_memory::{PAGE_MASK, TakenEntries};

use crate::Cpu;

/// Address spaces that are kept beside the current one; Linux uses six PCIDs a CPU.
pub const MOST_KEPT: usize = 8;

/// Which address space is current, and what is kept of others.
#[derive(Debug)]
pub struct AddressSpaces {
    /// Keep anything; off, each load of CR3 forgets what is not global.
    pub keep: bool,
    id: u64,
    last_id: u64,
    /// The one left last is the last.
    kept: Vec<Kept>,
    /// One that is done with, for its buffers.
    spare: Kept,
}

#[derive(Debug, Default)]
struct Kept {
    pcid: u64,
    id: u64,
    /// Of each TLB.
    entries: [TakenEntries; 3],
}

impl Default for AddressSpaces {
    fn default() -> Self {
        AddressSpaces {
            keep: true,
            id: 0,
            last_id: 0,
            kept: Vec::new(),
            spare: Kept::default(),
        }
    }
}

impl AddressSpaces {
    /// Names the current translations that are not global: never the same again once some of them were flushed.
    pub fn id(&self) -> u64 {
        self.id
    }

    fn renew(&mut self) {
        self.last_id += 1;
        self.id = self.last_id;
    }

    fn take(&mut self, pcid: u64) -> Option<Kept> {
        let at = self.kept.iter().position(|kept| kept.pcid == pcid)?;
        Some(self.kept.remove(at))
    }
}

impl Cpu {
    /// Forgets cached translations: all of them and those of all PCIDs, or all of the current PCID but global ones.
    pub fn flush_tlb(&mut self, global_too: bool) {
        self.counters.tlb_flushes += 1;
        self.flushed.non_global = true;
        self.flushed.global |= global_too;
        self.spaces.renew();
        if global_too {
            self.spaces.kept.clear();
            self.large_pages.clear();
            self.global_user_pages = false;
        }
        self.code.flush(global_too);
        for tlb in &mut self.tlb {
            if global_too {
                tlb.flush()
            } else {
                tlb.flush_non_global()
            }
        }
    }

    /// Forgets the cached translation of one page of any size, global or not (INVLPG).
    pub fn flush_tlb_page(&mut self, linear: u64) {
        // What translators keep of the user's pages of a PCID goes as a whole, though INVLPG reaches what is global of all.
        if self.large_pages.may_hold(linear) || self.global_user_pages {
            return self.flush_tlb(true);
        }
        self.spaces.renew();
        self.flushed.page(linear & !PAGE_MASK);
        self.code.flush_page(linear);
        for tlb in &mut self.tlb {
            tlb.flush_page(linear);
        }
    }

    /// Forgets what is kept of a PCID that is not the current one.
    pub(crate) fn flush_kept(&mut self, pcid: u64) {
        self.spaces.take(pcid);
    }

    /// Forgets what is not global, of all PCIDs.
    pub(crate) fn flush_all_non_global(&mut self) {
        self.spaces.kept.clear();
        self.flush_tlb(false);
    }

    /// Empties the TLBs, those that are kept too. Translators need not know.
    pub(crate) fn empty_tlbs(&mut self) {
        self.spaces.kept.clear();
        self.tlb.iter_mut().for_each(|tlb| tlb.flush());
    }

    /// Takes write permission for a physical page from all TLBs.
    pub(crate) fn protect_in_tlbs(&mut self, page: u64) {
        for tlb in &mut self.tlb {
            tlb.protect(page);
        }
        for entries in self.spaces.kept.iter_mut().flat_map(|k| &mut k.entries) {
            entries.protect(page);
        }
    }

    /// Another PCID becomes current; with `resume`, its translations are those of when it was left.
    pub(crate) fn change_pcid(&mut self, from: u64, to: u64, resume: bool) {
        if !self.spaces.keep {
            return self.flush_tlb(false);
        }
        self.code.flush(false);
        self.flushed.switched = true;
        let there = self.spaces.take(to).filter(|_| resume);
        let mut leaving = std::mem::take(&mut self.spaces.spare);
        (leaving.pcid, leaving.id) = (from, self.spaces.id);
        for (tlb, entries) in self.tlb.iter_mut().zip(&mut leaving.entries) {
            tlb.take_non_global(entries);
        }
        if self.spaces.kept.len() == MOST_KEPT {
            self.spaces.kept.remove(0);
        }
        self.spaces.kept.push(leaving);
        let Some(mut there) = there else {
            return self.spaces.renew();
        };
        self.counters.spaces_resumed += 1;
        self.spaces.id = there.id;
        for (tlb, entries) in self.tlb.iter_mut().zip(&mut there.entries) {
            tlb.put_back(entries);
        }
        self.spaces.spare = there;
    }
}
