//! Every exception: its vector, error code and frame; the stack of its handler; exceptions within exceptions.

use doppel_conformance::paging::{P, error};
use doppel_conformance::*;
use doppel_x86::{Cr0, Cr4, Exit, Gpr, Rflags, Vendor};
use iced_x86::code_asm::*;

pub(super) type Emit = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;

pub(super) fn nothing(_: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    Ok(())
}

const NONE: u64 = Record::NO_ERROR;
const NOT_CANONICAL: u64 = 0x8000_0000_0000_0000;

pub(super) struct Fault {
    what: &'static str,
    prepare: Emit,
    code: Emit,
    vector: u64,
    error: u64,
}

pub(super) const fn fault(
    what: &'static str,
    prepare: Emit,
    code: Emit,
    vector: u64,
    error: u64,
) -> Fault {
    Fault {
        what,
        prepare,
        code,
        vector,
        error,
    }
}

/// Runs one fault and checks everything that all faults share.
pub(super) fn check(m: &mut Machine, f: &Fault) -> Record {
    let user = m.cpu().cpl == 3;
    let before = m.cpu().rflags;
    println!("{}", f.what);
    let r = m.faults(f.prepare, f.code);
    assert_eq!(
        (r.vector, r.error),
        (f.vector, f.error),
        "{}: {r:x?}",
        f.what
    );
    let base = if user { USER_CODE } else { CODE };
    assert_eq!(r.rip, base + 0x800, "{}: the fault's address", f.what);
    assert!(r.rf(), "{}: RF is set in the frame of a fault", f.what);
    let selector = if user { USER_CS } else { KERNEL_CS };
    assert_eq!(r.cs, selector, "{}", f.what);
    if user {
        assert_eq!((r.ss, r.stack), (USER_DS, KERNEL_STACK), "{}", f.what);
    }
    assert_eq!(
        r.rflags & Rflags::IF.bits(),
        (before & Rflags::IF).bits(),
        "{}",
        f.what
    );
    r
}

