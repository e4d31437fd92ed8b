//! Which instruction set extensions the guest is offered, from the CPUID that it sees.

use doppel_x86::Cpu;
use iced_x86::CpuidFeature;

#[derive(Clone, Copy)]
enum Reg {
    A,
    B,
    C,
    D,
}

/// Where CPUID says that a feature exists: leaf, subleaf, register, bit.
const FEATURES: &[(CpuidFeature, u32, u32, Reg, u32)] = &[
    (CpuidFeature::SSE3, 1, 0, Reg::C, 0),
    (CpuidFeature::PCLMULQDQ, 1, 0, Reg::C, 1),
    (CpuidFeature::SSSE3, 1, 0, Reg::C, 9),
    (CpuidFeature::FMA, 1, 0, Reg::C, 12),
    (CpuidFeature::CMPXCHG16B, 1, 0, Reg::C, 13),
    (CpuidFeature::SSE4_1, 1, 0, Reg::C, 19),
    (CpuidFeature::SSE4_2, 1, 0, Reg::C, 20),
    (CpuidFeature::MOVBE, 1, 0, Reg::C, 22),
    (CpuidFeature::POPCNT, 1, 0, Reg::C, 23),
    (CpuidFeature::AES, 1, 0, Reg::C, 25),
    (CpuidFeature::XSAVE, 1, 0, Reg::C, 26),
    (CpuidFeature::AVX, 1, 0, Reg::C, 28),
    (CpuidFeature::F16C, 1, 0, Reg::C, 29),
    (CpuidFeature::RDRAND, 1, 0, Reg::C, 30),
    (CpuidFeature::CX8, 1, 0, Reg::D, 8),
    (CpuidFeature::CMOV, 1, 0, Reg::D, 15),
    (CpuidFeature::CLFSH, 1, 0, Reg::D, 19),
    (CpuidFeature::MMX, 1, 0, Reg::D, 23),
    (CpuidFeature::FXSR, 1, 0, Reg::D, 24),
    (CpuidFeature::SSE, 1, 0, Reg::D, 25),
    (CpuidFeature::SSE2, 1, 0, Reg::D, 26),
    (CpuidFeature::FSGSBASE, 7, 0, Reg::B, 0),
    (CpuidFeature::BMI1, 7, 0, Reg::B, 3),
    (CpuidFeature::AVX2, 7, 0, Reg::B, 5),
    (CpuidFeature::BMI2, 7, 0, Reg::B, 8),
    (CpuidFeature::AVX512F, 7, 0, Reg::B, 16),
    (CpuidFeature::AVX512DQ, 7, 0, Reg::B, 17),
    (CpuidFeature::RDSEED, 7, 0, Reg::B, 18),
    (CpuidFeature::ADX, 7, 0, Reg::B, 19),
    (CpuidFeature::AVX512_IFMA, 7, 0, Reg::B, 21),
    (CpuidFeature::CLFLUSHOPT, 7, 0, Reg::B, 23),
    (CpuidFeature::CLWB, 7, 0, Reg::B, 24),
    (CpuidFeature::AVX512CD, 7, 0, Reg::B, 28),
    (CpuidFeature::SHA, 7, 0, Reg::B, 29),
    (CpuidFeature::AVX512BW, 7, 0, Reg::B, 30),
    (CpuidFeature::AVX512VL, 7, 0, Reg::B, 31),
    (CpuidFeature::AVX512_VBMI, 7, 0, Reg::C, 1),
    (CpuidFeature::PKU, 7, 0, Reg::C, 3),
    (CpuidFeature::AVX512_VBMI2, 7, 0, Reg::C, 6),
    (CpuidFeature::GFNI, 7, 0, Reg::C, 8),
    (CpuidFeature::VAES, 7, 0, Reg::C, 9),
    (CpuidFeature::VPCLMULQDQ, 7, 0, Reg::C, 10),
    (CpuidFeature::AVX512_VNNI, 7, 0, Reg::C, 11),
    (CpuidFeature::AVX512_BITALG, 7, 0, Reg::C, 12),
    (CpuidFeature::AVX512_VPOPCNTDQ, 7, 0, Reg::C, 14),
    (CpuidFeature::RDPID, 7, 0, Reg::C, 22),
    (CpuidFeature::MOVDIRI, 7, 0, Reg::C, 27),
    (CpuidFeature::MOVDIR64B, 7, 0, Reg::C, 28),
    (CpuidFeature::AVX512_VP2INTERSECT, 7, 0, Reg::D, 8),
    (CpuidFeature::SERIALIZE, 7, 0, Reg::D, 14),
    (CpuidFeature::AVX512_FP16, 7, 0, Reg::D, 23),
    (CpuidFeature::SHA512, 7, 1, Reg::A, 0),
    (CpuidFeature::SM3, 7, 1, Reg::A, 1),
    (CpuidFeature::SM4, 7, 1, Reg::A, 2),
    (CpuidFeature::AVX_VNNI, 7, 1, Reg::A, 4),
    (CpuidFeature::AVX512_BF16, 7, 1, Reg::A, 5),
    (CpuidFeature::AVX_IFMA, 7, 1, Reg::A, 23),
    (CpuidFeature::AVX_VNNI_INT8, 7, 1, Reg::D, 4),
    (CpuidFeature::AVX_NE_CONVERT, 7, 1, Reg::D, 5),
    (CpuidFeature::AVX_VNNI_INT16, 7, 1, Reg::D, 10),
    (CpuidFeature::XSAVEOPT, 0xd, 1, Reg::A, 0),
    (CpuidFeature::XSAVEC, 0xd, 1, Reg::A, 1),
    (CpuidFeature::XSAVES, 0xd, 1, Reg::A, 3),
    (CpuidFeature::LZCNT, 0x8000_0001, 0, Reg::C, 5),
    (CpuidFeature::SSE4A, 0x8000_0001, 0, Reg::C, 6),
    (CpuidFeature::PREFETCHW, 0x8000_0001, 0, Reg::C, 8),
    (CpuidFeature::XOP, 0x8000_0001, 0, Reg::C, 11),
    (CpuidFeature::FMA4, 0x8000_0001, 0, Reg::C, 16),
    (CpuidFeature::TBM, 0x8000_0001, 0, Reg::C, 21),
];

/// Every guest is offered SERIALIZE, which the monitor emulates; the bare processor need not have it.
fn host_serializes() -> bool {
    raw_cpuid::cpuid!(7).edx >> 14 & 1 != 0
}

/// Whether the guest is offered a feature, and a comparison with the bare processor possible. What is not known here counts as missing.
pub fn offered(cpu: &Cpu, feature: CpuidFeature) -> bool {
    use CpuidFeature::*;
    let always = matches!(
        feature,
        INTEL8086
            | INTEL186
            | INTEL286
            | INTEL386
            | INTEL486
            | X64
            | FPU
            | FPU287
            | FPU387
            | MULTIBYTENOP
            | PAUSE
            // Long NOPs where the processor does not have them.
            | CET_IBT
            | CLDEMOTE
    );
    if feature == SERIALIZE && !host_serializes() {
        return false;
    }
    always
        || FEATURES.iter().find(|f| f.0 == feature).is_some_and(
            |&(_, leaf, subleaf, register, bit)| {
                let l = cpu.cpuid(leaf, subleaf);
                let value = match register {
                    Reg::A => l.eax,
                    Reg::B => l.ebx,
                    Reg::C => l.ecx,
                    Reg::D => l.edx,
                };
                value >> bit & 1 != 0
            },
        )
}
