//! Performance counters, on a processor that was asked to have them: Intel's architectural performance monitoring (version 2), or AMD's six core counters, of which the first
//! four have their registers of old too.
//!
//! Problem: translated code, and code that the host's processor executes itself, does not know how many instructions it has executed, nor when it came from user code to the kernel.
//! Idea: what is exact without that costs nothing. Cycles are the TSC's while an engine runs the CPU, brought up to date when somebody asks ([`Cpu::sync_counters`]). While some counter counts
//! instructions, or cycles of user code or of the kernel alone, the CPU *steps*: every engine interprets ([`Pmu::steps`]), which counts each instruction that is completed, exactly.
//! Invariant: what was counted since the last synchronization was all at privilege [`Pmu::cpl`] and with the present selection, so it is synchronized before either changes.
//! An overflow of cycles comes when an engine next looks, at the latest by an alarm that the machine sets ([`Bus::set_counter_alarm`]); one of instructions after ten more at most.
//! Cost: a look at a flag per run of an engine and per interpreted instruction, nothing in translated code.
//!
//! Sources: Intel SDM vol. 3B, chapter 21 (performance monitoring), vol. 2B (RDPMC); AMD APM vol. 2, 13.2 (the core counters: 13.2.2); AMD PPR (events 0x76 and 0xC0).

use crate::vendor::Vendor;
use crate::{Bus, Cpu, Cr0, Cr4, Exception, Gpr, arch_host};

/// Bits of a counter.
pub(crate) const WIDTH: u32 = 48;
const MASK: u64 = (1 << WIDTH) - 1;
/// Intel's counters that can be told what to count, and those that each count one thing.
pub(crate) const GENERAL: usize = 4;
pub(crate) const FIXED: usize = 3;
/// AMD's.
const CORE: usize = 6;
/// Where the fixed ones are.
const FIRST_FIXED: usize = CORE;

/// What a counter counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Event {
    #[default]
    Nothing,
    /// Cycles, and reference cycles.
    Ticks,
    Instructions,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counter {
    value: u64,
    event: Event,
    user: bool,
    kernel: bool,
    interrupts: bool,
}

impl Counter {
    fn counts(&self, event: Event, cpl: u8) -> bool {
        self.event == event && if cpl == 0 { self.kernel } else { self.user }
    }

    /// It has to be known when the privilege changes, or which instructions are executed.
    fn steps(&self) -> bool {
        match self.event {
            Event::Nothing => false,
            Event::Ticks => self.user != self.kernel,
            Event::Instructions => self.user || self.kernel,
        }
    }

    /// What is missing to an overflow.
    fn room(&self) -> u64 {
        MASK + 1 - self.value
    }

    /// True where it overflows.
    fn add(&mut self, by: u64) -> bool {
        let overflows = by >= self.room();
        self.value = self.value.wrapping_add(by) & MASK;
        overflows
    }
}

/// The bit of a counter in Intel's global registers.
fn global_bit(n: usize) -> u64 {
    match n.checked_sub(FIRST_FIXED) {
        None => 1 << n,
        Some(fixed) => 1 << (32 + fixed),
    }
}

/// All of Intel's.
const GLOBAL_BITS: u64 = ((1 << GENERAL) - 1) | (((1 << FIXED) - 1) << 32);
/// What can be cleared in the status beside: OvfBuf, CondChgd.
const STATUS_BITS: u64 = GLOBAL_BITS | 0b11 << 62;

/// Bits of an event select register.
const USER: u64 = 1 << 16;
const KERNEL: u64 = 1 << 17;
const INTERRUPT: u64 = 1 << 20;
const ENABLE: u64 = 1 << 22;
/// Edges, inversion and a threshold: of other events alone.
const REFINED: u64 = 1 << 18 | 1 << 23 | 0xff << 24;
const INTEL_RESERVED: u64 = !0xffff_ffff | 1 << 21;
const AMD_KEPT: u64 = 0xf_ffd7_ffff;

