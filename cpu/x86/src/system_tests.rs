//! System instructions, assembled and executed one by one.

use iced_x86::code_asm::{
    CodeAssembler, al, ax, bx, cr0, cr3, cx, dr0, dr4, dr5, dr7, ds, dx, eax, ebx, ecx, fs,
    fword_ptr, ptr, rax, rbx, rcx, rsi, ss, xmmword_ptr,
};
use iced_x86::{Decoder, DecoderOptions};

use super::*;
use crate::testing::*;
use crate::{Activity, Efer, Segment, event};

/// Assembles one instruction, decodes it in the CPU's mode and executes it. A completed instruction moves RIP on.
fn run(
    cpu: &mut Cpu,
    bus: &mut TestBus,
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Step {
    let bits = match cpu.mode() {
        CpuMode::Bits64 => 64,
        CpuMode::Bits32 => 32,
        _ => 16,
    };
    let mut a = CodeAssembler::new(bits).expect("assembler");
    f(&mut a).expect("instruction");
    let bytes = a.assemble(cpu.rip).expect("encoding");
    let i = Decoder::with_ip(bits, &bytes, cpu.rip, DecoderOptions::NONE).decode();
    let step = execute(cpu, bus, &i).expect("a system instruction");
    if step == Ok(Flow::Next) {
        cpu.rip = next_rip(cpu, &i);
    }
    step
}

fn long() -> (Box<Cpu>, TestBus) {
    (long_mode(AMD), TestBus::default())
}

fn user() -> (Box<Cpu>, TestBus) {
    let (mut cpu, bus) = long();
    to_user(&mut cpu);
    (cpu, bus)
}

fn set(cpu: &mut Cpu, r: Gpr, v: u64) {
    cpu.gpr[r as usize] = v;
}

const DONE: Step = Ok(Flow::Done);
const NEXT: Step = Ok(Flow::Next);
const GP: Step = Err(GP0);
const UD: Step = Err(Exception::UD);

#[test]
fn cpuid_tells_the_microcodes_revision_as_software_asks_for_it() {
    const BIOS_SIGN_ID: u32 = 0x8b;
    let (mut cpu, mut bus) = (long_mode(INTEL), TestBus::default());
    let revision = msr::read(&mut cpu, &mut bus, BIOS_SIGN_ID);
    msr::write(&mut cpu, &mut bus, BIOS_SIGN_ID, 0).expect("cleared");
    for (leaf, told) in [(0, Ok(0)), (1, revision)] {
        cpu.gpr[Gpr::Rax as usize] = leaf;
        assert_eq!(run(&mut cpu, &mut bus, |a| a.cpuid()), NEXT);
        assert_eq!(msr::read(&mut cpu, &mut bus, BIOS_SIGN_ID), told);
    }
    assert_ne!(revision, Ok(0));
}

#[test]
fn popf_changes_if_and_iopl_only_where_it_may() {
    let image = Rflags::IF | Rflags::IOPL | Rflags::CF | Rflags::ONE | Rflags::VM | Rflags::RF;
    let popf = |cpu: &mut Cpu, bus: &mut TestBus| {
        let sp = cpu.reg(Gpr::Rsp);
        put(cpu, sp, image.bits());
        assert_eq!(run(cpu, bus, |a| a.popfq()), NEXT);
        assert_eq!(cpu.reg(Gpr::Rsp), sp + 8);
        cpu.rflags
    };
    let (mut cpu, mut bus) = long();
    let kernel = Rflags::ONE | Rflags::CF | Rflags::IF | Rflags::IOPL;
    assert_eq!(popf(&mut cpu, &mut bus), kernel);

    let (mut cpu, mut bus) = user();
    cpu.rflags = Rflags::ONE;
    // Without a fault, and without an effect on IF: this is what the bare processor does not tell a monitor.
    assert_eq!(popf(&mut cpu, &mut bus), Rflags::ONE | Rflags::CF);
    cpu.rflags = Rflags::ONE | Rflags::IOPL;
    assert_eq!(popf(&mut cpu, &mut bus), kernel);
}

#[test]
fn pushf_hides_rf_and_vm() {
    let (mut cpu, mut bus) = user();
    cpu.rflags |= Rflags::RF | Rflags::AC;
    run(&mut cpu, &mut bus, |a| a.pushfq()).unwrap();
    let image = Rflags::ONE | Rflags::IF | Rflags::AC;
    assert_eq!(get(&cpu, USER_STACK - 8), image.bits());
    run(&mut cpu, &mut bus, |a| a.pushf()).unwrap();
    assert_eq!(cpu.ram.load::<u16>(USER_STACK - 10), Some(0x202));
}

#[test]
fn cli_and_sti_need_iopl_and_sti_casts_a_shadow() {
    let (mut cpu, mut bus) = user();
    assert_eq!(run(&mut cpu, &mut bus, |a| a.cli()), GP);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.sti()), GP);
    cpu.rflags |= Rflags::IOPL;
    assert_eq!(run(&mut cpu, &mut bus, |a| a.cli()), NEXT);
    assert!(!cpu.rflags.contains(Rflags::IF) && !cpu.interrupt_shadow);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.sti()), NEXT);
    assert!(cpu.rflags.contains(Rflags::IF) && cpu.interrupt_shadow);
    bus.interrupt = Some(0x20);
    assert!(!event::deliverable(&cpu, &mut bus));
    // A second STI casts none.
    cpu.interrupt_shadow = false;
    run(&mut cpu, &mut bus, |a| a.sti()).unwrap();
    assert!(!cpu.interrupt_shadow);
}

