//! The network card behind virtio-pci: frames both ways, buffers of all sizes, commands, hostile drivers.

use std::collections::VecDeque;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use doppel_device::{HostClock, Nanos};
use doppel_net::{
    Accepts, Link, Offload, PartialChecksum, Port, Received, Segment, Segmentation, Sent, Sink,
    UserConfig, UserNetwork,
};
use doppel_virtio::testing::{DriverQueue, PATIENCE, Piece, Rig};
use doppel_virtio::{EVENT_IDX, NEEDS_RESET, Net};
use fastrand::Rng;
use rustix::event::{EventfdFlags, eventfd};

const RINGS: u64 = 0x1_0000;
const OUT: u64 = 0x20_0000;
const IN: u64 = 0x40_0000;
const HEADER: u32 = 12;
const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const MRG_RXBUF: u64 = 1 << 15;
const CTRL_VQ: u64 = 1 << 17;
const ALL: u64 =
    1 << 0 | GUEST_CSUM | GUEST_TSO4 | 1 << 5 | MRG_RXBUF | 1 << 16 | CTRL_VQ | 1 << 23;

type Frames = Arc<Mutex<VecDeque<(Offload, Vec<u8>)>>>;

/// A back-end that a test looks into.
#[derive(Clone)]
struct Fake {
    sent: Frames,
    frames: Frames,
    full: Arc<AtomicBool>,
    accepts: Arc<Mutex<Accepts>>,
    news: Arc<OwnedFd>,
    echo: bool,
}

impl Fake {
    fn new(echo: bool) -> Self {
        let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
        Fake {
            sent: Frames::default(),
            frames: Frames::default(),
            full: Arc::default(),
            accepts: Arc::default(),
            news: Arc::new(eventfd(0, flags).unwrap()),
            echo,
        }
    }

    fn give(&self, frame: &[u8]) {
        let frame = (Offload::default(), frame.to_vec());
        self.frames.lock().unwrap().push_back(frame);
        self.wake();
    }

    fn wake(&self) {
        rustix::io::write(&self.news, &1u64.to_ne_bytes()).unwrap();
    }

    fn wait_for_sent(&self, count: usize) -> Vec<(Offload, Vec<u8>)> {
        let end = Instant::now() + PATIENCE;
        while self.sent.lock().unwrap().len() < count {
            assert!(Instant::now() < end, "frames do not arrive");
            std::thread::sleep(Duration::from_micros(100));
        }
        self.sent.lock().unwrap().drain(..).collect()
    }
}

impl Link for Fake {
    fn accepts(&self) -> Accepts {
        Accepts::ALL
    }

    fn guest_accepts(&mut self, accepts: Accepts) {
        *self.accepts.lock().unwrap() = accepts;
    }

    fn send(&mut self, offload: Offload, frame: &[u8]) -> Sent {
        if self.full.load(Ordering::SeqCst) {
            return Sent::Full;
        }
        let to = if self.echo { &self.frames } else { &self.sent };
        to.lock().unwrap().push_back((offload, frame.to_vec()));
        Sent::Taken
    }

    fn receive(&mut self, room: usize, sink: Sink) -> Received {
        let mut frames = self.frames.lock().unwrap();
        match frames.front() {
            None => Received::Nothing,
            Some((_, frame)) if frame.len() > room => Received::TooLong(frame.len()),
            Some((offload, frame)) => {
                // In parts, as a gateway's ring gives it.
                let (a, b) = frame.split_at(frame.len() / 3);
                sink(*offload, &[a, b]);
                frames.pop_front();
                Received::Frame
            }
        }
    }

    fn discard(&mut self) {
        self.frames.lock().unwrap().pop_front();
    }

    fn has_frames(&self) -> bool {
        !self.frames.lock().unwrap().is_empty()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.news.as_fd()
    }

    fn deadline(&self) -> Option<Nanos> {
        None
    }

    fn service(&mut self) -> bool {
        let _ = rustix::io::read(&*self.news, &mut [0; 8]);
        true
    }
}

fn rig_with(fake: &Fake, at_once: bool) -> Rig {
    let port = Port::new(Box::new(fake.clone()), Arc::new(HostClock::new())).unwrap();
    Rig::new(Box::new(Net::new(port, MAC, 1500, at_once)))
}

