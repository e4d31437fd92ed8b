//! Where a round's decisions come from: a number, or the bytes of an input.

use std::collections::VecDeque;

/// A source of numbers.
pub enum Random {
    /// xorshift64*.
    Seeded(u64),
    /// Little-endian numbers of as many bytes as they need; zeros when the bytes are used up.
    Bytes(VecDeque<u8>),
}

impl Random {
    /// Numbers that a number decides.
    pub fn seeded(seed: u64) -> Self {
        Random::Seeded(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Numbers that an input decides.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Random::Bytes(bytes.iter().copied().collect())
    }

    /// Whether the input is used up; a seed never is.
    pub fn is_used_up(&self) -> bool {
        matches!(self, Random::Bytes(bytes) if bytes.is_empty())
    }

    /// 64 bits.
    #[allow(clippy::should_implement_trait, reason = "it never ends")]
    pub fn next(&mut self) -> u64 {
        self.number(8)
    }

    /// Below `n`, which is not 0.
    pub fn below(&mut self, n: u64) -> u64 {
        let needed = (n - 1).checked_ilog2().map_or(0, |bit| bit / 8 + 1);
        match self {
            Random::Seeded(_) => (self.number(8) >> 11) % n,
            Random::Bytes(_) => self.number(needed) % n,
        }
    }

    /// One of a slice that is not empty.
    pub fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    fn number(&mut self, len: u32) -> u64 {
        match self {
            Random::Seeded(state) => {
                *state ^= *state >> 12;
                *state ^= *state << 25;
                *state ^= *state >> 27;
                state.wrapping_mul(0x2545_f491_4f6c_dd1d)
            }
            Random::Bytes(bytes) => {
                let taken = bytes.drain(..bytes.len().min(len as usize)).enumerate();
                taken.fold(0, |number, (n, byte)| number | u64::from(byte) << (8 * n))
            }
        }
    }
}
