//! Code that is explained without a guest.

use std::fmt::Write;

use doppel_memory::{PAGE_MASK, PAGE_SIZE, Privilege};
use doppel_x86::HiddenInstructions;

use super::dissect::{Dissected, Origin};
use super::{Symbols, text};
use crate::blocks::Form;
use crate::engine::TranslateOptions;
use crate::frontend::Simd;
use crate::narrow::Mode;
use crate::rewrite::Base;

/// Bytes of code, and where they are meant to stand.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The code.
    pub bytes: &'a [u8],
    /// Linear address of its first byte.
    pub address: u64,
    /// It runs at CPL 3, not 0.
    pub user: bool,
    /// What the guest's processor does not have.
    pub hidden: HiddenInstructions,
}

/// Why code cannot be explained.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExplainError {
    /// There is none.
    #[error("no bytes of code are given")]
    Empty,
    /// It does not end where an instruction ends.
    #[error("the instruction at {0:#x} has more bytes than are given")]
    Incomplete(u64),
}

impl Sample<'_> {
    /// The listing of the blocks that the bytes make up, one after the other, as they are translated where all
    /// vector instructions may be used.
    pub fn explain(
        &self,
        options: &TranslateOptions,
        symbols: &Symbols,
    ) -> Result<String, ExplainError> {
        if self.bytes.is_empty() {
            return Err(ExplainError::Empty);
        }
        let mut out = String::new();
        let (mut at, mut privilege) = (0, Privilege::Supervisor as u8);
        if self.user {
            privilege = Privilege::User as u8;
        }
        while at < self.bytes.len() {
            let linear = self.address.wrapping_add(at as u64);
            let origin = self.origin(at, linear, privilege);
            let block = Dissected::new(&origin, options).ok_or(ExplainError::Incomplete(linear))?;
            at += usize::from(block.guest.end - block.guest.start);
            if block.code.exits.iter().any(|e| e.changes_mode) {
                // CLAC and STAC: between Supervisor and SupervisorAc.
                privilege = 3 - privilege;
            }
            let _ = writeln!(out, "{}", text::block(&origin, options, symbols, "", None));
        }
        Ok(out)
    }

    /// What the next block is made from: what is left of its page, or an instruction that straddles the page's end.
    fn origin(&self, at: usize, linear: u64, privilege: u8) -> Origin<'_> {
        let rest = &self.bytes[at..];
        let room = (PAGE_SIZE - (linear & PAGE_MASK)) as usize;
        let mut origin = Origin {
            linear,
            bytes: &rest[..room.min(rest.len())],
            privilege,
            simd: Simd::Avx512,
            mode: Mode::LONG,
            base: match self.user {
                true => Base::Dynamic,
                false => Base::Fixed(linear & !PAGE_MASK),
            },
            form: Form::Normal,
            straddler_follows: false,
            processor: self.hidden.into(),
        };
        if rest.len() > room && origin.decode(&TranslateOptions::default()).is_none() {
            origin.bytes = origin.first_of(rest);
        }
        origin
    }
}
