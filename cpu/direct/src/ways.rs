//! Where decoding leads: whether some bytes in a page of code are an instruction, as the code before them tells.
//!
//! Problem: the bytes that are asked about (`hazard`) are often part of another instruction, and code does not say where its instructions begin.
//! Idea: x86 code decoded from a wrong byte falls into step within some instructions. So it is decoded from many bytes before; most starts lead to an instruction
//! that is one, and hardly any to one that is none. Where a way leads is kept for each byte that it comes by, since most ways meet.
//! Two kinds of answers: a vote ([`Walk::leads_to`]), and certainty ([`Walk::is_certain`]).
//! Cost: some 2 to 4 ns for each byte that something begins at, once ([`length`]).

use std::ops::RangeInclusive;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use crate::length::{self, Kind, LONGEST, Length};

/// How far before an instruction decoding starts, at most and at least: far enough to have fallen into step where there is so much before.
const STARTS: (usize, usize) = (160, 96);
/// Every so many bytes there is a start.
const STEP: usize = 4;
/// At least, where there is little.
pub(crate) const LEAST: usize = 12;
/// How far before a first glance starts: more than most code needs to fall into step, and a fraction of what all starts decode.
const GLANCE: [usize; 8] = [72, 67, 61, 56, 50, 45, 39, 34];
/// So many of them have to lead past.
const ENOUGH: usize = 3;
/// What is nearer to the beginning of a page has too little before it there to be judged alone.
pub(crate) const EARLY: usize = STARTS.1;
/// Starts, each a byte after the other, one of which at least begins an instruction of the code before: more than an instruction has bytes.
const ROW: usize = 2 * LONGEST;
/// How far before the byte the last of them is: as far as there is code, for the nearest have not yet fallen into step.
const NEAREST: [usize; 5] = [96, 64, 40, 16, 0];

/// Where decoding leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// To a common one.
    There,
    /// To something else.
    Past,
    /// Through what is no code of user programs.
    Nowhere,
}

/// Where decoding leads from the bytes before one: from the first on, and from no more than [`STARTS`] says.
struct Known {
    first: usize,
    ways: [Option<Way>; STARTS.0 + 1],
}

impl Known {
    fn from(first: usize) -> Self {
        let ways = [None; STARTS.0 + 1];
        Known { first, ways }
    }

    fn at(&mut self, at: usize) -> &mut Option<Way> {
        &mut self.ways[at - self.first]
    }
}

/// How many of the ways count.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Share {
    Any,
    Half,
}

