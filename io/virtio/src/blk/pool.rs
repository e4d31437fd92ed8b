//! The threads of a block device.
//!
//! Problem: a driver keeps many requests under way so that the disk can work on them at once. One thread that makes blocking calls would
//! do them one by one; a thread for each request would cost more than a request that the host has in its cache.
//! Idea: the thread of a queue does at once what needs no waiting (preadv2 with RWF_NOWAIT says whether it does), and hands the
//! rest to a pool, which grows while its requests wait and nobody is idle.
//! Invariant: a request is in one place: in the ring, with its queue's thread, in the pool's list, with one of its threads. The
//! queues are given back when all are in the ring again.
//! Cost: a lock of the queue for taking and one for giving back, a wake-up for what has to wait.

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};

use doppel_memory::GuestRam;

use super::Disk;
use super::request::{Done, Request};
use crate::worker::Stop;
use crate::{Broken, Queue, wait_readable};

/// More than this waits in line: as many as a disk of today does at once.
const THREADS_MAX: usize = 16;

/// Serves the queues until it is told to stop; gives them back.
pub fn serve(queues: Vec<Queue>, disk: &Arc<Disk>, ram: &Arc<GuestRam>, stop: &Stop) -> Vec<Queue> {
    let queues: Vec<_> = queues.into_iter().map(Mutex::new).collect();
    let pool = Pool::default();
    thread::scope(|scope| {
        let server = Server {
            scope,
            queues: &queues,
            pool: &pool,
            disk,
            ram,
            stop,
        };
        server.run();
        // The rest of the list is done before the threads end.
        pool.close();
    });
    let unlocked = |q: Mutex<Queue>| q.into_inner().unwrap_or_else(PoisonError::into_inner);
    queues.into_iter().map(unlocked).collect()
}

#[derive(Clone, Copy)]
struct Server<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    queues: &'env [Mutex<Queue>],
    pool: &'env Pool<'env>,
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
            thread.spawn_scoped(self.scope, move || self.serve_queue(n))
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
                Err(_) => self
                    .queue(n + 1)
                    .give_up(Broken("the host has no thread for it")),
            }
        }
    }

    fn queue(&self, n: usize) -> MutexGuard<'env, Queue> {
        self.queues[n]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn serve_queue(self, n: usize) {
        let notifier = self.queue(n).notifier().clone();
        while !self.stop.is_wanted() {
            if wait_readable(&[self.stop.as_fd(), notifier.as_fd()]).is_err() {
                return;
            }
            notifier.take();
            if let Err(broken) = self.drain(n) {
                return self.queue(n).give_up(broken);
            }
        }
    }

    /// Takes all requests that there are.
    fn drain(&self, n: usize) -> Result<(), Broken> {
        self.queue(n).quiet()?;
        while !self.stop.is_wanted() {
            let chain = {
                let mut queue = self.queue(n);
                match queue.pop(self.ram)? {
                    Some(chain) => chain,
                    None if queue.listen()? => continue,
                    None => break,
                }
            };
            match Request::parse(chain)?.try_now(self.disk) {
                Ok(done) => self.give_back(n, done)?,
                Err(request) => self.hand_over(n, request),
            }
        }
        Ok(())
    }

    fn give_back(&self, n: usize, (head, written): Done) -> Result<(), Broken> {
        let mut queue = self.queue(n);
        queue.push(head, written)?;
        queue.announce()
    }

    fn hand_over(&self, n: usize, request: Request<'env>) {
        if self.pool.put(n, request) {
            let thread = thread::Builder::new().name("virtio-blk pool".to_owned());
            let this = *self;
            let started = thread.spawn_scoped(self.scope, move || this.work());
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
        if let Err(broken) = self.give_back(n, request.carry_out(self.disk)) {
            self.queue(n).give_up(broken);
        }
    }
}

/// Requests that wait, with the number of their queue, and the threads that do them.
#[derive(Default)]
struct Pool<'r> {
    state: Mutex<PoolState<'r>>,
    work: Condvar,
}

#[derive(Default)]
struct PoolState<'r> {
    // At most as many as there are descriptors.
    waiting: VecDeque<(usize, Request<'r>)>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl<'r> Pool<'r> {
    fn state(&self) -> MutexGuard<'_, PoolState<'r>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a request. True where one more thread is to be started, which is counted already.
    fn put(&self, n: usize, request: Request<'r>) -> bool {
        let mut state = self.state();
        state.waiting.push_back((n, request));
        if state.idle >= state.waiting.len() {
            self.work.notify_one();
            return false;
        }
        let more = state.threads < THREADS_MAX;
        state.threads += usize::from(more);
        more
    }

    /// The thread that was counted could not be started. True where there is no other.
    fn has_no_thread_after_all(&self) -> bool {
        let mut state = self.state();
        state.threads -= 1;
        state.threads == 0
    }

    /// Waits for a request; `None` at the end.
    fn take(&self) -> Option<(usize, Request<'r>)> {
        let mut state = self.state();
        loop {
            if let Some(next) = state.waiting.pop_front() {
                return Some(next);
            }
            if state.closed {
                return None;
            }
            state.idle += 1;
            state = self
                .work
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }

    fn take_now(&self) -> Option<(usize, Request<'r>)> {
        self.state().waiting.pop_front()
    }

    fn close(&self) {
        self.state().closed = true;
        self.work.notify_all();
    }
}
