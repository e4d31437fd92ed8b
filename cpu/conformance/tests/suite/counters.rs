//! Performance counters, on a processor of either maker that was asked to have them: what they count, their overflows, RDPMC.

use std::sync::Arc;
use std::time::Duration;

use doppel_conformance::bus::COUNTER_VECTOR;
use doppel_conformance::machine::wrmsr;
use doppel_conformance::*;
use doppel_x86::{CpuFeatures, CpuidModel, Cr4, Exit, Gpr, Rflags, Vendor, host_tsc};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Emitted = Result<(), IcedError>;
type Emit = fn(&mut CodeAssembler) -> Emitted;

const GP: u64 = 13;
const BOTH: u64 = 3 << 16;
const USER: u64 = 1 << 16;
const KERNEL: u64 = 1 << 17;
const INTERRUPT: u64 = 1 << 20;
const ENABLE: u64 = 1 << 22;
const MASK: u64 = (1 << 48) - 1;
/// Intel's registers.
const FIXED_CONTROL: u32 = 0x38d;
const GLOBAL_STATUS: u32 = 0x38e;
const GLOBAL_CONTROL: u32 = 0x38f;
const CLEAR_STATUS: u32 = 0x390;
/// CPUID 8000_0001, ECX: AMD's core counters.
const CORE_COUNTERS: u32 = 1 << 23;

fn with_counters(vendor: &[u8; 12]) -> Arc<CpuidModel> {
    let model = Machine::model_of_vendor(vendor);
    Arc::new(model.requesting(CpuFeatures::PMU).unwrap())
}

/// On every engine, as a processor of each maker, by each of its sets of registers.
fn each_engine_with_counters(test: impl Fn(&mut Machine, Maker)) {
    let sets = [
        (b"AuthenticAMD", AMD),
        (b"AuthenticAMD", AMD_CORE),
        (b"GenuineIntel", INTEL),
    ];
    for (vendor, maker) in sets {
        println!("as {}, {:x}", vendor.escape_ascii(), maker.counter);
        each_engine_with(&with_counters(vendor), |m| test(m, maker));
    }
}

/// Where the registers are, and the numbers of the events.
#[derive(Clone, Copy)]
struct Maker {
    vendor: Vendor,
    select: u32,
    counter: u32,
    /// From one to the next.
    stride: u32,
    counters: u32,
    cycles: u64,
    instructions: u64,
}

const AMD: Maker = Maker {
    vendor: Vendor::Amd,
    select: 0xc001_0000,
    counter: 0xc001_0004,
    stride: 1,
    counters: 4,
    cycles: 0x76,
    instructions: 0xc0,
};
/// The core counters, of which the first four are those.
const AMD_CORE: Maker = Maker {
    select: 0xc001_0200,
    counter: 0xc001_0201,
    stride: 2,
    counters: 6,
    ..AMD
};
const INTEL: Maker = Maker {
    vendor: Vendor::Intel,
    select: 0x186,
    counter: 0xc1,
    stride: 1,
    counters: 4,
    cycles: 0x3c,
    instructions: 0xc0,
};

/// Instructions of it.
const RDPMC: u64 = 3;

/// Reads a counter into a register, by RDPMC, which is the third instruction; it takes six.
fn rdpmc(a: &mut CodeAssembler, n: u32, to: AsmRegister64) -> Emitted {
    a.nop()?;
    a.mov(ecx, n)?;
    a.rdpmc()?;
    a.shl(rdx, 32)?;
    a.or(rax, rdx)?;
    a.mov(to, rax)
}

impl Maker {
    fn is_intel(self) -> bool {
        self.vendor == Vendor::Intel
    }

    fn select(self, n: u32) -> u32 {
        self.select + self.stride * n
    }

    fn counter(self, n: u32) -> u32 {
        self.counter + self.stride * n
    }

    /// Sets a counter to a value and lets it count from then on: its last instruction is the WRMSR that does.
    fn begin(self, a: &mut CodeAssembler, n: u32, from: u64, select: u64) -> Emitted {
        wrmsr(a, self.counter(n), from)?;
        let last = if self.is_intel() { ENABLE } else { 0 };
        wrmsr(a, self.select(n), select | last)?;
        match self.is_intel() {
            true => wrmsr(a, GLOBAL_CONTROL, 0xf),
            false => wrmsr(a, self.select(n), select | ENABLE),
        }
    }