#[test]
fn faults_of_kernel_code() {
    let faults = [
        fault("#DE by zero", |a| a.xor(ecx, ecx), |a| a.div(ecx), 0, NONE),
        fault(
            "#DE by overflow",
            |a| {
                a.mov(edx, 5)?;
                a.mov(ecx, 5)
            },
            |a| a.div(rcx),
            0,
            NONE,
        ),
        fault(
            "#DE, the most negative number by -1",
            |a| {
                a.mov(rax, i64::MIN)?;
                a.cqo()?;
                a.mov(rcx, -1i64)
            },
            |a| a.idiv(rcx),
            0,
            NONE,
        ),
        fault(
            "#DE from memory",
            |a| a.mov(qword_ptr(DATA), 0),
            |a| a.div(qword_ptr(DATA)),
            0,
            NONE,
        ),
        fault("#UD", nothing, |a| a.ud2(), 6, NONE),
        fault(
            "#UD of LOCK on a register",
            nothing,
            |a| a.db(&[0xf0, 0x01, 0xc0]),
            6,
            NONE,
        ),
        fault(
            "#UD of LOCK on MOV",
            nothing,
            |a| a.db(&[0xf0, 0x89, 0x03]),
            6,
            NONE,
        ),
        fault("#UD of MOV CS", nothing, |a| a.db(&[0x8e, 0xc8]), 6, NONE),
        fault(
            "#UD of CR1",
            nothing,
            |a| a.db(&[0x0f, 0x20, 0xc8]),
            6,
            NONE,
        ),
        fault("#UD of PUSH ES", nothing, |a| a.db(&[0x06]), 6, NONE),
        fault(
            "#GP of a long instruction",
            nothing,
            |a| a.db(&[0x66; 15]),
            13,
            0,
        ),
        fault(
            "#GP of an address that is not canonical",
            |a| a.mov(rbx, NOT_CANONICAL),
            |a| a.mov(rax, qword_ptr(rbx)),
            13,
            0,
        ),
        fault(
            "#GP of a store there",
            |a| a.mov(rbx, NOT_CANONICAL),
            |a| a.mov(qword_ptr(rbx), rax),
            13,
            0,
        ),
        fault(
            "#GP at the end of the canonical addresses",
            |a| a.mov(rbx, 0x7fff_ffff_fffcu64),
            |a| a.mov(rax, qword_ptr(rbx)),
            13,
            0,
        ),
        fault(
            "#SS of the stack",
            |a| a.mov(rbp, NOT_CANONICAL),
            |a| a.mov(rax, qword_ptr(rbp)),
            12,
            0,
        ),
        fault(
            "#GP of a selector",
            |a| a.mov(eax, 0x1000),
            |a| a.mov(ds, eax),
            13,
            0x1000,
        ),
        fault(
            "#GP of a code segment for SS",
            |a| a.mov(eax, 0x10),
            |a| a.mov(ss, eax),
            13,
            0x10,
        ),
        fault(
            "#GP of SS null",
            |a| a.mov(eax, 3),
            |a| a.mov(ss, eax),
            13,
            0,
        ),
        fault(
            "#NP",
            |a| a.mov(eax, ABSENT_DS as u32),
            |a| a.mov(ds, eax),
            11,
            ABSENT_DS,
        ),
        fault(
            "#SS of a segment that is not present",
            |a| a.mov(eax, ABSENT_DS as u32),
            |a| a.mov(ss, eax),
            12,
            ABSENT_DS,
        ),
        fault(
            "#GP beyond the LDT",
            |a| a.mov(eax, 0xc),
            |a| a.mov(fs, eax),
            13,
            0xc,
        ),
        fault(
            "#GP of a misaligned vector",
            |a| a.mov(rbx, DATA + 8),
            |a| a.movaps(xmm0, xmmword_ptr(rbx)),
            13,
            0,
        ),
        fault(
            "#GP of a reserved bit of CR0",
            |a| a.mov(rax, 1u64 << 32),
            |a| a.mov(cr0, rax),
            13,
            0,
        ),
        fault(
            "#GP of a reserved bit of CR4",
            |a| a.mov(rax, 1u64 << 63),
            |a| a.mov(cr4, rax),
            13,
            0,
        ),
        fault(
            "#GP of an MSR",
            |a| a.mov(ecx, 0x1234_5678),
            |a| a.rdmsr(),
            13,
            0,
        ),
        fault(
            "#GP of LSTAR not canonical",
            |a| {
                a.mov(ecx, 0xc000_0082u32)?;
                a.mov(edx, 0x8000_0000u32)
            },
            |a| a.wrmsr(),
            13,
            0,
        ),
        fault(
            "#GP of LTR of a busy TSS",
            |a| a.mov(eax, TSS_SELECTOR as u32),
            |a| a.ltr(ax),
            13,
            TSS_SELECTOR,
        ),
        fault(
            "#GP of IRET with NT",
            |a| {
                a.pushfq()?;
                a.or(qword_ptr(rsp), 0x4000)?;
                a.popfq()
            },
            |a| a.iretq(),
            13,
            0,
        ),
    ];
    each_engine(|m| {
        for f in &faults {
            m.forget();
            m.to_kernel();
            check(m, f);
        }
    });
}

