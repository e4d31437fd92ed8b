//! Pages of code in which a CPUID stands, or an RDTSCP.

use super::*;
use crate::patch::Patch;

/// CPUID; RET.
const ASKS: &[u8] = &[0x0f, 0xa2, 0xc3];
/// MOV EBX, [RIP - 6]; RET: what it loads are bytes of its own.
const READS_ITSELF: &[u8] = &[0x8b, 0x1d, 0xfa, 0xff, 0xff, 0xff, 0xc3];

/// Calls OTHER, which asks CPUID, the code `beside` it, and the gate, for ever.
fn rig(options: DirectOptions, beside: &[u8]) -> Option<Rig> {
    let rig = Rig::new(options, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again).unwrap();
        a.xor(eax, eax).unwrap();
        a.xor(ecx, ecx).unwrap();
        a.call(OTHER).unwrap();
        a.call(BESIDE).unwrap();
        a.inc(r12).unwrap();
        a.call(GATE).unwrap();
        a.jmp(again).unwrap();
    })?;
    rig.put(OTHER, ASKS);
    rig.put(BESIDE, beside);
    rig.put(GATE, &[0xc3]);
    rig.put(GATE + 256, SENSITIVE);
    if !rig.direct.hazards.cpuid {
        eprintln!("SKIPPED: CPUID faults here");
        return None;
    }
    let any = Patch::as_is([0x90; PAGE_SIZE as usize]);
    if rig.direct.host.patched_page(any).is_none() {
        eprintln!("SKIPPED: this host has no code that can be executed and not read");
        return None;
    }
    Some(rig)
}

const BESIDE: u64 = OTHER + 0x100;
/// A page that is the engine's, whatever happens: so each round comes to an end.
const GATE: u64 = NEXT;

/// Runs until it has gone round so often.
fn rounds(rig: &mut Rig, count: u64) {
    let end = rig.cpu.gpr[12] + count;
    let mut left = 20 * count;
    while rig.cpu.gpr[12] < end {
        assert!(left > 0, "{:#x}: {:?}", rig.cpu.rip, rig.direct.counts);
        left -= 1;
        let left = rig.run().unwrap();
        rig.follow(left);
    }
}

#[test]
fn a_page_that_asks_cpuid_is_executed_from_a_copy() {
    let Some(mut rig) = rig(DirectOptions::always(), &[0xc3]) else {
        return;
    };
    rounds(&mut rig, 10);
    let counts = rig.direct.counts;
    assert_eq!((counts.sensitive, counts.patched), (1 + 10, 1));
    assert_eq!(counts.other_traps, 9, "one for each CPUID since");
    assert_eq!((counts.patched_reads, counts.unexplained), (0, 0));
    let most = rig.cpu.cpuid(0, 0).eax;
    rig.cpu.gpr[0] = 0;
    while rig.cpu.rip != OTHER + 2 {
        let left = rig.run().unwrap();
        rig.follow(left);
    }
    assert_eq!(rig.cpu.gpr[0], u64::from(most), "the guest's answer");
}

#[test]
fn without_copies_each_visit_is_the_engines() {
    let options = DirectOptions {
        unpatched: true,
        ..DirectOptions::always()
    };
    let Some(mut rig) = rig(options, &[0xc3]) else {
        return;
    };
    rounds(&mut rig, 10);
    let counts = rig.direct.counts;
    assert_eq!((counts.sensitive, counts.patched), (20 + 10, 0));
}

#[test]
fn code_reads_itself_as_the_guest_has_it() {
    let Some(mut rig) = rig(DirectOptions::always(), READS_ITSELF) else {
        return;
    };
    // What it reads is CPUID's bytes.
    let distance = (OTHER as i64 - BESIDE as i64 - 6) as i32;
    rig.put(BESIDE + 2, &distance.to_le_bytes());
    let expected = u32::from_le_bytes([ASKS[0], ASKS[1], ASKS[2], 0]);
    for round in 0..10 {
        rounds(&mut rig, 1);
        assert_eq!(rig.cpu.gpr[3], u64::from(expected), "{round}");
    }
    let counts = rig.direct.counts;
    assert_eq!((counts.patched, counts.patched_reads), (1, 10));
    rounds(&mut rig, 3 * u64::from(MOST_TURNS));
    let counts = rig.direct.counts;
    assert_eq!(
        counts.patched_reads,
        u64::from(MOST_TURNS) + 1,
        "then it is the engine's"
    );
    assert_eq!(counts.unexplained, 0);
    assert_eq!(rig.cpu.gpr[3], u64::from(expected));
}

