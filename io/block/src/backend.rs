//! The seam between a block device and the host: a disk as a row of bytes.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use doppel_memory::{GuestRam, GuestSlice};

use crate::guest::{Pieces, gather, guest_len, scatter};

/// Bytes in a sector, the unit in which disks tell their size.
pub const SECTOR: u64 = 512;

/// A disk of the guest. Calls block the thread that makes them and may come from many threads at once; between requests that overlap
/// in time nothing is promised, as on hardware.
///
/// Ranges outside of the disk are an error of kind `InvalidInput`, writes to a disk that is read-only one of kind `PermissionDenied`.
/// After an error the range that was asked for may be read or written in part; the disk stays usable.
pub trait BlockBackend: Send + Sync {
    /// Bytes on the disk, a multiple of [`SECTOR`]. It never changes.
    fn len(&self) -> u64;

    /// Whether the disk has no bytes at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many processes that serve the disk followed the first; none where it has no process of its own.
    fn restarts(&self) -> Arc<AtomicU64> {
        Arc::default()
    }

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Fills all of `into` from `offset` (bytes).
    fn read_at(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()>;

    /// Writes all of `from` at `offset` (bytes). It is durable only after a [`BlockBackend::flush`] that starts later.
    fn write_at(&self, offset: u64, from: &[IoSlice<'_>]) -> io::Result<()>;

    /// Fills guest RAM from `offset`. The guest may change the bytes meanwhile, so a back-end that cannot hand their addresses to
    /// the host's kernel copies them; this does.
    fn read_to_guest(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
        in_pieces(offset, into, |at, bytes, pieces| {
            self.read_at(at, &mut [IoSliceMut::new(bytes)])?;
            scatter(bytes, pieces);
            Ok(())
        })
    }

    /// Fills guest RAM from `offset` if that needs no waiting for the host's disk; `None`, with the RAM in any state, if it does.
    fn try_read_to_guest(&self, _offset: u64, _into: &[GuestSlice<'_>]) -> Option<io::Result<()>> {
        None
    }

    /// Writes guest RAM at `offset`, as [`BlockBackend::write_at`] does.
    fn write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        in_pieces(offset, from, |at, bytes, pieces| {
            gather(pieces, bytes);
            self.write_at(at, &[IoSlice::new(bytes)])
        })
    }

    /// Writes guest RAM at `offset` if that seldom waits, so that a thread that has other requests may call it; `None`, with some of
    /// it written perhaps, if not.
    fn try_write_from_guest(
        &self,
        _offset: u64,
        _from: &[GuestSlice<'_>],
    ) -> Option<io::Result<()>> {
        None
    }

    /// Hands what this process keeps of writes that are complete to the host, so that the end of the process loses nothing.
    fn settle(&self) -> io::Result<()> {
        Ok(())
    }

    /// Guest RAM is in this memory from now on, or in none. Called before any request with pieces of it.
    fn use_memory(&self, _ram: Option<&GuestRam>) -> io::Result<()> {
        Ok(())
    }

    /// Makes all writes that are complete durable, against loss of power too.
    fn flush(&self) -> io::Result<()>;

    /// Says that `len` bytes at `offset` are of no use any more. Afterwards they read as before or as zeros. A back-end that
    /// cannot give storage back does nothing.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Makes `len` bytes at `offset` zeros; `may_unmap` allows that their storage is given back.
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
}

/// Guest RAM is copied so many bytes at a time.
const BOUNCE: usize = 256 << 10;

/// Calls `each` with an offset, a buffer, and the pieces of guest RAM that belong there, at most [`BOUNCE`] bytes.
fn in_pieces(
    mut offset: u64,
    slices: &[GuestSlice<'_>],
    mut each: impl FnMut(u64, &mut [u8], &[GuestSlice<'_>]) -> io::Result<()>,
) -> io::Result<()> {
    let len = usize::try_from(guest_len(slices)).unwrap_or(usize::MAX);
    let mut buffer = vec![0; BOUNCE.min(len)];
    let mut pieces = Pieces::new(slices);
    loop {
        let now = pieces.take(BOUNCE as u64);
        let len = guest_len(&now);
        if len == 0 {
            return Ok(());
        }
        each(offset, &mut buffer[..len as usize], &now)?;
        offset += len;
    }
}

/// What a call that must not wait has to say: `None` where it would have had to.
pub(crate) fn unless_it_waits(result: io::Result<()>) -> Option<io::Result<()>> {
    match result {
        // Or a host that knows no such call.
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Unsupported
            ) =>
        {
            None
        }
        result => Some(result),
    }
}

/// An error unless `len` bytes at `offset` are on a disk of `size` bytes.
pub(crate) fn check_range(offset: u64, len: u64, size: u64) -> io::Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "beyond the end of the disk",
        )),
    }
}

/// The error for a write to a disk that is read-only.
pub(crate) fn check_writable(backend: &impl BlockBackend) -> io::Result<()> {
    if backend.read_only() {
        let kind = io::ErrorKind::PermissionDenied;
        return Err(io::Error::new(kind, "the disk is read-only"));
    }
    Ok(())
}

/// Bytes that slices have room for.
pub(crate) fn reads_len(slices: &[IoSliceMut<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

/// Bytes in slices.
pub(crate) fn writes_len(slices: &[IoSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}
