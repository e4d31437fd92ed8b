//! The levels: what the psABI says of each and nothing else, the same on every host that can carry it.

use super::*;
use crate::testing::{AMD, INTEL, TSC_HZ, host_leaf, model};

const LEVELS: [CpuModel; 4] = [CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::V4];

fn level(level: CpuModel, cpus: u32) -> CpuidModel {
    CpuidModel::on(model(INTEL, cpus), level).expect("it has everything")
}

/// Feature words in which instruction sets are told of, without those that the monitor emulates everywhere.
fn sets(m: &CpuidModel) -> [u32; 5] {
    /// PCID, x2APIC, TSC deadline, hypervisor.
    const LEAF1_ECX: u32 = 1 << 17 | 1 << 21 | 1 << 24 | 1 << 31;
    /// FSGSBASE, TSC_ADJUST, SMEP, INVPCID, SMAP.
    const LEAF7_EBX: u32 = 1 | 1 << 1 | 1 << 7 | 1 << 10 | 1 << 20;
    /// UMIP, RDPID.
    const LEAF7_ECX: u32 = 1 << 2 | 1 << 22;
    [
        m.get(1, 0).ecx & !LEAF1_ECX,
        m.get(7, 0).ebx & !LEAF7_EBX,
        m.get(7, 0).ecx & !LEAF7_ECX,
        m.get(0x8000_0001, 0).ecx,
        m.get(0xd, 1).eax,
    ]
}

#[test]
fn a_level_has_what_the_psabi_says_and_nothing_else() {
    let bits = |list: &[u32]| list.iter().fold(0, |word, bit| word | 1 << bit);
    // SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT.
    let v2 = bits(&[0, 9, 13, 19, 20, 23]);
    // FMA, MOVBE, XSAVE, AVX, F16C.
    let v3 = v2 | bits(&[12, 22, 26, 28, 29]);
    // BMI1, AVX2, BMI2.
    let v3_7 = bits(&[3, 5, 8]);
    // F, DQ, CD, BW, VL.
    let v4_7 = v3_7 | bits(&[16, 17, 28, 30, 31]);
    let expected = [
        [0, 0, 0, 0, 0],
        [v2, 0, 0, bits(&[0]), 0],
        [v3, v3_7, 0, bits(&[0, 5]), 0],
        [v3, v4_7, 0, bits(&[0, 5]), 0],
    ];
    for (model, expected) in LEVELS.into_iter().zip(expected) {
        let m = level(model, 1);
        assert_eq!(sets(&m), expected, "{model}");
        // CMOV, CX8, FPU, FXSR, MMX, SSE, SSE2; SYSCALL, long mode.
        let edx = bits(&[15, 8, 0, 24, 23, 25, 26]);
        assert_eq!(m.get(1, 0).edx & edx, edx, "{model}");
        let extended = bits(&[11, 29]);
        assert_eq!(m.get(0x8000_0001, 0).edx & extended, extended, "{model}");
        assert_eq!(m.get(7, 1), CpuidLeaf::default(), "{model}");
    }
}

#[test]
fn a_level_is_the_same_on_every_host_that_can_carry_it() {
    let other = |leaf, subleaf| match (leaf, subleaf) {
        // Other family, model, TLBs, caches, address sizes, no features beyond those of the fourth level.
        (1, _) => CpuModel::V4.leaf(1, 0),
        (7, 0) => CpuModel::V4.leaf(7, 0),
        (4, _) | (0x8000_0002..=0x8000_0008, _) => CpuidLeaf::default(),
        (0x8000_0001, _) => CpuModel::V4.leaf(leaf, 0),
        _ => host_leaf(INTEL, leaf, subleaf),
    };
    let amd = |leaf, subleaf| host_leaf(AMD, leaf, subleaf);
    let intel = |leaf, subleaf| host_leaf(INTEL, leaf, subleaf);
    for cpus in [1, 2, 64] {
        for model in LEVELS {
            let on = |host: &dyn Fn(u32, u32) -> CpuidLeaf, xcr0| {
                let host = CpuidModel::from_host(host, xcr0, TSC_HZ, cpus);
                CpuidModel::on(host, model).expect("it has everything")
            };
            let first = on(&intel, 0xe7);
            assert_eq!(first, on(&intel, 0x602e7));
            assert_eq!(first, on(&other, 0xe7));
            assert_eq!(first, on(&amd, 0xe7));
        }
    }
}

#[test]
fn the_frequency_of_the_tsc_alone_is_the_hosts() {
    let at = |hz| {
        CpuidModel::on(
            CpuidModel::from_host(&|l, s| host_leaf(INTEL, l, s), 0xe7, hz, 2),
            CpuModel::V3,
        )
    };
    let (slow, fast) = (at(2_000_000_000).unwrap(), at(3_000_000_000).unwrap());
    for leaf in (0..0x20)
        .chain(0x4000_0000..0x4000_0011)
        .chain(0x8000_0000..0x8000_0022)
    {
        for subleaf in 0..8 {
            let frequency = [0x15, 0x16, 0x4000_0010].contains(&leaf);
            let same = slow.get(leaf, subleaf) == fast.get(leaf, subleaf);
            assert_eq!(same, !frequency || subleaf > 0, "{leaf:#x}.{subleaf}");
        }
    }
}

