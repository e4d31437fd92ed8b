//! A test for any chip: every register written with everything, at any time, breaks nothing.

use doppel_device::{Chip, Nanos};
use fastrand::Rng;

/// The same numbers in every run.
pub(crate) fn numbers() -> Rng {
    Rng::with_seed(1)
}

/// Values that break things more often than even ones do.
pub(crate) fn value(random: &mut Rng) -> u64 {
    let value = random.u64(..);
    match random.u8(..8) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << (value % 64),
        3 => value & 0xff,
        4 => value & 0xffff,
        _ => value,
    }
}

/// Reads and writes `registers` registers at random, moves time and does `also`; the chip must neither panic, nor answer
/// more than it was asked for, nor have a deadline in the past once it was brought to the present.
pub(crate) fn every_register_takes_everything<C: Chip>(
    chip: &mut C,
    registers: u64,
    mut also: impl FnMut(&mut C, u64),
) {
    let mut random = numbers();
    let mut now: Nanos = 0;
    for _ in 0..200_000 {
        let offset = random.u64(..registers);
        let size = (1 << random.u8(..4)).min(C::WIDTH);
        match random.u64(..8) {
            0..4 => {
                let value = value(&mut random) & doppel_device::all_ones(size);
                chip.write(offset, size, value, now);
            }
            4..6 => {
                let value = chip.read(offset, size, now);
                assert!(value <= doppel_device::all_ones(size), "{offset:#x} {size}");
            }
            6 => also(chip, random.u64(..)),
            _ => {
                now = now.saturating_add(value(&mut random) >> (20 + random.u64(..40)));
                chip.advance(now);
                let deadline = chip.next_deadline();
                assert!(deadline.is_none_or(|at| at > now), "{deadline:?} at {now}");
            }
        }
        chip.outputs();
    }
}

/// Collects what is asked of the machine.
#[derive(Default)]
pub(crate) struct Requests(std::sync::Mutex<Vec<doppel_device::PowerRequest>>);

impl Requests {
    pub(crate) fn take(&self) -> Vec<doppel_device::PowerRequest> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl doppel_device::PowerControl for Requests {
    fn request(&self, request: doppel_device::PowerRequest) {
        self.0.lock().unwrap().push(request);
    }
}
