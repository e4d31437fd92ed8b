//! The buffers of a request: pieces of guest RAM, which go from thread to thread.

use doppel_memory::GuestSlice;
use vm_memory::Bytes;

/// Pieces of guest RAM, one after another.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'r>(Vec<GuestSlice<'r>>);

// SAFETY: a piece is an address in guest RAM with the bitmap of its region. The RAM lives for 'r, any thread may access it at any
// time (accesses are volatile or the kernel's), and the bitmap is Sync.
unsafe impl Send for Buffers<'_> {}

impl<'r> Buffers<'r> {
    pub(crate) fn pieces_mut(&mut self) -> &mut Vec<GuestSlice<'r>> {
        &mut self.0
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.0.iter().map(|slice| slice.len()).sum()
    }

    /// True where there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|slice| slice.len() == 0)
    }

    /// The pieces.
    pub fn slices(&self) -> &[GuestSlice<'r>] {
        &self.0
    }

    /// The first `at` bytes, or all, leave; what stays are those behind them.
    pub fn split_off_front(&mut self, at: usize) -> Buffers<'r> {
        let mut left = at;
        let whole = self
            .0
            .iter()
            .take_while(|slice| match left.checked_sub(slice.len()) {
                Some(rest) => {
                    left = rest;
                    true
                }
                None => false,
            });
        let whole = whole.count();
        let behind = self.0.split_off(whole);
        let mut front = std::mem::replace(&mut self.0, behind);
        if left > 0
            && let Some(first) = self.0.first_mut()
            && let Ok((head, tail)) = first.split_at(left)
        {
            front.push(head);
            *first = tail;
        }
        Buffers(front)
    }

    /// Copies bytes out of the front, as many as there are; says how many. They stay there.
    pub fn read(&self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            let rest = &mut into[done..];
            if rest.is_empty() {
                break;
            }
            done += slice.read(rest, 0).unwrap_or(0);
        }
        done
    }

    /// Copies bytes to the front, as many as have room; says how many.
    pub fn write(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            let rest = &from[done..];
            if rest.is_empty() {
                break;
            }
            done += slice.write(rest, 0).unwrap_or(0);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use doppel_memory::GuestRam;
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;

    fn addresses(buffers: &Buffers<'_>) -> Vec<u64> {
        let of = |slice: &GuestSlice<'_>| {
            let start = slice.bitmap().address();
            start..start + slice.len() as u64
        };
        buffers.slices().iter().flat_map(of).collect()
    }

    #[test]
    fn buffers_are_cut_anywhere_and_no_byte_is_lost() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let slice = |at, len| GuestMemoryBackend::get_slice(ram.view(), GuestAddress(at), len);
        let pieces = [(0x1000, 3), (0x3000, 0), (0x2000, 4), (0x2004, 1)];
        let all: Vec<_> = pieces.map(|(at, len)| slice(at, len).unwrap()).into();
        for at in 0..=10 {
            let mut rest = Buffers(all.clone());
            let front = rest.split_off_front(at);
            assert_eq!((front.len(), rest.len()), (at.min(8), 8 - at.min(8)));
            let joined = [addresses(&front), addresses(&rest)].concat();
            assert_eq!(joined, addresses(&Buffers(all.clone())), "at {at}");
        }
    }
}
