//! Bases that code will come back to, kept in memory.
//!
//! Problem: compiled code uses its bases in turn, and each drives the other out of S0. A register to keep one in can be borrowed
//! (see `pin`), but there is one such register at most, if any.
//! Idea: the check of a base that the block comes back to covers what it will touch then, and its host address is stored in the
//! context. Coming back is a load, which waits for no register of the guest's and destroys no flags.
//! Invariant: as in `share`; a slot holds what it was stored in this run of the block, since the block is entered at its start alone.
//! A write on a way that may not be taken is not counted in: the page may be one that can only be read.
//! Cost: a store a base, and a load each time.

use super::share::{Reference, Run, Stretch};
use super::*;

/// Slots in the context.
pub(crate) const SLOTS: usize = 8;

/// A base that is kept in a slot until an instruction.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    slot: usize,
    run: Run,
    last: usize,
}

/// What a check is to cover, and until which instruction its base is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub stretch: Stretch,
    last: usize,
}

impl Work<'_> {
    /// The plan for the base of the access at this instruction, if code comes back to it.
    pub(super) fn plan_hold(&self, r: &Reference) -> Option<Plan> {
        let held_otherwise = self.pin.is_some_and(|pin| pin.begins_at(self.at));
        let may = self.s.options.hold && !held_otherwise;
        if !may || !self.may_come_back(r) || self.free_slot().is_none() {
            return None;
        }
        let mut plan = Plan {
            stretch: Stretch::of(r)?,
            last: self.at,
        };
        let mut run = Run::anywhere(r);
        let mut pinned = self.pinned.map(|pinned| pinned.run);
        let (mut comes_back, mut away, mut was_away, mut branched) = (false, false, false, false);
        for (at, i) in self.block.instructions.iter().enumerate().skip(self.at) {
            match i.reference {
                Some(other) if run.is_off(&other) => {
                    let longer = plan.stretch.with(&run, &other);
                    let certain = !(was_away && branched);
                    match longer.filter(|s| certain || s.write == plan.stretch.write) {
                        Some(stretch) => {
                            plan = Plan { stretch, last: at };
                            comes_back |= away;
                            away = false;
                        }
                        None => away = true,
                    }
                }
                // A borrowed register leaves S0 alone.
                Some(other) if pinned.is_some_and(|run| run.find(&other).is_some()) => {}
                _ => away |= !i.leaves_s0 || i.reference.is_some(),
            }
            was_away |= away;
            branched |= matches!(i.class, Class::Conditional);
            let until = self.pinned.map_or(0, |pinned| pinned.last);
            pinned = pinned.filter(|_| at < until);
            if !pinned.as_mut().is_some_and(|run| run.follow(i)) {
                pinned = None;
            }
            if !run.follow(i) {
                break;
            }
        }
        comes_back.then_some(plan)
    }

    /// False where no access of what follows is off the same base, whatever is between.
    fn may_come_back(&self, r: &Reference) -> bool {
        let is_off = |other: Reference| other.root == r.root;
        // `leave` has a base go on as another.
        let renames = |i: &GuestInstruction| matches!(i.class, Class::Leave);
        let code = &self.block.instructions[self.at..];
        renames(&code[0])
            || (code[1..].iter()).any(|i| i.reference.is_some_and(is_off) || renames(i))
    }

    fn free_slot(&self) -> Option<usize> {
        (0..SLOTS).find(|slot| self.held.iter().all(|held| held.slot != *slot))
    }

    /// Keeps the address in S0.
    pub(super) fn begin_hold(&mut self, run: Run, plan: Plan) {
        let Some(slot) = self.free_slot() else {
            return;
        };
        self.asm().store(ctx::HELD + 8 * slot as i32, S0);
        let last = plan.last;
        self.held.push(Held { slot, run, last });
        self.out.holds += 1;
    }

    /// Brings the base of a reference back to S0, if it is kept.
    pub(super) fn recall(&mut self, r: &Reference) -> Option<(Reg, i32)> {
        let mut all = self.held.iter();
        let (held, at) = all.find_map(|held| Some((*held, held.run.find(r)?)))?;
        self.asm().load(S0, ctx::HELD + 8 * held.slot as i32);
        self.run = Some(held.run);
        Some((S0, at))
    }

    /// Follows an instruction.
    pub(super) fn follow_held(&mut self, i: &GuestInstruction) {
        let at = self.at;
        self.held
            .retain_mut(|held| at < held.last && held.run.follow(i));
    }
}
