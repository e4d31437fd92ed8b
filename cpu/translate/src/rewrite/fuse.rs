//! Comparisons beside their branches.
//!
//! Problem: the processor makes one operation of a comparison and the conditional branch right behind it, but the poll of a branch
//! backwards would stand between the two.
//! Idea: it stands before the comparison, as a part of that instruction.
//! Invariant: a kick finds the state of the comparison's beginning, and the monitor starts there again.
//! Cost: none.

use iced_x86::Mnemonic;

use super::*;

/// True where the processor takes an instruction and a conditional branch together.
fn fuses(i: &GuestInstruction) -> bool {
    use Mnemonic::*;
    let sets = matches!(
        i.decoded.mnemonic(),
        Cmp | Test | And | Add | Sub | Inc | Dec
    );
    sets && matches!(i.class, Class::Copy | Class::Memory { write: false, .. })
}

impl Work<'_> {
    /// The branch behind an instruction of the block that fuses with it.
    fn fused_branch(&self, at: usize) -> Option<&GuestInstruction> {
        let code = &self.block.instructions;
        let next = code.get(at + 1)?;
        let both = matches!(next.class, Class::Conditional) && fuses(&code[at]);
        (both && self.s.options.fuse).then_some(next)
    }

    /// True where the translation of an instruction of the block polls before it does anything else.
    pub(super) fn polls_first(&self, at: usize) -> bool {
        use Class::*;
        let Some(i) = self.block.instructions.get(at) else {
            return false;
        };
        match i.class {
            Serialize => true,
            Jump | Conditional | Counted | Call => self.may_close_cycle(i),
            _ => {
                let branch = self.fused_branch(at);
                branch.is_some_and(|branch| self.may_close_cycle(branch))
            }
        }
    }

    /// Polls for the branch that follows, where that is to stand right behind this instruction.
    pub(super) fn poll_early(&mut self) {
        let Some(branch) = self.fused_branch(self.at) else {
            return;
        };
        if self.may_close_cycle(branch) {
            self.end_residence();
            self.poll();
            self.polled = Some(self.at + 1);
            self.out.fused += 1;
        }
    }

    /// True where the poll of this branch was done before.
    pub(super) fn has_polled(&self) -> bool {
        self.polled == Some(self.at)
    }
}
