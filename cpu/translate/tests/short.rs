//! Random 16-bit code, and 32-bit code in segments with bases and limits, translated and interpreted: the whole state must end up the same.
//!
//! Real mode, virtual-8086 mode and protected mode at every CPL; segments that begin and end anywhere, expand down, or lack a right; stacks of either
//! size; pointers near the ends of segments and where 16 bits wrap.

mod random_code;

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use doppel_memory::GuestRam;
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
const TSS: u64 = 0x5800;
const HANDLERS: u64 = 0x6000;
const HANDLER_STACK: u64 = 0x8000;
const CODE: u64 = 0x10000;
const DATA: u64 = 0x20000;
const STACK: u64 = 0x30000;
const COUNT: u64 = 0x38800;
const END: u64 = 0x60000;

const CASES: u64 = 600;
const ROUNDS: u16 = 3;
const SELECTORS: u16 = 14;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Real,
    V86,
    Protected,
}

/// How a case begins.
#[derive(Clone, Debug)]
struct Setup {
    kind: Kind,
    bits: u32,
    cpl: u8,
    /// CS, SS, DS, ES, FS, GS.
    segments: [Segment; 6],
    descriptors: Vec<u64>,
    ip: u64,
    sp: u64,
}

fn descriptor(base: u64, limit: u32, granular: bool, big: bool, kind: u64, dpl: u64) -> u64 {
    let limit = u64::from(limit);
    (limit & 0xffff)
        | (base & 0xff_ffff) << 16
        | (0x90 | kind | dpl << 5) << 40
        | (limit >> 16 & 0xf) << 48
        | (u64::from(granular) << 3 | u64::from(big) << 2) << 52
        | (base >> 24) << 56
}

fn segment(selector: u16, d: u64) -> Segment {
    let raw = (d & 0xffff) as u32 | (d >> 32 & 0xf_0000) as u32;
    Segment {
        base: (d >> 16 & 0xff_ffff) | (d >> 32 & 0xff00_0000),
        limit: if d >> 55 & 1 != 0 {
            raw << 12 | 0xfff
        } else {
            raw
        },
        attributes: (d >> 40 & 0xf0ff) as u32,
        selector,
    }
}

fn pick<T: Copy>(r: &mut Rng, from: &[T]) -> T {
    from[r.usize(..from.len())]
}

/// Data: mostly 64 KiB that may be written, with other limits, types and bases between.
fn data_descriptor(r: &mut Rng, base: u64, dpl: u64) -> u64 {
    let base = base + pick(r, &[0, 0, 0x10, 0x123, 0xff0]);
    match r.u64(..8) {
        0 => descriptor(base, 0xfff, false, false, 3, dpl),
        1 => descriptor(base, 0x1007, false, true, 3, dpl),
        2 => descriptor(base, 0xf_ffff, true, true, 3, dpl),
        3 => descriptor(base, 0x1fff, false, r.bool(), 7, dpl), // expands down
        4 => descriptor(base, 0xffff, false, false, 1, dpl),    // read only
        5 => descriptor(base, 0xffff, false, false, 0xb, dpl),  // code
        _ => descriptor(base, 0xffff, false, false, 3, dpl),
    }
}

