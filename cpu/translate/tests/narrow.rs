//! Random 32-bit code, translated and interpreted: registers, flags and memory must end up the same.

mod random_code;

use std::sync::Arc;

use doppel_memory::{Backing, GuestRam};
use doppel_translate::{Translate, TranslateOptions};
use doppel_x86::{Cpu, Cr0, Cr4, Dtr, EmptyBus, Engine, Exit, Rflags, Seg, Segment};
use fastrand::Rng;
use iced_x86::{
    CpuidFeature, Decoder, DecoderOptions, Encoder, FlowControl, Instruction, Mnemonic, OpKind,
    Register,
};
use random_code::{Outcome, difference};

const GDT: u64 = 0x4000;
const IDT: u64 = 0x5000;
const HANDLERS: u64 = 0x6000;
const CODE: u64 = 0x10000;
const DATA: u64 = 0x20000;
const STACK: u64 = 0x30000;
const COUNT: u64 = 0x38000;
const END: u64 = 0x40000;

const CASES: u64 = 600;
const ROUNDS: u32 = 3;

/// Descriptors by their selectors: flat code, flat data, data with a base and a limit, flat data that is read only.
const DESCRIPTORS: [u64; 5] = [
    0,
    0x00cf_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0043_9300_0040_4fff,
    0x00cf_9100_0000_ffff,
];

fn segment(selector: u16, base: u64, limit: u32, attributes: u32) -> Segment {
    let mut s = Segment {
        base,
        limit,
        attributes: 0,
        selector,
    };
    s.attributes = attributes;
    s
}

/// A CPU in protected mode at CPL 0 without paging; each exception stops it at an address of its own.
fn cpu_with(code: &[u8], random: &mut Rng, backing: Backing) -> Box<Cpu> {
    let ram = Arc::new(GuestRam::with_backing(1 << 20, backing).unwrap());
    for (n, d) in (0..).zip(DESCRIPTORS) {
        ram.store::<u64>(GDT + 8 * n, d).unwrap();
    }
    for n in 0..32 {
        let gate = 0x0000_8e00_0008_0000 | (HANDLERS + n);
        ram.store::<u64>(IDT + 8 * n, gate).unwrap();
    }
    ram.ptr(HANDLERS).unwrap().write(&[0xf4; 32]);
    for at in (DATA..DATA + 0x2000).step_by(8) {
        ram.store::<u64>(at, random.u64(..)).unwrap();
    }
    ram.store::<u32>(COUNT, ROUNDS).unwrap();
    ram.ptr(CODE).unwrap().write(code);
    let mut cpu = Cpu::new(0, ram);
    cpu.cr0 = Cr0::PE | Cr0::ET | Cr0::NE | Cr0::WP;
    cpu.cr4 = Cr4::OSFXSR | Cr4::OSXMMEXCPT;
    cpu.gdtr = Dtr {
        base: GDT,
        limit: 8 * 5 - 1,
    };
    cpu.idtr = Dtr {
        base: IDT,
        limit: 8 * 32 - 1,
    };
    for s in [Seg::Es, Seg::Ss, Seg::Ds] {
        cpu.seg[s as usize] = segment(0x10, 0, !0, 0xc093);
    }
    cpu.seg[Seg::Cs as usize] = segment(8, 0, !0, 0xc09b);
    cpu.seg[Seg::Fs as usize] = segment(0x18, 0x340, 0x34fff, 0x4093);
    cpu.seg[Seg::Gs as usize] = segment(0x18, 0x80, 0x20fff, 0x4093);
    for r in &mut cpu.gpr[..8] {
        *r = random.u64(..) & 0xffff_ffff;
    }
    cpu.rflags = Rflags::from_bits_retain(2);
    cpu.rip = CODE;
    cpu.gpr[4] = STACK;
    cpu
}

/// A random instruction of the integer set that goes on behind itself.
fn plain(random: &mut Rng) -> Instruction {
    loop {
        let bytes: Vec<u8> = (0..15).map(|_| random.u8(..)).collect();
        let i = Decoder::with_ip(32, &bytes, 0, DecoderOptions::NONE).decode();
        if fits(&i) {
            return i;
        }
    }
}

