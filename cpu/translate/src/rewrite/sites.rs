//! What the monitor has to know of a block's code: its exits, its checks, which host address belongs to which instruction.

use crate::flags::FlagPlace;

use super::{BranchSite, Chained, RecipeId};

/// A way out of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExitSite {
    /// Where it goes, relative to the block's page.
    pub target: i64,
    /// Position of the displacement that linking patches; `None` where the exit is never linked.
    pub patch: Option<u32>,
    /// Position of the code that leaves to the monitor.
    pub stub: u32,
    /// Positions of a displacement, and of what it leads to while the exit is linked; else it leads to `stub`.
    pub gate: Option<(u32, u32)>,
    pub flags: FlagPlace,
    /// The instruction at the target is to be interpreted.
    pub interpret: bool,
    /// It jumps through this slot. Where user code does, it has turned the page: `target` counts from the new one.
    pub slot: Option<u32>,
    /// The next block is of another privilege (EFLAGS.AC changed); which, is known from this one.
    pub changes_mode: bool,
}

/// A TLB check.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AccessSite {
    /// Offset of the guest instruction in its page.
    pub offset: u16,
    /// What the check is for, from the address that it was given on.
    pub span: u16,
    pub write: bool,
    /// What the instruction itself accesses: so far from that address, and so many bytes; no bytes where it is all of the span, and the
    /// interpreter's where that is neither in one place in the host nor free of translated code.
    pub own: Part,
    /// The exit to the careful form, where others share the check.
    pub careful: Option<u32>,
    /// It is the explicit memory operand of an ordinary instruction.
    pub own_operand: bool,
    /// Position of the check.
    pub retry: u32,
    /// Position behind the check, where S0 is a host address.
    pub done: u32,
    pub flags: FlagPlace,
    /// A register whose value the guest finds in `pinned` (see `pin`).
    pub borrowed: Option<u8>,
}

/// A part of the bytes that a check is for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub from: u16,
    pub size: u8,
    pub write: bool,
    /// And any number of bytes behind them in the page: a repeated string instruction.
    pub repeats: bool,
}

/// From here on, host code belongs to this guest instruction and its flags are there.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Boundary {
    pub host: u32,
    pub guest: u16,
    pub flags: FlagPlace,
    /// As in [`AccessSite`].
    pub borrowed: Option<u8>,
}

/// The outcome of translating one block. Positions are relative to its first byte.
#[derive(Default, Debug)]
pub(crate) struct Translated {
    pub entry_registers: u32,
    pub entry_saved: u32,
    /// Where blocks enter that have the vector state loaded: past the question for it (see `thunk`).
    pub entry_simd: u32,
    /// It uses the vector state.
    pub simd: bool,
    pub exits: Vec<ExitSite>,
    pub branches: Vec<BranchSite>,
    pub recipes: Vec<Chained>,
    /// Boundaries, and exits that interpret, by their numbers in the block: where flags are lost, and how they come back.
    pub lost_at_boundaries: Vec<(u32, RecipeId)>,
    pub lost_at_exits: Vec<(u32, RecipeId)>,
    pub accesses: Vec<AccessSite>,
    /// Slots taken.
    pub slots: usize,
    /// Instructions that could not be encoded with another operand, so that they are interpreted.
    pub unencodable: u32,
    /// Instructions that the library encoded.
    pub encoded: u32,
    /// Registers borrowed for a base.
    pub pins: u32,
    /// Bases kept in memory.
    pub holds: u32,
    /// Accesses that needed no check of their own.
    pub shared: u32,
    /// Accesses through a window.
    pub windowed: u32,
    /// Checks that shift with RORX.
    pub rorx: u32,
    /// Comparisons that stand beside their branch since its poll stands before them.
    pub fused: u32,
    /// Saves and restores of the vector state.
    pub state_moves: u32,
    /// Where the last instruction's code ends and the stubs begin.
    pub body: u32,
    pub boundaries: Vec<Boundary>,
}

impl Translated {
    /// Makes it what it was at first, but for the buffers.
    pub fn clear(&mut self) {
        let Translated {
            exits,
            branches,
            recipes,
            lost_at_boundaries,
            lost_at_exits,
            accesses,
            boundaries,
            entry_registers,
            entry_saved,
            entry_simd,
            simd,
            slots,
            unencodable,
            encoded,
            pins,
            holds,
            shared,
            windowed,
            rorx,
            fused,
            state_moves,
            body,
        } = self;
        exits.clear();
        branches.clear();
        recipes.clear();
        lost_at_boundaries.clear();
        lost_at_exits.clear();
        accesses.clear();
        boundaries.clear();
        (*simd, *slots) = (false, 0);
        for n in [
            entry_registers,
            entry_saved,
            entry_simd,
            unencodable,
            encoded,
            pins,
            holds,
            shared,
            windowed,
            rorx,
            fused,
            state_moves,
            body,
        ] {
            *n = 0;
        }
    }
}

/// Numbers of the first sites of each kind in the block that is about to be translated.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FirstSites {
    pub exit: u32,
    pub access: u32,
    pub branch: u32,
}
