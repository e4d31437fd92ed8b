//! Single steps, breakpoints in DR0 to DR3, general detect.

use doppel_conformance::paging::{P, RW};
use doppel_conformance::*;
use doppel_x86::{Cr4, Gpr, Rflags, Vendor};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const BS: u64 = 1 << 14;
const BD: u64 = 1 << 13;
/// DR7: G of breakpoint n, with R/W and LEN.
fn enable(n: u64, kind: u64, len: u64) -> u64 {
    2 << (2 * n) | (kind | len << 2) << (16 + 4 * n)
}

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const PORT: u64 = 2;
const ACCESS: u64 = 3;
/// LEN for 1, 2, 4 and 8 bytes.
const LEN: [u64; 4] = [0, 1, 3, 2];

fn set_tf(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.pushfq()?;
    a.or(qword_ptr(rsp), 0x100)?;
    a.popfq()
}

fn clear_tf(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.pushfq()?;
    a.and(qword_ptr(rsp), !0x100)?;
    a.popfq()
}

fn set_dr(a: &mut CodeAssembler, r: AsmRegisterDr, v: u64) -> Result<(), IcedError> {
    a.mov(r14, v)?;
    a.mov(r, r14)
}

#[test]
fn a_single_step_ends_a_halt() {
    each_engine(|m| {
        m.run_code(|a| {
            set_tf(a)?;
            a.hlt()?;
            clear_tf(a)
        });
        // Those after POPF and HLT, and two of the instructions that end it.
        let rips: Vec<u64> = m.records().iter().map(|r| r.rip).collect();
        let popf = CODE + 1 + 8 + 1;
        assert_eq!(rips[0], popf + 1, "behind HLT");
        assert!((STOPPED_AT..STOPPED_AT + 0x10).contains(&m.cpu().rip));
    });
}

#[test]
fn single_steps_stop_after_each_instruction() {
    each_engine(|m| {
        m.put_bytes(DATA, &[1; 8]);
        m.run_code(|a| {
            set_tf(a)?;
            a.nop()?;
            a.inc(dword_ptr(DATA))?;
            a.jmp(CODE + 0x100)?;
            Ok(())
        });
        let begin = CODE + 1 + 8 + 1;
        m.place(64, CODE + 0x100, |a: &mut CodeAssembler| {
            clear_tf(a)?;
            machine::stop(a)
        });
        m.forget();
        m.to_kernel();
        m.go(CODE);
        m.run();
        let rips: Vec<u64> = m.records().iter().map(|r| r.rip).collect();
        let at = CODE + 0x100;
        assert_eq!(&rips[..3], [begin + 1, begin + 8, at]);
        assert_eq!(
            &rips[3..],
            [at + 1, at + 9, at + 10],
            "PUSHFQ, AND and POPFQ itself"
        );
        assert!(
            m.records()
                .iter()
                .all(|r| r.vector == 1 && r.dr6 & BS != 0 && !r.rf())
        );
    });
}

const DEBUGCTL: u32 = 0x1d9;
const BTF: u64 = 1 << 1;

#[test]
fn steps_on_branches_stop_at_the_first_that_is_taken_and_then_at_each_instruction() {
    each_engine(|m| {
        let at = CODE + 0x200;
        m.place(64, at, |a: &mut CodeAssembler| {
            clear_tf(a)?;
            a.mov(ecx, DEBUGCTL)?;
            a.rdmsr()?;
            machine::stop(a)
        });
        m.set_reg(Gpr::Rax, BTF | 1);
        m.set_reg(Gpr::Rcx, DEBUGCTL.into());
        m.run_code(|a| {
            a.wrmsr()?;
            a.mov(edi, DATA as u32)?;
            a.mov(ecx, 3)?;
            set_tf(a)?;
            a.rep().stosb()?;
            a.test(eax, eax)?;
            a.jz(CODE)?;
            a.jmp(at)
        });
        let r = m.records();
        let rips: Vec<u64> = r.iter().map(|r| r.rip).collect();
        assert_eq!(rips, [at, at + 1, at + 9, at + 10]);
        assert!(r.iter().all(|r| r.vector == 1 && r.dr6 & BS != 0));
        assert_eq!(m.cpu().msr.debugctl, 0, "a #DB clears it");
    });
}

