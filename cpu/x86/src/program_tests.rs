//! Small guest programs, run by the interpreter: control flow between privileges and modes as a whole.

use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, al, ax, byte_ptr, cr0, cr2, cr3, cr4, cs, ds, dword_ptr, dx, eax, ecx, edx,
    fword_ptr, ptr, qword_ptr, r8, r9, rax, rbx, rcx, rdi, rdx, rsi, rsp, ss, word_ptr,
};

use crate::interpret::step;
use crate::testing::*;
use crate::{Activity, Cpu, CpuMode, Efer, Gpr, Outcome, Rflags, Seg, Segment, event};

const CODE: u64 = 0x1_0000;
const USER_CODE: u64 = 0x1_4000;
/// Where programs leave what they saw.
const LOG: u64 = 0x1_8000;

fn assemble(
    bits: u32,
    at: u64,
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).expect("assembler");
    f(&mut a).expect("instructions");
    a.assemble(at).expect("encoding")
}

fn place(
    cpu: &Cpu,
    bits: u32,
    at: u64,
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) {
    for (n, byte) in assemble(bits, at, f).into_iter().enumerate() {
        put(cpu, at + n as u64, byte);
    }
}

/// Runs until the guest halts with interrupts off, taking interrupts on the way; fails after `most` steps.
fn run(cpu: &mut Cpu, bus: &mut TestBus, most: u32) {
    for _ in 0..most {
        event::deliver_pending(cpu, bus);
        if cpu.activity == Activity::Halted {
            if bus.interrupt.is_none() {
                return;
            }
            continue;
        }
        assert_ne!(step(cpu, bus), Outcome::Shutdown, "at {:#x}", cpu.rip);
    }
    panic!("still running at {:#x}", cpu.rip);
}

fn log(cpu: &Cpu, n: u64) -> u64 {
    get(cpu, LOG + 8 * n)
}

#[test]
fn from_real_mode_to_long_mode_as_every_boot_loader_goes() {
    let (mut cpu, mut bus) = (reset(AMD), TestBus::default());
    // Tables: the GDT (32-bit code, data, 64-bit code), its pointer, page tables, far pointers.
    for (n, d) in [
        0u64,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_9b00_0000_ffff,
    ]
    .into_iter()
    .enumerate()
    {
        put(&cpu, GDT + 8 * n as u64, d);
    }
    put(&cpu, 0x500, 31u16);
    put(&cpu, 0x502, GDT as u32);
    put(&cpu, PML4, 0x2003u64);
    put(&cpu, 0x2000, 0x3003u64);
    put(&cpu, 0x3000, 0x83u64);
    put(&cpu, 0x508, CODE as u32);
    put(&cpu, 0x50c, 0x08u16);
    put(&cpu, 0x510, (CODE + 0x100) as u32);
    put(&cpu, 0x514, 0x18u16);
    place(&cpu, 16, 0x7c00, |a| {
        a.mov(ax, cs)?;
        a.mov(ds, ax)?;
        a.lgdt(fword_ptr(0x500))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        a.jmp(fword_ptr(0x508))
    });
    place(&cpu, 32, CODE, |a| {
        a.mov(ax, 0x10)?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(eax, cr4)?;
        a.or(eax, 0x20)?;
        a.mov(cr4, eax)?;
        a.mov(eax, PML4 as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.rdmsr()?;
        a.or(eax, 0x100)?;
        a.wrmsr()?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32)?;
        a.mov(cr0, eax)?;
        a.jmp(fword_ptr(0x510))
    });
    place(&cpu, 64, CODE + 0x100, |a| {
        a.mov(rax, 0x1234_5678_9abc_def0u64)?;
        a.mov(qword_ptr(LOG), rax)?;
        a.hlt()
    });
    cpu.seg[Seg::Cs as usize] = Segment {
        base: 0,
        limit: 0xffff,
        attributes: 0x9b,
        selector: 0,
    };
    cpu.rip = 0x7c00;
    run(&mut cpu, &mut bus, 60);
    assert_eq!(log(&cpu, 0), 0x1234_5678_9abc_def0);
    assert_eq!(cpu.mode(), CpuMode::Bits64);
    assert!(cpu.efer.contains(Efer::LMA));
}

