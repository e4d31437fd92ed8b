//! Interrupts of a virtio-pci function: MSI-X, or the pin and the ISR status (virtio 1.2, 4.1.4.5 and 4.1.5.3).
//!
//! A device's thread comes in with the lock of this and of nothing else, and leaves towards the interrupt controller. The lock is
//! held meanwhile, so that a mask and an interrupt happen one after the other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use doppel_device::{MSIX_ENTRY, MsiMessage, MsiTarget, Msix, Pin};

use crate::{Interrupt, Status};

/// A vector register that names none.
pub const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// The registers.
#[derive(Clone, Debug)]
pub struct Registers {
    /// Vectors of the function.
    pub msix: Msix,
    /// ISR status.
    pub isr: u8,
    /// The vector of configuration changes.
    pub config_vector: u16,
    /// The vector of each queue.
    pub queue_vectors: Vec<u16>,
    /// The command register's interrupt disable bit.
    pub pin_disabled: bool,
}

impl Registers {
    /// What a vector register holds after this was written to it.
    pub fn vector(&self, written: u16) -> u16 {
        match written < self.msix.len() {
            true => written,
            false => NO_VECTOR,
        }
    }
}

/// The interrupts of a function.
pub struct PciInterrupt {
    registers: Mutex<Registers>,
    status: Arc<Status>,
    target: Arc<dyn MsiTarget>,
    pin: Pin,
}

impl PciInterrupt {
    /// For a device with so many queues: a vector each, and one for the configuration.
    pub fn new(
        queues: usize,
        status: Arc<Status>,
        target: Arc<dyn MsiTarget>,
        pin: Pin,
    ) -> Arc<Self> {
        let registers = Registers {
            msix: Msix::new(queues as u16 + 1),
            isr: 0,
            config_vector: NO_VECTOR,
            queue_vectors: vec![NO_VECTOR; queues],
            pin_disabled: false,
        };
        Arc::new(PciInterrupt {
            registers: Mutex::new(registers),
            status,
            target,
            pin,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads or changes the registers; pin follows.
    pub fn with<R>(&self, f: impl FnOnce(&mut Registers) -> R) -> R {
        let mut registers = self.lock();
        let result = f(&mut registers);
        self.drive(&registers);
        result
    }

    /// The same for what may let pending interrupts go.
    pub fn release(&self, f: impl FnOnce(&mut Registers) -> Vec<MsiMessage>) {
        let mut registers = self.lock();
        for (address, data) in f(&mut registers) {
            self.target.send(address, data);
        }
        self.drive(&registers);
    }

    /// A store of 4 bytes to the table of vectors.
    pub fn write_table(&self, at: u64, value: u32) {
        const DATA: u64 = 8;
        if at % MSIX_ENTRY == DATA {
            self.target.set_up(value);
        }
        self.release(|r| r.msix.write_table(at, value));
    }

    /// Forgets all but what belongs to PCI, as a reset of the device does.
    pub fn reset(&self) {
        self.with(|r| {
            r.isr = 0;
            r.config_vector = NO_VECTOR;
            r.queue_vectors.fill(NO_VECTOR);
        });
    }

    /// True where the function asserts its pin, or would if it were not disabled.
    pub fn is_pending(&self) -> bool {
        let registers = self.lock();
        registers.isr != 0 && !registers.msix.is_enabled()
    }

    fn drive(&self, r: &Registers) {
        self.pin
            .set(r.isr != 0 && !r.msix.is_enabled() && !r.pin_disabled);
    }

    fn raise(&self, isr: u8, vector: impl FnOnce(&Registers) -> Option<u16>) {
        let mut registers = self.lock();
        if !registers.msix.is_enabled() {
            registers.isr |= isr;
            self.drive(&registers);
            return;
        }
        let message = vector(&registers).and_then(|v| registers.msix.trigger(v));
        if let Some((address, data)) = message {
            self.target.send(address, data);
        }
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        self.raise(ISR_QUEUE, |r| {
            r.queue_vectors.get(usize::from(index)).copied()
        });
    }

    fn config(&self) {
        self.status.next_generation();
        self.raise(ISR_CONFIG, |r| Some(r.config_vector));
    }

    fn needs_reset(&self, why: &str) {
        tracing::warn!("a virtio device needs a reset: {why}");
        if self.status.needs_reset() {
            self.config();
        }
    }
}
