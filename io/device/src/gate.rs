//! A wire that another one cuts.

use std::sync::{Arc, Mutex, PoisonError};

use crate::{InterruptInput, Pin};

/// Drives a pin as its input says, unless it is cut.
pub struct Gate {
    pin: Pin,
    state: Mutex<State>,
}

#[derive(Clone, Copy, Default)]
struct State {
    input: bool,
    cut: bool,
}

impl Gate {
    /// The input that is passed on.
    pub const INPUT: u32 = 0;
    /// The one that cuts it.
    pub const CUT: u32 = 1;

    /// Low, and not cut.
    pub fn new(pin: Pin) -> Arc<Self> {
        Arc::new(Gate {
            pin,
            state: Mutex::default(),
        })
    }
}

impl InterruptInput for Gate {
    fn set_level(&self, input: u32, level: bool) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match input {
            Gate::INPUT => state.input = level,
            _ => state.cut = level,
        }
        self.pin.set(state.input && !state.cut);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Line;

    #[test]
    fn a_cut_wire_is_low() {
        let gate = Gate::new(Line::new(vec![]).pin());
        let mut levels = Vec::new();
        for (input, level) in [
            (Gate::INPUT, true),
            (Gate::CUT, true),
            (Gate::INPUT, false),
            (Gate::INPUT, true),
            (Gate::CUT, false),
        ] {
            gate.set_level(input, level);
            levels.push(gate.pin.level());
        }
        assert_eq!(levels, [true, false, false, false, true]);
    }
}
