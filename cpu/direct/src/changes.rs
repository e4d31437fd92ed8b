//! Changes of a child's mappings, as few as will do.

use doppel_memory::PAGE_SIZE;

use crate::change::Change;
use crate::shadow::Entry;

/// Changes that a list has room for between two runs of a child. Each of a machine's children has a list, and hardly one run has more.
const ROOM: usize = 16;

/// A list of changes; one that goes on where the last one ends becomes part of it.
#[derive(Clone, Debug, Default)]
pub struct Changes(Vec<Change>);

impl Changes {
    /// In order.
    pub fn list(&self) -> &[Change] {
        &self.0
    }

    /// Forgets all, and gives back what many changes at once took.
    pub fn clear(&mut self) {
        self.0.clear();
        self.0.shrink_to(ROOM);
    }

    /// Maps a page that lies at `offset` in the file.
    pub fn map(&mut self, linear: u64, offset: u64, entry: Entry) {
        let (w, x) = (entry.may_write(), entry.may_execute());
        if let Some(Change::Map {
            at,
            offset: first,
            len,
            write,
            execute,
            ..
        }) = self.0.last_mut()
            && (*at + *len, *first + *len, *write, *execute) == (linear, offset, w, x)
        {
            *len += PAGE_SIZE;
            return;
        }
        self.0.push(Change::Map {
            at: linear,
            offset,
            len: PAGE_SIZE,
            write: w,
            execute: x,
            populate: true,
        });
    }

    /// Maps a patched copy of a page of code, at this offset of its file.
    pub fn map_patched(&mut self, linear: u64, offset: u64) {
        self.0.push(Change::MapPatched { at: linear, offset });
    }

    /// Unmaps a page.
    pub fn unmap(&mut self, linear: u64) {
        if let Some(Change::Unmap { at, len }) = self.0.last_mut()
            && *at + *len == linear
        {
            *len += PAGE_SIZE;
            return;
        }
        self.unmap_range(linear, PAGE_SIZE);
    }

    /// Unmaps so many bytes.
    pub fn unmap_range(&mut self, at: u64, len: u64) {
        self.0.push(Change::Unmap { at, len });
    }

    /// Gives a page the permissions of its entry.
    pub fn protect(&mut self, linear: u64, entry: Entry) {
        let (w, x) = (entry.may_write(), entry.may_execute());
        if let Some(Change::Protect {
            at,
            len,
            write,
            execute,
        }) = self.0.last_mut()
            && (*at + *len, *write, *execute) == (linear, w, x)
        {
            *len += PAGE_SIZE;
            return;
        }
        self.0.push(Change::Protect {
            at: linear,
            len: PAGE_SIZE,
            write: w,
            execute: x,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_changes_leave_nothing_behind() {
        let mut c = Changes::default();
        for page in 0..1000 {
            c.unmap(page * 2 * PAGE_SIZE);
        }
        c.clear();
        assert!(c.list().is_empty());
        assert!(c.0.capacity() <= ROOM, "{}", c.0.capacity());
    }

    #[test]
    fn neighbours_become_one_change() {
        let mut c = Changes::default();
        let w = Entry::new(0).write(true);
        c.map(0x1000, 0x8000, w);
        c.map(0x2000, 0x9000, w);
        c.map(0x3000, 0x9000, w);
        c.map(0x4000, 0xa000, Entry::new(0));
        c.unmap(0x7000);
        c.unmap(0x8000);
        c.protect(0x9000, w);
        c.protect(0xa000, w);
        c.protect(0xb000, Entry::new(0));
        let lens: Vec<_> = c
            .list()
            .iter()
            .map(|c| match c {
                Change::Map { len, .. }
                | Change::Unmap { len, .. }
                | Change::Protect { len, .. } => len / PAGE_SIZE,
                Change::MapPatched { .. } => 1,
            })
            .collect();
        assert_eq!(lens, [2, 1, 1, 2, 2, 1]);
    }
}
