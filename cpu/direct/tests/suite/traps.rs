//! Exceptions of user code come out as the architecture raises them (Intel SDM vol. 3A, chapter 7).

use crate::rig::{CODE, DATA, DATA_OFFSET, Rig, Runner, breakpoint, exception};
use doppel_direct::{Change, CpuidFaults, Stop};
use iced_x86::code_asm::*;

const PRESENT: u32 = 1;
const WRITE: u32 = 2;
const USER: u32 = 4;
const FETCH: u32 = 16;
const READ_ONLY: u64 = DATA + 0x10_0000;
const NOWHERE: u64 = 0x1234_5000;

fn page_fault(error: u32, address: u64) -> Stop {
    Stop::Trap {
        vector: 14,
        error: error | USER,
        address,
    }
}

fn fault(vector: u8, error: u32) -> Stop {
    Stop::Trap {
        vector,
        error,
        address: 0,
    }
}

/// Runs code that is to trap at its byte `at`.
fn expect(rig: &Rig, code: &[u8], at: u64, stop: Stop) -> Runner {
    let mut r = rig.runner_of(code);
    expect_from(&mut r, code, at, stop);
    r
}

fn expect_from(r: &mut Runner, code: &[u8], at: u64, stop: Stop) {
    assert_eq!(r.run(), stop, "{code:x?}");
    assert_eq!(r.user.rip, CODE + at, "{code:x?}");
}

#[test]
fn page_faults_say_what_was_done_and_where() {
    let rig = Rig::new();
    let mut r = rig.runner(|a| {
        a.mov(eax, dword_ptr(rbx)).unwrap();
        a.mov(dword_ptr(rbx), eax).unwrap();
        a.jmp(rbx).unwrap();
    });
    let read_only = Change::Map {
        at: READ_ONLY,
        offset: DATA_OFFSET,
        len: 0x1000,
        write: false,
        execute: false,
        populate: true,
    };
    r.child.apply(&[read_only]).unwrap();
    let (read, write, jump) = (CODE, CODE + 2, CODE + 4);
    for (rip, address, error, at) in [
        (read, NOWHERE + 0x123, 0, read),
        (write, NOWHERE + 0x123, WRITE, write),
        (jump, NOWHERE + 0x123, FETCH, NOWHERE + 0x123),
        (write, READ_ONLY + 8, WRITE | PRESENT, write),
        (jump, READ_ONLY + 8, FETCH | PRESENT, READ_ONLY + 8),
        // Across the end of a page that is there.
        (read, READ_ONLY + 0xffe, 0, read),
        (read, 0, 0, read),
    ] {
        r.user.rip = rip;
        r.user.gprs[3] = address;
        let faulted = match (rip, address) {
            (_, a) if a == READ_ONLY + 0xffe => READ_ONLY + 0x1000,
            (_, a) => a,
        };
        assert_eq!(r.run(), page_fault(error, faulted), "{address:x}");
        assert_eq!(r.user.rip, at);
    }
}

#[test]
fn a_fault_is_repaired_and_the_instruction_goes_on() {
    let rig = Rig::new();
    rig.store(0x8000, 0x1122_3344_5566_7788);
    let mut r = rig.runner(|a| {
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.int3().unwrap();
    });
    r.user.gprs[3] = NOWHERE;
    assert_eq!(r.run(), page_fault(0, NOWHERE));
    let map = Change::Map {
        at: NOWHERE,
        offset: 0x8000,
        len: 0x1000,
        write: false,
        execute: false,
        populate: false,
    };
    let stop = r.child.run(&mut r.user, &[map], &r.kick).unwrap();
    assert_eq!(stop, breakpoint());
    assert_eq!(r.user.gprs[0], 0x1122_3344_5566_7788);
}

