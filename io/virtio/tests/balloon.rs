//! The balloon behind virtio-pci: inflation, deflation, free pages, statistics, wishes of the host, hostile drivers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use doppel_virtio::testing::{DriverQueue, PATIENCE, Piece, Rig};
use doppel_virtio::{Balloon, BalloonControl, BalloonCounters, EVENT_IDX, NEEDS_RESET};

const RINGS: u64 = 0x1_0000;
const NUMBERS: u64 = 0x20_0000;
const PAGES: u64 = 0x80_0000;
const CONFIG: u64 = 0x2000;
const STATS_VQ: u64 = 1 << 1;
const PAGE_POISON: u64 = 1 << 4;
const REPORTING: u64 = 1 << 5;

struct Parts {
    rig: Rig,
    control: Arc<BalloonControl>,
    counters: Arc<BalloonCounters>,
}

fn parts(bytes: u64, period: Option<Duration>) -> Parts {
    let control = BalloonControl::new(bytes).unwrap();
    let balloon = Balloon::new(control.clone(), period);
    Parts {
        counters: balloon.counters(),
        rig: Rig::new(Box::new(balloon)),
        control,
    }
}

fn fill(rig: &Rig) {
    for page in 0..16 {
        rig.ram.store(PAGES + 4096 * page, 7u64).unwrap();
    }
}

/// Which of the 16 pages are zero.
fn zero(rig: &Rig) -> Vec<u64> {
    let is_zero = |page: &u64| rig.ram.load::<u64>(PAGES + 4096 * page) == Some(0);
    (0..16).filter(is_zero).collect()
}

fn give(rig: &Rig, queue: &mut DriverQueue, numbers: &[u32]) {
    let bytes: Vec<_> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    rig.ram.write_from_device(NUMBERS, &bytes);
    queue.submit(&rig.ram, &[Piece::Out(NUMBERS, bytes.len() as u32)]);
    assert_eq!(rig.complete(queue).1, 0);
}

#[track_caller]
fn until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "no {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

fn count(n: &AtomicU64) -> u64 {
    n.load(Ordering::Relaxed)
}

#[test]
fn pages_in_the_balloon_go_back_to_the_host() {
    let parts = parts(12 << 20, None);
    let rig = &parts.rig;
    assert_eq!(rig.read(CONFIG, 4), 12 << 20 >> 12);
    let mut queues = rig.start(EVENT_IDX, RINGS);
    fill(rig);
    let cpu = rig.ram.tracker().join();
    rig.ram.tracker().add_code(PAGES + 0x3000, 64, &cpu);
    let first = (PAGES >> 12) as u32;
    // Out of order, twice, and not in memory at all.
    let numbers = [3, 1, 2, 9, 3].map(|n| first + n);
    give(rig, &mut queues[0], &numbers);
    give(rig, &mut queues[0], &[0x10_0000, u32::MAX, u32::MAX - 1]);
    assert_eq!(zero(rig), [1, 2, 3, 9]);
    assert!(cpu.has_requests(), "code that is gone is told of");
    assert_eq!(count(&parts.counters.discarded_bytes), 4 * 4096);
    rig.write(CONFIG + 4, 4, 4);
    assert_eq!(parts.control.actual(), 4 * 4096);
    give(rig, &mut queues[1], &numbers[..4]);
    assert_eq!(count(&parts.counters.deflated_bytes), 4 * 4096);
    rig.ram.store(PAGES + 0x1000, 5u64).unwrap();
    assert_eq!(zero(rig), [2, 3, 9]);
    rig.set_status(0);
    assert_eq!(parts.control.actual(), 0);
}

#[test]
fn free_pages_go_back_to_the_host() {
    // With the statistics queue and without, as the specification numbers queues and as Linux does.
    for (features, index) in [
        (REPORTING, 2),
        (REPORTING, 4),
        (REPORTING | STATS_VQ, 3),
        (REPORTING | STATS_VQ, 4),
    ] {
        let parts = parts(0, None);
        let rig = &parts.rig;
        assert_eq!(rig.offered() & features, features);
        let mut queues = rig.start(features, RINGS);
        fill(rig);
        let queue = &mut queues[index];
        // Parts of pages stay.
        let pieces = [
            Piece::In(PAGES + 0x1000, 0x3000),
            Piece::In(PAGES + 0x6800, 0x2000),
        ];
        queue.submit(&rig.ram, &pieces);
        assert_eq!(rig.complete(queue).1, 0);
        assert_eq!(zero(rig), [1, 2, 3, 7]);
        assert_eq!(count(&parts.counters.reported_bytes), 0x5000);
        assert_eq!(count(&parts.counters.discarded_bytes), 0x4000);
    }
}