fn fits(i: &Instruction) -> bool {
    let integer = |f: &CpuidFeature| {
        use CpuidFeature::*;
        matches!(
            f,
            INTEL8086 | INTEL186 | INTEL286 | INTEL386 | INTEL486 | CMOV | CX8 | BMI1 | BMI2
        )
    };
    let selector = (0..i.op_count())
        .any(|op| i.op_kind(op) == OpKind::Register && i.op_register(op).is_segment_register());
    let stack = i.op_count() > 0 && matches!(i.op0_register(), Register::ESP | Register::SP);
    !i.is_invalid()
        && i.flow_control() == FlowControl::Next
        && !i.is_privileged()
        && i.cpuid_features().iter().all(integer)
        && !selector
        && !stack
        // What is left undefined differs between the host and the interpreter.
        && i.rflags_undefined() == 0
        && !matches!(
            i.mnemonic(),
            Mnemonic::Enter | Mnemonic::Leave | Mnemonic::Popa | Mnemonic::Popad | Mnemonic::Les | Mnemonic::Lds
                | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Sti
                | Mnemonic::Cli | Mnemonic::Xlatb | Mnemonic::Bound
        )
}

fn emit(code: &mut Vec<u8>, i: &Instruction) -> bool {
    let mut encoder = Encoder::new(32);
    let at = CODE + code.len() as u64;
    let done = encoder.encode(i, at).is_ok();
    if done {
        code.extend(encoder.take_buffer());
    }
    done
}

fn immediate(code: &mut Vec<u8>, number: u8, value: u64) {
    code.push(0xb8 + number);
    code.extend((value as u32).to_le_bytes());
}

/// An instruction, with its address in the data for the most part.
fn ordinary(code: &mut Vec<u8>, random: &mut Rng) {
    let mut i = plain(random);
    if i.is_string_instruction() {
        immediate(code, 1, random.u64(..20));
        immediate(code, 6, DATA + random.u64(..0x1000));
        immediate(code, 7, DATA + random.u64(..0x1000));
    }
    let memory = (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory);
    if memory {
        const BASES: [(Register, u8); 4] = [
            (Register::EBX, 3),
            (Register::EBP, 5),
            (Register::ESI, 6),
            (Register::EDI, 7),
        ];
        let (base, number) = BASES[random.usize(..4)];
        immediate(code, number, DATA + 0x200 + random.u64(..0x1000));
        let disp = random.u64(..256) as i64 - 128;
        i.set_memory_base(base);
        i.set_memory_index(Register::None);
        i.set_memory_displacement64(disp as u64 & 0xffff_ffff);
        i.set_memory_displ_size(1);
        match random.u64(..4) {
            0 => {
                i.set_memory_base(Register::None);
                i.set_memory_displacement64(DATA + random.u64(..0x1000));
                i.set_memory_displ_size(4);
            }
            1 => {
                immediate(code, 1, random.u64(..0x100));
                i.set_memory_index(Register::ECX);
                i.set_memory_index_scale(1 << random.u64(..4));
            }
            _ => (),
        }
    }
    emit(code, &i);
}

/// A sequence that changes a segment, or goes somewhere.
fn special(code: &mut Vec<u8>, random: &mut Rng) {
    let next = |code: &Vec<u8>, more: u64| CODE + code.len() as u64 + more;
    match random.u64(..7) {
        // mov edx, selector; mov ds/es/fs/gs, edx
        0 => {
            immediate(code, 2, 0x10 + 8 * (random.u64(..8) / 3).min(2));
            code.extend([0x8e, [0xda, 0xc2, 0xe2, 0xea][random.usize(..4)]]);
        }
        // call over a byte; add esp, 4 or pop
        1 => code.extend([0xe8, 1, 0, 0, 0, 0xf4, 0x58]),
        // mov eax, next; call eax; pop edx
        2 => {
            immediate(code, 0, next(code, 7));
            code.extend([0xff, 0xd0, 0x5a]);
        }
        // push next; ret
        3 => {
            let target = next(code, 6);
            code.push(0x68);
            code.extend((target as u32).to_le_bytes());
            code.push(0xc3);
        }
        // jcc over a move
        4 => {
            code.extend([0x70 | random.u8(..16), 5]);
            immediate(code, random.u8(..4), random.u64(..));
        }
        // mov ecx, n; back: add eax, ecx; loop back
        5 => {
            immediate(code, 1, 1 + random.u64(..9));
            code.extend([0x01, 0xc8, 0xe2, 0xfc]);
        }
        // pushfd; popfd
        _ => code.extend([0x9c, 0x9d]),
    }
}

/// Code that runs some rounds and stops.
fn program(random: &mut Rng) -> Vec<u8> {
    let mut code = Vec::new();
    for _ in 0..4 + random.u64(..24) {
        match random.u64(..5) {
            0 => special(&mut code, random),
            _ => ordinary(&mut code, random),
        }
    }
    // mov esp, STACK; dec dword ss:[COUNT]; jz +5; jmp CODE; hlt
    immediate(&mut code, 4, STACK);
    code.extend([0x36, 0xff, 0x0d]);
    code.extend((COUNT as u32).to_le_bytes());
    code.extend([0x74, 5, 0xe9]);
    let back = -(code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    code.push(0xf4);
    code
}

/// How a program is run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    Interpreted,
    /// Each access with a TLB check.
    Checked,
    /// Accesses through a window, where RAM is a file.
    Windowed,
}

