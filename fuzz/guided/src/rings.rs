//! Drivers of virtio devices: every class, through PCI, with whatever descriptors, registers and resets an input says. Afterwards an honest driver must be
//! served, and what no descriptor named must be as it was (`io/virtio/src/hostile`).

use crate::{Door, Take};

pub const DOOR: Door = Door {
    name: "rings",
    longest: 2 << 10,
    words: &[
        b"\x00\x00\x00\x00\x00\x00\x00\x01",
        b"\xff\xff\xff\xff",
        b"\x0d\x0d\x0d\x0d",
    ],
    seeds,
    open,
};

fn open() -> anyhow::Result<Take> {
    Ok(Box::new(doppel_virtio::hostile::run_bytes))
}

/// Each class of devices, driven by bytes without a pattern.
fn seeds() -> Vec<Vec<u8>> {
    let bytes = |class: u8| {
        let step = |n: u32| (n.wrapping_mul(2_654_435_761) >> 13) as u8;
        let rest = (0..400).map(move |n| step(n + 1000 * u32::from(class)));
        [class].into_iter().chain(rest).collect()
    };
    (0..16).map(bytes).collect()
}
