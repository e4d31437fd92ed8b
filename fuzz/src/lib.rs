//! Differential tests of the CPU engines: the host's processor is the oracle.
//!
//! Problem: an engine has thousands of instruction forms, and each can be wrong in a register, a flag, a byte of memory or
//! a fault. Idea: guest and host are the same instruction set, so the same user-level code can run on the bare
//! processor, from the same state, at the same linear addresses; then everything that a program can see must be
//! equal. Invariant: a case is a pure function of a seed and a number, so whatever is found can be run again.
//! Cost: a case takes some tens of microseconds, most of them the translator's.
//!
//! Reading order: [`layout`] and [`state`] (where code runs and from what), [`native_unsafe`] and [`guest`] (who runs it),
//! [`compare`], then [`program`], [`catalogue`], [`operands`] and [`generate`] (what runs), [`minimize`] and [`campaign`].
//! [`kernel`] does the same at system level, where an engine is compared with the interpreter.

pub mod campaign;
pub mod catalogue;
pub mod compare;
pub mod coverage;
pub mod features;
pub mod gadfly;
pub mod generate;
pub mod guest;
pub mod kernel;
pub mod layout;
pub mod limits;
pub mod minimize;
pub mod native_unsafe;
pub mod operands;
pub mod program;
pub mod random;
pub mod rig;
pub mod state;
pub mod time_unsafe;
pub mod trace;
pub mod watchdog;
pub mod xsave;
