//! Register forms of the integer instructions against the host's processor, flags included.

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind,
};

use super::machine;
use crate::EmptyBus;
use crate::interpret::arch_native::{CodeBuffer, Frame};
use crate::interpret::register::{gpr_index, register_size};
use crate::interpret::{Flow, dispatch};
use crate::{Cpu, CpuMode, FpuArea, Gpr, Rflags};

/// xorshift64*
pub(super) struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// Values that are often at an edge.
    pub fn value(&mut self) -> u64 {
        const EDGES: [u64; 12] = [
            0,
            1,
            2,
            0x7f,
            0x80,
            0xff,
            0x7fff,
            0x8000,
            0x7fff_ffff,
            0x8000_0000,
            i64::MIN as u64,
            u64::MAX,
        ];
        match self.next() % 4 {
            0 => EDGES[self.next() as usize % EDGES.len()],
            1 => self.next() & 0x7f,
            _ => self.next(),
        }
    }
}

/// Bytes that look like an integer instruction.
fn candidate(r: &mut Random) -> [u8; 15] {
    let mut bytes = [0; 15];
    bytes.fill_with(|| r.next() as u8);
    let mut at = 0;
    let mut push = |b: u8| {
        bytes[at] = b;
        at += 1;
    };
    let v = r.next();
    if v & 7 == 0 {
        // VEX, maps 2 and 3.
        push(0xc4);
        push(0xe0 | if v & 8 == 0 { 2 } else { 3 });
        push((v >> 8) as u8 & !4);
        push(0xf0 | (v >> 16) as u8 & 7);
        push(0xc0 | (v >> 24) as u8);
        return bytes;
    }
    match v >> 3 & 7 {
        0 => push(0x66),
        1 => push(0xf2),
        2 => push(0xf3),
        _ => {}
    }
    if v >> 6 & 1 != 0 {
        push(0x40 | (v >> 8) as u8 & 15);
    }
    match v >> 16 & 3 {
        0 => {}
        1 => {
            push(0x0f);
            push(0x38);
            push(0xf0 | (v >> 24) as u8 & 7);
            push(0xc0 | (v >> 32) as u8);
            return bytes;
        }
        _ => push(0x0f),
    }
    push((v >> 24) as u8);
    push(0xc0 | (v >> 32) as u8);
    bytes
}

/// The instruction, where it only names registers (not RSP) and is an integer instruction of ours.
fn acceptable(bytes: &[u8; 15]) -> Option<Instruction> {
    let i = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    let plain = !i.is_invalid() && i.flow_control() == FlowControl::Next && !i.is_privileged();
    if !plain || !dispatch::is_integer(&i) {
        return None;
    }
    let mut info = InstructionInfoFactory::new();
    let info = info.info(&i);
    let stack = |r| gpr_index(r) == Some(Gpr::Rsp as usize) && gpr_index(r) != Some(0);
    let high = |n| n == OpKind::Memory;
    let good = info.used_memory().is_empty()
        && !i.op_kinds().any(high)
        && !info.used_registers().iter().any(|r| stack(r.register()));
    good.then_some(i)
}

fn native(buffer: &mut CodeBuffer, cpu: &Cpu, bytes: &[u8]) -> ([u64; 16], u64) {
    let mut frame = Frame::default();
    frame.gpr = cpu.gpr;
    frame.flags = cpu.rflags.bits();
    let mut code = bytes.to_vec();
    code.push(0xc3);
    let code = match buffer.append(&code) {
        Some(c) => c,
        None => {
            buffer.clear();
            buffer.append(&code).unwrap()
        }
    };
    buffer.run(code, &mut frame, &mut FpuArea::reset(), 0);
    frame.gpr[Gpr::Rsp as usize] = cpu.reg(Gpr::Rsp);
    (frame.gpr, frame.flags & Rflags::ARITHMETIC.bits())
}

