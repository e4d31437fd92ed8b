//! Model-specific registers: what exists, what may be written, what a write does.
//!
//! A table names those that are storage or constants. The rest is in [`read_special`] and [`write_special`]. An MSR that is
//! nowhere raises #GP(0), as on hardware; which ones Debian's kernels access without expecting that decided what is here.
//! Sources: Intel SDM vol. 4; AMD APM vol. 2 appendix A; Linux msr-index.h.

use crate::interpret::components_in_use;
use crate::monitor_wait::MISC_ENABLE_MONITOR;
use crate::state::Msrs;
use crate::vendor::Vendor;
use crate::{Bus, Cpu, Cr0, Efer, Exception, Seg, mtrr, pmu};

const APIC_BASE: u32 = 0x1b;
/// IA32_APIC_BASE: the local APIC is on.
const APIC_ENABLE: u64 = 1 << 11;
const TSC_DEADLINE: u32 = 0x6e0;
const X2APIC: std::ops::RangeInclusive<u32> = 0x800..=0x8ff;
const TSC: u32 = 0x10;
const TSC_ADJUST: u32 = 0x3b;
const PRED_CMD: u32 = 0x49;
/// IA32_PRED_CMD: indirect branch prediction barrier.
const IBPB: u64 = 1;
const KVM_WALL_CLOCK_OLD: u32 = 0x11;
const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
const KVM_PV_EOI: u32 = 0x4b56_4d04;
const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
const PLATFORM_INFO: u32 = 0xce;
/// How deep MWAIT sleeps, which is the host's affair: Linux's driver for Intel's processors reads and writes both.
const CST_CONFIG_CONTROL: u32 = 0xe2;
const POWER_CTL: u32 = 0x1fc;
const PAT: u32 = 0x277;
const EFER: u32 = 0xc000_0080;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;

/// What may be written to a storage MSR.
#[derive(Clone, Copy)]
enum Accepts {
    Any,
    /// A canonical address; else #GP(0).
    Canonical,
    /// These bits; others raise #GP(0).
    Bits(u64),
    /// The low half; the rest is dropped.
    Low32,
}

/// An MSR that is a field of [`Msrs`].
struct Stored {
    msr: u32,
    field: fn(&mut Msrs) -> &mut u64,
    accepts: Accepts,
    /// `None`: every vendor.
    vendor: Option<Vendor>,
}

macro_rules! stored {
    ($msr:expr, $field:ident, $accepts:expr, $vendor:expr) => {
        Stored {
            msr: $msr,
            field: |m| &mut m.$field,
            accepts: $accepts,
            vendor: $vendor,
        }
    };
}

use Accepts::{Any, Bits, Canonical, Low32};
const INTEL: Option<Vendor> = Some(Vendor::Intel);
const AMD: Option<Vendor> = Some(Vendor::Amd);

const STORED: &[Stored] = &[
    stored!(0xc000_0081, star, Any, None),
    stored!(0xc000_0082, lstar, Canonical, None),
    stored!(0xc000_0083, cstar, Canonical, None),
    stored!(0xc000_0084, sfmask, Low32, None),
    stored!(0xc000_0102, kernel_gs_base, Canonical, None),
    stored!(0xc000_0103, tsc_aux, Bits(u32::MAX as u64), INTEL),
    stored!(0xc000_0103, tsc_aux, Low32, None),
    stored!(0x174, sysenter_cs, Low32, None),
    stored!(0x175, sysenter_esp, Canonical, None),
    stored!(0x176, sysenter_eip, Canonical, None),
    stored!(0x1a0, misc_enable, Bits(MISC_ENABLE), INTEL),
    // IBRS, STIBP, BHI_DIS_S.
    stored!(0x48, spec_ctrl, Bits(1 << 10 | 0b11), INTEL),
    // LBR and BTF.
    stored!(0x1d9, debugctl, Bits(0b11), None),
    stored!(0x17a, mcg_status, Bits(0b111), None),
    // IA32_BIOS_SIGN_ID: written with 0 before CPUID, then read.
    stored!(0x8b, microcode, Any, None),
    stored!(0xc001_0015, hwcr, Any, AMD),
    stored!(0xc001_0010, syscfg, Any, AMD),
    stored!(0xc001_001f, northbridge_cfg, Any, AMD),
    stored!(0xc001_1020, ls_cfg, Any, AMD),
    stored!(0xc001_1029, decode_cfg, Any, AMD),
];

