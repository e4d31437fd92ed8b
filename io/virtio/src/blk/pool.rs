//! The threads of a block device.
//!
//! Problem: a driver keeps many requests under way so that the disk can work on them at once. One thread that makes blocking calls would
//! do them one by one; a thread for each request would cost more than a request that the host has in its cache.
//! Idea: the thread of a queue does at once what needs no waiting (preadv2 with RWF_NOWAIT says whether it does), and hands the
//! rest to a pool, which grows while its requests wait and nobody is idle.
//! Invariant: a request is in one place: in the ring, with its queue's thread, in the pool's list, with one of its threads, or left. The
//! queues are given back when all are in the ring again or left: who is told to stop begins none that may take long, and leaves one that
//! does between two pieces of it. What the driver was told is done is done.
//! Cost: a lock of the queue for taking and one for giving back, a wake-up for what has to wait.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};

use doppel_memory::GuestRam;
use doppel_seccomp::{Kind, narrowed};

use super::Disk;
use super::pace::{LONG, Pace};
use super::request::{Done, HEADER_LEN, Request};
use crate::pool::Pool;
use crate::worker::Stop;
use crate::{Broken, Queue, wait_readable};

/// More than this waits in line: as many as a disk of today does at once.
const THREADS_MAX: usize = 16;
/// A vCPU does no more requests at one notification.
const AT_ONCE_MAX: usize = 8;
/// A queue while the device is active.
#[derive(Default)]
pub struct Slot {
    queue: Mutex<Option<Queue>>,
    pace: Pace,
}

/// Serves the queues until it is told to stop; they stay in their slots.
pub fn serve(queues: &[Arc<Slot>], disk: &Disk, ram: &GuestRam, stop: &Stop) {
    let pool = Pool::new(THREADS_MAX);
    thread::scope(|scope| {
        let server = Server {
            scope,
            queues,
            pool: &pool,
            disk,
            ram,
            stop,
        };
        server.run();
        // The rest of the list is left before the threads end.
        pool.close();
    });
}

/// What the vCPU that notifies does itself: requests that need no waiting, as long as they are few and short. True where none is
/// left.
pub fn serve_at_once(slot: &Slot, disk: &Disk, ram: &GuestRam) -> bool {
    // Where the queue's thread is at work it finds the requests itself, but it may be about to sleep.
    let Ok(mut queue) = slot.queue.try_lock() else {
        return false;
    };
    let Some(queue) = queue.as_mut() else {
        return false;
    };
    // What is broken is for the queue's thread to find again.
    at_once(queue, &slot.pace, disk, ram).unwrap_or(false)
}

fn at_once(queue: &mut Queue, pace: &Pace, disk: &Disk, ram: &GuestRam) -> Result<bool, Broken> {
    let mut room = pace.room() + HEADER_LEN + 1;
    for n in 0..AT_ONCE_MAX {
        let Some(chain) = queue.pop(ram)? else {
            if queue.listen()? {
                continue;
            }
            return Ok(true);
        };
        let len = chain.readable.len() + chain.writable.len();
        if n > 0 && len > LONG {
            pace.several();
        }
        let left = room.checked_sub(len).filter(|_| !pace.is_trial(len));
        let request = left.and_then(|_| Request::parse(chain).ok());
        let done = request.map(|request| request.try_now(disk));
        room = left.unwrap_or(0);
        match done {
            Some(Ok((head, written))) => {
                count(&disk.counters.at_once);
                queue.push(head, written)?;
                queue.announce()?;
            }
            _ => {
                queue.undo_pop();
                return Ok(false);
            }
        }
    }
    Ok(false)
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The queue of a slot, if it is active.
pub fn lock(slot: &Slot) -> MutexGuard<'_, Option<Queue>> {
    slot.queue.lock().unwrap_or_else(PoisonError::into_inner)
}

/// There is always a queue while its threads run.
const GONE: Broken = Broken("a queue that is gone");

#[derive(Clone, Copy)]
struct Server<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    queues: &'env [Arc<Slot>],
    pool: &'env Pool<(usize, Request<'env>)>,
    disk: &'env Disk,
    ram: &'env GuestRam,
    stop: &'env Stop,
}

impl<'scope, 'env> Server<'scope, 'env> {
    /// A thread for each queue but the first, which this one serves.
    fn run(self) {
        let others = (1..self.queues.len()).map(|n| {
            let name = format!("virtio-blk {n}");
            let thread = thread::Builder::new().name(name);
            thread.spawn_scoped(
                self.scope,
                narrowed(Kind::Disk, move || self.serve_queue(n)),
            )
        });
        let others: Vec<_> = others.collect();
        if !self.queues.is_empty() {
            self.serve_queue(0);
        }
        for (n, other) in others.into_iter().enumerate() {
            match other {
                // A panic comes out of the scope.
                Ok(other) => drop(other.join()),
                // No thread to be had: the queue waits for the next chance, which is the device's next life.
                Err(_) => self.give_up(n + 1, Broken("the host has no thread for it")),
            }
        }
    }

    fn give_up(&self, n: usize, broken: Broken) {
        if let Some(queue) = lock(&self.queues[n]).as_ref() {
            queue.give_up(broken);
        }
    }

    fn serve_queue(self, n: usize) {
        let notifier = lock(&self.queues[n]).as_ref().map(|q| q.notifier().clone());
        let Some(notifier) = notifier else { return };
        while !self.stop.is_wanted() {
            if wait_readable(&[self.stop.as_fd(), notifier.as_fd()]).is_err() {
                return;
            }
            notifier.take();
            if let Err(broken) = self.drain(n) {
                return self.give_up(n, broken);
            }
        }
    }

