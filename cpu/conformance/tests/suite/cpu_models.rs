//! The levels of the x86-64 psABI as processors: what a level has works and what it has not is #UD, whatever the host has.

use doppel_conformance::machine::stop;
use doppel_conformance::*;
use doppel_x86::{CpuModel, Cr4};
use iced_x86::code_asm::*;

/// An instruction in bytes, and the first level that has it.
type Row = (&'static str, &'static [u8], CpuModel);

/// No level has these.
const NONE_HAS: CpuModel = CpuModel::Host;

const INSTRUCTIONS: &[Row] = &[
    ("addpd xmm0, xmm1", &[0x66, 0x0f, 0x58, 0xc1], CpuModel::V1),
    (
        "addsubpd xmm0, xmm1",
        &[0x66, 0x0f, 0xd0, 0xc1],
        CpuModel::V2,
    ),
    (
        "pshufb xmm0, xmm1",
        &[0x66, 0x0f, 0x38, 0x00, 0xc1],
        CpuModel::V2,
    ),
    (
        "pminsd xmm0, xmm1",
        &[0x66, 0x0f, 0x38, 0x39, 0xc1],
        CpuModel::V2,
    ),
    (
        "pcmpgtq xmm0, xmm1",
        &[0x66, 0x0f, 0x38, 0x37, 0xc1],
        CpuModel::V2,
    ),
    (
        "crc32 eax, ecx",
        &[0xf2, 0x0f, 0x38, 0xf1, 0xc1],
        CpuModel::V2,
    ),
    ("popcnt eax, ecx", &[0xf3, 0x0f, 0xb8, 0xc1], CpuModel::V2),
    ("cmpxchg16b [rsi]", &[0x48, 0x0f, 0xc7, 0x0e], CpuModel::V2),
    ("lahf", &[0x9f], CpuModel::V2),
    (
        "vaddpd ymm0, ymm0, ymm1",
        &[0xc5, 0xfd, 0x58, 0xc1],
        CpuModel::V3,
    ),
    (
        "vpaddd ymm0, ymm0, ymm1",
        &[0xc5, 0xfd, 0xfe, 0xc1],
        CpuModel::V3,
    ),
    (
        "vfmadd231pd ymm0, ymm0, ymm1",
        &[0xc4, 0xe2, 0xfd, 0xb8, 0xc1],
        CpuModel::V3,
    ),
    (
        "vcvtph2ps xmm0, xmm1",
        &[0xc4, 0xe2, 0x79, 0x13, 0xc1],
        CpuModel::V3,
    ),
    (
        "andn eax, eax, ecx",
        &[0xc4, 0xe2, 0x78, 0xf2, 0xc1],
        CpuModel::V3,
    ),
    (
        "pdep eax, eax, ecx",
        &[0xc4, 0xe2, 0x7b, 0xf5, 0xc1],
        CpuModel::V3,
    ),
    ("movbe eax, [rsi]", &[0x0f, 0x38, 0xf0, 0x06], CpuModel::V3),
    ("xgetbv", &[0x0f, 0x01, 0xd0], CpuModel::V3),
    (
        "vaddpd zmm0, zmm0, zmm1",
        &[0x62, 0xf1, 0xfd, 0x48, 0x58, 0xc1],
        CpuModel::V4,
    ),
    (
        "vpaddd xmm16, xmm0, xmm1",
        &[0x62, 0xe1, 0x7d, 0x08, 0xfe, 0xc1],
        CpuModel::V4,
    ),
    (
        "kaddd k1, k1, k2",
        &[0xc4, 0xe1, 0xf5, 0x4a, 0xca],
        CpuModel::V4,
    ),
    (
        "aesenc xmm0, xmm1",
        &[0x66, 0x0f, 0x38, 0xdc, 0xc1],
        NONE_HAS,
    ),
    (
        "pclmulqdq xmm0, xmm1, 0",
        &[0x66, 0x0f, 0x3a, 0x44, 0xc1, 0],
        NONE_HAS,
    ),
    ("adcx eax, ecx", &[0x66, 0x0f, 0x38, 0xf6, 0xc1], NONE_HAS),
    ("sha256msg1 xmm0, xmm1", &[0x0f, 0x38, 0xcc, 0xc1], NONE_HAS),
    ("rdrand eax", &[0x0f, 0xc7, 0xf0], NONE_HAS),
    (
        "vpdpbusd xmm0, xmm0, xmm1",
        &[0x62, 0xf2, 0x7d, 0x08, 0x50, 0xc1],
        NONE_HAS,
    ),
];

