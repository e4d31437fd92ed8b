//! The conformance suite: one module per concern, every test on every engine.

mod exceptions;
mod paging;
