//! Fetch and decode, remembered.
//!
//! Problem: walking the page tables and decoding cost many times what executing an instruction does.
//! Idea: a small TLB for code pages, and a cache of decoded instructions by guest physical address, each with the function
//! that executes it. Invariant: an entry is used only for the very bytes that it was made from, which are
//! compared every time, at the same RIP and in the same mode; so self-modifying code needs no tracking here. The code TLB
//! holds what a walk for execution at CPL 3 or below it allowed, and is flushed with the data TLBs. Cost: some 2 MiB
//! per CPU whose engine interprets; an eighth of that where another engine has single instructions interpreted.

use doppel_memory::{AccessKind, HostPtr, PAGE_MASK, PAGE_SIZE, Privilege};
use iced_x86::{Decoder, DecoderError, Instruction};

use super::quick::{Blocks, Ran};
use super::{Handler, dispatch};
use crate::{Cpu, CpuMode, Exception, Seg};

const PAGES: usize = 256;
/// Instructions that are remembered where all are interpreted; a power of two, as is the next.
const ENTRIES: usize = 1 << 14;
/// The same where few are: those that another engine does not execute itself.
const ENTRIES_OF_FEW: usize = 1 << 9;
/// Bytes of the longest instruction.
const LONGEST: usize = 15;
/// Executed instructions that are kept for a trace.
const HISTORY: usize = 16;

/// What the interpreter remembers between instructions.
#[derive(Default)]
pub(crate) struct CodeCache {
    tables: Option<Box<Tables>>,
    all: bool,
    /// The blocks of `quick`; taken out while they run.
    pub(super) blocks: Option<Box<Blocks>>,
}

/// What was executed, for a trace.
#[derive(Clone, Copy, Default)]
pub(super) enum Past {
    #[default]
    Nothing,
    One(Instruction),
    Block(Ran),
}

struct Tables {
    pages: [CodePage; PAGES],
    entries: Vec<Entry>,
    history: [Past; HISTORY],
    executed: usize,
}

#[derive(Clone, Copy, Default)]
struct CodePage {
    /// Linear page, with [`VALID`] and perhaps [`USER`]; 0 where nothing is known.
    tag: u64,
    /// Guest physical page, with [`GLOBAL`] where the translation is.
    gpa: u64,
}

const VALID: u64 = 1;
const USER: u64 = 2;
const GLOBAL: u64 = 1;

#[derive(Clone, Copy)]
struct Entry {
    gpa: u64,
    raw: [u64; 2],
    mode: CpuMode,
    decoded: Decoded,
}

/// An instruction and what executes it.
#[derive(Clone, Copy)]
pub(super) struct Decoded {
    pub instruction: Instruction,
    pub handler: Handler,
    /// It may make an interrupt deliverable.
    pub system: bool,
}

impl Decoded {
    /// No instruction: #UD.
    pub(super) fn none() -> Self {
        Decoded {
            instruction: Instruction::default(),
            handler: super::hint::undefined,
            system: false,
        }
    }
}

impl CodeCache {
    /// Makes room for everything that a guest executes; without, for the few instructions that its engine leaves.
    pub(super) fn expect_all(&mut self) {
        if self.all {
            return;
        }
        *self = CodeCache {
            all: true,
            ..CodeCache::default()
        };
    }

    /// Forgets where code pages lie, perhaps but for global ones.
    pub(crate) fn flush(&mut self, global_too: bool) {
        for page in self.tables.iter_mut().flat_map(|t| &mut t.pages) {
            if global_too || page.gpa & GLOBAL == 0 {
                *page = CodePage::default();
            }
        }
    }

    /// Forgets where one code page lies.
    pub(crate) fn flush_page(&mut self, linear: u64) {
        if let Some(t) = &mut self.tables {
            t.pages[page_slot(linear)] = CodePage::default();
        }
    }

    /// Notes an instruction that is about to be executed.
    #[inline]
    fn note(&mut self, i: &Instruction) {
        self.note_past(Past::One(*i));
    }

