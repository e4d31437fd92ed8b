//! Instruction sets by name: where CPUID says that one exists, and which of them a guest's processor does not have.
//!
//! A processor that lacks an instruction set raises #UD at its instructions. The host's may have it, though, so whoever would leave an instruction to the
//! host's processor asks [`HiddenInstructions`] first. Three encodings are no #UD: without BMI1 and LZCNT, TZCNT and LZCNT are BSF and BSR with a
//! prefix that says nothing (Intel SDM vol. 2); without its bit LAHF is undefined in 64-bit mode alone.

use iced_x86::{CodeSize, CpuidFeature, DecoderOptions, Instruction, Mnemonic};

use crate::CpuidLeaf;

/// A register that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reg {
    A,
    B,
    C,
    D,
}

impl Reg {
    /// Its value in a leaf.
    pub fn of(self, leaf: CpuidLeaf) -> u32 {
        match self {
            Reg::A => leaf.eax,
            Reg::B => leaf.ebx,
            Reg::C => leaf.ecx,
            Reg::D => leaf.edx,
        }
    }
}

/// Where CPUID tells of a feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub leaf: u32,
    pub subleaf: u32,
    pub register: Reg,
    pub bit: u32,
}

pub(crate) const fn at(leaf: u32, subleaf: u32, register: Reg, bit: u32) -> Place {
    Place {
        leaf,
        subleaf,
        register,
        bit,
    }
}

impl Place {
    /// True where what `read` tells has the feature.
    pub fn is_in(&self, read: &dyn Fn(u32, u32) -> CpuidLeaf) -> bool {
        self.register.of(read(self.leaf, self.subleaf)) >> self.bit & 1 != 0
    }
}

/// Sets that the interpreter has the host's processor execute.
const NATIVE: &[(CpuidFeature, Place)] = &[
    (CpuidFeature::SSE3, at(1, 0, Reg::C, 0)),
    (CpuidFeature::PCLMULQDQ, at(1, 0, Reg::C, 1)),
    (CpuidFeature::SSSE3, at(1, 0, Reg::C, 9)),
    (CpuidFeature::FMA, at(1, 0, Reg::C, 12)),
    (CpuidFeature::SSE4_1, at(1, 0, Reg::C, 19)),
    (CpuidFeature::SSE4_2, at(1, 0, Reg::C, 20)),
    (CpuidFeature::AES, at(1, 0, Reg::C, 25)),
    (CpuidFeature::AVX, at(1, 0, Reg::C, 28)),
    (CpuidFeature::F16C, at(1, 0, Reg::C, 29)),
    (CpuidFeature::RDRAND, at(1, 0, Reg::C, 30)),
    (CpuidFeature::AVX2, at(7, 0, Reg::B, 5)),
    (CpuidFeature::AVX512F, at(7, 0, Reg::B, 16)),
    (CpuidFeature::AVX512DQ, at(7, 0, Reg::B, 17)),
    (CpuidFeature::RDSEED, at(7, 0, Reg::B, 18)),
    (CpuidFeature::AVX512_IFMA, at(7, 0, Reg::B, 21)),
    (CpuidFeature::AVX512CD, at(7, 0, Reg::B, 28)),
    (CpuidFeature::SHA, at(7, 0, Reg::B, 29)),
    (CpuidFeature::AVX512BW, at(7, 0, Reg::B, 30)),
    (CpuidFeature::AVX512VL, at(7, 0, Reg::B, 31)),
    (CpuidFeature::AVX512_VBMI, at(7, 0, Reg::C, 1)),
    (CpuidFeature::AVX512_VBMI2, at(7, 0, Reg::C, 6)),
    (CpuidFeature::GFNI, at(7, 0, Reg::C, 8)),
    (CpuidFeature::VAES, at(7, 0, Reg::C, 9)),
    (CpuidFeature::VPCLMULQDQ, at(7, 0, Reg::C, 10)),
    (CpuidFeature::AVX512_VNNI, at(7, 0, Reg::C, 11)),
    (CpuidFeature::AVX512_BITALG, at(7, 0, Reg::C, 12)),
    (CpuidFeature::AVX512_VPOPCNTDQ, at(7, 0, Reg::C, 14)),
    (CpuidFeature::AVX512_VP2INTERSECT, at(7, 0, Reg::D, 8)),
    (CpuidFeature::AVX512_FP16, at(7, 0, Reg::D, 23)),
    (CpuidFeature::SHA512, at(7, 1, Reg::A, 0)),
    (CpuidFeature::SM3, at(7, 1, Reg::A, 1)),
    (CpuidFeature::SM4, at(7, 1, Reg::A, 2)),
    (CpuidFeature::AVX_VNNI, at(7, 1, Reg::A, 4)),
    (CpuidFeature::AVX512_BF16, at(7, 1, Reg::A, 5)),
    (CpuidFeature::AVX_IFMA, at(7, 1, Reg::A, 23)),
    (CpuidFeature::AVX_VNNI_INT8, at(7, 1, Reg::D, 4)),
    (CpuidFeature::AVX_NE_CONVERT, at(7, 1, Reg::D, 5)),
    (CpuidFeature::AVX_VNNI_INT16, at(7, 1, Reg::D, 10)),
    (CpuidFeature::SSE4A, at(0x8000_0001, 0, Reg::C, 6)),
];

