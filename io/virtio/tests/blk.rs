//! The block device: requests as a driver makes them, against a raw file and against a host that fails or is slow.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use doppel_block::{BlockBackend, DiskSpec};
use doppel_device::PciFunction;
use doppel_virtio::testing::{DriverQueue, PATIENCE, Piece, Rig};
use doppel_virtio::{Blk, EVENT_IDX, NEEDS_RESET};
use tempfile::NamedTempFile;

const RINGS: u64 = 0x1_0000;
const HEADER: u64 = 0x20_0000;
const STATUS: u64 = 0x20_1000;
const DATA: u64 = 0x30_0000;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;

fn raw(content: &[u8], read_only: bool) -> (NamedTempFile, Arc<dyn BlockBackend>) {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(content).unwrap();
    let mut spec: DiskSpec = format!("{},format=raw", file.path().display())
        .parse()
        .unwrap();
    spec.read_only = read_only;
    let backend = spec.open().unwrap();
    (file, backend)
}

fn rig(backend: Arc<dyn BlockBackend>) -> Rig {
    Rig::new(Box::new(Blk::new(backend, "a-serial-number", 1)))
}

/// One request with its data in `pieces`; status and number of bytes written.
fn request(
    rig: &Rig,
    queue: &mut DriverQueue,
    code: u32,
    sector: u64,
    pieces: &[Piece],
) -> (u8, u32) {
    rig.ram.write_from_device(HEADER, &code.to_le_bytes());
    rig.ram.write_from_device(HEADER + 8, &sector.to_le_bytes());
    rig.ram.write_from_device(STATUS, &[0xee]);
    let mut all = vec![Piece::Out(HEADER, 16)];
    all.extend(pieces);
    all.push(Piece::In(STATUS, 1));
    queue.submit(&rig.ram, &all);
    let (_, written) = rig.complete(queue);
    (rig.ram.load(STATUS).unwrap(), written)
}

fn bytes(rig: &Rig, at: u64, len: u64) -> Vec<u8> {
    (at..at + len).map(|a| rig.ram.load(a).unwrap()).collect()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 23) as u8)
        .collect()
}

#[test]
fn reads_and_writes_reach_the_file() {
    let content = pattern(1 << 20);
    let (file, backend) = raw(&content, false);
    let rig = rig(backend);
    let queue = &mut rig.start(EVENT_IDX | F_FLUSH, RINGS)[0];
    let pieces = [Piece::In(DATA + 3, 1000), Piece::In(DATA + 0x5000, 24)];
    assert_eq!(request(&rig, queue, IN, 7, &pieces), (0, 1025));
    assert_eq!(bytes(&rig, DATA + 3, 1000), content[3584..4584]);
    assert_eq!(bytes(&rig, DATA + 0x5000, 24), content[4584..4608]);

    let new = pattern(4096 * 3);
    rig.ram.write_from_device(DATA + 0x777, &new);
    let pieces = [Piece::Out(DATA + 0x777, 4096 * 3)];
    assert_eq!(request(&rig, queue, OUT, 100, &pieces), (0, 1));
    assert_eq!(request(&rig, queue, FLUSH, 0, &[]), (0, 1));
    let written = fs::read(file.path()).unwrap();
    assert_eq!(written[51_200..51_200 + 4096 * 3], new);
    assert_eq!(written[..51_200], content[..51_200]);
}

#[test]
fn the_serial_number_is_told() {
    let rig = rig(raw(&[0; 512], false).1);
    let queue = &mut rig.start(0, RINGS)[0];
    let answer = request(&rig, queue, GET_ID, 0, &[Piece::In(DATA, 20)]);
    assert_eq!(answer, (0, 21));
    assert_eq!(bytes(&rig, DATA, 20), b"a-serial-number\0\0\0\0\0");
}

#[test]
fn the_configuration_tells_size_and_limits() {
    let rig = rig(raw(&vec![0; 5 << 20], false).1);
    assert_eq!(rig.read(0x2000, 4), (5 << 20) / 512);
    assert_eq!(rig.read(0x2000 + 34, 2), 1);
    assert_eq!(rig.read(0x2000 + 60, 4), 0, "beyond the end");
    assert_eq!(rig.read(0x2fff, 1), 0);
    assert_eq!(rig.offered() & (F_RO | F_DISCARD), F_DISCARD);
}