#[test]
fn privileged_instructions_fault_in_user_mode() {
    let (mut cpu, mut bus) = user();
    type Emit = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let all: [Emit; 16] = [
        |a| a.hlt(),
        |a| a.clts(),
        |a| a.lmsw(ax),
        |a| a.lgdt(ptr(rax)),
        |a| a.lidt(ptr(rax)),
        |a| a.lldt(ax),
        |a| a.ltr(ax),
        |a| a.rdmsr(),
        |a| a.wrmsr(),
        |a| a.swapgs(),
        |a| a.invlpg(ptr(rax)),
        |a| a.wbinvd(),
        |a| a.mov(cr3, rax),
        |a| a.mov(rax, cr0),
        |a| a.mov(dr7, rax),
        |a| a.rdpmc(),
    ];
    for (n, emit) in all.into_iter().enumerate() {
        let before = (cpu.gpr, cpu.rip);
        assert_eq!(run(&mut cpu, &mut bus, emit), GP, "number {n}");
        assert_eq!((cpu.gpr, cpu.rip), before);
    }
    assert_eq!(run(&mut cpu, &mut bus, |a| a.clac()), UD);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.in_(al, dx)), GP);
}

#[test]
fn umip_hides_the_tables_from_user_code() {
    let (mut cpu, mut bus) = user();
    set(&mut cpu, Gpr::Rax, 0x1_8000);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.sgdt(ptr(rax))), NEXT);
    assert_eq!(cpu.ram.load::<u16>(0x1_8000), Some(0x4f));
    assert_eq!(get(&cpu, 0x1_8002), GDT);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.str(ecx)), NEXT);
    assert_eq!(cpu.reg(Gpr::Rcx), u64::from(TSS_SELECTOR));
    cpu.cr4 |= Cr4::UMIP;
    assert_eq!(run(&mut cpu, &mut bus, |a| a.sgdt(ptr(rax))), GP);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.sidt(ptr(rax))), GP);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.sldt(ax)), GP);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.str(ax)), GP);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.smsw(ax)), GP);
}

#[test]
fn lgdt_and_lidt_load_what_sgdt_and_sidt_store() {
    let (mut cpu, mut bus) = long();
    put(&cpu, 0x1_8000, 0x123u16);
    put(&cpu, 0x1_8002, 0xffff_8000_0000_1000u64);
    set(&mut cpu, Gpr::Rax, 0x1_8000);
    run(&mut cpu, &mut bus, |a| a.lidt(ptr(rax))).unwrap();
    assert_eq!(
        (cpu.idtr.base, cpu.idtr.limit),
        (0xffff_8000_0000_1000, 0x123)
    );
    put(&cpu, 0x1_8002, 0x8000_0000_0000_1000u64);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.lgdt(ptr(rax))), GP);
    assert_eq!(cpu.gdtr.base, GDT);
}

#[test]
fn syscall_and_sysret_go_to_the_kernel_and_back() {
    let (mut cpu, mut bus) = user();
    cpu.msr.star = 0x0023_0010_0000_0000;
    cpu.msr.lstar = 0x1_2000;
    cpu.msr.sfmask = (Rflags::IF | Rflags::TF).bits();
    cpu.rflags |= Rflags::CF | Rflags::RF;
    cpu.rip = 0x1000;
    assert_eq!(run(&mut cpu, &mut bus, |a| a.syscall()), DONE);
    assert_eq!(
        (cpu.rip, cpu.cpl, cpu.mode()),
        (0x1_2000, 0, CpuMode::Bits64)
    );
    assert_eq!(cpu.reg(Gpr::Rcx), 0x1002);
    assert_eq!(
        cpu.reg(Gpr::R11),
        (Rflags::ONE | Rflags::IF | Rflags::CF).bits()
    );
    assert_eq!(cpu.rflags, Rflags::ONE | Rflags::CF);
    assert_eq!(
        (cpu.segment(Seg::Cs).selector, cpu.segment(Seg::Ss).selector),
        (0x10, 0x18)
    );
    assert_eq!(cpu.reg(Gpr::Rsp), USER_STACK);

    assert_eq!(run(&mut cpu, &mut bus, |a| a.sysretq()), DONE);
    assert_eq!((cpu.rip, cpu.cpl), (0x1002, 3));
    assert_eq!(cpu.rflags, Rflags::ONE | Rflags::IF | Rflags::CF);
    assert_eq!(cpu.segment(Seg::Cs).selector, USER_CS);
    assert_eq!(cpu.segment(Seg::Ss).selector, USER_DS);

    cpu.efer.remove(Efer::SCE);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.syscall()), UD);
}

