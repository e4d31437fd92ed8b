//! 5-level paging: what CR4.LA57 makes canonical, and what the processor takes for later use without it.

use crate::canonical;
use doppel_conformance::machine::stop;
use doppel_conformance::paging::{P, RW};
use doppel_conformance::*;
use doppel_x86::{CpuChoice, CpuFeatures, Cr4, Gpr, Vendor};
use iced_x86::code_asm::*;

/// Its first and second entries, and the last, lead to the tables of 4-level paging.
const PML5: u64 = 0x20_0000;
/// What the second entry of the root stands for, and the first address beyond the lower half.
const ALIAS: u64 = 1 << 48;
const END: u64 = 1 << 56;
/// Data that user code may have.
const AT: u64 = USER_DATA;
const FS_BASE: u32 = 0xc000_0100;
const LSTAR: u32 = 0xc000_0082;

fn each_engine_with_la57(test: impl Fn(&mut Machine)) {
    let choice: CpuChoice = "host,+la57".parse().unwrap();
    let model = Machine::cpu_of(choice).unwrap();
    each_engine_with(&model, |m| {
        for entry in [0, 1, 511] {
            m.put(PML5 + 8 * entry, PML4 | 7);
        }
        test(m);
    });
}

fn switch(m: &mut Machine, on: bool) {
    let cpu = m.cpu_mut();
    cpu.cr4.set(Cr4::LA57, on);
    cpu.cr3 = if on { PML5 } else { PML4 };
    cpu.flush_tlb(true);
}

/// Whether user code runs, and whether CR4.LA57 is set.
const SETTINGS: [(bool, bool); 6] = [
    (false, true),
    (false, false),
    (false, true),
    (true, true),
    (true, false),
    (true, true),
];

/// Addresses, and the vectors of what an access to them raises without LA57 and with it.
const REACH: [(u64, &[u64], &[u64]); 5] = [
    (AT + ALIAS, &[13], &[]),
    (AT.wrapping_sub(ALIAS), &[13], &[]),
    (AT, &[], &[]),
    (END, &[13], &[13]),
    (END - 4, &[13], &[13]),
];

fn begin(m: &mut Machine, user: bool, on: bool) {
    m.forget();
    m.to_kernel();
    if user {
        m.to_user();
    }
    switch(m, on);
}

#[test]
fn five_levels_reach_where_four_do_not() {
    each_engine_with_la57(|m| {
        for (user, on) in SETTINGS {
            println!("user {user}, LA57 {on}");
            for (at, narrow, wide) in REACH {
                begin(m, user, on);
                let expected = if on { wide } else { narrow };
                load_and_store(m, at, expected);
            }
        }
    });
}

/// Loads from an address and stores to it, which raises what is expected.
fn load_and_store(m: &mut Machine, at: u64, expected: &[u64]) {
    m.put(AT, 0x1234_5678u64);
    let base = m.fault_at();
    let recover = base + 0x400;
    let end = m.place(64, base, |a: &mut CodeAssembler| {
        a.mov(r15, recover)?;
        a.mov(rbx, at)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.inc(qword_ptr(rbx))
    });
    for at in [end, recover] {
        m.place(64, at, stop);
    }
    m.go(base);
    m.run();
    assert_eq!(m.vectors(), expected, "{at:x}");
    if expected.is_empty() {
        assert_eq!((m.reg(Gpr::Rax), m.get(AT)), (0x1234_5678, 0x1234_5679));
    }
}

#[test]
fn code_and_stack_lie_above_47_bits() {
    each_engine_with_la57(|m| {
        // What is pushed below the end is canonical, and mapped by nothing.
        for (user, expected) in [(false, &[][..]), (true, &[14])] {
            begin(m, user, true);
            call_and_push(m, user);
            assert_eq!(m.vectors(), expected);
        }
    });
}

/// Calls code above 47 bits, with the stack there, and pushes below the end where `push` says so.
fn call_and_push(m: &mut Machine, push: bool) {
    m.put(AT + 0x100, 0u64);
    let base = m.fault_at();
    let target = base + 0x200;
    let end = m.place(64, base, |a: &mut CodeAssembler| {
        a.mov(r15, base + 0x400)?;
        a.mov(rsp, AT + 0x108 + ALIAS)?;
        a.mov(rbx, target + ALIAS)?;
        a.call(rbx)?;
        if push {
            a.mov(rsp, END)?;
            a.push(rax)?;
        }
        Ok(())
    });
    m.place(64, target, |a: &mut CodeAssembler| {
        a.nop()?;
        a.ret()
    });
    for at in [end, base + 0x400] {
        m.place(64, at, stop);
    }
    m.go(base);
    m.run();
    let returned = m.get(AT + 0x100);
    assert!(returned > base && returned < target, "{returned:x}");
}

