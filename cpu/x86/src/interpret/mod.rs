//! The reference interpreter: one instruction at a time, in every mode.

pub(crate) mod operand;
pub(crate) mod register;
pub(crate) mod stack;

/// Where execution goes on after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flow {
    /// At the next instruction.
    Next,
    /// At RIP, which the instruction has set.
    Done,
    /// At the same instruction: a repeated string instruction was interrupted, its registers are updated.
    Repeat,
    /// HLT was executed; RIP goes to the next instruction.
    Halt,
}
