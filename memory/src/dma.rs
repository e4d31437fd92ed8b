//! Writes of devices (DMA): no way around the tracker of pages.
//!
//! Problem: a device that writes to guest RAM changes pages behind the back of the CPUs. A page becomes dirty, and where it holds
//! translated code the engines must hear of it; a write that nobody noted would leave them running what is no longer there.
//! Idea: `vm-memory` reports each write that goes through it to the *bitmap* of the region. [`DmaBitmap`] is a bitmap that keeps
//! nothing but passes the report on to the [`PageTracker`], so a device cannot forget it. What `vm-memory` does not do itself, reads
//! of a host file straight into the guest's pages, is in `dma_unsafe` and reports likewise.
//! Invariant: the report comes after the write and before anybody tells the guest of it.
//! Cost: a fence, and a look at one byte for each page written.

use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::PageTracker;
use crate::mapping_unsafe::Mapping;

/// Guest RAM as the crates of the `vm-memory` family see it. Every write through it is noted.
pub type GuestView = vm_memory::GuestMemoryMmap<DmaBitmap>;

/// A piece of guest RAM that the guest may change at any time. Every write through it is noted.
pub type GuestSlice<'a> = vm_memory::VolatileSlice<'a, DmaSlice<'a>>;

/// The bitmap of a region of guest RAM, and what keeps its memory alive.
#[derive(Debug)]
pub struct DmaBitmap {
    pub(crate) tracker: Arc<PageTracker>,
    /// Guest physical address of the region.
    pub(crate) start: u64,
    /// The region lies in here.
    pub(crate) _mapping: Arc<Mapping>,
}

impl<'a> WithBitmapSlice<'a> for DmaBitmap {
    type S = DmaSlice<'a>;
}

impl Bitmap for DmaBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.tracker
            .note_device_write(self.start + offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.tracker.is_dirty(self.start + offset as u64)
    }

    fn slice_at(&self, offset: usize) -> DmaSlice<'_> {
        DmaSlice {
            bitmap: self,
            offset,
        }
    }
}

/// The bitmap of a piece of a region.
#[derive(Clone, Copy, Debug)]
pub struct DmaSlice<'a> {
    bitmap: &'a DmaBitmap,
    offset: usize,
}

impl DmaSlice<'_> {
    /// The guest physical address at which the piece starts.
    pub fn address(&self) -> u64 {
        self.bitmap.start + self.offset as u64
    }
}

impl WithBitmapSlice<'_> for DmaSlice<'_> {
    type S = Self;
}

impl BitmapSlice for DmaSlice<'_> {}

impl Bitmap for DmaSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.bitmap.mark_dirty(self.offset + offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.dirty_at(self.offset + offset)
    }

    fn slice_at(&self, offset: usize) -> Self {
        DmaSlice {
            bitmap: self.bitmap,
            offset: self.offset + offset,
        }
    }
}

/// Reports that pieces of guest RAM were written, as they report it themselves, but for one fence.
pub(crate) fn note_written(pieces: &[GuestSlice<'_>]) {
    let tracker = |piece: &GuestSlice<'_>| Arc::as_ptr(&piece.bitmap().bitmap.tracker);
    for pieces in pieces.chunk_by(|a, b| tracker(a) == tracker(b)) {
        let ranges = pieces
            .iter()
            .map(|piece| (piece.bitmap().address(), piece.len() as u64));
        pieces[0].bitmap().bitmap.tracker.note_device_writes(ranges);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, Permissions};

    use crate::{GuestRam, HIGH_START, HOLE_START};

    #[test]
    fn every_way_to_write_through_the_view_is_noted() {
        let ram = GuestRam::new(5 << 30).unwrap();
        let cpu = ram.tracker().join();
        let at = HIGH_START + 0x5000;
        ram.tracker().add_code(at, 64, &cpu);
        cpu.take_requests();
        let told = || {
            let (requests, _) = cpu.take_requests();
            assert_eq!(requests.code, [(at, 1)].into());
        };
        let view = ram.view();
        let (page, inside) = (GuestAddress(at), GuestAddress(at + 8));
        view.write_obj(1u64, inside).unwrap();
        told();
        view.store(2u16, inside, Ordering::Release).unwrap();
        told();
        view.write_slice(&[3; 8], inside).unwrap();
        told();
        view.read_exact_volatile_from(inside, &mut [4u8; 8].as_slice(), 8)
            .unwrap();
        told();
        let slice = GuestMemoryBackend::get_slice(view, page, 0x1000).unwrap();
        slice.copy_from(&[5u8; 16]);
        told();
        slice
            .subslice(4, 8)
            .unwrap()
            .write_slice(&[6; 8], 0)
            .unwrap();
        slice.offset(8).unwrap().copy_from(&[7u8]);
        told();
        let slices = GuestMemory::get_slices(view, page, 0x1000, Permissions::Write).unwrap();
        slices.for_each(|s| s.unwrap().copy_from(&[8u8]));
        told();
        assert!(ram.tracker().is_dirty(at));
        view.write_obj(9u8, GuestAddress(at + 0x40)).unwrap();
        assert!(!cpu.has_requests(), "another granule");
    }

    #[test]
    fn a_write_over_several_pages_is_noted_in_each() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let cpu = ram.tracker().join();
        for page in [0x2000, 0x4000] {
            ram.tracker().add_code(page, 8, &cpu);
        }
        cpu.take_requests();
        let data = vec![1; 0x3000];
        ram.view().write_slice(&data, GuestAddress(0x1800)).unwrap();
        let (requests, _) = cpu.take_requests();
        assert!(requests.code.into_keys().eq([0x2000, 0x4000]));
        assert!((0x1..=0x4).all(|page| ram.tracker().is_dirty(page << 12)));
        assert!(!ram.tracker().is_dirty(0x5000));
    }

    #[test]
    fn a_piece_knows_its_address() {
        let ram = GuestRam::new(5 << 30).unwrap();
        let slice =
            GuestMemoryBackend::get_slice(ram.view(), GuestAddress(HIGH_START + 0x5000), 0x100);
        let piece = slice.unwrap().offset(0x20).unwrap().subslice(3, 8).unwrap();
        assert_eq!(piece.bitmap().address(), HIGH_START + 0x5023);
    }

    #[test]
    fn another_process_maps_the_same_memory() {
        let ram = GuestRam::with_backing(4 << 30, crate::Backing::Memfd).unwrap();
        let file = || ram.file().unwrap().try_clone().unwrap();
        let other = GuestRam::of_file(4 << 30, file()).unwrap();
        for at in [0x1000, HIGH_START + 0x2000] {
            other.write_from_device(at, b"same");
            assert_eq!(ram.load::<u32>(at), Some(u32::from_le_bytes(*b"same")));
        }
        assert!(GuestRam::of_file(5 << 30, file()).is_err(), "too short");
    }

    #[test]
    fn a_clone_of_the_view_keeps_the_memory() {
        let ram = GuestRam::new(5 << 30).unwrap();
        let view = ram.view().clone();
        drop(ram);
        view.write_obj(7u32, GuestAddress(HOLE_START - 4)).unwrap();
        let mut kept = [0; 4];
        view.read_slice(&mut kept, GuestAddress(HOLE_START - 4))
            .unwrap();
        assert_eq!(kept, [7, 0, 0, 0]);
    }
}
