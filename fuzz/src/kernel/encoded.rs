//! System instructions by their bytes: every operand size and form of addressing, in every code size.

use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{CodeAssembler, dword_ptr, word_ptr};

use super::layout::*;
use super::write::{Assembled, Mode, Writer};

/// An opcode and what follows it.
enum Tail {
    None,
    /// A ModRM byte with any register field.
    Modrm,
    /// The same without a memory operand.
    Registers,
    /// An immediate of so many bytes.
    Immediate(usize),
}

use Tail::{Immediate, Modrm, None as Nothing, Registers};

/// Opcodes, and how often.
const OPCODES: &[(u64, &[u8], Tail)] = &[
    // SLDT, STR, LLDT, LTR, VERR, VERW.
    (6, &[0x0f, 0x00], Modrm),
    // SGDT, SIDT, LGDT, LIDT, SMSW, LMSW, INVLPG.
    (4, &[0x0f, 0x01], Modrm),
    (4, &[0x0f, 0x02], Modrm),
    (4, &[0x0f, 0x03], Modrm),
    (1, &[0x0f, 0x06], Nothing),
    (1, &[0x0f, 0x08], Nothing),
    (1, &[0x0f, 0x09], Nothing),
    (2, &[0x0f, 0x20], Registers),
    (2, &[0x0f, 0x21], Registers),
    (1, &[0x0f, 0x23], Registers),
    (1, &[0x0f, 0x32], Nothing),
    (2, &[0x0f, 0xb2], Modrm),
    (2, &[0x0f, 0xb4], Modrm),
    (2, &[0x0f, 0xb5], Modrm),
    (4, &[0x8e], Modrm),
    (4, &[0x8c], Modrm),
    (2, &[0xc4], Modrm),
    (2, &[0xc5], Modrm),
    (3, &[0x62], Modrm),
    (2, &[0x63], Modrm),
    (2, &[0xcf], Nothing),
    (2, &[0xcb], Nothing),
    (1, &[0xca], Immediate(2)),
    (1, &[0xc3], Nothing),
    (2, &[0x6c], Nothing),
    (2, &[0x6d], Nothing),
    (2, &[0x6e], Nothing),
    (2, &[0x6f], Nothing),
    (1, &[0xe4], Immediate(1)),
    (1, &[0xe5], Immediate(1)),
    (1, &[0xec], Nothing),
    (1, &[0xed], Nothing),
    (1, &[0x0f, 0xa0], Nothing),
    (1, &[0x0f, 0xa1], Nothing),
    (1, &[0x0f, 0xa8], Nothing),
    (1, &[0x0f, 0xa9], Nothing),
    (1, &[0x06], Nothing),
    (1, &[0x07], Nothing),
    (1, &[0x16], Nothing),
    (1, &[0x17], Nothing),
    (1, &[0x1f], Nothing),
    (1, &[0x0f, 0x05], Nothing),
    (1, &[0x0f, 0x07], Nothing),
    (1, &[0x0f, 0x34], Nothing),
    (1, &[0x0f, 0x35], Nothing),
    (1, &[0x9c], Nothing),
    (2, &[0x9d], Nothing),
    (1, &[0xfa], Nothing),
    (1, &[0xfb], Nothing),
    (1, &[0xf4], Nothing),
    (1, &[0xce], Nothing),
    (1, &[0x0f, 0x01, 0xf8], Nothing),
    (1, &[0x0f, 0x01, 0xca], Nothing),
    (1, &[0x0f, 0x01, 0xcb], Nothing),
    (1, &[0x0f, 0x01, 0xd0], Nothing),
    (1, &[0x0f, 0x01, 0xc1], Nothing),
    (1, &[0x0f, 0x01, 0xc8], Nothing),
    (1, &[0x0f, 0x01, 0xc9], Nothing),
    (1, &[0x0f, 0x01, 0xee], Nothing),
    (1, &[0x0f, 0x01, 0xef], Nothing),
    (1, &[0x0f, 0xb9], Modrm),
    (1, &[0x0f, 0xff], Modrm),
    (1, &[0x0f, 0xaa], Nothing),
    (1, &[0xf0, 0x0f, 0x22, 0xc0], Nothing),
    (1, &[0x8f], Modrm),
    (1, &[0xff], Modrm),
    (1, &[0x60], Nothing),
    (1, &[0x61], Nothing),
    (1, &[0x9b], Nothing),
    (1, &[0xcd], Immediate(1)),
    (1, &[0x0f, 0xc7], Modrm),
];

