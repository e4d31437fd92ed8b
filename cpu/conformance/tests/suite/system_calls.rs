//! Ways into the kernel and out: SYSCALL, SYSRET, SYSENTER, SYSEXIT, INT, IRET, from 64-bit and from 32-bit user code.

use doppel_conformance::*;
use doppel_x86::{CpuMode, Gpr, Rflags, Seg, Vendor};
use iced_x86::code_asm::*;

const KERNEL: u64 = CODE + 0x400;
const STAR: u64 = 0x0023_0010 << 32;

fn set_up(m: &mut Machine) {
    let cpu = m.cpu_mut();
    cpu.msr.star = STAR;
    cpu.msr.lstar = KERNEL;
    cpu.msr.cstar = KERNEL + 0x100;
    cpu.msr.sfmask = (Rflags::IF | Rflags::DF | Rflags::TF | Rflags::AC).bits();
    cpu.msr.sysenter_cs = KERNEL_CS;
    cpu.msr.sysenter_esp = KERNEL_STACK;
    cpu.msr.sysenter_eip = KERNEL + 0x200;
}

#[test]
fn syscall_and_sysret() {
    each_engine_and_vendor(|m| {
        set_up(m);
        m.place(64, KERNEL, |a: &mut CodeAssembler| {
            a.mov(qword_ptr(DATA), rcx)?;
            a.mov(qword_ptr(DATA + 8), r11)?;
            a.mov(ebx, cs)?;
            a.mov(ebp, ss)?;
            a.pushfq()?;
            a.pop(r8)?;
            a.inc(r12)?;
            a.sysretq()
        });
        m.run_user(|a| {
            // The stack is still the user's: the kernel's PUSHFQ goes there.
            a.xor(r12d, r12d)?;
            a.mov(r13d, 100)?;
            a.std()?;
            a.stc()?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.syscall()?;
            a.dec(r13)?;
            a.jnz(again)?;
            a.pushfq()?;
            a.pop(r14)
        });
        assert_eq!(m.reg(Gpr::R12), 100);
        assert_eq!(m.data(0), USER_CODE + 3 + 6 + 2 + 2);
        assert_eq!(m.data(1) & 0x600, 0x600, "IF and DF of the user");
        assert_eq!((m.reg(Gpr::Rbx), m.reg(Gpr::Rbp)), (0x10, 0x18));
        assert_eq!(m.reg(Gpr::R8) & 0x600, 0, "IF and DF are masked");
        assert_eq!(m.reg(Gpr::R14) & 0x600, 0x600);
    });
}

#[test]
fn sysret_does_not_set_rf_and_returns_to_compatibility_mode() {
    each_engine_and_vendor(|m| {
        set_up(m);
        m.place(64, CODE, |a: &mut CodeAssembler| {
            a.mov(rcx, USER_CODE)?;
            a.mov(r11, 0x1_0202u64)?;
            a.sysret()
        });
        m.place(32, USER_CODE, |a: &mut CodeAssembler| {
            // DEC EAX here, a REX prefix in 64-bit mode.
            a.mov(eax, 5)?;
            a.dec(eax)?;
            a.mov(ebx, cs)?;
            a.int(0x81)
        });
        m.go(CODE);
        m.run();
        assert_eq!((m.reg(Gpr::Rax), m.reg(Gpr::Rbx)), (4, 0x23));
        m.to_kernel();
        m.forget();
        // AMD's is in user mode already when it faults.
        m.action(13, Action::Stop);
        let r = m.faults(|a| a.mov(rcx, 1u64 << 63), |a| a.sysretq());
        if m.cpu().cpuid.vendor() == Vendor::Intel {
            assert_eq!((r.vector, r.error), (13, 0));
        } else {
            assert_eq!((r.vector, r.rip, r.cs), (13, 1 << 63, USER_CS));
        }
    });
}

#[test]
fn system_calls_can_be_turned_off() {
    each_engine_and_vendor(|m| {
        set_up(m);
        m.cpu_mut().efer.remove(doppel_x86::Efer::SCE);
        let r = m.faults(|_| Ok(()), |a| a.syscall());
        assert_eq!(r.vector, 6);
        m.forget();
        let r = m.faults(|_| Ok(()), |a| a.sysretq());
        assert_eq!(r.vector, 6);
    });
}

