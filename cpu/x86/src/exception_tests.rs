//! Delivery of exceptions and interrupts in long, protected, virtual-8086 and real mode.

use super::*;
use crate::testing::*;
use crate::{Activity, CpuMode, Cr0, Gpr, Rflags, event, iret};

const HANDLER: u64 = 0x1_1000;

fn frame(cpu: &Cpu, n: u64) -> u64 {
    get(cpu, cpu.reg(Gpr::Rsp) + 8 * n)
}

#[test]
fn a_fault_in_user_mode_switches_to_rsp0_and_pushes_its_error_code() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    gate(&cpu, 14, HANDLER, 0xe, 0, 0);
    to_user(&mut cpu);
    cpu.rip = 0x1234;
    let outcome = raise(&mut cpu, &mut bus, Exception::pf(0xdead_b000, 6), 0x1240);
    assert_eq!(outcome, Outcome::Continue);
    assert_eq!((cpu.rip, cpu.cpl, cpu.cr2), (HANDLER, 0, 0xdead_b000));
    assert_eq!(cpu.reg(Gpr::Rsp), STACK - 48);
    let rf = Rflags::RF.bits();
    let frame: Vec<u64> = (0..6).map(|n| frame(&cpu, n)).collect();
    assert_eq!(
        frame,
        [
            6,
            0x1234,
            USER_CS.into(),
            0x202 | rf,
            USER_STACK,
            USER_DS.into()
        ]
    );
    assert!(!cpu.rflags.intersects(Rflags::IF | Rflags::RF));
    assert_eq!(cpu.segment(Seg::Cs).selector, KERNEL_CS);
    assert!(cpu.segment(Seg::Ss).unusable() && cpu.segment(Seg::Ss).selector == 0);
    assert_eq!(cpu.counters.exceptions[14], 1);
}

#[test]
fn iret_takes_a_user_fault_back_to_where_it_was() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    gate(&cpu, 3, HANDLER, 0xe, 0, 3);
    to_user(&mut cpu);
    let before = (cpu.seg, cpu.gpr, cpu.rflags, cpu.cpl);
    cpu.rip = 0x1234;
    raise(&mut cpu, &mut bus, Exception::BP, 0x1235);
    assert_eq!((cpu.cpl, cpu.rip), (0, HANDLER));
    iret::execute(&mut cpu, &mut bus, 8, 0).expect("iret");
    // The data segments were flat user ones and stay; the accessed bits are set already.
    assert_eq!((cpu.seg, cpu.gpr, cpu.rflags, cpu.cpl), before);
    assert_eq!(cpu.rip, 0x1235);
}

#[test]
fn a_kernel_fault_stays_on_its_aligned_stack_and_trap_gates_keep_if() {
    let (mut cpu, mut bus) = (long_mode(INTEL), TestBus::default());
    gate(&cpu, 13, HANDLER, 0xf, 0, 0);
    cpu.rflags |= Rflags::IF | Rflags::TF | Rflags::NT;
    cpu.gpr[Gpr::Rsp as usize] = STACK - 0x103;
    raise(&mut cpu, &mut bus, Exception::gp(0x18), 0);
    assert_eq!(cpu.reg(Gpr::Rsp), STACK - 0x110 - 48);
    assert_eq!(frame(&cpu, 0), 0x18);
    assert_eq!(frame(&cpu, 4), STACK - 0x103);
    assert_eq!(cpu.rflags, Rflags::ONE | Rflags::IF);
    // The same privilege keeps SS.
    assert_eq!(cpu.segment(Seg::Ss).selector, KERNEL_DS);
}

