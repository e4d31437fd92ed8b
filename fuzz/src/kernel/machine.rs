//! One engine with the machine around it, which runs case after case, and what it leaves behind.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use doppel_direct::{Direct, DirectHost, DirectOptions};
use doppel_memory::{Backing, GuestRam};
use doppel_translate::{Translate, TranslateOptions};
use doppel_x86::interpret::Interpret;
use doppel_x86::{
    Activity, Bus, Cpu, CpuidModel, Cr0, Cr4, Dtr, Efer, Engine, EngineStats, Exit, FpuArea, Gpr,
    Kick, Msrs, Rflags, Seg, Segment,
};

use super::image::Image;
use super::layout::*;
use crate::gadfly::Gadfly;
use crate::time_unsafe::thread_time;
use crate::watchdog::{WATCH_PERIOD, Watchdog};
use crate::xsave::{Vectors, XsaveLayout};

const PAGE: usize = 0x1000;
/// Times that a halted kernel is woken.
pub const MOST_WAKES: u32 = 40;
/// The interrupt that wakes it.
const WAKE_VECTOR: u8 = 0x7f;
const MOST_NOTED: usize = 4000;

/// Address or port, size (with bit 7 where it is read), value.
pub type Access = (u64, u8, u64);

/// What a kernel sees of the machine, and what the machine saw of it.
#[derive(Default)]
pub struct KernelBus {
    ram: Option<Arc<GuestRam>>,
    pending: Option<u8>,
    nmi: bool,
    cr8: u64,
    dma: Dma,
    /// Accesses to ports and devices.
    pub noted: Vec<Access>,
}

/// Where a device writes, and what.
pub type Dma = (u64, Vec<u8>);

impl KernelBus {
    /// Of a machine with this RAM.
    pub fn new(ram: Arc<GuestRam>) -> Self {
        KernelBus {
            ram: Some(ram),
            ..KernelBus::default()
        }
    }

    fn note(&mut self, at: u64, size: u8, value: u64) {
        if self.noted.len() < MOST_NOTED {
            self.noted.push((at, size, value));
        }
    }

    /// As at power-on, for a case that has this written.
    pub fn reset(&mut self, dma: &Dma) {
        (self.pending, self.nmi, self.cr8) = (None, false, 0);
        self.noted.clear();
        self.dma = dma.clone();
    }
}

impl Bus for KernelBus {
    fn port_read(&mut self, port: u16, size: u8) -> u32 {
        self.note(port.into(), size | 0x80, 0);
        (u32::from(port) * 0x0101) & (u32::MAX >> (32 - 8 * u32::from(size)))
    }
    fn port_write(&mut self, port: u16, size: u8, value: u32) {
        self.note(port.into(), size, value.into());
        match port {
            PORT_INTERRUPT => self.pending = Some(value as u8 | 0x10),
            PORT_NMI => self.nmi = true,
            PORT_DMA => {
                if let Some(ram) = &self.ram {
                    ram.write_from_device(self.dma.0, &self.dma.1);
                }
            }
            _ => {}
        }
    }
    fn mmio_read(&mut self, gpa: u64, size: u8) -> u64 {
        self.note(gpa, size | 0x80, 0);
        // Each byte is its address's lowest, whatever the size.
        let bytes: [u8; 8] = std::array::from_fn(|n| (gpa as u8).wrapping_add(n as u8));
        u64::from_le_bytes(bytes) & (u64::MAX >> (64 - 8 * u32::from(size)))
    }
    fn mmio_write(&mut self, gpa: u64, size: u8, value: u64) {
        self.note(gpa, size, value);
    }
    fn apic_msr_read(&mut self, _: u32) -> Option<u64> {
        None
    }
    fn apic_msr_write(&mut self, _: u32, _: u64, _: u64) -> Option<()> {
        None
    }
    fn cr8(&mut self) -> u64 {
        self.cr8
    }
    fn set_cr8(&mut self, value: u64) {
        self.cr8 = value;
    }
    fn interrupt_pending(&mut self) -> bool {
        self.pending.is_some_and(|v| u64::from(v >> 4) > self.cr8)
    }
    fn interrupt_acknowledge(&mut self) -> Option<u8> {
        self.pending.take()
    }
    fn take_nmi(&mut self) -> bool {
        std::mem::take(&mut self.nmi)
    }
}

