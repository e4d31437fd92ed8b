//! What the transports have in common: negotiation, queues, the device's life (virtio 1.2, sections 2 and 3.1).
//!
//! A [`Frontend`] is the driver's side of a device without its registers. It activates the device at DRIVER_OK and takes
//! its queues back at a reset, which may come at any moment: the device's threads end the requests that are being served first.
//! Rings cannot be moved while they are enabled; the reset of one queue (VIRTIO_F_RING_RESET) deactivates the device,
//! and activates it again without that queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use doppel_memory::GuestRam;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config as bit;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::device::{Activation, DeviceState, VirtioDevice};
use crate::{Interrupt, Notifier, Queue, QueueState};

/// Device status: the driver and the device agree on the features.
pub const FEATURES_OK: u8 = bit::VIRTIO_CONFIG_S_FEATURES_OK as u8;
/// Device status: the driver is ready.
pub const DRIVER_OK: u8 = bit::VIRTIO_CONFIG_S_DRIVER_OK as u8;
/// Device status: the device cannot go on.
pub const NEEDS_RESET: u8 = bit::VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// VIRTIO_F_VERSION_1.
pub const VERSION_1: u64 = 1 << bit::VIRTIO_F_VERSION_1;
/// VIRTIO_F_EVENT_IDX.
pub const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
const RING_RESET: u64 = 1 << bit::VIRTIO_F_RING_RESET;

/// What every device here offers.
const RING_FEATURES: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC | RING_RESET;

/// Status and configuration generation, which threads of the device change too.
#[derive(Debug, Default)]
pub struct Status {
    bits: AtomicU8,
    generation: AtomicU8,
}

impl Status {
    /// The status register.
    pub fn get(&self) -> u8 {
        self.bits.load(Ordering::SeqCst)
    }

    /// Notes that the device needs a reset; says whether a driver is there to be told.
    pub fn needs_reset(&self) -> bool {
        self.bits.fetch_or(NEEDS_RESET, Ordering::SeqCst) & DRIVER_OK != 0
    }

    /// Notes that the configuration space changed.
    pub fn next_generation(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Changes with the configuration space.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }
}

/// One of the three parts of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The descriptors.
    Descriptors,
    /// The ring that the driver writes.
    Driver,
    /// The ring that the device writes.
    Device,
}

/// What a machine gives every device.
#[derive(Clone)]
pub struct Environment {
    /// The guest's memory.
    pub ram: Arc<GuestRam>,
    /// What tells the driver of changes.
    pub interrupt: Arc<dyn Interrupt>,
    /// The status that `interrupt` changes.
    pub status: Arc<Status>,
}

/// What a device was told and how far it got, with its version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrontendState {
    /// 1.
    pub version: u32,
    /// Device ID of virtio 1.2, section 5.
    pub device_type: u16,
    /// The status register.
    pub status: u8,
    /// The features that the driver accepted.
    pub features: u64,
    /// The selector registers: device features, driver features, queue.
    pub selectors: [u32; 3],
    /// Every queue.
    pub queues: Vec<QueueState>,
    /// What the device itself remembers.
    pub device: DeviceState,
}

/// The version of [`FrontendState`] that this code writes and reads.
pub const STATE_VERSION: u32 = 1;

/// The driver's side of a device.
pub struct Frontend {
    device: Box<dyn VirtioDevice>,
    environment: Environment,
    notifiers: Vec<Arc<Notifier>>,
    sizes: Vec<u16>,
    queues: Vec<QueueState>,
    accepted: u64,
    active: bool,
    /// The device may access the guest's memory.
    reaches_memory: bool,
    /// Which half of the device's features is read.
    pub device_feature_select: u32,
    /// Which half of the driver's features is accessed.
    pub driver_feature_select: u32,
    /// Which queue is accessed.
    pub queue_select: u32,
}

impl Frontend {
    /// A device after power-on.
    pub fn new(device: Box<dyn VirtioDevice>, environment: Environment) -> std::io::Result<Self> {
        let sizes = device.queue_sizes();
        let notifiers = sizes.iter().map(|_| Notifier::new().map(Arc::new));
        let mut frontend = Frontend {
            device,
            environment,
            notifiers: notifiers.collect::<Result<_, _>>()?,
            queues: Vec::new(),
            sizes,
            accepted: 0,
            active: false,
            reaches_memory: true,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
        };
        frontend.forget();
        Ok(frontend)
    }

    /// The device's class.
    pub fn device_type(&self) -> u16 {
        self.device.device_type()
    }

