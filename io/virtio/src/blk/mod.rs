//! The block device (virtio 1.2, 5.2): a disk, whatever is behind its [`BlockBackend`].
//!
//! Each queue has a thread that takes its requests. What the host has in its cache is done there and then; what would wait (a
//! read that misses, a flush, a discard) goes to a pool of threads, so that a deep queue is a deep queue on the host too
//! (`pool.rs`). Data goes between the host's file and the guest's RAM with no copy where the back-end can.
//!
//! A host that refuses something, a full disk included, makes an I/O error of the one request.

mod config;
mod pace;
mod pool;
mod request;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use doppel_block::BlockBackend;
use doppel_memory::GuestRam;
use doppel_seccomp::Kind;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk as bit;

use crate::device::copy_config;
use crate::worker::Worker;
use crate::{Activation, DeviceState, OnNotify, Queue, VirtioDevice};
use pool::{Slot, lock};

const QUEUE_SIZE: u16 = 512;
/// More queues than this are of no use.
pub const BLK_QUEUES_MAX: u16 = 8;
/// Bytes of the serial number (virtio 1.2, 5.2.6.1).
const SERIAL_LEN: usize = 20;

/// What is saved of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlkState {
    /// 1.
    pub version: u32,
    /// The driver has writes cached.
    pub writeback: bool,
}

const STATE_VERSION: u32 = 1;

/// Requests, by who served them.
#[derive(Debug, Default)]
pub struct BlkCounters {
    /// The vCPU that notified.
    pub at_once: AtomicU64,
    /// The thread of a queue.
    pub by_queue: AtomicU64,
    /// A thread of the pool.
    pub by_pool: AtomicU64,
    /// Processes of the back-end that followed the first, as the back-end counts them: it outlives the device.
    pub restarts: Arc<AtomicU64>,
}

/// What the device's threads share.
struct Disk {
    backend: Arc<dyn BlockBackend>,
    serial: [u8; SERIAL_LEN],
    /// Writes are durable only after a flush; else each is followed by one.
    writeback: AtomicBool,
    counters: Arc<BlkCounters>,
}

/// The block device.
pub struct Blk {
    disk: Arc<Disk>,
    queues: u16,
    /// The driver can flush.
    flushes: bool,
    at_once: bool,
    active: Option<Active>,
    /// By queue, from the first activation on; what a notification looks at.
    slots: Vec<Arc<Slot>>,
}

/// What is there while the driver drives the device.
struct Active {
    worker: Worker<()>,
    slots: Vec<Arc<Slot>>,
    /// Whom the queues' notifiers ask.
    _handlers: Vec<Arc<dyn OnNotify>>,
}

/// Has the vCPU that notifies serve what needs no waiting.
struct AtOnce {
    slot: Arc<Slot>,
    disk: Arc<Disk>,
    ram: Arc<GuestRam>,
}

impl OnNotify for AtOnce {
    fn notified(&self, _queue: u16) -> bool {
        pool::serve_at_once(&self.slot, &self.disk, &self.ram)
    }
}

impl Blk {
    /// A disk with a queue for each of so many processors, as far as that is of use. `serial` is cut after 20 bytes.
    pub fn new(backend: Arc<dyn BlockBackend>, serial: &str, processors: u32) -> Self {
        let mut bytes = [0; SERIAL_LEN];
        for (to, from) in bytes.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        let counters = BlkCounters {
            restarts: backend.restarts(),
            ..BlkCounters::default()
        };
        let disk = Disk {
            backend,
            serial: bytes,
            writeback: AtomicBool::new(true),
            counters: Arc::new(counters),
        };
        let queues = processors.clamp(1, BLK_QUEUES_MAX.into()) as u16;
        Blk {
            disk: Arc::new(disk),
            queues,
            flushes: false,
            at_once: true,
            active: None,
            slots: (0..queues).map(|_| Arc::default()).collect(),
        }
    }

    /// Whether the vCPU that notifies serves what needs no waiting; it does unless told otherwise.
    pub fn at_once(mut self, at_once: bool) -> Self {
        self.at_once = at_once;
        self
    }

    /// What it has done so far.
    pub fn counters(&self) -> Arc<BlkCounters> {
        self.disk.counters.clone()
    }
}

impl Drop for Blk {
    fn drop(&mut self) {
        // The machine's memory goes, and a back-end in another process would keep it.
        let _ = self.disk.backend.use_memory(None);
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK as u16
    }

    fn features(&self) -> u64 {
        let always = [
            bit::VIRTIO_BLK_F_SEG_MAX,
            bit::VIRTIO_BLK_F_BLK_SIZE,
            bit::VIRTIO_BLK_F_TOPOLOGY,
            bit::VIRTIO_BLK_F_FLUSH,
            bit::VIRTIO_BLK_F_CONFIG_WCE,
            bit::VIRTIO_BLK_F_MQ,
        ];
        let writable = [bit::VIRTIO_BLK_F_DISCARD, bit::VIRTIO_BLK_F_WRITE_ZEROES];
        let more = match self.disk.backend.read_only() {
            true => &[bit::VIRTIO_BLK_F_RO][..],
            false => &writable[..],
        };
        always
            .iter()
            .chain(more)
            .fold(0, |bits, bit| bits | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let bytes = config::bytes(
            self.disk.backend.len(),
            self.queues,
            self.disk.writeback.load(Ordering::Relaxed),
        );
        copy_config(&bytes, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (config::WRITEBACK, [writeback]) = (offset, data)
            && self.flushes
        {
            self.disk
                .writeback
                .store(*writeback != 0, Ordering::Relaxed);
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            features,
            queues,
            ram,
            interrupt,
        } = activation;
        self.disk.backend.use_memory(Some(&ram))?;
        self.flushes = features & 1 << bit::VIRTIO_BLK_F_FLUSH != 0;
        if !self.flushes {
            // Virtio 1.2, 5.2.6.2: without FLUSH the device is write-through.
            self.disk.writeback.store(false, Ordering::Relaxed);
        }
        let (mut slots, mut handlers) = (Vec::new(), Vec::new());
        for queue in queues {
            let slot = self.slots[usize::from(queue.index())].clone();
            let at_once: Arc<dyn OnNotify> = Arc::new(AtOnce {
                slot: slot.clone(),
                disk: self.disk.clone(),
                ram: ram.clone(),
            });
            let handler = (queue.index(), Arc::downgrade(&at_once));
            queue
                .notifier()
                .handle(Some(handler).filter(|_| self.at_once));
            handlers.push(at_once);
            *lock(&slot) = Some(queue);
            slots.push(slot);
        }
        let (served, disk) = (slots.clone(), self.disk.clone());
        let worker = Worker::start((Kind::Disk, "virtio-blk"), interrupt, move |stop| {
            pool::serve(&served, &disk, &ram, stop);
        })?;
        self.active = Some(Active {
            worker,
            slots,
            _handlers: handlers,
        });
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some(active) = self.active.take() else {
            return Vec::new();
        };
        active.worker.stop();
        let queues = active.slots.iter().filter_map(|slot| lock(slot).take());
        queues
            .inspect(|queue| queue.notifier().handle(None))
            .collect()
    }

    fn reset(&mut self) {
        self.flushes = false;
        self.disk.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Blk(BlkState {
            version: STATE_VERSION,
            writeback: self.disk.writeback.load(Ordering::Relaxed),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Blk(state) = state else {
            return false;
        };
        self.disk
            .writeback
            .store(state.writeback, Ordering::Relaxed);
        state.version == STATE_VERSION
    }
}
