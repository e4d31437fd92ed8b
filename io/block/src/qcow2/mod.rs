//! qcow2 images, through the crate `imago`.
//!
//! An image maps clusters (64 KiB, usually) of the disk to clusters of its file by two levels of tables, L1 and L2, and counts references
//! to each cluster of the file. What is not mapped comes from the backing file, another image that is only read, or is zeros.
//!
//! **Order.** A write into a cluster that is mapped goes straight to the file. One that needs a new cluster takes one (its reference count
//! in memory goes up), writes the data, and then enters the mapping into the L2 table in memory. [`BlockBackend::flush`] writes tables out in
//! the order that keeps the file sound at every moment (counts before mappings where clusters were taken, the other way round where they were
//! freed) and syncs; the upper tables come last (`gate`). A process that is killed between leaves at worst clusters that are counted and not used ("leaked"), which
//! `qemu-img check -r leaks` gives back.
//!
//! **Guest RAM.** Where the disk is mapped to a piece of a file as it is, whichever image of the chain that file is, the host's kernel reads and
//! writes guest RAM there. What is compressed, or has no place yet, goes through the crate and a buffer.
//!
//! **Threads.** Reads and writes run in parallel; only writes that need new clusters of one L2 table (512 MiB of disk) wait for each other.
//! What takes mappings away (discard) has the image for itself, since a request might be on its way to a cluster that it would free.

mod chain;
mod gate;
mod header;
mod refcounts;
mod storage_unsafe;

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use doppel_memory::GuestSlice;
use imago::{FormatAccess, Mapping};

use crate::backend::{
    BlockBackend, SECTOR, check_range, check_writable, reads_len, unless_it_waits, writes_len,
};
use crate::file::HostFile;
use crate::guest::{Pieces, gather, guest_len, scatter, zero};
pub(crate) use chain::{Chain, create, create_over, open, open_over};
use gate::{ENTRY, Gate};
pub use header::Header;
use storage_unsafe::ImageFile;

/// Zeros are written so many bytes at a time to an image that has no zero clusters.
const ZEROS: &[u8] = &[0; 64 << 10];

/// Guest RAM that cannot be given to the host's kernel is copied so many bytes at a time.
const BOUNCE: u64 = 256 << 10;

/// Clusters that are discarded at a time: each may be a piece of the file of its own, and a disk may have billions.
const DISCARD_CLUSTERS: u64 = 64 << 10;

/// Whether a call may wait for the host's disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    Waits,
    /// An error of kind `WouldBlock` takes the place of waiting.
    AtOnce,
}

/// A qcow2 image and what is below it.
pub struct Qcow2 {
    image: RwLock<FormatAccess<ImageFile>>,
    file: Arc<HostFile>,
    gate: Gate,
    header: Header,
    backed: bool,
}

impl Qcow2 {
    fn new(chain: Chain, header: Header, gate: Gate) -> Qcow2 {
        Qcow2 {
            image: RwLock::new(chain.image),
            file: chain.file,
            gate,
            header,
            backed: chain.backing.is_some(),
        }
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<ImageFile>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<ImageFile>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared_with(
        &self,
        patience: Patience,
    ) -> io::Result<RwLockReadGuard<'_, FormatAccess<ImageFile>>> {
        match (patience, self.image.try_read()) {
            (Patience::Waits, _) => Ok(self.shared()),
            (Patience::AtOnce, Ok(image)) => Ok(image),
            (Patience::AtOnce, Err(_)) => Err(ErrorKind::WouldBlock.into()),
        }
    }

