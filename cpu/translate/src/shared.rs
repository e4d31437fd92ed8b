//! The translations that the vCPUs of one machine share.
//!
//! Problem: what one vCPU has translated, the others translate again, since each has translations of its own; with sixteen of them that is
//! three quarters of all code.
//! Idea: one [`Code`] for all. A vCPU takes it to translate, to look up what its own jump caches do not know, to link, and to throw away; and
//! puts it back before it runs guest code, interprets, or waits for anybody. What is right for one vCPU alone (TLBs, jump caches, slots, what
//! is known of address spaces) it keeps for itself, and translated code reaches that through the GS base.
//! Invariants:
//! * links that are in the code lead from a block to one of the same page, so that they are right whoever runs them; others are in slots;
//! * a block can be found only once its bytes are protected and were looked at again;
//! * a vCPU follows what was thrown away ([`crate::blocks::Blocks::removed`]) whenever it takes the code, and it answers a request only after that;
//! * memory is used again only when all is thrown away, which happens while every other vCPU is outside (`Peer::alone`) and none of them has
//!   left translated code for a while only (`busy`); they see another `generation` afterwards.
//!
//! Cost: two uncontended locks for a way through the monitor. A vCPU that shares with nobody has the code always, and no lock.

use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use doppel_memory::PAGE_SIZE;

use crate::asm::Asm;
use crate::blocks::Blocks;
use crate::cache_unsafe::CodeCache;
use crate::engine::{TranslateError, TranslateOptions};
use crate::enter_unsafe::host_features;
use crate::thunk::{self, How, Thunks};
use crate::translator::CACHE_MARGIN;

/// Translated code and what is known of it.
pub(crate) struct Code {
    pub cache: CodeCache,
    pub blocks: Blocks,
    pub thunks: Thunks,
    /// vCPUs that wait for others and go back into translated code then.
    pub busy: usize,
}

impl Code {
    /// Bytes of the cache that these options ask for.
    pub fn size(options: &TranslateOptions) -> usize {
        let size = options.cache_size.clamp(4 * CACHE_MARGIN, 1 << 30);
        size.next_multiple_of(PAGE_SIZE as usize)
    }

    fn new(
        options: &TranslateOptions,
        blocks: impl FnOnce(Range<u64>) -> io::Result<Blocks>,
    ) -> Result<Self, TranslateError> {
        let size = Code::size(options);
        let mut cache = CodeCache::new(size, options.perf_map, options.huge_code)
            .map_err(|e| TranslateError::Cache(size, e))?;
        let mut asm = Asm::default();
        let how = How::new(options, host_features().1);
        let thunks = thunk::assemble(&mut asm, cache.cursor(), how);
        cache.append(&asm.bytes);
        cache.pin();
        Ok(Code {
            blocks: blocks(cache.range()).map_err(|e| TranslateError::Cache(size, e))?,
            cache,
            thunks,
            busy: 0,
        })
    }

    /// Bytes that are left for code and what has to be known of it.
    pub fn room(&self) -> usize {
        let known = self.blocks.bytes() + self.slot_bytes() + self.cache.form_bytes();
        let taken = self.cache.used() + known;
        (self.cache.room()).min(self.cache.len().saturating_sub(taken))
    }

    /// What the host's memory holds of that beside the mappings of the code, which the forms lie behind.
    pub fn memory(&self) -> usize {
        self.blocks.memory() + self.slot_bytes()
    }

    fn slot_bytes(&self) -> usize {
        self.blocks.cpus() * 8 * self.cache.slots_used()
    }
}

/// Translations that engines share; those of the first that joins. All run CPUs of one RAM with the same options.
#[derive(Clone, Default)]
pub struct SharedCode(Arc<Shelf>);

/// Where the code is while nobody has it.
#[derive(Default)]
struct Shelf {
    place: Mutex<Place>,
    put_back: Condvar,
}

#[derive(Default)]
struct Place {
    code: Option<Box<Code>>,
    /// It was made.
    made: bool,
    waiting: usize,
}

impl Shelf {
    fn lock(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nobody has the code.
    fn take(&self) -> Box<Code> {
        let mut place = self.lock();
        loop {
            if let Some(code) = place.code.take() {
                return code;
            }
            place.waiting += 1;
            place = (self.put_back.wait(place)).unwrap_or_else(PoisonError::into_inner);
            place.waiting -= 1;
        }
    }

    fn put(&self, code: Box<Code>) {
        let mut place = self.lock();
        place.code = Some(code);
        let anybody = place.waiting > 0;
        drop(place);
        if anybody {
            self.put_back.notify_one();
        }
    }
}

/// The code, as one vCPU has it: always, or from [`Self::take`] to [`Self::put_back`].
pub(crate) struct Held {
    code: Option<Box<Code>>,
    shelf: Option<Arc<Shelf>>,
    /// It was the first, who tells of all.
    pub first: bool,
}

impl Held {
    /// Code of its own.
    pub fn own(
        options: &TranslateOptions,
        blocks: impl FnOnce(Range<u64>) -> io::Result<Blocks>,
    ) -> Result<Self, TranslateError> {
        Ok(Held {
            code: Some(Box::new(Code::new(options, blocks)?)),
            shelf: None,
            first: true,
        })
    }

    /// That of others, made by the first. It is taken.
    pub fn shared(
        with: &SharedCode,
        options: &TranslateOptions,
        blocks: impl FnOnce(Range<u64>) -> io::Result<Blocks>,
    ) -> Result<Self, TranslateError> {
        let mut place = with.0.lock();
        let first = !place.made;
        let code = match first {
            true => {
                let code = Box::new(Code::new(options, blocks)?);
                place.made = true;
                drop(place);
                code
            }
            false => {
                drop(place);
                with.0.take()
            }
        };
        Ok(Held {
            code: Some(code),
            shelf: Some(with.0.clone()),
            first,
        })
    }

    pub fn is_shared(&self) -> bool {
        self.shelf.is_some()
    }

    /// Takes the code; true where it had been put back.
    #[inline]
    pub fn take(&mut self) -> bool {
        if self.code.is_some() {
            return false;
        }
        self.code = self.shelf.as_ref().map(|shelf| shelf.take());
        true
    }

    /// Lets others have it.
    #[inline]
    pub fn put_back(&mut self) {
        if let Some(shelf) = &self.shelf
            && let Some(code) = self.code.take()
        {
            shelf.put(code);
        }
    }

    /// Looks at it, whether it is taken or not.
    pub fn look<R>(&self, f: impl FnOnce(&Code) -> R) -> Option<R> {
        if let Some(code) = &self.code {
            return Some(f(code));
        }
        let shelf = self.shelf.as_ref()?;
        let code = shelf.take();
        let result = f(&code);
        shelf.put(code);
        Some(result)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.put_back();
    }
}

impl Deref for Held {
    type Target = Code;

    #[inline]
    fn deref(&self) -> &Code {
        self.code.as_ref().expect("the code was taken")
    }
}

impl DerefMut for Held {
    #[inline]
    fn deref_mut(&mut self) -> &mut Code {
        self.code.as_mut().expect("the code was taken")
    }
}
