//! A guest in user mode, with the regions of [`crate::layout`] at their addresses and a kernel that only halts.
//!
//! Physical pages are in another order than linear ones, so that an engine that confuses the two is found out. The kernel's part (tables,
//! stack, one HLT for each exception vector) lies in the upper half, where the host has its kernel too.

use std::sync::Arc;

use anyhow::Result;
use doppel_direct::{Direct, DirectHost, DirectOptions};
use doppel_memory::{Backing, GuestRam, PAGE_SIZE};
use doppel_translate::{Translate, TranslateOptions};
use doppel_x86::{
    Activity, Bus, Cpu, CpuidModel, Cr0, Cr4, Dtr, Efer, EmptyBus, Engine, Exit, Gpr, Rflags, Seg,
    Segment,
    interpret::{self, Interpret},
};

use crate::layout::REGIONS;
use crate::state::{Ending, Memory, Outcome, State};
use crate::trace::Trace;
use crate::watchdog::Watchdog;
use crate::xsave::{Vectors, XsaveLayout};

/// The upper half, where the kernel's pages are mapped.
pub const KERNEL: u64 = 0xffff_8000_0000_0000;
const KERNEL_GPA: u64 = 0x10_000;
const PML4: u64 = 0x1000;
/// Physical addresses of the kernel's parts.
pub const GDT: u64 = KERNEL_GPA;
const IDT: u64 = KERNEL_GPA + 0x1000;
const TSS: u64 = KERNEL_GPA + 0x2000;
const HANDLERS: u64 = KERNEL_GPA + 0x3000;
/// A free page for tests that run code in the kernel.
pub const KERNEL_CODE: u64 = KERNEL_GPA + 0x4000;
const KERNEL_PAGES: u64 = 8;
const STACK_TOP: u64 = KERNEL_GPA + KERNEL_PAGES * PAGE_SIZE;
const REGIONS_GPA: [u64; 4] = [0x20_000, 0x30_000, 0x40_000, 0x50_000];
const RAM: u64 = 1 << 20;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// Linux's selectors.
const KERNEL_CS: u16 = 0x10;
const KERNEL_DS: u16 = 0x18;
const USER_DS: u16 = 0x2b;
const USER_CS: u16 = 0x33;
const TSS_SELECTOR: u16 = 0x40;
const HANDLER_SIZE: u64 = 16;

/// The address in the kernel's half of one of its parts.
pub fn kernel_linear(gpa: u64) -> u64 {
    KERNEL + gpa
}

fn put(cpu: &Cpu, gpa: u64, value: u64) {
    // Inside of RAM: all callers pass constants.
    cpu.ram.store(gpa, value).unwrap_or_default();
}

fn segment(selector: u16, attributes: u32) -> Segment {
    Segment {
        base: 0,
        limit: !0,
        attributes,
        selector,
    }
}

/// The physical address of a page of a region.
fn page_gpa(region: usize, page: u64) -> u64 {
    let pages = REGIONS[region].len / PAGE_SIZE;
    REGIONS_GPA[region] + (pages - 1 - page) * PAGE_SIZE
}

fn write_page_tables(cpu: &Cpu) {
    let link = |at: u64, table: u64| put(cpu, at, table | PRESENT | WRITE | USER);
    link(PML4, 0x2000);
    link(0x2000, 0x3000);
    for (n, region) in REGIONS.iter().enumerate() {
        let table = 0x4000 + 0x1000 * n as u64;
        link(0x3000 + 8 * (region.base >> 21), table);
        let write = if region.write { WRITE } else { 0 };
        let no_execute = if region.execute { 0 } else { NO_EXECUTE };
        for page in 0..region.len / PAGE_SIZE {
            let first = region.base >> 12 & 511;
            let entry = page_gpa(n, page) | PRESENT | USER | write | no_execute;
            put(cpu, table + 8 * (first + page), entry);
        }
    }
    link(PML4 + 8 * 256, 0x8000);
    link(0x8000, 0x9000);
    link(0x9000, 0xa000);
    for page in 0..KERNEL_PAGES {
        let gpa = KERNEL_GPA + page * PAGE_SIZE;
        put(cpu, 0xa000 + 8 * (gpa >> 12), gpa | PRESENT | WRITE);
    }
}