#[test]
fn privileged_instructions_of_user_code() {
    let codes: &[(&str, Emit)] = &[
        ("hlt", |a| a.hlt()),
        ("cli", |a| a.cli()),
        ("sti", |a| a.sti()),
        ("in", |a| a.in_(al, 0x60)),
        ("out", |a| a.out(0x60, eax)),
        ("rdmsr", |a| a.rdmsr()),
        ("wrmsr", |a| a.wrmsr()),
        ("mov from cr0", |a| a.mov(rax, cr0)),
        ("mov to cr3", |a| a.mov(cr3, rax)),
        ("mov from cr8", |a| a.db(&[0x44, 0x0f, 0x20, 0xc0])),
        ("mov from dr7", |a| a.mov(rax, dr7)),
        ("mov to dr0", |a| a.mov(dr0, rax)),
        ("clts", |a| a.clts()),
        ("lmsw", |a| a.lmsw(ax)),
        ("lgdt", |a| a.lgdt(ptr(rsp))),
        ("lidt", |a| a.lidt(ptr(rsp))),
        ("lldt", |a| a.lldt(ax)),
        ("ltr", |a| a.ltr(ax)),
        ("invlpg", |a| a.invlpg(byte_ptr(rsp))),
        ("wbinvd", |a| a.wbinvd()),
        ("invd", |a| a.invd()),
        ("swapgs", |a| a.swapgs()),
        ("sysretq", |a| a.sysretq()),
        ("insb", |a| a.insb()),
        ("rep outsb", |a| a.rep().outsb()),
    ];
    each_engine(|m| {
        for (what, code) in codes {
            m.forget();
            m.to_user();
            m.set_reg(Gpr::Rcx, 1);
            check(m, &fault(what, nothing, *code, 13, 0));
        }
    });
}

#[test]
fn umip_guards_the_tables_addresses() {
    each_engine(|m| {
        let code: &[(&str, Emit)] = &[
            ("sgdt", |a| a.sgdt(ptr(USER_DATA))),
            ("sidt", |a| a.sidt(ptr(USER_DATA))),
            ("sldt", |a| a.sldt(eax)),
            ("str", |a| a.str(eax)),
            ("smsw", |a| a.smsw(eax)),
        ];
        for (what, code) in code {
            for umip in [false, true] {
                m.forget();
                m.cpu_mut().cr4.set(Cr4::UMIP, umip);
                m.to_user();
                if umip {
                    check(m, &fault(what, nothing, *code, 13, 0));
                } else {
                    m.run_user(code);
                    assert!(m.records().is_empty(), "{what}");
                }
            }
        }
        m.cpu_mut().cr4.remove(Cr4::UMIP);
        m.to_user();
        m.run_user(|a| {
            a.sgdt(ptr(USER_DATA))?;
            a.sidt(ptr(USER_DATA + 16))?;
            a.str(ebx)
        });
        // The guest's own tables, not the host's.
        assert_eq!(m.get(USER_DATA + 2), GDT);
        assert_eq!(m.get(USER_DATA + 18) & 0xffff_ffff, IDT);
        assert_eq!(m.reg(Gpr::Rbx), TSS_SELECTOR);
    });
}

#[test]
fn traps_save_the_next_instruction() {
    each_engine(|m| {
        let mut after = 0;
        for (code, vector) in [
            (&[0xcc][..], 3u64),
            (&[0xcd, 3], 3),
            (&[0xcd, 0x80], 0x80),
            (&[0xcd, 0xff], 0xff),
            (&[0xf1], 1),
        ] {
            m.forget();
            m.to_user();
            m.run_user(|a| {
                a.stc()?;
                a.db(code)?;
                a.setc(bl)
            });
            let r = m.records()[0];
            after += 1;
            assert_eq!((r.vector, r.error), (vector, NONE), "case {after}");
            assert_eq!(r.rip, USER_CODE + 1 + code.len() as u64);
            assert!(!r.rf() && r.rflags & 1 == 1);
            assert_eq!(m.reg(Gpr::Rbx) & 0xff, 1);
        }
    });
}

#[test]
fn software_interrupts_check_the_gate() {
    each_engine(|m| {
        // DPL 0, from user code: the error code names the gate.
        for vector in [0u8, 6, 13, 14, 0x20] {
            m.forget();
            m.to_user();
            let code = [0xcd, vector];
            let r = m.faults(nothing, |a: &mut CodeAssembler| a.db(&code));
            assert_eq!((r.vector, r.error), (13, u64::from(vector) * 8 + 2));
            assert!(r.rf());
        }
        // Not present; beyond the limit.
        let at = IDT + 16 * 0x90;
        m.put(at, m.get(at) & !(0x80 << 40));
        m.forget();
        m.to_user();
        let r = m.faults(nothing, |a: &mut CodeAssembler| a.int(0x90));
        assert_eq!((r.vector, r.error), (11, 0x90 * 8 + 2));
        m.cpu_mut().idtr.limit = 0xfff - 16;
        m.forget();
        m.to_user();
        let r = m.faults(nothing, |a: &mut CodeAssembler| a.int(0xff));
        assert_eq!((r.vector, r.error), (13, 0xff * 8 + 2));
    });
}

