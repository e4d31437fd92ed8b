//! Page permissions at every level and size, reserved bits, error codes, accessed and dirty bits.

use doppel_conformance::paging::{A, D, P, RW, US, XD, error};
use doppel_conformance::*;
use doppel_x86::{Cr0, Cr4, Efer, Gpr, Rflags};
use iced_x86::code_asm::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Read,
    Write,
    /// Reads first, but asks for a page that may be written.
    Modify,
    Fetch,
}

const ACCESSES: [Access; 4] = [Access::Read, Access::Write, Access::Modify, Access::Fetch];

/// Where a table entry of the walk to [`X`] stands: PML4, PDPT, page directory, page table.
const LEVELS: [u64; 4] = [PML4 + 8, X_PDPT, X_PD, X_PT];

/// How the processor is set up, and how the page is mapped.
#[derive(Clone, Copy, Debug)]
struct Case {
    user: bool,
    wp: bool,
    smep: bool,
    smap: bool,
    ac: bool,
    /// RW, US, and XD of the entry at `level`; all others allow everything.
    bits: u64,
    level: usize,
    /// 4 KiB, 2 MiB or 1 GiB: the level of the leaf.
    leaf: usize,
}

/// What the manual says: `None` where the access is allowed, or the error code.
fn expected(c: &Case, access: Access) -> Option<u64> {
    let (writable, user_page) = (c.bits & RW != 0, c.bits & US != 0);
    let write = matches!(access, Access::Write | Access::Modify);
    let allowed = if access == Access::Fetch {
        c.bits & XD == 0
            && if c.user {
                user_page
            } else {
                !(c.smep && user_page)
            }
    } else if c.user {
        user_page && (!write || writable)
    } else {
        {
            let smap = c.smap && user_page && !c.ac;
            let protected = write && !writable && c.wp;
            !smap && !protected
        }
    };
    let bits = error::P
        | if write { error::W } else { 0 }
        | if c.user { error::U } else { 0 }
        | if access == Access::Fetch { error::I } else { 0 };
    (!allowed).then_some(bits)
}

/// Maps [`X`] as the case says, onto [`SPARE`].
fn map(m: &Machine, c: &Case) {
    for (level, at) in LEVELS.iter().enumerate().take(c.leaf + 1) {
        let bits = if level == c.level { c.bits } else { RW | US };
        let target = if level == c.leaf {
            SPARE | if c.leaf < 3 { paging::PS } else { 0 }
        } else {
            [X_PDPT, X_PD, X_PT][level]
        };
        m.put(
            *at,
            target
                & !(if c.leaf == 1 && level == 1 {
                    0x3fff_e000
                } else {
                    0
                })
                | bits
                | P,
        );
    }
}

/// The physical page that [`map`] maps: a 1 GiB page begins at 0.
fn physical(c: &Case) -> u64 {
    if c.leaf == 1 { 0 } else { SPARE }
}

/// The offset in the page that is used: with 1 GiB pages one that lies in [`SPARE`].
fn linear(c: &Case) -> u64 {
    X + SPARE - physical(c)
}

