//! The timer of a local APIC: one-shot, periodic and TSC deadline.
//!
//! Source: Intel SDM volume 3, 11.5.4.

use doppel_device::{NANOS_PER_SECOND, Nanos, periods, ticks};

/// A guest may ask for a period of a nanosecond; it gets interrupts no more often than this.
const SHORTEST_PERIOD: Nanos = 20_000;

/// Bits 18:17 of the LVT timer entry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum TimerMode {
    #[default]
    OneShot,
    Periodic,
    TscDeadline,
}

impl TimerMode {
    /// The reserved mode 3 counts as one-shot.
    pub fn from_lvt(entry: u32) -> Self {
        match entry >> 17 & 3 {
            1 => TimerMode::Periodic,
            2 => TimerMode::TscDeadline,
            _ => TimerMode::OneShot,
        }
    }
}

/// The timer's state.
#[derive(Clone, Debug)]
pub(crate) struct ApicTimer {
    bus_hz: u64,
    tsc_hz: u64,
    mode: TimerMode,
    divide: u32,
    initial: u32,
    tsc_deadline: u64,
    due: Option<Nanos>,
    quiet_until: Nanos,
}

impl ApicTimer {
    pub fn new(bus_hz: u64, tsc_hz: u64) -> Self {
        ApicTimer {
            bus_hz,
            tsc_hz,
            mode: TimerMode::OneShot,
            divide: 0,
            initial: 0,
            tsc_deadline: 0,
            due: None,
            quiet_until: 0,
        }
    }

    pub fn reset(&mut self) {
        *self = ApicTimer::new(self.bus_hz, self.tsc_hz);
    }

    /// Going to or from TSC deadline mode disarms the timer.
    pub fn set_mode(&mut self, mode: TimerMode) {
        let deadline = TimerMode::TscDeadline;
        if mode != self.mode && (mode == deadline || self.mode == deadline) {
            self.due = None;
            self.tsc_deadline = 0;
            self.initial = 0;
        }
        self.mode = mode;
    }

    pub fn divide_configuration(&self) -> u32 {
        self.divide
    }

    /// The count goes on at the new rate.
    pub fn set_divide_configuration(&mut self, value: u32, now: Nanos) {
        let remaining = self.current_count(now);
        self.divide = value & 0xb;
        if self.mode != TimerMode::TscDeadline && self.due.is_some() {
            self.due = Some(now.saturating_add(self.duration(remaining)));
        }
    }

    fn divisor(&self) -> u64 {
        let code = self.divide & 3 | self.divide >> 1 & 4;
        1 << ((code + 1) & 7)
    }

    fn duration(&self, count: u32) -> Nanos {
        periods(u64::from(count) * self.divisor(), self.bus_hz)
    }

    pub fn initial_count(&self) -> u32 {
        self.initial
    }

    pub fn set_initial_count(&mut self, count: u32, now: Nanos) {
        if self.mode == TimerMode::TscDeadline {
            return;
        }
        self.initial = count;
        self.due = (count > 0).then(|| now.saturating_add(self.duration(count)));
    }

    pub fn current_count(&self, now: Nanos) -> u32 {
        let Some(due) = self.due.filter(|_| self.mode != TimerMode::TscDeadline) else {
            return 0;
        };
        let left = ticks(due.saturating_sub(now), self.bus_hz).div_ceil(self.divisor());
        left.min(self.initial.into()) as u32
    }

    pub fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// A write to IA32_TSC_DEADLINE when the guest's TSC was `tsc_now`.
    pub fn set_tsc_deadline(&mut self, deadline: u64, tsc_now: u64, now: Nanos) {
        if self.mode != TimerMode::TscDeadline {
            return;
        }
        self.tsc_deadline = deadline;
        let wait = periods(deadline.saturating_sub(tsc_now), self.tsc_hz);
        self.due = (deadline != 0).then(|| now.saturating_add(wait));
    }

    /// The guest has set its TSC, which is `tsc_now`: it reaches the deadline at another time (Intel SDM volume 3, 11.5.4.1).
    pub fn follow_tsc(&mut self, tsc_now: u64, now: Nanos) {
        if self.tsc_deadline != 0 {
            self.set_tsc_deadline(self.tsc_deadline, tsc_now, now);
        }
    }

    /// When to look again.
    pub fn next_deadline(&self) -> Option<Nanos> {
        match self.mode {
            TimerMode::Periodic => self.due.map(|due| due.max(self.quiet_until)),
            _ => self.due,
        }
    }