#[test]
fn vendors_differ_in_sysret_syscall_and_sysenter() {
    for (vendor, sysret, sysenter) in [(INTEL, GP, DONE), (AMD, DONE, UD)] {
        let (mut cpu, mut bus) = (long_mode(vendor), TestBus::default());
        cpu.msr.star = 0x0023_0010_0000_0000;
        cpu.msr.sysenter_cs = 0x10;
        cpu.msr.sysenter_eip = 0x1_2000;
        set(&mut cpu, Gpr::Rcx, 0x8000_0000_0000_0000);
        assert_eq!(run(&mut cpu, &mut bus, |a| a.sysretq()), sysret);
        assert_eq!(cpu.cpl, if vendor == AMD { 3 } else { 0 });
        to_user(&mut cpu);
        cpu.rip = 0x1000;
        assert_eq!(run(&mut cpu, &mut bus, |a| a.sysenter()), sysenter);
        assert_eq!(cpu.cpl, if vendor == AMD { 3 } else { 0 });
        to_user(&mut cpu);
        cpu.rip = 0x1000;
        assert_eq!(run(&mut cpu, &mut bus, |a| a.sysexit()), GP);
        // Compatibility mode: SYSCALL is AMD's alone.
        to_user(&mut cpu);
        cpu.seg[Seg::Cs as usize] = segment::flat(USER_CS32, 0xc09b, 3);
        cpu.msr.cstar = 0x1_3000;
        cpu.rip = 0x1000;
        let syscall = run(&mut cpu, &mut bus, |a| a.syscall());
        assert_eq!(syscall, if vendor == AMD { DONE } else { UD });
        if vendor == AMD {
            assert_eq!((cpu.rip, cpu.mode()), (0x1_3000, CpuMode::Bits64));
        }
    }
}

#[test]
fn canonical_faults_of_registers_that_hold_addresses() {
    let (mut cpu, mut bus) = long();
    const BAD: u64 = 0x0000_8000_0000_0000;
    for msr in [
        0xc000_0082u64,
        0xc000_0083,
        0xc000_0100,
        0xc000_0101,
        0xc000_0102,
        0x175,
        0x176,
    ] {
        set(&mut cpu, Gpr::Rcx, msr);
        set(&mut cpu, Gpr::Rdx, BAD >> 32);
        set(&mut cpu, Gpr::Rax, 0);
        assert_eq!(run(&mut cpu, &mut bus, |a| a.wrmsr()), GP, "{msr:#x}");
        set(&mut cpu, Gpr::Rdx, 0xffff_8000);
        assert_eq!(run(&mut cpu, &mut bus, |a| a.wrmsr()), NEXT, "{msr:#x}");
        run(&mut cpu, &mut bus, |a| a.rdmsr()).unwrap();
        assert_eq!((cpu.reg(Gpr::Rdx), cpu.reg(Gpr::Rax)), (0xffff_8000, 0));
    }
    set(&mut cpu, Gpr::Rax, BAD);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.wrfsbase(rax)), UD);
    cpu.cr4 |= Cr4::FSGSBASE;
    assert_eq!(run(&mut cpu, &mut bus, |a| a.wrfsbase(rax)), GP);
    set(&mut cpu, Gpr::Rax, 0x1234);
    run(&mut cpu, &mut bus, |a| a.wrgsbase(rax)).unwrap();
    run(&mut cpu, &mut bus, |a| a.rdgsbase(rbx)).unwrap();
    assert_eq!(cpu.reg(Gpr::Rbx), 0x1234);
    run(&mut cpu, &mut bus, |a| a.swapgs()).unwrap();
    assert_eq!(
        (cpu.segment(Seg::Gs).base, cpu.msr.kernel_gs_base),
        (0xffff_8000_0000_0000, 0x1234)
    );
}

#[test]
fn segment_loads_check_null_type_privilege_and_presence() {
    let (mut cpu, mut bus) = user();
    let mut mov_ds = |cpu: &mut Cpu, selector: u16| {
        set(cpu, Gpr::Rax, selector.into());
        run(cpu, &mut bus, |a| a.mov(ds, eax))
    };
    assert_eq!(mov_ds(&mut cpu, 3), NEXT);
    assert!(cpu.segment(Seg::Ds).unusable());
    assert_eq!(mov_ds(&mut cpu, USER_DS), NEXT);
    assert_eq!(
        mov_ds(&mut cpu, KERNEL_DS),
        Err(Exception::gp(KERNEL_DS.into()))
    );
    assert_eq!(
        mov_ds(&mut cpu, 0x53),
        Err(Exception::gp(0x50)),
        "beyond the limit"
    );
    assert_eq!(mov_ds(&mut cpu, 0x2c), Err(Exception::gp(0x2c)), "no LDT");
    put(&cpu, GDT + 0x28, 0x00cf_7300_0000_ffffu64);
    assert_eq!(mov_ds(&mut cpu, USER_DS), Err(Exception::np(0x28)));
    // The accessed bit is set by a load.
    put(&cpu, GDT + 0x28, 0x00cf_f200_0000_ffffu64);
    assert_eq!(mov_ds(&mut cpu, USER_DS), NEXT);
    assert_eq!(cpu.ram.load::<u8>(GDT + 0x2d), Some(0xf3));
    assert_eq!(run(&mut cpu, &mut bus, |a| a.mov(ss, eax)), NEXT);
    assert!(cpu.mov_ss_shadow);
    set(&mut cpu, Gpr::Rax, 0);
    assert_eq!(
        run(&mut cpu, &mut bus, |a| a.mov(ss, eax)),
        GP,
        "a null SS in user mode"
    );
}