type Branch = fn(&mut CodeAssembler, u64) -> Result<(), IcedError>;

#[test]
fn every_branch_that_is_taken_is_such_a_step() {
    let branches: [Branch; 10] = [
        |a, at| a.jmp(at),
        |a, at| {
            a.lea(rax, qword_ptr(at))?;
            a.jmp(rax)
        },
        |a, at| {
            a.cmp(eax, eax)?;
            a.jne(at)?;
            a.je(at)
        },
        |a, at| a.call(at),
        |a, at| {
            a.push(at as i32)?;
            a.ret()
        },
        |a, at| {
            a.mov(ecx, 2)?;
            a.loop_(at)
        },
        |a, at| {
            a.xor(ecx, ecx)?;
            a.loope(at)?;
            a.jrcxz(at)?;
            a.mov(ecx, 0)?;
            a.jrcxz(at)
        },
        |a, at| {
            a.push(KERNEL_CS as i32)?;
            a.push(at as i32)?;
            a.db(&[0x48, 0xcb])
        },
        |a, at| {
            a.mov(rbx, rsp)?;
            a.push(KERNEL_DS as i32)?;
            a.push(rbx)?;
            a.pushfq()?;
            a.push(KERNEL_CS as i32)?;
            a.push(at as i32)?;
            a.iretq()
        },
        // What goes into a handler is stepped neither there nor when that returns.
        |a, at| {
            a.int3()?;
            a.jmp(at)
        },
    ];
    for branch in branches {
        each_engine(|m| {
            let at = CODE + 0x60;
            m.cpu_mut().msr.debugctl = BTF;
            m.place(64, at, |a: &mut CodeAssembler| {
                clear_tf(a)?;
                machine::stop(a)
            });
            m.run_code(|a| {
                set_tf(a)?;
                a.nop()?;
                branch(a, at)
            });
            let steps: Vec<u64> = m
                .records()
                .iter()
                .filter(|r| r.vector == 1 && r.dr6 & BS != 0)
                .map(|r| r.rip)
                .collect();
            assert_eq!(steps, [at, at + 1, at + 9, at + 10]);
            assert_eq!(m.cpu().msr.debugctl, 0);
        });
    }
}

#[test]
fn user_code_steps_on_branches_over_system_calls() {
    each_engine(|m| {
        m.enable(Cr4::FSGSBASE);
        if m.cpu().cpuid.has_xsave() {
            m.enable(Cr4::OSXSAVE);
            m.cpu_mut().xcr0 = m.cpu().cpuid.xcr0();
        }
        m.cpu_mut().msr.debugctl = BTF;
        let kernel = CODE + 0x400;
        m.place(64, kernel, |a: &mut CodeAssembler| a.iretq());
        m.gate(0x80, kernel, 0xe, 0, 3);
        let at = USER_CODE + 0x80;
        m.place(64, at, |a: &mut CodeAssembler| {
            clear_tf(a)?;
            machine::stop(a)
        });
        m.run_user(|a| {
            set_tf(a)?;
            a.int(0x80)?;
            a.nop()?;
            a.cpuid()?;
            a.jmp(at)
        });
        let steps: Vec<u64> = m.records().iter().map(|r| r.rip).collect();
        assert_eq!(steps, [at, at + 1, at + 9, at + 10]);
    });
}

#[test]
fn each_unit_of_a_repetition_is_a_step() {
    each_engine(|m| {
        m.run_code(|a| {
            a.mov(edi, DATA as u32)?;
            a.mov(ecx, 3)?;
            set_tf(a)?;
            a.rep().stosb()?;
            clear_tf(a)
        });
        let at = CODE + 5 + 5 + 10;
        let seen: Vec<_> = m.records().iter().map(|r| (r.rip, r.rf())).collect();
        // AMD's processors leave RF clear between the units.
        let rf = m.cpu().cpuid.vendor() == Vendor::Intel;
        assert_eq!(&seen[..3], [(at, rf), (at, rf), (at + 2, false)]);
    });
}

