//! What the interpreter remembers must not outlive what it was made from: every way to invalidate it, in whole programs, with
//! predecoded blocks and without; and the blocks against the interpreter proper, on random instructions.

use iced_x86::code_asm::{
    CodeAssembler, al, byte_ptr, cr0, cr3, cr4, eax, ecx, edi, ptr, qword_ptr, r12, rax, rcx, rdi,
    rdx, rsp, word_ptr,
};
use iced_x86::{Decoder, DecoderOptions, IcedError};

use super::oracle::Random;
use crate::interpret::{Interpret, quick};
use crate::testing::*;
use crate::{Activity, Cpu, Cr0, Engine, Exit, Rflags, Vector};

const CODE: u64 = 0x1_0000;
/// Where the two functions lie that return 1 and 2.
const ONE: u64 = 0x1_2000;
const TWO: u64 = 0x1_3000;
const HANDLER: u64 = 0x1_4000;
const USER: u64 = 0x1_5000;
/// Where programs leave what they saw; page faults leave their error code at 15.
const LOG: u64 = 0x1_8000;
/// A page table of 4 KiB pages for the linear addresses from here on.
const PAGES: u64 = 0x20_0000;
const TABLE: u64 = 0x4000;
/// A page of 2 MiB, like the one at 0.
const LARGE: u64 = 0x40_0000;
const PRESENT: u64 = 7;
const GLOBAL: u64 = 1 << 8;

type Assembly = Result<(), IcedError>;

fn place(cpu: &Cpu, at: u64, f: impl FnOnce(&mut CodeAssembler) -> Assembly) {
    let mut a = CodeAssembler::new(64).unwrap();
    f(&mut a).unwrap();
    for (n, byte) in a.assemble(at).unwrap().into_iter().enumerate() {
        put(cpu, at + n as u64, byte);
    }
}

fn function(cpu: &Cpu, at: u64, result: u32) {
    place(cpu, at, |a| {
        a.mov(eax, result)?;
        a.ret()
    });
}

/// Long mode with the function at [`ONE`] mapped at [`PAGES`], and a handler for page faults that halts.
fn machine() -> Box<Cpu> {
    let cpu = long_mode(AMD);
    put(&cpu, 0x3008, TABLE | PRESENT);
    put(&cpu, 0x3010, 0x87u64);
    put(&cpu, TABLE, ONE | PRESENT);
    function(&cpu, ONE, 1);
    function(&cpu, TWO, 2);
    gate(&cpu, Vector::PageFault as u8, HANDLER, 0xe, 0, 0);
    place(&cpu, HANDLER, |a| {
        a.pop(rax)?;
        a.or(rax, 0x100)?;
        a.mov(qword_ptr(LOG + 8 * 15), rax)?;
        a.hlt()
    });
    cpu
}

/// Runs a program to its HLT on `cpu`; what it logged.
fn logged(cpu: Box<Cpu>, on: bool) -> [u64; 16] {
    let mut engine = Interpret::new(cpu);
    engine.set_quick(on);
    let exit = engine.run(&mut TestBus::default());
    let cpu = engine.cpu();
    assert_eq!(exit, Exit::Halted, "at {:#x}", cpu.rip);
    assert_eq!(cpu.counters.quick_instructions > 0, on);
    std::array::from_fn(|n| get(cpu, LOG + 8 * n as u64))
}

/// Runs `program` both ways, on a machine that `prepare` changed.
fn check(
    expected: &[(usize, u64)],
    prepare: impl Fn(&mut Cpu),
    program: impl Fn(&mut CodeAssembler) -> Assembly,
) {
    for on in [false, true] {
        let mut cpu = machine();
        prepare(&mut cpu);
        place(&cpu, CODE, &program);
        let log = logged(cpu, on);
        for (n, v) in expected {
            assert_eq!(log[*n], *v, "entry {n}, blocks {on}");
        }
    }
}

/// Calls the function at `at` three times, so that everything that remembers does, and logs the last result.
fn call(a: &mut CodeAssembler, at: u64, n: u64) -> Assembly {
    a.mov(rdi, at)?;
    for _ in 0..3 {
        a.call(rdi)?;
    }
    a.mov(qword_ptr(LOG + 8 * n), rax)
}

fn remap(a: &mut CodeAssembler, entry: u64) -> Assembly {
    a.mov(rax, entry)?;
    a.mov(qword_ptr(TABLE), rax)
}

