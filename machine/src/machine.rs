//! A machine from its start to its end, over reboots.
//!
//! An [`Instance`] is everything that a power-on makes new: RAM, chips, engines. A reboot drops one and makes the
//! next, so no chip needs a reset path of its own and nothing survives by accident.

use std::sync::Arc;
use std::time::Instant;

use doppel_device::{Backed, PowerRequest};
use doppel_memory::MOST_CPUS;
use doppel_x86::{CpuidModel, TscMeasurement};

use crate::boot::BootError;
use crate::config::MachineConfig;
use crate::control::{Cause, Control, StopHandle};
use crate::death::{Death, DeathCause};
use crate::engine::{self, EngineError, EngineKind, Host, Selection};
use crate::instance::{Instance, Loaded, Over};
use crate::serial::CharLink;
use crate::stats::{self, Stats};

/// Why a machine could not be made or could not go on: the host's or the user's fault, never the guest's.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// An impossible number of vCPUs.
    #[error("{0} vCPUs are not possible: give --cpus 1 to {MOST_CPUS}")]
    Cpus(u32),
    /// The engine asked for cannot be had.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The host cannot carry the processor asked for.
    #[error(transparent)]
    CpuModel(#[from] doppel_x86::CpuModelError),
    /// No guest RAM.
    #[error(transparent)]
    Ram(#[from] doppel_memory::RamError),
    /// Kernel or initial RAM disk cannot be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// More virtio devices than there are slots.
    #[error("{0} virtio devices are not possible: there are 31 slots")]
    Devices(usize),
    /// The wiring is wrong.
    #[error("two devices at one address: {0}")]
    Bus(#[from] doppel_device::BusError),
    /// So is the PCI bus.
    #[error(transparent)]
    Pci(#[from] doppel_pc::PciSlotTaken),
    /// A network cannot be had.
    #[error(transparent)]
    Net(#[from] doppel_net::NetError),
    /// The host refused something.
    #[error("{0}: {1}")]
    Host(&'static str, std::io::Error),
    /// A thread of the monitor panicked: a bug.
    #[error("a thread of the monitor panicked")]
    Broken,
}

/// The counter of the bytes that records of translations take.
const RECORDS: &str = "translation_metadata_bytes";

/// How a machine ended.
#[derive(Clone, Debug)]
pub enum Ending {
    /// The guest switched the machine off.
    PoweredOff,
    /// The guest reset the machine, with [`MachineConfig::no_reboot`].
    Reset,
    /// The guest halted for good and said so ("reboot: System halted").
    Halted,
    /// The guest wrote to the debug-exit port; the exit status that follows from it.
    DebugExit(u8),
    /// The guest died.
    Died(Box<Death>),
    /// [`StopHandle::stop`] was called.
    Stopped,
}

/// A virtual machine.
pub struct Machine {
    config: MachineConfig,
    selection: Selection,
    model: Arc<CpuidModel>,
    control: Arc<Control>,
    serial: Arc<CharLink>,
    first: Option<Instance>,
    stats: Stats,
}

impl Machine {
    /// Makes a machine, loads its kernel and leaves it switched off. Every problem with files, engine and
    /// memory shows here.
    pub fn new(config: MachineConfig) -> Result<Self, MachineError> {
        if !(1..=MOST_CPUS as u32).contains(&config.cpus) {
            return Err(MachineError::Cpus(config.cpus));
        }
        let tsc = TscMeasurement::start();
        // Loading lasts longer than the measurement.
        let (loaded, selection) = load(&config)?;
        let control = Arc::new(Control::default());
        let serial = Arc::new(CharLink::default());
        let model = Arc::new(CpuidModel::of(config.cpu, tsc.finish(), config.cpus)?);
        let first = Instance::new(&config, loaded, selection.engine, &model, &control, &serial)?;
        let stats = Stats {
            engine: selection.engine.to_string(),
            engine_reason: selection.reason.clone(),
            cpus: config.cpus,
            memory_bytes: config.memory,
            ..Stats::default()
        };
        Ok(Machine {
            config,
            selection,
            model,
            control,
            serial,
            first: Some(first),
            stats,
        })
    }

    /// Which engine was taken, and why; its text is the line that a user is shown.
    pub fn engine(&self) -> &Selection {
        &self.selection
    }

    /// Ends the machine from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle::new(self.control.clone())
    }

    /// The serial port, for the back-end to call when it has input or room for output.
    pub fn serial_frontend(&self) -> Arc<dyn Backed> {
        self.serial.clone()
    }

    /// What was counted so far.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }

    /// Switches the machine on and runs it to its end, rebooting as often as the guest asks for it.
    pub fn run(&mut self) -> Result<Ending, MachineError> {
        let start = Instant::now();
        let ending = self.run_boots();
        self.stats.seconds.wall += stats::seconds(start.elapsed());
        ending
    }

    fn run_boots(&mut self) -> Result<Ending, MachineError> {
        loop {
            let instance = match self.first.take() {
                Some(instance) => instance,
                None => self.instance()?,
            };
            self.stats.boots += 1;
            if let Some(ending) = self.run_instance(instance)? {
                return Ok(ending);
            }
            self.control.restart();
        }
    }

    fn instance(&self) -> Result<Instance, MachineError> {
        let engine = self.selection.engine;
        let (control, serial) = (&self.control, &self.serial);
        let loaded = Loaded::new(&self.config, engine)?;
        Instance::new(&self.config, loaded, engine, &self.model, control, serial)
    }

    /// Runs one boot to its end; `None` where the machine is to start again.
    fn run_instance(&mut self, instance: Instance) -> Result<Option<Ending>, MachineError> {
        let over = instance.run(&self.control)?;
        let mut records = 0;
        for v in &over.vcpus {
            let counters = v.engine.stats();
            records += counters.get(RECORDS).copied().unwrap_or_default();
            self.stats
                .add_vcpu(&counters, &v.bus.exits, &v.exits, &v.time);
        }
        self.stats.memory_ahead_bytes += over.vcpus[0].engine.cpu().ram.ahead_bytes();
        self.stats.add_devices(&over.devices);
        self.stats.memory = over.memory.map(|memory| memory.with_records(records));
        self.ending(&over)
    }

    fn ending(&self, over: &Over) -> Result<Option<Ending>, MachineError> {
        let died = |cause| {
            let engines = over.vcpus.iter().map(|v| v.engine.as_ref());
            Ending::Died(Box::new(Death::new(cause, engines)))
        };
        Ok(Some(match over.cause {
            Cause::Power(PowerRequest::PowerOff) => Ending::PoweredOff,
            Cause::Power(PowerRequest::Reset) if !self.config.no_reboot => return Ok(None),
            Cause::Power(PowerRequest::Reset) => Ending::Reset,
            Cause::Power(PowerRequest::Exit(status)) => Ending::DebugExit(status),
            Cause::TripleFault => died(DeathCause::TripleFault),
            Cause::Panic => died(DeathCause::Panic),
            Cause::Halted if over.announced_halt => Ending::Halted,
            Cause::Halted => died(DeathCause::Halted),
            Cause::Stop => Ending::Stopped,
            Cause::Broken => return Err(MachineError::Broken),
        }))
    }
}

/// Loads what is to be booted for the engine that is taken. Where that may execute user code directly, it is tried out on the way.
fn load(config: &MachineConfig) -> Result<(Loaded, Selection), MachineError> {
    let matters = engine::check_direct_matters(config.engine, config.memory_backing);
    let tried = matters
        .is_ok()
        .then(|| Loaded::new(config, EngineKind::Direct));
    let tried = tried.transpose()?;
    let direct = matters.and_then(|()| tried.as_ref().map_or(Ok(()), Loaded::direct_works));
    let selection = engine::select(config.engine, &Host::probe(direct))?;
    let loaded = match tried.filter(|loaded| loaded.suits(selection.engine)) {
        Some(loaded) => loaded,
        None => Loaded::new(config, selection.engine)?,
    };
    Ok((loaded, selection))
}
