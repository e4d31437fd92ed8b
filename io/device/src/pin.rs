//! Interrupt wires.
//!
//! A [`Line`] runs from any number of sources to any number of inputs of interrupt controllers (ISA line 4 ends at the
//! 8259 *and* at the I/O APIC). Each source holds a [`Pin`]; the line is high while any pin is (wired or). The line
//! carries levels; what an edge means is for the controller's input to decide.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// An interrupt controller as a wire sees it.
pub trait InterruptInput: Send + Sync {
    /// Input `input` is now at `level`. Called on every change, in order.
    fn set_level(&self, input: u32, level: bool);
}

/// Where message-signalled interrupts (PCI MSI and MSI-X) go.
pub trait MsiTarget: Send + Sync {
    /// A device's write of `data` to an address in 0xfee0_0000..0xfef0_0000.
    fn send(&self, address: u64, data: u32);
    /// A device was told to send this `data` one day.
    fn set_up(&self, _data: u32) {}
}

/// A wire from pins to inputs of interrupt controllers.
pub struct Line {
    targets: Vec<(Arc<dyn InterruptInput>, u32)>,
    // Pins that are high. The lock orders changes, so that the targets see them as they happened.
    high: Mutex<u32>,
}

impl Line {
    /// A low line that ends at each `(controller, input)`.
    pub fn new(targets: Vec<(Arc<dyn InterruptInput>, u32)>) -> Arc<Self> {
        Arc::new(Line {
            targets,
            high: Mutex::new(0),
        })
    }

    /// One more source on the line, low.
    pub fn pin(self: &Arc<Self>) -> Pin {
        Pin(Arc::new(Source {
            line: self.clone(),
            level: AtomicBool::new(false),
        }))
    }

    fn change(&self, source: &AtomicBool, level: bool) {
        // Most calls change nothing, and only this source's own calls change its level.
        if source.load(Ordering::Relaxed) == level {
            return;
        }
        let mut high = self.high.lock().unwrap_or_else(PoisonError::into_inner);
        if source.swap(level, Ordering::Relaxed) == level {
            return;
        }
        let before = *high > 0;
        *high = if level { *high + 1 } else { *high - 1 };
        if before != (*high > 0) {
            for (target, input) in &self.targets {
                target.set_level(*input, *high > 0);
            }
        }
    }
}

struct Source {
    line: Arc<Line>,
    level: AtomicBool,
}

impl Drop for Source {
    fn drop(&mut self) {
        self.line.change(&self.level, false);
    }
}

/// An output pin soldered to a [`Line`]. Clones are the same pin.
#[derive(Clone)]
pub struct Pin(Arc<Source>);

impl Pin {
    /// A pin that leads nowhere.
    pub fn unconnected() -> Self {
        Line::new(Vec::new()).pin()
    }

    /// Drives the pin.
    pub fn set(&self, level: bool) {
        self.0.line.change(&self.0.level, level);
    }

    /// A rising edge: low, then high, then low again.
    pub fn pulse(&self) {
        self.set(false);
        self.set(true);
        self.set(false);
    }

    /// How the pin stands.
    pub fn level(&self) -> bool {
        self.0.level.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u32, bool)>>);
    impl InterruptInput for Recorder {
        fn set_level(&self, input: u32, level: bool) {
            self.0.lock().unwrap().push((input, level));
        }
    }

    #[test]
    fn a_line_reaches_all_its_inputs() {
        let [pic, apic] = [(); 2].map(|()| Arc::new(Recorder::default()));
        let pin = Line::new(vec![(pic.clone(), 0), (apic.clone(), 2)]).pin();
        pin.pulse();
        assert_eq!(*pic.0.lock().unwrap(), [(0, true), (0, false)]);
        assert_eq!(*apic.0.lock().unwrap(), [(2, true), (2, false)]);
    }

    #[test]
    fn a_shared_line_is_high_while_any_pin_is() {
        let input = Arc::new(Recorder::default());
        let line = Line::new(vec![(input.clone(), 9)]);
        let (a, b) = (line.pin(), line.pin());
        a.set(true);
        a.set(true);
        b.set(true);
        a.set(false);
        assert_eq!(*input.0.lock().unwrap(), [(9, true)]);
        drop(b);
        assert_eq!(*input.0.lock().unwrap(), [(9, true), (9, false)]);
    }
}
