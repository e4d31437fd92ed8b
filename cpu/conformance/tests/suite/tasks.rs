//! Hardware task switches: whose a fault on the way is, what its error code says, and the debug trap of a task.

use doppel_conformance::*;
use doppel_x86::{Gpr, Rflags};
use iced_x86::code_asm::*;

const CODE: u64 = 0x1_0000;
const IP: u64 = 0x100;
/// The new task: 32-bit code, at CPL 0.
const TASK: u16 = 0x20;
const TASK_CS: u16 = 0x28;
const TASK_DS: u16 = 0x30;
const ABSENT: u16 = 0x38;
const TASK_CODE: u64 = 0x4_0000;
const TASK_IP: u32 = 0x200;
const TSS: u64 = 0x9000;
const TASK_STACK: u32 = 0x5_8000;
const INVALID_TSS: u64 = 10;
const NOT_PRESENT: u64 = 11;
/// Fields of a 32-bit TSS.
const CS: u64 = 0x4c;
const SS: u64 = 0x50;
const DS: u64 = 0x54;
const LDT: u64 = 0x60;
const TRAP: u64 = 0x64;
const DR6_BT: u64 = 1 << 15;
const DEBUGGER: u16 = 0x40;

/// What leads to the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Jump,
    Call,
    Interrupt,
    /// A fault, whose handler it is.
    Fault,
}

const WAYS: [Way; 4] = [Way::Jump, Way::Call, Way::Interrupt, Way::Fault];

impl Way {
    fn code(self) -> &'static [u8] {
        match self {
            Way::Jump => &[0xea, 0, 0, TASK as u8, 0],
            Way::Call => &[0x9a, 0, 0, TASK as u8, 0],
            Way::Interrupt => &[0xcd, 0x15],
            Way::Fault => &[0x0f, 0x0b],
        }
    }

    fn ext(self) -> u64 {
        u64::from(self == Way::Fault)
    }
}

/// Goes to a task whose TSS has been changed.
fn each_way(
    cpl: u8,
    change: impl Fn(&mut LegacyMachine),
    check: impl Fn(&mut LegacyMachine, Way, End),
) {
    for way in WAYS {
        each_legacy(Legacy::Protected(cpl), |m| {
            write_task(m);
            change(m);
            m.place(16, CODE, IP, |a: &mut CodeAssembler| a.db(way.code()));
            let end = m.run(IP);
            println!("{way:?}");
            check(m, way, end);
        });
    }
}

fn write_task(m: &mut LegacyMachine) {
    const DPL3: u32 = 3 << 5;
    m.describe(TASK, TSS, 0x67, 0x89 | DPL3);
    m.describe(TASK_CS, TASK_CODE, 0xffff, kind::CODE | kind::BIG);
    m.describe(TASK_DS, 0, 0xf_ffff, kind::DATA | kind::BIG);
    m.describe(ABSENT, 0, 0xf_ffff, kind::DATA & !0x80);
    for (at, v) in [
        (0x04, 0x8800),
        (0x08, 0x10),
        (0x20, TASK_IP),
        (0x24, 2),
        (0x38, TASK_STACK),
        (CS, TASK_CS.into()),
        (SS, TASK_DS.into()),
        (DS, TASK_DS.into()),
    ] {
        m.put(TSS + at, v);
    }
    m.place(32, TASK_CODE, TASK_IP.into(), |a: &mut CodeAssembler| {
        a.hlt()
    });
    let idt = m.cpu_mut().idtr.base;
    for vector in [6, 0x15] {
        m.put(idt + 8 * vector, 0xe500_0000_0000 | u64::from(TASK) << 16);
    }
}

#[test]
fn a_task_begins_where_its_tss_says() {
    for cpl in [0, 3] {
        each_way(
            cpl,
            |_| {},
            |m, _, end| {
                assert_eq!((end.vector, end.ip), (None, u64::from(TASK_IP) + 1));
                assert_eq!(m.cpu_mut().tr.selector, TASK);
                assert_eq!(m.cpu_mut().cpl, 0);
                assert_eq!(m.reg(Gpr::Rsp), u64::from(TASK_STACK));
            },
        );
    }
}

