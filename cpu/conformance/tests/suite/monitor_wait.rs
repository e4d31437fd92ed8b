//! MONITOR and MWAIT, on a processor that was asked to have them: their faults, and what ends an MWAIT.

use std::sync::Arc;

use doppel_conformance::bus::{DEVICE_PAGE, PORT_DEVICE_WRITE, PORT_INTERRUPT, PORT_IPI};
use doppel_conformance::machine::stop;
use doppel_conformance::paging::{A, D, P, RW};
use doppel_conformance::*;
use doppel_x86::{Activity, CpuChoice, CpuFeatures, CpuidModel, Exit, Gpr, Rflags, Vendor};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Emitted = Result<(), IcedError>;

const UD: u64 = 6;
const SS: u64 = 12;
const GP: u64 = 13;
const PF: u64 = 14;
const VECTOR: u8 = 0x50;
/// The line, in the middle of its page.
const LINE: u64 = SPARE + 0x7c0;
const NOT_CANONICAL: u64 = 1 << 55;
const MISC_ENABLE: u32 = 0x1a0;
const HWCR: u32 = 0xc001_0015;
/// Bit 3 of leaf 1's ECX.
const MONITOR: u32 = 1 << 3;

fn with_monitor(cpus: u32) -> Arc<CpuidModel> {
    let choice: CpuChoice = "host,+monitor".parse().unwrap();
    Machine::cpus_of(choice, cpus).unwrap()
}

/// On every engine, as a processor of each maker.
fn each_engine_with_monitor(test: impl Fn(&mut Machine)) {
    for vendor in [b"GenuineIntel", b"AuthenticAMD"] {
        println!("as {}", vendor.escape_ascii());
        let model = Machine::model_of_vendor(vendor).requesting(CpuFeatures::MONITOR);
        each_engine_with(&Arc::new(model.unwrap()), &test);
    }
}

fn monitor(a: &mut CodeAssembler, at: u64) -> Emitted {
    a.mov(rax, at)?;
    a.xor(ecx, ecx)?;
    a.xor(edx, edx)?;
    a.monitor()
}

fn mwait(a: &mut CodeAssembler, extensions: u32) -> Emitted {
    a.xor(eax, eax)?;
    a.mov(ecx, extensions)?;
    a.mwait()
}

/// What follows an MWAIT.
fn passed(a: &mut CodeAssembler) -> Emitted {
    a.inc(r12)
}

/// Runs code into its MWAIT, and looks again.
fn falls_asleep(m: &mut Machine, code: impl machine::Code) {
    m.forget();
    m.set_reg(Gpr::R12, 0);
    m.run_code(code);
    assert_eq!((m.reg(Gpr::R12), m.run_once()), (0, Exit::Halted));
    assert!(matches!(m.cpu().activity, Activity::Waiting { .. }));
}

/// True where it has gone on since, to the end.
fn goes_on(m: &mut Machine) -> bool {
    m.run();
    m.reg(Gpr::R12) == 1
}

// ---- faults ----

#[test]
fn without_the_request_they_are_undefined_and_cpuid_does_not_tell_of_them() {
    each_engine(|m| {
        assert_eq!(m.cpu().cpuid(1, 0).ecx & MONITOR, 0);
        for user in [false, true] {
            for instruction in [CodeAssembler::monitor, CodeAssembler::mwait] {
                m.forget();
                m.to_kernel();
                if user {
                    m.to_user();
                }
                assert_eq!(m.faults(|_| Ok(()), instruction).vector, UD);
            }
        }
    });
}

#[test]
fn cpuid_tells_of_a_line_and_of_masked_interrupts() {
    each_engine_with_monitor(|m| {
        assert_eq!(m.cpu().cpuid(1, 0).ecx & MONITOR, MONITOR);
        let leaf = m.cpu().cpuid(5, 0);
        assert_eq!((leaf.eax, leaf.ebx, leaf.ecx), (64, 64, 3));
    });
}

/// What is in RAX and RCX, whether MONITOR is what is tried, and the fault: vector and error code.
type Case = (u64, u64, bool, u64, u64);

