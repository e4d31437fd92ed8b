//! The extended register state, as the XSAVE area keeps it: where each register lies, and access to it.
//!
//! Intel SDM vol. 1, chapter 13. The offsets of the components differ between makers: CPUID leaf 0xd tells them.

use crate::FpuArea;

/// State components, bits of XCR0.
pub(super) mod component {
    pub const X87: u64 = 1;
    pub const SSE: u64 = 1 << 1;
    pub const AVX: u64 = 1 << 2;
    pub const OPMASK: u64 = 1 << 5;
    pub const ZMM_HIGH: u64 = 1 << 6;
    pub const HIGH_ZMM: u64 = 1 << 7;
    /// The rights of protection keys, 32 bits of its 64.
    pub const PKRU: u64 = crate::XCR0_PKRU;
    /// What AVX-512 needs enabled.
    pub const AVX512: u64 = SSE | AVX | OPMASK | ZMM_HIGH | HIGH_ZMM;
}

/// Bytes of the legacy region and the header.
pub(super) const EXTENDED: usize = 576;
/// Where the header begins.
pub(super) const HEADER: usize = 512;
/// Where XMM0 lies.
pub(super) const XMM: usize = 160;
const COMPONENTS: usize = 10;

/// Where the components lie in the standard format.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    /// `(offset, size)` of the components from 2 on; the first two are in the legacy region.
    places: [(usize, usize); COMPONENTS],
    /// Components that are aligned to 64 bytes in the compacted format.
    aligned: u64,
    /// Components that the host has and that fit an [`FpuArea`].
    pub supported: u64,
}

impl Layout {
    /// The host's.
    pub fn of_host() -> Self {
        let root = raw_cpuid::cpuid!(0xd, 0);
        let mut layout = Layout {
            places: [(0, 0); COMPONENTS],
            aligned: 0,
            supported: component::X87 | component::SSE,
        };
        for n in 2..COMPONENTS {
            let leaf = raw_cpuid::cpuid!(0xd, n as u32);
            let (size, offset) = (leaf.eax as usize, leaf.ebx as usize);
            let fits = offset.saturating_add(size) <= FpuArea::SIZE && size > 0;
            if root.eax >> n & 1 == 0 || !fits {
                continue;
            }
            layout.places[n] = (offset, size);
            layout.aligned |= u64::from(leaf.ecx >> 1 & 1) << n;
            layout.supported |= 1 << n;
        }
        layout
    }

    /// `(offset, size)` of component `n` (2 and up) in the standard format.
    pub fn place(&self, n: usize) -> (usize, usize) {
        self.places.get(n).copied().unwrap_or((0, 0))
    }

    /// Bytes of an area of either format that holds these components, of which all are [supported](Self::supported).
    pub fn area_size(&self, components: u64) -> usize {
        let ends = (2..COMPONENTS)
            .filter(|n| components >> n & 1 != 0)
            .map(|n| {
                let (at, size) = self.place(n);
                size + at.max(self.compacted(n, components))
            });
        ends.max().unwrap_or(EXTENDED)
    }

    /// Where component `n` begins in the compacted format with the components `compaction`.
    pub fn compacted(&self, n: usize, compaction: u64) -> usize {
        let mut at = EXTENDED;
        for c in (2..=n).filter(|c| compaction >> c & 1 != 0) {
            if self.aligned >> c & 1 != 0 {
                at = at.next_multiple_of(64);
            }
            if c < n {
                at += self.place(c).1;
            }
        }
        at
    }
}

/// The components that are not in their initial state (XSTATE_BV).
pub(super) fn in_use(fpu: &FpuArea) -> u64 {
    fpu.word(HEADER)
}

/// Sets XSTATE_BV.
pub(super) fn set_in_use(fpu: &mut FpuArea, components: u64) {
    fpu.bytes[HEADER..HEADER + 8].copy_from_slice(&components.to_le_bytes());
}

/// Sets MXCSR, which must have no reserved bit.
pub(super) fn set_mxcsr(fpu: &mut FpuArea, v: u32) {
    fpu.bytes[24..28].copy_from_slice(&v.to_le_bytes());
}