/// How a case ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The schedule was done, or the log was full.
    Finished,
    /// In a halt that nothing ends.
    Halted,
    Shutdown,
    /// It was ended from outside.
    TimedOut,
}

/// Everything that is compared.
pub struct Final {
    pub ending: Ending,
    /// By name.
    pub registers: Vec<(&'static str, u64)>,
    pub vectors: Vectors,
    pub msrs: Msrs,
    pub noted: Vec<Access>,
    /// Executed, as the interpreter counts them.
    pub instructions: u64,
    /// Empty where it is as it should be.
    pub ram: Vec<u8>,
}

/// A machine of one engine.
pub struct Runner {
    pub name: &'static str,
    /// Arithmetic flags in the frames of faults are exact.
    pub exact_flags: bool,
    engine: Box<dyn Engine>,
    bus: KernelBus,
    ram: Arc<GuestRam>,
    layout: XsaveLayout,
    watchdog: Watchdog,
    gadfly: Option<Arc<Gadfly>>,
    /// Kicks of the watchdog after which a case is ended: the interpreter decides which cases do not end.
    most_kicks: u32,
    /// Processor time of its runs.
    pub spent: Duration,
    pub runs: u64,
    /// As the interpreter counts them.
    pub instructions: u64,
}

/// Which engine, and how.
#[derive(Clone, Copy)]
pub enum Kind {
    Interpret { quick: bool },
    Translate(TranslateOptions),
    Direct,
}

fn engine(kind: Kind, mut cpu: Box<Cpu>) -> Result<Box<dyn Engine>> {
    Ok(match kind {
        Kind::Interpret { quick } => {
            let mut engine = Interpret::new(cpu);
            engine.set_quick(quick);
            Box::new(engine)
        }
        Kind::Translate(options) => Box::new(Translate::new(cpu, options)?),
        Kind::Direct => {
            cpu.tsc_offset = 0;
            let host = Arc::new(DirectHost::new(&cpu.ram)?);
            let direct = Direct::new(host, &cpu, DirectOptions::always());
            let options = TranslateOptions {
                entry_flags: true,
                ..TranslateOptions::default()
            };
            let engine = Translate::new(cpu, options)?;
            Box::new(engine.leaving_user_code_to(Box::new(direct)))
        }
    })
}

impl Runner {
    /// A machine for this engine.
    pub fn new(name: &'static str, kind: Kind, model: &Arc<CpuidModel>) -> Result<Self> {
        let ram = Arc::new(GuestRam::with_backing(RAM, Backing::Memfd)?);
        let cpu = Cpu::with_model(0, ram.clone(), model.clone());
        let engine = engine(kind, cpu)?;
        Ok(Runner {
            name,
            exact_flags: match kind {
                Kind::Translate(o) => o.entry_flags || !o.flag_liveness,
                _ => true,
            },
            most_kicks: match kind {
                Kind::Interpret { quick: true } => 2,
                _ => 80,
            },
            watchdog: Watchdog::with_period(engine.kicker(), WATCH_PERIOD / 4),
            gadfly: None,
            engine,
            bus: KernelBus::new(ram.clone()),
            ram,
            layout: XsaveLayout::new(model.xcr0()),
            spent: Duration::ZERO,
            runs: 0,
            instructions: 0,
        })
    }

    /// The CPU.
    pub fn cpu_mut(&mut self) -> &mut Cpu {
        self.engine.cpu_mut()
    }

