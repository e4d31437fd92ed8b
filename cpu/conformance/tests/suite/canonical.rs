//! The end of the lower half: what reaches beyond it is #GP(0), or #SS(0) through the stack segment, and never asks the page tables.

use doppel_conformance::paging::{A, P, RW};
use doppel_conformance::*;
use doppel_x86::{Cr4, Gpr, Seg, Vendor};
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

/// Descriptors behind those that the machine has: a call gate, an LDT and a TSS, all of which lead to the end.
const GATE: u64 = 0x60;
const LDT: u64 = 0x70;
const OTHER_TSS: u64 = 0x80;
/// Far pointers: to the end with 64 bits, and to the gate with 32.
const FAR: u64 = DATA;
const FAR_GATE: u64 = DATA + 0x10;
/// What LGDT and LIDT load.
const TABLE: u64 = DATA + 0x20;

fn put_ways_to_the_end(m: &mut Machine) {
    let gate = (END & 0xffff) | KERNEL_CS << 16 | 0x8c << 40 | (END >> 16 & 0xffff) << 48;
    for (selector, low) in [
        (GATE, gate),
        (LDT, 0xfff | 0x82 << 40),
        (OTHER_TSS, 0x67 | 0x89 << 40),
    ] {
        m.put(GDT + selector, low);
        m.put(GDT + selector + 8, END >> 32);
    }
    m.cpu_mut().gdtr.limit = 0x8f;
    m.put(FAR, END);
    m.put(FAR + 8, KERNEL_CS);
    m.put(FAR_GATE, GATE << 32);
    m.put(TABLE, 0xfffu16);
    m.put(TABLE + 2, END);
    m.cpu_mut().msr.sysenter_cs = KERNEL_CS;
    map_the_end(m, PML4, 4);
}

/// What the kernel does, and the vector and error code of what it raises.
const KERNELS: [(&str, Emit, Emit, u64, u64); 15] = [
    ("LLDT", |a| a.mov(eax, LDT as u32), |a| a.lldt(ax), 13, LDT),
    (
        "LTR",
        |a| a.mov(eax, OTHER_TSS as u32),
        |a| a.ltr(ax),
        13,
        OTHER_TSS,
    ),
    ("LGDT", |_| Ok(()), |a| a.lgdt(tbyte_ptr(TABLE)), 13, 0),
    ("LIDT", |_| Ok(()), |a| a.lidt(tbyte_ptr(TABLE)), 13, 0),
    (
        "JMP through a gate",
        |a| a.mov(ebx, FAR_GATE as u32),
        |a| a.db(&[0xff, 0x2b]),
        13,
        0,
    ),
    (
        "CALL through a gate",
        |a| a.mov(ebx, FAR_GATE as u32),
        |a| a.db(&[0xff, 0x1b]),
        13,
        0,
    ),
    (
        "RETF",
        |a| push_all(a, &[KERNEL_CS, END]),
        |a| a.db(&[0x48, 0xcb]),
        13,
        0,
    ),
    (
        "RETF to a user",
        |a| push_all(a, &[USER_DS, USER_STACK, USER_CS, END]),
        |a| a.db(&[0x48, 0xcb]),
        13,
        0,
    ),
    (
        "FXSAVE",
        |a| a.mov(rbx, END - 256),
        |a| a.fxsave64(ptr(rbx)),
        13,
        0,
    ),
    (
        "FXSAVE on the stack",
        |a| a.mov(rbp, END - 256),
        |a| a.fxsave64(ptr(rbp)),
        12,
        0,
    ),
    (
        "FXRSTOR",
        |a| a.mov(rbx, END - 16),
        |a| a.fxrstor64(ptr(rbx)),
        13,
        0,
    ),
    (
        "FXRSTOR on the stack",
        |a| a.mov(rbp, END - 16),
        |a| a.fxrstor64(ptr(rbp)),
        12,
        0,
    ),
    (
        "MOVUPS",
        |a| a.mov(rbx, END - 8),
        |a| a.movups(xmmword_ptr(rbx), xmm0),
        13,
        0,
    ),
    (
        "CMPXCHG16B",
        |a| a.mov(rbx, END),
        |a| a.cmpxchg16b(xmmword_ptr(rbx)),
        13,
        0,
    ),
    (
        "SGDT",
        |a| a.mov(rbx, END - 4),
        |a| a.sgdt(tbyte_ptr(rbx)),
        13,
        0,
    ),
];

