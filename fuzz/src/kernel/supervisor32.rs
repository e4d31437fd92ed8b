//! The supervisor of a kernel without long mode: what `supervisor` does, in 32-bit code. Double faults have a task of their own, as
//! they have in real kernels, so the dispatcher first puts the ordinary task back.

use anyhow::Result;
use iced_x86::code_asm::*;

use super::layout::*;
use super::supervisor::{
    Assembled, NO_ERROR, RECORD_REGISTERS, RECORD_SYSTEM, assemble, finish, stubs,
};
use super::write::Paging;

/// Addresses and bytes.
pub fn pieces(paging: Paging) -> Result<Vec<(u64, Vec<u8>)>> {
    let mut pieces = stubs(32)?;
    let note = assemble(32, SUPERVISOR, |a| note(a, paging))?;
    pieces.push((SUPERVISOR, note));
    for (at, code) in [
        (
            SYSCALL_ENTRY,
            call_entry as fn(&mut CodeAssembler) -> Assembled,
        ),
        (SYSENTER_ENTRY, call_entry),
        (DISPATCH, dispatch),
        (DOUBLE_FAULT_TASK_CODE, |a| {
            // The error code is on the task's stack.
            a.push(8)?;
            a.jmp(SUPERVISOR)
        }),
        (FINISH, finish),
    ] {
        pieces.push((at, assemble(32, at, code)?));
    }
    Ok(pieces)
}

/// Of SYSENTER, and of SYSCALL where there is that: a frame as an exception has it.
fn call_entry(a: &mut CodeAssembler) -> Assembled {
    a.mov(esp, CALL_STACK as u32)?;
    for v in [0, 0, 2, 0, 0, NO_ERROR, 0x101] {
        a.push(v)?;
    }
    a.jmp(SUPERVISOR)
}

/// Bytes from ESP to the vector, once EAX, EBX and DS are saved.
const FRAME: u32 = 12;

fn variable(at: u64) -> AsmMemoryOperand {
    dword_ptr(at)
}

fn note(a: &mut CodeAssembler, paging: Paging) -> Assembled {
    a.push(eax)?;
    a.push(ebx)?;
    a.push(ds)?;
    a.mov(eax, u32::from(KDS))?;
    a.mov(ds, eax)?;
    a.mov(eax, variable(FLAG_MASK))?;
    a.and(dword_ptr(esp + FRAME + 16), eax)?;
    a.mov(ebx, variable(LOG_NEXT))?;
    a.cmp(ebx, (LOG + RECORD * MOST_RECORDS) as i32)?;
    a.jae(FINISH)?;
    a.add(variable(LOG_NEXT), RECORD as i32)?;
    for word in 0..7 {
        a.mov(eax, dword_ptr(esp + FRAME + 4 * word))?;
        a.mov(dword_ptr(ebx + 8 * word), eax)?;
    }
    note_registers(a)?;
    note_system(a)?;
    act(a, paging)
}

fn note_registers(a: &mut CodeAssembler) -> Assembled {
    let at = |n: u64| dword_ptr(ebx + 8 * (RECORD_REGISTERS + n) as u32);
    a.mov(eax, dword_ptr(esp + 8))?;
    a.mov(at(0), eax)?;
    a.mov(eax, dword_ptr(esp + 4))?;
    a.mov(at(3), eax)?;
    for (n, register) in [(1, ecx), (2, edx), (4, ebp), (5, esi), (6, edi)] {
        a.mov(at(n), register)?;
    }
    // What the saved DS and the rest of the frame are.
    a.mov(eax, dword_ptr(esp))?;
    a.mov(at(7), eax)?;
    a.str(eax)?;
    a.mov(at(8), eax)?;
    a.sldt(eax)?;
    a.mov(at(9), eax)
}

fn note_system(a: &mut CodeAssembler) -> Assembled {
    let at = |n: usize| dword_ptr(ebx + 8 * (RECORD_SYSTEM as u32 + n as u32));
    for (n, register) in [cr2, cr0, cr3, cr4].into_iter().enumerate() {
        a.mov(eax, register)?;
        a.mov(at(n), eax)?;
    }
    for (n, register) in [dr6, dr7].into_iter().enumerate() {
        a.mov(eax, register)?;
        a.mov(at(4 + n), eax)?;
    }
    for (n, register) in [es, fs, gs, ss].into_iter().enumerate() {
        a.mov(eax, register)?;
        a.mov(
            word_ptr(ebx + 8 * (RECORD_SYSTEM as u32 + 6) + 2 * n as u32),
            ax,
        )?;
    }
    let mut other = a.create_label();
    a.cmp(dword_ptr(esp + FRAME), 1)?;
    a.jne(other)?;
    a.xor(eax, eax)?;
    a.mov(dr6, eax)?;
    a.set_label(&mut other)?;
    a.nop()
}