fn queues(rig: &Rig, features: u64) -> [DriverQueue; 3] {
    let queues = rig.start(features, RINGS);
    queues.try_into().unwrap()
}

fn bytes(rig: &Rig, at: u64, len: u32) -> Vec<u8> {
    (at..at + u64::from(len))
        .map(|at| rig.ram.load(at).unwrap())
        .collect()
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|n| ((n * 7) >> 2) as u8 ^ n as u8)
        .collect()
}

fn send(rig: &Rig, tx: &mut DriverQueue, header: &[u8; 12], frame: &[u8]) {
    rig.ram.write_from_device(OUT, header);
    rig.ram.write_from_device(OUT + 0x100, frame);
    let (first, second) = (
        frame.len() as u32 / 2,
        frame.len() as u32 - frame.len() as u32 / 2,
    );
    let second_at = OUT + 0x100 + u64::from(first);
    tx.submit(
        &rig.ram,
        &[
            Piece::Out(OUT, HEADER),
            Piece::Out(OUT + 0x100, first),
            Piece::Out(second_at, second),
        ],
    );
    assert_eq!(rig.complete(tx).1, 0);
}

#[test]
fn frames_leave_whole_with_what_is_left_undone_in_them() {
    for at_once in [true, false] {
        let fake = Fake::new(false);
        let rig = rig_with(&fake, at_once);
        let [_, mut tx, _] = queues(&rig, ALL | EVENT_IDX);
        let header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
        for len in [60, 1514, 5000, 65_550] {
            let frame = pattern(len);
            send(&rig, &mut tx, &header, &frame);
            let sent = fake.wait_for_sent(1);
            let offload = Offload {
                checksum: Some(PartialChecksum {
                    start: 34,
                    offset: 16,
                }),
                segmentation: Some(Segmentation {
                    kind: Segment::Tcp4,
                    size: 1460,
                    header: 54,
                }),
            };
            assert!(sent == [(offload, frame)], "{len} {at_once}");
        }
    }
}

#[test]
fn a_frame_fills_as_many_buffers_as_it_needs_and_is_seen_whole() {
    let fake = Fake::new(false);
    let rig = rig_with(&fake, true);
    let [mut rx, _, _] = queues(&rig, ALL | EVENT_IDX);
    for n in 0..32 {
        rx.submit(&rig.ram, &[Piece::In(IN + 0x1000 * n, 1000)]);
    }
    rig.notify(&rx);
    let frame = pattern(6500);
    fake.give(&frame);
    let mut got = Vec::new();
    let (_, first) = rx.wait(&rig.ram).unwrap();
    let header = bytes(&rig, IN, HEADER);
    assert_eq!(header[10..12], [7, 0], "number of buffers");
    got.extend(bytes(&rig, IN, first));
    for n in 1..7 {
        let (head, len) = rx.take(&rig.ram).expect("all buffers at once");
        assert_eq!(u64::from(head), n);
        got.extend(bytes(&rig, IN + 0x1000 * n, len));
    }
    assert!(got[12..] == frame);
    // The buffers that were not needed serve the next one.
    fake.give(b"0123456789abcdef");
    assert_eq!(rx.wait(&rig.ram), Some((7, HEADER + 16)));
}

#[test]
fn without_mergeable_buffers_a_frame_that_does_not_fit_is_lost_and_the_next_comes() {
    let fake = Fake::new(false);
    let rig = rig_with(&fake, true);
    let [mut rx, _, _] = queues(&rig, 0);
    for n in 0..4 {
        rx.submit(&rig.ram, &[Piece::In(IN + 0x1000 * n, 1526)]);
    }
    rig.notify(&rx);
    fake.give(&pattern(3000));
    fake.give(&pattern(1514));
    assert_eq!(rx.wait(&rig.ram), Some((0, 1526)));
    assert!(bytes(&rig, IN + 12, 1514) == pattern(1514));
}

/// A user network that counts how often it is asked whether it has frames.
struct Counted(UserNetwork, Arc<AtomicUsize>);

impl Link for Counted {
    fn accepts(&self) -> Accepts {
        self.0.accepts()
    }

    fn guest_accepts(&mut self, accepts: Accepts) {
        self.0.guest_accepts(accepts);
    }

    fn send(&mut self, offload: Offload, frame: &[u8]) -> Sent {
        self.0.send(offload, frame)
    }

