//! A process with the stub in it, told what to do through its exchange area.
//!
//! Problem: a guest can write to its child's exchange area, give the monitor the turn, and run on. While its kernel takes it for stopped, takes
//! its pages away and gives them to others, it would still write to them; and it could claim that changes were made.
//! Idea: only the kernel is believed. The stub wakes a sleeping monitor by one call, FUTEX_WAKE_OP, that the filter lets pass at one instruction and that
//! sets the word to 0 as it wakes; who was woken by it knows that the child is behind that instruction, in the stub. Where the monitor was not
//! asleep, it asks the kernel to move the child from one futex to another (FUTEX_CMP_REQUEUE), which succeeds for a child that sleeps behind the
//! stub's other instruction. A child that does neither gets a signal, whose handler is the stub.
//! Invariant: from a stop to the next turn that it is given, a child is in the stub. Orders it executes before anything else, and whether one
//! failed is known before it leaves.
//! Cost: none in the first case, which is the usual one; a system call in the second.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, pidfd_send_signal};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use crate::arch_stub::{
    ANNOUNCED, CALL_SIZE, DONE, MOST_CALLS, ORDER_COUNT, ORDER_KEY, ORDER_RESUME, ORDERS, RESUME,
    RESUMED,
};
use crate::change::Call;
use crate::exchange::{Shared, Turn};

/// So long a process may take for system calls, on a host however busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// So long a child may take from giving the turn to falling asleep, and so long until it is reminded.
const CLAIM: Duration = Duration::from_secs(5);
const HINT: Duration = Duration::from_millis(2);

/// One process.
#[derive(Debug)]
pub(crate) struct Process {
    pub exchange: Shared,
    orders: Shared,
    pub pidfd: OwnedFd,
    pub pid: u32,
    /// What the word says in its turn: its thread number, or 1 until it has one.
    pub owner: u32,
    key: [u64; 2],
    /// The host processor that it was told to run on. The monitor and its child take turns: on one processor a turn is a switch, on two it is
    /// a wake-up of an idle one, which takes ten times as long in a virtual machine.
    cpu: Option<usize>,
    /// It sleeps on the bench.
    benched: bool,
    /// There are orders.
    ordered: bool,
    dead: bool,
}

/// What became of calls.
#[derive(Debug)]
pub(crate) enum Called {
    /// All succeeded.
    Done,
    /// The call with this number in the list failed, and those after it were not made.
    Failed(usize, io::Error),
    /// The process is dead.
    Dead,
}

impl Process {
    /// A process that is about to take its first turn. It has never run guest code.
    pub fn new(exchange: Shared, orders: Shared, pidfd: OwnedFd, pid: u32, owner: u32) -> Process {
        Process {
            exchange,
            orders,
            pidfd,
            pid,
            owner,
            key: [0; 2],
            cpu: None,
            benched: false,
            ordered: false,
            dead: false,
        }
    }

    /// From now on, calls need this key.
    pub fn lock(&mut self, key: [u64; 2]) {
        self.key = key;
    }