    /// Notes a block that was executed.
    #[inline]
    pub(super) fn note_past(&mut self, past: Past) {
        if let Some(t) = &mut self.tables {
            t.history[t.executed % HISTORY] = past;
            t.executed = t.executed.wrapping_add(1);
        }
    }

    /// The last instructions that were noted, oldest first.
    pub(super) fn history(&self) -> Vec<Instruction> {
        let Some(t) = &self.tables else {
            return Vec::new();
        };
        let mut all = Vec::new();
        for n in 0..HISTORY {
            match &t.history[t.executed.wrapping_add(n) % HISTORY] {
                Past::Nothing => {}
                Past::One(i) => all.push(*i),
                Past::Block(ran) => {
                    all.extend(self.blocks.iter().flat_map(|b| b.instructions(ran)))
                }
            }
        }
        all.split_off(all.len().saturating_sub(HISTORY))
    }

    fn tables(&mut self) -> &mut Tables {
        let entries = match self.all {
            true => ENTRIES,
            false => ENTRIES_OF_FEW,
        };
        self.tables
            .get_or_insert_with(|| Box::new(Tables::new(entries)))
    }
}

impl std::fmt::Debug for CodeCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodeCache")
            .field("used", &self.tables.is_some())
            .finish()
    }
}

impl Tables {
    fn new(entries: usize) -> Self {
        let empty = Entry {
            gpa: u64::MAX,
            raw: [0; 2],
            mode: CpuMode::Real,
            decoded: Decoded::none(),
        };
        Tables {
            pages: [CodePage::default(); PAGES],
            entries: vec![empty; entries],
            history: [Past::default(); HISTORY],
            executed: 0,
        }
    }

    #[inline]
    fn slot(&self, gpa: u64) -> usize {
        (gpa ^ gpa >> 14) as usize & (self.entries.len() - 1)
    }

    #[inline]
    fn entry(&self, gpa: u64) -> &Entry {
        &self.entries[self.slot(gpa)]
    }
}

fn page_slot(linear: u64) -> usize {
    (linear >> 12) as usize % PAGES
}

fn page_tag(cpu: &Cpu, linear: u64) -> u64 {
    linear & !PAGE_MASK | VALID | if cpu.cpl == 3 { USER } else { 0 }
}

/// The bits of 16 bytes that the first `len` make up.
fn masks(len: usize) -> [u64; 2] {
    let bits = if len >= 16 {
        u128::MAX
    } else {
        (1 << (8 * len)) - 1
    };
    [bits as u64, (bits >> 64) as u64]
}

/// Puts the instruction at RIP in `out`, or says why it cannot be executed. (It is copied, once: it may replace its own entry.)
#[inline]
pub(super) fn next(cpu: &mut Cpu, out: &mut Decoded) -> Result<(), Exception> {
    let mode = cpu.mode();
    let linear = code_linear(cpu, mode)?;
    let gpa = cpu.fetch_address(linear)?;
    if !cached(cpu, mode, gpa) {
        *out = decode(cpu, mode, linear, gpa)?;
        cpu.code.note(&out.instruction);
        return Ok(());
    }
    let tables = cpu.code.tables();
    let slot = tables.slot(gpa);
    let decoded = &tables.entries[slot].decoded;
    *out = *decoded;
    // From the entry, not from the copy that was just made: the processor could not forward those stores to these loads.
    tables.history[tables.executed % HISTORY] = Past::One(decoded.instruction);
    tables.executed = tables.executed.wrapping_add(1);
    Ok(())
}

/// The linear address of RIP; #GP(0) where it is outside of the code segment or not canonical.
#[inline]
fn code_linear(cpu: &Cpu, mode: CpuMode) -> Result<u64, Exception> {
    let cs = &cpu.seg[Seg::Cs as usize];
    if mode == CpuMode::Bits64 {
        return if cpu.canonical(cpu.rip) {
            Ok(cpu.rip)
        } else {
            Err(Exception::gp(0))
        };
    }
    if cpu.rip > cs.limit.into() {
        return Err(Exception::gp(0));
    }
    Ok(cs.base.wrapping_add(cpu.rip) & 0xffff_ffff)
}

