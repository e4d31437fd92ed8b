//! Virtio devices: what the user asks for becomes functions on the PCI bus, in slots from 1 on in the order they were asked for.
//!
//! There is no firmware, so their BARs are placed here, one after another from the start of the PCI window; a guest may move them.

use std::fmt;
use std::sync::Arc;

use doppel_block::BlockBackend;
use doppel_device::{HostClock, Line, Pin};
use doppel_memory::GuestRam;
use doppel_net::{NetConfig, Port};
use doppel_pc::PciBus;
use doppel_virtio::{BAR_SIZE, Blk, Net, NetCounters, PciWiring, Rng, VirtioDevice, VirtioPci};

use crate::config::MachineConfig;
use crate::layout;
use crate::machine::MachineError;
use crate::pc::Pc;

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
    },
    /// A network card.
    Net(NetConfig),
}

impl DeviceConfig {
    /// The device; a network card's counters come to those of `cards`.
    fn device(&self, cpus: u32, cards: &mut Cards) -> Result<Box<dyn VirtioDevice>, MachineError> {
        Ok(match self {
            DeviceConfig::Rng => Box::new(Rng::new()),
            DeviceConfig::Disk { backend, serial } => {
                Box::new(Blk::new(backend.clone(), serial, cpus))
            }
            DeviceConfig::Net(config) => {
                let card = card(config, cards.len() as u8)?;
                cards.push(card.counters());
                Box::new(card)
            }
        })
    }
}

impl fmt::Debug for DeviceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceConfig::Rng => f.write_str("Rng"),
            DeviceConfig::Disk { serial, .. } => write!(f, "Disk({serial})"),
            DeviceConfig::Net(config) => write!(f, "Net({config:?})"),
        }
    }
}

/// A network card with its cable plugged in.
fn card(config: &NetConfig, number: u8) -> Result<Net, MachineError> {
    let clock = Arc::new(HostClock::new());
    let (link, mac) = config.open(number, clock.clone())?;
    let port = Port::new(link, clock)
        .map_err(|e| MachineError::Host("a network card cannot be made", e))?;
    Ok(Net::new(port, mac, config.mtu(), config.at_once))
}

/// What the network cards count.
pub type Cards = Vec<Arc<NetCounters>>;

/// The functions of a machine, which run until they are stopped.
#[derive(Default)]
pub struct VirtioFunctions {
    functions: Vec<Arc<VirtioPci>>,
    /// Of the network cards among them.
    pub cards: Cards,
}

impl VirtioFunctions {
    /// Makes them and plugs them in.
    pub fn plug_in(
        pc: &Pc,
        pci: &PciBus,
        config: &MachineConfig,
        ram: &Arc<GuestRam>,
    ) -> Result<Self, MachineError> {
        let refused = |e| MachineError::Host("a virtio device cannot be made", e);
        let lines: Vec<_> = (0..4).map(|pin| pci_line(pc, pin)).collect();
        let mut functions = VirtioFunctions::default();
        for (n, device) in config.devices.iter().enumerate() {
            let slot = n + 1;
            let wiring = PciWiring {
                ram: ram.clone(),
                bus: Arc::downgrade(&pc.memory),
                msi: pc.apics.clone(),
                pin: pin_of(&lines, slot),
            };
            let device = device.device(config.cpus, &mut functions.cards)?;
            let function = VirtioPci::new(device, wiring).map_err(refused)?;
            let slot = u8::try_from(slot).unwrap_or(u8::MAX);
            pci.insert(slot, 0, function.clone())?;
            let window = layout::PCI_MMIO_LOW;
            function.place((window.start + n as u64 * BAR_SIZE) as u32);
            functions.functions.push(function);
        }
        Ok(functions)
    }

    /// Ends the threads of all devices.
    pub fn stop(&self) {
        self.functions.iter().for_each(|function| function.stop());
    }
}

/// The interrupt line at which INTA of the devices `pin`, `pin + 4` and so on ends.
fn pci_line(pc: &Pc, pin: u32) -> Arc<Line> {
    Line::new(vec![(pc.apics.clone(), layout::pci_gsi(pin, 0))])
}

/// INTA of the device in `slot`.
fn pin_of(lines: &[Arc<Line>], slot: usize) -> Pin {
    lines[slot % lines.len()].pin()
}
