//! Where AMD's processors and Intel's differ in user code, each guest's does as its maker's. `doppel-fuzz` holds the interpreter to the processor of
//! the host, which is but one of them.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::super::dispatch;
use super::super::native::host_has;
use super::super::vector::Layout;
use super::super::{Flow, Step, step};
use crate::testing::{AMD, INTEL, STACK, gate, get, long_mode, put, to_user};
use crate::{Cpu, CpuMode, Cr0, Cr4, EmptyBus, Exception, Gpr, Outcome, Rflags, Vector};

/// RAM, all of which is mapped, ends here.
const END: u64 = 2 << 20;
const DATA: u64 = 0x10_0000;

fn user(vendor: &'static [u8; 12]) -> Box<Cpu> {
    let mut cpu = long_mode(vendor);
    cpu.cr0 |= Cr0::AM;
    cpu.cr4 |= Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::OSXSAVE;
    cpu.xcr0 = Layout::of_host().supported & 7;
    to_user(&mut cpu);
    cpu.gpr[Gpr::Rdi as usize] = DATA;
    cpu
}

fn decode(code: &[u8]) -> Instruction {
    Decoder::with_ip(64, code, 0x1000, DecoderOptions::NONE).decode()
}

fn execute(cpu: &mut Cpu, code: &[u8]) -> Step {
    let i = decode(code);
    let (handler, _) = dispatch::resolve(&i, CpuMode::Bits64);
    handler(cpu, &mut EmptyBus, &i)
}

/// False, aloud, where this host cannot execute it.
fn possible(what: &str, code: &[u8]) -> bool {
    let possible = host_has(&mut user(INTEL), &decode(code)).is_ok();
    if !possible {
        eprintln!("SKIPPED: {what}: this processor has no such instruction");
    }
    possible
}

fn both(code: &[u8], prepare: impl Fn(&mut Cpu)) -> [(Step, Box<Cpu>); 2] {
    [AMD, INTEL].map(|vendor| {
        let mut cpu = user(vendor);
        prepare(&mut cpu);
        (execute(&mut cpu, code), cpu)
    })
}

fn page_fault(step: &Step) -> Option<u64> {
    match step {
        Err(e) if e.vector == Vector::PageFault => Some(e.address),
        _ => None,
    }
}

const DONE: Step = Ok(Flow::Next);

#[test]
fn flags_of_a_repeated_comparison_that_faults() {
    // repe scasb: zeros up to the end.
    let [(amd, a), (intel, i)] = both(&[0xf3, 0xae], |cpu| {
        cpu.gpr[Gpr::Rdi as usize] = END - 2;
        cpu.gpr[Gpr::Rcx as usize] = 9;
        cpu.rflags |= Rflags::CF | Rflags::SF;
    });
    assert_eq!(
        (page_fault(&amd), page_fault(&intel)),
        (Some(END), Some(END))
    );
    let arithmetic = |cpu: &Cpu| cpu.rflags & Rflags::ARITHMETIC;
    assert_eq!(arithmetic(&a), Rflags::ZF | Rflags::PF);
    assert_eq!(arithmetic(&i), Rflags::CF | Rflags::SF);
    assert_eq!((a.reg(Gpr::Rcx), i.reg(Gpr::Rcx)), (7, 7));
}

#[test]
fn a_prefetch_of_a_register() {
    let [(amd, _), (intel, _)] = both(&[0x0f, 0x0d, 0xc0], |_| ());
    assert_eq!((amd, intel), (Err(Exception::UD), DONE));
}

#[test]
fn movsxd_to_16_bits() {
    // movsxd ax, [rdi]
    let [(amd, _), (intel, _)] = both(&[0x66, 0x63, 0x07], |cpu| {
        cpu.gpr[Gpr::Rdi as usize] = END - 2;
    });
    assert_eq!((page_fault(&amd), intel), (Some(END), DONE));
}

#[test]
fn alignment_checks_of_vectors() {
    /// Whether AMD's and Intel's check: movdqu, vmovdqu of 32 bytes, vmaskmovps, vcvtph2ps, maskmovdqu.
    const CODES: &[(&[u8], u64, bool, bool)] = &[
        (&[0xf3, 0x0f, 0x6f, 0x07], 8, true, false),
        (&[0xf3, 0x0f, 0x6f, 0x07], 16, false, false),
        (&[0xc5, 0xfe, 0x6f, 0x07], 8, true, false),
        (&[0xc5, 0xfe, 0x6f, 0x07], 16, false, false),
        (&[0xc4, 0xe2, 0x79, 0x2c, 0x07], 1, false, false),
        (&[0xc4, 0xe2, 0x79, 0x13, 0x07], 4, true, false),
        (&[0x66, 0x0f, 0xf7, 0xc1], 8, false, false),
        (&[0x66, 0x0f, 0xf7, 0xc1], 4, true, true),
    ];
    for (code, offset, by_amd, by_intel) in CODES {
        if !possible("alignment checks of vectors", code) {
            continue;
        }
        let [(amd, _), (intel, _)] = both(code, |cpu| {
            cpu.gpr[Gpr::Rdi as usize] = DATA + offset;
            cpu.rflags |= Rflags::AC;
        });
        let expected = |checks: bool| if checks { Err(Exception::AC) } else { DONE };
        assert_eq!(amd, expected(*by_amd), "{code:x?} at {offset}");
        assert_eq!(intel, expected(*by_intel), "{code:x?} at {offset}");
    }
}

