//! The translated blocks: where they are, how they are found, linked and thrown away.
//!
//! Blocks are keyed by the guest *physical* address of their code, so that a page of a shared library is translated once
//! for all processes that map it. A direct branch within a page is linked for good. A link across pages assumes that the other page
//! is still mapped where it was: kernel blocks ([`Base::Fixed`]) are linked across pages too, and every such link is listed, to be cut when a
//! code page's mapping changes; user code, whose mappings change with every process, goes across pages through slots (see
//! `cache_unsafe`), which are quick to set back.
//! Invariant: no linked jump and no jump cache entry leads to a block that was thrown away.

use rustc_hash::FxHashMap;

use doppel_memory::{CodeGranules, PAGE_MASK, PAGE_SIZE, PageTracker};

use crate::cache_unsafe::CodeCache;
use crate::flags::FlagPlace;
use crate::frontend::Simd;
use crate::rewrite::{AccessSite, Base, Boundary, ExitSite, FirstSites, Translated};

/// Index of a block, valid until the cache is emptied.
pub(crate) type BlockId = u32;

/// What a block is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    pub privilege: u8,
    pub simd: Simd,
    pub base: Base,
    pub form: Form,
}

/// What the block is a translation of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// The instructions from its address on.
    Normal,
    /// The one instruction there, whose memory operand lies in two pages and is at `bounce` for now (see `access`).
    TwoPages,
    /// The instructions from its address on, each access with a check of its own (see `rewrite::share`).
    Careful,
}

/// One translated block.
#[derive(Debug)]
pub(crate) struct Block {
    pub key: Key,
    /// Guest physical page of the second part of an instruction that straddles two pages.
    pub second_page: Option<u64>,
    /// Host addresses.
    pub host: u64,
    pub len: u32,
    pub entry_registers: u64,
    pub entry_saved: u64,
    /// Entry for blocks that have the vector state loaded, with the flags saved.
    entry_simd: u64,
    /// Uses the vector state, so that it is loaded at every exit that can be linked.
    pub simd: bool,
    /// Bytes of guest code.
    pub guest_len: u16,
    boundaries: Vec<Boundary>,
    /// Exits of other blocks that were linked to this one.
    incoming: Vec<u32>,
    pub alive: bool,
}

/// An exit as the tables keep it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exit {
    pub block: BlockId,
    pub site: ExitSite,
}

/// A TLB check as the tables keep it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub block: BlockId,
    pub site: AccessSite,
}

/// A block that was just translated.
pub(crate) struct Made {
    pub second_page: Option<u64>,
    pub guest_len: u16,
    /// Host address and length of its code.
    pub host: u64,
    pub len: u32,
    pub code: Translated,
}

/// All blocks and the tables beside them.
#[derive(Default)]
pub(crate) struct Blocks {
    blocks: Vec<Block>,
    exits: Vec<Exit>,
    accesses: Vec<Access>,
    /// By the number of an access: where its form for two pages begins, or 0.
    forms: Vec<u64>,
    by_key: FxHashMap<Key, BlockId>,
    by_page: FxHashMap<u64, Vec<BlockId>>,
    /// Linked exits that lead to another page, of kernel and of user code.
    cross_page: [Vec<u32>; 2],
    pub links: u64,
    pub invalidated: u64,
}

impl Blocks {
    pub fn first_sites(&self) -> FirstSites {
        FirstSites {
            exit: self.exits.len() as u32,
            access: self.accesses.len() as u32,
        }
    }

    pub fn get(&self, id: BlockId) -> &Block {
        &self.blocks[id as usize]
    }

    pub fn exit(&self, n: u32) -> Exit {
        self.exits[n as usize]
    }

    pub fn access(&self, n: u32) -> Access {
        self.accesses[n as usize]
    }

    /// Notes where an access goes on that crosses pages; returns the address of the whole table, which `forms` must be told.
    pub fn set_form(&mut self, access: u32, at: u64) -> u64 {
        self.forms[access as usize] = at;
        self.forms.as_ptr() as u64
    }

