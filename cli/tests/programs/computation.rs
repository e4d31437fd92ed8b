//! A computation of about a second that calls nobody: Collatz sequences.

use std::process::ExitCode;

fn steps(mut n: u64) -> u64 {
    let mut count = 0;
    while n != 1 {
        n = if n % 2 == 0 { n / 2 } else { 3 * n + 1 };
        count += 1;
    }
    count
}

fn main() -> ExitCode {
    let longest = (1..8_000_000).max_by_key(|n| steps(*n));
    ExitCode::from(u8::from(longest != Some(6_649_279)))
}
