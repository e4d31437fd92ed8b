//! An instruction with another memory operand, byte by byte.
//!
//! Problem: a library that encodes any instruction takes longer for one than all else that is done for a memory access, and keeps tables of
//! 0.7 MiB once it has encoded one.
//! Idea: only the operand changes. Prefixes, opcode and immediate are copied; REX (or what VEX and EVEX have of it), ModRM and displacement are
//! made anew. Displacements of EVEX are scaled by what the opcode says, so there they are long ones.
//! Invariant: the outcome is what iced-x86 encodes; a test compares them. What is not of the plain form (32-bit addresses, no ModRM, XOP) is left
//! to it.

use iced_x86::{CodeSize, EncodingKind, Instruction, Mnemonic};

/// Number of a general register.
type Reg = u8;

/// An instruction's bytes.
#[derive(Default)]
pub struct Bytes {
    bytes: [u8; 16],
    len: usize,
}

impl Bytes {
    /// All of them.
    #[must_use]
    pub fn get(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.len) {
            *place = byte;
        }
        self.len += 1;
    }

    fn extend(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.push(*byte);
        }
    }

    /// As they are, if the processor takes so many.
    fn finish(self) -> Option<Bytes> {
        (self.len <= LONGEST).then_some(self)
    }
}

/// Bytes of the longest instruction.
const LONGEST: usize = 15;

/// The memory operand that an instruction gets, and what becomes of its registers.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    /// The register that holds the address.
    pub base: Reg,
    /// Added to it.
    pub disp: i32,
    /// The general registers of a set, a bit each, become another in the other operands; without VEX that is the one that ModRM.reg names, whatever
    /// the set says.
    pub renamed: Option<(u16, Reg)>,
}

/// The instruction that `bytes` hold with `operand` for its memory operand.
#[must_use]
pub fn with_operand(i: &Instruction, bytes: &[u8], operand: Operand) -> Option<Bytes> {
    let is_plain = i.code_size() == CodeSize::Code64 && !i.is_vsib() && !is_of_tiles(i);
    match i.encoding() {
        EncodingKind::Legacy => legacy(bytes, operand),
        EncodingKind::VEX if is_plain => vex(bytes, operand),
        EncodingKind::EVEX if is_plain && operand.renamed.is_none() => evex(bytes, operand),
        _ => None,
    }
}

/// The index of these is no part of an address.
fn is_of_tiles(i: &Instruction) -> bool {
    matches!(
        i.mnemonic(),
        Mnemonic::Tileloadd | Mnemonic::Tileloaddt1 | Mnemonic::Tilestored
    )
}

const REX_W: u8 = 8;
const REX_R: u8 = 4;

fn legacy(bytes: &[u8], operand: Operand) -> Option<Bytes> {
    let Operand {
        base,
        disp,
        renamed,
    } = operand;
    let mut out = Bytes::default();
    let mut rest = bytes.iter().copied().peekable();
    let mut old_rex = None;
    while let Some(prefix) = rest.next_if(|b| is_prefix(*b) || is_rex(*b)) {
        // A REX that is not the last prefix means nothing.
        old_rex = is_rex(prefix).then_some(prefix);
        match prefix {
            0x67 => return None,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65 | 0x40..=0x4f => {}
            _ => out.push(prefix),
        }
    }
    let mut opcode = Bytes::default();
    let first = rest.next()?;
    opcode.push(first);
    if first == 0x0f {
        let second = rest.next()?;
        opcode.push(second);
        if matches!(second, 0x38 | 0x3a) {
            opcode.push(rest.next()?);
        }
    } else if matches!(first, 0xa0..=0xa3) {
        return None;
    }
    let modrm = rest.next()?;
    let skip = operand_len(modrm, rest.peek().copied())?;
    let immediate = bytes.get(bytes.len() - rest.len() + skip..)?;
    let (r, reg) = match renamed {
        Some((_, register)) => ((register >> 3) * REX_R, register & 7),
        None => (old_rex.unwrap_or(0) & REX_R, modrm >> 3 & 7),
    };
    let rex = old_rex.unwrap_or(0) & REX_W | r | base >> 3;
    if rex != 0 || old_rex.is_some() {
        out.push(0x40 | rex);
    }
    out.extend(opcode.get());
    put_operand(&mut out, reg, base, disp, false);
    out.extend(immediate);
    out.finish()
}

/// In VEX and EVEX these bits are inverted.
const R: u8 = 0x80;
const X: u8 = 0x40;
const B: u8 = 0x20;

/// What the second byte of the long form of VEX is where the short form would do, but for R.
const SHORT: u8 = X | B | 1;

