//! One boot of a machine: everything that a power-on makes new, and the threads that run it.

use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, Scope, ScopedJoinHandle};

use doppel_direct::{Direct, DirectError, DirectHost};
use doppel_footprint::Footprint;
use doppel_memory::GuestRam;
use doppel_seccomp::{Kind, narrowed};
use doppel_translate::{SharedCode, Translate, TranslateOptions};
use doppel_x86::interpret::Interpret;
use doppel_x86::{Activity, Cpu, CpuidModel, Engine};

use crate::boot::{self, BootError, BootFile, BootSource, Entry, KernelSource};
use crate::config::MachineConfig;
use crate::control::{Cause, Control};
use crate::cpu_bus::CpuBus;
use crate::doorbell::Doorbell;
use crate::engine::{EngineError, EngineKind};
use crate::machine::MachineError;
use crate::pc::{Pc, PcParts};
use crate::probe::Probe;
use crate::serial::CharLink;
use crate::slice_unsafe::ask_for_short_slices;
use crate::vcpu::{RunExits, Sleepers, Vcpu, VcpuTime};
use crate::virtio::{DeviceCounters, VirtioTransport};
use crate::{acpi, smbios, spare};

/// RAM with what is to be booted in it.
pub struct Loaded {
    ram: Arc<GuestRam>,
    entry: Entry,
    direct: Tried,
}

/// Who executes user code directly: nobody for engines that have no use for it.
type Tried = Option<Result<Arc<DirectHost>, DirectError>>;

impl Loaded {
    /// Makes RAM and loads kernel, tables and what goes with them. What executes user code directly starts meanwhile.
    pub fn new(config: &MachineConfig, engine: EngineKind) -> Result<Self, MachineError> {
        let backing = config.memory_backing.unwrap_or(engine.usual_backing());
        let ram = GuestRam::with_backing(config.memory, backing)?;
        let (direct, entry) = thread::scope(|scope| {
            let start = narrowed(Kind::Control, || {
                let host = DirectHost::new(&ram)?;
                host.prices();
                Ok(Arc::new(host))
            });
            let thread = thread::Builder::new().name("direct".into());
            let started = match engine {
                EngineKind::Direct => Some(thread.spawn_scoped(scope, start)),
                EngineKind::Interpret | EngineKind::Translate => None,
            };
            let entry = load(config, &ram);
            let direct = started.map(|started| {
                let started = started.map_err(|e| DirectError::Host("thread", e))?;
                started.join().unwrap_or_else(|panic| resume_unwind(panic))
            });
            (direct, entry)
        });
        if config.memory_ahead {
            // Without, the guest asks page by page, which is slower and nothing else.
            let _ = ram.ask_ahead();
        }
        Ok(Loaded {
            ram: Arc::new(ram),
            entry: entry?,
            direct,
        })
    }

    /// Whether user code can be executed directly; the reason where it cannot.
    pub fn direct_works(&self) -> Result<(), String> {
        match &self.direct {
            Some(Ok(_)) => Ok(()),
            Some(Err(e)) => Err(e.to_string()),
            None => Err("it was not tried".to_owned()),
        }
    }

    /// Whether this is what [`Self::new`] would make for an engine.
    pub fn suits(&self, engine: EngineKind) -> bool {
        self.direct.is_some() == (engine == EngineKind::Direct)
    }
}

/// A machine that is about to run.
pub struct Instance {
    /// Bytes of RAM, where it is to be told what else was taken.
    weighed: Option<u64>,
    pc: Pc,
    vcpus: Vec<Vcpu<CpuBus>>,
}

/// A machine that has run.
pub struct Over {
    /// Why it ended.
    pub cause: Cause,
    /// Its vCPUs as they were at the end.
    pub vcpus: Vec<Vcpu<CpuBus>>,
    /// The last thing that its kernel printed is that it halts.
    pub announced_halt: bool,
    /// What its devices counted.
    pub devices: DeviceCounters,
    /// What it took of the host's memory, records of translations not told apart.
    pub memory: Option<Footprint>,
}

