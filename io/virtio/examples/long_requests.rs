//! What a block request of 1 MiB in 256 pieces costs the thread that notifies: `-- [FILE]`, a raw image that is read and written; without
//! one only the device's own share is measured, with a back-end that moves no bytes.

use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppel_block::{BlockBackend, DiskSpec};
use doppel_memory::GuestSlice;
use doppel_virtio::Blk;
use doppel_virtio::testing::{DriverQueue, Piece, Rig};

const RINGS: u64 = 0x1_0000;
const TABLE: u64 = 0x4_0000;
const HEADER: u64 = 0x20_0000;
const STATUS: u64 = 0x20_1000;
const DATA: u64 = 0x40_0000;
const PIECES: u64 = 256;
const PIECE: u32 = 4096;
const REQUESTS: usize = 4000;
const DISK: u64 = 256 << 20;
const F_FLUSH: u64 = 1 << 9;

/// Moves nothing.
struct Nothing;

impl BlockBackend for Nothing {
    fn len(&self) -> u64 {
        DISK
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, _: u64, _: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        Ok(())
    }
    fn write_at(&self, _: u64, _: &[IoSlice<'_>]) -> io::Result<()> {
        Ok(())
    }
    fn try_read_to_guest(&self, _: u64, _: &[GuestSlice<'_>]) -> Option<io::Result<()>> {
        Some(Ok(()))
    }
    fn try_write_from_guest(&self, _: u64, _: &[GuestSlice<'_>]) -> Option<io::Result<()>> {
        Some(Ok(()))
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
}

/// From the notification to the used buffer, a request after another.
fn times(rig: &Rig, queue: &mut DriverQueue, code: u32, disk: u64) -> Vec<Duration> {
    let piece = |n| match code {
        0 => Piece::In(DATA + 2 * n * u64::from(PIECE), PIECE),
        _ => Piece::Out(DATA + 2 * n * u64::from(PIECE), PIECE),
    };
    let mut pieces = vec![Piece::Out(HEADER, 16)];
    pieces.extend((0..PIECES).map(piece));
    pieces.push(Piece::In(STATUS, 1));
    rig.ram.write_from_device(HEADER, &code.to_le_bytes());
    let one = |n: usize| {
        let sector = n as u64 * (1 << 20) % disk / 512;
        rig.ram.write_from_device(HEADER + 8, &sector.to_le_bytes());
        queue.submit_indirect(&rig.ram, TABLE, &pieces);
        let start = Instant::now();
        rig.complete(queue);
        assert_eq!(rig.ram.load::<u8>(STATUS), Some(0));
        start.elapsed()
    };
    (0..REQUESTS).map(one).collect()
}

fn measure(name: &str, backend: Arc<dyn BlockBackend>) {
    let disk = backend.len() >> 20 << 20;
    let rig = Rig::new(Box::new(Blk::new(backend, "", 1)));
    let queue = &mut rig.start(F_FLUSH, RINGS)[0];
    for (what, code) in [("read", 0), ("write", 1)] {
        let mut times = times(&rig, queue, code, disk);
        times.sort();
        let (least, median) = (times[REQUESTS / 10], times[REQUESTS / 2]);
        println!("{name}, {what}: {least:?} in the best tenth, {median:?} in the median");
    }
}

fn main() {
    measure("nothing", Arc::new(Nothing));
    if let Some(file) = std::env::args().nth(1) {
        let spec: DiskSpec = file.parse().expect("FILE[,format=raw]");
        measure(&file, spec.open().expect("an image"));
    }
}
