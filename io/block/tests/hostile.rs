//! Images that a stranger made: headers and tables with random damage are refused, or give errors or any bytes, and nothing
//! crashes, hangs or grows without bound.
//!
//! `DOPPEL_DISK_FUZZ` says how many images (`cargo xtask disks` sets it).

mod support;

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::path::Path;
use std::time::{Duration, Instant};

use doppel_block::{BlockBackend, Format, create};
use fastrand::Rng;
use support::{Scratch, has_qemu_img, open_path, qemu_img, resident_kib, write};

const DISK: u64 = 1 << 20;

/// An image with data, zeros, compressed clusters where there is `qemu-img`, and few clusters in all.
fn images(scratch: &Scratch) -> Vec<Vec<u8>> {
    let path = scratch.path("seed.qcow2");
    create(&path, Format::Qcow2, DISK).unwrap();
    let disk = open_path(&path, "").unwrap();
    write(&*disk, 0, &[7; 200_000 / 512 * 512]);
    disk.write_zeroes(300_000 / 512 * 512, 131_072, true)
        .unwrap();
    drop(disk);
    let mut images = vec![fs::read(&path).unwrap()];
    if has_qemu_img() {
        for options in [
            "-c",
            "-o cluster_size=512",
            "-o compat=0.10",
            "-c -o cluster_size=4k",
        ] {
            let to = scratch.path("variant.qcow2");
            qemu_img(&format!("convert -O qcow2 {options}"), &[&path, &to]);
            images.push(fs::read(to).unwrap());
        }
    }
    images
}

/// Bytes and numbers that a table has none of.
fn damage(image: &mut Vec<u8>, random: &mut Rng) {
    for _ in 0..1 + random.u64(..6) {
        let area = [104, 512, 65536, image.len() as u64][random.usize(..4)];
        let at = random.u64(..area.min(image.len() as u64 - 8)) as usize;
        let aligned = at / 8 * 8;
        let value = match random.u64(..6) {
            0 => 0,
            1 => u64::MAX,
            2 => random.u64(..),
            3 => 1 << random.u64(..64),
            4 => random.u64(..64) << 9,
            _ => (random.u64(..image.len() as u64) / 512 * 512) | (random.u64(..4) << 62),
        };
        match random.u64(..3) {
            0 => image[at] ^= 1 << random.u64(..8),
            1 => image[aligned..aligned + 8].copy_from_slice(&value.to_be_bytes()),
            _ => image[aligned..aligned + 4].copy_from_slice(&(value as u32).to_be_bytes()),
        }
    }
    if random.u64(..8) == 0 {
        image.truncate(random.usize(..image.len()));
    }
}

fn use_it(disk: &dyn BlockBackend, random: &mut Rng) {
    for _ in 0..24 {
        let len = disk.len();
        let sectors = len / 512;
        let count = 1 + random.u64(..300).min(sectors.saturating_sub(1));
        let offset = random.u64(..sectors.saturating_sub(count).max(1)) * 512;
        let mut bytes = vec![0x5a; (count * 512) as usize];
        // Whatever comes of these is right.
        let _ = match random.u64(..6) {
            0 | 1 => disk.read_at(offset, &mut [IoSliceMut::new(&mut bytes)]),
            2 | 3 => disk.write_at(offset, &[IoSlice::new(&bytes)]),
            4 => disk.flush(),
            _ => match random.u64(..2) {
                0 => disk.discard(offset, count * 512),
                _ => disk.write_zeroes(offset, count * 512, random.bool()),
            },
        };
    }
}

fn one(path: &Path, seed: &[u8], random: &mut Rng) -> bool {
    let mut image = seed.to_vec();
    damage(&mut image, random);
    fs::write(path, &image).unwrap();
    let options = [",format=qcow2", ",format=qcow2,ro"][random.usize(..2)];
    let Ok(disk) = open_path(path, options) else {
        return false;
    };
    use_it(&*disk, random);
    true
}

#[test]
fn damaged_images_neither_crash_nor_hang_nor_grow() {
    let count = std::env::var("DOPPEL_DISK_FUZZ").map_or(600, |n| n.parse().unwrap());
    let first: u64 = std::env::var("DOPPEL_DISK_SEED").map_or(0, |n| n.parse().unwrap());
    let scratch = Scratch::new();
    let seeds = images(&scratch);
    let path = scratch.path("damaged.qcow2");
    let before = resident_kib();
    let (mut opened, mut slowest) = (0, Duration::ZERO);
    for number in 0..count {
        let mut random = Rng::with_seed(first << 32 | number);
        let seed = &seeds[random.usize(..seeds.len())];
        let start = Instant::now();
        opened += u64::from(one(&path, seed, &mut random));
        slowest = slowest.max(start.elapsed());
    }
    let grown = (resident_kib() - before) >> 10;
    eprintln!(
        "{count} images, {opened} opened, the slowest took {slowest:?}, memory grew by {grown} MiB"
    );
    assert!(opened > count / 10, "{opened}");
    assert!(slowest < Duration::from_secs(20), "{slowest:?}");
    assert!(grown < 512, "{grown} MiB");
}
