//! How much faster 16-bit code runs translated than interpreted: a sieve and a CRC, in real mode, virtual-8086 mode and 16-bit protected mode.

use std::sync::Arc;
use std::time::{Duration, Instant};

use doppel_memory::GuestRam;
use doppel_translate::{Translate, TranslateOptions};
use doppel_x86::interpret::Interpret;
use doppel_x86::{Cpu, Cr0, Dtr, EmptyBus, Engine, Exit, Rflags, Seg, Segment};
use iced_x86::IcedError;
use iced_x86::code_asm::*;

const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STACK: u64 = 0x3_0000;
const TABLES: u64 = 0x4_0000;
const FLAGS: i32 = 0x100;
const SIZE: i32 = 8192;
const PASSES: u16 = 40;
const ROUNDS: usize = 5;

fn program() -> Result<Vec<u8>, IcedError> {
    let mut a = CodeAssembler::new(16)?;
    let [mut pass, mut next, mut mark, mut skip] = [(); 4].map(|()| a.create_label());
    let [mut each, mut byte, mut bit, mut clear] = [(); 4].map(|()| a.create_label());
    a.cld()?;
    a.mov(word_ptr(0), i32::from(PASSES))?;
    a.set_label(&mut pass)?;
    a.mov(di, FLAGS)?;
    a.mov(cx, SIZE / 2)?;
    a.mov(ax, 0x101)?;
    a.rep().stosw()?;
    a.mov(si, 2)?;
    a.set_label(&mut next)?;
    a.cmp(byte_ptr(si + FLAGS), 0)?;
    a.je(skip)?;
    a.mov(bx, si)?;
    a.add(bx, si)?;
    a.set_label(&mut mark)?;
    a.cmp(bx, SIZE)?;
    a.jae(skip)?;
    a.mov(byte_ptr(bx + FLAGS), 0)?;
    a.add(bx, si)?;
    a.jmp(mark)?;
    a.set_label(&mut skip)?;
    a.inc(si)?;
    a.cmp(si, 91)?;
    a.jb(next)?;
    a.mov(si, FLAGS)?;
    a.mov(cx, SIZE)?;
    a.mov(dx, 0xffff)?;
    a.set_label(&mut each)?;
    a.lodsb()?;
    a.push(cx)?;
    a.call(byte)?;
    a.pop(cx)?;
    a.loop_(each)?;
    a.dec(word_ptr(0))?;
    a.jnz(pass)?;
    a.hlt()?;
    a.set_label(&mut byte)?;
    a.xor(dl, al)?;
    a.mov(cx, 8)?;
    a.set_label(&mut bit)?;
    a.shr(dx, 1)?;
    a.jnc(clear)?;
    a.xor(dx, 0xa001)?;
    a.set_label(&mut clear)?;
    a.loop_(bit)?;
    a.ret()?;
    a.assemble(0)
}

fn cpu(mode: &str, code: &[u8]) -> Box<Cpu> {
    let ram = Arc::new(GuestRam::new(1 << 20).expect("guest memory"));
    ram.ptr(CODE).expect("within RAM").write(code);
    // In virtual-8086 mode HLT faults: its handler halts.
    ram.store::<u64>(TABLES + 8, 0x00cf_9b00_0000_ffff)
        .expect("within RAM");
    ram.store::<u64>(TABLES + 16, 0x00cf_9300_0000_ffff)
        .expect("within RAM");
    let gate = 0x0000_8e00_0008_0000 | TABLES >> 16 << 48 | 0x800;
    ram.store::<u64>(TABLES + 0x100 + 13 * 8, gate)
        .expect("within RAM");
    ram.store::<u8>(TABLES + 0x800, 0xf4).expect("within RAM");
    ram.store::<u32>(TABLES + 0x404, TABLES as u32 + 0x1000)
        .expect("within RAM");
    ram.store::<u32>(TABLES + 0x408, 0x10).expect("within RAM");
    let mut cpu = Cpu::new(0, ram);
    (cpu.gdtr, cpu.idtr) = (
        Dtr {
            base: TABLES,
            limit: 23,
        },
        Dtr {
            base: TABLES + 0x100,
            limit: 0xff,
        },
    );
    cpu.tr.base = TABLES + 0x400;
    cpu.tr.limit = 0x67;
    cpu.tr.attributes = 0x8b;
    cpu.rflags = Rflags::from_bits_retain(2);
    let attributes = match mode {
        "virtual-8086" => [0xf3, 0xf3],
        _ => [0x9b, 0x93],
    };
    for (seg, base) in [
        (Seg::Cs, CODE),
        (Seg::Ss, STACK),
        (Seg::Ds, DATA),
        (Seg::Es, DATA),
    ] {
        cpu.seg[seg as usize] = Segment {
            base,
            limit: 0xffff,
            attributes: attributes[usize::from(seg != Seg::Cs)],
            selector: (base >> 4) as u16,
        };
    }
    if mode != "real" {
        cpu.cr0 |= Cr0::PE;
    }
    if mode == "virtual-8086" {
        cpu.rflags |= Rflags::VM;
        cpu.cpl = 3;
    }
    (cpu.rip, cpu.gpr[4]) = (0, 0xfff0);
    cpu
}

/// Seconds, and the checksum.
fn run(mut engine: impl Engine) -> (Duration, u16) {
    let began = Instant::now();
    let exit = engine.run(&mut EmptyBus);
    assert_eq!(exit, Exit::Halted);
    (began.elapsed(), engine.cpu().gpr[2] as u16)
}

fn main() {
    let code = program().expect("a program");
    for mode in ["real", "virtual-8086", "protected"] {
        let mut best = [Duration::MAX; 2];
        for _ in 0..ROUNDS {
            let translate = Translate::new(cpu(mode, &code), TranslateOptions::default());
            let translated = run(translate.expect("the translator"));
            let interpreted = run(Interpret::new(cpu(mode, &code)));
            assert_eq!(translated.1, interpreted.1);
            for (best, now) in best.iter_mut().zip([translated.0, interpreted.0]) {
                *best = now.min(*best);
            }
        }
        let [translated, interpreted] = best.map(|t| t.as_secs_f64());
        println!(
            "{mode}: interpreted {interpreted:.3} s, translated {translated:.4} s, ratio {:.1}",
            interpreted / translated
        );
    }
}
