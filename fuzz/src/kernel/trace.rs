//! A case on the interpreter, instruction by instruction: which were executed, which exceptions they raised, and whether the
//! manual says what comes out.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Result;
use doppel_memory::{GuestRam, PAGE_SIZE, probe};
use doppel_x86::{Activity, Cpu, CpuMode, CpuidModel, Gpr, Seg, event, interpret};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, RflagsBits};

use super::compare::is_table;
use super::image::Image;
use super::layout::{PD, PDPT, PML4, PML4_B, PT, RAM, STUBS, TO_PML5, WIDE, is_supervisors};
use super::machine::{self, KernelBus};
use super::stale::{self, StaleEntries};

/// Its vector.
const GENERAL_PROTECTION: usize = 13;
/// Instructions that a case may take here.
const MOST: u64 = 400_000;

/// An exception by what it was: vector, what its error code says, who raised it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Cause {
    pub vector: u8,
    pub error: String,
    pub by: String,
}

/// Instructions by code size and privilege, and exceptions, each with how often.
#[derive(Clone, Debug, Default)]
pub struct Reached {
    pub instructions: BTreeMap<(u32, u8, Code), u64>,
    pub causes: BTreeMap<Cause, u64>,
}

impl Reached {
    /// Whether user code executed what direct execution looks for, but cannot find everywhere among other bytes (see the limit told in
    /// `cpu/direct/src/hazard.rs`): the host answers then.
    pub fn user_asks_the_host(&self) -> bool {
        use Mnemonic::*;
        let tells = |code: &Code| {
            let descriptors = [Lar, Lsl, Sysenter, Verr, Verw, Sgdt, Sidt, Sldt, Smsw, Str];
            let others = [Rdtscp, Xgetbv, Rdpkru, Wrpkru, Vmcall, Vmmcall];
            // A null selector has lost its RPL when the child stops.
            let loads = [Lds, Les, Lfs, Lgs, Lss];
            let is_load = matches!(
                code,
                Code::Mov_Sreg_rm16 | Code::Mov_Sreg_r32m16 | Code::Mov_Sreg_r64m16
            ) || matches!(
                code,
                Code::Popw_FS | Code::Popq_FS | Code::Popw_GS | Code::Popq_GS
            );
            let sensitive = [&descriptors[..], &others, &loads].concat();
            let mnemonic = code.mnemonic();
            is_load || sensitive.contains(&mnemonic) || saves_what_is_in_use(mnemonic)
        };
        let mut executed = self.instructions.keys();
        executed.any(|(_, cpl, code)| *cpl == 3 && tells(code))
    }

    /// Takes in another's.
    pub fn add(&mut self, other: &Reached) {
        for (key, count) in &other.instructions {
            *self.instructions.entry(*key).or_default() += count;
        }
        for (key, count) in &other.causes {
            *self.causes.entry(key.clone()).or_default() += count;
        }
    }
}

/// What a case did.
#[derive(Default)]
pub struct Trace {
    pub reached: Reached,
    /// An instruction was executed whose outcome nobody specifies: processors may differ from there on.
    pub unspecified: Option<Instruction>,
    /// A step wrote over the tables of what it runs in, and flushed nothing: the outcome is open.
    pub lost_tables: bool,
    /// Page tables were executed, or read by other code than the supervisor's: when a processor sets their accessed and dirty bits is its own
    /// affair.
    pub sees_tables: Option<Instruction>,
    /// Where code went by an entry of the page tables that had changed, and was not invalidated.
    pub stale: Option<u64>,
}

impl Trace {
    /// Why the manual does not say what comes out, unless it does.
    pub fn why_unspecified(&self) -> Option<String> {
        let at = |i: Instruction| format!("{i} at {:#x}", i.ip());
        let lost = "a step wrote over the tables that it runs in".to_owned();
        let lost = self.lost_tables.then_some(lost);
        let seen = self
            .sees_tables
            .map(|i| format!("page tables are seen by {}", at(i)));
        let stale = self
            .stale
            .map(|rip| format!("an entry that changed is used without a flush at {rip:#x}"));
        self.unspecified.map(at).or(lost).or(seen).or(stale)
    }
}

/// Who looks on; of code that cannot be fetched there is no instruction.
pub type Watch<'a> = dyn FnMut(&Cpu, Option<&Instruction>) + 'a;

/// A CPU of its own.
pub struct Tracer {
    cpu: Box<Cpu>,
    bus: KernelBus,
}

impl Tracer {
    /// A machine without an engine.
    pub fn new(model: &Arc<CpuidModel>) -> Result<Self> {
        let ram = Arc::new(GuestRam::new(RAM)?);
        Ok(Tracer {
            cpu: Cpu::with_model(0, ram.clone(), model.clone()),
            bus: KernelBus::new(ram),
        })
    }

    /// The CPU.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Runs a case.
    pub fn run(&mut self, image: &Image, dma: &machine::Dma) -> Trace {
        self.watched(image, dma, &mut |_, _| ())
    }