#[test]
fn user_code_steps_into_and_out_of_system_calls() {
    each_engine(|m| {
        let kernel = CODE + 0x400;
        m.place(64, kernel, |a: &mut CodeAssembler| {
            a.inc(r12)?;
            a.iretq()
        });
        m.gate(0x80, kernel, 0xe, 0, 3);
        m.set_reg(Gpr::R12, 0);
        m.run_user(|a| {
            set_tf(a)?;
            a.int(0x80)?;
            a.nop()?;
            clear_tf(a)
        });
        let after = USER_CODE + 10 + 2;
        let r = m.records();
        assert_eq!(m.reg(Gpr::R12), 1);
        // The kernel is not stepped; IRET gives TF back, and the trap comes after the instruction behind INT.
        assert_eq!((r[0].rip, r[0].cs), (after + 1, USER_CS));
    });
}

#[test]
fn an_instruction_breakpoint_is_a_fault_that_rf_skips() {
    each_engine(|m| {
        let target = CODE + 0x40;
        m.place(64, CODE, |a: &mut CodeAssembler| {
            set_dr(a, dr1, target)?;
            set_dr(a, dr7, enable(1, EXECUTE, LEN[0]))?;
            a.mov(ecx, 3)?;
            a.jmp(target)
        });
        let end = m.place(64, target, |a: &mut CodeAssembler| {
            a.inc(ebx)?;
            a.dec(ecx)?;
            a.jnz(target)?;
            a.xor(eax, eax)?;
            a.mov(dr7, rax)?;
            machine::stop(a)
        });
        assert!(end > target);
        // The handler returns with RF set.
        let handler = CODE + 0x400;
        m.place(64, handler, |a: &mut CodeAssembler| {
            a.inc(r12)?;
            a.mov(r13, qword_ptr(rsp))?;
            a.mov(rbp, dr6)?;
            a.mov(rsi, qword_ptr(rsp + 16))?;
            a.or(qword_ptr(rsp + 16), 0x1_0000)?;
            a.iretq()
        });
        m.gate(1, handler, 0xe, 0, 0);
        m.go(CODE);
        m.run();
        assert_eq!((m.reg(Gpr::R12), m.reg(Gpr::Rbx)), (3, 3));
        assert_eq!((m.reg(Gpr::R13), m.reg(Gpr::Rbp) & 0xf), (target, 2));
        assert_eq!(
            m.reg(Gpr::Rsi) & 0x1_0000,
            0,
            "RF in the frame is as it was"
        );
    });
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    let target = DATA + 0x28;
    type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let accesses: [(&str, Emit, bool, bool); 9] = [
        ("store", |a| a.mov(qword_ptr(rbx), rax), false, true),
        ("load", |a| a.mov(rax, qword_ptr(rbx)), true, false),
        ("modify", |a| a.inc(qword_ptr(rbx)), true, true),
        ("exchange", |a| a.xchg(qword_ptr(rbx), rax), true, true),
        ("compare", |a| a.cmp(qword_ptr(rbx), rax), true, false),
        (
            "vector store",
            |a| a.movups(xmmword_ptr(rbx), xmm0),
            false,
            true,
        ),
        (
            "vector load",
            |a| a.movups(xmm0, xmmword_ptr(rbx)),
            true,
            false,
        ),
        ("string store", |a| a.stosq(), false, true),
        ("string load", |a| a.lodsq(), true, false),
    ];
    each_engine(|m| {
        for (what, code, reads, writes) in accesses {
            for kind in [WRITE, ACCESS] {
                for n in 0..4u64 {
                    m.forget();
                    m.to_kernel();
                    m.set_reg(Gpr::R15, 0);
                    let register = [dr0, dr1, dr2, dr3][n as usize];
                    m.run_code(|a| {
                        a.mov(rbx, target)?;
                        a.mov(rdi, target)?;
                        a.mov(rsi, target)?;
                        a.mov(rax, qword_ptr(rbx))?;
                        set_dr(a, dr6, 0)?;
                        set_dr(a, register, target)?;
                        set_dr(a, dr7, enable(n, kind, LEN[3]))?;
                        // On the page, but elsewhere.
                        a.mov(qword_ptr(rbx + 8 * 4), rax)?;
                        a.mov(rcx, qword_ptr(rbx - 8))?;
                        code(a)?;
                        a.xor(r8d, r8d)?;
                        a.mov(dr7, r8)
                    });
                    let hit = if kind == WRITE {
                        writes
                    } else {
                        reads || writes
                    };
                    let r = m.records();
                    assert_eq!(r.len(), usize::from(hit), "{what} {kind} {n}: {r:x?}");
                    if hit {
                        assert_eq!((r[0].vector, r[0].dr6 & 0xf), (1, 1 << n), "{what}");
                        assert!(!r[0].rf());
                    }
                }
            }
        }
    });
}

