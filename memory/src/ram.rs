//! Guest physical RAM: its layout and checked access to it.
//!
//! Layout of a PC: RAM from 0 up to [`HOLE_START`], the hole for devices below 4 GiB, the rest of the
//! RAM from [`HIGH_START`]. The legacy VGA window [`VGA_HOLE`] is never RAM.

use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::ahead::{Ahead, Batches};
use crate::mapping_unsafe::{Mapping, vm_memory_view};
use crate::{GuestView, HostPtr, PAGE_MASK, PAGE_SIZE, PageTracker, Word};

/// Where RAM below 4 GiB ends at the latest.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on above the device hole.
pub const HIGH_START: u64 = 1 << 32;
/// The legacy VGA window, which is never RAM.
pub const VGA_HOLE: Range<u64> = 0xa_0000..0xc_0000;

/// Why guest RAM could not be made.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The size is out of range or not a whole number of pages.
    #[error(
        "guest memory of {0} bytes is not possible: give a multiple of 4 KiB from 1 MiB to 1 TiB"
    )]
    Size(u64),
    /// The host refused the memory.
    #[error("the host gives no memory for {0} bytes of guest RAM; ask for less with --memory: {1}")]
    Host(u64, std::io::Error),
    /// The `vm-memory` view could not be made.
    #[error("guest RAM layout: {0}")]
    View(String),
}

/// What guest RAM is made of on the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Memory of this process, in small pages.
    #[default]
    Anonymous,
    /// Memory of this process, in pages of 2 MiB where the host has them.
    HugePages,
    /// A memfd, which other processes can map.
    Memfd,
}

/// The guest's RAM, shared by every vCPU and device of a machine.
#[derive(Debug)]
pub struct GuestRam {
    view: GuestView,
    mapping: Arc<Mapping>,
    low: u64,
    high: u64,
    tracker: Arc<PageTracker>,
    /// What the host was asked for.
    /// What the host was asked for, or will be by the thread of `ahead`, and what it has given.
    asked: Batches,
    given: Arc<Batches>,
    ahead: OnceLock<Ahead>,
}

/// So much memory is asked of the host at the first access to any of it.
const BATCH: u64 = 64 << 10;

impl GuestRam {
    /// RAM of `size` bytes, zero filled; host memory is taken when it is first touched.
    pub fn new(size: u64) -> Result<Self, RamError> {
        Self::with_backing(size, Backing::default())
    }

    /// RAM that is made of what is said.
    pub fn with_backing(size: u64, backing: Backing) -> Result<Self, RamError> {
        Self::made(size, |end, pieces| Mapping::new(end, pieces, backing))
    }

    /// The RAM of a machine in another process, whose [`Self::file`] this is. Writes here are noted here only; the other process has to
    /// be told of them.
    pub fn of_file(size: u64, file: File) -> Result<Self, RamError> {
        Self::made(size, |end, pieces| Mapping::of_file(end, pieces, file))
    }

    fn made(
        size: u64,
        map: impl FnOnce(usize, &[(usize, usize)]) -> std::io::Result<Mapping>,
    ) -> Result<Self, RamError> {
        if !(1 << 20..=1 << 40).contains(&size) || size & PAGE_MASK != 0 {
            return Err(RamError::Size(size));
        }
        let low = size.min(HOLE_START);
        let high = size - low;
        let end = if high > 0 { HIGH_START + high } else { low };
        let mut pieces = vec![(0, low as usize)];
        if high > 0 {
            pieces.push((HIGH_START as usize, high as usize));
        }
        let mapping = map(end as usize, &pieces).map_err(|e| RamError::Host(size, e))?;
        let mapping = Arc::new(mapping);
        let tracker = Arc::new(PageTracker::new(end / PAGE_SIZE));
        let view_pieces: Vec<_> = pieces
            .iter()
            .map(|&(at, len)| (at as u64, at, len))
            .collect();
        let view = vm_memory_view(&mapping, &view_pieces, &tracker).map_err(RamError::View)?;
        Ok(GuestRam {
            view,
            mapping,
            low,
            high,
            tracker,
            asked: Batches::new(end.div_ceil(BATCH)),
            given: Arc::new(Batches::new(end.div_ceil(BATCH))),
            ahead: OnceLock::new(),
        })
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.low + self.high
    }

    /// The guest physical ranges that are RAM, in order (the VGA window counts as RAM's first piece here:
    /// the memory map that the guest sees leaves it out).
    pub fn ranges(&self) -> Vec<Range<u64>> {
        let mut ranges = vec![0..VGA_HOLE.start, VGA_HOLE.end..self.low];
        if self.high > 0 {
            ranges.push(HIGH_START..HIGH_START + self.high);
        }
        ranges
    }

