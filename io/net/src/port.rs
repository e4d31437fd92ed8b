//! What a device plugs its cable into: a back-end with its lock, and what its thread waits for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use doppel_device::{Clock, NANOS_PER_SECOND, Nanos};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::link::Link;

struct State {
    link: Box<dyn Link>,
    // What the timer is set to.
    armed: Option<Nanos>,
}

/// A back-end that several threads use.
pub struct Port {
    state: Mutex<State>,
    clock: Arc<dyn Clock>,
    events: OwnedFd,
    timer: OwnedFd,
}

impl Port {
    /// A port of `link`, whose deadlines refer to `clock`.
    pub fn new(link: Box<dyn Link>, clock: Arc<dyn Clock>) -> io::Result<Arc<Self>> {
        let events = link.descriptor().try_clone_to_owned()?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Arc::new(Port {
            state: Mutex::new(State { link, armed: None }),
            clock,
            events,
            timer,
        }))
    }

    /// Uses the back-end.
    pub fn with<R>(&self, f: impl FnOnce(&mut dyn Link) -> R) -> R {
        let state = self.state.lock();
        self.within(state.unwrap_or_else(PoisonError::into_inner), f)
    }

    /// The same, unless another thread is at it.
    pub fn try_with<R>(&self, f: impl FnOnce(&mut dyn Link) -> R) -> Option<R> {
        match self.state.try_lock() {
            Ok(state) => Some(self.within(state, f)),
            Err(TryLockError::Poisoned(state)) => Some(self.within(state.into_inner(), f)),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    fn within<R>(&self, mut state: MutexGuard<State>, f: impl FnOnce(&mut dyn Link) -> R) -> R {
        let result = f(state.link.as_mut());
        let deadline = state.link.deadline();
        if deadline.is_some_and(|at| state.armed.is_none_or(|armed| at < armed)) {
            self.arm(&mut state, deadline);
        }
        result
    }

    fn arm(&self, state: &mut State, deadline: Option<Nanos>) {
        state.armed = deadline;
        // A value of 0 would turn the timer off.
        let wait = deadline.map_or(0, |at| at.saturating_sub(self.clock.now()).max(1));
        let value = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: (wait / NANOS_PER_SECOND) as i64,
                tv_nsec: (wait % NANOS_PER_SECOND) as _,
            },
        };
        let set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value);
        debug_assert!(set.is_ok(), "{set:?}");
    }

    /// What has news for [`Port::service`] when it can be read: sockets of the host, and the timer.
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.events.as_fd(), self.timer.as_fd()]
    }

    /// Looks after host sockets and timers. True where the device should look for frames, or offer again what was refused.
    pub fn service(&self) -> bool {
        // It only says that time has passed; nothing to read is as good.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let room = state.link.service();
        let deadline = state.link.deadline();
        self.arm(&mut state, deadline);
        room || state.link.has_frames()
    }
}
