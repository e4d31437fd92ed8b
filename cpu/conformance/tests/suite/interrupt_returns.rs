//! IRETQ to user code, or to the kernel, that has been executed often: it is what it was the first time, and what changes meanwhile is seen.

use doppel_conformance::paging::{P, RW};
use doppel_conformance::*;
use doppel_x86::{Dtr, Gpr, Rflags};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const HANDLER: u64 = CODE + 0x400;
const CF: i32 = 1;
const ZF: i32 = 1 << 6;
const DF: i32 = 1 << 10;
const ID: i32 = 1 << 21;
const OFTEN: u64 = 200;

/// As a 64-bit Linux has them for its programs.
fn without_data_segments(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.xor(eax, eax)?;
    a.mov(ds, ax)?;
    a.mov(es, ax)?;
    a.mov(fs, ax)?;
    a.mov(gs, ax)
}

#[test]
fn flags_of_the_frame_come_back_each_time() {
    each_engine(|m| {
        m.place(64, HANDLER, |a: &mut CodeAssembler| {
            a.xor(qword_ptr(rsp + 16), CF | DF | ID)?;
            a.iretq()
        });
        m.gate(0x80, HANDLER, 0xe, 0, 3);
        m.set_reg(Gpr::Rcx, OFTEN);
        m.set_reg(Gpr::Rbx, 0);
        m.run_user(|a| {
            without_data_segments(a)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.xor(eax, eax)?;
            a.int(0x80)?;
            a.pushfq()?;
            a.pop(rax)?;
            a.and(eax, CF | ZF | DF | ID)?;
            a.add(rbx, rax)?;
            a.dec(ecx)?;
            a.jnz(again)
        });
        let each = (CF | ZF) as u64;
        let every_other = (DF | ID) as u64;
        assert_eq!(m.reg(Gpr::Rbx), OFTEN * each + OFTEN / 2 * every_other);
    });
}

#[test]
fn a_frame_may_lie_in_two_pages() {
    each_engine(|m| {
        m.place(64, HANDLER, |a: &mut CodeAssembler| {
            for word in 0..5 {
                a.mov(rax, qword_ptr(rsp + 8 * word))?;
                a.mov(qword_ptr(DATA + 0xff0 + 8 * word as u64), rax)?;
            }
            a.mov(rsp, DATA + 0xff0)?;
            a.iretq()
        });
        m.gate(0x80, HANDLER, 0xe, 0, 3);
        m.set_reg(Gpr::Rcx, OFTEN);
        m.set_reg(Gpr::Rbx, 0);
        m.run_user(|a| {
            without_data_segments(a)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.int(0x80)?;
            a.inc(rbx)?;
            a.dec(ecx)?;
            a.jnz(again)
        });
        assert_eq!(m.reg(Gpr::Rbx), OFTEN);
    });
}

#[test]
fn null_selectors_lose_their_rpl() {
    each_engine(|m| {
        m.place(64, HANDLER, |a: &mut CodeAssembler| a.iretq());
        m.gate(0x80, HANDLER, 0xe, 0, 3);
        m.set_reg(Gpr::Rcx, OFTEN);
        m.set_reg(Gpr::Rbx, 0);
        m.run_user(|a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            without_data_segments(a)?;
            for segment in [ds, es, fs, gs] {
                a.mov(eax, 3)?;
                a.mov(segment, ax)?;
                a.int(0x80)?;
                a.mov(eax, segment)?;
                a.add(rbx, rax)?;
            }
            a.dec(ecx)?;
            a.jnz(again)
        });
        assert_eq!(m.reg(Gpr::Rbx), 0);
    });
}

type Change = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// Byte 5 of a descriptor: present, privilege, type.
const fn access_byte(selector: u64) -> u64 {
    GDT + (selector & !7) + 5
}