    /// True where the timer went off at least once up to `now`.
    pub fn advance(&mut self, now: Nanos) -> bool {
        let Some(due) = self.due.filter(|due| *due <= now) else {
            return false;
        };
        self.due = None;
        self.tsc_deadline = 0;
        if self.mode == TimerMode::Periodic && self.initial > 0 {
            let period = self.duration(self.initial).max(1);
            let late = (now - due) % period;
            self.due = Some(now.saturating_add(period - late));
            self.quiet_until = now.saturating_add(SHORTEST_PERIOD.min(NANOS_PER_SECOND));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bus of 1 GHz, undivided: counts are nanoseconds.
    fn timer(mode: TimerMode) -> ApicTimer {
        let mut timer = ApicTimer::new(1_000_000_000, 2_000_000_000);
        timer.set_divide_configuration(0xb, 0);
        timer.set_mode(mode);
        timer
    }

    #[test]
    fn one_shot_goes_off_once() {
        let mut timer = timer(TimerMode::OneShot);
        timer.set_initial_count(1000, 5);
        assert_eq!(timer.next_deadline(), Some(1005));
        assert_eq!(timer.current_count(505), 500);
        assert!(!timer.advance(1004));
        assert!(timer.advance(1005));
        assert!(!timer.advance(9999));
        assert_eq!(
            (timer.current_count(9999), timer.next_deadline()),
            (0, None)
        );
    }

    #[test]
    fn periodic_keeps_its_beat_when_it_is_served_late() {
        let mut timer = timer(TimerMode::Periodic);
        timer.set_initial_count(1_000_000, 0);
        assert!(timer.advance(2_300_000));
        assert_eq!(timer.next_deadline(), Some(3_000_000));
        assert_eq!(timer.current_count(2_300_000), 700_000);
    }

    #[test]
    fn a_period_too_short_is_served_less_often() {
        let mut timer = timer(TimerMode::Periodic);
        timer.set_initial_count(1, 0);
        assert!(timer.advance(10));
        assert_eq!(timer.next_deadline(), Some(10 + SHORTEST_PERIOD));
    }

    #[test]
    fn a_deadline_is_on_the_guests_clock() {
        let mut timer = timer(TimerMode::TscDeadline);
        timer.set_tsc_deadline(5000, 3000, 100);
        assert_eq!(timer.next_deadline(), Some(1100));
        assert_eq!(timer.tsc_deadline(), 5000);
        assert!(timer.advance(1100));
        assert_eq!((timer.tsc_deadline(), timer.next_deadline()), (0, None));
        timer.set_tsc_deadline(1, 3000, 2000);
        assert!(timer.advance(2000), "in the past is at once");
        timer.set_tsc_deadline(9000, 3000, 2000);
        timer.set_tsc_deadline(0, 3000, 2000);
        assert_eq!(timer.next_deadline(), None);
    }

    #[test]
    fn a_deadline_follows_the_guests_clock() {
        let mut timer = timer(TimerMode::TscDeadline);
        timer.follow_tsc(7000, 100);
        assert_eq!(timer.next_deadline(), None, "nothing is armed");
        timer.set_tsc_deadline(5000, 3000, 100);
        timer.follow_tsc(1000, 200);
        assert_eq!(timer.next_deadline(), Some(2200));
        timer.follow_tsc(4990, 300);
        assert_eq!(timer.next_deadline(), Some(305));
        timer.follow_tsc(u64::MAX, 301);
        assert!(timer.advance(301), "it is past");
        timer.follow_tsc(0, 400);
        assert_eq!(timer.next_deadline(), None, "it went off");
    }

    #[test]
    fn a_change_to_or_from_deadline_mode_disarms() {
        let mut timer = timer(TimerMode::TscDeadline);
        timer.set_initial_count(10, 0);
        assert_eq!(timer.initial_count(), 0);
        timer.set_tsc_deadline(5000, 3000, 100);
        timer.set_mode(TimerMode::OneShot);
        assert_eq!((timer.next_deadline(), timer.tsc_deadline()), (None, 0));
        timer.set_tsc_deadline(5000, 3000, 100);
        assert_eq!(timer.next_deadline(), None);
    }

    #[test]
    fn the_divider_slows_the_count() {
        let mut timer = timer(TimerMode::OneShot);
        for (code, divisor) in [
            (0, 2),
            (1, 4),
            (2, 8),
            (3, 16),
            (8, 32),
            (9, 64),
            (10, 128),
            (11, 1),
        ] {
            timer.set_divide_configuration(code, 0);
            timer.set_initial_count(1000, 0);
            assert_eq!(timer.next_deadline(), Some(1000 * divisor));
        }
        timer.set_initial_count(1000, 0);
        timer.set_divide_configuration(0, 400);
        assert_eq!(timer.next_deadline(), Some(400 + 600 * 2));
    }
}
