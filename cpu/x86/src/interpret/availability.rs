//! Which units an instruction needs, whether the host has them, and whether the guest has switched them on.

use std::collections::HashMap;

use iced_x86::{CpuidFeature, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::numeric_error;
use super::vector::component;
use crate::{Cpu, Cr0, Cr4, Exception, arch_host, instruction_set};

/// The part of the processor that executes an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unit {
    /// x87 instructions that wait for a pending exception.
    X87,
    /// Those that do not (FNINIT, FNSTSW and so on).
    X87Control,
    /// FWAIT.
    Wait,
    Mmx,
    /// Between MMX registers and XMM ones, and conversions between floating point and integers in MMX registers: SSE that waits for an x87 exception.
    MmxSse,
    Sse,
    Avx,
    Avx512,
    /// Only general registers (RDRAND).
    General,
}

impl Unit {
    /// The unit of an instruction that `native` may execute.
    pub fn of(i: &Instruction) -> Option<Unit> {
        use Mnemonic::*;
        match i.mnemonic() {
            Wait => return Some(Unit::Wait),
            Fninit | Fnclex | Fnstsw | Fnstcw | Fnstenv | Fnsave | Fneni | Fndisi | Fnsetpm => {
                return Some(Unit::X87Control);
            }
            Emms => return Some(Unit::Mmx),
            Rdrand | Rdseed => return Some(Unit::General),
            Vzeroupper | Vzeroall => return Some(Unit::Avx),
            Fisttp => return Some(Unit::X87),
            _ => {}
        }
        let needs = |f: fn(CpuidFeature) -> bool| i.cpuid_features().iter().any(|n| f(*n));
        let uses = |f: fn(Register) -> bool| {
            (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && f(i.op_register(n)))
        };
        Some(match i.encoding() {
            EncodingKind::EVEX => Unit::Avx512,
            EncodingKind::VEX if uses(Register::is_k) => Unit::Avx512,
            EncodingKind::VEX => Unit::Avx,
            EncodingKind::Legacy if needs(is_x87) => Unit::X87,
            EncodingKind::Legacy
                if uses(Register::is_mm) && (uses(Register::is_xmm) || converts_to_mmx(i)) =>
            {
                Unit::MmxSse
            }
            EncodingKind::Legacy if uses(Register::is_mm) => Unit::Mmx,
            EncodingKind::Legacy if needs(is_sse) => Unit::Sse,
            _ => return None,
        })
    }

    /// The state components that the instruction reads or writes, as bits of XCR0; `enabled` is the guest's XCR0.
    pub fn components(self, enabled: u64) -> u64 {
        match self {
            Unit::X87 | Unit::X87Control | Unit::Wait => component::X87,
            Unit::Mmx | Unit::MmxSse => component::X87 | component::SSE,
            Unit::Sse => component::SSE,
            // VEX instructions clear what lies above their vectors.
            Unit::Avx => component::SSE | component::AVX | enabled & component::ZMM_HIGH,
            Unit::Avx512 => component::AVX512,
            Unit::General => 0,
        }
    }

    /// True where SIMD floating-point exceptions are possible.
    pub fn simd(self) -> bool {
        use Unit::*;
        matches!(self, Mmx | MmxSse | Sse | Avx | Avx512)
    }