impl Cpu {
    /// The guest physical address that a fetch from `linear`, which is canonical, reads with the current privilege: from
    /// the code TLB, or else by a walk that may fault.
    #[inline]
    pub fn fetch_address(&mut self, linear: u64) -> Result<u64, Exception> {
        match code_address(self, linear) {
            Some(gpa) => Ok(gpa),
            None => find_page(self, linear),
        }
    }
}

/// The guest physical address of code, where its page is known for the current privilege.
#[inline]
pub(super) fn code_address(cpu: &Cpu, linear: u64) -> Option<u64> {
    let page = &cpu.code.tables.as_deref()?.pages[page_slot(linear)];
    (page.tag == page_tag(cpu, linear)).then_some(page.gpa & !PAGE_MASK | linear & PAGE_MASK)
}

/// Walks the page tables for code, and remembers the page where it is RAM.
#[cold]
fn find_page(cpu: &mut Cpu, linear: u64) -> Result<u64, Exception> {
    let privilege = if cpu.cpl == 3 {
        Privilege::User
    } else {
        Privilege::Supervisor
    };
    let t = cpu.translate(linear, AccessKind::Execute, privilege)?;
    if cpu.ram.is_ram(t.gpa) {
        let page = CodePage {
            tag: page_tag(cpu, linear),
            gpa: t.gpa & !PAGE_MASK | if t.global { GLOBAL } else { 0 },
        };
        cpu.code.tables().pages[page_slot(linear)] = page;
    }
    Ok(t.gpa)
}

/// True where the entry for this address holds the instruction that is there.
#[inline]
fn cached(cpu: &Cpu, mode: CpuMode, gpa: u64) -> bool {
    let Some(t) = cpu.code.tables.as_deref() else {
        return false;
    };
    let e = t.entry(gpa);
    let i = &e.decoded.instruction;
    if e.gpa != gpa || i.ip() != cpu.rip || e.mode != mode {
        return false;
    }
    if i.len() > within_limit(cpu, mode) {
        return false;
    }
    let m = masks(i.len());
    raw_bytes(cpu, gpa)
        .is_some_and(|raw| (raw[0] ^ e.raw[0]) & m[0] | (raw[1] ^ e.raw[1]) & m[1] == 0)
}

/// 16 bytes of code; those beyond the page are zero.
#[inline]
fn raw_bytes(cpu: &Cpu, gpa: u64) -> Option<[u64; 2]> {
    let p = cpu.ram.ptr(gpa)?;
    if p.room() >= 16 {
        return Some([p.load(), cpu.ram.ptr(gpa + 8)?.load()]);
    }
    Some(short_bytes(p))
}

#[cold]
fn short_bytes(p: HostPtr) -> [u64; 2] {
    let mut bytes = [0; 16];
    p.read(&mut bytes[..p.room()]);
    to_words(&bytes)
}

fn to_words(bytes: &[u8; 16]) -> [u64; 2] {
    let v = u128::from_le_bytes(*bytes);
    [v as u64, (v >> 64) as u64]
}

#[cold]
fn decode(cpu: &mut Cpu, mode: CpuMode, linear: u64, gpa: u64) -> Result<Decoded, Exception> {
    let mut bytes = [0; 16];
    let within = within_limit(cpu, mode);
    let mut available = on_page(cpu, gpa, &mut bytes).min(within);
    let (mut instruction, mut error) = decode_bytes(cpu, mode, &bytes[..available]);
    if error == DecoderError::NoMoreBytes && available < within {
        available = cpu.fetch(linear, &mut bytes)?.min(within);
        (instruction, error) = decode_bytes(cpu, mode, &bytes[..available]);
    }
    if instruction.is_invalid() {
        let beyond = error == DecoderError::NoMoreBytes && available == within;
        if beyond || too_long(cpu, mode, &bytes[..available]) {
            return Err(Exception::gp(0));
        }
        return Err(invalid(cpu, linear, available, error));
    }
    let (handler, system) = match cpu.cpuid.hidden().has(&instruction) {
        true => (super::hint::undefined as Handler, false),
        false => dispatch::resolve(&instruction, mode),
    };
    let decoded = Decoded {
        instruction,
        handler,
        system,
    };
    remember(cpu, mode, gpa, &bytes, decoded);
    Ok(decoded)
}

