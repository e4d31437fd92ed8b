//! The conformance suite: one module per concern, every test on every engine.

mod crossing;
mod exceptions;
mod interrupts;
mod paging;
mod self_modifying;
mod translations;