#[test]
fn exceptions_of_instructions_have_their_vector_and_error_code() {
    let rig = Rig::new();
    // DIV ECX by 0.
    expect(&rig, &[0xf7, 0xf1], 0, exception(0));
    // UD2; an undefined opcode of 64-bit mode; LOCK before what cannot be locked.
    expect(&rig, &[0x90, 0x0f, 0x0b], 1, exception(6));
    expect(&rig, &[0x06], 0, exception(6));
    expect(&rig, &[0xf0, 0x90], 0, exception(6));
    // HLT, MOV CR3, RAX; CLI; IN AL, DX; RDMSR.
    for code in [
        &[0xf4][..],
        &[0x0f, 0x22, 0xd8],
        &[0xfa],
        &[0xec],
        &[0x0f, 0x32],
    ] {
        expect(&rig, code, 0, fault(13, 0));
    }
    // INT 0x42, whose gate is not the user's.
    expect(&rig, &[0xcd, 0x42], 0, fault(13, 0x42 * 8 + 2));
    // MOV DS, AX with the selector of the kernel's code.
    let mut r = rig.runner_of(&[0x8e, 0xd8]);
    r.user.gprs[0] = 0x10;
    expect_from(&mut r, &[0x8e, 0xd8], 0, fault(13, 0x10));
    // MOV EAX, [RBX] and POP RAX where the address is not canonical.
    let mut r = rig.runner_of(&[0x8b, 0x03]);
    r.user.gprs[3] = 1 << 60;
    expect_from(&mut r, &[0x8b, 0x03], 0, fault(13, 0));
    let mut r = rig.runner_of(&[0x58]);
    r.user.gprs[4] = 1 << 60;
    expect_from(&mut r, &[0x58], 0, fault(12, 0));
}

#[test]
fn traps_leave_rip_behind_their_instruction() {
    let rig = Rig::new();
    expect(&rig, &[0xcc], 1, breakpoint());
    expect(&rig, &[0xcd, 3], 2, breakpoint());
    expect(&rig, &[0xcd, 4], 2, exception(4));
    // INT1 (ICEBP): DR6 shows no step.
    expect(&rig, &[0xf1], 1, exception(1));
}

#[test]
fn the_trap_flag_steps_one_instruction_at_a_time() {
    let rig = Rig::new();
    let mut r = rig.runner(|a| {
        a.mov(ecx, 1).unwrap();
        a.add(ecx, 2).unwrap();
        a.nop().unwrap();
    });
    r.user.rflags |= 1 << 8;
    let step = Stop::Trap {
        vector: 1,
        error: 0,
        address: 1 << 14,
    };
    for rip in [CODE + 5, CODE + 8, CODE + 9] {
        assert_eq!(r.run(), step);
        assert_eq!(r.user.rip, rip);
        assert_ne!(r.user.rflags & 1 << 8, 0, "TF is still the guest's");
    }
    assert_eq!(r.user.gprs[1], 3);
}

#[test]
fn misaligned_accesses_trap_where_ac_is_set() {
    let rig = Rig::new();
    let mut r = rig.runner_of(&[0x8b, 0x03, 0xcc]);
    r.user.gprs[3] = DATA + 1;
    r.user.rflags |= 1 << 18;
    expect_from(&mut r, &[0x8b, 0x03], 0, fault(17, 0));
    r.user.rflags &= !(1 << 18);
    assert_eq!(r.run(), breakpoint());
}

#[test]
fn floating_point_exceptions_trap_where_they_are_not_masked() {
    let rig = Rig::new();
    // DIVSS XMM0, XMM1: 0 by 0.
    let divide = [0xf3, 0x0f, 0x5e, 0xc1];
    let mut r = rig.runner_of(&divide);
    r.user.fpu.bytes[24..28].copy_from_slice(&0x1f00u32.to_le_bytes());
    r.user.fpu.bytes[512] = 2;
    expect_from(&mut r, &divide, 0, exception(19));
    assert_eq!(r.user.fpu.mxcsr(), 0x1f01);
    // FLDZ; FLDZ; FDIVP; FWAIT: the exception comes with the next instruction of the unit.
    let divide = [0xd9, 0xee, 0xd9, 0xee, 0xde, 0xf9, 0x9b];
    let mut r = rig.runner_of(&divide);
    r.user.fpu.bytes[..2].copy_from_slice(&0x37eu16.to_le_bytes());
    r.user.fpu.bytes[512] = 1;
    expect_from(&mut r, &divide, 6, exception(16));
}

#[test]
fn cpuid_faults_where_it_was_asked_to() {
    let rig = Rig::with(CpuidFaults::WherePossible);
    if !rig.zygote.cpuid_faults() {
        eprintln!("skipped: CPUID cannot fault on this host");
        return;
    }
    expect(&rig, &[0x90, 0x0f, 0xa2], 1, fault(13, 0));
    let rig = Rig::with(CpuidFaults::Never);
    let r = expect(&rig, &[0x0f, 0xa2, 0xcc], 3, breakpoint());
    assert_ne!(r.user.gprs[1], 0, "the host's answer");
}
