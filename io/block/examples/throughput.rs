//! How fast an image is read and written by many threads at once: `throughput FILE[,format=…] [THREADS]`. FILE is overwritten.
//!
//! Phases of two seconds: sequential writes and reads of 1 MiB by one thread, random reads and writes of 4 KiB by all, and the random
//! reads again while one thread writes and flushes.

use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use doppel_block::{BlockBackend, DiskSpec};

const PHASE: Duration = Duration::from_secs(2);
const PIECE: u64 = 1 << 20;
const BLOCK: u64 = 4096;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let spec: DiskSpec = arguments.next().ok_or("name an image")?.parse()?;
    let threads = arguments.next().map_or(Ok(4), |n| n.parse())?;
    let disk = spec.open()?;
    sequential(&disk, "write 1 MiB", |disk, at, bytes| {
        disk.write_at(at, &[IoSlice::new(bytes)])
    })?;
    disk.flush()?;
    sequential(&disk, "read 1 MiB", |disk, at, bytes| {
        disk.read_at(at, &mut [IoSliceMut::new(bytes)])
    })?;
    let random = [
        ("read 4 KiB", false, false),
        ("write 4 KiB", true, false),
        ("read 4 KiB beside syncs", false, true),
    ];
    for (name, write, sync) in random {
        let count = random_phase(&disk, threads, write, sync);
        println!(
            "{name}, {threads} threads: {:.0}/s",
            count / PHASE.as_secs_f64()
        );
    }
    Ok(())
}

type Request = fn(&dyn BlockBackend, u64, &mut [u8]) -> std::io::Result<()>;

fn sequential(disk: &Arc<dyn BlockBackend>, name: &str, request: Request) -> std::io::Result<()> {
    let mut bytes = vec![0x5a; PIECE as usize];
    let start = Instant::now();
    let mut done = 0;
    // All of the disk once, so that every cluster is there, and more if there is time.
    while done < disk.len() / PIECE || start.elapsed() < PHASE {
        request(&**disk, done % (disk.len() / PIECE) * PIECE, &mut bytes)?;
        done += 1;
    }
    println!(
        "{name}: {:.0} MiB/s",
        done as f64 / start.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Random requests by all threads for the time of a phase; how many.
fn random_phase(disk: &Arc<dyn BlockBackend>, threads: u64, write: bool, sync: bool) -> f64 {
    let (over, count) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for seed in 0..threads {
            let (over, count) = (&over, &count);
            scope.spawn(move || {
                let mut bytes = vec![0; BLOCK as usize];
                let mut state = seed + 1;
                while !over.load(Ordering::Relaxed) {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let at = (state >> 20) % (disk.len() / BLOCK) * BLOCK;
                    let result = match write {
                        true => disk.write_at(at, &[IoSlice::new(&bytes)]),
                        false => disk.read_at(at, &mut [IoSliceMut::new(&mut bytes)]),
                    };
                    result.expect("a request failed");
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        if sync {
            let over = &over;
            scope.spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    disk.write_at(0, &[IoSlice::new(&[1; 4096])])
                        .expect("a write failed");
                    disk.flush().expect("a flush failed");
                }
            });
        }
        std::thread::sleep(PHASE);
        over.store(true, Ordering::Relaxed);
    });
    count.load(Ordering::Relaxed) as f64
}
