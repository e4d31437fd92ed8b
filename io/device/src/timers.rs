//! Alarms: who wants to be called at what time.
//!
//! One thread serves all alarms of a machine. It sleeps in a read of a timerfd that is set to the earliest one, so
//! that setting an alarm costs at most one system call and wakes nobody, and an idle machine wakes only when
//! something is due.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use crate::{Clock, NANOS_PER_SECOND, Nanos};

/// What an alarm calls, from the timer thread and with no lock held. It may come late and for a deadline that was since
/// changed, so the callee looks at the time itself.
pub trait OnAlarm: Send + Sync {
    /// A deadline has passed.
    fn on_alarm(&self);
}

/// Called before alarms that are late.
type WhenLate = Box<dyn Fn() + Send + Sync>;

/// So late is the thread only where the host stopped the whole process, or has no time for it.
const LATE: Nanos = NANOS_PER_SECOND / 2;

/// The alarms of a machine.
pub struct Timers {
    clock: Arc<dyn Clock>,
    timer: OwnedFd,
    queue: Mutex<Queue>,
    stopped: AtomicBool,
    when_late: OnceLock<WhenLate>,
}

#[derive(Default)]
struct Queue {
    alarms: Vec<Slot>,
    // What the timerfd is set to.
    armed: Option<Nanos>,
}

struct Slot {
    deadline: Option<Nanos>,
    target: Weak<dyn OnAlarm>,
}