/// The register that points to memory.
const MEMORY: u8 = 3;

fn modrm(w: &mut Writer, memory: bool) -> u8 {
    let reg = w.r.below(8) as u8;
    match memory && w.r.percent(65) {
        // [RBX], or with 8 bits more.
        true => reg << 3 | MEMORY,
        false => 0xc0 | reg << 3 | w.r.below(3) as u8,
    }
}

fn bytes(w: &mut Writer) -> Vec<u8> {
    let total: u64 = OPCODES.iter().map(|o| o.0).sum();
    let mut left = w.r.below(total);
    let chosen = OPCODES.iter().find(|o| match left.checked_sub(o.0) {
        Some(rest) => {
            left = rest;
            false
        }
        None => true,
    });
    let (_, opcode, tail) = chosen.unwrap_or(&OPCODES[0]);
    let mut code = Vec::new();
    for (prefix, percent) in [(0x66, 25), (0xf3, 4), (0xf2, 4), (0x64, 5), (0xf0, 2)] {
        if w.r.percent(percent) {
            code.push(prefix);
        }
    }
    if w.mode == Mode::Bits16 && w.r.percent(70) {
        // The address is 32 bits wide.
        code.push(0x67);
    }
    if w.mode == Mode::Bits64 && w.r.percent(40) {
        code.push(0x48);
    }
    code.extend(*opcode);
    match tail {
        Nothing => {}
        Modrm => code.push(modrm(w, true)),
        Registers => code.push(modrm(w, false)),
        Immediate(n) => code.extend((0..*n).map(|_| w.r.bits() as u8 & 0x4f)),
    }
    // RDTSC, RDPMC, RDRAND and their kin tell of the host.
    let tells = code.windows(2).any(|b| b == [0x0f, 0xc7]) && code.last() >= Some(&0xc0);
    if tells { vec![0x90] } else { code }
}

/// One of them, with operands that are likely to be of use.
pub fn instruction(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (at, selector, other) = (w.pointer(), w.selector(), w.selector());
    let port = 0x40 + w.r.below(8);
    match w.mode {
        Mode::Bits64 => a.mov(rbx, at)?,
        _ => a.mov(ebx, at as u32)?,
    }
    a.mov(eax, u32::from(selector))?;
    a.mov(ecx, w.r.below(4) as u32)?;
    a.mov(edx, port as u32)?;
    if w.r.percent(50) {
        // A far pointer in memory.
        let target = *w.r.pick(&[USER_PAD, KERNEL_PAD, USER_DATA]);
        match w.mode {
            Mode::Bits64 => {
                a.mov(dword_ptr(rbx), target as i32)?;
                a.mov(word_ptr(rbx + 4), i32::from(other as i16))?;
            }
            _ => {
                a.mov(dword_ptr(ebx), target as i32)?;
                a.mov(word_ptr(ebx + 4), i32::from(other as i16))?;
            }
        }
    }
    if w.r.percent(30) {
        // On the stack, too.
        for v in [u32::from(other), USER_PAD as u32] {
            a.mov(edi, v)?;
            match w.mode {
                Mode::Bits64 => a.push(rdi)?,
                _ => a.push(edi)?,
            }
        }
    }
    let code = bytes(w);
    a.db(&code)
}