/// What is made of the way back, the exception that comes of it, and its error code.
type Case = (&'static str, Change, u64, u64);

/// Whatever is returned to, with RSP at the frame.
const CHANGES: &[Case] = &[
    (
        "the selector of the code segment is null",
        |a| a.mov(qword_ptr(rsp + 8), 0),
        13,
        0,
    ),
    (
        "the address is not canonical",
        |a| {
            a.mov(rax, 1u64 << 47)?;
            a.mov(qword_ptr(rsp), rax)
        },
        13,
        0,
    ),
    (
        "a nested task",
        |a| {
            a.pushfq()?;
            a.or(dword_ptr(rsp), 1 << 14)?;
            a.popfq()
        },
        13,
        0,
    ),
    (
        "a single step",
        |a| a.or(dword_ptr(rsp + 16), 1 << 8),
        1,
        Record::NO_ERROR,
    ),
];

/// Of a return to user code.
const USER_CHANGES: &[Case] = &[
    (
        "the code segment is not present",
        |a| a.mov(byte_ptr(access_byte(USER_CS)), 0x7b),
        11,
        USER_CS & !3,
    ),
    (
        "the stack segment cannot be written to",
        |a| a.mov(byte_ptr(access_byte(USER_DS)), 0xf1),
        13,
        USER_DS & !3,
    ),
    (
        "the descriptors' page is another",
        |a| {
            a.mov(qword_ptr(PT + 8 * (GDT >> 12)), (SPARE | P | RW) as i32)?;
            a.invlpg(byte_ptr(GDT))
        },
        11,
        USER_CS & !3,
    ),
    (
        "the table is shorter",
        |a| {
            a.mov(word_ptr(DATA), (USER_CS & !7) as i32)?;
            a.mov(rax, GDT)?;
            a.mov(qword_ptr(DATA + 2), rax)?;
            a.lgdt(tword_ptr(DATA))
        },
        13,
        USER_CS & !3,
    ),
    (
        "the selector of the stack segment is null",
        |a| a.mov(qword_ptr(rsp + 32), 0),
        13,
        0,
    ),
];

/// Before the returns, which R12 counts down and RSI counts.
fn begin(m: &mut Machine) {
    m.action(1, Action::Stop);
    m.forget();
    m.set_reg(Gpr::R12, OFTEN);
    m.set_reg(Gpr::R15, 0);
    m.set_reg(Gpr::Rsi, 0);
}

/// Whether the last of them, and none before, had that exception.
fn judge(m: &Machine, (what, _, vector, error): &Case) {
    let r = m.records()[0];
    assert_eq!((r.vector, r.error), (*vector, *error), "{what}");
    let came_back = OFTEN - u64::from(*vector != 1);
    assert_eq!(m.reg(Gpr::Rsi), came_back, "{what}");
}

/// What changes may have left, but for descriptors.
fn put_back(m: &mut Machine, gdtr: Dtr) {
    m.cpu_mut().gdtr = gdtr;
    m.cpu_mut().rflags.remove(Rflags::NT);
    m.cpu_mut().flush_tlb(true);
}

#[test]
fn what_changes_after_many_returns_is_seen() {
    each_engine(|m| {
        for case @ (what, change, ..) in CHANGES.iter().chain(USER_CHANGES) {
            println!("{what}");
            let table: Vec<u64> = (0..12).map(|n| m.get(GDT + 8 * n)).collect();
            let (page, gdtr) = (m.get(PT + 8 * (GDT >> 12)), m.cpu().gdtr);
            for (n, descriptor) in table.iter().enumerate() {
                m.put(SPARE + 8 * n as u64, *descriptor);
            }
            m.put(SPARE + (access_byte(USER_CS) & 0xfff), 0x7bu8);
            m.place(64, HANDLER, |a: &mut CodeAssembler| {
                let mut back = a.create_label();
                a.dec(r12)?;
                a.jnz(back)?;
                change(a)?;
                a.set_label(&mut back)?;
                a.iretq()
            });
            m.gate(0x80, HANDLER, 0xe, 0, 3);
            begin(m);
            m.run_user(|a| {
                without_data_segments(a)?;
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.int(0x80)?;
                a.inc(rsi)?;
                a.jmp(again)
            });
            judge(m, case);
            for (n, descriptor) in table.iter().enumerate() {
                m.put(GDT + 8 * n as u64, *descriptor);
            }
            m.put(PT + 8 * (GDT >> 12), page);
            put_back(m, gdtr);
        }
    });
}

#[test]
fn popf_ignores_the_upper_half_of_what_it_pops() {
    each_engine(|m| {
        let pop = |a: &mut CodeAssembler| {
            a.mov(rax, 0x18_0000_0046u64)?;
            a.push(rax)?;
            a.popfq()
        };
        let r = m.faults(pop, |a| a.ud2());
        assert_eq!(r.rflags & !Rflags::RF.bits(), 0x46);
    });
}

const AC: i32 = 1 << 18;
/// Segments of the kernel that no gate leads to.
const OTHER_CS: u64 = 0x50;
const OTHER_DS: u64 = 0x58;

/// Interrupts itself often, with this in SS.
fn interrupts_itself(m: &mut Machine, stack: u64) {
    m.to_kernel();
    m.place(64, HANDLER, |a: &mut CodeAssembler| {
        a.xor(qword_ptr(rsp + 16), CF | DF | ID | AC)?;
        a.iretq()
    });
    m.gate(0x80, HANDLER, 0xe, 0, 0);
    m.set_reg(Gpr::Rcx, OFTEN);
    for r in [Gpr::Rbx, Gpr::R12, Gpr::R13] {
        m.set_reg(r, 0);
    }
    m.run_code(|a| {
        a.mov(edx, stack as i32)?;
        a.mov(ss, edx)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.xor(eax, eax)?;
        a.int(0x80)?;
        a.pushfq()?;
        a.pop(rax)?;
        a.and(eax, CF | ZF | DF | ID | AC)?;
        a.add(rbx, rax)?;
        a.mov(eax, ss)?;
        a.add(r12, rax)?;
        a.mov(eax, cs)?;
        a.add(r13, rax)?;
        a.dec(ecx)?;
        a.jnz(again)
    });
}

#[test]
fn the_kernel_comes_back_with_its_flags_and_segments() {
    each_engine(|m| {
        for stack in [KERNEL_DS, 0, KERNEL_DS] {
            interrupts_itself(m, stack);
            let each = (CF | ZF) as u64;
            let every_other = (DF | ID | AC) as u64;
            let flags = OFTEN * each + OFTEN / 2 * every_other;
            assert_eq!(m.reg(Gpr::Rbx), flags, "with SS {stack:#x}");
            assert_eq!(m.reg(Gpr::R12), OFTEN * stack);
            assert_eq!(m.reg(Gpr::R13), OFTEN * KERNEL_CS);
            m.cpu_mut().rflags.remove(Rflags::AC | Rflags::DF);
        }
    });
}

/// Of a return to the kernel.
const KERNEL_CHANGES: &[Case] = &[
    (
        "the code segment is not present",
        |a| a.mov(byte_ptr(access_byte(OTHER_CS)), 0x1b),
        11,
        OTHER_CS,
    ),
    (
        "the code segment is data",
        |a| a.mov(byte_ptr(access_byte(OTHER_CS)), 0x93),
        13,
        OTHER_CS,
    ),
    (
        "the code segment is of user code",
        |a| a.mov(byte_ptr(access_byte(OTHER_CS)), 0xfb),
        13,
        OTHER_CS,
    ),
    (
        "the stack segment cannot be written to",
        |a| a.mov(byte_ptr(access_byte(OTHER_DS)), 0x91),
        13,
        OTHER_DS,
    ),
    (
        "the stack segment is not present",
        |a| a.mov(byte_ptr(access_byte(OTHER_DS)), 0x13),
        12,
        OTHER_DS,
    ),
    (
        "the table is shorter",
        |a| {
            a.mov(word_ptr(DATA), OTHER_CS as i32 - 1)?;
            a.mov(rax, GDT)?;
            a.mov(qword_ptr(DATA + 2), rax)?;
            a.lgdt(tword_ptr(DATA))
        },
        13,
        OTHER_CS,
    ),
    (
        "the selector of the stack segment is null with an RPL",
        |a| a.mov(qword_ptr(rsp + 32), 3),
        13,
        0,
    ),
    (
        "the address is not canonical in the upper half",
        |a| {
            a.mov(rax, !(1u64 << 47))?;
            a.mov(qword_ptr(rsp), rax)
        },
        13,
        0,
    ),
];

#[test]
fn what_changes_after_many_returns_to_the_kernel_is_seen() {
    each_engine(|m| {
        for case @ (what, change, ..) in CHANGES.iter().chain(KERNEL_CHANGES) {
            println!("{what}");
            let gdtr = m.cpu().gdtr;
            for (selector, like) in [(OTHER_CS, KERNEL_CS), (OTHER_DS, KERNEL_DS)] {
                m.put(GDT + selector, m.get(GDT + like));
            }
            m.to_kernel();
            begin(m);
            m.run_code(|a| {
                let (mut again, mut back, mut next) =
                    (a.create_label(), a.create_label(), a.create_label());
                a.mov(edx, OTHER_DS as i32)?;
                a.mov(ss, edx)?;
                a.mov(rdi, rsp)?;
                a.set_label(&mut again)?;
                a.mov(eax, ss)?;
                a.push(rax)?;
                a.push(rdi)?;
                a.pushfq()?;
                a.push(OTHER_CS as i32)?;
                a.lea(rax, ptr(next))?;
                a.push(rax)?;
                a.dec(r12)?;
                a.jnz(back)?;
                change(a)?;
                a.set_label(&mut back)?;
                a.iretq()?;
                a.set_label(&mut next)?;
                a.inc(rsi)?;
                a.jmp(again)
            });
            judge(m, case);
            put_back(m, gdtr);
        }
    });
}