/// Sets that it executes itself.
const OWN: &[(CpuidFeature, Place)] = &[
    (CpuidFeature::CMPXCHG16B, at(1, 0, Reg::C, 13)),
    (CpuidFeature::MOVBE, at(1, 0, Reg::C, 22)),
    (CpuidFeature::POPCNT, at(1, 0, Reg::C, 23)),
    (CpuidFeature::XSAVE, at(1, 0, Reg::C, 26)),
    (CpuidFeature::BMI1, at(7, 0, Reg::B, 3)),
    (CpuidFeature::BMI2, at(7, 0, Reg::B, 8)),
    (CpuidFeature::ADX, at(7, 0, Reg::B, 19)),
    (CpuidFeature::CLFLUSHOPT, at(7, 0, Reg::B, 23)),
    (CpuidFeature::CLWB, at(7, 0, Reg::B, 24)),
    (CpuidFeature::XSAVEOPT, at(0xd, 1, Reg::A, 0)),
    (CpuidFeature::XSAVEC, at(0xd, 1, Reg::A, 1)),
    (CpuidFeature::XSAVES, at(0xd, 1, Reg::A, 3)),
    (CpuidFeature::LZCNT, at(0x8000_0001, 0, Reg::C, 5)),
];

/// Sets that every processor of 64 bits has, and instructions that do nothing where the processor lacks them.
const ALWAYS: &[CpuidFeature] = &[
    CpuidFeature::INTEL8086,
    CpuidFeature::INTEL8086_ONLY,
    CpuidFeature::INTEL186,
    CpuidFeature::INTEL286,
    CpuidFeature::INTEL286_ONLY,
    CpuidFeature::INTEL386,
    CpuidFeature::INTEL386_ONLY,
    CpuidFeature::INTEL486,
    CpuidFeature::X64,
    CpuidFeature::CMOV,
    CpuidFeature::CX8,
    CpuidFeature::CLFSH,
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::FXSR,
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::PAUSE,
    CpuidFeature::MULTIBYTENOP,
    CpuidFeature::PREFETCHW,
    CpuidFeature::CET_IBT,
    CpuidFeature::CLDEMOTE,
];

/// False where no guest's processor executes an instruction of user code, whatever the host's does: it is of a set that nobody has looked at
/// here, and may have state of its own, as AMX has its tiles. What a guest's kernel is given by the monitor is not asked for.
pub fn may_be_offered(i: &Instruction) -> bool {
    i.cpuid_features()
        .iter()
        .all(|feature| ALWAYS.contains(feature) || all().any(|(known, _)| known == feature))
}

/// LAHF and SAHF in 64-bit mode.
const LAHF: Place = at(0x8000_0001, 0, Reg::C, 0);
/// Its bit among the hidden ones, above those of the tables.
const LAHF_BIT: u64 = 1 << 63;

fn all() -> impl Iterator<Item = &'static (CpuidFeature, Place)> {
    NATIVE.iter().chain(OWN)
}

/// Where CPUID tells of a set that the host's processor executes.
pub(crate) fn native(feature: CpuidFeature) -> Option<&'static Place> {
    let found = NATIVE.iter().find(|(known, _)| *known == feature);
    found.map(|(_, place)| place)
}

/// The instruction sets that a guest's processor lacks though the host's may have them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HiddenInstructions(u64);

impl HiddenInstructions {
    /// Nothing is hidden.
    pub const NONE: HiddenInstructions = HiddenInstructions(0);

    /// Those that the CPUID of a processor does not tell of.
    pub(crate) fn of(read: &dyn Fn(u32, u32) -> CpuidLeaf) -> Self {
        let missing = all().enumerate().filter(|(_, (_, p))| !p.is_in(read));
        let sets = missing.fold(0, |sets, (n, _)| sets | 1 << n);
        let lahf = if LAHF.is_in(read) { 0 } else { LAHF_BIT };
        HiddenInstructions(sets | lahf)
    }

    /// True where nothing is hidden.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// True where the guest's processor does not execute this as the host's does.
    #[inline]
    pub fn has(self, i: &Instruction) -> bool {
        !self.is_empty() && self.has_some(i)
    }

    fn has_some(self, i: &Instruction) -> bool {
        if matches!(i.mnemonic(), Mnemonic::Lahf | Mnemonic::Sahf) {
            return self.0 & LAHF_BIT != 0 && i.code_size() == CodeSize::Code64;
        }
        i.cpuid_features().iter().any(|f| self.has_set(*f))
    }