#[test]
fn a_range_is_discarded_or_made_zeros() {
    let content = pattern(1 << 20);
    let (file, backend) = raw(&content, false);
    let rig = rig(backend);
    let queue = &mut rig.start(F_DISCARD | 1 << 14, RINGS)[0];
    let ranges = [(16u64, 8u32, 0u32), (1024, 64, 0)];
    let put = |ranges: &[(u64, u32, u32)]| {
        for (n, (sector, count, flags)) in ranges.iter().enumerate() {
            let at = DATA + 16 * n as u64;
            rig.ram.write_from_device(at, &sector.to_le_bytes());
            rig.ram.write_from_device(at + 8, &count.to_le_bytes());
            rig.ram.write_from_device(at + 12, &flags.to_le_bytes());
        }
        [Piece::Out(DATA, 16 * ranges.len() as u32)]
    };
    for code in [DISCARD, WRITE_ZEROES] {
        let pieces = put(&ranges);
        assert_eq!(request(&rig, queue, code, 0, &pieces), (0, 1));
    }
    let now = fs::read(file.path()).unwrap();
    assert!(now[8192..12_288].iter().all(|b| *b == 0));
    assert!(now[524_288..557_056].iter().all(|b| *b == 0));
    assert_eq!(now[12_288..524_288], content[12_288..524_288]);
    assert_eq!(now.len(), 1 << 20);

    let pieces = put(&[(0, 1, 1)]);
    assert_eq!(request(&rig, queue, DISCARD, 0, &pieces).0, 2, "unmap");
    for bad in [(2047, 2, 0), (u64::MAX, 1, 0), (0, u32::MAX, 0)] {
        let pieces = put(&[bad]);
        assert_eq!(
            request(&rig, queue, WRITE_ZEROES, 0, &pieces).0,
            1,
            "{bad:?}"
        );
    }
    let pieces = [Piece::Out(DATA, 15)];
    assert_eq!(request(&rig, queue, DISCARD, 0, &pieces).0, 1);
    let pieces = [Piece::Out(DATA, 16 * 33)];
    assert_eq!(request(&rig, queue, DISCARD, 0, &pieces).0, 1);
}

#[test]
fn what_cannot_be_is_an_error_of_the_request() {
    let rig = rig(raw(&[0; 4096], false).1);
    let queue = &mut rig.start(0, RINGS)[0];
    for (code, sector, len, status) in [
        (IN, 8, 512, 1),
        (IN, 7, 1024, 1),
        (IN, u64::MAX, 512, 1),
        (IN, u64::MAX / 512, 512, 1),
        (IN, 0, 100, 1),
        (99, 0, 512, 2),
        (3, 0, 512, 2),
    ] {
        let answer = request(&rig, queue, code, sector, &[Piece::In(DATA, len)]);
        assert_eq!(answer.0, status, "{code} {sector}");
        let answer = request(&rig, queue, code.max(1), sector, &[Piece::Out(DATA, len)]);
        assert_eq!(answer.0, status, "{code} {sector} written");
    }
    assert_eq!(request(&rig, queue, IN, 0, &[Piece::In(DATA, 512)]).0, 0);
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let (file, backend) = raw(&[7; 4096], true);
    let rig = rig(backend);
    assert_eq!(rig.offered() & (F_RO | F_DISCARD), F_RO);
    let queue = &mut rig.start(F_RO, RINGS)[0];
    for code in [OUT, DISCARD, WRITE_ZEROES] {
        let pieces = [Piece::Out(DATA, 512)];
        assert_eq!(request(&rig, queue, code, 0, &pieces).0, 1, "{code}");
    }
    assert_eq!(request(&rig, queue, FLUSH, 0, &[]).0, 0);
    assert_eq!(fs::read(file.path()).unwrap(), [7; 4096]);
}

#[test]
fn a_request_without_header_or_status_breaks_the_queue() {
    for pieces in [
        &[Piece::In(STATUS, 1)][..],
        &[Piece::Out(HEADER, 16)],
        &[Piece::Out(HEADER, 15), Piece::In(STATUS, 1)],
        &[Piece::Out(HEADER, 16), Piece::In(STATUS, 0)],
    ] {
        let rig = rig(raw(&[0; 512], false).1);
        let queue = &mut rig.start(0, RINGS)[0];
        rig.use_msix(1);
        queue.submit(&rig.ram, pieces);
        rig.notify(queue);
        assert_eq!(rig.messages.wait(), [(0xfee0_0000, 0x40)], "{pieces:?}");
        assert_eq!(rig.status() & NEEDS_RESET, NEEDS_RESET);
    }
}

