//! VIF in the place of IF: the extensions of virtual-8086 mode (CR4.VME), and virtual interrupts of protected mode (CR4.PVI).

use doppel_conformance::*;
use doppel_x86::{Cr4, Gpr, Rflags};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const CODE: u64 = 0x1_0000;
const CODE64: u64 = doppel_conformance::CODE;
const STACK: u64 = 0x3_0000;
const IP: u64 = 0x100;
/// Where the 8086 program handles [`VECTOR`].
const HANDLER_IP: u64 = 0x400;
const VECTOR: u8 = 0x15;
const REDIRECTION: u64 = 0x68;
const IO_MAP: u64 = REDIRECTION + 32;
const TF: Rflags = Rflags::TF;
const IF: Rflags = Rflags::IF;
const VIF: Rflags = Rflags::VIF;
const VIP: Rflags = Rflags::VIP;
const NONE: Rflags = Rflags::empty();

type Instructions = fn(&mut CodeAssembler) -> Result<(), IcedError>;

fn general_protection(error: u64, ip: u64) -> End {
    End {
        vector: Some(13),
        error,
        ip,
    }
}

/// Virtual-8086 mode with VME, these flags, and a TSS with a redirection bitmap, all of it clear.
fn extended(iopl: u8, flags: Rflags, test: impl Fn(&mut LegacyMachine)) {
    each_legacy(Legacy::V86(iopl), |m| {
        let cpu = m.cpu_mut();
        cpu.cr4 |= Cr4::VME;
        cpu.rflags |= flags;
        cpu.tr.limit = IO_MAP as u32;
        let tss = cpu.tr.base;
        m.put(tss + 0x66, IO_MAP as u16);
        test(m);
    });
}

/// What the handler of a #GP found: the flags, and SP.
fn interrupted(m: &mut LegacyMachine) -> (Rflags, u64) {
    let frame = m.reg(Gpr::Rsp);
    let flags = m.get::<u32>(frame + 12);
    let flags = Rflags::from_bits_retain(flags.into()) & !Rflags::RF;
    (flags, m.get::<u32>(frame + 16).into())
}

fn iopl(n: u8) -> Rflags {
    Rflags::from_bits_retain(u64::from(n) << 12)
}

#[test]
fn cli_sti_and_pushf_of_virtual_8086_mode_take_vif_for_if() {
    for (n, real) in [(0, NONE), (1, IF), (2, NONE), (0, IF)] {
        extended(n, real | VIF, |m| {
            m.finish(IP, |a| {
                a.cli()?;
                a.pushf()?;
                a.pop(ax)?;
                a.sti()?;
                a.pushf()?;
                a.pop(bx)
            });
            let shown = |r| Rflags::from_bits_retain(m.reg(r) & 0xffff);
            let always = Rflags::ONE | iopl(3);
            assert_eq!(shown(Gpr::Rax), always);
            assert_eq!(shown(Gpr::Rbx), always | IF);
            let (flags, _) = interrupted(m);
            assert_eq!(flags, Rflags::ONE | Rflags::VM | VIF | real | iopl(n));
        });
    }
}

#[test]
fn sti_faults_where_an_interrupt_is_pending_and_cli_does_not() {
    extended(1, VIP, |m| {
        assert_eq!(m.fault(IP, |a| a.sti()), general_protection(0, IP));
        assert!(!interrupted(m).0.contains(VIF));
    });
    extended(1, VIP, |m| {
        m.finish(IP, |a| a.cli());
        assert_eq!(interrupted(m).0 & (VIF | VIP), VIP);
    });
    // Where IOPL is 3, IF is the program's own.
    extended(3, VIP, |m| {
        m.finish(IP, |a| a.sti());
        assert_eq!(interrupted(m).0 & (IF | VIF), IF);
    });
}

/// What POPF and IRET of 16 bits pop, what VIP is, and VIF afterwards; `None` for #GP.
const POPPED: [(Rflags, Rflags, Option<Rflags>); 6] = [
    (NONE, NONE, Some(NONE)),
    (IF, NONE, Some(VIF)),
    (NONE, VIP, Some(NONE)),
    (IF, VIP, None),
    (TF, NONE, None),
    (TF, VIP, None),
];

