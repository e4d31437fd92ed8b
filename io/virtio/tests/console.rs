//! The console behind virtio-pci: bytes both ways, a slow host, windows, hostile rings; each with and without the vCPU's own service.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use doppel_device::{Backed, CharSink, InputQueue};
use doppel_virtio::testing::{DriverQueue, PATIENCE, Piece, Rig};
use doppel_virtio::{Console, ConsoleBackend, ConsoleCounters, EVENT_IDX, NEEDS_RESET, WindowSize};

const RINGS: u64 = 0x1_0000;
const OUT: u64 = 0x20_0000;
const IN: u64 = 0x40_0000;
const SIZE: u64 = 1 << 0;
const CONFIG: u64 = 0x2000;

/// A screen that takes so many bytes, and then no more until it is given room.
#[derive(Default)]
struct Screen {
    shown: Mutex<(Vec<u8>, usize)>,
    frontend: Mutex<Option<Weak<dyn Backed>>>,
}

impl CharSink for Screen {
    fn write(&self, bytes: &[u8]) -> usize {
        let mut shown = self.shown.lock().unwrap();
        let n = bytes.len().min(shown.1);
        shown.0.extend(&bytes[..n]);
        shown.1 -= n;
        n
    }
}

impl Screen {
    fn give_room(&self, room: usize) {
        self.shown.lock().unwrap().1 += room;
        let frontend = self.frontend.lock().unwrap();
        let frontend = frontend.as_ref().and_then(Weak::upgrade);
        frontend.iter().for_each(|f| f.backend_ready());
    }

    fn text(&self) -> Vec<u8> {
        self.shown.lock().unwrap().0.clone()
    }
}

struct Parts {
    rig: Rig,
    screen: Arc<Screen>,
    keyboard: Arc<InputQueue>,
    size: Arc<WindowSize>,
    counters: Arc<ConsoleCounters>,
    frontend: Weak<dyn Backed>,
}

fn parts(at_once: bool) -> Parts {
    let screen = Arc::new(Screen::default());
    let keyboard = InputQueue::new(1 << 20);
    let size = Arc::new(WindowSize::new(25, 80));
    let backend = ConsoleBackend {
        sink: screen.clone(),
        source: keyboard.clone(),
        size: Some(size.clone()),
    };
    let console = Console::new(backend, at_once).unwrap();
    let frontend = console.frontend();
    *screen.frontend.lock().unwrap() = Some(frontend.clone());
    keyboard.connect(frontend.clone());
    Parts {
        counters: console.counters(),
        rig: Rig::new(Box::new(console)),
        screen,
        keyboard,
        size,
        frontend,
    }
}

fn put(rig: &Rig, queue: &mut DriverQueue, at: u64, bytes: &[u8]) {
    rig.ram.write_from_device(at, bytes);
    queue.submit(&rig.ram, &[Piece::Out(at, bytes.len() as u32)]);
    rig.notify(queue);
}

fn bytes(rig: &Rig, at: u64, len: u32) -> Vec<u8> {
    let end = at + u64::from(len);
    (at..end).map(|a| rig.ram.load(a).unwrap()).collect()
}

