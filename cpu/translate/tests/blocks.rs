//! Straight-line code, loops and calls through the translator, compared with what the same code must give.

use std::sync::Arc;
use std::time::Duration;

use doppel_memory::GuestRam;
use doppel_translate::{Translate, TranslateOptions};
use doppel_x86::{Cpu, Cr0, Cr4, Efer, EmptyBus, Engine, Exit, Rflags, Seg, Segment};
use iced_x86::code_asm::*;

const CODE: u64 = 0x10000;
const DATA: u64 = 0x20000;
const STACK: u64 = 0x30000;

/// A CPU in 64-bit mode at CPL 0, the first GiB mapped to itself, code at `CODE`.
fn cpu_with(code: &[u8]) -> Box<Cpu> {
    let ram = Arc::new(GuestRam::new(16 << 20).unwrap());
    ram.store::<u64>(0x1000, 0x2003).unwrap();
    ram.store::<u64>(0x2000, 0x3003).unwrap();
    for n in 0..8u64 {
        ram.store::<u64>(0x3000 + 8 * n, (n << 21) | 0x83).unwrap();
    }
    for (n, page) in code.chunks(4096).enumerate() {
        ram.ptr(CODE + 4096 * n as u64).unwrap().write(page);
    }
    let mut cpu = Cpu::new(0, ram);
    cpu.cr0 = Cr0::PE | Cr0::PG | Cr0::ET | Cr0::NE | Cr0::WP;
    cpu.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXMMEXCPT;
    cpu.efer = Efer::LME | Efer::LMA;
    cpu.cr3 = 0x1000;
    cpu.seg[Seg::Cs as usize] = Segment {
        base: 0,
        limit: !0,
        attributes: 0xa09b,
        selector: 8,
    };
    cpu.rip = CODE;
    cpu.gpr[4] = STACK;
    cpu
}

/// Runs the code, which must end in a jump to itself, until a kick finds it there.
fn run(options: TranslateOptions, build: impl FnOnce(&mut CodeAssembler)) -> Translate {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a);
    let mut end = a.create_label();
    a.set_label(&mut end).unwrap();
    a.jmp(end).unwrap();
    let code = a.assemble(CODE).unwrap();
    let last = CODE + code.len() as u64 - 2;
    let mut engine = Translate::new(cpu_with(&code), options).unwrap();
    for _ in 0..100 {
        let kicker = engine.kicker();
        let t = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(2));
            kicker.kick();
        });
        assert_eq!(engine.run(&mut EmptyBus), Exit::Kicked);
        t.join().unwrap();
        if engine.cpu().rip == last {
            return engine;
        }
    }
    panic!("did not get to the end: rip {:#x}", engine.cpu().rip);
}

fn both(build: impl Fn(&mut CodeAssembler), check: impl Fn(&Cpu)) {
    for flag_liveness in [true, false] {
        for link in [true, false] {
            let options = TranslateOptions {
                flag_liveness,
                link,
                ..Default::default()
            };
            check(run(options, &build).cpu());
        }
    }
}

#[test]
fn a_loop_sums_an_array_through_every_kind_of_register() {
    both(
        |a| {
            a.mov(rbx, DATA).unwrap();
            a.xor(ecx, ecx).unwrap();
            let mut fill = a.create_label();
            a.set_label(&mut fill).unwrap();
            a.mov(qword_ptr(rbx + rcx * 8), rcx).unwrap();
            a.inc(rcx).unwrap();
            a.cmp(rcx, 1000).unwrap();
            a.jne(fill).unwrap();
            a.mov(r10, rbx).unwrap();
            a.xor(r11d, r11d).unwrap();
            a.xor(r9d, r9d).unwrap();
            let mut sum = a.create_label();
            a.set_label(&mut sum).unwrap();
            a.add(r9, qword_ptr(r10 + r11 * 8)).unwrap();
            a.inc(r11).unwrap();
            a.cmp(r11, 1000).unwrap();
            a.jne(sum).unwrap();
        },
        |cpu| {
            assert_eq!(cpu.gpr[9], 999 * 1000 / 2);
            assert_eq!(cpu.gpr[11], 1000);
        },
    );
}