    /// Runs a case, and shows each instruction that is to be executed next, with the state before it.
    pub fn watched(&mut self, image: &Image, dma: &machine::Dma, watch: &mut Watch<'_>) -> Trace {
        machine::load(&self.cpu.ram, image);
        self.bus.reset(dma);
        machine::reset(&mut self.cpu, image);
        let mut trace = Trace::default();
        let tables = self.identity_map();
        let mut entries = StaleEntries::new(&self.cpu);
        let mut wakes = 0;
        for _ in 0..MOST {
            event::deliver_pending(&mut self.cpu, &mut self.bus);
            match self.cpu.activity {
                Activity::Active => self.step(&mut trace, &mut entries, watch),
                Activity::Halted if machine::is_finished(&self.cpu) => break,
                Activity::Halted if wakes < machine::MOST_WAKES => {
                    wakes += 1;
                    if !machine::wake(&self.cpu, &mut self.bus) {
                        break;
                    }
                }
                _ => break,
            }
        }
        trace.lost_tables = self.identity_map() != tables;
        trace
    }

    /// The entries of the identity map and those that lead there, without accessed and dirty bits. No step has business there.
    fn identity_map(&self) -> Vec<u64> {
        /// Of one entry of 64 bits, or two of 32.
        const ACCESSED_AND_DIRTY: u64 = 0x60_0000_0060;
        let roots = [PML4, PML4_B];
        let of_five = roots.map(|root| root + TO_PML5);
        let upper = roots.into_iter().chain(of_five).chain([PDPT, PD]);
        let entries = upper.chain((PT..PT + PAGE_SIZE).step_by(8)).map(|at| {
            let entry = self.cpu.ram.load::<u64>(at);
            entry.unwrap_or(0) & !ACCESSED_AND_DIRTY
        });
        entries.collect()
    }

    fn step(&mut self, trace: &mut Trace, entries: &mut StaleEntries, watch: &mut Watch<'_>) {
        entries.prepare(&mut self.cpu);
        let instruction = self.next();
        watch(&self.cpu, instruction.as_ref());
        let sees_tables = self.is_entry(self.fetched())
            || instruction.is_some_and(|i| self.reads_tables(&i) || self.copies_tables(&i));
        let place = (bits(&self.cpu), self.cpu.cpl);
        let tells_use = instruction.is_some_and(|i| tells_what_is_in_use(&i, &self.cpu));
        let before = self.cpu.counters.exceptions;
        let fetched = self.fetched();
        let kept = entries.before(&self.cpu, instruction.as_ref(), fetched);
        interpret::step(&mut self.cpu, &mut self.bus);
        self.cpu.code_writes.clear();
        let after = self.cpu.counters.exceptions;
        let raised: Vec<usize> = (0..32).filter(|n| after[*n] != before[*n]).collect();
        if entries.after(&self.cpu, &kept, &raised) {
            trace.stale = trace.stale.or(Some(fetched));
        }
        if let Some(i) = instruction {
            trace.sees_tables = trace.sees_tables.or(sees_tables.then_some(i));
            let key = (place.0, place.1, i.code());
            *trace.reached.instructions.entry(key).or_default() += 1;
            // The supervisor's shifts leave flags to nobody.
            let supervisor = is_supervisors(i.ip());
            let specified = supervisor || !is_unspecified(&i);
            // Whether its return address is written before.
            let lost_call = i.is_call_near_indirect() && raised.contains(&GENERAL_PROTECTION);
            // Where a save faults depends on what is in use, too.
            if !specified && stale::was_executed(&raised) || tells_use || lost_call {
                trace.unspecified = trace.unspecified.or(Some(i));
            }
        }
        let by = instruction.map_or("fetch".to_owned(), |i| format!("{:?}", i.mnemonic()));
        let double = self.cpu.rip & !WIDE == STUBS + 16 * 8 && self.cpu.cpl == 0;
        let shutdown = self.cpu.activity == Activity::Shutdown;
        for vector in raised.into_iter().chain(double.then_some(8)) {
            if shutdown {
                // The last of them leads nowhere.
                continue;
            }
            let cause = Cause {
                vector: vector as u8,
                error: self.error(vector as u8),
                by: by.to_lowercase(),
            };
            *trace.reached.causes.entry(cause).or_default() += 1;
        }
    }

    /// The linear address of RIP.
    fn fetched(&self) -> u64 {
        let base = match self.cpu.mode() {
            CpuMode::Bits64 => 0,
            _ => self.cpu.segment(Seg::Cs).base,
        };
        base.wrapping_add(self.cpu.rip)
    }

    /// Whether there is an entry of a page table that leads somewhere: of others no processor changes a bit.
    fn is_entry(&self, linear: u64) -> bool {
        /// Of one of 64 bits, or two of 32.
        const PRESENT: u64 = 1 << 32 | 1;
        let found = probe(&self.cpu.ram, &self.cpu.paging(), linear).filter(|t| is_table(t.gpa));
        let entry = found.and_then(|t| self.cpu.ram.load::<u64>(t.gpa & !7));
        entry.is_some_and(|entry| entry & PRESENT != 0)
    }

