//! Predecoded blocks: the common instructions of 64-bit code, a handful at a time.
//!
//! Problem: between two instructions, [`step`](super::step) finds out again what cannot have changed (the mode, the page, breakpoints,
//! shadows), and a handler that serves every operand of every mode decides more than it computes. That is most of its time.
//!
//! Idea: a *block* is a run of instructions on one page, each resolved to a function for its operation, operand size and
//! operand places ([`Op`]). The functions know registers, arithmetic flags and RAM that the TLB knows: nothing
//! that they change is a condition of their own execution, so those conditions ([`allowed`]) are checked once for many blocks.
//!
//! Invariant: a function either executes its instruction whole or changes nothing and says [`Go::Bail`]; then, as for every
//! instruction that has no function here, the interpreter proper executes it from its beginning. So faults, devices, accesses
//! across pages and all that is sensitive have one implementation, and this one can be left out ([`super::Interpret::set_quick`]).
//! A block is keyed by guest physical address and compared with the bytes in memory every time that it is entered;
//! within it, an instruction that stores to the page that the block lies on is the last ([`Go::Stop`]): comparing host addresses
//! catches every alias. Where code pages lie is asked of the same code TLB as ever, which every flush empties.
//!
//! Cost: 3 MiB per CPU, up to 24 where the guest executes so much code that blocks drive each other out, and a decoding per block that is met
//! the first time or has changed.

mod handlers;
mod lookup;
mod operand;

use std::sync::atomic::{AtomicBool, Ordering};

use doppel_memory::{HostPtr, PAGE_MASK, Privilege};
use iced_x86::{Decoder, Instruction};

use super::decode::{Past, code_address};
use crate::{Cpu, CpuMode, Cr0, HiddenInstructions, Rflags};
#[cfg(test)]
pub(super) use lookup::{ends_block, lookup};

/// Instructions of a block at most.
const OPS: usize = 10;
/// Words of code of a block at most.
const WORDS: usize = 6;
/// Blocks that are remembered at first, and at most; powers of two.
const BLOCKS: usize = 1 << 13;
const BLOCKS_MAX: usize = 1 << 16;
/// For each block that is remembered, so many are predecoded before twice as many are.
const WORN: usize = 8;

/// What an [`Op`] led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Go {
    /// Executed; the next instruction follows.
    Next,
    /// Executed; RIP is where execution goes on.
    Jump,
    /// Executed; the block may have changed.
    Stop,
    /// Not executed, nothing changed.
    Bail,
}

/// A function that executes one instruction. RIP is that of the block's beginning.
pub(super) type Run = fn(&mut Cpu, &Op, &Context) -> Go;

/// One instruction, resolved.
#[derive(Clone, Copy)]
pub(super) struct Op {
    run: Run,
    /// The immediate, sign extended; of a branch the target, relative to the block.
    immediate: i64,
    /// The displacement; of a RIP-relative operand relative to the block.
    displacement: i64,
    target: u8,
    source: u8,
    base: u8,
    index: u8,
    shift: u8,
    address: operand::Address,
    /// Where the instruction begins and ends, relative to the block.
    begin: u8,
    end: u8,
}

/// What does not change while blocks run, and the page that the current one lies on.
pub(super) struct Context {
    /// Of data accesses.
    privilege: Privilege,
    page: CodePage,
}

struct CodePage {
    linear: u64,
    gpa: u64,
    host: HostPtr,
}

impl CodePage {
    /// The page of RIP, where the code TLB knows it and it is RAM.
    fn of(cpu: &Cpu, rip: u64) -> Option<Self> {
        let linear = rip & !PAGE_MASK;
        let gpa = code_address(cpu, linear)?;
        let host = cpu.ram.ptr(gpa)?;
        Some(CodePage { linear, gpa, host })
    }
}

