//! A program: instructions, with labels for what jumps.

use crate::layout::{CODE_ROOM, UD2};
use iced_x86::{Decoder, DecoderOptions, Encoder, Formatter, Instruction, IntelFormatter, OpKind};

/// One instruction.
#[derive(Clone, Debug)]
pub struct Item {
    pub instruction: Instruction,
    /// Bytes put before the encoded instruction: prefixes that it does not need.
    pub prefix: Vec<u8>,
    /// The label that it jumps to, or whose address it takes.
    pub label: Option<usize>,
}

impl Item {
    /// An instruction that names no label.
    pub fn plain(instruction: Instruction) -> Self {
        Item {
            instruction,
            prefix: Vec::new(),
            label: None,
        }
    }
}

/// Instructions in order; the program ends with UD2 after the last.
#[derive(Clone, Debug, Default)]
pub struct Program {
    pub items: Vec<Item>,
    /// The item before which each label stands.
    pub labels: Vec<usize>,
}

impl Program {
    /// The program without one item.
    pub fn without(&self, n: usize) -> Program {
        let mut p = self.clone();
        p.items.remove(n);
        for label in &mut p.labels {
            *label -= usize::from(*label > n);
        }
        p
    }

    /// Its bytes where it begins at `rip`; `None` where it is too long or a branch does not reach.
    pub fn assemble(&self, rip: u64) -> Option<Vec<u8>> {
        let mut places = vec![rip; self.items.len() + 1];
        let mut bytes = Vec::new();
        // Lengths do not depend on targets: one round to place the items, one to emit them.
        for _ in 0..2 {
            bytes.clear();
            for (n, item) in self.items.iter().enumerate() {
                places[n] = rip + bytes.len() as u64;
                let target = item.label.map(|l| places[self.labels[l]]);
                bytes.extend(encode(item, places[n], target)?);
            }
            places[self.items.len()] = rip + bytes.len() as u64;
        }
        bytes.extend(UD2);
        (bytes.len() as u64 <= CODE_ROOM).then_some(bytes)
    }
}

fn encode(item: &Item, at: u64, target: Option<u64>) -> Option<Vec<u8>> {
    let mut i = item.instruction;
    if let Some(target) = target {
        match i.op0_kind() {
            OpKind::NearBranch64 => i.set_near_branch64(target),
            _ => i.set_memory_displacement64(target),
        }
    }
    let at = at + item.prefix.len() as u64;
    let mut encoder = Encoder::new(64);
    encoder.encode(&i, at).ok()?;
    let mut bytes = item.prefix.clone();
    bytes.extend(encoder.take_buffer());
    (bytes.len() <= 15).then_some(bytes)
}

/// The instructions of some bytes.
pub fn decode(bytes: &[u8], rip: u64) -> Vec<Instruction> {
    Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE)
        .into_iter()
        .collect()
}

/// One line for each instruction.
pub fn disassemble(bytes: &[u8], rip: u64) -> String {
    let mut formatter = IntelFormatter::new();
    let mut text = String::new();
    for i in decode(bytes, rip) {
        let at = (i.ip() - rip) as usize;
        let raw: String = bytes[at..at + i.len()]
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let mut line = String::new();
        formatter.format(&i, &mut line);
        text += &format!("  {:#x}  {raw:<24} {line}\n", i.ip());
    }
    text
}