/// IA32_MISC_ENABLE: fast strings (0), automatic thermal control (3), performance monitoring (7), BTS and PEBS unavailable (11, 12), SpeedStep
/// (16), MONITOR (18), limit CPUID (22), xTPR disable (23), XD disable (34).
const MISC_ENABLE: u64 = 0x4_00c5_1889;
/// There is performance monitoring, without BTS and PEBS.
const MISC_ENABLE_COUNTERS: u64 = 1 << 7 | 1 << 11 | 1 << 12;

/// What a write to a constant MSR does.
#[derive(Clone, Copy, PartialEq, Eq)]
enum OnWrite {
    Fault,
    Ignore,
}

/// RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO,
/// PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
const ARCH_CAPABILITIES: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// MSR, value, what a write does, whose.
const CONSTANTS: &[(u32, u64, OnWrite, Option<Vendor>)] = &[
    // IA32_MTRRCAP.
    (0xfe, mtrr::CAPABILITIES, OnWrite::Fault, None),
    // IA32_MCG_CAP: no banks.
    (0x179, 0, OnWrite::Fault, None),
    // IA32_FEATURE_CONTROL: locked.
    (0x3a, 1, OnWrite::Fault, INTEL),
    (0x10a, ARCH_CAPABILITIES, OnWrite::Fault, INTEL),
    // IA32_PLATFORM_ID, MSR_EBL_CR_POWERON.
    (0x17, 0, OnWrite::Fault, INTEL),
    (0x2a, 0, OnWrite::Ignore, INTEL),
    // MSR_SMI_COUNT: none.
    (0x34, 0, OnWrite::Fault, INTEL),
    // P5_MC_ADDR, P5_MC_TYPE.
    (0x0, 0, OnWrite::Ignore, None),
    (0x1, 0, OnWrite::Ignore, None),
    // IA32_PERF_STATUS, IA32_THERM_STATUS: nothing to report.
    (0x198, 0, OnWrite::Fault, None),
    (0x19c, 0, OnWrite::Ignore, None),
    // Last branch and last exception records.
    (0x1db, 0, OnWrite::Ignore, None),
    (0x1dc, 0, OnWrite::Ignore, None),
    (0x1dd, 0, OnWrite::Ignore, None),
    (0x1de, 0, OnWrite::Ignore, None),
    // AMD: TOP_MEM and TOP_MEM2 (the firmware describes memory), interrupt pending (C1E), FIDVID status, patch loader.
    (0xc001_001a, 0, OnWrite::Ignore, AMD),
    (0xc001_001d, 0, OnWrite::Ignore, AMD),
    (0xc001_0055, 0, OnWrite::Ignore, AMD),
    (0xc001_0020, 0, OnWrite::Ignore, AMD),
    // VM_CR: SVM disabled and locked; VM_HSAVE_PA.
    (0xc001_0114, 0x18, OnWrite::Ignore, AMD),
    (0xc001_0117, 0, OnWrite::Ignore, AMD),
    // BU_CFG2, IC_CFG, DC_CFG.
    (0xc001_102a, 0, OnWrite::Ignore, AMD),
    (0xc001_1021, 0, OnWrite::Ignore, AMD),
    (0xc001_1022, 0, OnWrite::Ignore, AMD),
];

const GP0: Exception = Exception::gp(0);

/// RDMSR. The caller checked the CPL.
pub(crate) fn read(cpu: &mut Cpu, bus: &mut dyn Bus, msr: u32) -> Result<u64, Exception> {
    cpu.counters.msr_accesses += 1;
    read_option(cpu, bus, msr).ok_or(GP0)
}

/// WRMSR. The caller checked the CPL.
pub(crate) fn write(cpu: &mut Cpu, bus: &mut dyn Bus, msr: u32, v: u64) -> Result<(), Exception> {
    cpu.counters.msr_accesses += 1;
    write_option(cpu, bus, msr, v).ok_or(GP0)
}

fn is_apic(msr: u32) -> bool {
    msr == APIC_BASE || msr == TSC_DEADLINE || X2APIC.contains(&msr)
}

fn has(cpu: &Cpu, vendor: Option<Vendor>) -> bool {
    vendor.is_none_or(|v| v == cpu.cpuid.vendor())
}

fn find_stored(cpu: &Cpu, msr: u32) -> Option<&'static Stored> {
    STORED.iter().find(|s| s.msr == msr && has(cpu, s.vendor))
}