const SEES_BOTH: &[(usize, u64)] = &[(0, 1), (1, 2), (15, 0)];

#[test]
fn invlpg_forgets_a_code_page() {
    check(
        SEES_BOTH,
        |_| (),
        |a| {
            call(a, PAGES, 0)?;
            remap(a, TWO | PRESENT)?;
            a.invlpg(byte_ptr(PAGES))?;
            call(a, PAGES, 1)?;
            a.hlt()
        },
    );
}

#[test]
fn a_cr3_load_forgets_code_pages() {
    check(
        SEES_BOTH,
        |_| (),
        |a| {
            call(a, PAGES, 0)?;
            remap(a, TWO | PRESENT)?;
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            call(a, PAGES, 1)?;
            a.hlt()
        },
    );
}

#[test]
fn global_code_pages_go_with_cr4_pge() {
    check(
        SEES_BOTH,
        |cpu| put(cpu, TABLE, ONE | PRESENT | GLOBAL),
        |a| {
            call(a, PAGES, 0)?;
            remap(a, TWO | PRESENT | GLOBAL)?;
            a.mov(rax, cr4)?;
            a.xor(rax, 0x80)?;
            a.mov(cr4, rax)?;
            a.xor(rax, 0x80)?;
            a.mov(cr4, rax)?;
            call(a, PAGES, 1)?;
            a.hlt()
        },
    );
}

#[test]
fn global_code_pages_go_with_invlpg() {
    check(
        SEES_BOTH,
        |cpu| put(cpu, TABLE, ONE | PRESENT | GLOBAL),
        |a| {
            call(a, PAGES, 0)?;
            remap(a, TWO | PRESENT | GLOBAL)?;
            a.invlpg(byte_ptr(PAGES + 0xfff))?;
            call(a, PAGES, 1)?;
            a.hlt()
        },
    );
}

#[test]
fn invlpg_of_any_address_forgets_a_large_code_page() {
    check(
        SEES_BOTH,
        |_| (),
        |a| {
            call(a, LARGE + ONE, 0)?;
            // The linear address of the function now lies in a page of the table.
            a.mov(rax, TWO | PRESENT)?;
            a.mov(qword_ptr(TABLE + ONE / 0x1000 * 8), rax)?;
            a.mov(rax, TABLE | PRESENT)?;
            a.mov(qword_ptr(0x3010), rax)?;
            a.mov(rdx, LARGE)?;
            a.invlpg(byte_ptr(rdx))?;
            call(a, LARGE + ONE, 1)?;
            a.hlt()
        },
    );
}

#[test]
fn smep_takes_user_pages_from_the_kernel() {
    // A fetch by the supervisor from a present page.
    check(
        &[(0, 1), (1, 0), (15, 0x111)],
        |cpu| {
            // The code itself must stay executable: the identity map is the supervisor's.
            put(cpu, 0x3000, 0x83u64);
        },
        |a| {
            call(a, PAGES, 0)?;
            a.mov(rax, cr4)?;
            a.or(rax, 1 << 20)?;
            a.mov(cr4, rax)?;
            call(a, PAGES, 1)?;
            a.hlt()
        },
    );
}

#[test]
fn a_page_that_turned_no_execute_is_not_fetched_from() {
    check(
        &[(0, 1), (1, 0), (15, 0x111)],
        |_| (),
        |a| {
            call(a, PAGES, 0)?;
            remap(a, ONE | PRESENT | 1 << 63)?;
            a.invlpg(byte_ptr(PAGES))?;
            call(a, PAGES, 1)?;
            a.hlt()
        },
    );
}

#[test]
fn efer_nxe_decides_about_no_execute_at_once() {
    // Without EFER.NXE the bit is reserved: that fault has bit 3, and no bit for the fetch.
    check(
        &[(0, 1), (1, 1), (2, 0), (15, 0x109)],
        |_| (),
        |a| {
            call(a, PAGES, 0)?;
            remap(a, ONE | PRESENT | 1 << 63)?;
            call(a, PAGES, 1)?;
            a.mov(ecx, 0xc000_0080u32)?;
            a.rdmsr()?;
            a.and(eax, !0x800)?;
            a.wrmsr()?;
            call(a, PAGES, 2)?;
            a.hlt()
        },
    );
}