const LEVELS: [CpuModel; 4] = [CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::V4];

/// Runs a test as each level that the host can carry, on every engine.
fn each_engine_and_level(test: impl Fn(&mut Machine, CpuModel)) {
    for level in LEVELS {
        match Machine::cpu_of(level) {
            Ok(model) => each_engine_with(&model, |m| {
                enable_extended_state(m);
                test(m, level);
            }),
            Err(error) => eprintln!("SKIPPED: {error}"),
        }
    }
}

fn enable_extended_state(m: &mut Machine) {
    m.enable(Cr4::FSGSBASE);
    if m.cpu().cpuid.has_xsave() {
        m.enable(Cr4::OSXSAVE);
        m.cpu_mut().xcr0 = m.cpu().cpuid.xcr0();
    }
}

/// All of them, one after the other; a fault goes on at the next. Returns where each begins.
fn program(m: &Machine, at: u64) -> Vec<u64> {
    let mut here = m.place(64, at, |a: &mut CodeAssembler| {
        a.xor(ecx, ecx)?;
        a.mov(rsi, USER_DATA)
    });
    let mut begins = Vec::new();
    for (_, code, _) in INSTRUCTIONS {
        const LOAD: u64 = 10;
        let next = here + LOAD + code.len() as u64;
        begins.push(here + LOAD);
        let load_r15 = [&[0x49, 0xbf], &next.to_le_bytes()[..]].concat();
        m.put_bytes(here, &[&load_r15, *code].concat());
        here = next;
    }
    m.place(64, here, stop);
    begins
}

#[test]
fn a_level_executes_what_it_has_and_nothing_else() {
    const UD: u64 = 6;
    each_engine_and_level(|m, level| {
        for user in [false, true] {
            println!("as {level}, user: {user}");
            let at = if user { USER_CODE } else { CODE };
            let begins = program(m, at);
            m.forget();
            match user {
                true => m.to_user(),
                false => m.to_kernel(),
            }
            m.go(at);
            m.run();
            let hidden = |first: CpuModel| first == NONE_HAS || first > level;
            let all = INSTRUCTIONS.iter().zip(&begins);
            let expected: Vec<_> = all
                .filter(|((_, _, first), _)| hidden(*first))
                .map(|(_, at)| (UD, *at))
                .collect();
            let met: Vec<_> = m.records().iter().map(|r| (r.vector, r.rip)).collect();
            assert_eq!(met, expected);
        }
    });
}

#[test]
fn counts_of_zeros_are_searches_of_bits_where_a_level_has_no_counts() {
    each_engine_and_level(|m, level| {
        m.run_code(|a| {
            a.mov(ecx, 0x0f00)?;
            a.lzcnt(eax, ecx)?;
            a.tzcnt(edx, ecx)?;
            a.mov(qword_ptr(DATA), rax)?;
            a.mov(qword_ptr(DATA + 8), rdx)
        });
        let expected = if level >= CpuModel::V3 { 20 } else { 11 };
        assert_eq!((m.data(0), m.data(1)), (expected, 8));
    });
}

#[test]
fn a_level_without_xsave_refuses_to_enable_it() {
    each_engine_and_level(|m, level| {
        let code = |a: &mut CodeAssembler| {
            a.mov(rax, cr4)?;
            a.or(eax, Cr4::OSXSAVE.bits() as i32)
        };
        m.to_kernel();
        if level >= CpuModel::V3 {
            return;
        }
        let record = m.faults(code, |a: &mut CodeAssembler| a.mov(cr4, rax));
        assert_eq!((record.vector, record.error), (13, 0));
    });
}
