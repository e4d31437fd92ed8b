//! Whether a kernel uses a translation that its page tables no longer have.
//!
//! A processor may keep what a present entry said until software invalidates it (Intel SDM vol. 3A, 5.10.4), or may not: what comes out of a use between the
//! two is open. An entry whose accessed bit was clear has not been used, and is kept nowhere. So from the change of a used entry on, its
//! accessed bit is cleared before each instruction, and the TLB emptied: where the walk has set the bit, the instruction went by that entry. A
//! page fault went by the entries on the way to CR2. The use is specified where the page was invalidated, by its linear address and PCID.

use std::collections::BTreeMap;

use doppel_memory::{GuestRam, PAGE_SIZE, Paging, PagingMode};
use doppel_x86::{Cpu, Cr0, Cr4, Gpr, Rflags};
use iced_x86::{Code, Instruction, Mnemonic, OpAccess, Register};

use super::layout::TABLES;

const PRESENT: u64 = 1;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const PAGE_FAULT: usize = 14;
/// Raised behind an instruction that was executed.
const TRAPS: [usize; 3] = [1, 3, 4];

/// Whether an instruction that raised these was executed: none is a fault.
pub fn was_executed(raised: &[usize]) -> bool {
    raised.iter().all(|vector| TRAPS.contains(vector))
}

/// What an instruction invalidates if it does not fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    Nothing,
    Page { pcid: u64, linear: u64 },
    NotGlobal { pcid: u64 },
    NotGlobalOfAll,
    Everything,
}

/// What was in an entry when it changed, and what was invalidated since.
#[derive(Debug, Default)]
struct Changed {
    global: bool,
    pages: Vec<(u64, u64)>,
    pcids: Vec<u64>,
    /// Its new translation, too, may be kept.
    used_again: bool,
}

impl Changed {
    fn is_flushed(&self, pcid: u64, page: u64) -> bool {
        self.pages.contains(&(pcid, page)) || (self.pcids.contains(&pcid) && !self.global)
    }
}

/// The page tables as they were, and their entries that other translations may be kept of.
pub struct StaleEntries {
    tables: Vec<u8>,
    /// Room for what they are now.
    now: Vec<u8>,
    changed: BTreeMap<u64, Changed>,
}

/// What an instruction is known to do before it is executed.
pub struct Step {
    flush: Flush,
    /// Linear addresses of its operands and of its own bytes.
    at: Vec<u64>,
    controls: (Cr0, Cr4, u64),
}

impl StaleEntries {
    /// Of tables that were never changed.
    pub fn new(cpu: &Cpu) -> Self {
        let mut tables = vec![0; (TABLES.end - TABLES.start) as usize];
        read(&cpu.ram, &mut tables);
        StaleEntries {
            now: tables.clone(),
            tables,
            changed: BTreeMap::new(),
        }
    }

    /// Before anything of an instruction is looked at.
    pub fn prepare(&mut self, cpu: &mut Cpu) {
        if self.changed.is_empty() {
            return;
        }
        cpu.tlb.iter_mut().for_each(|tlb| tlb.flush());
        for at in self.changed.keys() {
            let entry = cpu.ram.load::<u32>(*at).unwrap_or(0);
            cpu.ram.store(*at, entry & !(ACCESSED as u32));
        }
        read(&cpu.ram, &mut self.tables);
    }

    /// Before it is executed; `fetched` is where it stands.
    pub fn before(&self, cpu: &Cpu, i: Option<&Instruction>, fetched: u64) -> Step {
        let mut at = vec![fetched, fetched.wrapping_add(15)];
        if let Some(i) = i.filter(|_| !self.changed.is_empty()) {
            at.extend(operands(cpu, i));
        }
        Step {
            flush: i.map_or(Flush::Nothing, |i| flush(cpu, i)),
            at,
            controls: (cpu.cr0, cpu.cr4, cpu.cr3),
        }
    }

    /// Whether it went by an entry that may be kept as it was. `raised` are the vectors of its exceptions.
    pub fn after(&mut self, cpu: &Cpu, step: &Step, raised: &[usize]) -> bool {
        let stale = self.is_stale(cpu, step, raised);
        if was_executed(raised) {
            self.flush(cpu, step);
        }
        self.note_changes(cpu);
        stale
    }

