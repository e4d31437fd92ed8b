//! What user code may do and see: flags, ports, descriptors, counters. The sensitive instructions that x86-64 does not trap
//! must give the guest's answer, not the host's.

use doppel_conformance::*;
use doppel_x86::{Cr4, Gpr, Rflags};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Emit = fn(&mut CodeAssembler) -> Result<(), IcedError>;

#[test]
fn popf_of_user_code_changes_neither_if_nor_iopl() {
    each_engine(|m| {
        m.run_user(|a| {
            a.pushfq()?;
            a.pop(rax)?;
            a.push(0x4_7cd7)?;
            a.popfq()?;
            a.pushfq()?;
            a.pop(rbx)?;
            a.push(2)?;
            a.popfq()?;
            a.pushfq()?;
            a.pop(rcx)
        });
        assert_eq!(m.reg(Gpr::Rax), 0x202);
        assert_eq!(m.reg(Gpr::Rbx), 0x4_4ed7, "IF stays 1, IOPL 0");
        assert_eq!(m.reg(Gpr::Rcx), 0x202);
    });
}

#[test]
fn popf_of_the_kernel_changes_both() {
    each_engine(|m| {
        m.run_code(|a| {
            a.push(0x3002)?;
            a.popfq()?;
            a.pushfq()?;
            a.pop(rbx)?;
            a.push(0x202)?;
            a.popfq()?;
            a.pushfq()?;
            a.pop(rcx)?;
            a.cli()?;
            a.pushfq()?;
            a.pop(rdx)?;
            a.pushf()?;
            a.pop(si)
        });
        let seen = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx].map(|r| m.reg(r));
        assert_eq!(seen, [0x3002, 0x202, 2]);
        assert_eq!(m.reg(Gpr::Rsi) & 0xffff, 2);
    });
}

#[test]
fn iopl_opens_ports_and_the_interrupt_flag() {
    each_engine(|m| {
        m.to_user();
        m.place(64, USER_CODE, |a: &mut CodeAssembler| {
            a.in_(al, 0x60)?;
            a.out(0x61, al)?;
            a.cli()?;
            a.pushfq()?;
            a.pop(rbx)?;
            a.sti()?;
            a.pushfq()?;
            a.pop(rcx)?;
            machine::stop(a)
        });
        m.cpu_mut().rflags |= Rflags::IOPL;
        m.go(USER_CODE);
        m.run();
        assert!(m.records().is_empty());
        assert_eq!(m.bus.written, [(0x61, 0x60)]);
        assert_eq!((m.reg(Gpr::Rbx), m.reg(Gpr::Rcx)), (0x3002, 0x3202));
    });
}

#[test]
fn the_io_permission_map_opens_single_ports() {
    each_engine(|m| {
        // The map behind the TSS: ports 0x10 to 0x13 are open, all others up to 0xff are not.
        m.put(TSS + 0x66, 0x68u16);
        m.put_bytes(TSS + 0x68, &[0xff; 33]);
        m.put(TSS + 0x68 + 2, 0xf0u8);
        m.cpu_mut().tr.limit = 0x68 + 32;
        let cases: [(Emit, bool); 7] = [
            (|a| a.in_(al, 0x10), true),
            (|a| a.in_(eax, 0x10), true),
            (|a| a.in_(ax, 0x13), false),
            (|a| a.in_(al, 0x14), false),
            (|a| a.in_(al, 0x0f), false),
            (|a| a.out(0x13, al), true),
            (|a| a.out(0xf8, eax), false),
        ];
        for (n, (code, open)) in cases.iter().enumerate() {
            println!("case {n}");
            m.forget();
            m.to_user();
            if *open {
                m.run_user(code);
                assert!(m.records().is_empty());
            } else {
                let r = m.faults(|_| Ok(()), code);
                assert_eq!((r.vector, r.error), (13, 0));
            }
        }
        // Beyond the map.
        m.forget();
        m.to_user();
        let r = m.faults(|a| a.mov(edx, 0x1000), |a| a.in_(al, dx));
        assert_eq!((r.vector, r.error), (13, 0));
    });
}