fn run(seed: u64, how: How) -> (Translate, Outcome, Vec<u8>) {
    let mut random = Rng::with_seed(seed);
    let code = program(&mut random);
    // Without `entry_flags` the frame of a fault may show stale flags.
    let options = TranslateOptions {
        entry_flags: true,
        narrow_modes: how != How::Interpreted,
        window: how == How::Windowed,
        ..Default::default()
    };
    let cpu = cpu_with(&code, &mut random, Backing::Memfd);
    let mut engine = Translate::new(cpu, options).unwrap();
    let exit = engine.run(&mut EmptyBus);
    let outcome = Outcome::of(&engine, exit, END);
    (engine, outcome, code)
}

fn counted(engine: &Translate, name: &str) -> u64 {
    let stats = engine.stats();
    stats.get(name).copied().unwrap_or_default()
}

fn listing(code: &[u8]) -> String {
    let decoder = Decoder::with_ip(32, code, CODE, DecoderOptions::NONE);
    let line = |i: Instruction| format!("{:x} {:?} {i}\n", i.ip(), i.code());
    decoder.into_iter().map(line).collect()
}

#[test]
fn random_32_bit_code_does_what_the_interpreter_does() {
    let (mut ended, mut failed, mut opened) = (0, 0, 0);
    for case in 1..=CASES {
        let (_, theirs, code) = run(case, How::Interpreted);
        for how in [How::Checked, How::Windowed] {
            let (engine, ours, _) = run(case, how);
            opened += counted(&engine, "window_runs_opened");
            if ours != theirs {
                failed += 1;
                if failed < 6 {
                    let difference = difference(&ours, &theirs);
                    eprintln!("case {case}, {how:?}\n{difference}{}", listing(&code));
                }
            }
        }
        ended += usize::from(theirs.rip > CODE);
    }
    assert_eq!(failed, 0, "of {CASES}");
    assert!(ended > CASES as usize / 4, "most programs fault: {ended}");
    assert!(opened > CASES / 2, "hardly a window was used: {opened}");
}

/// Runs code until it halts; RAM is a file or memory.
fn run_code(code: &[u8], backing: Backing) -> Translate {
    let cpu = cpu_with(code, &mut Rng::with_seed(1), backing);
    let mut engine = Translate::new(cpu, TranslateOptions::default()).unwrap();
    assert_eq!(engine.run(&mut EmptyBus), Exit::Halted);
    engine
}

#[test]
fn memory_without_a_file_has_no_window() {
    // mov [DATA], eax; hlt
    let code = [0xa3, 0, 0, 2, 0, 0xf4];
    let engine = run_code(&code, Backing::Anonymous);
    assert_eq!(counted(&engine, "accesses_through_window"), 0);
    let engine = run_code(&code, Backing::Memfd);
    assert_eq!(counted(&engine, "accesses_through_window"), 1);
    assert_eq!(counted(&engine, "window_runs_opened"), 1);
}

#[test]
fn code_that_is_written_over_in_a_window_is_translated_again() {
    // At 1000f stands `mov ebx, imm32`, whose immediate the loop writes to: mov ecx, 3; mov eax, ecx; mov [10010], eax; nop; nop; nop;
    // mov ebx, 0; add edx, ebx; loop; hlt
    let code = [
        0xb9, 3, 0, 0, 0, 0x89, 0xc8, 0xa3, 0x10, 0, 1, 0, 0x90, 0x90, 0x90, 0xbb, 0, 0, 0, 0,
        0x01, 0xda, 0xe2, 0xed, 0xf4,
    ];
    let engine = run_code(&code, Backing::Memfd);
    let mut random = Rng::with_seed(1);
    let before = cpu_with(&code, &mut random, Backing::Anonymous).gpr[2];
    let sum = (engine.cpu().gpr[2] as u32).wrapping_sub(before as u32);
    assert_eq!(sum, 3 + 2 + 1);
    assert!(counted(&engine, "window_faults") > 0);
}

#[test]
fn what_comes_to_no_memory_all_the_time_has_checks_in_the_end() {
    // mov ecx, 5000; mov al, [a0000]; loop; hlt
    let code = [
        0xb9, 0x88, 0x13, 0, 0, 0xa0, 0, 0, 0x0a, 0, 0xe2, 0xf9, 0xf4,
    ];
    let engine = run_code(&code, Backing::Memfd);
    assert_eq!(counted(&engine, "window_faults"), 2000);
    assert_eq!(engine.cpu().gpr[1] as u32, 0);
}
