//! Items of 32-bit and 16-bit code under a 64-bit kernel: segments with bases and limits, instructions that 64-bit mode has not.

use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{CodeAssembler, byte_ptr, dword_ptr, fword_ptr, word_ptr};

use super::layout::*;
use super::write::{Assembled, Levels, Writer};

fn access(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let base = w.register32();
    let data = w.register32();
    let m = base + *w.r.pick(&[0i32, 0, 4, 0x7c, -4, 0xf00]);
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
    a.mov(ebp, w.times() as u32)?;
    a.set_label(&mut again)?;
    access(w, a)?;
    compute_one(w, a)?;
    a.dec(ebp)?;
    a.jnz(again)
}

/// Branches with every displacement, calls and returns.
pub fn branches(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let mut over = a.create_label();
    match w.r.below(8) {
        0 => {
            compute_one(w, a)?;
            a.db(&[0x70 | w.r.below(16) as u8, 0x01, 0x90])
        }
        1 => {
            compute_one(w, a)?;
            let wide: &[u8] = &[0x0f, 0x80 | w.r.below(16) as u8, 0x01, 0, 0, 0, 0x90];
            let narrow: &[u8] = &[0x0f, wide[1], 0x01, 0, 0x90];
            match w.mode {
                super::write::Mode::Bits32 => a.db(wide),
                _ => a.db(narrow),
            }
        }
        2 => {
            a.mov(ecx, 1 + w.r.below(20) as u32)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            compute_one(w, a)?;
            a.mov(ecx, ecx)?;
            a.loop_(again)
        }
        3 => {
            a.jecxz(over)?;
            compute_one(w, a)?;
            a.set_label(&mut over)?;
            a.nop()
        }
        4 | 5 => {
            let mut routine = a.create_label();
            a.call(routine)?;
            a.jmp(over)?;
            a.set_label(&mut routine)?;
            compute_one(w, a)?;
            match w.r.percent(70) {
                true => a.ret()?,
                false => a.ret_1(4)?,
            }
            a.set_label(&mut over)?;
            a.nop()
        }
        6 => {
            // With the other operand size: the instruction pointer may lose its upper half.
            let code = [0x66, 0x70 | w.r.below(16) as u8, 0x00];
            a.db(&code)
        }
        _ => {
            compute_one(w, a)?;
            a.jmp(over)?;
            a.ud2()?;
            a.set_label(&mut over)?;
            a.nop()
        }
    }
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

pub fn ports(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let at = w.pointer();
    a.mov(edx, 0x40 + w.r.below(8) as u32)?;
    a.mov(esi, at as u32)?;
    a.mov(edi, at as u32)?;
    a.mov(ecx, w.r.below(4) as u32)?;
    match w.r.below(10) {
        0 => a.in_(al, dx),
        1 => a.in_(ax, 0x41u32),
        2 => a.in_(eax, dx),
        3 => a.out(dx, al),
        4 => a.out(0x42u32, eax),
        5 => a.rep().insb(),
        6 => a.rep().insd(),
        7 => a.rep().outsb(),
        8 => a.outsw(),
        _ => a.insw(),
    }
}

pub fn control_registers(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    match w.r.below(8) {
        0 => {
            let bit = 1i32 << *w.r.pick(&[1u32, 2, 3, 16, 18, 30]);
            a.mov(eax, cr0)?;
            a.xor(eax, bit)?;
            a.mov(cr0, eax)
        }
        1 => {
            let bit = 1i32 << *w.r.pick(&[2u32, 3, 7, 8, 9, 11, 12, 20, 21, 22]);
            a.mov(eax, cr4)?;
            a.xor(eax, bit)?;
            a.mov(cr4, eax)
        }
        2 => {
            let root = w.root();
            a.mov(eax, root as u32)?;
            if w.traits.levels != Levels::Four {
                // As `supervisor::load_root`.
                a.mov(ecx, cr4)?;
                a.and(ecx, 1 << 12)?;
                a.lea(eax, dword_ptr(eax + ecx * 2))?;
            }
            a.mov(cr3, eax)
        }
        3 => {
            a.mov(ecx, 0xc000_0080u32)?;
            a.rdmsr()?;
            a.xor(eax, 1)?;
            a.wrmsr()
        }
        4 => a.clts(),
        5 => {
            let at = w.pointer();
            a.mov(ebx, at as u32)?;
            a.invlpg(byte_ptr(ebx))
        }
        6 => {
            let at = w.pointer();
            a.mov(eax, at as u32)?;
            a.mov(dr1, eax)?;
            a.mov(eax, 0x400u32 | 1 << 2 | 3 << 20 | 3 << 22)?;
            a.mov(dr7, eax)?;
            a.mov(ebx, at as u32)?;
            a.mov(dword_ptr(ebx), ecx)
        }
        _ => {
            a.mov(eax, cr2)?;
            a.smsw(ecx)
        }
    }
}

pub fn descriptor_tables(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    a.mov(ebx, KERNEL_DATA as u32 + 0x7900)?;
    let (limit, table) = match w.r.percent(50) {
        true => (*w.r.pick(&[0xfffi32, 0x7f, 0x107]), GDT),
        false => (*w.r.pick(&[0xfffi32, 0x91f, 0x8ff]), IDT),
    };
    a.mov(word_ptr(ebx), limit)?;
    a.mov(dword_ptr(ebx + 2), table as i32)?;
    match (w.r.below(4), table) {
        (0, GDT) => {
            a.mov(eax, u32::from(LDTR))?;
            a.lldt(ax)
        }
        (0, _) => a.sidt(fword_ptr(ebx)),
        (_, GDT) => a.lgdt(fword_ptr(ebx)),
        _ => a.lidt(fword_ptr(ebx)),
    }
}

/// Interrupts, NMIs and writes by a device, which come at once.
pub fn interrupts(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let port =
        *w.r.pick(&[PORT_INTERRUPT, PORT_INTERRUPT, PORT_NMI, PORT_DMA]);
    if w.r.percent(30) {
        a.cli()?;
    }
    a.mov(eax, 0x20 + w.r.below(0x60) as u32)?;
    a.out(u32::from(port), al)?;
    match w.r.below(4) {
        0 => a.sti()?,
        1 => {
            a.sti()?;
            a.hlt()?;
        }
        2 => {
            a.mov(ecx, ss)?;
            a.mov(ss, ecx)?;
        }
        _ => {}
    }
    a.inc(ebx)
}