#[test]
fn user_code_calls_the_kernel_faults_and_goes_on() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    cpu.msr.star = 0x0023_0010_0000_0000;
    cpu.msr.lstar = CODE + 0x100;
    cpu.msr.sfmask = Rflags::IF.bits();
    gate(&cpu, 6, CODE + 0x200, 0xe, 0, 0);
    gate(&cpu, 13, CODE + 0x300, 0xe, 1, 0);
    // The kernel: SYSCALL doubles RDI; #UD skips the two bytes of UD2; #GP notes the error code and stops.
    place(&cpu, 64, CODE + 0x100, |a| {
        a.swapgs()?;
        a.lea(rax, ptr(rdi + rdi))?;
        a.swapgs()?;
        a.sysretq()
    });
    place(&cpu, 64, CODE + 0x200, |a| {
        a.add(qword_ptr(rsp), 2)?;
        a.inc(qword_ptr(LOG))?;
        a.iretq()
    });
    place(&cpu, 64, CODE + 0x300, |a| {
        a.pop(qword_ptr(LOG + 8))?;
        a.pop(qword_ptr(LOG + 16))?;
        a.mov(qword_ptr(LOG + 24), rbx)?;
        a.hlt()
    });
    let user = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.mov(rbx, 1u64)?;
        a.mov(r8, 5u64)?;
        a.set_label(&mut again)?;
        a.mov(rdi, rbx)?;
        a.syscall()?;
        a.mov(rbx, rax)?;
        a.ud2()?;
        a.dec(r8)?;
        a.jne(again)?;
        a.cli()
    };
    let cli_at = USER_CODE + assemble(64, USER_CODE, user).len() as u64 - 1;
    place(&cpu, 64, USER_CODE, user);
    to_user(&mut cpu);
    cpu.rip = USER_CODE;
    run(&mut cpu, &mut bus, 200);
    assert_eq!(log(&cpu, 0), 5, "five #UD");
    assert_eq!((log(&cpu, 1), log(&cpu, 2), log(&cpu, 3)), (0, cli_at, 32));
    // The #GP came on its own stack.
    assert_eq!(cpu.reg(Gpr::Rsp), IST1 - 48 + 16);
}

/// Makes the linear address 2 MiB + `page` × 4 KiB a page of its own: a table at 0x4000, empty.
fn small_pages(cpu: &Cpu) {
    put(cpu, 0x3008, 0x4007u64);
}

#[test]
fn demand_paging_restarts_the_instruction_that_faulted() {
    const FAULTING: u64 = 0x20_3ff8;
    let (mut cpu, mut bus) = (long_mode(INTEL), TestBus::default());
    small_pages(&cpu);
    gate(&cpu, 14, CODE + 0x200, 0xe, 0, 0);
    // The handler logs error codes and addresses, maps the page to itself less 1 MiB, and returns.
    place(&cpu, 64, CODE + 0x200, |a| {
        a.pop(rax)?;
        a.mov(rbx, cr2)?;
        a.mov(qword_ptr(r9), rax)?;
        a.mov(qword_ptr(r9 + 8), rbx)?;
        a.add(r9, 16)?;
        a.mov(rcx, rbx)?;
        a.shr(rcx, 12)?;
        a.and(ecx, 511)?;
        a.lea(rdx, ptr(rbx - 0x10_0000))?;
        a.and(rdx, -4096)?;
        a.or(rdx, 7)?;
        a.mov(ptr(rcx * 8 + 0x4000), rdx)?;
        a.iretq()
    });
    // A store that crosses into a second missing page: two faults, then done.
    place(&cpu, 64, CODE, |a| {
        a.mov(r9, LOG)?;
        a.mov(rsi, 0x1122_3344_5566_7788u64)?;
        a.mov(rdi, FAULTING + 4)?;
        a.mov(qword_ptr(rdi), rsi)?;
        a.mov(r8, qword_ptr(rdi))?;
        a.hlt()
    });
    run(&mut cpu, &mut bus, 100);
    assert_eq!(cpu.reg(Gpr::R8), 0x1122_3344_5566_7788);
    let seen = [log(&cpu, 0), log(&cpu, 1), log(&cpu, 2), log(&cpu, 3)];
    assert_eq!(seen, [2, FAULTING + 4, 2, 0x20_4000]);
    assert_eq!(cpu.reg(Gpr::R9), LOG + 32, "two faults");
    // Accessed and dirty: both pages were written.
    for page in [3, 4] {
        let entry = get(&cpu, 0x4000 + 8 * page);
        assert_eq!(entry & 0xfff, 0x67, "page {page}");
    }
    assert_eq!(cpu.ram.load::<u32>(0x10_3ffc), Some(0x5566_7788));
    assert_eq!(cpu.ram.load::<u32>(0x10_4000), Some(0x1122_3344));
}

