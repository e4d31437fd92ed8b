//! Translations of linear addresses: after a flush that must drop one it is never used again, for data or for code.

use doppel_conformance::paging::{G, P, RW, US, XD, error};
use doppel_conformance::*;
use doppel_x86::{Cr0, Cr4, Gpr};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const OTHER: u64 = SPARE + 0x1000;

/// Points page 0 of [`X`] at another physical page, in the guest.
fn remap(a: &mut CodeAssembler, entry: u64) -> Result<(), IcedError> {
    a.mov(r8, entry)?;
    a.mov(qword_ptr(X_PT), r8)
}

type Flush = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn reload_cr3(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(r8, cr3)?;
    a.mov(cr3, r8)
}

fn toggle_cr4(a: &mut CodeAssembler, bit: Cr4) -> Result<(), IcedError> {
    a.mov(r8, cr4)?;
    a.xor(r8, bit.bits() as i32)?;
    a.mov(cr4, r8)?;
    a.xor(r8, bit.bits() as i32)?;
    a.mov(cr4, r8)
}

fn invpcid(a: &mut CodeAssembler, kind: u64, pcid: i32) -> Result<(), IcedError> {
    a.mov(r8, kind)?;
    a.mov(qword_ptr(DATA + 0x100), pcid)?;
    a.mov(r9, X)?;
    a.mov(qword_ptr(DATA + 0x108), r9)?;
    a.invpcid(r8, xmmword_ptr(DATA + 0x100))
}

/// What drops a translation that is not global, and whether it drops a global one too.
const FLUSHES: &[(&str, Flush, bool)] = &[
    ("INVLPG", |a| a.invlpg(byte_ptr(rbx)), true),
    ("CR3", reload_cr3, false),
    ("CR4.PGE", |a| toggle_cr4(a, Cr4::PGE), true),
    ("INVPCID of an address", |a| invpcid(a, 0, 0), false),
    ("INVPCID of a context", |a| invpcid(a, 1, 0), false),
    ("INVPCID of everything", |a| invpcid(a, 2, 0), true),
    (
        "INVPCID of everything that is not global",
        |a| invpcid(a, 3, 0),
        false,
    ),
];

#[test]
fn a_flush_drops_what_it_must_for_data() {
    each_engine(|m| {
        m.put(SPARE, 1u64);
        m.put(OTHER, 2u64);
        for (what, flush, global_too) in FLUSHES {
            for global in [0, G].into_iter().take(1 + usize::from(*global_too)) {
                println!("{what} {global:x}");
                m.to_kernel();
                m.map(0, SPARE, P | RW | global);
                m.run_code(|a| {
                    a.mov(rbx, X)?;
                    a.invlpg(byte_ptr(rbx))?;
                    a.mov(rax, qword_ptr(rbx))?;
                    a.mov(qword_ptr(rbx), rax)?;
                    remap(a, OTHER | P | RW | global)?;
                    flush(a)?;
                    a.mov(rcx, qword_ptr(rbx))?;
                    a.mov(qword_ptr(rbx + 8), rcx)
                });
                assert_eq!((m.reg(Gpr::Rax), m.reg(Gpr::Rcx)), (1, 2), "{what}");
                assert_eq!(m.get(OTHER + 8), 2, "{what}");
            }
        }
        assert_eq!(m.get(SPARE + 8), 0);
    });
}

#[test]
fn a_flush_drops_what_it_must_for_code() {
    each_engine(|m| {
        let routine = |n: u64| {
            move |a: &mut CodeAssembler| {
                a.add(rax, n as i32)?;
                a.ret()
            }
        };
        m.place_at(64, SPARE, X, routine(1));
        m.place_at(64, OTHER, X, routine(0x100));
        for (what, flush, global_too) in FLUSHES {
            for global in [0, G].into_iter().take(1 + usize::from(*global_too)) {
                println!("{what} {global:x}");
                m.to_kernel();
                m.map(0, SPARE, P | global);
                m.run_code(|a| {
                    a.xor(eax, eax)?;
                    a.mov(rbx, X)?;
                    a.invlpg(byte_ptr(rbx))?;
                    a.mov(ecx, 3)?;
                    let mut first = a.create_label();
                    a.set_label(&mut first)?;
                    a.call(rbx)?;
                    a.dec(ecx)?;
                    a.jnz(first)?;
                    remap(a, OTHER | P | global)?;
                    flush(a)?;
                    a.mov(ecx, 3)?;
                    let mut second = a.create_label();
                    a.set_label(&mut second)?;
                    a.call(rbx)?;
                    a.dec(ecx)?;
                    a.jnz(second)
                });
                assert_eq!(m.reg(Gpr::Rax), 0x303, "{what}");
            }
        }
    });
}