/// Where the manual leaves the outcome open, we do as AMD's processors do; others differ.
fn forgive_undefined(i: &Instruction, ours: &State, host: &mut State) {
    use iced_x86::RflagsBits as R;
    let mut undefined = i.rflags_undefined();
    if matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) {
        // Also where the count leaves the operand as it is, of which iced-x86 says that it leaves the flags alone.
        undefined |= R::OF;
    }
    let bits = [
        (R::OF, Rflags::OF),
        (R::SF, Rflags::SF),
        (R::ZF, Rflags::ZF),
        (R::AF, Rflags::AF),
        (R::CF, Rflags::CF),
        (R::PF, Rflags::PF),
    ];
    for (_, flag) in bits.iter().filter(|(bit, _)| undefined & bit != 0) {
        host.1 = host.1 & !flag.bits() | ours.1 & flag.bits();
    }
    // A count that is a whole turn is one more case of a count that is not 1.
    let through_carry = matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr);
    if through_carry && i.try_immediate(1).ok() != Some(1) {
        host.1 = host.1 & !Rflags::OF.bits() | ours.1 & Rflags::OF.bits();
    }
    let narrow = register_size(i.op0_register()) == 2;
    if narrow
        && matches!(
            i.mnemonic(),
            Mnemonic::Shld | Mnemonic::Shrd | Mnemonic::Bswap
        )
    {
        *host = *ours;
    }
}

type State = ([u64; 16], u64);

/// What there is to see of a difference: operands before, and what changed.
fn describe(i: &Instruction, before: State, ours: State, host: State) -> String {
    let operands: Vec<_> = i
        .op_kinds()
        .enumerate()
        .filter(|(_, k)| *k == OpKind::Register)
        .filter_map(|(n, _)| gpr_index(i.op_register(n as u32)))
        .chain([1])
        .map(|n| format!("{:#x}", before.0[n]))
        .collect();
    let changed: Vec<_> = (0..16)
        .filter(|n| ours.0[*n] != host.0[*n])
        .map(|n| format!("r{n} {:#x} not {:#x}", ours.0[n], host.0[n]))
        .collect();
    format!(
        "{i}: operands {operands:?} flags before {:#x} ours {:#x} host {:#x} {changed:?}",
        before.1, ours.1, host.1
    )
}

#[test]
fn integer_instructions_match_the_host() {
    let mut r = Random(0x9e37_79b9_7f4a_7c15);
    let mut buffer = CodeBuffer::new(3).unwrap();
    let mut cpu = machine(64);
    let mut seen = std::collections::BTreeMap::<String, u32>::new();
    let mut wrong = std::collections::BTreeMap::<String, Vec<String>>::new();
    let mut tried = 0;
    let amd = cpu.cpuid.vendor() == crate::Vendor::Amd;
    while tried < 60_000 {
        let bytes = candidate(&mut r);
        let Some(i) = acceptable(&bytes) else {
            continue;
        };
        tried += 1;
        for g in cpu.gpr.iter_mut() {
            *g = r.value();
        }
        let flags = r.next() & Rflags::ARITHMETIC.bits() | 2;
        cpu.rflags = Rflags::from_bits_retain(flags);
        let before = (cpu.gpr, flags);
        let (handler, _) = dispatch::resolve(&i, CpuMode::Bits64);
        match handler(&mut cpu, &mut EmptyBus, &i) {
            Ok(Flow::Next) => {}
            Ok(flow) => panic!("{i}: {flow:?}"),
            Err(_) => continue,
        }
        let ours = (cpu.gpr, cpu.rflags.bits() & Rflags::ARITHMETIC.bits());
        (cpu.gpr, cpu.rflags) = (before.0, Rflags::from_bits_retain(before.1));
        let mut host = native(&mut buffer, &cpu, &bytes[..i.len()]);
        // In the flags of these two AMD's processors differ from each other: Zen 3 changes ZF alone.
        if !amd || matches!(i.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr) {
            forgive_undefined(&i, &ours, &mut host);
        }
        let name = format!(
            "{:?} {}",
            i.mnemonic(),
            if ours.0 == host.0 { "flags" } else { "result" }
        );
        *seen.entry(format!("{:?}", i.mnemonic())).or_default() += 1;
        if ours != host {
            let examples: &mut Vec<String> = wrong.entry(name).or_default();
            if examples.len() < 5 {
                examples.push(describe(&i, before, ours, host));
            }
        }
    }
    println!("{seen:?}");
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen.len() > 90, "only {} instructions were met", seen.len());
}