#[test]
fn page_protection_changes_take_effect_with_invlpg() {
    const PAGE: u64 = 0x20_5000;
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    small_pages(&cpu);
    put(&cpu, 0x4000 + 8 * 5, 0x10_5003u64);
    gate(&cpu, 14, CODE + 0x200, 0xe, 0, 0);
    place(&cpu, 64, CODE + 0x200, |a| {
        a.pop(qword_ptr(LOG))?;
        a.hlt()
    });
    // Write, take write permission away, flush, write again.
    place(&cpu, 64, CODE, |a| {
        a.mov(rdi, PAGE)?;
        a.mov(byte_ptr(rdi), 1)?;
        a.and(qword_ptr(0x4000 + 8 * 5), -3)?;
        a.invlpg(ptr(rdi))?;
        a.mov(al, byte_ptr(rdi))?;
        a.mov(byte_ptr(rdi), 2)?;
        a.hlt()
    });
    run(&mut cpu, &mut bus, 20);
    assert_eq!((log(&cpu, 0), cpu.cr2), (3, PAGE));
    assert_eq!(cpu.ram.load::<u8>(0x10_5000), Some(1));
}

#[test]
fn smap_and_smep_guard_the_kernel_in_a_program() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    small_pages(&cpu);
    put(&cpu, 0x3000, 0x83u64);
    // A user page at 2 MiB, whose first byte is RET.
    put(&cpu, 0x4000, 0x10_0007u64);
    put(&cpu, 0x10_0000, 0xc3u8);
    gate(&cpu, 14, CODE + 0x200, 0xe, 0, 0);
    // The handler logs the error code and skips to the address in R8.
    place(&cpu, 64, CODE + 0x200, |a| {
        a.pop(qword_ptr(r9))?;
        a.add(r9, 8)?;
        a.mov(qword_ptr(rsp), r8)?;
        a.iretq()
    });
    place(&cpu, 64, CODE, |a| {
        let mut after_read = a.create_label();
        let mut after_call = a.create_label();
        a.mov(r9, LOG)?;
        a.mov(rdi, 0x20_0000u64)?;
        a.call(rdi)?;
        a.mov(al, byte_ptr(rdi))?;
        a.mov(rax, cr4)?;
        a.or(eax, 0x30_0000)?;
        a.mov(cr4, rax)?;
        a.lea(r8, ptr(after_read))?;
        a.mov(al, byte_ptr(rdi))?;
        a.set_label(&mut after_read)?;
        a.stac()?;
        a.mov(al, byte_ptr(rdi))?;
        a.clac()?;
        a.lea(r8, ptr(after_call))?;
        a.call(rdi)?;
        a.set_label(&mut after_call)?;
        a.hlt()
    });
    run(&mut cpu, &mut bus, 60);
    assert_eq!(cpu.reg(Gpr::R9), LOG + 16, "two faults");
    // NXE is on, so a fetch says so: present, instruction.
    assert_eq!((log(&cpu, 0), log(&cpu, 1)), (1, 0x11));
    assert_eq!(cpu.reg(Gpr::Rax) & 0xff, 0xc3);
}