fn find_constant(cpu: &Cpu, msr: u32) -> Option<(u64, OnWrite)> {
    CONSTANTS
        .iter()
        .find(|c| c.0 == msr && has(cpu, c.3))
        .map(|c| (c.1, c.2))
}

fn read_option(cpu: &mut Cpu, bus: &mut dyn Bus, msr: u32) -> Option<u64> {
    if is_apic(msr) {
        return bus.apic_msr_read(msr);
    }
    if mtrr::is_mtrr(msr) {
        return mtrr::read(cpu, msr);
    }
    if let Some(s) = find_stored(cpu, msr) {
        return Some(*(s.field)(&mut cpu.msr));
    }
    match find_constant(cpu, msr) {
        Some((v, _)) => Some(v),
        None => read_special(cpu, msr).or_else(|| pmu::read_msr(cpu, msr)),
    }
}

fn read_special(cpu: &Cpu, msr: u32) -> Option<u64> {
    Some(match msr {
        TSC => cpu.tsc_now(),
        TSC_ADJUST => cpu.msr.tsc_adjust,
        PAT => cpu.msr.pat,
        EFER => cpu.efer.bits(),
        FS_BASE => cpu.segment(Seg::Fs).base,
        GS_BASE => cpu.segment(Seg::Gs).base,
        KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => cpu.msr.kvm_system_time,
        KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => cpu.msr.kvm_wall_clock,
        KVM_STEAL_TIME => cpu.msr.kvm_steal_time,
        KVM_PV_EOI => cpu.msr.kvm_pv_eoi,
        CST_CONFIG_CONTROL | POWER_CTL if has(cpu, INTEL) && cpu.cpuid.has_monitor() => 0,
        // Bits 15:8: the TSC's ratio to a 100 MHz bus clock.
        PLATFORM_INFO if has(cpu, INTEL) => ((cpu.tsc_hz / 100_000_000) & 0xff) << 8,
        _ => return None,
    })
}

fn write_option(cpu: &mut Cpu, bus: &mut dyn Bus, msr: u32, v: u64) -> Option<()> {
    if is_apic(msr) {
        // SDM volume 3, 11.4.4: the page's address has as many bits as physical addresses.
        if msr == APIC_BASE && v >> cpu.physical_bits != 0 {
            return None;
        }
        let now = cpu.tsc_now();
        bus.apic_msr_write(msr, v, now)?;
        if msr == APIC_BASE {
            cpu.apic_enabled = v & APIC_ENABLE != 0;
        }
        return Some(());
    }
    if mtrr::is_mtrr(msr) {
        return mtrr::write(cpu, msr, v);
    }
    if let Some(s) = find_stored(cpu, msr) {
        let v = accepted(cpu, s.accepts, v)?;
        *(s.field)(&mut cpu.msr) = v;
        return Some(());
    }
    match find_constant(cpu, msr) {
        Some((_, OnWrite::Ignore)) => Some(()),
        Some((_, OnWrite::Fault)) => None,
        None => write_special(cpu, bus, msr, v),
    }
}

fn accepted(cpu: &Cpu, accepts: Accepts, v: u64) -> Option<u64> {
    match accepts {
        Any => Some(v),
        Canonical => cpu.canonical_in_register(v).then_some(v),
        Bits(allowed) => (v & !allowed == 0).then_some(v),
        Low32 => Some(v & 0xffff_ffff),
    }
}

fn write_special(cpu: &mut Cpu, bus: &mut dyn Bus, msr: u32, v: u64) -> Option<()> {
    match msr {
        // There is no predictor to guard here, and nothing to read.
        PRED_CMD if cpu.cpuid.vendor() == Vendor::Intel => return (v & !IBPB == 0).then_some(()),
        TSC | TSC_ADJUST => {
            if msr == TSC {
                cpu.write_tsc(v);
            } else {
                cpu.write_tsc_adjust(v);
            }
            bus.tsc_moved(cpu.tsc_now());
            cpu.refresh_kvm_clock(bus);
        }
        PAT if mtrr::valid_pat(v) => cpu.msr.pat = v,
        EFER => return write_efer(cpu, v),
        FS_BASE if cpu.canonical_in_register(v) => cpu.seg[Seg::Fs as usize].base = v,
        GS_BASE if cpu.canonical_in_register(v) => cpu.seg[Seg::Gs as usize].base = v,
        KVM_SYSTEM_TIME | KVM_SYSTEM_TIME_OLD => cpu.write_kvm_system_time(bus, v),
        KVM_WALL_CLOCK | KVM_WALL_CLOCK_OLD => cpu.write_kvm_wall_clock(bus, v),
        KVM_STEAL_TIME => return cpu.write_steal_time_msr(v),
        KVM_PV_EOI => return cpu.write_kvm_pv_eoi(bus, v),
        PLATFORM_INFO if has(cpu, INTEL) => {}
        CST_CONFIG_CONTROL | POWER_CTL if has(cpu, INTEL) && cpu.cpuid.has_monitor() => {}
        _ => return pmu::write_msr(cpu, msr, v),
    }
    Some(())
}