fn write_kernel(cpu: &Cpu) {
    let flat = |attributes: u64| 0x000f_0000_0000_ffff | attributes << 40;
    let tss = kernel_linear(TSS);
    let descriptor = 0x67 | (tss & 0xff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56;
    for (selector, value) in [
        (KERNEL_CS, flat(0xa09b)),
        (KERNEL_DS, flat(0xc093)),
        (0x20, flat(0xc0fb)),
        (USER_DS, flat(0xc0f3)),
        (USER_CS, flat(0xa0fb)),
        (TSS_SELECTOR, descriptor),
        (TSS_SELECTOR + 8, tss >> 32),
    ] {
        put(cpu, GDT + u64::from(selector & !7), value);
    }
    put(cpu, TSS + 4, kernel_linear(STACK_TOP));
    // The I/O permission bitmap begins beyond the limit: there is none.
    put(cpu, TSS + 0x60, 0x68 << 48);
    for vector in 0..32 {
        put(cpu, HANDLERS + HANDLER_SIZE * vector, 0x00fd_ebf4); // hlt; jmp to it
        let dpl = if matches!(vector, 3 | 4) { 3 } else { 0 };
        gate(
            cpu,
            vector,
            kernel_linear(HANDLERS + HANDLER_SIZE * vector),
            dpl,
        );
    }
}

fn gate(cpu: &Cpu, vector: u64, handler: u64, dpl: u64) {
    let low = handler & 0xffff
        | u64::from(KERNEL_CS) << 16
        | (0x8e | dpl << 5) << 40
        | (handler >> 16 & 0xffff) << 48;
    put(cpu, IDT + 16 * vector, low);
    put(cpu, IDT + 16 * vector + 8, handler >> 32);
}

/// A CPU in 64-bit user mode, as Linux sets one up.
pub fn cpu(model: &Arc<CpuidModel>) -> Result<Box<Cpu>> {
    let ram = Arc::new(GuestRam::with_backing(RAM, Backing::Memfd)?);
    let mut cpu = Cpu::with_model(0, ram, model.clone());
    write_page_tables(&cpu);
    write_kernel(&cpu);
    cpu.cr0 = Cr0::PE | Cr0::MP | Cr0::ET | Cr0::NE | Cr0::WP | Cr0::AM | Cr0::PG;
    cpu.cr4 = Cr4::PAE | Cr4::PGE | Cr4::OSFXSR | Cr4::OSXMMEXCPT | Cr4::FSGSBASE;
    if model.has_xsave() {
        cpu.cr4 |= Cr4::OSXSAVE;
        cpu.xcr0 = model.xcr0();
    }
    cpu.efer = Efer::SCE | Efer::LME | Efer::LMA | Efer::NXE;
    cpu.cr3 = PML4;
    cpu.gdtr = Dtr {
        base: kernel_linear(GDT),
        limit: 0x4f,
    };
    cpu.idtr = Dtr {
        base: kernel_linear(IDT),
        limit: 0x1ff,
    };
    cpu.tr = Segment {
        base: kernel_linear(TSS),
        limit: 0x67,
        ..segment(TSS_SELECTOR, 0x8b)
    };
    to_user(&mut cpu);
    Ok(cpu)
}

/// CPL 3 with Linux's selectors.
pub fn to_user(cpu: &mut Cpu) {
    let null = segment(0, 0xc0f3 | Segment::UNUSABLE);
    cpu.seg = [null; 6];
    cpu.seg[Seg::Cs as usize] = segment(USER_CS, 0xa0fb);
    cpu.seg[Seg::Ss as usize] = segment(USER_DS, 0xc0f3);
    cpu.cpl = 3;
    cpu.activity = Activity::Active;
}

/// CPL 0 with Linux's selectors and the kernel's stack.
pub fn to_kernel(cpu: &mut Cpu) {
    to_user(cpu);
    cpu.seg[Seg::Cs as usize] = segment(KERNEL_CS, 0xa09b);
    cpu.seg[Seg::Ss as usize] = segment(KERNEL_DS, 0xc093);
    cpu.cpl = 0;
    cpu.gpr[Gpr::Rsp as usize] = kernel_linear(STACK_TOP);
}

/// Puts the state into a CPU, and tells a translator that the code has changed.
fn load(cpu: &mut Cpu, state: &State, code: &[u8], layout: &XsaveLayout) {
    let mut memory = state.memory.clone();
    let at = (state.rip - REGIONS[0].base) as usize;
    memory.0[0][at..at + code.len()].copy_from_slice(code);
    for (region, bytes) in memory.0.iter().enumerate() {
        for (page, bytes) in bytes.chunks(PAGE_SIZE as usize).enumerate() {
            if let Some(p) = cpu.ram.ptr(page_gpa(region, page as u64)) {
                p.write(bytes);
            }
        }
    }
    for page in 0..REGIONS[0].len / PAGE_SIZE {
        cpu.code_writes.push((page_gpa(0, page), PAGE_SIZE as u32));
    }
    reload(cpu, state, layout);
}

/// Puts the registers and the data into a CPU; the code is what it was.
fn reload(cpu: &mut Cpu, state: &State, layout: &XsaveLayout) {
    for (region, bytes) in state.memory.0.iter().enumerate().skip(1) {
        for (page, bytes) in bytes.chunks(PAGE_SIZE as usize).enumerate() {
            if let Some(p) = cpu.ram.ptr(page_gpa(region, page as u64)) {
                p.write(bytes);
            }
        }
    }
    to_user(cpu);
    cpu.gpr = state.gpr;
    cpu.rip = state.rip;
    cpu.rflags = Rflags::from_bits_retain(state.flags);
    cpu.seg[Seg::Fs as usize].base = state.fs;
    cpu.seg[Seg::Gs as usize].base = state.gs;
    cpu.fpu = (*state.vectors.store(layout)).clone();
    cpu.dr[6] = 0xffff_0ff0;
}

/// Bytes of the regions as the guest left them; the code as it was given.
fn memory_of(cpu: &Cpu, state: &State) -> Memory {
    let read = |region: usize| {
        let mut bytes = vec![0; REGIONS[region].len as usize];
        for (page, bytes) in bytes.chunks_mut(PAGE_SIZE as usize).enumerate() {
            if let Some(p) = cpu.ram.ptr(page_gpa(region, page as u64)) {
                p.read(bytes);
            }
        }
        bytes
    };
    Memory(std::array::from_fn(|n| match n {
        0 => state.memory.0[0].clone(),
        _ => read(n),
    }))
}

/// The vector whose handler the CPU has halted in.
pub fn halted_vector(cpu: &Cpu) -> Option<u8> {
    let offset = cpu.rip.wrapping_sub(kernel_linear(HANDLERS));
    let halted = cpu.activity == Activity::Halted && offset % HANDLER_SIZE == 1;
    (halted && offset < 32 * HANDLER_SIZE).then_some((offset / HANDLER_SIZE) as u8)
}

/// The vector whose handler the CPU is about to enter.
fn vector_at_handler(cpu: &Cpu) -> Option<u8> {
    let offset = cpu.rip.wrapping_sub(kernel_linear(HANDLERS));
    (offset.is_multiple_of(HANDLER_SIZE) && offset < 32 * HANDLER_SIZE)
        .then_some((offset / HANDLER_SIZE) as u8)
}

/// What the handler sees: error code (0 where the vector has none), RIP, RFLAGS, RSP.
pub fn exception_frame(cpu: &Cpu, vector: u8) -> [u64; 4] {
    let rsp = cpu.reg(Gpr::Rsp).wrapping_sub(KERNEL);
    let word = |n: u64| cpu.ram.load(rsp.wrapping_add(8 * n)).unwrap_or(0);
    let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
    let first = u64::from(has_error);
    let error = if has_error { word(0) } else { 0 };
    [error, word(first), word(first + 2), word(first + 3)]
}

/// Reads the outcome out of a CPU that has halted in a handler.
fn outcome(cpu: &Cpu, state: &State, layout: &XsaveLayout, timed_out: bool) -> Outcome {
    let mut o = Outcome {
        ending: Ending::Other,
        gpr: cpu.gpr,
        rip: cpu.rip,
        flags: cpu.rflags.bits(),
        fs: cpu.seg[Seg::Fs as usize].base,
        gs: cpu.seg[Seg::Gs as usize].base,
        vectors: Vectors::of(&cpu.fpu, layout),
        memory: memory_of(cpu, state),
    };
    if timed_out {
        o.ending = Ending::TimedOut;
    } else if let Some(vector) = halted_vector(cpu) {
        let [error, rip, flags, rsp] = exception_frame(cpu, vector);
        (o.rip, o.flags, o.gpr[Gpr::Rsp as usize]) = (rip, flags, rsp);
        o.ending = Ending::Exception {
            vector,
            error,
            address: (vector == 14).then_some(cpu.cr2),
        };
    }
    o
}

/// Instructions that a case may take.
pub const MOST_STEPS: u64 = 4000;

/// The reference interpreter, one instruction at a time.
pub struct Interpreted {
    cpu: Box<Cpu>,
    layout: XsaveLayout,
}

impl Interpreted {
    /// A guest of its own.
    pub fn new(model: &Arc<CpuidModel>, layout: XsaveLayout) -> Result<Self> {
        Ok(Interpreted {
            cpu: cpu(model)?,
            layout,
        })
    }

    /// Runs the case; the trace says what was executed.
    pub fn run<'a>(&mut self, state: &State, code: &'a [u8]) -> (Outcome, Trace<'a>) {
        load(&mut self.cpu, state, code, &self.layout);
        let mut trace = Trace::new(code, state.rip);
        let mut steps = 0;
        while self.cpu.activity == Activity::Active && steps < MOST_STEPS {
            if self.cpu.cpl == 3 {
                trace.begin(&self.cpu);
            }
            interpret::step(&mut self.cpu, &mut EmptyBus);
            if self.cpu.cpl == 3 {
                trace.end(self.cpu.rip);
            } else if let Some(vector) = vector_at_handler(&self.cpu) {
                trace.end(exception_frame(&self.cpu, vector)[1]);
            }
            self.cpu.code_writes.clear();
            steps += 1;
        }
        let timed_out = self.cpu.activity == Activity::Active;
        (outcome(&self.cpu, state, &self.layout, timed_out), trace)
    }
}

