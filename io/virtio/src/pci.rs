//! Virtio over PCI, modern only (virtio 1.2, 4.1): a function with one BAR, which holds all register blocks.
//!
//! | offset | block |
//! |---|---|
//! | 0x0000 | common configuration |
//! | 0x1000 | ISR status |
//! | 0x2000 | configuration of the device's class |
//! | 0x3000 | notifications, four bytes a queue |
//! | 0x4000 | MSI-X vectors |
//! | 0x6000 | MSI-X pending bits |
//!
//! Nothing here holds a lock while a queue is notified: the write goes to the queue's eventfd. The BAR is where the guest puts it; a place where
//! something else answers is one where the function does not.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use doppel_device::{
    Bar, BarKind, Bus, BusDevice, ConfigSpace, MSIX_CAPABILITY, MsiTarget, PciFunction, PciIds,
    Pin, Region,
};
use doppel_memory::GuestRam;
use serde::{Deserialize, Serialize};

use crate::frontend::{Environment, Frontend, FrontendState, Part, Status};
use crate::pci_common::{self, Field};
use crate::pci_interrupt::PciInterrupt;
use crate::{Notifier, VirtioDevice};

const VENDOR: u16 = 0x1af4;
/// Device ID of a class is this plus its number.
const DEVICE_BASE: u16 = 0x1040;
const SUBSYSTEM: u16 = 0x1100;

/// Bytes of the BAR.
pub const BAR_SIZE: u64 = 0x8000;
const BAR: usize = 0;
const COMMON: Range<u64> = 0..0x1000;
const ISR: Range<u64> = 0x1000..0x2000;
const DEVICE: Range<u64> = 0x2000..0x3000;
const NOTIFY: Range<u64> = 0x3000..0x4000;
const TABLE: Range<u64> = 0x4000..0x6000;
const PENDING: Range<u64> = 0x6000..0x6100;
const NOTIFY_MULTIPLIER: u32 = 4;
const VENDOR_CAPABILITY: u8 = 9;
// Kinds of virtio capabilities (virtio 1.2, 4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_WINDOW: u8 = 5;
const INTERRUPT_PIN_A: u8 = 1;
/// Of the window in the configuration space, from its capability: BAR, offset, length, data.
const WINDOW: [u16; 4] = [4, 8, 12, 16];

/// Base class, subclass and interface of a virtio class.
fn class_code(device_type: u16) -> u32 {
    match device_type {
        1 => 0x02_00_00,  // Ethernet
        2 => 0x01_80_00,  // other mass storage
        3 => 0x07_80_00,  // other communication
        19 => 0x02_80_00, // other network
        26 => 0x01_80_00, // file system
        _ => 0xff_00_00,
    }
}

/// What a function is wired to.
pub struct PciWiring {
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// Where its BAR appears.
    pub bus: Weak<Bus>,
    /// Where its messages go.
    pub msi: Arc<dyn MsiTarget>,
    /// Its INTA.
    pub pin: Pin,
}

struct Config {
    space: ConfigSpace,
    msix: u16,
    window: u16,
    /// Where the BAR is on the bus.
    placed: Option<u64>,
}

/// What is saved of a function, with its version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciState {
    /// 1.
    pub version: u32,
    /// Configuration space.
    pub config: Vec<u8>,
    /// MSI-X vectors and control.
    pub msix: Vec<u32>,
    /// ISR status.
    pub isr: u8,
    /// The vector of configuration changes.
    pub config_vector: u16,
    /// The vector of each queue.
    pub queue_vectors: Vec<u16>,
    /// The rest.
    pub frontend: FrontendState,
}

const STATE_VERSION: u32 = 1;

/// A virtio device as a PCI function.
pub struct VirtioPci {
    config: Mutex<Config>,
    frontend: Mutex<Frontend>,
    interrupt: Arc<PciInterrupt>,
    notifiers: Vec<Arc<Notifier>>,
    bus: Weak<Bus>,
    this: Weak<VirtioPci>,
}

