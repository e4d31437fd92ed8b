//! Random bytes as guest code: nothing crashes or hangs. A longer run is `cargo run --release -p doppel-conformance -- SECONDS`.

use std::time::Duration;

use doppel_conformance::{ENGINES, hostile};

#[test]
fn random_bytes() {
    let mut sum = hostile::Outcome::default();
    for seed in 0..12 {
        for row in ENGINES {
            println!("seed {seed} on {}", row.name);
            sum += hostile::run(row, seed, Duration::from_millis(20));
        }
    }
    assert_eq!(sum.guests, 12 * ENGINES.len() as u64);
}
