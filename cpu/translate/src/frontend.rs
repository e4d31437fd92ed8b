//! From guest memory to a list of decoded instructions: one block.
//!
//! A block begins anywhere, goes on after a conditional branch forwards that is not taken, ends at the first other instruction that
//! changes the control flow or that the monitor must execute, and never leaves its page. Instructions are decoded as if the page began at address 0, so that branch targets and RIP-relative addresses come out
//! relative to the page: that makes a block independent of where the guest maps it.

use iced_x86::{
    Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory,
    Mnemonic, Register,
};

use doppel_memory::Privilege;
use doppel_x86::{CpuidModel, HiddenInstructions, XCR0_PKRU};

pub(crate) use crate::classify::{Class, Element, Facts, has_memory};
use crate::engine::TranslateOptions;
use crate::flags::{ALL, FlagSet, FlagUse};
use crate::narrow::{Mode, widen};
use crate::rewrite::{Base, Reference, cannot_fault, constant_move, leaves_s0, reference};

/// Which instructions the guest's control registers let run: a part of a block's key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Simd {
    #[default]
    None,
    Sse,
    Avx,
    Avx512,
}

/// What decoding depends on of the guest's processor.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Processor {
    /// What the host's processor would execute otherwise.
    pub hidden: HiddenInstructions,
    /// LSTAR may hold an address that is not canonical now, at which SYSCALL ends: the processor has LA57.
    wide_lstar: bool,
    /// PKRU is among its state, and not where a save by the host's processor would look for it.
    emulated_state: bool,
}

impl Processor {
    pub fn of(model: &CpuidModel) -> Self {
        Processor {
            hidden: model.hidden(),
            wide_lstar: model.has_la57(),
            emulated_state: model.xcr0() & XCR0_PKRU != 0,
        }
    }
}

/// One of which no more is known.
impl From<HiddenInstructions> for Processor {
    fn from(hidden: HiddenInstructions) -> Self {
        Processor {
            hidden,
            ..Processor::default()
        }
    }
}

/// What decoding depends on besides the bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Decoding {
    pub simd: Simd,
    pub mode: Mode,
    /// RIP of the beginning of the page where that is [placed](Mode::is_placed).
    pub origin: u64,
    /// Not CPL 0.
    pub user: bool,
    pub flag_liveness: bool,
    pub inline_system: bool,
    /// As code on the virtual state too.
    pub inline_syscall: bool,
    pub inline_strings: bool,
    pub inline_xsave: bool,
    pub yield_spins: bool,
    /// Go on after a conditional branch forwards.
    pub extend: bool,
    /// What the host's processor would execute otherwise than the guest's.
    pub hidden: HiddenInstructions,
}

impl Decoding {
    /// For code that runs with this vector state and at this [`Privilege`].
    pub fn new(
        processor: Processor,
        simd: Simd,
        mode: Mode,
        privilege: u8,
        options: &TranslateOptions,
    ) -> Self {
        Decoding {
            simd,
            mode,
            origin: 0,
            user: privilege == Privilege::User as u8 || mode.middle,
            flag_liveness: options.flag_liveness,
            inline_system: options.inline_system,
            inline_syscall: !processor.wide_lstar,
            inline_strings: options.inline_strings,
            inline_xsave: options.inline_xsave && !processor.emulated_state,
            yield_spins: options.yield_spins,
            extend: options.extend,
            hidden: processor.hidden,
        }
    }

    /// The same for a block that is keyed by this.
    pub fn placed(self, base: Base) -> Self {
        match base {
            Base::Fixed(origin) => Decoding { origin, ..self },
            Base::Dynamic => self,
        }
    }
}

/// One guest instruction of a block.
#[derive(Clone, Debug)]
pub(crate) struct GuestInstruction {
    pub decoded: Instruction,
    /// Offset in its page.
    pub offset: u16,
    pub class: Class,
    /// It uses x87 or vector registers, and is not left to the monitor.
    pub simd: bool,
    pub flags: FlagUse,
    /// General registers that it may write, a bit each.
    pub writes: u16,
    /// General registers that it names or uses, a bit each.
    pub uses: u16,
    pub live_before: FlagSet,
    pub live_after: FlagSet,
    /// Its memory access, where others off the same base may share its check.
    pub reference: Option<Reference>,
    /// General registers that it moves by a constant, and by how much.
    pub moves: (u16, i64),
    /// Bytes that it pushes or pops, or of the near address that it goes to.
    pub word: u8,
    /// It is not of 64-bit mode.
    pub narrow: bool,
    /// Its addresses, or its counter, have 16 bits.
    pub short: bool,
    /// The host's bytes for it are not the guest's.
    pub encode: bool,
    /// It computes in general registers only.
    pub cannot_fault: bool,
    /// Its translation leaves S0 as the address of its own access, or alone.
    pub leaves_s0: bool,
}

