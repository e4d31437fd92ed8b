//! User code in child processes, against what the processor and its architecture say.

mod calls;
mod hostile;
mod kicks;
mod lifetime;
mod rig;
mod state;
mod traps;