#[test]
fn pop_of_a_bad_selector_leaves_the_stack_pointer() {
    let (mut cpu, mut bus) = user();
    put(&cpu, USER_STACK, u64::from(KERNEL_DS));
    let e = run(&mut cpu, &mut bus, |a| a.pop(fs));
    assert_eq!(e, Err(Exception::gp(KERNEL_DS.into())));
    assert_eq!(cpu.reg(Gpr::Rsp), USER_STACK);
    put(&cpu, USER_STACK, u64::from(USER_DS));
    assert_eq!(run(&mut cpu, &mut bus, |a| a.pop(fs)), NEXT);
    assert_eq!(
        (cpu.reg(Gpr::Rsp), cpu.segment(Seg::Fs).selector),
        (USER_STACK + 8, USER_DS)
    );
    run(&mut cpu, &mut bus, |a| a.push(fs)).unwrap();
    assert_eq!(get(&cpu, USER_STACK), u64::from(USER_DS));
}

#[test]
fn lar_lsl_and_verify_tell_without_a_fault() {
    let (mut cpu, mut bus) = user();
    set(&mut cpu, Gpr::Rbx, USER_DS.into());
    run(&mut cpu, &mut bus, |a| a.lar(eax, ebx)).unwrap();
    assert!(cpu.rflags.contains(Rflags::ZF));
    assert_eq!(cpu.reg(Gpr::Rax), 0xcf_f300);
    run(&mut cpu, &mut bus, |a| a.lsl(rax, rbx)).unwrap();
    assert_eq!(cpu.reg(Gpr::Rax), 0xffff_ffff);
    run(&mut cpu, &mut bus, |a| a.verw(bx)).unwrap();
    assert!(cpu.rflags.contains(Rflags::ZF));
    for selector in [KERNEL_DS, 0, 0x7b] {
        set(&mut cpu, Gpr::Rbx, selector.into());
        set(&mut cpu, Gpr::Rax, 7);
        run(&mut cpu, &mut bus, |a| a.lar(eax, ebx)).unwrap();
        assert!(!cpu.rflags.contains(Rflags::ZF));
        assert_eq!(cpu.reg(Gpr::Rax), 7);
        cpu.rflags |= Rflags::ZF;
        run(&mut cpu, &mut bus, |a| a.verr(bx)).unwrap();
        assert!(!cpu.rflags.contains(Rflags::ZF));
    }
}

#[test]
fn ports_need_iopl_or_a_bit_of_the_tss() {
    let (mut cpu, mut bus) = user();
    bus.port_value = 0x1234_5678;
    cpu.tr.limit = 0x100;
    put(&cpu, TSS + 0x66, 0x80u16);
    put(&cpu, TSS + 0x80, u64::MAX);
    put(&cpu, TSS + 0x80 + 8, 0b1111_0011u8);
    set(&mut cpu, Gpr::Rdx, 0x42);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.in_(ax, dx)), NEXT);
    assert_eq!(cpu.reg(Gpr::Rax), 0x5678);
    assert_eq!(
        run(&mut cpu, &mut bus, |a| a.in_(eax, dx)),
        GP,
        "two of four ports"
    );
    // The second byte of the bitmap read must be within the limit.
    cpu.tr.limit = 0x88;
    assert_eq!(run(&mut cpu, &mut bus, |a| a.in_(ax, dx)), GP);
    cpu.rflags |= Rflags::IOPL;
    assert_eq!(run(&mut cpu, &mut bus, |a| a.out(dx, eax)), NEXT);
    assert_eq!(bus.written, [(0x42, 4, 0x5678)]);
}

#[test]
fn string_ports_repeat_item_by_item() {
    let (mut cpu, mut bus) = long();
    put(&cpu, 0x1_8000, 0x0403_0201u32);
    set(&mut cpu, Gpr::Rsi, 0x1_8000);
    set(&mut cpu, Gpr::Rcx, 3);
    set(&mut cpu, Gpr::Rdx, 0xe9);
    let step = |cpu: &mut Cpu, bus: &mut TestBus| run(cpu, bus, |a| a.rep().outsb());
    assert_eq!(step(&mut cpu, &mut bus), Ok(Flow::Repeat));
    assert_eq!(step(&mut cpu, &mut bus), Ok(Flow::Repeat));
    assert_eq!(step(&mut cpu, &mut bus), NEXT);
    assert_eq!(
        step(&mut cpu, &mut bus),
        NEXT,
        "a count of zero does nothing"
    );
    assert_eq!(bus.written, [(0xe9, 1, 1), (0xe9, 1, 2), (0xe9, 1, 3)]);
    assert_eq!((cpu.reg(Gpr::Rsi), cpu.reg(Gpr::Rcx)), (0x1_8003, 0));
    // INS to a page that is not there must not read the port: the fault comes first.
    set(&mut cpu, Gpr::Rdi, 0x4000_0000);
    let e = run(&mut cpu, &mut bus, |a| a.insd());
    assert_eq!(e, Err(Exception::pf(0x4000_0000, 2)));
    assert_eq!(cpu.reg(Gpr::Rdi), 0x4000_0000);
}

