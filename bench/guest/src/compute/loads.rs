//! Loads that wait for loads: a linked list that fills 4 MiB, and a hash table.

use crate::random::Random;
use crate::row::measured;
use anyhow::Result;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::time::Duration;

const LINKS: usize = (4 << 20) / size_of::<u32>();

/// Follows one cycle through all links of a 4 MiB array (Sattolo's shuffle makes exactly one).
pub fn chase(count: u64) -> Result<(u64, Duration)> {
    let mut random = Random::new(2);
    let mut links: Vec<u32> = (0..LINKS as u32).collect();
    for n in (1..LINKS).rev() {
        links.swap(n, random.below(n as u64) as usize);
    }
    measured(links, |links| {
        let mut at = 0u32;
        for _ in 0..count {
            at = links[at as usize];
        }
        Ok(u64::from(at))
    })
}

/// Counts, looks up and removes in the standard library's hash table with its standard hash function.
pub fn hash(count: u64) -> Result<u64> {
    let mut random = Random::new(3);
    let mut table: HashMap<u64, u64, BuildHasherDefault<DefaultHasher>> = HashMap::default();
    for n in 0..count {
        *table.entry(random.below(count / 8)).or_insert(0) += n;
    }
    let mut sum = 0u64;
    for n in 0..count {
        let key = random.below(count / 4);
        sum = match n % 8 {
            0 => sum.wrapping_add(table.remove(&key).unwrap_or(1)),
            _ => sum.wrapping_add(table.get(&key).copied().unwrap_or(1)),
        };
    }
    Ok(sum ^ table.len() as u64)
}
