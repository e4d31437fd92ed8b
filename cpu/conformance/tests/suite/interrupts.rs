//! Interrupts, NMIs and kicks: when they are taken, and when they wait.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use doppel_conformance::bus::{PORT_INTERRUPT, PORT_NMI};
use doppel_conformance::machine::wrmsr;
use doppel_conformance::paging::{P, RW, US};
use doppel_conformance::*;
use doppel_x86::{Exit, Gpr, Rflags};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

const VECTOR: u8 = 0x40;

/// Raises the interrupt, then runs `more`.
fn raise(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(al, i32::from(VECTOR))?;
    a.out(i32::from(PORT_INTERRUPT), al)
}

#[test]
fn an_interrupt_waits_for_if_and_comes_after_the_shadow_of_sti() {
    each_engine(|m| {
        m.run_code(|a| {
            raise(a)?;
            a.mov(ecx, 100)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.sti()?;
            a.inc(ebx)?;
            a.inc(ebx)
        });
        let r = m.records();
        assert_eq!(m.vectors(), [u64::from(VECTOR)]);
        // After STI and one INC: 4 + 5 + 2 + 2 bytes, 1, 2.
        assert_eq!(r[0].rip, CODE + 4 + 5 + 2 + 2 + 1 + 2);
        assert!(!r[0].rf() && r[0].rflags & 0x200 != 0);
    });
}

#[test]
fn sti_twice_and_sti_cli() {
    each_engine(|m| {
        m.run_code(|a| {
            raise(a)?;
            // CLI in the shadow: never open.
            a.sti()?;
            a.cli()?;
            a.nop()?;
            a.mov(rbx, qword_ptr(HANDLER_DATA))?;
            a.sti()?;
            a.sti()?;
            a.nop()
        });
        assert_eq!(m.reg(Gpr::Rbx), LOG, "none so far");
        assert_eq!(m.records()[0].rip, CODE + 4 + 3 + 8 + 2);
    });
}

#[test]
fn popf_and_iret_open_at_once() {
    each_engine(|m| {
        m.run_code(|a| {
            raise(a)?;
            a.push(0x202)?;
            a.popfq()?;
            a.nop()
        });
        assert_eq!(m.records()[0].rip, CODE + 4 + 5 + 1);
        m.forget();
        m.to_kernel();
        let target = CODE + 0x400;
        m.place(64, target, machine::stop);
        m.run_code(|a| {
            raise(a)?;
            a.push(KERNEL_DS as i32)?;
            a.push(rsp)?;
            a.push(0x202)?;
            a.push(KERNEL_CS as i32)?;
            a.push(target as i32)?;
            a.iretq()
        });
        assert_eq!(m.records()[0].rip, target);
    });
}

#[test]
fn mov_ss_and_pop_ss_hold_interrupts_and_nmi_back() {
    each_engine(|m| {
        m.run_code(|a| {
            a.mov(edx, ss)?;
            a.mov(eax, i32::from(VECTOR))?;
            a.sti()?;
            a.nop()?;
            a.mov(ss, edx)?;
            a.out(i32::from(PORT_INTERRUPT), al)?;
            a.nop()?;
            a.mov(ss, edx)?;
            a.out(i32::from(PORT_NMI), al)?;
            a.nop()
        });
        let base = CODE + 2 + 5 + 1 + 1;
        let records = m.records();
        assert_eq!(m.vectors(), [u64::from(VECTOR), 2]);
        assert_eq!(
            (records[0].rip, records[1].rip),
            (base + 4, base + 4 + 1 + 4)
        );
    });
}

#[test]
fn sti_hlt_wakes_in_one_piece() {
    each_engine(|m| {
        m.place(64, CODE, |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.cli()?;
            a.inc(ebx)?;
            a.sti()?;
            a.hlt()?;
            a.cmp(ebx, 5)?;
            a.jb(again)?;
            machine::stop(a)
        });
        for n in 1..=5 {
            m.run();
            assert_eq!((m.reg(Gpr::Rbx), m.cpu().rip), (n, CODE + 5), "in HLT");
            assert_eq!(m.run_once(), Exit::Halted, "it stays there");
            m.bus.lines.interrupt(VECTOR);
        }
        m.run();
        assert_eq!(m.records().len(), 5);
        assert!(m.records().iter().all(|r| r.rip == CODE + 5));
    });
}

#[test]
fn an_interrupt_that_is_pending_before_sti_hlt_does_not_get_lost() {
    each_engine(|m| {
        m.run_code(|a| {
            raise(a)?;
            a.sti()?;
            a.hlt()
        });
        assert_eq!(m.records()[0].rip, CODE + 6);
    });
}

