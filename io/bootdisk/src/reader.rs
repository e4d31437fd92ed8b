//! Reads from a disk in larger pieces than file systems ask for, and not for ever.

use std::io::{self, IoSliceMut};
use std::sync::{Arc, Mutex, PoisonError};

use doppel_block::BlockBackend;

/// Bytes read at a time; files mostly lie in one piece.
const CHUNK: u64 = 256 << 10;
/// Chunks kept: a file and the tables that lead to it.
const CHUNKS: usize = 8;
/// Requests after which a search is given up. A kernel and an initial RAM disk of 100 MB take 25,000 blocks of 4 KiB.
const REQUESTS_MAX: u64 = 4_000_000;
/// Pieces read from the disk after which it is given up too, 4 GiB: each may be a cluster to be inflated.
const CHUNKS_READ_MAX: u64 = 16_384;

/// A disk to be read.
#[derive(Clone)]
pub struct Reader {
    disk: Arc<dyn BlockBackend>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    requests: u64,
    chunks_read: u64,
    /// By number, the last used at the end.
    chunks: Vec<(u64, Vec<u8>)>,
}

impl Reader {
    pub fn new(disk: Arc<dyn BlockBackend>) -> Reader {
        Reader {
            disk,
            state: Arc::default(),
        }
    }

    /// Bytes on the disk.
    pub fn len(&self) -> u64 {
        self.disk.len()
    }

    /// Fills `into` from `offset`.
    pub fn read(&self, mut offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.requests += 1;
        if state.requests > REQUESTS_MAX {
            return Err(in_circles());
        }
        while !into.is_empty() {
            let chunk = state.chunk(offset / CHUNK, &*self.disk)?;
            let at = (offset % CHUNK) as usize;
            let n = into.len().min(chunk.len().saturating_sub(at));
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            into[..n].copy_from_slice(&chunk[at..at + n]);
            into = &mut into[n..];
            offset += n as u64;
        }
        Ok(())
    }

    /// The bytes at `offset`.
    pub fn bytes<const N: usize>(&self, offset: u64) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes)?;
        Ok(bytes)
    }
}

fn in_circles() -> io::Error {
    io::Error::other("a damaged file system leads in circles")
}

impl State {
    fn chunk(&mut self, number: u64, disk: &dyn BlockBackend) -> io::Result<&[u8]> {
        if let Some(found) = self.chunks.iter().position(|(n, _)| *n == number) {
            let chunk = self.chunks.remove(found);
            self.chunks.push(chunk);
        } else {
            self.chunks_read += 1;
            if self.chunks_read > CHUNKS_READ_MAX {
                return Err(in_circles());
            }
            let start = number.saturating_mul(CHUNK);
            let len = disk.len().saturating_sub(start).min(CHUNK);
            let mut bytes = vec![0; len as usize];
            disk.read_at(start.min(disk.len()), &mut [IoSliceMut::new(&mut bytes)])?;
            if self.chunks.len() == CHUNKS {
                self.chunks.remove(0);
            }
            self.chunks.push((number, bytes));
        }
        Ok(self.chunks.last().map_or(&[], |(_, bytes)| bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use doppel_block::testing::MemoryDisk;
    use std::sync::RwLock;

    #[test]
    fn a_search_ends_after_so_many_pieces() {
        let chunks = CHUNKS as u64 + 1;
        let content = vec![0; (chunks * CHUNK) as usize];
        let reader = Reader::new(Arc::new(MemoryDisk(RwLock::new(content))));
        let mut reads = (0..).map(|n| reader.bytes::<8>(n % chunks * CHUNK));
        let failed = reads.position(|read| read.is_err());
        assert_eq!(failed, Some(CHUNKS_READ_MAX as usize));
    }
}