/// Code that takes a way over two pages of [`X`], remaps the second in its middle and goes on there.
#[test]
fn linked_blocks_across_pages_follow_a_changed_mapping() {
    each_engine(|m| {
        // Page 0 jumps to page 1, which adds to RAX and jumps back; page 0 counts and swaps page 1 each time.
        let pages = [SPARE + 0x1000, SPARE + 0x2000];
        let back = X + 0x100;
        for (n, page) in pages.iter().enumerate() {
            m.place_at(64, *page, X + 0x1000, |a: &mut CodeAssembler| {
                a.add(rax, [1, 0x1000][n])?;
                a.jmp(back)
            });
        }
        m.map(0, SPARE, P | RW);
        m.map(1, pages[0], P | RW);
        m.place_at(64, SPARE, X, |a: &mut CodeAssembler| a.jmp(X + 0x1000));
        m.place_at(64, SPARE + 0x100, back, |a: &mut CodeAssembler| {
            a.xor(qword_ptr(X_PT + 8), 0x3000)?;
            a.invlpg(byte_ptr(rbx))?;
            a.dec(ecx)?;
            a.jnz(X)?;
            machine::stop(a)
        });
        m.set_reg(Gpr::Rbx, X + 0x1000);
        m.set_reg(Gpr::Rcx, 100);
        m.go(X);
        m.run();
        assert_eq!(m.reg(Gpr::Rax), 50 * 0x1001);
    });
}

#[test]
fn a_straddling_instruction_follows_a_changed_second_page() {
    each_engine(|m| {
        // MOV EAX, imm32 whose last two bytes are on the second page.
        let pages = [SPARE + 0x1000, SPARE + 0x2000];
        m.put_bytes(SPARE + 0xffd, &[0xb8, 0x11, 0x22]);
        for (n, page) in pages.iter().enumerate() {
            m.put_bytes(*page, &[0x33, 0x44 + n as u8, 0xc3]);
        }
        m.map(0, SPARE, P);
        m.map(1, pages[0], P);
        m.run_code(|a| {
            a.mov(rbx, X + 0xffd)?;
            a.mov(rbp, X + 0x1000)?;
            a.mov(ecx, 10)?;
            a.xor(edx, edx)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.call(rbx)?;
            a.add(rdx, rax)?;
            a.xor(qword_ptr(X_PT + 8), 0x3000)?;
            a.invlpg(byte_ptr(rbp))?;
            a.dec(ecx)?;
            a.jnz(again)
        });
        assert_eq!(m.reg(Gpr::Rdx), 5 * (0x4433_2211 + 0x4533_2211));
        // Without the second page: a fault there, at the instruction.
        m.map(1, 0, 0);
        m.cpu_mut().flush_tlb(true);
        let r = m.faults(|_| Ok(()), |a: &mut CodeAssembler| a.call(rbx));
        assert_eq!((r.vector, r.error, r.cr2), (14, error::I, X + 0x1000));
        assert_eq!(r.rip, X + 0xffd);
    });
}

/// Makes a second address space: all as in the first, but for the tables of [`X`]. Returns its CR3.
fn second_address_space(m: &Machine, gpa: u64, bits: u64) -> u64 {
    let [pml4, pdpt, pd, pt] = [0, 1, 2, 3].map(|n| TABLES + 0x1000 * n);
    m.put(pml4, m.get(PML4));
    m.put(pml4 + 8, pdpt | 7);
    m.put(pdpt, pd | 7);
    m.put(pd, pt | 7);
    m.put(pt, gpa | bits);
    pml4
}