    fn has_set(self, feature: CpuidFeature) -> bool {
        let place = all().position(|(known, _)| *known == feature);
        place.is_some_and(|n| self.0 >> n & 1 != 0)
    }

    /// What iced-x86 is to decode for the processor: TZCNT and LZCNT, or what they are without.
    pub(crate) fn decoder_options(self) -> u32 {
        let options = [
            (CpuidFeature::BMI1, DecoderOptions::NO_MPFX_0FBC),
            (CpuidFeature::LZCNT, DecoderOptions::NO_MPFX_0FBD),
        ];
        let hidden = options.iter().filter(|(f, _)| self.has_set(*f));
        hidden.fold(0, |all, (_, option)| all | option)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::Decoder;

    fn decode(bits: u32, bytes: &[u8]) -> Instruction {
        Decoder::new(bits, bytes, DecoderOptions::NONE).decode()
    }

    #[test]
    fn the_tables_fit_and_name_nothing_twice() {
        let mut places: Vec<_> = all().map(|(_, place)| *place).collect();
        places.push(LAHF);
        assert!(places.len() < 64);
        for (n, place) in places.iter().enumerate() {
            assert!(!places[..n].contains(place), "{place:?}");
        }
    }

    #[test]
    fn sets_without_a_name_here_are_nobodys() {
        let nobodys: &[&[u8]] = &[
            &[0xc4, 0xe2, 0x78, 0x49, 0x07],       // ldtilecfg [rdi]
            &[0xc4, 0xe2, 0x78, 0x49, 0xc0],       // tilerelease
            &[0xc4, 0xe2, 0x7b, 0x49, 0xc0],       // tilezero tmm0
            &[0x0f, 0x38, 0xf9, 0x07],             // movdiri
            &[0x0f, 0x01, 0xfc],                   // clzero
            &[0x0f, 0x01, 0xd6],                   // xtest
            &[0xf3, 0x0f, 0x38, 0xdc, 0x07],       // aesenc128kl
            &[0xc4, 0xe2, 0x79, 0xe6, 0x07],       // cmpnpxadd
            &[0x62, 0xf2, 0x7f, 0x48, 0x9a, 0x07], // v4fmaddps
        ];
        for bytes in nobodys {
            assert!(!may_be_offered(&decode(64, bytes)), "{bytes:x?}");
        }
        let usual: &[&[u8]] = &[
            &[0x48, 0x89, 0xc0],                   // mov
            &[0x0f, 0x44, 0xc1],                   // cmove
            &[0xd9, 0xc0],                         // fld
            &[0xdf, 0xe9],                         // fucomip
            &[0x66, 0x0f, 0x38, 0xcf, 0xc1],       // gf2p8mulb
            &[0x62, 0xf1, 0xfd, 0x48, 0x58, 0xc1], // vaddpd zmm
            &[0x9b],                               // wait
        ];
        for bytes in usual {
            assert!(may_be_offered(&decode(64, bytes)), "{bytes:x?}");
        }
    }

    #[test]
    fn an_instruction_is_hidden_with_any_set_that_it_needs() {
        let none = |_, _| CpuidLeaf::default();
        let all = |_, _| CpuidLeaf {
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
        };
        let hidden: &[&[u8]] = &[
            &[0xc4, 0xe2, 0x78, 0xf2, 0xc1],       // andn
            &[0xc5, 0xf8, 0x57, 0xc0],             // vxorps xmm
            &[0xc4, 0xe2, 0x7d, 0xdc, 0xc0],       // vaesenc ymm
            &[0x62, 0xf1, 0x7c, 0x48, 0x57, 0xc0], // vxorps zmm
            &[0xf3, 0x0f, 0xb8, 0xc0],             // popcnt
            &[0xf3, 0x0f, 0xbd, 0xc0],             // lzcnt
            &[0x48, 0x0f, 0xc7, 0x0f],             // cmpxchg16b
            &[0x0f, 0x38, 0xf0, 0x07],             // movbe
            &[0x9f],                               // lahf
            &[0x0f, 0xc7, 0xf0],                   // rdrand
            &[0x0f, 0xae, 0x27],                   // xsave
            &[0x66, 0x0f, 0xae, 0x3f],             // clflushopt
        ];
        for bytes in hidden {
            let i = decode(64, bytes);
            assert!(HiddenInstructions::of(&none).has(&i), "{bytes:x?}");
            assert!(!HiddenInstructions::of(&all).has(&i), "{bytes:x?}");
            assert!(!HiddenInstructions::default().has(&i), "{bytes:x?}");
        }
        assert!(!HiddenInstructions::of(&none).has(&decode(32, &[0x9f])));
        let never: &[&[u8]] = &[
            &[0x0f, 0x58, 0xc1],
            &[0x0f, 0xa2],
            &[0xf3, 0x90],
            &[0x48, 0x89, 0xc0],
        ];
        for bytes in never {
            assert!(
                !HiddenInstructions::of(&none).has(&decode(64, bytes)),
                "{bytes:x?}"
            );
        }
    }
}