    /// Takes all requests that there are.
    fn drain(&self, n: usize) -> Result<(), Broken> {
        while !self.stop.is_wanted() {
            let mut slot = lock(&self.queues[n]);
            let queue = slot.as_mut().ok_or(GONE)?;
            let Some(chain) = queue.pop(self.ram)? else {
                if queue.listen()? {
                    continue;
                }
                break;
            };
            queue.quiet()?;
            drop(slot);
            let len = chain.readable.len() + chain.writable.len();
            match Request::parse(chain)?.try_now(self.disk) {
                Ok(done) => {
                    count(&self.disk.counters.by_queue);
                    self.give_back(n, len, done)?;
                }
                Err(request) => {
                    count(&self.disk.counters.by_pool);
                    self.hand_over(n, request);
                }
            }
        }
        Ok(())
    }

    /// Gives a request of `len` bytes back.
    fn give_back(&self, n: usize, len: usize, (head, written): Done) -> Result<(), Broken> {
        let mut slot = lock(&self.queues[n]);
        let queue = slot.as_mut().ok_or(GONE)?;
        // What comes when the driver knows of this one tells nothing.
        let another = queue.has_next()?;
        self.queues[n].pace.served(len, another);
        queue.push(head, written)?;
        if !another {
            // Who is woken may take this thread's processor, and shall not find the queue silent or locked with its next request.
            queue.listen()?;
        }
        let announcement = queue.announcement()?;
        drop(slot);
        announcement.send();
        Ok(())
    }

    fn hand_over(&self, n: usize, request: Request<'env>) {
        if self.pool.put((n, request)) {
            let thread = thread::Builder::new().name("virtio-blk pool".to_owned());
            let this = *self;
            let started =
                thread.spawn_scoped(self.scope, narrowed(Kind::Disk, move || this.work()));
            if started.is_err() && self.pool.has_no_thread_after_all() {
                // None to be had at all: this one does what is to be done.
                self.work_off();
            }
        }
    }

    /// A thread of the pool.
    fn work(self) {
        while let Some((n, request)) = self.pool.take() {
            self.do_one(n, request);
        }
    }

    fn work_off(&self) {
        while let Some((n, request)) = self.pool.take_now() {
            self.do_one(n, request);
        }
    }

    fn do_one(&self, n: usize, request: Request<'env>) {
        let head = request.head();
        let end = match request.carry_out(self.disk, self.stop) {
            Some(done) => self.give_back(n, 0, done),
            None => self.leave(n, head),
        };
        if let Err(broken) = end {
            self.give_up(n, broken);
        }
    }

    fn leave(&self, n: usize, head: u16) -> Result<(), Broken> {
        lock(&self.queues[n]).as_mut().ok_or(GONE)?.leave(head);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    use super::*;
    use crate::testing::{DriverQueue, Piece};
    use crate::{Activation, Blk, EVENT_IDX, Interrupt, Notifier, QueueState, VirtioDevice};

    const RINGS: u64 = 0x1_0000;
    const DATA: u64 = 0x20_0000;

    /// A driver whose next request comes with the interrupt: says whether it finds the queue free and listening.
    struct Impatient {
        slot: Arc<Slot>,
        ram: Arc<GuestRam>,
        event: u64,
        finds: Sender<(bool, Option<u16>)>,
    }

    impl Interrupt for Impatient {
        fn queue(&self, _: u16) {
            let free = self.slot.queue.try_lock().is_ok();
            let _ = self.finds.send((free, self.ram.load(self.event)));
        }
        fn config(&self) {}
        fn needs_reset(&self, why: &str) {
            panic!("{why}");
        }
    }

    #[test]
    fn who_is_told_of_a_long_request_finds_the_queue_free_and_listening() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&[7; 2 * LONG]).unwrap();
        let spec = format!("{},format=raw", file.path().display());
        let backend = spec.parse::<doppel_block::DiskSpec>().unwrap().open();
        let mut blk = Blk::new(backend.unwrap(), "", 1);

        let ram = Arc::new(GuestRam::new(16 << 20).unwrap());
        let mut driver = DriverQueue::new(0, 16, RINGS);
        let (finds, found) = channel();
        let interrupt = Arc::new(Impatient {
            slot: blk.slots[0].clone(),
            ram: ram.clone(),
            event: driver.used() + 4 + 8 * u64::from(driver.size),
            finds,
        });
        let state = QueueState {
            enabled: true,
            size: driver.size,
            descriptors: driver.base,
            driver: driver.avail(),
            device: driver.used(),
            ..QueueState::default()
        };
        let notifier = Arc::new(Notifier::new().unwrap());
        let (memory, to) = (ram.clone(), interrupt.clone());
        let queue = Queue::new(0, &state, true, memory, notifier.clone(), to).unwrap();
        let features = EVENT_IDX;
        let activation = Activation {
            features,
            queues: vec![queue],
            ram: ram.clone(),
            interrupt,
        };
        blk.activate(activation).unwrap();

        let data = Piece::In(DATA, 2 * LONG as u32);
        let status = Piece::In(DATA - 0x1000, 1);
        driver.submit(&ram, &[Piece::Out(DATA - 0x2000, 16), data, status]);
        notifier.notify();
        let found = found.recv_timeout(Duration::from_secs(20));
        assert_eq!(found, Ok((true, Some(1))));
        assert_eq!(ram.load::<u8>(DATA + 2 * LONG as u64 - 1), Some(7));
        assert_eq!(blk.deactivate().len(), 1);
    }
}
