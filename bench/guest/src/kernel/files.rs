//! System calls on descriptors and files.

use super::system_unsafe;
use crate::row::{fold_bytes, measured};
use anyhow::{Result, ensure};
use std::fs::{self, File};
use std::hint::black_box;
use std::io::pipe;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

const FILE: &str = "/tmp/bench-file";
const BLOCK: usize = 512;
const DESCRIPTORS: usize = 100;

/// getppid(2): the least that a system call can be.
pub fn null(count: u64) -> Result<u64> {
    let parent = system_unsafe::parent();
    for _ in 0..count {
        ensure!(system_unsafe::parent() == parent, "another parent");
    }
    Ok(count)
}

pub fn pread(count: u64) -> Result<(u64, Duration)> {
    fs::write(FILE, [7; 16 * BLOCK])?;
    let done = measured(File::open(FILE)?, |file| {
        let mut block = [0; BLOCK];
        for n in 0..count {
            file.read_exact_at(black_box(&mut block), n % 16 * BLOCK as u64)?;
        }
        Ok(fold_bytes(&block))
    })?;
    fs::remove_file(FILE)?;
    Ok(done)
}

pub fn pwrite(count: u64) -> Result<(u64, Duration)> {
    let (sum, took) = measured(File::create(FILE)?, |file| {
        for n in 0..count {
            file.write_all_at(&[n as u8; BLOCK], n % 16 * BLOCK as u64)?;
        }
        Ok(0)
    })?;
    let sum = sum ^ fold_bytes(&fs::read(FILE)?);
    fs::remove_file(FILE)?;
    Ok((sum, took))
}

/// select(2) on the reading ends of pipes, of which the last one has something to read.
pub fn select(count: u64) -> Result<(u64, Duration)> {
    let mut pipes = Vec::new();
    for _ in 0..DESCRIPTORS {
        pipes.push(pipe()?);
    }
    std::io::Write::write_all(&mut pipes[DESCRIPTORS - 1].1, b"x")?;
    measured(pipes, |pipes| {
        let descriptors: Vec<i32> = pipes.iter().map(|(reader, _)| reader.as_raw_fd()).collect();
        let mut ready = 0;
        for _ in 0..count {
            ready += system_unsafe::select(&descriptors)?;
        }
        Ok(ready)
    })
}

pub fn create(count: u64) -> Result<u64> {
    for _ in 0..count {
        drop(File::create_new(FILE)?);
        fs::remove_file(FILE)?;
    }
    Ok(count)
}
