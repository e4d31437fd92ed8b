//! Indirect branches whose target the first level of the jump cache does not know.
//!
//! Problem: a branch to an address that is not canonical faults at the branch, with RSP as it was; but its translation has moved
//! RSP, and has left the block, when the monitor sees the target.
//! Idea: the way from a miss to the look-up goes through a stub of the branch's own, out of line, which notes which branch it
//! was. With that the monitor takes RSP back and raises the fault of the branch. (The branch is not executed again from its beginning:
//! a CALL has pushed already, maybe onto the very operand that names its target.)
//! Invariant: `BRANCH` is the number of the branch that left with `EXIT_INDIRECT`, and an indirect branch has changed
//! nothing but RSP and what lies below it.
//! Cost: one store for a branch that misses the first level; nothing for one that does not.

use super::*;

/// An indirect branch, call or return.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BranchSite {
    /// Offset of the guest instruction in its page.
    pub offset: u16,
    /// What it adds to RSP.
    pub moves_rsp: i32,
    /// Position of its stub.
    pub stub: u32,
}

impl Work<'_> {
    /// Lets a jump that missed go on to the look-up, by way of the stub of this branch.
    pub(super) fn miss(&mut self, miss: Fixup, cache: u8, i: &GuestInstruction) {
        let site = self.out.branches.len();
        self.out.branches.push(BranchSite {
            offset: i.offset,
            moves_rsp: moves_rsp(i),
            stub: 0,
        });
        self.stubs.push((miss, Stub::Lookup { site, cache }));
    }

    pub(super) fn lookup_stub(&mut self, site: usize, cache: u8) {
        self.out.branches[site].stub = self.r.asm.pos() as u32;
        let number = self.first.branch + site as u32;
        let lookup = self.s.thunks.lookup[usize::from(cache)];
        self.asm().store_imm32(ctx::BRANCH, number);
        self.asm().jmp_to(lookup);
    }
}

fn moves_rsp(i: &GuestInstruction) -> i32 {
    let released = match i.decoded.op_count() {
        0 => 0,
        _ => i32::from(i.decoded.immediate16()),
    };
    match i.class {
        Class::CallIndirect => -8,
        Class::Return => 8 + released,
        _ => 0,
    }
}
