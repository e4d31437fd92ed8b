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

use crate::window_unsafe::View;
use crate::{GuestRam, HOLE_START, PAGE_MASK, PAGE_SIZE, PageTracker, Peer};

/// What 32 bits name.
const LENGTH: u64 = 1 << 32;
/// Pages that are opened at a time.
const RUN: u64 = 64;

/// The RAM below 4 GiB as a CPU sees it that runs without paging.
#[derive(Debug)]
pub struct Window {
    view: View,
    ram: Vec<Range<u64>>,
    /// A bit a page.
    open: Vec<u64>,
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
        let end = pieces.last().map_or(0, |piece| piece.end);
        let open = vec![0; (end / PAGE_SIZE).div_ceil(RUN) as usize];
        let ram = pieces;
        Ok(Some(Window { view, ram, open }))
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
        let may = |page| self.is_ram(page) && !self.is_open(page) && tracker.may_write(page, by);
        if !may(gpa) {
            return self.is_open(gpa);
        }
        let first = gpa / PAGE_SIZE / RUN * RUN;
        let pages = (0..RUN).map(|n| (n, (first + n) * PAGE_SIZE));
        let mut opened = 0_u64;
        for (n, page) in pages.filter(|(_, page)| may(*page)) {
            tracker.mark_dirty(page);
            opened |= 1 << n;
        }
        let mut rest = opened;
        while rest != 0 {
            let from = rest.trailing_zeros();
            let len = (rest >> from).trailing_ones();
            let at = (first + u64::from(from)) * PAGE_SIZE;
            if !self.view.protect(at, u64::from(len) * PAGE_SIZE, true) {
                // The host is out of mappings: these pages stay closed.
                opened &= !(run_of_ones(len) << from);
            }
            rest &= !(run_of_ones(len) << from);
        }
        if let Some(word) = self.open.get_mut((first / RUN) as usize) {
            *word |= opened;
        }
        self.is_open(gpa)
    }

    /// Closes a page.
    pub fn close(&mut self, gpa: u64) {
        if !self.is_open(gpa) {
            return;
        }
        if !self.view.protect(gpa & !PAGE_MASK, PAGE_SIZE, false) {
            // The host is out of mappings; this takes none.
            return self.close_all();
        }
        let page = gpa / PAGE_SIZE;
        self.open[(page / RUN) as usize] &= !(1 << (page % RUN));
    }

    /// Closes all pages.
    pub fn close_all(&mut self) {
        for piece in &self.ram {
            self.view
                .protect(piece.start, piece.end - piece.start, false);
        }
        self.open.fill(0);
    }

    fn is_ram(&self, gpa: u64) -> bool {
        self.ram.iter().any(|piece| piece.contains(&gpa))
    }

    fn is_open(&self, gpa: u64) -> bool {
        let page = gpa / PAGE_SIZE;
        let word = self.open.get((page / RUN) as usize);
        word.is_some_and(|word| word >> (page % RUN) & 1 != 0)
    }
}

fn run_of_ones(len: u32) -> u64 {
    u64::MAX >> (64 - len)
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