impl VirtioPci {
    /// The function of `device`, with its BAR not placed.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(device: Box<dyn VirtioDevice>, wiring: PciWiring) -> io::Result<Arc<Self>> {
        let status = Arc::new(Status::default());
        let queues = device.queue_sizes().len();
        let PciWiring { ram, bus, msi, pin } = wiring;
        let interrupt = PciInterrupt::new(queues, status.clone(), msi, pin);
        let environment = Environment {
            ram,
            interrupt: interrupt.clone(),
            status,
        };
        let mut frontend = Frontend::new(device, environment)?;
        frontend.set_reaches_memory(false);
        interrupt.release(|r| r.msix.set_silent(true));
        let config = Config::new(&frontend, &interrupt);
        Ok(Arc::new_cyclic(|this| VirtioPci {
            notifiers: frontend.notifiers().to_vec(),
            config: Mutex::new(config),
            frontend: Mutex::new(frontend),
            interrupt,
            bus,
            this: this.clone(),
        }))
    }

    /// Puts the BAR at `address` and lets the function decode memory, as firmware does. To make it a bus master, without which it
    /// accesses no memory and sends no message, is for the driver.
    pub fn place(&self, address: u32) {
        self.config_write(0x10 + 4 * BAR as u16, 4, address);
        self.config_write(0x04, 2, 0x0002);
    }

    /// Ends the device's threads, as the end of the machine does.
    pub fn stop(&self) {
        self.frontend().reset();
    }

    fn config(&self) -> MutexGuard<'_, Config> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn frontend(&self) -> MutexGuard<'_, Frontend> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves the BAR to where the configuration space says.
    fn follow_bar(&self, config: &mut Config) {
        let wanted = config.space.bar(BAR).map(|range| range.start);
        let (Some(bus), Some(this)) = (self.bus.upgrade(), self.this.upgrade()) else {
            return;
        };
        if wanted == config.placed {
            return;
        }
        if let Some(old) = config.placed.take() {
            bus.detach(old);
        }
        config.placed = wanted.filter(|at| bus.attach(Region::new(*at, BAR_SIZE), this).is_ok());
    }

    /// Does what the command register says of the function as a bus master, and of its pin.
    fn follow_command(&self, config: &Config) {
        let (disabled, master) = (config.space.pin_disabled(), config.space.bus_master());
        self.frontend().set_reaches_memory(master);
        self.interrupt.release(|r| {
            r.pin_disabled = disabled;
            r.msix.set_silent(!master)
        });
    }

    /// The access that the window in the configuration space stands for: offset and size.
    fn window(&self) -> Option<(u64, u8)> {
        let config = self.config();
        let [bar, offset, length, _] =
            WINDOW.map(|register| config.space.read(config.window + register, 4));
        let size = [1, 2, 4].into_iter().find(|size| *size == length)?;
        let inside = u64::from(offset) + u64::from(length) <= BAR_SIZE;
        let good = bar & 0xff == BAR as u32 && offset.is_multiple_of(length) && inside;
        good.then_some((offset.into(), size as u8))
    }

    fn is_window_data(&self, offset: u16) -> bool {
        let data = self.config().window + WINDOW[3];
        (data..data + 4).contains(&offset)
    }

    fn read_common(&self, offset: u64, size: u8) -> u64 {
        let frontend = self.frontend();
        pci_common::read(offset, size, |field| self.read_field(&frontend, field))
    }

    fn read_field(&self, frontend: &Frontend, field: Field) -> u32 {
        let queue = frontend.queue().copied().unwrap_or_default();
        let at = |part, high| {
            let address = match part {
                Part::Descriptors => queue.descriptors,
                Part::Driver => queue.driver,
                Part::Device => queue.device,
            };
            (address >> (32 * u32::from(high))) as u32
        };
        match field {
            Field::DeviceFeatureSelect => frontend.device_feature_select,
            Field::DeviceFeature => frontend.device_features(),
            Field::DriverFeatureSelect => frontend.driver_feature_select,
            Field::DriverFeature => frontend.driver_features(),
            Field::ConfigVector => self.interrupt.with(|r| r.config_vector.into()),
            Field::QueueCount => frontend.queue_count() as u32,
            Field::Status => frontend.status().into(),
            Field::Generation => frontend.generation().into(),
            Field::QueueSelect => frontend.queue_select,
            Field::QueueSize => queue.size.into(),
            Field::QueueVector => self.queue_vector(frontend).into(),
            Field::QueueEnable => queue.enabled.into(),
            Field::QueueNotifyOffset => frontend.queue_select,
            Field::QueueAddress(part, high) => at(part, high),
            Field::QueueNotifyData => frontend.queue_select,
            Field::QueueReset => 0,
        }
    }

    fn queue_vector(&self, frontend: &Frontend) -> u16 {
        let n = frontend.queue_select as usize;
        let vector = self.interrupt.with(|r| r.queue_vectors.get(n).copied());
        vector.unwrap_or(crate::pci_interrupt::NO_VECTOR)
    }

    fn write_field(&self, frontend: &mut Frontend, field: Field, value: u32) {
        match field {
            Field::DeviceFeatureSelect => frontend.device_feature_select = value,
            Field::DriverFeatureSelect => frontend.driver_feature_select = value,
            Field::DriverFeature => frontend.set_driver_features(value),
            Field::ConfigVector => self.interrupt.with(|r| {
                r.config_vector = r.vector(value as u16);
            }),
            Field::Status if frontend.set_status(value as u8) => self.interrupt.reset(),
            Field::QueueSelect => frontend.queue_select = value,
            Field::QueueSize => frontend.set_queue_size(value as u16),
            Field::QueueVector => self.interrupt.with(|r| {
                let vector = r.vector(value as u16);
                if let Some(of) = r.queue_vectors.get_mut(frontend.queue_select as usize) {
                    *of = vector;
                }
            }),
            Field::QueueEnable if value == 1 => frontend.enable_queue(),
            Field::QueueReset if value == 1 => frontend.reset_queue(),
            Field::QueueAddress(part, high) => frontend.set_queue_address(part, high, value),
            _ => {}
        }
    }

    fn notify(&self, queue: u64) {
        if let Some(notifier) = self.notifiers.get(queue as usize) {
            notifier.notify();
        }
    }

    /// What there is to know of the function. It goes on afterwards.
    pub fn save(&self) -> PciState {
        let frontend = self.frontend().save();
        let config = self.config().space.bytes().to_vec();
        self.interrupt.with(|r| PciState {
            version: STATE_VERSION,
            config,
            msix: r.msix.save(),
            isr: r.isr,
            config_vector: r.config_vector,
            queue_vectors: r.queue_vectors.clone(),
            frontend,
        })
    }

    /// Takes back what [`VirtioPci::save`] gave, and goes on from there. False where it is no state of this function.
    pub fn restore(&self, state: &PciState) -> bool {
        let restored = self.interrupt.with(|r| {
            let fits = state.version == STATE_VERSION
                && state.queue_vectors.len() == r.queue_vectors.len()
                && r.msix.restore(&state.msix);
            if fits {
                r.isr = state.isr;
                r.config_vector = r.vector(state.config_vector);
                let vectors = state.queue_vectors.iter().map(|v| r.vector(*v));
                r.queue_vectors = vectors.collect();
            }
            fits
        });
        if !restored {
            return false;
        }
        let mut config = self.config();
        config.space.restore(&state.config);
        self.follow_bar(&mut config);
        self.frontend().set_reaches_memory(false);
        let restored = self.frontend().restore(&state.frontend);
        self.follow_command(&config);
        restored
    }
}

