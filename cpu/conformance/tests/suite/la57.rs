//! 5-level paging: what CR4.LA57 makes canonical, and what the processor takes for later use without it.

use doppel_conformance::machine::stop;
use doppel_conformance::*;
use doppel_x86::{CpuChoice, Cr4, Gpr};
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
