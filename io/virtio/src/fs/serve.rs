//! The threads of a file system device: one for each queue, and a pool for what has to wait.
//!
//! Who is told to stop leaves what waits in the pool's list: nothing of it was done. One request does not take long by itself, as the
//! file server bounds what it moves.

use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope};

use doppel_memory::GuestRam;
use doppel_seccomp::{Kind, narrowed};
use doppel_share::Session;

use super::request::{Done, Request};
use crate::pool::Pool;
use crate::worker::Stop;
use crate::{Broken, Queue, wait_readable};

/// Requests that wait for the host's disk at a time.
const THREADS_MAX: usize = 8;

#[derive(Clone, Copy)]
struct Server<'scope, 'env> {
    scope: &'scope Scope<'scope, 'env>,
    queues: &'env [Mutex<Queue>],
    pool: &'env Pool<(usize, Request<'env>)>,
    session: &'env Session,
    ram: &'env GuestRam,
    stop: &'env Stop,
}

/// Serves the queues until it is told to stop, and gives them back.
pub fn serve(queues: Vec<Queue>, session: &Session, ram: &GuestRam, stop: &Stop) -> Vec<Queue> {
    let queues: Vec<_> = queues.into_iter().map(Mutex::new).collect();
    let pool = Pool::new(THREADS_MAX);
    thread::scope(|scope| {
        let server = Server {
            scope,
            queues: &queues,
            pool: &pool,
            session,
            ram,
            stop,
        };
        server.run();
        // The rest of the list is left before the threads end.
        pool.close();
    });
    let queues = queues.into_iter().map(Mutex::into_inner);
    queues
        .map(|queue| queue.unwrap_or_else(PoisonError::into_inner))
        .collect()
}

impl<'scope, 'env> Server<'scope, 'env> {
    /// A thread for each queue but the last, which this one serves.
    fn run(self) {
        let Some(last) = self.queues.len().checked_sub(1) else {
            return;
        };
        let others = (0..last).map(|n| {
            let thread = thread::Builder::new().name(format!("virtio-fs {n}"));
            thread.spawn_scoped(
                self.scope,
                narrowed(Kind::Share, move || self.serve_queue(n)),
            )
        });
        let others: Vec<_> = others.collect();
        match others.iter().all(Result::is_ok) {
            true => self.serve_queue(last),
            false => self.give_up(last, Broken("the host has no thread for it")),
        }
        for thread in others.into_iter().flatten() {
            if thread.join().is_err() {
                self.give_up(last, Broken("a thread of the device panicked"));
            }
        }
    }

    fn queue(&self, n: usize) -> MutexGuard<'env, Queue> {
        self.queues[n]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn give_up(&self, n: usize, broken: Broken) {
        self.queue(n).give_up(broken);
    }

    fn serve_queue(self, n: usize) {
        let notifier = self.queue(n).notifier().clone();
        while !self.stop.is_wanted() {
            if let Err(broken) = self.drain(n) {
                return self.give_up(n, broken);
            }
            if wait_readable(&[self.stop.as_fd(), notifier.as_fd()]).is_err() {
                return;
            }
            notifier.take();
        }
    }

    /// Takes all requests that there are.
    fn drain(&self, n: usize) -> Result<(), Broken> {
        self.queue(n).quiet()?;
        while !self.stop.is_wanted() {
            let mut queue = self.queue(n);
            let Some(chain) = queue.pop(self.ram)? else {
                if queue.listen()? {
                    continue;
                }
                break;
            };
            drop(queue);
            let request = Request::parse(chain)?;
            match request.carry_out(self.session, false) {
                Some(done) => self.give_back(n, done)?,
                None => self.hand_over(n, request),
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
        if self.pool.put((n, request)) {
            let thread = thread::Builder::new().name("virtio-fs pool".to_owned());
            let this = *self;
            let started =
                thread.spawn_scoped(self.scope, narrowed(Kind::Share, move || this.work()));
            if started.is_err() && self.pool.has_no_thread_after_all() {
                // None to be had at all: this one does what is to be done.
                while let Some((n, request)) = self.pool.take_now() {
                    self.do_one(n, request);
                }
            }
        }
    }

    /// A thread of the pool.
    fn work(self) {
        while let Some((n, request)) = self.pool.take() {
            self.do_one(n, request);
        }
    }

    fn do_one(&self, n: usize, request: Request<'env>) {
        if self.stop.is_wanted() {
            // Nothing of it was done.
            return self.queue(n).leave(request.head());
        }
        // With leave to wait all are carried out.
        if let Some(done) = request.carry_out(self.session, true)
            && let Err(broken) = self.give_back(n, done)
        {
            self.give_up(n, broken);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use doppel_share::{HEADER_LEN, Limits, Share, ShareSpec, opcode};

    use super::*;
    use crate::testing::{DriverQueue, Piece};

    #[test]
    fn what_waits_when_the_device_stops_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let spec = ShareSpec {
            tag: "tag".to_owned(),
            directory: folder.path().to_owned(),
            read_only: true,
            owner: (0, 0),
        };
        let limits = Limits {
            open: 8,
            descriptors: 4,
            node_bytes: 8 << 10,
        };
        let share = Share::open(&spec, limits).unwrap();
        let session = Session::new(Arc::new(share)).unwrap();
        let ram = Arc::new(GuestRam::new(2 << 20).unwrap());
        let mut driver = DriverQueue::new(0, 16, 0x1_0000);
        let queues = [Mutex::new(driver.device_half(&ram, true))];
        ram.store(0x10_0000, HEADER_LEN as u32).unwrap();
        ram.store(0x10_0004, opcode::FSYNC).unwrap();
        let pieces = [
            Piece::Out(0x10_0000, HEADER_LEN as u32),
            Piece::In(0x10_1000, 16),
        ];
        let (pool, stop) = (Pool::new(1), Stop::new().unwrap());
        thread::scope(|scope| {
            let server = Server {
                scope,
                queues: &queues,
                pool: &pool,
                session: &session,
                ram: &ram,
                stop: &stop,
            };
            let next = || {
                let chain = server.queue(0).pop(&ram).unwrap();
                chain.map(|chain| Request::parse(chain).unwrap())
            };
            driver.submit(&ram, &pieces);
            server.do_one(0, next().unwrap());
            assert!(driver.take(&ram).is_some());
            driver.submit(&ram, &pieces);
            let request = next().unwrap();
            stop.want();
            server.do_one(0, request);
            assert!(driver.take(&ram).is_none());
            assert!(next().is_none());
            server.queue(0).rewind().unwrap();
            assert_eq!(next().map(|request| request.head()), Some(2));
        });
    }
}