    /// What the driver raises to notify each queue.
    pub fn notifiers(&self) -> &[Arc<Notifier>] {
        &self.notifiers
    }

    /// Everything that the device offers.
    pub fn offered(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }

    /// The selected half of the offered features.
    pub fn device_features(&self) -> u32 {
        half(self.offered(), self.device_feature_select)
    }

    /// The selected half of the accepted features.
    pub fn driver_features(&self) -> u32 {
        half(self.accepted, self.driver_feature_select)
    }

    /// Accepts features in the selected half, until both sides agreed.
    pub fn set_driver_features(&mut self, value: u32) {
        if self.status() & FEATURES_OK != 0 {
            return;
        }
        match self.driver_feature_select {
            0 => self.accepted = self.accepted >> 32 << 32 | u64::from(value),
            1 => self.accepted = u64::from(value) << 32 | self.accepted & u64::from(u32::MAX),
            _ => {}
        }
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        self.environment.status.get()
    }

    /// The driver writes the status register. A driver sets bits; 0 is a reset, after which this is true.
    pub fn set_status(&mut self, value: u8) -> bool {
        if value == 0 {
            self.reset();
            return true;
        }
        let old = self.status();
        let mut set = value & !old & !NEEDS_RESET;
        if set & FEATURES_OK != 0 && !self.features_agree() {
            set &= !FEATURES_OK;
        }
        if (old | set) & FEATURES_OK == 0 {
            set &= !DRIVER_OK;
        }
        self.environment.status.bits.fetch_or(set, Ordering::SeqCst);
        if set & DRIVER_OK != 0 {
            self.activate();
        }
        false
    }

    fn features_agree(&self) -> bool {
        self.accepted & !self.offered() == 0 && self.accepted & VERSION_1 != 0
    }

    /// Switches the device off and forgets everything.
    pub fn reset(&mut self) {
        // What was not served is dropped: the driver gets nothing back after a reset, and nothing is written to its rings.
        self.stop();
        self.device.reset();
        self.forget();
        self.environment.status.bits.store(0, Ordering::SeqCst);
    }

    fn forget(&mut self) {
        let fresh = |size: &u16| QueueState {
            size: *size,
            ..QueueState::default()
        };
        self.queues = self.sizes.iter().map(fresh).collect();
        self.accepted = 0;
        for notifier in &self.notifiers {
            notifier.take();
        }
        (self.device_feature_select, self.driver_feature_select) = (0, 0);
        self.queue_select = 0;
    }

    /// Whether the device may access the guest's memory, as a bus master. Where it may not, its threads stand still after the
    /// requests that are being served, and go on later from where they were.
    pub fn set_reaches_memory(&mut self, reaches: bool) {
        if self.reaches_memory == reaches {
            return;
        }
        self.reaches_memory = reaches;
        match reaches {
            false => self.deactivate(),
            true if self.status() & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK => self.activate(),
            true => {}
        }
    }

    fn activate(&mut self) {
        if !self.reaches_memory {
            return;
        }
        if let Err(why) = self.try_activate() {
            self.deactivate();
            self.environment.interrupt.needs_reset(&why);
        }
    }

    fn try_activate(&mut self) -> Result<(), String> {
        let event_idx = self.accepted & EVENT_IDX != 0;
        let mut queues = Vec::new();
        for (n, state) in self.queues.iter().enumerate().filter(|(_, q)| q.enabled) {
            let Environment { ram, interrupt, .. } = self.environment.clone();
            let notifier = self.notifiers[n].clone();
            // The device looks once by itself: a notification may have come before it was ready.
            notifier.notify();
            let queue = Queue::new(n as u16, state, event_idx, ram, notifier, interrupt);
            queues.push(queue.map_err(|broken| format!("queue {n}: {broken}"))?);
        }
        self.active = true;
        let activation = Activation {
            features: self.accepted,
            queues,
            ram: self.environment.ram.clone(),
            interrupt: self.environment.interrupt.clone(),
        };
        let activated = self.device.activate(activation);
        activated.map_err(|e| format!("the host refuses what the device needs: {e}"))
    }

    /// Stops the device's threads.
    fn stop(&mut self) -> Vec<Queue> {
        match std::mem::take(&mut self.active) {
            true => self.device.deactivate(),
            false => Vec::new(),
        }
    }