    fn receive(&mut self, room: usize, sink: Sink) -> Received {
        self.0.receive(room, sink)
    }

    fn next_length(&self) -> usize {
        self.0.next_length()
    }

    fn discard(&mut self) {
        self.0.discard();
    }

    fn has_frames(&self) -> bool {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.has_frames()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.descriptor()
    }

    fn deadline(&self) -> Option<Nanos> {
        self.0.deadline()
    }

    fn service(&mut self) -> bool {
        self.0.service()
    }
}

/// A call from 10.0.2.15 to a port of the host's loopback.
fn syn(port: u16) -> Vec<u8> {
    let mut frame = vec![0x52, 0x55, 10, 0, 2, 2];
    frame.extend_from_slice(&MAC);
    frame.extend_from_slice(&[8, 0, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0x62, 0xc0]);
    frame.extend_from_slice(&[10, 0, 2, 15, 10, 0, 2, 2, 0x9c, 0x40]);
    frame.extend_from_slice(&port.to_be_bytes());
    frame.extend_from_slice(&[0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, 2, 0xff, 0xff, 0, 0, 0, 0]);
    frame
}

#[test]
fn a_buffer_too_small_for_any_segment_does_not_keep_the_card_busy() {
    let host = TcpListener::bind("127.0.0.1:0").unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let clock = Arc::new(HostClock::new());
    let network = UserNetwork::new(&UserConfig::default(), MAC, clock.clone()).unwrap();
    let port = Port::new(Box::new(Counted(network, asked.clone())), clock).unwrap();
    let rig = Rig::new(Box::new(Net::new(port, MAC, 1500, true)));
    let [mut rx, mut tx, _] = queues(&rig, 0);
    rx.submit(&rig.ram, &[Piece::In(IN, 40)]);
    rig.notify(&rx);
    let frame = syn(host.local_addr().unwrap().port());
    send(&rig, &mut tx, &[0; 12], &frame);
    host.accept().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let asked = asked.load(Ordering::SeqCst);
    assert!(asked < 200, "asked {asked} times");
    assert_eq!(rx.take(&rig.ram), None);
}

#[test]
fn frames_wait_until_the_guest_has_buffers() {
    for features in [ALL, ALL | EVENT_IDX] {
        let fake = Fake::new(false);
        let rig = rig_with(&fake, true);
        let [mut rx, _, _] = queues(&rig, features);
        fake.give(&pattern(1514));
        std::thread::sleep(Duration::from_millis(20));
        rx.submit(&rig.ram, &[Piece::In(IN, 1000)]);
        rig.notify(&rx);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(rx.take(&rig.ram), None, "half a frame");
        rx.submit(&rig.ram, &[Piece::In(IN + 0x1000, 1000)]);
        rig.notify(&rx);
        assert_eq!(rx.wait(&rig.ram), Some((0, 1000)));
        assert_eq!(rx.wait(&rig.ram), Some((1, 526)));
    }
}

#[test]
fn an_answer_is_there_when_the_notification_returns() {
    let fake = Fake::new(true);
    let rig = rig_with(&fake, true);
    let [mut rx, mut tx, _] = queues(&rig, ALL | EVENT_IDX);
    rx.submit(&rig.ram, &[Piece::In(IN, 2000)]);
    // The thread has its first look behind it.
    std::thread::sleep(Duration::from_millis(50));
    rig.ram.write_from_device(OUT, &[0; 12]);
    tx.submit(&rig.ram, &[Piece::Out(OUT, HEADER + 60)]);
    rig.notify(&tx);
    assert_eq!(rx.take(&rig.ram), Some((0, HEADER + 60)));
}

#[test]
fn a_back_end_without_room_gets_the_frame_when_it_has_some() {
    let fake = Fake::new(false);
    let rig = rig_with(&fake, true);
    let [_, mut tx, _] = queues(&rig, ALL | EVENT_IDX);
    fake.full.store(true, Ordering::SeqCst);
    tx.submit(&rig.ram, &[Piece::Out(OUT, HEADER + 60)]);
    rig.notify(&tx);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(tx.take(&rig.ram), None);
    fake.full.store(false, Ordering::SeqCst);
    fake.wake();
    assert_eq!(tx.wait(&rig.ram), Some((0, 0)));
    assert_eq!(fake.wait_for_sent(1).len(), 1);
}

