//! Patched pages: code that the processor executes in place of a page in which a sensitive instruction stands.
//!
//! Problem: CPUID and others do not trap in user mode, and a host that is a virtual machine itself cannot make CPUID trap. Programs ask it once, at their start, but the code that asks may lie in one page with code that
//! is hot: GCC's lexer does, and each file that it compiled came by some 50,000 times, a stop each.
//! Idea: what other monitors do to kernels that were not made for them. A copy of the page has something else in its place ([`Patch`]), most often an instruction that
//! traps; then the instruction that the guest has there is interpreted. The guest must not see the copy, so it is mapped to be executed and not read: Linux makes such a mapping of
//! PROT_EXEC alone, by a protection key, where the processor has them. A read faults, and is interpreted with what the guest has there. Until it is executed the page is mapped to be read.
//!
//! Invariants:
//! * what is executed holds no sensitive instruction: the copy is looked through like any page;
//! * a copy is as good as its page: both are given up when the page is written, before that is done;
//! * no mapping is made unless one was seen to be unreadable on this host ([`crate::DirectHost`] tries, once).
//!
//! Cost: a page of host memory for each page patched, 1,024 a machine at most, which all its children map.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use doppel_memory::PAGE_SIZE;
use rustix::fs::ftruncate;

use crate::DirectError;
use crate::exchange::Shared;
use crate::patch::{Counters, Patch};

/// Bytes of all that a machine has.
const SIZE: u64 = 4 << 20;

/// Where they are in the file of guest RAM, which children map anyway: behind the RAM.
pub(crate) fn range(ram_size: u64) -> Range<u64> {
    let start = ram_size.next_multiple_of(SIZE);
    start..start + SIZE
}

/// A page of code.
pub(crate) type Code = [u8; PAGE_SIZE as usize];

/// Room for patched pages.
#[derive(Debug)]
pub(crate) struct PatchedPages {
    memory: Shared,
    range: Range<u64>,
    free: Mutex<Vec<u64>>,
}

/// One of them, as long as it is needed.
#[derive(Debug)]
pub(crate) struct PatchedPage {
    slot: u64,
    pages: Arc<PatchedPages>,
    pub counters: Counters,
}

impl PatchedPages {
    /// In the file of guest RAM, which is made longer.
    pub fn behind(ram: &File, ram_size: u64) -> Result<PatchedPages, DirectError> {
        let range = range(ram_size);
        let file = ram.try_clone().map_err(|e| DirectError::Host("dup", e))?;
        let longer = ftruncate(&file, range.end);
        longer.map_err(|e| DirectError::Host("ftruncate", e.into()))?;
        let memory = Shared::map(&Arc::new(file), range.start / SIZE, SIZE);
        let free = (0..SIZE / PAGE_SIZE).rev().collect();
        Ok(PatchedPages {
            memory: memory.map_err(|e| DirectError::Host("mmap", e))?,
            range,
            free: Mutex::new(free),
        })
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A page with this code, where there is room for one.
    pub fn page(self: &Arc<Self>, patch: Patch) -> Option<PatchedPage> {
        let slot = self.free().pop()?;
        self.memory.write((slot * PAGE_SIZE) as usize, &patch.code);
        Some(PatchedPage {
            slot,
            pages: self.clone(),
            counters: patch.counters,
        })
    }
}

impl PatchedPage {
    /// Where it is in the file.
    pub fn offset(&self) -> u64 {
        self.pages.range.start + self.slot * PAGE_SIZE
    }
}

/// Its room may be another page's before a child has unmapped it: that child makes its changes before it executes anything.
impl Drop for PatchedPage {
    fn drop(&mut self) {
        self.pages.free().push(self.slot);
    }
}
