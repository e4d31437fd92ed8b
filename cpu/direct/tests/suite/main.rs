//! User code in child processes, against what the processor and its architecture say.

mod rig;
mod state;