fn check_popped(m: &mut LegacyMachine, popped: Rflags, vip: Rflags, vif: Option<Rflags>, end: u64) {
    const SP: u64 = 0x8000;
    let pushed = m.reg(Gpr::Rbp);
    let ended = m.run(IP);
    let (flags, top) = interrupted(m);
    let kept = flags & (IF | Rflags::IOPL | VIP | TF);
    assert_eq!(kept, IF | iopl(2) | vip, "{popped:?}");
    match vif {
        Some(vif) => {
            assert_eq!((ended, top), (general_protection(0, end), SP));
            assert_eq!((flags & VIF, flags & Rflags::DF), (vif, Rflags::DF));
        }
        None => {
            assert_eq!(ended.vector, Some(13));
            assert_eq!((ended.error, top), (0, SP - pushed));
            assert_eq!(flags & (VIF | Rflags::DF), NONE);
        }
    }
}

#[test]
fn popf_of_virtual_8086_mode_takes_if_as_vif() {
    for (popped, vip, vif) in POPPED {
        extended(2, IF | vip, |m| {
            let image = popped | Rflags::DF | iopl(1);
            let end = m.place(16, CODE, IP, |a| {
                a.push(image.bits() as i32)?;
                a.popf()?;
                a.hlt()
            });
            m.set(Gpr::Rbp, 2);
            check_popped(m, popped, vip, vif, end - 1);
        });
    }
}

#[test]
fn iret_of_virtual_8086_mode_takes_if_as_vif() {
    for (popped, vip, vif) in POPPED {
        extended(2, IF | vip, |m| {
            let image = popped | Rflags::DF | iopl(1);
            m.place(16, CODE, IP, |a| {
                a.push(image.bits() as i32)?;
                a.push(cs)?;
                a.push(HANDLER_IP as i32)?;
                a.iret()
            });
            m.place(16, CODE, HANDLER_IP, |a: &mut CodeAssembler| a.hlt());
            m.set(Gpr::Rbp, 6);
            check_popped(m, popped, vip, vif, HANDLER_IP);
        });
    }
}

#[test]
fn flags_of_32_bits_are_the_monitors() {
    let codes: [Instructions; 3] = [|a| a.pushfd(), |a| a.popfd(), |a| a.iretd()];
    for code in codes {
        extended(2, NONE, |m| {
            assert_eq!(m.fault(IP, code), general_protection(0, IP));
        });
    }
}

/// An INT of virtual-8086 mode with a bit of the redirection bitmap.
fn interrupt(m: &mut LegacyMachine, bit: bool) -> End {
    let (tss, idt) = (m.cpu_mut().tr.base, m.cpu_mut().idtr.base);
    let map: u8 = if bit {
        1 << (VECTOR % 8)
    } else {
        !(1 << (VECTOR % 8))
    };
    m.put(tss + REDIRECTION + u64::from(VECTOR / 8), map);
    // A gate that user code may use.
    m.put(idt + 8 * u64::from(VECTOR) + 5, 0xeeu8);
    m.put(4 * u64::from(VECTOR), (CODE << 12 | HANDLER_IP) as u32);
    m.place(16, CODE, HANDLER_IP, |a: &mut CodeAssembler| a.hlt());
    m.fault(IP, |a| a.int(u32::from(VECTOR)))
}

#[test]
fn a_software_interrupt_goes_where_iopl_and_the_redirection_bitmap_send_it() {
    let monitor = general_protection(0, IP);
    let handler = End {
        vector: Some(VECTOR.into()),
        error: 0,
        ip: IP + 2,
    };
    let program = general_protection(0, HANDLER_IP);
    // The six methods of table 22-2.
    for (vme, n, bit, expected) in [
        (false, 3, false, handler),
        (false, 3, true, handler),
        (false, 2, false, monitor),
        (false, 0, true, monitor),
        (true, 2, true, monitor),
        (true, 0, true, monitor),
        (true, 3, true, handler),
        (true, 3, false, program),
        (true, 2, false, program),
        (true, 0, false, program),
    ] {
        extended(n, NONE, |m| {
            m.cpu_mut().cr4.set(Cr4::VME, vme);
            assert_eq!(interrupt(m, bit), expected, "{vme} {n} {bit}");
        });
    }
}

