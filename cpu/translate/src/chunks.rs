//! An array that grows at its end, chunk by chunk, and never moves.
//!
//! Problem: a vector of some megabytes that grows is copied whenever it is full, and what it leaves behind in the heap fits nothing
//! else: after the boot of a distribution a third of what the tables of translations held was such holes.
//! Idea: chunks of a fixed number of entries; an entry's number says which chunk it is in.
//! Invariant: all chunks but the last are full.
//! Cost: one more load for an entry.

use std::ops::{Index, IndexMut, Range};

/// log2 of the entries of a chunk.
const SHIFT: usize = 12;
const CHUNK: usize = 1 << SHIFT;

pub(crate) struct Chunks<T> {
    chunks: Vec<Vec<T>>,
    len: usize,
}

impl<T> Default for Chunks<T> {
    fn default() -> Self {
        Chunks {
            chunks: Vec::new(),
            len: 0,
        }
    }
}

impl<T> Chunks<T> {
    pub fn len(&self) -> usize {
        self.len
    }

    /// Bytes of its entries.
    pub fn bytes(&self) -> usize {
        self.len() * size_of::<T>()
    }

    pub fn push(&mut self, entry: T) {
        self.last().push(entry);
        self.len += 1;
    }

    /// The chunk that has room for the next entry.
    fn last(&mut self) -> &mut Vec<T> {
        if self.len.is_multiple_of(CHUNK) {
            self.chunks.push(Vec::with_capacity(CHUNK));
        }
        &mut self.chunks[self.len >> SHIFT]
    }

    pub fn get(&self, n: usize) -> Option<&T> {
        self.chunks.get(n >> SHIFT)?.get(n % CHUNK)
    }

    /// The first number in `range` whose entry does not have a property that entries have up to some number; else its end.
    pub fn partition_point(&self, range: Range<usize>, has: impl Fn(&T) -> bool) -> usize {
        let Range { mut start, mut end } = range;
        while start < end {
            let middle = start + (end - start) / 2;
            match has(&self[middle]) {
                true => start = middle + 1,
                false => end = middle,
            }
        }
        start
    }
}

impl<T> Extend<T> for Chunks<T> {
    fn extend<I: IntoIterator<Item = T>>(&mut self, entries: I) {
        let mut entries = entries.into_iter().peekable();
        while entries.peek().is_some() {
            let last = self.last();
            let before = last.len();
            last.extend(entries.by_ref().take(CHUNK - before));
            let added = last.len() - before;
            self.len += added;
        }
    }
}

impl<T> Index<usize> for Chunks<T> {
    type Output = T;

    fn index(&self, n: usize) -> &T {
        &self.chunks[n >> SHIFT][n % CHUNK]
    }
}

impl<T> IndexMut<usize> for Chunks<T> {
    fn index_mut(&mut self, n: usize) -> &mut T {
        &mut self.chunks[n >> SHIFT][n % CHUNK]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_found_by_number_on_both_sides_of_a_border() {
        for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7] {
            let mut chunks = Chunks::default();
            chunks.extend(0..len);
            assert_eq!((chunks.len(), chunks.bytes()), (len, 8 * len));
            assert!((0..len).all(|n| chunks[n] == n && chunks.get(n) == Some(&n)));
            assert_eq!(chunks.get(len), None);
            for bound in [0, 1, CHUNK, len] {
                let point = chunks.partition_point(0..len, |n| *n < bound);
                assert_eq!(point, bound.min(len));
                let point = chunks.partition_point(len / 2..len, |n| *n < bound);
                assert_eq!(point, bound.clamp(len / 2, len));
            }
        }
    }

    #[test]
    fn entries_stay_where_they_are() {
        let mut chunks = Chunks::default();
        chunks.push(7u64);
        let at = std::ptr::from_ref(&chunks[0]);
        chunks.extend(0..2 * CHUNK as u64);
        assert!(std::ptr::eq(at, &chunks[0]));
        chunks[0] = 8;
        assert_eq!(chunks[0], 8);
    }
}
