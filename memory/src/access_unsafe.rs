//! Loads, stores and atomics on guest RAM through host pointers.
//!
//! Guest memory changes under us (other vCPUs, a hostile guest), so it is never borrowed as a Rust
//! reference: every access is volatile or atomic, and copies whole values out.

use std::ptr::NonNull;

/// An integer that the guest loads and stores as one unit.
pub trait Word: Copy + Eq + Into<u64> {
    /// Bytes of the unit.
    const SIZE: usize;
    /// The low bits of `v`.
    fn truncate(v: u64) -> Self;
    #[doc(hidden)]
    fn compare_exchange(p: *mut u8, old: Self, new: Self) -> Result<Self, Self>;
}

macro_rules! word {
    ($t:ty, $register:ident, $accumulator:tt, $instruction:literal) => {
        impl Word for $t {
            const SIZE: usize = size_of::<$t>();
            fn truncate(v: u64) -> Self {
                v as $t
            }
            #[inline]
            fn compare_exchange(p: *mut u8, old: Self, new: Self) -> Result<Self, Self> {
                let mut seen = old;
                // SAFETY: `HostPtr` guarantees a live guest RAM address with room for the value; written out, since Rust's
                // atomics must be aligned and a guest's need not be.
                unsafe {
                    core::arch::asm!(
                        $instruction,
                        p = in(reg) p,
                        new = in($register) new,
                        inout($accumulator) seen,
                        options(nostack),
                    );
                }
                if seen == old { Ok(seen) } else { Err(seen) }
            }
        }
    };
}
word!(u8, reg_byte, "al", "lock cmpxchg byte ptr [{p}], {new}");
word!(u16, reg, "ax", "lock cmpxchg word ptr [{p}], {new:x}");
word!(u32, reg, "eax", "lock cmpxchg dword ptr [{p}], {new:e}");
word!(u64, reg, "rax", "lock cmpxchg qword ptr [{p}], {new}");

/// A checked host address of guest RAM: at least the number of bytes that it was made for are valid there.
///
/// Made only by this crate; valid while the [`crate::GuestRam`] it came from lives (engines hold an `Arc` of it).
#[derive(Clone, Copy, Debug)]
pub struct HostPtr {
    at: NonNull<u8>,
    room: usize,
}

impl HostPtr {
    /// # Safety
    /// `room` bytes from `at` must be mapped guest RAM for as long as the value is used.
    pub(crate) unsafe fn new(at: NonNull<u8>, room: usize) -> Self {
        HostPtr { at, room }
    }

    /// The pointer that a matching TLB entry stands for, with room up to the end of its page.
    #[inline]
    pub(crate) fn from_tlb(host_page: u64, offset: u64) -> Self {
        debug_assert!(host_page != 0 && offset < crate::PAGE_SIZE);
        let at = (host_page + offset) as *mut u8;
        // SAFETY: a matching tag implies that `host_page` came from `GuestRam::ptr` of a whole
        // page (see the invariant in `tlb`), and the offset is inside it.
        unsafe {
            HostPtr::new(
                NonNull::new_unchecked(at),
                (crate::PAGE_SIZE - offset) as usize,
            )
        }
    }

    /// Bytes that may be accessed from here.
    #[inline]
    pub fn room(self) -> usize {
        self.room
    }

    /// The raw address, for code generators and `libc` calls.
    #[inline]
    pub fn addr(self) -> u64 {
        self.at.as_ptr() as u64
    }

    #[inline]
    fn check(self, len: usize) -> *mut u8 {
        assert!(
            len <= self.room,
            "access of {len} bytes where {} are",
            self.room
        );
        self.at.as_ptr()
    }

    /// Loads a value (little endian, any alignment).
    #[inline]
    pub fn load<T: Word>(self) -> T {
        let p = self.check(T::SIZE).cast::<T>();
        // SAFETY: `check` bounds the access to guest RAM; unaligned volatile reads of integers
        // through a packed wrapper are always valid.
        unsafe { std::ptr::read_volatile(p.cast::<Packed<T>>()).0 }
    }

    /// Stores a value (little endian, any alignment).
    #[inline]
    pub fn store<T: Word>(self, v: T) {
        let p = self.check(T::SIZE).cast::<T>();
        // SAFETY: as for `load`.
        unsafe { std::ptr::write_volatile(p.cast::<Packed<T>>(), Packed(v)) }
    }

    /// Atomic compare and exchange, as `lock cmpxchg` does; `Err` holds what was there. Any alignment, but across two lines of the
    /// cache the host's operating system may punish it.
    pub fn compare_exchange<T: Word>(self, old: T, new: T) -> Result<T, T> {
        T::compare_exchange(self.check(T::SIZE), old, new)
    }

    /// Atomic compare and exchange of 16 bytes, as `lock cmpxchg16b` does. The address must be 16-byte aligned.
    pub fn compare_exchange_16(self, old: u128, new: u128) -> Result<u128, u128> {
        let p = self.check(16);
        assert!(p.addr().is_multiple_of(16));
        // SAFETY: bounds by `check`, alignment asserted; cmpxchg16b is part of every processor
        // that Doppel's engines accept (checked at start).
        let seen = unsafe { compare_exchange_16(p.cast(), old, new) };
        if seen == old { Ok(seen) } else { Err(seen) }
    }