#[test]
fn a_redirected_interrupt_pushes_the_flags_that_the_program_knows() {
    for (n, before, pushed, after) in [
        (3, IF, IF, NONE),
        (3, VIF, NONE, VIF),
        (1, VIF, IF, NONE),
        (1, IF, NONE, IF),
        (1, IF | VIF | TF, IF | TF, IF),
    ] {
        extended(n, before, |m| {
            assert_eq!(interrupt(m, false), general_protection(0, HANDLER_IP));
            let (flags, top) = interrupted(m);
            assert_eq!(flags, Rflags::ONE | Rflags::VM | after | iopl(n));
            assert_eq!(top, 0x7ffa);
            let frame = [0, 2, 4].map(|at| u64::from(m.get::<u16>(STACK + top + at)));
            let image = Rflags::ONE | pushed | iopl(3);
            assert_eq!(frame, [IP + 2, CODE >> 4, image.bits()]);
        });
    }
}

#[test]
fn a_redirection_bitmap_beyond_the_tss_refuses() {
    let last = REDIRECTION + u64::from(VECTOR / 8);
    for (limit, good) in [
        (last, true),
        (last - 1, false),
        (0x67, false),
        (0x66, false),
    ] {
        extended(0, NONE, |m| {
            m.cpu_mut().tr.limit = limit as u32;
            let expected = if good { HANDLER_IP } else { IP };
            assert_eq!(interrupt(m, false), general_protection(0, expected));
        });
    }
}

#[test]
fn breakpoints_and_overflows_are_not_redirected() {
    for n in [0, 3] {
        let codes: [(u64, Instructions); 2] = [(3, |a| a.int3()), (4, |a| a.into())];
        for (vector, code) in codes {
            extended(n, Rflags::OF, |m| {
                // The gates' DPL is 0.
                let expected = general_protection(vector << 3 | 2, IP);
                assert_eq!(m.fault(IP, code), expected);
            });
        }
    }
}

#[test]
fn an_interrupt_that_is_pending_and_allowed_faults_before_the_next_instruction() {
    for (vme, n, waits) in [
        (true, 0, true),
        (true, 2, true),
        (true, 3, false),
        (false, 0, false),
    ] {
        extended(n, VIF | VIP, |m| {
            m.cpu_mut().cr4.set(Cr4::VME, vme);
            let end = m.fault(IP, |a| {
                a.inc(bx)?;
                a.hlt()
            });
            let at = if waits { IP } else { IP + 1 };
            assert_eq!(end, general_protection(0, at), "{vme} {n}");
        });
    }
}

#[test]
fn protected_mode_has_a_virtual_interrupt_flag_too() {
    for n in 0..3 {
        let with = |flags: Rflags, test: &dyn Fn(&mut LegacyMachine)| {
            each_legacy(Legacy::Protected(3), |m| {
                m.cpu_mut().cr4 |= Cr4::PVI;
                m.cpu_mut().rflags |= iopl(n) | flags;
                test(m);
            });
        };
        with(IF, &|m| {
            m.finish(IP, |a| {
                a.sti()?;
                a.pushf()?;
                a.pop(ax)?;
                // POPF changes neither.
                a.push(0x202 & !0x200)?;
                a.popf()
            });
            assert_eq!(m.reg(Gpr::Rax) & 0xffff, 0x202 | iopl(n).bits());
            assert_eq!(interrupted(m).0, Rflags::ONE | IF | VIF | iopl(n));
        });
        with(VIF | VIP, &|m| {
            assert_eq!(m.fault(IP, |a| a.cli()), general_protection(0, IP));
        });
        with(VIF, &|m| {
            m.finish(IP, |a| a.cli());
            assert_eq!(interrupted(m).0, Rflags::ONE | iopl(n));
        });
        with(VIP, &|m| {
            assert_eq!(m.fault(IP, |a| a.sti()), general_protection(0, IP));
            assert_eq!(interrupted(m).0 & (VIF | VIP), VIP);
        });
    }
}