#[test]
fn control_registers_refuse_what_the_manual_refuses() {
    let (mut cpu, mut bus) = long();
    let mut write = |cpu: &mut Cpu, n: usize, v: u64| control::write(cpu, &mut bus, n, v);
    let old0 = cpu.cr0.bits();
    let e = Err(GP0);
    assert_eq!(write(&mut cpu, 0, old0 & !1), e, "PG without PE");
    assert_eq!(write(&mut cpu, 0, old0 | 1 << 29), e, "NW without CD");
    assert_eq!(write(&mut cpu, 0, old0 | 1 << 32), e);
    assert_eq!(
        write(&mut cpu, 0, old0 & !(1 << 31)),
        e,
        "PG off in 64-bit mode"
    );
    let old4 = cpu.cr4.bits();
    assert_eq!(
        write(&mut cpu, 4, old4 & !(1 << 5)),
        e,
        "PAE off in long mode"
    );
    for reserved in [12, 13, 15, 19, 22, 23, 24, 40] {
        assert_eq!(
            write(&mut cpu, 4, old4 | 1 << reserved),
            e,
            "bit {reserved}"
        );
    }
    assert_eq!(write(&mut cpu, 3, 1 << 46), e);
    assert_eq!(write(&mut cpu, 3, 1 << 63 | PML4), e, "no PCIDs yet");
    assert_eq!(write(&mut cpu, 8, 16), e);
    assert_eq!(write(&mut cpu, 5, 0), Err(Exception::UD));
    assert_eq!(
        (cpu.cr0.bits(), cpu.cr4.bits(), cpu.cr3),
        (old0, old4, PML4)
    );

    cpu.cr3 = PML4 | 5;
    assert_eq!(
        write(&mut cpu, 4, old4 | 1 << 17),
        e,
        "PCIDE with a PCID in CR3"
    );
    cpu.cr3 = PML4;
    assert_eq!(write(&mut cpu, 4, old4 | 1 << 17), Ok(()));
    assert_eq!(write(&mut cpu, 3, 1 << 63 | PML4 | 7), Ok(()));
    assert_eq!(cpu.cr3, PML4 | 7, "bit 63 is not kept");
    assert_eq!(write(&mut cpu, 8, 9), Ok(()));
    assert_eq!(bus.cr8, 9);
}

#[test]
fn long_mode_is_entered_as_linux_does_and_left() {
    let (mut cpu, mut bus) = (protected_mode(), TestBus::default());
    let lme = |cpu: &mut Cpu, bus: &mut TestBus, v: u64| {
        set(cpu, Gpr::Rcx, 0xc000_0080);
        set(cpu, Gpr::Rax, v);
        set(cpu, Gpr::Rdx, 0);
        run(cpu, bus, |a| a.wrmsr())
    };
    assert_eq!(lme(&mut cpu, &mut bus, 0x500), NEXT);
    assert_eq!(cpu.efer, Efer::LME, "LMA is read only");
    cpu.cr3 = PML4;
    let pg = cpu.cr0.bits() | 1 << 31;
    assert_eq!(
        control::write(&mut cpu, &mut bus, 0, pg),
        Err(GP0),
        "no PAE"
    );
    control::write(&mut cpu, &mut bus, 4, 0x20).unwrap();
    control::write(&mut cpu, &mut bus, 0, pg).unwrap();
    assert_eq!(cpu.efer, Efer::LME | Efer::LMA);
    assert_eq!(cpu.mode(), CpuMode::Bits32);
    assert_eq!(lme(&mut cpu, &mut bus, 0), GP, "LME with paging on");
    // A far jump to 64-bit code. The tables for this mode:
    put(&cpu, PML4, 0x2003u64);
    put(&cpu, 0x2000, 0x3003u64);
    put(&cpu, 0x3000, 0x83u64);
    put(&cpu, 0x1_8000, 0x1_2345u32);
    put(&cpu, 0x1_8004, USER_CS & !3);
    put(
        &cpu,
        GDT + u64::from(USER_CS & !7),
        0x00af_9b00_0000_ffffu64,
    );
    set(&mut cpu, Gpr::Rax, 0x1_8000);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.jmp(fword_ptr(eax))), DONE);
    assert_eq!((cpu.mode(), cpu.rip), (CpuMode::Bits64, 0x1_2345));
    // Back to compatibility mode by a far return, then out.
    put(&cpu, GDT + 0x10, 0x00cf_9b00_0000_ffffu64);
    put(&cpu, STACK, 0x1_5555u64);
    put(&cpu, STACK + 8, 0x10u64);
    set(&mut cpu, Gpr::Rsp, STACK);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.retf()), DONE);
    assert_eq!((cpu.mode(), cpu.rip), (CpuMode::Bits32, 0x1_5555));
    control::write(&mut cpu, &mut bus, 0, pg & !(1 << 31)).unwrap();
    assert_eq!(cpu.efer, Efer::LME);
}