    fn end(self, a: &mut CodeAssembler) -> Emitted {
        if self.is_intel() {
            wrmsr(a, GLOBAL_CONTROL, 0)?;
        }
        (0..self.counters).try_for_each(|n| wrmsr(a, self.select(n), 0))
    }
}

/// A value of a counter, read in the kernel.
fn value(m: &mut Machine, maker: Maker, n: u32) -> u64 {
    m.to_kernel();
    m.run_code(|a| {
        a.mov(ecx, maker.counter(n))?;
        a.rdmsr()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.mov(r14, rax)
    });
    m.reg(Gpr::R14)
}

/// 2 `n` and one instructions.
fn turns(a: &mut CodeAssembler, n: u32) -> Emitted {
    let mut again = a.create_label();
    a.mov(ecx, n)?;
    a.set_label(&mut again)?;
    a.dec(ecx)?;
    a.jnz(again)
}

#[test]
fn without_the_request_there_are_none() {
    each_engine_and_vendor(|m| {
        assert_eq!(m.cpu().cpuid(0xa, 0).eax, 0);
        assert_eq!(m.cpu().cpuid(0x8000_0001, 0).ecx & CORE_COUNTERS, 0);
        for msr in [
            AMD_CORE.select,
            AMD_CORE.counter,
            INTEL.select,
            GLOBAL_CONTROL,
        ] {
            m.forget();
            m.to_kernel();
            let r = m.faults(|a| a.mov(ecx, msr), |a| a.rdmsr());
            assert_eq!((r.vector, r.error), (GP, 0));
        }
        m.forget();
        m.enable(Cr4::PCE);
        let r = m.faults(|a| a.xor(ecx, ecx), |a| a.rdpmc());
        assert_eq!((r.vector, r.error), (GP, 0));
    });
}

#[test]
fn cpuid_tells_of_them() {
    each_engine_with_counters(|m, maker| {
        let core = m.cpu().cpuid(0x8000_0001, 0).ecx & CORE_COUNTERS;
        assert_eq!(core == 0, maker.is_intel());
        let leaf = m.cpu().cpuid(0xa, 0);
        match maker.is_intel() {
            // Version 2, four of 48 bits, seven events of which three can be counted; three fixed ones of 48 bits.
            true => assert_eq!((leaf.eax, leaf.ebx, leaf.edx), (0x0730_0402, 0x78, 0x603)),
            false => assert_eq!(leaf.eax, 0),
        }
    });
}

#[test]
fn instructions_are_counted_one_by_one() {
    each_engine_with_counters(|m, maker| {
        let codes: [(u64, Emit); 4] = [
            (0, |_| Ok(())),
            (2001, |a| turns(a, 1000)),
            // Repetitions are one.
            (4, |a| {
                a.mov(ecx, 0x3000)?;
                a.mov(edi, SPARE as u32)?;
                a.mov(esi, DATA as u32)?;
                a.rep().movsb()
            }),
            (7, |a| {
                a.push(rax)?;
                a.cpuid()?;
                a.pop(rax)?;
                a.mov(rdx, cr3)?;
                a.mov(cr3, rdx)?;
                a.sti()?;
                a.cli()
            }),
        ];
        for (expected, code) in codes {
            for turn in 0..2 {
                m.to_kernel();
                m.run_code(|a| {
                    maker.begin(a, 1, 5, maker.instructions | BOTH)?;
                    code(a)?;
                    rdpmc(a, 1, r12)?;
                    maker.end(a)
                });
                let counted = m.reg(Gpr::R12) - 5;
                assert_eq!(counted, expected + RDPMC - 1, "{expected}, {turn}");
                assert!(m.vectors().is_empty());
            }
        }
    });
}

