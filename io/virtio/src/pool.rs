//! Work that has to wait for the host, and the threads that do it.
//!
//! A pool grows while its work waits and nobody is idle, up to a bound; it never shrinks before its end. Its list has no bound of its
//! own: work is requests of queues, of which no more are under way than there are descriptors (`queue.rs`). At the end all of the list
//! is still taken, and whoever takes it asks whether it is to be done or left.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Work that waits, and how many threads there are for it.
pub struct Pool<T> {
    state: Mutex<State<T>>,
    work: Condvar,
    threads_max: usize,
}

struct State<T> {
    /// At most as many as the queues have descriptors.
    waiting: VecDeque<T>,
    threads: usize,
    idle: usize,
    closed: bool,
}

impl<T> Pool<T> {
    /// A pool without threads.
    pub fn new(threads_max: usize) -> Self {
        let state = State {
            waiting: VecDeque::new(),
            threads: 0,
            idle: 0,
            closed: false,
        };
        Pool {
            state: Mutex::new(state),
            work: Condvar::new(),
            threads_max,
        }
    }

    fn state(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds work. True where one more thread is to be started, which is counted already.
    pub fn put(&self, work: T) -> bool {
        let mut state = self.state();
        state.waiting.push_back(work);
        if state.idle >= state.waiting.len() {
            self.work.notify_one();
            return false;
        }
        let more = state.threads < self.threads_max;
        state.threads += usize::from(more);
        more
    }

    /// The thread that was counted could not be started. True where there is no other.
    pub fn has_no_thread_after_all(&self) -> bool {
        let mut state = self.state();
        state.threads -= 1;
        state.threads == 0
    }

    /// Waits for work; `None` at the end.
    pub fn take(&self) -> Option<T> {
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

    /// Work, if there is any.
    pub fn take_now(&self) -> Option<T> {
        self.state().waiting.pop_front()
    }

    /// Ends the threads when the list is empty.
    pub fn close(&self) {
        self.state().closed = true;
        self.work.notify_all();
    }
}