#[test]
fn nmi_is_taken_with_interrupts_off_and_waits_for_iret() {
    each_engine(|m| {
        let handler = CODE + 0x400;
        m.place(64, handler, |a: &mut CodeAssembler| {
            a.inc(ebx)?;
            a.cmp(ebx, 3)?;
            let mut leave = a.create_label();
            a.jae(leave)?;
            // Another one, which has to wait.
            a.out(i32::from(PORT_NMI), al)?;
            a.nop()?;
            a.mov(qword_ptr(rbx * 8 + DATA), rbx)?;
            a.set_label(&mut leave)?;
            a.iretq()
        });
        m.gate(2, handler, 0xe, 1, 0);
        m.run_code(|a| {
            a.out(i32::from(PORT_NMI), al)?;
            a.nop()
        });
        assert_eq!(m.reg(Gpr::Rbx), 3);
        assert_eq!(
            (m.data(1), m.data(2)),
            (1, 2),
            "the handler was not interrupted"
        );
    });
}

#[test]
fn an_nmi_wakes_a_halt_with_interrupts_off() {
    each_engine(|m| {
        m.place(64, CODE, |a: &mut CodeAssembler| {
            a.hlt()?;
            a.mov(ebx, 7)?;
            machine::stop(a)
        });
        m.run();
        m.bus.lines.interrupt(VECTOR);
        assert_eq!(m.run_once(), Exit::Halted);
        m.bus.lines.nmi();
        m.run();
        assert_eq!((m.vectors(), m.reg(Gpr::Rbx)), (vec![2], 7));
    });
}

/// Raises an interrupt every so often until told to stop; an interrupt that is still waiting is not replaced.
fn with_timer(m: &mut Machine, run: impl FnOnce(&mut Machine)) {
    let (lines, kicker) = (m.bus.lines.clone(), m.kicker());
    let over = Arc::new(AtomicBool::new(false));
    let ends = over.clone();
    let timer = std::thread::spawn(move || {
        while !ends.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_micros(100));
            if !lines.interrupt_waits() {
                lines.interrupt(VECTOR);
            }
            kicker.kick();
        }
    });
    run(m);
    over.store(true, Ordering::SeqCst);
    timer.join().expect("the timer");
}

/// The handler counts in R12 and stops the guest at 20 with the loop's registers as they are.
fn counting_handler(m: &mut Machine) {
    let handler = CODE + 0x800;
    m.place(64, handler, |a: &mut CodeAssembler| {
        let mut leave = a.create_label();
        a.inc(r12)?;
        a.cmp(r12, 20)?;
        a.jb(leave)?;
        a.hlt()?;
        a.set_label(&mut leave)?;
        a.iretq()
    });
    m.gate(VECTOR, handler, 0xe, 1, 0);
}

/// Endless loops, each with something that must hold at every instruction: RAX = RBX.
const LOOPS: &[Emit] = &[
    |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.jmp(again)
    },
    |a| {
        // Two blocks, forward and back.
        let (mut again, mut other) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.inc(rcx)?;
        a.jmp(other)?;
        a.nops_with_size(100)?;
        a.set_label(&mut other)?;
        a.inc(rdx)?;
        a.jmp(again)
    },
    |a| {
        // Calls and returns, memory, flags that live over the back edge.
        let (mut again, mut f) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.call(f)?;
        a.jmp(again)?;
        a.set_label(&mut f)?;
        a.inc(qword_ptr(DATA))?;
        a.ret()
    },
    |a| {
        // An indirect jump to itself.
        let mut again = a.create_label();
        a.lea(r13, qword_ptr(again))?;
        a.set_label(&mut again)?;
        a.inc(rcx)?;
        a.jmp(r13)
    },
    |a| {
        // LOOP with a huge count, over and over.
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.loop_(again)?;
        a.jmp(again)
    },
    |a| {
        // A repeated string instruction of four GiB of units, on one page again and again by wrapping R.
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rdi, DATA)?;
        a.mov(ecx, 0x1000)?;
        a.rep().stosb()?;
        a.jmp(again)
    },
    |a| {
        // Conditional branches alone.
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.test(rsp, rsp)?;
        a.jnz(again)?;
        a.hlt()
    },
];

#[test]
fn interrupts_reach_every_kind_of_loop() {
    each_engine(|m| {
        counting_handler(m);
        for (n, code) in LOOPS.iter().enumerate() {
            println!("loop {n}");
            m.to_kernel();
            m.set_reg(Gpr::R12, 0);
            m.cpu_mut().rflags |= Rflags::IF;
            m.place(64, CODE, code);
            m.go(CODE);
            with_timer(m, |m| m.run());
            assert_eq!(m.reg(Gpr::R12), 20);
        }
    });
}

