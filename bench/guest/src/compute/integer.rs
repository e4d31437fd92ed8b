//! Integer arithmetic: a mixing function in a loop, and calls.

use anyhow::Result;
use std::hint::black_box;

/// SplitMix64's finalizer (Steele, Lea, Flood 2014), each input the output before.
pub fn mix(count: u64) -> Result<u64> {
    let mut z = black_box(1u64);
    for n in 0..count {
        z = z.wrapping_add(n).wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
    }
    Ok(z)
}

/// Two calls a call, as the definition of the Fibonacci numbers has them; what is done with the results keeps a compiler
/// from making a loop of either.
pub fn recursion(count: u64) -> Result<u64> {
    Ok(recurse(black_box(count)))
}

#[inline(never)]
fn recurse(n: u64) -> u64 {
    if n < 2 {
        return n;
    }
    let first = recurse(black_box(n - 1));
    let second = recurse(black_box(n - 2));
    first.wrapping_mul(3).wrapping_add(second >> 1 ^ n)
}
