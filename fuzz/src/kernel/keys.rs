//! Items for processors with protection keys: rights that change by WRPKRU and XRSTOR, and accesses before and after.

use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{CodeAssembler, dword_ptr, qword_ptr, zmmword_ptr};

use super::write::{Assembled, Mode, Writer};

/// An access, other rights, the same access.
pub fn change_rights(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let at = match w.mode {
        // Of 16-bit code a segment's base is added.
        Mode::Bits16 => w.r.below(0x7000),
        _ => w.pointer(),
    };
    let stores = w.r.percent(50);
    access(w, a, at, stores)?;
    match (w.mode, w.r.below(10)) {
        (Mode::Bits64, 0..3) => restore(w, a)?,
        (_, 3) => {
            a.xor(ecx, ecx)?;
            a.rdpkru()?;
        }
        _ => write(w, a)?,
    }
    access(w, a, at, stores)
}

fn access(w: &Writer, a: &mut CodeAssembler, at: u64, stores: bool) -> Assembled {
    match (w.mode, stores) {
        (Mode::Bits64, _) => a.mov(rbx, at)?,
        _ => a.mov(ebx, at as u32)?,
    }
    match (w.mode, stores) {
        (Mode::Bits64, true) => a.mov(qword_ptr(rbx), rsi),
        (Mode::Bits64, false) => a.mov(rsi, qword_ptr(rbx)),
        (_, true) => a.mov(dword_ptr(ebx), esi),
        (_, false) => a.mov(esi, dword_ptr(ebx)),
    }
}

/// WRPKRU, rarely with what it does not take in ECX or EDX.
fn write(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    a.mov(eax, w.rights())?;
    for register in [ecx, edx] {
        match w.r.percent(3) {
            true => a.mov(register, w.r.bits() as u32)?,
            false => a.xor(register, register)?,
        }
    }
    a.wrpkru()
}

/// XRSTOR of an area that has PKRU alone, or not even that. It is a compacted one, in which every processor has it in the same place.
fn restore(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    const PKRU: u32 = 1 << 9;
    const COMPACTED: u64 = 1 << 63;
    const HEADER: u64 = 512;
    let area = w.own_data();
    let present = if w.r.percent(80) { PKRU } else { 0 };
    a.mov(rbx, area)?;
    for word in 2..8 {
        a.mov(qword_ptr(rbx + HEADER + 8 * word), 0)?;
    }
    a.mov(qword_ptr(rbx + HEADER), present as i32)?;
    a.mov(rax, COMPACTED | u64::from(PKRU))?;
    a.mov(qword_ptr(rbx + HEADER + 8), rax)?;
    a.mov(dword_ptr(rbx + HEADER + 64), w.rights() as i32)?;
    a.mov(eax, PKRU)?;
    a.xor(edx, edx)?;
    a.xrstor64(zmmword_ptr(rbx))
}
