//! Page faults that nothing explains: the page is mapped in the child as it should be, and the processor says that it is not.
//!
//! Problem: whatever the reason (a host that did not do what it said, a shadow that is wrong), the instruction can be interpreted; but the next one at the page stops again, and so
//! a program is interpreted, one instruction a stop, for as long as it runs. Idea: such a fault may happen. Where it happens again and again, the page is mapped afresh, and where that
//! does not help, the address space is translated.
//! Cost: nothing until there is one.

/// What is done about such a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remedy {
    /// The instruction is interpreted.
    Interpret,
    /// The page is unmapped and mapped again.
    MapAfresh,
    /// Nothing helps: the address space is translated.
    Translate,
}

/// Faults at one page until it is mapped afresh, and until the address space is given up.
const MOST: (u32, u32) = (3, 6);
/// Pages that are remembered: more of them are reason enough.
const MOST_PAGES: usize = 64;

/// The faults of one address space that nothing explained.
#[derive(Clone, Debug, Default)]
pub struct Unexplained {
    /// Where they were, and how many.
    pages: Vec<(u64, u32)>,
}

impl Unexplained {
    /// One more at this page.
    pub fn again(&mut self, linear: u64) -> Remedy {
        let count = match self.pages.iter_mut().find(|(at, _)| *at == linear) {
            Some((_, count)) => {
                *count += 1;
                *count
            }
            None => {
                self.pages.push((linear, 1));
                1
            }
        };
        match count {
            n if n >= MOST.1 || self.pages.len() > MOST_PAGES => Remedy::Translate,
            n if n == MOST.0 => Remedy::MapAfresh,
            _ => Remedy::Interpret,
        }
    }

    /// The page is mapped another way than before.
    pub fn forget(&mut self, linear: u64) {
        self.pages.retain(|(at, _)| *at != linear);
    }

    /// What was is no longer.
    pub fn clear(&mut self) {
        self.pages.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Remedy::{Interpret, MapAfresh, Translate};

    #[test]
    fn remedies_grow_with_the_faults_at_a_page() {
        let mut u = Unexplained::default();
        let [first, second] = [0x1000, 0x2000];
        let remedies: Vec<_> = (0..6).map(|_| u.again(first)).collect();
        let expected = [
            Interpret, Interpret, MapAfresh, Interpret, Interpret, Translate,
        ];
        assert_eq!(remedies, expected);
        assert_eq!(u.again(second), Interpret);
        u.forget(first);
        assert_eq!(u.again(first), Interpret, "it was mapped another way");
    }

    #[test]
    fn faults_all_over_are_as_bad() {
        let mut u = Unexplained::default();
        let needed = (0..).find(|n| u.again(n << 12) == Translate);
        assert_eq!(needed, Some(MOST_PAGES as u64));
        u.clear();
        assert_eq!(u.again(0), Interpret);
    }
}