/// A kernel that at each system call (INT 0x80) changes CR3 by XOR with R14 and sets the bits in R13.
fn switch_at_each_call(m: &mut Machine) {
    let kernel = CODE + 0x400;
    m.place(64, kernel, |a: &mut CodeAssembler| {
        a.mov(r8, cr3)?;
        a.xor(r8, r14)?;
        a.or(r8, r13)?;
        a.mov(cr3, r8)?;
        a.iretq()
    });
    m.gate(0x80, kernel, 0xe, 0, 3);
}

/// With such a kernel, a user program that runs the same address in two address spaces.
fn two_programs(m: &mut Machine, first: u64, second: u64) {
    switch_at_each_call(m);
    for (page, n) in [(SPARE, 1), (OTHER, 0x1_0000)] {
        m.place_at(64, page, X, |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.add(rax, n)?;
            a.int(0x80)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            machine::stop(a)
        });
    }
    m.to_user();
    m.set_reg(Gpr::Rax, 0);
    m.set_reg(Gpr::Rcx, 100);
    m.set_reg(Gpr::R14, first ^ second);
    m.cpu_mut().cr3 = first;
    m.cpu_mut().flush_tlb(true);
    m.go(X);
    m.run();
    assert_eq!(m.reg(Gpr::Rax), 50 * 0x1_0001);
}

#[test]
fn the_same_address_in_two_address_spaces() {
    each_engine(|m| {
        m.map(0, SPARE, P | US);
        let second = second_address_space(m, OTHER, P | US);
        m.set_reg(Gpr::R13, 0);
        two_programs(m, PML4, second);
    });
}

#[test]
fn the_same_address_under_two_pcids_without_flush() {
    each_engine(|m| {
        m.enable(Cr4::PCIDE);
        m.map(0, SPARE, P | US);
        let second = second_address_space(m, OTHER, P | US);
        // R8 with bit 63: the translations of the PCID stay.
        m.set_reg(Gpr::R13, 1 << 63);
        two_programs(m, PML4 | 1, second | 2);
    });
}

/// The same program in two address spaces calls a routine in the next page, which is another in each.
fn a_routine_in_the_next_page(pcids: bool) {
    each_engine(|m| {
        let routine = X + 0x1000;
        m.map(0, SPARE, P | US);
        let second = second_address_space(m, SPARE, P | US);
        let routines = [(OTHER, 1), (SPARE + 0x2000, 0x1_0000)];
        m.map(1, routines[0].0, P | US);
        m.put(TABLES + 0x3008, routines[1].0 | P | US);
        for (page, n) in routines {
            m.place_at(64, page, routine, |a: &mut CodeAssembler| {
                a.add(rax, n)?;
                a.ret()
            });
        }
        switch_at_each_call(m);
        m.place_at(64, SPARE, X, |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.call(routine)?;
            a.mov(r9, routine)?;
            a.call(r9)?;
            a.int(0x80)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            machine::stop(a)
        });
        let (tags, keep) = if pcids {
            ((1, 2), 1 << 63)
        } else {
            ((0, 0), 0)
        };
        if pcids {
            m.enable(Cr4::PCIDE);
        }
        m.to_user();
        m.set_reg(Gpr::Rax, 0);
        m.set_reg(Gpr::Rcx, 400);
        m.set_reg(Gpr::R13, keep);
        m.set_reg(Gpr::R14, (PML4 | tags.0) ^ (second | tags.1));
        m.cpu_mut().cr3 = PML4 | tags.0;
        m.cpu_mut().flush_tlb(true);
        m.go(X);
        m.run();
        assert_eq!(m.reg(Gpr::Rax), 400 * 0x1_0001);
    });
}

#[test]
fn calls_into_the_next_page_in_two_address_spaces() {
    a_routine_in_the_next_page(false);
}

#[test]
fn calls_into_the_next_page_under_two_pcids() {
    a_routine_in_the_next_page(true);
}

