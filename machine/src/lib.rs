//! One virtual machine: wiring, boot loaders, vCPU threads, lifecycle.

pub mod boot;
pub mod layout;