#[test]
fn an_interrupt_through_a_bad_gate_says_that_it_was_external() {
    each_engine(|m| {
        let at = IDT + 16 * 0x40;
        m.put(at, m.get(at) & !(0x80 << 40));
        m.run_code(|a| {
            a.sti()?;
            a.mov(r15, STOPPED_AT)?;
            a.mov(al, 0x40)?;
            a.out(i32::from(bus::PORT_INTERRUPT), al)?;
            a.nop()
        });
        let r = m.records()[0];
        assert_eq!((r.vector, r.error), (11, 0x40 * 8 + 3));
    });
}

#[test]
fn the_handler_of_user_code_runs_on_rsp0_or_an_interrupt_stack() {
    each_engine(|m| {
        for ist in 0..=7 {
            m.forget();
            m.to_user();
            m.gate_on_ist(6, ist);
            m.set_reg(Gpr::Rsp, USER_STACK - 5);
            let r = m.faults(nothing, |a: &mut CodeAssembler| a.ud2());
            let stack = match ist {
                0 => KERNEL_STACK,
                n => IST1 + 0x2000 * (n - 1),
            };
            assert_eq!((r.stack, r.rsp), (stack, USER_STACK - 5), "IST {ist}");
        }
    });
}

#[test]
fn the_kernels_own_stack_is_aligned_and_ist_is_taken_without_a_change_of_privilege() {
    each_engine(|m| {
        let top = KERNEL_STACK - 0x803;
        m.set_reg(Gpr::Rsp, top);
        let r = m.faults(nothing, |a: &mut CodeAssembler| a.ud2());
        assert_eq!((r.stack, r.rsp), (top & !15, top));
        assert_eq!(r.ss, KERNEL_DS);
        m.forget();
        m.gate_on_ist(6, 3);
        m.set_reg(Gpr::Rsp, top);
        let r = m.faults(nothing, |a: &mut CodeAssembler| a.ud2());
        assert_eq!((r.stack, r.rsp), (IST1 + 0x4000, top));
    });
}

#[test]
fn trap_gates_leave_interrupts_on() {
    each_engine(|m| {
        let seen = CODE + 0x400;
        m.place(64, seen, |a: &mut CodeAssembler| {
            a.pushfq()?;
            a.pop(qword_ptr(DATA))?;
            a.iretq()
        });
        for (kind, on) in [(0xe, 0), (0xf, 0x200)] {
            m.gate(0x80, seen, kind, 0, 3);
            m.to_user();
            m.run_user(|a| {
                a.std()?;
                a.pushfq()?;
                a.or(qword_ptr(rsp), 0x4_0000)?;
                a.popfq()?;
                a.int(0x80)
            });
            assert_eq!(m.data(0) & 0x4_0600, 0x4_0400 | on, "AC and DF stay");
        }
    });
}

#[test]
fn a_fault_in_the_delivery_of_a_fault_is_a_double_fault() {
    each_engine(|m| {
        // #GP whose gate is not present: contributory and contributory.
        let at = IDT + 16 * 13;
        m.put(at, m.get(at) & !(0x80 << 40));
        m.gate_on_ist(8, 1);
        m.action(8, Action::Stop);
        m.run_code(|a| {
            a.mov(rax, NOT_CANONICAL)?;
            a.mov(rax, qword_ptr(rax))
        });
        let r = m.records()[0];
        assert_eq!((r.vector, r.error, r.stack), (8, 0, IST1));
        assert_eq!(r.rip, CODE + 10);
    });
}

