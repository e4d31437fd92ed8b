//! MSRs: which exist, what they take.

use super::*;
use crate::testing::{AMD, INTEL, TestBus, long_mode};

#[test]
fn unknown_registers_fault_and_say_nothing() {
    for vendor in [INTEL, AMD] {
        let (mut cpu, mut bus) = (long_mode(vendor), TestBus::default());
        for msr in [
            0x2,
            0x187,
            0x309,
            0x345,
            0x38f,
            0x480,
            0xc001_0200,
            0xdead_beef,
        ] {
            assert_eq!(read(&mut cpu, &mut bus, msr), Err(GP0), "{msr:#x}");
            assert_eq!(write(&mut cpu, &mut bus, msr, 0), Err(GP0), "{msr:#x}");
        }
    }
    let (mut intel, mut bus) = (long_mode(INTEL), TestBus::default());
    assert_eq!(read(&mut intel, &mut bus, 0xc001_0015), Err(GP0));
    let mut amd = long_mode(AMD);
    assert_eq!(read(&mut amd, &mut bus, 0x10a), Err(GP0));
}

#[test]
fn the_first_four_counters_of_amd_exist_and_count_nothing() {
    let (mut amd, mut intel) = (long_mode(AMD), long_mode(INTEL));
    let mut bus = TestBus::default();
    for msr in 0xc001_0000..=0xc001_0007 {
        assert_eq!(write(&mut amd, &mut bus, msr, 0x53_00c0), Ok(()));
        assert_eq!(read(&mut amd, &mut bus, msr), Ok(0), "{msr:#x}");
        assert_eq!(read(&mut intel, &mut bus, msr), Err(GP0), "{msr:#x}");
    }
}

#[test]
fn what_storage_takes_it_returns() {
    let (mut cpu, mut bus) = (long_mode(INTEL), TestBus::default());
    for (msr, v) in [
        (0xc000_0081, 0x0023_0010_0000_0000),
        (0xc000_0082, 0xffff_ffff_8100_0000),
        (0xc000_0084, 0x4_7700),
        (0xc000_0103, 5),
        (0x174, 0x10),
        (0x1a0, 0x1),
        (0x48, 1),
        (0x277, 0x0407_0506_0007_0106),
        (0x2ff, 0xc06),
        (0x200, 0xc000_0000),
        (0x201, 0x3fff_c000_0800),
        (0x26f, 0x0505_0505_0505_0505),
        (0x1b, 0xfee0_0900),
    ] {
        assert_eq!(write(&mut cpu, &mut bus, msr, v), Ok(()), "{msr:#x}");
        assert_eq!(read(&mut cpu, &mut bus, msr), Ok(v), "{msr:#x}");
    }
}

#[test]
fn reserved_bits_and_types_fault_and_change_nothing() {
    let (mut cpu, mut bus) = (long_mode(INTEL), TestBus::default());
    for (msr, v) in [
        (0xc000_0080, 1 << 1),
        (0xc000_0080, 1 << 12),
        (0xc000_0080, 1 << 21),
        (0x277, 0x0000_0000_0000_0002),
        (0x277, 0x0800_0000_0000_0000),
        (0x200, 0x2),
        (0x200, 1 << 46),
        (0x201, 1),
        (0x2ff, 0x1000),
        (0x2ff, 0x2),
        (0x250, 0x03),
        (0x48, 1 << 2),
        (0x1d9, 1 << 6),
        (0xfe, 0),
        (0x10a, 0),
        (0x832, 0),
        (0x1b, 1 << 46 | 0xfee0_0900),
    ] {
        let before = read(&mut cpu, &mut bus, msr);
        assert_eq!(
            write(&mut cpu, &mut bus, msr, v),
            Err(GP0),
            "{msr:#x} {v:#x}"
        );
        assert_eq!(read(&mut cpu, &mut bus, msr), before);
    }
}