#[test]
fn an_instruction_that_faults_is_none_until_it_is_completed() {
    each_engine_with_counters(|m, maker| {
        let faults = |m: &mut Machine, n: usize| {
            m.forget();
            m.to_kernel();
            m.run_code(|a| {
                maker.begin(a, 0, 0, maker.instructions | BOTH)?;
                for _ in 0..n {
                    let mut here = a.create_label();
                    a.lea(r15, qword_ptr(here))?;
                    a.ud2()?;
                    a.set_label(&mut here)?;
                    a.nop()?;
                }
                rdpmc(a, 0, r12)?;
                maker.end(a)
            });
            assert_eq!(m.vectors().len(), n);
            m.reg(Gpr::R12)
        };
        let [none, one, three] = [0, 1, 3].map(|n| faults(m, n));
        assert_eq!(none, RDPMC - 1);
        assert_eq!(three - none, 3 * (one - none));
        // LEA and NOP, and the handler's: as many as it has up to its IRET.
        assert!((30..60).contains(&(one - none)), "{}", one - none);
    });
}

#[test]
fn user_code_and_kernel_are_told_apart() {
    each_engine_with_counters(|m, maker| {
        m.to_kernel();
        m.run_code(|a| {
            for (n, at) in [(0, USER), (1, KERNEL), (2, BOTH), (3, 0)] {
                maker.begin(a, n, 0, maker.instructions | at)?;
            }
            Ok(())
        });
        let before = [0, 1, 2, 3].map(|n| value(m, maker, n));
        assert!(before[0] == 0 && before[1] > 0 && before[2] > 0);
        m.run_user(|a| turns(a, 5000));
        let user = value(m, maker, 0);
        // And the INT that ends it.
        assert_eq!(user, 10_001 + 1);
        let [kernel, both] = [1, 2].map(|n| value(m, maker, n));
        // One is read, and began, a little before the other.
        assert!(
            kernel > 10 && kernel.abs_diff(both - user) < 60,
            "{kernel} {both}"
        );
        assert_eq!(value(m, maker, 3), 0);
    });
}

#[test]
fn cycles_are_the_clocks_but_for_halts() {
    each_engine_with_counters(|m, maker| {
        m.cpu_mut().rflags |= Rflags::IF;
        let begin = host_tsc();
        m.run_code(|a| {
            maker.begin(a, 0, 0, maker.cycles | BOTH)?;
            turns(a, 10_000)?;
            rdpmc(a, 0, r12)?;
            a.sti()?;
            a.hlt()?;
            a.nop()
        });
        let (awake, passed) = (m.reg(Gpr::R12), host_tsc() - begin);
        assert!(awake > 5_000 && awake < passed, "{awake} of {passed}");
        let asleep = host_tsc();
        std::thread::sleep(Duration::from_millis(20));
        let asleep = host_tsc() - asleep;
        m.bus.lines.interrupt(0x50);
        assert_eq!(m.run_to_exit(), Exit::Halted);
        let cycles = value(m, maker, 0);
        let passed = host_tsc() - begin;
        assert!(
            cycles >= awake && cycles <= passed - asleep,
            "{cycles} of {passed}, asleep {asleep}"
        );
    });
}

#[test]
fn cycles_of_user_code_alone_leave_out_the_kernels() {
    each_engine_with_counters(|m, maker| {
        m.run_code(|a| {
            maker.begin(a, 0, 0, maker.cycles | USER)?;
            maker.begin(a, 1, 0, maker.cycles | BOTH)?;
            turns(a, 20_000)
        });
        assert_eq!(value(m, maker, 0), 0);
        m.run_user(|a| turns(a, 1000));
        let [user, both] = [0, 1].map(|n| value(m, maker, n));
        assert!(user > 500 && user < both, "{user} of {both}");
    });
}