#[test]
fn interrupts_reach_loops_of_user_code_across_pages() {
    each_engine(|m| {
        counting_handler(m);
        m.map(0, SPARE, P | US);
        m.map(1, SPARE + 0x1000, P | US);
        m.place_at(64, SPARE, X, |a: &mut CodeAssembler| a.jmp(X + 0x1000));
        m.place_at(64, SPARE + 0x1000, X + 0x1000, |a: &mut CodeAssembler| {
            a.jmp(X)
        });
        m.to_user();
        m.go(X);
        with_timer(m, |m| m.run());
        assert_eq!(m.reg(Gpr::R12), 20);
    });
}

#[test]
fn registers_and_flags_survive_interrupts_anywhere() {
    each_engine(|m| {
        counting_handler(m);
        // A sum with carries through memory and back, checked against what it must give, until the timer ends it.
        m.set_reg(Gpr::R12, 0);
        m.cpu_mut().rflags |= Rflags::IF;
        let wrong = CODE + 0x700;
        m.place(64, wrong, |a: &mut CodeAssembler| a.ud2());
        m.place(64, CODE, |a: &mut CodeAssembler| {
            let (mut again, mut inner) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.mov(ecx, 1000)?;
            a.xor(eax, eax)?;
            a.xor(edx, edx)?;
            a.mov(qword_ptr(DATA), rax)?;
            a.set_label(&mut inner)?;
            a.mov(r10, 0x8000_0000_0000_0001u64)?;
            a.add(qword_ptr(DATA), r10)?;
            a.adc(rdx, 0)?;
            a.push(rcx)?;
            a.pop(r11)?;
            a.add(rax, r11)?;
            a.dec(rcx)?;
            a.jnz(inner)?;
            a.cmp(rax, 500_500)?;
            a.jne(wrong)?;
            a.cmp(rdx, 500)?;
            a.jne(wrong)?;
            a.cmp(qword_ptr(DATA), 1000)?;
            a.jne(wrong)?;
            a.jmp(again)
        });
        m.go(CODE);
        with_timer(m, |m| m.run());
        assert!(m.records().is_empty(), "{:x?}", m.records());
        assert_eq!(m.reg(Gpr::R12), 20);
    });
}

#[test]
fn a_kick_before_a_run_is_not_lost() {
    each_engine(|m| {
        m.place(64, CODE, LOOPS[0]);
        for _ in 0..3 {
            m.kicker().kick();
            assert_eq!(m.run_once(), Exit::Kicked);
        }
    });
}

#[test]
fn cli_and_sti_in_a_tight_loop_let_interrupts_in() {
    each_engine(|m| {
        counting_handler(m);
        m.set_reg(Gpr::R12, 0);
        m.place(64, CODE, |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.pushfq()?;
            a.cli()?;
            a.inc(qword_ptr(DATA))?;
            a.popfq()?;
            a.cli()?;
            a.inc(rcx)?;
            a.sti()?;
            a.inc(rdx)?;
            a.jmp(again)
        });
        m.go(CODE);
        with_timer(m, |m| m.run());
        assert_eq!(m.reg(Gpr::R12), 20);
    });
}

/// Nothing but the instruction behind STI is between it and an interrupt that has come meanwhile, whatever that is.
#[test]
fn no_interrupt_comes_right_behind_sti() {
    const BEHIND: [Emit; 2] = [|_| Ok(()), |a| a.cmp(rbx, rbx)];
    /// Works with interrupts off, lets them in, and does so again.
    fn code(a: &mut CodeAssembler, behind: Emit) -> Result<(), IcedError> {
        let (mut again, mut work) = (a.create_label(), a.create_label());
        a.set_label(&mut again)?;
        a.cli()?;
        a.mov(ecx, 50)?;
        a.set_label(&mut work)?;
        a.dec(ecx)?;
        a.jnz(work)?;
        a.sti()?;
        behind(a)?;
        a.je(again)?;
        a.hlt()
    }
    let handler = CODE + 0x800;
    each_engine(|m| {
        for behind in BEHIND {
            let code = |a: &mut CodeAssembler| code(a, behind);
            let bytes = machine::assemble(64, CODE, code);
            let sti = bytes.iter().position(|byte| *byte == 0xfb).expect("STI");
            let wrong = CODE + sti as u64 + 1;
            m.place(64, CODE, code);
            m.place(64, handler, |a: &mut CodeAssembler| {
                let (mut leave, mut right) = (a.create_label(), a.create_label());
                a.inc(r12)?;
                a.mov(r13, wrong)?;
                a.cmp(qword_ptr(rsp), r13)?;
                a.jne(right)?;
                a.inc(r14)?;
                a.set_label(&mut right)?;
                a.cmp(r12, 40)?;
                a.jb(leave)?;
                a.hlt()?;
                a.set_label(&mut leave)?;
                a.iretq()
            });
            m.gate(VECTOR, handler, 0xe, 1, 0);
            for r in [Gpr::R12, Gpr::R14] {
                m.set_reg(r, 0);
            }
            m.go(CODE);
            with_timer(m, |m| m.run());
            assert_eq!((m.reg(Gpr::R12), m.reg(Gpr::R14)), (40, 0));
        }
    });
}

