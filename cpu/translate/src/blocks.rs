//! The translated blocks: where they are, how they are found, linked and thrown away.
//!
//! Blocks are keyed by the guest *physical* address of their code, so that a page of a shared library is translated once
//! for all processes that map it. A direct branch within a page is linked for good. A link across pages assumes that the other page
//! is still mapped where it was: kernel blocks ([`Base::Fixed`]) are linked across pages too, and every such link is listed, to be cut when a
//! code page's mapping changes; user code, whose mappings change with every process, goes across pages through slots (see
//! `context`), which are quick to set back and each CPU's own (`slot_links`). So does all code that several CPUs run.
//! The tables keep all of this packed (see `records`); what is given out is unpacked.
//! Invariant: no linked jump and no jump cache entry leads to a block that was thrown away.

mod links;

use std::hash::BuildHasher;
use std::io;
use std::iter;
use std::ops::Range;
use std::sync::Arc;

use hashbrown::HashTable;
use rustc_hash::{FxBuildHasher, FxHashMap};

use doppel_memory::{CodeGranules, PAGE_MASK, PAGE_SIZE, PageTracker, Peer, Privilege};

use crate::cache_unsafe::CodeCache;
use crate::context_unsafe::Slots;
use crate::flags::FlagPlace;
use crate::frontend::Simd;
use crate::narrow::Mode;
use crate::recipes::{Lost, Recipes};
use crate::records::{
    AccessRecord, BlockRecord, BoundaryRecord, BranchRecord, ExitRecord, NONE, PackedKey,
};
use crate::rewrite::{AccessSite, Base, Boundary, ExitSite, FirstSites, Translated};
use crate::table_unsafe::Table;
use crate::translator::CACHE_MARGIN;

/// Index of a block, valid until the cache is emptied.
pub(crate) type BlockId = u32;

/// An exit, and the block that it leads to.
pub(crate) type Link = (u32, BlockId);

/// What a block is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    pub privilege: u8,
    pub simd: Simd,
    pub base: Base,
    pub form: Form,
    pub mode: Mode,
}

/// Number of the jump cache for code that runs like this: user code of 64-bit mode has another than that of other modes, so that
/// each stays where they take turns.
pub(crate) fn jump_cache_of(privilege: u8, mode: Mode) -> u8 {
    match privilege == Privilege::User as u8 && mode.is_narrow() {
        true => NARROW_USER,
        false => privilege,
    }
}

/// The jump cache of user code that is not of 64-bit mode.
pub(crate) const NARROW_USER: u8 = 3;

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

/// One translated block, as it is given out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub key: Key,
    /// Guest physical page of the second part of an instruction that straddles two pages.
    pub second_page: Option<u64>,
    /// Host address of its code, and the code's length.
    pub host: u64,
    pub len: u32,
    entry_registers: u64,
    pub entry_saved: u64,
    /// Entry for blocks that have the vector state loaded, with the flags saved.
    entry_simd: u64,
    /// Uses the vector state, so that it is loaded at every exit that can be linked.
    pub simd: bool,
    /// Bytes of guest code.
    guest_len: u16,
    pub alive: bool,
}

/// An exit, as it is given out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Exit {
    pub block: BlockId,
    pub site: ExitSite,
}

/// A TLB check, as it is given out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub block: BlockId,
    pub site: AccessSite,
}

/// An instruction of a block, as it is given out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub block: BlockId,
    pub boundary: Boundary,
    pub lost: Lost,
}

/// A block that was just translated.
pub(crate) struct Made<'a> {
    pub second_page: Option<u64>,
    pub guest_len: u16,
    /// Host address and length of its code.
    pub host: u64,
    pub len: u32,
    pub code: &'a Translated,
}