/// What an event select register chooses.
fn chosen(vendor: Vendor, select: u64) -> Event {
    let code = select & 0xff;
    let event = match (vendor, code, select >> 8 & 0xff, select >> 32 & 0xf) {
        (Vendor::Intel, 0x3c, 0 | 1, _) => Event::Ticks,
        (Vendor::Intel, 0xc0, 0, _) => Event::Instructions,
        (Vendor::Amd, 0x76, _, 0) => Event::Ticks,
        (Vendor::Amd, 0xc0, _, 0) => Event::Instructions,
        _ => Event::Nothing,
    };
    match select & ENABLE != 0 && select & REFINED == 0 {
        true => event,
        false => Event::Nothing,
    }
}

/// The counters of a CPU.
#[derive(Clone, Debug)]
pub struct Pmu {
    /// The general ones, then Intel's fixed ones.
    counters: [Counter; FIRST_FIXED + FIXED],
    select: [u64; CORE],
    fixed_control: u64,
    global_control: u64,
    status: u64,
    /// An engine runs the CPU.
    running: bool,
    /// Host TSC of the last synchronization.
    since: u64,
    /// Instructions since.
    retired: u64,
    /// The privilege since.
    cpl: u8,
    /// Some counter counts.
    on: bool,
    steps: bool,
    /// So many instructions, and the host TSC, at which a counter overflows.
    left: u64,
    deadline: u64,
    /// The deadline that the machine was told.
    told: u64,
    /// An overflow is to interrupt.
    due: bool,
}

const NEVER: u64 = u64::MAX;

impl Default for Pmu {
    fn default() -> Self {
        Pmu {
            counters: Default::default(),
            select: [0; CORE],
            fixed_control: 0,
            global_control: 0,
            status: 0,
            running: false,
            since: 0,
            retired: 0,
            cpl: 0,
            on: false,
            steps: false,
            left: NEVER,
            deadline: NEVER,
            told: NEVER,
            due: false,
        }
    }
}

impl Pmu {
    /// True while every instruction has to be interpreted.
    #[inline]
    pub fn steps(&self) -> bool {
        self.steps
    }

    /// Instructions that may be executed before somebody looks.
    pub(crate) fn budget(&self) -> u64 {
        self.left.saturating_sub(self.retired)
    }

    /// Notes completed instructions.
    #[inline]
    pub(crate) fn retire(&mut self, instructions: u64) {
        self.retired += instructions;
    }

    /// Adds what was counted since the last time.
    fn sync(&mut self, now: u64, cpl: u8) {
        let ticks = match self.running {
            true => now.saturating_sub(self.since),
            false => 0,
        };
        let retired = std::mem::take(&mut self.retired);
        self.since = now;
        for (n, counter) in self.counters.iter_mut().enumerate() {
            let by = match counter.event {
                e if !counter.counts(e, self.cpl) => 0,
                Event::Nothing => 0,
                Event::Ticks => ticks,
                Event::Instructions => retired,
            };
            if counter.add(by) {
                self.status |= global_bit(n);
                self.due |= counter.interrupts;
            }
        }
        self.cpl = cpl;
        self.plan();
    }

    /// Follows a change of the selection.
    fn choose(&mut self, vendor: Vendor) {
        let intel = vendor == Vendor::Intel;
        let global = self.global_control;
        let on = |n: usize| !intel || global & global_bit(n) != 0;
        for n in 0..CORE {
            let select = self.select[n];
            self.counters[n] = Counter {
                value: self.counters[n].value,
                event: chosen(vendor, if on(n) { select } else { 0 }),
                user: select & USER != 0,
                kernel: select & KERNEL != 0,
                interrupts: select & INTERRUPT != 0,
            };
        }
        for (fixed, event) in [Event::Instructions, Event::Ticks, Event::Ticks]
            .into_iter()
            .enumerate()
        {
            let n = FIRST_FIXED + fixed;
            let control = self.fixed_control >> (4 * fixed);
            self.counters[n] = Counter {
                value: self.counters[n].value,
                event: if on(n) { event } else { Event::Nothing },
                user: control & 2 != 0,
                kernel: control & 1 != 0,
                interrupts: control & 8 != 0,
            };
        }
        self.plan();
    }

