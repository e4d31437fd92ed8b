//! The work that `cargo xtask bench` measures: the same static program on the host, in QEMU and in Doppel.
//!
//! `doppel-bench-guest [--passes N] [NAME...]` does the rows of those names, or of the groups of those names, or all.
//! What it prints, a line each, is for the host's side to read:
//!
//! ```text
//! clock SECONDS                    the smallest step of CLOCK_MONOTONIC that was seen
//! begin
//! cpu SECONDS                      processor time used so far, by this process and its children
//! row NAME CHECKSUM SECONDS...     one time a pass
//! end SECONDS                      since "begin"
//! ```
//!
//! A row does a fixed amount of work, the same everywhere, and the checksum is of its results.

mod compute;
mod kernel;
mod random;
mod row;
mod whole;

use anyhow::{Context, Result, bail, ensure};
use row::Row;
use std::time::{Duration, Instant};

/// As this program's first argument: end at once. What fork+exec of a static program runs.
const NOTHING: &str = "nothing";
/// A row that has taken so long is not repeated: in a slow machine the benchmark shall end all the same.
const ENOUGH: Duration = Duration::from_secs(3);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some(NOTHING) => Ok(()),
        Some("list") => {
            all().for_each(|row| println!("{} {}", row.group, row.name));
            Ok(())
        }
        _ => measure(&arguments),
    }
}

fn all() -> impl Iterator<Item = &'static Row> {
    [compute::ROWS, kernel::ROWS, whole::ROWS]
        .into_iter()
        .flatten()
}

fn measure(arguments: &[String]) -> Result<()> {
    let (passes, names) = match arguments {
        [flag, passes, names @ ..] if flag == "--passes" => (passes.parse()?, names),
        names => (3, names),
    };
    kernel::system_unsafe::pin_to_one_cpu()?;
    let rows = chosen(names)?;
    println!("clock {}", clock_step().as_secs_f64());
    println!("begin");
    println!("cpu {}", kernel::system_unsafe::cpu_time()?.as_secs_f64());
    let start = Instant::now();
    for row in rows {
        report(row, passes)?;
    }
    println!("end {}", start.elapsed().as_secs_f64());
    Ok(())
}

fn chosen(names: &[String]) -> Result<Vec<&'static Row>> {
    for name in names {
        ensure!(all().any(|row| row.is(name)), "no row or group {name}");
    }
    Ok(all()
        .filter(|row| names.is_empty() || names.iter().any(|name| row.is(name)))
        .collect())
}

fn report(row: &Row, passes: usize) -> Result<()> {
    let mut times = Vec::new();
    let mut checksum = None;
    let start = Instant::now();
    while times.len() < row.passes(passes) && (times.is_empty() || start.elapsed() < ENOUGH) {
        let (sum, took) = row
            .run(row.count)
            .with_context(|| format!("row {}", row.name))?;
        if checksum.is_some_and(|before| before != sum) {
            bail!("row {}: two passes, two results", row.name);
        }
        checksum = Some(sum);
        times.push(format!("{:.9}", took.as_secs_f64()));
    }
    let checksum = checksum.context("no pass")?;
    println!("cpu {}", kernel::system_unsafe::cpu_time()?.as_secs_f64());
    println!("row {} {checksum:016x} {}", row.name, times.join(" "));
    Ok(())
}

fn clock_step() -> Duration {
    let step = |_| {
        let start = Instant::now();
        loop {
            let passed = start.elapsed();
            if !passed.is_zero() {
                return passed;
            }
        }
    };
    (0..1000).map(step).min().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_are_no_group() {
        for row in all() {
            let named = all().filter(|other| other.is(row.name));
            assert_eq!(named.count(), 1, "{}", row.name);
        }
    }

    /// A little of everything that needs none of the guest's files: whether it works, and gives the same again.
    #[test]
    fn a_row_gives_the_same_result_again() {
        let rows = compute::ROWS.iter().chain(kernel::ROWS);
        for row in rows.filter(|row| !row.name.starts_with("exec-")) {
            let sums = [1, 2].map(|_| row.run(16).unwrap().0);
            assert_eq!(sums[0], sums[1], "{}", row.name);
        }
    }

    #[test]
    fn a_row_that_does_more_gives_another_result() {
        for row in compute::ROWS.iter().filter(|row| row.name != "compress") {
            let sums = [16, 17].map(|count| row.run(count).unwrap().0);
            assert_ne!(sums[0], sums[1], "{}", row.name);
        }
    }
}