/// All blocks and the tables beside them.
pub(crate) struct Blocks {
    /// Host address of the cache.
    cache: u64,
    /// Whose they are.
    peer: Arc<Peer>,
    blocks: Table<BlockRecord>,
    boundaries: Table<BoundaryRecord>,
    exits: Table<ExitRecord>,
    accesses: Table<AccessRecord>,
    branches: Table<BranchRecord>,
    recipes: Recipes,
    by_key: HashTable<BlockId>,
    /// First of the list of the blocks that begin in a page.
    by_page: FxHashMap<u64, BlockId>,
    /// The second pages of blocks that have one, and which blocks these are.
    second_pages: FxHashMap<BlockId, u64>,
    by_second_page: FxHashMap<u64, Vec<BlockId>>,
    /// Links that lead to another page, of kernel and of user code.
    cross_page: [Vec<Link>; 2],
    /// The slots of all CPUs that run them.
    slots: Vec<Slots>,
    /// Those that were thrown away, in this order.
    pub removed: Vec<BlockId>,
    /// How often all were.
    pub generation: u64,
    pub links: u64,
    pub invalidated: u64,
}

fn hash(key: PackedKey) -> u64 {
    FxBuildHasher.hash_one(key)
}

impl Blocks {
    /// No blocks yet of a CPU, for a cache at these host addresses. What is known of them takes no more than the cache is large.
    pub fn new(cache: Range<u64>, peer: Arc<Peer>) -> io::Result<Self> {
        let most = (cache.end - cache.start) as usize + CACHE_MARGIN;
        Ok(Blocks {
            cache: cache.start,
            peer,
            blocks: Table::new(most)?,
            boundaries: Table::new(most)?,
            exits: Table::new(most)?,
            accesses: Table::new(most)?,
            branches: Table::new(most)?,
            recipes: Recipes::new(most)?,
            by_key: HashTable::new(),
            by_page: FxHashMap::default(),
            second_pages: FxHashMap::default(),
            by_second_page: FxHashMap::default(),
            cross_page: [Vec::new(), Vec::new()],
            slots: Vec::new(),
            removed: Vec::new(),
            generation: 0,
            links: 0,
            invalidated: 0,
        })
    }

    /// Whose record of translated bytes they stand in.
    pub fn peer(&self) -> &Arc<Peer> {
        &self.peer
    }

    /// A CPU more runs them.
    pub fn add_slots(&mut self, slots: Slots) {
        for exit in 0..self.exits.len() as u32 {
            if let Some(slot) = self.exit(exit).site.slot {
                slots.set(slot, self.stub(exit));
            }
        }
        self.slots.push(slots);
    }

    /// How many CPUs run them.
    pub fn cpus(&self) -> usize {
        self.slots.len()
    }

    /// Several CPUs run them.
    fn are_shared(&self) -> bool {
        self.slots.len() > 1
    }

    /// Where an exit leaves that is not linked.
    pub fn stub(&self, exit: u32) -> u64 {
        let e = self.exit(exit);
        self.host(e.block) + u64::from(e.site.stub)
    }

    pub fn first_sites(&self) -> FirstSites {
        FirstSites {
            exit: self.exits.len() as u32,
            access: self.accesses.len() as u32,
            branch: self.branches.len() as u32,
        }
    }

    fn record(&self, id: BlockId) -> &BlockRecord {
        &self.blocks[id as usize]
    }

    /// Host address of its code.
    pub fn host(&self, id: BlockId) -> u64 {
        self.cache + u64::from(self.record(id).host)
    }

    pub fn get(&self, id: BlockId) -> Block {
        let (r, host) = (self.record(id), self.host(id));
        Block {
            key: r.key.unpack(),
            second_page: self.second_page(id),
            host,
            len: u32::from(r.last) + 1,
            entry_registers: host + u64::from(r.entry_registers),
            entry_saved: host + u64::from(r.entry_saved),
            entry_simd: host + u64::from(r.entry_simd),
            simd: r.simd,
            guest_len: r.guest_len,
            alive: r.alive,
        }
    }

    /// What `rip` is relative to in a block.
    pub fn base(&self, id: BlockId) -> Base {
        self.record(id).key.base()
    }

    pub fn mode(&self, id: BlockId) -> Mode {
        self.record(id).key.mode()
    }

    pub fn privilege(&self, id: BlockId) -> u8 {
        self.record(id).key.privilege()
    }

    /// Where a caller enters that saved its flags.
    pub fn entry_saved(&self, id: BlockId) -> u64 {
        self.host(id) + u64::from(self.record(id).entry_saved)
    }