#[test]
fn a_page_fault_on_a_missing_stack_is_a_double_fault() {
    each_engine(|m| {
        m.gate_on_ist(8, 2);
        m.action(8, Action::Stop);
        m.run_code(|a| {
            a.mov(rsp, X + 0x3000)?;
            a.push(rax)
        });
        let r = m.records()[0];
        assert_eq!((r.vector, r.error, r.stack), (8, 0, IST1 + 0x2000));
        assert_eq!((r.rip, r.rsp), (CODE + 10, X + 0x3000));
        assert_eq!(r.cr2, X + 0x2ff8, "of the second page fault");
    });
}

#[test]
fn a_page_fault_in_the_delivery_of_a_benign_exception_is_delivered() {
    each_engine(|m| {
        m.map(2, SPARE, 0);
        m.gate_on_ist(14, 1);
        // #UD on a missing stack: #PF, whose handler maps the stack; then #UD again.
        let pf = CODE + 0x400;
        m.place(64, pf, |a: &mut CodeAssembler| {
            a.pop(qword_ptr(DATA))?;
            a.pop(qword_ptr(DATA + 8))?;
            a.sub(rsp, 8)?;
            a.mov(rax, SPARE | P | 2)?;
            a.mov(qword_ptr(X_PT + 16), rax)?;
            a.iretq()
        });
        m.gate(14, pf, 0xe, 1, 0);
        m.run_code(|a| {
            a.mov(rsp, X + 0x3000)?;
            a.mov(r15, CODE + 12 + 10)?;
            a.ud2()
        });
        assert_eq!((m.data(0), m.data(1)), (error::W, CODE + 20));
        let records = m.records();
        assert_eq!(records[0].vector, 6);
        assert_eq!(records[0].rsp, X + 0x3000);
    });
}

#[test]
fn a_third_fault_shuts_the_processor_down() {
    each_engine(|m| {
        m.cpu_mut().idtr.limit = 0;
        m.place(64, CODE, |a: &mut CodeAssembler| a.ud2());
        assert_eq!(m.run_to_exit(), Exit::Shutdown);
        assert_eq!(m.run_to_exit(), Exit::Shutdown, "and it stays");
        assert_eq!(m.cpu().rip, CODE);
    });
}

#[test]
fn no_stack_for_the_double_fault_shuts_down_too() {
    each_engine(|m| {
        m.to_user();
        m.put(TSS + 4, X);
        m.place(64, USER_CODE, |a: &mut CodeAssembler| a.hlt());
        assert_eq!(m.run_to_exit(), Exit::Shutdown);
    });
}

#[test]
fn the_coprocessor_is_not_available_while_ts_is_set() {
    let codes: &[(&str, Emit)] = &[
        ("fld1", |a| a.fld1()),
        ("fnstcw", |a| a.fnstcw(word_ptr(DATA))),
        ("addps", |a| a.addps(xmm0, xmm1)),
        ("movaps from memory", |a| a.movaps(xmm0, xmmword_ptr(DATA))),
        ("pxor mm", |a| a.pxor(mm0, mm0)),
        ("fxsave", |a| a.fxsave(ptr(DATA))),
        ("wait", |a| a.wait()),
        ("ldmxcsr", |a| a.ldmxcsr(dword_ptr(DATA))),
    ];
    each_engine(|m| {
        for (what, code) in codes {
            m.cpu_mut().cr0.insert(Cr0::TS);
            m.forget();
            check(m, &fault(what, nothing, *code, 7, NONE));
        }
        // CLTS lets the next one through, in the block that has just faulted too.
        m.forget();
        m.cpu_mut().cr0.insert(Cr0::TS);
        m.action(7, Action::Return);
        let nm = CODE + 0x400;
        m.place(64, nm, |a: &mut CodeAssembler| {
            a.clts()?;
            a.inc(qword_ptr(DATA + 0x100))?;
            a.iretq()
        });
        m.gate(7, nm, 0xe, 0, 0);
        m.put(DATA + 0x100, 0u64);
        m.go(CODE);
        m.run_code(|a| {
            a.mov(eax, 3)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.cvtsi2sd(xmm0, eax)?;
            a.mov(rbx, cr0)?;
            a.or(rbx, 8)?;
            a.mov(cr0, rbx)?;
            a.dec(eax)?;
            a.jnz(again)?;
            a.clts()?;
            a.cvttsd2si(ebx, xmm0)
        });
        assert_eq!((m.get(DATA + 0x100), m.reg(Gpr::Rbx)), (3, 1));
    });
}