/// What the delivery of an exception pushes is an access like any other, and the trap comes before the handler's first instruction.
#[test]
fn a_data_breakpoint_on_the_stack_of_a_handler_comes_before_it() {
    const UD: u64 = 6;
    const RETURN_ADDRESS: u64 = KERNEL_STACK - 40;
    each_engine(|m| {
        m.run_code(|a| {
            set_dr(a, dr6, 0)?;
            set_dr(a, dr0, RETURN_ADDRESS)?;
            set_dr(a, dr7, enable(0, WRITE, LEN[3]))
        });
        m.action(UD as u8, Action::Stop);
        m.run_user(|a| a.ud2());
        let r = m.records();
        assert_eq!(m.vectors(), [1, UD]);
        assert_eq!((r[0].rip, r[0].dr6 & 0xf), (HANDLERS + 16 * UD, 1));
        assert_eq!(r[1].rip, USER_CODE);
    });
}

#[test]
fn breakpoints_have_lengths() {
    each_engine(|m| {
        for (log, len) in LEN.iter().enumerate() {
            let size = 1u64 << log;
            let base = DATA + 0x40;
            for offset in 0..16 {
                m.forget();
                m.to_kernel();
                m.run_code(|a| {
                    a.mov(rbx, DATA + 0x38 + offset)?;
                    set_dr(a, dr2, base)?;
                    set_dr(a, dr7, enable(2, WRITE, *len))?;
                    a.mov(word_ptr(rbx), cx)?;
                    a.xor(r8d, r8d)?;
                    a.mov(dr7, r8)
                });
                let first = DATA + 0x38 + offset;
                let hit = first < base + size && base < first + 2;
                assert_eq!(m.records().len(), usize::from(hit), "{size} {offset}");
            }
        }
    });
}

#[test]
fn an_access_that_crosses_into_a_watched_page_hits() {
    each_engine(|m| {
        for second in [SPARE + 0x1000, SPARE + 0x3000] {
            for (watched, hit) in [
                (X + 0xff8, 1),
                (X + 0x1000, 1),
                (X + 0x1008, 0),
                (X + 0xfe0, 0),
            ] {
                m.forget();
                m.to_kernel();
                m.map(0, SPARE, P | RW);
                m.map(1, second, P | RW);
                m.run_code(|a| {
                    a.mov(rbx, X + 0xffc)?;
                    a.mov(qword_ptr(rbx), rax)?;
                    a.mov(rax, qword_ptr(rbx + 4))?;
                    set_dr(a, dr0, watched)?;
                    set_dr(a, dr7, enable(0, WRITE, LEN[3]))?;
                    a.mov(qword_ptr(rbx), rax)?;
                    a.xor(r8d, r8d)?;
                    a.mov(dr7, r8)
                });
                assert_eq!(m.records().len(), hit, "{watched:x}");
            }
        }
    });
}