    /// The engine's counters.
    pub fn stats(&self) -> EngineStats {
        self.engine.stats()
    }

    /// Runs a case. Where `expected` is given and RAM is as there, RAM is left out.
    pub fn run(&mut self, image: &Image, dma: &Dma, expected: Option<&Final>) -> Final {
        load(&self.ram, image);
        self.bus.reset(dma);
        reset(self.engine.cpu_mut(), image);
        let before = self.engine.cpu().counters.interpreted_instructions;
        let began = thread_time();
        self.watchdog.start();
        self.set_gadfly_on(Some(self.engine.kicker()));
        let ending = self.run_to_end();
        self.set_gadfly_on(None);
        self.watchdog.stop();
        self.spent += thread_time().saturating_sub(began);
        self.runs += 1;
        let interpreted = self.engine.cpu().counters.interpreted_instructions - before;
        let instructions = expected.map_or(interpreted, |e| e.instructions);
        self.instructions += instructions;
        self.take(ending, expected, instructions)
    }

    /// Has it kicked while it runs.
    pub fn pester(&mut self, gadfly: Option<Arc<Gadfly>>) {
        self.gadfly = gadfly;
    }

    fn set_gadfly_on(&self, victim: Option<Arc<dyn Kick>>) {
        if let Some(gadfly) = &self.gadfly {
            gadfly.set_on(victim);
        }
    }

    fn run_to_end(&mut self) -> Ending {
        let mut wakes = 0;
        loop {
            match self.engine.run(&mut self.bus) {
                Exit::Kicked if self.watchdog.bites() < self.most_kicks => {}
                Exit::Kicked => return Ending::TimedOut,
                Exit::Shutdown => return Ending::Shutdown,
                Exit::Halted if is_finished(self.engine.cpu()) => return Ending::Finished,
                Exit::Halted if wakes == MOST_WAKES => return Ending::Halted,
                Exit::Halted => {
                    wakes += 1;
                    if !wake(self.engine.cpu(), &mut self.bus) {
                        return Ending::Halted;
                    }
                }
            }
        }
    }

    fn take(&self, ending: Ending, expected: Option<&Final>, instructions: u64) -> Final {
        let cpu = self.engine.cpu();
        let same = expected.is_some_and(|expected| is_equal(&self.ram, &expected.ram));
        Final {
            ending,
            registers: registers(cpu),
            vectors: Vectors::of(&cpu.fpu, &self.layout),
            msrs: cpu.msr.clone(),
            noted: self.bus.noted.clone(),
            instructions,
            ram: if same {
                Vec::new()
            } else {
                contents(&self.ram)
            },
        }
    }
}

/// All bytes of RAM.
pub fn contents(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; RAM as usize];
    for (n, page) in bytes.chunks_mut(PAGE).enumerate() {
        if let Some(p) = ram.ptr((n * PAGE) as u64) {
            p.read(page);
        }
    }
    bytes
}

/// Whether RAM holds these bytes.
pub fn is_equal(ram: &GuestRam, bytes: &[u8]) -> bool {
    let mut page = [0; PAGE];
    bytes.chunks(PAGE).enumerate().all(|(n, wanted)| {
        if let Some(p) = ram.ptr((n * PAGE) as u64) {
            p.read(&mut page);
        }
        page == *wanted
    })
}

/// Makes RAM what the image says; where it is that, translations stay.
pub fn load(ram: &GuestRam, image: &Image) {
    let mut page = [0; PAGE];
    for (n, wanted) in image.0.chunks(PAGE).enumerate() {
        let at = (n * PAGE) as u64;
        if let Some(p) = ram.ptr(at) {
            p.read(&mut page);
        }
        if page != *wanted {
            ram.write_from_device(at, wanted);
        }
    }
}

/// True where the kernel has come to its end.
pub fn is_finished(cpu: &Cpu) -> bool {
    cpu.rip & !WIDE == FINISH + 2 && cpu.cpl == 0
}

