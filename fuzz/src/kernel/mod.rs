//! Differential tests at system level: small generated kernels, run on the interpreter and on every other engine.
//!
//! Problem: what an engine makes of page tables, segments, privilege and faults depends on all of them together, and on
//! what it remembers from before. There is no bare processor to ask. Idea: a kernel is generated from a seed: random tables around a
//! fixed supervisor (`supervisor`), and steps of random code in a random context, kernel's or user's, 64-bit or narrower, that
//! run in a random order, several times each. Every exception, interrupt and system call is noted in the kernel's memory with all
//! registers. At the end the CPU's whole state and all of RAM must be what they are on the interpreter.
//! Invariant: a case is a pure function of seed and number, and nothing in it depends on time: interrupts come from ports.
//! What the manual leaves open is not generated: whoever changes a page table entry flushes what it may be known by.
//! Cost: a case takes about a millisecond on each engine, half of it to compare RAM.
//!
//! Reading order: [`layout`], [`supervisor`], [`steps`], [`write`] and the files of items ([`ordinary`], [`transfer`],
//! [`system`], [`narrow`], [`short`], [`encoded`], [`protected`], [`keys`]), [`image`], [`case`], [`machine`], [`trace`], [`stale`], [`compare`], [`campaign`], [`coverage`].

pub mod campaign;
pub mod case;
pub mod compare;
pub mod coverage;
pub mod encoded;
pub mod image;
pub mod keys;
pub mod kvm_unsafe;
pub mod layout;
pub mod machine;
pub mod narrow;
pub mod ordinary;
pub mod protected;
pub mod short;
pub mod stale;
pub mod steps;
pub mod supervisor;
pub mod supervisor32;
pub mod system;
pub mod trace;
pub mod transfer;
pub mod write;