#[test]
fn an_interrupt_stack_is_taken_at_every_privilege() {
    for user in [false, true] {
        let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
        gate(&cpu, 2, HANDLER, 0xe, 1, 0);
        if user {
            to_user(&mut cpu);
        }
        bus.nmi = true;
        assert!(event::deliver_pending(&mut cpu, &mut bus));
        assert_eq!(cpu.reg(Gpr::Rsp), IST1 - 40);
        assert!(cpu.nmi_blocked);
        bus.nmi = true;
        assert!(
            !event::deliver_pending(&mut cpu, &mut bus),
            "NMIs do not nest"
        );
        iret::execute(&mut cpu, &mut bus, 8, 0).expect("iret");
        assert_eq!(std::mem::take(&mut bus.calls), ["nmi ends"]);
        assert!(event::deliver_pending(&mut cpu, &mut bus));
    }
}

#[test]
fn a_missing_page_fault_handler_is_a_double_fault() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    gate(&cpu, 8, HANDLER, 0xe, 1, 0);
    let rip = cpu.rip;
    let outcome = raise(&mut cpu, &mut bus, Exception::pf(0x40, 0), 0);
    assert_eq!(outcome, Outcome::Continue);
    assert_eq!((cpu.rip, cpu.reg(Gpr::Rsp)), (HANDLER, IST1 - 48));
    assert_eq!((frame(&cpu, 0), frame(&cpu, 1)), (0, rip));
}

#[test]
fn a_bad_kernel_stack_is_a_double_fault_and_cr2_tells_where() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    gate(&cpu, 14, HANDLER, 0xe, 0, 0);
    gate(&cpu, 8, HANDLER + 0x100, 0xe, 1, 0);
    cpu.gpr[Gpr::Rsp as usize] = 0x4000_0000;
    raise(&mut cpu, &mut bus, Exception::pf(0x4000_0010, 2), 0);
    assert_eq!(cpu.rip, HANDLER + 0x100);
    assert_eq!(cpu.cr2, 0x4000_0000 - 8);
}

#[test]
fn no_handler_at_all_is_a_triple_fault() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    let before = (cpu.rip, cpu.gpr, cpu.seg);
    let outcome = raise(&mut cpu, &mut bus, Exception::UD, 0);
    assert_eq!(outcome, Outcome::Shutdown);
    assert_eq!(cpu.activity, Activity::Shutdown);
    assert_eq!(
        (cpu.rip, cpu.gpr, cpu.seg),
        before,
        "as before the delivery"
    );
}

#[test]
fn faults_of_delivery_name_the_gate_and_say_ext() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    gate(&cpu, 13, HANDLER, 0xe, 0, 0);
    gate(&cpu, 11, HANDLER + 0x100, 0xe, 0, 0);
    // An interrupt through an entry that is all zero: #GP(vector, IDT, EXT).
    cpu.rflags |= Rflags::IF;
    bus.interrupt = Some(0x30);
    assert!(event::deliver_pending(&mut cpu, &mut bus));
    assert_eq!((cpu.rip, frame(&cpu, 0)), (HANDLER, 0x30 << 3 | 3));
    // INT n from user mode through a kernel-only gate: EXT is clear.
    to_user(&mut cpu);
    let event = Event::software(13, Source::SoftwareInterrupt, cpu.rip + 2);
    let e = deliver(&mut cpu, &mut bus, &event);
    assert_eq!(e, Err(Exception::gp(13 << 3 | 2)));
    assert_eq!(cpu.cpl, 3);
    // A gate that is not present.
    gate(&cpu, 0x31, HANDLER, 0xe, 0, 3);
    put(&cpu, IDT + 0x310 + 5, 0x6eu8);
    let event = Event::software(0x31, Source::SoftwareInterrupt, cpu.rip + 2);
    let e = deliver(&mut cpu, &mut bus, &event);
    assert_eq!(e, Err(Exception::np(0x31 << 3 | 2)));
}

#[test]
fn the_double_fault_table_is_the_manuals() {
    use Combined::{Double, Serial, Triple};
    let contributory = [0, 10, 11, 12, 13];
    for first in contributory {
        for second in contributory {
            assert_eq!(combine(Some(first), second), Double);
        }
        assert_eq!(combine(Some(first), 14), Serial);
        assert_eq!(combine(Some(14), first), Double);
        assert_eq!(combine(Some(8), first), Triple);
        assert_eq!(combine(Some(6), first), Serial);
        assert_eq!(combine(None, first), Serial);
    }
    assert_eq!(combine(Some(14), 14), Double);
    assert_eq!(combine(Some(8), 14), Triple);
    assert_eq!(combine(Some(1), 14), Serial);
    assert_eq!(combine(Some(14), 1), Serial);
}