impl Instance {
    /// Makes engines and chips for what was loaded.
    pub fn new(
        config: &MachineConfig,
        loaded: Loaded,
        engine: EngineKind,
        model: &Arc<CpuidModel>,
        control: &Arc<Control>,
        serial: &CharLink,
    ) -> Result<Self, MachineError> {
        let Loaded { ram, entry, direct } = loaded;
        let engines = Engines::new(config, engine, direct)?;
        let cpus = on_a_stack_of_its_own(|| new_cpus(config.cpus, &ram, model, &entry))?;
        let probes: Vec<Arc<Probe>> = cpus.iter().map(|_| Arc::default()).collect();
        let engines = cpus
            .into_iter()
            .zip(&probes)
            .map(|(cpu, probe)| engines.engine(cpu, probe))
            .collect::<Result<Vec<_>, _>>()?;
        let sleepers = Sleepers::new(config.cpus);
        let doorbells: Vec<_> = engines.iter().map(|e| Doorbell::new(e.kicker())).collect();
        for (engine, doorbell) in engines.iter().zip(&doorbells) {
            let doorbell = doorbell.clone();
            engine.cpu().peer.set_alarm(move || doorbell.ring());
        }
        let pc = Pc::new(PcParts {
            config,
            tsc_hz: model.tsc_hz(),
            doorbells: &doorbells,
            control,
            serial,
            sleepers: &sleepers,
            ram: &ram,
        })?;
        probes.iter().for_each(|probe| probe.by(&pc.timers));
        spare::descriptors(config.devices.len())
            .map_err(|e| MachineError::Host("descriptors for the guest's devices", e))?;
        let vcpus = engines
            .into_iter()
            .zip(doorbells)
            .zip(pc.cpu_apics())
            .map(|((engine, doorbell), apic)| Vcpu {
                bus: {
                    let id = engine.cpu().id;
                    let mut bus = CpuBus::new(&pc, id, apic, ram.clone(), config.count);
                    if model.has_counters() {
                        bus.call_for_counters(doorbell.clone());
                    }
                    bus
                },
                engine,
                doorbell,
                control: control.clone(),
                sleepers: sleepers.clone(),
                time: VcpuTime::default(),
                exits: RunExits::default(),
            })
            .collect();
        Ok(Instance {
            weighed: config.weigh.then_some(config.memory),
            pc,
            vcpus,
        })
    }

    /// Runs until something ends it.
    pub fn run(self, control: &Control) -> Result<Over, MachineError> {
        let Instance { weighed, pc, vcpus } = self;
        control.set_doorbells(vcpus.iter().map(|v| v.doorbell.clone()).collect());
        let (cause, memory, vcpus) = thread::scope(|scope| {
            let timers = spawn(scope, (Kind::Device, "timers"), control, || pc.timers.run())?;
            let vcpus = start(scope, control, vcpus);
            let cause = control.wait();
            // While all of it is there.
            let memory = weighed.and_then(|ram| Footprint::own(ram).ok());
            let vcpus = vcpus.into_iter().map(|v| join(v?)).collect::<Vec<_>>();
            pc.virtio.stop();
            pc.timers.stop();
            join(timers)?;
            let vcpus = vcpus.into_iter().collect::<Result<Vec<_>, _>>()?;
            Ok::<_, MachineError>((cause, memory, vcpus))
        })?;
        Ok(Over {
            cause,
            vcpus,
            announced_halt: pc.watch.announced_halt(),
            devices: pc.virtio.counters.clone(),
            memory,
        })
    }
}

/// Writes tables, kernel and what goes with it into RAM.
fn load(config: &MachineConfig, ram: &GuestRam) -> Result<Entry, MachineError> {
    let virtio_mmio = match config.virtio {
        VirtioTransport::Pci => 0,
        VirtioTransport::Mmio => config.devices.len() as u32,
    };
    let rsdp = acpi::place_tables(ram, config.cpus, virtio_mmio)?;
    smbios::place_tables(ram, config.cpus)?;
    Ok(boot::load(ram, &boot_source(config)?, rsdp)?)
}

/// What is to be booted; a boot disk is read anew each time.
fn boot_source(config: &MachineConfig) -> Result<BootSource, BootError> {
    let source = match &config.kernel {
        KernelSource::File(path) => BootSource {
            kernel: path.into(),
            cmdline: config.cmdline.clone(),
            ..BootSource::default()
        },
        KernelSource::Disk(disk) => disk.read(config.memory, &config.cmdline)?,
    };
    let given = config.initrd.as_ref().map(BootFile::from);
    let module = |(file, cmdline): &(PathBuf, String)| (file.into(), cmdline.clone());
    Ok(BootSource {
        modules: config.modules.iter().map(module).collect(),
        initrd: given.or(source.initrd),
        ..source
    })
}

/// Does something that needs much stack once: a CPU, which is half a megabyte, passes over the stack on its way to the heap, and
/// stack that was touched is never given back.
fn on_a_stack_of_its_own<T: Send>(body: impl FnOnce() -> T + Send) -> Result<T, MachineError> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, body);
        let thread = thread.map_err(|e| MachineError::Host("a thread cannot be started", e))?;
        thread.join().map_err(|_| MachineError::Broken)
    })
}