    /// Ends it for good.
    pub fn kill(&mut self) {
        self.dead = true;
        // A process that is gone already is what was wanted.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }

    /// Whether the kernel says that it ended.
    pub fn has_ended(&self) -> bool {
        ended(self.pidfd.as_fd())
    }

    /// Has it execute calls and come back. At most [`MOST_CALLS`].
    pub fn call(&mut self, calls: &[Call]) -> Called {
        if !self.start(calls, false) || !self.wait_patiently() {
            return Called::Dead;
        }
        self.called(calls.len())
    }

    /// Has it execute a call that raises a signal in it. False where it is dead.
    pub fn interrupt(&mut self, call: Call) -> bool {
        self.start(&[call], false) && self.wait_patiently()
    }

    /// What became of the calls of a list of `count`, in the monitor's turn.
    pub fn called(&mut self, count: usize) -> Called {
        let done = self.exchange.load32(DONE) as usize;
        if done == count {
            return Called::Done;
        }
        let result = self.result(done.min(MOST_CALLS - 1)) as i64;
        if done > count || !(-4095..0).contains(&result) {
            self.kill();
            return Called::Dead;
        }
        Called::Failed(done, io::Error::from_raw_os_error(-result as i32))
    }

    /// The result of a call of the last list.
    pub fn result(&self, n: usize) -> u64 {
        self.exchange
            .load64(ORDERS + CALL_SIZE * (n + 1) + CALL_SIZE - 8)
    }

    /// Has it execute calls and then go to the guest with the frame in the exchange area. False where it is dead.
    pub fn resume(&mut self, calls: &[Call]) -> bool {
        self.exchange.store32(RESUMED, 0);
        self.start(calls, true)
    }

    /// Gives it the turn with a list of calls.
    fn start(&mut self, calls: &[Call], resume: bool) -> bool {
        if !calls.is_empty() {
            self.order(calls, resume);
        }
        self.exchange.store32(ANNOUNCED, calls.len() as u32);
        self.exchange.store32(RESUME, resume.into());
        let benched = std::mem::take(&mut self.benched);
        if !self.dead && self.exchange.give(self.owner, benched).is_err() {
            self.kill();
        }
        !self.dead
    }

    /// Writes the orders, and the key last: a guest that has them executed early is without it until they are whole.
    fn order(&mut self, calls: &[Call], resume: bool) {
        assert!(calls.len() <= MOST_CALLS);
        for (n, call) in calls.iter().enumerate() {
            for (m, word) in call.iter().enumerate() {
                self.orders.store64(CALL_SIZE * (n + 1) + 8 * m, *word);
            }
        }
        self.orders.store32(ORDER_COUNT, calls.len() as u32);
        self.orders.store32(ORDER_RESUME, resume.into());
        fence(Ordering::SeqCst);
        self.orders.store64(ORDER_KEY[0], self.key[0]);
        self.orders.store64(ORDER_KEY[1], self.key[1]);
        self.ordered = true;
    }

    /// Takes the orders back, so that nobody has them executed again.
    fn take_back(&mut self) {
        if std::mem::take(&mut self.ordered) {
            self.orders.store64(ORDER_KEY[0], 0);
            self.orders.store64(ORDER_KEY[1], 0);
            self.orders.store32(ORDER_COUNT, 0);
            fence(Ordering::SeqCst);
        }
    }

    /// Waits for the monitor's turn, a while. `None` where it has not come yet.
    pub fn wait(&mut self) -> Option<bool> {
        match self.exchange.wait(self.owner) {
            Turn::Monitor { proven } => {
                let stopped = proven || self.is_in_the_stub();
                self.take_back();
                Some(stopped)
            }
            Turn::NotYet if !self.has_ended() => None,
            Turn::NotYet | Turn::Dead => {
                self.kill();
                Some(false)
            }
        }
    }

    /// Makes sure that it has stopped, and did not only claim to: it sleeps in the stub. One that runs on is made to stop. False where it
    /// cannot be, and is killed.
    fn is_in_the_stub(&mut self) -> bool {
        let start = Instant::now();
        let mut next = HINT;
        while !self.exchange.bench() {
            let waited = start.elapsed();
            if waited > CLAIM {
                self.kill();
                return false;
            }
            if waited > next {
                // In the stub it has signals blocked, and stops once more when it runs again: that is seen for what it is.
                let _ = pidfd_send_signal(&self.pidfd, Signal::USR1);
                next *= 2;
            }
            std::thread::yield_now();
        }
        self.benched = true;
        true
    }

    /// Waits for the monitor's turn after something that takes no time. False where the process is dead.
    pub fn wait_patiently(&mut self) -> bool {
        let start = Instant::now();
        loop {
            match self.wait() {
                Some(alive) => return alive,
                None if start.elapsed() > PATIENCE => {
                    self.kill();
                    return false;
                }
                None => {}
            }
        }
    }

    /// Has it run on the host processor on which this thread is: see [`Process::cpu`].
    pub fn follow(&mut self) {
        let here = sched_getcpu();
        if self.cpu == Some(here) {
            return;
        }
        self.cpu = Some(here);
        let mut set = CpuSet::new();
        if here < CpuSet::MAX_CPU {
            set.set(here);
            // A host that does not let us runs it where it likes.
            let _ = sched_setaffinity(Pid::from_raw(self.pid as i32), &set);
        }
    }
}

/// Whether the process behind a pidfd ended.
pub(crate) fn ended(pidfd: std::os::fd::BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok_and(|n| n > 0)
}
