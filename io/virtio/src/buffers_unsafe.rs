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
        let mut front = Vec::new();
        let mut left = at;
        while left > 0 && !self.0.is_empty() {
            let len = self.0[0].len();
            let Ok((head, tail)) = self.0[0].split_at(left.min(len)) else {
                break;
            };
            left -= head.len();
            front.push(head);
            if tail.is_empty() {
                self.0.remove(0);
            } else {
                self.0[0] = tail;
            }
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
