//! The network card (virtio 1.2, 5.1): frames between the guest's rings and a back-end of `doppel_net`.
//!
//! **Problem.** A packet should not have to wait for a thread to wake up. On a host with idle processors that takes 50 µs
//! and more, longer than everything else that becomes of a packet together.
//!
//! **Idea.** What the guest sends is dealt with by the vCPU that notifies, at once: through the gateway or into a
//! socket of the host, and what there is to answer (an acknowledgement, an echo) is in the guest's buffers before the vCPU goes on. Only
//! where a lock is taken, or when there is more than a little to do, is the card's own thread woken. That thread does
//! all that does not begin with the guest: it waits for the back-end's sockets and timers, and fills the guest's buffers.
//!
//! **Invariant.** Whoever finds a lock taken raises a flag that the thread waits for; so whatever came while the lock was held is
//! looked at after it. Locks: transmit queue, then receive queue, then back-end.
//!
//! **Cost.** One copy between guest memory and the back-end's buffer in each direction.

mod control;
mod receive;
mod transmit;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use doppel_memory::GuestRam;
use doppel_net::{Accepts, Port};
use doppel_seccomp::Kind;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net as bit;

use crate::device::copy_config;
use crate::locks::{lock, try_lock};
use crate::worker::{Stop, Worker};
use crate::{
    Activation, Broken, DeviceState, Notifier, OnNotify, Queue, VirtioDevice, wait_readable,
};
use control::Control;
use receive::Receive;
use transmit::{Transmit, Transmitted};

const RX: u16 = 0;
const TX: u16 = 1;
const CONTROL: u16 = 2;
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];
/// Bytes of `struct virtio_net_hdr` with its number of buffers.
const HEADER: usize = doppel_net::HEADER + 2;
/// What is dealt with for the vCPU at once: frames that it sends, and frames for it.
const AT_ONCE: usize = 64;
/// Longer frames are the thread's: to copy one and give it to the host lasts longer than to wake somebody, and the vCPU has its guest to run
/// meanwhile.
const SHORT: usize = 4096;
/// Frames for the guest before others have their turn.
const BATCH: usize = 256;

const fn feature(bit: u32) -> u64 {
    1 << bit
}

const MTU_DEFAULT: u16 = 1500;
const LINK_UP: u16 = bit::VIRTIO_NET_S_LINK_UP as u16;

/// What a card has done.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Frames from the guest.
    pub sent: AtomicU64,
    /// Frames to the guest.
    pub received: AtomicU64,
    /// Bytes in them.
    pub sent_bytes: AtomicU64,
    /// Likewise.
    pub received_bytes: AtomicU64,
    /// Notifications that the vCPU dealt with itself.
    pub at_once: AtomicU64,
    /// Notifications for the card's thread.
    pub handed_over: AtomicU64,
    /// Processes of the back-end that followed the first.
    pub restarts: Arc<AtomicU64>,
}

impl NetCounters {
    fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// What is saved of a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// 1.
    pub version: u32,
    /// Its address, which the driver may have changed.
    pub mac: [u8; 6],
    /// The unfinished frames that the driver takes, as feature bits, where it changed its mind.
    pub offloads: Option<u64>,
}

/// A network card.
pub struct Net {
    port: Arc<Port>,
    mtu: u16,
    at_once: bool,
    counters: Arc<NetCounters>,
    settings: Arc<Mutex<Settings>>,
    active: Option<(Arc<Active>, Worker<()>)>,
}

/// What the driver can change.
#[derive(Clone, Copy, Debug)]
struct Settings {
    mac: [u8; 6],
    original: [u8; 6],
    offloads: Option<u64>,
}

impl Net {
    /// A card with this address at `port`, whose network takes packets of `mtu` bytes. Where not `at_once`, the card's thread
    /// does everything.
    pub fn new(port: Arc<Port>, mac: [u8; 6], mtu: u16, at_once: bool) -> Self {
        let counters = NetCounters {
            restarts: port.with(|link| link.restarts()),
            ..NetCounters::default()
        };
        let settings = Settings {
            mac,
            original: mac,
            offloads: None,
        };
        Net {
            port,
            mtu,
            at_once,
            counters: Arc::new(counters),
            settings: Arc::new(Mutex::new(settings)),
            active: None,
        }
    }

    /// What it has done so far.
    pub fn counters(&self) -> Arc<NetCounters> {
        self.counters.clone()
    }

