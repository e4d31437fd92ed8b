//! Memory as instructions see it: linear addresses in, RAM or devices out, or an exception.
//!
//! The fast path is a hit in the software TLB. Everything else (a miss, a device, an access that
//! crosses a page, a write to a page with translated code) goes through [`Cpu::translate`], the only caller of the page walk.
//! A write that crosses a page checks both pages before it changes either.

use doppel_memory::{
    AccessKind, HostPtr, PAGE_MASK, PAGE_SIZE, Privilege, Translation, Word, walk,
};

use crate::{Bus, Cpu, CpuMode, Cr4, Exception};

impl Cpu {
    /// True where bits 63:47 are equal, or with CR4.LA57 bits 63:56: for addresses that are used.
    #[inline]
    pub fn canonical(&self, linear: u64) -> bool {
        /// What 57 bits are more than 48.
        const MORE: u64 = 9;
        let la57 = self.cr4.bits() >> Cr4::LA57.bits().trailing_zeros() & 1;
        is_canonical(linear, 16 - MORE * la57)
    }

    /// The same for addresses that registers are loaded with to be used later (bases, MSRs, what INVPCID names): 57 bits wide wherever the processor has
    /// LA57, switched on or not (Intel SDM vol. 1, 3.3.7.1).
    pub(crate) fn canonical_in_register(&self, linear: u64) -> bool {
        is_canonical(linear, if self.cpuid.has_la57() { 7 } else { 16 })
    }

    /// Walks the page tables for one byte and enters the outcome into the TLB. Canonicality was checked before.
    pub fn translate(
        &mut self,
        linear: u64,
        kind: AccessKind,
        privilege: Privilege,
    ) -> Result<Translation, Exception> {
        self.counters.page_walks += 1;
        let paging = self.paging();
        let t = walk(&self.ram, &paging, linear, kind, privilege)
            .map_err(|f| Exception::pf(linear, f.error_code))?;
        if t.page_shift > 12 {
            self.large_pages.note(linear);
        }
        self.global_user_pages |= t.global && t.rights_user;
        if kind == AccessKind::Write {
            self.ram.tracker().mark_dirty(t.gpa);
        }
        if kind != AccessKind::Execute && !self.page_is_watched(linear) {
            let rights = t.rights(&paging, privilege);
            self.tlb[privilege as usize].fill(linear, &t, rights, &self.ram, &self.peer);
        }
        Ok(t)
    }

    /// Loads a value at a linear address.
    #[inline]
    pub fn load<T: Word>(
        &mut self,
        bus: &mut dyn Bus,
        linear: u64,
        privilege: Privilege,
    ) -> Result<T, Exception> {
        match self.tlb[privilege as usize].lookup_read(linear, T::SIZE) {
            Some(p) => Ok(p.load()),
            None => self
                .load_slow(bus, linear, T::SIZE, privilege)
                .map(T::truncate),
        }
    }

    /// Stores a value at a linear address.
    #[inline]
    pub fn store<T: Word>(
        &mut self,
        bus: &mut dyn Bus,
        linear: u64,
        privilege: Privilege,
        v: T,
    ) -> Result<(), Exception> {
        match self.tlb[privilege as usize].lookup_write(linear, T::SIZE) {
            Some(p) => {
                p.store(v);
                Ok(())
            }
            None => self.store_slow(bus, linear, T::SIZE, privilege, v.into()),
        }
    }