/// What the vector's action says; those of SYSCALL and SYSENTER begin the next step.
fn act(a: &mut CodeAssembler, paging: Paging) -> Assembled {
    let mut labels: [CodeLabel; 4] = std::array::from_fn(|_| a.create_label());
    a.mov(ebx, dword_ptr(esp + FRAME))?;
    a.mov(ebx, dword_ptr(ebx * 8 + ACTIONS as u32))?;
    for (n, label) in labels.iter().enumerate() {
        a.cmp(ebx, n as i32 + 1)?;
        a.je(*label)?;
    }
    a.jmp(DISPATCH)?;
    let [back, fix, resume, no_steps] = &mut labels;
    a.set_label(fix)?;
    a.dec(variable(FIXES_LEFT))?;
    a.js(DISPATCH)?;
    make_good(a, paging)?;
    a.jmp(*back)?;
    a.set_label(no_steps)?;
    a.and(dword_ptr(esp + FRAME + 16), !0x100)?;
    a.jmp(*back)?;
    a.set_label(resume)?;
    a.or(dword_ptr(esp + FRAME + 16), 0x1_0000)?;
    a.set_label(back)?;
    a.pop(ds)?;
    a.pop(ebx)?;
    a.pop(eax)?;
    a.add(esp, 8)?;
    a.iretd()
}

fn make_good(a: &mut CodeAssembler, paging: Paging) -> Assembled {
    let (mask, scale) = match paging {
        Paging::Pae => (511, 8),
        _ => (1023, 4),
    };
    a.mov(ebx, cr2)?;
    a.shr(ebx, 12)?;
    a.and(ebx, mask)?;
    a.mov(eax, dword_ptr(ebx * scale + GOOD_ENTRIES as u32))?;
    for tables in X_TABLES {
        a.mov(dword_ptr(ebx * scale + tables[2] as u32), eax)?;
        if scale == 8 {
            a.mov(dword_ptr(ebx * scale + tables[2] as u32 + 4), 0)?;
        }
    }
    a.mov(eax, cr3)?;
    a.mov(cr3, eax)
}

fn not_busy(a: &mut CodeAssembler, selector: u16) -> Assembled {
    a.and(byte_ptr(GDT + u64::from(selector) + 5), !2)
}

fn dispatch(a: &mut CodeAssembler) -> Assembled {
    let (mut no_registers, mut no_breakpoints, mut no_root) =
        (a.create_label(), a.create_label(), a.create_label());
    a.mov(eax, u32::from(KDS))?;
    for register in [ss, ds, es, fs, gs] {
        a.mov(register, eax)?;
    }
    a.mov(esp, KERNEL_STACK as u32)?;
    a.push(2)?;
    a.popfd()?;
    a.mov(ebx, variable(CURSOR))?;
    a.cmp(ebx, variable(SCHEDULE_END))?;
    a.jae(FINISH)?;
    for selector in [TR, DOUBLE_FAULT_TR] {
        not_busy(a, selector)?;
    }
    a.mov(eax, u32::from(TR))?;
    a.ltr(ax)?;
    a.mov(eax, u32::from(LDTR))?;
    a.lldt(ax)?;
    a.movzx(esi, word_ptr(ebx))?;
    a.add(variable(CURSOR), 2)?;
    a.shl(esi, STEP_SIZE.trailing_zeros() as i32)?;
    a.add(esi, STEPS as i32)?;
    a.test(byte_ptr(esi + step::RESTORES as u32), 1)?;
    a.jz(no_registers)?;
    a.mov(eax, variable(BASE_CR0))?;
    a.mov(cr0, eax)?;
    a.mov(eax, variable(BASE_CR4))?;
    a.mov(cr4, eax)?;
    a.mov(ecx, 0xc000_0080u32)?;
    a.mov(eax, variable(BASE_EFER))?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    a.set_label(&mut no_registers)?;
    a.test(byte_ptr(esi + step::RESTORES as u32), 2)?;
    a.jz(no_breakpoints)?;
    a.mov(eax, 0x400)?;
    a.mov(dr7, eax)?;
    a.set_label(&mut no_breakpoints)?;
    a.mov(eax, dword_ptr(esi + step::CR3 as u32))?;
    a.test(eax, eax)?;
    a.jz(no_root)?;
    a.mov(cr3, eax)?;
    a.set_label(&mut no_root)?;
    begin(a)
}

/// To a step of the kernel on its stack, or to one of the user through the whole frame that IRET takes.
fn begin(a: &mut CodeAssembler) -> Assembled {
    let (mut outer, mut go) = (a.create_label(), a.create_label());
    let field = |at: u64| dword_ptr(esi + at as u32);
    a.mov(eax, field(step::DATA))?;
    a.mov(es, eax)?;
    a.test(byte_ptr(esi + step::CS as u32), 3)?;
    a.jnz(outer)?;
    a.mov(ecx, field(step::SS))?;
    a.mov(ss, ecx)?;
    a.mov(esp, field(step::RSP))?;
    a.jmp(go)?;
    a.set_label(&mut outer)?;
    // GS, FS, DS and ES of virtual-8086 mode.
    for _ in 0..4 {
        a.push(field(step::DATA))?;
    }
    a.push(field(step::SS))?;
    a.push(field(step::RSP))?;
    a.set_label(&mut go)?;
    for at in [step::FLAGS, step::CS, step::RIP] {
        a.push(field(at))?;
    }
    let at = |n: u64| field(step::REGISTERS + 8 * n);
    for (n, register) in [(1, ecx), (2, edx), (3, ebx), (4, ebp), (6, edi)] {
        a.mov(register, at(n))?;
    }
    // Through the kernel's own DS to the last.
    a.push(at(0))?;
    a.push(at(5))?;
    a.mov(ds, eax)?;
    a.pop(esi)?;
    a.pop(eax)?;
    a.iretd()
}