/// The watchdog's kicks before a case that the interpreter ended is taken for endless: 4 s, for the host may have let it wait.
const MOST_KICKS: u32 = 20;

/// The translator with one set of options.
pub struct Translated {
    engine: Translate,
    layout: XsaveLayout,
    watchdog: Watchdog,
}

impl Translated {
    /// A guest of its own.
    pub fn new(
        model: &Arc<CpuidModel>,
        layout: XsaveLayout,
        options: TranslateOptions,
    ) -> Result<Self> {
        Self::with(Translate::new(cpu(model)?, options)?, layout)
    }

    /// The same, with user code executed directly.
    pub fn directly(model: &Arc<CpuidModel>, layout: XsaveLayout) -> Result<Self> {
        let mut cpu = cpu(model)?;
        cpu.tsc_offset = 0;
        Self::with(direct(cpu)?, layout)
    }

    fn with(engine: Translate, layout: XsaveLayout) -> Result<Self> {
        let watchdog = Watchdog::new(engine.kicker());
        Ok(Translated {
            engine,
            layout,
            watchdog,
        })
    }

    /// Runs the case, translating its code anew.
    pub fn run(&mut self, state: &State, code: &[u8]) -> Outcome {
        load(self.engine.cpu_mut(), state, code, &self.layout);
        self.finish(state)
    }

