//! Code that changes: by the program itself, through another address, by string instructions, by devices.

use doppel_conformance::paging::{P, RW, US};
use doppel_conformance::*;
use doppel_x86::Gpr;
use iced_x86::code_asm::*;

/// MOV EAX, 0: the immediate is what these tests change.
const MOV_EAX: u8 = 0xb8;

#[test]
fn the_next_instruction_of_the_same_block() {
    each_engine(|m| {
        let target = CODE + 0x20;
        for value in [7u64, 9] {
            m.to_kernel();
            m.place(64, CODE, |a: &mut CodeAssembler| {
                a.mov(dword_ptr(target + 1), value as i32)?;
                a.nops_with_size(0x20 - 11)
            });
            m.put_bytes(target, &[MOV_EAX, 0, 0, 0, 0]);
            m.place(64, target + 5, machine::stop);
            m.go(CODE);
            m.run();
            assert_eq!(m.reg(Gpr::Rax), value);
        }
    });
}

#[test]
fn a_loop_that_counts_in_its_own_immediate() {
    each_engine(|m| {
        let (again, target) = (CODE + 0x20, CODE + 0x40);
        m.place(64, CODE, |a: &mut CodeAssembler| {
            a.xor(ebx, ebx)?;
            a.mov(ecx, 5000)?;
            a.jmp(again)
        });
        m.place(64, again, |a: &mut CodeAssembler| {
            a.inc(dword_ptr(target + 1))?;
            a.jmp(target)
        });
        m.put_bytes(target, &[MOV_EAX, 0, 0, 0, 0]);
        m.place(64, target + 5, |a: &mut CodeAssembler| {
            a.add(rbx, rax)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            machine::stop(a)
        });
        m.go(CODE);
        m.run();
        assert_eq!(m.reg(Gpr::Rbx), 12_502_500);
        let noted = m.cpu().code_writes.capacity();
        assert!(
            noted < 1000,
            "{noted}: the list of writes is followed and emptied"
        );
    });
}

/// A loop calls a routine at [`X`] and changes it with what `change` emits: RBX is the routine's immediate, EDX the new
/// value, RSI a copy of the value in memory.
fn changed_by(
    m: &mut Machine,
    immediate: u64,
    change: fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) {
    m.map(0, SPARE, P | RW | US);
    m.map(1, SPARE + 0x1000, P | RW | US);
    m.map(2, SPARE, P | RW | US);
    m.map(3, SPARE + 0x1000, P | RW | US);
    let routine = X + 0xf00;
    m.put_bytes(SPARE + 0xf00, &[MOV_EAX, 0, 0, 0, 0, 0xc3]);
    m.run_code(|a| {
        a.mov(rbp, routine)?;
        a.mov(rbx, immediate)?;
        a.xor(r12d, r12d)?;
        a.mov(r14d, 50)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(edx, r14d)?;
        a.mov(qword_ptr(DATA), rdx)?;
        a.mov(rsi, DATA)?;
        change(a)?;
        a.call(rbp)?;
        a.add(r12, rax)?;
        a.dec(r14d)?;
        a.jnz(again)
    });
    assert_eq!(m.reg(Gpr::R12), 50 * 51 / 2);
}

#[test]
fn a_routine_in_another_page() {
    each_engine(|m| changed_by(m, X + 0xf01, |a| a.mov(dword_ptr(rbx), edx)));
}

#[test]
fn through_another_linear_address() {
    each_engine(|m| changed_by(m, X + 0x2f01, |a| a.mov(dword_ptr(rbx), edx)));
}

#[test]
fn by_atomic_and_vector_stores() {
    each_engine(|m| {
        changed_by(m, X + 0xf01, |a| a.xchg(dword_ptr(rbx), edx));
        changed_by(m, X + 0x2f01, |a| {
            a.movd(xmm0, edx)?;
            a.movd(dword_ptr(rbx), xmm0)
        });
        changed_by(m, X + 0x2f01, |a| {
            a.mov(eax, dword_ptr(rbx))?;
            a.lock().cmpxchg(dword_ptr(rbx), edx)
        });
    });
}