/// Reads what there is of an instruction on its first page; nothing where that is not RAM.
fn on_page(cpu: &Cpu, gpa: u64, out: &mut [u8; 16]) -> usize {
    let Some(p) = cpu.ram.ptr(gpa) else { return 0 };
    let len = p.room().min(LONGEST);
    p.read(&mut out[..len]);
    len
}

fn decode_bytes(cpu: &mut Cpu, mode: CpuMode, bytes: &[u8]) -> (Instruction, DecoderError) {
    let bitness = match mode {
        CpuMode::Bits64 => 64,
        CpuMode::Bits32 => 32,
        _ => 16,
    };
    let options = cpu.cpuid.decoder_options();
    let mut decoder = Decoder::with_ip(bitness, bytes, cpu.rip, options);
    (decoder.decode(), decoder.last_error())
}

/// The bytes at RIP in 64-bit mode, where they still are the instruction that was found there.
pub(super) fn bytes_of(cpu: &mut Cpu, i: &Instruction) -> Option<[u8; 16]> {
    let mode = cpu.mode();
    if mode != CpuMode::Bits64 || !cpu.canonical(cpu.rip) {
        return None;
    }
    let mut bytes = [0; 16];
    let gpa = cpu.fetch_address(cpu.rip).ok()?;
    let mut available = on_page(cpu, gpa, &mut bytes);
    if available < i.len() {
        // No sooner: to read on in the next page would set its accessed bit.
        available = cpu.fetch(cpu.rip, &mut bytes).ok()?;
    }
    let (again, _) = decode_bytes(cpu, mode, &bytes[..available]);
    (again == *i && again.len() == i.len()).then_some(bytes)
}

/// True where the bytes of an invalid instruction do not end before the longest that is allowed. The decoder says the same of
/// these as of other invalid ones, but not when one byte is missing.
fn too_long(cpu: &mut Cpu, mode: CpuMode, bytes: &[u8]) -> bool {
    let shorter = bytes.get(..LONGEST - 1).filter(|_| bytes.len() >= LONGEST);
    shorter.is_some_and(|bytes| decode_bytes(cpu, mode, bytes).1 == DecoderError::NoMoreBytes)
}

/// Why bytes are no instruction: a fault on those that are missing, or #UD.
fn invalid(cpu: &mut Cpu, linear: u64, available: usize, why: DecoderError) -> Exception {
    if why != DecoderError::NoMoreBytes {
        return Exception::UD;
    }
    let missing = linear.wrapping_add(available as u64);
    let privilege = if cpu.cpl == 3 {
        Privilege::User
    } else {
        Privilege::Supervisor
    };
    let found = cpu
        .check_canonical(missing, 1)
        .and_then(|()| cpu.translate(missing, AccessKind::Execute, privilege));
    match found {
        Err(fault) => fault,
        // Mapped meanwhile by another processor: what its bytes say is found out next time.
        Ok(_) => Exception::pf(missing, 0),
    }
}

/// Bytes at RIP that an instruction may have: what lies beyond the segment is not looked at.
fn within_limit(cpu: &Cpu, mode: CpuMode) -> usize {
    let limit = u64::from(cpu.seg[Seg::Cs as usize].limit);
    match mode {
        CpuMode::Bits64 => LONGEST,
        _ => LONGEST.min((limit + 1).saturating_sub(cpu.rip) as usize),
    }
}

/// Enters what was decoded, unless it reaches into a second page.
fn remember(cpu: &mut Cpu, mode: CpuMode, gpa: u64, bytes: &[u8; 16], decoded: Decoded) {
    let room = PAGE_SIZE - (gpa & PAGE_MASK);
    if decoded.instruction.len() as u64 > room || !cpu.ram.is_ram(gpa) {
        return;
    }
    let tables = cpu.code.tables();
    let slot = tables.slot(gpa);
    tables.entries[slot] = Entry {
        gpa,
        raw: to_words(bytes),
        mode,
        decoded,
    };
}