/// What was learned of a page along with the one before it is dropped with it.
#[test]
fn invlpg_of_a_page_beside_the_current_one() {
    each_engine(|m| {
        let routine = X + 0x1000;
        m.map(0, SPARE, P | US);
        let routines = [(OTHER, 1), (SPARE + 0x2000, 0x1_0000)];
        m.map(1, routines[0].0, P | US);
        for (page, n) in routines {
            m.place_at(64, page, routine, |a: &mut CodeAssembler| {
                a.add(rax, n)?;
                a.ret()
            });
        }
        switch_at_each_call(m);
        let remaps = CODE + 0x500;
        m.place(64, remaps, |a: &mut CodeAssembler| {
            a.xor(qword_ptr(X_PT + 8), r15)?;
            a.mov(r8, routine)?;
            a.invlpg(byte_ptr(r8))?;
            a.iretq()
        });
        m.gate(0x90, remaps, 0xe, 0, 3);
        m.place_at(64, SPARE, X, |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            // Loads CR3 anew.
            a.int(0x80)?;
            a.int(0x90)?;
            a.call(routine)?;
            a.dec(ecx)?;
            a.jnz(again)?;
            machine::stop(a)
        });
        m.to_user();
        m.set_reg(Gpr::Rax, 0);
        m.set_reg(Gpr::Rcx, 100);
        m.set_reg(Gpr::R13, 0);
        m.set_reg(Gpr::R14, 0);
        m.set_reg(Gpr::R15, routines[0].0 ^ routines[1].0);
        m.cpu_mut().flush_tlb(true);
        m.go(X);
        m.run();
        assert_eq!(m.reg(Gpr::Rax), 50 * 0x1_0001);
    });
}

#[test]
fn invpcid_of_another_context_and_a_flush_on_return() {
    each_engine(|m| {
        // Changed while the other context is current, told by INVPCID: must be seen on the way back without a flush.
        m.enable(Cr4::PCIDE);
        m.put(SPARE, 1u64);
        m.put(OTHER, 2u64);
        m.map(0, SPARE, P | RW);
        let second = second_address_space(m, SPARE + 0x2000, P | RW);
        m.put(DATA + 0x100, 1u64);
        m.put(DATA + 0x108, X);
        m.cpu_mut().cr3 = PML4 | 1;
        m.run_code(|a| {
            a.mov(rbx, X)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.mov(rcx, second | 2)?;
            a.mov(cr3, rcx)?;
            a.mov(rdx, qword_ptr(rbx))?;
            remap(a, OTHER | P | RW)?;
            a.xor(r9d, r9d)?;
            a.invpcid(r9, xmmword_ptr(DATA + 0x100))?;
            a.mov(rcx, PML4 | 1 | 1 << 63)?;
            a.mov(cr3, rcx)?;
            a.mov(rsi, qword_ptr(rbx))
        });
        assert_eq!(
            (m.reg(Gpr::Rax), m.reg(Gpr::Rdx), m.reg(Gpr::Rsi)),
            (1, 0, 2)
        );
    });
}

/// In the address space of PCID 2: flushes that reach the page at [`X`] of PCID 1.
const FLUSHES_OF_ANOTHER_PCID: &[(&str, Flush)] = &[
    ("INVPCID of an address", |a| invpcid(a, 0, 1)),
    ("INVPCID of a context", |a| invpcid(a, 1, 1)),
    ("INVPCID of everything", |a| invpcid(a, 2, 1)),
    ("INVPCID of what is not global", |a| invpcid(a, 3, 1)),
    ("CR4.PGE", |a| toggle_cr4(a, Cr4::PGE)),
    ("CR3 without bit 63", |a| {
        a.mov(r9, cr3)?;
        a.mov(r8, PML4 | 1)?;
        a.mov(cr3, r8)?;
        a.bts(r9, 63)?;
        a.mov(cr3, r9)
    }),
];

