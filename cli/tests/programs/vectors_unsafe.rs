//! SSE, AVX2 and AVX-512 in the guest against plain arithmetic, with processes that keep different values in the vector
//! registers switched under each other.

use std::arch::x86_64::*;
use std::process::Command;

const LANES: usize = 1 << 12;

fn main() {
    match std::env::args().nth(1) {
        Some(seed) => child(seed.parse().unwrap()),
        None => parent(),
    }
}

fn parent() {
    let names = [
        ("avx2", is_x86_feature_detected!("avx2")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
    ];
    for (name, has) in names {
        println!("vectors: {name} {has}");
    }
    let start = |seed: u32| Command::new("/proc/self/exe").arg(seed.to_string()).spawn();
    let children: Vec<_> = (1..=4).map(|seed| start(seed).unwrap()).collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    println!("vectors: passed");
}

fn child(seed: u32) {
    let a: Vec<f32> = (0..LANES).map(|n| (n as u32 * seed % 1013) as f32).collect();
    let b: Vec<f32> = (0..LANES).map(|n| (n as u32 % 97 + seed) as f32).collect();
    let expected: f32 = lanes_sum(&a, &b);
    for _ in 0..200 {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features are there.
            assert_eq!(unsafe { avx2(&a, &b) }, expected, "avx2");
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature is there.
            assert_eq!(unsafe { avx512(&a, &b) }, expected, "avx512f");
        }
    }
}

/// The sum of products, every term and sum a small integer, so that the order does not matter.
fn lanes_sum(a: &[f32], b: &[f32]) -> f32 {
    let products = a.iter().zip(b).map(|(a, b)| (*a as u64) * (*b as u64) % 64);
    products.sum::<u64>() as f32
}

#[target_feature(enable = "avx2,fma")]
fn avx2(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = _mm256_setzero_ps();
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        // SAFETY: both chunks have eight lanes.
        let (a, b) = unsafe { (_mm256_loadu_ps(a.as_ptr()), _mm256_loadu_ps(b.as_ptr())) };
        let product = _mm256_mullo_epi32(_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
        let low = _mm256_and_si256(product, _mm256_set1_epi32(63));
        sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), _mm256_set1_ps(1.0), sum);
    }
    let mut lanes = [0.0; 8];
    // SAFETY: there is room for eight lanes.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
    lanes.iter().sum()
}

#[target_feature(enable = "avx512f")]
fn avx512(a: &[f32], b: &[f32]) -> f32 {
    let mut sum = _mm512_setzero_ps();
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        // SAFETY: both chunks have sixteen lanes.
        let (a, b) = unsafe { (_mm512_loadu_ps(a.as_ptr()), _mm512_loadu_ps(b.as_ptr())) };
        let product = _mm512_mullo_epi32(_mm512_cvtps_epi32(a), _mm512_cvtps_epi32(b));
        let odd = _mm512_test_epi32_mask(product, _mm512_set1_epi32(1));
        let low = _mm512_and_epi32(product, _mm512_set1_epi32(63));
        let low = _mm512_mask_mov_epi32(_mm512_maskz_mov_epi32(odd, low), !odd, low);
        sum = _mm512_add_ps(sum, _mm512_cvtepi32_ps(low));
    }
    _mm512_reduce_add_ps(sum)
}
