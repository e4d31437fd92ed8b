//! Pieces of guest RAM that a request is about, taken from the front.
//!
//! The guest may change the bytes at any time, so they are never seen as a Rust slice: they are copied, or the host's kernel gets their
//! addresses (`file.rs`).

use doppel_memory::GuestSlice;

/// Zeros are copied so many bytes at a time.
const ZEROS: &[u8] = &[0; 4096];

/// Bytes in pieces of guest RAM.
pub(crate) fn guest_len(slices: &[GuestSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// What is left of the pieces of a request.
pub(crate) struct Pieces<'a, 'r> {
    /// The first one, which was cut.
    first: Option<GuestSlice<'r>>,
    rest: &'a [GuestSlice<'r>],
}

impl<'a, 'r> Pieces<'a, 'r> {
    /// All of `slices`.
    pub fn new(slices: &'a [GuestSlice<'r>]) -> Self {
        Pieces {
            first: None,
            rest: slices,
        }
    }

    fn next(&mut self) -> Option<GuestSlice<'r>> {
        self.first.take().or_else(|| {
            let (first, rest) = self.rest.split_first()?;
            self.rest = rest;
            Some(*first)
        })
    }

    /// The first `len` bytes, or as many as there are.
    pub fn take(&mut self, len: u64) -> Vec<GuestSlice<'r>> {
        let mut taken = Vec::new();
        let mut left = usize::try_from(len).unwrap_or(usize::MAX);
        while left > 0
            && let Some(piece) = self.next()
        {
            let Ok((head, tail)) = piece.split_at(left.min(piece.len())) else {
                break;
            };
            left -= head.len();
            taken.push(head);
            self.first = Some(tail).filter(|tail| !tail.is_empty());
        }
        taken
    }
}

/// Copies bytes to the pieces, which have room for them.
pub(crate) fn scatter(mut bytes: &[u8], pieces: &[GuestSlice<'_>]) {
    for piece in pieces {
        let (now, rest) = bytes.split_at(piece.len().min(bytes.len()));
        piece.copy_from(now);
        bytes = rest;
    }
}

/// Copies the pieces out, as they are now.
pub(crate) fn gather(pieces: &[GuestSlice<'_>], mut bytes: &mut [u8]) {
    for piece in pieces {
        let (now, rest) = bytes.split_at_mut(piece.len().min(bytes.len()));
        piece.copy_to(now);
        bytes = rest;
    }
}

/// Makes the pieces zeros.
pub(crate) fn zero(pieces: &[GuestSlice<'_>]) {
    for piece in pieces {
        let mut pieces = Pieces::new(std::slice::from_ref(piece));
        loop {
            let some = pieces.take(ZEROS.len() as u64);
            if some.is_empty() {
                break;
            }
            some.iter()
                .for_each(|part| part.copy_from(&ZEROS[..part.len()]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use doppel_memory::GuestRam;
    use vm_memory::{GuestAddress, GuestMemoryBackend};

    #[test]
    fn pieces_are_cut_where_asked_and_hold_what_was_copied() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let slice =
            |at, len| GuestMemoryBackend::get_slice(ram.view(), GuestAddress(at), len).unwrap();
        let slices = [slice(0x1000, 10), slice(0x3000, 0), slice(0x2000, 5000)];
        assert_eq!(guest_len(&slices), 5010);
        let bytes: Vec<u8> = (0..5010).map(|n| n as u8).collect();
        scatter(&bytes, &slices);
        let mut pieces = Pieces::new(&slices);
        let mut back = Vec::new();
        for len in [4, 0, 20, 4000] {
            let taken = pieces.take(len);
            assert_eq!(guest_len(&taken), len);
            let mut some = vec![0; len as usize];
            gather(&taken, &mut some);
            back.extend(some);
        }
        assert!(back == bytes[..4024]);
        let rest = pieces.take(u64::MAX);
        assert_eq!(guest_len(&rest), 5010 - 4024);
        zero(&rest);
        let mut all = vec![1; 5010];
        gather(&slices, &mut all);
        assert!(all[..4024] == bytes[..4024] && all[4024..].iter().all(|byte| *byte == 0));
        assert!(pieces.take(1).is_empty());
    }
}