/// The same for what is not alike on all processors: Intel's vector and error code, and AMD's vector where it has the instruction.
const INTELS: [(&str, Emit, Emit, Option<u64>); 4] = [
    (
        "far JMP",
        |a| a.mov(ebx, FAR as u32),
        |a| a.db(&[0x48, 0xff, 0x2b]),
        None,
    ),
    (
        "far CALL",
        |a| a.mov(ebx, FAR as u32),
        |a| a.db(&[0x48, 0xff, 0x1b]),
        None,
    ),
    (
        "SYSEXIT",
        |a| sysexit_registers(a, END, USER_STACK),
        |a| a.sysexitq(),
        Some(6),
    ),
    (
        "SYSEXIT to a stack",
        |a| sysexit_registers(a, USER_CODE, END),
        |a| a.sysexitq(),
        Some(6),
    ),
];

fn push_all(a: &mut CodeAssembler, words: &[u64]) -> Result<(), IcedError> {
    words.iter().try_for_each(|word| {
        a.mov(rax, *word)?;
        a.push(rax)
    })
}

fn sysexit_registers(a: &mut CodeAssembler, to: u64, stack: u64) -> Result<(), IcedError> {
    a.mov(rdx, to)?;
    a.mov(rcx, stack)
}

#[test]
fn what_leads_behind_the_end_is_refused() {
    each_engine_and_vendor(|m| {
        put_ways_to_the_end(m);
        let intel = m.cpu().cpuid.vendor() == Vendor::Intel;
        let makers = INTELS.into_iter().filter_map(|(what, prepare, code, amd)| {
            let vector = if intel { Some(13) } else { amd };
            vector.map(|vector| (what, prepare, code, vector, 0))
        });
        for (what, prepare, code, vector, error) in KERNELS.into_iter().chain(makers) {
            println!("{what}");
            m.forget();
            m.to_kernel();
            let before = (m.cpu().tr, m.cpu().ldtr, m.cpu().gdtr, m.cpu().idtr);
            let r = m.faults(prepare, code);
            let error = if vector == 6 { Record::NO_ERROR } else { error };
            assert_eq!(
                (r.vector, r.error, r.rip, r.cs),
                (vector, error, CODE + 0x800, KERNEL_CS)
            );
            assert_eq!(
                (m.cpu().tr, m.cpu().ldtr, m.cpu().gdtr, m.cpu().idtr),
                before
            );
            assert_not_walked(m, 4);
        }
        m.forget();
        m.to_kernel();
        m.run_code(|a| {
            a.mov(rbx, END)?;
            a.invlpg(ptr(rbx))?;
            a.mov(rbx, END - 512)?;
            a.fxsave64(ptr(rbx))?;
            a.fxrstor64(ptr(rbx))
        });
        assert!(m.records().is_empty());
    });
}

#[test]
fn a_stack_does_not_reach_behind_the_end() {
    let pushes: [Emit; 6] = [
        |a| a.push(rax),
        |a| a.push(5),
        |a| a.push(qword_ptr(USER_DATA)),
        |a| a.pushfq(),
        |a| a.call(USER_CODE),
        |a| a.enter(8, 0),
    ];
    let pops: [Emit; 5] = [
        |a| a.pop(rax),
        |a| a.pop(qword_ptr(USER_DATA)),
        |a| a.popfq(),
        |a| a.ret(),
        |a| a.leave(),
    ];
    each_engine_and_vendor(|m| {
        map_the_end(m, PML4, 4);
        let from = |stack: [u64; 2], codes: &[Emit]| -> Vec<(u64, Emit)> {
            let each = |at| codes.iter().map(move |code| (at, *code));
            stack.into_iter().flat_map(each).collect()
        };
        let pushed = from([END + 8, END + 4], &pushes);
        let popped = from([END, END - 4], &pops);
        for (n, (stack, code)) in pushed.into_iter().chain(popped).enumerate() {
            println!("{n}: {stack:x}");
            m.forget();
            m.to_user();
            let prepare = |a: &mut CodeAssembler| {
                a.mov(rsp, stack)?;
                a.mov(rbp, stack)
            };
            let r = m.faults(prepare, code);
            assert_eq!((r.vector, r.error, r.rsp), (12, 0, stack));
            assert_not_walked(m, 4);
        }
    });
}

