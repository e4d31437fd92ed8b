//! Items of ordinary code: accesses everywhere, loops, strings, calls into pages whose mapping changes, code that changes code.

use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{
    AsmMemoryOperand, AsmRegister64, CodeAssembler, byte_ptr, dword_ptr, qword_ptr, word_ptr,
    xmmword_ptr, zmmword_ptr,
};

use super::layout::*;
use super::write::{Assembled, Writer};

/// The low 8, 16 and 32 bits of a register for data.
fn parts(
    r: AsmRegister64,
) -> (
    iced_x86::code_asm::AsmRegister8,
    iced_x86::code_asm::AsmRegister16,
    iced_x86::code_asm::AsmRegister32,
) {
    use iced_x86::code_asm::registers::{gpr8::*, gpr16::*, gpr32::*};
    let table = [
        (gpr64::rax, (al, ax, eax)),
        (gpr64::rcx, (cl, cx, ecx)),
        (gpr64::rdx, (dl, dx, edx)),
        (gpr64::rbx, (bl, bx, ebx)),
        (gpr64::rsi, (sil, si, esi)),
        (gpr64::rdi, (dil, di, edi)),
        (gpr64::r8, (r8b, r8w, r8d)),
        (gpr64::r9, (r9b, r9w, r9d)),
        (gpr64::r10, (r10b, r10w, r10d)),
        (gpr64::r11, (r11b, r11w, r11d)),
        (gpr64::r12, (r12b, r12w, r12d)),
    ];
    let found = table.iter().find(|(wide, _)| *wide == r);
    found.map_or((r15b, r15w, r15d), |(_, parts)| *parts)
}

/// An address off a base, rarely with a segment or an index.
fn operand(w: &mut Writer, base: AsmRegister64) -> AsmMemoryOperand {
    let displacement = *w.r.pick(&[0i32, 0, 1, 8, 16, -8, 64, 0x7f, 0xf00, -0x1000]);
    let m = base + displacement;
    match w.r.below(16) {
        0 => m.fs(),
        1 => m.gs(),
        _ => m,
    }
}

fn access(w: &mut Writer, a: &mut CodeAssembler, base: AsmRegister64) -> Assembled {
    let m = operand(w, base);
    let data = w.register();
    let (byte, word, dword) = parts(data);
    match w.r.below(34) {
        0 => a.mov(data, qword_ptr(m)),
        1 => a.mov(dword, dword_ptr(m)),
        2 => a.mov(word, word_ptr(m)),
        3 => a.mov(byte, byte_ptr(m)),
        4 | 5 => a.mov(qword_ptr(m), data),
        6 => a.mov(dword_ptr(m), dword),
        7 => a.mov(word_ptr(m), word),
        8 => a.mov(byte_ptr(m), byte),
        9 => a.add(qword_ptr(m), data),
        10 => a.add(data, qword_ptr(m)),
        11 => a.cmp(dword_ptr(m), dword),
        12 => a.xchg(qword_ptr(m), data),
        13 => a.lock().xadd(dword_ptr(m), dword),
        14 => a.lock().cmpxchg(qword_ptr(m), data),
        15 => a.push(qword_ptr(m)),
        16 => a.pop(qword_ptr(m)),
        17 => a.inc(dword_ptr(m)),
        18 => a.movups(xmm1, xmmword_ptr(m)),
        19 => a.movups(xmmword_ptr(m), xmm2),
        20 => a.movaps(xmm3, xmmword_ptr(m)),
        21 => a.movaps(xmmword_ptr(m), xmm1),
        22 => a.movzx(dword, word_ptr(m)),
        23 => a.movsx(data, byte_ptr(m)),
        24 => a.bt(dword_ptr(m), 3u32),
        25 => a.lock().cmpxchg16b(xmmword_ptr(m)),
        26 => a.movnti(qword_ptr(m), data),
        27 => a.sbb(qword_ptr(m), 0x55),
        28 => a.lock().bts(qword_ptr(m), 7u32),
        29 => a.not(dword_ptr(m)),
        30 => a.neg(word_ptr(m)),
        31 => a.movq(xmm4, qword_ptr(m)),
        32 => a.paddd(xmm1, xmmword_ptr(m)),
        _ => a.sub(dword, dword_ptr(m)),
    }
}