    /// #UD or #NM where the guest has not switched the unit on; #MF where an x87 exception is pending.
    pub fn check(self, cpu: &Cpu) -> Result<(), Exception> {
        match self {
            Unit::General => Ok(()),
            Unit::X87 => check_x87(cpu, Cr0::EM | Cr0::TS).and_then(|()| check_pending(cpu)),
            Unit::X87Control => check_x87(cpu, Cr0::EM | Cr0::TS),
            Unit::Wait => {
                if cpu.cr0.contains(Cr0::MP | Cr0::TS) {
                    return Err(Exception::NM);
                }
                check_pending(cpu)
            }
            Unit::Mmx => {
                check_not_emulated(cpu)?;
                check_switched(cpu)?;
                check_pending(cpu)
            }
            Unit::MmxSse => Unit::Sse.check(cpu).and_then(|()| check_pending(cpu)),
            Unit::Sse => {
                check_not_emulated(cpu)?;
                require(cpu.cr4.contains(Cr4::OSFXSR))?;
                check_switched(cpu)
            }
            Unit::Avx => check_extended(cpu, component::SSE | component::AVX),
            Unit::Avx512 => check_extended(cpu, component::AVX512),
        }
    }
}

fn is_x87(f: CpuidFeature) -> bool {
    matches!(
        f,
        CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387
    )
}

fn is_sse(f: CpuidFeature) -> bool {
    use CpuidFeature::*;
    matches!(
        f,
        SSE | SSE2 | SSE3 | SSSE3 | SSE4_1 | SSE4_2 | SSE4A | AES | PCLMULQDQ | SHA | GFNI
    )
}

fn require(b: bool) -> Result<(), Exception> {
    if b { Ok(()) } else { Err(Exception::UD) }
}

fn check_x87(cpu: &Cpu, bits: Cr0) -> Result<(), Exception> {
    if cpu.cr0.intersects(bits) {
        Err(Exception::NM)
    } else {
        Ok(())
    }
}

/// #UD where CR0.EM is set.
pub(super) fn check_not_emulated(cpu: &Cpu) -> Result<(), Exception> {
    require(!cpu.cr0.contains(Cr0::EM))
}

/// #NM where CR0.TS is set.
pub(super) fn check_switched(cpu: &Cpu) -> Result<(), Exception> {
    check_x87(cpu, Cr0::TS)
}

fn check_extended(cpu: &Cpu, components: u64) -> Result<(), Exception> {
    require(cpu.cr4.contains(Cr4::OSXSAVE) && cpu.xcr0 & components == components)?;
    check_switched(cpu)
}

/// From floating point in memory or an XMM register (Intel SDM vol. 3A, table 2-3: CR4.OSFXSR).
fn converts_to_mmx(i: &Instruction) -> bool {
    use Mnemonic::{Cvtpd2pi, Cvtps2pi, Cvttpd2pi, Cvttps2pi};
    matches!(i.mnemonic(), Cvtpd2pi | Cvtps2pi | Cvttpd2pi | Cvttps2pi)
}

/// #MF where the x87 status word has an unmasked exception pending.
fn check_pending(cpu: &Cpu) -> Result<(), Exception> {
    match numeric_error::is_pending(cpu) {
        true => Err(Exception::MF),
        false => Ok(()),
    }
}

/// What the host has, asked once: where it is a virtual machine itself, CPUID leaves it, for as long as a thousand instructions take or more.
#[derive(Debug, Default)]
pub(super) struct HostFeatures(HashMap<CpuidFeature, bool>);

impl HostFeatures {
    /// True where the host has everything that the instruction asks for. What is not known here counts as missing.
    pub fn cover(&mut self, i: &Instruction) -> bool {
        let mut has = |f| *self.0.entry(f).or_insert_with(|| host_feature(f));
        i.cpuid_features().iter().all(|f| has(*f))
    }
}

fn host_feature(f: CpuidFeature) -> bool {
    use CpuidFeature::*;
    let place = match f {
        INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | X64 | CMOV | FPU | FPU287
        | FPU387 | MMX | SSE | SSE2 => return true,
        _ => instruction_set::native(f),
    };
    place.is_some_and(|place| {
        let known = arch_host::cpuid(place.leaf & 0x8000_0000, 0).eax >= place.leaf;
        let sub_known = place.subleaf == 0 || arch_host::cpuid(place.leaf, 0).eax >= place.subleaf;
        known && sub_known && place.is_in(&arch_host::cpuid)
    })
}
