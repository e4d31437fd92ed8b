//! The conformance suite: one module per concern, every test on every engine.

mod alignment;
mod canonical;
mod counters;
mod cpu_models;
mod crossing;
mod debug;
mod exceptions;
mod extended_state;
mod hostile;
mod interrupt_returns;
mod interrupts;
mod la57;
mod legacy_modes;
mod monitor_wait;
mod paging;
mod privilege;
mod protection_keys;
mod segments;
mod self_modifying;
mod several_cpus;
mod strings;
mod system_calls;
mod tasks;
mod translations;
mod virtual_interrupts;