#[test]
fn interrupts_come_after_the_shadow_and_wake_a_halt() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    gate(&cpu, 0x20, CODE + 0x200, 0xe, 0, 0);
    place(&cpu, 64, CODE + 0x200, |a| {
        a.mov(qword_ptr(LOG), rbx)?;
        a.push(qword_ptr(rsp))?;
        a.pop(qword_ptr(LOG + 8))?;
        a.iretq()
    });
    place(&cpu, 64, CODE, |a| {
        a.sti()?;
        a.inc(rbx)?;
        a.inc(rbx)?;
        a.cli()?;
        a.sti()?;
        a.hlt()?;
        a.inc(rbx)?;
        a.cli()?;
        a.hlt()
    });
    bus.interrupt = Some(0x20);
    for _ in 0..8 {
        event::deliver_pending(&mut cpu, &mut bus);
        if cpu.activity == Activity::Active {
            step(&mut cpu, &mut bus);
        }
    }
    // Not before the instruction after STI had run.
    assert_eq!(log(&cpu, 0), 1);
    while cpu.activity == Activity::Active {
        step(&mut cpu, &mut bus);
    }
    assert_eq!(cpu.reg(Gpr::Rbx), 2, "halted at the first HLT");
    assert!(!event::deliver_pending(&mut cpu, &mut bus));
    bus.interrupt = Some(0x20);
    run(&mut cpu, &mut bus, 20);
    assert_eq!((log(&cpu, 0), cpu.reg(Gpr::Rbx)), (2, 3));
    assert_eq!(cpu.counters.halts, 2);
}

#[test]
fn single_steps_count_instructions_and_stop_in_the_handler() {
    let (mut cpu, mut bus) = (long_mode(INTEL), TestBus::default());
    gate(&cpu, 1, CODE + 0x200, 0xe, 0, 0);
    place(&cpu, 64, CODE + 0x200, |a| {
        a.inc(r8)?;
        a.iretq()
    });
    place(&cpu, 64, CODE, |a| {
        a.pushfq()?;
        a.or(qword_ptr(rsp), 0x100)?;
        a.popfq()?;
        // Four instructions: NOP, MOV SS and its shadow as one, PUSHFQ.
        a.nop()?;
        a.mov(eax, ss)?;
        a.mov(ss, eax)?;
        a.nop()?;
        a.pushfq()?;
        a.and(qword_ptr(rsp), -257)?;
        a.popfq()?;
        a.hlt()
    });
    run(&mut cpu, &mut bus, 60);
    // NOP, MOV from SS, (MOV to SS is not followed by one), NOP, PUSHFQ, AND, POPFQ.
    assert_eq!(cpu.reg(Gpr::R8), 6);
    assert_ne!(cpu.dr[6] & 1 << 14, 0);
}

#[test]
fn nested_faults_end_in_a_triple_fault_from_a_program() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    cpu.idtr.limit = 0;
    place(&cpu, 64, CODE, |a| a.int3());
    assert_eq!(step(&mut cpu, &mut bus), Outcome::Shutdown);
    assert_eq!(cpu.activity, Activity::Shutdown);
}

#[test]
fn compatibility_code_runs_32_bit_and_enters_64_bit_handlers() {
    let (mut cpu, mut bus) = (long_mode(AMD), TestBus::default());
    gate(&cpu, 0x80, CODE + 0x200, 0xe, 0, 3);
    place(&cpu, 64, CODE + 0x200, |a| {
        a.mov(qword_ptr(LOG), rax)?;
        a.mov(rcx, qword_ptr(rsp + 8))?;
        a.mov(qword_ptr(LOG + 8), rcx)?;
        a.hlt()
    });
    place(&cpu, 32, USER_CODE, |a| {
        a.mov(eax, 0xffff_ffffu32)?;
        a.inc(eax)?;
        a.dec(eax)?;
        a.mov(edx, dword_ptr(0x1_8100))?;
        a.mov(dword_ptr(0x1_8104), edx)?;
        a.mov(dx, word_ptr(0x1_8102))?;
        a.int(0x80)
    });
    put(&cpu, 0x1_8100, 0xcafe_f00du32);
    to_user(&mut cpu);
    cpu.seg[Seg::Cs as usize] = crate::segment::flat(USER_CS32, 0xc09b, 3);
    cpu.rip = USER_CODE;
    run(&mut cpu, &mut bus, 30);
    assert_eq!(
        (log(&cpu, 0), log(&cpu, 1)),
        (0xffff_ffff, USER_CS32.into())
    );
    assert_eq!(cpu.ram.load::<u32>(0x1_8104), Some(0xcafe_f00d));
    assert_eq!(cpu.reg(Gpr::Rdx), 0xcafe_cafe);
}