fn write_efer(cpu: &mut Cpu, v: u64) -> Option<()> {
    let mut writable = Efer::SCE | Efer::LME | Efer::NXE;
    writable.set(Efer::AUTOIBRS, cpu.cpuid.traits().automatic_ibrs);
    let new = Efer::from_bits_retain(v);
    if !(writable | Efer::LMA).contains(new) {
        return None;
    }
    let changed = cpu.efer ^ new;
    if changed.contains(Efer::LME) && cpu.cr0.contains(Cr0::PG) {
        return None;
    }
    // LMA is read only: writes to it are ignored.
    cpu.efer = (new & writable) | (cpu.efer & Efer::LMA);
    if changed.contains(Efer::NXE) {
        cpu.flush_tlb(true);
    }
    Some(())
}

/// What CPUID(1) does beside its answer: IA32_BIOS_SIGN_ID, which software has cleared, tells the revision again (Intel SDM vol. 3A, 10.11.7.1).
pub(crate) fn load_microcode_revision(cpu: &mut Cpu) {
    if has(cpu, INTEL) {
        cpu.msr.microcode = cpu.cpuid.traits().microcode_revision;
    }
}

/// SWAPGS. The caller checked the CPL.
pub(crate) fn swap_gs(cpu: &mut Cpu) {
    std::mem::swap(
        &mut cpu.seg[Seg::Gs as usize].base,
        &mut cpu.msr.kernel_gs_base,
    );
}

/// XSETBV: XCR0 with a sane combination of the components that CPUID shows. The caller checked the CPL.
pub(crate) fn write_xcr(cpu: &mut Cpu, n: u64, v: u64) -> Result<(), Exception> {
    const X87: u64 = 1;
    const SSE: u64 = 1 << 1;
    const AVX: u64 = 1 << 2;
    const AVX512: u64 = 0xe0;
    let avx_without_sse = v & AVX != 0 && v & SSE == 0;
    let avx512 = v & AVX512;
    let partial_avx512 = avx512 != 0 && (avx512 != AVX512 || v & AVX == 0);
    let invalid =
        n != 0 || v & X87 == 0 || v & !cpu.cpuid.xcr0() != 0 || avx_without_sse || partial_avx512;
    if invalid {
        return Err(GP0);
    }
    cpu.xcr0 = v;
    Ok(())
}

/// XGETBV: XCR0, or with ECX = 1, where the processor has that, the components of it in use (Intel SDM vol. 1, 13.2).
pub(crate) fn read_xcr(cpu: &Cpu, n: u64) -> Result<u64, Exception> {
    match n {
        0 => Ok(cpu.xcr0),
        1 if cpu.cpuid.tells_components_in_use() => Ok(cpu.xcr0 & components_in_use(cpu)),
        _ => Err(GP0),
    }
}

/// The reset values that depend on the processor model.
pub(crate) fn reset(cpu: &mut Cpu) {
    const TSC_RATIO_FIXED: u64 = 1 << 24;
    const LFENCE_SERIALIZING: u64 = 1 << 1;
    cpu.msr.hwcr = TSC_RATIO_FIXED;
    cpu.msr.decode_cfg = LFENCE_SERIALIZING;
    if cpu.cpuid.has_monitor() {
        cpu.msr.misc_enable |= MISC_ENABLE_MONITOR;
    }
    if cpu.cpuid.has_counters() {
        cpu.msr.misc_enable |= MISC_ENABLE_COUNTERS;
    }
    cpu.msr.microcode = cpu.cpuid.traits().microcode_revision;
}

#[cfg(test)]
#[path = "msr_tests.rs"]
mod tests;