#[test]
fn calls_return_and_the_stack_keeps_its_values() {
    both(
        |a| {
            let mut f = a.create_label();
            let mut over = a.create_label();
            a.mov(rdi, 10u64).unwrap();
            a.push(rdi).unwrap();
            a.push(77).unwrap();
            a.mov(r10, 5u64).unwrap();
            a.push(r10).unwrap();
            a.call(f).unwrap();
            a.pop(r11).unwrap();
            a.pop(rsi).unwrap();
            a.pop(rdx).unwrap();
            a.jmp(over).unwrap();
            // Recursive Fibonacci of rdi.
            a.set_label(&mut f).unwrap();
            let mut small = a.create_label();
            a.cmp(rdi, 2).unwrap();
            a.jb(small).unwrap();
            a.push(rdi).unwrap();
            a.dec(rdi).unwrap();
            a.call(f).unwrap();
            a.pop(rdi).unwrap();
            a.push(rax).unwrap();
            a.sub(rdi, 2).unwrap();
            a.call(f).unwrap();
            a.pop(rcx).unwrap();
            a.add(rax, rcx).unwrap();
            a.ret().unwrap();
            a.set_label(&mut small).unwrap();
            a.mov(rax, rdi).unwrap();
            a.ret().unwrap();
            a.set_label(&mut over).unwrap();
            a.nop().unwrap();
        },
        |cpu| {
            assert_eq!(cpu.gpr[0], 55);
            assert_eq!((cpu.gpr[11], cpu.gpr[6], cpu.gpr[2]), (5, 77, 10));
            assert_eq!(cpu.gpr[4], STACK);
        },
    );
}

#[test]
fn flags_survive_memory_accesses_and_indirect_jumps() {
    both(
        |a| {
            let mut next = a.create_label();
            a.mov(rbx, DATA).unwrap();
            a.mov(rax, u64::MAX).unwrap();
            a.add(rax, 1).unwrap(); // CF = ZF = 1
            a.mov(rcx, qword_ptr(rbx)).unwrap();
            a.adc(rcx, 0).unwrap(); // 1
            a.mov(rdx, i64::MAX as u64).unwrap();
            a.lea(rsi, qword_ptr(next)).unwrap();
            a.add(rdx, 1).unwrap(); // OF = SF = 1
            a.jmp(rsi).unwrap();
            a.set_label(&mut next).unwrap();
            a.seto(dil).unwrap();
            a.movzx(edi, dil).unwrap();
            a.stc().unwrap();
            a.push(rbx).unwrap();
            a.pop(r8).unwrap();
            a.adc(r8, qword_ptr(rbx)).unwrap();
            a.stc().unwrap();
        },
        |cpu| {
            assert_eq!((cpu.gpr[1], cpu.gpr[7], cpu.gpr[8]), (1, 1, DATA + 1));
            assert!(cpu.rflags.contains(Rflags::CF));
        },
    );
}

#[test]
fn code_that_crosses_pages_runs() {
    both(
        |a| {
            a.xor(eax, eax).unwrap();
            for _ in 0..4000 {
                a.add(rax, 3).unwrap();
                a.lea(rcx, qword_ptr(rax + rax * 2 + 7)).unwrap();
            }
        },
        |cpu| assert_eq!((cpu.gpr[0], cpu.gpr[1]), (12000, 36007)),
    );
}

/// Four thousand blocks of one access each.
fn many_blocks(a: &mut CodeAssembler) {
    a.mov(rbx, DATA).unwrap();
    for _ in 0..4000 {
        let mut next = a.create_label();
        a.mov(rax, qword_ptr(rbx)).unwrap();
        a.jmp(next).unwrap();
        a.set_label(&mut next).unwrap();
    }
    a.nop().unwrap();
}

#[test]
fn the_bound_of_the_cache_counts_what_is_known_of_the_code() {
    let taken = |cache_size| {
        let options = TranslateOptions {
            cache_size,
            ..Default::default()
        };
        let stats = run(options, many_blocks).stats();
        let number = |name: &str| stats[name] as usize;
        (
            number("code_cache_bytes"),
            number("translation_metadata_bytes"),
            number("code_cache_flushes"),
        )
    };
    let (code, known, flushes) = taken(64 << 20);
    assert_eq!(flushes, 0);
    // The code alone would fit, with what one more block can take.
    let size = (code + known / 4 + (64 << 10)).next_multiple_of(4096);
    assert!(known / 4 > 64 << 10, "{known}");
    let (code, known, flushes) = taken(size);
    assert!(flushes > 0);
    assert!(code + known <= size, "{code} and {known} of {size}");
}