#[test]
fn user_code_does_not_run_on_what_the_kernel_may_fetch() {
    // Protection violation, by a user, on a fetch.
    check(
        &[(0, 1), (1, 0), (2, 1), (15, 0x115)],
        |cpu| {
            put(cpu, TABLE, ONE | 3);
            put(cpu, TABLE + 8, ONE | PRESENT);
            place(cpu, USER, |a| {
                call(a, PAGES + 0x1000, 2)?;
                call(a, PAGES, 1)
            });
        },
        |a| {
            call(a, PAGES, 0)?;
            a.push(i32::from(USER_DS))?;
            a.push(USER_STACK as i32)?;
            a.push(2)?;
            a.push(i32::from(USER_CS))?;
            a.push(USER as i32)?;
            a.iretq()
        },
    );
}

#[test]
fn cr0_wp_takes_write_permission_at_once() {
    check(
        &[(0, 7), (15, 0x103)],
        |cpu| {
            cpu.cr0.remove(Cr0::WP);
            put(cpu, TABLE + 8, LOG | 1);
        },
        |a| {
            a.mov(rdi, PAGES + 0x1000)?;
            a.mov(eax, 7)?;
            for _ in 0..3 {
                a.mov(ptr(rdi), rax)?;
            }
            a.mov(rcx, cr0)?;
            a.or(rcx, 1 << 16)?;
            a.mov(cr0, rcx)?;
            a.inc(eax)?;
            a.mov(ptr(rdi), rax)?;
            a.hlt()
        },
    );
}

#[test]
fn code_written_by_the_cpu_is_executed() {
    check(
        &[(0, 1), (1, 9), (2, 5)],
        |_| (),
        |a| {
            call(a, ONE, 0)?;
            a.mov(byte_ptr(ONE + 1), 9)?;
            call(a, ONE, 1)?;
            // Through another linear address.
            a.mov(rdi, PAGES)?;
            a.mov(byte_ptr(rdi + 1), 5)?;
            call(a, ONE, 2)?;
            a.hlt()
        },
    );
}

#[test]
fn code_written_by_a_string_instruction_is_executed() {
    check(
        &[(0, 1), (1, 2)],
        |_| (),
        |a| {
            call(a, ONE, 0)?;
            a.mov(edi, ONE as u32)?;
            a.mov(iced_x86::code_asm::esi, TWO as u32)?;
            a.mov(ecx, 6)?;
            a.rep().movsb()?;
            call(a, ONE, 1)?;
            a.hlt()
        },
    );
}

/// A loop whose body changes an immediate that follows in the same run of instructions.
#[test]
fn a_store_to_the_next_instruction_takes_effect_at_once() {
    // The page of the program under a second linear address, and a first look that fills the TLB.
    let alias = PAGES + 0x1000;
    check(
        &[(0, 6 + 5 + 4 + 3 + 2 + 1)],
        |cpu| put(cpu, TABLE + 8, CODE | PRESENT),
        |a| {
            let (mut again, mut target) = (a.create_label(), a.create_label());
            a.mov(rdi, alias)?;
            a.mov(rdx, rsp)?;
            a.xor(rcx, rcx)?;
            a.mov(al, 6)?;
            a.lea(r12, ptr(target))?;
            a.and(r12, 0xfff)?;
            a.add(r12, rdi)?;
            a.set_label(&mut again)?;
            a.mov(byte_ptr(r12 + 2), al)?;
            a.set_label(&mut target)?;
            a.add(ecx, 0x7f)?;
            a.dec(al)?;
            a.jne(again)?;
            a.mov(qword_ptr(LOG), rcx)?;
            a.hlt()
        },
    );
}

#[test]
fn a_block_is_left_for_what_it_cannot_do() {
    // A load across pages, a far address, a 16-bit push: all within straight code.
    check(
        &[(0, 0x1122_3344_5566_7788), (1, 0x7788), (2, 2)],
        |cpu| put(cpu, TABLE + 8, TWO | PRESENT),
        |a| {
            a.mov(rax, 0x1122_3344_5566_7788u64)?;
            a.mov(qword_ptr(USER - 4), rax)?;
            a.mov(rcx, qword_ptr(USER - 4))?;
            a.mov(qword_ptr(LOG), rcx)?;
            a.push(iced_x86::code_asm::ax)?;
            a.movzx(ecx, word_ptr(rsp))?;
            a.mov(qword_ptr(LOG + 8), rcx)?;
            call(a, PAGES + 0x1000, 2)?;
            a.hlt()
        },
    );
}