#[test]
fn a_host_that_cannot_carry_a_level_says_what_is_missing_and_what_it_can() {
    let old = |leaf, subleaf| match (leaf, subleaf) {
        (7, 0) => CpuModel::V3.leaf(7, 0),
        _ => host_leaf(INTEL, leaf, subleaf),
    };
    let error = |xcr0, model| {
        let host = CpuidModel::from_host(&old, xcr0, TSC_HZ, 1);
        CpuidModel::on(host, model)
            .map(|_| ())
            .unwrap_err()
            .to_string()
    };
    let v4 = error(0xe7, CpuModel::V4);
    for part in [
        "AVX512F, AVX512DQ, AVX512CD, AVX512BW, AVX512VL",
        "--cpu x86-64-v3",
    ] {
        assert!(v4.contains(part), "{v4}");
    }
    // An operating system without AVX.
    let v3 = error(0x3, CpuModel::V3);
    assert!(
        v3.contains("no FMA, AVX, F16C, AVX2; take --cpu x86-64-v2"),
        "{v3}"
    );
}

#[test]
fn a_host_that_lays_out_the_state_of_avx_512_otherwise_says_so() {
    let zen = |leaf, subleaf| match (leaf, subleaf) {
        (0xd, 5) => CpuidLeaf {
            ebx: 0x340,
            ..host_leaf(AMD, leaf, subleaf)
        },
        _ => host_leaf(AMD, leaf, subleaf),
    };
    let host = CpuidModel::from_host(&zen, 0xe7, TSC_HZ, 1);
    let error = CpuidModel::on(host.clone(), CpuModel::V4).unwrap_err();
    assert!(error.to_string().contains("Intel's layout"), "{error}");
    assert!(CpuidModel::on(host, CpuModel::V3).is_ok());
}

#[test]
fn names_are_the_psabis() {
    for model in CpuModel::ALL {
        assert_eq!(model.name().parse(), Ok(model));
    }
    let error = "help".parse::<CpuModel>().unwrap_err();
    assert!(
        CpuModel::ALL.iter().all(|m| error.contains(m.name())),
        "{error}"
    );
}

#[test]
fn extended_state_is_as_long_as_the_level_has_it() {
    for (model, xcr0, size) in [
        (CpuModel::V1, 0, 0),
        (CpuModel::V2, 0, 0),
        (CpuModel::V3, 0x7, 0x340),
        (CpuModel::V4, 0xe7, 0xa80),
    ] {
        let m = level(model, 1);
        assert_eq!((m.xcr0(), m.has_xsave()), (xcr0, xcr0 != 0));
        assert_eq!(m.get(0xd, 0).ecx, size, "{model}");
    }
}

fn with_keys(vendor: &'static [u8; 12]) -> CpuidModel {
    let choice: CpuChoice = "host,+pku".parse().unwrap();
    let read = |leaf, subleaf| host_leaf(vendor, leaf, subleaf);
    model(vendor, 1).with(choice, &read).unwrap()
}

#[test]
fn protection_keys_are_had_by_request() {
    for vendor in [INTEL, AMD] {
        let (without, m) = (model(vendor, 1), with_keys(vendor));
        assert!(!without.has_protection_keys() && m.has_protection_keys());
        assert_eq!(m.get(7, 0).ecx, without.get(7, 0).ecx | 1 << 3);
        assert_eq!((without.xcr0(), m.xcr0()), (0xe7, 0x2e7));
        let sizes = m.get(0xd, 0);
        assert_eq!((sizes.eax, sizes.ecx), (0x2e7, 0xa88));
        let place = m.get(0xd, 9);
        assert_eq!((place.eax, place.ebx, place.ecx), (8, 0xa80, 0));
        assert_eq!(
            without.with(CpuModel::Host.into(), &|_, _| unreachable!()),
            Ok(model(vendor, 1))
        );
    }
}

#[test]
fn a_host_without_protection_keys_says_so() {
    let choice: CpuChoice = "host,+pku".parse().unwrap();
    let old = |leaf, subleaf| match (leaf, subleaf) {
        (7, 0) => CpuModel::V3.leaf(7, 0),
        _ => host_leaf(INTEL, leaf, subleaf),
    };
    let error = model(INTEL, 1).with(choice, &old).unwrap_err().to_string();
    assert!(
        error.contains("cannot be host,+pku, for it has no PKU") && error.ends_with("--cpu host"),
        "{error}"
    );
}

#[test]
fn features_are_asked_for_by_name_and_with_the_hosts_processor_alone() {
    for text in ["host", "host,+pku", "x86-64-v3"] {
        let choice: CpuChoice = text.parse().unwrap();
        assert_eq!(choice.to_string(), text);
    }
    for (text, part) in [
        ("host,+smap", "write +pku"),
        ("host,pku", "write +pku"),
        ("host,", "write +pku"),
        ("x86-64-v3,+pku", "takes no features"),
        (",+pku", "x86-64-v4"),
    ] {
        let error = text.parse::<CpuChoice>().unwrap_err();
        assert!(error.contains(part), "{text}: {error}");
    }
}