#[test]
fn an_overflow_of_instructions_interrupts_soon() {
    each_engine_with_counters(|m, maker| {
        let last = maker.counters - 1;
        for (n, interrupts) in [(0, true), (3, true), (last, true), (1, false)] {
            m.forget();
            m.to_kernel();
            let select = maker.instructions | BOTH | if interrupts { INTERRUPT } else { 0 };
            m.run_code(|a| {
                a.sti()?;
                maker.begin(a, n, 100u64.wrapping_neg() & MASK, select)?;
                for _ in 0..200 {
                    a.inc(rbx)?;
                }
                a.cli()?;
                rdpmc(a, n, r12)?;
                maker.end(a)
            });
            assert_eq!(m.vectors().len(), usize::from(interrupts));
            assert!(m.reg(Gpr::R12) < 300, "it goes on from 0");
            let at = m.records().first().map(|r| r.rip);
            if let Some(rip) = at {
                assert_eq!(m.vectors(), [u64::from(COUNTER_VECTOR)]);
                let end = end_of_incs(m);
                let left = (end - rip) / 3;
                assert!((89..=100).contains(&left), "{left} before the end");
            }
            if maker.is_intel() {
                m.to_kernel();
                m.run_code(|a| {
                    a.mov(ecx, GLOBAL_STATUS)?;
                    a.rdmsr()?;
                    a.mov(r13, rax)?;
                    wrmsr(a, CLEAR_STATUS, 1 << n)?;
                    a.mov(ecx, GLOBAL_STATUS)?;
                    a.rdmsr()?;
                    a.mov(r14, rax)
                });
                assert_eq!((m.reg(Gpr::R13), m.reg(Gpr::R14)), (1 << n, 0));
            }
        }
    });
}

/// Where the INCs of three bytes each end: before the CLI.
fn end_of_incs(m: &Machine) -> u64 {
    let inc = [0x48, 0xff, 0xc3];
    let byte = |at: u64| m.ram.load::<u8>(at).unwrap();
    let is_inc = |at: u64| (0..3).all(|n| byte(at + n) == inc[n as usize]);
    let mut at = (CODE..).find(|at| is_inc(*at)).unwrap();
    while is_inc(at) {
        at += 3;
    }
    at
}

#[test]
fn an_overflow_of_cycles_interrupts_a_loop_that_nothing_else_ends() {
    each_engine_with_counters(|m, maker| {
        m.action(COUNTER_VECTOR, Action::Stop);
        for user in [false, true] {
            m.forget();
            m.to_kernel();
            m.run_code(|a| maker.begin(a, 2, MASK - 3_000_000, maker.cycles | BOTH | INTERRUPT));
            let spin = |a: &mut CodeAssembler| {
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.inc(rbx)?;
                a.jmp(again)
            };
            match user {
                true => m.run_user(spin),
                false => {
                    m.to_kernel();
                    m.cpu_mut().rflags |= Rflags::IF;
                    m.run_code(spin);
                }
            }
            assert_eq!(m.vectors(), [u64::from(COUNTER_VECTOR)]);
            m.to_kernel();
            m.run_code(|a| maker.end(a));
        }
    });
}

#[test]
fn the_fixed_counters_count_one_thing_each() {
    each_engine_with(&with_counters(b"GenuineIntel"), |m| {
        m.run_code(|a| {
            wrmsr(a, FIXED_CONTROL, 0x333)?;
            wrmsr(a, GLOBAL_CONTROL, 7 << 32)?;
            turns(a, 1000)?;
            rdpmc(a, 1 << 30, r12)?;
            rdpmc(a, 1 << 30 | 1, r13)?;
            rdpmc(a, 1 << 30 | 2, r14)?;
            wrmsr(a, GLOBAL_CONTROL, 0)
        });
        assert_eq!(m.reg(Gpr::R12), 2001 + RDPMC - 1);
        let [cycles, reference] = [Gpr::R13, Gpr::R14].map(|r| m.reg(r));
        assert!(cycles > 500 && reference > cycles);
    });
}

#[test]
fn rdpmc_is_the_kernels_unless_it_says_otherwise_and_wants_a_counter() {
    each_engine_with_counters(|m, maker| {
        let fixed = [0x4000_0000u32, 0x4000_0003];
        for user in [false, true] {
            for open in [false, true] {
                for n in [0u32, 3, 4, 5, 6, fixed[0], fixed[1], 0x8000_0000] {
                    let there = match maker.is_intel() {
                        true => n < 4 || n == fixed[0],
                        false => n < 6,
                    };
                    m.forget();
                    m.to_kernel();
                    if user {
                        m.to_user();
                    }
                    m.cpu_mut().cr4.set(Cr4::PCE, open);
                    let base = m.fault_at();
                    let end = m.place(64, base, |a: &mut CodeAssembler| {
                        a.mov(r15, base + 0x400)?;
                        a.mov(rcx, 0xf_0000_0000 | u64::from(n))?;
                        a.mov(rdx, -1i64)?;
                        a.rdpmc()
                    });
                    for at in [end, base + 0x400] {
                        m.place(64, at, machine::stop);
                    }
                    m.go(base);
                    m.run();
                    let fine = there && (open || !user);
                    assert_eq!(
                        m.vectors(),
                        [GP; 1][usize::from(fine)..],
                        "{n:x} {user} {open}"
                    );
                    assert_eq!(m.reg(Gpr::Rdx) == 0, fine);
                }
            }
        }
    });
}