fn vex(bytes: &[u8], operand: Operand) -> Option<Bytes> {
    let (mut first, mut second, rest) = match *without_segments(bytes)? {
        [0xc5, only, ref rest @ ..] => (only & R | SHORT, only & !R, rest),
        [0xc4, first, second, ref rest @ ..] => (first, second, rest),
        _ => return None,
    };
    let &[opcode, modrm, ref rest @ ..] = rest else {
        return None;
    };
    let immediate = rest.get(operand_len(modrm, rest.first().copied())?..)?;
    let mut reg = modrm >> 3 & 7;
    if let Some((set, register)) = operand.renamed {
        let is_in = |n: u8| set >> n & 1 != 0;
        // Where ModRM.reg is a part of the opcode (BLSR and its like), only VEX.vvvv names a register.
        let is_group = first & 0x1f == 2 && opcode == 0xf3;
        if !is_group && is_in(reg | (!first & R) >> 4) {
            reg = register & 7;
            first = first & !R | (!register << 4) & R;
        }
        if is_in(!second >> 3 & 15) {
            second = second & !(15 << 3) | (!register & 15) << 3;
        }
    }
    first = with_base(first, operand.base);
    let mut out = Bytes::default();
    if first | R == SHORT | R && second & 0x80 == 0 {
        out.extend(&[0xc5, first & R | second]);
    } else {
        out.extend(&[0xc4, first, second]);
    }
    out.push(opcode);
    put_operand(&mut out, reg, operand.base, operand.disp, false);
    out.extend(immediate);
    out.finish()
}

fn evex(bytes: &[u8], operand: Operand) -> Option<Bytes> {
    let rest = without_segments(bytes)?;
    let &[0x62, first, second, third, opcode, modrm, ref rest @ ..] = rest else {
        return None;
    };
    let immediate = rest.get(operand_len(modrm, rest.first().copied())?..)?;
    let mut out = Bytes::default();
    let first = with_base(first, operand.base);
    out.extend(&[0x62, first, second, third, opcode]);
    let reg = modrm >> 3 & 7;
    put_operand(&mut out, reg, operand.base, operand.disp, true);
    out.extend(immediate);
    out.finish()
}

/// No index, and this base.
fn with_base(byte: u8, base: Reg) -> u8 {
    let b = if base < 8 { B } else { 0 };
    byte & !B | X | b
}

/// What follows prefixes that only name a segment; `None` where there are others.
fn without_segments(bytes: &[u8]) -> Option<&[u8]> {
    let is_segment = |b: &u8| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64 | 0x65);
    let first = bytes.iter().position(|b| !is_segment(b))?;
    bytes.get(first..)
}

fn is_prefix(b: u8) -> bool {
    matches!(
        b,
        0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3
    )
}

fn is_rex(b: u8) -> bool {
    b & 0xf0 == 0x40
}

/// Bytes of SIB and displacement.
fn operand_len(modrm: u8, sib: Option<u8>) -> Option<usize> {
    let (mode, rm) = (modrm >> 6, modrm & 7);
    let has_sib = usize::from(rm == 4);
    let no_base = rm == 5 || (rm == 4 && sib? & 7 == 5);
    Some(match mode {
        0 if no_base => has_sib + 4,
        0 => has_sib,
        1 => has_sib + 1,
        2 => has_sib + 4,
        _ => return None,
    })
}

