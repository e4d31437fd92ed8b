//! The guest's own instruction with another memory operand, byte by byte.
//!
//! Problem: a library that encodes any instruction takes longer for one than all else that is done for a memory access.
//! Idea: only the operand changes. Prefixes, opcode and immediate are copied; REX, ModRM and displacement are made anew.
//! Invariant: the outcome is what iced-x86 encodes; a test compares them. What is not of the plain form (VEX, EVEX, 32-bit addresses, no ModRM)
//! is left to it.

use iced_x86::{EncodingKind, Instruction};

use super::Reg;

/// An instruction's bytes.
#[derive(Default)]
pub(super) struct Bytes {
    bytes: [u8; 16],
    len: usize,
}

impl Bytes {
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
}

const REX_W: u8 = 8;
const REX_R: u8 = 4;

/// The instruction that `bytes` hold with `[base + disp]` for its memory operand and, where one is given, another register for
/// the one that ModRM.reg names.
pub(super) fn with_operand(
    i: &Instruction,
    bytes: &[u8],
    base: Reg,
    disp: i32,
    register: Option<Reg>,
) -> Option<Bytes> {
    if i.encoding() != EncodingKind::Legacy {
        return None;
    }
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
    let (r, reg) = match register {
        Some(register) => ((register >> 3) * REX_R, register & 7),
        None => (old_rex.unwrap_or(0) & REX_R, modrm >> 3 & 7),
    };
    let rex = old_rex.unwrap_or(0) & REX_W | r | base >> 3;
    if rex != 0 || old_rex.is_some() {
        out.push(0x40 | rex);
    }
    out.extend(opcode.get());
    operand(&mut out, reg, base, disp);
    out.extend(immediate);
    (out.len <= 15).then_some(out)
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

/// ModRM, SIB and displacement of `[base + disp]`.
fn operand(out: &mut Bytes, reg: u8, base: Reg, disp: i32) {
    let short = i8::try_from(disp);
    let mode = match short {
        Ok(0) if base & 7 != 5 => 0,
        Ok(_) => 1,
        Err(_) => 2,
    };
    out.push(mode << 6 | reg << 3 | base & 7);
    if base & 7 == 4 {
        out.push(0x24);
    }
    match (mode, short) {
        (0, _) => {}
        (1, Ok(short)) => out.push(short as u8),
        _ => out.extend(&disp.to_le_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Encoder, OpKind, Register};

    /// What the library makes of it, without redundant prefixes.
    fn encoded(i: &Instruction, base: Reg, disp: i32, register: Option<Reg>) -> Vec<u8> {
        let mut own = *i;
        super::super::memory::set_host_operand(&mut own, base, disp);
        for op in 0..own.op_count() {
            if let (OpKind::Register, Some(n)) = (own.op_kind(op), register) {
                let family = match own.op_register(op).size() {
                    8 => Register::RAX,
                    4 => Register::EAX,
                    2 => Register::AX,
                    _ => return Vec::new(),
                };
                own.set_op_register(op, family + u32::from(n));
            }
        }
        let mut encoder = Encoder::new(64);
        match encoder.encode(&own, 0) {
            Ok(_) => encoder.take_buffer(),
            Err(_) => Vec::new(),
        }
    }

    #[test]
    fn the_bytes_are_those_of_the_library() {
        let tails = [
            [0x04, 0x8b, 0x11, 0x22, 0x33, 0x44],
            [0x44, 0x24, 0x08, 0x22, 0x33, 0x44],
            [0x05, 0x10, 0x20, 0x30, 0x40, 0x55],
            [0x9d, 0x10, 0x20, 0x30, 0x40, 0x55],
            [0x13, 0x7f, 0x80, 0x30, 0x40, 0x55],
            [0x7c, 0x05, 0x80, 0x30, 0x40, 0x55],
        ];
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
        let mut compared = 0;
        for prefix in prefixes {
            for escape in [&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]] {
                for opcode in 0..=255 {
                    for tail in tails {
                        let bytes = [prefix, escape, &[opcode], &tail, &[1; 6]].concat();
                        compared += usize::from(compare(&bytes));
                    }
                }
            }
        }
        assert!(compared > 10_000, "{compared}");
    }

    fn compare(bytes: &[u8]) -> bool {
        let i = Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode();
        let memory = (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory);
        if i.is_invalid() || !memory || i.is_string_instruction() || i.is_vsib() {
            return false;
        }
        let mut compared = false;
        for (base, disp) in [(10, 0), (3, 127), (13, 0), (12, -129), (5, 0), (4, 4096)] {
            let scratch = (0..i.op_count()).any(|op| {
                i.op_kind(op) == OpKind::Register && super::super::is_scratch(i.op_register(op))
            });
            for register in [None, scratch.then_some(11)] {
                let Some(new) = with_operand(&i, &bytes[..i.len()], base, disp, register) else {
                    continue;
                };
                let library = encoded(&i, base, disp, register);
                if library.is_empty() || names_high_byte(&i) {
                    continue;
                }
                let ours = Decoder::with_ip(64, new.get(), 0, DecoderOptions::NONE).decode();
                let theirs = Decoder::with_ip(64, &library, 0, DecoderOptions::NONE).decode();
                assert_eq!(ours.len(), new.get().len(), "{bytes:x?}");
                assert_eq!(
                    ours,
                    theirs,
                    "{bytes:x?} {i}: {:x?} {library:x?}",
                    new.get()
                );
                compared = true;
            }
        }
        compared
    }

    fn names_high_byte(i: &Instruction) -> bool {
        (0..i.op_count()).any(|op| {
            i.op_kind(op) == OpKind::Register
                && super::super::memory::is_high_byte(i.op_register(op))
        })
    }
}