#[test]
fn pae_loads_its_pdptes_with_cr3_and_refuses_reserved_bits() {
    let (mut cpu, mut bus) = (protected_mode(), TestBus::default());
    cpu.cr4 = Cr4::PAE;
    put(&cpu, 0x3000, 0x4001u64);
    put(&cpu, 0x3018, 0x5001u64);
    control::write(&mut cpu, &mut bus, 3, 0x3000).unwrap();
    let paged = cpu.cr0.bits() | 1 << 31;
    control::write(&mut cpu, &mut bus, 0, paged).unwrap();
    assert_eq!(cpu.pdpte, [0x4001, 0, 0, 0x5001]);
    for bad in [1 << 1, 1 << 6, 1 << 46, 1 << 63] {
        put(&cpu, 0x6000, 0x4001u64 | bad);
        assert_eq!(control::write(&mut cpu, &mut bus, 3, 0x6000), Err(GP0));
        assert_eq!((cpu.cr3, cpu.pdpte[3]), (0x3000, 0x5001));
    }
    // An absent entry may hold anything.
    put(&cpu, 0x6000, 1u64 << 63);
    assert_eq!(control::write(&mut cpu, &mut bus, 3, 0x6000), Ok(()));
}

#[test]
fn real_mode_enters_protected_mode_and_keeps_its_segments() {
    let (mut cpu, mut bus) = (reset(INTEL), TestBus::default());
    set(&mut cpu, Gpr::Rax, 0x11);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.lmsw(ax)), NEXT);
    assert!(cpu.cr0.contains(Cr0::PE));
    assert_eq!(cpu.segment(Seg::Cs).base, 0xffff_0000);
    set(&mut cpu, Gpr::Rax, 0);
    run(&mut cpu, &mut bus, |a| a.lmsw(ax)).unwrap();
    assert!(cpu.cr0.contains(Cr0::PE), "LMSW cannot clear PE");
    assert_eq!(run(&mut cpu, &mut bus, |a| a.lldt(ax)), NEXT);
    let (mut cpu, mut bus) = (reset(INTEL), TestBus::default());
    assert_eq!(run(&mut cpu, &mut bus, |a| a.lldt(ax)), UD);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.lar(ax, cx)), UD);
}

#[test]
fn debug_registers_alias_fault_and_detect() {
    let (mut cpu, mut bus) = long();
    set(&mut cpu, Gpr::Rax, 0x1234);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.mov(dr0, rax)), NEXT);
    assert_eq!(cpu.dr[0], 0x1234);
    set(&mut cpu, Gpr::Rax, u64::from(u32::MAX));
    assert_eq!(
        run(&mut cpu, &mut bus, |a| a.mov(dr4, rax)),
        NEXT,
        "DR4 is DR6"
    );
    assert_eq!(
        cpu.dr[6],
        0xffff_effff_u64 & 0xffff_0000 | 0xffff_0ff0 | 0xe00f
    );
    set(&mut cpu, Gpr::Rax, 1 << 32);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.mov(dr7, rax)), GP);
    cpu.cr4 |= Cr4::DE;
    assert_eq!(run(&mut cpu, &mut bus, |a| a.mov(dr5, rax)), UD);
    set(&mut cpu, Gpr::Rax, 1 << 13);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.mov(dr7, rax)), NEXT);
    let e = run(&mut cpu, &mut bus, |a| a.mov(rax, dr0));
    assert_eq!(e, Err(Exception::db(1 << 13, false)));
}

#[test]
fn hlt_halts_and_reset_signals_start_again() {
    let (mut cpu, mut bus) = long();
    assert_eq!(run(&mut cpu, &mut bus, |a| a.hlt()), Ok(Flow::Halt));
    cpu.id = 1;
    cpu.msr.lstar = 5;
    cpu.init();
    assert_eq!(
        (cpu.activity, cpu.mode(), cpu.msr.lstar),
        (Activity::WaitForSipi, CpuMode::Real, 5)
    );
    cpu.start_up(0x9a);
    assert_eq!(
        (cpu.activity, cpu.rip, cpu.segment(Seg::Cs).base),
        (Activity::Active, 0, 0x9a000)
    );
    assert_eq!(cpu.segment(Seg::Cs).selector, 0x9a00);
    cpu.start_up(0x10);
    assert_eq!(cpu.segment(Seg::Cs).selector, 0x9a00, "only once");
}

