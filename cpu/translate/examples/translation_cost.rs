//! What translations cost: translates the blocks of an ELF file's code and runs none of them.
//!
//! `valgrind --tool=callgrind --collect-atstart=no --toggle-collect='*Translate::translates*'` on `translation_cost MODE FILE [BLOCKS]` counts what it takes,
//! to be divided by the instructions that are printed; repeatable, unlike a time. The digests are of all code that came out and of all records of it:
//! where they are the same as before a change, so are the translations. MODE is `user`, `kernel`, `flat` (32-bit) or `real`; for the latter two the
//! bytes mean other instructions, which serve for a comparison.

use std::collections::BTreeSet;
use std::error::Error;
use std::fs::{self, File};
use std::hash::Hasher;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Instant;

use doppel_memory::GuestRam;
use doppel_translate::{Switch, Translate, TranslateOptions};
use doppel_x86::{Cpu, Cr0, Cr4, Efer, Engine, Seg, Segment};
use iced_x86::{Decoder, DecoderOptions, FlowControl, OpKind};
use rustc_hash::FxHasher;

/// Guest physical addresses of the page tables, and of the code outside of real mode.
const TABLES: u64 = 0x1000;
const CODE: u64 = 16 << 20;
const RAM: u64 = 128 << 20;
/// Bytes of code at most, since each is decoded first.
const CODE_MOST: usize = 8 << 20;
/// Bytes at the beginning of the code cache that hold the way in and out, where addresses of this process stand.
const THUNKS: usize = 16 << 10;
const BLOCKS: usize = 50_000;

/// The bytes of an ELF file's segments that are executed, as far as there is room.
fn code(file: &[u8]) -> Vec<u8> {
    let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().expect("8 bytes"));
    let (headers, each, count) = (
        word(0x20) as usize,
        word(0x36) & 0xffff,
        word(0x38) & 0xffff,
    );
    let mut all = Vec::new();
    for n in 0..count {
        let at = headers + (n * each) as usize;
        let (kind, flags) = (word(at) as u32, word(at) >> 32);
        if kind == 1 && flags & 1 != 0 {
            let from = word(at + 8) as usize;
            all.extend_from_slice(&file[from..from + word(at + 32) as usize]);
        }
    }
    all.truncate(CODE_MOST);
    all
}

/// Offsets at which control arrives: targets of direct branches, and what follows a branch that is always taken, or a call.
fn entries(code: &[u8]) -> Vec<u64> {
    let (mut begins, mut targets) = (BTreeSet::new(), BTreeSet::new());
    let mut after_branch = false;
    for i in Decoder::with_ip(64, code, 0, DecoderOptions::NONE) {
        begins.insert(i.ip());
        if after_branch {
            targets.insert(i.ip());
        }
        let flow = i.flow_control();
        after_branch = !matches!(flow, FlowControl::Next | FlowControl::ConditionalBranch);
        if i.op_count() > 0 && i.op0_kind() == OpKind::NearBranch64 {
            targets.insert(i.near_branch64());
        }
    }
    targets.intersection(&begins).copied().collect()
}

fn segment(attributes: u32, base: u64, limit: u32) -> Segment {
    Segment {
        base,
        limit,
        attributes,
        selector: (base >> 4) as u16,
    }
}

