//! A block that counts for a profile how often each of its parts runs (see `explain`): one part from its beginning, one after each
//! branch in it that is not taken.

use super::*;

impl Work<'_> {
    /// Counts the part that begins after the instruction at hand, or at the block's beginning. S0 keeps what it may hold.
    pub(super) fn count_part(&mut self, begun: usize) {
        let Some(counters) = self.s.counters else {
            return;
        };
        let before = &self.block.instructions[..begun];
        let branches = before
            .iter()
            .filter(|i| matches!(i.class, Class::Conditional));
        let counter = counters + 8 * branches.count() as u64;
        let a = self.asm();
        a.store(ctx::SPILL, S0);
        a.mov_imm(S1, counter);
        a.load_mem(S0, S1, 0);
        a.lea(S0, S0, 1);
        a.store_mem(S1, 0, S0);
        a.load(S0, ctx::SPILL);
    }
}

/// How many instructions each part has.
pub(crate) fn parts(block: &GuestBlock) -> Vec<u64> {
    let parts = block
        .instructions
        .split_inclusive(|i| matches!(i.class, Class::Conditional));
    parts.map(|p| p.len() as u64).collect()
}