    /// Stops the device's threads; what they got to is in the queues' states, what they did not serve in the rings.
    fn deactivate(&mut self) {
        for mut queue in self.stop() {
            if let Err(broken) = queue.rewind() {
                queue.give_up(broken);
            }
            if let Some(state) = self.queues.get_mut(usize::from(queue.index())) {
                *state = queue.state();
            }
        }
    }

    /// Number of queues.
    pub fn queue_count(&self) -> usize {
        self.queues.len()
    }

    /// The selected queue.
    pub fn queue(&self) -> Option<&QueueState> {
        self.queues.get(self.queue_select as usize)
    }

    /// The largest size of the selected queue, 0 where there is none.
    pub fn queue_size_max(&self) -> u16 {
        let size = self.sizes.get(self.queue_select as usize);
        size.copied().unwrap_or(0)
    }

    fn changeable_queue(&mut self) -> Option<&mut QueueState> {
        let queue = self.queues.get_mut(self.queue_select as usize)?;
        Some(queue).filter(|queue| !queue.enabled)
    }

    /// Sets the size of the selected queue, while it is off. Sizes that are not possible are left out.
    pub fn set_queue_size(&mut self, size: u16) {
        let max = self.queue_size_max();
        if let Some(queue) = self.changeable_queue()
            && size.is_power_of_two()
            && size <= max
        {
            queue.size = size;
        }
    }

    /// Sets a half of the address of a part of the selected queue, while it is off.
    pub fn set_queue_address(&mut self, part: Part, high: bool, value: u32) {
        let Some(queue) = self.changeable_queue() else {
            return;
        };
        let address = match part {
            Part::Descriptors => &mut queue.descriptors,
            Part::Driver => &mut queue.driver,
            Part::Device => &mut queue.device,
        };
        let (shift, value) = (32 * u32::from(high), u64::from(value));
        *address = *address & !(u64::from(u32::MAX) << shift) | value << shift;
    }

    /// Switches the selected queue on.
    pub fn enable_queue(&mut self) {
        let Some(queue) = self.changeable_queue() else {
            return;
        };
        queue.enabled = true;
        if self.active {
            self.deactivate();
            self.activate();
        }
    }

    /// Switches the selected queue off and forgets where it was.
    pub fn reset_queue(&mut self) {
        let n = self.queue_select as usize;
        if self.queues.get(n).is_none_or(|queue| !queue.enabled) {
            return;
        }
        let active = self.active;
        self.deactivate();
        self.queues[n] = QueueState {
            size: self.sizes[n],
            ..QueueState::default()
        };
        if active {
            self.activate();
        }
    }

    /// A load from the configuration space of the device's class.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        self.device.read_config(offset, data);
    }

    /// A store to it.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.device.write_config(offset, data);
    }

    /// Changes whenever the configuration space does.
    pub fn generation(&self) -> u8 {
        self.environment.status.generation()
    }

    /// What there is to know of the device. It goes on afterwards.
    pub fn save(&mut self) -> FrontendState {
        let active = self.active;
        self.deactivate();
        let state = FrontendState {
            version: STATE_VERSION,
            device_type: self.device_type(),
            status: self.status(),
            features: self.accepted,
            selectors: [
                self.device_feature_select,
                self.driver_feature_select,
                self.queue_select,
            ],
            queues: self.queues.clone(),
            device: self.device.save(),
        };
        if active {
            self.activate();
        }
        state
    }

    /// Takes back what [`Frontend::save`] gave, and goes on from there. False where it is no state of this device.
    pub fn restore(&mut self, state: &FrontendState) -> bool {
        let fits = state.version == STATE_VERSION
            && state.device_type == self.device_type()
            && state.queues.len() == self.queues.len()
            && self.sizes.iter().zip(&state.queues).all(size_is_possible);
        self.reset();
        if !fits || !self.device.restore(&state.device) {
            return false;
        }
        self.accepted = state.features & self.offered();
        self.queues.clone_from(&state.queues);
        let [device, driver, queue] = state.selectors;
        (self.device_feature_select, self.driver_feature_select) = (device, driver);
        self.queue_select = queue;
        self.environment
            .status
            .bits
            .store(state.status, Ordering::SeqCst);
        if state.status & (DRIVER_OK | NEEDS_RESET) == DRIVER_OK {
            self.activate();
        }
        true
    }
}

impl Drop for Frontend {
    fn drop(&mut self) {
        self.stop();
    }
}

fn size_is_possible((max, queue): (&u16, &QueueState)) -> bool {
    queue.size.is_power_of_two() && queue.size <= *max
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