    #[cold]
    fn load_slow(
        &mut self,
        bus: &mut dyn Bus,
        linear: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<u64, Exception> {
        self.check_canonical(linear, size as u64)?;
        let mut bytes = [0; 8];
        self.load_bytes(bus, linear, privilege, &mut bytes[..size])?;
        Ok(u64::from_le_bytes(bytes))
    }

    #[cold]
    fn store_slow(
        &mut self,
        bus: &mut dyn Bus,
        linear: u64,
        size: usize,
        privilege: Privilege,
        v: u64,
    ) -> Result<(), Exception> {
        self.check_canonical(linear, size as u64)?;
        self.store_bytes(bus, linear, privilege, &v.to_le_bytes()[..size])
    }

    /// #GP(0) unless every byte is canonical. (A stack access raises #SS(0) instead: the caller maps it.)
    pub fn check_canonical(&self, linear: u64, size: u64) -> Result<(), Exception> {
        let last = linear.wrapping_add(size - 1);
        if self.mode() == CpuMode::Bits64 && !(self.canonical(linear) && self.canonical(last)) {
            return Err(Exception::gp(0));
        }
        Ok(())
    }

    /// Loads any number of bytes. The address wraps as the mode says.
    pub fn load_bytes(
        &mut self,
        bus: &mut dyn Bus,
        linear: u64,
        privilege: Privilege,
        out: &mut [u8],
    ) -> Result<(), Exception> {
        if let Some(p) = self.tlb[privilege as usize].lookup_read(linear, out.len()) {
            p.read(out);
            return Ok(());
        }
        let size = out.len() as u64;
        let mut at = linear;
        let mut out = out;
        while !out.is_empty() {
            let (now, rest) = out.split_at_mut(out.len().min(room(at)));
            let t = self.translate(at, AccessKind::Read, privilege)?;
            match self.ram.ptr(t.gpa) {
                Some(p) => p.read(now),
                None => self.mmio_load(bus, t.gpa, now),
            }
            at = self.wrap(at.wrapping_add(now.len() as u64));
            out = rest;
            self.counters.page_crossings += u64::from(!out.is_empty());
        }
        self.note_access(linear, size, false);
        Ok(())
    }

    /// Stores any number of bytes; checks every page before it changes the first.
    pub fn store_bytes(
        &mut self,
        bus: &mut dyn Bus,
        linear: u64,
        privilege: Privilege,
        data: &[u8],
    ) -> Result<(), Exception> {
        if let Some(p) = self.tlb[privilege as usize].lookup_write(linear, data.len()) {
            p.write(data);
            return Ok(());
        }
        let first = self.translate(linear, AccessKind::Write, privilege)?;
        let mut at = linear;
        let mut left = data.len();
        while left > room(at) {
            left -= room(at);
            at = self.wrap((at | PAGE_MASK).wrapping_add(1));
            self.translate(at, AccessKind::Write, privilege)?;
        }
        self.note_access(linear, data.len() as u64, true);
        let (mut at, mut data, mut t) = (linear, data, first);
        loop {
            let (now, rest) = data.split_at(data.len().min(room(at)));
            self.store_physical(bus, t.gpa, now);
            if rest.is_empty() {
                return Ok(());
            }
            self.counters.page_crossings += 1;
            at = self.wrap(at.wrapping_add(now.len() as u64));
            data = rest;
            t = self.translate(at, AccessKind::Write, privilege)?;
        }
    }

    /// Stores within one page of guest physical memory, with everything that a write by this CPU entails.
    pub fn store_physical(&mut self, bus: &mut dyn Bus, gpa: u64, data: &[u8]) {
        match self.ram.ptr(gpa) {
            Some(p) => {
                p.write(data);
                self.note_write(gpa, data.len() as u32);
            }
            None => self.mmio_store(bus, gpa, data),
        }
    }

    /// Loads within one page of guest physical memory.
    pub fn load_physical(&mut self, bus: &mut dyn Bus, gpa: u64, out: &mut [u8]) {
        match self.ram.ptr(gpa) {
            Some(p) => p.read(out),
            None => self.mmio_load(bus, gpa, out),
        }
    }

    /// Tells the trackers of a write to RAM that did not go through [`Self::store`] (or will not; then the CPU is among the page's
    /// writers already).
    pub fn note_write(&mut self, gpa: u64, len: u32) {
        let tracker = self.ram.tracker();
        tracker.mark_dirty(gpa);
        if tracker.touched_code(gpa, u64::from(len)) {
            self.counters.code_writes += 1;
            self.code_writes.push((gpa, len));
        }
    }

    /// A pointer for a read-modify-write (`lock` prefixed or not) of `size` bytes within one page of RAM:
    /// `None` where the access crosses a page or is not RAM. The write is noted already.
    pub fn rmw_ptr(
        &mut self,
        linear: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<Option<HostPtr>, Exception> {
        if let Some(p) = self.tlb[privilege as usize].lookup_write(linear, size) {
            return Ok(Some(p));
        }
        self.check_canonical(linear, size as u64)?;
        let t = self.translate(linear, AccessKind::Write, privilege)?;
        if size > room(linear) {
            return Ok(None);
        }
        let p = self.ram.ptr(t.gpa);
        if p.is_some() {
            self.ram.tracker().add_writer(t.gpa, &self.peer);
            self.note_write(t.gpa, size as u32);
            self.note_access(linear, size as u64, true);
        }
        Ok(p)
    }

    /// A locked read-modify-write of `size` bytes (8 at most) that may lie in two pages, while no other CPU runs guest code, as if
    /// the bus were locked. `None` where not all of it is RAM: nothing has happened then.
    pub(crate) fn modify_alone<R>(
        &mut self,
        linear: u64,
        size: usize,
        privilege: Privilege,
        f: impl FnOnce(u64) -> (u64, R),
    ) -> Result<Option<R>, Exception> {
        self.check_canonical(linear, size as u64)?;
        self.counters.split_locks += 1;
        // A fault names the first byte that could not be had.
        let last = match size > room(linear) {
            true => self.wrap((linear | PAGE_MASK).wrapping_add(1)),
            false => linear,
        };
        self.alone(|cpu| {
            // Devices are called outside, so they cannot be called here.
            let first = cpu.translate(linear, AccessKind::Write, privilege)?.gpa;
            let last = cpu.translate(last, AccessKind::Write, privilege)?.gpa;
            let second = last & !PAGE_MASK;
            let (Some(low), Some(high)) = (cpu.ram.ptr(first), cpu.ram.ptr(second)) else {
                return Ok(None);
            };
            let here = size.min(low.room());
            let mut bytes = [0; 8];
            low.read(&mut bytes[..here]);
            high.read(&mut bytes[here..size]);
            let (new, out) = f(u64::from_le_bytes(bytes));
            let new = new.to_le_bytes();
            low.write(&new[..here]);
            cpu.note_write(first, here as u32);
            if here < size {
                high.write(&new[here..size]);
                cpu.note_write(second, (size - here) as u32);
            }
            cpu.note_access(linear, size as u64, true);
            Ok(Some(out))
        })
    }

    /// A pointer for a read of `size` bytes within one page of RAM: `None` where the access crosses a page or is not RAM.
    pub fn read_ptr(
        &mut self,
        linear: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<Option<HostPtr>, Exception> {
        if let Some(p) = self.tlb[privilege as usize].lookup_read(linear, size) {
            return Ok(Some(p));
        }
        self.check_canonical(linear, size as u64)?;
        let t = self.translate(linear, AccessKind::Read, privilege)?;
        Ok(self.ram.ptr(t.gpa).filter(|_| size <= room(linear)))
    }

    /// Checks that `size` bytes may be written, and sets the dirty bits of their pages as the write will.
    pub fn check_writable(
        &mut self,
        linear: u64,
        size: usize,
        privilege: Privilege,
    ) -> Result<(), Exception> {
        if self.tlb[privilege as usize]
            .lookup_write(linear, size)
            .is_some()
        {
            return Ok(());
        }
        let (mut at, mut left) = (linear, size);
        loop {
            self.translate(at, AccessKind::Write, privilege)?;
            if left <= room(at) {
                return Ok(());
            }
            left -= room(at);
            at = self.wrap((at | PAGE_MASK).wrapping_add(1));
        }
    }

    /// Reads instruction bytes from `linear` on, up to 15: as many as can be fetched without a fault. A fault on
    /// the first byte is the exception; a fault further on only shortens the outcome, and the decoder that runs
    /// out of bytes asks for the fault of the byte that it misses.
    pub fn fetch(&mut self, linear: u64, out: &mut [u8; 16]) -> Result<usize, Exception> {
        let privilege = if self.cpl == 3 {
            Privilege::User
        } else {
            Privilege::Supervisor
        };
        let first = self.translate(linear, AccessKind::Execute, privilege)?;
        let len = room(linear).min(15);
        match self.ram.ptr(first.gpa) {
            Some(p) => p.read(&mut out[..len]),
            None => out[..len].fill(0xff),
        }
        if len == 15 {
            return Ok(15);
        }
        let next = self.wrap((linear | PAGE_MASK).wrapping_add(1));
        let second = self
            .check_canonical(next, 1)
            .and_then(|()| self.translate(next, AccessKind::Execute, privilege));
        let Ok(t) = second else {
            return Ok(len);
        };
        match self.ram.ptr(t.gpa) {
            Some(p) => p.read(&mut out[len..15]),
            None => out[len..15].fill(0xff),
        }
        Ok(15)
    }

    /// Linear addresses are 32 bits wide outside long mode. (In compatibility mode the tables are above 4 GiB.)
    fn wrap(&self, linear: u64) -> u64 {
        if self.long_mode() {
            linear
        } else {
            linear & 0xffff_ffff
        }
    }

    fn mmio_load(&mut self, bus: &mut dyn Bus, gpa: u64, out: &mut [u8]) {
        self.counters.mmio_accesses += 1;
        for (at, size) in device_units(gpa, out.len()) {
            let v = self.outside(|| bus.mmio_read(gpa + at as u64, size as u8));
            let v = v.to_le_bytes();
            out[at..at + size].copy_from_slice(&v[..size]);
        }
    }

    fn mmio_store(&mut self, bus: &mut dyn Bus, gpa: u64, data: &[u8]) {
        self.counters.mmio_accesses += 1;
        for (at, size) in device_units(gpa, data.len()) {
            let mut v = [0; 8];
            v[..size].copy_from_slice(&data[at..at + size]);
            let v = u64::from_le_bytes(v);
            self.outside(|| bus.mmio_write(gpa + at as u64, size as u8, v));
        }
    }
}

/// True where so many bits at the top, and one more, are equal.
#[inline]
fn is_canonical(linear: u64, unused: u64) -> bool {
    ((linear as i64) << unused >> unused) as u64 == linear
}

fn room(linear: u64) -> usize {
    (PAGE_SIZE - (linear & PAGE_MASK)) as usize
}

/// Cuts an access to a device into naturally sized units: the whole where it is a power of two, else pieces.
fn device_units(gpa: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = len - at;
        if left == 0 {
            return None;
        }
        let size = if left.is_power_of_two() && left <= 8 {
            left
        } else {
            [8, 4, 2, 1]
                .into_iter()
                .find(|s| *s <= left && (gpa + at as u64).is_multiple_of(*s as u64))
                .unwrap_or(1)
        };
        at += size;
        Some((at - size, size))
    })
}
