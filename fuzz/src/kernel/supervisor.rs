//! The part of a generated kernel that is always the same: it notes what every handler was called with, and begins step after step.
//!
//! Problem: a step may fail anywhere and leave anything behind, and the next one is to run all the same. Idea: a handler
//! never goes back into a step unless its vector's action says so; it goes to the dispatcher, which takes stack, registers and
//! privilege of the next step from a table. Invariant: the log is bounded, so that the kernel ends whatever its steps do,
//! but for loops without an exception.

use anyhow::Result;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

use super::layout::*;

/// In place of an error code where the vector has none.
pub const NO_ERROR: i32 = 0x5ead_0000;
pub const WITH_ERROR_CODE: [u32; 8] = [8, 10, 11, 12, 13, 14, 17, 21];
/// Where records have what, in words: vector, error code, RIP, CS, RFLAGS, RSP, SS, then the general registers but RSP.
pub const RECORD_REGISTERS: u64 = 7;
/// CR2, CR0, CR3, CR4, DR6, DR7, then DS, ES, FS and GS.
pub const RECORD_SYSTEM: u64 = 22;

pub(super) type Assembled = Result<(), IcedError>;

/// Addresses and bytes.
pub fn pieces() -> Result<Vec<(u64, Vec<u8>)>> {
    let mut pieces = stubs(64)?;
    for (at, code) in [
        (SUPERVISOR, note as fn(&mut CodeAssembler) -> Assembled),
        (SYSCALL_ENTRY, |a| call_entry(a, 0x100)),
        (SYSENTER_ENTRY, |a| call_entry(a, 0x101)),
        (DISPATCH, dispatch),
        (CHANGE_LEVELS, change_levels),
        (FINISH, finish),
    ] {
        pieces.push((at, assemble(64, at, code)?));
    }
    let narrow = assemble(32, CHANGE_LEVELS_32, change_levels32)?;
    pieces.push((CHANGE_LEVELS_32, narrow));
    Ok(pieces)
}

pub(super) fn assemble(
    bits: u32,
    at: u64,
    code: impl Fn(&mut CodeAssembler) -> Assembled,
) -> Result<Vec<u8>> {
    let mut a = CodeAssembler::new(bits)?;
    code(&mut a)?;
    Ok(a.assemble(at)?)
}

/// What the gates of all vectors lead to.
pub(super) fn stubs(bits: u32) -> Result<Vec<(u64, Vec<u8>)>> {
    let piece = |vector| {
        let at = STUBS + 16 * u64::from(vector);
        Ok((at, assemble(bits, at, |a| stub(a, vector))?))
    };
    (0..256).map(piece).collect()
}

pub(super) fn finish(a: &mut CodeAssembler) -> Assembled {
    a.cli()?;
    a.hlt()?;
    a.jmp(FINISH)
}

fn stub(a: &mut CodeAssembler, vector: u32) -> Assembled {
    if !WITH_ERROR_CODE.contains(&vector) {
        a.push(NO_ERROR)?;
    }
    a.push(vector as i32)?;
    a.jmp(SUPERVISOR)
}

/// Makes a frame as an exception has it.
fn call_entry(a: &mut CodeAssembler, vector: i32) -> Assembled {
    a.mov(qword_ptr(SCRATCH), rsp)?;
    a.mov(esp, CALL_STACK as u32)?;
    a.push(0)?;
    a.push(qword_ptr(SCRATCH))?;
    a.push(r11)?;
    a.push(0)?;
    a.push(rcx)?;
    a.push(NO_ERROR)?;
    a.push(vector)?;
    a.jmp(SUPERVISOR)
}

/// Bytes from RSP to the vector, once RAX and RBX are saved.
const FRAME: u64 = 16;

fn note(a: &mut CodeAssembler) -> Assembled {
    a.push(rax)?;
    a.push(rbx)?;
    a.mov(rax, qword_ptr(FLAG_MASK))?;
    a.and(qword_ptr(rsp + FRAME + 32), rax)?;
    a.mov(rbx, qword_ptr(LOG_NEXT))?;
    a.cmp(rbx, (LOG + RECORD * MOST_RECORDS) as i32)?;
    a.jae(FINISH)?;
    a.add(qword_ptr(LOG_NEXT), RECORD as i32)?;
    for word in 0..7 {
        a.mov(rax, qword_ptr(rsp + FRAME + 8 * word))?;
        a.mov(qword_ptr(rbx + 8 * word), rax)?;
    }
    note_registers(a)?;
    note_system(a)?;
    act(a)
}