#[test]
fn emulation_and_missing_support_of_the_system_make_invalid_opcodes() {
    each_engine(|m| {
        let addps: Emit = |a| a.addps(xmm0, xmm1);
        m.cpu_mut().cr4.remove(Cr4::OSFXSR);
        check(m, &fault("without OSFXSR", nothing, addps, 6, NONE));
        m.forget();
        let mixed: [Emit; 4] = [
            |a| a.movq2dq(xmm0, mm1),
            |a| a.movdq2q(mm0, xmm1),
            |a| a.cvtps2pi(mm0, xmm1),
            |a| a.cvttps2pi(mm0, qword_ptr(DATA)),
        ];
        for emit in mixed {
            check(
                m,
                &fault("MMX and XMM without OSFXSR", nothing, emit, 6, NONE),
            );
            m.forget();
        }
        let alone: Emit = |a| {
            a.paddb(mm0, mm1)?;
            a.pshufw(mm0, mm1, 0)?;
            a.emms()
        };
        m.run_code(alone);
        assert!(m.records().is_empty(), "MMX alone does not need it");
        m.forget();
        m.cpu_mut().cr4.insert(Cr4::OSFXSR);
        m.cpu_mut().cr0.insert(Cr0::EM);
        check(m, &fault("with EM", nothing, addps, 6, NONE));
        m.forget();
        check(m, &fault("x87 with EM", nothing, |a| a.fld1(), 7, NONE));
        m.forget();
        m.cpu_mut().cr0.remove(Cr0::EM);
        check(m, &fault("xgetbv", nothing, |a| a.xgetbv(), 6, NONE));
        m.forget();
        check(
            m,
            &fault("vaddps", nothing, |a| a.vaddps(ymm0, ymm0, ymm0), 6, NONE),
        );
        m.forget();
        check(m, &fault("xsave", nothing, |a| a.xsave(ptr(DATA)), 6, NONE));
    });
}

#[test]
fn unmasked_simd_and_x87_exceptions() {
    each_engine(|m| {
        let r = check(
            m,
            &fault(
                "#XM",
                |a| {
                    a.mov(dword_ptr(DATA), 0x1f80 & !0x200)?;
                    a.ldmxcsr(dword_ptr(DATA))?;
                    a.pxor(xmm1, xmm1)?;
                    a.mov(eax, 1)?;
                    a.cvtsi2ss(xmm0, eax)
                },
                |a| a.divss(xmm0, xmm1),
                19,
                NONE,
            ),
        );
        assert_eq!(r.vector, 19);
        assert_eq!(m.cpu().fpu.mxcsr() & 4, 4, "ZE is set");
        m.forget();
        m.cpu_mut().cr4.remove(Cr4::OSXMMEXCPT);
        check(
            m,
            &fault(
                "#UD without OSXMMEXCPT",
                nothing,
                |a| a.divss(xmm0, xmm1),
                6,
                NONE,
            ),
        );
        m.forget();
        let mf: Emit = |a| {
            a.mov(word_ptr(DATA), 0x37f & !4)?;
            a.fninit()?;
            a.fldcw(word_ptr(DATA))?;
            a.fld1()?;
            a.fldz()?;
            a.fdivp(st1, st0)
        };
        check(
            m,
            &fault(
                "#MF at the next x87 instruction",
                mf,
                |a| a.fld1(),
                16,
                NONE,
            ),
        );
        m.forget();
        check(m, &fault("#MF at WAIT", mf, |a| a.wait(), 16, NONE));
    });
}