#[test]
fn int_0x80_from_32_bit_code() {
    each_engine(|m| {
        m.to_user32();
        m.set_reg(Gpr::Rsp, USER_STACK | 1 << 40);
        m.place(32, USER_CODE, |a: &mut CodeAssembler| {
            a.mov(eax, 0x1234_5678)?;
            a.mov(ecx, 20)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.push(eax)?;
            a.int(0x80)?;
            a.pop(edx)?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.int(0x81)
        });
        m.go(USER_CODE);
        m.run();
        let records = m.records();
        assert_eq!(records.len(), 20);
        assert_eq!((records[0].cs, records[0].ss), (USER_CS32, USER_DS));
        assert_eq!(records[0].rip, USER_CODE + 5 + 5 + 1 + 2);
        assert_eq!(records[0].rsp & 0xffff_ffff, USER_STACK - 4);
        assert_eq!(m.reg(Gpr::Rdx), 0x1234_5678);
    });
}

#[test]
fn syscall_from_32_bit_code() {
    each_engine_and_vendor(|m| {
        set_up(m);
        let amd = m.cpu().cpuid.vendor() != Vendor::Intel;
        m.place(64, KERNEL + 0x100, |a: &mut CodeAssembler| {
            a.mov(ebx, 77)?;
            a.sysret()
        });
        m.to_user32();
        m.place(32, USER_CODE, |a: &mut CodeAssembler| {
            a.syscall()?;
            a.mov(edx, ebx)?;
            a.int(0x81)
        });
        m.action(6, Action::Stop);
        m.set_reg(Gpr::Rdx, 0);
        m.go(USER_CODE);
        m.run();
        if amd {
            assert_eq!(m.reg(Gpr::Rdx), 77);
        } else {
            let r = m.records()[0];
            assert_eq!((r.vector, r.cs, r.rip), (6, USER_CS32, USER_CODE));
        }
    });
}

#[test]
fn sysenter_and_sysexit() {
    each_engine_and_vendor(|m| {
        set_up(m);
        let intel = m.cpu().cpuid.vendor() == Vendor::Intel;
        m.place(64, KERNEL + 0x200, |a: &mut CodeAssembler| {
            a.mov(rbp, rsp)?;
            a.pushfq()?;
            a.pop(r8)?;
            a.sysexit()
        });
        m.to_user32();
        m.place(32, USER_CODE, |a: &mut CodeAssembler| {
            a.mov(edx, (USER_CODE + 0x40) as u32)?;
            a.mov(ecx, esp)?;
            a.sysenter()
        });
        m.place(32, USER_CODE + 0x40, |a: &mut CodeAssembler| {
            a.mov(ebx, cs)?;
            a.mov(esi, ss)?;
            a.int(0x81)
        });
        m.action(6, Action::Stop);
        m.go(USER_CODE);
        m.run();
        if !intel {
            assert_eq!(m.vectors(), [6]);
            return;
        }
        assert_eq!(m.reg(Gpr::Rbp), KERNEL_STACK);
        assert_eq!(m.reg(Gpr::R8) & 0x200, 0, "IF is cleared");
        assert_eq!((m.reg(Gpr::Rbx), m.reg(Gpr::Rsi)), (USER_CS32, USER_DS));
        // And with REX.W, to 64-bit code: the segments are 32 and 40 behind.
        m.to_kernel();
        m.forget();
        m.put(GDT + 0x30, 0x00af_fb00_0000_ffffu64);
        m.put(GDT + 0x38, 0x00cf_f300_0000_ffffu64);
        m.place(64, USER_CODE + 0x80, |a: &mut CodeAssembler| {
            a.mov(rax, 1u64 << 40)?;
            a.mov(ebx, cs)?;
            machine::stop(a)
        });
        m.run_code(|a| {
            a.mov(rcx, USER_STACK)?;
            a.mov(rdx, USER_CODE + 0x80)?;
            a.sysexitq()
        });
        assert_eq!((m.reg(Gpr::Rax), m.reg(Gpr::Rbx)), (1 << 40, 0x33));
        m.to_kernel();
        m.cpu_mut().msr.sysenter_cs = 0;
        let r = m.faults(|_| Ok(()), |a| a.sysenter());
        assert_eq!((r.vector, r.error), (13, 0));
    });
}