    /// Address of the table of forms.
    pub fn forms(&self) -> u64 {
        self.forms.as_ptr() as u64
    }

    pub fn find(&self, key: &Key) -> Option<BlockId> {
        self.by_key.get(key).copied()
    }

    /// Enters a block whose code stands at `host`.
    pub fn insert(
        &mut self,
        key: Key,
        made: Made,
        tracker: &PageTracker,
        cache: &mut CodeCache,
    ) -> BlockId {
        let Made {
            second_page,
            guest_len,
            host,
            len,
            code: t,
        } = made;
        let id = self.blocks.len() as BlockId;
        let first = self.exits.len();
        self.exits
            .extend(t.exits.into_iter().map(|site| Exit { block: id, site }));
        self.accesses.extend(
            t.accesses
                .into_iter()
                .map(|site| Access { block: id, site }),
        );
        self.forms.resize(self.accesses.len(), 0);
        self.blocks.push(Block {
            key,
            second_page,
            host,
            len,
            entry_registers: host + u64::from(t.entry_registers),
            entry_saved: host + u64::from(t.entry_saved),
            entry_simd: host + u64::from(t.entry_simd),
            simd: t.simd,
            guest_len,
            boundaries: t.boundaries,
            incoming: Vec::new(),
            alive: true,
        });
        let block = &self.blocks[id as usize];
        for n in first..self.exits.len() {
            let site = &self.exits[n].site;
            if let Some(slot) = site.slot {
                cache.set_slot(slot, block.host + u64::from(site.stub));
            }
        }
        self.by_key.insert(key, id);
        for (gpa, len) in self.blocks[id as usize].guest_ranges() {
            tracker.add_code(gpa, len);
            self.by_page.entry(gpa & !PAGE_MASK).or_default().push(id);
        }
        id
    }

    /// Links an exit to a block, so that the monitor is not asked again.
    pub fn link(&mut self, exit: u32, to: BlockId, across_pages: bool, cache: &mut CodeCache) {
        let e = self.exits[exit as usize];
        let simd = self.blocks[e.block as usize].simd;
        let target = &mut self.blocks[to as usize];
        let entry = target.entry(e.site.flags, simd);
        target.incoming.push(exit);
        self.lead(exit, entry, cache);
        self.links += 1;
        if across_pages {
            let user = usize::from(self.blocks[e.block as usize].key.base == Base::Dynamic);
            self.cross_page[user].push(exit);
        }
    }

