//! Same-ISA binary translation: guest code becomes host code of the same instruction set.
//!
//! Problem: without hardware virtualization the guest's kernel cannot run on the processor as it is: some of its instructions would act on the
//! real machine, others (`popf`, `sgdt`, …) would silently do the wrong thing, and every address means something else.
//! Idea: guest and host speak the same language, so nearly every instruction is copied; only memory operands, branches
//! and sensitive instructions are rewritten. There is no intermediate representation.
//!
//! Reading order: `frontend` (guest bytes → decoded block), `classify` (what an instruction is), `flags` (liveness), `rewrite` (block → host code), `asm`,
//! `thunk` (the way in and out), `blocks` (cache, links, self-modifying code), `engine` (the loop), `enter_unsafe` (signals).
//! docs/translate.md explains the whole.

mod access;
mod asm;
mod blocks;
mod cache_unsafe;
mod classify;
mod code_map;
mod code_pages;
mod context;
mod context_unsafe;
mod engine;
mod enter_unsafe;
pub mod explain;
mod flags;
mod frontend;
mod huge_unsafe;
mod interrupt_return;
mod jump_cache;
mod lookup;
mod mirror_unsafe;
mod narrow;
mod not_canonical;
mod ordinary;
mod recipe;
mod recipes;
mod records;
mod rewrite;
mod shared;
mod slot_links;
mod spaces;
mod stats;
mod table_unsafe;
mod thunk;
mod translator;
mod window;
mod x87_pointers;

pub use engine::{Switch, Translate, TranslateError, TranslateOptions, supported};
pub use shared::SharedCode;
