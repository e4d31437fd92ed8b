//! An alarm that calls a vCPU's engine out of translated code, for the policy of direct execution: the guest's own timer comes every few
//! milliseconds only.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use doppel_device::{Alarm, Nanos, OnAlarm, Timers};
use doppel_direct::Reminder;
use doppel_x86::Kick;

/// The alarm of one vCPU. Nothing rings before both are known: whom to call, and the machine's timers.
#[derive(Default)]
pub struct Probe {
    engine: OnceLock<Arc<dyn Kick>>,
    alarm: OnceLock<(Alarm, Arc<Timers>)>,
    rang: AtomicBool,
}

impl Probe {
    /// Whom to call.
    pub fn calls(&self, engine: Arc<dyn Kick>) {
        let _ = self.engine.set(engine);
    }

    /// By which timers.
    pub fn by(self: &Arc<Self>, timers: &Arc<Timers>) {
        let this: Weak<dyn OnAlarm> = Arc::<Self>::downgrade(self);
        let _ = self.alarm.set((timers.alarm(this), timers.clone()));
    }
}

impl Reminder for Probe {
    fn after(&self, nanoseconds: Nanos) {
        if let Some((alarm, timers)) = self.alarm.get() {
            alarm.set(Some(timers.clock().now() + nanoseconds));
        }
    }

    fn take_rung(&self) -> bool {
        self.rang.swap(false, Ordering::SeqCst)
    }
}

impl OnAlarm for Probe {
    fn on_alarm(&self) {
        self.rang.store(true, Ordering::SeqCst);
        if let Some(engine) = self.engine.get() {
            engine.kick();
        }
    }
}