/// Wakes a halted CPU, if anything can.
pub fn wake(cpu: &Cpu, bus: &mut KernelBus) -> bool {
    if cpu.activity != Activity::Halted {
        return false;
    }
    if cpu.rflags.contains(Rflags::IF) && bus.cr8 < u64::from(WAKE_VECTOR >> 4) {
        bus.pending = Some(WAKE_VECTOR);
        return true;
    }
    bus.nmi = true;
    !cpu.nmi_blocked
}

fn flat(selector: u16, attributes: u32) -> Segment {
    Segment {
        base: 0,
        limit: !0,
        attributes,
        selector,
    }
}

/// The CPU at the dispatcher.
pub fn reset(cpu: &mut Cpu, image: &Image) {
    reset_long(cpu, image);
    if !cpu.efer.contains(Efer::LMA) {
        reset_protected(cpu);
    }
}

/// What differs without long mode.
fn reset_protected(cpu: &mut Cpu) {
    cpu.seg[Seg::Cs as usize] = flat(K64, 0xc09b);
    cpu.idtr.limit = 0x7ff;
    cpu.msr.sysenter_cs = K64.into();
    if cpu.cr4.contains(Cr4::PAE) {
        let entry = |n: u64| cpu.ram.load(PML4 + 8 * n).unwrap_or(0);
        cpu.pdpte = std::array::from_fn(|n| entry(n as u64));
    }
}

fn reset_long(cpu: &mut Cpu, image: &Image) {
    cpu.gpr = [0; 16];
    cpu.gpr[Gpr::Rsp as usize] = KERNEL_STACK;
    cpu.rip = DISPATCH;
    cpu.rflags = Rflags::ONE;
    cpu.seg = [flat(KDS, 0xc093); 6];
    cpu.seg[Seg::Cs as usize] = flat(K64, 0xa09b);
    cpu.ldtr = Segment {
        base: LDT,
        limit: 0xff,
        attributes: 0x82,
        selector: LDTR,
    };
    cpu.tr = Segment {
        base: TSS,
        limit: TSS_LIMIT as u32,
        attributes: 0x8b,
        selector: TR,
    };
    cpu.gdtr = Dtr {
        base: GDT,
        limit: 0xfff,
    };
    cpu.idtr = Dtr {
        base: IDT,
        limit: 0xfff,
    };
    cpu.cr0 = Cr0::from_bits_truncate(image.word(BASE_CR0));
    cpu.cr4 = Cr4::from_bits_truncate(image.word(BASE_CR4));
    cpu.efer = Efer::from_bits_truncate(image.word(BASE_EFER));
    let levels_5 = cpu.efer.contains(Efer::LMA) && cpu.cr4.contains(Cr4::LA57);
    (cpu.cr2, cpu.cr3) = (0, PML4 + if levels_5 { TO_PML5 } else { 0 });
    cpu.pkru = image.word(BASE_PKRU) as u32;
    cpu.xcr0 = cpu.cpuid.xcr0();
    cpu.dr = [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400];
    cpu.cpl = 0;
    (cpu.interrupt_shadow, cpu.mov_ss_shadow, cpu.nmi_blocked) = (false, false, false);
    cpu.activity = Activity::Active;
    cpu.msr = Msrs {
        star: 0x0023_0010_0000_0000,
        lstar: SYSCALL_ENTRY,
        cstar: SYSCALL_ENTRY,
        sfmask: 0x4_4700,
        kernel_gs_base: KERNEL_DATA,
        sysenter_cs: K64.into(),
        sysenter_esp: CALL_STACK,
        sysenter_eip: SYSENTER_ENTRY,
        pat: 0x0007_0406_0007_0406,
        misc_enable: 1,
        ..Msrs::default()
    };
    cpu.pdpte = [0; 4];
    cpu.fpu = FpuArea::reset();
    cpu.flush_tlb(true);
}

