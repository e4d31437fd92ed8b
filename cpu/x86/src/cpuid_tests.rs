//! CPUID: consistent within itself, whatever the host.

use std::sync::Arc;

use super::*;
use crate::testing::{AMD, INTEL, TSC_HZ, host_leaf, model, reset};

fn cpu_of(vendor: &'static [u8; 12], cpus: u32, id: u32) -> Box<Cpu> {
    let mut cpu = reset(vendor);
    cpu.cpuid = Arc::new(model(vendor, cpus));
    cpu.id = id;
    cpu
}

fn bit(word: u32, n: u32) -> bool {
    word >> n & 1 != 0
}

#[test]
fn what_does_not_work_is_hidden_even_where_the_host_has_it() {
    for vendor in [INTEL, AMD] {
        let cpu = cpu_of(vendor, 1, 0);
        let l1 = cpu.cpuid(1, 0);
        // MONITOR, VMX, SMX, PDCM, OSXSAVE (not yet enabled).
        for n in [3, 5, 6, 15, 27] {
            assert!(!bit(l1.ecx, n), "leaf 1 ECX {n}");
        }
        let l7 = cpu.cpuid(7, 0);
        // SGX, HLE, RTM, MPX, PT.
        for n in [2, 4, 11, 14, 25] {
            assert!(!bit(l7.ebx, n), "leaf 7 EBX {n}");
        }
        // PKU, OSPKE, WAITPKG, CET_SS, TME, LA57, KL, SGX_LC, PKS.
        for n in [3, 4, 5, 7, 13, 16, 23, 30, 31] {
            assert!(!bit(l7.ecx, n), "leaf 7 ECX {n}");
        }
        // UINTR, CET_IBT, AMX.
        for n in [5, 20, 22, 24, 25] {
            assert!(!bit(l7.edx, n), "leaf 7 EDX {n}");
        }
        for leaf in [5, 9, 0xa, 0xf, 0x10, 0x12, 0x14, 0x17, 0x1a, 0x1c, 0x1d] {
            assert_eq!(cpu.cpuid(leaf, 0), CpuidLeaf::default(), "leaf {leaf:#x}");
        }
        let ext = cpu.cpuid(0x8000_0001, 0);
        // SVM, EXTAPIC, OSVW, IBS, SKINIT, WDT, LWP, PERFCTR, MWAITX.
        for n in [2, 3, 9, 10, 12, 13, 15, 23, 24, 26, 28, 29] {
            assert!(!bit(ext.ecx, n), "extended ECX {n}");
        }
        assert!(!bit(ext.edx, 25), "FFXSR");
        if vendor == AMD {
            assert_eq!(cpu.cpuid(0x8000_000a, 0), CpuidLeaf::default());
        }
    }
}

#[test]
fn what_is_emulated_is_offered_on_every_host() {
    let bare = |leaf, subleaf| match leaf {
        0 | 0x8000_0000 => host_leaf(AMD, leaf, subleaf),
        _ => CpuidLeaf::default(),
    };
    let mut cpu = reset(AMD);
    cpu.cpuid = Arc::new(CpuidModel::from_host(&bare, 0, TSC_HZ, 1));
    let l1 = cpu.cpuid(1, 0);
    // PCID, x2APIC, TSC deadline, hypervisor; no XSAVE.
    for n in [17, 21, 24, 31] {
        assert!(bit(l1.ecx, n));
    }
    assert!(!bit(l1.ecx, 26) && !bit(l1.ecx, 28));
    let l7 = cpu.cpuid(7, 0);
    for n in [0, 1, 7, 10, 20] {
        assert!(bit(l7.ebx, n));
    }
    assert!(bit(l7.ecx, 2) && bit(l7.ecx, 22));
    let ext = cpu.cpuid(0x8000_0001, 0);
    for n in [11, 20, 26, 27, 29] {
        assert!(bit(ext.edx, n));
    }
    assert!(bit(cpu.cpuid(0x8000_0007, 0).edx, 8));
    assert!(bit(cpu.cpuid(6, 0).eax, 2));
    assert_eq!(cpu.cpuid(0xd, 0), CpuidLeaf::default());
}

/// Intel SDM vol. 2A, CPUID: bit 11 is there in 64-bit mode alone.
#[test]
fn syscall_is_told_of_where_it_is() {
    let told = |cpu: &Cpu| bit(cpu.cpuid(0x8000_0001, 0).edx, 11);
    assert!(!told(&reset(INTEL)) && told(&reset(AMD)));
    assert!(!told(&crate::testing::protected_mode()));
    assert!(told(&crate::testing::long_mode(INTEL)));
}