    /// Lets an exit lead to a host address.
    fn lead(&self, exit: u32, to: u64, cache: &mut CodeCache) {
        let e = self.exits[exit as usize];
        match (e.site.slot, e.site.patch) {
            (Some(slot), _) => cache.set_slot(slot, to),
            (None, Some(at)) => {
                let host = self.blocks[e.block as usize].host;
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
            (None, None) => {}
        }
    }

    fn unlink(&mut self, exit: u32, cache: &mut CodeCache) {
        let e = self.exits[exit as usize];
        let from = &self.blocks[e.block as usize];
        self.lead(exit, from.host + u64::from(e.site.stub), cache);
    }

    /// Cuts every link of user or of kernel code that leads to another page.
    pub fn unlink_cross_page(&mut self, user: bool, cache: &mut CodeCache) {
        for exit in std::mem::take(&mut self.cross_page[usize::from(user)]) {
            self.unlink(exit, cache);
        }
    }

    /// Throws away the blocks that were made from any of `len` bytes at `gpa`; returns which they were.
    pub fn invalidate(
        &mut self,
        gpa: u64,
        len: u64,
        cache: &mut CodeCache,
        tracker: &PageTracker,
    ) -> Vec<BlockId> {
        let page = gpa & !PAGE_MASK;
        let Some(ids) = self.by_page.get(&page) else {
            return Vec::new();
        };
        let hit: Vec<_> = ids
            .iter()
            .copied()
            .filter(|id| {
                self.blocks[*id as usize]
                    .guest_ranges()
                    .any(|(at, n)| at < gpa.saturating_add(len) && gpa < at + n)
            })
            .collect();
        for id in &hit {
            self.remove(*id, cache);
        }
        tracker.set_code(page, self.granules(page));
        hit
    }

    fn remove(&mut self, id: BlockId, cache: &mut CodeCache) {
        self.invalidated += 1;
        let block = &mut self.blocks[id as usize];
        block.alive = false;
        let key = block.key;
        if key.form == Form::TwoPages {
            self.forms.fill(0);
        }
        let incoming = std::mem::take(&mut block.incoming);
        let pages: Vec<_> = block
            .guest_ranges()
            .map(|(gpa, _)| gpa & !PAGE_MASK)
            .collect();
        for exit in incoming {
            self.unlink(exit, cache);
        }
        if self.by_key.get(&key) == Some(&id) {
            self.by_key.remove(&key);
        }
        for page in pages {
            if let Some(ids) = self.by_page.get_mut(&page) {
                ids.retain(|other| *other != id);
            }
        }
    }

    fn granules(&self, page: u64) -> CodeGranules {
        let ids = self.by_page.get(&page).map_or(&[][..], Vec::as_slice);
        ids.iter()
            .flat_map(|id| self.blocks[*id as usize].guest_ranges())
            .filter(|(gpa, _)| gpa & !PAGE_MASK == page)
            .fold(0, |g, (gpa, len)| g | PageTracker::granules(gpa, len))
    }

    /// Throws everything away (the cache is full).
    pub fn clear(&mut self, tracker: &PageTracker) {
        for page in self.by_page.keys() {
            tracker.set_code(*page, 0);
        }
        *self = Blocks {
            links: self.links,
            invalidated: self.invalidated,
            ..Blocks::default()
        };
    }

    /// The block that a host address lies in, and the guest instruction there.
    pub fn at_host(&self, pc: u64) -> Option<(BlockId, Boundary)> {
        let after = self.blocks.partition_point(|b| b.host <= pc);
        let id = after.checked_sub(1)?;
        let block = &self.blocks[id];
        let offset = u32::try_from(pc - block.host)
            .ok()
            .filter(|o| *o < block.len)?;
        let n = block.boundaries.partition_point(|b| b.host <= offset);
        Some((id as BlockId, *block.boundaries.get(n.checked_sub(1)?)?))
    }

    /// The exits of a block, in the order of its translation.
    pub fn exits_of(&self, id: BlockId) -> &[Exit] {
        let from = self.exits.partition_point(|e| e.block < id);
        let to = self.exits.partition_point(|e| e.block <= id);
        &self.exits[from..to]
    }

    /// Host bytes that hold metadata, roughly.
    pub fn metadata_bytes(&self) -> u64 {
        let boundaries: usize = self.blocks.iter().map(|b| b.boundaries.capacity()).sum();
        (self.blocks.capacity() * size_of::<Block>()
            + self.exits.capacity() * size_of::<Exit>()
            + self.accesses.capacity() * size_of::<Access>()
            + boundaries * size_of::<Boundary>()) as u64
    }
}

impl Block {
    /// Host addresses of its code.
    pub fn host_range(&self) -> std::ops::Range<u64> {
        self.host..self.host + u64::from(self.len)
    }

    /// Where code enters that has its flags there, and the vector state loaded or perhaps not.
    pub fn entry(&self, flags: FlagPlace, simd: bool) -> u64 {
        let flags_fit = flags == FlagPlace::Saved || self.entry_registers == self.entry_saved;
        match flags {
            _ if simd && flags_fit => self.entry_simd,
            FlagPlace::Registers => self.entry_registers,
            FlagPlace::Saved => self.entry_saved,
        }
    }

    /// The guest physical bytes it was made from: `(address, length)`, one range a page.
    fn guest_ranges(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let room = PAGE_SIZE - (self.key.gpa & PAGE_MASK);
        let len = u64::from(self.guest_len);
        let second = self
            .second_page
            .filter(|_| len > room)
            .map(|page| (page, len - room));
        [Some((self.key.gpa, len.min(room))), second]
            .into_iter()
            .flatten()
    }
}