fn compute_one(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (x, y) = (w.register(), w.register());
    let (_, _, x32) = parts(x);
    let (_, _, y32) = parts(y);
    match w.r.below(20) {
        0 => a.add(x, y),
        1 => a.sub(x32, y32),
        2 => a.adc(x, y),
        3 => a.sbb(x32, y32),
        4 => a.cmp(x, y),
        5 => a.inc(x),
        6 => a.dec(x32),
        7 => a.neg(x),
        8 => a.mov(x, y),
        9 => a.mov(x32, y32),
        10 => a.lea(x, qword_ptr(y + x * 4 + 5)),
        11 => a.cmovb(x, y),
        12 => a.seto(parts(x).0),
        13 => a.xchg(x, y),
        14 => a.bswap(x),
        15 => a.stc(),
        16 => a.cmc(),
        17 => a.pxor(xmm1, xmm2),
        18 => a.not(x),
        _ => a.add(x32, w.r.value() as i32),
    }
}

pub fn accesses(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let base = w.register();
    if w.r.percent(85) {
        let at = w.pointer();
        a.mov(base, at)?;
    }
    for _ in 0..1 + w.r.below(4) {
        access(w, a, base)?;
    }
    Ok(())
}

pub fn compute(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    for _ in 0..1 + w.r.below(6) {
        compute_one(w, a)?;
    }
    Ok(())
}

/// A bounded loop of accesses and a branch within it.
pub fn bounded_loop(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (base, count) = (w.register(), w.counter());
    let times = w.times();
    let at = w.pointer();
    let (mut again, mut over) = (a.create_label(), a.create_label());
    a.mov(base, at)?;
    a.mov(count, times)?;
    a.set_label(&mut again)?;
    access(w, a, base)?;
    compute_one(w, a)?;
    a.jc(over)?;
    access(w, a, base)?;
    a.set_label(&mut over)?;
    if w.r.percent(30) {
        a.add(base, 0x40)?;
    }
    a.dec(count)?;
    a.jnz(again)
}

pub fn strings(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (from, to, count) = (w.pointer(), w.pointer(), w.r.below(0x60));
    a.mov(rsi, from)?;
    a.mov(rdi, to)?;
    a.mov(rcx, count)?;
    if w.r.percent(15) {
        a.std()?;
    }
    match w.r.below(12) {
        0 => a.rep().movsb(),
        1 => a.rep().movsd(),
        2 => a.rep().movsq(),
        3 => a.rep().stosb(),
        4 => a.rep().stosq(),
        5 => a.rep().lodsb(),
        6 => a.repe().cmpsb(),
        7 => a.repne().scasb(),
        8 => a.repe().scasq(),
        9 => a.movsq(),
        10 => a.stosd(),
        _ => a.repne().cmpsd(),
    }?;
    a.cld()
}

pub fn stack(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (x, y) = (w.register(), w.register());
    match w.r.below(9) {
        0 => {
            a.push(x)?;
            a.push(y)?;
            a.pop(x)?;
            a.pop(y)
        }
        1 => {
            a.pushfq()?;
            a.pop(x)
        }
        2 => {
            a.enter(0x20, w.r.below(4) as u32)?;
            a.leave()
        }
        3 => {
            let flags = w.flags();
            a.mov(x, flags)?;
            a.push(x)?;
            a.popfq()?;
            a.nop()
        }
        4 => {
            // Another stack for a moment.
            let at = w.pointer();
            a.mov(r13, rsp)?;
            a.mov(rsp, at)?;
            a.push(x)?;
            a.pop(y)?;
            a.mov(rsp, r13)
        }
        5 => {
            a.push(w.r.value() as i32)?;
            a.pop(x)
        }
        6 => {
            a.push(fs)?;
            a.pop(x)
        }
        7 => {
            let mut routine = a.create_label();
            let mut over = a.create_label();
            a.call(routine)?;
            compute_one(w, a)?;
            a.jmp(over)?;
            a.set_label(&mut routine)?;
            compute_one(w, a)?;
            a.ret()?;
            a.set_label(&mut over)?;
            a.nop()
        }
        _ => {
            a.pushw(0x1234)?;
            a.popw_pair(x)
        }
    }
}