/// Registers, values, and whether they take them without LA57.
const WRITES: [(u32, u64, bool); 4] = [
    (FS_BASE, ALIAS, true),
    (FS_BASE, END, false),
    (LSTAR, ALIAS, true),
    (LSTAR, END, false),
];

#[test]
fn registers_take_57_bits_before_they_can_be_used() {
    each_engine_with_la57(|m| {
        m.to_kernel();
        switch(m, false);
        for (msr, value, fine) in WRITES {
            m.forget();
            m.run_code(|a| {
                a.mov(r15, STOPPED_AT)?;
                a.mov(ecx, msr)?;
                a.mov(eax, value as u32)?;
                a.mov(edx, (value >> 32) as u32)?;
                a.wrmsr()
            });
            assert_eq!(m.vectors().is_empty(), fine, "{msr:x} {value:x}");
        }
        m.forget();
        let r = m.faults(|_| Ok(()), |a| a.mov(rax, qword_ptr(DATA).fs()));
        assert_eq!((r.vector, r.error), (13, 0), "FS is based beyond");
    });
}

#[test]
fn long_mode_keeps_its_levels() {
    each_engine_with_la57(|m| {
        for on in [false, true] {
            m.forget();
            m.to_kernel();
            switch(m, on);
            let code = |a: &mut CodeAssembler| {
                a.mov(rax, cr4)?;
                a.xor(eax, Cr4::LA57.bits() as i32)
            };
            let r = m.faults(code, |a| a.mov(cr4, rax));
            assert_eq!((r.vector, r.error), (13, 0));
            assert_eq!(m.cpu().cr4.contains(Cr4::LA57), on);
        }
    });
}

#[test]
fn only_a_processor_with_la57_shows_it() {
    each_engine(|m| {
        assert_eq!(m.cpu().cpuid(7, 0).ecx >> 16 & 1, 0);
        assert_eq!(m.cpu().cpuid(0x8000_0008, 0).eax >> 8, 48);
    });
    each_engine_with_la57(|m| {
        assert_eq!(m.cpu().cpuid(7, 0).ecx >> 16 & 1, 1);
        assert_eq!(m.cpu().cpuid(0x8000_0008, 0).eax >> 8, 57);
    });
}

/// The same on processors of either maker.
fn each_engine_and_vendor_with_la57(test: impl Fn(&mut Machine)) {
    for vendor in [b"GenuineIntel", b"AuthenticAMD"] {
        println!("{}", String::from_utf8_lossy(vendor));
        let model = Machine::model_of_vendor(vendor);
        let model = model.requesting(CpuFeatures::LA57).unwrap();
        each_engine_with(&model.into(), |m| {
            for entry in [0, 1, 511] {
                m.put(PML5 + 8 * entry, PML4 | 7);
            }
            test(m);
        });
    }
}

/// Addresses that a return may lead to, and whether four and five levels reach them. The last ones lead to no page.
const TARGETS: [(u64, bool, bool); 5] = [
    (USER_CODE, true, true),
    (USER_CODE + ALIAS, false, true),
    (USER_CODE.wrapping_sub(ALIAS), false, true),
    (END, false, false),
    (!END, false, false),
];

/// Returns from the kernel to a place where user code would end, by this. What the handlers noted; faults end the guest.
fn returned(
    m: &mut Machine,
    on: bool,
    target: u64,
    code: impl Fn(&mut CodeAssembler, u64) -> Result<(), iced_x86::IcedError>,
) -> Option<Record> {
    m.forget();
    m.to_kernel();
    m.cpu_mut().msr.star = 0x0023_0010 << 32;
    switch(m, on);
    m.place(64, USER_CODE, stop);
    m.action(13, Action::Stop);
    m.place(64, CODE, |a: &mut CodeAssembler| code(a, target));
    m.go(CODE);
    m.run();
    let records = m.records();
    assert!(records.len() < 2, "{target:x}, LA57 {on}: {records:x?}");
    records.first().copied()
}

