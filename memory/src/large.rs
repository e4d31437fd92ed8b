//! Where large pages may be cached, so that INVLPG of one address forgets the whole page.
//!
//! The software TLB holds 4 KiB entries whatever the guest's page size, and INVLPG of any address in a large page must drop
//! all of its entries: Linux flushes 2 MiB mappings with one INVLPG each. Noting every large page would cost more than
//! it saves, so this notes gigabytes of linear addresses that held any; INVLPG elsewhere, the common case, stays cheap.

/// Linear gigabytes in which some translation of a large page may be cached.
#[derive(Clone, Debug, Default)]
pub struct LargePages {
    gigabytes: Vec<u64>,
    everywhere: bool,
}

impl LargePages {
    const SHIFT: u32 = 30;
    /// Gigabytes that are told apart; past that many, all count.
    const MOST: usize = 32;

    /// A large page at this linear address was walked.
    #[inline]
    pub fn note(&mut self, linear: u64) {
        if !self.may_hold(linear) {
            self.add(linear >> Self::SHIFT);
        }
    }

    fn add(&mut self, gigabyte: u64) {
        if self.gigabytes.len() < Self::MOST {
            self.gigabytes.push(gigabyte);
        } else {
            self.everywhere = true;
        }
    }

    /// False where no large page near this address can be cached.
    #[inline]
    pub fn may_hold(&self, linear: u64) -> bool {
        self.everywhere || self.gigabytes.contains(&(linear >> Self::SHIFT))
    }

    /// Everything was flushed.
    pub fn clear(&mut self) {
        self.gigabytes.clear();
        self.everywhere = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gigabytes_are_told_apart_until_there_are_too_many() {
        let mut l = LargePages::default();
        l.note(0x4000_0000);
        l.note(0x7fff_ffff);
        assert!(l.may_hold(0x4000_1234) && !l.may_hold(0x3fff_ffff) && !l.may_hold(0x8000_0000));
        for n in 2..40 {
            l.note(n << 30);
        }
        assert!(l.may_hold(u64::MAX));
        l.clear();
        assert!(!l.may_hold(0x4000_0000));
    }
}
