//! No system call of the guest's code reaches the host, by whatever instruction and number.

use crate::rig::{CODE, DATA, DATA_OFFSET, DATA_SIZE, Rig, Runner, exception};
use doppel_direct::{CODE_32, Entry, Stop};
use fastrand::Rng;

const SYSCALL: [u8; 2] = [0x0f, 0x05];
const INT_80: [u8; 2] = [0xcd, 0x80];
const X32: u64 = 1 << 30;
const VSYSCALL: u64 = 0xffff_ffff_ff60_0000;

fn call(r: &mut Runner, number: u64, arguments: [u64; 6], entry: Entry) {
    r.user.rip = CODE;
    r.user.gprs[0] = number;
    for (register, value) in [7, 6, 2, 10, 8, 9].into_iter().zip(arguments) {
        r.user.gprs[register] = value;
    }
    let before = r.user.clone();
    assert_eq!(r.run(), Stop::SystemCall(entry), "{number:#x}");
    assert_eq!(r.user.rip, CODE, "{number:#x}");
    let mut after = r.user.gprs;
    if entry == Entry::Syscall {
        assert_eq!(after[1], CODE + 2);
        (after[1], after[11]) = (before.gprs[1], before.gprs[11]);
    }
    assert_eq!(after, before.gprs, "{number:#x}");
}

/// Arguments that would do harm, or at least something, in one call or another.
fn harmful(pid: u64) -> [[u64; 6]; 5] {
    [
        [0; 6],
        [1, DATA, 8, 0, 0, 0],
        [pid, 9, 0, 0, 0, 0],
        [DATA, 0x1000, 7, 0x32, u64::MAX, 0],
        [u64::MAX, 9, 0, 0, 0, 0],
    ]
}

#[test]
fn syscall_with_every_number_comes_to_the_monitor() {
    let rig = Rig::new();
    let mut r = rig.runner_of(&SYSCALL);
    let mut random = Rng::with_seed(3);
    let pid = r.child.pid().into();
    for number in (0..=600).chain((0..=600).map(|n| n | X32)) {
        for arguments in harmful(pid) {
            call(&mut r, number, arguments, Entry::Syscall);
        }
    }
    for number in [
        u64::MAX,
        u64::MAX >> 1,
        1 << 63,
        u64::from(u32::MAX),
        1 << 31,
    ] {
        call(&mut r, number, harmful(pid)[2], Entry::Syscall);
    }
    for _ in 0..500 {
        let number = random.u64(..);
        let arguments = std::array::from_fn(|_| random.u64(..));
        call(&mut r, number, arguments, Entry::Syscall);
    }
}

#[test]
fn int_80_with_every_number_comes_to_the_monitor() {
    let rig = Rig::new();
    let mut r = rig.runner_of(&INT_80);
    if matches!(r.run(), Stop::Trap { vector: 13, .. }) {
        eprintln!("skipped: this host has no system calls of 32-bit programs");
        return;
    }
    for number in 0..=500 {
        for arguments in harmful(r.child.pid().into()) {
            call(&mut r, number, arguments, Entry::Int80);
        }
    }
}

#[test]
fn sysenter_neither_reaches_the_host_nor_harms_the_child() {
    let rig = Rig::new();
    for number in [1, 20, 37, 11] {
        let mut r = rig.runner_of(&[0x0f, 0x34]);
        r.user.gprs[0] = number;
        (r.user.gprs[3], r.user.gprs[5]) = (r.child.pid().into(), DATA);
        // The processor forgets RIP and RSP, and the kernel goes on elsewhere: no state is right, but one there is, unless the kernel shows
        // an address of its own that no 32-bit code can have. Then the child has run for the last time.
        let stop = r.run();
        if matches!(stop, Stop::Gone { lost: true }) {
            continue;
        }
        assert!(
            !matches!(stop, Stop::Gone { .. } | Stop::Kicked),
            "{stop:?}"
        );
        let mut user = doppel_direct::UserState::new(CODE + 0x100);
        rig.ram_write(0x100, &[0x0f, 0x0b]);
        let after = r.child.run(&mut user, &[], &r.kick).unwrap();
        assert_eq!(after, exception(6));
    }
}

/// AMD's processors have SYSCALL in 32-bit code, where Linux forgets RIP and goes on at the host's vDSO.
#[test]
fn syscall_of_32_bit_code_does_not_show_where_the_host_goes_on() {
    let rig = Rig::new();
    let [b0, b1, b2, b3] = (CODE as u32 + 16).to_le_bytes();
    // PUSH CODE_32; PUSH CODE + 16; RETFQ
    let mut code = vec![0x6a, CODE_32 as u8, 0x68, b0, b1, b2, b3, 0x48, 0xcb];
    code.resize(16, 0x90);
    code.extend(SYSCALL);
    code.extend([0x0f, 0x0b]);
    let mut r = rig.runner_of(&code);
    r.user.gprs[0] = 20;
    let stop = r.run();
    // Intel's have none; and a host without system calls of 32-bit programs goes on behind it.
    let undefined = [CODE + 16, CODE + 18].contains(&r.user.rip);
    assert!(
        stop == Stop::Gone { lost: true } || stop == exception(6) && undefined,
        "{stop:?} at {:#x}",
        r.user.rip
    );
}

#[test]
fn the_vsyscall_page_is_what_it_is_in_the_guest() {
    let rig = Rig::new();
    // CALL RBX
    let mut r = rig.runner_of(&[0xff, 0xd3]);
    for (offset, number) in [(0, 96), (0x400, 201), (0x800, 309)] {
        let stack = DATA + DATA_SIZE / 2;
        r.user.rip = CODE;
        r.user.gprs[3] = VSYSCALL + offset;
        r.user.gprs[4] = stack;
        let stop = r.run();
        let Stop::Trap {
            vector: 14,
            error,
            address,
        } = stop
        else {
            panic!("{number}: {stop:?}");
        };
        assert_eq!(error & !1, 0x14);
        assert_eq!(
            (address, r.user.rip),
            (VSYSCALL + offset, VSYSCALL + offset)
        );
        assert_eq!(r.user.gprs[4], stack - 8);
        assert_eq!(rig.load(DATA_OFFSET + DATA_SIZE / 2 - 8), CODE + 2);
    }
}