#[test]
fn a_watched_variable_of_user_code_in_a_loop() {
    each_engine(|m| {
        m.cpu_mut().dr[0] = USER_DATA + 0x10;
        m.cpu_mut().dr[7] |= enable(0, WRITE, LEN[2]);
        m.run_user(|a| {
            a.mov(ecx, 1000)?;
            let (mut again, mut other) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.add(dword_ptr(USER_DATA), ecx)?;
            a.test(ecx, 0xff)?;
            a.jnz(other)?;
            a.mov(dword_ptr(USER_DATA + 0x10), ecx)?;
            a.set_label(&mut other)?;
            a.dec(ecx)?;
            a.jnz(again)
        });
        assert_eq!(m.vectors(), [1, 1, 1], "at 768, 512 and 256");
        assert_eq!(m.get(USER_DATA) & 0xffff_ffff, 500_500);
    });
}

#[test]
fn a_repetition_stops_at_the_unit_that_hits() {
    each_engine(|m| {
        m.run_code(|a| {
            set_dr(a, dr0, DATA + 0x10)?;
            set_dr(a, dr7, enable(0, WRITE, LEN[0]))?;
            a.mov(edi, DATA as u32)?;
            a.mov(ecx, 0x100)?;
            a.xor(eax, eax)?;
            a.rep().stosb()?;
            a.xor(r8d, r8d)?;
            a.mov(dr7, r8)
        });
        let r = m.records();
        assert_eq!(r.len(), 1, "{r:x?}");
        assert!(r[0].rf(), "not the last unit");
        assert_eq!(m.reg(Gpr::Rcx), 0);
    });
}

#[test]
fn port_breakpoints_need_de() {
    each_engine(|m| {
        m.enable(Cr4::DE);
        m.run_code(|a| {
            set_dr(a, dr3, 0x70)?;
            set_dr(a, dr7, enable(3, PORT, LEN[0]))?;
            a.out(0x71, al)?;
            a.in_(al, 0x70)?;
            a.out(0x70, al)?;
            a.xor(r8d, r8d)?;
            a.mov(dr7, r8)
        });
        let r = m.records();
        assert_eq!((m.vectors(), r[0].dr6 & 0xf), (vec![1, 1], 8));
    });
}

#[test]
fn general_detect_guards_the_debug_registers() {
    each_engine(|m| {
        m.place(64, CODE + 0xc00, machine::stop);
        let r = m.faults(|a| set_dr(a, dr7, 1 << 13), |a| a.mov(rax, dr0));
        assert_eq!((r.vector, r.rip, r.dr6 & BD), (1, CODE + 0x800, BD));
        assert!(r.rf());
        assert_eq!(m.cpu().dr[7] & 1 << 13, 0, "GD is cleared for the handler");
    });
}

#[test]
fn dr4_and_dr5_are_aliases_without_de() {
    each_engine(|m| {
        m.run_code(|a| {
            a.db(&[0x0f, 0x21, 0xe0])?; // MOV RAX, DR4
            a.mov(rbx, dr6)
        });
        assert_eq!(m.reg(Gpr::Rax), m.reg(Gpr::Rbx));
        m.enable(Cr4::DE);
        let r = m.faults(|_| Ok(()), |a| a.db(&[0x0f, 0x21, 0xe0]));
        assert_eq!(r.vector, 6);
    });
}

#[test]
fn mov_ss_delays_a_data_breakpoint_by_one_instruction() {
    each_engine(|m| {
        m.put(DATA, KERNEL_DS);
        m.run_code(|a| {
            set_dr(a, dr0, DATA)?;
            set_dr(a, dr7, enable(0, ACCESS, LEN[1]))?;
            a.mov(ss, word_ptr(DATA))?;
            a.nop()?;
            a.xor(r8d, r8d)?;
            a.mov(dr7, r8)
        });
        let r = m.records();
        // MOV R14, imm64 and MOV DRn, R14; MOV SS, [disp32]; NOP.
        let begin = CODE + 2 * (10 + 4);
        assert_eq!(m.vectors(), [1]);
        let shadow_ends: u64 = begin + 7 + 1;
        assert_eq!(r[0].rip, shadow_ends);
    });
}

