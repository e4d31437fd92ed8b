//! A row of the table: a name and a fixed amount of work.

use anyhow::Result;
use std::time::{Duration, Instant};

/// What is measured of a row.
pub enum Work {
    /// Time the whole function, which is given the count: nothing in it needs a preparation worth a mention.
    All(fn(u64) -> Result<u64>),
    /// The function prepares, measures and tells both.
    Own(fn(u64) -> Result<(u64, Duration)>),
}

pub struct Row {
    pub group: &'static str,
    pub name: &'static str,
    /// How often the work is done: chosen so that a pass takes tens of milliseconds natively.
    pub count: u64,
    pub work: Work,
    /// Whether a pass is repeated: a whole program runs once, cold as its user finds it.
    pub repeated: bool,
}

impl Row {
    pub fn is(&self, name: &str) -> bool {
        self.name == name || self.group == name
    }

    pub fn passes(&self, wanted: usize) -> usize {
        if self.repeated { wanted } else { 1 }
    }

    /// One pass of so much work: the checksum of its results, and how long it took.
    pub fn run(&self, count: u64) -> Result<(u64, Duration)> {
        match self.work {
            Work::All(work) => {
                let start = Instant::now();
                let checksum = work(count)?;
                Ok((checksum, start.elapsed()))
            }
            Work::Own(work) => work(count),
        }
    }
}

/// Measures `work`, for which `input` was prepared before the clock runs; it is dropped after that.
pub fn measured<T>(input: T, work: impl FnOnce(&mut T) -> Result<u64>) -> Result<(u64, Duration)> {
    let mut input = input;
    let start = Instant::now();
    let checksum = work(&mut input)?;
    Ok((checksum, start.elapsed()))
}

/// Folds a sequence of numbers into one that depends on each and on their order (FNV-1a, a word at a time).
pub fn fold(numbers: impl IntoIterator<Item = u64>) -> u64 {
    let step = |sum: u64, number: u64| (sum ^ number).wrapping_mul(0x0100_0000_01b3);
    numbers.into_iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// The same of bytes.
pub fn fold_bytes(bytes: &[u8]) -> u64 {
    fold(bytes.iter().map(|b| u64::from(*b)))
}
