//! The recipes of all blocks (see `recipe`), and which places need one.
//!
//! Problem: few places need a recipe, and a recipe is asked for only when something faults; so it should cost the others nothing.
//! Idea: the places that need one stand in lists beside the tables of `blocks`, in ascending order of their numbers there, and are looked
//! up by bisection. A check needs what the boundary before it needs, so it is in no list.
//! Invariant: the next recipe of a chain stands before it, in the same block.
//! Cost: 8 bytes for a place that needs a recipe, and 12 for a recipe, which the places of a block share.

use std::io;

use crate::records::RecipeRecord;
use crate::rewrite::{Chained, IN_PLACE, RecipeId, Translated};
use crate::table_unsafe::Table;

/// Which recipe is the first of those that give what is not in place, if anything is not.
pub(crate) type Lost = Option<u32>;

/// The number of a place, and of its first recipe.
type Need = (u32, u32);

pub(crate) struct Recipes {
    recipes: Table<RecipeRecord>,
    boundaries: Table<Need>,
    exits: Table<Need>,
}

impl Recipes {
    /// For so many bytes of each kind, at least.
    pub fn new(most: usize) -> io::Result<Self> {
        Ok(Recipes {
            recipes: Table::new(most)?,
            boundaries: Table::new(most)?,
            exits: Table::new(most)?,
        })
    }

    /// Enters those of a block whose boundaries and exits are numbered from these on.
    pub fn add(&mut self, code: &Translated, first_boundary: u32, first_exit: u32) {
        let first = self.recipes.len() as u32;
        let recipes = code.recipes.iter().enumerate().map(pack);
        self.recipes.extend(recipes);
        let need = |from: u32| move |(n, id): &(u32, RecipeId)| (from + n, first + u32::from(*id));
        let boundaries = code.lost_at_boundaries.iter().map(need(first_boundary));
        self.boundaries.extend(boundaries);
        let exits = code.lost_at_exits.iter().map(need(first_exit));
        self.exits.extend(exits);
    }

    pub fn at_boundary(&self, n: u32) -> Lost {
        look_up(&self.boundaries, n)
    }

    /// What is lost at an exit that interprets.
    pub fn at_exit(&self, n: u32) -> Lost {
        look_up(&self.exits, n)
    }

    /// RFLAGS with what was lost.
    pub fn apply(&self, lost: Lost, rflags: u64, gpr: &[u64; 16]) -> u64 {
        let next = |n: &u32| Some(n - self.recipes[*n as usize].back()?);
        std::iter::successors(lost, next).fold(rflags, |rflags, n| {
            self.recipes[n as usize].recipe().apply(rflags, gpr)
        })
    }

    pub fn bytes(&self) -> usize {
        self.recipes.bytes() + self.boundaries.bytes() + self.exits.bytes()
    }

    /// Bytes that they take of the host's memory.
    pub fn memory(&self) -> usize {
        self.recipes.memory() + self.boundaries.memory() + self.exits.memory()
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.recipes.clear();
        self.boundaries.clear();
        self.exits.clear();
    }
}

fn pack((at, (recipe, next)): (usize, &Chained)) -> RecipeRecord {
    let back = match *next {
        IN_PLACE => 0,
        next => at - usize::from(next),
    };
    RecipeRecord::new(recipe, back as u32)
}

fn look_up(needs: &Table<Need>, place: u32) -> Lost {
    let at = needs.partition_point(0..needs.len(), |need| need.0 < place);
    let (found, first) = *needs.get(at)?;
    (found == place).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{Kind, Recipe, Source};

    /// Gives one flag of a register that is 0 or 1: zero (bit 6), or carry where it is below 1 (bit 0).
    fn recipe(kind: Kind, flags: u8, number: u8) -> Recipe {
        Recipe {
            kind,
            size: 8,
            left: Source::Register { number, moved: 0 },
            right: Source::Constant(1),
            flags,
        }
    }

    fn block() -> Translated {
        let (carry, zero) = (recipe(Kind::Compare, 1, 0), recipe(Kind::And, 8, 1));
        Translated {
            recipes: vec![(carry, IN_PLACE), (zero, 0), (zero, IN_PLACE)],
            lost_at_boundaries: vec![(1, 0), (4, 1)],
            lost_at_exits: vec![(0, 2)],
            ..Translated::default()
        }
    }

    #[test]
    fn each_place_finds_the_recipes_of_its_block() {
        let mut recipes = Recipes::new(1 << 16).unwrap();
        recipes.add(&block(), 0, 0);
        recipes.add(&Translated::default(), 5, 2);
        recipes.add(&block(), 9, 3);
        let found: Vec<_> = (0..14).filter_map(|n| recipes.at_boundary(n)).collect();
        assert_eq!(found, [0, 1, 3, 4]);
        assert_eq!([10, 13].map(|n| recipes.at_boundary(n)), [Some(3), Some(4)]);
        assert_eq!(
            [0, 1, 3].map(|n| recipes.at_exit(n)),
            [Some(2), None, Some(5)]
        );
        let gpr = [0; 16];
        for (lost, flags) in [(None, 0), (Some(3), 1), (Some(4), 0x41), (Some(5), 0x40)] {
            assert_eq!(recipes.apply(lost, 0, &gpr), flags, "{lost:?}");
        }
    }
}
