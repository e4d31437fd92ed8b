//! The PCI host: bus 0, the two ways to its configuration space (ports 0xcf8 to 0xcff and ECAM), the host bridge.
//!
//! A function is plugged in with [`PciBus::insert`]; where nothing is, everything reads as ones.
//!
//! Source: PCI Local Bus Specification 3.0, 3.2.2.3.2 (configuration mechanism #1); PCI Express Base Specification,
//! 7.2.2 (ECAM).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use doppel_device::{
    BusDevice, ConfigSpace, PciFunction, PciIds, PowerControl, PowerRequest, all_ones,
};

use crate::reset_control::ResetControl;

/// A slot is taken already, or is no slot.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("PCI device {device:#x} function {function} cannot be plugged in")]
pub struct PciSlotTaken {
    /// Device number, 0 to 31.
    pub device: u8,
    /// Function number, 0 to 7.
    pub function: u8,
}

/// PCI bus 0.
#[derive(Default)]
pub struct PciBus {
    functions: RwLock<BTreeMap<u8, Arc<dyn PciFunction>>>,
}

impl PciBus {
    /// An empty bus.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Plugs a function in.
    pub fn insert(
        &self,
        device: u8,
        function: u8,
        what: Arc<dyn PciFunction>,
    ) -> Result<(), PciSlotTaken> {
        let taken = PciSlotTaken { device, function };
        if device > 31 || function > 7 {
            return Err(taken);
        }
        let mut functions = self
            .functions
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let slot = device << 3 | function;
        if functions.contains_key(&slot) {
            return Err(taken);
        }
        functions.insert(slot, what);
        Ok(())
    }

    /// The function that bits 31:12 of an ECAM offset name: bus, device and function.
    fn find(&self, bus_device_function: u64) -> Option<Arc<dyn PciFunction>> {
        let slot = u8::try_from(bus_device_function).ok()?;
        let functions = self
            .functions
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        functions.get(&slot).cloned()
    }

    fn read(&self, address: u64, size: u8) -> u64 {
        match self.find(address >> 12) {
            Some(function) => {
                let value = function.config_read((address & 0xfff) as u16, size);
                u64::from(value) & all_ones(size)
            }
            None => all_ones(size),
        }
    }

    fn write(&self, address: u64, size: u8, value: u64) {
        if let Some(function) = self.find(address >> 12) {
            function.config_write((address & 0xfff) as u16, size, value as u32);
        }
    }
}

/// The enhanced configuration access mechanism: 1 MiB of device memory for each bus.
pub struct Ecam(Arc<PciBus>);

impl Ecam {
    /// The window to `bus`.
    pub fn new(bus: Arc<PciBus>) -> Arc<Self> {
        Arc::new(Ecam(bus))
    }
}

impl BusDevice for Ecam {
    fn width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        self.0.read(offset, size)
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        self.0.write(offset, size, value);
    }
}

const ENABLE: u32 = 1 << 31;

/// Configuration mechanism #1: the address port (offset 0) and the data port (offset 4). A byte access to offset 1 is
/// the reset control register.
pub struct PciConfigPorts {
    bus: Arc<PciBus>,
    power: Arc<dyn PowerControl>,
    state: Mutex<Ports>,
}

#[derive(Default)]
struct Ports {
    address: u32,
    reset: ResetControl,
}