fn try_access(m: &mut Machine, c: &Case, access: Access) -> Option<Record> {
    m.forget();
    m.to_kernel();
    if c.user {
        m.to_user();
    }
    let cpu = m.cpu_mut();
    cpu.cr0.set(Cr0::WP, c.wp);
    cpu.cr4.set(Cr4::SMEP, c.smep);
    cpu.cr4.set(Cr4::SMAP, c.smap);
    cpu.rflags.set(Rflags::AC, c.ac);
    cpu.flush_tlb(true);
    cpu.gpr[Gpr::Rbx as usize] = linear(c) + 0x10;
    cpu.gpr[Gpr::Rax as usize] = 0;
    let base = m.fault_at();
    m.put_bytes(SPARE, &[0xc3; 0x40]);
    let records = {
        let prepare = base - 0x800;
        m.place(64, prepare, |a: &mut CodeAssembler| {
            a.mov(r15, prepare + 0xc00)?;
            a.jmp(base)
        });
        let end = m.place(64, base, |a: &mut CodeAssembler| match access {
            Access::Read => a.mov(eax, dword_ptr(rbx)),
            Access::Write => a.mov(dword_ptr(rbx), eax),
            Access::Modify => a.or(dword_ptr(rbx), eax),
            Access::Fetch => a.call(rbx),
        });
        for at in [end, prepare + 0xc00] {
            m.place(64, at, machine::stop);
        }
        m.go(prepare);
        m.run();
        m.records()
    };
    assert!(records.len() <= 1, "{c:x?} {access:?}: {records:x?}");
    let r = records.first().copied()?;
    assert_eq!(
        (r.vector, r.cr2),
        (14, linear(c) + 0x10),
        "{c:x?} {access:?}"
    );
    let at = if access == Access::Fetch { r.cr2 } else { base };
    assert_eq!(r.rip, at, "{c:x?} {access:?}");
    Some(r)
}

fn check(m: &mut Machine, c: &Case) {
    map(m, c);
    for access in ACCESSES {
        let r = try_access(m, c, access);
        assert_eq!(r.map(|r| r.error), expected(c, access), "{c:x?} {access:?}");
    }
}

const OPEN: Case = Case {
    user: false,
    wp: true,
    smep: false,
    smap: false,
    ac: false,
    bits: RW | US,
    level: 3,
    leaf: 3,
};

/// All combinations of RW, US and XD.
fn all_bits() -> impl Iterator<Item = u64> {
    (0..8u64).map(|n| {
        [RW, US, XD]
            .iter()
            .enumerate()
            .fold(0, |bits, (at, bit)| bits | ((n >> at & 1) * bit))
    })
}

#[test]
fn permissions_with_every_control_bit() {
    each_engine(|m| {
        for bits in all_bits() {
            for n in 0..16u32 {
                let [wp, smep, smap, ac] = [1, 2, 4, 8].map(|b| n & b != 0);
                let c = Case {
                    wp,
                    smep,
                    smap,
                    ac,
                    bits,
                    ..OPEN
                };
                check(m, &c);
            }
            check(
                m,
                &Case {
                    user: true,
                    bits,
                    ..OPEN
                },
            );
            check(
                m,
                &Case {
                    user: true,
                    smep: true,
                    smap: true,
                    ac: true,
                    bits,
                    ..OPEN
                },
            );
        }
    });
}