    fn is_stale(&mut self, cpu: &Cpu, step: &Step, raised: &[usize]) -> bool {
        let paging = cpu.paging();
        let mut pages = step.at.clone();
        let missed = match raised.contains(&PAGE_FAULT) {
            true => {
                pages.push(cpu.cr2);
                entries(&cpu.ram, &paging, cpu.cr2)
            }
            false => Vec::new(),
        };
        let pcid = pcid(step.controls.1, step.controls.2);
        let mut stale = false;
        for (at, changed) in &mut self.changed {
            let entry = cpu.ram.load::<u32>(*at).unwrap_or(0);
            if u64::from(entry) & ACCESSED == 0 && !missed.contains(at) {
                continue;
            }
            changed.used_again = true;
            let flushed = |linear: &u64| {
                changed.is_flushed(pcid, linear / PAGE_SIZE)
                    && entries(&cpu.ram, &paging, *linear).contains(at)
            };
            stale |= !pages.iter().any(flushed);
        }
        stale
    }

    fn flush(&mut self, cpu: &Cpu, step: &Step) {
        let (cr0, cr4, cr3) = step.controls;
        let formats = Cr4::PGE | Cr4::PAE | Cr4::PSE | Cr4::PCIDE | Cr4::SMEP;
        let other = (cr0 ^ cpu.cr0).contains(Cr0::PG) || (cr4 ^ cpu.cr4).intersects(formats);
        let flush = match step.flush {
            _ if other => Flush::Everything,
            // By a task switch.
            Flush::Nothing if cr3 != cpu.cr3 && !cr4.contains(Cr4::PCIDE) => Flush::NotGlobalOfAll,
            flush => flush,
        };
        match flush {
            Flush::Nothing => {}
            Flush::Everything => self.changed.clear(),
            Flush::NotGlobalOfAll => self.changed.retain(|_, changed| changed.global),
            Flush::NotGlobal { pcid } => {
                self.changed.values_mut().for_each(|c| c.pcids.push(pcid));
            }
            Flush::Page { pcid, linear } => {
                let page = (pcid, linear / PAGE_SIZE);
                self.changed.values_mut().for_each(|c| c.pages.push(page));
            }
        }
    }

    fn note_changes(&mut self, cpu: &Cpu) {
        read(&cpu.ram, &mut self.now);
        if self.now == self.tables {
            return;
        }
        let global = cpu.cr4.contains(Cr4::PGE);
        let size = match cpu.paging().mode {
            PagingMode::Bits32 { .. } => 4,
            _ => 8,
        };
        let pairs = self.tables.chunks(size).zip(self.now.chunks(size));
        for (n, (old, new)) in pairs.enumerate().filter(|(_, (old, new))| old != new) {
            let at = TABLES.start + (n * size) as u64;
            note(&mut self.changed, at, entry(old), entry(new), global);
        }
        std::mem::swap(&mut self.tables, &mut self.now);
    }
}

