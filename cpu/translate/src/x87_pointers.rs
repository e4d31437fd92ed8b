//! The addresses of the last x87 instruction and of its operand, as the guest may be told them.
//!
//! Problem: the processor notes both (FIP and FDP) and XSAVE stores them; in translated code they are addresses of the host, in the code cache and in
//! its mapping of guest RAM. A program would find addresses there that are not its own, and learn where the monitor's memory is.
//! Idea: they are looked at wherever the state can come to memory that the guest reads: after translated code was left, when all of it is in the CPU's
//! area, from which the interpreter saves and children load; and behind an XSAVE in translated code, which is left to the interpreter where FIP lies in
//! the code cache. FIP becomes the address of the guest's instruction, or 0 where its translation is gone. Of FDP no guest address is known: it becomes 0.
//! Invariant: what a guest can save has no address of the code cache in FIP, and no FDP from translated code.
//! Cost: a load and a comparison each time that translated code is left, four instructions for an XSAVE.

use crate::translator::Translator;

impl Translator {
    /// Makes addresses of the guest of those that translated code left in the x87 state.
    pub(crate) fn settle_x87_pointers(&mut self) {
        let fip = self.context.cpu.fpu.fip();
        if !self.range.contains(&fip) {
            return;
        }
        self.hold();
        let place = self.code.blocks.at_host(fip);
        let rip = place.map_or(0, |p| self.rip_in(p.block, i64::from(p.boundary.guest)));
        let fpu = &mut self.context.cpu.fpu;
        fpu.set_fip(rip);
        fpu.set_fdp(0);
    }
}