    /// True where the byte at this guest physical address is RAM.
    #[inline]
    pub fn is_ram(&self, gpa: u64) -> bool {
        (gpa < self.low && !(VGA_HOLE.start..VGA_HOLE.end).contains(&gpa))
            || (gpa >= HIGH_START && gpa < HIGH_START + self.high)
    }

    /// A pointer to RAM at `gpa` with room up to the end of its page, or `None` where there is no RAM.
    #[inline]
    pub fn ptr(&self, gpa: u64) -> Option<HostPtr> {
        if !self.is_ram(gpa) {
            return None;
        }
        let room = (PAGE_SIZE - (gpa & PAGE_MASK)) as usize;
        Some(self.mapping.host_ptr(gpa as usize, room))
    }

    /// Says that the page will be accessed: the host is asked for its batch, once.
    #[inline]
    pub fn will_access(&self, gpa: u64) {
        if !self.given.has(gpa / BATCH) {
            self.first_access(gpa / BATCH);
        }
    }

    fn first_access(&self, batch: u64) {
        let asked = self.asked.has(batch);
        self.asked.set(batch);
        if let Some(ahead) = self.ahead.get().filter(|_| !asked) {
            let gpa = batch * BATCH;
            let end = match gpa < self.low {
                true => self.low,
                false => HIGH_START + self.high,
            };
            ahead.follow(&self.asked, batch, end / BATCH, BATCH);
        }
        self.populate(batch * BATCH, BATCH);
        // Whether all of it is RAM or not.
        self.given.set(batch);
    }

    /// From now on a thread asks the host for memory that the guest is likely to access next.
    pub fn ask_ahead(&self) -> std::io::Result<()> {
        let ahead = Ahead::start(self.mapping.clone(), self.given.clone(), BATCH)?;
        // Where there is one already, the new one ends.
        let _ = self.ahead.set(ahead);
        Ok(())
    }

    /// Has the host give what of these bytes is RAM now and not page by page when it is touched.
    pub fn populate(&self, gpa: u64, len: u64) {
        let end = gpa.saturating_add(len);
        for piece in [0..self.low, HIGH_START..HIGH_START + self.high] {
            let (from, to) = (gpa.max(piece.start), end.min(piece.end));
            if from < to {
                let from = from & !PAGE_MASK;
                self.mapping.populate(from as usize, (to - from) as usize);
                for batch in from.div_ceil(BATCH)..to / BATCH {
                    self.asked.set(batch);
                    self.given.set(batch);
                }
            }
        }
    }

    /// Gives the host back the pages that lie wholly in these bytes, as far as they are RAM; says how many bytes. They read as zeros
    /// afterwards, and take host memory again when they are accessed. To the CPUs it is a write by a device: see
    /// [`Self::write_from_device`].
    pub fn discard(&self, gpa: u64, len: u64) -> u64 {
        let end = gpa.saturating_add(len);
        let mut discarded = 0;
        for piece in self.ranges() {
            let from = gpa.max(piece.start).div_ceil(PAGE_SIZE);
            let to = end.min(piece.end) / PAGE_SIZE;
            if from < to {
                let (from, to) = (from * PAGE_SIZE, to * PAGE_SIZE);
                let len = to - from;
                let done = self.mapping.discard(from as usize, len as usize);
                self.forget_populated(from, to);
                self.tracker.note_device_write(from, len);
                discarded += done.map_or(0, |()| len);
            }
        }
        discarded
    }

    /// Batches that lie wholly in a range are asked for again when one of their pages is accessed.
    fn forget_populated(&self, from: u64, to: u64) {
        for batch in from.div_ceil(BATCH)..to / BATCH {
            self.asked.clear(batch);
            self.given.clear(batch);
        }
    }

    /// Bytes that the thread of [`Self::ask_ahead`] was told to ask for.
    pub fn ahead_bytes(&self) -> u64 {
        let bytes = |a: &Ahead| a.bytes.load(std::sync::atomic::Ordering::Relaxed);
        self.ahead.get().map_or(0, bytes)
    }

    /// Bytes that the host was asked for ahead of their use, about.
    pub fn populated_bytes(&self) -> u64 {
        self.asked.count() * BATCH
    }

    /// Loads a value that lies within one page.
    #[inline]
    pub fn load<T: Word>(&self, gpa: u64) -> Option<T> {
        self.ptr(gpa)
            .filter(|p| p.room() >= T::SIZE)
            .map(HostPtr::load)
    }

    /// Stores a value that lies within one page. Does not tell translators: use it for tables only
    /// they do not execute, or call [`PageTracker::mark_dirty`] and check for code yourself.
    #[inline]
    pub fn store<T: Word>(&self, gpa: u64, v: T) -> Option<()> {
        self.ptr(gpa)
            .filter(|p| p.room() >= T::SIZE)
            .map(|p| p.store(v))
    }

