//! Whether the host let a vCPU's thread run since it last took an interrupt.
//!
//! Problem: an interrupt may wait for a vCPU already when the host stops the process, so that the timer thread is not late (see `clock_pages`). Idea: of the time
//! between two interrupts a thread that was let run has used some; one that was stopped, none. Time in a halt does not count. Cost: a look
//! at the clock for each interrupt, and at the thread's processor time, a system call, ten times in a second.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// So long without the processor is a stop.
const STOP: Duration = Duration::from_millis(500);
/// Between two looks at the processor time.
const PERIOD: Duration = Duration::from_millis(100);

/// Of one thread, which alone asks.
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    seen: Instant,
    looked: Instant,
    used: Duration,
}

impl Attention {
    /// From now on.
    pub fn new() -> Self {
        let now = Instant::now();
        Attention {
            seen: now,
            looked: now,
            used: used(),
        }
    }

    /// The thread slept, as it wanted to.
    pub fn slept(&mut self) {
        self.seen = Instant::now();
    }

    /// True where the thread was not let run for long since it was here last.
    pub fn was_stopped(&mut self) -> bool {
        let now = Instant::now();
        let gap = now.duration_since(self.seen);
        self.seen = now;
        if gap < STOP && now.duration_since(self.looked) < PERIOD {
            return false;
        }
        let before = std::mem::replace(&mut self.used, used());
        self.looked = now;
        is_stop(gap, self.used.saturating_sub(before))
    }
}

/// Whether a thread that had so much of the processor in a time, and perhaps a little more before it, was stopped.
fn is_stop(gap: Duration, used: Duration) -> bool {
    gap.saturating_sub(used) + PERIOD >= STOP
}

/// What the calling thread has had of the processor.
fn used() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
    Duration::new(seconds, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_works_or_sleeps_as_it_wants_is_not_stopped() {
        let mut attention = Attention::new();
        assert!(!attention.was_stopped());
        std::thread::sleep(STOP);
        attention.slept();
        assert!(!attention.was_stopped());
        // For the thread it is the same whether it sleeps in a system call or is stopped.
        std::thread::sleep(STOP);
        assert!(attention.was_stopped());
        assert!(!attention.was_stopped());
    }

    #[test]
    fn time_on_the_processor_is_no_stop() {
        let ms = Duration::from_millis;
        assert!(is_stop(ms(5000), ms(20)) && is_stop(ms(500), ms(99)));
        assert!(!is_stop(ms(5000), ms(4900)) && !is_stop(ms(100), ms(0)));
    }
}