/// The branch itself faults, with RSP as it was.
#[test]
fn branches_to_addresses_that_are_not_canonical_fault() {
    let codes: &[Emit] = &[
        |a| a.jmp(rax),
        |a| a.jmp(qword_ptr(USER_DATA)),
        |a| a.call(rax),
        |a| a.call(qword_ptr(USER_DATA)),
        |a| a.ret(),
    ];
    each_engine(|m| {
        for target in [1 << 63, (1 << 63) + 2, 1 << 47, 0xffff_7fff_ffff_ffff] {
            for (n, code) in codes.iter().enumerate() {
                for user in [false, true] {
                    println!("{target:x} {n} {user}");
                    m.forget();
                    m.to_kernel();
                    if user {
                        m.to_user();
                    }
                    m.put(USER_DATA, target);
                    m.put(USER_STACK - 8, target);
                    m.set_reg(Gpr::Rax, target);
                    m.set_reg(Gpr::Rsp, USER_STACK - 8);
                    let at = m.fault_at();
                    let r = m.faults(nothing, code);
                    assert_eq!((r.vector, r.error), (13, 0));
                    assert_eq!((r.rip, r.rsp), (at, USER_STACK - 8));
                }
            }
        }
    });
}

/// Direct ones too, where the code lies near the end of the addresses.
#[test]
fn direct_branches_to_addresses_that_are_not_canonical_fault() {
    /// The last page below 2^47, and the page tables that lead there.
    const LAST: u64 = 0x7fff_ffff_f000;
    let codes: [Emit; 4] = [
        |a| a.jmp(LAST + 0x1000),
        |a| a.jmp(LAST + 0x7fff_0000),
        |a| a.call(LAST + 0x1_0000),
        |a| a.jne(LAST + 0x1_2345),
    ];
    each_engine(|m| {
        let tables = [0, 1, 2].map(|n| TABLES + 0x1000 * n);
        m.put(PML4 + 8 * 255, tables[0] | 7);
        m.put(tables[0] + 8 * 511, tables[1] | 7);
        m.put(tables[1] + 8 * 511, tables[2] | 7);
        m.put(tables[2] + 8 * 511, SPARE | 7);
        for (n, code) in codes.iter().enumerate() {
            for user in [false, true] {
                println!("{n} {user}");
                let offset = 0x200 + 0x100 * n as u64;
                m.forget();
                m.place_at(
                    64,
                    SPARE + offset,
                    LAST + offset,
                    |a: &mut CodeAssembler| {
                        a.test(eax, eax)?;
                        code(a)
                    },
                );
                // TEST EAX, EAX
                let branch = LAST + offset + 2;
                m.to_kernel();
                let stack = if user {
                    USER_STACK
                } else {
                    KERNEL_STACK - 0x400
                };
                if user {
                    m.to_user();
                }
                m.set_reg(Gpr::Rax, 1);
                m.set_reg(Gpr::Rsp, stack);
                m.go(LAST + offset);
                m.run();
                let r = m.records()[0];
                assert_eq!((r.vector, r.rip, r.rsp), (13, branch, stack));
            }
        }
    });
}

#[test]
fn a_near_return_with_an_operand_size_prefix_is_the_makers() {
    const TARGET: u64 = 0x4_f000;
    each_engine(|m| {
        for at in [TARGET, TARGET & 0xffff] {
            m.place(64, at, |a: &mut CodeAssembler| {
                a.mov(rbx, at)?;
                a.mov(rdx, rsp)?;
                a.int(0x81)
            });
        }
        m.run_code(|a| {
            a.push(TARGET as i32)?;
            a.mov(r12, rsp)?;
            a.db(&[0x66, 0xc3])
        });
        let popped = m.reg(Gpr::Rdx) - m.reg(Gpr::R12);
        let expected = match m.cpu().cpuid.vendor() {
            Vendor::Intel => (TARGET, 8),
            Vendor::Amd => (TARGET & 0xffff, 2),
        };
        assert_eq!((m.reg(Gpr::Rbx), popped), expected);
    });
}