    /// A write by a device (DMA): what is no RAM is left out. The pages are dirty then, and every CPU that has translated what was
    /// there follows (see [`PageTracker::note_device_write`]). From any thread, under any lock.
    pub fn write_from_device(&self, gpa: u64, data: &[u8]) {
        let (mut at, mut data) = (gpa, data);
        while !data.is_empty() {
            let room = (PAGE_SIZE - (at & PAGE_MASK)) as usize;
            let (now, rest) = data.split_at(data.len().min(room));
            if let Some(p) = self.ptr(at) {
                p.write(now);
                self.tracker.note_device_write(at, now.len() as u64);
            }
            at = at.wrapping_add(now.len() as u64);
            data = rest;
        }
    }

    /// What a device has to call that wrote to RAM by itself (not through [`Self::view`], with a system call on a [`HostPtr`]), after
    /// the write and before it tells the guest of it. As [`Self::write_from_device`], but for the bytes.
    pub fn written_by_device(&self, gpa: u64, len: u64) {
        self.tracker.note_device_write(gpa, len);
    }

    /// What the pages hold (written pages, translated code).
    pub fn tracker(&self) -> &PageTracker {
        &self.tracker
    }

    /// The same memory as `vm-memory` sees it, for boot loaders and devices. Writes are noted as those of
    /// [`Self::write_from_device`].
    pub fn view(&self) -> &GuestView {
        &self.view
    }

    /// What it is made of.
    pub fn backing(&self) -> Backing {
        self.mapping.backing()
    }

    /// The memfd behind the RAM, if there is one: low RAM first, high RAM after it.
    pub fn file(&self) -> Option<&File> {
        self.mapping.file()
    }

    /// Where a byte of RAM lies in [`Self::file`].
    pub fn file_offset(&self, gpa: u64) -> Option<u64> {
        let in_file = match gpa < HIGH_START {
            true => gpa,
            false => self.low + (gpa - HIGH_START),
        };
        self.is_ram(gpa).then_some(in_file)
    }

    /// Host address of guest physical address 0; `host = base + gpa` for all RAM.
    pub fn host_base(&self) -> u64 {
        self.mapping.base().as_ptr() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_asked_for_ahead_and_changes_nothing() {
        let ram = GuestRam::new(5 << 30).unwrap();
        ram.ask_ahead().unwrap();
        for batch in 0..8 {
            ram.ptr(batch * BATCH).unwrap().write(&[7]);
            ram.will_access(batch * BATCH);
        }
        assert!(ram.ahead_bytes() >= 4 * BATCH, "{}", ram.ahead_bytes());
        assert_eq!(ram.load::<u8>(7 * BATCH), Some(7));
        assert_eq!(ram.load::<u8>(8 * BATCH), Some(0));
        let before = ram.ahead_bytes();
        for page in [
            HOLE_START - BATCH,
            HIGH_START,
            HIGH_START + (2 << 30) - BATCH,
        ] {
            ram.will_access(page);
        }
        assert_eq!(ram.ahead_bytes(), before, "no stream at the ends of RAM");
    }

    #[test]
    fn layout_leaves_the_holes_out() {
        let ram = GuestRam::new(5 << 30).unwrap();
        for (gpa, is) in [
            (0, true),
            (0x9_ffff, true),
            (0xa_0000, false),
            (0xb_ffff, false),
            (0xc_0000, true),
            (HOLE_START - 1, true),
            (HOLE_START, false),
            (HIGH_START, true),
            (HIGH_START + (2 << 30) - 1, true),
            (HIGH_START + (2 << 30), false),
            (u64::MAX, false),
        ] {
            assert_eq!(ram.is_ram(gpa), is, "{gpa:#x}");
            assert_eq!(ram.ptr(gpa).is_some(), is, "{gpa:#x}");
        }
    }

    #[test]
    fn values_come_back_and_do_not_cross_pages() {
        let ram = GuestRam::new(1 << 20).unwrap();
        ram.store(0x1003, 0x1122_3344_5566_7788u64).unwrap();
        assert_eq!(ram.load::<u32>(0x1005), Some(0x3344_5566));
        assert_eq!(ram.load::<u32>(0x1ffd), None);
        assert_eq!(ram.load::<u8>(1 << 20), None);
    }

    #[test]
    fn either_backing_is_zero_and_keeps_what_is_stored() {
        for backing in [Backing::Anonymous, Backing::HugePages, Backing::Memfd] {
            let ram = GuestRam::with_backing(5 << 30, backing).unwrap();
            assert_eq!((ram.backing(), ram.host_base() % (2 << 20)), (backing, 0));
            for gpa in [0, HOLE_START - 8, HIGH_START, HIGH_START + (2 << 30) - 8] {
                assert_eq!(ram.load::<u64>(gpa), Some(0));
                ram.store(gpa, gpa + 1).unwrap();
                ram.will_access(gpa);
                assert_eq!(ram.load::<u64>(gpa), Some(gpa + 1));
            }
        }
    }

    #[test]
    fn batches_are_asked_for_once_and_end_where_the_ram_does() {
        let ram = GuestRam::new((1 << 20) + 4096).unwrap();
        for gpa in [0, 0xffff, 0x10000, 1 << 20, HIGH_START, u64::MAX] {
            ram.will_access(gpa);
        }
        assert_eq!(ram.populated_bytes(), 3 * BATCH);
        ram.populate(0xfffff, u64::MAX);
        assert_eq!(ram.load::<u64>(1 << 20), Some(0));
    }

    #[test]
    fn a_memfd_is_the_ram_low_and_high() {
        use std::os::unix::fs::FileExt;
        let ram = GuestRam::with_backing(5 << 30, Backing::Memfd).unwrap();
        ram.store(HIGH_START + 8, 77u8).unwrap();
        let mut byte = [0];
        let file = ram.file().unwrap();
        file.read_exact_at(&mut byte, HOLE_START + 8).unwrap();
        assert_eq!(byte, [77]);
    }

    #[test]
    fn devices_write_across_pages_and_past_the_end() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let cpu = ram.tracker().join();
        ram.tracker().add_code(0x2000, 16, &cpu);
        ram.write_from_device(0x1fff, &[1, 2, 3]);
        assert_eq!(cpu.take_requests().0.code, [(0x2000, 1)].into());
        assert_eq!(ram.load::<u16>(0x2000), Some(0x0302));
        assert!(ram.tracker().is_dirty(0x1000) && ram.tracker().is_dirty(0x2000));
        ram.written_by_device(0x1000, 0x2000);
        assert_eq!(cpu.take_requests().0.code, [(0x2000, u64::MAX)].into());
        ram.write_from_device((1 << 20) - 1, &[7, 8]);
        assert_eq!(ram.load::<u8>((1 << 20) - 1), Some(7));
        ram.write_from_device(u64::MAX, &[1, 2]);
        assert_eq!(ram.load::<u8>(0), Some(2), "the address wraps");
        assert!(!cpu.has_requests());
    }

