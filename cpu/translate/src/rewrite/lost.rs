//! Flags that a check destroys although nobody saved them, and the recipes for them.
//!
//! Invariant: at each instruction that may leave to the monitor, every flag is in `place` or in `lost`, whose recipes hold there.
//! Whether they will is looked up before flags are given up: all instructions up to the one that overwrites them are
//! asked. Where they will not, the check saves the flags; and where an instruction overwrites some of the saved flags only, they
//! are restored first.
//! One thing is left open, unless `entry_flags` asks for it: a block that overwrites all flags does not ask where they are when it
//! is entered, so a fault before that sees any.

use super::*;
use crate::recipe::{Recipe, may_set, sets};

/// Number, among those of the block, of the first of the recipes that together give what is lost; each names the next.
pub(crate) type RecipeId = u8;
/// All flags are in place.
pub(crate) const IN_PLACE: RecipeId = u8::MAX;

/// A recipe and the number of the next.
pub(crate) type Chained = (Recipe, RecipeId);

impl Work<'_> {
    /// Notes what is lost at the boundary that is about to be noted, of this instruction.
    pub(super) fn record_lost(&mut self, i: &GuestInstruction) {
        if !i.may_leave() {
            return;
        }
        self.recipe = self.chain();
        if self.recipe != IN_PLACE {
            let n = self.out.boundaries.len() as u32;
            self.out.lost_at_boundaries.push((n, self.recipe));
        }
    }

    fn chain(&mut self) -> RecipeId {
        let mut next = IN_PLACE;
        for recipe in &self.lost {
            let known = self.out.recipes.iter().position(|r| *r == (*recipe, next));
            let at = known.unwrap_or(self.out.recipes.len());
            if known.is_none() {
                self.out.recipes.push((*recipe, next));
            }
            next = RecipeId::try_from(at).unwrap_or(IN_PLACE);
        }
        next
    }

    /// Gives up the flags in the registers, if they can be had again wherever they may be asked for.
    pub(super) fn give_up(&mut self) -> bool {
        let missing = ALL & !given(&self.lost);
        let Some(mut all) = self.made_by(missing) else {
            return false;
        };
        all.extend_from_slice(&self.lost);
        // Each of the remaining places takes as many new ones at most.
        let places = 2 * (self.block.instructions.len() - self.at + 1);
        let room = self.out.recipes.len() + all.len() * places < usize::from(IN_PLACE);
        let holds = room && self.hold(&all);
        if holds {
            self.lost = all;
        }
        holds
    }

    /// How the flags that stand in the registers now are worked out.
    fn made_by(&self, mut missing: FlagSet) -> Option<Vec<Recipe>> {
        let mut found = Vec::new();
        for (n, i) in self.block.instructions[..self.at].iter().enumerate().rev() {
            if missing == 0 {
                break;
            }
            if may_set(i) && i.flags.writes & missing != 0 {
                return None;
            }
            let flags = sets(i) & missing;
            if flags == 0 {
                continue;
            }
            let between = &self.block.instructions[n + 1..self.at];
            let recipe = between.iter().try_fold(Recipe::of(i)?, Recipe::after)?;
            found.push(recipe.only(flags));
            missing &= !flags;
        }
        (missing == 0 || self.entry_unknown).then_some(found)
    }

    /// True where recipes that hold now do so at every instruction that may leave before their flags are overwritten.
    fn hold(&self, recipes: &[Recipe]) -> bool {
        recipes.iter().all(|recipe| {
            let mut recipe = Some(*recipe);
            let mut flags = recipe.map_or(0, |r| r.flags);
            for i in &self.block.instructions[self.at..] {
                let after = recipe.as_ref().and_then(|r| follow(r, i));
                let in_between = matches!(i.class, Class::Repeat { .. }) && after.is_none();
                if i.may_leave() && (recipe.is_none() || in_between) {
                    return false;
                }
                flags &= !sets(i);
                if flags == 0 {
                    break;
                }
                recipe = after;
            }
            true
        })
    }

    /// What is lost after an instruction.
    pub(super) fn follow_lost(&mut self, i: &GuestInstruction) {
        self.lost.retain_mut(|recipe| {
            let after = follow(recipe, i);
            *recipe = after.unwrap_or(*recipe);
            after.is_some()
        });
    }

    /// True where the instruction would leave flags behind that are saved, and that may be asked for.
    pub(super) fn leaves_saved_flags(&self, i: &GuestInstruction) -> bool {
        let left = ALL & !sets(i) & !given(&self.lost);
        i.flags.writes != 0 && watched(&self.block.instructions[self.at + 1..], left)
    }

    /// True where a block that overwrites all flags has to know them nevertheless.
    pub(super) fn entry_watched(&self) -> bool {
        let wanted = self.s.options.entry_flags || self.s.form != Form::Normal;
        wanted && watched(&self.block.instructions, ALL)
    }
}

/// A recipe after an instruction that may take over some of its flags.
fn follow(recipe: &Recipe, i: &GuestInstruction) -> Option<Recipe> {
    let flags = recipe.flags & !sets(i);
    let unsure = may_set(i) && i.flags.writes & flags != 0;
    let after = recipe.after(i)?;
    (flags != 0 && !unsure).then_some(after.only(flags))
}

fn given(recipes: &[Recipe]) -> FlagSet {
    recipes.iter().fold(0, |all, r| all | r.flags)
}

/// True where some instruction may leave to the monitor before all of the flags are overwritten.
fn watched(instructions: &[GuestInstruction], mut flags: FlagSet) -> bool {
    for i in instructions {
        if flags == 0 {
            return false;
        }
        if i.may_leave() {
            return true;
        }
        flags &= !sets(i);
    }
    false
}