#[test]
fn they_check_privilege_then_extensions_then_the_line() {
    each_engine_with_monitor(|m| {
        let intel = m.cpu().cpuid.vendor() == Vendor::Intel;
        let upper = if intel { GP } else { 0 };
        let cases: [Case; 9] = [
            (LINE, 0, true, 0, 0),
            (NOT_CANONICAL, 1, true, GP, 0),
            (NOT_CANONICAL, 0, true, GP, 0),
            (LINE, 1 << 31, true, GP, 0),
            (LINE, 1 << 32, true, upper, 0),
            // Nothing is mapped there: a load in kernel mode.
            (X + 0x1000, 0, true, PF, 0),
            (X + 0x1000, 0, false, 0, 0),
            (LINE, 2, false, GP, 0),
            (LINE, 1 << 32 | 1, false, upper, 0),
        ];
        for (address, extensions, is_monitor, vector, error) in cases {
            for user in [false, true] {
                println!("{address:x} {extensions:x} {is_monitor} {user}");
                m.forget();
                m.to_kernel();
                if user {
                    m.to_user();
                }
                let base = m.fault_at();
                let recover = base + 0x400;
                let end = m.place(64, base, |a: &mut CodeAssembler| {
                    a.mov(r15, recover)?;
                    a.mov(rax, address)?;
                    a.mov(rcx, extensions)?;
                    if is_monitor { a.monitor() } else { a.mwait() }
                });
                for at in [end, recover] {
                    m.place(64, at, stop);
                }
                m.go(base);
                m.run();
                let found: Vec<_> = m.records().iter().map(|r| (r.vector, r.error)).collect();
                let expected = match (user, vector) {
                    (true, _) => vec![(UD, Record::NO_ERROR)],
                    (false, 0) => vec![],
                    (false, _) => vec![(vector, error)],
                };
                assert_eq!(found, expected);
            }
        }
    });
}

#[test]
fn segments_and_address_size_choose_the_line() {
    each_engine_with_monitor(|m| {
        let intel = m.cpu().cpuid.vendor() == Vendor::Intel;
        let try_at = |m: &mut Machine, rax_is: u64, bytes: &'static [u8]| {
            m.forget();
            m.to_kernel();
            m.cpu_mut().seg[doppel_x86::Seg::Fs as usize].base = NOT_CANONICAL;
            m.set_reg(Gpr::R15, STOPPED_AT);
            m.run_code(|a| {
                a.mov(rax, rax_is)?;
                a.xor(ecx, ecx)?;
                a.db(bytes)
            });
            m.vectors()
        };
        assert_eq!(try_at(m, LINE, &[0x64, 0x0f, 0x01, 0xc8]), [GP]);
        let beyond = NOT_CANONICAL | LINE;
        assert_eq!(try_at(m, beyond, &[0x0f, 0x01, 0xc8]), [GP]);
        let stack = if intel { SS } else { GP };
        assert_eq!(try_at(m, beyond, &[0x36, 0x0f, 0x01, 0xc8]), [stack]);
        assert!(try_at(m, beyond, &[0x67, 0x0f, 0x01, 0xc8]).is_empty());
        for prefix in [0x66, 0xf2, 0xf3, 0xf0] {
            for last in [0xc8, 0xc9] {
                let bytes: &'static [u8] = Box::leak(Box::new([prefix, 0x0f, 0x01, last]));
                assert_eq!(try_at(m, LINE, bytes), [UD], "{bytes:x?}");
            }
        }
    });
}

#[test]
fn a_monitor_is_a_load_to_the_page_tables() {
    each_engine_with_monitor(|m| {
        let at = m.map(3, SPARE, P | RW);
        m.run_code(|a| monitor(a, at + 0x40));
        assert_eq!(m.entry(3) & (A | D), A);
    });
}

#[test]
fn they_can_be_switched_off() {
    each_engine_with_monitor(|m| {
        let (msr, bit, off) = match m.cpu().cpuid.vendor() {
            Vendor::Intel => (MISC_ENABLE, 18, false),
            Vendor::Amd => (HWCR, 9, true),
        };
        for (set, has) in [(off, false), (!off, true)] {
            m.to_kernel();
            m.run_code(|a| {
                a.mov(ecx, msr)?;
                a.rdmsr()?;
                a.and(eax, !(1i32 << bit))?;
                a.or(eax, i32::from(set) << bit)?;
                a.wrmsr()?;
                a.mov(eax, 1)?;
                a.cpuid()?;
                a.mov(r13, rcx)
            });
            assert_eq!(m.reg(Gpr::R13) as u32 & MONITOR != 0, has);
            for instruction in [CodeAssembler::monitor, CodeAssembler::mwait] {
                m.forget();
                m.to_kernel();
                let prepare = |a: &mut CodeAssembler| {
                    a.xor(ecx, ecx)?;
                    a.mov(eax, LINE as u32)
                };
                let base = m.fault_at();
                let end = m.place(64, base, |a: &mut CodeAssembler| {
                    a.mov(r15, STOPPED_AT)?;
                    prepare(a)?;
                    instruction(a)
                });
                m.place(64, end, stop);
                m.go(base);
                m.run();
                assert_eq!(m.vectors(), [UD; 1][usize::from(has)..]);
            }
        }
    });
}