    #[test]
    fn discarded_pages_are_zero_cost_nothing_and_are_told_to_cpus() {
        for backing in [Backing::Anonymous, Backing::HugePages, Backing::Memfd] {
            let ram = GuestRam::with_backing(64 << 20, backing).unwrap();
            let cpu = ram.tracker().join();
            ram.tracker().add_code(0x40_3000, 16, &cpu);
            for page in (0x40_0000..0x80_0000).step_by(4096) {
                ram.will_access(page);
                ram.store(page, 7u64).unwrap();
            }
            let populated = ram.populated_bytes();
            // Pages that are only half in it stay.
            assert_eq!(ram.discard(0x40_0800, 0x3f_f000), 0x3f_e000, "{backing:?}");
            assert_eq!(ram.load::<u64>(0x40_0000), Some(7));
            assert_eq!(ram.load::<u64>(0x40_1000), Some(0));
            assert_eq!(ram.load::<u64>(0x7f_e000), Some(0));
            assert_eq!(ram.load::<u64>(0x7f_f000), Some(7));
            assert_eq!(cpu.take_requests().0.code, [(0x40_3000, u64::MAX)].into());
            assert!(ram.tracker().is_dirty(0x40_1000));
            assert_eq!(populated - ram.populated_bytes(), 0x3e_0000);
            ram.will_access(0x50_0000);
            ram.store(0x50_0000, 8u64).unwrap();
            assert_eq!(ram.load::<u64>(0x50_0000), Some(8));
            if let Some(file) = ram.file() {
                use std::os::unix::fs::MetadataExt;
                assert!(file.metadata().unwrap().blocks() * 512 < 0x10_0000);
            }
        }
    }

    #[test]
    fn only_ram_is_discarded() {
        let ram = GuestRam::new(5 << 30).unwrap();
        assert_eq!(ram.discard(0x9_f000, 0x2_2000), 0x2000, "the VGA window");
        assert_eq!(ram.discard(HOLE_START - 4096, 1 << 30), 4096);
        assert_eq!(ram.discard(HIGH_START + (2 << 30) - 4096, u64::MAX), 4096);
        assert_eq!(ram.discard(u64::MAX - 8191, u64::MAX), 0);
        assert_eq!(ram.discard(0x1001, 4096), 0);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        for size in [0, 4095, (1 << 20) + 1, 2 << 40] {
            assert!(matches!(GuestRam::new(size), Err(RamError::Size(_))));
        }
    }
}
