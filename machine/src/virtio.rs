//! Virtio devices: what the user asks for becomes functions on the PCI bus, in slots from 1 on in the order they were asked for, or
//! pages of registers that the DSDT names.
//!
//! There is no firmware, so BARs are placed here, one after another from the start of the PCI window; a guest may move them.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use doppel_block::BlockBackend;
use doppel_device::{HostClock, Line, Region};
use doppel_memory::GuestRam;
use doppel_net::{NetConfig, Port, StartNetwork};
use doppel_pc::PciBus;
use doppel_share::Share;
use doppel_virtio::{
    BAR_SIZE, Balloon, BalloonControl, BalloonCounters, Blk, BlkCounters, Console, ConsoleBackend,
    ConsoleCounters, Fs, MMIO_SIZE, Net, NetCounters, PciWiring, Rng, VirtioDevice, VirtioMmio,
    VirtioPci, Vsock, VsockCounters, VsockSocket,
};

use crate::acpi;
use crate::config::MachineConfig;
use crate::layout;
use crate::machine::MachineError;
use crate::pc::Pc;
use crate::serial::CharLink;

/// A device that a machine is to have.
#[derive(Clone)]
#[non_exhaustive]
pub enum DeviceConfig {
    /// An entropy device, fed by the host's random number generator.
    Rng,
    /// A disk.
    Disk {
        /// What it is on the host.
        backend: Arc<dyn BlockBackend>,
        /// Its serial number; 20 bytes of it count.
        serial: String,
        /// The vCPU that asks for something that needs no waiting does it itself.
        at_once: bool,
    },
    /// A network card.
    Net {
        /// What it is plugged into.
        config: NetConfig,
        /// What starts a process for that, where it is to have one of its own.
        apart: Option<StartNetwork>,
    },
    /// A shared directory.
    Share(Arc<Share>),
    /// A console.
    Console {
        /// What it is on the host.
        backend: ConsoleBackend,
        /// What that tells of its news.
        link: Arc<CharLink>,
        /// The vCPU that notifies sends by itself.
        at_once: bool,
    },
    /// A memory balloon.
    Balloon {
        /// The host's side of it.
        control: Arc<BalloonControl>,
        /// How often the guest is asked what its memory is like.
        period: Option<Duration>,
    },
    /// Sockets between guest and host.
    Vsock {
        /// The guest's address, 3 or more.
        cid: u32,
        /// The host's end.
        socket: Arc<VsockSocket>,
    },
}

impl DeviceConfig {
    /// The device; its counters come to the others.
    fn device(
        &self,
        cpus: u32,
        counters: &mut DeviceCounters,
    ) -> Result<Box<dyn VirtioDevice>, MachineError> {
        Ok(match self {
            DeviceConfig::Rng => Box::new(Rng::new()),
            DeviceConfig::Disk {
                backend,
                serial,
                at_once,
            } => {
                let queues = acpi::possible_cpus(cpus);
                let disk = Blk::new(backend.clone(), serial, queues).at_once(*at_once);
                counters.disks.push(disk.counters());
                Box::new(disk)
            }
            DeviceConfig::Net { config, apart } => {
                let card = card(config, apart.as_ref(), counters.cards.len() as u8)?;
                counters.cards.push(card.counters());
                Box::new(card)
            }
            DeviceConfig::Share(share) => Box::new(Fs::new(share.clone())),
            DeviceConfig::Console {
                backend,
                link,
                at_once,
            } => {
                let console = Console::new(backend.clone(), *at_once).map_err(refused)?;
                link.connect(console.frontend());
                counters.consoles.push(console.counters());
                Box::new(console)
            }
            DeviceConfig::Balloon { control, period } => {
                let balloon = Balloon::new(control.clone(), *period);
                let counted = (control.clone(), balloon.counters());
                counters.balloons.push(Arc::new(counted));
                Box::new(balloon)
            }
            DeviceConfig::Vsock { cid, socket } => {
                let vsock = Vsock::new(*cid, socket.clone());
                counters.vsocks.push(vsock.counters());
                Box::new(vsock)
            }
        })
    }
}

impl fmt::Debug for DeviceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceConfig::Rng => f.write_str("Rng"),
            DeviceConfig::Disk { serial, .. } => write!(f, "Disk({serial})"),
            DeviceConfig::Net { config, .. } => write!(f, "Net({config:?})"),
            DeviceConfig::Share(share) => write!(f, "{share:?}"),
            DeviceConfig::Console { .. } => f.write_str("Console"),
            DeviceConfig::Balloon { .. } => f.write_str("Balloon"),
            DeviceConfig::Vsock { cid, .. } => write!(f, "Vsock({cid})"),
        }
    }
}

