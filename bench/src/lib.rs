//! What measurements share: the processor time of a process and of all that it started.

pub mod cpu;