    /// True where guest memory holds these words; of the last one, its top `shift` bits do not matter.
    #[inline]
    pub fn holds(self, words: &[u64], shift: u32) -> bool {
        let p = self.check(8 * words.len()).cast::<Packed<u64>>();
        // SAFETY: word `n` is in bounds by `check`; unaligned volatile reads as in `load`.
        let seen = |n: usize| unsafe { std::ptr::read_volatile(p.add(n)).0 };
        let Some((last, full)) = words.split_last() else {
            return true;
        };
        full.iter().enumerate().all(|(n, word)| seen(n) == *word)
            && (seen(full.len()) ^ last) << (shift & 63) == 0
    }

    /// True where guest memory holds these bytes.
    pub fn equals(self, bytes: &[u8]) -> bool {
        let p = self.check(bytes.len());
        let (words, rest) = bytes.as_chunks::<8>();
        // SAFETY: word `n` is in bounds by `check`; unaligned volatile reads as in `load`.
        let word = |n: usize| unsafe { std::ptr::read_volatile(p.cast::<Packed<u64>>().add(n)).0 };
        // SAFETY: byte `n` is in bounds by `check`.
        let byte = |n: usize| unsafe { std::ptr::read_volatile(p.add(n)) };
        let whole = 8 * words.len();
        words
            .iter()
            .enumerate()
            .all(|(n, w)| word(n) == u64::from_le_bytes(*w))
            && rest.iter().enumerate().all(|(n, b)| byte(whole + n) == *b)
    }

    /// The pointer `offset` bytes further on; `offset` is at most the room.
    #[inline]
    pub fn at(self, offset: usize) -> HostPtr {
        let at = self.check(offset);
        // SAFETY: `check` keeps the sum inside or at the end of the room, which is not null.
        unsafe { HostPtr::new(NonNull::new_unchecked(at.add(offset)), self.room - offset) }
    }

    /// Copies guest memory out; 1, 2, 4 and 8 bytes as one unit.
    pub fn read(self, out: &mut [u8]) {
        match out.len() {
            1 => out.copy_from_slice(&[self.load::<u8>()]),
            2 => out.copy_from_slice(&self.load::<u16>().to_le_bytes()),
            4 => out.copy_from_slice(&self.load::<u32>().to_le_bytes()),
            8 => out.copy_from_slice(&self.load::<u64>().to_le_bytes()),
            _ => self.read_bytes(out),
        }
    }

    fn read_bytes(self, out: &mut [u8]) {
        let p = self.check(out.len());
        // SAFETY: source in bounds by `check`; the destination is a Rust slice, which never overlaps guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(p, out.as_mut_ptr(), out.len()) }
    }

    /// Copies `len` bytes from other guest memory, as if all were read before the first is written.
    pub fn copy_from(self, source: HostPtr, len: usize) {
        let (to, from) = (self.check(len), source.check(len));
        // SAFETY: both ends in bounds by `check`; `copy` allows them to overlap.
        unsafe { std::ptr::copy(from, to, len) }
    }

    /// Fills `len` bytes with repetitions of the low `unit` bytes (1, 2, 4 or 8) of `v`.
    pub fn fill(self, len: usize, v: u64, unit: usize) {
        let p = self.check(len);
        let pattern = v & u64::MAX >> (64 - 8 * unit);
        let all = (0..8 / unit).fold(0, |all, n| all | pattern << (8 * unit * n));
        if all == u64::from(all as u8) * 0x0101_0101_0101_0101 {
            // SAFETY: in bounds by `check`.
            return unsafe { std::ptr::write_bytes(p, all as u8, len) };
        }
        let (bytes, whole) = (all.to_le_bytes(), len & !7);
        for at in (0..whole).step_by(8) {
            // SAFETY: `at + 8 <= len`, which `check` bounds.
            unsafe { p.add(at).cast::<[u8; 8]>().write(bytes) };
        }
        // SAFETY: `whole..len` is in bounds by `check`; the source is a Rust array of 8 bytes, and `len - whole < 8`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), p.add(whole), len - whole) }
    }

    /// Copies into guest memory; 1, 2, 4 and 8 bytes as one unit.
    pub fn write(self, data: &[u8]) {
        match *data {
            [a] => self.store(a),
            [a, b] => self.store(u16::from_le_bytes([a, b])),
            [a, b, c, d] => self.store(u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                self.store(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
            }
            _ => self.write_bytes(data),
        }
    }

    fn write_bytes(self, data: &[u8]) {
        let p = self.check(data.len());
        // SAFETY: as for `read`, the other way.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), p, data.len()) }
    }
}

/// `lock cmpxchg16b`, written out: the intrinsic becomes a library call wherever it is inlined into code that
/// is compiled for processors without the instruction.
///
/// # Safety
/// `p` must be aligned to 16 bytes and valid for atomic access; the processor must have the instruction.
unsafe fn compare_exchange_16(p: *mut u128, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: the access is as our caller promises; RBX, which the compiler keeps, is put back.
    unsafe {
        core::arch::asm!(
            "xchg rbx, rsi",
            "lock cmpxchg16b [rdi]",
            "mov rbx, rsi",
            in("rdi") p,
            inout("rsi") new as u64 => _,
            in("rcx") (new >> 64) as u64,
            inout("rax") low,
            inout("rdx") high,
            options(nostack),
        );
    }
    u128::from(high) << 64 | u128::from(low)
}

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Packed<T>(T);