#[test]
fn simd_goes_with_the_registers_that_the_host_enables() {
    let read = |leaf, subleaf| host_leaf(INTEL, leaf, subleaf);
    for (host_xcr0, xcr0, avx, avx512) in [
        (0x3, 0x3, false, false),
        (0x7, 0x7, true, false),
        (0x27, 0x7, true, false),
        (0x602e7, 0xe7, true, true),
    ] {
        let m = CpuidModel::from_host(&read, host_xcr0, TSC_HZ, 1);
        assert_eq!(m.xcr0(), xcr0);
        let l7 = m.get(7, 0);
        assert_eq!((bit(m.get(1, 0).ecx, 28), bit(l7.ebx, 5)), (avx, avx));
        for n in [16, 17, 21, 28, 30, 31] {
            assert_eq!(bit(l7.ebx, n), avx512);
        }
        assert_eq!((bit(l7.ecx, 9), bit(l7.ecx, 6)), (avx, avx512));
        assert_eq!(bit(m.get(7, 1).eax, 5), avx512);
        assert_eq!(m.get(0xd, 0).eax, xcr0 as u32);
        // BMI and SHA need no such registers.
        assert!(bit(l7.ebx, 3) && bit(l7.ebx, 29));
    }
}

#[test]
fn leaf_d_follows_xcr0_and_osxsave_follows_cr4() {
    let mut cpu = cpu_of(INTEL, 1, 0);
    let sizes = |cpu: &Cpu| {
        let (now, compacted) = (cpu.cpuid(0xd, 0), cpu.cpuid(0xd, 1));
        assert_eq!((now.eax, now.ecx, now.edx), (0xe7, 0xa80, 0));
        assert_eq!(compacted.eax, 7, "no XSAVES");
        (now.ebx, compacted.ebx)
    };
    assert_eq!(sizes(&cpu), (0x240, 0x240));
    cpu.xcr0 = 7;
    assert_eq!(sizes(&cpu), (0x340, 0x340));
    cpu.xcr0 = 0xe7;
    // The standard format has a gap where MPX would be.
    assert_eq!(sizes(&cpu), (0xa80, 0x980));
    assert_eq!(cpu.cpuid(0xd, 5).ebx, 0x440);
    for hidden in [3, 4, 8, 9, 17, 18] {
        assert_eq!(cpu.cpuid(0xd, hidden), CpuidLeaf::default());
    }
    assert!(!bit(cpu.cpuid(1, 0).ecx, 27));
    cpu.cr4 |= Cr4::OSXSAVE;
    assert!(bit(cpu.cpuid(1, 0).ecx, 27));
}

#[test]
fn topology_agrees_across_leaves() {
    for vendor in [INTEL, AMD] {
        for cpus in [1, 2, 3, 4, 6, 8, 255] {
            for id in [0, cpus - 1] {
                let cpu = cpu_of(vendor, cpus, id);
                let l1 = cpu.cpuid(1, 0);
                assert_eq!((l1.ebx >> 24, l1.ebx >> 16 & 0xff), (id, cpus));
                assert_eq!(bit(l1.edx, 28), cpus > 1);
                let (smt, core) = (cpu.cpuid(0xb, 0), cpu.cpuid(0xb, 1));
                assert_eq!((smt.eax, smt.ebx, smt.ecx, smt.edx), (0, 1, 0x100, id));
                assert_eq!((core.ebx, core.ecx, core.edx), (cpus, 0x201, id));
                assert!(1 << core.eax >= cpus && (core.eax == 0 || 1 << (core.eax - 1) < cpus));
                assert_eq!(cpu.cpuid(0xb, 2).ebx, 0);
                if vendor == AMD {
                    let sizes = cpu.cpuid(0x8000_0008, 0).ecx;
                    assert_eq!((sizes & 0xff, sizes >> 12 & 15), (cpus - 1, core.eax));
                    let l1e = cpu.cpuid(0x8000_001e, 0);
                    assert_eq!((l1e.eax, l1e.ebx, l1e.ecx), (id, id, 0));
                    assert_eq!(cpu.cpuid(0x8000_001d, 3).eax >> 14 & 0xfff, cpus - 1);
                    assert_eq!(cpu.cpuid(0x8000_001d, 2).eax >> 14 & 0xfff, 0);
                } else {
                    let l3 = cpu.cpuid(4, 3).eax;
                    assert!(l3 >> 14 & 0xfff >= cpus - 1);
                    assert_eq!(cpu.cpuid(4, 0).eax >> 14 & 0xfff, 0);
                    assert_eq!(cpu.cpuid(4, 4).eax & 0x1f, 0);
                }
            }
        }
    }
}

#[test]
fn the_tsc_frequency_is_said_three_times_and_the_same() {
    let cpu = cpu_of(INTEL, 1, 0);
    let l = cpu.cpuid(0x15, 0);
    let hz = u64::from(l.ecx) * u64::from(l.ebx) / u64::from(l.eax);
    assert_eq!(hz, TSC_HZ);
    assert_eq!(u64::from(cpu.cpuid(0x4000_0010, 0).eax) * 1000, TSC_HZ);
    assert_eq!(u64::from(cpu.cpuid(0x16, 0).eax) * 1_000_000, TSC_HZ);
    assert_eq!(u64::from(l.ecx), APIC_BUS_HZ);
    assert_eq!(cpu.tsc_hz, TSC_HZ);
}

