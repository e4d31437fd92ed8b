//! The console device (virtio 1.2, 5.3): bytes between a terminal of the guest (hvc0) and the host.
//!
//! **Problem.** Linux sends a line, notifies, and spins until the device has taken it, with interrupts off. A thread that is woken for it
//! takes longer than all else that a line costs.
//!
//! **Idea.** The vCPU that notifies takes what is to be sent itself and puts it into the host's queue of output, which
//! never blocks. Only where that is full, or the lock taken, the device's thread sees to it. The thread also fills the guest's buffers with
//! what comes in.
//!
//! **Invariant.** The device keeps no bytes. What the host has no room for stays in the guest's ring, with a note of how much of its first
//! buffer was sent; input is taken from the host when there is a buffer to put it into.
//!
//! **Cost.** One copy each way.

mod config;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use doppel_device::{Backed, CharSink, CharSource};
use doppel_memory::GuestRam;
use doppel_seccomp::Kind;
use serde::{Deserialize, Serialize};

use crate::device::copy_config;
use crate::locks::{lock, try_lock};
use crate::worker::{Stop, Worker};
use crate::{
    Activation, Broken, DeviceState, Interrupt, Notifier, OnNotify, Queue, VirtioDevice,
    wait_readable,
};
pub use config::WindowSize;

/// VIRTIO_CONSOLE_F_SIZE.
const F_SIZE: u64 = 1 << 0;
/// VIRTIO_CONSOLE_F_EMERG_WRITE.
const F_EMERG_WRITE: u64 = 1 << 2;

const RX: u16 = 0;
const TX: u16 = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];
/// Bytes that are moved at a time.
const PIECE: usize = 4096;
/// A vCPU sends no more requests at one notification,
const AT_ONCE_MAX: usize = 64;
/// and no more bytes.
const AT_ONCE_BYTES: usize = 16 << 10;
/// Requests before the thread looks whether it is to end.
const BATCH: usize = 256;
const BATCH_BYTES: usize = 1 << 20;

/// What is saved of a console.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// 1.
    pub version: u32,
    /// So many bytes of the first buffer in the transmit queue were sent.
    pub sent: u64,
}

const STATE_VERSION: u32 = 1;

/// What a console has done.
#[derive(Debug, Default)]
pub struct ConsoleCounters {
    /// Bytes from the guest.
    pub sent_bytes: AtomicU64,
    /// Bytes to the guest.
    pub received_bytes: AtomicU64,
    /// Notifications that the vCPU dealt with itself.
    pub at_once: AtomicU64,
    /// Notifications for the console's thread.
    pub handed_over: AtomicU64,
}

fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

/// What a console is on the host.
#[derive(Clone)]
pub struct ConsoleBackend {
    /// Takes what the guest sends.
    pub sink: Arc<dyn CharSink>,
    /// Gives what the guest receives.
    pub source: Arc<dyn CharSource>,
    /// The window, where there is one.
    pub size: Option<Arc<WindowSize>>,
}

/// A console.
pub struct Console {
    backend: ConsoleBackend,
    at_once: bool,
    counters: Arc<ConsoleCounters>,
    wake: Arc<Wake>,
    /// See [`ConsoleState::sent`], while nobody drives the device.
    sent: usize,
    /// The window that the driver knows of. Linux looks only when it is told of a change, so at the start there is one.
    told: AtomicU32,
    active: Option<(Arc<Active>, Worker<()>)>,
}

/// Wakes the console's thread.
struct Wake(Notifier);

impl Backed for Wake {
    fn backend_ready(&self) {
        self.0.raise();
    }
}

impl Console {
    /// A console of this back-end. Where not `at_once`, its thread does everything.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(backend: ConsoleBackend, at_once: bool) -> io::Result<Self> {
        Ok(Console {
            told: AtomicU32::new(0),
            backend,
            at_once,
            counters: Arc::default(),
            wake: Arc::new(Wake(Notifier::new()?)),
            sent: 0,
            active: None,
        })
    }

    /// What it has done so far.
    pub fn counters(&self) -> Arc<ConsoleCounters> {
        self.counters.clone()
    }

    /// Whom the back-end tells that it has input, room for output, or a window of another size.
    pub fn frontend(&self) -> Weak<dyn Backed> {
        let wake: Arc<dyn Backed> = self.wake.clone();
        Arc::downgrade(&wake)
    }
}