#[test]
fn pages_that_are_poisoned_stay() {
    for (poison, gone) in [(0xaaaa_aaaa, vec![]), (0, vec![1])] {
        let parts = parts(0, None);
        let rig = &parts.rig;
        fill(rig);
        assert!(rig.negotiate(REPORTING | PAGE_POISON));
        rig.write(CONFIG + 12, 4, poison);
        let mut queue = rig.enable_queue(2, RINGS);
        rig.set_status(15);
        queue.submit(&rig.ram, &[Piece::In(PAGES + 0x1000, 0x1000)]);
        assert_eq!(rig.complete(&mut queue).1, 0);
        assert_eq!(zero(rig), gone);
    }
}

#[test]
fn statistics_are_given_back_when_new_ones_are_wanted() {
    let parts = parts(0, None);
    let rig = &parts.rig;
    let mut queues = rig.start(STATS_VQ, RINGS);
    let queue = &mut queues[2];
    let mut give = |free: u64| {
        let mut bytes = Vec::new();
        for (tag, value) in [(4u16, free), (5, 512 << 20), (99, 1)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        rig.ram.write_from_device(NUMBERS, &bytes);
        queue.submit(&rig.ram, &[Piece::Out(NUMBERS, bytes.len() as u32)]);
        rig.notify(queue);
        let free_is = |s: doppel_virtio::GuestMemoryStats| s.free == Some(free);
        until("statistics", || {
            parts.control.statistics().is_some_and(free_is)
        });
        assert!(queue.take(&rig.ram).is_none(), "the buffer is kept");
        parts.control.ask_for_statistics();
        assert!(queue.wait(&rig.ram).is_some(), "new ones are wanted");
    };
    give(100 << 20);
    give(99 << 20);
    let statistics = parts.control.statistics().unwrap();
    assert_eq!(statistics.total, Some(512 << 20));
    assert_eq!(statistics.swapped_in, None);
}

#[test]
fn statistics_are_asked_for_again_and_again_and_survive_being_saved() {
    let parts = parts(0, Some(Duration::from_millis(5)));
    let rig = &parts.rig;
    let mut queues = rig.start(STATS_VQ, RINGS);
    let queue = &mut queues[2];
    for _ in 0..3 {
        queue.submit(&rig.ram, &[Piece::Out(NUMBERS, 20)]);
        rig.notify(queue);
        rig.pci.save();
        assert!(queue.wait(&rig.ram).is_some());
    }
}

#[test]
fn another_target_is_announced() {
    let parts = parts(1 << 20, None);
    let rig = &parts.rig;
    assert!(rig.negotiate(0));
    assert_eq!(rig.read(CONFIG, 4), 1 << 20 >> 12);
    rig.use_msix(5);
    rig.enable_queue(0, RINGS);
    rig.set_status(15);
    parts.control.set_target(8 << 20);
    assert_eq!(rig.messages.wait(), [(0xfee0_0000, 0x40)]);
    assert_eq!(rig.read(CONFIG, 4), 8 << 20 >> 12);
}

#[test]
fn what_the_driver_told_is_saved() {
    let old = parts(0, None);
    old.rig.write(CONFIG + 4, 4, 77);
    old.rig.write(CONFIG + 12, 4, 0xaa);
    let new = parts(0, None);
    assert!(new.rig.pci.restore(&old.rig.pci.save()));
    assert_eq!(new.control.actual(), 77 * 4096);
    assert_eq!(new.rig.read(CONFIG + 12, 4), 0xaa);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_reset_heals() {
    let parts = parts(0, None);
    let rig = &parts.rig;
    for broken in 0..5 {
        let mut queues = rig.start(STATS_VQ | REPORTING, RINGS);
        queues[broken].submit(&rig.ram, &[Piece::In(1 << 40, 4096)]);
        rig.notify(&queues[broken]);
        until("wish for a reset", || rig.status() & NEEDS_RESET != 0);
    }
    let mut queues = rig.start(REPORTING, RINGS);
    queues[4].submit(&rig.ram, &[Piece::In(PAGES, 4096)]);
    assert_eq!(rig.complete(&mut queues[4]).1, 0);
}