#[test]
fn amds_processors_can_let_user_code_have_them() {
    each_engine_with_monitor(|m| {
        if m.cpu().cpuid.vendor() != Vendor::Amd {
            return;
        }
        const USER_TOO: u64 = 1 << 10;
        m.cpu_mut().msr.hwcr |= USER_TOO;
        m.run_user(|a| {
            monitor(a, USER_DATA)?;
            mwait(a, 0)?;
            passed(a)
        });
        assert_eq!((m.vectors(), m.reg(Gpr::R12)), (vec![], 0));
        m.ram.write_from_device(USER_DATA + 63, &[0]);
        assert!(goes_on(m));
        m.forget();
        m.to_user();
        let r = m.faults(|a| monitor(a, USER_DATA), |a| a.mov(rax, qword_ptr(LINE)));
        assert_eq!((r.vector, r.error), (PF, 5));
        m.forget();
        m.to_user();
        let r = m.faults(|a| a.xor(ecx, ecx), |a| monitor(a, LINE));
        assert_eq!((r.vector, r.error), (PF, 5), "a load of the user's");
    });
}

// ---- what ends it ----

#[test]
fn a_device_that_stores_to_the_line_ends_it_and_one_that_stores_beside_does_not() {
    each_engine_with_monitor(|m| {
        for (at, len) in [(LINE, 1), (LINE + 63, 1), (LINE - 1, 2), (LINE + 60, 8)] {
            m.to_kernel();
            falls_asleep(m, |a| {
                monitor(a, LINE + 5)?;
                mwait(a, 0)?;
                passed(a)
            });
            for (beside, len) in [(LINE - 8, 8), (LINE + 64, 64), (LINE + 0x1000, 8)] {
                m.ram.write_from_device(beside, &vec![0; len]);
                assert_eq!((m.run_once(), m.reg(Gpr::R12)), (Exit::Halted, 0));
            }
            // What was there already counts as well.
            m.ram.write_from_device(at, &vec![0; len]);
            assert!(goes_on(m), "{at:x}");
        }
    });
}

#[test]
fn without_a_monitor_that_is_armed_it_ends_at_once() {
    each_engine_with_monitor(|m| {
        m.run_code(|a| {
            mwait(a, 0)?;
            passed(a)
        });
        assert_eq!(m.reg(Gpr::R12), 1, "no MONITOR");
        m.to_kernel();
        m.run_code(|a| {
            monitor(a, DEVICE_PAGE)?;
            mwait(a, 0)?;
            passed(a)
        });
        assert_eq!(m.reg(Gpr::R12), 2, "no RAM");
        m.to_kernel();
        falls_asleep(m, |a| {
            monitor(a, LINE)?;
            mwait(a, 0)?;
            mwait(a, 0)?;
            passed(a)
        });
        m.ram.write_from_device(LINE, &[1]);
        assert!(goes_on(m), "one MWAIT for a MONITOR");
    });
}

#[test]
fn a_store_between_monitor_and_mwait_is_not_missed() {
    each_engine_with_monitor(|m| {
        let stores: [fn(&mut CodeAssembler) -> Emitted; 8] = [
            |a| a.mov(qword_ptr(LINE), rax),
            |a| a.mov(byte_ptr(LINE + 63), 0),
            |a| a.lock().xadd(dword_ptr(LINE + 8), eax),
            |a| a.movups(xmmword_ptr(LINE - 15), xmm0),
            |a| {
                a.mov(rsp, LINE + 8)?;
                a.push(rax)
            },
            |a| {
                a.mov(edi, (LINE - 0x80) as u32)?;
                a.mov(ecx, 0x11)?;
                a.rep().stosq()
            },
            // From another address.
            |a| {
                a.mov(rax, X + (LINE & 0xfff))?;
                a.mov(byte_ptr(rax), cl)
            },
            |a| a.out(i32::from(PORT_DEVICE_WRITE), al),
        ];
        m.map(0, LINE & !0xfff, P | RW);
        m.bus.device_write = (LINE + 1, vec![7]);
        for (n, store) in stores.into_iter().enumerate() {
            m.to_kernel();
            m.forget();
            m.set_reg(Gpr::R12, 0);
            m.run_code(|a| {
                // The pages are in the TLB already, to be written to.
                a.mov(rax, X + (LINE & 0xfff))?;
                a.mov(dword_ptr(rax), 0)?;
                a.mov(dword_ptr(LINE), 0)?;
                monitor(a, LINE)?;
                store(a)?;
                mwait(a, 0)?;
                passed(a)
            });
            assert_eq!((m.vectors(), m.reg(Gpr::R12)), (vec![], 1), "{n}");
            falls_asleep(m, |a| {
                monitor(a, LINE)?;
                a.mov(qword_ptr(LINE - 0x20), rax)?;
                a.mov(qword_ptr(LINE + 0x40), rax)?;
                mwait(a, 0)?;
                passed(a)
            });
            m.ram.write_from_device(LINE, &[0]);
            assert!(goes_on(m));
        }
    });
}