fn cpu(mode: &str) -> Box<Cpu> {
    let ram = Arc::new(GuestRam::new(RAM).expect("guest memory"));
    for (at, entry) in [(0, TABLES + 0x1007), (0x1000, TABLES + 0x2007)] {
        ram.store(TABLES + at, entry).expect("within RAM");
    }
    for n in 0..RAM >> 21 {
        let entry = n << 21 | 0x87;
        ram.store(TABLES + 0x2000 + 8 * n, entry)
            .expect("within RAM");
    }
    let mut cpu = Cpu::new(0, ram);
    cpu.cr4 = Cr4::PAE | Cr4::OSFXSR | Cr4::OSXSAVE;
    cpu.xcr0 = 7;
    let (code, data, limit) = match mode {
        "user" => (0xa0fb, 0xc0f3, u32::MAX),
        "kernel" => (0xa09b, 0xc093, u32::MAX),
        "flat" => (0xc09b, 0xc093, u32::MAX),
        _ => (0x9b, 0x93, 0xffff),
    };
    if mode != "real" {
        cpu.cr0 |= Cr0::PE;
    }
    if matches!(mode, "user" | "kernel") {
        cpu.cr0 |= Cr0::PG | Cr0::WP;
        cpu.efer = Efer::LME | Efer::LMA | Efer::SCE;
        cpu.cr3 = TABLES;
    }
    cpu.cpl = if mode == "user" { 3 } else { 0 };
    cpu.seg = [segment(data, 0, limit); 6];
    cpu.seg[Seg::Cs as usize] = segment(code, 0, limit);
    cpu
}

/// A digest of the executable mapping of this name, or of what may be written behind each mapping of it, but for its first bytes.
fn digest(name: &str, is_behind: bool, skip: usize) -> Result<u64, Box<dyn Error>> {
    let (maps, memory) = (
        fs::read_to_string("/proc/self/maps")?,
        File::open("/proc/self/mem")?,
    );
    let mut hasher = FxHasher::default();
    let mut wanted = false;
    for line in maps.lines() {
        let is_it = line.contains(name) && (is_behind || line.contains("r-x"));
        if is_behind && wanted && line.contains(" rw-") || is_it && !is_behind {
            let (range, _) = line.split_once(' ').ok_or("no range")?;
            let (from, to) = range.split_once('-').ok_or("no range")?;
            let [from, to] = [from, to].map(|n| u64::from_str_radix(n, 16).unwrap_or_default());
            let mut bytes = vec![0; (to - from) as usize];
            memory.read_exact_at(&mut bytes, from)?;
            hasher.write(&bytes[skip.min(bytes.len())..]);
        }
        wanted = is_it;
    }
    Ok(hasher.finish())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "translation_cost user|kernel|flat|real FILE [BLOCKS [WITHOUT...]]";
    let (mode, file) = (
        arguments.next().ok_or(usage)?,
        arguments.next().ok_or(usage)?,
    );
    let most = arguments.next().map_or(Ok(BLOCKS), |n| n.parse())?;
    let mut options = TranslateOptions {
        huge_code: false,
        ..TranslateOptions::default()
    };
    for name in arguments {
        options = options.without(Switch::named(&name).ok_or("no such switch")?);
    }
    let mut code = code(&fs::read(file)?);
    let at = if mode == "real" { 0 } else { CODE };
    if mode == "real" {
        code.truncate(0xf000);
    }
    let mut entries = entries(&code);
    // Pages of all of the code.
    entries.sort_by_key(|at| ((at >> 12).wrapping_mul(0x9e37_79b9_7f4a_7c15), *at));
    entries.truncate(most);
    let cpu = cpu(&mode);
    for (page, bytes) in (at..).step_by(4096).zip(code.chunks(4096)) {
        cpu.ram.ptr(page).ok_or("no RAM")?.write(bytes);
    }
    let mut engine = Translate::new(cpu, options)?;
    let began = Instant::now();
    for entry in &entries {
        engine.cpu_mut().rip = at + entry;
        engine.translates();
    }
    let took = began.elapsed();
    let stats = engine.stats();
    let count = |name: &str| stats.get(name).copied().unwrap_or_default();
    let instructions = count("instructions_translated");
    println!(
        "{mode}: {} blocks, {instructions} instructions, {} bytes of code, {} of records; {:.0} ns an instruction",
        count("translations"),
        count("code_cache_bytes"),
        count("translation_metadata_bytes"),
        took.as_nanos() as f64 / instructions as f64,
    );
    let (code, records) = (
        digest("doppel-code", false, THUNKS)?,
        digest("doppel-records", true, 0)?,
    );
    println!("digests: code {code:016x}, records {records:016x}");
    Ok(())
}