#[test]
fn a_flush_reaches_a_pcid_that_is_not_current() {
    each_engine(|m| {
        m.enable(Cr4::PCIDE | Cr4::PGE);
        m.put(SPARE, 1u64);
        m.put(OTHER, 2u64);
        let second = second_address_space(m, SPARE + 0x2000, P | RW);
        for (what, flush) in FLUSHES_OF_ANOTHER_PCID {
            println!("{what}");
            m.map(0, SPARE, P | RW);
            m.cpu_mut().cr3 = PML4 | 1;
            m.cpu_mut().flush_tlb(true);
            m.run_code(|a| {
                a.mov(rbx, X)?;
                a.mov(rax, qword_ptr(rbx))?;
                a.mov(rcx, second | 2)?;
                a.mov(cr3, rcx)?;
                remap(a, OTHER | P | RW)?;
                flush(a)?;
                a.mov(rcx, PML4 | 1 | 1 << 63)?;
                a.mov(cr3, rcx)?;
                a.mov(rsi, qword_ptr(rbx))
            });
            assert!(m.records().is_empty(), "{what}: {:x?}", m.records());
            assert_eq!((m.reg(Gpr::Rax), m.reg(Gpr::Rsi)), (1, 2), "{what}");
        }
    });
}

#[test]
fn a_page_becomes_code_while_the_pcid_that_wrote_to_it_is_not_current() {
    each_engine(|m| {
        m.enable(Cr4::PCIDE);
        // MOV EAX, imm; RET.
        m.put_bytes(SPARE, &[0xb8, 0, 0, 0, 0, 0xc3]);
        m.map(0, SPARE, P | RW);
        let second = second_address_space(m, SPARE, P | RW);
        m.cpu_mut().cr3 = PML4 | 1;
        m.run_code(|a| {
            a.mov(rbx, X)?;
            a.mov(r8, PML4 | 1 | 1 << 63)?;
            a.mov(r9, second | 2 | 1 << 63)?;
            a.xor(edx, edx)?;
            for value in 1..8 {
                a.mov(byte_ptr(rbx + 1), value)?;
                a.mov(cr3, r9)?;
                a.call(rbx)?;
                a.shl(rdx, 4)?;
                a.add(rdx, rax)?;
                a.mov(cr3, r8)?;
            }
            Ok(())
        });
        assert!(m.records().is_empty(), "{:x?}", m.records());
        assert_eq!(m.reg(Gpr::Rdx), 0x123_4567);
    });
}

#[test]
fn large_pages_are_dropped_as_a_whole() {
    each_engine(|m| {
        m.put(SPARE + 0x5000, 1u64);
        m.put(SPARE + 0x20_5000, 2u64);
        m.map_2m(0, SPARE, P | RW);
        m.run_code(|a| {
            a.mov(rbx, X + 0x5000)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.mov(rcx, qword_ptr(rbx + 0x1000))?;
            a.mov(r8, (SPARE + 0x20_0000) | P | RW | paging::PS)?;
            a.mov(qword_ptr(X_PD), r8)?;
            a.mov(rbp, X + 0x1f_f000)?;
            a.invlpg(byte_ptr(rbp))?;
            a.mov(rdx, qword_ptr(rbx))
        });
        assert_eq!((m.reg(Gpr::Rax), m.reg(Gpr::Rdx)), (1, 2));
    });
}

#[test]
fn rights_that_control_registers_change_take_effect_at_once() {
    each_engine(|m| {
        // Read-only for the kernel: writable only while WP is off.
        m.map(0, SPARE, P);
        m.run_code(|a| {
            a.mov(rbx, X)?;
            a.mov(rax, cr0)?;
            a.and(eax, !(Cr0::WP.bits() as i32))?;
            a.mov(cr0, rax)?;
            a.mov(qword_ptr(rbx), rax)?;
            a.or(rax, Cr0::WP.bits() as i32)?;
            a.mov(cr0, rax)?;
            a.mov(r15, CODE + 0xc00)?;
            a.mov(qword_ptr(rbx), rax)?;
            machine::stop(a)?;
            a.nops_with_size(0xc00 - 0x3c)?;
            Ok(())
        });
        m.place(64, CODE + 0xc00, machine::stop);
        let r = m.records();
        assert_eq!((r[0].vector, r[0].error), (14, error::P | error::W));
        // SMEP and SMAP, and NX, for a page that was used before.
        let routine = X + 0x1000;
        m.map(1, OTHER, P | RW | US);
        m.put_bytes(OTHER, &[0xc3]);
        for (bit, access, code) in [
            (Cr4::SMEP, 0, error::P | error::I),
            (Cr4::SMAP, 1, error::P),
        ] {
            m.forget();
            m.to_kernel();
            m.set_reg(Gpr::Rbx, routine);
            let r = m.faults(
                |a| {
                    a.call(rbx)?;
                    a.mov(rax, qword_ptr(rbx))?;
                    a.mov(r8, cr4)?;
                    a.or(r8, bit.bits() as i32)?;
                    a.mov(cr4, r8)
                },
                |a| {
                    if access == 0 {
                        a.call(rbx)
                    } else {
                        a.mov(rax, qword_ptr(rbx))
                    }
                },
            );
            assert_eq!((r.vector, r.error, r.cr2), (14, code, routine));
            m.cpu_mut().cr4.remove(bit);
            m.cpu_mut().flush_tlb(true);
        }
        m.forget();
        m.to_kernel();
        let r = m.faults(
            |a| {
                a.call(rbx)?;
                a.mov(r8, OTHER | P | RW | XD)?;
                a.mov(qword_ptr(X_PT + 8), r8)?;
                a.invlpg(byte_ptr(rbx))
            },
            |a| a.call(rbx),
        );
        assert_eq!((r.vector, r.error), (14, error::P | error::I));
    });
}

