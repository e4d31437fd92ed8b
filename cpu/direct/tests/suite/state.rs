//! Registers go into a child and come out of it.

use std::os::unix::fs::FileExt;

use crate::rig::{CODE, DATA, DATA_OFFSET, Rig, breakpoint};
use doppel_direct::{CODE_32, Entry, STACK, Stop, UserState};
use doppel_x86::FpuArea;
use fastrand::Rng;
use iced_x86::code_asm::*;

const FLAGS: [(u64, &str); 9] = [
    (0x8d5, "arithmetic"),
    (0, "none"),
    (1 << 10, "DF"),
    (1 << 14, "NT"),
    (1 << 18, "AC"),
    (1 << 21, "ID"),
    (1 << 21 | 1 << 10, "ID and DF"),
    (1, "CF"),
    (1 << 18 | 1 << 14 | 1 << 21 | 0x8d5, "all"),
];

#[test]
fn general_registers_go_in_and_come_out() {
    let rig = Rig::new();
    let all = [
        rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15,
    ];
    let mut r = rig.runner(|a| {
        a.mov(qword_ptr(rsp), rax).unwrap();
        for (n, register) in all.into_iter().enumerate() {
            a.mov(qword_ptr(rsp + 8 * n), register).unwrap();
        }
        for register in all {
            a.not(register).unwrap();
        }
        a.int3().unwrap();
    });
    let mut random = Rng::with_seed(1);
    for _ in 0..20 {
        let mut before = r.user.clone();
        before.gprs = std::array::from_fn(|_| random.u64(..));
        before.gprs[4] = DATA + 0x100;
        before.rip = CODE;
        r.user = before.clone();
        assert_eq!(r.run(), breakpoint());
        assert_eq!(r.user.gprs, before.gprs.map(|v| !v));
        for (n, value) in before.gprs.into_iter().enumerate() {
            assert_eq!(rig.load(DATA_OFFSET + 0x100 + 8 * n as u64), value);
        }
    }
}

#[test]
fn flags_go_in_and_come_out() {
    let rig = Rig::new();
    let mut r = rig.runner(|a| {
        a.pushfq().unwrap();
        a.pop(rax).unwrap();
        a.push(rbx).unwrap();
        a.popfq().unwrap();
        a.int3().unwrap();
    });
    for (flags, name) in FLAGS {
        for (after, other) in FLAGS {
            r.user.rip = CODE;
            r.user.rflags = flags | 0x202;
            r.user.gprs[3] = after;
            assert_eq!(r.run(), breakpoint(), "{name}, {other}");
            assert_eq!(r.user.gprs[0], flags | 0x202, "{name}");
            assert_eq!(r.user.rflags, after | 0x202, "{name}, then {other}");
        }
    }
}

/// An XSAVE image with every component that the host has for us in use.
fn image(random: &mut Rng) -> FpuArea {
    let mut fpu = FpuArea::reset();
    let mut fill = |from: usize, to: usize| {
        for byte in &mut fpu.bytes[from..to] {
            *byte = random.u8(..);
        }
    };
    (0..8).for_each(|n| fill(32 + 16 * n, 42 + 16 * n));
    fill(160, 416);
    let mut in_use = 3u64;
    let have = xcr0();
    for n in (2..8).filter(|n| have >> n & 1 != 0) {
        let leaf = raw_cpuid::native_cpuid::cpuid_count(0xd, n);
        fill(leaf.ebx as usize, (leaf.ebx + leaf.eax) as usize);
        in_use |= 1 << n;
    }
    // Other rounding and masks than after a reset, an x87 stack with something in it.
    fpu.bytes[0..2].copy_from_slice(&0x0f7fu16.to_le_bytes());
    fpu.bytes[2..4].copy_from_slice(&0x3800u16.to_le_bytes());
    fpu.bytes[4] = 0xff;
    fpu.bytes[24..28].copy_from_slice(&0x7fa5u32.to_le_bytes());
    fpu.bytes[512..520].copy_from_slice(&in_use.to_le_bytes());
    fpu
}

