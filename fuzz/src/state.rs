//! What a case starts from and what it ends in.

use crate::layout::{CODE, CONSTANT, DATA, LANDING, REGIONS, STACK_START, UD2};
use crate::random::Random;
use crate::xsave::Vectors;
use doppel_x86::Rflags;

/// The bytes of every region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory(pub [Vec<u8>; 4]);

/// Registers and memory before the first instruction.
#[derive(Clone, Debug)]
pub struct State {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub flags: u64,
    pub fs: u64,
    pub gs: u64,
    pub vectors: Vectors,
    pub memory: Memory,
}

/// Why a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// An exception; `address` is CR2 where it is a page fault.
    Exception {
        vector: u8,
        error: u64,
        address: Option<u64>,
    },
    /// It did not end by itself.
    TimedOut,
    /// The engine left otherwise (triple fault).
    Other,
}

/// Registers and memory when the case has ended, at the exception that ended it.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub ending: Ending,
    pub gpr: [u64; 16],
    pub rip: u64,
    pub flags: u64,
    pub fs: u64,
    pub gs: u64,
    pub vectors: Vectors,
    pub memory: Memory,
}

const XMM_OF_INDICES: std::ops::Range<usize> = 12..16;

impl State {
    /// The state of a case.
    pub fn random(r: &mut Random) -> Self {
        let mut gpr = [0; 16];
        for g in &mut gpr {
            *g = match r.below(4) {
                0 => DATA.base + r.below(DATA.len - 64),
                1 => r.below(64),
                _ => r.value(),
            };
        }
        gpr[4] = STACK_START - 8 * r.below(16);
        let flags = r.bits() & (Rflags::ARITHMETIC | Rflags::DF).bits();
        let direction = if r.percent(85) {
            !Rflags::DF.bits()
        } else {
            !0
        };
        State {
            gpr,
            rip: start(r),
            flags: flags & direction | (Rflags::ONE | Rflags::IF).bits(),
            fs: DATA.base + r.below(0x1000),
            gs: DATA.base + r.below(0x1000),
            vectors: vectors(r),
            memory: memory(r),
        }
    }
}

/// Usually early in the page, sometimes such that the code crosses into the next one.
fn start(r: &mut Random) -> u64 {
    match r.below(8) {
        0 => CODE.base + 0x1000 - 1 - r.below(0x60),
        _ => CODE.base + r.below(0x40),
    }
}

fn vectors(r: &mut Random) -> Vectors {
    let mut v = Vectors {
        mxcsr: mxcsr(r),
        control: x87_control(r),
        tags: if r.percent(50) { r.bits() as u8 } else { 0 },
        status: (r.below(8) << 11 | r.bits() & 0x4700) as u16,
        ..Vectors::default()
    };
    for st in &mut v.st {
        *st = extended(r);
    }
    for zmm in &mut v.zmm {
        for (n, chunk) in zmm.chunks_mut(8).enumerate() {
            let again = n > 0 && r.percent(20);
            let word = if again { 0 } else { lanes(r) };
            chunk.copy_from_slice(&word.to_le_bytes());
        }
    }
    // Small numbers, so that gathers and scatters stay within the data.
    for (n, zmm) in v.zmm[XMM_OF_INDICES].iter_mut().enumerate() {
        for lane in zmm.chunks_mut(if n < 2 { 4 } else { 8 }) {
            lane.fill(0);
            lane[0] = r.below(256) as u8;
        }
    }
    for k in &mut v.k {
        *k = r.bits() | if r.percent(30) { !0 } else { 0 };
    }
    v
}

/// MXCSR.MM, where the processor has it: SSE operands need not be aligned.
fn misaligned_sse() -> u32 {
    const MISALIGNED: u32 = 1 << 7;
    const MM: u32 = 1 << 17;
    match raw_cpuid::cpuid!(0x8000_0001).ecx & MISALIGNED {
        0 => 0,
        _ => MM,
    }
}

fn mxcsr(r: &mut Random) -> u32 {
    let mut m = 0x1f80;
    if r.percent(30) {
        m |= (r.bits() & 0x6000) as u32;
    }
    if r.percent(10) {
        let offered = 0x8040 | misaligned_sse();
        m |= (r.bits() & u64::from(offered)) as u32;
    }
    if r.percent(8) {
        m &= !(r.bits() & 0x1f80) as u32;
    }
    m | if r.percent(10) {
        r.bits() as u32 & 0x3f
    } else {
        0
    }
}

fn x87_control(r: &mut Random) -> u16 {
    let mut c = 0x37f;
    if r.percent(30) {
        c = c & !0xf00 | (r.bits() & 0xf00) as u16;
    }
    if r.percent(8) {
        c &= !(r.bits() & 0x3f) as u16;
    }
    c
}

/// Eight bytes of a vector: integers, one double, two singles, edges.
fn lanes(r: &mut Random) -> u64 {
    match r.below(5) {
        0 => double(r),
        1 => u64::from(single(r)) | u64::from(single(r)) << 32,
        2 => r.value(),
        _ => r.bits(),
    }
}

fn double(r: &mut Random) -> u64 {
    const EDGES: [u64; 8] = [
        0,
        1 << 63,
        0x7ff0_0000_0000_0000,
        0xfff0_0000_0000_0000,
        0x7ff8_0000_0000_0000,
        0x7ff0_0000_0000_0001,
        1,
        0x3ff0_0000_0000_0000,
    ];
    match r.below(3) {
        0 => *r.pick(&EDGES),
        _ => ((r.bits() as i32 as f64) / (1 + r.below(1000)) as f64).to_bits(),
    }
}

fn single(r: &mut Random) -> u32 {
    const EDGES: [u32; 8] = [
        0,
        1 << 31,
        0x7f80_0000,
        0xff80_0000,
        0x7fc0_0000,
        0x7f80_0001,
        1,
        0x3f80_0000,
    ];
    match r.below(3) {
        0 => *r.pick(&EDGES),
        _ => ((r.bits() as i16 as f32) / (1 + r.below(1000)) as f32).to_bits(),
    }
}

/// An 80-bit number.
fn extended(r: &mut Random) -> [u8; 10] {
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&(r.bits() | 1 << 63).to_le_bytes());
    let exponent = match r.below(6) {
        0 => 0x7fff,
        1 => 0,
        2 => r.bits() as u16,
        _ => (0x3fff - 8 + r.below(24) as u16) | (r.bits() as u16 & 0x8000),
    };
    if exponent & 0x7fff == 0 {
        bytes[7] &= 0x7f;
    }
    if r.percent(10) {
        bytes[..8].copy_from_slice(&r.value().to_le_bytes());
    }
    bytes[8..].copy_from_slice(&exponent.to_le_bytes());
    bytes
}

fn memory(r: &mut Random) -> Memory {
    let mut memory = Memory(REGIONS.map(|region| vec![0; region.len as usize]));
    for bytes in memory.0[0].chunks_mut(2) {
        bytes.copy_from_slice(&UD2);
    }
    for region in [1, 3] {
        fill(r, &mut memory.0[region]);
    }
    // The same in every case, so that the host's pages need not be written.
    fill(&mut Random::of(0, 0, CONSTANT.base), &mut memory.0[2]);
    memory
}

fn fill(r: &mut Random, bytes: &mut [u8]) {
    for word in bytes.chunks_mut(8) {
        let v = match r.below(8) {
            0 | 1 => LANDING + 2 * r.below(64),
            2 => r.value(),
            3 => lanes(r),
            _ => r.bits(),
        };
        word.copy_from_slice(&v.to_le_bytes());
    }
}