    fn plan(&mut self) {
        let counters = &self.counters;
        let counting = |c: &Counter| c.event != Event::Nothing && (c.user || c.kernel);
        self.on = counters.iter().any(counting);
        self.steps = counters.iter().any(Counter::steps);
        let cpl = self.cpl;
        let room = |event| {
            let here = counters.iter().filter(|c| c.counts(event, cpl));
            here.map(Counter::room).min()
        };
        let (instructions, ticks) = (room(Event::Instructions), room(Event::Ticks));
        self.left = instructions.unwrap_or(NEVER);
        let since = self.since;
        self.deadline = ticks.map_or(NEVER, |ticks| since.saturating_add(ticks));
    }
}

/// A register of the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    Counter(usize),
    Select(usize),
    FixedControl,
    GlobalStatus,
    GlobalControl,
    ClearStatus,
}

fn register(cpu: &Cpu, msr: u32) -> Option<Register> {
    use Register::*;
    let at = |base: u32| (msr - base) as usize;
    let found = match (cpu.cpuid.vendor(), msr) {
        (Vendor::Intel, 0xc1..=0xc4) => Counter(at(0xc1)),
        (Vendor::Intel, 0x186..=0x189) => Select(at(0x186)),
        (Vendor::Intel, 0x309..=0x30b) => Counter(FIRST_FIXED + at(0x309)),
        (Vendor::Intel, 0x38d) => FixedControl,
        (Vendor::Intel, 0x38e) => GlobalStatus,
        (Vendor::Intel, 0x38f) => GlobalControl,
        (Vendor::Intel, 0x390) => ClearStatus,
        (Vendor::Amd, 0xc001_0000..=0xc001_0003) => Select(at(0xc001_0000)),
        (Vendor::Amd, 0xc001_0004..=0xc001_0007) => Counter(at(0xc001_0004)),
        (Vendor::Amd, 0xc001_0200..=0xc001_020b) => match (at(0xc001_0200) / 2, msr & 1) {
            (n, 0) => Select(n),
            (n, _) => Counter(n),
        },
        _ => return None,
    };
    cpu.cpuid.has_counters().then_some(found)
}

/// The first four of AMD's, of which CPUID does not tell: their registers exist on all its processors.
const AMD_FIRST_FOUR: std::ops::RangeInclusive<u32> = 0xc001_0000..=0xc001_0007;

/// Registers that are there though no counter is: they are zero, and forget what is written, as under KVM without counters.
fn without_counter(cpu: &Cpu, msr: u32) -> bool {
    let amd = cpu.cpuid.vendor() == Vendor::Amd;
    amd && !cpu.cpuid.has_counters() && AMD_FIRST_FOUR.contains(&msr)
}

/// RDMSR; `None` is none of the counters' registers.
pub(crate) fn read_msr(cpu: &mut Cpu, msr: u32) -> Option<u64> {
    if without_counter(cpu, msr) {
        return Some(0);
    }
    let register = register(cpu, msr)?;
    cpu.sync_counters();
    let pmu = &cpu.pmu;
    Some(match register {
        Register::Counter(n) => pmu.counters[n].value,
        Register::Select(n) => pmu.select[n],
        Register::FixedControl => pmu.fixed_control,
        Register::GlobalStatus => pmu.status,
        Register::GlobalControl => pmu.global_control,
        Register::ClearStatus => 0,
    })
}

/// WRMSR; `None` is #GP(0), or none of the counters' registers.
pub(crate) fn write_msr(cpu: &mut Cpu, msr: u32, v: u64) -> Option<()> {
    const FIXED_BITS: u64 = 0xbbb;
    if without_counter(cpu, msr) {
        return Some(());
    }
    let register = register(cpu, msr)?;
    let vendor = cpu.cpuid.vendor();
    let intel = vendor == Vendor::Intel;
    cpu.sync_counters();
    let pmu = &mut cpu.pmu;
    match register {
        // The upper half cannot be written: it is the sign.
        Register::Counter(n) if intel && n < FIRST_FIXED => {
            pmu.counters[n].value = v as i32 as u64 & MASK;
        }
        Register::Counter(n) => pmu.counters[n].value = v & MASK,
        Register::Select(_) if intel && v & INTEL_RESERVED != 0 => return None,
        Register::Select(n) if intel => pmu.select[n] = v,
        Register::Select(n) => pmu.select[n] = v & AMD_KEPT,
        Register::FixedControl if v & !FIXED_BITS == 0 => pmu.fixed_control = v,
        Register::GlobalControl if v & !GLOBAL_BITS == 0 => pmu.global_control = v,
        Register::ClearStatus if v & !STATUS_BITS == 0 => pmu.status &= !v,
        _ => return None,
    }
    pmu.choose(vendor);
    Some(())
}