fn xcr0() -> u64 {
    let leaf = raw_cpuid::native_cpuid::cpuid_count(0xd, 0);
    u64::from(leaf.edx) << 32 | u64::from(leaf.eax)
}

/// What of an image is a register: not what the software uses, nor MXCSR's mask.
fn registers(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes[..2688].to_vec();
    bytes[28..32].fill(0);
    bytes[416..512].fill(0);
    bytes[520..576].fill(0);
    bytes
}

#[test]
fn vector_and_floating_point_registers_go_in_and_come_out() {
    let rig = Rig::new();
    let mut r = rig.runner(|a| {
        a.mov(eax, 0xe7u32).unwrap();
        a.xor(edx, edx).unwrap();
        a.xsave64(ptr(rbx)).unwrap();
        a.xrstor64(ptr(rsi)).unwrap();
        a.int3().unwrap();
    });
    let mut random = Rng::with_seed(2);
    for round in 0..8 {
        let (mut before, mut after) = (image(&mut random), image(&mut random));
        if round % 2 == 1 {
            // Some components in their initial state.
            for image in [&mut before, &mut after] {
                let some = random.u64(..) & 0xfe | 2;
                let in_use = u64::from_le_bytes(image.bytes[512..520].try_into().unwrap()) & some;
                image.bytes[512..520].copy_from_slice(&in_use.to_le_bytes());
            }
        }
        rig.ram.write_all_at(&[0; 4096], DATA_OFFSET).unwrap();
        rig.ram
            .write_all_at(&after.bytes, DATA_OFFSET + 0x1000)
            .unwrap();
        r.user.rip = CODE;
        r.user.gprs[3] = DATA;
        r.user.gprs[6] = DATA + 0x1000;
        r.user.fpu = before.clone();
        assert_eq!(r.run(), breakpoint());
        let mut seen = [0; 4096];
        rig.ram.read_exact_at(&mut seen, DATA_OFFSET).unwrap();
        assert_same(&before.bytes, &seen, "on the way in");
        assert_same(&after.bytes, &r.user.fpu.bytes, "on the way out");
    }
}

/// Compares what two images mean.
fn assert_same(a: &[u8], b: &[u8], what: &str) {
    let (a, b) = (registers(&meant(a)), registers(&meant(b)));
    let different: Vec<usize> = (0..a.len()).filter(|n| a[*n] != b[*n]).collect();
    assert!(different.is_empty(), "{what}: {different:?}");
}