#[test]
fn an_interrupt_waits_for_if_and_the_shadow_and_ends_a_halt() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    gate(&cpu, 0x20, HANDLER, 0xe, 0, 0);
    bus.interrupt = Some(0x20);
    assert!(!event::deliver_pending(&mut cpu, &mut bus));
    cpu.rflags |= Rflags::IF;
    cpu.interrupt_shadow = true;
    assert!(!event::deliverable(&cpu, &mut bus));
    cpu.interrupt_shadow = false;
    cpu.activity = Activity::Halted;
    let rip = cpu.rip;
    assert!(event::deliver_pending(&mut cpu, &mut bus));
    assert_eq!(cpu.activity, Activity::Active);
    assert_eq!((cpu.rip, frame(&cpu, 0)), (HANDLER, rip));
    assert_eq!(cpu.counters.interrupts, 1);
    assert!(!event::deliver_pending(&mut cpu, &mut bus));
}

#[test]
fn debug_exceptions_set_dr6_and_clear_general_detect() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    gate(&cpu, 1, HANDLER, 0xe, 0, 0);
    cpu.dr[6] |= 3;
    cpu.dr[7] |= 1 << 13;
    raise(&mut cpu, &mut bus, Exception::db(1 << 14, true), 0x1_0001);
    assert_eq!(cpu.dr[6], 0xffff_0ff0 | 1 << 14);
    assert_eq!(cpu.dr[7], 0x400);
    assert_eq!(frame(&cpu, 0), 0x1_0001);
    assert_eq!(frame(&cpu, 2) & Rflags::RF.bits(), 0);
}

#[test]
fn protected_mode_switches_to_the_stack_of_its_tss() {
    let (mut cpu, mut bus) = (protected_mode(), TestBus::default());
    gate32(&cpu, 13, KERNEL_CS, HANDLER, 0xe, 0);
    cpu.seg = [crate::segment::flat(USER_DS, 0xc093, 3); 6];
    cpu.seg[Seg::Cs as usize] = crate::segment::flat(USER_CS32, 0xc09b, 3);
    cpu.cpl = 3;
    cpu.gpr[Gpr::Rsp as usize] = USER_STACK;
    let before = (cpu.seg, cpu.gpr, cpu.rflags, cpu.cpl, cpu.rip);
    raise(&mut cpu, &mut bus, Exception::gp(0), 0);
    assert_eq!((cpu.rip, cpu.reg(Gpr::Rsp)), (HANDLER, STACK - 24));
    let words: Vec<u32> = (0..6)
        .map(|n| cpu.ram.load::<u32>(STACK - 24 + 4 * n).unwrap())
        .collect();
    assert_eq!(
        words,
        [
            0,
            0x1_0000,
            USER_CS32.into(),
            0x1_0002,
            USER_STACK as u32,
            USER_DS.into()
        ]
    );
    assert_eq!(cpu.segment(Seg::Ss).selector, KERNEL_DS);
    cpu.gpr[Gpr::Rsp as usize] += 4;
    iret::execute(&mut cpu, &mut bus, 4, 0).expect("iret");
    assert_eq!(cpu.rflags, before.2 | Rflags::RF);
    assert_eq!((cpu.gpr, cpu.cpl, cpu.rip), (before.1, before.3, before.4));
    assert_eq!(cpu.segment(Seg::Ss).selector, USER_DS);
}