#[test]
fn an_interrupt_ends_it_and_is_taken_behind_it() {
    each_engine_with_monitor(|m| {
        for extensions in [0, 1] {
            m.to_kernel();
            falls_asleep(m, |a| {
                a.cli()?;
                monitor(a, LINE)?;
                a.xor(eax, eax)?;
                a.mov(ecx, extensions)?;
                // What comes now is held back to the MWAIT.
                a.sti()?;
                a.mwait()?;
                passed(a)
            });
            let behind = m.cpu().rip;
            m.bus.lines.interrupt(VECTOR);
            assert!(goes_on(m));
            assert_eq!(m.vectors(), [u64::from(VECTOR)]);
            assert_eq!(m.records()[0].rip, behind);
        }
    });
}

#[test]
fn a_masked_interrupt_ends_it_where_it_was_asked_to_and_is_not_taken() {
    each_engine_with_monitor(|m| {
        falls_asleep(m, |a| {
            monitor(a, LINE)?;
            mwait(a, 0)?;
            passed(a)
        });
        m.bus.lines.interrupt(VECTOR);
        assert_eq!((m.run_once(), m.reg(Gpr::R12)), (Exit::Halted, 0));
        m.bus.lines.nmi();
        assert!(goes_on(m), "an NMI ends it");
        assert_eq!(m.vectors(), [2]);
        m.cpu_mut().nmi_blocked = false;
        // The interrupt waits, so that this one ends at once.
        m.to_kernel();
        m.forget();
        m.set_reg(Gpr::R12, 0);
        m.run_code(|a| {
            monitor(a, LINE)?;
            mwait(a, 1)?;
            passed(a)
        });
        assert_eq!((m.reg(Gpr::R12), m.vectors()), (1, vec![]));
        assert!(m.bus.lines.interrupt_waits());
        m.to_kernel();
        m.cpu_mut().rflags |= Rflags::IF;
        m.run_code(|a| a.nop());
        assert_eq!(m.vectors(), [u64::from(VECTOR)]);
        m.to_kernel();
        falls_asleep(m, |a| {
            monitor(a, LINE)?;
            mwait(a, 1)?;
            passed(a)
        });
        m.bus.lines.interrupt(VECTOR);
        assert!(goes_on(m) && m.vectors().is_empty());
    });
}

#[test]
fn an_interrupt_between_the_two_lets_it_end_at_once() {
    each_engine_with_monitor(|m| {
        m.run_code(|a| {
            a.sti()?;
            monitor(a, LINE)?;
            a.mov(eax, i32::from(VECTOR))?;
            a.out(i32::from(PORT_INTERRUPT), al)?;
            mwait(a, 0)?;
            passed(a)
        });
        assert_eq!((m.reg(Gpr::R12), m.vectors()), (1, vec![u64::from(VECTOR)]));
    });
}

// ---- between CPUs ----

/// Words on lines of their own: what CPU 0 waits for is in the line.
const READY: u64 = DATA;
const ROUNDS: u64 = 300;

fn wait_for_ready(a: &mut CodeAssembler, at: u64) -> Emitted {
    let (mut again, mut done) = (a.create_label(), a.create_label());
    a.nop()?; // the caller may have set a label
    a.set_label(&mut again)?;
    a.cmp(qword_ptr(at), r13)?;
    a.jae(done)?;
    a.pause()?;
    a.jmp(again)?;
    a.set_label(&mut done)?;
    a.nop()
}

/// Code for CPU `n`, with a stop behind it, at its place for kernel or user code.
fn place(crowd: &Crowd, start: u64, code: impl machine::Code) -> u64 {
    let end = crowd.first().place(64, start, code);
    crowd.first().place(64, end, stop);
    start
}