/// A network card with its cable plugged in.
fn card(config: &NetConfig, apart: Option<&StartNetwork>, number: u8) -> Result<Net, MachineError> {
    let clock = Arc::new(HostClock::new());
    let (link, mac) = match apart {
        Some(start) => config.open_apart(number, start, clock.clone())?,
        None => config.open(number, clock.clone())?,
    };
    let port = Port::new(link, clock)
        .map_err(|e| MachineError::Host("a network card cannot be made", e))?;
    Ok(Net::new(port, mac, config.mtu(), config.at_once))
}

/// What the devices of a machine count, by class, in the order of their slots.
#[derive(Clone, Default)]
#[allow(missing_docs)]
pub struct DeviceCounters {
    pub disks: Vec<Arc<BlkCounters>>,
    pub cards: Vec<Arc<NetCounters>>,
    pub consoles: Vec<Arc<ConsoleCounters>>,
    pub vsocks: Vec<Arc<VsockCounters>>,
    pub balloons: Vec<Arc<(Arc<BalloonControl>, Arc<BalloonCounters>)>>,
}

/// How a guest reaches its virtio devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VirtioTransport {
    /// Functions on the PCI bus.
    #[default]
    Pci,
    /// A page of registers each, named in the DSDT.
    Mmio,
}

/// As many as there are slots beside the host bridge's; without PCI it is the same.
const DEVICES_MAX: usize = 31;

/// A device behind its registers.
enum Plugged {
    Pci(Arc<VirtioPci>),
    Mmio(Arc<VirtioMmio>),
}

/// The devices of a machine, whose threads run until they are stopped.
#[derive(Default)]
pub struct VirtioDevices {
    plugged: Vec<Plugged>,
    /// What they count.
    pub counters: DeviceCounters,
}

impl VirtioDevices {
    /// Makes them and plugs them in.
    pub fn plug_in(
        pc: &Pc,
        pci: &PciBus,
        config: &MachineConfig,
        ram: &Arc<GuestRam>,
    ) -> Result<Self, MachineError> {
        if config.devices.len() > DEVICES_MAX {
            return Err(MachineError::Devices(config.devices.len()));
        }
        let mut counters = DeviceCounters::default();
        let made = config.devices.iter();
        let made = made.map(|d| d.device(config.cpus, &mut counters));
        let made = made.collect::<Result<Vec<_>, _>>()?;
        let plugged = match config.virtio {
            VirtioTransport::Pci => on_pci(pc, pci, made, ram)?,
            VirtioTransport::Mmio => in_memory(pc, made, ram)?,
        };
        Ok(VirtioDevices { plugged, counters })
    }

    /// Ends the threads of all devices.
    pub fn stop(&self) {
        for device in &self.plugged {
            match device {
                Plugged::Pci(function) => function.stop(),
                Plugged::Mmio(page) => page.stop(),
            }
        }
    }
}

fn refused(e: std::io::Error) -> MachineError {
    MachineError::Host("a virtio device cannot be made", e)
}

fn on_pci(
    pc: &Pc,
    pci: &PciBus,
    devices: Vec<Box<dyn VirtioDevice>>,
    ram: &Arc<GuestRam>,
) -> Result<Vec<Plugged>, MachineError> {
    let lines: Vec<_> = (0..4).map(|n| line(pc, layout::pci_gsi(n, 0))).collect();
    let mut plugged = Vec::new();
    for (n, device) in devices.into_iter().enumerate() {
        let slot = n + 1;
        let wiring = PciWiring {
            ram: ram.clone(),
            bus: Arc::downgrade(&pc.memory),
            msi: pc.apics.clone(),
            pin: lines[slot % lines.len()].pin(),
        };
        let function = VirtioPci::new(device, wiring).map_err(refused)?;
        pci.insert(slot as u8, 0, function.clone())?;
        let window = layout::PCI_MMIO_LOW;
        function.place((window.start + n as u64 * BAR_SIZE) as u32);
        plugged.push(Plugged::Pci(function));
    }
    Ok(plugged)
}

fn in_memory(
    pc: &Pc,
    devices: Vec<Box<dyn VirtioDevice>>,
    ram: &Arc<GuestRam>,
) -> Result<Vec<Plugged>, MachineError> {
    let lines: Vec<_> = (0..8).map(|n| line(pc, layout::virtio_gsi(n))).collect();
    let mut plugged = Vec::new();
    for (n, device) in devices.into_iter().enumerate() {
        let pin = lines[n % lines.len()].pin();
        let page = VirtioMmio::new(device, ram.clone(), pin).map_err(refused)?;
        let at = layout::VIRTIO_MMIO.start + n as u64 * MMIO_SIZE;
        pc.memory.attach(Region::new(at, MMIO_SIZE), page.clone())?;
        plugged.push(Plugged::Mmio(page));
    }
    Ok(plugged)
}

/// A line to an input of the I/O APIC, which several devices may share.
fn line(pc: &Pc, gsi: u32) -> Arc<Line> {
    Line::new(vec![(pc.apics.clone(), gsi)])
}