    pub fn second_page(&self, id: BlockId) -> Option<u64> {
        let straddles = self.record(id).straddles;
        straddles
            .then(|| self.second_pages.get(&id).copied())
            .flatten()
    }

    pub fn exit(&self, n: u32) -> Exit {
        let e = &self.exits[n as usize];
        Exit {
            block: e.block,
            site: e.site(),
        }
    }

    pub fn access(&self, n: u32) -> Access {
        let a = &self.accesses[n as usize];
        Access {
            block: a.block,
            site: a.site(),
        }
    }

    pub fn branch(&self, n: u32) -> BranchRecord {
        self.branches[n as usize]
    }

    pub fn recipes(&self) -> &Recipes {
        &self.recipes
    }

    pub fn find(&self, key: &Key) -> Option<BlockId> {
        self.find_packed(PackedKey::new(key))
    }

    fn find_packed(&self, key: PackedKey) -> Option<BlockId> {
        let same = |id: &BlockId| self.record(*id).key == key;
        self.by_key.find(hash(key), same).copied()
    }

    /// Enters a block whose code stands at `host`. It is found only once it is [published](Self::publish).
    pub fn insert(&mut self, key: Key, made: Made, tracker: &PageTracker) -> BlockId {
        let (id, t) = (self.blocks.len() as BlockId, made.code);
        let position = |p: u32| u16::try_from(p).expect("a position lies within a block");
        self.blocks.push(BlockRecord {
            key: PackedKey::new(&key),
            host: (made.host - self.cache) as u32,
            first_boundary: self.boundaries.len() as u32,
            incoming: NONE,
            next_in_page: NONE,
            entry_registers: position(t.entry_registers),
            entry_saved: position(t.entry_saved),
            entry_simd: position(t.entry_simd),
            last: position(made.len - 1),
            guest_len: made.guest_len,
            simd: t.simd,
            alive: true,
            straddles: made.second_page.is_some(),
        });
        self.insert_sites(id, made.host, t);
        self.insert_pages(id, made.second_page);
        for (gpa, len) in guest_ranges(key.gpa, made.guest_len, made.second_page) {
            tracker.add_code(gpa, len, &self.peer);
        }
        id
    }

    fn insert_sites(&mut self, id: BlockId, host: u64, t: &Translated) {
        let first = (self.boundaries.len() as u32, self.exits.len() as u32);
        self.recipes.add(t, first.0, first.1);
        let boundaries = t.boundaries.iter().map(BoundaryRecord::new);
        self.boundaries.extend(boundaries);
        let exits = t.exits.iter().map(|site| ExitRecord::new(id, site));
        self.exits.extend(exits);
        let accesses = t.accesses.iter().map(|site| AccessRecord::new(id, site));
        self.accesses.extend(accesses);
        let branches = t.branches.iter().map(|site| BranchRecord::new(id, site));
        self.branches.extend(branches);
        for site in &t.exits {
            if let Some(slot) = site.slot {
                let stub = host + u64::from(site.stub);
                self.slots.iter().for_each(|slots| slots.set(slot, stub));
            }
        }
    }

    pub fn is_alive(&self, id: BlockId) -> bool {
        self.record(id).alive
    }

    /// Lets its key find the block from now on.
    pub fn publish(&mut self, id: BlockId) {
        let key = self.record(id).key;
        let Blocks { blocks, by_key, .. } = self;
        let key_of = |id: &BlockId| blocks[*id as usize].key;
        match by_key.find_mut(hash(key), |other| key_of(other) == key) {
            Some(place) => *place = id,
            None => {
                by_key.insert_unique(hash(key), id, |other| hash(key_of(other)));
            }
        }
    }

    fn insert_pages(&mut self, id: BlockId, second: Option<u64>) {
        let page = self.record(id).key.gpa() & !PAGE_MASK;
        let next = self.by_page.insert(page, id);
        self.blocks[id as usize].next_in_page = next.unwrap_or(NONE);
        if let Some(second) = second {
            self.second_pages.insert(id, second);
            self.by_second_page.entry(second).or_default().push(id);
        }
    }