fn protected(r: &mut Rng) -> Setup {
    let cpl = r.u8(..4);
    let dpl = u64::from(cpl);
    let bits = pick(r, &[16, 16, 32]);
    let base = CODE + pick(r, &[0, 0, 0x10, 0x340, 0xfff]);
    let (limit, granular) = pick(
        r,
        &[
            (0xffff, false),
            (0xffff, false),
            (0xf_ffff, true),
            (0x8fff, false),
            (0x2_1000, false),
        ],
    );
    let code = descriptor(
        base,
        limit,
        granular,
        bits == 32,
        pick(r, &[0xb, 0xb, 9]),
        dpl,
    );
    let stack = match r.u64(..5) {
        0 => descriptor(STACK, 0xf_ffff, true, r.bool(), 3, dpl),
        1 => descriptor(STACK, 0x7fff, false, r.bool(), 7, dpl),
        n => descriptor(STACK + 0x10 * (n & 1), 0xffff, false, r.bool(), 3, dpl),
    };
    // The handlers' code and data, the task; then what the code has, and what it may load.
    let task = descriptor(TSS, 0x67, false, false, 0, 0) & !(0x1f << 40) | 0xb << 40;
    let mut descriptors = vec![
        0,
        0x00cf_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        task,
        code,
        stack,
    ];
    while descriptors.len() < usize::from(SELECTORS) {
        descriptors.push(data_descriptor(r, DATA, dpl));
    }
    let mut segments = [Segment::default(); 6];
    for (n, s) in segments.iter_mut().enumerate() {
        let selector = if n < 2 { 4 + n as u16 } else { 6 + r.u16(..8) };
        *s = segment(
            (8 * selector) | u16::from(cpl),
            descriptors[usize::from(selector)],
        );
    }
    Setup {
        kind: Kind::Protected,
        bits,
        cpl,
        segments,
        descriptors,
        ip: 0,
        sp: 0,
    }
}

fn paragraphs(r: &mut Rng, kind: Kind) -> Setup {
    let mut setup = protected(r);
    let bases = [
        CODE + pick(r, &[0, 0x10, 0xff0]),
        STACK,
        DATA,
        DATA + 0x100,
        DATA + 0x1000,
        DATA + 0xf000,
    ];
    for (s, base) in setup.segments.iter_mut().zip(bases) {
        *s = Segment {
            base,
            limit: 0xffff,
            attributes: if kind == Kind::V86 { 0xf3 } else { 0x93 },
            selector: (base >> 4) as u16,
        };
    }
    let cpl = if kind == Kind::V86 { 3 } else { 0 };
    Setup {
        kind,
        bits: 16,
        cpl,
        ..setup
    }
}

fn setup(r: &mut Rng) -> Setup {
    let mut setup = match r.u64(..4) {
        0 => paragraphs(r, Kind::Real),
        1 => paragraphs(r, Kind::V86),
        _ => protected(r),
    };
    setup.ip = pick(r, &[0x100, 0x100, 0x7f0, 0xe80, 0xfe00, 0x8f00]);
    setup.sp = pick(r, &[0xa000, 0xa000, 0xa001, 0xfffe, 0x8004]);
    setup
}

fn cpu_for(setup: &Setup, code: &[u8], r: &mut Rng) -> Box<Cpu> {
    let ram = Arc::new(GuestRam::new(1 << 20).unwrap());
    for (n, d) in (0..).zip(&setup.descriptors) {
        ram.store::<u64>(GDT + 8 * n, *d).unwrap();
    }
    for n in 0..32 {
        ram.store::<u64>(IDT + 8 * n, 0x0000_8e00_0008_0000 | (HANDLERS + n))
            .unwrap();
        ram.store::<u32>(4 * n, (HANDLERS + n) as u32).unwrap();
    }
    ram.store::<u32>(TSS + 4, HANDLER_STACK as u32).unwrap();
    ram.store::<u32>(TSS + 8, 0x10).unwrap();
    ram.store::<u16>(TSS + 0x66, 0x68).unwrap();
    ram.ptr(HANDLERS).unwrap().write(&[0xf4; 32]);
    for at in (DATA..DATA + 0x1_1000).step_by(8) {
        ram.store::<u64>(at, r.u64(..)).unwrap();
    }
    ram.store::<u16>(COUNT, ROUNDS).unwrap();
    ram.store::<u16>(COUNT + 0x10, ROUNDS).unwrap();
    let at = setup.segments[0].base + setup.ip;
    for (at, byte) in (at..).zip(code) {
        ram.store::<u8>(at, *byte).unwrap();
    }
    let mut cpu = Cpu::new(0, ram);
    cpu.cr0 = Cr0::ET | Cr0::NE | Cr0::WP;
    cpu.cr4 = Cr4::OSFXSR | Cr4::OSXMMEXCPT;
    cpu.idtr = Dtr {
        base: if setup.kind == Kind::Real { 0 } else { IDT },
        limit: 0xff,
    };
    cpu.gdtr = Dtr {
        base: GDT,
        limit: 8 * SELECTORS - 1,
    };
    cpu.rflags = Rflags::from_bits_retain(2);
    if setup.kind != Kind::Real {
        cpu.cr0 |= Cr0::PE;
        cpu.tr = segment(0x18, setup.descriptors[3]);
    }
    if setup.kind == Kind::V86 {
        cpu.rflags |= Rflags::VM;
        cpu.rflags |= Rflags::from_bits_retain(r.u64(..4) << 12);
    }
    for (seg, s) in [Seg::Cs, Seg::Ss, Seg::Ds, Seg::Es, Seg::Fs, Seg::Gs]
        .into_iter()
        .zip(setup.segments)
    {
        cpu.seg[seg as usize] = s;
    }
    cpu.cpl = setup.cpl;
    for g in &mut cpu.gpr[..8] {
        *g = r.u64(..) & 0xffff_ffff;
    }
    cpu.rip = setup.ip;
    // SP alone counts where the stack is of 16 bits.
    let above = if setup.segments[1].big() && setup.kind != Kind::V86 {
        0
    } else {
        0x5a5a_0000
    };
    cpu.gpr[4] = setup.sp | above;
    cpu
}