/// A disk of 1 MiB whose host takes its time, or fails.
struct Odd {
    delay: Duration,
    fails: Option<i32>,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
    flushes: AtomicUsize,
}

impl Odd {
    fn new(delay: Duration, fails: Option<i32>) -> Arc<Self> {
        Arc::new(Odd {
            delay,
            fails,
            at_once: AtomicUsize::new(0),
            most_at_once: AtomicUsize::new(0),
            flushes: AtomicUsize::new(0),
        })
    }

    fn answer(&self) -> io::Result<()> {
        let now = self.at_once.fetch_add(1, Ordering::SeqCst) + 1;
        self.most_at_once.fetch_max(now, Ordering::SeqCst);
        std::thread::sleep(self.delay);
        self.at_once.fetch_sub(1, Ordering::SeqCst);
        self.fails
            .map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(code)))
    }
}

impl BlockBackend for Odd {
    fn len(&self) -> u64 {
        1 << 20
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        into.iter_mut().for_each(|s| s.fill((offset / 512) as u8));
        self.answer()
    }
    fn write_at(&self, _: u64, _: &[IoSlice<'_>]) -> io::Result<()> {
        self.answer()
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        self.answer()
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        self.answer()
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        self.answer()
    }
}

#[test]
fn an_error_of_the_host_is_an_io_error_and_no_more() {
    const EIO: i32 = 5;
    const ENOSPC: i32 = 28;
    for code in [EIO, ENOSPC] {
        let rig = rig(Odd::new(Duration::ZERO, Some(code)));
        let queue = &mut rig.start(F_FLUSH, RINGS)[0];
        for _ in 0..3 {
            let read = request(&rig, queue, IN, 0, &[Piece::In(DATA, 512)]);
            let write = request(&rig, queue, OUT, 0, &[Piece::Out(DATA, 512)]);
            let flush = request(&rig, queue, FLUSH, 0, &[]);
            assert_eq!((read.0, write.0, flush.0), (1, 1, 1));
        }
        assert_eq!(rig.status() & NEEDS_RESET, 0);
    }
}

/// Submits reads of sectors 0, 1, 2 ...; each has header, status and data of its own.
fn submit_reads(rig: &Rig, queue: &mut DriverQueue, count: u64) {
    for n in 0..count {
        let (header, status) = (HEADER + 16 * n, STATUS + n);
        rig.ram.write_from_device(header, &[0; 8]);
        rig.ram.write_from_device(header + 8, &n.to_le_bytes());
        rig.ram.write_from_device(status, &[0xee]);
        let data = Piece::In(DATA + 512 * n, 512);
        queue.submit(
            &rig.ram,
            &[Piece::Out(header, 16), data, Piece::In(status, 1)],
        );
    }
    rig.notify(queue);
}

#[test]
fn a_deep_queue_is_deep_on_the_host_too() {
    let odd = Odd::new(Duration::from_millis(50), None);
    let rig = rig(odd.clone());
    let queue = &mut rig.start(EVENT_IDX, RINGS)[0];
    let start = Instant::now();
    submit_reads(&rig, queue, 32);
    for _ in 0..32 {
        queue.wait(&rig.ram).expect("an answer");
    }
    assert!(start.elapsed() < Duration::from_millis(32 * 50 / 3));
    assert!(odd.most_at_once.load(Ordering::SeqCst) >= 8);
    for n in 0..32 {
        assert_eq!(rig.ram.load::<u8>(STATUS + n), Some(0));
        assert_eq!(bytes(&rig, DATA + 512 * n, 512), vec![n as u8; 512]);
    }
}

#[test]
fn a_reset_waits_for_the_requests_under_way_and_nothing_comes_after_it() {
    let odd = Odd::new(Duration::from_millis(30), None);
    let rig = rig(odd.clone());
    for round in 0..3 {
        let queue = &mut rig.start(0, RINGS)[0];
        submit_reads(&rig, queue, 20);
        std::thread::sleep(Duration::from_millis(10 * round));
        rig.set_status(0);
        assert_eq!(odd.at_once.load(Ordering::SeqCst), 0);
        let used: u16 = rig.ram.load(queue.used() + 2).unwrap();
        for at in (RINGS..RINGS + 0x8000).step_by(8) {
            rig.ram.store(at, 0u64).unwrap();
        }
        std::thread::sleep(Duration::from_millis(40));
        assert!(used <= 20);
        assert_eq!(rig.ram.load::<u16>(queue.used() + 2), Some(0));
    }
}

#[test]
fn a_cache_that_is_off_or_cannot_be_flushed_is_written_through() {
    let odd = Odd::new(Duration::ZERO, None);
    let rig = rig(odd.clone());
    let flushes = || odd.flushes.load(Ordering::SeqCst);
    let write = [Piece::Out(DATA, 512)];
    let queue = &mut rig.start(F_FLUSH | 1 << 11, RINGS)[0];
    assert_eq!(rig.read(0x2020, 1), 1);
    request(&rig, queue, OUT, 0, &write);
    assert_eq!(flushes(), 0);
    rig.write(0x2020, 1, 0);
    assert_eq!(rig.read(0x2020, 1), 0);
    request(&rig, queue, OUT, 0, &write);
    assert_eq!(flushes(), 1);
    let queue = &mut rig.start(0, RINGS)[0];
    request(&rig, queue, OUT, 0, &write);
    assert_eq!(flushes(), 2);
}

#[test]
fn several_queues_are_served_at_once() {
    let odd = Odd::new(Duration::from_millis(20), None);
    let rig = Rig::new(Box::new(Blk::new(odd, "", 3)));
    assert_eq!(rig.read(0x2022, 2), 3);
    let mut queues = rig.start(0, RINGS);
    rig.use_msix(3);
    for queue in &mut queues {
        submit_reads(&rig, queue, 4);
    }
    for queue in &mut queues {
        for _ in 0..4 {
            queue.wait(&rig.ram).expect("an answer");
        }
    }
    rig.set_status(0);
    let seen: BTreeSet<_> = rig.messages.take().into_iter().map(|m| m.1).collect();
    assert_eq!(seen, [0x41, 0x42, 0x43].into());
}

#[test]
fn whoever_serves_a_request_it_comes_to_the_same() {
    let run = |at_once: bool| {
        let (file, backend) = raw(&pattern(1 << 20), false);
        let blk = Blk::new(backend, "", 1).at_once(at_once);
        let counters = blk.counters();
        let rig = Rig::new(Box::new(blk));
        let queue = &mut rig.start(EVENT_IDX | F_FLUSH, RINGS)[0];
        for n in 0..200u64 {
            let (sector, len) = (n * 7919 % 1500, 512 * (n as u32 % 40 + 1));
            let (code, piece) = match n % 3 {
                0 => (OUT, Piece::Out(DATA + 64 * n, len)),
                _ => (IN, Piece::In(DATA + 512 * n, len)),
            };
            assert_eq!(request(&rig, queue, code, sector, &[piece]).0, 0);
        }
        assert_eq!(request(&rig, queue, FLUSH, 0, &[]).0, 0);
        let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
        assert_eq!(count(&counters.at_once) > 0, at_once);
        let others = count(&counters.by_queue) + count(&counters.by_pool);
        assert_eq!(count(&counters.at_once) + others, 201);
        (fs::read(file.path()).unwrap(), bytes(&rig, DATA, 512 * 240))
    };
    assert!(run(true) == run(false));
}

/// Whoever serves them, the bytes are the same; a driver that waits for each long request has its vCPU serve most of them.
#[test]
fn long_requests_of_a_driver_that_waits_are_served_at_once_but_for_trials() {
    const LEN: u32 = 256 << 10;
    let ends = [true, false].map(|at_once| {
        let content = pattern(4 << 20);
        let (file, backend) = raw(&content, false);
        let disk = Blk::new(backend, "", 1).at_once(at_once);
        let counters = disk.counters();
        let rig = Rig::new(Box::new(disk));
        let queue = &mut rig.start(EVENT_IDX | F_FLUSH, RINGS)[0];
        for n in 0..32 {
            let sector = |chunk: u32| u64::from(chunk * (LEN / 512));
            let (from, to) = (sector(n % 8), sector(15 - n % 7));
            let pieces = [Piece::In(DATA + 5, LEN)];
            let answer = request(&rig, queue, IN, from, &pieces);
            assert_eq!(answer, (0, LEN + 1));
            let pieces = [Piece::Out(DATA + 5, LEN)];
            assert_eq!(request(&rig, queue, OUT, to, &pieces), (0, 1));
        }
        let count = |of: &std::sync::atomic::AtomicU64| of.load(Ordering::Relaxed);
        let (by_vcpu, by_thread) = (count(&counters.at_once), count(&counters.by_queue));
        assert_eq!(by_vcpu + by_thread + count(&counters.by_pool), 64);
        match at_once {
            true => assert!(by_vcpu > 32, "{counters:?}"),
            false => assert_eq!(by_vcpu, 0),
        }
        fs::read(file.path()).unwrap()
    });
    assert!(ends[0] == ends[1]);
    assert!(ends[0] != pattern(4 << 20));
}

/// A disk of 4 GiB whose host takes its time, and notes what it is to make zeros.
#[derive(Default)]
struct Slow {
    delays: Vec<Duration>,
    calls: AtomicUsize,
    zeros: Mutex<Vec<(u64, u64)>>,
}

impl Slow {
    /// Its calls take so many milliseconds, in turn.
    fn new(delays: &[u64]) -> Arc<Self> {
        Arc::new(Slow {
            delays: delays.iter().copied().map(Duration::from_millis).collect(),
            ..Slow::default()
        })
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    fn answer(&self) -> io::Result<()> {
        let n = self.calls.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(self.delays[n % self.delays.len()]);
        Ok(())
    }
}

impl BlockBackend for Slow {
    fn len(&self) -> u64 {
        4 << 30
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        into.iter_mut().for_each(|s| s.fill((offset / 512) as u8));
        self.answer()
    }
    fn write_at(&self, _: u64, _: &[IoSlice<'_>]) -> io::Result<()> {
        self.answer()
    }
    fn flush(&self) -> io::Result<()> {
        self.answer()
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        self.answer()
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.zeros.lock().unwrap().push((offset, len));
        self.answer()
    }
}

/// A rig around it, and how many requests its pool was given.
fn slow_rig(slow: &Arc<Slow>) -> (Rig, impl Fn() -> u64) {
    let blk = Blk::new(slow.clone(), "", 1);
    let counters = blk.counters();
    let by_pool = move || counters.by_pool.load(Ordering::Relaxed);
    (Rig::new(Box::new(blk)), by_pool)
}

fn wait_until(what: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < end);
        std::thread::yield_now();
    }
}

#[test]
fn a_driver_that_offers_a_chain_again_before_it_has_it_back_is_stopped() {
    let slow = Slow::new(&[200]);
    let (rig, by_pool) = slow_rig(&slow);
    let queue = &mut rig.start(EVENT_IDX, RINGS)[0];
    let size = u64::from(queue.size);
    let broken = || rig.status() & NEEDS_RESET != 0;
    submit_reads(&rig, queue, 1);
    for n in 1..=4 * size {
        wait_until(|| by_pool() >= n || broken());
        let used: u16 = rig.ram.load(queue.used() + 2).unwrap();
        assert!(by_pool() - u64::from(used) <= size);
        if broken() {
            break;
        }
        queue.offer(&rig.ram, 0);
        rig.notify(queue);
    }
    assert!(broken());
    rig.set_status(0);
    let queue = &mut rig.start(EVENT_IDX, RINGS)[0];
    let answer = request(&rig, queue, IN, 0, &[Piece::In(DATA, 512)]);
    assert_eq!(answer, (0, 513));
}

#[test]
fn a_reset_drops_what_was_not_begun() {
    const REQUESTS: u64 = 160;
    let slow = Slow::new(&[300]);
    let (rig, by_pool) = slow_rig(&slow);
    let queue = &mut rig.start(EVENT_IDX, RINGS)[0];
    submit_reads(&rig, queue, REQUESTS);
    wait_until(|| by_pool() == REQUESTS);
    rig.set_status(0);
    let calls = slow.calls();
    assert!(calls < REQUESTS as usize / 2, "{calls}");
    assert_eq!(rig.ram.load(queue.used() + 2), Some(calls as u16));
    let taken = (0..REQUESTS as u16).map(|n| rig.ram.load(queue.avail() + 4 + 2 * u64::from(n)));
    let offered = (0..REQUESTS as u16).map(|n| Some(3 * n));
    assert!(taken.eq(offered), "nothing is written to the driver's ring");
}

/// Each request is answered once, however often the device stands still, in whatever order they end.
#[test]
fn what_was_not_begun_when_the_device_stands_still_is_done_later() {
    const REQUESTS: usize = 160;
    let slow = Slow::new(&[1, 9, 1, 1, 3]);
    let (rig, by_pool) = slow_rig(&slow);
    let queue = &mut rig.start(EVENT_IDX, RINGS)[0];
    submit_reads(&rig, queue, REQUESTS as u64);
    let mut under_way: BTreeSet<u32> = (0..REQUESTS as u32).map(|n| 3 * n).collect();
    let mut stood_still = 0;
    // The ring is written three times over.
    for n in 0..1600 {
        let (head, _) = queue.wait(&rig.ram).expect("an answer");
        assert!(under_way.remove(&head), "{head}");
        let request = u64::from(head / 3);
        assert_eq!(rig.ram.load::<u8>(STATUS + request), Some(0));
        assert_eq!(rig.ram.load(DATA + 512 * request), Some(request as u8));
        if n < 1600 - REQUESTS {
            rig.ram.write_from_device(STATUS + request, &[0xee]);
            queue.offer(&rig.ram, head as u16);
            rig.notify(queue);
            under_way.insert(head);
        }
        match n % 100 {
            30 => drop(rig.pci.save()),
            60 => {
                rig.pci.config_write(4, 2, 0x0002);
                let (used, calls) = (rig.ram.load::<u16>(queue.used() + 2), slow.calls());
                std::thread::sleep(Duration::from_millis(10));
                assert_eq!(rig.ram.load(queue.used() + 2), used);
                assert_eq!(slow.calls(), calls);
                stood_still += usize::from(n < 1400);
                rig.pci.config_write(4, 2, 0x0006);
            }
            _ => {}
        }
    }
    assert!(under_way.is_empty() && queue.take(&rig.ram).is_none());
    let again = by_pool() - 1600;
    assert!(
        again > stood_still as u64,
        "{again} were left and done later"
    );
    assert_eq!(rig.status() & NEEDS_RESET, 0);
}

/// Offers a request to make 32 times 64 MiB zeros, from the second page on.
fn submit_zeros(rig: &Rig, queue: &mut DriverQueue) {
    for n in 0..32 {
        let at = DATA + 16 * n;
        rig.ram.store(at, 8 + n * (64 << 11)).unwrap();
        rig.ram.store(at + 8, 64u32 << 11).unwrap();
        rig.ram.store(at + 12, 0u32).unwrap();
    }
    rig.ram.store(HEADER, WRITE_ZEROES).unwrap();
    rig.ram.store(HEADER + 8, 0u64).unwrap();
    rig.ram.store(STATUS, 0xeeu8).unwrap();
    let pieces = [
        Piece::Out(HEADER, 16),
        Piece::Out(DATA, 16 * 32),
        Piece::In(STATUS, 1),
    ];
    queue.submit(&rig.ram, &pieces);
    rig.notify(queue);
}

#[test]
fn a_long_request_ends_between_its_pieces_when_the_device_stops() {
    const PIECE: u64 = 16 << 20;
    const WHOLE: (u64, u64) = (4096, 2 << 30);
    let slow = Slow::new(&[20]);
    let (rig, _) = slow_rig(&slow);
    let queue = &mut rig.start(EVENT_IDX, RINGS)[0];
    submit_zeros(&rig, queue);
    wait_until(|| slow.calls() > 0);
    rig.set_status(0);
    let calls = slow.calls();
    assert!(calls < 16, "{calls}");
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(slow.calls(), calls);
    assert_eq!(rig.ram.load(STATUS), Some(0xeeu8));

    // Where it only stands still the request is begun again.
    let queue = &mut rig.start(EVENT_IDX, RINGS)[0];
    submit_zeros(&rig, queue);
    wait_until(|| slow.calls() > calls);
    rig.pci.config_write(4, 2, 0x0002);
    slow.zeros.lock().unwrap().clear();
    rig.pci.config_write(4, 2, 0x0006);
    assert_eq!(queue.wait(&rig.ram), Some((0, 1)));
    assert_eq!(rig.ram.load(STATUS), Some(0u8));
    let mut end = WHOLE.0;
    for (offset, len) in &*slow.zeros.lock().unwrap() {
        assert_eq!(*offset, end);
        end += len;
        assert!(*len <= PIECE && offset / PIECE == (end - 1) / PIECE);
    }
    assert_eq!(end, WHOLE.0 + WHOLE.1);
}