/// ModRM, SIB and displacement of `[base + disp]`; the last is of no byte or, where it is scaled, of four.
fn put_operand(out: &mut Bytes, reg: u8, base: Reg, disp: i32, scaled: bool) {
    let short = i8::try_from(disp).ok().filter(|d| !scaled || *d == 0);
    let mode = match short {
        Some(0) if base & 7 != 5 => 0,
        Some(_) => 1,
        None => 2,
    };
    out.push(mode << 6 | reg << 3 | base & 7);
    if base & 7 == 4 {
        out.push(0x24);
    }
    match (mode, short) {
        (0, _) => {}
        (1, Some(short)) => out.push(short as u8),
        _ => out.extend(&disp.to_le_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Encoder, OpKind, Register};

    /// The scratch registers of the translator.
    const SET: u16 = 1 << 10 | 1 << 11;

    /// The number of a general register.
    fn number(r: Register) -> Option<u32> {
        let is_high = matches!(r, Register::AH | Register::BH | Register::CH | Register::DH);
        (r.is_gpr() && !is_high).then(|| r.number() as u32)
    }

    fn is_in_set(r: Register) -> bool {
        number(r).is_some_and(|n| SET >> n & 1 != 0)
    }

    fn registers(i: &Instruction) -> impl Iterator<Item = (u32, Register)> + '_ {
        let all = (0..i.op_count()).filter(|op| i.op_kind(*op) == OpKind::Register);
        all.map(|op| (op, i.op_register(op)))
    }

    /// What the library makes of it, without redundant prefixes.
    fn encoded(i: &Instruction, operand: Operand) -> Vec<u8> {
        let mut own = *i;
        own.set_segment_prefix(Register::None);
        own.set_memory_base(Register::RAX + u32::from(operand.base));
        own.set_memory_index(Register::None);
        own.set_memory_index_scale(1);
        own.set_memory_displacement64(operand.disp as i64 as u64);
        own.set_memory_displ_size(match i8::try_from(operand.disp) {
            Ok(0) => 0,
            Ok(_) => 1,
            Err(_) => 8,
        });
        for (op, r) in registers(i) {
            if let (true, Some((_, to))) = (is_in_set(r), operand.renamed) {
                let family = match r.size() {
                    8 => Register::RAX,
                    4 => Register::EAX,
                    2 => Register::AX,
                    _ => return Vec::new(),
                };
                own.set_op_register(op, family + u32::from(to));
            }
        }
        let mut encoder = Encoder::new(64);
        match encoder.encode(&own, 0) {
            Ok(_) => encoder.take_buffer(),
            Err(_) => Vec::new(),
        }
    }

    const TAILS: [[u8; 6]; 6] = [
        [0x04, 0x8b, 0x11, 0x22, 0x33, 0x44],
        [0x44, 0x24, 0x08, 0x22, 0x33, 0x44],
        [0x05, 0x10, 0x20, 0x30, 0x40, 0x55],
        [0x9d, 0x10, 0x20, 0x30, 0x40, 0x55],
        [0x13, 0x7f, 0x80, 0x30, 0x40, 0x55],
        [0x7c, 0x05, 0x80, 0x30, 0x40, 0x55],
    ];

    /// How many instructions were compared, with each opcode behind each of these.
    fn compare_all<'a>(heads: impl IntoIterator<Item = &'a [u8]>) -> usize {
        let mut compared = 0;
        for head in heads {
            for opcode in 0..=255 {
                for tail in TAILS {
                    let bytes = [head, &[opcode], &tail, &[1; 6]].concat();
                    compared += usize::from(compare(&bytes));
                }
            }
        }
        compared
    }

    #[test]
    fn the_bytes_are_those_of_the_library() {
        let prefixes: [&[u8]; 8] = [
            &[],
            &[0x66],
            &[0x48],
            &[0x65, 0x4f],
            &[0x66, 0x45],
            &[0xf0],
            &[0xf2],
            &[0xf3, 0x41],
        ];
        let escapes: [&[u8]; 4] = [&[], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]];
        let heads = prefixes.map(|prefix| escapes.map(|escape| [prefix, escape].concat()));
        let compared = compare_all(heads.iter().flatten().map(Vec::as_slice));
        assert!(compared > 10_000, "{compared}");
    }

    #[test]
    fn vex_and_evex_are_as_the_library_has_them() {
        // R, vvvv, L and pp; with r10, r11 and others in vvvv.
        let low = [0x78, 0x79, 0x7d, 0xe2, 0x57, 0xcf, 0xd5, 0x28];
        let mut heads = Vec::new();
        for low in low {
            heads.push(vec![0xc5, low]);
            heads.push(vec![0x64, 0xc5, low | 0x80]);
            for map in [1, 2, 3] {
                for rxb in [0xe0, 0x40, 0x80, 0x20] {
                    heads.push(vec![0xc4, rxb | map, low]);
                    heads.push(vec![0xc4, rxb | map, low | 0x80]);
                }
            }
        }
        let compared = compare_all(heads.iter().map(Vec::as_slice));
        assert!(compared > 5_000, "{compared}");
        let mut heads = Vec::new();
        for map in [1, 2, 3, 5, 6] {
            for rxb in [0xf0, 0x40, 0x90, 0x20] {
                for second in [0x7d, 0xfd, 0x7c, 0xfe, 0x2e, 0x55] {
                    for third in [0x08, 0x28, 0x48, 0x4f, 0xc9, 0x58, 0x30] {
                        heads.push(vec![0x62, rxb | map, second, third]);
                    }
                }
            }
        }
        let compared = compare_all(heads.iter().map(Vec::as_slice));
        assert!(compared > 5_000, "{compared}");
    }

    fn compare(bytes: &[u8]) -> bool {
        let i = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
        let memory = (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory);
        if i.is_invalid() || !memory || i.is_string_instruction() || i.is_vsib() {
            return false;
        }
        let mut compared = false;
        for (base, disp) in [(10, 0), (3, 127), (13, 0), (12, -129), (5, 0), (4, 4096)] {
            let renamed = registers(&i).any(|(_, r)| is_in_set(r));
            for renamed in [None, renamed.then_some((SET, 11))] {
                compared |= compare_one(
                    &i,
                    bytes,
                    Operand {
                        base,
                        disp,
                        renamed,
                    },
                );
            }
        }
        compared
    }

    fn compare_one(i: &Instruction, bytes: &[u8], operand: Operand) -> bool {
        let Some(new) = with_operand(i, &bytes[..i.len()], operand) else {
            return false;
        };
        let library = encoded(i, operand);
        let names_high_byte = registers(i).any(|(_, r)| r.is_gpr() && number(r).is_none());
        if library.is_empty() || names_high_byte {
            return false;
        }
        let decoded = |bytes: &[u8]| {
            let mut i = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
            // How long it is written is no part of what is compared.
            i.set_memory_displ_size(8);
            i
        };
        let (ours, theirs) = (decoded(new.get()), decoded(&library));
        assert_eq!(ours.len(), new.get().len(), "{bytes:x?}");
        let shown = new.get();
        assert_eq!(ours, theirs, "{bytes:x?} {i}: {shown:x?} {library:x?}");
        true
    }
}