#[test]
fn smap_follows_ac_within_a_block() {
    each_engine(|m| {
        m.enable(Cr4::SMAP);
        m.map(0, SPARE, P | RW | US);
        m.put(SPARE, 5u64);
        m.set_reg(Gpr::Rbx, X);
        let r = m.faults(
            |a| {
                a.mov(ecx, 5)?;
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.stac()?;
                a.add(rax, qword_ptr(rbx))?;
                a.clac()?;
                a.dec(ecx)?;
                a.jnz(again)
            },
            |a| a.add(rax, qword_ptr(rbx)),
        );
        assert_eq!((r.vector, r.error, r.cr2), (14, error::P, X));
        assert_eq!(m.reg(Gpr::Rax), 25);
    });
}

#[test]
fn a_page_that_becomes_the_users_own_is_seen_by_both() {
    each_engine(|m| {
        // Supervisor page; the user's access faults, the handler opens it and returns.
        m.map(0, SPARE, P | RW);
        m.put(SPARE, 7u64);
        let pf = CODE + 0x400;
        m.place(64, pf, |a: &mut CodeAssembler| {
            a.pop(qword_ptr(DATA))?;
            a.or(qword_ptr(X_PT), US as i32)?;
            a.push(rbx)?;
            a.mov(rbx, cr2)?;
            a.mov(qword_ptr(DATA + 8), rbx)?;
            a.invlpg(byte_ptr(rbx))?;
            a.pop(rbx)?;
            a.iretq()
        });
        m.gate(14, pf, 0xe, 0, 0);
        m.run_user(|a| {
            a.mov(rbx, X)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.mov(qword_ptr(rbx + 8), rax)
        });
        assert_eq!((m.data(0), m.data(1)), (error::P | error::U, X));
        assert_eq!((m.reg(Gpr::Rax), m.get(SPARE + 8)), (7, 7));
    });
}

/// One physical page of code at three linear addresses: what depends on the address is that of the one in use.
fn aliases(m: &mut Machine) {
    for n in [0, 2, 5] {
        m.map(n, SPARE, P | US);
        m.map(n + 1, SPARE + 0x1000, P | US);
    }
    // Returns the address of the instruction after LEA, by way of a jump to the next page and back.
    m.place_at(64, SPARE, X, |a: &mut CodeAssembler| a.jmp(X + 0x1000));
    m.place_at(64, SPARE + 0x100, X + 0x100, |a: &mut CodeAssembler| {
        let mut here = a.create_label();
        a.lea(rax, qword_ptr(here))?;
        a.set_label(&mut here)?;
        a.ret()
    });
    m.place_at(64, SPARE + 0x1000, X + 0x1000, |a: &mut CodeAssembler| {
        a.jmp(X + 0x100)
    });
}

fn call_aliases(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.xor(r12d, r12d)?;
    a.mov(ecx, 30)?;
    let mut again = a.create_label();
    a.set_label(&mut again)?;
    for n in [0, 2, 5] {
        a.mov(rbx, X + (n << 12))?;
        a.call(rbx)?;
        a.sub(rax, rbx)?;
        a.add(r12, rax)?;
    }
    a.dec(ecx)?;
    a.jnz(again)
}

