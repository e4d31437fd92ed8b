//! How often each block of a run was executed, and which they were.
//!
//! Each part of a block counts its runs in a word of its own, which lives here. Blocks that were thrown away (written over, or the cache
//! was emptied) keep their count; where the cache is emptied the records of the same code become one and only the
//! [`KEPT`] with the most instructions stay, so that a guest cannot make a profile grow without bound.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use super::dissect::Origin;
use super::{Symbols, text};
use crate::blocks::{BlockId, Key};
use crate::engine::TranslateOptions;
use crate::frontend::{GuestBlock, Processor};
use crate::rewrite::counter::parts;

/// Records that outlive an emptying of the cache.
const KEPT: usize = 1 << 14;

/// How often each part of a block ran: from its beginning, and after each branch in it that was not taken.
pub(crate) type Counters = Box<[AtomicU64]>;

/// The blocks of a run.
#[derive(Debug, Default)]
pub struct Profile {
    inner: Mutex<Inner>,
}

/// Which blocks to show.
#[derive(Clone, Copy, Debug)]
pub enum Selection {
    /// The so many with the most instructions executed.
    Hottest(usize),
    /// Those with code at a linear address.
    At(u64),
}

#[derive(Debug, Default)]
struct Inner {
    options: TranslateOptions,
    records: Vec<Record>,
    /// Instructions that the records ran which are no longer kept.
    forgotten: u64,
    lstar: u64,
}

/// A block and how often it ran.
#[derive(Debug)]
pub(crate) struct Record {
    key: Key,
    /// Its number until the cache is emptied.
    id: Option<BlockId>,
    linear: u64,
    bytes: Box<[u8]>,
    /// Instructions of each part.
    parts: Vec<u64>,
    straddler_follows: bool,
    processor: Processor,
    counters: Counters,
    /// Which exits were linked at the end, if it was still there.
    links: Vec<bool>,
}

impl Record {
    pub fn new(
        key: Key,
        id: BlockId,
        linear: u64,
        guest: &GuestBlock,
        processor: Processor,
        counters: Counters,
    ) -> Self {
        Record {
            key,
            id: Some(id),
            linear,
            bytes: guest.bytes.clone().into(),
            parts: parts(guest),
            straddler_follows: guest.straddler_follows,
            processor,
            counters,
            links: Vec::new(),
        }
    }

    fn runs(&self) -> u64 {
        self.counters[0].load(Ordering::Relaxed)
    }

    fn executed(&self) -> u64 {
        let parts = self.counters.iter().zip(&self.parts);
        parts.map(|(n, len)| n.load(Ordering::Relaxed) * len).sum()
    }

    /// Takes over the runs of the same code.
    fn add(&mut self, other: Record) {
        for (mine, others) in self.counters.iter().zip(&other.counters) {
            mine.fetch_add(others.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        if !other.links.is_empty() {
            self.links = other.links;
        }
    }

    fn covers(&self, linear: u64) -> bool {
        linear.wrapping_sub(self.linear) < self.bytes.len() as u64
    }

    fn origin(&self) -> Origin<'_> {
        Origin {
            linear: self.linear,
            bytes: &self.bytes,
            privilege: self.key.privilege,
            simd: self.key.simd,
            mode: self.key.mode,
            base: self.key.base,
            form: self.key.form,
            straddler_follows: self.straddler_follows,
            processor: self.processor,
        }
    }
}

impl Inner {
    fn executed(&self) -> u64 {
        self.forgotten + self.records.iter().map(Record::executed).sum::<u64>()
    }

    /// Makes records of the same code one.
    fn merge(&mut self) {
        let mut known: HashMap<(Key, u64, Box<[u8]>), usize> = HashMap::new();
        let mut merged: Vec<Record> = Vec::new();
        for record in std::mem::take(&mut self.records) {
            let code = (record.key, record.linear, record.bytes.clone());
            match known.get(&code) {
                Some(n) => merged[*n].add(record),
                None => {
                    known.insert(code, merged.len());
                    merged.push(record);
                }
            }
        }
        self.records = merged;
    }

    /// After the cache was emptied nothing counts any more.
    fn close(&mut self) {
        self.merge();
        for record in &mut self.records {
            record.id = None;
        }
        self.records.sort_by_key(|r| Reverse(r.executed()));
        let dropped = self.records.drain(KEPT.min(self.records.len())..);
        self.forgotten += dropped.map(|r| r.executed()).sum::<u64>();
    }
}

impl Profile {
    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self, options: TranslateOptions) {
        self.inner().options = options;
    }

    pub(crate) fn add(&self, record: Record) {
        self.inner().records.push(record);
    }

    pub(crate) fn emptied(&self) {
        self.inner().close();
    }

    /// The engine ends: its LSTAR, and which exits of its blocks are linked.
    pub(crate) fn end(&self, lstar: u64, links: impl Fn(BlockId) -> Vec<bool>) {
        let mut inner = self.inner();
        inner.lstar = lstar;
        for record in &mut inner.records {
            record.links = record.id.map(&links).unwrap_or_default();
        }
        inner.close();
    }

    /// How far the guest's kernel lies from where its symbols say.
    pub fn slide(&self, symbols: &Symbols) -> u64 {
        symbols.slide(self.inner().lstar)
    }

    /// The listing of the blocks selected, the hottest first; empty where there is none.
    pub fn report(&self, selection: Selection, symbols: &Symbols) -> String {
        let inner = self.inner();
        let all = inner.executed();
        let chosen: Vec<_> = match selection {
            Selection::Hottest(n) => inner.records.iter().take(n).collect(),
            Selection::At(linear) => inner.records.iter().filter(|r| r.covers(linear)).collect(),
        };
        let mut out = String::new();
        let _ = writeln!(out, "{all} instructions were executed in translated code\n");
        let header = out.len();
        for record in chosen.into_iter().filter(|r| r.runs() > 0) {
            let share = 100.0 * record.executed() as f64 / all.max(1) as f64;
            let heading = format!(
                "ran {} times: {} instructions, {share:.2} % of all",
                record.runs(),
                record.executed(),
            );
            let origin = record.origin();
            let block = text::block(
                &origin,
                &inner.options,
                symbols,
                &heading,
                Some(&record.links),
            );
            let _ = writeln!(out, "{block}");
        }
        if out.len() == header {
            out.clear();
        }
        out
    }
}