impl GuestInstruction {
    /// To be decoded in place: it is large, and the processor is slow to copy what was just written in pieces.
    fn blank() -> Self {
        GuestInstruction {
            decoded: Instruction::default(),
            offset: 0,
            class: Class::Nothing,
            simd: false,
            flags: FlagUse::default(),
            writes: 0,
            uses: 0,
            live_before: ALL,
            live_after: ALL,
            reference: None,
            moves: (0, 0),
            word: 8,
            narrow: false,
            short: false,
            encode: false,
            cannot_fault: false,
            leaves_s0: false,
        }
    }

    /// Fills in what is known of what was decoded.
    fn learn(&mut self, info: &mut InstructionInfoFactory, code: &[u8], how: Decoding) {
        let hidden = how.hidden.has(&self.decoded);
        self.narrow = how.mode.is_narrow();
        let widened = self
            .narrow
            .then(|| widen(&mut self.decoded, how.mode, how.origin));
        if let Some(Some(w)) = widened {
            (self.encode, self.word, self.short) = (w.encode, w.word, w.short);
        }
        let mut facts = match widened {
            Some(None) => Facts::interpreted(info, &self.decoded),
            _ => Facts::of(info, &self.decoded, how),
        };
        let branch = facts.class.ends_block() && !self.narrow;
        let others = branch && is_makers_branch(&self.decoded, code);
        if hidden || others || self.narrow && !self.may_be_translated(facts.class, how) {
            facts = Facts::interpreted(info, &self.decoded);
        }
        self.offset = self.decoded.ip() as u16;
        self.class = facts.class;
        self.simd = facts.simd;
        self.flags = facts.flags;
        self.writes = facts.writes;
        self.uses = facts.uses;
        self.reference = reference(self).filter(|_| !self.narrow || how.mode.flat && !self.short);
        self.moves = constant_move(self);
        self.cannot_fault = cannot_fault(self);
        self.leaves_s0 = leaves_s0(self);
    }

    /// False for what the translation of a class does otherwise than this instruction in narrow code.
    fn may_be_translated(&self, class: Class, how: Decoding) -> bool {
        let d = &self.decoded;
        // Where it is not to be written, and perhaps not to be read.
        let code = accesses_code_segment(d, class) && how.mode.flat;
        // What it leaves above SP is the moved stack pointer's.
        let stack = matches!(class, Class::Pop)
            && self.word < how.mode.stack()
            && d.op0_register() == Register::RSP;
        // Its address wraps after the bit offset was added.
        let bits = matches!(class, Class::BitString) && self.short;
        !code && !stack && !bits
    }

    /// True where the emitted code may leave to the monitor before the instruction is done.
    pub fn may_leave(&self) -> bool {
        match self.class {
            Class::Copy => !self.always_completes(),
            Class::Lea
            | Class::Nothing
            | Class::ReadSelector
            | Class::ReadControl
            | Class::DirectionFlag
            | Class::Rdpid
            | Class::Swapgs => false,
            _ => true,
        }
    }

    /// It touches general registers alone, and the processor raises no exception.
    fn always_completes(&self) -> bool {
        let d = &self.decoded;
        let divides = matches!(d.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        !divides && !d.has_lock_prefix() && !self.simd
    }
}

/// A decoded block.
#[derive(Default)]
pub(crate) struct GuestBlock {
    pub instructions: Vec<GuestInstruction>,
    /// The bytes from the start of the block on.
    pub bytes: Vec<u8>,
    /// Offset of the start in its page.
    pub start: u16,
    /// Offset one past the end; may lie beyond the page where the only instruction straddles it.
    pub end: u16,
    /// The next instruction begins in this page and ends in the next.
    pub straddler_follows: bool,
    /// Some instruction that is not left to the monitor uses x87 or vector registers.
    pub simd: bool,
}

impl GuestBlock {
    /// True where the block writes memory in an instruction that must be atomic, or that under a mask writes some of its bytes alone: the others may
    /// be somebody else's.
    pub fn must_write_in_place(&self) -> bool {
        self.instructions.iter().any(|i| {
            let d = &i.decoded;
            let writes = matches!(i.class, Class::Memory { write: true, .. });
            let masked = writes && d.op_mask() != Register::None;
            d.has_lock_prefix() || d.mnemonic() == Mnemonic::Xchg || masked
        })
    }

    /// The bytes of one of its instructions.
    pub fn bytes_of(&self, i: &GuestInstruction) -> &[u8] {
        let from = usize::from(i.offset - self.start);
        &self.bytes[from..from + i.decoded.len()]
    }

    /// True where it may go on behind the first `len` bytes.
    pub fn ran_out(&self, len: usize) -> bool {
        let ended = self
            .instructions
            .last()
            .is_some_and(|last| last.class.ends_block());
        self.straddler_follows || (!ended && usize::from(self.end - self.start) == len)
    }