#[test]
fn misaligned_operands_of_sha() {
    let code = &[0x0f, 0x38, 0xc9, 0x07]; // sha1msg1 xmm0, [rdi]
    if possible("SHA", code) {
        let [(amd, _), (intel, _)] = both(code, |cpu| cpu.gpr[Gpr::Rdi as usize] = DATA + 4);
        assert_eq!((amd, intel), (DONE, Err(Exception::gp(0))));
    }
}

#[test]
fn where_the_state_is_looked_at_first() {
    const FXSAVE: &[u8] = &[0x0f, 0xae, 0x07];
    const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x0f];
    const XSAVE: &[u8] = &[0x0f, 0xae, 0x27];
    const XSAVEC: &[u8] = &[0x0f, 0xc7, 0x27];
    const XSAVEOPT: &[u8] = &[0x0f, 0xae, 0x37];
    const XRSTOR: &[u8] = &[0x0f, 0xae, 0x2f];
    type Missing = Option<u64>;
    /// An instruction at an address, and the bytes from there on that AMD's and Intel's find missing. AVX is in its initial state, and asked for.
    const CASES: &[(&[u8], u64, Missing, Missing)] = &[
        (FXSAVE, END + 0xff0, Some(0), Some(0x1ff)),
        (FXRSTOR, END + 0xff0, Some(0), Some(0x1ff)),
        (XSAVE, END + 0xfc0, Some(0x200), Some(0x33f)),
        (XSAVEC, END + 0xfc0, Some(0), Some(0x33f)),
        (XRSTOR, END + 0xfc0, Some(0), Some(0x208)),
        // It is not stored.
        (XSAVEC, END - 0x280, None, Some(0x33f)),
        (XSAVEOPT, END - 0x280, None, Some(0x33f)),
    ];
    if Layout::of_host().supported & 4 == 0 {
        return eprintln!("SKIPPED: this processor has no AVX");
    }
    for (code, at, by_amd, by_intel) in CASES {
        if !possible("saves of the state", code) {
            continue;
        }
        let [(amd, _), (intel, _)] = both(code, |cpu| {
            cpu.gpr[Gpr::Rdi as usize] = *at;
            (cpu.gpr[Gpr::Rax as usize], cpu.gpr[Gpr::Rdx as usize]) = (7, 0);
        });
        let missing = |by: &Missing| by.map(|byte| at + byte);
        assert_eq!(page_fault(&amd), missing(by_amd), "{code:x?}: {amd:?}");
        assert_eq!(page_fault(&intel), missing(by_intel), "{code:x?}");
        assert!(by_amd.is_some() || amd == DONE, "{code:x?}: {amd:?}");
    }
}

#[test]
fn an_x87_store_that_is_suppressed() {
    // fistp word [rdi] of an empty register; invalid operations are not masked.
    let [(amd, a), (intel, i)] = both(&[0xdf, 0x1f], |cpu| {
        cpu.gpr[Gpr::Rdi as usize] = END;
        cpu.fpu.bytes[0] &= !1;
        cpu.fpu.bytes[512] |= 3;
    });
    assert_eq!((page_fault(&amd), intel), (Some(END), DONE));
    let status = |cpu: &Cpu| cpu.fpu.bytes[2];
    assert_eq!((status(&a), status(&i) & 0x81), (0, 0x81));
}