impl PciConfigPorts {
    /// The ports to `bus`; resets are asked of `power`.
    pub fn new(bus: Arc<PciBus>, power: Arc<dyn PowerControl>) -> Arc<Self> {
        Arc::new(PciConfigPorts {
            bus,
            power,
            state: Mutex::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, Ports> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the data port leads to, as an ECAM offset.
    fn target(&self, offset: u64) -> Option<u64> {
        let address = u64::from(Some(self.state().address).filter(|a| a & ENABLE != 0)?);
        Some((address & 0xff_ff00) << 4 | address & 0xfc | offset & 3)
    }
}

impl BusDevice for PciConfigPorts {
    fn width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        match (offset, size) {
            (0, 4) => self.state().address.into(),
            (1, 1) => self.state().reset.read().into(),
            (4.., _) => self
                .target(offset)
                .map_or(all_ones(size), |at| self.bus.read(at, size)),
            _ => all_ones(size),
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        match (offset, size) {
            (0, 4) => self.state().address = value as u32 & !0x7f00_0003,
            (1, 1) => {
                let resets = self.state().reset.write(value as u8);
                if resets {
                    self.power.request(PowerRequest::Reset);
                }
            }
            (4.., _) => {
                if let Some(at) = self.target(offset) {
                    self.bus.write(at, size, value);
                }
            }
            _ => {}
        }
    }
}

/// The host bridge, function 00:00.0: a generic PCI Express one, for which no guest has work-arounds.
pub struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    /// IDs of a generic PCI Express host bridge.
    pub const IDS: PciIds = PciIds {
        vendor: 0x1b36,
        device: 0x0008,
        class: 0x06_00_00,
        revision: 0,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };

    /// The bridge.
    pub fn new() -> Arc<Self> {
        Arc::new(HostBridge(Mutex::new(ConfigSpace::new(Self::IDS))))
    }

    fn space(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, size: u8) -> u32 {
        self.space().read(offset, size)
    }

    fn config_write(&self, offset: u16, size: u8, value: u32) {
        self.space().write(offset, size, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::{Requests, numbers, value};
    use doppel_device::{Bus, Region};

    const ECAM: u64 = 0xe000_0000;

    struct Rig {
        ports: Bus,
        memory: Bus,
        requests: Arc<Requests>,
    }

    fn rig() -> Rig {
        let pci = PciBus::new();
        pci.insert(0, 0, HostBridge::new()).unwrap();
        pci.insert(3, 2, HostBridge::new()).unwrap();
        let requests = Arc::new(Requests::default());
        let (ports, memory) = (Bus::new(), Bus::new());
        let config = PciConfigPorts::new(pci.clone(), requests.clone());
        ports.attach(Region::new(0xcf8, 8), config).unwrap();
        memory
            .attach(Region::new(ECAM, 256 << 20), Ecam::new(pci))
            .unwrap();
        Rig {
            ports,
            memory,
            requests,
        }
    }

    #[test]
    fn both_ways_lead_to_the_same_registers() {
        let rig = rig();
        for (slot, there) in [
            (0, true),
            (3 << 3 | 2, true),
            (1 << 3, false),
            (1 << 8, false),
        ] {
            let id = if there { 0x0008_1b36 } else { 0xffff_ffff };
            rig.ports.write(0xcf8, 4, 0x8000_0000 | slot << 8);
            assert_eq!(rig.ports.read(0xcfc, 4), id, "{slot:#x}");
            assert_eq!(rig.ports.read(0xcfe, 2), id >> 16);
            assert_eq!(rig.memory.read(ECAM + (slot << 12), 4), id);
        }
        rig.ports.write(0xcf8, 4, 0x8000_003c);
        rig.ports.write(0xcfc, 1, 0x0b);
        assert_eq!(rig.memory.read(ECAM + 0x3c, 1), 0x0b);
        rig.memory.write(ECAM + 0x3c, 4, 0x0c);
        assert_eq!(rig.ports.read(0xcfc, 1), 0x0c);
    }

    /// The steps of Linux's `pci_check_type1`.
    #[test]
    fn linux_finds_mechanism_1() {
        let rig = rig();
        rig.ports.write(0xcfb, 1, 1);
        rig.ports.write(0xcf8, 4, 0x8000_0000);
        assert_eq!(rig.ports.read(0xcf8, 4), 0x8000_0000);
        rig.ports.write(0xcf8, 4, 0x8000_0008);
        assert_eq!(rig.ports.read(0xcfe, 2), 0x0600);
        rig.ports.write(0xcf8, 4, 0);
        assert_eq!(rig.ports.read(0xcfc, 4), 0xffff_ffff, "not enabled");
    }

    #[test]
    fn a_byte_at_0xcf9_is_the_reset_control() {
        let rig = rig();
        rig.ports.write(0xcf8, 4, 0x8000_0600);
        assert_eq!(rig.requests.take(), []);
        rig.ports.write(0xcf9, 1, 0x06);
        assert_eq!(rig.requests.take(), [PowerRequest::Reset]);
        assert_eq!(rig.ports.read(0xcf9, 1), 0x06);
        assert_eq!(rig.ports.read(0xcf8, 4), 0x8000_0600);
    }

    #[test]
    fn a_slot_takes_one_function() {
        let pci = PciBus::new();
        pci.insert(31, 7, HostBridge::new()).unwrap();
        for (device, function) in [(31, 7), (32, 0), (0, 8)] {
            let refused = pci.insert(device, function, HostBridge::new());
            assert_eq!(refused, Err(PciSlotTaken { device, function }));
        }
    }

    #[test]
    fn nothing_written_breaks_it() {
        let rig = rig();
        let mut random = numbers();
        for _ in 0..100_000 {
            let size = 1 << random.u8(..4);
            let port = 0xcf0 + random.u64(..0x18);
            let address = ECAM + random.u64(..1 << 14);
            rig.ports.write(port, size, value(&mut random));
            rig.memory.write(address, size, value(&mut random));
            assert!(rig.ports.read(port, size) <= all_ones(size));
            assert!(rig.memory.read(address, size) <= all_ones(size));
        }
    }
}
