//! SIGKILL at any moment: what was flushed is there, and the image is sound.
//!
//! The test starts itself as a process that writes and flushes, and tells after each flush how far it is. `DOPPEL_CRASH_ROUNDS` says
//! how often it is killed (`cargo xtask disks` sets it).

mod support;

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use doppel_block::{BlockBackend, Format, create};
use fastrand::Rng;
use support::{Scratch, check, has_qemu_img, open_path, read};

const DISK: u64 = 64 << 20;
const BLOCK: u64 = 4096;
const ME: &str = "DOPPEL_CRASH_DISK";

/// Write number `n` of the run `seed`: where, and whether it is a discard. Of a run's writes no two touch a block.
fn place(seed: u64, n: u64) -> u64 {
    // A walk over all blocks in an order of its own: the step is odd, their number a power of two.
    let blocks = DISK / BLOCK;
    let step = Rng::with_seed(seed).u64(..) | 1;
    (n.wrapping_mul(step) % blocks) * BLOCK
}

fn content(seed: u64, n: u64) -> Vec<u8> {
    let mut content = vec![0; BLOCK as usize];
    Rng::with_seed(seed ^ (n << 20)).fill(&mut content);
    content
}

/// The process that is killed.
fn write_until_killed(disk: &dyn BlockBackend, seed: u64) {
    let mut random = Rng::with_seed(!seed);
    let mut out = std::io::stdout();
    for n in 0..DISK / BLOCK / 2 {
        let bytes = content(seed, n);
        disk.write_at(place(seed, n), &[IoSlice::new(&bytes)])
            .unwrap();
        // A discard of what this run does not write keeps the allocator busy.
        if random.u64(..16) == 0 {
            let far = place(seed, n + DISK / BLOCK / 2);
            disk.discard(far / 65536 * 65536, 0).unwrap();
            disk.write_zeroes(far, BLOCK, true).unwrap();
        }
        if random.u64(..4) == 0 {
            disk.flush().unwrap();
            writeln!(out, "flushed {n}").unwrap();
            out.flush().unwrap();
        }
    }
}

#[test]
fn what_was_flushed_survives_a_kill_and_the_image_is_sound() {
    if let Ok(text) = std::env::var(ME) {
        let (seed, options) = text.split_once(' ').unwrap();
        let disk = support::open(options).unwrap();
        return write_until_killed(&*disk, seed.parse().unwrap());
    }
    let rounds = std::env::var("DOPPEL_CRASH_ROUNDS").map_or(3, |n| n.parse().unwrap());
    let scratch = Scratch::new();
    let base = scratch.file("base", &vec![3; DISK as usize]);
    let plain = scratch.path("disk.qcow2");
    let over = scratch.path("over.qcow2");
    create(&plain, Format::Qcow2, DISK).unwrap();
    let mut flushed = 0;
    for round in 0..rounds {
        let overlay = format!(",overlay={}", over.display());
        for (path, options, image) in [(&plain, "", &plain), (&base, &*overlay, &over)] {
            flushed += kill_one(path, options, round);
            if has_qemu_img() {
                let state = check(image);
                assert!(
                    state == 0 || state == 3,
                    "round {round}: check says {state}"
                );
            }
        }
    }
    eprintln!("{flushed} writes were flushed before {} kills", 2 * rounds);
    assert!(flushed > 10 * rounds, "{flushed}");
}

/// Starts a writer, kills it after some time, and looks for what it said was flushed. How many writes that was.
fn kill_one(path: &Path, options: &str, round: u64) -> u64 {
    let seed = 1000 + round;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "what_was_flushed_survives_a_kill_and_the_image_is_sound",
        ])
        .arg("--nocapture")
        .env(ME, format!("{seed} {}{options}", path.display()))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let killer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(150 + Rng::with_seed(seed).u64(..300)));
        child.kill().unwrap();
        child.wait().unwrap();
    });
    let mut last = None;
    for line in lines.map_while(Result::ok) {
        // The harness writes to the same pipe, and the last line may be cut off.
        if let Some(n) = line
            .rsplit_once("flushed ")
            .and_then(|(_, n)| n.parse().ok())
        {
            last = Some(n);
        }
    }
    killer.join().unwrap();
    let disk = open_path(path, options).unwrap();
    let count: u64 = last.map_or(0, |n: u64| n + 1);
    for n in 0..count {
        let found = read(&*disk, place(seed, n), BLOCK as usize);
        assert!(
            found == content(seed, n),
            "round {round}: write {n} of {count} is lost"
        );
    }
    count
}

/// The file as it is when the process is killed, before anything was flushed and after: each new table of 512 MiB is named by one that is
/// written at another time.
#[test]
fn tables_that_are_new_are_named_when_they_are_counted() {
    const PLACES: [u64; 3] = [0, 600 << 20, 3 << 30];
    let scratch = Scratch::new();
    let path = scratch.path("wide.qcow2");
    create(&path, Format::Qcow2, 4 << 30).unwrap();
    let disk = open_path(&path, "").unwrap();
    let killed = |name: &str| {
        let copy = scratch.path(name);
        std::fs::copy(&path, &copy).unwrap();
        if has_qemu_img() {
            let state = check(&copy);
            assert!(state == 0 || state == 3, "{name}: check says {state}");
        }
        copy
    };
    for (n, at) in PLACES.into_iter().enumerate() {
        let bytes = content(1, n as u64);
        disk.write_at(at, &[IoSlice::new(&bytes)]).unwrap();
        let copy = open_path(&killed(&format!("unflushed-{n}")), "").unwrap();
        // What is free there is free.
        copy.write_at(1 << 30, &[IoSlice::new(&bytes)]).unwrap();
        copy.flush().unwrap();
        for (m, at) in PLACES[..n].iter().enumerate() {
            assert!(read(&*copy, *at, BLOCK as usize) == content(1, m as u64));
        }
        disk.flush().unwrap();
        let copy = open_path(&killed(&format!("flushed-{n}")), "").unwrap();
        assert!(read(&*copy, at, BLOCK as usize) == bytes);
    }
    let bytes = content(1, 99);
    disk.write_at(2 << 30, &[IoSlice::new(&bytes)]).unwrap();
    drop(disk);
    let disk = open_path(&path, "").unwrap();
    assert!(read(&*disk, 2 << 30, BLOCK as usize) == bytes, "let go of");
}