/// POP of 16 bits, which `code_asm` has by the register's size.
trait PopWord {
    fn pushw(&mut self, v: i32) -> Assembled;
    fn popw_pair(&mut self, r: AsmRegister64) -> Assembled;
}

impl PopWord for CodeAssembler {
    fn pushw(&mut self, v: i32) -> Assembled {
        self.db(&[0x66, 0x68, v as u8, (v >> 8) as u8])
    }
    fn popw_pair(&mut self, r: AsmRegister64) -> Assembled {
        self.pop(parts(r).1)
    }
}

/// Calls a routine in pages whose mapping changes, once or in a loop.
pub fn call_routine(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (target, count) = (w.register(), w.counter());
    let at = w.routine();
    let times = if w.r.percent(50) {
        1
    } else {
        w.r.below(40) + 1
    };
    let mut again = a.create_label();
    a.mov(count, times)?;
    a.set_label(&mut again)?;
    a.mov(target, at)?;
    a.call(target)?;
    a.dec(count)?;
    a.jnz(again)
}

/// Changes a byte of a routine, through some mapping of it, and calls it.
pub fn patch_routine(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let page = w.r.below(ROUTINE_PAGES);
    let slot = w.r.below(64);
    let written = match w.r.percent(50) {
        true => SPARE + page * 0x1000 + slot * 0x40 + 2,
        false => w.routine() + 2,
    };
    let called = w.routine();
    a.mov(rdi, written)?;
    a.mov(rbx, called)?;
    let mut again = a.create_label();
    a.mov(r14d, 1 + w.r.below(4) as u32)?;
    a.set_label(&mut again)?;
    match w.r.below(4) {
        0 => a.mov(byte_ptr(rdi), w.r.bits() as i8 as i32)?,
        1 => a.inc(byte_ptr(rdi))?,
        2 => a.lock().add(byte_ptr(rdi), 3)?,
        _ => a.xchg(byte_ptr(rdi), al)?,
    }
    a.call(rbx)?;
    a.dec(r14d)?;
    a.jnz(again)
}

/// Code that changes the immediate operand of an instruction a little further on.
pub fn patch_itself(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (mut patched, mut again) = (a.create_label(), a.create_label());
    let x = w.counter();
    a.mov(x, 1 + w.r.below(20))?;
    a.set_label(&mut again)?;
    a.lea(rdi, qword_ptr(patched))?;
    a.add(byte_ptr(rdi + 1), 1)?;
    for _ in 0..w.r.below(3) {
        compute_one(w, a)?;
    }
    if w.r.percent(40) {
        a.lea(rdi, qword_ptr(patched))?;
    }
    a.set_label(&mut patched)?;
    a.mov(eax, 0x11)?;
    a.add(r12, rax)?;
    a.dec(x)?;
    a.jnz(again)
}