impl Timers {
    /// No alarms yet, on `clock`.
    pub fn new(clock: Arc<dyn Clock>) -> io::Result<Arc<Self>> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC)?;
        Ok(Arc::new(Timers {
            clock,
            timer,
            queue: Mutex::default(),
            stopped: AtomicBool::new(false),
            when_late: OnceLock::new(),
        }))
    }

    /// The clock that deadlines refer to.
    pub fn clock(&self) -> &Arc<dyn Clock> {
        &self.clock
    }

    /// A new alarm, not set, that calls `target` while that lives. Alarms are made once, with the machine.
    pub fn alarm(self: &Arc<Self>, target: Weak<dyn OnAlarm>) -> Alarm {
        let mut queue = self.lock();
        queue.alarms.push(Slot {
            deadline: None,
            target,
        });
        Alarm {
            index: queue.alarms.len() - 1,
            timers: self.clone(),
        }
    }

    /// The timer thread: calls alarms when they are due until [`Timers::stop`].
    pub fn run(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            self.fire_due();
            let mut expirations = [0; 8];
            // Any outcome (expired, interrupted) means: look again.
            let _ = rustix::io::read(&self.timer, &mut expirations);
            self.tell_lateness();
        }
    }

    /// Has `call` called before alarms that are late by half a second or more: the host had stopped the process, or had no time for it.
    /// The first counts.
    pub fn when_late(&self, call: impl Fn() + Send + Sync + 'static) {
        let _ = self.when_late.set(Box::new(call));
    }

    /// Does so now where the thread is that late and has not woken yet: whoever hands on what is due, from a thread of its own, asks for it before.
    pub fn tell_lateness(&self) {
        let due = self.lock().armed;
        let late = due.is_some_and(|due| self.clock.now().saturating_sub(due) >= LATE);
        if let Some(call) = self.when_late.get().filter(|_| late) {
            call();
        }
    }

    /// Ends [`Timers::run`].
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        let _queue = self.lock();
        self.arm(Some(0));
    }

    /// Calls all alarms that are due now, then says when the next one is.
    pub fn fire_due(&self) -> Option<Nanos> {
        while !self.stopped.load(Ordering::Acquire)
            && let Some(target) = self.take_due()
        {
            if let Some(target) = target.upgrade() {
                target.on_alarm();
            }
        }
        let mut queue = self.lock();
        let next = queue.alarms.iter().filter_map(|slot| slot.deadline).min();
        queue.armed = next;
        if !self.stopped.load(Ordering::Acquire) {
            self.arm(next);
        }
        next
    }

    fn take_due(&self) -> Option<Weak<dyn OnAlarm>> {
        let now = self.clock.now();
        let mut queue = self.lock();
        let slot = queue
            .alarms
            .iter_mut()
            .filter(|slot| slot.deadline.is_some_and(|deadline| deadline <= now))
            .min_by_key(|slot| slot.deadline)?;
        slot.deadline = None;
        Some(slot.target.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the timerfd; the caller holds the lock of the queue, so that the last setting is the right one.
    fn arm(&self, deadline: Option<Nanos>) {
        let in_nanos = match deadline {
            // Zero would disarm it.
            Some(at) => at.saturating_sub(self.clock.now()).max(1),
            None => 0,
        };
        let value = Itimerspec {
            it_interval: timespec(0),
            it_value: timespec(in_nanos),
        };
        // Fails only for bad arguments.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value);
    }
}

fn timespec(nanos: Nanos) -> Timespec {
    Timespec {
        tv_sec: (nanos / NANOS_PER_SECOND) as i64,
        tv_nsec: (nanos % NANOS_PER_SECOND) as _,
    }
}

/// One alarm of a machine's [`Timers`].
pub struct Alarm {
    timers: Arc<Timers>,
    index: usize,
}

impl Alarm {
    /// Sets or clears the deadline. A deadline that has passed is called at once (by the timer thread).
    pub fn set(&self, deadline: Option<Nanos>) {
        let mut queue = self.timers.lock();
        let slot = &mut queue.alarms[self.index];
        if slot.deadline == deadline {
            return;
        }
        slot.deadline = deadline;
        // A later or cleared deadline leaves the timerfd alone: the thread wakes once in vain at worst, where a system
        // call for each postponement would cost more.
        if let Some(at) = deadline
            && queue.armed.is_none_or(|armed| at < armed)
        {
            queue.armed = Some(at);
            self.timers.arm(Some(at));
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.set(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FakeClock, HostClock};
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    struct Log(&'static str, Mutex<Sender<&'static str>>);
    impl OnAlarm for Log {
        fn on_alarm(&self) {
            self.1.lock().unwrap().send(self.0).unwrap();
        }
    }

    fn weak(target: &Arc<Log>) -> Weak<dyn OnAlarm> {
        Arc::downgrade(target) as Weak<dyn OnAlarm>
    }

    #[test]
    fn alarms_fire_in_the_order_of_their_deadlines() {
        let clock = Arc::new(FakeClock::default());
        let timers = Timers::new(clock.clone()).unwrap();
        let (sender, heard) = channel();
        let [a, b] = ["a", "b"].map(|name| Arc::new(Log(name, Mutex::new(sender.clone()))));
        let (alarm_a, alarm_b) = (timers.alarm(weak(&a)), timers.alarm(weak(&b)));
        alarm_a.set(Some(20));
        alarm_b.set(Some(10));
        clock.advance(9);
        assert_eq!(timers.fire_due(), Some(10));
        clock.advance(11);
        assert_eq!(timers.fire_due(), None);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["b", "a"]);

        alarm_a.set(Some(30));
        drop(alarm_a);
        alarm_b.set(Some(40));
        assert_eq!(timers.fire_due(), Some(40));
    }

    #[test]
    fn lateness_is_told_before_the_alarm() {
        let clock = Arc::new(FakeClock::default());
        let timers = Timers::new(clock.clone()).unwrap();
        let (sender, heard) = channel();
        let target = Arc::new(Log("alarm", Mutex::new(sender.clone())));
        let alarm = timers.alarm(weak(&target));
        let sender = Mutex::new(sender);
        timers.when_late(move || sender.lock().unwrap().send("late").unwrap());
        let wake_after = |nanos| {
            alarm.set(Some(clock.now() + 10));
            clock.advance(10 + nanos);
            timers.tell_lateness();
            timers.fire_due();
            timers.tell_lateness();
            heard.try_iter().collect::<Vec<_>>()
        };
        assert_eq!(wake_after(LATE - 1), ["alarm"]);
        assert_eq!(wake_after(LATE), ["late", "alarm"]);
    }

    #[test]
    fn the_thread_wakes_for_an_alarm_set_while_it_sleeps() {
        let clock = Arc::new(HostClock::new());
        let timers = Timers::new(clock.clone()).unwrap();
        let (sender, heard) = channel();
        let target = Arc::new(Log("it", Mutex::new(sender)));
        let alarm = timers.alarm(weak(&target));
        let thread = std::thread::spawn({
            let timers = timers.clone();
            move || timers.run()
        });
        for delay in [0, 1_000_000, 20_000_000] {
            let due = clock.now() + delay;
            alarm.set(Some(due + 1_000_000_000));
            alarm.set(Some(due));
            heard.recv_timeout(Duration::from_secs(10)).unwrap();
            assert!(clock.now() >= due);
        }
        timers.stop();
        thread.join().unwrap();
    }
}
