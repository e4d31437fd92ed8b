//! For tests and campaigns of what reads disks.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::RwLock;

use crate::BlockBackend;

/// A disk in memory that is read alone. Its content may be exchanged; a read beyond it panics.
#[derive(Debug, Default)]
pub struct MemoryDisk(pub RwLock<Vec<u8>>);

impl BlockBackend for MemoryDisk {
    fn len(&self) -> u64 {
        self.0.read().expect("no panic before").len() as u64
    }
    fn read_only(&self) -> bool {
        true
    }
    fn read_at(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        let bytes = self.0.read().expect("no panic before");
        let mut at = offset as usize;
        for slice in into {
            let len = slice.len();
            slice.copy_from_slice(&bytes[at..at + len]);
            at += len;
        }
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[IoSlice<'_>]) -> io::Result<()> {
        panic!("a reader writes nothing")
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        panic!("a reader discards nothing")
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        panic!("a reader writes nothing")
    }
}
