//! The end of the lower half: what reaches beyond it is #GP(0), or #SS(0) through the stack segment, and never asks the page tables.

use doppel_conformance::paging::A;
use doppel_conformance::*;
use doppel_x86::{Cr4, Seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

/// The first address that is not canonical.
pub const END: u64 = 1 << 47;
/// The page below, and the one that a walk would find beyond.
const LAST: u64 = SPARE;
const BEYOND: u64 = SPARE + 0x1000;

/// Maps [`LAST`] below the end of the lower half under this root, of so many levels, and [`BEYOND`] where a walk from the end on arrives.
pub fn map_the_end(m: &Machine, root: u64, levels: u64) {
    let mut table = root;
    for level in 1..levels {
        let next = TABLES + 0x1000 * level;
        // The root's lower half ends in its middle.
        let last = if level == 1 { 255 } else { 511 };
        m.put(table + 8 * last, next | 7);
        m.put(table + 8 * ((last + 1) % 512), next | 7);
        table = next;
    }
    m.put(table + 8 * 511, LAST | 7);
    m.put(table, BEYOND | 7);
    m.put_bytes(LAST, &[0; 0x1000]);
    m.put_bytes(BEYOND, &[0; 0x1000]);
}

/// Fails where the page beyond was walked to.
fn assert_not_walked(m: &Machine, levels: u64) {
    let entry = m.get(TABLES + 0x1000 * (levels - 1));
    assert_eq!(entry & A, 0, "the accessed bit beyond the end");
}

/// Runs instructions that reach the end from below, as the kernel and as a user.
pub fn fetch_across(m: &mut Machine, end: u64, levels: u64) {
    // MOV EAX, imm32, of which two bytes are there; NOP as the last one.
    for (bytes, faults_at) in [(&[0xb8, 0x90][..], end - 2), (&[0x90], end)] {
        for user in [false, true] {
            println!("{bytes:x?}, user {user}");
            m.forget();
            m.to_kernel();
            if user {
                m.to_user();
            }
            m.action(13, Action::Stop);
            m.action(14, Action::Stop);
            m.put_bytes(LAST + 0x1000 - bytes.len() as u64, bytes);
            m.go(end - bytes.len() as u64);
            m.run();
            let records = m.records();
            assert_eq!(records.len(), 1);
            let r = records[0];
            assert_eq!((r.vector, r.error, r.rip), (13, 0, faults_at));
            assert_not_walked(m, levels);
        }
    }
}

#[test]
fn instructions_do_not_go_on_behind_the_end() {
    each_engine_and_vendor(|m| {
        map_the_end(m, PML4, 4);
        fetch_across(m, END, 4);
    });
}

/// With so many components enabled; false where the processor does not have them.
fn enable_xsave(m: &mut Machine) -> bool {
    let has = m.cpu().cpuid.has_xsave() && m.cpu().cpuid.xcr0() & 7 == 7;
    m.enable(Cr4::OSXSAVE);
    m.cpu_mut().xcr0 = 7;
    has && m.cpu().cpuid(0xd, 1).eax & 3 == 3
}

/// All components in use, and the area in RBX and RBP.
fn begin_xsave(a: &mut CodeAssembler, at: u64, components: u64) -> Result<(), IcedError> {
    a.vpcmpeqd(ymm3, ymm3, ymm3)?;
    a.fninit()?;
    a.fld1()?;
    a.mov(rbx, at)?;
    a.mov(rbp, at)?;
    a.mov(eax, components as u32)?;
    a.xor(edx, edx)
}

const SAVES: [(Emit, Emit); 4] = [
    (|a| a.xsave64(ptr(rbx)), |a| a.xsave64(ptr(rbp))),
    (|a| a.xsaveopt64(ptr(rbx)), |a| a.xsaveopt64(ptr(rbp))),
    (|a| a.xsavec64(ptr(rbx)), |a| a.xsavec64(ptr(rbp))),
    (|a| a.xrstor64(ptr(rbx)), |a| a.xrstor64(ptr(rbp))),
];

/// An area that is there as far as component 2: a standard one that has it, or a compacted one.
fn put_area(m: &Machine, at: u64, compacted: bool) {
    m.put_bytes(at, &[0; 576]);
    m.put(at + 24, 0x1f80u32);
    m.put(at + 512, 7u64);
    m.put(at + 520, if compacted { 1 << 63 | 7 } else { 0u64 });
}

#[test]
fn state_is_not_saved_behind_the_end() {
    each_engine_and_vendor(|m| {
        if !enable_xsave(m) {
            return;
        }
        map_the_end(m, PML4, 4);
        // Nothing of component 2 is there, and a part of it.
        for length in [576, 640] {
            for (n, (code, on_stack)) in SAVES.into_iter().enumerate() {
                for (code, vector) in [(code, 13), (on_stack, 12)] {
                    for compacted in [false, true] {
                        println!("{n}, {length} bytes, vector {vector}, compacted {compacted}");
                        m.forget();
                        m.to_kernel();
                        put_area(m, LAST + 0x1000 - length, compacted);
                        let before = m.get(LAST + 0x1000 - length + 32);
                        let r = m.faults(|a| begin_xsave(a, END - length, 7), code);
                        assert_eq!((r.vector, r.error), (vector, 0));
                        assert_eq!(m.get(LAST + 0x1000 - length + 32), before);
                        assert_not_walked(m, 4);
                        // What is not asked for is not touched.
                        m.forget();
                        m.to_kernel();
                        m.run_code(|a| {
                            begin_xsave(a, END - length, 3)?;
                            code(a)
                        });
                        assert!(m.records().is_empty());
                    }
                }
            }
        }
    });
}

#[test]
fn state_is_not_saved_behind_a_segments_limit() {
    let codes: [(Emit, Emit); 2] = [
        (|a| a.xsave(ptr(ebx)), |a| a.xsave(ptr(ebp))),
        (|a| a.xrstor(ptr(ebx)), |a| a.xrstor(ptr(ebp))),
    ];
    each_engine_and_vendor(|m| {
        if !enable_xsave(m) {
            return;
        }
        for (limit, components, fine) in [(575, 7, false), (576 + 255, 7, true), (575, 3, true)] {
            for (code, on_stack) in codes {
                for (code, vector, seg) in [(code, 13, Seg::Ds), (on_stack, 12, Seg::Ss)] {
                    println!("{limit} {components} {vector}");
                    m.forget();
                    m.to_user32();
                    m.cpu_mut().seg[seg as usize].limit = USER_DATA as u32 + limit;
                    for vector in [12, 13] {
                        m.action(vector, Action::Stop);
                    }
                    put_area(m, USER_DATA, false);
                    m.place(32, USER_CODE, |a: &mut CodeAssembler| {
                        a.mov(ebx, USER_DATA as u32)?;
                        a.mov(ebp, USER_DATA as u32)?;
                        a.mov(eax, components)?;
                        a.xor(edx, edx)?;
                        code(a)?;
                        a.int(0x81)
                    });
                    m.go(USER_CODE);
                    m.run();
                    let seen: Vec<_> = m.records().iter().map(|r| (r.vector, r.error)).collect();
                    let expected = if fine { vec![] } else { vec![(vector, 0)] };
                    assert_eq!(seen, expected);
                }
            }
        }
    });
}