/// What is compared of a CPU, by name.
pub fn registers(cpu: &Cpu) -> Vec<(&'static str, u64)> {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12",
        "r13", "r14", "r15",
    ];
    const SEGMENTS: [[&str; 3]; 8] = [
        ["es", "es base", "es limit, attributes"],
        ["cs", "cs base", "cs limit, attributes"],
        ["ss", "ss base", "ss limit, attributes"],
        ["ds", "ds base", "ds limit, attributes"],
        ["fs", "fs base", "fs limit, attributes"],
        ["gs", "gs base", "gs limit, attributes"],
        ["ldtr", "ldtr base", "ldtr limit, attributes"],
        ["tr", "tr base", "tr limit, attributes"],
    ];
    let mut all: Vec<_> = NAMES.into_iter().zip(cpu.gpr).collect();
    for (names, s) in SEGMENTS
        .iter()
        .zip(cpu.seg.iter().chain([&cpu.ldtr, &cpu.tr]))
    {
        let rest = u64::from(s.limit) << 32 | u64::from(s.attributes);
        all.extend(names.iter().copied().zip([s.selector.into(), s.base, rest]));
    }
    let bit = u64::from;
    all.extend([
        ("rip", cpu.rip),
        ("rflags", cpu.rflags.bits()),
        ("cr0", cpu.cr0.bits()),
        ("cr2", cpu.cr2),
        ("cr3", cpu.cr3),
        ("cr4", cpu.cr4.bits()),
        ("efer", cpu.efer.bits()),
        ("xcr0", cpu.xcr0),
        ("pkru", cpu.pkru.into()),
        ("dr0", cpu.dr[0]),
        ("dr1", cpu.dr[1]),
        ("dr6", cpu.dr[6]),
        ("dr7", cpu.dr[7]),
        ("gdtr base", cpu.gdtr.base),
        ("gdtr limit", cpu.gdtr.limit.into()),
        ("idtr base", cpu.idtr.base),
        ("idtr limit", cpu.idtr.limit.into()),
        ("cpl", cpu.cpl.into()),
        (
            "shadow",
            bit(cpu.interrupt_shadow) | bit(cpu.mov_ss_shadow) << 1,
        ),
        ("nmi blocked", bit(cpu.nmi_blocked)),
        ("active", bit(cpu.activity == Activity::Active)),
    ]);
    all
}

#[cfg(test)]
mod tests {
    use super::super::case::Case;
    use super::super::compare::differences;
    use super::super::image::Supervisors;
    use super::super::write::Offered;
    use super::*;
    use doppel_x86::CpuFeatures;

    #[test]
    fn a_kernel_that_is_changed_ends_otherwise() {
        let model = Arc::new(CpuidModel::host(1));
        let mut runner = Runner::new("interpret", Kind::Interpret { quick: true }, &model).unwrap();
        let supervisors = Supervisors::new().unwrap();
        let offered = Offered {
            physical_bits: model.physical_bits(),
            features: CpuFeatures::empty(),
        };
        let mut compared = 0;
        for number in 0..10 {
            let case = Case::random(&supervisors, 3, number, offered).unwrap();
            let image = case.image().unwrap();
            let expected = runner.run(&image, &case.dma, None);
            let records = super::super::compare::records(&expected.ram);
            if expected.ending != Ending::Finished || records == MOST_RECORDS {
                continue;
            }
            compared += 1;
            let again = runner.run(&image, &case.dma, Some(&expected));
            assert_eq!(differences(&again, &expected, true), Vec::<String>::new());
            // One step more, and the log is longer.
            let mut longer = case.clone();
            longer.schedule.push(0);
            let other = runner.run(&longer.image().unwrap(), &case.dma, Some(&expected));
            assert!(!differences(&other, &expected, true).is_empty());
        }
        assert!(compared > 5);
    }
}