    fn settings(&self) -> MutexGuard<'_, Settings> {
        lock(&self.settings)
    }

    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.settings().mac);
        config[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        config
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_NET as u16
    }

    fn features(&self) -> u64 {
        let accepts = self.port.with(|link| link.accepts());
        let optional = [
            (accepts.checksum, bit::VIRTIO_NET_F_CSUM),
            (accepts.tcp4, bit::VIRTIO_NET_F_HOST_TSO4),
            (accepts.tcp6, bit::VIRTIO_NET_F_HOST_TSO6),
            (self.mtu != MTU_DEFAULT, bit::VIRTIO_NET_F_MTU),
        ];
        let always = [
            bit::VIRTIO_NET_F_GUEST_CSUM,
            bit::VIRTIO_NET_F_GUEST_TSO4,
            bit::VIRTIO_NET_F_GUEST_TSO6,
            bit::VIRTIO_NET_F_MRG_RXBUF,
            bit::VIRTIO_NET_F_MAC,
            bit::VIRTIO_NET_F_STATUS,
            bit::VIRTIO_NET_F_CTRL_VQ,
            bit::VIRTIO_NET_F_CTRL_RX,
            bit::VIRTIO_NET_F_CTRL_MAC_ADDR,
            bit::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        ];
        let optional = optional.into_iter().filter(|(has, _)| *has).map(|o| o.1);
        always
            .into_iter()
            .chain(optional)
            .fold(0, |all, bit| all | feature(bit))
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        copy_config(&self.config(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let offloads = self.settings().offloads;
        let accepted = accepts(offloads.unwrap_or(activation.features));
        self.port.with(|link| link.guest_accepts(accepted));
        let interrupt = activation.interrupt.clone();
        let notifiers: Vec<_> = activation
            .queues
            .iter()
            .map(|queue| (queue.index(), queue.notifier().clone()))
            .collect();
        let active = Arc::new(Active::new(self, activation)?);
        if self.at_once {
            let handler: Weak<dyn OnNotify> = Arc::downgrade(&active) as _;
            for (index, notifier) in &notifiers {
                notifier.handle(Some((*index, handler.clone())));
            }
        }
        let serving = active.clone();
        let worker = Worker::start((Kind::Net, "virtio-net"), interrupt, move |stop| {
            serving.serve(stop, &notifiers);
        })?;
        self.active = Some((active, worker));
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let Some((active, worker)) = self.active.take() else {
            return Vec::new();
        };
        for notifier in active.notifiers() {
            notifier.handle(None);
        }
        worker.stop();
        active.end()
    }

    fn reset(&mut self) {
        let mut settings = self.settings();
        settings.mac = settings.original;
        settings.offloads = None;
    }

    fn save(&self) -> DeviceState {
        let Settings { mac, offloads, .. } = *self.settings();
        DeviceState::Net(NetState {
            version: 1,
            mac,
            offloads,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Net(state) = state else {
            return false;
        };
        let mut settings = self.settings();
        settings.mac = state.mac;
        settings.offloads = state.offloads;
        state.version == 1
    }
}

/// The unfinished frames that a driver with these features takes.
fn accepts(features: u64) -> Accepts {
    let has = |bit| features & feature(bit) != 0;
    let checksum = has(bit::VIRTIO_NET_F_GUEST_CSUM);
    Accepts {
        checksum,
        tcp4: checksum && has(bit::VIRTIO_NET_F_GUEST_TSO4),
        tcp6: checksum && has(bit::VIRTIO_NET_F_GUEST_TSO6),
    }
}

/// A card whose driver is ready.
struct Active {
    ram: Arc<GuestRam>,
    port: Arc<Port>,
    transmit: Mutex<Option<Transmit>>,
    receive: Mutex<Option<Receive>>,
    control: Mutex<Option<Control>>,
    /// What the thread waits for.
    flags: Vec<(u16, Arc<Notifier>)>,
    counters: Arc<NetCounters>,
    broken: AtomicBool,
}

impl Active {
    fn new(net: &Net, activation: Activation) -> io::Result<Self> {
        let features = activation.features;
        let mut queues = activation.queues;
        let flags = queues.iter().map(|q| (q.index(), q.notifier().clone()));
        let flags = flags.collect();
        let mut take = |index| {
            let at = queues.iter().position(|queue| queue.index() == index)?;
            Some(queues.remove(at))
        };
        let mergeable = features & feature(bit::VIRTIO_NET_F_MRG_RXBUF) != 0;
        let (settings, port) = (net.settings.clone(), net.port.clone());
        Ok(Active {
            transmit: Mutex::new(take(TX).map(Transmit::new)),
            receive: Mutex::new(take(RX).map(|queue| Receive::new(queue, mergeable))),
            control: Mutex::new(take(CONTROL).map(|queue| Control::new(queue, settings, port))),
            ram: activation.ram,
            port: net.port.clone(),
            flags,
            counters: net.counters.clone(),
            broken: AtomicBool::new(false),
        })
    }

    fn notifiers(&self) -> impl Iterator<Item = &Arc<Notifier>> {
        self.flags.iter().map(|(_, notifier)| notifier)
    }

    /// Has the thread look at a queue.
    fn hand_over(&self, queue: u16) {
        if let Some((_, flag)) = self.flags.iter().find(|(index, _)| *index == queue) {
            flag.raise();
        }
    }

    /// The queues, once nobody is at them.
    fn end(&self) -> Vec<Queue> {
        let receive = lock(&self.receive).take().map(|r| r.queue);
        let transmit = lock(&self.transmit).take().map(|t| t.queue);
        let control = lock(&self.control).take().map(|c| c.queue);
        [receive, transmit, control].into_iter().flatten().collect()
    }

    /// The card's thread.
    fn serve(&self, stop: &Stop, queues: &[(u16, Arc<Notifier>)]) {
        let [events, timer] = self.port.descriptors();
        let mut descriptors = vec![stop.as_fd(), events, timer];
        descriptors.extend(queues.iter().map(|(_, notifier)| notifier.as_fd()));
        // Whether there is more to send, and to fill in.
        let mut more = (true, true);
        while !stop.is_wanted() && !self.is_broken() {
            if more == (false, false) && wait_readable(&descriptors).is_err() {
                return;
            }
            for (queue, notifier) in queues {
                if notifier.take() {
                    more.0 |= *queue == TX;
                    if *queue == CONTROL {
                        self.carry_out();
                    }
                }
            }
            more.0 |= self.port.service();
            more.0 = more.0 && self.transmit();
            more.1 = self.fill();
        }
    }

    fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Nothing of the card goes on until it is reset.
    fn give_up(&self, queue: &Queue, broken: Broken) {
        self.broken.store(true, Ordering::Release);
        queue.give_up(broken);
    }

    /// Carries out what the driver wants.
    fn carry_out(&self) {
        let mut control = lock(&self.control);
        let Some(control) = control.as_mut() else {
            return;
        };
        match control.drain(&self.ram, AT_ONCE) {
            Ok(true) => self.hand_over(CONTROL),
            Ok(false) => {}
            Err(broken) => self.give_up(&control.queue, broken),
        }
    }

    /// Sends the guest's frames. True if there may be more.
    fn transmit(&self) -> bool {
        let mut transmit = lock(&self.transmit);
        let Some(transmit) = transmit.as_mut() else {
            return false;
        };
        let sent = transmit.drain(self, (BATCH, usize::MAX), |port, frame| {
            Some(port.with(frame))
        });
        match sent {
            Ok(end) => end == Transmitted::More,
            Err(broken) => {
                self.give_up(&transmit.queue, broken);
                false
            }
        }
    }

    /// Fills the guest's buffers. True if there may be more to fill in.
    fn fill(&self) -> bool {
        self.fill_from(lock(&self.receive), BATCH)
    }

    fn fill_from(&self, mut receive: MutexGuard<Option<Receive>>, limit: usize) -> bool {
        let Some(receive) = receive.as_mut() else {
            return false;
        };
        match receive.fill(self, limit) {
            Ok(more) => more,
            Err(broken) => {
                self.give_up(&receive.queue, broken);
                false
            }
        }
    }

    /// What the vCPU does that notified the transmit queue. False where the thread has to.
    fn transmit_at_once(&self) -> bool {
        let Some(mut transmit) = try_lock(&self.transmit) else {
            return false;
        };
        let Some(transmit) = transmit.as_mut() else {
            return true;
        };
        let done = transmit.drain(self, (AT_ONCE, SHORT), |port, frame| port.try_with(frame));
        match done {
            Ok(Transmitted::All) => true,
            Ok(Transmitted::Blocked) => true,
            Ok(Transmitted::More) => false,
            Err(broken) => {
                self.give_up(&transmit.queue, broken);
                true
            }
        }
    }

    /// Gives the guest at once what its frames led to.
    fn answer_at_once(&self) {
        if !self.port.try_with(|link| link.has_frames()).unwrap_or(true) {
            return;
        }
        let more = try_lock(&self.receive).is_none_or(|receive| self.fill_from(receive, AT_ONCE));
        if more {
            self.hand_over(RX);
        }
    }
}

impl OnNotify for Active {
    fn notified(&self, queue: u16) -> bool {
        if self.is_broken() {
            return true;
        }
        let done = queue == TX && self.transmit_at_once();
        if queue == TX {
            self.answer_at_once();
        }
        let counter = match done {
            true => &self.counters.at_once,
            false => &self.counters.handed_over,
        };
        NetCounters::add(counter, 1);
        done
    }
}