/// Code that is being written.
struct Writer<'a> {
    r: &'a mut Rng,
    setup: &'a Setup,
    code: Vec<u8>,
}

impl Writer<'_> {
    fn wide(&self) -> bool {
        self.setup.bits == 32
    }

    /// The prefix that an instruction of this operand (or, with 0x67, address) size needs.
    fn sized(&mut self, prefix: u8, wide: bool) {
        if wide != self.wide() {
            self.code.push(prefix);
        }
    }

    fn set(&mut self, number: u8, value: u64, wide: bool) {
        self.sized(0x66, wide);
        self.code.push(0xb8 + number);
        let len = if wide { 4 } else { 2 };
        self.code.extend(&value.to_le_bytes()[..len]);
    }

    /// An offset in a segment of data: mostly in its beginning, at times where it ends or wraps.
    fn offset(&mut self) -> u64 {
        match self.r.u64(..16) {
            0 => 0xfff0 + self.r.u64(..16),
            1 => 0x0ff0 + self.r.u64(..32),
            2 => 0x1ff0 + self.r.u64(..32),
            _ => self.r.u64(..0x1800),
        }
    }

    fn plain(&mut self) -> Instruction {
        loop {
            let mut bytes: Vec<u8> = (0..15).map(|_| self.r.u8(..)).collect();
            if self.r.u64(..4) == 0 {
                bytes[0] = pick(self.r, &[0x66, 0x67, 0x26, 0x2e, 0x36, 0x64, 0x65]);
            }
            let i = Decoder::with_ip(self.setup.bits, &bytes, 0, DecoderOptions::NONE).decode();
            if fits(&i) {
                return i;
            }
        }
    }

    fn ordinary(&mut self) {
        let mut i = self.plain();
        if i.is_string_instruction() {
            let n = self.r.u64(..40);
            self.set(1, n, true);
            for pointer in [6, 7] {
                let at = self.offset();
                self.set(pointer, at, true);
            }
        }
        let memory = (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory);
        if memory {
            self.address(&mut i);
        }
        self.emit(&i);
    }

    /// Gives the instruction an operand of either address size that lies in the data, for the most part.
    fn address(&mut self, i: &mut Instruction) {
        use Register::*;
        const SHORT: [(Register, Register); 8] = [
            (BX, None),
            (BP, None),
            (SI, None),
            (DI, None),
            (BX, SI),
            (BX, DI),
            (BP, SI),
            (BP, DI),
        ];
        const LONG: [Register; 4] = [EBX, EBP, ESI, EDI];
        let number = |r: Register| r.full_register().number() as u8;
        let disp = self.r.u64(..256) as i64 - 128;
        let short = self.r.u64(..if self.wide() { 5 } else { 3 }) < 2 && !self.wide()
            || self.r.u64(..4) == 0;
        i.set_memory_index_scale(1);
        i.set_memory_index(None);
        if self.r.u64(..5) == 0 {
            i.set_memory_base(None);
            let at = self.offset();
            i.set_memory_displacement64(at);
            i.set_memory_displ_size(if short { 2 } else { 4 });
            return;
        }
        if short {
            let (base, index) = pick(self.r, &SHORT);
            let at = self.offset();
            let part = if index == None {
                0
            } else {
                self.r.u64(..) & 0xffff
            };
            self.set(number(base), at.wrapping_sub(part) & 0xffff, false);
            if index != None {
                self.set(number(index), part, false);
            }
            i.set_memory_base(base);
            i.set_memory_index(index);
            i.set_memory_displacement64(disp as u64 & 0xffff);
            i.set_memory_displ_size(1);
        } else {
            let base = pick(self.r, &LONG);
            let at = self.offset() + 0x80;
            self.set(number(base), at, true);
            i.set_memory_base(base);
            i.set_memory_displacement64(disp as u64 & 0xffff_ffff);
            i.set_memory_displ_size(1);
        }
    }

    fn emit(&mut self, i: &Instruction) {
        let mut encoder = Encoder::new(self.setup.bits);
        let at = self.setup.ip + self.code.len() as u64;
        if encoder.encode(i, at).is_ok() {
            self.code.extend(encoder.take_buffer());
        }
    }

    /// A relative displacement of a branch.
    fn relative(&mut self, by: i32, wide: bool) {
        let len = if wide { 4 } else { 2 };
        self.code.extend(&by.to_le_bytes()[..len]);
    }

    fn special(&mut self) {
        let native = self.wide();
        let wide = if self.r.u64(..8) == 0 {
            !native
        } else {
            native
        };
        let here = |w: &Self, more: u64| w.setup.ip + w.code.len() as u64 + more;
        match self.r.u64(..13) {
            // mov ax, selector; mov ds/es/fs/gs, ax
            0 | 1 => {
                let selector = match self.setup.kind {
                    Kind::Protected => (8 * (6 + self.r.u64(..8))) | u64::from(self.setup.cpl),
                    _ => (DATA >> 4) + pick(self.r, &[0, 1, 0x10, 0xff, 0xf00]),
                };
                self.set(0, selector, false);
                let modrm = pick(self.r, &[0xd8, 0xc0, 0xe0, 0xe8]);
                self.code.extend([0x8e, modrm]);
            }
            // call over a byte; pop
            2 => {
                self.sized(0x66, wide);
                self.code.push(0xe8);
                self.relative(1, wide);
                self.code.push(0xf4);
                self.sized(0x66, wide);
                self.code.push(0x58);
            }
            // mov ax, next; call ax; pop dx
            3 => {
                let prefix = u64::from(wide != native);
                let len = 2 * prefix + if wide { 5 } else { 3 } + 2;
                let target = here(self, len);
                self.set(0, target, wide);
                self.sized(0x66, wide);
                self.code.extend([0xff, 0xd0]);
                self.sized(0x66, wide);
                self.code.push(0x5a);
            }
            // push next; ret, perhaps with a word released
            4 => {
                let prefix = u64::from(wide != native);
                let release = self.r.bool();
                let len = 2 * prefix + if wide { 5 } else { 3 } + if release { 3 } else { 1 };
                let target = here(self, len);
                self.sized(0x66, wide);
                self.code.push(0x68);
                self.relative(target as i32, wide);
                self.sized(0x66, wide);
                match release {
                    true => self.code.extend([0xc2, 2, 0]),
                    false => self.code.push(0xc3),
                }
            }
            // jcc over a move, short or near
            5 => {
                let cc = self.r.u8(..16);
                let len = if native { 5 } else { 3 };
                match self.r.u64(..2) {
                    0 => self.code.extend([0x70 | cc, len]),
                    _ => {
                        self.sized(0x66, wide);
                        self.code.extend([0x0f, 0x80 | cc]);
                        self.relative(len.into(), wide);
                    }
                }
                let value = self.r.u64(..);
                let number = self.r.u8(..4);
                self.set(number, value, native);
            }
            // mov cx, n; back: add ax, cx; loop, loope or loopne back
            6 => {
                let counter = self.r.bool();
                let n = 1 + self.r.u64(..9);
                self.set(1, n, counter);
                let opcode = pick(self.r, &[0xe2, 0xe2, 0xe1, 0xe0]);
                self.code.extend([0x01, 0xc8]);
                let prefix = u8::from(counter != native);
                self.sized(0x67, counter);
                self.code.extend([opcode, 0xfc - prefix]);
            }
            // jcxz over a byte
            7 => {
                let n = self.r.u64(..2);
                let counter = self.r.bool();
                let low = self.r.u64(..2);
                self.set(1, n << 16 | low, true);
                self.sized(0x67, counter);
                self.code.extend([0xe3, 1, 0x40]);
            }
            // pushf; popf
            8 => {
                self.sized(0x66, wide);
                self.code.push(0x9c);
                self.sized(0x66, wide);
                self.code.push(0x9d);
            }
            // A stack that is about to wrap.
            9 => {
                let sp = pick(
                    self.r,
                    &[0u64, 1, 2, 3, 4, 0xffff, 0xfffe, 0xfffd, 0x10000, 0x10002],
                );
                self.set(4, sp, true);
                let pushes = self.r.bool();
                self.sized(0x66, wide);
                self.code
                    .push(if pushes { 0x50 } else { 0x58 } + self.r.u8(..4));
                self.set(4, self.setup.sp, true);
            }
            // mov bp, sp; push bp; sub sp, 8; leave
            10 => {
                self.code.extend([0x89, 0xe5]);
                self.sized(0x66, wide);
                self.code.extend([0x55, 0x83, 0xec, 8]);
                self.sized(0x66, wide);
                self.code.push(0xc9);
            }
            // A far jump to the same place through the next lower paragraph.
            11 if self.setup.kind != Kind::Protected => {
                let next = here(self, 5) as u16;
                let cs = self.setup.segments[0].selector;
                if next < 0xff00 {
                    self.code.push(0xea);
                    self.code.extend((next + 0x10).to_le_bytes());
                    self.code.extend((cs - 1).to_le_bytes());
                    // And back.
                    self.code.push(0xea);
                    self.code.extend((next + 5).to_le_bytes());
                    self.code.extend(cs.to_le_bytes());
                }
            }
            // A repeated string instruction with counts and pointers of either size.
            _ => {
                let short = self.r.u64(..3) != 0;
                let n = pick(self.r, &[0, 1, 3, 40, 700, 0x1_0002]);
                let (from, to) = (self.offset(), self.offset());
                for (number, v) in [(1, n), (6, from), (7, to)] {
                    self.set(number, v, true);
                }
                let opcode = pick(
                    self.r,
                    &[0xa4, 0xa5, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0xa6, 0xa7],
                );
                self.sized(0x66, wide);
                self.sized(0x67, !short);
                if self.r.u64(..3) == 0 {
                    let segment = pick(self.r, &[0x26, 0x2e, 0x36, 0x64]);
                    self.code.push(segment);
                }
                let repeat = pick(self.r, &[0xf3, 0xf3, 0xf2]);
                self.code.extend([repeat, opcode]);
            }
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
    let stack = i.op_count() > 0 && matches!(i.op0_register(), Register::ESP | Register::SP);
    let loads_segment = i.op_count() > 0 && i.op0_register().is_segment_register();
    !i.is_invalid()
        && i.flow_control() == FlowControl::Next
        && !i.is_privileged()
        && i.cpuid_features().iter().all(integer)
        && !stack
        && !loads_segment
        // What is left undefined differs between the host and the interpreter.
        && i.rflags_undefined() == 0
        && !matches!(
            i.mnemonic(),
            Mnemonic::Enter | Mnemonic::Leave | Mnemonic::Popa | Mnemonic::Popad | Mnemonic::Les | Mnemonic::Lds
                | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs | Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Sti
                | Mnemonic::Cli | Mnemonic::Bound
        )
}

/// Code that runs some rounds and stops.
fn program(r: &mut Rng, setup: &Setup) -> Vec<u8> {
    let mut w = Writer {
        r,
        setup,
        code: Vec::new(),
    };
    for _ in 0..4 + w.r.u64(..24) {
        match w.r.u64(..3) {
            0 => w.special(),
            _ => w.ordinary(),
        }
    }
    // mov esp, the stack; dec word ss:[count]; jz over the jump; jmp to the beginning; hlt
    let sp = setup.sp;
    w.set(4, sp, true);
    w.code.push(0x36);
    w.sized(0x67, true);
    w.sized(0x66, false);
    w.code.extend([0xff, 0x0d]);
    w.code.extend(((COUNT - STACK) as u32).to_le_bytes());
    let wide = w.wide();
    let jump = if wide { 5 } else { 3 };
    w.code.extend([0x74, jump, 0xe9]);
    let by = -(w.code.len() as i32 + i32::from(jump) - 1);
    w.relative(by, wide);
    w.code.push(0xf4);
    w.code
}

/// `None` where it does not end.
fn run(seed: u64, short_modes: bool) -> (Option<Outcome>, u64, Setup, Vec<u8>) {
    let mut random = Rng::with_seed(seed);
    let setup = setup(&mut random);
    let code = program(&mut random, &setup);
    // Without `entry_flags` the frame of a fault may show stale flags.
    let options = TranslateOptions {
        entry_flags: true,
        short_modes,
        count: true,
        ..Default::default()
    };
    let mut engine = Translate::new(cpu_for(&setup, &code, &mut random), options).unwrap();
    let kicker = engine.kicker();
    let (done, wait) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if wait.recv_timeout(Duration::from_secs(2)) == Err(mpsc::RecvTimeoutError::Timeout) {
            kicker.kick();
        }
    });
    let exit = engine.run(&mut EmptyBus);
    drop(done);
    watchdog.join().unwrap();
    let stats = engine.stats();
    let ran = stats
        .get("translated_instructions_run")
        .copied()
        .unwrap_or(0);
    let outcome = (exit != Exit::Kicked).then(|| Outcome::of(&engine, exit, END));
    (outcome, ran, setup, code)
}

fn listing(setup: &Setup, code: &[u8]) -> String {
    let decoder = Decoder::with_ip(setup.bits, code, setup.ip, DecoderOptions::NONE);
    let line = |i: Instruction| format!("{:x} {:?} {i}\n", i.ip(), i.code());
    decoder.into_iter().map(line).collect()
}

#[test]
fn random_16_bit_code_does_what_the_interpreter_does() {
    let (mut failed, mut translated, mut skipped) = (0, 0, 0);
    for case in 1..=CASES {
        let (ours, ran, setup, code) = run(case, true);
        let (theirs, ..) = run(case, false);
        translated += ran;
        let (Some(ours), Some(theirs)) = (ours, theirs) else {
            skipped += 1;
            continue;
        };
        if ours != theirs {
            failed += 1;
            if failed < 4 {
                let setup_text = format!("{setup:x?}");
                let differs = difference(&ours, &theirs);
                eprintln!(
                    "case {case}\n{setup_text}\n{differs}{}",
                    listing(&setup, &code)
                );
            }
        }
    }
    assert_eq!(failed, 0, "of {CASES}");
    assert!(skipped < CASES / 50, "{skipped} do not end");
    assert!(
        translated > 40 * CASES,
        "{translated} instructions were translated"
    );
}
