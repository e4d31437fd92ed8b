//! A campaign of hostile drivers: `--rounds N`, `--seconds S`, `--seed N`.

use std::time::{Duration, Instant};

use doppel_virtio::hostile::{Campaign, run};

fn main() {
    let arguments: Vec<_> = std::env::args().collect();
    let value = |name: &str, default| {
        let at = arguments.iter().position(|a| a == name);
        let given = at.and_then(|at| arguments.get(at + 1)?.parse().ok());
        given.unwrap_or(default)
    };
    let campaign = Campaign {
        seed: value("--seed", 1),
        rounds: value("--rounds", u64::MAX),
        limit: Duration::from_secs(value("--seconds", 60)),
    };
    let start = Instant::now();
    let report = run(campaign);
    println!("{campaign:?}: {report:?} in {:?}", start.elapsed());
}