#[test]
fn only_cpl_3_has_it() {
    for cpl in [1, 2] {
        let codes: [Instructions; 2] = [|a| a.cli(), |a| a.sti()];
        for code in codes {
            each_legacy(Legacy::Protected(cpl), |m| {
                m.cpu_mut().cr4 |= Cr4::PVI;
                assert_eq!(m.fault(IP, code), general_protection(0, IP));
            });
        }
    }
    // And in virtual-8086 mode it is VME's.
    each_legacy(Legacy::V86(0), |m| {
        m.cpu_mut().cr4 |= Cr4::PVI;
        assert_eq!(m.fault(IP, |a| a.sti()), general_protection(0, IP));
    });
}

/// 64-bit user code as `direct` runs it, with virtual interrupts.
fn enable_for_user_code(m: &mut Machine) {
    m.enable(Cr4::PVI | Cr4::FSGSBASE);
    if m.cpu().cpuid.has_xsave() {
        m.enable(Cr4::OSXSAVE);
        m.cpu_mut().xcr0 = m.cpu().cpuid.xcr0();
    }
}

#[test]
fn so_has_64_bit_code_and_its_frames_show_it() {
    each_engine(|m| {
        enable_for_user_code(m);
        m.run_user(|a| {
            a.sti()?;
            a.pushfq()?;
            a.pop(rbx)?;
            a.int3()?;
            a.pushfq()?;
            a.pop(rcx)?;
            a.cli()?;
            a.pushfq()?;
            a.pop(rdx)
        });
        let both = (IF | VIF).bits();
        let shown = [Gpr::Rbx, Gpr::Rcx, Gpr::Rdx].map(|r| m.reg(r) & both);
        assert_eq!(shown, [both, both, IF.bits()]);
        assert_eq!(m.records()[0].rflags & both, both);
        m.forget();
        m.to_user();
        m.cpu_mut().rflags |= VIP;
        let r = m.faults(|_| Ok(()), |a| a.sti());
        assert_eq!((r.vector, r.error), (13, 0));
        assert_eq!(r.rflags & (VIF | VIP).bits(), VIP.bits());
    });
}

#[test]
fn a_kernel_that_returns_with_both_flags_is_back_at_once() {
    const KERNEL: u64 = CODE64 + 0x400;
    const OFTEN: u64 = 200;
    let both = (VIF | VIP).bits() as i32;
    for syscall in [false, true] {
        each_engine(|m| {
            enable_for_user_code(m);
            m.gate(0x80, KERNEL, 0xe, 0, 3);
            let cpu = m.cpu_mut();
            (cpu.msr.star, cpu.msr.lstar) = (0x0023_0010 << 32, KERNEL);
            cpu.msr.sfmask = 0xffff & !Rflags::ONE.bits() | Rflags::AC.bits();
            m.place(64, KERNEL, |a: &mut CodeAssembler| {
                let mut last = a.create_label();
                a.dec(r12d)?;
                a.jz(last)?;
                let leave = |a: &mut CodeAssembler| match syscall {
                    true => a.sysretq(),
                    false => a.iretq(),
                };
                leave(a)?;
                a.set_label(&mut last)?;
                match syscall {
                    true => a.or(r11d, both)?,
                    false => a.or(dword_ptr(rsp + 16), both)?,
                }
                leave(a)
            });
            m.set_reg(Gpr::R12, OFTEN);
            m.set_reg(Gpr::R15, 0);
            m.run_user(|a| {
                let mut again = a.create_label();
                a.xor(eax, eax)?;
                a.mov(ds, eax)?;
                a.mov(es, eax)?;
                a.set_label(&mut again)?;
                match syscall {
                    true => a.syscall()?,
                    false => a.int(0x80)?,
                }
                a.jmp(again)
            });
            let r = m.records()[0];
            assert_eq!((r.vector, r.error, r.cs), (13, 0, USER_CS), "{r:x?}");
            assert_eq!((m.reg(Gpr::R12), r.rip), (0, USER_CODE + 8), "{syscall}");
        });
    }
}
