//! The x87 and vector state as values, out of and into the XSAVE area (standard format).
//!
//! A component whose XSTATE_BV bit is clear is in its initial state, whatever its bytes are; two areas are equal where
//! what they stand for is. The last x87 instruction's opcode and addresses are left out: the engines execute
//! x87 instructions elsewhere than at their guest address.

use doppel_x86::FpuArea;

/// XCR0 bits.
pub const X87: u64 = 1;
pub const SSE: u64 = 2;
pub const AVX: u64 = 4;
pub const OPMASK: u64 = 0x20;
pub const ZMM_HIGH: u64 = 0x40;
pub const HIGH_16: u64 = 0x80;
/// All that is compared.
pub const ALL: u64 = X87 | SSE | AVX | OPMASK | ZMM_HIGH | HIGH_16;

const XSTATE_BV: usize = 512;

/// Where the components lie on this processor.
#[derive(Clone, Copy, Debug)]
pub struct XsaveLayout {
    /// The components that the guest is offered.
    pub mask: u64,
    avx: usize,
    opmask: usize,
    zmm_high: usize,
    high_16: usize,
}

impl XsaveLayout {
    /// This host's, for a guest that is offered `xcr0`.
    pub fn new(xcr0: u64) -> Self {
        let offset = |n| raw_cpuid::cpuid!(0xd, n).ebx as usize;
        XsaveLayout {
            mask: xcr0 & ALL,
            avx: offset(2),
            opmask: offset(5),
            zmm_high: offset(6),
            high_16: offset(7),
        }
    }
}

/// What a program can see of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vectors {
    pub control: u16,
    pub status: u16,
    /// A bit for each physical register that is not empty.
    pub tags: u8,
    /// ST(0) to ST(7).
    pub st: [[u8; 10]; 8],
    pub mxcsr: u32,
    pub zmm: [[u8; 64]; 32],
    pub k: [u64; 8],
}

impl Default for Vectors {
    fn default() -> Self {
        Vectors {
            control: 0x37f,
            status: 0,
            tags: 0,
            st: [[0; 10]; 8],
            mxcsr: 0x1f80,
            zmm: [[0; 64]; 32],
            k: [0; 8],
        }
    }
}

impl Vectors {
    /// What an area stands for.
    pub fn of(area: &FpuArea, layout: &XsaveLayout) -> Self {
        let b = &area.bytes;
        let present = u64::from_le_bytes(array(&b[XSTATE_BV..])) & layout.mask;
        let mut v = Vectors {
            mxcsr: u32::from_le_bytes(array(&b[24..])),
            ..Vectors::default()
        };
        if present & X87 != 0 {
            v.control = u16::from_le_bytes(array(&b[0..]));
            v.status = u16::from_le_bytes(array(&b[2..]));
            v.tags = b[4];
            for (n, st) in v.st.iter_mut().enumerate() {
                *st = array(&b[32 + 16 * n..]);
            }
        }
        for (n, zmm) in v.zmm.iter_mut().enumerate() {
            for (component, from, to, len) in parts(layout, n) {
                if present & component != 0 {
                    zmm[to..to + len].copy_from_slice(&b[from..from + len]);
                }
            }
        }
        if present & OPMASK != 0 {
            for (n, k) in v.k.iter_mut().enumerate() {
                *k = u64::from_le_bytes(array(&b[layout.opmask + 8 * n..]));
            }
        }
        v
    }

    /// An area that stands for this, with the components of the layout in use.
    pub fn store(&self, layout: &XsaveLayout) -> Box<FpuArea> {
        let mut area = Box::new(FpuArea::reset());
        let b = &mut area.bytes;
        b[0..2].copy_from_slice(&self.control.to_le_bytes());
        b[2..4].copy_from_slice(&self.status.to_le_bytes());
        b[4] = self.tags;
        b[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        for (n, st) in self.st.iter().enumerate() {
            b[32 + 16 * n..][..10].copy_from_slice(st);
        }
        for (n, zmm) in self.zmm.iter().enumerate() {
            for (component, at, from, len) in parts(layout, n) {
                if layout.mask & component != 0 {
                    b[at..at + len].copy_from_slice(&zmm[from..from + len]);
                }
            }
        }
        if layout.mask & OPMASK != 0 {
            for (n, k) in self.k.iter().enumerate() {
                b[layout.opmask + 8 * n..][..8].copy_from_slice(&k.to_le_bytes());
            }
        }
        b[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&layout.mask.to_le_bytes());
        area
    }
}

/// The parts of vector register `n`: component, offset in the area, offset in the register, length.
fn parts(layout: &XsaveLayout, n: usize) -> impl Iterator<Item = (u64, usize, usize, usize)> {
    let low = [
        (SSE, 160 + 16 * n, 0, 16),
        (AVX, layout.avx + 16 * n, 16, 16),
        (ZMM_HIGH, layout.zmm_high + 32 * n, 32, 32),
    ];
    let high = [(HIGH_16, layout.high_16 + 64 * n.saturating_sub(16), 0, 64)];
    let (low, high) = if n < 16 {
        (&low[..], &high[..0])
    } else {
        (&low[..0], &high[..])
    };
    let all: Vec<_> = low.iter().chain(high).copied().collect();
    all.into_iter()
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut a = [0; N];
    a.copy_from_slice(&bytes[..N]);
    a
}