    /// Where a block that is still there is entered by callers that saved their flags.
    pub fn entry_of_alive(&self, id: BlockId) -> Option<u64> {
        self.record(id).alive.then(|| self.entry_saved(id))
    }

    /// The blocks that were made from bytes of a page and not thrown away.
    fn in_page(&self, page: u64) -> impl Iterator<Item = BlockId> {
        let link = |id: BlockId| (id != NONE).then_some(id);
        let first = self.by_page.get(&page).copied();
        let begin = std::iter::successors(first, move |id| link(self.record(*id).next_in_page));
        let second = self.by_second_page.get(&page);
        begin.chain(second.into_iter().flatten().copied())
    }

    /// Throws away the blocks that were made from any of `len` bytes at `gpa`.
    pub fn invalidate(&mut self, gpa: u64, len: u64, cache: &mut CodeCache, tracker: &PageTracker) {
        let page = gpa & !PAGE_MASK;
        let written = |id: &BlockId| {
            let mut ranges = self.get(*id).guest_ranges();
            ranges.any(|(at, n)| at < gpa.saturating_add(len) && gpa < at + n)
        };
        let hit: Vec<_> = self.in_page(page).filter(written).collect();
        for id in &hit {
            self.remove(*id, cache);
        }
        tracker.set_code(page, self.granules(page), &self.peer);
    }

    /// Throws away a block that nobody has found yet.
    pub fn discard(&mut self, id: BlockId, cache: &mut CodeCache, tracker: &PageTracker) {
        let pages = [Some(self.record(id).key.gpa()), self.second_page(id)];
        self.remove(id, cache);
        for page in pages.into_iter().flatten().map(|gpa| gpa & !PAGE_MASK) {
            tracker.set_code(page, self.granules(page), &self.peer);
        }
    }

    fn remove(&mut self, id: BlockId, cache: &mut CodeCache) {
        // One whose two pages are the same physical page is found twice.
        if !self.record(id).alive {
            return;
        }
        self.invalidated += 1;
        self.removed.push(id);
        self.blocks[id as usize].alive = false;
        if self.record(id).key.form() == Form::TwoPages {
            cache.clear_forms();
        }
        let mut gated = Vec::new();
        while self.record(id).incoming != NONE {
            let exit = self.record(id).incoming;
            if self.are_shared() && self.exit(exit).site.gate.is_some() {
                // Another CPU may be between the gate and the jump.
                self.leave_list(exit);
                gated.push(self.exit(exit).block);
            } else {
                self.unlink(exit, cache);
            }
        }
        self.remove_key(id);
        self.remove_pages(id);
        for block in gated {
            self.remove(block, cache);
        }
    }

    fn remove_key(&mut self, id: BlockId) {
        let hash = hash(self.record(id).key);
        if let Ok(entry) = self.by_key.find_entry(hash, |other| *other == id) {
            entry.remove();
        }
    }

    fn remove_pages(&mut self, id: BlockId) {
        let page = self.record(id).key.gpa() & !PAGE_MASK;
        let next = self.record(id).next_in_page;
        let before = self
            .in_page(page)
            .find(|b| self.record(*b).next_in_page == id);
        match before {
            Some(before) => self.blocks[before as usize].next_in_page = next,
            None if next == NONE => {
                self.by_page.remove(&page);
            }
            None => {
                self.by_page.insert(page, next);
            }
        }
        if let Some(second) = self.second_pages.remove(&id)
            && let Some(ids) = self.by_second_page.get_mut(&second)
        {
            ids.retain(|other| *other != id);
        }
    }

    fn granules(&self, page: u64) -> CodeGranules {
        self.in_page(page)
            .flat_map(|id| self.get(id).guest_ranges())
            .filter(|(gpa, _)| gpa & !PAGE_MASK == page)
            .fold(0, |g, (gpa, len)| g | PageTracker::granules(gpa, len))
    }