fn note_registers(a: &mut CodeAssembler) -> Assembled {
    let at = |n: u64| qword_ptr(rbx + 8 * (RECORD_REGISTERS + n));
    a.mov(rax, qword_ptr(rsp + 8))?;
    a.mov(at(0), rax)?;
    a.mov(rax, qword_ptr(rsp))?;
    a.mov(at(3), rax)?;
    let others = [
        (1, rcx),
        (2, rdx),
        (4, rbp),
        (5, rsi),
        (6, rdi),
        (7, r8),
        (8, r9),
        (9, r10),
        (10, r11),
        (11, r12),
        (12, r13),
        (13, r14),
        (14, r15),
    ];
    for (n, register) in others {
        a.mov(at(n), register)?;
    }
    Ok(())
}

fn note_system(a: &mut CodeAssembler) -> Assembled {
    let at = |n: u64| qword_ptr(rbx + 8 * (RECORD_SYSTEM + n));
    for (n, register) in [cr2, cr0, cr3, cr4].into_iter().enumerate() {
        a.mov(rax, register)?;
        a.mov(at(n as u64), rax)?;
    }
    for (n, register) in [dr6, dr7].into_iter().enumerate() {
        a.mov(rax, register)?;
        a.mov(at(4 + n as u64), rax)?;
    }
    for (n, register) in [ds, es, fs, gs].into_iter().enumerate() {
        a.mov(eax, register)?;
        a.mov(word_ptr(rbx + 8 * (RECORD_SYSTEM + 6) + 2 * n as u64), ax)?;
    }
    // DR6 gathers: each record is to have its own.
    let mut other = a.create_label();
    a.cmp(qword_ptr(rsp + FRAME), 1)?;
    a.jne(other)?;
    a.xor(eax, eax)?;
    a.mov(dr6, rax)?;
    a.set_label(&mut other)?;
    a.nop()
}

/// What the vector's action says.
fn act(a: &mut CodeAssembler) -> Assembled {
    let mut labels: [CodeLabel; 7] = std::array::from_fn(|_| a.create_label());
    a.mov(rbx, qword_ptr(rsp + FRAME))?;
    a.mov(rbx, qword_ptr(rbx * 8 + ACTIONS))?;
    for (n, label) in labels.iter().enumerate() {
        a.cmp(rbx, n as i32 + 1)?;
        a.je(*label)?;
    }
    a.jmp(DISPATCH)?;
    let [back, fix, resume, no_steps, sysret, sysret32, sysexit] = &mut labels;
    a.set_label(fix)?;
    a.dec(qword_ptr(FIXES_LEFT))?;
    a.js(DISPATCH)?;
    a.mov(rbx, cr2)?;
    a.shr(rbx, 12)?;
    a.and(ebx, 511)?;
    a.mov(rax, qword_ptr(rbx * 8 + GOOD_ENTRIES))?;
    for tables in X_TABLES {
        a.mov(qword_ptr(rbx * 8 + tables[2]), rax)?;
    }
    flush_all(a)?;
    a.jmp(*back)?;
    a.set_label(no_steps)?;
    a.and(qword_ptr(rsp + FRAME + 32), !0x100)?;
    a.jmp(*back)?;
    a.set_label(resume)?;
    a.or(qword_ptr(rsp + FRAME + 32), 0x1_0000)?;
    a.set_label(back)?;
    a.pop(rbx)?;
    a.pop(rax)?;
    a.add(rsp, 16)?;
    a.iretq()?;
    a.set_label(sysret)?;
    leave_call(a)?;
    a.sysretq()?;
    a.set_label(sysret32)?;
    leave_call(a)?;
    a.sysret()?;
    a.set_label(sysexit)?;
    leave_call(a)?;
    a.sysexit()
}

/// Every translation, global or not, of all address spaces.
fn flush_all(a: &mut CodeAssembler) -> Assembled {
    a.mov(rax, cr4)?;
    a.xor(eax, 0x80)?;
    a.mov(cr4, rax)?;
    a.xor(eax, 0x80)?;
    a.mov(cr4, rax)
}

fn leave_call(a: &mut CodeAssembler) -> Assembled {
    a.pop(rbx)?;
    a.pop(rax)?;
    a.mov(rsp, qword_ptr(rsp + 40))
}

/// CR4.LA57.
const LA57: i32 = 1 << 12;
const _: () = assert!(TO_PML5 == 2 * LA57 as u64);

/// CR3 becomes RAX, the root of four levels, or the one of five where there are so many. RCX is lost.
pub(super) fn load_root(a: &mut CodeAssembler) -> Assembled {
    a.mov(rcx, cr4)?;
    a.and(ecx, LA57)?;
    a.lea(rax, qword_ptr(rax + rcx * 2))?;
    a.mov(cr3, rax)
}