/// An image with its components in their initial state written out, all in use.
fn meant(image: &[u8]) -> Vec<u8> {
    let mut all = image.to_vec();
    let in_use = u64::from_le_bytes(image[512..520].try_into().unwrap());
    if in_use & 1 == 0 {
        all[..24].fill(0);
        all[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        all[32..160].fill(0);
    }
    // The kernel's frames leave out the last instruction and operand of a unit that has none pending.
    all[6..24].fill(0);
    if in_use & 2 == 0 {
        all[160..416].fill(0);
    }
    for n in (2..8).filter(|n| in_use >> n & 1 == 0 && xcr0() >> n & 1 != 0) {
        let leaf = raw_cpuid::native_cpuid::cpuid_count(0xd, n);
        all[leaf.ebx as usize..(leaf.ebx + leaf.eax) as usize].fill(0);
    }
    all[512..520].fill(0);
    all
}

#[test]
fn the_bases_of_fs_and_gs_go_in_and_come_out() {
    let rig = Rig::new();
    rig.store(DATA_OFFSET + 8, 0x1111);
    rig.store(DATA_OFFSET + 24, 0x2222);
    let mut r = rig.runner(|a| {
        a.mov(rax, qword_ptr(8).fs()).unwrap();
        a.mov(rcx, qword_ptr(8).gs()).unwrap();
        a.rdfsbase(rdx).unwrap();
        a.rdgsbase(rbx).unwrap();
        a.wrfsbase(rsi).unwrap();
        a.wrgsbase(rdi).unwrap();
        a.int3().unwrap();
    });
    r.user.fs_base = DATA;
    r.user.gs_base = DATA + 16;
    r.user.gprs[6] = 0x7fff_1234_5678;
    r.user.gprs[7] = 0xffff_8000_0000_0000;
    assert_eq!(r.run(), breakpoint());
    assert_eq!(r.user.gprs[..4], [0x1111, 0x2222, DATA, DATA + 16]);
    assert_eq!(r.user.fs_base, 0x7fff_1234_5678);
    assert_eq!(r.user.gs_base, 0xffff_8000_0000_0000);
}

#[test]
fn selectors_go_in_and_come_out() {
    let rig = Rig::new();
    let mut r = rig.runner(|a| {
        a.mov(eax, ds).unwrap();
        a.mov(ecx, es).unwrap();
        a.mov(edx, fs).unwrap();
        a.mov(ebx, gs).unwrap();
        a.mov(ds, esi).unwrap();
        a.mov(es, esi).unwrap();
        a.mov(fs, edi).unwrap();
        a.mov(gs, edi).unwrap();
        a.int3().unwrap();
    });
    // Null selectors other than 0 become 0 at any IRET of the host, natively too.
    for (before, after) in [(0, STACK), (STACK, 0), (0, 0), (STACK, STACK)] {
        r.user.rip = CODE;
        (r.user.ds, r.user.es) = (before, before);
        (r.user.fs, r.user.gs) = (before, before);
        (r.user.fs_base, r.user.gs_base) = (DATA, DATA);
        (r.user.gprs[6], r.user.gprs[7]) = (after.into(), after.into());
        assert_eq!(r.run(), breakpoint());
        assert_eq!(r.user.gprs[..4], [u64::from(before); 4]);
        let selectors = [r.user.ds, r.user.es, r.user.fs, r.user.gs];
        assert_eq!(selectors, [after; 4]);
        assert_eq!((r.user.cs, r.user.ss), (0x33, STACK));
    }
}

#[test]
fn a_state_that_no_user_code_of_linux_has_is_refused() {
    let rig = Rig::new();
    let mut r = rig.runner_of(&[0xcc]);
    let wrong: [fn(&mut UserState); 6] = [
        |u| u.cs = 0x10,
        |u| u.ss = 0,
        |u| u.ds = 0x18,
        |u| u.gs = 0x33,
        |u| u.rip = 1 << 47,
        |u| u.fs_base = 1 << 47,
    ];
    for spoil in wrong {
        let mut user = r.user.clone();
        spoil(&mut user);
        assert!(r.child.run(&mut user, &[], &r.kick).is_err());
    }
    assert_eq!(r.run(), breakpoint());
}

#[test]
fn thirty_two_bit_code_runs_and_says_so() {
    let rig = Rig::new();
    // MOV EAX, 7; DEC ECX (a REX prefix in 64-bit mode); INT 0x80.
    let mut r = rig.runner_of(&[0xb8, 7, 0, 0, 0, 0x49, 0xcd, 0x80]);
    r.user.cs = CODE_32;
    (r.user.ds, r.user.es) = (STACK, STACK);
    r.user.gprs[1] = 5;
    assert_eq!(r.run(), Stop::SystemCall(Entry::Int80));
    assert_eq!(r.user.gprs[..2], [7, 4]);
    assert_eq!((r.user.cs, r.user.rip), (CODE_32, CODE + 6));
    // And 64-bit code that goes there by itself: JMP FAR [RBX].
    let mut r = rig.runner_of(&[0xff, 0x2b]);
    rig.store(DATA_OFFSET, (CODE + 0x10) | u64::from(CODE_32) << 32);
    rig.ram.write_all_at(&[0x49, 0xcd, 0x80], 0x10).unwrap();
    r.user.gprs[3] = DATA;
    assert_eq!(r.run(), Stop::SystemCall(Entry::Int80));
    assert_eq!((r.user.cs, r.user.rip), (CODE_32, CODE + 0x11));
}
