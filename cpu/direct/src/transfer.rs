//! The state of user code, between the CPU and a child.

use doppel_memory::probe;
use doppel_x86::{Cpu, Exception, Rflags, Seg, Segment, flat_attributes};

use crate::state::{CODE_64, UserState};

const USER_DPL: u32 = 3 << 5;

/// Bytes of the XSAVE area that hold components up to AVX-512's.
const XSAVE_BYTES: usize = 2688;

/// From the CPU.
pub(crate) fn load(user: &mut UserState, cpu: &Cpu) {
    let selector = |s: Seg| cpu.segment(s).selector;
    user.gprs = cpu.gpr;
    user.rip = cpu.rip;
    user.rflags = cpu.rflags.bits();
    user.fs_base = cpu.segment(Seg::Fs).base;
    user.gs_base = cpu.segment(Seg::Gs).base;
    (user.cs, user.ss) = (selector(Seg::Cs), selector(Seg::Ss));
    (user.ds, user.es) = (selector(Seg::Ds), selector(Seg::Es));
    (user.fs, user.gs) = (selector(Seg::Fs), selector(Seg::Gs));
    user.fpu.bytes[..XSAVE_BYTES].copy_from_slice(&cpu.fpu.bytes[..XSAVE_BYTES]);
}

/// Into the CPU.
pub(crate) fn store(user: &UserState, cpu: &mut Cpu) {
    /// RF is set in the state that a fault saves, for an instruction breakpoint that there is none of.
    const NOT_RF: u64 = !Rflags::RF.bits();
    let changed = UserState::FLAGS & NOT_RF;
    let kept = cpu.rflags.bits() & !UserState::FLAGS;
    cpu.gpr = user.gprs;
    cpu.rip = user.rip;
    cpu.rflags = Rflags::from_bits_retain(kept | user.rflags & changed);
    cpu.fpu.bytes[..XSAVE_BYTES].copy_from_slice(&user.fpu.bytes[..XSAVE_BYTES]);
    forget_hidden_components(cpu);
    for (segment, selector) in [
        (Seg::Cs, user.cs),
        (Seg::Ss, user.ss),
        (Seg::Ds, user.ds),
        (Seg::Es, user.es),
        (Seg::Fs, user.fs),
        (Seg::Gs, user.gs),
    ] {
        if cpu.segment(segment).selector != selector {
            cpu.seg[segment as usize] = loaded(segment, selector);
        }
    }
    cpu.seg[Seg::Fs as usize].base = user.fs_base;
    cpu.seg[Seg::Gs as usize].base = user.gs_base;
}

/// Components that the guest's processor does not have go back to their initial state, whatever was executed.
fn forget_hidden_components(cpu: &mut Cpu) {
    const LEGACY: u64 = 0b11;
    const XSTATE_BV: std::ops::Range<usize> = 512..520;
    let mine = (cpu.xcr0 | LEGACY).to_le_bytes();
    for (byte, mask) in cpu.fpu.bytes[XSTATE_BV].iter_mut().zip(mine) {
        *byte &= mask;
    }
}

/// What user code has loaded from the host's descriptor table, which has flat segments alone.
fn loaded(segment: Seg, selector: u16) -> Segment {
    let attributes = match (segment, selector) {
        (Seg::Cs, CODE_64) => flat_attributes::CODE64 | USER_DPL,
        (Seg::Cs, _) => flat_attributes::CODE32 | USER_DPL,
        (_, 0..=3) => Segment::UNUSABLE,
        _ => flat_attributes::DATA | USER_DPL,
    };
    Segment {
        base: 0,
        limit: u32::MAX,
        attributes,
        selector,
    }
}

/// A trap came whose exception the interpreter would not raise as the processor did: a single step, after user code has set TF (RF is set between the
/// parts of a string instruction), or a SIMD floating-point exception, whose flags in MXCSR depend on what is masked. Otherwise RIP is where
/// an instruction begins that is to be interpreted; behind INT1, INT3 and INT with their vectors, which trap, it is led back there.
pub(crate) fn raised(cpu: &mut Cpu, user: &UserState, vector: u8, dr6: u64) -> Option<Exception> {
    const DR6_BS: u64 = 1 << 14;
    const DB: u8 = 1;
    const BP: u8 = 3;
    const OF: u8 = 4;
    const XM: u8 = 19;
    let before = |n: u64| code_byte(cpu, cpu.rip.wrapping_sub(n));
    let back = match vector {
        DB if dr6 & DR6_BS != 0 => {
            cpu.rflags |= Rflags::from_bits_retain(user.rflags) & Rflags::RF;
            return Some(Exception::db(DR6_BS, true));
        }
        XM => return Some(Exception::XM),
        DB if before(1) == Some(0xf1) => 1,
        BP if before(1) == Some(0xcc) => 1,
        // INTO, of 32-bit code.
        OF if before(1) == Some(0xce) => 1,
        BP | OF if before(2) == Some(0xcd) => 2,
        _ => 0,
    };
    cpu.rip = cpu.rip.wrapping_sub(back);
    None
}

fn code_byte(cpu: &Cpu, linear: u64) -> Option<u8> {
    let at = probe(&cpu.ram, &cpu.paging(), linear)?;
    cpu.ram.load::<u8>(at.gpa)
}