/// PKRU, where CR4.PKE is set in RAX.
fn restore_keys(a: &mut CodeAssembler) -> Assembled {
    let mut no_keys = a.create_label();
    a.bt(eax, 22)?;
    a.jnc(no_keys)?;
    a.mov(eax, dword_ptr(BASE_PKRU))?;
    a.xor(ecx, ecx)?;
    a.xor(edx, edx)?;
    a.wrpkru()?;
    a.set_label(&mut no_keys)?;
    a.nop()
}

/// Called by a step: long mode is left, CR4.LA57 changed, and long mode entered again with the other root. With PCIDs it faults.
fn change_levels(a: &mut CodeAssembler) -> Assembled {
    let mut back = a.create_label();
    a.pushfq()?;
    a.pop(r11)?;
    a.push(2)?;
    a.popfq()?;
    a.mov(qword_ptr(SCRATCH), rsp)?;
    a.mov(esp, CALL_STACK as u32)?;
    a.push(i32::from(K32))?;
    a.push(CHANGE_LEVELS_32 as i32)?;
    a.lea(rdx, qword_ptr(back))?;
    a.db(&[0x48, 0xcb])?;
    a.set_label(&mut back)?;
    a.mov(rsp, qword_ptr(SCRATCH))?;
    a.push(r11)?;
    a.popfq()?;
    a.ret()
}

/// In 32-bit code, which alone may do without paging; it goes back to RDX.
fn change_levels32(a: &mut CodeAssembler) -> Assembled {
    const PG: u32 = 1 << 31;
    a.mov(eax, cr0)?;
    a.and(eax, !PG)?;
    a.mov(cr0, eax)?;
    a.mov(ecx, cr4)?;
    a.xor(ecx, LA57)?;
    a.mov(cr4, ecx)?;
    a.and(ecx, LA57)?;
    a.mov(eax, cr3)?;
    a.lea(eax, dword_ptr(eax + ecx * 4 - TO_PML5 as i32))?;
    a.mov(cr3, eax)?;
    a.mov(eax, cr0)?;
    a.or(eax, PG)?;
    a.mov(cr0, eax)?;
    a.push(i32::from(K64))?;
    a.push(edx)?;
    a.db(&[0xcb])
}

fn dispatch(a: &mut CodeAssembler) -> Assembled {
    let (mut no_registers, mut no_breakpoints, mut no_root) =
        (a.create_label(), a.create_label(), a.create_label());
    a.mov(esp, KERNEL_STACK as u32)?;
    a.mov(rbx, qword_ptr(CURSOR))?;
    a.cmp(rbx, qword_ptr(SCHEDULE_END))?;
    a.jae(FINISH)?;
    a.movzx(esi, word_ptr(rbx))?;
    a.add(qword_ptr(CURSOR), 2)?;
    a.shl(esi, STEP_SIZE.trailing_zeros() as i32)?;
    a.add(esi, STEPS as i32)?;
    a.test(byte_ptr(rsi + step::RESTORES), 1)?;
    a.jz(no_registers)?;
    a.mov(eax, PML4 as u32)?;
    load_root(a)?;
    a.mov(rax, qword_ptr(BASE_CR0))?;
    a.mov(cr0, rax)?;
    // All but LA57.
    a.mov(rax, qword_ptr(BASE_CR4))?;
    a.mov(rcx, cr4)?;
    a.xor(ecx, eax)?;
    a.and(ecx, LA57)?;
    a.xor(eax, ecx)?;
    a.mov(cr4, rax)?;
    restore_keys(a)?;
    a.mov(ecx, 0xc000_0080u32)?;
    a.mov(eax, dword_ptr(BASE_EFER))?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.set_label(&mut no_registers)?;
    a.test(byte_ptr(rsi + step::RESTORES), 2)?;
    a.jz(no_breakpoints)?;
    a.mov(eax, 0x400)?;
    a.mov(dr7, rax)?;
    a.set_label(&mut no_breakpoints)?;
    a.mov(rax, qword_ptr(rsi + step::CR3))?;
    a.test(rax, rax)?;
    a.jz(no_root)?;
    load_root(a)?;
    a.set_label(&mut no_root)?;
    a.mov(eax, dword_ptr(rsi + step::DATA))?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    for at in [step::SS, step::RSP, step::FLAGS, step::CS, step::RIP] {
        a.push(qword_ptr(rsi + at))?;
    }
    let registers = [
        rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
    ];
    let at = |n: usize| qword_ptr(rsi + step::REGISTERS + 8 * n as u64);
    for (n, register) in registers.into_iter().enumerate() {
        if register != rsi {
            a.mov(register, at(n))?;
        }
    }
    a.mov(rsi, at(5))?;
    a.iretq()
}