fn window(backend: &ConsoleBackend) -> u32 {
    backend.size.as_ref().map_or(0, |size| size.word())
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE as u16
    }

    fn features(&self) -> u64 {
        match self.backend.size {
            Some(_) => F_SIZE | F_EMERG_WRITE,
            None => F_EMERG_WRITE,
        }
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let window = window(&self.backend);
        self.told.store(window, Ordering::Relaxed);
        let bytes = config::bytes(window);
        copy_config(&bytes, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (config::EMERGENCY_WRITE, [character, ..]) = (offset, data) {
            // There is no way to make this driver wait.
            add(
                &self.counters.sent_bytes,
                self.backend.sink.write(&[*character]),
            );
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let interrupt = activation.interrupt.clone();
        let notifiers: Vec<_> = activation
            .queues
            .iter()
            .map(|queue| (queue.index(), queue.notifier().clone()))
            .collect();
        let active = Arc::new(Active::new(self, activation));
        if self.at_once {
            let handler: Weak<dyn OnNotify> = Arc::downgrade(&active) as _;
            for (index, notifier) in &notifiers {
                notifier.handle(Some((*index, handler.clone())));
            }
        }
        let serving = active.clone();
        let flags: Vec<_> = notifiers.into_iter().map(|(_, flag)| flag).collect();
        let worker = Worker::start((Kind::Device, "virtio-console"), interrupt, move |stop| {
            serving.serve(stop, &flags);
        })?;
        self.active = Some((active, worker));
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some((active, worker)) = self.active.take() else {
            return Vec::new();
        };
        let queues = [&active.receive, &active.transmit];
        let notifier = |slot: &Mutex<Option<Queue>>| {
            let slot = lock(slot);
            slot.as_ref().map(|queue| queue.notifier().clone())
        };
        for notifier in queues.into_iter().filter_map(notifier) {
            notifier.handle(None);
        }
        worker.stop();
        self.sent = *lock(&active.sent);
        queues.iter().filter_map(|slot| lock(slot).take()).collect()
    }

    fn reset(&mut self) {
        self.sent = 0;
        *self.told.get_mut() = 0;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(ConsoleState {
            version: STATE_VERSION,
            sent: self.sent as u64,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Console(state) = state else {
            return false;
        };
        self.sent = usize::try_from(state.sent).unwrap_or(usize::MAX);
        state.version == STATE_VERSION
    }
}

/// A console whose driver is ready. Locks: transmit queue, then what of it was sent.
struct Active {
    ram: Arc<GuestRam>,
    backend: ConsoleBackend,
    receive: Mutex<Option<Queue>>,
    transmit: Mutex<Option<Queue>>,
    sent: Mutex<usize>,
    /// The window that the driver knows of.
    told: u32,
    wake: Arc<Wake>,
    interrupt: Arc<dyn Interrupt>,
    counters: Arc<ConsoleCounters>,
    broken: AtomicBool,
}

impl Active {
    fn new(console: &Console, activation: Activation) -> Self {
        let Activation {
            mut queues,
            ram,
            interrupt,
            ..
        } = activation;
        let mut take = |index| {
            let at = queues.iter().position(|queue| queue.index() == index)?;
            Some(queues.remove(at))
        };
        let (receive, transmit) = (take(RX), take(TX));
        // A queue that is off was reset, and what was in it is forgotten.
        let sent = transmit.as_ref().map_or(0, |_| console.sent);
        Active {
            ram,
            backend: console.backend.clone(),
            receive: Mutex::new(receive),
            transmit: Mutex::new(transmit),
            sent: Mutex::new(sent),
            told: console.told.load(Ordering::Relaxed),
            wake: console.wake.clone(),
            interrupt,
            counters: console.counters.clone(),
            broken: AtomicBool::new(false),
        }
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// What `queue` came to; nothing of the console goes on after an error until it is reset.
    fn unless_broken(&self, queue: &Queue, result: Result<bool, Broken>) -> bool {
        result.unwrap_or_else(|broken| {
            self.broken.store(true, Ordering::Release);
            queue.give_up(broken);
            false
        })
    }

    /// The console's thread.
    fn serve(&self, stop: &Stop, queues: &[Arc<Notifier>]) {
        let mut descriptors = vec![stop.as_fd(), self.wake.0.as_fd()];
        descriptors.extend(queues.iter().map(|flag| flag.as_fd()));
        let mut told = self.told;
        while !stop.is_wanted() && !self.is_broken() {
            let more = [self.transmit(), self.fill()].contains(&true);
            let now = window(&self.backend);
            if std::mem::replace(&mut told, now) != now {
                self.interrupt.config();
            }
            if !more && wait_readable(&descriptors).is_err() {
                return;
            }
            self.wake.0.take();
            for flag in queues {
                flag.take();
            }
        }
    }

    /// Sends what the guest wrote. True if there is more that could be sent now.
    fn transmit(&self) -> bool {
        self.transmit_from(lock(&self.transmit), BATCH, BATCH_BYTES)
    }

    fn transmit_from(
        &self,
        mut transmit: MutexGuard<Option<Queue>>,
        requests: usize,
        bytes: usize,
    ) -> bool {
        let Some(queue) = transmit.as_mut() else {
            return false;
        };
        let more = self.send(queue, requests, bytes);
        self.unless_broken(queue, more)
    }

    fn send(&self, queue: &mut Queue, requests: usize, bytes: usize) -> Result<bool, Broken> {
        let (mut piece, mut left) = ([0; PIECE], bytes);
        let mut sent = lock(&self.sent);
        queue.quiet()?;
        for _ in 0..requests {
            let Some(mut chain) = queue.pop(&self.ram)? else {
                if queue.listen()? {
                    continue;
                }
                return Ok(false);
            };
            chain.readable.split_off_front(*sent);
            while !chain.readable.is_empty() {
                let n = chain.readable.read(&mut piece[..PIECE.min(left)]);
                let taken = self.backend.sink.write(&piece[..n]);
                chain.readable.split_off_front(taken);
                (*sent, left) = (*sent + taken, left - taken);
                add(&self.counters.sent_bytes, taken);
                if !chain.readable.is_empty() && (taken < n || left == 0) {
                    // The back-end says when it has room again.
                    queue.undo_pop();
                    return Ok(taken == n);
                }
            }
            *sent = 0;
            queue.push(chain.head, 0)?;
            queue.announce()?;
        }
        Ok(true)
    }

    /// Fills the guest's buffers. True if there is more that could be filled in now.
    fn fill(&self) -> bool {
        let mut receive = lock(&self.receive);
        let Some(queue) = receive.as_mut() else {
            return false;
        };
        let more = self.receive(queue);
        self.unless_broken(queue, more)
    }

    fn receive(&self, queue: &mut Queue) -> Result<bool, Broken> {
        let mut piece = [0; PIECE];
        queue.quiet()?;
        for _ in 0..BATCH {
            let Some(chain) = queue.pop(&self.ram)? else {
                if queue.listen()? {
                    continue;
                }
                return Ok(false);
            };
            let room = chain.writable.len().min(PIECE);
            let n = self.backend.source.read(&mut piece[..room]);
            if n == 0 && room > 0 {
                queue.undo_pop();
                return Ok(false);
            }
            let written = chain.writable.write(&piece[..n]);
            add(&self.counters.received_bytes, written);
            queue.push(chain.head, written as u32)?;
            queue.announce()?;
        }
        Ok(true)
    }
}

impl OnNotify for Active {
    fn notified(&self, queue: u16) -> bool {
        if self.is_broken() {
            return true;
        }
        let done = queue == TX
            && try_lock(&self.transmit)
                .is_some_and(|transmit| !self.transmit_from(transmit, AT_ONCE_MAX, AT_ONCE_BYTES));
        let counter = match done {
            true => &self.counters.at_once,
            false => &self.counters.handed_over,
        };
        add(counter, 1);
        done
    }
}