#[test]
fn a_bad_stack_segment_in_the_tss_is_an_invalid_tss() {
    let (mut cpu, mut bus) = (protected_mode(), TestBus::default());
    gate32(&cpu, 13, KERNEL_CS, HANDLER, 0xe, 0);
    gate32(&cpu, 10, KERNEL_CS, HANDLER + 0x100, 0xe, 0);
    cpu.cpl = 3;
    cpu.seg[Seg::Cs as usize] = crate::segment::flat(USER_CS32, 0xc09b, 3);
    put(&cpu, TSS + 8, u32::from(USER_DS));
    let event = Event::exception(&cpu, &Exception::gp(0), 0);
    let e = deliver(&mut cpu, &mut bus, &event);
    assert_eq!(e, Err(Exception::ts(u32::from(USER_DS & 0xfffc) | 1)));
}

/// #AC, or a fault that leads to it, has a handler that is user code with a misaligned stack: each delivery meets #AC.
#[test]
fn alignment_checks_that_meet_themselves_without_end_do_not_hold_the_processor() {
    const NO_GATE: u64 = 0;
    for (handled, raised) in [(&[17][..], Exception::AC), (&[13], Exception::gp(0))] {
        let (mut cpu, mut bus) = (protected_mode(), TestBus::default());
        for vector in [13, 17] {
            put(&cpu, IDT + 8 * vector, NO_GATE);
        }
        for vector in handled {
            gate32(&cpu, *vector, USER_CS32, HANDLER, 0xe, 0);
        }
        cpu.seg = [crate::segment::flat(USER_DS, 0xc093, 3); 6];
        cpu.seg[Seg::Cs as usize] = crate::segment::flat(USER_CS32, 0xc09b, 3);
        cpu.cpl = 3;
        cpu.cr0 |= Cr0::AM;
        cpu.rflags |= Rflags::AC;
        cpu.gpr[Gpr::Rsp as usize] = USER_STACK + 1;
        let before = (cpu.seg, cpu.gpr, cpu.rflags, cpu.cpl, cpu.rip);
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let outcome = raise(&mut cpu, &mut bus, raised, 0);
            let after = (cpu.seg, cpu.gpr, cpu.rflags, cpu.cpl, cpu.rip);
            done.send((outcome, after)).expect("the test waits");
        });
        let ended = ended.recv_timeout(std::time::Duration::from_secs(10));
        assert_eq!(ended, Ok((Outcome::Continue, before)));
    }
}

#[test]
fn virtual_8086_mode_is_left_and_entered_again() {
    let (mut cpu, mut bus) = (protected_mode(), TestBus::default());
    gate32(&cpu, 0x20, KERNEL_CS, HANDLER, 0xe, 0);
    for (n, s) in cpu.seg.iter_mut().enumerate() {
        *s = Segment::v86(0x100 * (n as u16 + 1));
    }
    cpu.cpl = 3;
    cpu.rflags = Rflags::ONE | Rflags::VM | Rflags::IF | Rflags::VIF | Rflags::VIP;
    cpu.rip = 0x77;
    cpu.gpr[Gpr::Rsp as usize] = 0x800;
    let before = (cpu.seg, cpu.gpr, cpu.rflags, cpu.cpl, cpu.rip);
    assert_eq!(cpu.mode(), CpuMode::V86);
    bus.interrupt = Some(0x20);
    assert!(event::deliver_pending(&mut cpu, &mut bus));
    assert_eq!((cpu.mode(), cpu.cpl), (CpuMode::Bits32, 0));
    assert_eq!(cpu.reg(Gpr::Rsp), STACK - 36);
    assert!(cpu.segment(Seg::Ds).unusable());
    // An EIP beyond the limit of virtual-8086 mode's segments.
    put(&cpu, STACK - 36, 0x1_0077u32);
    assert_eq!(
        iret::execute(&mut cpu, &mut bus, 4, 0),
        Err(Exception::gp(0))
    );
    put(&cpu, STACK - 36, 0x77u32);
    cpu.gpr[Gpr::Rsp as usize] = STACK - 36;
    iret::execute(&mut cpu, &mut bus, 4, 0).expect("iret");
    assert_eq!((cpu.seg, cpu.gpr, cpu.rflags, cpu.cpl, cpu.rip), before);
}