impl Config {
    fn new(frontend: &Frontend, interrupt: &PciInterrupt) -> Self {
        let mut space = ConfigSpace::new(PciIds {
            vendor: VENDOR,
            device: DEVICE_BASE + frontend.device_type(),
            class: class_code(frontend.device_type()),
            revision: 1,
            subsystem_vendor: VENDOR,
            subsystem: SUBSYSTEM,
        });
        let (kind, size) = (BarKind::Memory32, BAR_SIZE);
        space.add_bar(BAR, Bar { kind, size });
        space.set_interrupt_pin(INTERRUPT_PIN_A);
        let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
        for (kind, block, rest) in [
            (CAP_COMMON, COMMON, &[][..]),
            (CAP_ISR, ISR, &[]),
            (CAP_DEVICE, DEVICE, &[]),
            (CAP_NOTIFY, NOTIFY, &multiplier),
        ] {
            let body = virtio_capability(kind, &block, rest);
            space.add_capability(VENDOR_CAPABILITY, &body, &vec![0; body.len()]);
        }
        let body = virtio_capability(CAP_WINDOW, &(0..0), &[0; 4]);
        // The BAR, offset and length of an access, and its data.
        let writable: Vec<_> = (2..2 + body.len() as u16)
            .map(|at| if at == 4 || at >= 8 { 0xff } else { 0 })
            .collect();
        let window = space.add_capability(VENDOR_CAPABILITY, &body, &writable);
        let (body, writable) = interrupt.with(|r| {
            r.msix
                .capability(BAR as u32, TABLE.start as u32, PENDING.start as u32)
        });
        Config {
            msix: space.add_capability(MSIX_CAPABILITY, &body, &writable),
            space,
            window,
            placed: None,
        }
    }
}

