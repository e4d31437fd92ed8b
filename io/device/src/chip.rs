//! Chips, and the adapter that wires one into a machine.
//!
//! A chip is a pure state machine. It holds no lock, thread or clock: whoever calls it says what time it is and
//! looks afterwards how its output pins stand and when it next has something to do by itself. So a chip is tested by
//! calling it, and all concurrency is in [`Wired`].
//!
//! `Wired` sets the pins before it lets go of the chip's lock. If it set them after, two threads could apply their
//! changes in the wrong order and leave a line stuck. There is no deadlock, since a pin only ever leads *down*: to the
//! 8259 or the I/O APIC, from there to a local APIC, none of which calls a device.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{Alarm, Backed, BusDevice, Clock, InterruptInput, Nanos, OnAlarm, Pin, Timers};

/// How a chip's output pins stand; bit n is pin n.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outputs {
    /// The levels now.
    pub level: u32,
    /// Pins that rose at least once since the chip was last asked, whatever their level is now.
    pub rose: u32,
}

/// A chip: registers, time, output pins.
pub trait Chip: Send {
    /// The widest access in bytes that the chip decodes as one.
    const WIDTH: u8 = 1;

    /// A load from register `offset`.
    fn read(&mut self, offset: u64, size: u8, now: Nanos) -> u64;
    /// A store to register `offset`.
    fn write(&mut self, offset: u64, size: u8, value: u64, now: Nanos);
    /// Input pin `input` is now at `level`. Called on changes.
    fn set_input(&mut self, _input: u32, _level: bool, _now: Nanos) {}
    /// A host back-end of the chip has input or room for output.
    fn backend_ready(&mut self, _now: Nanos) {}
    /// How the pins stand after all calls so far.
    fn outputs(&mut self) -> Outputs {
        Outputs::default()
    }
    /// When the chip next changes by itself in a way that others notice (a pin), if it does.
    fn next_deadline(&self) -> Option<Nanos> {
        None
    }
    /// Brings the chip to `now`; called at its deadline or later.
    fn advance(&mut self, _now: Nanos) {}
}

/// A chip with its lock, its pins and its alarm.
pub struct Wired<C: Chip> {
    state: Mutex<State<C>>,
    pins: Vec<Pin>,
    clock: Arc<dyn Clock>,
    alarm: Alarm,
}

struct State<C> {
    chip: C,
    // What the alarm is set to, so that a chip that stays with its deadline leaves the queue alone.
    armed: Option<Nanos>,
}

impl<C: Chip + 'static> Wired<C> {
    /// Wires `chip`: its output n drives `pins[n]`.
    pub fn new(chip: C, pins: Vec<Pin>, timers: &Arc<Timers>) -> Arc<Self> {
        let wired = Arc::new_cyclic(|this: &std::sync::Weak<Self>| Wired {
            state: Mutex::new(State { chip, armed: None }),
            pins,
            clock: timers.clock().clone(),
            alarm: timers.alarm(this.clone()),
        });
        wired.with(|_, _| ());
        wired
    }

    /// Calls into the chip, then lets its pins and its alarm follow.
    pub fn with<R>(&self, f: impl FnOnce(&mut C, Nanos) -> R) -> R {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut state.chip, self.clock.now());
        let deadline = state.chip.next_deadline();
        if state.armed != deadline {
            state.armed = deadline;
            self.alarm.set(deadline);
        }
        self.drive(state.chip.outputs());
        result
    }

    fn drive(&self, outputs: Outputs) {
        for (n, pin) in self.pins.iter().enumerate().take(32) {
            if outputs.rose >> n & 1 != 0 {
                pin.set(false);
                pin.set(true);
            }
            pin.set(outputs.level >> n & 1 != 0);
        }
    }
}

impl<C: Chip + 'static> BusDevice for Wired<C> {
    fn width(&self) -> u8 {
        C::WIDTH
    }

    fn read(&self, offset: u64, size: u8) -> u64 {
        self.with(|chip, now| chip.read(offset, size, now))
    }

    fn write(&self, offset: u64, size: u8, value: u64) {
        self.with(|chip, now| chip.write(offset, size, value, now));
    }
}

impl<C: Chip + 'static> InterruptInput for Wired<C> {
    fn set_level(&self, input: u32, level: bool) {
        self.with(|chip, now| chip.set_input(input, level, now));
    }
}

impl<C: Chip + 'static> Backed for Wired<C> {
    fn backend_ready(&self) {
        self.with(|chip, now| chip.backend_ready(now));
    }
}

impl<C: Chip + 'static> OnAlarm for Wired<C> {
    fn on_alarm(&self) {
        self.with(|chip, now| chip.advance(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FakeClock, InterruptInput, Line};

    /// Counts down from what is written, then raises its pin until it is read.
    #[derive(Default)]
    struct EggTimer {
        due: Option<Nanos>,
        rings: bool,
    }
    impl Chip for EggTimer {
        fn read(&mut self, _: u64, _: u8, _: Nanos) -> u64 {
            std::mem::take(&mut self.rings).into()
        }
        fn write(&mut self, _: u64, _: u8, value: u64, now: Nanos) {
            self.due = Some(now + value);
        }
        fn outputs(&mut self) -> Outputs {
            let level = self.rings.into();
            Outputs { level, rose: 0 }
        }
        fn next_deadline(&self) -> Option<Nanos> {
            self.due
        }
        fn advance(&mut self, now: Nanos) {
            if self.due.is_some_and(|due| due <= now) {
                self.due = None;
                self.rings = true;
            }
        }
    }

    #[derive(Default)]
    struct Input(Mutex<Vec<bool>>);
    impl InterruptInput for Input {
        fn set_level(&self, _: u32, level: bool) {
            self.0.lock().unwrap().push(level);
        }
    }

    #[test]
    fn a_wired_chip_rings_at_its_deadline() {
        let clock = Arc::new(FakeClock::default());
        let timers = Timers::new(clock.clone()).unwrap();
        let input = Arc::new(Input::default());
        let pin = Line::new(vec![(input.clone(), 0)]).pin();
        let chip = Wired::new(EggTimer::default(), vec![pin], &timers);

        chip.write(0, 1, 100);
        assert_eq!(timers.fire_due(), Some(100));
        clock.advance(100);
        assert_eq!(timers.fire_due(), None);
        assert_eq!(*input.0.lock().unwrap(), [true]);
        assert_eq!(chip.read(0, 1), 1);
        assert_eq!(*input.0.lock().unwrap(), [true, false]);
    }

    struct Blinker;
    impl Chip for Blinker {
        fn read(&mut self, _: u64, _: u8, _: Nanos) -> u64 {
            0
        }
        fn write(&mut self, _: u64, _: u8, _: u64, _: Nanos) {}
        fn outputs(&mut self) -> Outputs {
            Outputs { level: 1, rose: 1 }
        }
    }

    #[test]
    fn an_edge_shows_on_a_pin_that_is_high_before_and_after() {
        let timers = Timers::new(Arc::new(FakeClock::default())).unwrap();
        let input = Arc::new(Input::default());
        let pin = Line::new(vec![(input.clone(), 0)]).pin();
        let chip = Wired::new(Blinker, vec![pin], &timers);
        chip.read(0, 1);
        assert_eq!(*input.0.lock().unwrap(), [true, false, true]);
    }
}