/// As measured on Intel's processors, of which the manual says the same.
#[test]
fn far_transfers_look_at_their_stack_before_their_target() {
    const FRAME: u64 = X + 0x1000 - 24;
    const NOT_MAPPED: u64 = X + 0x1800;
    const ABSENT: u64 = ABSENT_DS | 3;
    let frame: Emit = |a| {
        a.mov(rsp, X + 0x1000)?;
        push_all(a, &[2, USER_CS, END])?;
        a.mov(rsp, FRAME)
    };
    let far_call: Emit = |a| a.db(&[0x48, 0xff, 0x1b]);
    let cases: [(&str, Emit, Emit, u64, u64); 8] = [
        ("IRET, no stack pointer", frame, |a| a.iretq(), 14, 0),
        (
            "IRET, bad stack segment",
            |a| push_all(a, &[ABSENT, USER_STACK, 2, USER_CS, END]),
            |a| a.iretq(),
            13,
            ABSENT_DS,
        ),
        (
            "IRET, good stack",
            |a| push_all(a, &[USER_DS, USER_STACK, 2, USER_CS, END]),
            |a| a.iretq(),
            13,
            0,
        ),
        (
            "RETF, bad stack segment",
            |a| push_all(a, &[ABSENT, USER_STACK, USER_CS, END]),
            |a| a.db(&[0x48, 0xcb]),
            13,
            ABSENT_DS,
        ),
        (
            "CALL, no stack",
            |a| {
                a.mov(ebx, FAR as u32)?;
                a.mov(rsp, NOT_MAPPED)
            },
            far_call,
            14,
            2,
        ),
        (
            "CALL, stack behind the end",
            |a| {
                a.mov(ebx, FAR as u32)?;
                a.mov(rsp, END + 64)
            },
            far_call,
            12,
            0,
        ),
        (
            "CALL through a gate, no stack",
            |a| {
                a.mov(ebx, FAR_GATE as u32)?;
                a.mov(rsp, NOT_MAPPED)
            },
            |a| a.db(&[0xff, 0x1b]),
            14,
            2,
        ),
        (
            "CALL through a gate, stack behind the end",
            |a| {
                a.mov(ebx, FAR_GATE as u32)?;
                a.mov(rsp, END + 64)
            },
            |a| a.db(&[0xff, 0x1b]),
            12,
            0,
        ),
    ];
    each_engine(|m| {
        put_ways_to_the_end(m);
        m.map(0, SPARE, P | RW);
        for vector in [12, 13, 14] {
            m.gate_on_ist(vector, 1);
        }
        m.gate(STOP, STOPPED_AT, 0xe, 1, 3);
        // AMD's far pointers have 32 bits of offset.
        let intel = m.cpu().cpuid.vendor() == Vendor::Intel;
        for (what, prepare, code, vector, error) in cases {
            if !intel && what.starts_with("CALL, ") {
                continue;
            }
            println!("{what}");
            m.forget();
            m.to_kernel();
            let r = m.faults(prepare, code);
            assert_eq!((r.vector, r.error, r.rip), (vector, error, CODE + 0x800));
        }
    });
}

/// As measured: of 64 bits compatibility mode takes 32.
#[test]
fn an_address_of_compatibility_mode_has_32_bits() {
    const HIGH: u64 = 1 << 63;
    let returns: [Emit; 2] = [
        |a| {
            push_all(a, &[USER_DS, USER_STACK, 2, USER_CS32, USER_CODE | HIGH])?;
            a.iretq()
        },
        |a| {
            push_all(a, &[USER_DS, USER_STACK, USER_CS32, USER_CODE | HIGH])?;
            a.db(&[0x48, 0xcb])
        },
    ];
    each_engine(|m| {
        for code in returns {
            m.forget();
            m.to_kernel();
            m.place(32, USER_CODE, |a: &mut CodeAssembler| {
                // DEC EAX here, a REX prefix in 64-bit mode.
                a.mov(eax, 5)?;
                a.dec(eax)?;
                machine::stop(a)
            });
            m.place(64, CODE, code);
            m.go(CODE);
            m.run();
            assert!(m.records().is_empty());
            assert_eq!(m.reg(Gpr::Rax), 4);
        }
    });
}
