//! Guest memory that the host is asked for before the guest needs it.
//!
//! Problem: a guest that boots touches its memory for the first time, and each page that the host gives takes as long as some hundred
//! instructions of the guest: an eighth of a boot, on the thread of a vCPU.
//! Idea: first touches come in streams (a kernel that unpacks itself, its arrays, an initial RAM disk), up or down. Where a batch is touched
//! that continues one, a thread has the host give the next ones: as many as the stream has had so far, up to [`WINDOW`].
//! Where the guest comes to a batch before the thread has done it, it asks for that batch itself: page by page it would take twice as long.
//! Invariant: it changes nothing but when the host gives memory. Who comes first to a page, guest or thread, waits for the host as ever.
//! Cost: the thread sleeps but for its requests; at the end of a stream up to [`WINDOW`] batches are given that nobody wanted.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use doppel_seccomp::{Kind, narrowed};

use crate::mapping_unsafe::Mapping;

/// Batches that are asked for at once at most.
const WINDOW: u64 = 16;
/// Requests that wait for the thread at most; what comes on top is not asked for ahead.
const QUEUE: usize = 64;

/// A bit for each batch of guest memory: whether somebody is on the way to ask the host for it, say, or whether the host has given it.
#[derive(Debug)]
pub(crate) struct Batches {
    bits: Vec<AtomicU64>,
}

impl Batches {
    /// For so many batches at least, none of them asked for.
    pub fn new(count: u64) -> Self {
        let words = count.div_ceil(64);
        Batches {
            bits: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// True for what does not exist, so that nobody asks for it.
    #[inline]
    pub fn has(&self, batch: u64) -> bool {
        self.bits
            .get((batch / 64) as usize)
            .is_none_or(|word| word.load(Ordering::Relaxed) & 1 << (batch % 64) != 0)
    }

    pub fn set(&self, batch: u64) {
        if let Some(word) = self.bits.get((batch / 64) as usize) {
            word.fetch_or(1 << (batch % 64), Ordering::Relaxed);
        }
    }

    pub fn clear(&self, batch: u64) {
        if let Some(word) = self.bits.get((batch / 64) as usize) {
            word.fetch_and(!(1 << (batch % 64)), Ordering::Relaxed);
        }
    }

    /// How many have theirs set.
    pub fn count(&self) -> u64 {
        let ones = |w: &AtomicU64| u64::from(w.load(Ordering::Relaxed).count_ones());
        self.bits.iter().map(ones).sum()
    }

    /// What to ask for when `batch` is touched first, of those below `end`: the batches that it makes likely.
    fn likely(&self, batch: u64, end: u64) -> Range<u64> {
        let up = (1..=WINDOW).take_while(|n| batch.checked_sub(*n).is_some_and(|b| self.has(b)));
        let up = up.count() as u64;
        if up > 0 {
            let free = (batch + 1..end.min(batch + 1 + up)).take_while(|b| !self.has(*b));
            return batch + 1..batch + 1 + free.count() as u64;
        }
        let down = (1..=WINDOW).take_while(|n| batch + n < end && self.has(batch + n));
        let down = down.count() as u64;
        let free = (batch.saturating_sub(down)..batch)
            .rev()
            .take_while(|b| !self.has(*b));
        batch - free.count() as u64..batch
    }
}

/// The thread that asks.
#[derive(Debug)]
pub(crate) struct Ahead {
    requests: SyncSender<Range<u64>>,
    /// Bytes that were asked for.
    pub bytes: AtomicU64,
}

impl Ahead {
    /// Starts it. It ends when this value is gone.
    pub fn start(mapping: Arc<Mapping>, given: Arc<Batches>, size: u64) -> io::Result<Self> {
        let (requests, received) = sync_channel(QUEUE);
        thread::Builder::new()
            .name("ram".into())
            .spawn(narrowed(Kind::Helper, move || {
                serve(&mapping, &received, &given, size);
            }))?;
        Ok(Ahead {
            requests,
            bytes: AtomicU64::new(0),
        })
    }

    /// Asks for what follows `batch`, which is touched for the first time, in a piece of RAM that ends with the batch before `end`.
    pub fn follow(&self, batches: &Batches, batch: u64, end: u64, size: u64) {
        let likely = batches.likely(batch, end);
        let len = (likely.end - likely.start) * size;
        if len > 0 && self.requests.try_send(likely.clone()).is_ok() {
            self.bytes.fetch_add(len, Ordering::Relaxed);
            likely.for_each(|b| batches.set(b));
        }
    }
}

fn serve(mapping: &Mapping, requests: &Receiver<Range<u64>>, given: &Batches, size: u64) {
    for batch in requests.iter().flatten() {
        if !given.has(batch) {
            mapping.populate((batch * size) as usize, size as usize);
            given.set(batch);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batches(asked: &[u64]) -> Batches {
        let batches = Batches::new(128);
        asked.iter().for_each(|b| batches.set(*b));
        batches
    }

    #[test]
    fn a_stream_is_followed_as_far_as_it_has_come() {
        assert!(batches(&[50]).likely(50, 100).is_empty(), "no stream yet");
        assert_eq!(batches(&[49, 50]).likely(50, 100), 51..52);
        assert_eq!(batches(&[46, 47, 48, 49, 50]).likely(50, 100), 51..55);
        let long: Vec<u64> = (0..=50).collect();
        assert_eq!(batches(&long).likely(50, 100), 51..51 + WINDOW);
        assert_eq!(batches(&long).likely(50, 53), 51..53, "the end of RAM");
        let gap = [48, 49, 50, 52];
        assert_eq!(batches(&gap).likely(50, 100), 51..52, "asked for already");
    }

    #[test]
    fn a_stream_may_go_down() {
        assert_eq!(batches(&[50, 51]).likely(50, 100), 49..50);
        assert_eq!(batches(&[50, 51, 52, 53]).likely(50, 100), 47..50);
        assert_eq!(batches(&[1, 2, 3, 4]).likely(1, 100), 0..1, "the beginning");
        assert_eq!(batches(&[0, 1]).likely(0, 100), 0..0);
        assert_eq!(batches(&[48, 50, 51, 52]).likely(50, 100), 49..50);
    }
}
