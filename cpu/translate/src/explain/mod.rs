//! Guest instructions and their translation, side by side, with reasons: `doppel explain`.
//!
//! Problem: to see what the translator does to some code one would have to follow it through the frontend, liveness,
//! the sharing of checks and the rewriting; and which code is worth a look, only a run tells.
//! Idea: translation is a function of the guest's bytes and a few settings. So nothing is written down while a guest
//! runs but the bytes of each block and how often it ran ([`Profile`]); what is to be shown is translated once more,
//! without counters, and taken apart: `dissect` lays the host's instructions beside the guest's and gives them
//! labels, `why` finds the steps in them and says what each is for, `slots` names what they reach through the GS base.
//! The reasons are read off the code and the translator's own tables, so they cannot tell of a check that was not emitted.
//! Cost: none where nobody observes. A profile costs four instructions a block and the bytes of its code; a [`PerfMap`] a line of text
//! a block.

mod dissect;
mod observe;
mod perf_map;
mod profile;
mod sample;
mod slots;
mod symbols;
mod text;
mod why;

pub(crate) use dissect::format;
pub use observe::Observers;
pub use perf_map::PerfMap;
pub use profile::{Profile, Selection};
pub use sample::{ExplainError, Sample};
pub use symbols::Symbols;
