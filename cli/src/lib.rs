//! What the `doppel` command is made of.

pub mod args;
pub mod assemble;
pub mod devices;
pub mod domain;
pub mod explain;
pub mod guest;
pub mod host_error;
pub mod image;
mod out_of_memory_unsafe;
mod own_memory_unsafe;
pub mod run;
pub mod sandbox;
pub mod signals;
pub mod size;
pub mod terminal;
mod told_disk;
mod unblocked_unsafe;
mod warnings;
