//! Physical memory at one place of the monitor's address space, for a CPU that runs without paging.
//!
//! Problem: where paging is off (a kernel's decompressor, a boot loader, a memory test) a linear address is a physical one; yet each access goes through
//! the software TLB, whose check costs more than the access and stands before it in time.
//! Idea: the four gigabytes that 32 bits name are reserved, the RAM below is mapped into them a second time, and an access is one at
//! `base + linear`: what is no RAM faults in the host, and the monitor does the access by itself. Pages are write-protected until they are written to
//! first, when all of the run around them that may be are *opened*.
//! Invariant: a page is open only while its CPU counts as one that writes to it ([`PageTracker::may_write`]), and it is dirty; whoever translates code
//! from it asks the CPU, as ever, to give that up, and [`Window::close`] is a part of that. The guard behind the end is longer than what an access with a
//! displacement reaches.
//! Cost: a fault of the host for each run of pages that is written to, a system call for each page of them with code.

use std::io;
use std::ops::Range;

use crate::track::PageSet;
use crate::window_unsafe::View;
use crate::{GuestRam, HOLE_START, PAGE_MASK, PAGE_SIZE, PageTracker, Peer};

/// What 32 bits name.
const LENGTH: u64 = 1 << 32;
/// Bytes that are opened at a time.
const RUN: u64 = 64 * PAGE_SIZE;

/// The RAM below 4 GiB as a CPU sees it that runs without paging.
#[derive(Debug)]
pub struct Window {
    view: View,
    ram: Vec<Range<u64>>,
    open: PageSet,
}

impl Window {
    /// Bytes behind the end where nothing is, so that an access may reach so far from its base.
    pub const GUARD: u64 = 64 << 10;

    /// A window without an open page; `None` where the RAM is no file, so that it cannot be mapped twice.
    pub fn new(ram: &GuestRam) -> io::Result<Option<Self>> {
        let Some(file) = ram.file() else {
            return Ok(None);
        };
        let low = ram.ranges().into_iter().filter(|r| r.start < HOLE_START);
        let pieces: Vec<_> = low.collect();
        let view = View::new((LENGTH + Self::GUARD) as usize)?;
        for piece in &pieces {
            // Low RAM comes first in the file, with the window of VGA.
            view.map(file, piece.clone(), piece.start)?;
        }
        Ok(Some(Window {
            view,
            ram: pieces,
            open: PageSet::new(LENGTH / PAGE_SIZE),
        }))
    }

    /// Host address of physical address 0.
    pub fn base(&self) -> u64 {
        self.view.base()
    }

    /// What a host address in the window stands for.
    pub fn physical(&self, host: u64) -> Option<u64> {
        let at = host.wrapping_sub(self.base());
        (at < LENGTH + Self::GUARD).then_some(at)
    }

    /// Opens the page and those around it that `by` may write to; false where that page is none of them.
    pub fn open(&mut self, gpa: u64, tracker: &PageTracker, by: &Peer) -> bool {
        if !self.may_open(gpa, tracker, by) {
            return self.open.contains(gpa);
        }
        let mut page = gpa / RUN * RUN;
        let end = page + RUN;
        while page < end {
            let from = page;
            while page < end && self.may_open(page, tracker, by) {
                page += PAGE_SIZE;
            }
            self.open_run(from..page, tracker);
            page += PAGE_SIZE;
        }
        self.open.contains(gpa)
    }

    fn may_open(&self, gpa: u64, tracker: &PageTracker, by: &Peer) -> bool {
        self.is_ram(gpa) && !self.open.contains(gpa) && tracker.may_write(gpa, by)
    }

    fn open_run(&mut self, run: Range<u64>, tracker: &PageTracker) {
        let len = run.end - run.start;
        // A host that is out of mappings leaves them closed.
        if len > 0 && self.view.protect(run.start, len, true) {
            tracker.mark_range_dirty(run.start, len);
            run.step_by(PAGE_SIZE as usize)
                .for_each(|page| self.open.insert(page));
        }
    }

    /// Closes a page.
    pub fn close(&mut self, gpa: u64) {
        if !self.open.contains(gpa) {
            return;
        }
        match self.view.protect(gpa & !PAGE_MASK, PAGE_SIZE, false) {
            true => self.open.remove(gpa),
            // The host is out of mappings; this takes none.
            false => self.close_all(),
        }
    }