#[test]
fn by_string_instructions() {
    each_engine(|m| {
        changed_by(m, X + 0xf01, |a| {
            a.mov(rdi, rbx)?;
            a.movsd()
        });
        changed_by(m, X + 0x2f01, |a| {
            a.mov(rdi, rbx)?;
            a.mov(ecx, 4)?;
            a.rep().movsb()
        });
        changed_by(m, X + 0xf01, |a| {
            a.mov(rdi, rbx)?;
            a.mov(eax, edx)?;
            a.mov(ecx, 1)?;
            a.rep().stosd()
        });
        changed_by(m, X + 0xf01, |a| {
            a.lea(rdi, qword_ptr(rbx + 3))?;
            a.add(rsi, 3)?;
            a.std()?;
            a.mov(ecx, 4)?;
            a.rep().movsb()?;
            a.cld()
        });
    });
}

/// What it writes first lies beside the code.
#[test]
fn by_a_string_instruction_that_begins_before_the_code() {
    each_engine(|m| {
        for immediate in [X + 0xf01, X + 0x2f01] {
            changed_by(m, immediate, |a| {
                a.mov(byte_ptr(DATA + 0x300), u32::from(MOV_EAX))?;
                a.mov(dword_ptr(DATA + 0x301), edx)?;
                a.mov(rsi, DATA + 0x200)?;
                a.lea(rdi, qword_ptr(rbx - 0x101))?;
                a.mov(ecx, 0x105)?;
                a.rep().movsb()
            });
        }
    });
}

#[test]
fn by_a_push() {
    each_engine(|m| {
        changed_by(m, X + 0xf01, |a| {
            a.mov(rax, rsp)?;
            a.lea(rsp, qword_ptr(rbx + 4))?;
            a.mov(r13, qword_ptr(rbx - 4))?;
            a.shl(rdx, 32)?;
            a.shr(r13, 0)?;
            a.mov(r13d, r13d)?;
            a.or(rdx, r13)?;
            a.push(rdx)?;
            a.mov(rsp, rax)
        });
    });
}

/// The handler of a breakpoint or an interrupt, whose frame is a part of its own code: MOV ECX, imm32; JMP, as RSP says.
fn by_a_frame(
    m: &mut Machine,
    vector: u8,
    raise: fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) {
    let handler = SPARE + 0x3000 + 0x800;
    let linear = X + 0x4000 + 0x800;
    m.map(4, SPARE + 0x3000, P | RW);
    // RSP and SS are the last 16 bytes of a frame that ends 16 bytes into the handler.
    m.gate(vector, linear, 0xe, 1, 0);
    m.put(TSS + 0x24, linear + 0x10);
    m.put_bytes(handler, &[0x90; 16]);
    m.place_at(64, handler + 0x20, linear + 0x20, machine::stop);
    for value in [0x11u8, 0x22, 0x33] {
        m.to_kernel();
        let code = u64::from_le_bytes([0xb9, value, 0, 0, 0, 0xeb, 0x19, 0]);
        m.run_code(|a| {
            a.mov(rsp, code)?;
            raise(a)
        });
        assert_eq!(m.reg(Gpr::Rcx), u64::from(value));
    }
}

#[test]
fn by_the_frame_of_an_exception() {
    each_engine(|m| by_a_frame(m, 3, |a| a.int3()));
}

#[test]
fn by_the_frame_of_an_interrupt() {
    each_engine(|m| {
        by_a_frame(m, 0x40, |a| {
            a.sti()?;
            a.mov(al, 0x40)?;
            a.out(i32::from(bus::PORT_INTERRUPT), al)
        });
    });
}

#[test]
fn by_a_device() {
    each_engine(|m| {
        m.map(0, SPARE, P | RW);
        m.put_bytes(SPARE, &[MOV_EAX, 1, 0, 0, 0, 0xc3]);
        m.bus.device_write = (SPARE + 1, vec![2, 1]);
        m.run_code(|a| {
            a.mov(rbp, X)?;
            a.xor(ebx, ebx)?;
            a.mov(ecx, 10)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.call(rbp)?;
            a.add(rbx, rax)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.out(i32::from(bus::PORT_DEVICE_WRITE), al)?;
            a.call(rbp)
        });
        assert_eq!((m.reg(Gpr::Rbx), m.reg(Gpr::Rax)), (10, 0x102));
    });
}