#[test]
fn the_trace_shows_what_ran_in_blocks() {
    for on in [false, true] {
        let cpu = machine();
        place(&cpu, CODE, |a| {
            a.mov(eax, 5)?;
            a.inc(eax)?;
            a.hlt()
        });
        let mut engine = Interpret::new(cpu);
        engine.set_quick(on);
        engine.run(&mut TestBus::default());
        let trace: Vec<_> = engine
            .trace()
            .iter()
            .map(|line| line[20..].to_string())
            .collect();
        assert_eq!(trace, ["mov eax,5", "inc eax", "hlt"]);
    }
}

// ---- blocks against the interpreter proper ----

const DATA: u64 = 0x2_0000;

/// Random bytes that are an instruction with a function of its own in blocks.
fn instruction(r: &mut Random, out: &mut Vec<u8>) {
    loop {
        let mut bytes = [0u8; 15];
        bytes.fill_with(|| r.next() as u8);
        let (v, mut at) = (r.next(), 0);
        let prefixes = [0x66, 0x65, 0x64, 0x3e];
        let prefix = prefixes.get(v as usize & 15).copied();
        let rex = (v & 16 != 0).then_some(0x40 | (v >> 8) as u8 & 15);
        let escape = (v & 0x60 == 0).then_some(0x0f);
        for b in [prefix, rex, escape].into_iter().flatten() {
            bytes[at] = b;
            at += 1;
        }
        // Mostly registers and 8-bit displacements, so that addresses stay in RAM.
        let modes = [0xc0, 0xc0, 0x40, 0x00];
        bytes[at + 1] = bytes[at + 1] & 0x3f | modes[(v >> 16) as usize & 3];
        let i = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE).decode();
        if i.is_jcc_short_or_near() {
            // To the next instruction, taken or not.
            bytes[i.len() - if i.is_jcc_near() { 4 } else { 1 }..i.len()].fill(0);
        } else if quick::ends_block(&i) {
            continue;
        }
        if quick::lookup(&i).is_some() {
            return out.extend(&bytes[..i.len()]);
        }
    }
}

fn memory(cpu: &Cpu) -> Vec<u8> {
    let mut all = vec![0; 2 << 20];
    for (n, page) in all.chunks_mut(4096).enumerate() {
        if let Some(p) = cpu.ram.ptr(4096 * n as u64) {
            p.read(page);
        }
    }
    all
}

#[test]
fn blocks_do_what_single_instructions_do() {
    let mut r = Random(0x0123_4567_89ab_cdef);
    let mut engines = Vec::new();
    let (mut halted, mut ran) = (0, 0);
    for round in 0..1500 {
        if round % 50 == 0 {
            engines = [false, true]
                .map(|on| {
                    let mut engine = Interpret::new(long_mode(AMD));
                    engine.set_quick(on);
                    engine
                })
                .into();
        }
        let mut code = Vec::new();
        for _ in 0..24 {
            instruction(&mut r, &mut code);
        }
        code.push(0xf4);
        let registers: [u64; 16] = std::array::from_fn(|_| DATA + (r.next() & 0x1fff));
        let flags = r.next() & Rflags::ARITHMETIC.bits() | 2;
        let mut states = Vec::new();
        for engine in &mut engines {
            let cpu = engine.cpu_mut();
            for (n, b) in code.iter().enumerate() {
                put(cpu, CODE + n as u64, *b);
            }
            (cpu.gpr, cpu.rip, cpu.activity) = (registers, CODE, Activity::Active);
            cpu.rflags = Rflags::from_bits_retain(flags);
            let exit = engine.run(&mut TestBus::default());
            let cpu = engine.cpu();
            halted += u32::from(exit == Exit::Halted);
            states.push((exit, cpu.gpr, cpu.rip, cpu.rflags, cpu.cr2));
        }
        assert_eq!(states[0], states[1], "{code:02x?} from {registers:x?}");
        if round % 5 == 0 {
            assert!(
                memory(engines[0].cpu()) == memory(engines[1].cpu()),
                "{code:02x?}"
            );
        }
        ran = ran.max(engines[1].cpu().counters.quick_instructions);
    }
    assert!(halted > 200, "only {halted} programs came to their end");
    assert!(ran > 300, "only {ran} instructions ran in blocks");
}
