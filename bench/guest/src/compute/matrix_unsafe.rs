//! The product of two matrices of doubles: one source, compiled for SSE2 and for AVX2 with FMA.

use crate::random::Random;
use crate::row::{fold, measured};
use anyhow::{Result, ensure};
use std::time::Duration;

const SIZE: usize = 192;
type Matrix = Vec<[f64; SIZE]>;

pub fn sse2(count: u64) -> Result<(u64, Duration)> {
    product(count, |a, b, c| multiply(a, b, c, |x, y, sum| x * y + sum))
}

pub fn avx2(count: u64) -> Result<(u64, Duration)> {
    let has = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    ensure!(has, "this processor has no AVX2");
    // SAFETY: the processor has both features that the function is compiled for.
    product(count, |a, b, c| unsafe { multiply_avx2(a, b, c) })
}

#[target_feature(enable = "avx2,fma")]
fn multiply_avx2(a: &Matrix, b: &Matrix, c: &mut Matrix) {
    multiply(a, b, c, |x, y, sum| x.mul_add(y, sum));
}

#[inline(always)]
fn multiply(
    a: &Matrix,
    b: &Matrix,
    c: &mut Matrix,
    multiply_add: impl Fn(f64, f64, f64) -> f64 + Copy,
) {
    for (row, sums) in a.iter().zip(c) {
        *sums = [0.0; SIZE];
        for (x, other) in row.iter().zip(b) {
            for (sum, y) in sums.iter_mut().zip(other) {
                *sum = multiply_add(*x, *y, *sum);
            }
        }
    }
}

fn product(
    count: u64,
    multiply: impl Fn(&Matrix, &Matrix, &mut Matrix),
) -> Result<(u64, Duration)> {
    let mut random = Random::new(4);
    let mut number = || random.below(1000) as f64 / 1000.0;
    let mut matrix = || -> Matrix {
        (0..SIZE)
            .map(|_| std::array::from_fn(|_| number()))
            .collect()
    };
    let input = (matrix(), matrix(), matrix());
    measured(input, |(a, b, c)| {
        for _ in 0..count {
            multiply(a, b, c);
            a[0][0] += c[1][1];
        }
        Ok(fold(c.iter().flatten().map(|x| x.to_bits())))
    })
}
