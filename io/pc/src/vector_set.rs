//! A set of the 256 interrupt vectors: the IRR, ISR and TMR of a local APIC.

/// Bit n of word n / 32 is vector n, as the registers show it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct VectorSet([u32; 8]);

impl VectorSet {
    fn place(vector: u8) -> (usize, u32) {
        (usize::from(vector / 32), 1 << (vector % 32))
    }

    pub fn insert(&mut self, vector: u8) {
        self.set(vector, true);
    }

    pub fn remove(&mut self, vector: u8) {
        self.set(vector, false);
    }

    pub fn set(&mut self, vector: u8, present: bool) {
        let (word, bit) = Self::place(vector);
        if present {
            self.0[word] |= bit;
        } else {
            self.0[word] &= !bit;
        }
    }

    pub fn contains(&self, vector: u8) -> bool {
        let (word, bit) = Self::place(vector);
        self.0[word] & bit != 0
    }

    pub fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|word| *word != 0)?;
        Some(word as u8 * 32 + self.0[word].ilog2() as u8)
    }

    /// Word `index` (0 to 7).
    pub fn word(&self, index: u32) -> u32 {
        self.0.get(index as usize).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_member_is_found() {
        let mut set = VectorSet::default();
        assert_eq!(set.highest(), None);
        for vector in [0, 31, 32, 200, 255] {
            set.insert(vector);
            assert_eq!(set.highest(), Some(vector));
            assert!(set.contains(vector));
        }
        assert_eq!(
            (set.word(0), set.word(1), set.word(7)),
            (0x8000_0001, 1, 1 << 31)
        );
        set.remove(255);
        assert_eq!(set.highest(), Some(200));
    }
}
