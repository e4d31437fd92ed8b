//! Virtio over device memory (virtio 1.2, 4.2): a page of registers and one level-triggered interrupt.
//!
//! For guests without PCI. Who tells the guest where the page is (the DSDT, the kernel's command line) is the machine's business.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use doppel_device::{BusDevice, Pin};
use doppel_memory::GuestRam;
use serde::{Deserialize, Serialize};

use crate::frontend::{Environment, Frontend, FrontendState, Part, Status};
use crate::{Interrupt, Notifier, VirtioDevice};

/// Bytes of registers.
pub const MMIO_SIZE: u64 = 0x1000;
const CONFIG: u64 = 0x100;
/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "DPPL".
const VENDOR: u32 = 0x4c50_5044;

const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// The interrupt of a device: its status register and its pin.
struct MmioInterrupt {
    pending: Mutex<u32>,
    status: Arc<Status>,
    pin: Pin,
}

impl MmioInterrupt {
    fn change(&self, change: impl FnOnce(&mut u32)) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut pending);
        self.pin.set(*pending != 0);
    }

    fn get(&self) -> u32 {
        *self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _index: u16) {
        self.change(|pending| *pending |= INTERRUPT_QUEUE);
    }

    fn config(&self) {
        self.status.next_generation();
        self.change(|pending| *pending |= INTERRUPT_CONFIG);
    }

    fn needs_reset(&self, why: &str) {
        tracing::warn!("a virtio device needs a reset: {why}");
        if self.status.needs_reset() {
            self.config();
        }
    }
}

/// What is saved of a device, with its version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MmioState {
    /// 1.
    pub version: u32,
    /// The interrupt status register.
    pub interrupt: u32,
    /// The rest.
    pub frontend: FrontendState,
}

const STATE_VERSION: u32 = 1;

/// A virtio device as a page of registers.
pub struct VirtioMmio {
    frontend: Mutex<Frontend>,
    interrupt: Arc<MmioInterrupt>,
    notifiers: Vec<Arc<Notifier>>,
}

impl VirtioMmio {
    /// The registers of `device`, which reaches `ram` and drives `pin`.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: Arc<GuestRam>,
        pin: Pin,
    ) -> io::Result<Arc<Self>> {
        let status = Arc::new(Status::default());
        let interrupt = Arc::new(MmioInterrupt {
            pending: Mutex::new(0),
            status: status.clone(),
            pin,
        });
        let environment = Environment {
            ram,
            interrupt: interrupt.clone(),
            status,
        };
        let frontend = Frontend::new(device, environment)?;
        Ok(Arc::new(VirtioMmio {
            notifiers: frontend.notifiers().to_vec(),
            frontend: Mutex::new(frontend),
            interrupt,
        }))
    }

    /// Ends the device's threads, as the end of the machine does.
    pub fn stop(&self) {
        self.frontend().reset();
    }

    /// What there is to know of the device. It goes on afterwards.
    pub fn save(&self) -> MmioState {
        let frontend = self.frontend().save();
        MmioState {
            version: STATE_VERSION,
            interrupt: self.interrupt.get(),
            frontend,
        }
    }

    /// Takes back what [`VirtioMmio::save`] gave, and goes on from there. False where it is no state of this device.
    pub fn restore(&self, state: &MmioState) -> bool {
        self.interrupt.change(|pending| *pending = state.interrupt);
        state.version == STATE_VERSION && self.frontend().restore(&state.frontend)
    }

    fn frontend(&self) -> MutexGuard<'_, Frontend> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let frontend = self.frontend();
        let queue = frontend.queue().copied().unwrap_or_default();
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => frontend.device_type().into(),
            0x00c => VENDOR,
            0x010 => frontend.device_features(),
            0x034 => frontend.queue_size_max().into(),
            0x044 => queue.enabled.into(),
            0x060 => self.interrupt.get(),
            0x070 => frontend.status().into(),
            // No shared memory: its length is -1.
            0x0b0..=0x0bc => u32::MAX,
            0x0fc => frontend.generation().into(),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let mut frontend = self.frontend();
        match offset {
            0x014 => frontend.device_feature_select = value,
            0x020 => frontend.set_driver_features(value),
            0x024 => frontend.driver_feature_select = value,
            0x030 => frontend.queue_select = value,
            0x038 => frontend.set_queue_size(u16::try_from(value).unwrap_or(0)),
            0x044 if value == 1 => frontend.enable_queue(),
            0x044 if value == 0 => frontend.reset_queue(),
            0x064 => self.interrupt.change(|pending| *pending &= !value),
            0x070 if frontend.set_status(value as u8) => {
                self.interrupt.change(|pending| *pending = 0);
            }
            0x080 => frontend.set_queue_address(Part::Descriptors, false, value),
            0x084 => frontend.set_queue_address(Part::Descriptors, true, value),
            0x090 => frontend.set_queue_address(Part::Driver, false, value),
            0x094 => frontend.set_queue_address(Part::Driver, true, value),
            0x0a0 => frontend.set_queue_address(Part::Device, false, value),
            0x0a4 => frontend.set_queue_address(Part::Device, true, value),
            0x0c0 if value == 1 => frontend.reset_queue(),
            _ => {}
        }
    }
}

impl BusDevice for VirtioMmio {
    fn width(&self) -> u8 {
        4
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        if offset >= CONFIG {
            let mut bytes = [0; 8];
            let len = usize::from(size.min(8));
            self.frontend()
                .read_config(offset - CONFIG, &mut bytes[..len]);
            return u64::from_le_bytes(bytes);
        }
        match size {
            4 => self.read_register(offset).into(),
            _ => 0,
        }
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        if offset == 0x050 && size == 4 {
            // No lock is taken for it.
            if let Some(notifier) = self.notifiers.get(value as usize) {
                notifier.notify();
            }
        } else if offset >= CONFIG {
            let bytes = value.to_le_bytes();
            let len = usize::from(size.min(8));
            self.frontend().write_config(offset - CONFIG, &bytes[..len]);
        } else if size == 4 {
            self.write_register(offset, value as u32);
        }
    }
}
