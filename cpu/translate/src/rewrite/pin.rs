//! A register for the base that code keeps coming back to.
//!
//! Problem: two bases in turn (`load a[i]; store b[i]`, a frame and a structure) drive each other out of S0, so that no access
//! shares a check.
//! Idea: a block that comes back to a base, and leaves some register alone altogether, borrows that register from the first access off
//! the base to the last: it holds the host address, the guest's value waits in the context, and S0 is free for the others.
//! Invariant: while the register is borrowed (`Work::pinned` is `Some`), every way out gives it back: exits load it first, and sites
//! and boundaries name it so that the monitor does where it takes over in the middle.
//! Cost: three moves a block.

use iced_x86::Register;

use super::share::{Reference, Run, Stretch};
use super::*;

/// How often code has to come back to a base for a register to be worth while.
const LEAST_RETURNS: usize = 1;
/// Registers in the order in which they are borrowed: those that need no REX prefix to be a base last, since code uses them most.
const CANDIDATES: [Reg; 13] = [9, 8, 15, 14, 13, 12, 3, 5, 7, 6, 1, 2, 0];

/// Which base is held, and from which instruction to which.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pin {
    pub register: Reg,
    first: usize,
    last: usize,
    stretch: Stretch,
}

impl Pin {
    pub fn begins_at(&self, at: usize) -> bool {
        self.first == at
    }
}

/// A base that is held.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pinned {
    pub register: Reg,
    pub run: Run,
    pub last: usize,
}

impl Work<'_> {
    /// Chooses the base to hold, if any.
    pub(super) fn plan_pin(&mut self) {
        if !(self.s.options.share_checks && self.s.options.borrow_registers)
            || self.s.form != Form::Normal
        {
            return;
        }
        let code = self.block.instructions.iter().enumerate();
        if code
            .clone()
            .filter(|(_, i)| i.reference.is_some())
            .nth(2)
            .is_none()
        {
            return; // too few to come back to one
        }
        let mut references = std::mem::take(&mut self.r.references);
        references.clear();
        references.extend(code.filter_map(|(at, i)| Some((at, i.reference?))));
        self.pin = self.best_pin(&references);
        self.r.references = references;
    }

    fn best_pin(&self, references: &[(usize, Reference)]) -> Option<Pin> {
        if !comes_back(references) {
            return None;
        }
        let code = &self.block.instructions;
        let used = code.iter().fold(0, |used, i| used | i.uses);
        let register = CANDIDATES.into_iter().find(|r| used & 1 << r == 0)?;
        let best = (0..references.len())
            .filter_map(|n| self.span(references, n, register))
            .max_by_key(|(gain, pin)| (*gain, std::cmp::Reverse(pin.first)))?;
        Some(best.1)
    }

    /// The stretch of code and memory for which the base of the `n`-th reference could be held, and how often code comes back.
    fn span(
        &self,
        references: &[(usize, Reference)],
        n: usize,
        register: Reg,
    ) -> Option<(usize, Pin)> {
        let (first, r) = references[n];
        let earlier = n.checked_sub(1).map(|m| references[m].1.root);
        if earlier == Some(r.root) {
            return None; // the earlier one begins a longer span
        }
        let mut stretch = Stretch::of(&r)?;
        let mut run = Run::anywhere(&r);
        let (mut last, mut gain, mut away) = (first, 0, false);
        for (at, i) in self.block.instructions.iter().enumerate().skip(first) {
            match i.reference {
                Some(other) if run.is_off(&other) => {
                    let Some(longer) = stretch.with(&run, &other) else {
                        break;
                    };
                    stretch = longer;
                    gain += usize::from(away);
                    (last, away) = (at, false);
                }
                Some(_) => away = true,
                None => away |= i.class.checks(),
            }
            if !run.follow(i) {
                break;
            }
        }
        let pin = Pin {
            register,
            first,
            last,
            stretch,
        };
        (gain >= LEAST_RETURNS).then_some((gain, pin))
    }

    /// The stretch that the check at this instruction is to cover where it begins to hold its base.
    pub(super) fn pinned_stretch(&self) -> Option<Stretch> {
        self.pin
            .filter(|pin| pin.first == self.at)
            .map(|pin| pin.stretch)
    }

    /// Borrows the register for the address in S0 where the plan says so.
    pub(super) fn begin_pin(&mut self, run: Run) {
        let Some(pin) = self.pin.filter(|pin| pin.first == self.at) else {
            return;
        };
        let a = self.asm();
        a.store(ctx::PINNED, pin.register);
        a.mov(pin.register, S0);
        self.pinned = Some(Pinned {
            register: pin.register,
            run,
            last: pin.last,
        });
        self.out.pins += 1;
        let i = &self.block.instructions[self.at];
        self.boundary(i);
    }

    /// Follows an instruction; gives the register back after the last access.
    pub(super) fn follow_pin(&mut self, i: &GuestInstruction) {
        let at = self.at;
        let Some(pinned) = &mut self.pinned else {
            return;
        };
        if at >= pinned.last || !pinned.run.follow(i) {
            self.unpin();
        }
    }

    /// Gives a borrowed register back. No flag changes.
    pub(super) fn unpin(&mut self) {
        if let Some(pinned) = self.pinned.take() {
            self.asm().load(pinned.register, ctx::PINNED);
        }
    }

    /// The register that is borrowed now.
    pub(super) fn borrowed(&self) -> Option<Reg> {
        self.pinned.map(|pinned| pinned.register)
    }
}

/// True where code comes back to a base that it has left.
fn comes_back(references: &[(usize, Reference)]) -> bool {
    let root = |n: usize| references[n].1.root;
    (2..references.len()).any(|n| root(n) != root(n - 1) && (0..n - 1).any(|m| root(m) == root(n)))
}

/// A register by its number, 64 bits wide.
pub(super) fn wide(r: Reg) -> Register {
    Register::RAX + u32::from(r)
}