#[test]
fn across_a_page_boundary() {
    each_engine(|m| {
        m.map(0, SPARE, P | RW);
        m.map(1, SPARE + 0x1000, P | RW);
        // MOV EAX, imm32 at the end of page 0: the immediate is on page 1 from its second byte on.
        m.put_bytes(SPARE + 0xffe, &[MOV_EAX, 0, 0, 0, 0, 0xc3]);
        m.run_code(|a| {
            a.mov(rbp, X + 0xffe)?;
            a.mov(rbx, X + 0xfff)?;
            a.mov(r14, 0x0101_0101u64)?;
            a.xor(r12d, r12d)?;
            a.mov(ecx, 20)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            // One store over both pages, then one to each.
            a.add(dword_ptr(rbx), r14d)?;
            a.call(rbp)?;
            a.add(r12, rax)?;
            a.inc(byte_ptr(rbx))?;
            a.call(rbp)?;
            a.add(r12, rax)?;
            a.inc(byte_ptr(rbx + 1))?;
            a.call(rbp)?;
            a.add(r12, rax)?;
            a.dec(ecx)?;
            a.jnz(again)
        });
        let (mut value, mut sum) = (0u32, 0u64);
        for _ in 0..20 {
            for step in [0x0101_0101, 1, 0x100] {
                value = value.wrapping_add(step);
                sum += u64::from(value);
            }
        }
        assert_eq!(m.reg(Gpr::R12), sum);
    });
}

#[test]
fn by_a_store_that_begins_on_a_page_without_code() {
    each_engine(|m| {
        for second in [SPARE + 0x1000, SPARE + 0x3000] {
            m.to_kernel();
            m.map(0, SPARE, P | RW);
            m.map(1, second, P | RW);
            m.put_bytes(second, &[MOV_EAX, 0, 0, 0, 0, 0xc3]);
            m.run_code(|a| {
                a.mov(rbp, X + 0x1000)?;
                a.invlpg(byte_ptr(rbp))?;
                a.xor(r12d, r12d)?;
                a.mov(ecx, 50)?;
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.mov(rdx, rcx)?;
                a.shl(rdx, 40)?;
                a.mov(r8, u64::from(MOV_EAX) << 32)?;
                a.or(rdx, r8)?;
                a.mov(qword_ptr(rbp - 4), rdx)?;
                a.call(rbp)?;
                a.add(r12, rax)?;
                a.dec(ecx)?;
                a.jnz(again)
            });
            assert_eq!(m.reg(Gpr::R12), 50 * 51 / 2);
        }
    });
}

#[test]
fn data_beside_code_does_not_disturb_it() {
    each_engine(|m| {
        let counter = CODE + 0x800;
        m.put(counter, 0u64);
        m.run_code(|a| {
            a.mov(ecx, 10_000)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(qword_ptr(counter))?;
            a.dec(ecx)?;
            a.jnz(again)
        });
        assert_eq!(m.get(counter), 10_000);
    });
}

#[test]
fn a_kernel_patches_user_code_through_its_own_map() {
    each_engine(|m| {
        // User code at X, the same page at SPARE for the kernel, as Linux's text_poke and uprobes do.
        m.map(0, SPARE, P | US);
        let patch = CODE + 0x400;
        m.place(64, patch, |a: &mut CodeAssembler| {
            a.inc(dword_ptr(SPARE + 1))?;
            a.iretq()
        });
        m.gate(0x80, patch, 0xe, 0, 3);
        m.put_bytes(SPARE, &[MOV_EAX, 0, 0, 0, 0]);
        m.place_at(64, SPARE + 5, X + 5, |a: &mut CodeAssembler| {
            a.add(rbx, rax)?;
            a.int(0x80)?;
            a.dec(ecx)?;
            a.jnz(X)?;
            machine::stop(a)
        });
        m.to_user();
        m.set_reg(Gpr::Rbx, 0);
        m.set_reg(Gpr::Rcx, 20);
        m.go(X);
        m.run();
        assert_eq!(m.reg(Gpr::Rbx), 190);
    });
}
