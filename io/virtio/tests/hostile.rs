//! A short campaign of hostile drivers; `cargo run --release -p doppel-virtio --example hostile` runs longer ones.

use std::time::Duration;

use doppel_virtio::hostile::{Campaign, run};

#[test]
fn hostile_drivers_neither_crash_nor_hang_a_device_nor_reach_beyond_their_buffers() {
    let report = run(Campaign {
        seed: 1,
        rounds: 150,
        limit: Duration::from_secs(60),
    });
    assert!(report.rounds > 0 && report.chains > report.rounds);
    assert!(report.broken * 4 > report.rounds, "{report:?}: too tame");
}
