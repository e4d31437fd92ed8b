//! Items that change privilege, segments and code sizes: far branches and returns, system calls, loads of selectors.

use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{CodeAssembler, dword_ptr, fword_ptr, qword_ptr, tbyte_ptr, word_ptr};

use super::layout::*;
use super::write::{Assembled, Writer};

impl Writer<'_> {
    /// An address that code may go to: most often one that ends the step.
    fn target(&mut self) -> u64 {
        match self.r.below(100) {
            0..40 => self.wide(USER_PAD),
            40..70 => self.wide(KERNEL_PAD),
            70..78 => USER_PAD - USER_CODE,
            78..80 => self.beyond(),
            80..90 => self.routine(),
            _ => self.pointer(),
        }
    }

    /// A stack for where it goes to.
    fn other_stack(&mut self) -> u64 {
        match self.r.below(10) {
            0..6 => self.wide(USER_STACK - 0x100),
            6..8 => self.wide(STEP_STACK - 0x100),
            _ => self.pointer(),
        }
    }

    /// A place for a far pointer.
    pub fn own_data(&self) -> u64 {
        match self.cpl {
            3 => USER_DATA + 0x7000,
            _ => KERNEL_DATA + 0x7000,
        }
    }
}

/// Pushes these, the first first.
fn push_all(a: &mut CodeAssembler, values: &[u64]) -> Assembled {
    for v in values {
        a.mov(rax, *v)?;
        a.push(rax)?;
    }
    Ok(())
}

pub fn iret(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let likely = w.r.percent(50);
    let stack = if likely { UDS } else { w.selector() };
    let code = match likely {
        true => *w.r.pick(&[U64, U32, U16]),
        false => w.selector(),
    };
    let frame = [
        stack.into(),
        w.other_stack(),
        w.flags(),
        code.into(),
        w.target(),
    ];
    push_all(a, &frame)?;
    match w.r.below(8) {
        // The operands are 64 bits wide, what is popped is not.
        0 => a.iretd(),
        1 => a.iret(),
        _ => a.iretq(),
    }
}

/// IRET to the next instruction, in a loop.
pub fn iret_onwards(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (mut again, mut next) = (a.create_label(), a.create_label());
    let flags = w.flags() & !0x1_4000;
    a.mov(r14d, 1 + w.r.below(10) as u32)?;
    a.set_label(&mut again)?;
    a.mov(rbx, rsp)?;
    a.mov(ecx, ss)?;
    a.push(rcx)?;
    a.push(rbx)?;
    a.mov(rax, flags)?;
    a.push(rax)?;
    a.mov(ecx, cs)?;
    a.push(rcx)?;
    a.lea(rax, qword_ptr(next))?;
    a.push(rax)?;
    a.iretq()?;
    a.set_label(&mut next)?;
    a.dec(r14d)?;
    a.jnz(again)
}

pub fn far_return(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let frame = [
        w.selector().into(),
        w.other_stack(),
        w.selector().into(),
        w.target(),
    ];
    push_all(a, &frame)?;
    match w.r.below(6) {
        0 => a.db(&[0xcb]),
        1 => a.db(&[0x48, 0xca, 0x10, 0x00]),
        _ => a.db(&[0x48, 0xcb]),
    }
}

pub fn far_branch(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let (selector, target, at) = (w.selector(), w.target(), w.own_data());
    a.mov(rbx, at)?;
    a.mov(rax, target)?;
    match w.r.below(4) {
        0 => {
            a.mov(qword_ptr(rbx), rax)?;
            a.mov(word_ptr(rbx + 8), i32::from(selector as i16))?;
            a.jmp(tbyte_ptr(rbx))
        }
        1 => {
            a.mov(qword_ptr(rbx), rax)?;
            a.mov(word_ptr(rbx + 8), i32::from(selector as i16))?;
            a.call(tbyte_ptr(rbx))
        }
        2 => {
            a.mov(dword_ptr(rbx), eax)?;
            a.mov(word_ptr(rbx + 4), i32::from(selector as i16))?;
            a.call(fword_ptr(rbx))
        }
        _ => {
            a.mov(dword_ptr(rbx), eax)?;
            a.mov(word_ptr(rbx + 4), i32::from(selector as i16))?;
            a.jmp(fword_ptr(rbx))
        }
    }
}

pub fn system_call(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    match w.r.below(8) {
        0 => a.sysenter(),
        1 => {
            let (target, stack) = (w.target(), w.other_stack());
            a.mov(rdx, target)?;
            a.mov(rcx, stack)?;
            match w.r.percent(50) {
                true => a.sysexit(),
                false => a.sysexitq(),
            }
        }
        2 | 3 => {
            let (rip, flags) = (w.target(), w.flags());
            a.mov(rcx, rip)?;
            a.mov(r11, flags)?;
            match w.r.percent(70) {
                true => a.sysretq(),
                false => a.sysret(),
            }
        }
        _ => {
            let mut again = a.create_label();
            a.mov(r14d, 1 + w.r.below(6) as u32)?;
            a.set_label(&mut again)?;
            a.syscall()?;
            a.dec(r14d)?;
            a.jnz(again)
        }
    }
}