#[test]
fn xsetbv_takes_sane_combinations_only() {
    let (mut cpu, mut bus) = long();
    set(&mut cpu, Gpr::Rcx, 0);
    set(&mut cpu, Gpr::Rdx, 0);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.xsetbv()), UD);
    cpu.cr4 |= Cr4::OSXSAVE;
    for (v, expected) in [
        (0, GP),
        (2, GP),
        (5, GP),
        (0x27, GP),
        (0xe3, GP),
        (0x1f, GP),
        (0x207, GP),
        (1, NEXT),
        (3, NEXT),
        (7, NEXT),
        (0xe7, NEXT),
    ] {
        set(&mut cpu, Gpr::Rax, v);
        assert_eq!(run(&mut cpu, &mut bus, |a| a.xsetbv()), expected, "{v:#x}");
    }
    run(&mut cpu, &mut bus, |a| a.xgetbv()).unwrap();
    assert_eq!(cpu.reg(Gpr::Rax), 0xe7);
    set(&mut cpu, Gpr::Rcx, 2);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.xgetbv()), GP);
}

#[test]
fn invpcid_and_invlpg_drop_what_they_name() {
    let (mut cpu, mut bus) = long();
    let cached = |cpu: &Cpu| cpu.tlb[1].lookup_read(0x1_8000, 8).is_some();
    let fill = |cpu: &mut Cpu, bus: &mut TestBus| {
        cpu.load::<u64>(bus, 0x1_8000, doppel_memory::Privilege::Supervisor)
            .unwrap();
        assert!(cached(cpu));
    };
    fill(&mut cpu, &mut bus);
    // Another address of the same 2 MiB page.
    set(&mut cpu, Gpr::Rax, 0x10_0000);
    run(&mut cpu, &mut bus, |a| a.invlpg(ptr(rax))).unwrap();
    assert!(!cached(&cpu));
    set(&mut cpu, Gpr::Rax, 0x1_9000);
    for (kind, pcid, linear, expected, gone) in [
        (0u64, 0u32, 0x1_8000, NEXT, true),
        (0, 0, 1u64 << 50, GP, false),
        (1, 1, 0, GP, false),
        (1, 0, 0, NEXT, true),
        (2, 0, 0, NEXT, true),
        (3, 0, 0, NEXT, true),
        (4, 0, 0, GP, false),
        (3, 0x1000, 0, GP, false),
    ] {
        fill(&mut cpu, &mut bus);
        put(&cpu, 0x1_9000, u64::from(pcid));
        put(&cpu, 0x1_9008, linear);
        set(&mut cpu, Gpr::Rcx, kind);
        assert_eq!(
            run(&mut cpu, &mut bus, |a| a.invpcid(rcx, xmmword_ptr(rax))),
            expected
        );
        // The descriptor's own page entry may go with it.
        assert_eq!(!cached(&cpu), gone, "kind {kind}");
    }
}

#[test]
fn call_gates_change_privilege_and_far_returns_change_back() {
    let (mut cpu, mut bus) = (protected_mode(), TestBus::default());
    // At selector 0x38: a 32-bit call gate with two parameters, DPL 3.
    put(&cpu, GDT + 0x38, 0x0001_ec02_0010_3000u64);
    cpu.seg = [segment::flat(USER_DS, 0xc093, 3); 6];
    cpu.seg[Seg::Cs as usize] = segment::flat(USER_CS32, 0xc09b, 3);
    cpu.cpl = 3;
    set(&mut cpu, Gpr::Rsp, USER_STACK);
    put(&cpu, USER_STACK, 0x1111u32);
    put(&cpu, USER_STACK + 4, 0x2222u32);
    put(&cpu, 0x1_8000, 0u32);
    put(&cpu, 0x1_8004, 0x3bu16);
    set(&mut cpu, Gpr::Rax, 0x1_8000);
    let rip = cpu.rip;
    assert_eq!(run(&mut cpu, &mut bus, |a| a.call(fword_ptr(eax))), DONE);
    assert_eq!(
        (cpu.rip, cpu.cpl, cpu.reg(Gpr::Rsp)),
        (0x1_3000, 0, STACK - 24)
    );
    let words: Vec<u32> = (0..6)
        .map(|n| cpu.ram.load::<u32>(STACK - 24 + 4 * n).unwrap())
        .collect();
    assert_eq!(
        words[..4],
        [rip as u32 + 2, USER_CS32.into(), 0x1111, 0x2222]
    );
    assert_eq!(words[4..], [USER_STACK as u32, USER_DS.into()]);
    cpu.seg[Seg::Ds as usize] = segment::flat(KERNEL_DS, 0xc093, 0);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.retf_1(8)), DONE);
    assert_eq!(
        (cpu.rip, cpu.cpl, cpu.reg(Gpr::Rsp)),
        (rip + 2, 3, USER_STACK + 8)
    );
    assert!(
        cpu.segment(Seg::Ds).unusable(),
        "kernel data is not user code's"
    );
    assert_eq!(cpu.segment(Seg::Es).selector, USER_DS);
}