fn entry(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// That software, or a walk, wrote an entry.
fn note(changed: &mut BTreeMap<u64, Changed>, at: u64, old: u64, new: u64, global: bool) {
    const SET: u64 = ACCESSED | DIRTY;
    let by_a_walk = (old ^ new) & !SET == 0 && old & !new == 0;
    let known = changed.get(&at);
    let kept = old & ACCESSED != 0 || known.is_some_and(|c| c.used_again);
    if old == new || by_a_walk || old & PRESENT == 0 || !kept {
        return;
    }
    let global = global && old & GLOBAL != 0;
    let entry = Changed {
        global,
        ..Changed::default()
    };
    changed.insert(at, entry);
}

fn read(ram: &GuestRam, tables: &mut [u8]) {
    let pages = tables.chunks_mut(PAGE_SIZE as usize);
    for (at, page) in TABLES.step_by(PAGE_SIZE as usize).zip(pages) {
        if let Some(from) = ram.ptr(at) {
            from.read(page);
        }
    }
}

/// Where the entries are that the walk for a linear address goes by.
fn entries(ram: &GuestRam, paging: &Paging, linear: u64) -> Vec<u64> {
    let (mut table, size, bits, levels) = match paging.mode {
        PagingMode::Off => return Vec::new(),
        PagingMode::Bits32 { .. } => (paging.root, 4, 10, 2),
        PagingMode::Pae { pdpte } => (pdpte[(linear >> 30 & 3) as usize] & ADDRESS, 8, 9, 2),
        PagingMode::Level4 => (paging.root, 8, 9, 4),
        PagingMode::Level5 => (paging.root, 8, 9, 5),
    };
    let mut found = Vec::new();
    for level in (0..levels).rev() {
        let index = linear >> (12 + bits * level) & ((1 << bits) - 1);
        let at = table + index * size;
        found.push(at);
        let entry = match size {
            4 => ram.load::<u32>(at).map(u64::from),
            _ => ram.load::<u64>(at),
        };
        let Some(entry) = entry.filter(|e| e & PRESENT != 0) else {
            break;
        };
        if level < 3 && entry & LARGE != 0 {
            break;
        }
        table = entry & ADDRESS;
    }
    found
}

fn pcid(cr4: Cr4, cr3: u64) -> u64 {
    match cr4.contains(Cr4::PCIDE) {
        true => cr3 & 0xfff,
        false => 0,
    }
}

/// What a register adds to an address.
pub fn value(cpu: &Cpu, register: Register) -> Option<u64> {
    match register.is_segment_register() {
        true => Some(cpu.seg[register.number()].base),
        false if register.is_gpr() => Some(cpu.gpr[register.full_register().number()]),
        // Of a gather.
        false => None,
    }
}

/// Where an instruction reads, and how many bytes.
pub fn read_by(cpu: &Cpu, i: &Instruction) -> Vec<(u64, u64)> {
    use OpAccess::{CondRead, Read, ReadCondWrite, ReadWrite};
    let mut info = iced_x86::InstructionInfoFactory::new();
    let used = info.info(i).used_memory().iter();
    let read = used.filter(|m| matches!(m.access(), Read | CondRead | ReadWrite | ReadCondWrite));
    let spans = read.filter_map(|memory| {
        let first = memory.virtual_address(0, |register, _, _| value(cpu, register))?;
        let size = match memory.memory_size().size() as u64 {
            // As much as the state to be loaded says.
            0 => PAGE_SIZE,
            size => size,
        };
        let repeats = i.has_rep_prefix() || i.has_repne_prefix();
        let more = match repeats && i.is_string_instruction() {
            true => cpu.reg(Gpr::Rcx).clamp(1, PAGE_SIZE / size) - 1,
            false => 0,
        };
        let down = cpu.rflags.contains(Rflags::DF);
        let from = if down {
            first.wrapping_sub(more * size)
        } else {
            first
        };
        Some((from, (more + 1) * size))
    });
    spans.collect()
}

/// First and last bytes of what an instruction accesses.
fn operands(cpu: &Cpu, i: &Instruction) -> Vec<u64> {
    let mut info = iced_x86::InstructionInfoFactory::new();
    let used = info.info(i).used_memory().iter();
    let spans = used.filter_map(|memory| {
        let first = memory.virtual_address(0, |register, _, _| value(cpu, register))?;
        let last = first.wrapping_add(memory.memory_size().size().max(1) as u64 - 1);
        Some([first, last])
    });
    spans.flatten().collect()
}

fn flush(cpu: &Cpu, i: &Instruction) -> Flush {
    /// Of a value for CR3.
    const KEEPS: u64 = 1 << 63;
    let current = pcid(cpu.cr4, cpu.cr3);
    let address = |operand| i.virtual_address(operand, 0, |register, _, _| value(cpu, register));
    match i.mnemonic() {
        Mnemonic::Invlpg => address(0).map_or(Flush::Nothing, |linear| Flush::Page {
            pcid: current,
            linear,
        }),
        Mnemonic::Invpcid => address(1)
            .and_then(|at| invpcid(cpu, cpu.gpr[i.op0_register().full_register().number()], at))
            .unwrap_or(Flush::Nothing),
        _ if !matches!(i.code(), Code::Mov_cr_r64 | Code::Mov_cr_r32) => Flush::Nothing,
        _ if i.op0_register() != Register::CR3 => Flush::Nothing,
        _ if !cpu.cr4.contains(Cr4::PCIDE) => Flush::NotGlobalOfAll,
        _ => match cpu.gpr[i.op1_register().full_register().number()] {
            root if root & KEEPS != 0 => Flush::Nothing,
            root => Flush::NotGlobal { pcid: root & 0xfff },
        },
    }
}

/// Its descriptor is read where it lies.
fn invpcid(cpu: &Cpu, kind: u64, descriptor: u64) -> Option<Flush> {
    let word = |at: u64| {
        let found = doppel_memory::probe(&cpu.ram, &cpu.paging(), at)?;
        cpu.ram.load::<u64>(found.gpa)
    };
    match kind {
        0 => Some(Flush::Page {
            pcid: word(descriptor)? & 0xfff,
            linear: word(descriptor.wrapping_add(8))?,
        }),
        1 => Some(Flush::NotGlobal {
            pcid: word(descriptor)? & 0xfff,
        }),
        2 => Some(Flush::Everything),
        3 => Some(Flush::NotGlobalOfAll),
        _ => None,
    }
}