    /// Runs the same case once more, in the blocks that there are now, linked as they are now.
    pub fn run_again(&mut self, state: &State) -> Outcome {
        reload(self.engine.cpu_mut(), state, &self.layout);
        self.finish(state)
    }

    fn finish(&mut self, state: &State) -> Outcome {
        self.watchdog.start();
        let mut kicks = 0;
        while self.engine.run(&mut EmptyBus) == Exit::Kicked && kicks < MOST_KICKS {
            kicks += 1;
        }
        self.watchdog.stop();
        let cpu = self.engine.cpu();
        let timed_out = cpu.activity == Activity::Active;
        outcome(cpu, state, &self.layout, timed_out)
    }

    /// The engine's counters.
    pub fn stats(&self) -> doppel_x86::EngineStats {
        self.engine.stats()
    }
}

fn direct(cpu: Box<Cpu>) -> Result<Translate> {
    let host = Arc::new(DirectHost::new(&cpu.ram)?);
    let direct = Direct::new(host, &cpu, DirectOptions::always());
    // Pages with sensitive code are translated.
    let options = TranslateOptions {
        entry_flags: true,
        ..TranslateOptions::default()
    };
    let engine = Translate::new(cpu, options)?;
    Ok(engine.leaving_user_code_to(Box::new(direct)))
}