pub fn load_segment(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let selector = w.selector();
    a.mov(eax, u32::from(selector))?;
    match w.r.below(14) {
        0 | 1 => a.mov(ds, eax),
        2 | 3 => a.mov(es, eax),
        4 | 5 => a.mov(fs, eax),
        6 => a.mov(gs, eax),
        7 => {
            a.mov(ss, eax)?;
            a.nop()
        }
        8 => {
            a.push(rax)?;
            a.pop(fs)
        }
        9 => {
            a.push(rax)?;
            a.pop(gs)
        }
        10 => {
            let at = w.pointer();
            a.mov(rbx, at)?;
            a.mov(ds, word_ptr(rbx))
        }
        n => {
            let at = w.own_data();
            a.mov(rbx, at)?;
            a.mov(dword_ptr(rbx), ecx)?;
            a.mov(word_ptr(rbx + 4), ax)?;
            match n {
                11 => a.lss(ecx, fword_ptr(rbx)),
                12 => a.lfs(ecx, fword_ptr(rbx)),
                _ => a.lgs(ecx, fword_ptr(rbx)),
            }
        }
    }
}

pub fn look_at_descriptor(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let selector = w.selector();
    a.mov(eax, u32::from(selector))?;
    match w.r.below(6) {
        0 => a.lar(ecx, eax),
        1 => a.lsl(ecx, eax),
        2 => a.verr(ax),
        3 => a.verw(ax),
        4 => a.lar(rdx, rax),
        _ => {
            let at = w.pointer();
            a.mov(rbx, at)?;
            a.lsl(ecx, word_ptr(rbx))
        }
    }
}

/// What user code sees of the system: the tables' registers, and bases.
pub fn look_at_system(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let at = w.pointer();
    a.mov(rbx, at)?;
    match w.r.below(13) {
        0 => a.sgdt(fword_ptr(rbx)),
        1 => a.sidt(fword_ptr(rbx)),
        2 => a.sldt(ecx),
        3 => a.str(ecx),
        4 => a.smsw(ecx),
        5 => a.sldt(word_ptr(rbx)),
        6 => a.smsw(word_ptr(rbx)),
        7 => a.rdfsbase(rcx),
        8 => a.rdgsbase(ecx),
        9 => a.wrfsbase(rbx),
        10 => a.wrgsbase(rbx),
        11 => {
            let xcr = w.r.below(3);
            a.mov(ecx, xcr as u32)?;
            a.xgetbv()
        }
        _ => {
            let leaf =
                *w.r.pick(&[0u32, 1, 7, 0xd, 0x8000_0000, 0x8000_0001, 0x8000_0008]);
            a.mov(eax, leaf)?;
            a.xor(ecx, ecx)?;
            a.cpuid()
        }
    }
}

pub fn ports(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let port = match w.r.percent(50) {
        true => 0x40 + w.r.below(16),
        false => w.r.below(0x1_0000),
    };
    a.mov(edx, port as u32)?;
    let at = w.pointer();
    match w.r.below(8) {
        0 => a.in_(al, dx),
        1 => a.in_(ax, dx),
        2 => a.in_(eax, dx),
        3 if port & !0xf != 0x80 => a.out(dx, eax),
        4 => a.in_(al, 0x40u32),
        5 => a.out(0x41u32, al),
        6 => {
            a.mov(rdi, at)?;
            a.mov(ecx, 3)?;
            a.rep().insb()
        }
        _ => {
            a.mov(rsi, at)?;
            a.mov(ecx, 3)?;
            a.mov(edx, 0x42)?;
            a.rep().outsw()
        }
    }
}

/// Interrupts, NMIs and writes by a device, which come at once.
pub fn interrupts(w: &mut Writer, a: &mut CodeAssembler) -> Assembled {
    let port = match w.r.below(10) {
        0..6 => PORT_INTERRUPT,
        6..8 => PORT_NMI,
        _ => PORT_DMA,
    };
    let vector = 0x20 + w.r.below(0x60);
    let next = w.r.below(6);
    if next == 1 {
        a.cli()?;
    }
    a.mov(eax, vector as u32)?;
    a.out(u32::from(port), al)?;
    match next {
        0 => {
            a.sti()?;
            a.nop()
        }
        1 => {
            a.sti()?;
            a.add(rcx, rdx)
        }
        2 => {
            a.sti()?;
            a.hlt()
        }
        3 => {
            a.mov(ecx, ss)?;
            a.mov(ss, ecx)?;
            a.inc(rbx)
        }
        _ => a.nop(),
    }
}