/// A kick makes branches look where nothing is, and that has an address as well.
#[test]
fn branches_to_the_lowest_addresses_let_interrupts_in() {
    each_engine(|m| {
        for low in (0..24).step_by(4) {
            counting_handler(m);
            m.set_reg(Gpr::R12, 0);
            m.place(64, low, |a: &mut CodeAssembler| a.jmp(rbx));
            m.place(64, CODE, |a: &mut CodeAssembler| {
                a.sti()?;
                a.mov(rbx, CODE)?;
                a.mov(ecx, 1)?;
                for _ in 0..50 {
                    a.xor(edx, edx)?;
                    a.div(rcx)?;
                }
                a.mov(rax, low)?;
                a.jmp(rax)
            });
            m.go(CODE);
            with_timer(m, |m| m.run());
            assert_eq!(m.reg(Gpr::R12), 20, "{low:#x}");
        }
    });
}

/// Three of them come back to where they began, by 4 GiB.
#[test]
fn jumps_forwards_around_32_bits_let_interrupts_in() {
    const PLACES: [u64; 3] = [0x1000_0000, 0x6000_0000, 0xb000_0000];
    const LARGE: u64 = 0x80;
    each_engine(|m| {
        counting_handler(m);
        m.set_reg(Gpr::R12, 0);
        for (n, at) in PLACES.into_iter().enumerate() {
            let directory = match at >> 30 {
                0 => PD,
                gib => TABLES + 0x1000 * gib,
            };
            let page = SPARE + 0x20_0000 * n as u64;
            m.put(PDPT + 8 * (at >> 30), directory | P | RW | US);
            m.put(
                directory + 8 * (at >> 21 & 0x1ff),
                page | P | RW | US | LARGE,
            );
            let next = PLACES[(n + 1) % PLACES.len()];
            let by = (next as u32).wrapping_sub(at as u32 + 5);
            m.put_bytes(page, &[&[0xe9], &by.to_le_bytes()[..]].concat());
        }
        m.to_user32();
        m.cpu_mut().rip = PLACES[0];
        with_timer(m, |m| m.run());
        assert_eq!(m.reg(Gpr::R12), 20);
    });
}

#[test]
fn cpuid_shows_a_local_apic_while_it_is_on() {
    const ON: u64 = 0xfee0_0900;
    const OFF: u64 = 0xfee0_0100;
    const RESERVED: u64 = 1;
    each_engine(|m| {
        for (base, on, taken) in [
            (ON, true, true),
            (OFF, false, true),
            (ON | RESERVED, false, false),
            (ON, true, true),
            (OFF | RESERVED, true, false),
        ] {
            println!("{base:x}");
            m.forget();
            m.to_kernel();
            m.place(64, CODE, |a: &mut CodeAssembler| {
                a.mov(r15, STOPPED_AT)?;
                wrmsr(a, 0x1b, base)?;
                machine::stop(a)
            });
            m.go(CODE);
            m.run();
            assert_eq!(m.vectors().is_empty(), taken);
            let cpuid = |a: &mut CodeAssembler| {
                a.mov(eax, 1)?;
                a.cpuid()
            };
            m.to_kernel();
            m.run_code(cpuid);
            assert_eq!(m.reg(Gpr::Rdx) >> 9 & 1, u64::from(on));
            m.run_user(cpuid);
            assert_eq!(m.reg(Gpr::Rdx) >> 9 & 1, u64::from(on), "to user code");
        }
    });
}

#[test]
fn a_write_of_the_tsc_is_told_to_its_deadline() {
    const TSC: u32 = 0x10;
    const TSC_ADJUST: u32 = 0x3b;
    const FAR: u64 = 1 << 60;
    each_engine(|m| {
        for (msr, value) in [(TSC, FAR), (TSC_ADJUST, FAR), (TSC, 0), (TSC_ADJUST, 0)] {
            m.to_kernel();
            m.bus.tsc_moves.clear();
            m.run_code(|a| {
                wrmsr(a, msr, value)?;
                a.rdtsc()
            });
            let after = m.reg(Gpr::Rax) | m.reg(Gpr::Rdx) << 32;
            let told = &m.bus.tsc_moves;
            assert_eq!(told.len(), 1, "{msr:x} {value:x}");
            // On its way, not the one of before.
            assert!(after.wrapping_sub(told[0]) < 1 << 40, "{msr:x} {value:x}");
        }
    });
}
