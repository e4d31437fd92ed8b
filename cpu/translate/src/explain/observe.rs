//! Where the translator tells of its blocks.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use doppel_memory::{PAGE_MASK, Privilege};

use super::profile::{Counters, Record};
use super::{PerfMap, Profile};
use crate::blocks::{BlockId, Form};
use crate::frontend::{GuestBlock, Processor};
use crate::rewrite::counter::parts;
use crate::rewrite::{Base, ExitSite};
use crate::translator::Translator;

/// Who is told of the blocks that a translator makes; nobody by default.
#[derive(Clone, Debug, Default)]
pub struct Observers {
    /// Counts how often each block runs.
    pub profile: Option<Arc<Profile>>,
    /// Names translated code for perf.
    pub perf_map: Option<Arc<PerfMap>>,
}

impl Observers {
    /// Counters for the parts of a block that is about to be made, if blocks are counted.
    pub(crate) fn counters(&self, guest: &GuestBlock) -> Option<Counters> {
        let profile = self.profile.as_ref();
        profile.map(|_| parts(guest).iter().map(|_| AtomicU64::new(0)).collect())
    }
}

impl Translator {
    pub(crate) fn begin_observing(&mut self, observers: Observers) {
        self.observers = observers;
        if let Some(profile) = &self.observers.profile {
            profile.begin(self.options);
        }
        self.name_thunks();
    }

    /// The code cache was emptied.
    pub(crate) fn observe_emptying(&self) {
        if let Some(profile) = &self.observers.profile {
            profile.emptied();
        }
        if let Some(map) = &self.observers.perf_map {
            map.clear();
        }
        self.name_thunks();
    }

    fn name_thunks(&self) {
        let Some(map) = &self.observers.perf_map else {
            return;
        };
        let named = self.thunks.names();
        let ends = named.keys().skip(1).copied();
        let ends: Vec<_> = ends
            .chain(self.code.look(|code| code.cache.cursor()))
            .collect();
        for ((at, name), end) in named.iter().zip(ends) {
            map.line(*at, end - at, &format!("doppel:{name}"));
        }
    }

    /// A block was made.
    pub(crate) fn observe(
        &mut self,
        id: BlockId,
        rip: u64,
        guest: &GuestBlock,
        counters: Option<Counters>,
    ) {
        if self.observers.profile.is_none() && self.observers.perf_map.is_none() {
            return;
        }
        let block = self.code.blocks.get(id);
        let linear = match (block.key.form, block.key.base) {
            (Form::Normal, _) => rip,
            (_, Base::Fixed(origin)) => {
                let at = origin.wrapping_add(block.key.gpa & PAGE_MASK);
                block.key.mode.cut(at)
            }
            (_, Base::Dynamic) => self.context.page_base | (rip & PAGE_MASK),
        };
        if let Some(map) = &self.observers.perf_map {
            let user = block.key.privilege == Privilege::User as u8;
            let form = match block.key.form {
                Form::Normal => "",
                Form::TwoPages => " [two pages]",
                Form::Careful => " [careful]",
            };
            let lstar = self.context.cpu.msr.lstar;
            map.block(block.host, block.len, linear, user, form, lstar);
        }
        if let (Some(profile), Some(counters)) = (&self.observers.profile, counters) {
            let processor = Processor::of(&self.context.cpu.cpuid);
            profile.add(Record::new(
                block.key, id, linear, guest, processor, counters,
            ));
        }
    }

    /// The engine ends: what only it knows goes into the profile.
    pub(crate) fn end_observing(&mut self) {
        if let Some(map) = &self.observers.perf_map {
            map.flush();
        }
        if let Some(profile) = self.observers.profile.clone() {
            self.hold();
            profile.end(self.context.cpu.msr.lstar, |id| self.links(id));
        }
    }

    /// Which exits of a block are linked; nothing of one that was thrown away.
    fn links(&self, id: BlockId) -> Vec<bool> {
        let (blocks, cache) = (&self.code.blocks, &self.code.cache);
        let block = blocks.get(id);
        let linked = |site: ExitSite| {
            let patch = site
                .patch
                .map(|at| cache.target(block.host + u64::from(at)));
            let leads = site.slot.map(|at| self.slot_links.target(at)).or(patch);
            leads.is_some_and(|to| to != block.host + u64::from(site.stub))
        };
        let exits = blocks.exits_of(id).filter(|_| block.alive);
        exits.map(|e| linked(e.site)).collect()
    }
}