// A header of one cache line, then the instructions.
#[repr(C, align(64))]
struct Block {
    gpa: u64,
    /// Instructions; 0 where the first is for the interpreter proper.
    count: u8,
    words: u8,
    /// Bits of the last word that do not matter.
    shift: u8,
    code: [u64; WORDS],
    ops: [Op; OPS],
}

/// The blocks of one CPU.
pub(crate) struct Blocks {
    blocks: Vec<Block>,
    /// Predecoded since there are so many.
    predecoded: usize,
    decoder_options: u32,
    hidden: HiddenInstructions,
}

/// A block that was executed, or its first `count` instructions.
#[derive(Clone, Copy)]
pub(super) struct Ran {
    rip: u64,
    slot: u32,
    count: u32,
}

impl Block {
    fn empty() -> Self {
        Block {
            gpa: u64::MAX,
            count: 0,
            words: 0,
            shift: 0,
            code: [0; WORDS],
            ops: [Op::none(); OPS],
        }
    }

    fn matches(&self, gpa: u64, p: HostPtr) -> bool {
        self.gpa == gpa && p.holds(&self.code[..usize::from(self.words)], self.shift.into())
    }
}

impl Op {
    fn none() -> Self {
        Op {
            run: |_, _, _| Go::Bail,
            immediate: 0,
            displacement: 0,
            target: 0,
            source: 0,
            base: 0,
            index: 0,
            shift: 0,
            address: operand::Address::Base,
            begin: 0,
            end: 0,
        }
    }
}

impl Blocks {
    fn new(cpu: &Cpu) -> Self {
        Blocks {
            blocks: empty_blocks(BLOCKS),
            predecoded: 0,
            decoder_options: cpu.cpuid.decoder_options(),
            hidden: cpu.cpuid.hidden(),
        }
    }

    /// The block at `gpa`, predecoded now where it is not known or has changed.
    #[inline]
    fn at(&mut self, cpu: &mut Cpu, gpa: u64, p: HostPtr) -> (usize, &Block) {
        let mut slot = self.slot(gpa);
        if !self.blocks[slot].matches(gpa, p) {
            cpu.counters.predecoded_blocks += 1;
            slot = self.predecode(gpa, p);
        }
        (slot, &self.blocks[slot])
    }

    #[inline]
    fn slot(&self, gpa: u64) -> usize {
        (gpa ^ gpa >> 13) as usize & (self.blocks.len() - 1)
    }

    #[cold]
    fn predecode(&mut self, gpa: u64, p: HostPtr) -> usize {
        self.predecoded += 1;
        let len = self.blocks.len();
        if self.predecoded > WORN * len && len < BLOCKS_MAX {
            self.blocks = empty_blocks(2 * len);
            self.predecoded = 0;
        }
        let slot = self.slot(gpa);
        self.blocks[slot] = predecode(gpa, p, self.decoder_options, self.hidden);
        slot
    }

    /// The instructions that ran, as far as they are still known.
    pub(super) fn instructions(&self, ran: &Ran) -> Vec<Instruction> {
        let b = &self.blocks[ran.slot as usize];
        if (b.gpa ^ ran.rip) & PAGE_MASK != 0 {
            return Vec::new();
        }
        let bytes: Vec<u8> = b.code.iter().flat_map(|w| w.to_le_bytes()).collect();
        let decoder = Decoder::with_ip(64, &bytes, ran.rip, self.decoder_options);
        decoder.into_iter().take(ran.count as usize).collect()
    }
}

fn empty_blocks(count: usize) -> Vec<Block> {
    let mut blocks = Vec::new();
    blocks.resize_with(count, Block::empty);
    blocks
}

