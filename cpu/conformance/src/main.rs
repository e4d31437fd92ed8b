//! Random bytes as guests, for as long as one likes: `doppel-conformance SECONDS [SEED]`.

use std::time::{Duration, Instant};

use doppel_conformance::{ENGINES, hostile};

fn main() {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<u64>());
    let (Some(Ok(seconds)), Ok(first)) = (
        arguments.next(),
        arguments.next().transpose().map(|s| s.unwrap_or(1)),
    ) else {
        eprintln!("usage: doppel-conformance SECONDS [SEED]");
        std::process::exit(1);
    };
    let (began, mut seed) = (Instant::now(), first);
    let mut sum = hostile::Outcome::default();
    while began.elapsed() < Duration::from_secs(seconds) {
        for row in ENGINES {
            // Printed first: the seed that crashes the monitor is the last one shown.
            println!("seed {seed} on {}", row.name);
            sum += hostile::run(row, seed, Duration::from_millis(50));
        }
        seed += 1;
    }
    println!("seeds {first} to {}: {sum:?}", seed - 1);
}