#[test]
fn int1_takes_the_place_of_a_data_breakpoint_that_mov_ss_delays() {
    each_engine(|m| {
        m.put(DATA, KERNEL_DS);
        m.run_code(|a| {
            set_dr(a, dr0, DATA)?;
            set_dr(a, dr7, enable(0, ACCESS, LEN[1]))?;
            a.mov(ss, word_ptr(DATA))?;
            a.db(&[0xf1])?;
            a.mov(r9, dr6)?;
            a.xor(r8d, r8d)?;
            a.mov(dr7, r8)
        });
        assert_eq!(m.vectors(), [1]);
        assert_eq!(m.records()[0].rip, CODE + 2 * (10 + 4) + 7 + 1);
        assert_eq!(m.reg(Gpr::R9) & 0xf, 0);
    });
}

/// Steps of user code that makes a system call: the first of them is behind SYSCALL.
const BEHIND_SYSCALL: u64 = USER_CODE + 10 + 2;
const SYSTEM_CALLS: u64 = CODE + 0x400;

/// The system call at [`SYSTEM_CALLS`], whose kernel returns with the flags of R11 and R12.
fn place_system_call(m: &mut Machine, masked: Rflags) {
    let cpu = m.cpu_mut();
    cpu.msr.star = 0x0023_0010 << 32;
    cpu.msr.lstar = SYSTEM_CALLS;
    cpu.msr.sfmask = masked.bits();
    m.place(64, SYSTEM_CALLS, |a: &mut CodeAssembler| {
        a.nop()?;
        a.and(r11, r12)?;
        a.sysretq()
    });
}

fn steps(m: &Machine) -> Vec<(u64, u64)> {
    let records = m.records();
    assert!(records.iter().all(|r| r.vector == 1 && r.dr6 & BS != 0));
    records.iter().map(|r| (r.rip, r.cs)).collect()
}

#[test]
fn system_calls_are_stepped_where_they_leave_tf_set() {
    const ALL: Rflags = Rflags::from_bits_retain(0x4_7fd5);
    const ENTRY: u64 = SYSTEM_CALLS;
    let kernel = [
        (ENTRY, KERNEL_CS),
        (ENTRY + 1, KERNEL_CS),
        (ENTRY + 4, KERNEL_CS),
    ];
    let user = [(BEHIND_SYSCALL, USER_CS), (BEHIND_SYSCALL + 1, USER_CS)];
    each_engine_and_vendor(|m| {
        for (masked, kept, expected) in [
            (ALL, !0, user.to_vec()),
            (ALL, !0x100, vec![]),
            (Rflags::empty(), !0, [&kernel[..], &user].concat()),
            (Rflags::empty(), !0x100, kernel.to_vec()),
        ] {
            println!("masked {masked:?}, kept {kept:x}");
            m.forget();
            place_system_call(m, masked);
            m.set_reg(Gpr::R12, kept);
            m.run_user(|a| {
                set_tf(a)?;
                a.syscall()?;
                a.nop()
            });
            assert_eq!(steps(m), expected);
        }
    });
}

#[test]
fn a_system_call_that_returns_with_tf_set_is_a_step() {
    each_engine_and_vendor(|m| {
        place_system_call(m, Rflags::all());
        // What was not stepped before may be translated, or on the processor.
        for n in 0..4 {
            m.forget();
            m.set_reg(Gpr::R12, !0);
            m.place(64, SYSTEM_CALLS, |a: &mut CodeAssembler| {
                a.or(r11d, 0x100)?;
                a.sysretq()
            });
            m.run_user(|a| {
                a.mov(eax, n)?;
                a.syscall()?;
                a.nop()
            });
            let behind = USER_CODE + 5 + 2;
            assert_eq!(steps(m), [(behind, USER_CS), (behind + 1, USER_CS)]);
        }
        m.forget();
        m.to_kernel();
        m.put_bytes(USER_CODE + 0x100, &[0x90, 0xcd, STOP]);
        m.place(64, CODE, |a: &mut CodeAssembler| {
            a.mov(rcx, USER_CODE + 0x100)?;
            a.mov(r11, 0x302u64)?;
            a.sysret()
        });
        m.go(CODE);
        m.run();
        let narrow = USER_CODE + 0x100;
        assert_eq!(steps(m), [(narrow, USER_CS32), (narrow + 1, USER_CS32)]);
    });
}