#[test]
fn registers_take_what_they_have() {
    each_engine_with_counters(|m, maker| {
        let both = [
            (maker.counter, 0x1234, Some(0x1234)),
            (maker.select(3), 0x1_00c0, Some(0x1_00c0)),
        ];
        let intel = [
            (0x18a, 0, None),
            (maker.counter, 0x8000_0000, Some(0xffff_8000_0000)),
            (maker.counter, 0x12_7fff_ffff, Some(0x7fff_ffff)),
            (0x309, 0x1234_5678_9abc, Some(0x1234_5678_9abc)),
            (maker.select, 1 << 21, None),
            (maker.select, 1 << 32, None),
            (FIXED_CONTROL, 0xbbb, Some(0xbbb)),
            (FIXED_CONTROL, 4, None),
            (GLOBAL_CONTROL, 0x7_0000_000f, Some(0x7_0000_000f)),
            (GLOBAL_CONTROL, 1 << 4, None),
            (GLOBAL_STATUS, 0, None),
            (CLEAR_STATUS, 3 << 62 | 7, Some(0)),
            (CLEAR_STATUS, 1 << 60, None),
        ];
        let amd = [
            (0xc001_0008, 0, None),
            (0xc001_01ff, 0, None),
            (0xc001_020b, 0x1234, Some(0x1234)),
            (0xc001_020c, 0, None),
            (maker.counter, u64::MAX, Some(MASK)),
            (maker.select, 1 << 21 | 1 << 19 | 0xc0, Some(0xc0)),
        ];
        let own: &[_] = if maker.is_intel() { &intel } else { &amd };
        for (msr, v, reads) in both.iter().chain(own) {
            m.forget();
            m.to_kernel();
            m.run_code(|a| {
                a.mov(r15, STOPPED_AT)?;
                wrmsr(a, *msr, *v)?;
                a.rdmsr()?;
                a.shl(rdx, 32)?;
                a.or(rax, rdx)?;
                a.mov(r12, rax)
            });
            let expected = [GP; 1][usize::from(reads.is_some())..].to_vec();
            assert_eq!(m.vectors(), expected, "{msr:x} {v:x}");
            if let Some(reads) = reads {
                assert_eq!(m.reg(Gpr::R12), *reads, "{msr:x} {v:x}");
            }
        }
    });
}

#[test]
fn the_first_four_core_counters_have_two_sets_of_registers() {
    each_engine_with(&with_counters(b"AuthenticAMD"), |m| {
        for (n, from, to) in (0..4).flat_map(|n| [(n, AMD, AMD_CORE), (n, AMD_CORE, AMD)]) {
            let (v, select) = (0x1000 + u64::from(n), 0x1_0076 + u64::from(to.stride));
            m.to_kernel();
            m.run_code(|a| {
                wrmsr(a, from.counter(n), v)?;
                wrmsr(a, from.select(n), select)?;
                a.mov(ecx, to.select(n))?;
                a.rdmsr()?;
                a.mov(r13, rax)
            });
            let selected = m.reg(Gpr::R13);
            assert_eq!((value(m, to, n), selected), (v, select), "{n}");
        }
        assert!(m.vectors().is_empty());
        // What is set up by the one counts and is read by the other.
        m.run_code(|a| {
            AMD.begin(a, 2, 0, AMD.instructions | BOTH)?;
            turns(a, 100)?;
            AMD_CORE.end(a)
        });
        let counted = value(m, AMD_CORE, 2);
        assert!((200..240).contains(&counted), "{counted}");
        assert_eq!(value(m, AMD, 2), counted, "it was ended");
    });
}