/// RDPMC: EDX:EAX is the counter that ECX names.
pub(crate) fn rdpmc(cpu: &mut Cpu) -> Result<(), Exception> {
    /// Intel: a fixed counter.
    const FIXED_COUNTER: u32 = 1 << 30;
    let open = cpu.cr4.contains(Cr4::PCE) || cpu.cpl == 0 || !cpu.cr0.contains(Cr0::PE);
    let n = cpu.reg(Gpr::Rcx) as u32;
    let intel = cpu.cpuid.vendor() == Vendor::Intel;
    let (n, first, most) = match intel {
        true if n & FIXED_COUNTER != 0 => (n & !FIXED_COUNTER, FIRST_FIXED, FIXED),
        true => (n, 0, GENERAL),
        false => (n, 0, CORE),
    };
    let n = n as usize;
    if !open || !cpu.cpuid.has_counters() || n >= most {
        return Err(Exception::gp(0));
    }
    cpu.sync_counters();
    let value = cpu.pmu.counters[first + n].value;
    cpu.gpr[Gpr::Rax as usize] = value & 0xffff_ffff;
    cpu.gpr[Gpr::Rdx as usize] = value >> 32;
    Ok(())
}

impl Cpu {
    /// An engine begins to run the CPU.
    #[inline]
    pub fn begin_counting(&mut self) {
        self.pmu.running = true;
        if self.pmu.on {
            self.pmu.since = arch_host::tsc();
            self.pmu.plan();
        }
    }

    /// It ends: the CPU halts, or the machine has something to do.
    #[inline]
    pub fn end_counting(&mut self) {
        if self.pmu.on {
            self.sync_counters();
        }
        self.pmu.running = false;
    }

    /// Adds to the counters what they counted since the last time.
    fn sync_counters(&mut self) {
        self.pmu.sync(arch_host::tsc(), self.cpl);
    }

    /// Before an instruction that is interpreted: synchronizes where the privilege has changed since.
    #[inline]
    pub(crate) fn begin_step(&mut self) {
        if self.pmu.cpl != self.cpl {
            self.sync_counters();
        }
    }

    /// After it; true where an overflow is to interrupt.
    #[inline]
    pub(crate) fn end_step(&mut self) -> bool {
        if self.pmu.cpl != self.cpl || self.pmu.retired >= self.pmu.left {
            self.sync_counters();
        }
        self.pmu.due
    }

    /// Between instructions: raises the interrupt of an overflow, and has the machine call when the next one is due.
    #[inline]
    pub(crate) fn follow_counters(&mut self, bus: &mut dyn Bus) {
        if self.pmu.on || self.pmu.due {
            self.raise_overflows(bus);
        }
    }

    #[cold]
    fn raise_overflows(&mut self, bus: &mut dyn Bus) {
        /// What is further away is seen by who comes by: some minutes.
        const FAR: u64 = 1 << 40;
        let now = arch_host::tsc();
        if now >= self.pmu.deadline || self.pmu.retired >= self.pmu.left || self.pmu.cpl != self.cpl
        {
            self.pmu.sync(now, self.cpl);
        }
        if std::mem::take(&mut self.pmu.due) {
            self.counters.counter_interrupts += 1;
            bus.counter_interrupt(self.cpuid.traits().counter_interrupt_masks_itself);
        }
        let deadline = self.pmu.deadline;
        let left = deadline.saturating_sub(now);
        if deadline != self.pmu.told && left < FAR {
            self.pmu.told = deadline;
            let nanoseconds = u128::from(left) * 1_000_000_000 / u128::from(self.tsc_hz.max(1));
            bus.set_counter_alarm(nanoseconds as u64);
        }
    }
}