#[test]
fn a_gather_that_faults() {
    let code = &[0xc4, 0xe2, 0x69, 0x90, 0x04, 0x0f]; // vpgatherdd xmm0, [rdi + xmm1], xmm2
    if !possible("gathers", code) {
        return;
    }
    // XMM0 is 0, XMM1 the offsets, XMM2 the mask: the second element is not asked for, the third not there.
    let offsets: [u32; 4] = [0, 0, (END - DATA) as u32, 0];
    let mask: [u32; 4] = [0x8000_0001, 0x7fff_ffff, 0x8000_0003, 0x8000_0004];
    let lanes = |cpu: &Cpu, n: usize| -> [u32; 4] {
        std::array::from_fn(|lane| {
            let at = 160 + 16 * n + 4 * lane;
            u32::from_le_bytes(cpu.fpu.bytes[at..at + 4].try_into().unwrap())
        })
    };
    let [(amd, a), (intel, i)] = both(code, |cpu| {
        put(cpu, DATA, 0x1234_5678u32);
        cpu.fpu.bytes[512] |= 7;
        for (n, values) in [(1, offsets), (2, mask)] {
            for (lane, value) in values.into_iter().enumerate() {
                let at = 160 + 16 * n + 4 * lane;
                cpu.fpu.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            }
        }
    });
    assert_eq!(
        (page_fault(&amd), page_fault(&intel)),
        (Some(END), Some(END))
    );
    assert_eq!(lanes(&a, 0), [0x1234_5678, 0, 0, 0]);
    assert_eq!(lanes(&i, 0), [0x1234_5678, 0, 0, 0]);
    assert_eq!(lanes(&a, 2), [0, 0, 0x8000_0003, 0x8000_0004]);
    assert_eq!(lanes(&i, 2), [0, 0, u32::MAX, u32::MAX]);
}

#[test]
fn an_instruction_breakpoint_behind_mov_ss() {
    // mov ss, eax; pop rax.
    let code: [u8; 3] = [0x8e, 0xd0, 0x58];
    for (vendor, faults) in [(AMD, true), (INTEL, false)] {
        let mut cpu = long_mode(vendor);
        gate(&cpu, 1, 0x1_4000, 0xe, 0, 0);
        for (at, byte) in (cpu.rip..).zip(code) {
            put(&cpu, at, byte);
        }
        let rip = cpu.rip;
        cpu.gpr[Gpr::Rax as usize] = 0x18;
        cpu.dr[0] = rip + 2;
        cpu.dr[7] = 0x402;
        assert_eq!(step(&mut cpu, &mut EmptyBus), Outcome::Continue);
        assert_eq!(cpu.rip, rip + 2, "no #DB of MOV SS itself");
        assert_eq!(step(&mut cpu, &mut EmptyBus), Outcome::Continue);
        if !faults {
            assert_eq!(cpu.rip, rip + 3);
            continue;
        }
        assert_eq!((cpu.rip, cpu.dr[6] & 0xf), (0x1_4000, 1));
        assert_eq!(get(&cpu, cpu.gpr[Gpr::Rsp as usize]), rip + 2, "a fault");
    }
}

/// MOV SS leaves a hit of a data breakpoint to the next instruction, and that faults: whether as it is fetched or as it executes, the hit is gone.
#[test]
fn a_fault_behind_mov_ss_takes_a_data_breakpoint_with_it() {
    // mov ss, [rbx]; then ud2, or a byte that begins no instruction of 64-bit mode.
    for behind in [[0x0fu8, 0x0b], [0x06, 0x90]] {
        for vendor in [AMD, INTEL] {
            let mut cpu = long_mode(vendor);
            gate(&cpu, 6, 0x1_4000, 0xe, 0, 0);
            gate(&cpu, 1, 0x1_5000, 0xe, 0, 0);
            for (at, byte) in (cpu.rip..).zip([0x8e, 0x13].into_iter().chain(behind)) {
                put(&cpu, at, byte);
            }
            put(&cpu, 0x1_4000, 0x90u8);
            put(&cpu, DATA, 0x18u16);
            cpu.gpr[Gpr::Rbx as usize] = DATA;
            cpu.dr[0] = DATA;
            cpu.dr[7] = 0x7_0402;
            for _ in 0..3 {
                step(&mut cpu, &mut EmptyBus);
            }
            assert_eq!(cpu.rip, 0x1_4001, "{behind:x?}");
        }
    }
}

#[test]
fn single_steps_of_a_repetition() {
    for (vendor, sets_rf) in [(AMD, false), (INTEL, true)] {
        let mut cpu = user(vendor);
        gate(&cpu, 1, 0x1_4000, 0xe, 0, 0);
        put(&cpu, cpu.rip, 0xaaf3u16); // rep stosb
        cpu.gpr[Gpr::Rcx as usize] = 3;
        cpu.rflags |= Rflags::TF;
        let rip = cpu.rip;
        assert_eq!(step(&mut cpu, &mut EmptyBus), Outcome::Continue);
        assert_eq!((cpu.rip, get(&cpu, STACK - 40)), (0x1_4000, rip));
        let flags = Rflags::from_bits_truncate(get(&cpu, STACK - 24));
        assert_eq!(flags.contains(Rflags::RF), sets_rf);
    }
}