#[test]
fn permissions_at_every_level_and_page_size() {
    each_engine(|m| {
        for leaf in [1, 2, 3] {
            for level in 0..=leaf {
                for bits in all_bits() {
                    for user in [false, true] {
                        check(
                            m,
                            &Case {
                                user,
                                bits,
                                level,
                                leaf,
                                ..OPEN
                            },
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn without_nx_the_bit_is_reserved_and_fetches_look_like_reads() {
    each_engine(|m| {
        m.cpu_mut().efer.remove(Efer::NXE);
        for (bits, error) in [(US, error::P), (US | XD, error::P | error::RSVD)] {
            let c = Case { bits, ..OPEN };
            map(m, &c);
            let r = try_access(m, &c, Access::Read);
            assert_eq!(r.map(|r| r.error), (bits & XD != 0).then_some(error));
            let c = Case {
                user: true,
                bits: bits & !US,
                ..OPEN
            };
            map(m, &c);
            let r = try_access(m, &c, Access::Fetch).expect("no right");
            assert_eq!(r.error, error | error::U);
        }
    });
}

#[test]
fn what_is_not_present_faults_at_every_level() {
    each_engine(|m| {
        for leaf in [1, 2, 3] {
            for (level, at) in LEVELS.iter().enumerate().take(leaf + 1) {
                for user in [false, true] {
                    let c = Case { user, leaf, ..OPEN };
                    map(m, &c);
                    let entry = m.get(*at);
                    // Nothing else in the entry counts.
                    m.put(*at, (entry | 0x7ff0_0000_0000_0000) & !P);
                    for access in ACCESSES {
                        let r = try_access(m, &c, access).expect("a fault");
                        let all = expected(
                            &Case {
                                bits: XD,
                                wp: true,
                                smap: true,
                                ..c
                            },
                            access,
                        );
                        let all = all.unwrap_or(match access {
                            Access::Write | Access::Modify => error::W,
                            _ => 0,
                        });
                        assert_eq!(r.error, all & !error::P, "{c:?} level {level} {access:?}");
                    }
                }
            }
        }
    });
}

#[test]
fn reserved_bits_fault_at_every_level() {
    each_engine(|m| {
        let beyond = 1u64 << 51;
        for (level, leaf, bits) in [
            (0, 3, paging::PS),
            (0, 3, beyond),
            (1, 3, beyond),
            (2, 3, beyond),
            (3, 3, beyond),
            (2, 2, 1 << 13),
            (2, 2, 1 << 20),
            (1, 1, 1 << 13),
            (1, 1, 1 << 29),
        ] {
            for user in [false, true] {
                let c = Case { user, leaf, ..OPEN };
                map(m, &c);
                m.put(LEVELS[level], m.get(LEVELS[level]) | bits);
                for access in ACCESSES {
                    let r = try_access(m, &c, access).expect("a fault");
                    let write = matches!(access, Access::Write | Access::Modify);
                    let code = error::P
                        | error::RSVD
                        | if write { error::W } else { 0 }
                        | if user { error::U } else { 0 }
                        | if access == Access::Fetch { error::I } else { 0 };
                    assert_eq!(r.error, code, "level {level} bits {bits:x} {access:?}");
                }
            }
        }
    });
}

/// Accessed and dirty bits of the entries of the walk.
fn accessed_dirty(m: &Machine, leaf: usize) -> Vec<u64> {
    LEVELS[..=leaf]
        .iter()
        .map(|at| m.get(*at) & (A | D))
        .collect()
}

#[test]
fn accessed_and_dirty_bits_are_set_by_what_is_done() {
    each_engine(|m| {
        for leaf in [1, 2, 3] {
            for user in [false, true] {
                for access in ACCESSES {
                    let c = Case { user, leaf, ..OPEN };
                    map(m, &c);
                    assert!(try_access(m, &c, access).is_none());
                    let write = matches!(access, Access::Write | Access::Modify);
                    let mut all = vec![A; leaf + 1];
                    all[leaf] |= if write { D } else { 0 };
                    assert_eq!(accessed_dirty(m, leaf), all, "{access:?} {leaf}");
                }
            }
        }
    });
}

#[test]
fn code_that_ends_with_its_page_leaves_the_next_alone() {
    /// FLD1; FST [RBX]: the processor executes them for the interpreter, from a copy. ADDPS XMM0, [RBX]; MOV [RBX], EAX. RET behind each.
    const CODES: [&[u8]; 3] = [
        &[0xd9, 0xe8, 0xd9, 0x13, 0xc3],
        &[0x0f, 0x58, 0x03, 0xc3],
        &[0x89, 0x03, 0xc3],
    ];
    each_engine(|m| {
        for code in CODES {
            let end = 0x1000 - code.len() as u64;
            m.map(0, SPARE, P | RW);
            m.map(1, SPARE + 0x1000, P | RW);
            m.cpu_mut().flush_tlb(true);
            m.put_bytes(SPARE + end, code);
            m.run_code(|a| {
                a.fninit()?;
                a.mov(rbx, DATA)?;
                a.mov(rdx, X + end)?;
                a.call(rdx)
            });
            assert_eq!(m.entry(0) & A, A, "{code:x?}");
            assert_eq!(m.entry(1) & (A | D), 0, "{code:x?}");
        }
    });
}

#[test]
fn a_faulting_access_leaves_the_leaf_alone() {
    each_engine(|m| {
        for leaf in [1, 2, 3] {
            for access in ACCESSES {
                let c = Case {
                    user: true,
                    bits: XD,
                    level: leaf,
                    leaf,
                    ..OPEN
                };
                map(m, &c);
                assert!(try_access(m, &c, access).is_some());
                assert_eq!(accessed_dirty(m, leaf)[leaf], 0, "{access:?}");
            }
            // A write that is refused does not make a page dirty that a read had used.
            let c = Case {
                user: true,
                bits: US,
                level: leaf,
                leaf,
                ..OPEN
            };
            map(m, &c);
            assert!(try_access(m, &c, Access::Read).is_none());
            assert!(try_access(m, &c, Access::Write).is_some());
            assert_eq!(accessed_dirty(m, leaf)[leaf], A);
        }
    });
}

#[test]
fn a_write_after_a_read_makes_the_page_dirty_in_translated_loops_too() {
    each_engine(|m| {
        m.map(0, SPARE, P | RW);
        m.map(1, SPARE + 0x1000, P | RW);
        m.run_code(|a| {
            a.mov(rbx, X)?;
            a.mov(ecx, 100)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.add(rax, qword_ptr(rbx))?;
            a.add(rax, qword_ptr(rbx + 0x1000))?;
            a.dec(ecx)?;
            a.jnz(again)?;
            a.mov(qword_ptr(rbx), rax)
        });
        assert_eq!(m.entry(0) & (A | D), A | D);
        assert_eq!(m.entry(1) & (A | D), A);
    });
}

#[test]
fn bits_that_the_guest_clears_are_set_again_after_a_flush() {
    each_engine(|m| {
        m.map(0, SPARE, P | RW);
        m.run_code(|a| {
            a.mov(rbx, X)?;
            a.mov(ecx, 4)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(qword_ptr(rbx), rcx)?;
            a.mov(rax, qword_ptr(X_PT))?;
            a.and(eax, (A | D) as i32)?;
            a.mov(qword_ptr(rcx * 8 + DATA), rax)?;
            a.and(qword_ptr(X_PT), !(A | D) as i32)?;
            a.invlpg(byte_ptr(rbx))?;
            a.dec(ecx)?;
            a.jnz(again)?;
            // Read alone: accessed, not dirty.
            a.mov(rax, qword_ptr(rbx))
        });
        assert_eq!([1, 2, 3, 4].map(|n| m.data(n)), [A | D; 4]);
        assert_eq!(m.entry(0) & (A | D), A);
    });
}

#[test]
fn implicit_accesses_are_the_supervisors() {
    each_engine(|m| {
        // The GDT on a supervisor page is read for a user's segment load; SMAP does not let AC help a table.
        m.enable(Cr4::SMAP);
        m.run_user(|a| {
            a.mov(eax, USER_DS as u32)?;
            a.mov(ds, eax)?;
            a.mov(fs, eax)
        });
        assert!(m.records().is_empty());
        // Descriptor tables on a user page with SMAP: the implicit access faults, as a supervisor's.
        m.to_kernel();
        m.forget();
        let copy = USER_DATA;
        for n in 0..12 {
            m.put(copy + 8 * n, m.get(GDT + 8 * n));
        }
        m.cpu_mut().gdtr.base = copy;
        m.cpu_mut().rflags.insert(Rflags::AC);
        m.gate_on_ist(14, 1);
        m.action(14, Action::Stop);
        m.place(64, CODE, |a: &mut CodeAssembler| {
            a.mov(eax, USER_DS as u32)?;
            a.mov(ds, eax)
        });
        m.go(CODE);
        // The gate's own code segment lies there too: double fault, then shutdown.
        assert_eq!(m.run_to_exit(), doppel_x86::Exit::Shutdown);
        assert_eq!(m.cpu().cr2 & !0xff, copy);
    });
}