/// The body of a `struct virtio_pci_cap`, without ID and link.
fn virtio_capability(kind: u8, block: &Range<u64>, rest: &[u8]) -> Vec<u8> {
    let length = 16 + rest.len() as u8;
    let mut body = vec![length, kind, BAR as u8, 0, 0, 0];
    body.extend((block.start as u32).to_le_bytes());
    body.extend(((block.end - block.start) as u32).to_le_bytes());
    body.extend(rest);
    body
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, size: u8) -> u32 {
        if self.is_window_data(offset) {
            let access = self.window();
            return access.map_or(0, |(at, size)| BusDevice::read(self, at, size) as u32);
        }
        let pending = self.interrupt.is_pending();
        let mut config = self.config();
        config.space.set_interrupt_status(pending);
        config.space.read(offset, size)
    }

    fn config_write(&self, offset: u16, size: u8, value: u32) {
        let mut config = self.config();
        let change = config.space.write(offset, size, value);
        if change.bars {
            self.follow_bar(&mut config);
            self.follow_command(&config);
        }
        if change.capabilities {
            let control = config.space.read(config.msix + 2, 2) as u16;
            self.interrupt.release(|r| r.msix.set_control(control));
        }
        drop(config);
        if self.is_window_data(offset)
            && let Some((at, size)) = self.window()
        {
            BusDevice::write(self, at, size, value.into());
        }
    }
}

/// The BAR.
impl BusDevice for VirtioPci {
    fn width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        if COMMON.contains(&offset) {
            self.read_common(offset, size)
        } else if ISR.contains(&offset) {
            self.interrupt.with(|r| std::mem::take(&mut r.isr)).into()
        } else if DEVICE.contains(&offset) {
            let mut bytes = [0; 8];
            let len = usize::from(size.min(8));
            let within = offset - DEVICE.start;
            self.frontend().read_config(within, &mut bytes[..len]);
            u64::from_le_bytes(bytes)
        } else if TABLE.contains(&offset) && size == 4 {
            let at = offset - TABLE.start;
            self.interrupt.with(|r| r.msix.read_table(at)).into()
        } else if PENDING.contains(&offset) && size == 4 {
            let at = offset - PENDING.start;
            self.interrupt.with(|r| r.msix.read_pending(at)).into()
        } else {
            0
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if NOTIFY.contains(&offset) {
            self.notify((offset - NOTIFY.start) / u64::from(NOTIFY_MULTIPLIER));
        } else if COMMON.contains(&offset) {
            let mut frontend = self.frontend();
            pci_common::write(offset, size, value, |field, value| {
                self.write_field(&mut frontend, field, value);
            });
        } else if DEVICE.contains(&offset) {
            let bytes = value.to_le_bytes();
            let len = usize::from(size.min(8));
            let within = offset - DEVICE.start;
            self.frontend().write_config(within, &bytes[..len]);
        } else if TABLE.contains(&offset) && size == 4 {
            let at = offset - TABLE.start;
            self.interrupt.write_table(at, value as u32);
        }
    }
}