#[test]
fn thirty_two_bit_code_faults_with_32_bit_addresses() {
    each_engine(|m| {
        m.to_user32();
        m.action(14, Action::Stop);
        m.place(32, USER_CODE, |a: &mut CodeAssembler| {
            a.mov(eax, 0xffff_fff0u32)?;
            a.mov(ebx, dword_ptr(eax + 0x18))
        });
        // Wraps to address 8, a supervisor page.
        m.go(USER_CODE);
        m.run();
        let r = m.records()[0];
        assert_eq!((r.vector, r.error, r.cr2), (14, 5, 8));
        assert_eq!(r.rip, USER_CODE + 5);
    });
}

#[test]
fn far_transfers_between_64_and_32_bit_code() {
    each_engine(|m| {
        m.put(USER_DATA, (USER_CODE + 0x100) as u32);
        m.put(USER_DATA + 4, USER_CS32 as u16);
        m.place(32, USER_CODE + 0x100, |a: &mut CodeAssembler| {
            a.mov(ebx, 5)?;
            a.dec(ebx)?;
            a.retf()
        });
        m.run_user(|a| {
            a.mov(r12d, 50)?;
            a.xor(r13d, r13d)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.call(fword_ptr(USER_DATA))?;
            a.add(r13, rbx)?;
            a.dec(r12d)?;
            a.jnz(again)
        });
        assert_eq!((m.reg(Gpr::R13), m.reg(Gpr::Rsp)), (200, STACK_AFTER_STOP));
        assert!(m.records().is_empty());
    });
}

/// RSP in the stop handler of user code.
const STACK_AFTER_STOP: u64 = KERNEL_STACK - 40;

#[test]
fn iret_to_user_code_restores_the_frame() {
    each_engine(|m| {
        for (selector, long) in [(USER_CS, true), (USER_CS32, false)] {
            m.to_kernel();
            m.put_bytes(USER_CODE, &[0x8c, 0xcb, 0x9c, 0xcd, STOP]);
            m.run_code(|a| {
                a.push(USER_DS as i32)?;
                a.push(USER_STACK as i32)?;
                a.push(0x4_4ed7)?;
                a.push(selector as i32)?;
                a.push(USER_CODE as i32)?;
                a.iretq()
            });
            assert_eq!(m.reg(Gpr::Rbx) & 0xffff, selector);
            let at = USER_STACK - if long { 8 } else { 4 };
            assert_eq!(
                m.ram.load::<u32>(at),
                Some(0x4_4ed7),
                "NT, DF, AC and the arithmetic flags"
            );
        }
    });
}

#[test]
fn iret_refuses_bad_frames() {
    each_engine(|m| {
        for (code_selector, stack_selector, rip, stack, code) in [
            (0, USER_DS, USER_CODE, USER_STACK, 0),
            (KERNEL_DS, KERNEL_DS, CODE, KERNEL_STACK, KERNEL_DS),
            (USER_CS, KERNEL_DS, USER_CODE, USER_STACK, KERNEL_DS),
            (USER_CS, 0, USER_CODE, USER_STACK, 0),
            (USER_CS, 3, USER_CODE, USER_STACK, 0),
            (USER_CS, USER_DS, 1 << 63, USER_STACK, 0),
            (0x200, USER_DS, USER_CODE, USER_STACK, 0x200),
        ] {
            println!("{code_selector:x} {stack_selector:x} {rip:x}");
            m.to_kernel();
            m.forget();
            let r = m.faults(
                |a| {
                    for word in [stack_selector, stack, 2, code_selector, rip] {
                        a.mov(rax, word)?;
                        a.push(rax)?;
                    }
                    Ok(())
                },
                |a| a.iretq(),
            );
            assert_eq!((r.vector, r.error), (13, code));
            assert_eq!(r.rsp, KERNEL_STACK - 0x800 - 40, "RSP is as it was");
        }
        assert_eq!(m.cpu().mode(), CpuMode::Bits64);
    });
}

#[test]
fn iret_to_less_privilege_forgets_the_kernels_data_segments() {
    each_engine(|m| {
        m.to_kernel();
        m.place(64, USER_CODE, machine::stop);
        m.run_code(|a| {
            a.push(USER_DS as i32)?;
            a.push(USER_STACK as i32)?;
            a.push(2)?;
            a.push(USER_CS as i32)?;
            a.push(USER_CODE as i32)?;
            a.iretq()
        });
        for seg in [Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs] {
            assert_eq!(m.cpu().segment(seg).selector, 0, "{seg:?}");
        }
    });
}
