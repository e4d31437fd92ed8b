//! What the `doppel` command is made of.

pub mod guest;