#[test]
fn one_page_of_code_at_several_addresses() {
    each_engine(|m| {
        aliases(m);
        m.run_code(call_aliases);
        assert_eq!(m.reg(Gpr::R12), 90 * 0x107);
        m.run_user(call_aliases);
        assert_eq!(m.reg(Gpr::R12), 90 * 0x107);
        assert!(m.records().is_empty());
    });
}

/// What may stand at the end of a page of code, to go on in the next.
#[derive(Clone, Copy, Debug)]
enum Way {
    Jump,
    FallThrough,
    /// MOV EAX, imm32, the last two bytes of which are on the next page; entered at the first of so many NOPs before it.
    Straddles(u64),
}

/// One physical page of code at three linear addresses, each with another page behind it.
fn followed_by_others(m: &mut Machine, way: Way) -> u64 {
    let straddles = matches!(way, Way::Straddles(_));
    for (n, at) in [0, 2, 5].into_iter().enumerate() {
        let page = SPARE + 0x1000 * (n as u64 + 1);
        m.map(at, SPARE, P | US);
        m.map(at + 1, page, P | US);
        let bytes = [0xb8, 0x11, 0x22, 0x33, 0x40 + n as u8, 0xc3];
        m.put_bytes(page, &bytes[if straddles { 3 } else { 0 }..]);
    }
    m.put_bytes(SPARE + 0xe00, &[0x90; 0x200]);
    match way {
        Way::Jump => {
            m.place_at(64, SPARE, X, |a: &mut CodeAssembler| a.jmp(X + 0x1000));
            0
        }
        Way::FallThrough => 0xf00,
        Way::Straddles(nops) => {
            m.put_bytes(SPARE + 0xffd, &[0xb8, 0x11, 0x22]);
            0xffd - nops
        }
    }
}

#[test]
fn behind_a_page_at_several_addresses_is_what_follows_each() {
    let call_each = |entry: u64| {
        move |a: &mut CodeAssembler| {
            a.xor(r12d, r12d)?;
            a.mov(ecx, 30)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            for n in [0, 0, 2, 5] {
                a.mov(rbx, X + (n << 12) + entry)?;
                a.call(rbx)?;
                a.imul_3(r12, r12, 3)?;
                a.add(r12, rax)?;
            }
            a.dec(ecx)?;
            a.jnz(again)
        }
    };
    let values = (0..30).flat_map(|_| [0, 0, 1, 2]);
    let expected = values.fold(0u64, |sum, n| {
        sum.wrapping_mul(3).wrapping_add(0x4033_2211 + (n << 24))
    });
    let ways = [0, 1, 60].map(Way::Straddles);
    for way in [Way::Jump, Way::FallThrough].into_iter().chain(ways) {
        each_engine(|m| {
            let entry = followed_by_others(m, way);
            m.run_code(call_each(entry));
            assert_eq!(m.reg(Gpr::R12), expected, "{way:?}");
            m.run_user(call_each(entry));
            assert_eq!(m.reg(Gpr::R12), expected, "{way:?} of user code");
            assert!(m.records().is_empty());
        });
    }
}

