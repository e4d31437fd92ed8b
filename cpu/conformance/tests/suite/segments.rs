//! FS and GS bases, SWAPGS, and what of segments is left in 64-bit mode.

use doppel_conformance::machine::wrmsr;
use doppel_conformance::paging::{P, RW, US};
use doppel_conformance::*;
use doppel_x86::{Cr4, Gpr};
use iced_x86::code_asm::*;

const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

#[test]
fn bases_by_msr_are_added_to_every_kind_of_access() {
    each_engine(|m| {
        m.map(0, SPARE, P | RW);
        m.put(SPARE + 0x18, 0x77u64);
        m.run_code(|a| {
            wrmsr(a, FS_BASE, X)?;
            wrmsr(a, GS_BASE, X + 0x10)?;
            a.mov(rbx, qword_ptr(0x18).fs())?;
            a.mov(ebp, 8)?;
            a.mov(rsi, qword_ptr(rbp).gs())?;
            a.add(qword_ptr(rbp + 8).gs(), rsi)?;
            a.xor(edi, edi)?;
            a.movzx(edi, byte_ptr(rbp * 2 + 8).fs())?;
            // LEA knows no base.
            a.lea(r8, qword_ptr(0x18).fs())?;
            a.push(qword_ptr(0x18).fs())?;
            a.pop(r9)?;
            a.inc(dword_ptr(0x30).fs())
        });
        assert_eq!([Gpr::Rbx, Gpr::Rsi, Gpr::Rdi].map(|r| m.reg(r)), [0x77; 3]);
        assert_eq!((m.get(SPARE + 0x20), m.get(SPARE + 0x30)), (0x77, 1));
        assert_eq!((m.reg(Gpr::R8), m.reg(Gpr::R9)), (0x18, 0x77));
    });
}

#[test]
fn user_code_sets_its_bases_where_cr4_lets_it() {
    each_engine(|m| {
        m.to_user();
        let r = m.faults(|_| Ok(()), |a| a.wrfsbase(rax));
        assert_eq!(r.vector, 6);
        m.forget();
        m.enable(Cr4::FSGSBASE);
        m.map(0, SPARE, P | RW | US);
        m.run_user(|a| {
            a.mov(rax, X)?;
            a.wrfsbase(rax)?;
            a.mov(qword_ptr(8).fs(), rax)?;
            a.add(rax, 0x100)?;
            a.wrgsbase(rax)?;
            a.mov(qword_ptr(8).gs(), rax)?;
            a.rdfsbase(rbx)?;
            a.rdgsbase(rcx)?;
            // A loop with a base that changes.
            a.mov(edx, 10)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.mov(qword_ptr(16).gs(), rdx)?;
            a.add(rax, 0x20)?;
            a.wrgsbase(rax)?;
            a.dec(edx)?;
            a.jnz(again)
        });
        assert_eq!((m.reg(Gpr::Rbx), m.reg(Gpr::Rcx)), (X, X + 0x100));
        assert_eq!((m.get(SPARE + 8), m.get(SPARE + 0x108)), (X, X + 0x100));
        for n in 0..10 {
            assert_eq!(m.get(SPARE + 0x110 + 0x20 * n), 10 - n);
        }
        m.to_user();
        let r = m.faults(|a| a.mov(rax, 1u64 << 63), |a| a.wrgsbase(rax));
        assert_eq!((r.vector, r.error), (13, 0));
    });
}

#[test]
fn swapgs_on_the_way_in_and_out() {
    each_engine(|m| {
        m.map(0, SPARE, P | RW);
        m.map(1, SPARE + 0x1000, P | RW | US);
        let kernel = CODE + 0x400;
        m.place(64, kernel, |a: &mut CodeAssembler| {
            a.swapgs()?;
            a.inc(qword_ptr(0).gs())?;
            a.swapgs()?;
            a.iretq()
        });
        m.gate(0x80, kernel, 0xe, 0, 3);
        m.to_kernel();
        m.run_code(|a| {
            wrmsr(a, GS_BASE, X + 0x1000)?;
            wrmsr(a, KERNEL_GS_BASE, X)
        });
        m.to_user();
        m.cpu_mut().seg[doppel_x86::Seg::Gs as usize].base = X + 0x1000;
        m.place(64, USER_CODE, |a: &mut CodeAssembler| {
            a.mov(ecx, 30)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.int(0x80)?;
            a.inc(qword_ptr(0).gs())?;
            a.dec(ecx)?;
            a.jnz(again)?;
            machine::stop(a)
        });
        m.go(USER_CODE);
        m.run();
        assert_eq!((m.get(SPARE), m.get(SPARE + 0x1000)), (30, 30));
    });
}

