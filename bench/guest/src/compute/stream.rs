//! Work that goes through memory from one end to the other: copies, scans, a digest, compression.

use crate::random;
use crate::row::{fold, fold_bytes, measured};
use anyhow::{Result, ensure};
use sha2::{Digest, Sha256};
use std::hint::black_box;
use std::time::Duration;

const BLOCK: usize = 64 << 10;
const TEXT: usize = 1 << 20;

pub fn memcpy(count: u64) -> Result<(u64, Duration)> {
    let input = (random::text(BLOCK), vec![0u8; BLOCK]);
    measured(input, |(from, to)| {
        for n in 0..count {
            from[n as usize % BLOCK] ^= 1;
            black_box(&mut *to).copy_from_slice(black_box(from));
        }
        Ok(fold_bytes(&to[..1024]))
    })
}

pub fn memset(count: u64) -> Result<(u64, Duration)> {
    measured(vec![0u8; BLOCK], |block| {
        for n in 0..count {
            black_box(&mut *block).fill(black_box(n as u8));
        }
        Ok(fold_bytes(&block[..1024]))
    })
}

/// Looks for a word that is not there, and counts lines, words and vowels of a text.
pub fn scan(count: u64) -> Result<(u64, Duration)> {
    let text = String::from_utf8(random::text(TEXT / 4))?;
    measured(text, |text| {
        let counts = (0..count).map(|_| {
            let text = black_box(&*text);
            let words = text.split_ascii_whitespace().count();
            let vowels = text.bytes().filter(|b| b"aeiou".contains(b)).count();
            let found = text.find("nowhere to be found").unwrap_or(text.len());
            (words ^ vowels << 20 ^ found << 40) as u64
        });
        Ok(fold(counts))
    })
}

/// SHA-256 in plain code: the processor's SHA instructions are not everywhere.
pub fn sha256(count: u64) -> Result<(u64, Duration)> {
    measured(random::text(TEXT), |text| {
        let mut digest = Sha256::new();
        (0..count).for_each(|_| digest.update(&*text));
        Ok(fold_bytes(&digest.finalize()))
    })
}

/// Deflates a text and inflates it again.
pub fn compress(count: u64) -> Result<(u64, Duration)> {
    measured(random::text(TEXT), |text| {
        let mut sum = 0;
        for _ in 0..count {
            let small = miniz_oxide::deflate::compress_to_vec(text, 6);
            let large = miniz_oxide::inflate::decompress_to_vec(&small)?;
            ensure!(large == *text, "inflating gives another text");
            sum = fold_bytes(&small);
        }
        Ok(sum)
    })
}