    fn read_guest(
        &self,
        mut offset: u64,
        into: &[GuestSlice<'_>],
        patience: Patience,
    ) -> io::Result<()> {
        let mut left = guest_len(into);
        check_range(offset, left, self.len())?;
        let image = self.shared_with(patience)?;
        let mut pieces = Pieces::new(into);
        while left > 0 {
            let (mapping, len) = image.get_mapping(offset, left)?;
            // The disk's size may be rounded up to a sector, and zeros are there.
            let len = if len == 0 { left } else { len.min(left) };
            let now = pieces.take(len);
            match mapping {
                Mapping::Raw {
                    storage, offset, ..
                } => {
                    storage.read_to_guest(offset, &now, patience == Patience::AtOnce)?;
                }
                Mapping::Zero { .. } | Mapping::Eof { .. } => zero(&now),
                _ if patience == Patience::AtOnce => return Err(ErrorKind::WouldBlock.into()),
                _ => read_copied(&image, offset, &now)?,
            }
            (offset, left) = (offset + len, left - len);
        }
        Ok(())
    }

    fn write_guest(
        &self,
        mut offset: u64,
        from: &[GuestSlice<'_>],
        patience: Patience,
    ) -> io::Result<()> {
        check_writable(self)?;
        let mut left = guest_len(from);
        check_range(offset, left, self.len())?;
        let image = self.shared_with(patience)?;
        let mut pieces = Pieces::new(from);
        while left > 0 {
            let (mapping, len) = image.get_mapping(offset, left)?;
            let len = if len == 0 { left } else { len.min(left) };
            let now = pieces.take(len);
            match mapping {
                Mapping::Raw {
                    storage,
                    offset,
                    writable: true,
                    ..
                } => {
                    storage.write_from_guest(offset, &now)?;
                }
                _ if patience == Patience::AtOnce => return Err(ErrorKind::WouldBlock.into()),
                _ => write_copied(&image, offset, &now)?,
            }
            (offset, left) = (offset + len, left - len);
        }
        Ok(())
    }

    /// Version 2 has no zero clusters: a mapping can only be taken away, and then the backing file shows.
    fn has_zero_clusters(&self) -> bool {
        self.header.version >= 3
    }

    /// Takes mappings away and gives their storage back to the host. With `zero`, edges that are no whole clusters become zeros
    /// too.
    fn unmap(&self, mut offset: u64, len: u64, zero: bool) -> io::Result<()> {
        let (end, step) = (offset + len, DISCARD_CLUSTERS * self.header.cluster_size);
        while offset < end {
            let next = ((offset / step + 1) * step).min(end);
            self.unmap_some(offset, next - offset, zero)?;
            offset = next;
        }
        Ok(())
    }

    fn unmap_some(&self, offset: u64, len: u64, zero: bool) -> io::Result<()> {
        let mut image = self.alone();
        let freed = self.clusters_within(&image, offset, len)?;
        match (zero, self.has_zero_clusters()) {
            (true, _) => image.discard_to_zero(offset, len)?,
            (false, true) => image.discard_to_any(offset, len)?,
            (false, false) => image.discard_to_backing(offset, len)?,
        }
        // The tables on disk may still name these clusters. Who follows them after a crash finds zeros, which is right.
        for (offset, len) in freed {
            self.file.punch_hole(offset, len)?;
        }
        Ok(())
    }

    /// Pieces of the file, by offset and length, that hold whole clusters of a range of the disk and nothing else.
    fn clusters_within(
        &self,
        image: &FormatAccess<ImageFile>,
        offset: u64,
        len: u64,
    ) -> io::Result<Vec<(u64, u64)>> {
        let cluster = self.header.cluster_size;
        let mut at = offset.next_multiple_of(cluster);
        let end = (offset + len) / cluster * cluster;
        let mut pieces = Vec::new();
        while at < end {
            let (mapping, len) = image.get_mapping(at, end - at)?;
            if let Mapping::Raw {
                offset,
                writable: true,
                ..
            } = mapping
            {
                pieces.push((offset, len));
            }
            at += len.max(1);
        }
        Ok(pieces)
    }

    /// Writes tables out, counts first. With `sync` the counts are on the host's disk before what depends on them.
    fn write_tables(&self, sync: bool) -> io::Result<()> {
        let counts = || match sync {
            // A write that has its count and not its mapping yet would be in between.
            true => self.alone().flush(),
            false => self.shared().flush(),
        };
        let entries = |held: &BTreeMap<u64, [u8; ENTRY]>| {
            if sync {
                self.shared().sync()?;
            }
            let mut each = held.iter();
            each.try_for_each(|(at, entry)| self.file.write_at(*at, vec![IoSlice::new(entry)]))
        };
        self.gate.write_out(counts, entries)
    }

    fn write_zeros(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        while offset < end {
            let n = (end - offset).min(ZEROS.len() as u64);
            self.shared().write(&ZEROS[..n as usize], offset)?;
            offset += n;
        }
        Ok(())
    }
}

/// Reads through the crate.
fn read_copied(
    image: &FormatAccess<ImageFile>,
    mut offset: u64,
    into: &[GuestSlice<'_>],
) -> io::Result<()> {
    let mut buffer = vec![0; guest_len(into).min(BOUNCE) as usize];
    let mut pieces = Pieces::new(into);
    loop {
        let now = pieces.take(BOUNCE);
        let bytes = &mut buffer[..guest_len(&now) as usize];
        if bytes.is_empty() {
            return Ok(());
        }
        image.read(&mut *bytes, offset)?;
        scatter(bytes, &now);
        offset += bytes.len() as u64;
    }
}

/// Writes through the crate, which finds a place.
fn write_copied(
    image: &FormatAccess<ImageFile>,
    mut offset: u64,
    from: &[GuestSlice<'_>],
) -> io::Result<()> {
    let mut buffer = vec![0; guest_len(from).min(BOUNCE) as usize];
    let mut pieces = Pieces::new(from);
    loop {
        let now = pieces.take(BOUNCE);
        let bytes = &mut buffer[..guest_len(&now) as usize];
        if bytes.is_empty() {
            return Ok(());
        }
        gather(&now, bytes);
        image.write(&*bytes, offset)?;
        offset += bytes.len() as u64;
    }
}

impl BlockBackend for Qcow2 {
    fn len(&self) -> u64 {
        self.header.size / SECTOR * SECTOR
    }

    fn read_only(&self) -> bool {
        !self.file.writable()
    }

    fn read_at(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        check_range(offset, reads_len(into), self.len())?;
        // The crate does not expect slices that are empty.
        let slices = into.iter_mut().filter(|slice| !slice.is_empty());
        let slices: Vec<_> = slices.map(|slice| IoSliceMut::new(slice)).collect();
        self.shared().readv(slices.into(), offset)
    }

    fn write_at(&self, offset: u64, from: &[IoSlice<'_>]) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, writes_len(from), self.len())?;
        let slices: Vec<_> = from
            .iter()
            .filter(|slice| !slice.is_empty())
            .copied()
            .collect();
        self.shared().writev(slices.into(), offset)
    }

    fn read_to_guest(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
        self.read_guest(offset, into, Patience::Waits)
    }

    fn try_read_to_guest(&self, offset: u64, into: &[GuestSlice<'_>]) -> Option<io::Result<()>> {
        unless_it_waits(self.read_guest(offset, into, Patience::AtOnce))
    }

    fn write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        self.write_guest(offset, from, Patience::Waits)
    }

    fn try_write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> Option<io::Result<()>> {
        unless_it_waits(self.write_guest(offset, from, Patience::AtOnce))
    }

    fn settle(&self) -> io::Result<()> {
        match self.read_only() {
            true => Ok(()),
            false => self.write_tables(false),
        }
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only() {
            return Ok(());
        }
        self.write_tables(true)?;
        self.shared().sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, len, self.len())?;
        match self.backed && !self.has_zero_clusters() {
            true => Ok(()),
            false => self.unmap(offset, len, false),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, len, self.len())?;
        match (self.has_zero_clusters(), may_unmap) {
            (true, true) => self.unmap(offset, len, true),
            // The crate looks at the edges before it takes them: a write to the rest of such a cluster must not come between.
            (true, false) => self.alone().write_zeroes(offset, len),
            (false, _) => self.write_zeros(offset, len),
        }
    }
}

impl Drop for Qcow2 {
    /// Who lets go of an image without a flush has been promised nothing; but what he wrote is there if the host takes it.
    fn drop(&mut self) {
        let _ = self.settle();
    }
}