/// The CPUs after reset, the first as the boot protocol wants it, with their TSCs in step.
fn new_cpus(
    count: u32,
    ram: &Arc<GuestRam>,
    model: &Arc<CpuidModel>,
    entry: &Entry,
) -> Vec<Box<Cpu>> {
    let mut first = Cpu::with_model(0, ram.clone(), model.clone());
    entry.apply(&mut first);
    let mut cpus = vec![first];
    for id in 1..count {
        let mut cpu = Cpu::with_model(id, ram.clone(), model.clone());
        cpu.activity = Activity::WaitForSipi;
        (cpu.tsc_origin, cpu.tsc_offset) = (cpus[0].tsc_origin, cpus[0].tsc_offset);
        // As firmware leaves them.
        cpu.msr.mtrr_def_type = cpus[0].msr.mtrr_def_type;
        cpu.msr.mtrr_fixed = cpus[0].msr.mtrr_fixed;
        cpu.msr.mtrr_physical = cpus[0].msr.mtrr_physical;
        cpus.push(cpu);
    }
    cpus
}

/// What makes the engines of a machine.
struct Engines<'a> {
    config: &'a MachineConfig,
    kind: EngineKind,
    /// What the engines share that execute user code directly.
    direct: Option<Arc<DirectHost>>,
    code: SharedCode,
}

impl<'a> Engines<'a> {
    fn new(
        config: &'a MachineConfig,
        kind: EngineKind,
        direct: Tried,
    ) -> Result<Self, EngineError> {
        let direct = direct.transpose().map_err(refused)?;
        Ok(Engines {
            config,
            kind,
            direct,
            code: SharedCode::default(),
        })
    }

    fn engine(
        &self,
        mut cpu: Box<Cpu>,
        probe: &Arc<Probe>,
    ) -> Result<Box<dyn Engine>, EngineError> {
        if self.kind == EngineKind::Interpret {
            return Ok(Box::new(Interpret::new(cpu)));
        }
        let config = self.config;
        let options = TranslateOptions {
            count: config.count,
            yield_spins: config.translate.yield_spins && config.cpus > 1,
            perf_map: config.observers.perf_map.is_some(),
            ..config.translate
        };
        let direct = self.direct.as_ref().map(|host| {
            // The processor reads the host's TSC.
            cpu.tsc_offset = 0;
            Direct::new(host.clone(), &cpu, config.direct).reminded_by(probe.clone())
        });
        let observers = config.observers.clone();
        let engine = match config.cpus > 1 {
            true => Translate::sharing(cpu, options, &self.code, observers),
            false => Translate::new(cpu, options).map(|engine| engine.observed(observers)),
        };
        let engine = engine.map_err(refused)?;
        probe.calls(engine.kicker());
        Ok(Box::new(match direct {
            Some(direct) => engine.leaving_user_code_to(Box::new(direct)),
            None => engine,
        }))
    }
}

fn refused(e: impl std::error::Error) -> EngineError {
    EngineError {
        engine: "asked for",
        reason: e.to_string(),
    }
}

type Started<'scope, T> = Result<ScopedJoinHandle<'scope, T>, MachineError>;

/// Starts the vCPU threads. Where one cannot be had, the machine ends at once.
fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    control: &'scope Control,
    vcpus: Vec<Vcpu<CpuBus>>,
) -> Vec<Started<'scope, Vcpu<CpuBus>>> {
    let several = vcpus.len() > 1;
    let threads: Vec<_> = vcpus
        .into_iter()
        .map(|mut vcpu| {
            let name = format!("vcpu {}", vcpu.engine.cpu().id);
            spawn(scope, (Kind::Vcpu, &name), control, move || {
                if several {
                    ask_for_short_slices();
                }
                vcpu.run();
                vcpu
            })
        })
        .collect();
    if threads.iter().any(Result::is_err) {
        control.end(Cause::Broken);
    }
    threads
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    (kind, name): (Kind, &str),
    control: &'scope Control,
    body: impl FnOnce() -> T + Send + 'scope,
) -> Started<'scope, T> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn_scoped(
            scope,
            narrowed(kind, move || {
                let _end = EndOnPanic(control);
                body()
            }),
        )
        .map_err(|e| MachineError::Host("a thread cannot be started", e))
}

fn join<T>(thread: ScopedJoinHandle<'_, T>) -> Result<T, MachineError> {
    thread.join().map_err(|_| MachineError::Broken)
}

/// Ends the machine where the thread that holds it panics, so that nobody waits for ever.
struct EndOnPanic<'a>(&'a Control);

impl Drop for EndOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(Cause::Broken);
        }
    }
}
