//! Items of 32-bit and 16-bit code under a 64-bit kernel: segments with bases and limits, instructions that 64-bit mode has not.

use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{CodeAssembler, byte_ptr, dword_ptr, fword_ptr, word_ptr};

use super::layout::*;
use super::write::{Assembled, Writer};

fn access(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let base = w.register32();
    let data = w.register32();
    let m = base + *w.r.pick(&[0i32, 0, 4, 0x7c, -4, 0x1000]);
    let m = match w.r.below(8) {
        0 => m.es(),
        1 => m.fs(),
        2 => m.cs(),
        3 => m.gs(),
        _ => m,
    };
    match w.r.below(12) {
        0 | 1 => a.mov(data, dword_ptr(m)),
        2 | 3 => a.mov(dword_ptr(m), data),
        4 => a.add(dword_ptr(m), data),
        5 => a.cmp(word_ptr(m), 3),
        6 => a.mov(byte_ptr(m), 0x5a),
        7 => a.lock().xadd(dword_ptr(m), data),
        8 => a.push(dword_ptr(m)),
        9 => a.pop(dword_ptr(m)),
        10 => a.movzx(data, byte_ptr(m)),
        _ => a.xchg(dword_ptr(m), data),
    }
}

fn compute_one(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (x, y) = (w.register32(), w.register32());
    match w.r.below(9) {
        0 => a.add(x, y),
        1 => a.sub(x, y),
        2 => a.adc(x, y),
        3 => a.inc(x),
        4 => a.dec(x),
        5 => a.mov(x, y),
        6 => a.lea(x, dword_ptr(y + x * 2 + 1)),
        7 => a.cmp(x, y),
        _ => a.neg(x),
    }
}

pub fn accesses(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    for _ in 0..1 + w.r.below(3) {
        if w.r.percent(80) {
            let (base, at) = (w.register32(), w.pointer());
            a.mov(base, at as u32)?;
        }
        access(w, a)?;
    }
    Ok(())
}

pub fn compute(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    for _ in 0..1 + w.r.below(6) {
        compute_one(w, a)?;
    }
    Ok(())
}

pub fn bounded_loop(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let at = w.pointer();
    let mut again = a.create_label();
    a.mov(ebx, at as u32)?;
    a.mov(ebp, 2 + w.r.below(50) as u32)?;
    a.set_label(&mut again)?;
    access(w, a)?;
    compute_one(w, a)?;
    a.dec(ebp)?;
    a.jnz(again)
}

pub fn load_segment(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let selector = w.selector();
    a.mov(eax, u32::from(selector))?;
    match w.r.below(9) {
        0 => a.mov(ds, eax),
        1 => a.mov(es, eax),
        2 => a.mov(fs, eax),
        3 => a.mov(gs, eax),
        4 => {
            a.push(eax)?;
            a.pop(es)
        }
        5 => {
            a.mov(ss, eax)?;
            a.push(eax)
        }
        n => {
            let at = w.pointer();
            a.mov(ebx, at as u32)?;
            match n {
                6 => a.les(ecx, fword_ptr(ebx)),
                7 => a.lds(ecx, fword_ptr(ebx)),
                _ => a.lss(ecx, fword_ptr(ebx)),
            }
        }
    }
}

/// Instructions that 64-bit mode has not.
pub fn only_here(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let at = w.pointer();
    match w.r.below(13) {
        0 => a.pushad(),
        1 => a.popad(),
        2 => a.into(),
        3 => {
            a.mov(ebx, at as u32)?;
            a.bound(eax, dword_ptr(ebx))
        }
        4 => a.salc(),
        5 => {
            a.push(es)?;
            a.pop(ds)
        }
        6 => {
            a.mov(eax, w.r.below(0x100) as u32)?;
            a.arpl(ax, cx)
        }
        7 => a.aad(10),
        8 => a.db(&[0xd4, 0x00]),
        9 => {
            a.mov(eax, 0x7fff_ffff)?;
            a.inc(eax)?;
            a.into()
        }
        10 => {
            // INC and DEC in one byte, and the other encodings.
            a.db(&[0x40 + w.r.below(16) as u8])
        }
        11 => a.db(&[0x82, 0xc0, 0x11]),
        _ => {
            a.push(cs)?;
            a.pop(eax)
        }
    }
}

pub fn transfer(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (selector, other) = (w.selector(), w.selector());
    let rip =
        *w.r.pick(&[USER_PAD, USER_PAD, KERNEL_PAD, USER_PAD - USER_CODE]);
    let flags = w.flags();
    match w.r.below(8) {
        0 => {
            for v in [
                u64::from(other),
                USER_STACK - 0x200,
                flags,
                u64::from(selector),
                rip,
            ] {
                a.mov(eax, v as u32)?;
                a.push(eax)?;
            }
            a.iretd()
        }
        1 => {
            for v in [
                u64::from(other),
                USER_STACK - 0x200,
                u64::from(selector),
                rip,
            ] {
                a.mov(eax, v as u32)?;
                a.push(eax)?;
            }
            match w.r.percent(70) {
                true => a.db(&[0xcb]),
                false => a.db(&[0xca, 8, 0]),
            }
        }
        2 => {
            a.mov(edi, USER_DATA as u32 + 0x7100)?;
            a.mov(eax, rip as u32)?;
            a.mov(dword_ptr(edi), eax)?;
            a.mov(word_ptr(edi + 4), i32::from(selector as i16))?;
            match w.r.percent(50) {
                true => a.call(fword_ptr(edi)),
                false => a.jmp(fword_ptr(edi)),
            }
        }
        3 => a.syscall(),
        4 => a.sysenter(),
        5 => a.int(u32::from(RANDOM_GATES.start) + w.r.below(16) as u32),
        6 => {
            // A far branch with its target in the code.
            let [r0, r1, r2, r3] = (rip as u32).to_le_bytes();
            let [s0, s1] = selector.to_le_bytes();
            match w.mode {
                super::write::Mode::Bits32 => a.db(&[0xea, r0, r1, r2, r3, s0, s1]),
                _ => a.db(&[0x66, 0xea, r0, r1, r2, r3, s0, s1]),
            }
        }
        _ => {
            a.pushfd()?;
            a.pop(eax)?;
            a.mov(eax, flags as u32)?;
            a.push(eax)?;
            a.popfd()?;
            a.nop()
        }
    }
}

pub fn strings(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (from, to) = (w.pointer(), w.pointer());
    a.mov(esi, from as u32)?;
    a.mov(edi, to as u32)?;
    a.mov(ecx, w.r.below(0x40) as u32)?;
    match w.r.below(5) {
        0 => a.rep().movsd(),
        1 => a.rep().stosb(),
        2 => a.repe().cmpsb(),
        3 => a.repne().scasw(),
        _ => a.lodsd(),
    }
}

pub fn call_routine(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let at = w.routine();
    a.mov(eax, at as u32)?;
    a.call(eax)
}

pub fn exception(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    match w.r.below(7) {
        0 => a.ud2(),
        1 => a.int3(),
        2 => a.db(&[0xf1]),
        3 => {
            a.xor(ecx, ecx)?;
            a.div(ecx)
        }
        4 => a.int(w.r.below(256) as u32),
        5 => a.hlt(),
        _ => a.db(&[w.r.bits() as u8, w.r.bits() as u8, w.r.bits() as u8]),
    }
}