/// The lowest of several accesses may lie further below its base than a displacement says.
#[test]
fn accesses_two_gibibytes_below_a_register_that_moves() {
    const BELOW: u64 = 1 << 31;
    const LARGE: u64 = 0x80;
    each_engine(|m| {
        m.map(0, SPARE, P | RW);
        m.put(SPARE + 0x100, 1u64);
        m.put(SPARE + 0xf8, 2u64);
        // What lies 4 GiB further on.
        m.put(X_PDPT + 8 * 4, TABLES | P | RW);
        m.put(TABLES, (SPARE + 0x20_0000) | P | RW | LARGE);
        m.run_code(|a| {
            let mut again = a.create_label();
            for page in [X, X + 2 * BELOW] {
                a.mov(rbx, page)?;
                a.mov(qword_ptr(rbx), rbx)?;
            }
            a.mov(edx, 100)?;
            a.set_label(&mut again)?;
            a.mov(rbx, X + BELOW + 0x100)?;
            // mov rax, [rbx - 2^31]; then 8 bytes further down, read and written.
            a.db(&[0x48, 0x8b, 0x83, 0, 0, 0, 0x80])?;
            a.lea(rbx, ptr(rbx - 8))?;
            a.db(&[0x48, 0x8b, 0x8b, 0, 0, 0, 0x80])?;
            a.lea(rbx, ptr(rbx - 8))?;
            a.db(&[0x48, 0x89, 0x8b, 0, 0, 0, 0x80])?;
            a.dec(edx)?;
            a.jnz(again)
        });
        assert_eq!((m.reg(Gpr::Rax), m.reg(Gpr::Rcx)), (1, 2));
        assert_eq!(m.get(SPARE + 0xf0), 2);
    });
}

/// Of two large pages that user code has touched the second changes, and nothing has been looked up since all was flushed.
#[test]
fn a_large_page_of_the_user_is_dropped_as_a_whole_after_a_flush_of_everything() {
    const LARGE: u64 = 0x80;
    const SIZE: u64 = 2 << 20;
    const WITHIN: u64 = 0x5000;
    each_engine(|m| {
        let frames = [0, 1, 2].map(|n| SPARE + SIZE * n);
        for (n, frame) in frames.into_iter().enumerate() {
            m.put(frame + WITHIN, n as u64 + 1);
        }
        for (n, frame) in frames[..2].iter().enumerate() {
            m.put(X_PD + 8 * (n as u64 + 1), frame | P | RW | US | LARGE);
        }
        // Not placed anew: it is code all the time.
        m.place(64, USER_CODE, |a: &mut CodeAssembler| {
            a.mov(rbx, X + SIZE + WITHIN)?;
            a.mov(rsi, qword_ptr(rbx))?;
            a.add(rbx, SIZE as i32)?;
            a.mov(rdi, qword_ptr(rbx))?;
            a.int(0x81)
        });
        let read = |m: &mut Machine| {
            m.to_user();
            m.go(USER_CODE);
            m.run();
            [Gpr::Rsi, Gpr::Rdi].map(|r| m.reg(r))
        };
        assert_eq!(read(m), [1, 2]);
        m.to_kernel();
        m.run_code(|a| toggle_cr4(a, Cr4::PGE));
        assert_eq!(read(m), [1, 2]);
        m.to_kernel();
        m.run_code(|a| {
            a.mov(r8, frames[2] | P | RW | US | LARGE)?;
            a.mov(r9, X_PD + 16)?;
            a.mov(qword_ptr(r9), r8)?;
            a.mov(r9, X + 2 * SIZE)?;
            a.invlpg(byte_ptr(r9))
        });
        assert_eq!(read(m), [1, 3]);
    });
}

#[test]
fn a_global_page_of_the_user_is_dropped_whatever_the_pcid() {
    const KEEP: u64 = 1 << 63;
    each_engine(|m| {
        m.enable(Cr4::PCIDE);
        m.map(0, SPARE, P | US | G);
        for (n, frame) in [SPARE, OTHER].into_iter().enumerate() {
            m.place_at(64, frame, X, |a: &mut CodeAssembler| {
                a.mov(eax, n as u32 + 1)?;
                a.int(0x81)
            });
        }
        m.cpu_mut().cr3 = PML4 | 1;
        m.cpu_mut().flush_tlb(true);
        let run = |m: &mut Machine| {
            m.to_user();
            m.go(X);
            m.run();
            m.reg(Gpr::Rax)
        };
        assert_eq!((run(m), run(m)), (1, 1));
        m.to_kernel();
        m.run_code(|a| {
            a.mov(rcx, PML4 | 2 | KEEP)?;
            a.mov(cr3, rcx)?;
            a.mov(rbx, X)?;
            remap(a, OTHER | P | US | G)?;
            a.invlpg(byte_ptr(rbx))?;
            a.mov(rcx, PML4 | 1 | KEEP)?;
            a.mov(cr3, rcx)
        });
        assert_eq!(run(m), 2);
    });
}
