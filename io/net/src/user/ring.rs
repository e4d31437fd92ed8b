//! A buffer of a byte stream: grows to what is asked for, gives its memory back when it is empty.

use std::io::IoSliceMut;

const SMALLEST: usize = 16 << 10;

/// A ring of bytes.
#[derive(Debug, Default)]
pub struct Ring {
    // Length 0 or a power of two.
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Ring {
    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes of memory that it takes.
    pub fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// Bytes from `offset` on, at most `len`, in two parts.
    pub fn slices(&self, offset: usize, len: usize) -> [&[u8]; 2] {
        let len = len.min(self.len.saturating_sub(offset));
        if len == 0 {
            return [&[], &[]];
        }
        let start = (self.start + offset) & (self.bytes.len() - 1);
        let first = len.min(self.bytes.len() - start);
        [
            &self.bytes[start..start + first],
            &self.bytes[..len - first],
        ]
    }

    /// Drops `n` bytes from the front.
    pub fn consume(&mut self, n: usize) {
        let n = n.min(self.len);
        self.len -= n;
        if self.len == 0 {
            self.start = 0;
        } else {
            self.start = (self.start + n) & (self.bytes.len() - 1);
        }
    }

    /// Gives memory back where there is nothing in it.
    pub fn release(&mut self) {
        if self.len == 0 {
            *self = Ring::default();
        }
    }

    /// Lets `fill` write into room for `room` bytes behind the last one; it says how many it wrote.
    pub fn fill<E>(
        &mut self,
        room: usize,
        fill: impl FnOnce(&mut [IoSliceMut]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        self.reserve(room);
        let size = self.bytes.len();
        let end = (self.start + self.len) & size.wrapping_sub(1);
        let first = room.min(size - end);
        let (low, high) = self.bytes.split_at_mut(end);
        let mut parts = [
            IoSliceMut::new(&mut high[..first]),
            IoSliceMut::new(&mut low[..room - first]),
        ];
        let n = fill(&mut parts)?.min(room);
        self.len += n;
        Ok(n)
    }

    /// Appends `data`.
    pub fn push(&mut self, data: &[u8]) {
        let copy = |parts: &mut [IoSliceMut]| {
            let (first, second) = data.split_at(parts[0].len());
            parts[0].copy_from_slice(first);
            parts[1].copy_from_slice(second);
            Ok::<_, ()>(data.len())
        };
        let _ = self.fill(data.len(), copy);
    }

    fn reserve(&mut self, room: usize) {
        let needed = self.len + room;
        if needed <= self.bytes.len() {
            return;
        }
        let mut bytes = vec![0; needed.next_power_of_two().max(SMALLEST)];
        let [a, b] = self.slices(0, self.len);
        bytes[..a.len()].copy_from_slice(a);
        bytes[a.len()..a.len() + b.len()].copy_from_slice(b);
        (self.bytes, self.start) = (bytes, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    #[test]
    fn it_is_a_queue_whatever_the_sizes() {
        let (mut ring, mut model) = (Ring::default(), VecDeque::new());
        let mut next = 0u8;
        for step in 0..5000usize {
            let n = step * 7919 % 9000;
            let data: Vec<u8> = (0..n)
                .map(|_| {
                    next = next.wrapping_add(1);
                    next
                })
                .collect();
            ring.push(&data);
            model.extend(&data);
            let take = (step * 104729 % 9500).min(model.len());
            let [a, b] = ring.slices(0, take);
            assert_eq!([a, b].concat(), model.drain(..take).collect::<Vec<_>>());
            ring.consume(take);
            assert_eq!(ring.len(), model.len());
        }
        let all = ring.len();
        ring.consume(all);
        ring.release();
        assert_eq!(ring.capacity(), 0);
        assert_eq!(ring.slices(0, 10), [&[] as &[u8], &[]]);
    }

    #[test]
    fn what_is_not_filled_is_not_there() {
        let mut ring = Ring::default();
        ring.push(b"abc");
        assert_eq!(ring.fill(100, |_| Err::<usize, _>(5)), Err(5));
        assert_eq!(ring.fill(100, |_| Ok::<_, ()>(0)), Ok(0));
        assert_eq!(ring.slices(1, 100), [&b"bc"[..], &[]]);
    }
}