/// CPU 0, round after round: says that it is about to wait, monitors, waits.
fn sleeper(a: &mut CodeAssembler, line: u64, ready: u64, extensions: u32) -> Emitted {
    let mut again = a.create_label();
    a.xor(r13d, r13d)?;
    a.set_label(&mut again)?;
    monitor(a, line)?;
    a.inc(r13)?;
    a.mov(qword_ptr(ready), r13)?;
    mwait(a, extensions)?;
    a.cmp(r13, ROUNDS as i32)?;
    a.jb(again)
}

#[test]
fn another_cpu_that_stores_to_the_line_ends_it_every_time() {
    let model = with_monitor(2);
    each_crowd_with(&model, |crowd| {
        let stores: [fn(&mut CodeAssembler) -> Emitted; 4] = [
            |a| a.mov(dword_ptr(rbx), 0),
            |a| a.lock().or(byte_ptr(rbx + 63), 0),
            |a| a.xchg(qword_ptr(rbx + 8), r11),
            |a| a.movups(xmmword_ptr(rbx - 8), xmm0),
        ];
        for store in stores {
            crowd.first().put(READY, 0u64);
            let sleeps = place(crowd, CODE, |a: &mut CodeAssembler| {
                sleeper(a, LINE, READY, 0)
            });
            // It stores once a round, and beside the line again and again.
            let stores = place(crowd, CODE + 0x2000, |a: &mut CodeAssembler| {
                let mut again = a.create_label();
                a.mov(rbx, LINE)?;
                a.mov(r13d, 1)?;
                a.set_label(&mut again)?;
                a.mov(dword_ptr(rbx - 0x40), r13d)?;
                wait_for_ready(a, READY)?;
                a.mov(dword_ptr(rbx + 0x40), r13d)?;
                store(a)?;
                a.inc(r13)?;
                a.cmp(r13, ROUNDS as i32)?;
                a.jbe(again)
            });
            crowd.to_kernel();
            crowd.run(|n| [sleeps, stores][n]);
        }
    });
}

#[test]
fn user_code_of_another_cpu_that_stores_to_the_line_ends_it_every_time() {
    let model = with_monitor(2);
    const USER_LINE: u64 = USER_DATA + 0x1040;
    const USER_READY: u64 = USER_DATA + 0x2000;
    each_crowd_with(&model, |crowd| {
        let sleeps = place(crowd, CODE, |a: &mut CodeAssembler| {
            sleeper(a, USER_LINE, USER_READY, 0)
        });
        let stores = place(crowd, USER_CODE, |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.mov(r13d, 1)?;
            a.set_label(&mut again)?;
            wait_for_ready(a, USER_READY)?;
            a.mov(dword_ptr(USER_LINE + 0x40), r13d)?;
            a.mov(dword_ptr(USER_LINE + 0x10), 0)?;
            a.inc(r13)?;
            a.cmp(r13, ROUNDS as i32)?;
            a.jbe(again)
        });
        crowd.cpus[1].to_user();
        crowd.run(|n| [sleeps, stores][n]);
    });
}

#[test]
fn an_interrupt_of_another_cpu_ends_it_masked_or_not() {
    let model = with_monitor(2);
    each_crowd_with(&model, |crowd| {
        for masked in [false, true] {
            crowd.first().put(READY, 0u64);
            let sleeps = place(crowd, CODE, |a: &mut CodeAssembler| {
                let mut again = a.create_label();
                a.xor(r13d, r13d)?;
                a.set_label(&mut again)?;
                a.cli()?;
                monitor(a, LINE)?;
                a.inc(r13)?;
                a.mov(qword_ptr(READY), r13)?;
                a.xor(eax, eax)?;
                a.mov(ecx, u32::from(masked))?;
                if !masked {
                    a.sti()?;
                }
                a.mwait()?;
                // Taken here at the latest.
                a.sti()?;
                a.nop()?;
                a.nop()?;
                a.cmp(r13, 100)?;
                a.jb(again)
            });
            let sends = place(crowd, CODE + 0x2000, |a: &mut CodeAssembler| {
                let mut again = a.create_label();
                a.mov(r13d, 1)?;
                a.set_label(&mut again)?;
                wait_for_ready(a, READY)?;
                a.mov(eax, i32::from(VECTOR))?;
                a.out(i32::from(PORT_IPI), eax)?;
                a.inc(r13)?;
                a.cmp(r13, 100)?;
                a.jbe(again)
            });
            crowd.first().forget();
            crowd.to_kernel();
            crowd.run(|n| [sleeps, sends][n]);
            let vectors = crowd.first().vectors();
            assert_eq!(vectors, vec![u64::from(VECTOR); 100]);
        }
    });
}
