//! Who ends the machine: the first cause counts, and every vCPU hears of it.
//!
//! A cause comes from anywhere: a chip under its lock (power off), a vCPU (triple fault), the host (stop). Noting it
//! takes one lock that nothing else is taken under but for waking the vCPUs, so it is safe from all of these places.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use doppel_device::{PowerControl, PowerRequest};

use crate::doorbell::Doorbell;

/// Why the machine ends or starts again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The guest asked for it.
    Power(PowerRequest),
    /// A vCPU shut down: triple fault.
    TripleFault,
    /// Every vCPU halted with interrupts off.
    Halted,
    /// The guest kernel panicked and stays there.
    Panic,
    /// The host asked for it.
    Stop,
    /// A thread of the monitor panicked.
    Broken,
}

#[derive(Default)]
struct State {
    cause: Option<Cause>,
    /// The host has asked for the end, be it the cause or not.
    stopped: bool,
    doorbells: Vec<Arc<Doorbell>>,
}

/// The end of a machine, shared by all its threads.
#[derive(Default)]
pub struct Control {
    state: Mutex<State>,
    changed: Condvar,
    ending: AtomicBool,
}

impl Control {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes a cause; the first one counts.
    pub fn end(&self, cause: Cause) {
        let mut state = self.lock();
        state.cause.get_or_insert(cause);
        state.stopped |= cause == Cause::Stop;
        self.ending.store(true, Ordering::Release);
        for doorbell in &state.doorbells {
            doorbell.ring();
        }
        self.changed.notify_all();
    }

    /// True once there is a cause.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Waits for a cause.
    pub fn wait(&self) -> Cause {
        let mut state = self.lock();
        loop {
            match state.cause {
                Some(cause) => return cause,
                None => {
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// The vCPUs to wake.
    pub fn set_doorbells(&self, doorbells: Vec<Arc<Doorbell>>) {
        let mut state = self.lock();
        state.doorbells = doorbells;
        // A cause that came before them.
        if state.cause.is_some() {
            state.doorbells.iter().for_each(|d| d.ring());
        }
    }

    /// True where no vCPU was called that has not looked why yet.
    pub fn nobody_is_called(&self) -> bool {
        !self.lock().doorbells.iter().any(|d| d.is_rung())
    }

    /// Forgets the cause before the machine starts again, unless the host asked for the end.
    pub fn restart(&self) {
        let mut state = self.lock();
        state.cause = state.stopped.then_some(Cause::Stop);
        self.ending.store(state.stopped, Ordering::Release);
    }
}

impl PowerControl for Control {
    fn request(&self, request: PowerRequest) {
        self.end(Cause::Power(request));
    }
}

/// Ends a machine from any thread of the host.
#[derive(Clone)]
pub struct StopHandle(Arc<Control>);

impl StopHandle {
    pub(crate) fn new(control: Arc<Control>) -> Self {
        StopHandle(control)
    }

    /// Ends the machine as if its plug were pulled; [`crate::Machine::run`] returns [`crate::Ending::Stopped`].
    pub fn stop(&self) {
        self.0.end(Cause::Stop);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_counts() {
        let control = Arc::new(Control::default());
        assert!(!control.is_ending());
        control.request(PowerRequest::PowerOff);
        control.end(Cause::TripleFault);
        assert!(control.is_ending());
        assert_eq!(control.wait(), Cause::Power(PowerRequest::PowerOff));
        control.restart();
        assert!(!control.is_ending());
    }

    #[test]
    fn a_stop_survives_a_restart() {
        let control = Arc::new(Control::default());
        StopHandle::new(control.clone()).stop();
        control.restart();
        assert_eq!(control.wait(), Cause::Stop);
    }

    #[test]
    fn a_stop_is_not_lost_while_the_guest_restarts() {
        let control = Arc::new(Control::default());
        control.request(PowerRequest::Reset);
        StopHandle::new(control.clone()).stop();
        assert_eq!(control.wait(), Cause::Power(PowerRequest::Reset));
        control.restart();
        assert!(control.is_ending());
        assert_eq!(control.wait(), Cause::Stop);
    }

    #[test]
    fn a_waiting_thread_is_woken() {
        let control = Arc::new(Control::default());
        let waiter = std::thread::spawn({
            let control = control.clone();
            move || control.wait()
        });
        control.end(Cause::Panic);
        assert_eq!(waiter.join().unwrap(), Cause::Panic);
    }
}