    /// Throws everything away (the cache is full).
    pub fn clear(&mut self, tracker: &PageTracker) {
        for page in self.by_page.keys().chain(self.by_second_page.keys()) {
            tracker.set_code(*page, 0, &self.peer);
        }
        self.blocks.clear();
        self.boundaries.clear();
        self.exits.clear();
        self.accesses.clear();
        self.branches.clear();
        self.recipes.clear();
        self.by_key = HashTable::new();
        self.by_page = FxHashMap::default();
        self.second_pages = FxHashMap::default();
        self.by_second_page = FxHashMap::default();
        self.cross_page = [Vec::new(), Vec::new()];
        self.removed = Vec::new();
        self.slots.iter().for_each(Slots::give_back);
        self.generation += 1;
    }

    /// The block that a host address lies in, and the guest instruction there.
    pub fn at_host(&self, pc: u64) -> Option<Place> {
        let pc = u32::try_from(pc.checked_sub(self.cache)?).ok()?;
        let all = 0..self.blocks.len();
        let after = self.blocks.partition_point(all, |b| b.host <= pc);
        let id = after.checked_sub(1)?;
        let block = &self.blocks[id];
        let offset = (pc - block.host <= block.last.into()).then(|| pc - block.host)?;
        self.place(id as BlockId, offset)
    }

    /// The guest instruction at a position in a block's code.
    fn place(&self, id: BlockId, position: u32) -> Option<Place> {
        let first = self.record(id).first_boundary as usize;
        let end = self.blocks.get(id as usize + 1);
        let end = end.map_or(self.boundaries.len(), |b| b.first_boundary as usize);
        let before = |b: &BoundaryRecord| b.host() <= position;
        let until = self.boundaries.partition_point(first..end, before);
        let n = until.checked_sub(1).filter(|n| *n >= first)?;
        Some(Place {
            block: id,
            boundary: self.boundaries[n].unpack(),
            lost: self.recipes.at_boundary(n as u32),
        })
    }

    /// What is lost at an access: the same as at the boundary before it.
    pub fn lost_at(&self, access: &Access) -> Lost {
        self.place(access.block, access.site.retry)?.lost
    }

    /// The exits of a block, in the order of its translation.
    pub fn exits_of(&self, id: BlockId) -> impl Iterator<Item = Exit> {
        let len = self.exits.len();
        let from = self.exits.partition_point(0..len, |e| e.block < id);
        let to = self.exits.partition_point(from..len, |e| e.block <= id);
        (from as u32..to as u32).map(|n| self.exit(n))
    }

    /// Bytes of what is known of them.
    pub fn bytes(&self) -> usize {
        self.blocks.bytes()
            + self.boundaries.bytes()
            + self.exits.bytes()
            + self.accesses.bytes()
            + self.branches.bytes()
            + self.recipes.bytes()
            + self.heap_bytes()
    }

    /// What that takes of the host's memory.
    pub fn memory(&self) -> usize {
        let tables = self.blocks.memory()
            + self.boundaries.memory()
            + self.exits.memory()
            + self.accesses.memory()
            + self.branches.memory()
            + self.recipes.memory();
        tables + self.heap_bytes()
    }

    fn heap_bytes(&self) -> usize {
        let by_second_page = self.by_second_page.capacity() * size_of::<(u64, Vec<BlockId>)>();
        let links = self.cross_page.iter().map(Vec::capacity).sum::<usize>();
        self.by_key.allocation_size()
            + self.by_page.capacity() * size_of::<(u64, BlockId)>()
            + self.second_pages.capacity() * size_of::<(BlockId, u64)>()
            + by_second_page
            + links * size_of::<Link>()
            + self.removed.capacity() * size_of::<BlockId>()
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

    fn guest_ranges(&self) -> impl Iterator<Item = (u64, u64)> + use<> {
        guest_ranges(self.key.gpa, self.guest_len, self.second_page)
    }
}

/// The guest physical bytes that a block was made from: `(address, length)`, one range a page.
fn guest_ranges(
    gpa: u64,
    len: u16,
    second_page: Option<u64>,
) -> impl Iterator<Item = (u64, u64)> + use<> {
    let room = PAGE_SIZE - (gpa & PAGE_MASK);
    let len = u64::from(len);
    let second = second_page.filter(|_| len > room);
    let second = second.map(|page| (page, len - room));
    iter::once((gpa, len.min(room))).chain(second)
}

#[cfg(test)]
#[path = "blocks_tests.rs"]
mod tests;