#[test]
fn descriptors_are_looked_up_in_the_guests_table() {
    each_engine(|m| {
        m.run_user(|a| {
            a.mov(eax, USER_CS as u32)?;
            a.lar(r8d, eax)?;
            a.setz(bl)?;
            a.lsl(r9d, eax)?;
            // The TSS is a system descriptor of DPL 0: not for user code.
            a.mov(eax, TSS_SELECTOR as u32)?;
            a.lar(r12d, eax)?;
            a.setz(bh)?;
            a.mov(eax, USER_DS as u32)?;
            a.verr(ax)?;
            a.setz(cl)?;
            a.verw(ax)?;
            a.setz(ch)?;
            a.mov(eax, KERNEL_DS as u32)?;
            a.verw(ax)?;
            a.setz(dl)?;
            a.str(edi)?;
            a.sldt(esi)?;
            a.smsw(ebp)
        });
        assert_eq!(m.reg(Gpr::R8), 0x00af_fb00);
        assert_eq!(m.reg(Gpr::R9), 0xffff_ffff);
        assert_eq!(m.reg(Gpr::Rbx) & 0xffff, 1);
        assert_eq!(
            (m.reg(Gpr::Rcx) & 0xffff, m.reg(Gpr::Rdx) & 0xff),
            (0x101, 0)
        );
        assert_eq!((m.reg(Gpr::Rdi), m.reg(Gpr::Rsi)), (TSS_SELECTOR, 0));
        assert_eq!(m.reg(Gpr::Rbp), m.cpu().cr0.bits() & 0xffff_ffff);
    });
}

#[test]
fn the_time_stamp_counter_can_be_closed_to_users() {
    each_engine(|m| {
        m.run_user(|a| {
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.lea(rbx, qword_ptr(rax + rdx))?;
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)?;
            a.sub(rax, rbx)
        });
        assert!((m.reg(Gpr::Rax) as i64) > 0, "it goes forward");
        m.enable(Cr4::TSD);
        for code in [
            |a: &mut CodeAssembler| a.rdtsc(),
            |a: &mut CodeAssembler| a.rdtscp(),
        ] {
            m.forget();
            m.to_user();
            let r = m.faults(|_| Ok(()), code);
            assert_eq!((r.vector, r.error), (13, 0));
        }
        m.forget();
        m.to_user();
        assert_eq!(m.faults(|a| a.xor(ecx, ecx), |a| a.rdpmc()).vector, 13);
        // The kernel may.
        m.forget();
        m.to_kernel();
        m.run_code(|a| a.rdtsc());
        assert!(m.records().is_empty());
    });
}

#[test]
fn cpuid_says_what_the_machine_offers() {
    each_engine(|m| {
        m.enable(Cr4::OSXSAVE);
        m.run_user(|a| {
            a.mov(eax, 1)?;
            a.xor(ecx, ecx)?;
            a.cpuid()?;
            a.mov(r8d, ecx)?;
            a.mov(r9d, edx)?;
            a.mov(eax, 0x4000_0000u32)?;
            a.cpuid()
        });
        let leaf = m.cpu().cpuid(1, 0);
        assert_eq!(m.reg(Gpr::R8), u64::from(leaf.ecx));
        assert_eq!(m.reg(Gpr::R9), u64::from(leaf.edx));
        assert_eq!(m.reg(Gpr::R8) >> 27 & 1, 1, "OSXSAVE follows CR4");
        assert_eq!(m.reg(Gpr::R9) & 2, 2, "VME");
        assert_eq!(
            m.reg(Gpr::Rbx),
            u64::from(m.cpu().cpuid(0x4000_0000, 0).ebx)
        );
        // CR4 refuses what CPUID does not show.
        m.to_kernel();
        let r = m.faults(
            |a| {
                a.mov(rax, cr4)?;
                a.or(eax, Cr4::PKE.bits() as i32)
            },
            |a| a.mov(cr4, rax),
        );
        assert_eq!((r.vector, r.error), (13, 0));
    });
}