#[test]
fn real_mode_uses_the_vector_table() {
    let (mut cpu, mut bus) = (reset(INTEL), TestBus::default());
    cpu.seg[Seg::Cs as usize] = Segment {
        base: 0x1000,
        limit: 0xffff,
        attributes: 0x9b,
        selector: 0x100,
    };
    cpu.rip = 0x55;
    cpu.gpr[Gpr::Rsp as usize] = 0x8000;
    cpu.rflags |= Rflags::IF | Rflags::CF;
    put(&cpu, 0x10 * 4, 0x0200_0123u32);
    let event = Event::software(0x10, Source::SoftwareInterrupt, 0x57);
    deliver(&mut cpu, &mut bus, &event).expect("delivered");
    assert_eq!((cpu.rip, cpu.segment(Seg::Cs).base), (0x123, 0x2000));
    assert_eq!(cpu.ram.load::<u16>(0x7ffa), Some(0x57));
    assert_eq!(cpu.ram.load::<u16>(0x7ffc), Some(0x100));
    assert_eq!(cpu.ram.load::<u16>(0x7ffe), Some(0x203));
    assert_eq!(cpu.rflags, Rflags::ONE | Rflags::CF);
    iret::execute(&mut cpu, &mut bus, 2, 0).expect("iret");
    assert_eq!((cpu.rip, cpu.segment(Seg::Cs).selector), (0x57, 0x100));
    assert_eq!(cpu.rflags, Rflags::ONE | Rflags::IF | Rflags::CF);
    assert_eq!(cpu.reg(Gpr::Rsp), 0x8000);
}

#[test]
fn a_task_gate_switches_tasks_and_iret_returns() {
    const OTHER: u64 = 0x9000;
    const OTHER_SELECTOR: u16 = 0x48;
    let (mut cpu, mut bus) = (protected_mode(), TestBus::default());
    put(&cpu, GDT + 0x48, 0x67u64 | OTHER << 16 | 0x89 << 40);
    put(&cpu, GDT + 0x40, 0x67u64 | TSS << 16 | 0x8b << 40);
    gate32(&cpu, 13, OTHER_SELECTOR, 0, 5, 0);
    for (offset, v) in [
        (0x20, HANDLER as u32),
        (0x24, 2),
        (0x38, 0x5000),
        (0x48, KERNEL_DS.into()),
        (0x4c, KERNEL_CS.into()),
        (0x50, KERNEL_DS.into()),
        (0x54, KERNEL_DS.into()),
    ] {
        put(&cpu, OTHER + offset, v);
    }
    cpu.gpr[Gpr::Rbx as usize] = 0x1234_5678;
    cpu.rflags |= Rflags::VIF | Rflags::VIP;
    let before = (cpu.gpr, cpu.rip, cpu.rflags);
    raise(&mut cpu, &mut bus, Exception::gp(0), 0);
    assert_eq!(
        (cpu.rip, cpu.tr.selector, cpu.reg(Gpr::Rsp)),
        (HANDLER, OTHER_SELECTOR, 0x4ffc)
    );
    assert_eq!(cpu.rflags, Rflags::ONE | Rflags::NT);
    assert!(cpu.cr0.contains(crate::Cr0::TS));
    assert_eq!(cpu.ram.load::<u16>(OTHER), Some(TSS_SELECTOR));
    cpu.gpr[Gpr::Rsp as usize] += 4;
    iret::execute(&mut cpu, &mut bus, 4, HANDLER + 1).expect("task return");
    assert_eq!(
        (cpu.gpr, cpu.rip, cpu.rflags, cpu.tr.selector),
        (before.0, before.1, before.2 | Rflags::RF, TSS_SELECTOR),
        "RF of a fault"
    );
    // The other task is available again, and will go on after its IRET.
    assert_eq!(cpu.ram.load::<u8>(GDT + 0x4d), Some(0x89));
    assert_eq!(cpu.ram.load::<u32>(OTHER + 0x20), Some(HANDLER as u32 + 1));
}
