//! The memory balloon (virtio 1.2, 5.5): how memory that a guest does not use goes back to the host.
//!
//! **Problem.** A guest touches nearly all of its memory in time, and the host keeps every page that was ever touched.
//!
//! **Idea.** A guest with free-page reporting (VIRTIO_BALLOON_F_PAGE_REPORTING) names blocks of pages that are free, about two seconds after
//! they became so, and waits for the answer before it uses them. The host takes them; the next access finds zeros. Besides, the
//! host can ask for so much memory outright: the driver allocates pages and hands them over (it *inflates* the balloon). It takes
//! them back when the host asks for less, or when the guest would run out of memory (VIRTIO_BALLOON_F_DEFLATE_ON_OOM).
//!
//! **Invariant.** To discard a page is to write to it as a device does (`doppel_memory::GuestRam::discard`): translated code of it is
//! thrown away, and it is dirty. Whatever the guest names, only whole pages of its own RAM change.
//!
//! **Cost.** A system call for each block, and a page fault for each batch of pages that is used again.

mod statistics;

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use doppel_memory::GuestRam;
use doppel_seccomp::Kind;
use serde::{Deserialize, Serialize};

use crate::device::copy_config;
use crate::locks::lock;
use crate::worker::{Stop, Worker};
use crate::{
    Activation, Broken, Buffers, Chain, DeviceState, Interrupt, Notifier, Queue, VirtioDevice,
    wait_readable_for,
};
pub use statistics::GuestMemoryStats;

// Features of the class.
const F_STATS_VQ: u64 = 1 << 1;
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
const F_PAGE_POISON: u64 = 1 << 4;
const F_PAGE_REPORTING: u64 = 1 << 5;

const QUEUE_SIZE: u16 = 128;
/// As many as the specification numbers.
const QUEUES: usize = 5;
/// The unit of the balloon, whatever the guest's pages are.
const PAGE: u64 = 4096;
/// Page numbers that are read at a time; Linux sends no more in a request.
const NUMBERS: usize = 256;
/// So much is discarded between two looks whether the thread is to end.
const STEP: u64 = 64 << 20;
// The configuration space: bytes of it, and what of it the driver writes.
const CONFIG_LEN: usize = 16;
const CONFIG_ACTUAL: u64 = 4;
const CONFIG_POISON: u64 = 12;

/// What is saved of a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// 1.
    pub version: u32,
    /// Pages of 4 KiB that the driver says are in it.
    pub actual: u32,
    /// What the driver fills free pages with.
    pub poison: u32,
}

const STATE_VERSION: u32 = 1;

/// What a balloon has done.
#[derive(Debug, Default)]
pub struct BalloonCounters {
    /// Bytes that the guest reported as free.
    pub reported_bytes: AtomicU64,
    /// Bytes that were put into the balloon.
    pub inflated_bytes: AtomicU64,
    /// Bytes that were taken out of it.
    pub deflated_bytes: AtomicU64,
    /// Bytes that went back to the host for either reason.
    pub discarded_bytes: AtomicU64,
}

/// A balloon as the host sees it, over reboots.
pub struct BalloonControl {
    target: AtomicU32,
    actual: AtomicU32,
    statistics: Mutex<Option<GuestMemoryStats>>,
    statistics_wanted: AtomicBool,
    wake: Notifier,
}

impl BalloonControl {
    /// A balloon that takes so many bytes from each guest.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(bytes: u64) -> io::Result<Arc<Self>> {
        let control = BalloonControl {
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
            statistics: Mutex::new(None),
            statistics_wanted: AtomicBool::new(false),
            wake: Notifier::new()?,
        };
        control.set_target(bytes);
        Ok(Arc::new(control))
    }

    /// The guest is to give up so many bytes, of which whole pages of 4 KiB count.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.target.store(pages, Ordering::Release);
        self.wake.raise();
    }

    /// Bytes that the guest says it has given up.
    pub fn actual(&self) -> u64 {
        u64::from(self.actual.load(Ordering::Acquire)) * PAGE
    }

    /// Asks the guest for its statistics.
    pub fn ask_for_statistics(&self) {
        self.statistics_wanted.store(true, Ordering::Release);
        self.wake.raise();
    }

    /// What it said last.
    pub fn statistics(&self) -> Option<GuestMemoryStats> {
        *lock(&self.statistics)
    }
}

/// The balloon device.
pub struct Balloon {
    control: Arc<BalloonControl>,
    counters: Arc<BalloonCounters>,
    /// How often the guest is asked for its statistics without being told to.
    period: Option<Duration>,
    poison: u32,
    /// The target that the driver knows of.
    told: AtomicU32,
    worker: Option<Worker<Vec<Queue>>>,
}