#[test]
fn the_driver_changes_address_and_offloads_and_a_reset_forgets_both() {
    let fake = Fake::new(false);
    let rig = rig_with(&fake, true);
    let mac = |rig: &Rig| {
        (0..6)
            .map(|n| rig.read(0x2000 + n, 1) as u8)
            .collect::<Vec<_>>()
    };
    assert_eq!(mac(&rig), MAC);
    assert_eq!(rig.read(0x2006, 2), 1, "link is up");
    let [_, _, mut control] = queues(&rig, ALL | 1 << 2);
    assert!(fake.accepts.lock().unwrap().tcp4);
    let mut command = |bytes: &[u8]| {
        rig.ram.write_from_device(OUT, bytes);
        rig.ram.store(IN, 0x55u8);
        control.submit(
            &rig.ram,
            &[Piece::Out(OUT, bytes.len() as u32), Piece::In(IN, 1)],
        );
        assert_eq!(rig.complete(&mut control).1, 1);
        rig.ram.load::<u8>(IN).unwrap()
    };
    let other = [2, 0, 0, 0, 0, 9];
    assert_eq!(command(&[&[1, 1][..], &other].concat()), 0);
    assert_eq!(mac(&rig), other);
    assert_eq!(command(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    let accepts = *fake.accepts.lock().unwrap();
    assert!(accepts.checksum && !accepts.tcp4);
    assert_eq!(command(&[0, 0, 1]), 0, "promiscuous");
    for nonsense in [&[][..], &[1], &[1, 1, 2], &[9, 9, 9], &[5, 0, 1]] {
        if !nonsense.is_empty() {
            assert_eq!(command(nonsense), 1, "{nonsense:?}");
        }
    }
    rig.set_status(0);
    assert_eq!(mac(&rig), MAC);
}

/// Whatever a driver puts into the rings, the card asks for a reset at worst, and works after it.
/// `DOPPEL_NET_RINGS=N cargo test --release -p doppel-virtio --test net hostile` makes a campaign of N drivers.
#[test]
fn hostile_drivers_stop_the_card_at_worst() {
    let rounds = std::env::var("DOPPEL_NET_RINGS").map_or(150, |n| n.parse().unwrap());
    let seed = std::env::var("DOPPEL_NET_SEED").map_or(1, |n| n.parse().unwrap());
    let mut random = Rng::with_seed(seed);
    let fake = Fake::new(true);
    let rig = rig_with(&fake, true);
    let (mut stopped, mut worked) = (0, 0);
    for _ in 0..rounds {
        let features = ALL | if random.bool() { EVENT_IDX } else { 0 };
        let mut queues = queues(&rig, features);
        for _ in 0..random.u8(..200) {
            let queue = &mut queues[random.usize(..3)];
            let descriptor = (
                match random.u8(..8) {
                    0 => random.u64(..),
                    _ => IN + random.u64(..0x10_0000),
                },
                match random.u8(..8) {
                    0 => random.u32(..),
                    1 => 0,
                    _ => random.u32(..3000),
                },
                match random.u8(..16) {
                    0 => random.u16(..),
                    _ => random.u16(..4),
                },
                random.u16(..256),
            );
            let n = random.u16(..queue.size);
            DriverQueue::put_descriptor(&rig.ram, queue.base, n, descriptor);
            if random.u8(..3) == 0 {
                let head = match random.u8(..64) {
                    0 => random.u16(..),
                    _ => random.u16(..64),
                };
                queue.offer(&rig.ram, head);
                rig.notify(queue);
            }
        }
        if rig.status() & NEEDS_RESET != 0 {
            stopped += 1;
        }
        rig.set_status(0);
        fake.frames.lock().unwrap().clear();
        let [mut rx, mut tx, _] = self::queues(&rig, ALL);
        rx.submit(&rig.ram, &[Piece::In(IN, 2000)]);
        rig.ram.write_from_device(OUT, &[0; 12]);
        tx.submit(&rig.ram, &[Piece::Out(OUT, HEADER + 60)]);
        rig.notify(&tx);
        assert_eq!(rx.wait(&rig.ram), Some((0, HEADER + 60)));
        worked += 1;
        fake.frames.lock().unwrap().clear();
    }
    assert!(stopped > 0 && worked == rounds, "{stopped} {worked}");
}