#[test]
fn efer_guards_long_mode_and_knows_amds_automatic_ibrs() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    let efer = cpu.efer.bits();
    assert_eq!(write(&mut cpu, &mut bus, EFER, efer & !(1 << 8)), Err(GP0));
    assert_eq!(write(&mut cpu, &mut bus, EFER, efer & !(1 << 10)), Ok(()));
    assert_eq!(cpu.efer.bits(), efer, "LMA stays");
    assert_eq!(write(&mut cpu, &mut bus, EFER, efer | 1 << 21), Ok(()));
    assert_eq!(read(&mut cpu, &mut bus, EFER), Ok(efer | 1 << 21));
}

#[test]
fn linux_finds_what_it_reads_without_a_net() {
    // Read by rdmsrl (not rdmsrl_safe) on the way to user space.
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    for msr in [
        0xc001_0015,
        0xc001_0010,
        0xc001_1029,
        0xc001_1020,
        0x8b,
        0xfe,
        0x179,
        0x1d9,
        0x277,
        0x2ff,
    ] {
        assert!(read(&mut cpu, &mut bus, msr).is_ok(), "{msr:#x}");
    }
    // The TSC ticks at P0's rate, LFENCE serializes.
    assert_ne!(read(&mut cpu, &mut bus, 0xc001_0015).unwrap() & 1 << 24, 0);
    assert_ne!(read(&mut cpu, &mut bus, 0xc001_1029).unwrap() & 1 << 1, 0);
    let (mut cpu, mut bus) = (long_mode(INTEL), TestBus::default());
    for msr in [0x10a, 0x48, 0x1a0, 0x8b, 0x3a, 0xce, 0x17] {
        assert!(read(&mut cpu, &mut bus, msr).is_ok(), "{msr:#x}");
    }
}

#[test]
fn firmware_leaves_mtrrs_that_linux_believes() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    cpu.set_firmware_mtrrs(0xc000_0000);
    let saved =
        [0x2ff, 0x200, 0x201, 0x250, 0x259].map(|m| (m, read(&mut cpu, &mut bus, m).unwrap()));
    assert_eq!(saved[0].1, 0xc06);
    assert_eq!((saved[1].1, saved[2].1), (0xc000_0000, 0x3fff_c000_0800));
    assert_eq!((saved[3].1, saved[4].1), (0x0606_0606_0606_0606, 0));
    // All of it is something that WRMSR takes.
    for (msr, v) in saved {
        assert_eq!(write(&mut cpu, &mut bus, msr, v), Ok(()), "{msr:#x}");
    }
}

#[test]
fn each_maker_takes_what_it_takes() {
    let mut bus = TestBus::default();
    let (mut intel, mut amd) = (long_mode(INTEL), long_mode(AMD));
    assert_eq!(write(&mut intel, &mut bus, 0xc000_0103, 1 << 32), Err(GP0));
    assert_eq!(write(&mut amd, &mut bus, 0xc000_0103, 1 << 32 | 7), Ok(()));
    assert_eq!(read(&mut amd, &mut bus, 0xc000_0103), Ok(7));
    // IA32_MISC_ENABLE as kvm-unit-tests writes it; IA32_PRED_CMD; IA32_PLATFORM_ID.
    let misc = 0x4_00c5_0809;
    assert_eq!(write(&mut intel, &mut bus, 0x1a0, misc), Ok(()));
    assert_eq!(read(&mut intel, &mut bus, 0x1a0), Ok(misc));
    assert_eq!(read(&mut intel, &mut bus, 0x49), Err(GP0));
    for bit in 1..64 {
        assert_eq!(write(&mut intel, &mut bus, 0x49, 1 << bit), Err(GP0));
    }
    assert_eq!(write(&mut intel, &mut bus, 0x49, 1), Ok(()));
    assert_eq!(write(&mut intel, &mut bus, 0x17, 0), Err(GP0));
}
