//! What an open image writes of its header and of its two upper tables, and when.
//!
//! **The header.** The tables of a hostile image may lead its guest there: the block of counts can be a piece of the disk, and a cluster whose count is 0 is
//! taken for the next write. A header names a backing file, which the next start opens with the user's rights. So the first cluster is
//! sealed when the image has been opened: nothing is written there but the numbers that the crate itself changes. What else such an image overwrites
//! is its own.
//!
//! **The tables.** The crate writes an entry of the L1 table, or of the refcount table, as soon as it has a place for the table that the entry names, and the
//! count of that place when the image is flushed. A process that is killed between would leave a table that counts as free, and
//! whoever writes next would write over it. So such entries are held here, and written when the counts have been. The crate has both tables in
//! memory and does not read them again.
//!
//! Invariant: what is held was entered in memory before it came here, so the next flush of the image writes its counts.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::header::{LEN_V2, field};

/// Bytes of an entry of either table.
pub(super) const ENTRY: usize = 8;

#[derive(Clone, Debug, Default)]
pub(super) struct Gate {
    state: Arc<Mutex<State>>,
    /// Held by who writes entries out, for another must not be told that his are before they are.
    writes_out: Arc<Mutex<()>>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes at the start that are the header's.
    sealed: u64,
    /// The L1 table and the refcount table.
    tables: [Range<u64>; 2],
    held: BTreeMap<u64, [u8; ENTRY]>,
}

/// What becomes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Write {
    /// It is made.
    Now,
    /// It is an entry of a table, to be given to [`Gate::hold`].
    Later,
    /// It is the numbers of the header, of which [`Gate::follow_header`] is told.
    OfHeader,
}

fn tables(head: &[u8]) -> Result<[Range<u64>; 2], String> {
    let (l1, l1_len) = (field(head, 40, 8)?, field(head, 36, 4)? * ENTRY as u64);
    let (counts, clusters) = (field(head, 48, 8)?, field(head, 56, 4)?);
    let counts_len = clusters << field(head, 20, 4)?.min(21);
    let range = |at: u64, len: u64| at..at.saturating_add(len);
    Ok([range(l1, l1_len), range(counts, counts_len)])
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The image with this header is open: from now on its first cluster is sealed.
    pub fn close(&self, head: &[u8], cluster: u64) -> Result<(), String> {
        let tables = tables(head)?;
        let mut state = self.state();
        (state.sealed, state.tables) = (cluster, tables);
        Ok(())
    }

    /// What becomes of a write of `len` bytes at `offset`. Of the header the crate writes what version 2 has, and no guest writes so few bytes.
    pub fn ask(&self, offset: u64, len: u64) -> io::Result<Write> {
        let state = self.state();
        if len == 0 || state.sealed == 0 {
            return Ok(Write::Now);
        }
        if offset < state.sealed {
            return match offset == 0 && len == LEN_V2 as u64 {
                true => Ok(Write::OfHeader),
                false => Err(io::Error::other(
                    "the image leads to its own header; repair it: qemu-img check -r all",
                )),
            };
        }
        let of_table = state.tables.iter().any(|table| table.contains(&offset));
        Ok(match of_table && len == ENTRY as u64 {
            true => Write::Later,
            false => Write::Now,
        })
    }

    /// Keeps an entry until its counts are written.
    pub fn hold(&self, offset: u64, entry: &[u8]) {
        if let Ok(entry) = entry.try_into() {
            self.state().held.insert(offset, entry);
        }
    }

    /// The header is written, and may name other tables, which were written as a whole.
    pub fn follow_header(&self, head: &[u8]) {
        let mut state = self.state();
        if let Ok(tables) = tables(head) {
            state.tables = tables.clone();
            let has_place = |at: &u64| tables.iter().any(|table| table.contains(at));
            state.held.retain(|at, _| has_place(at));
        }
    }

    /// Writes counts by `flush`, and then what is held by `write`. Where one of them fails, it is held as before.
    pub fn write_out(
        &self,
        flush: impl FnOnce() -> io::Result<()>,
        write: impl FnOnce(&BTreeMap<u64, [u8; ENTRY]>) -> io::Result<()>,
    ) -> io::Result<()> {
        let _alone = self
            .writes_out
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let held = self.state().held.clone();
        flush()?;
        if held.is_empty() {
            return Ok(());
        }
        write(&held)?;
        let still = |at: &u64, entry: &[u8; ENTRY]| held.get(at) != Some(entry);
        self.state().held.retain(|at, entry| still(at, entry));
        Ok(())
    }
}