    /// Whether what it reads has bytes of page tables.
    fn reads_tables(&self, i: &Instruction) -> bool {
        if looks_at_nothing(i) || is_supervisors(i.ip()) {
            return false;
        }
        let spans = stale::read_by(&self.cpu, i);
        spans.into_iter().any(|(first, len)| {
            let words = (0..len).step_by(8).chain([len - 1]);
            { words }.any(|n| self.is_entry(first.wrapping_add(n)))
        })
    }

    /// Whether the frames that ENTER copies have bytes of page tables.
    fn copies_tables(&self, i: &Instruction) -> bool {
        if i.mnemonic() != Mnemonic::Enter {
            return false;
        }
        let stack = self.cpu.segment(Seg::Ss);
        let (base, mask) = match self.cpu.mode() {
            CpuMode::Bits64 => (0, u64::MAX),
            _ if stack.big() => (stack.base, 0xffff_ffff),
            _ => (stack.base, 0xffff),
        };
        let frames = u64::from(i.immediate8_2nd() & 31);
        let bytes = (1..8 * frames.max(1)).map(|n| self.cpu.reg(Gpr::Rbp).wrapping_sub(n) & mask);
        { bytes }.any(|at| self.is_entry(base.wrapping_add(at)))
    }

    /// The instruction at RIP, where it can be fetched.
    fn next(&mut self) -> Option<Instruction> {
        let mut bytes = [0; 16];
        let got = self.cpu.fetch(self.fetched(), &mut bytes).ok()?;
        let options = DecoderOptions::NONE;
        let mut decoder = Decoder::with_ip(bits(&self.cpu), &bytes[..got], self.cpu.rip, options);
        let i = decoder.decode();
        (!i.is_invalid()).then_some(i)
    }

    /// What the error code on the stack says.
    fn error(&self, vector: u8) -> String {
        if !matches!(vector, 10..=14) {
            return String::new();
        }
        let rsp = self.cpu.reg(Gpr::Rsp);
        let found = probe(&self.cpu.ram, &self.cpu.paging(), rsp);
        let Some(code) = found.and_then(|t| self.cpu.ram.load::<u64>(t.gpa & !7)) else {
            return "?".to_owned();
        };
        match vector {
            14 => page_fault(code),
            _ => selector(code),
        }
    }
}

fn bits(cpu: &Cpu) -> u32 {
    match cpu.mode() {
        CpuMode::Bits64 => 64,
        CpuMode::Bits32 => 32,
        _ => 16,
    }
}

fn page_fault(code: u64) -> String {
    let names = ["present", "write", "user", "reserved", "fetch", "key"];
    let set = names.iter().enumerate().filter(|(n, _)| code >> n & 1 != 0);
    set.map(|(_, name)| *name).collect::<Vec<_>>().join(" ")
}

fn selector(code: u64) -> String {
    let table = match code & 7 {
        _ if code & !7 == 0 && code & 2 == 0 => "0",
        c if c & 2 != 0 => "IDT",
        c if c & 4 != 0 => "LDT",
        _ => "GDT",
    };
    format!("{table}{}", if code & 1 != 0 { " EXT" } else { "" })
}

/// It names an address only, or looks at one bit that is neither accessed nor dirty, as the steps do that change an entry.
fn looks_at_nothing(i: &Instruction) -> bool {
    use Mnemonic::{Bt, Btc, Btr, Bts, Invlpg};
    const ACCESSED: u8 = 5;
    const DIRTY: u8 = 6;
    match i.mnemonic() {
        Bt | Btc | Btr | Bts if i.op1_kind() == OpKind::Immediate8 => {
            !matches!(i.immediate8() & 31, ACCESSED | DIRTY)
        }
        Invlpg => true,
        _ => false,
    }
}

/// It tells which components are in use: a processor may say so of one whose state is the initial one.
fn tells_what_is_in_use(i: &Instruction, cpu: &Cpu) -> bool {
    let asks = i.mnemonic() == Mnemonic::Xgetbv && cpu.reg(Gpr::Rcx) as u32 == 1;
    asks || saves_what_is_in_use(i.mnemonic())
}

fn saves_what_is_in_use(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    let saves = [Xsave, Xsave64, Xsavec, Xsavec64, Xsaveopt, Xsaveopt64];
    saves.contains(&mnemonic)
}

/// Flags that are not defined, or results that are the host's. Logic, bit tests and moves from and to control and debug registers
/// clear flags or leave them as they are on every processor, and here.
fn is_unspecified(i: &Instruction) -> bool {
    use Mnemonic::*;
    const FLAGS: u32 = RflagsBits::OF
        | RflagsBits::SF
        | RflagsBits::ZF
        | RflagsBits::AF
        | RflagsBits::CF
        | RflagsBits::PF;
    match i.mnemonic() {
        Mov | And | Or | Xor | Test | Bt | Bts | Btr | Btc => false,
        Rdtsc | Rdtscp | Rdrand | Rdseed | Rdpmc => true,
        _ => i.rflags_undefined() & FLAGS != 0,
    }
}