#[test]
fn a_selector_that_cannot_be_loaded_is_the_new_tasks_fault() {
    for (field, selector, vector) in [
        (LDT, TASK_DS, INVALID_TSS),
        (CS, TASK_DS, INVALID_TSS),
        (SS, TASK_CS, INVALID_TSS),
        (SS, 0, INVALID_TSS),
        (DS, 0xf8, INVALID_TSS),
        (DS, ABSENT, NOT_PRESENT),
    ] {
        each_way(
            3,
            |m| m.put(TSS + field, u32::from(selector)),
            |m, way, end| {
                let expected = End {
                    vector: Some(vector),
                    error: u64::from(selector) | way.ext(),
                    ip: TASK_IP.into(),
                };
                assert_eq!(end, expected, "{field:x}");
                let cpu = m.cpu_mut();
                assert_eq!(cpu.tr.selector, TASK);
                // The handler's stack is the new task's or the one that its TSS names.
                assert!(cpu.gpr[Gpr::Rsp as usize] < 0x8800 || field == DS);
                let ip = cpu.gpr[Gpr::Rsp as usize] + 8;
                let code = if field == CS { selector } else { TASK_CS };
                assert_eq!(m.get::<u32>(ip), u32::from(code));
            },
        );
    }
}

#[test]
fn a_tss_that_is_too_short_is_the_old_tasks_fault() {
    each_way(
        3,
        |m| m.describe(TASK, TSS, 0x66, 0x89 | 3 << 5),
        |m, way, end| {
            assert_eq!(end.vector, Some(INVALID_TSS));
            assert_eq!((end.error, end.ip), (u64::from(TASK) | way.ext(), IP));
            assert_ne!(m.cpu_mut().tr.selector, TASK);
        },
    );
}

#[test]
fn a_task_may_trap_before_its_first_instruction() {
    for cpl in [0, 3] {
        each_way(
            cpl,
            |m| m.put(TSS + TRAP, 1u16),
            |m, _, end| {
                assert_eq!((end.vector, end.ip), (Some(1), TASK_IP.into()));
                assert_eq!(m.cpu_mut().dr[6] & (DR6_BT | 0xf), DR6_BT);
                assert_eq!(m.cpu_mut().tr.selector, TASK);
            },
        );
    }
}

#[test]
fn a_debug_task_that_traps_too_is_busy() {
    each_way(
        0,
        |m| {
            const DEBUGGER_TSS: u64 = 0x9800;
            m.describe(DEBUGGER, DEBUGGER_TSS, 0x67, 0x89);
            m.put(TSS + TRAP, 1u16);
            for at in (0..0x68).step_by(4) {
                m.put(DEBUGGER_TSS + at, m.get::<u32>(TSS + at));
            }
            let idt = m.cpu_mut().idtr.base;
            m.put(idt + 8, 0xe500_0000_0000 | u64::from(DEBUGGER) << 16);
        },
        |m, _, end| {
            let expected = End {
                vector: Some(13),
                error: u64::from(DEBUGGER) | 1,
                ip: TASK_IP.into(),
            };
            assert_eq!(end, expected);
            assert_eq!(m.cpu_mut().tr.selector, DEBUGGER);
        },
    );
}

#[test]
fn the_instruction_that_switches_tasks_is_no_single_step() {
    each_way(
        3,
        |m| m.cpu_mut().rflags |= Rflags::TF,
        |m, _, end| {
            assert_eq!((end.vector, end.ip), (None, u64::from(TASK_IP) + 1));
            assert_eq!(m.cpu_mut().dr[6] & 1 << 14, 0);
        },
    );
}

/// The instruction that it comes back to passes its breakpoint then.
#[test]
fn the_old_task_of_a_fault_has_rf_set() {
    each_way(
        3,
        |m| m.cpu_mut().rflags |= Rflags::RF,
        |m, way, end| {
            const OLD_TSS: u64 = 0x5800;
            assert_eq!(end.vector, None);
            let flags = Rflags::from_bits_truncate(m.get::<u32>(OLD_TSS + 0x24).into());
            assert_eq!(flags.contains(Rflags::RF), way == Way::Fault);
        },
    );
}