#[test]
fn a_return_by_sysret_is_checked_for_the_levels_in_use() {
    each_engine_and_vendor_with_la57(|m| {
        let intel = m.cpu().cpuid.vendor() == Vendor::Intel;
        for _ in 0..2 {
            for on in [true, false] {
                for (target, four, five) in TARGETS {
                    let fault = returned(m, on, target, |a, target| {
                        a.mov(rcx, target)?;
                        a.mov(r11, 0x202u64)?;
                        a.sysretq()
                    });
                    let fine = if on { five } else { four };
                    println!("{target:x}, LA57 {on}: {fault:x?}");
                    assert_eq!(fault.is_none(), fine);
                    if let Some(fault) = fault {
                        assert_eq!((fault.vector, fault.error), (13, 0));
                        // AMD's is in user mode already when it faults.
                        let kernels = fault.cs == KERNEL_CS;
                        assert_eq!((kernels, fault.rip == target), (intel, !intel));
                    }
                }
            }
        }
    });
}

#[test]
fn a_return_by_iret_is_checked_for_the_levels_in_use() {
    each_engine_with_la57(|m| {
        for _ in 0..2 {
            for on in [true, false] {
                for (target, four, five) in TARGETS {
                    let fault = returned(m, on, target, |a, target| {
                        a.push(USER_DS as i32)?;
                        a.mov(rax, USER_STACK + ALIAS)?;
                        a.push(rax)?;
                        a.push(0x202)?;
                        a.push(USER_CS as i32)?;
                        a.mov(rax, target)?;
                        a.push(rax)?;
                        a.iretq()
                    });
                    let fine = if on { five } else { four };
                    println!("{target:x}, LA57 {on}: {fault:x?}");
                    assert_eq!(fault.is_none(), fine);
                    if let Some(fault) = fault {
                        assert_eq!((fault.vector, fault.error, fault.cs), (13, 0, KERNEL_CS));
                    }
                }
            }
        }
    });
}

#[test]
fn invpcid_takes_57_bits_and_reaches_pages_beyond_47() {
    each_engine_with_la57(|m| {
        for (at, fine) in [
            (X, true),
            (X + ALIAS, true),
            (X.wrapping_sub(ALIAS), true),
            (END - 1, true),
            (END, false),
            (!END, false),
        ] {
            for on in [true, false] {
                m.forget();
                m.to_kernel();
                switch(m, on);
                m.put(SPARE, 0x11u64);
                m.put(SPARE + 0x1000, 0x22u64);
                m.map(0, SPARE, P | RW);
                m.put(DATA + 0x40, 0u64);
                m.put(DATA + 0x48, at);
                m.set_reg(Gpr::Rbp, 0);
                // With four levels, the page where these have it.
                let page = if on && at != END - 1 && fine { at } else { X };
                let code = move |a: &mut CodeAssembler| {
                    a.mov(rbx, page)?;
                    a.mov(rcx, qword_ptr(rbx))?;
                    a.mov(rax, (SPARE + 0x1000) | P | RW)?;
                    a.mov(qword_ptr(X_PT), rax)?;
                    a.xor(eax, eax)?;
                    a.mov(edx, (DATA + 0x40) as u32)
                };
                println!("{at:x}, LA57 {on}");
                let invalidate = |a: &mut CodeAssembler| a.invpcid(rax, xmmword_ptr(rdx));
                if !fine {
                    let r = m.faults(code, invalidate);
                    assert_eq!((r.vector, r.error), (13, 0));
                    continue;
                }
                m.run_code(|a| {
                    code(a)?;
                    invalidate(a)?;
                    a.mov(rbp, qword_ptr(rbx))
                });
                assert!(m.records().is_empty(), "{:x?}", m.records());
                if page == at {
                    assert_eq!((m.reg(Gpr::Rcx), m.reg(Gpr::Rbp)), (0x11, 0x22));
                }
            }
        }
    });
}

#[test]
fn instructions_do_not_go_on_behind_the_end_of_either() {
    each_engine_with_la57(|m| {
        for (on, root, end, levels) in [(false, PML4, ALIAS >> 1, 4), (true, PML5, END, 5)] {
            canonical::map_the_end(m, root, levels);
            switch(m, on);
            canonical::fetch_across(m, end, levels);
        }
    });
}