/// Resolves instructions up to the first that ends the block or has no function here. `p` has room for at least a word.
#[cold]
fn predecode(gpa: u64, p: HostPtr, options: u32, hidden: HiddenInstructions) -> Block {
    let mut bytes = [0; 8 * WORDS];
    let len = p.room().min(bytes.len()) & !7;
    p.read(&mut bytes[..len]);
    let mut block = Block::empty();
    block.gpa = gpa;
    let mut decoder = Decoder::with_ip(64, &bytes[..len], 0, options);
    let (mut instruction, mut end) = (Instruction::default(), 0);
    while usize::from(block.count) < OPS {
        decoder.decode_out(&mut instruction);
        let op = lookup::lookup(&instruction);
        let Some(op) = op.filter(|_| !hidden.has(&instruction)) else {
            break;
        };
        block.ops[usize::from(block.count)] = op;
        block.count += 1;
        end = decoder.position();
        if lookup::ends_block(&instruction) {
            break;
        }
    }
    // With no instruction resolved, the bytes of the first decide whether to look again.
    let checked = if block.count > 0 {
        end
    } else {
        decoder.position().max(1)
    };
    block.words = checked.div_ceil(8) as u8;
    block.shift = (8 * block.words as usize - checked) as u8 * 8;
    for (word, bytes) in block.code.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b));
    }
    block
}

/// True where nothing is to happen between instructions: the conditions that the functions leave as they are.
fn allowed(cpu: &Cpu) -> bool {
    const BREAKPOINT_ENABLES: u64 = 0xff;
    let aligned = cpu.cpl == 3 && cpu.rflags.contains(Rflags::AC) && cpu.cr0.contains(Cr0::AM);
    cpu.mode() == CpuMode::Bits64
        && !cpu.rflags.intersects(Rflags::TF | Rflags::RF)
        && !cpu.virtual_interrupt_waits()
        && cpu.dr[7] & BREAKPOINT_ENABLES == 0
        && !cpu.interrupt_shadow
        && !cpu.mov_ss_shadow
        && !aligned
}

/// Runs blocks until an instruction is met that is for the interpreter proper, `kick` is set, or `most` instructions were executed (by a block at most, more).
pub(super) fn run(cpu: &mut Cpu, kick: &AtomicBool, most: u64) {
    if !allowed(cpu) {
        return;
    }
    let Some(page) = CodePage::of(cpu, cpu.rip) else {
        return;
    };
    let mut blocks = match cpu.code.blocks.take() {
        Some(blocks) => blocks,
        None => Box::new(Blocks::new(cpu)),
    };
    let mut context = Context {
        privilege: cpu.privilege(),
        page,
    };
    let mut executed = 0;
    while executed < most && !kick.load(Ordering::Relaxed) {
        let rip = cpu.rip;
        if rip ^ context.page.linear > PAGE_MASK {
            match CodePage::of(cpu, rip) {
                Some(page) => context.page = page,
                None => break,
            }
        }
        let (count, more) = run_block(cpu, &mut blocks, &context);
        executed += u64::from(count);
        if !more {
            break;
        }
    }
    cpu.counters.interpreted_instructions += executed;
    cpu.counters.quick_instructions += executed;
    cpu.code.blocks = Some(blocks);
}

/// Runs the block at RIP: how many instructions were executed, and whether the next one may be one of ours.
#[inline]
fn run_block(cpu: &mut Cpu, blocks: &mut Blocks, context: &Context) -> (u32, bool) {
    let rip = cpu.rip;
    let offset = rip & PAGE_MASK;
    let p = context.page.host.at(offset as usize);
    if p.room() < 8 {
        return (0, false);
    }
    let (slot, block) = blocks.at(cpu, context.page.gpa | offset, p);
    let (mut count, mut go, mut end) = (0, Go::Next, 0);
    for op in &block.ops[..usize::from(block.count)] {
        go = (op.run)(cpu, op, context);
        end = op.end;
        if go != Go::Next {
            if go == Go::Bail {
                end = op.begin;
                break;
            }
            count += 1;
            break;
        }
        count += 1;
    }
    if go != Go::Jump {
        cpu.rip = rip.wrapping_add(end.into());
    }
    if count > 0 {
        let slot = slot as u32;
        cpu.code.note_past(Past::Block(Ran { rip, slot, count }));
    }
    (count, count > 0 && go != Go::Bail)
}