/// The pieces of vector register `n` (0 to 31): `(offset in the area, offset in the register, bytes, component)`.
fn pieces(layout: &Layout, n: usize) -> [(usize, usize, usize, u64); 3] {
    if n >= 16 {
        let at = layout.place(7).0 + 64 * (n - 16);
        return [(at, 0, 64, component::HIGH_ZMM), (0, 0, 0, 0), (0, 0, 0, 0)];
    }
    [
        (XMM + 16 * n, 0, 16, component::SSE),
        (layout.place(2).0 + 16 * n, 16, 16, component::AVX),
        (layout.place(6).0 + 32 * n, 32, 32, component::ZMM_HIGH),
    ]
}

/// All 64 bytes of a vector register; what the host does not have is zero.
pub(super) fn read(fpu: &FpuArea, layout: &Layout, n: usize) -> [u8; 64] {
    let mut v = [0; 64];
    for (at, offset, len, component) in pieces(layout, n & 31) {
        if component & layout.supported & in_use(fpu) != 0 {
            v[offset..offset + len].copy_from_slice(&fpu.bytes[at..at + len]);
        }
    }
    v
}

/// Writes all 64 bytes of a vector register.
pub(super) fn write(fpu: &mut FpuArea, layout: &Layout, n: usize, v: &[u8; 64]) {
    for (at, offset, len, component) in pieces(layout, n & 31) {
        if component & layout.supported == 0 {
            continue;
        }
        activate(fpu, layout, component);
        fpu.bytes[at..at + len].copy_from_slice(&v[offset..offset + len]);
    }
}

/// Takes a component out of its initial state: bytes that meant nothing become zero.
fn activate(fpu: &mut FpuArea, layout: &Layout, component: u64) {
    if in_use(fpu) & component != 0 {
        return;
    }
    let (at, len) = match component {
        component::SSE => (XMM, 256),
        _ => layout.place(component.trailing_zeros() as usize),
    };
    fpu.bytes[at..at + len].fill(0);
    set_in_use(fpu, in_use(fpu) | component);
}

/// Gives the bytes of components that are in their initial state its values: whoever saved the area may have left them as they were.
pub(super) fn settle(fpu: &mut FpuArea, layout: &Layout) {
    const X87_REGISTERS: std::ops::Range<usize> = 32..XMM;
    let initial = layout.supported & !in_use(fpu);
    if initial & component::X87 != 0 {
        let reset = FpuArea::reset();
        fpu.bytes[..24].copy_from_slice(&reset.bytes[..24]);
        fpu.bytes[X87_REGISTERS].fill(0);
    }
    if initial & component::SSE != 0 {
        fpu.bytes[XMM..XMM + 256].fill(0);
    }
    for n in (2..63).filter(|n| initial >> n & 1 != 0) {
        let (at, len) = layout.place(n);
        fpu.bytes[at..at + len].fill(0);
    }
}

/// Mask register `n` (0 to 7).
pub(super) fn read_mask(fpu: &FpuArea, layout: &Layout, n: usize) -> u64 {
    if in_use(fpu) & component::OPMASK & layout.supported == 0 {
        return 0;
    }
    fpu.word(layout.place(5).0 + 8 * (n & 7))
}

/// Writes mask register `n`.
pub(super) fn write_mask(fpu: &mut FpuArea, layout: &Layout, n: usize, v: u64) {
    if layout.supported & component::OPMASK == 0 {
        return;
    }
    activate(fpu, layout, component::OPMASK);
    let at = layout.place(5).0 + 8 * (n & 7);
    fpu.bytes[at..at + 8].copy_from_slice(&v.to_le_bytes());
}

/// What every MMX instruction does first: TOP is 0, and no register is empty. The area has the registers in the order
/// of the stack: they are turned so that MMX register `n` is the `n`th.
pub(super) fn enter_mmx(fpu: &mut FpuArea) {
    const REGISTERS: std::ops::Range<usize> = 32..160;
    if in_use(fpu) & component::X87 == 0 {
        let reset = FpuArea::reset();
        fpu.bytes[..24].copy_from_slice(&reset.bytes[..24]);
        fpu.bytes[REGISTERS].fill(0);
        set_in_use(fpu, in_use(fpu) | component::X87);
    }
    let top = usize::from(fpu.bytes[3] >> 3 & 7);
    fpu.bytes[REGISTERS].rotate_right(16 * top);
    fpu.bytes[3] &= !0x38;
    fpu.bytes[4] = 0xff;
}

/// MMX register `n`, after [`enter_mmx`].
pub(super) fn read_mmx(fpu: &FpuArea, n: usize) -> u64 {
    fpu.word(32 + 16 * (n & 7))
}