/// x87 and SSE instructions that CR0 and CR4 may forbid, and exceptions that are not masked.
pub fn floating_point(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    match w.r.below(10) {
        0 => a.fninit(),
        1 => a.wait(),
        2 => {
            a.fninit()?;
            a.push(0x0)?;
            a.fldcw(word_ptr(rsp))?;
            a.pop(rax)?;
            a.fldz()?;
            a.fld1()?;
            a.fdiv_2(st0, st1)?;
            a.wait()?;
            a.fninit()
        }
        3 => a.emms(),
        4 => {
            let mask = w.r.below(64) << 7;
            a.push(mask as i32)?;
            a.ldmxcsr(dword_ptr(rsp))?;
            a.xorps(xmm5, xmm5)?;
            a.divps(xmm6, xmm5)?;
            a.push(0x1f80)?;
            a.ldmxcsr(dword_ptr(rsp))?;
            a.pop(rax)?;
            a.pop(rax)
        }
        5 => a.cvttsd2si(rax, xmm1),
        6 => {
            let at = w.pointer();
            a.mov(rbx, at)?;
            a.fldcw(word_ptr(rbx))?;
            a.fninit()
        }
        7 => {
            a.push(w.r.bits() as i32)?;
            a.ldmxcsr(dword_ptr(rsp))?;
            a.push(0x1f80)?;
            a.ldmxcsr(dword_ptr(rsp))
        }
        8 => a.movd(xmm7, eax),
        _ => a.vpaddd(ymm1, ymm2, ymm3),
    }
}

/// Saves and restores of x87, SSE and AVX state. FNINIT comes first, since the last x87 instruction's addresses are the engine's.
pub fn extended_state(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let at = match w.r.percent(75) {
        true => w.pointer() & !0x3f,
        false => w.pointer(),
    };
    a.fninit()?;
    a.mov(rbx, at)?;
    a.mov(eax, w.r.bits() as u32 & 0x2e7)?;
    a.xor(edx, edx)?;
    let area = zmmword_ptr(rbx);
    match w.r.below(12) {
        0 => a.fxsave(area),
        1 => a.fxsave64(area),
        2 => a.fxrstor(area),
        3 => {
            a.fxsave64(area)?;
            a.pxor(xmm1, xmm1)?;
            a.fxrstor64(area)
        }
        4 => a.xrstor(area),
        5 => a.fnstenv(area),
        6 => a.fnsave(area),
        7 => a.xsave64(area),
        8 => a.xsavec64(area),
        9 => {
            a.xsave(area)?;
            a.pxor(xmm2, xmm2)?;
            a.xrstor64(area)
        }
        10 => a.xsaveopt(area),
        _ => a.fldenv(area),
    }?;
    a.fninit()?;
    a.push(0x1f80)?;
    a.ldmxcsr(dword_ptr(rsp))
}

/// An instruction that raises an exception of its own.
pub fn exception(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    match w.r.below(16) {
        0 => a.ud2(),
        1 => a.int3(),
        2 => a.db(&[0xf1]),
        3 => {
            a.xor(ecx, ecx)?;
            a.div(ecx)
        }
        4 => {
            a.mov(rax, i64::MIN as u64)?;
            a.cqo()?;
            a.mov(rcx, u64::MAX)?;
            a.idiv(rcx)
        }
        5 => a.int(w.r.below(256) as u32),
        6 => a.int(u32::from(RANDOM_GATES.start) + w.r.below(16) as u32),
        7 => a.int(w.r.below(32) as u32),
        8 => a.hlt(),
        9 => a.cli(),
        10 => a.sti(),
        // LOCK where it may not be, an instruction that is too long, UD1.
        11 => a.db(&[0xf0, 0x90]),
        12 => a.db(&[0x66; 15]),
        13 => a.db(&[0x0f, 0xb9, 0xc0]),
        14 => {
            let at = w.pointer();
            a.mov(rax, at)?;
            a.jmp(rax)
        }
        _ => {
            // Single steps over a few instructions.
            a.pushfq()?;
            a.or(qword_ptr(rsp), 0x100)?;
            a.popfq()?;
            compute_one(w, a)?;
            compute_one(w, a)?;
            a.pushfq()?;
            a.and(qword_ptr(rsp), !0x100)?;
            a.popfq()
        }
    }
}

/// Bytes as they come.
pub fn random_bytes(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let bytes: Vec<u8> = (0..2 + w.r.below(6)).map(|_| w.r.bits() as u8).collect();
    a.db(&bytes)
}