#[test]
fn the_hypervisor_is_kvm() {
    let cpu = cpu_of(AMD, 1, 0);
    let l = cpu.cpuid(0x4000_0000, 0);
    let name: Vec<u8> = [l.ebx, l.ecx, l.edx]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .collect();
    assert_eq!(
        (name.as_slice(), l.eax),
        (b"KVMKVMKVM\0\0\0".as_slice(), 0x4000_0010)
    );
    assert_eq!(cpu.cpuid(0x4000_0001, 0).eax, 0x0100_006b);
    assert_eq!(cpu_of(AMD, 2, 0).cpuid(0x4000_0001, 0).eax, 0x0100_2aeb);
}

#[test]
fn mitigations_are_said_to_be_needless() {
    let amd = cpu_of(AMD, 1, 0);
    let sizes = amd.cpuid(0x8000_0008, 0);
    assert!(bit(sizes.ebx, 26) && bit(sizes.ebx, 29), "SSB_NO, BTC_NO");
    // IBPB, IBRS, STIBP, SSBD and VIRT_SSBD have no MSRs behind them.
    for n in [12, 14, 15, 24, 25] {
        assert!(!bit(sizes.ebx, n));
    }
    let l21 = amd.cpuid(0x8000_0021, 0).eax;
    assert!(
        bit(l21, 8) && bit(l21, 29) && bit(l21, 2),
        "AutoIBRS, SRSO_NO, LFENCE"
    );
    assert!(!bit(amd.cpuid(7, 0).edx, 29));
    let intel = cpu_of(INTEL, 1, 0);
    assert!(bit(intel.cpuid(7, 0).edx, 29) && bit(intel.cpuid(7, 0).edx, 26));
    assert!(!bit(intel.cpuid(7, 0).edx, 31), "SSBD");
    assert_eq!((intel.cpuid(7, 0).eax, intel.cpuid(7, 2).edx), (2, 0x30));
    assert_eq!(amd.cpuid(7, 2), CpuidLeaf::default());
}

#[test]
fn leaves_out_of_range_answer_as_the_vendor_does() {
    let intel = cpu_of(INTEL, 1, 0);
    let highest = intel.cpuid(0, 0).eax;
    assert_eq!(intel.cpuid(highest + 1, 0), intel.cpuid(highest, 0));
    assert_eq!(intel.cpuid(0x8000_0fff, 0), intel.cpuid(highest, 0));
    let amd = cpu_of(AMD, 1, 0);
    assert_eq!(amd.cpuid(0x8000_0fff, 0), CpuidLeaf::default());
    assert_eq!(amd.cpuid(0x4000_0fff, 0), CpuidLeaf::default());
}

#[test]
fn the_real_host_gives_a_model_that_is_consistent() {
    let m = CpuidModel::host(2);
    let host = arch_host::cpuid(0, 0);
    assert_eq!(m.get(0, 0).ebx, host.ebx);
    assert!((36..=46).contains(&m.physical_bits()));
    assert_eq!(m.signature(), arch_host::cpuid(1, 0).eax);
    assert_eq!(m.xcr0() & !arch_host::xcr0(), 0);
    let ram = Arc::new(doppel_memory::GuestRam::new(1 << 20).expect("RAM"));
    let cpu = Cpu::with_model(1, ram, Arc::new(m));
    // No user-visible instruction set that the host lacks, where the processor may run the code itself.
    let l1 = cpu.cpuid(1, 0).ecx & feature::LEAF1_ECX.keep;
    assert_eq!(l1 & !arch_host::cpuid(1, 0).ecx, 0);
    let l7 = cpu.cpuid(7, 0).ebx & feature::LEAF7_EBX.keep;
    assert_eq!(l7 & !arch_host::cpuid(7, 0).ebx, 0);
    assert!(cpu.tsc_now() < 60 * cpu.tsc_hz);
}

#[test]
fn ospke_and_the_area_follow_protection_keys() {
    let read = |leaf, subleaf| host_leaf(INTEL, leaf, subleaf);
    let mut cpu = cpu_of(INTEL, 1, 0);
    cpu.cpuid = Arc::new(model(INTEL, 1).with_protection_keys(&read).unwrap());
    assert!(bit(cpu.cpuid(7, 0).ecx, 3) && !bit(cpu.cpuid(7, 0).ecx, 4));
    cpu.cr4 |= Cr4::PKE;
    assert!(bit(cpu.cpuid(7, 0).ecx, 4));
    cpu.xcr0 = 0x207;
    // In the compacted format it follows AVX's.
    assert_eq!(
        (cpu.cpuid(0xd, 0).ebx, cpu.cpuid(0xd, 1).ebx),
        (0xa88, 0x348)
    );
    // Without XSAVE there is no place for it.
    let bare = CpuidModel::from_host(&read, 0, TSC_HZ, 1);
    assert_eq!(bare.with_protection_keys(&read), None);
}
