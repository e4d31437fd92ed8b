//! Writes of devices (DMA): no way around the tracker of pages.
//!
//! Problem: a device that writes to guest RAM changes pages behind the back of the CPUs. A page becomes dirty, and where it holds
//! translated code the engines must hear of it; a write that nobody noted would leave them running what is no longer there.
//! Idea: `vm-memory` reports each write that goes through it to the *bitmap* of the region. [`DmaBitmap`] is a bitmap that keeps
//! nothing but passes the report on to the [`PageTracker`], so a device cannot forget it. What `vm-memory` does not do itself, reads
//! of a host file straight into the guest's pages, is in `dma_unsafe` and reports likewise.
//! Invariant: the report comes after the write and before anybody tells the guest of it.
//! Cost: a look at one byte for each page written.

use std::fmt;
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::mapping_unsafe::Mapping;
use crate::{PAGE_MASK, PAGE_SIZE, PageTracker};

/// Guest RAM as the crates of the `vm-memory` family see it. Every write through it is noted.
pub type GuestView = vm_memory::GuestMemoryMmap<DmaBitmap>;

/// A piece of guest RAM that the guest may change at any time. Every write through it is noted.
pub type GuestSlice<'a> = vm_memory::VolatileSlice<'a, DmaSlice<'a>>;

type OnCode = Box<dyn Fn() + Send + Sync>;

/// Who hears of devices' writes.
#[derive(Clone)]
pub(crate) struct DmaWatch {
    tracker: Arc<PageTracker>,
    on_code: Arc<OnceLock<OnCode>>,
}

impl DmaWatch {
    pub fn new(tracker: Arc<PageTracker>) -> Self {
        let on_code = Arc::default();
        DmaWatch { tracker, on_code }
    }

    /// Says who is called after a write to translated code. The first call counts.
    pub fn on_code(&self, call: OnCode) {
        let _ = self.on_code.set(call);
    }

    /// Notes that `len` bytes at `gpa` were written.
    pub fn written(&self, gpa: u64, len: u64) {
        let (mut at, end) = (gpa, gpa.saturating_add(len));
        let mut touched = false;
        while at < end {
            let next = (at & !PAGE_MASK).saturating_add(PAGE_SIZE).min(end);
            touched |= self.tracker.note_device_write(at, next - at);
            at = next;
        }
        if let (true, Some(call)) = (touched, self.on_code.get()) {
            call();
        }
    }
}

impl fmt::Debug for DmaWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DmaWatch")
    }
}

/// The bitmap of a region of guest RAM, and what keeps its memory alive.
#[derive(Debug)]
pub struct DmaBitmap {
    pub(crate) watch: DmaWatch,
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
        self.watch.written(self.start + offset as u64, len as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.watch.tracker.is_dirty(self.start + offset as u64)
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, Permissions};

    use super::*;
    use crate::{GuestRam, HIGH_START, HOLE_START};

    fn calls_of(ram: &GuestRam) -> Arc<AtomicUsize> {
        let calls = Arc::new(AtomicUsize::new(0));
        let count = calls.clone();
        ram.on_code_written(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        calls
    }

    #[test]
    fn every_way_to_write_through_the_view_is_noted() {
        let ram = GuestRam::new(5 << 30).unwrap();
        let calls = calls_of(&ram);
        let at = HIGH_START + 0x5000;
        ram.tracker().add_code(at, 64);
        let view = ram.view();
        let (page, inside) = (GuestAddress(at), GuestAddress(at + 8));
        view.write_obj(1u64, inside).unwrap();
        view.store(2u16, inside, Ordering::Release).unwrap();
        view.write_slice(&[3; 8], inside).unwrap();
        view.read_exact_volatile_from(inside, &mut [4u8; 8].as_slice(), 8)
            .unwrap();
        let slice = GuestMemoryBackend::get_slice(view, page, 0x1000).unwrap();
        slice.copy_from(&[5u8; 16]);
        slice.subslice(4, 8).unwrap().write_slice(&[6; 8], 0).unwrap();
        slice.offset(8).unwrap().copy_from(&[7u8]);
        let slices = GuestMemory::get_slices(view, page, 0x1000, Permissions::Write).unwrap();
        slices.for_each(|s| s.unwrap().copy_from(&[8u8]));
        assert_eq!(calls.load(Ordering::SeqCst), 8);
        assert!(ram.tracker().is_dirty(at));
        view.write_obj(9u8, GuestAddress(at + 0x40)).unwrap();
        assert_eq!(calls.load(Ordering::SeqCst), 8, "another granule");
    }

    #[test]
    fn a_write_over_several_pages_is_noted_in_each() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let calls = calls_of(&ram);
        let watch = ram.tracker().watch();
        for page in [0x2000, 0x4000] {
            ram.tracker().add_code(page, 8);
        }
        let data = vec![1; 0x3000];
        ram.view().write_slice(&data, GuestAddress(0x1800)).unwrap();
        assert!(watch.take().into_iter().eq([0x2000, 0x4000]));
        assert_eq!(calls.load(Ordering::SeqCst), 1);
        assert!((0x1..=0x4).all(|page| ram.tracker().is_dirty(page << 12)));
        assert!(!ram.tracker().is_dirty(0x5000));
    }

    #[test]
    fn a_clone_of_the_view_keeps_the_memory() {
        let ram = GuestRam::new(5 << 30).unwrap();
        let view = ram.view().clone();
        drop(ram);
        view.write_obj(7u32, GuestAddress(HOLE_START - 4)).unwrap();
        let mut kept = [0; 4];
        view.read_slice(&mut kept, GuestAddress(HOLE_START - 4)).unwrap();
        assert_eq!(kept, [7, 0, 0, 0]);
    }
}