impl Balloon {
    /// A balloon that `control` is about. Where there is a `period`, the guest's statistics are asked for so often.
    pub fn new(control: Arc<BalloonControl>, period: Option<Duration>) -> Self {
        Balloon {
            control,
            counters: Arc::default(),
            period,
            poison: 0,
            told: AtomicU32::new(0),
            worker: None,
        }
    }

    /// What it has done so far.
    pub fn counters(&self) -> Arc<BalloonCounters> {
        self.counters.clone()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON as u16
    }

    fn features(&self) -> u64 {
        F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_POISON | F_PAGE_REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [target, actual] =
            [&self.control.target, &self.control.actual].map(|n| n.load(Ordering::Acquire));
        self.told.store(target, Ordering::Relaxed);
        let mut bytes = [0; CONFIG_LEN];
        for (at, word) in [target, actual, 0, self.poison].into_iter().enumerate() {
            bytes[4 * at..][..4].copy_from_slice(&word.to_le_bytes());
        }
        copy_config(&bytes, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(word) = data.try_into().map(u32::from_le_bytes) else {
            return;
        };
        match offset {
            CONFIG_ACTUAL => self.control.actual.store(word, Ordering::Release),
            CONFIG_POISON => self.poison = word,
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            features,
            queues,
            ram,
            interrupt,
        } = activation;
        let active = Active {
            features,
            ram,
            interrupt: interrupt.clone(),
            control: self.control.clone(),
            counters: self.counters.clone(),
            period: self.period,
            told: self.told.load(Ordering::Relaxed),
            // What is poisoned has to stay so.
            takes_reported: features & F_PAGE_POISON == 0 || self.poison == 0,
        };
        let worker = Worker::start((Kind::Device, "virtio-balloon"), interrupt, move |stop| {
            let mut queues = queues;
            active.serve(&mut queues, stop);
            queues
        })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let queues = self.worker.take().and_then(Worker::stop);
        queues.unwrap_or_default()
    }

    fn reset(&mut self) {
        self.poison = 0;
        *self.told.get_mut() = 0;
        self.control.actual.store(0, Ordering::Release);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(BalloonState {
            version: STATE_VERSION,
            actual: self.control.actual.load(Ordering::Acquire),
            poison: self.poison,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Balloon(state) = state else {
            return false;
        };
        self.poison = state.poison;
        self.control.actual.store(state.actual, Ordering::Release);
        state.version == STATE_VERSION
    }
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

/// The specification numbers the queues once for all. Linux before 6.11, and QEMU, leave no gap where a queue is not used. Since the
/// queue of free-page hints (3) is not, both can be served.
fn role(queue: u16, features: u64) -> Role {
    match queue {
        0 => Role::Inflate,
        1 => Role::Deflate,
        2 if features & F_STATS_VQ != 0 => Role::Statistics,
        _ => Role::Reporting,
    }
}

/// A balloon whose driver is ready.
struct Active {
    features: u64,
    ram: Arc<GuestRam>,
    interrupt: Arc<dyn Interrupt>,
    control: Arc<BalloonControl>,
    counters: Arc<BalloonCounters>,
    period: Option<Duration>,
    told: u32,
    takes_reported: bool,
}

impl Active {
    /// The thread.
    fn serve(&self, queues: &mut [Queue], stop: &Stop) {
        let notifiers: Vec<_> = queues.iter().map(|q| q.notifier().clone()).collect();
        let mut descriptors = vec![stop.as_fd(), self.control.wake.as_fd()];
        descriptors.extend(notifiers.iter().map(|n| n.as_fd()));
        let mut told = self.told;
        // The driver's statistics, until new ones are asked for.
        let mut held = None;
        let mut next = self.period.map(|period| Instant::now() + period);
        while !stop.is_wanted() {
            for queue in queues.iter_mut() {
                if let Err(broken) = self.drain(queue, &mut held, stop) {
                    return queue.give_up(broken);
                }
            }
            let target = self.control.target.load(Ordering::Acquire);
            if std::mem::replace(&mut told, target) != target {
                self.interrupt.config();
            }
            let limit = next.map(|at| at.saturating_duration_since(Instant::now()));
            if wait_readable_for(&descriptors, limit).is_err() {
                break;
            }
            self.control.wake.take();
            for notifier in &notifiers {
                notifier.take();
            }
            if let (Some(period), Some(at)) = (self.period, next)
                && at <= Instant::now()
            {
                self.control
                    .statistics_wanted
                    .store(true, Ordering::Release);
                next = Some(Instant::now() + period);
            }
        }
        // As if it had not been taken.
        if held.is_some()
            && let Some(queue) = queues
                .iter_mut()
                .find(|q| role(q.index(), self.features) == Role::Statistics)
        {
            queue.undo_pop();
        }
    }

    /// Serves all requests of a queue that there are.
    fn drain(&self, queue: &mut Queue, held: &mut Option<u16>, stop: &Stop) -> Result<(), Broken> {
        let role = role(queue.index(), self.features);
        if role == Role::Statistics {
            return self.statistics(queue, held);
        }
        queue.quiet()?;
        while !stop.is_wanted() {
            if let Some(chain) = queue.pop(&self.ram)? {
                if !self.carry_out(role, &chain, stop) {
                    // To do it twice does no harm.
                    queue.undo_pop();
                    break;
                }
                queue.push(chain.head, 0)?;
                queue.announce()?;
            } else if !queue.listen()? {
                break;
            }
        }
        Ok(())
    }

    /// Takes statistics, keeps their buffer, and gives it back for new ones.
    fn statistics(&self, queue: &mut Queue, held: &mut Option<u16>) -> Result<(), Broken> {
        if held.is_some()
            && self.control.statistics_wanted.swap(false, Ordering::AcqRel)
            && let Some(head) = held.take()
        {
            queue.push(head, 0)?;
            queue.announce()?;
        }
        while held.is_none() {
            if let Some(chain) = queue.pop(&self.ram)? {
                *held = Some(chain.head);
                let statistics = GuestMemoryStats::parse(&chain.readable);
                *lock(&self.control.statistics) = Some(statistics);
            } else if !queue.listen()? {
                break;
            }
        }
        Ok(())
    }

    /// Carries a request out. False where the thread is to end before that is done.
    fn carry_out(&self, role: Role, chain: &Chain<'_>, stop: &Stop) -> bool {
        match role {
            Role::Inflate => self.inflate(chain.readable.clone(), stop),
            Role::Deflate => {
                let bytes = chain.readable.len() as u64 / 4 * PAGE;
                add(&self.counters.deflated_bytes, bytes);
                true
            }
            Role::Reporting => self.take_reported(&chain.writable, stop),
            Role::Statistics => true,
        }
    }

    /// Discards the pages whose numbers stand in the buffers.
    fn inflate(&self, mut buffers: Buffers<'_>, stop: &Stop) -> bool {
        while !buffers.is_empty() {
            if stop.is_wanted() {
                return false;
            }
            let mut bytes = [0; 4 * NUMBERS];
            let n = buffers.split_off_front(bytes.len()).read(&mut bytes);
            let numbers = bytes[..n].as_chunks::<4>().0;
            let mut pages: Vec<_> = numbers.iter().map(|n| u32::from_le_bytes(*n)).collect();
            pages.sort_unstable();
            pages.dedup();
            for run in pages.chunk_by(|a, b| a + 1 == *b) {
                let len = run.len() as u64 * PAGE;
                add(&self.counters.inflated_bytes, len);
                let discarded = self.ram.discard(u64::from(run[0]) * PAGE, len);
                add(&self.counters.discarded_bytes, discarded);
            }
        }
        true
    }

    /// Discards what the buffers themselves are.
    fn take_reported(&self, buffers: &Buffers<'_>, stop: &Stop) -> bool {
        for slice in buffers.slices() {
            let host = slice.ptr_guard().as_ptr() as u64;
            let (mut at, end) = (host - self.ram.host_base(), slice.len() as u64);
            let end = at + end;
            add(&self.counters.reported_bytes, end - at);
            while self.takes_reported && at < end {
                if stop.is_wanted() {
                    return false;
                }
                let len = STEP.min(end - at);
                let discarded = self.ram.discard(at, len);
                add(&self.counters.discarded_bytes, discarded);
                at += len;
            }
        }
        true
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_found_with_gaps_and_without() {
        let all = F_STATS_VQ | F_PAGE_REPORTING;
        let roles = |features| [0, 1, 2, 3, 4].map(|n| role(n, features));
        use Role::{Deflate, Inflate, Reporting, Statistics};
        assert_eq!(
            roles(all),
            [Inflate, Deflate, Statistics, Reporting, Reporting]
        );
        assert_eq!(roles(F_PAGE_REPORTING)[2..], [Reporting; 3]);
    }
}