/// Which engine runs a guest of [`run_code`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Interpret,
    Translate,
    Direct,
}

/// The CPU when the code of [`run_code`] has halted, or raised the exception that it was to end in.
pub struct Ended {
    pub gpr: [u64; 16],
    /// Where it halted, or at the exception.
    pub rip: u64,
    pub flags: u64,
    /// Vector and error code.
    pub exception: Option<(u8, u64)>,
    /// The first bytes of [`crate::layout::DATA`].
    pub data: [u8; 64],
    pub cpl: u8,
    /// VMCALLs and VMMCALLs that the monitor answered.
    pub hypercalls: u64,
}

impl Ended {
    fn of(cpu: &Cpu) -> Self {
        let mut data = [0; 64];
        if let Some(p) = cpu.ram.ptr(page_gpa(1, 0)) {
            p.read(&mut data);
        }
        let mut ended = Ended {
            gpr: cpu.gpr,
            rip: cpu.rip,
            flags: cpu.rflags.bits(),
            exception: None,
            data,
            cpl: cpu.cpl,
            hypercalls: cpu.counters.hypercalls,
        };
        if let Some(vector) = halted_vector(cpu) {
            let [error, rip, flags, rsp] = exception_frame(cpu, vector);
            (ended.rip, ended.flags, ended.gpr[Gpr::Rsp as usize]) = (rip, flags, rsp);
            ended.exception = Some((vector, error));
        }
        ended
    }
}

/// Runs code at CPL 0 (at [`KERNEL_CODE`]) or 3 (at the start of [`crate::layout::CODE`]), on a CPU that `prepare` has had its way with.
/// The code ends with HLT, or with an exception. `None` where it does not end in a second.
pub fn run_code(
    kind: Kind,
    cpl: u8,
    code: &[u8],
    bus: &mut dyn Bus,
    prepare: impl FnOnce(&mut Cpu),
) -> Result<Option<Ended>> {
    let mut cpu = cpu(&Arc::new(CpuidModel::host(1)))?;
    let gpa = if cpl == 0 {
        to_kernel(&mut cpu);
        cpu.rip = kernel_linear(KERNEL_CODE);
        KERNEL_CODE
    } else {
        cpu.rip = REGIONS[0].base;
        cpu.gpr[Gpr::Rsp as usize] = crate::layout::STACK_START;
        page_gpa(0, 0)
    };
    if let Some(p) = cpu.ram.ptr(gpa) {
        p.write(code);
    }
    if kind == Kind::Direct {
        cpu.tsc_offset = 0;
    }
    prepare(&mut cpu);
    let mut engine: Box<dyn Engine> = match kind {
        Kind::Interpret => Box::new(Interpret::new(cpu)),
        Kind::Translate => Box::new(Translate::new(cpu, TranslateOptions::default())?),
        Kind::Direct => Box::new(direct(cpu)?),
    };
    let watchdog = Watchdog::new(engine.kicker());
    watchdog.start();
    let exit = engine.run(bus);
    watchdog.stop();
    Ok((exit == Exit::Halted).then(|| Ended::of(engine.cpu())))
}