    /// Cuts the block after its first instruction.
    pub fn keep_first(&mut self, flag_liveness: bool) {
        self.instructions.truncate(1);
        if let Some(first) = self.instructions.first_mut() {
            self.end = first.offset + first.decoded.len() as u16;
            self.simd = first.simd;
            if matches!(first.class, Class::Sti) {
                first.class = Class::Interpret;
            }
            first.live_after = ALL;
            if flag_liveness {
                first.live_before = first.flags.live_before(ALL);
            }
        }
        self.bytes.truncate(usize::from(self.end - self.start));
        self.straddler_follows = false;
    }
}

/// Instructions in a block at most.
const MOST_INSTRUCTIONS: usize = 48;

/// Bytes of guest code that a block can be made from at most.
pub(crate) const MOST_BYTES: usize = MOST_INSTRUCTIONS * 15;

/// Conditional branches that a block goes on after at most.
const MOST_SIDE_EXITS: usize = 4;

/// Decodes one block from `bytes`, which begin at `start` in the page and go to its end (or 15 bytes on, for
/// one instruction that straddles), or are [`MOST_BYTES`] at least. `None` where not even one instruction fits.
pub(crate) fn decode(
    info: &mut InstructionInfoFactory,
    bytes: &[u8],
    start: u16,
    how: Decoding,
) -> Option<GuestBlock> {
    let mut block = GuestBlock::default();
    block.decode(info, bytes, start, how).then_some(block)
}

impl GuestBlock {
    /// The same into a block that is done with, for its buffers; false where not even one instruction fits.
    pub fn decode(
        &mut self,
        info: &mut InstructionInfoFactory,
        bytes: &[u8],
        start: u16,
        how: Decoding,
    ) -> bool {
        self.instructions.clear();
        self.bytes.clear();
        (self.start, self.end, self.straddler_follows) = (start, start, false);
        let at = u64::from(start);
        // Used where it is made: it is large.
        let mut made = Decoder::try_with_ip(how.mode.bits(), bytes, at, DecoderOptions::NONE);
        let Ok(decoder) = &mut made else {
            return false;
        };
        let mut side_exits = 0;
        while self.instructions.len() < MOST_INSTRUCTIONS && decoder.can_decode() {
            self.instructions.push(GuestInstruction::blank());
            let Some(i) = self.instructions.last_mut() else {
                break;
            };
            decoder.decode_out(&mut i.decoded);
            if i.decoded.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                self.instructions.pop();
                self.straddler_follows = true;
                break;
            }
            let begin = i.decoded.ip() as usize - usize::from(start);
            i.learn(info, &bytes[begin..], how);
            self.end = i.decoded.next_ip() as u16;
            let goes_on =
                matches!(i.class, Class::Conditional) && how.extend && forwards(&i.decoded);
            if goes_on && side_exits < MOST_SIDE_EXITS {
                side_exits += 1;
            } else if i.class.ends_block() {
                break;
            }
        }
        let Some(last) = self.instructions.last_mut() else {
            return false;
        };
        if matches!(last.class, Class::Sti) {
            // Its shadow reaches into the next block: the interpreter knows how.
            last.class = Class::Interpret;
        }
        let len = usize::from(self.end - start);
        self.bytes.extend_from_slice(&bytes[..len]);
        self.simd = self.instructions.iter().any(|i| i.simd);
        if how.flag_liveness {
            liveness(&mut self.instructions);
        }
        true
    }
}

/// Of 64-bit code: a near branch with an operand-size prefix: Intel's processors ignore that, AMD's cut the target to 16 bits. Which of
/// them the guest has the interpreter knows, and the host's must not execute it in a translation.
fn is_makers_branch(i: &Instruction, code: &[u8]) -> bool {
    const OPERAND_SIZE: u8 = 0x66;
    const REX_W: u8 = 0x48;
    if i.flow_control() == FlowControl::Next {
        return false;
    }
    let is_prefix = |b: &&u8| matches!(**b, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    let prefixes = code[..i.len().min(code.len())].iter().take_while(is_prefix);
    let (mut prefixed, mut wide) = (false, false);
    for prefix in prefixes {
        prefixed |= *prefix == OPERAND_SIZE;
        wide = prefix & 0xf8 == REX_W;
    }
    prefixed && !wide
}

fn liveness(instructions: &mut [GuestInstruction]) {
    let mut live = ALL;
    for i in instructions.iter_mut().rev() {
        if matches!(i.class, Class::Conditional) {
            live = ALL; // nobody knows of the other way
        }
        i.live_after = live;
        live = i.flags.live_before(live);
        i.live_before = live;
    }
}

fn accesses_code_segment(i: &Instruction, class: Class) -> bool {
    let accesses = has_memory(i) && !matches!(class, Class::Lea | Class::Nothing);
    accesses && i.memory_segment() == Register::CS
}

fn forwards(i: &Instruction) -> bool {
    i.near_branch64() as i64 > i.ip() as i64
}
