//! Sorting through a comparator that is called by pointer, as C's qsort and most libraries' sorts are.

use crate::random::Random;
use crate::row::{fold, measured};
use anyhow::Result;
use std::cmp::Ordering;
use std::hint::black_box;
use std::time::Duration;

#[derive(Clone, Copy)]
struct Record {
    key: u32,
    value: u32,
}

type Comparator = fn(&Record, &Record) -> Ordering;

pub fn sort(count: u64) -> Result<(u64, Duration)> {
    let mut random = Random::new(1);
    let record = |value| Record {
        key: random.below(count / 2) as u32,
        value: value as u32,
    };
    let records: Vec<Record> = (0..count).map(record).collect();
    measured(records, |records| {
        let compare: Comparator = black_box(by_key_then_value);
        records.sort_by(compare);
        Ok(fold(
            records
                .iter()
                .map(|r| u64::from(r.key) << 32 | u64::from(r.value)),
        ))
    })
}

fn by_key_then_value(a: &Record, b: &Record) -> Ordering {
    a.key.cmp(&b.key).then(b.value.cmp(&a.value))
}