#[test]
fn a_page_that_is_written_has_no_copy_any_more() {
    let Some(mut rig) = rig(DirectOptions::always(), &[0xc3]) else {
        return;
    };
    rounds(&mut rig, 5);
    // INC R13; RET, where the copy has CPUID's bytes changed.
    rig.put(OTHER, &[0x49, 0xff, 0xc5, 0xc3]);
    let Rig { direct, cpu } = &mut rig;
    direct.written(cpu, OTHER);
    let before = rig.direct.counts;
    rounds(&mut rig, 5);
    let counts = rig.direct.counts;
    assert_eq!(rig.cpu.gpr[13], 5);
    assert_eq!(counts.sensitive, before.sensitive + 5);
    assert_eq!(counts.other_traps, before.other_traps);
    // And has one again.
    rig.put(OTHER, ASKS);
    let Rig { direct, cpu } = &mut rig;
    direct.written(cpu, OTHER);
    rounds(&mut rig, 5);
    assert_eq!(rig.direct.counts.patched, before.patched + 1);
}

#[test]
fn what_was_seen_of_another_program_is_no_proof() {
    let Some(mut rig) = rig(DirectOptions::always(), &[0xc3]) else {
        return;
    };
    rounds(&mut rig, 5);
    // MOV EAX, 0x9090A20F in place of CPUID, of whose page nobody has heard that it is another one; and a CPUID that would count.
    rig.put(OTHER, &[0xb8, 0x0f, 0xa2, 0x90, 0x90, 0xc3]);
    rig.put(OTHER + 0x200, ASKS);
    let Rig { direct, cpu } = &mut rig;
    direct.note_cpuid(cpu, OTHER + 0x200);
    let known: Vec<_> = rig.direct.asked_cpuid.values().collect();
    assert!(known.iter().all(|k| k.at == [0x200]), "{known:?}");
}

#[test]
fn what_was_not_seen_executed_is_not_changed() {
    let Some(mut rig) = rig(DirectOptions::always(), &[0xc3]) else {
        return;
    };
    // A second CPUID, which nothing comes to, and that might be part of something else.
    rig.put(OTHER + 0x200, ASKS);
    rounds(&mut rig, 5);
    let counts = rig.direct.counts;
    assert_eq!((counts.sensitive, counts.patched), (10 + 5, 0));
}

/// RDTSCP, the NOP that Linux has behind it in the vDSO; MOV R13D, ECX; RET.
const TELLS_TIME: &[u8] = &[0x0f, 0x01, 0xf9, 0x66, 0x90, 0x41, 0x89, 0xcd, 0xc3];

#[test]
fn the_time_is_told_without_a_stop_and_with_the_guests_number() {
    let Some(mut rig) = rig(DirectOptions::always(), TELLS_TIME) else {
        return;
    };
    rig.put(OTHER, &[0xc3]);
    rig.put(OTHER + 1, &[0x90; 0xff]);
    if rig.direct.host.number_in_copies(&rig.cpu).is_none() {
        return eprintln!("SKIPPED: this host's processors have numbers of more than eight bits");
    }
    for number in [0, 5, 200, 5] {
        rig.cpu.msr.tsc_aux = number;
        rounds(&mut rig, 2);
        let before = (rig.direct.counts, rig.cpu.gpr[0]);
        rounds(&mut rig, 20);
        let counts = rig.direct.counts;
        assert_eq!(rig.cpu.gpr[13], number);
        assert_eq!(
            counts.sensitive,
            before.0.sensitive + 20,
            "the gate's alone"
        );
        assert_eq!(counts.other_traps, before.0.other_traps);
    }
    // The child is stopped right behind RDTSCP.
    let (root, rip) = (root(&rig.cpu), rig.cpu.rip);
    for (at, left) in [(BESIDE + 3, 5), (BESIDE + 5, 0x1234), (BESIDE, 0x1234)] {
        (rig.cpu.rip, rig.cpu.gpr[1]) = (at, 0x1234);
        rig.direct.complete_number(&mut rig.cpu, root);
        assert_eq!(rig.cpu.gpr[1], left, "{at:#x}");
    }
    rig.cpu.rip = rip;
    // A number of more bits than the copy has room for: each is a stop.
    rig.cpu.msr.tsc_aux = 0x1001;
    rounds(&mut rig, 2);
    let before = rig.direct.counts;
    rounds(&mut rig, 20);
    assert_eq!(rig.cpu.gpr[13], 0x1001);
    assert_eq!(rig.direct.counts.other_traps, before.other_traps + 20);
}

#[test]
fn a_page_is_read_as_it_is_until_it_is_executed() {
    let Some(mut rig) = rig(DirectOptions::always(), &[0xc3]) else {
        return;
    };
    rounds(&mut rig, 3);
    assert_eq!(rig.direct.counts.patched_reads, 0);
    let root = root(&rig.cpu);
    let entry = |rig: &Rig| rig.direct.spaces[&root].shadow.get(OTHER);
    assert!(entry(&rig).is_patched());
    let Rig { direct, cpu } = &mut rig;
    // As the engine would for a read of user code elsewhere.
    cpu.rip = CODE;
    assert_eq!(direct.fault(cpu, root, OTHER, 4), None);
    assert!(!entry(&rig).is_patched() && !entry(&rig).may_execute());
    rounds(&mut rig, 3);
    assert!(entry(&rig).is_patched());
    assert_eq!(rig.direct.counts.patched_reads, 1);
}
