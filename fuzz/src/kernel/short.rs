//! Items of 16-bit code: 16-bit addresses, stacks, counters and strings, near where they wrap at times; paragraphs in segment registers.

use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{AsmMemoryOperand, CodeAssembler, byte_ptr, dword_ptr, word_ptr};

use super::layout::*;
use super::write::{Assembled, Writer};

/// An offset in a segment of 64 KiB, or less.
fn offset(w: &mut Writer) -> i32 {
    let at = match w.r.below(12) {
        0 => 0xfff0 + w.r.below(16),
        1 => 0x7ff0 + w.r.below(32),
        2 => w.r.below(16),
        3..5 => 0x1000 * w.r.below(7) + 0xff8 + w.r.below(16),
        _ => w.r.below(0x7000),
    };
    at as i32
}

/// Sets registers so that the memory operand that is given back lies at an offset.
fn memory(w: &mut Writer, a: &mut CodeAssembler) -> Result<AsmMemoryOperand, iced_x86::IcedError> {
    let (at, part) = (offset(w), w.r.below(0x200) as i32);
    let d = *w.r.pick(&[0i32, 0, 2, -1, 0x7f, 0x120]);
    let single = (at - d) & 0xffff;
    let rest = (single - part) & 0xffff;
    let m = match w.r.below(6) {
        0 => {
            a.mov(bx, single)?;
            bx + d
        }
        1 => {
            a.mov(si, single)?;
            si + d
        }
        2 => {
            a.mov(bp, single)?;
            bp + d
        }
        3 => {
            a.mov(bx, rest)?;
            a.mov(di, part)?;
            bx + di + d
        }
        4 => {
            a.mov(bp, part)?;
            a.mov(si, rest)?;
            bp + si + d
        }
        _ => {
            // 32-bit addresses beside those of 16 bits.
            a.mov(edi, single as u32)?;
            edi + d
        }
    };
    Ok(match w.r.below(10) {
        0 => m.es(),
        1 => m.cs(),
        2 => m.ss(),
        3 => m.fs(),
        _ => m,
    })
}

fn access(w: &mut Writer, a: &mut CodeAssembler, m: AsmMemoryOperand) -> Assembled {
    match w.r.below(15) {
        0 | 1 => a.mov(ax, word_ptr(m)),
        2 | 3 => a.mov(word_ptr(m), dx),
        4 => a.add(word_ptr(m), cx),
        5 => a.adc(dword_ptr(m), eax),
        6 => a.mov(byte_ptr(m), ch),
        7 => a.sub(dl, byte_ptr(m)),
        8 => a.mov(edx, dword_ptr(m)),
        9 => a.push(word_ptr(m)),
        10 => a.lock().xadd(word_ptr(m), ax),
        11 => a.movzx(ecx, byte_ptr(m)),
        12 => a.lea(dx, m),
        13 => a.xchg(word_ptr(m), ax),
        _ => a.cmp(word_ptr(m), 3),
    }
}

pub fn accesses(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    for _ in 0..1 + w.r.below(4) {
        let m = memory(w, a)?;
        access(w, a, m)?;
    }
    Ok(())
}

pub fn loops(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let m = memory(w, a)?;
    let mut again = a.create_label();
    let times = 1 + w.r.below(60) as u32;
    a.mov(ecx, times | (w.r.bits() as u32) << 16)?;
    a.set_label(&mut again)?;
    match w.r.below(4) {
        0 => a.add(ax, word_ptr(m))?,
        1 => a.inc(byte_ptr(m))?,
        2 => {
            a.push(cx)?;
            a.pop(dx)?;
        }
        _ => a.rol(ax, 1)?,
    }
    match w.r.below(5) {
        0 => a.loope(again),
        1 => a.loopne(again),
        2 => {
            a.dec(cx)?;
            a.jnz(again)
        }
        _ => a.loop_(again),
    }
}

pub fn stack(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (mut routine, mut over) = (a.create_label(), a.create_label());
    match w.r.below(8) {
        0 | 1 => {
            a.call(routine)?;
            a.jmp(over)?;
            a.set_label(&mut routine)?;
            a.inc(ax)?;
            match w.r.percent(60) {
                true => a.ret()?,
                false => a.ret_1(2)?,
            }
            a.set_label(&mut over)?;
            a.nop()
        }
        2 => {
            a.push(bp)?;
            a.mov(bp, sp)?;
            a.sub(sp, 8)?;
            a.mov(word_ptr(bp - 4), ax)?;
            a.leave()
        }
        3 => {
            a.pusha()?;
            a.popa()
        }
        4 => {
            a.push(ax)?;
            a.push(ecx)?;
            a.pop(edx)?;
            a.pop(bx)
        }
        5 => {
            a.pushf()?;
            a.pop(ax)?;
            a.push(ax)?;
            a.popf()
        }
        6 if w.cpl == 3 => {
            // Where it wraps.
            let sp_then = *w.r.pick(&[0i32, 1, 2, 3, 0xfffe, 0xffff]);
            a.mov(dx, sp)?;
            a.mov(sp, sp_then)?;
            match w.r.percent(50) {
                true => a.push(ax)?,
                false => a.pop(ax)?,
            }
            a.mov(sp, dx)
        }
        _ => {
            a.mov(bx, sp)?;
            a.push(0x1234)?;
            a.mov(ax, word_ptr(bx - 2).ss())?;
            a.pop(cx)
        }
    }
}

pub fn strings(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (from, to) = (offset(w), offset(w));
    let count = *w.r.pick(&[0i32, 1, 7, 40, 300, 3000]);
    a.mov(si, from)?;
    a.mov(di, to)?;
    a.mov(cx, count)?;
    if w.r.percent(6) {
        a.std()?;
    }
    match w.r.below(12) {
        0 => a.rep().movsb()?,
        1 => a.rep().movsw()?,
        2 => a.rep().stosd()?,
        3 => a.rep().stosb()?,
        4 => a.repe().cmpsb()?,
        5 => a.repne().scasw()?,
        6 => a.lodsb()?,
        7 => a.stosw()?,
        8 => a.movsd()?,
        9 => a.scasb()?,
        10 => a.db(&[0x2e, 0xf3, 0xa4])?,
        _ => a.cmpsw()?,
    }
    a.cld()
}

/// Segments of 16-bit code: paragraphs of the user's pages, or descriptors of 64 KiB.
pub fn segments(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let v86 = w.v86;
    let value = match v86 {
        true => *w.r.pick(&[0xffffu16, 0xffff, 0xfffe, 0xf800]),
        false => match w.cpl {
            3 => *w.r.pick(&[D16, S16, UDS, U16]),
            _ => *w.r.pick(&[KD16, KS16, KDS, K16]),
        },
    };
    a.mov(ax, i32::from(value))?;
    match w.r.below(6) {
        0 | 1 => a.mov(ds, ax),
        2 => a.mov(es, ax),
        3 => a.mov(fs, ax),
        4 => {
            a.push(ds)?;
            a.pop(es)
        }
        _ => {
            a.mov(bx, es)?;
            a.mov(ds, bx)
        }
    }
}