#[test]
fn loading_a_selector_sets_the_base_of_its_descriptor() {
    each_engine(|m| {
        // A data segment with base SPARE, for 32-bit thread-local storage.
        m.put(
            GDT + 0x58,
            0x0000_f300_0000_ffffu64 | (SPARE & 0xff_ffff) << 16 | (SPARE >> 24) << 56,
        );
        m.put(SPARE + 0x10, 0x99u64);
        m.run_code(|a| {
            a.mov(eax, 0x58)?;
            a.mov(fs, eax)?;
            a.mov(rbx, qword_ptr(0x10).fs())?;
            // The same in ES and DS is without effect.
            a.mov(ds, eax)?;
            a.mov(es, eax)?;
            a.mov(rcx, qword_ptr(DATA + 0x10))?;
            a.mov(eax, KERNEL_DS as u32)?;
            a.mov(ds, eax)?;
            a.mov(es, eax)
        });
        assert_eq!((m.reg(Gpr::Rbx), m.reg(Gpr::Rcx)), (0x99, 0));
    });
}

/// Changes of a base between accesses by the same registers.
type Change = fn(&mut CodeAssembler) -> Result<(), IcedError>;

#[test]
fn accesses_by_the_same_registers_follow_a_base_that_changes() {
    const PLACES: [u64; 2] = [DATA, DATA + 0x1000];
    const CHANGES: &[(&str, Change)] = &[
        ("WRFSBASE", |a| {
            a.mov(rax, qword_ptr(rdi).fs())?;
            a.wrfsbase(rsi)?;
            a.mov(rdx, qword_ptr(rdi).fs())?;
            a.mov(qword_ptr(rdi + 8).fs(), rdi)
        }),
        ("WRGSBASE", |a| {
            a.mov(rax, qword_ptr(rdi).gs())?;
            a.wrgsbase(rsi)?;
            a.mov(rdx, qword_ptr(rdi).gs())?;
            a.mov(qword_ptr(rdi + 8).gs(), rdi)
        }),
        ("SWAPGS", |a| {
            a.mov(rax, qword_ptr(rdi).gs())?;
            a.swapgs()?;
            a.mov(rdx, qword_ptr(rdi).gs())?;
            a.mov(qword_ptr(rdi + 8).gs(), rdi)?;
            a.swapgs()
        }),
        ("SWAPGS between many", |a| {
            for _ in 0..4 {
                a.mov(rax, qword_ptr(rdi).gs())?;
                a.mov(rax, qword_ptr(rbx))?;
                a.mov(rax, qword_ptr(rdi).gs())?;
                a.swapgs()?;
                a.mov(rdx, qword_ptr(rdi).gs())?;
                a.mov(qword_ptr(rdi + 8).gs(), rdi)?;
                a.mov(rdx, qword_ptr(rbx))?;
                a.mov(rdx, qword_ptr(rdi).gs())?;
                a.swapgs()?;
            }
            Ok(())
        }),
    ];
    each_engine(|m| {
        m.enable(Cr4::FSGSBASE);
        for (what, change) in CHANGES {
            for (n, at) in PLACES.into_iter().enumerate() {
                m.put(at + 16, n as u64 + 1);
                m.put(at + 24, 0u64);
            }
            m.run_code(|a| {
                wrmsr(a, KERNEL_GS_BASE, PLACES[1])?;
                a.mov(rcx, PLACES[0])?;
                a.mov(rsi, PLACES[1])?;
                a.mov(rbx, DATA + 0x2000)?;
                for r in [rcx, rsi, rbx] {
                    a.mov(qword_ptr(r), r)?;
                }
                a.mov(edi, 16)?;
                let mut again = a.create_label();
                a.mov(ebp, 100)?;
                a.set_label(&mut again)?;
                a.wrfsbase(rcx)?;
                a.wrgsbase(rcx)?;
                change(a)?;
                a.dec(ebp)?;
                a.jnz(again)
            });
            let found = [Gpr::Rax, Gpr::Rdx].map(|r| m.reg(r));
            let written = PLACES.map(|at| m.get(at + 24));
            assert_eq!((found, written), ([1, 2], [0, 16]), "{what}");
        }
    });
}