/// Ways through code. What was decoded is kept: most ways are the same after some instructions.
pub(crate) struct Walk<'a> {
    code: &'a [u8],
    /// What begins at each byte, where that was asked.
    met: Vec<Option<Length>>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(code: &'a [u8]) -> Self {
        let met = Vec::new();
        Walk { code, met }
    }

    /// The mask in EDX:EAX, where the code right before the opcode sets it and then does nothing but store.
    pub(crate) fn mask_before(&mut self, at: usize) -> Option<u64> {
        /// Bytes before, that decoding starts at.
        const BEFORE: RangeInclusive<usize> = 64..=96;
        let starts = at.checked_sub(*BEFORE.end())?..=at - BEFORE.start();
        let start = { starts }.find(|start| self.way(*start, at) == Way::Past)?;
        let decoder = Decoder::with_ip(64, &self.code[start..], 0, DecoderOptions::NONE);
        let mut mask = Mask::default();
        let mut end = start;
        for instruction in decoder {
            end += instruction.len();
            if end > at {
                return mask.value().filter(|_| has_mask(instruction.mnemonic()));
            }
            mask.follow(&instruction);
        }
        None
    }

    /// True where decoding the code before leads to one at the byte, from so many of the starts.
    pub(crate) fn leads_to(&mut self, at: usize, share: Share) -> bool {
        let near = LEAST.max(STARTS.1.min(at / 2));
        if at < near {
            // Little is known of what comes before; perhaps nothing does.
            let (there, _) = self.votes(0..=at, 1, at);
            return self.way(0, at) == Way::There || 2 * there > at + 1;
        }
        if share == Share::Half && self.is_passed(at) {
            return false;
        }
        let starts = at.saturating_sub(STARTS.0)..=at - near;
        let (there, all) = self.votes(starts, STEP, at);
        match share {
            Share::Any => there > 0 || all == 0,
            Share::Half => there > 0 && 2 * there >= all,
        }
    }

    /// Whether an instruction's opcode is at the byte, for certain. Of [`ROW`] bytes of code in a row one at least begins an instruction, and decoding from
    /// that one stays in step: it comes here, or past. So where no way from all these leads past and one leads here, this is an instruction, if what lies between is code.
    /// `None` where no way leads anywhere, since there is no code before.
    pub(crate) fn is_certain(&mut self, at: usize) -> Option<bool> {
        NEAREST.iter().find_map(|nearest| {
            let end = at.checked_sub(*nearest)?;
            let starts = end.saturating_sub(ROW)..end;
            if starts.len() < LONGEST {
                return None;
            }
            let mut there = false;
            for start in starts {
                match self.arrives(start, at) {
                    Way::There => there = true,
                    Way::Past => return Some(false),
                    Way::Nowhere => {}
                }
            }
            there.then_some(true)
        })
    }

    /// Whether the opcode of the instruction that begins here is at the byte.
    fn is_opcode(&self, here: usize, at: usize) -> bool {
        self.code[here..at].iter().all(|byte| is_prefix(*byte))
    }

    /// Whether decoding comes to an instruction of which nothing but prefixes lies before the byte.
    fn arrives(&mut self, start: usize, at: usize) -> Way {
        let mut here = start;
        loop {
            let Length { bytes, kind } = self.instruction(here);
            let next = here + usize::from(bytes);
            if next > at {
                let there = self.is_opcode(here, at);
                return if there { Way::There } else { Way::Past };
            }
            if kind == Kind::NoCode {
                return Way::Nowhere;
            }
            here = next;
        }
    }

    /// A first glance from a few starts nearby: true where none leads there, and some lead past, as it is with nearly all that are part of an instruction. Before
    /// one that is an instruction itself, some of so many have fallen into step.
    fn is_passed(&mut self, at: usize) -> bool {
        let Some(first) = at.checked_sub(GLANCE[0]) else {
            return false;
        };
        let mut known = Known::from(first);
        let ways = GLANCE.map(|before| self.way_by(at - before, at, &mut known));
        let past = ways.iter().filter(|way| **way == Way::Past).count();
        past >= ENOUGH && !ways.contains(&Way::There)
    }

    /// How many of these starts lead there, and how many lead anywhere.
    fn votes(&mut self, starts: RangeInclusive<usize>, step: usize, at: usize) -> (usize, usize) {
        let mut known = Known::from(*starts.start());
        let (mut there, mut all) = (0, 0);
        for start in starts.step_by(step) {
            let way = self.way_by(start, at, &mut known);
            there += usize::from(way == Way::There);
            all += usize::from(way != Way::Nowhere);
        }
        (there, all)
    }

    fn way(&mut self, start: usize, at: usize) -> Way {
        self.way_by(start, at, &mut Known::from(start))
    }

    /// Where decoding leads, as it is known of an instruction on the way, or is then.
    fn way_by(&mut self, start: usize, at: usize, known: &mut Known) -> Way {
        let mut here = start;
        let way = loop {
            if let Some(way) = *known.at(here) {
                break way;
            }
            let Length { bytes, kind } = self.instruction(here);
            let next = here + usize::from(bytes);
            if next > at {
                let rest = &self.code[next.min(self.code.len())..];
                let there = kind == Kind::Common && self.is_opcode(here, at);
                break match there && goes_on(rest) {
                    true => Way::There,
                    false => Way::Past,
                };
            }
            if kind == Kind::NoCode {
                break Way::Nowhere;
            }
            here = next;
        };
        let (mut met, last) = (start, here);
        while met <= last {
            *known.at(met) = Some(way);
            met += usize::from(self.instruction(met).bytes);
        }
        way
    }

    fn instruction(&mut self, at: usize) -> Length {
        if self.met.is_empty() {
            self.met = vec![None; self.code.len()];
        }
        let code = &self.code[at..];
        *self.met[at].get_or_insert_with(|| length::decode(code))
    }
}

/// Legacy prefixes, and REX.
pub(crate) fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x40..=0x4f | 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

pub(crate) fn has_mask(mnemonic: Mnemonic) -> bool {
    use Mnemonic::{Xrstor, Xrstor64, Xsave, Xsave64, Xsavec, Xsavec64, Xsaveopt, Xsaveopt64};
    matches!(
        mnemonic,
        Xsave | Xsave64 | Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64 | Xrstor | Xrstor64
    )
}

/// EDX and EAX, as far as constants tell.
#[derive(Default)]
struct Mask {
    eax: Option<u32>,
    edx: Option<u32>,
}

impl Mask {
    fn follow(&mut self, i: &Instruction) {
        let constant = match (i.mnemonic(), i.op0_kind(), i.op1_kind()) {
            (Mnemonic::Mov, OpKind::Memory, _) => return,
            (Mnemonic::Mov, OpKind::Register, OpKind::Immediate32) => Some(i.immediate32()),
            (Mnemonic::Xor, OpKind::Register, OpKind::Register)
                if i.op0_register() == i.op1_register() =>
            {
                Some(0)
            }
            _ => None,
        };
        match (i.op0_register(), constant) {
            (Register::EAX, Some(_)) => self.eax = constant,
            (Register::EDX, Some(_)) => self.edx = constant,
            _ => *self = Mask::default(),
        }
    }

    fn value(&self) -> Option<u64> {
        Some(u64::from(self.edx?) << 32 | u64::from(self.eax?))
    }
}

/// True where what comes next is code as user programs have it, as far as it can be told: tables between code hardly ever are.
fn goes_on(code: &[u8]) -> bool {
    const INSTRUCTIONS: usize = 8;
    let decoder = Decoder::with_ip(64, code, 0, DecoderOptions::NONE);
    for i in decoder.into_iter().take(INSTRUCTIONS) {
        if i.is_invalid() {
            return i.len() == code.len() || code.len() < LONGEST;
        }
        let ends = [
            FlowControl::Return,
            FlowControl::UnconditionalBranch,
            FlowControl::IndirectBranch,
        ];
        if ends.contains(&i.flow_control()) {
            return true;
        }
    }
    true
}