    /// Closes all pages.
    pub fn close_all(&mut self) {
        for piece in &self.ram {
            self.view
                .protect(piece.start, piece.end - piece.start, false);
        }
        self.open = PageSet::new(LENGTH / PAGE_SIZE);
    }

    fn is_ram(&self, gpa: u64) -> bool {
        self.ram.iter().any(|piece| piece.contains(&gpa))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Backing, VGA_HOLE};

    const MIB: u64 = 1 << 20;

    fn window(ram: &GuestRam) -> Window {
        Window::new(ram).unwrap().expect("its RAM is a file")
    }

    /// How the host's page of a physical address may be accessed, as the host says.
    fn host_rights(window: &Window, gpa: u64) -> String {
        let at = window.base() + gpa;
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let line = maps.lines().find(|line| {
            let mut ends = line.split(' ').next().unwrap().split('-');
            let mut end = || u64::from_str_radix(ends.next().unwrap(), 16).unwrap();
            (end()..end()).contains(&at)
        });
        line.unwrap().split(' ').nth(1).unwrap()[..3].to_owned()
    }

    #[test]
    fn memory_that_is_no_file_has_none() {
        let ram = GuestRam::new(MIB).unwrap();
        assert!(Window::new(&ram).unwrap().is_none());
    }

    #[test]
    fn what_is_no_ram_faults_and_a_page_is_read_before_it_is_opened() {
        let ram = GuestRam::with_backing(2 * MIB, Backing::Memfd).unwrap();
        let (mut window, peer) = (window(&ram), ram.tracker().join());
        let nowhere = [
            VGA_HOLE.start,
            VGA_HOLE.end - 1,
            2 * MIB,
            LENGTH - 1,
            LENGTH,
        ];
        for gpa in nowhere {
            assert_eq!(host_rights(&window, gpa), "---", "{gpa:#x}");
            assert!(!window.open(gpa, ram.tracker(), &peer));
        }
        for gpa in [0, VGA_HOLE.start - 1, VGA_HOLE.end, 2 * MIB - 1] {
            assert_eq!(host_rights(&window, gpa), "r--", "{gpa:#x}");
            assert!(window.open(gpa, ram.tracker(), &peer));
            assert_eq!(host_rights(&window, gpa), "rw-", "{gpa:#x}");
        }
        assert_eq!(window.physical(window.base() + 77), Some(77));
        assert_eq!(window.physical(window.base() - 1), None);
    }

    #[test]
    fn the_run_around_a_page_is_opened_but_for_code() {
        let ram = GuestRam::with_backing(2 * MIB, Backing::Memfd).unwrap();
        let (tracker, peer) = (ram.tracker(), ram.tracker().join());
        let mut window = window(&ram);
        tracker.add_code(0x13040, 64, &peer);
        assert!(window.open(0x10000, tracker, &peer));
        assert!(tracker.is_dirty(0x3f000) && !tracker.is_dirty(0x40000));
        let rights = |w: &Window| {
            [0, 0x12fff, 0x13000, 0x14000, 0x3f000, 0x40000].map(|a| host_rights(w, a))
        };
        let opened = ["rw-", "rw-", "r--", "rw-", "rw-", "r--"];
        assert_eq!(rights(&window), opened);
        assert!(!window.open(0x13fff, tracker, &peer), "it has code");
        window.close(0x14123);
        assert_eq!(host_rights(&window, 0x14000), "r--");
        tracker.set_code(0x13000, 0, &peer);
        assert!(window.open(0x13000, tracker, &peer));
        assert_eq!(host_rights(&window, 0x14000), "rw-");
        window.close_all();
        assert_eq!(rights(&window), ["r--"; 6]);
        assert!(window.open(0, tracker, &peer));
    }

    #[test]
    fn who_shares_the_memory_learns_who_writes_through_a_window() {
        let ram = GuestRam::with_backing(2 * MIB, Backing::Memfd).unwrap();
        let tracker = ram.tracker();
        let (writer, _other) = (tracker.join(), tracker.join());
        let mut window = window(&ram);
        assert!(window.open(0x10000, tracker, &writer));
        assert!(tracker.is_writer(0x10000, &writer) && tracker.is_writer(0x3f000, &writer));
        assert!(!tracker.is_writer(0x40000, &writer));
    }
}