#[track_caller]
fn until(what: &str, condition: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < end, "no {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

#[test]
fn what_the_guest_sends_arrives_in_order() {
    for (at_once, features) in [(true, 0), (true, EVENT_IDX), (false, 0), (false, EVENT_IDX)] {
        let parts = parts(at_once);
        parts.screen.give_room(1 << 20);
        let mut queues = parts.rig.start(features, RINGS);
        let (ram, transmit) = (&parts.rig.ram, &mut queues[1]);
        let mut sent = Vec::new();
        for n in 0..500u32 {
            let line = format!("line {n} of what a guest has to say\n");
            put(&parts.rig, transmit, OUT, line.as_bytes());
            assert_eq!(transmit.wait(ram).map(|used| used.1), Some(0));
            sent.extend(line.into_bytes());
        }
        assert_eq!(parts.screen.text(), sent);
        let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
        assert_eq!(count(&parts.counters.sent_bytes), sent.len() as u64);
        assert_eq!(count(&parts.counters.at_once) > 0, at_once);
    }
}

#[test]
fn a_full_host_makes_the_guest_wait_and_loses_nothing() {
    for at_once in [true, false] {
        let parts = parts(at_once);
        let mut queues = parts.rig.start(EVENT_IDX, RINGS);
        let (ram, transmit) = (&parts.rig.ram, &mut queues[1]);
        let text: Vec<u8> = (0..40_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
        ram.write_from_device(OUT, &text);
        let pieces = [Piece::Out(OUT, 9_000), Piece::Out(OUT + 9_000, 31_000)];
        transmit.submit(ram, &pieces);
        parts.rig.notify(transmit);
        let mut room = 0;
        while room < 39_999 {
            assert!(transmit.take(ram).is_none());
            let more = (room / 3 + 17).min(39_999 - room);
            room += more;
            parts.screen.give_room(more);
            until("output", || parts.screen.text().len() == room);
        }
        parts.screen.give_room(1);
        assert!(transmit.wait(ram).is_some());
        assert_eq!(parts.screen.text(), text);
    }
}

#[test]
fn half_a_line_goes_on_where_it_was_saved() {
    let old = parts(true);
    let mut queues = old.rig.start(0, RINGS);
    old.screen.give_room(5);
    put(&old.rig, &mut queues[1], OUT, b"hello world");
    until("output", || old.screen.text() == b"hello");
    let state = serde_json::to_string(&old.rig.pci.save()).unwrap();
    let new = parts(true);
    for at in (RINGS..RINGS + 0x2_0000).chain(OUT..OUT + 16).step_by(8) {
        let word: u64 = old.rig.ram.load(at).unwrap();
        new.rig.ram.store(at, word).unwrap();
    }
    assert!(new.rig.pci.restore(&serde_json::from_str(&state).unwrap()));
    new.screen.give_room(100);
    until("the rest", || new.screen.text() == b" world");
    // A reset of the queue forgets the half.
    old.rig.write(0x16, 2, 1);
    old.rig.write(0x3a, 2, 1);
    let mut transmit = old.rig.enable_queue(1, 8 * RINGS);
    old.screen.give_room(100);
    put(&old.rig, &mut transmit, OUT, b"again");
    until("a new line", || old.screen.text() == b"helloagain");
}

#[test]
fn input_waits_for_buffers_and_fills_them() {
    let parts = parts(true);
    parts.keyboard.push(b"typed ahead");
    let mut queues = parts.rig.start(EVENT_IDX, RINGS);
    let (ram, receive) = (&parts.rig.ram, &mut queues[0]);
    for expected in [&b"type"[..], b"d ah", b"ead"] {
        receive.submit(ram, &[Piece::In(IN, 3), Piece::In(IN + 3, 1)]);
        let (_, len) = parts.rig.complete(receive);
        assert_eq!(bytes(&parts.rig, IN, len), expected);
    }
    receive.submit(ram, &[Piece::In(IN, 64)]);
    parts.rig.notify(receive);
    std::thread::sleep(Duration::from_millis(20));
    assert!(receive.take(ram).is_none());
    parts.keyboard.push(b"later");
    let (_, len) = receive.wait(ram).unwrap();
    assert_eq!(bytes(&parts.rig, IN, len), b"later");
}

#[test]
fn a_window_of_another_size_is_announced() {
    let parts = parts(true);
    assert_eq!(parts.rig.offered() & SIZE, SIZE);
    parts.rig.use_msix(2);
    parts.rig.start(SIZE, RINGS);
    // The start is news already, to a driver that has not looked.
    parts.rig.write(0x10, 2, 0);
    until("news", || parts.rig.read(0x15, 1) != 0);
    let generation = parts.rig.read(0x15, 1);
    assert_eq!(parts.rig.read(CONFIG, 4), 25 << 16 | 80);
    parts.rig.messages.take();
    parts.size.set(50, 132);
    parts.frontend.upgrade().unwrap().backend_ready();
    assert_eq!(parts.rig.messages.wait(), [(0xfee0_0000, 0x40)]);
    assert_eq!(parts.rig.read(CONFIG, 4), 50 << 16 | 132);
    assert_ne!(parts.rig.read(0x15, 1), generation);
}

#[test]
fn a_character_can_be_written_without_a_queue() {
    let parts = parts(true);
    parts.screen.give_room(1);
    parts.rig.write(CONFIG + 8, 4, u64::from(b'!'));
    assert_eq!(parts.screen.text(), b"!");
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_reset_heals() {
    for at_once in [true, false] {
        let parts = parts(at_once);
        parts.screen.give_room(100);
        for broken in [0, 1] {
            let mut queues = parts.rig.start(0, RINGS);
            queues[broken].submit(&parts.rig.ram, &[Piece::Out(1 << 40, 10)]);
            parts.rig.notify(&queues[broken]);
            until("wish for a reset", || parts.rig.status() & NEEDS_RESET != 0);
        }
        let mut queues = parts.rig.start(0, RINGS);
        put(&parts.rig, &mut queues[1], OUT, b"healed");
        until("output", || parts.screen.text() == b"healed");
    }
}