#[test]
fn iret_refuses_what_it_must() {
    let (mut cpu, mut bus) = long();
    let frame = |cpu: &Cpu, values: [u64; 5]| {
        for (n, v) in values.into_iter().enumerate() {
            put(cpu, STACK + 8 * n as u64, v);
        }
    };
    let user_frame = [0x1000, USER_CS.into(), 0x202, USER_STACK, USER_DS.into()];
    for (n, v, expected) in [
        (0, 1 << 47, GP0),
        (1, 0, GP0),
        (1, u64::from(KERNEL_DS), Exception::gp(KERNEL_DS.into())),
        (
            1,
            u64::from(USER_CS & !3),
            Exception::gp(u64::from(USER_CS & !3) as u32),
        ),
        (4, 3, GP0),
        (4, u64::from(KERNEL_DS), Exception::gp(KERNEL_DS.into())),
    ] {
        let mut bad = user_frame;
        bad[n] = v;
        frame(&cpu, bad);
        set(&mut cpu, Gpr::Rsp, STACK);
        let before = (cpu.seg, cpu.rip, cpu.rflags);
        assert_eq!(
            run(&mut cpu, &mut bus, |a| a.iretq()),
            Err(expected),
            "{n} {v:#x}"
        );
        assert_eq!((cpu.seg, cpu.rip, cpu.rflags), before);
    }
    cpu.rflags |= Rflags::NT;
    frame(&cpu, user_frame);
    assert_eq!(
        run(&mut cpu, &mut bus, |a| a.iretq()),
        GP,
        "no nested tasks in long mode"
    );
    cpu.rflags.remove(Rflags::NT);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.iretq()), DONE);
    assert_eq!(
        (cpu.cpl, cpu.rip, cpu.reg(Gpr::Rsp)),
        (3, 0x1000, USER_STACK)
    );
    // User code can neither raise its IOPL nor clear IF by IRET.
    cpu.gpr[Gpr::Rsp as usize] = STACK;
    let mut raised = user_frame;
    raised[2] = 0x3000;
    frame(&cpu, raised);
    assert_eq!(run(&mut cpu, &mut bus, |a| a.iretq()), DONE);
    assert_eq!(cpu.rflags, Rflags::ONE | Rflags::IF);
}

#[test]
fn ltr_marks_the_tss_busy() {
    let (mut cpu, mut bus) = long();
    put(&cpu, GDT + 0x48, 0xffff_8000u64);
    cpu.tr = Segment::null(0, 0);
    set(&mut cpu, Gpr::Rax, TSS_SELECTOR.into());
    assert_eq!(run(&mut cpu, &mut bus, |a| a.ltr(ax)), NEXT);
    assert_eq!(cpu.tr.base, 0xffff_8000_0000_0000 | TSS);
    assert_eq!(
        (cpu.tr.kind(), cpu.ram.load::<u8>(GDT + 0x45)),
        (11, Some(0x8b))
    );
    let e = run(&mut cpu, &mut bus, |a| a.ltr(ax));
    assert_eq!(e, Err(Exception::gp(TSS_SELECTOR.into())), "busy");
}

#[test]
fn hypercalls_answer_as_kvm_does() {
    let (mut cpu, mut bus) = long();
    set(&mut cpu, Gpr::Rax, 1);
    run(&mut cpu, &mut bus, |a| a.vmmcall()).unwrap();
    assert_eq!(cpu.reg(Gpr::Rax), 0);
    set(&mut cpu, Gpr::Rax, 999);
    run(&mut cpu, &mut bus, |a| a.vmcall()).unwrap();
    assert_eq!(cpu.reg(Gpr::Rax) as i64, -1000);
    to_user(&mut cpu);
    run(&mut cpu, &mut bus, |a| a.vmcall()).unwrap();
    assert_eq!(cpu.reg(Gpr::Rax) as i64, -1);
}

#[test]
fn rdtsc_obeys_tsd_and_moves_with_the_msrs() {
    let (mut cpu, mut bus) = user();
    run(&mut cpu, &mut bus, |a| a.rdtsc()).unwrap();
    let first = edx_eax(&cpu);
    cpu.msr.tsc_aux = 7;
    run(&mut cpu, &mut bus, |a| a.rdtscp()).unwrap();
    assert!(edx_eax(&cpu) > first);
    assert_eq!(cpu.reg(Gpr::Rcx), 7);
    cpu.cr4 |= Cr4::TSD;
    assert_eq!(run(&mut cpu, &mut bus, |a| a.rdtsc()), GP);
    run(&mut cpu, &mut bus, |a| a.rdpid(rsi)).unwrap();
    assert_eq!(cpu.reg(Gpr::Rsi), 7);

    let (mut cpu, mut bus) = long();
    let before = cpu.tsc_now();
    msr::write(&mut cpu, &mut bus, 0x3b, 1 << 60).unwrap();
    assert!(cpu.tsc_now() - before >= 1 << 60);
    msr::write(&mut cpu, &mut bus, 0x10, 0).unwrap();
    assert!(cpu.tsc_now() < 1 << 40);
    let adjust = msr::read(&mut cpu, &mut bus, 0x3b).unwrap() as i64;
    assert!(adjust <= -(before as i64), "{adjust}");
}
