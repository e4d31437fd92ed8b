//! The socket device behind virtio-pci: every kind of packet, credit both ways, half closes, resets, hosts and guests that do not behave.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use doppel_virtio::testing::{DriverQueue, PATIENCE, Piece, Rig};
use doppel_virtio::{EVENT_IDX, NEEDS_RESET, Vsock, VsockCounters, VsockSocket};

const RINGS: u64 = 0x1_0000;
const OUT: u64 = 0x20_0000;
const IN: u64 = 0x40_0000;
const IN_LEN: u64 = 8192;
const IN_COUNT: u64 = 64;
const GUEST: u64 = 7;
const HOST: u64 = 2;
const BUFFER: u32 = 64 << 10;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_UPDATE: u16 = 6;
const CREDIT_REQUEST: u16 = 7;

/// A packet as a test cares for it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Packet {
    guest: u32,
    host: u32,
    op: u16,
    flags: u32,
    room: u32,
    passed_on: u32,
    data: Vec<u8>,
}

impl Packet {
    fn new(guest: u32, host: u32, op: u16) -> Self {
        Packet {
            guest,
            host,
            op,
            flags: 0,
            room: BUFFER,
            passed_on: 0,
            data: Vec::new(),
        }
    }

    fn answer(&self, op: u16) -> Self {
        Packet::new(self.guest, self.host, op)
    }

    fn with(mut self, data: &[u8]) -> Self {
        self.data = data.to_vec();
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(GUEST.to_le_bytes());
        bytes.extend(HOST.to_le_bytes());
        for word in [self.guest, self.host, self.data.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        for word in [self.flags, self.room, self.passed_on] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(&self.data);
        bytes
    }
}

struct Guest {
    rig: Rig,
    queues: Vec<DriverQueue>,
    counters: Arc<VsockCounters>,
    path: PathBuf,
    given: u64,
    _scratch: tempfile::TempDir,
}

/// As the monitor does: an ordinary user's usual limit of descriptors is lower than what it may have.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

impl Guest {
    fn new() -> Self {
        raise_descriptor_limit();
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("v");
        let socket = Arc::new(VsockSocket::open(&path).unwrap());
        let vsock = Vsock::new(GUEST as u32, socket);
        let counters = vsock.counters();
        let rig = Rig::new(Box::new(vsock));
        let mut guest = Guest {
            queues: rig.start(EVENT_IDX, RINGS),
            rig,
            counters,
            path,
            given: 0,
            _scratch: scratch,
        };
        guest.give_buffers(IN_COUNT);
        guest
    }

    fn give_buffers(&mut self, count: u64) {
        for _ in 0..count {
            let at = IN + IN_LEN * (self.given % IN_COUNT);
            self.given += 1;
            let pieces = [Piece::In(at, 44), Piece::In(at + 44, IN_LEN as u32 - 44)];
            self.queues[0].submit(&self.rig.ram, &pieces);
        }
        self.rig.notify(&self.queues[0]);
    }

    fn send_bytes(&mut self, bytes: &[u8]) {
        self.rig.ram.write_from_device(OUT, bytes);
        let (head, rest) = (44.min(bytes.len() as u32), bytes.len() as u32);
        let mut pieces = vec![Piece::Out(OUT, head)];
        if rest > head {
            pieces.push(Piece::Out(OUT + u64::from(head), rest - head));
        }
        self.queues[1].submit(&self.rig.ram, &pieces);
        self.rig.complete(&mut self.queues[1]);
    }

    fn send(&mut self, packet: Packet) {
        self.send_bytes(&packet.bytes());
    }

    fn poll(&mut self) -> Option<Packet> {
        let n = self.queues[0].take(&self.rig.ram)?;
        Some(self.parse(n))
    }

    fn parse(&mut self, (head, len): (u32, u32)) -> Packet {
        // Two descriptors each, so the head says which buffer it is only as long as they go round in order.
        let _ = head;
        let at = IN + IN_LEN * ((self.given - IN_COUNT) % IN_COUNT);
        let load = |offset: u64| self.rig.ram.load::<u32>(at + offset).unwrap();
        assert_eq!((load(0), load(8)), (HOST as u32, GUEST as u32));
        assert_eq!(load(28) & 0xffff, 1, "stream");
        assert_eq!(load(24) + 44, len);
        let data = (0..u64::from(load(24))).map(|n| self.rig.ram.load(at + 44 + n).unwrap());
        let packet = Packet {
            guest: load(20),
            host: load(16),
            op: (load(28) >> 16) as u16,
            flags: load(32),
            room: load(36),
            passed_on: load(40),
            data: data.collect(),
        };
        self.give_buffers(1);
        packet
    }

    #[track_caller]
    fn next(&mut self) -> Packet {
        let used = self.queues[0].wait(&self.rig.ram);
        self.parse(used.expect("a packet"))
    }

    #[track_caller]
    fn expect(&mut self, packet: &Packet, op: u16) -> Packet {
        let next = self.next();
        assert_eq!(
            (next.guest, next.host, next.op),
            (packet.guest, packet.host, op)
        );
        next
    }

    #[track_caller]
    fn expect_nothing(&mut self) {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(self.poll(), None);
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.path.display())).unwrap()
    }

    /// A connection that the guest asked for.
    fn connect(&mut self, listener: &UnixListener, port: u32, room: u32) -> (Packet, UnixStream) {
        let mut request = Packet::new(1000, port, REQUEST);
        request.room = room;
        self.send(request.clone());
        let answer = self.expect(&request, RESPONSE);
        assert_eq!(answer.room, BUFFER);
        let stream = listener.accept().unwrap().0;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        (request, stream)
    }
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn noise(len: usize) -> Vec<u8> {
    (0..len).map(|n| ((n * 7919) >> 5) as u8).collect()
}

#[test]
fn a_guest_connects_and_bytes_go_both_ways() {
    let mut guest = Guest::new();
    assert_eq!(guest.rig.read(0x2000, 4), GUEST);
    let listener = guest.listen(80);
    let (request, mut stream) = guest.connect(&listener, 80, BUFFER);
    guest.send(request.answer(RW).with(b"hello"));
    assert_eq!(read(&mut stream, 5), b"hello");
    stream.write_all(b"world").unwrap();
    let packet = guest.expect(&request, RW);
    assert_eq!((&packet.data[..], packet.passed_on), (&b"world"[..], 5));
    let count = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    assert_eq!(count(&guest.counters.connections), 1);
    assert_eq!(count(&guest.counters.sent_bytes), 5);
    assert_eq!(count(&guest.counters.received_bytes), 5);
}

#[test]
fn a_host_connects_and_is_told_which_port_it_has() {
    let mut guest = Guest::new();
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"CONN").unwrap();
    guest.expect_nothing();
    stream.write_all(b"ECT 5000\nat once").unwrap();
    let request = guest.next();
    assert_eq!((request.op, request.guest), (REQUEST, 5000));
    guest.send(request.answer(RESPONSE));
    let told = format!("OK {}\n", request.host);
    assert_eq!(read(&mut stream, told.len()), told.as_bytes());
    let packet = guest.expect(&request, RW);
    assert_eq!((&packet.data[..], packet.passed_on), (&b"at once"[..], 0));
    guest.send(request.answer(RW).with(b"yes"));
    assert_eq!(read(&mut stream, 3), b"yes");
    // The next one has another port.
    let mut other = UnixStream::connect(&guest.path).unwrap();
    other.write_all(b"CONNECT 5000\n").unwrap();
    let second = guest.next();
    assert!(second.op == REQUEST && second.host != request.host);
    guest.send(second.answer(RST));
    assert_eq!(other.read(&mut [0]).unwrap(), 0, "refused");
}

#[test]
fn nonsense_of_a_host_is_hung_up_on() {
    let mut guest = Guest::new();
    for text in [&b"HELLO\n"[..], b"CONNECT x\n", &[b'C'; 100]] {
        let mut stream = UnixStream::connect(&guest.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let _ = stream.write_all(text);
        let end = stream.read(&mut [0]);
        assert!(matches!(end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset));
    }
    guest.expect_nothing();
    // One that goes before it is answered resets what it asked for.
    let mut stream = UnixStream::connect(&guest.path).unwrap();
    stream.write_all(b"CONNECT 1\n").unwrap();
    let request = guest.next();
    drop(stream);
    guest.expect(&request, RST);
}

#[test]
fn who_is_not_there_is_refused() {
    let mut guest = Guest::new();
    for op in [
        REQUEST,
        RESPONSE,
        SHUTDOWN,
        RW,
        CREDIT_UPDATE,
        CREDIT_REQUEST,
        0,
        99,
    ] {
        let packet = Packet::new(1, 81, op);
        guest.send(packet.clone());
        guest.expect(&packet, RST);
    }
    guest.send(Packet::new(1, 81, RST));
    // Another's address, another kind of socket, half a header.
    let mut bytes = Packet::new(1, 81, REQUEST).bytes();
    bytes[0] = 9;
    guest.send_bytes(&bytes);
    bytes[0] = GUEST as u8;
    guest.send_bytes(&bytes[..40]);
    guest.expect_nothing();
    bytes[28] = 2;
    guest.send_bytes(&bytes);
    guest.expect(&Packet::new(1, 81, 0), RST);
}

#[test]
fn a_guest_that_has_no_room_is_asked_and_gets_the_rest_later() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let (request, mut stream) = guest.connect(&listener, 80, 1000);
    let sent = noise(2500);
    stream.write_all(&sent).unwrap();
    let mut got = guest.expect(&request, RW).data;
    assert_eq!(got.len(), 1000);
    guest.expect(&request, CREDIT_REQUEST);
    guest.expect_nothing();
    let mut update = request.answer(CREDIT_UPDATE);
    (update.room, update.passed_on) = (1000, 400);
    guest.send(update.clone());
    got.extend(guest.expect(&request, RW).data);
    assert_eq!(got.len(), 1400);
    guest.expect(&request, CREDIT_REQUEST);
    (update.room, update.passed_on) = (5000, 1400);
    guest.send(update.clone());
    got.extend(guest.expect(&request, RW).data);
    assert_eq!(got, sent);
    // A guest that claims to have read what it never got.
    update.passed_on = u32::MAX;
    guest.send(update);
    stream.write_all(b"x").unwrap();
    assert!(guest.next().op != RST);
}

#[test]
fn a_host_that_does_not_read_holds_the_guest_up_and_no_more() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let (request, mut stream) = guest.connect(&listener, 80, BUFFER);
    let piece = noise(4096);
    // As an honest guest does: no more under way than there is room for.
    let (mut sent, mut passed_on) = (0u32, 0);
    loop {
        while sent - passed_on + 4096 <= BUFFER {
            guest.send(request.answer(RW).with(&piece));
            sent += 4096;
        }
        std::thread::sleep(Duration::from_millis(5));
        match guest.poll() {
            Some(packet) => {
                assert_eq!(packet.op, CREDIT_UPDATE);
                passed_on = packet.passed_on;
            }
            None => break,
        }
    }
    guest.send(request.answer(CREDIT_REQUEST));
    passed_on = guest.expect(&request, CREDIT_UPDATE).passed_on;
    assert!(sent - passed_on > BUFFER - 4096, "it is full");
    let end = sent + 40 * 4096;
    let reader = std::thread::spawn(move || {
        let all = read(&mut stream, end as usize);
        (all, stream)
    });
    while sent < end {
        if sent - passed_on + 4096 <= BUFFER {
            guest.send(request.answer(RW).with(&piece));
            sent += 4096;
        } else {
            let packet = guest.expect(&request, CREDIT_UPDATE);
            passed_on = packet.passed_on;
        }
    }
    let (all, _stream) = reader.join().unwrap();
    assert_eq!(all, piece.repeat(end as usize / 4096));
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_is_cut_off() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let (request, mut stream) = guest.connect(&listener, 80, BUFFER);
    let piece = noise(60_000);
    let mut n = 0;
    let reset = loop {
        guest.send(request.answer(RW).with(&piece));
        n += 1;
        assert!(n < 100, "nothing stops it");
        std::thread::sleep(Duration::from_millis(1));
        if let Some(packet) = guest.poll()
            && packet.op != CREDIT_UPDATE
        {
            break packet;
        }
    };
    assert_eq!(reset.op, RST);
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    assert!(all.len() < 60_000 * n);
    guest.send(request.answer(RW));
    while guest.next().op != RST {}
}

#[test]
fn half_closes_are_passed_on() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let (request, mut stream) = guest.connect(&listener, 80, BUFFER);
    // The host sends no more; the guest still does.
    stream.write_all(b"last").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(&request, RW).data, b"last");
    assert_eq!(guest.expect(&request, SHUTDOWN).flags, 2);
    guest.send(request.answer(RW).with(b"still here"));
    assert_eq!(read(&mut stream, 10), b"still here");
    // Then the guest is through, too.
    let mut shutdown = request.answer(SHUTDOWN);
    shutdown.flags = 3;
    guest.send(shutdown.clone());
    guest.expect(&request, RST);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);

    // The guest sends no more; the host still does.
    let (request, mut stream) = guest.connect(&listener, 80, BUFFER);
    shutdown.flags = 2;
    guest.send(request.answer(RW).with(b"question"));
    guest.send(shutdown.clone());
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"question");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(&request, RW).data, b"answer");
    drop(stream);
    // Its end, and that nothing can be sent either.
    while guest.expect(&request, SHUTDOWN).flags != 3 {}
    guest.send(request.answer(RST));

    // The guest receives no more.
    let (request, mut stream) = guest.connect(&listener, 80, BUFFER);
    shutdown.flags = 1;
    guest.send(shutdown);
    let end = Instant::now() + PATIENCE;
    while stream.write_all(b"x").is_ok() {
        assert!(Instant::now() < end, "nobody says that it is in vain");
    }
    guest.send(request.answer(RW).with(b"but listens"));
    assert_eq!(read(&mut stream, 11), b"but listens");
}

#[test]
fn a_host_that_closes_is_a_shutdown_both_ways() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let (request, mut stream) = guest.connect(&listener, 80, BUFFER);
    stream.write_all(b"bye").unwrap();
    drop(stream);
    assert_eq!(guest.expect(&request, RW).data, b"bye");
    while guest.expect(&request, SHUTDOWN).flags != 3 {}
    // What the guest sends meanwhile is lost, as on any network.
    guest.send(request.answer(RW).with(b"too late"));
    guest.send(request.answer(RST));
    guest.expect_nothing();
    let (_, _stream) = guest.connect(&listener, 80, BUFFER);
}

#[test]
fn a_reset_of_the_guest_ends_it_but_not_what_it_sent_in_order() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let (request, mut stream) = guest.connect(&listener, 80, BUFFER);
    guest.send(request.answer(RST));
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);

    let (request, mut stream) = guest.connect(&listener, 80, BUFFER);
    // More than the host's socket takes.
    let piece = noise(4096);
    let (mut sent, mut passed_on) = (0u32, 0);
    while sent - passed_on + 4096 <= BUFFER {
        guest.send(request.answer(RW).with(&piece));
        sent += 4096;
        std::thread::sleep(Duration::from_millis(1));
        while let Some(packet) = guest.poll() {
            passed_on = packet.passed_on;
        }
    }
    let mut shutdown = request.answer(SHUTDOWN);
    shutdown.flags = 3;
    guest.send(shutdown);
    // It waits for the answer, loses patience, and forgets.
    guest.send(request.answer(RST));
    guest.expect_nothing();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, piece.repeat(sent as usize / 4096));
    guest.expect_nothing();
}

#[test]
fn a_second_request_for_the_same_ports_is_a_mistake() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let (request, mut stream) = guest.connect(&listener, 80, BUFFER);
    guest.send(request.clone());
    guest.expect(&request, RST);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    let (_, _stream) = guest.connect(&listener, 80, BUFFER);
}

#[test]
fn connections_have_a_limit_and_give_their_places_back() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    let mut streams = Vec::new();
    let mut refused = 0;
    for n in 0..1100 {
        let request = Packet::new(n, 80, REQUEST);
        guest.send(request.clone());
        let answer = guest.next();
        match answer.op {
            RESPONSE => streams.push(listener.accept().unwrap().0),
            RST => refused += 1,
            other => panic!("{other}"),
        }
    }
    assert_eq!((streams.len(), refused), (1023, 77));
    guest.send(Packet::new(5, 80, RST));
    let request = Packet::new(5000, 80, REQUEST);
    guest.send(request.clone());
    guest.expect(&request, RESPONSE);
}

#[test]
fn a_guest_that_takes_no_answers_is_not_listened_to() {
    let mut guest = Guest::new();
    let mut queued = 0;
    // No buffers beyond the first: the refusals that fit, those that are owed, and then the ring.
    for n in 0..250u32 {
        let bytes = Packet::new(n, 81, REQUEST).bytes();
        let at = OUT + 64 * u64::from(n);
        guest.rig.ram.write_from_device(at, &bytes);
        guest.queues[1].submit(&guest.rig.ram, &[Piece::Out(at, 44)]);
        queued += 1;
    }
    guest.rig.notify(&guest.queues[1]);
    std::thread::sleep(Duration::from_millis(50));
    let mut taken = 0;
    while guest.queues[1].take(&guest.rig.ram).is_some() {
        taken += 1;
    }
    assert_eq!(taken, IN_COUNT + 64);
    for n in 0..queued {
        let packet = guest.next();
        assert_eq!((packet.guest, packet.op), (n, RST));
    }
}

#[test]
fn a_guest_that_asks_and_changes_its_mind_leaves_nothing_behind() {
    let mut guest = Guest::new();
    let listener = guest.listen(80);
    listener.set_nonblocking(true).unwrap();
    for n in 0..3000 {
        let request = Packet::new(n % 3, 80, REQUEST);
        guest.send(request.clone());
        guest.send(request.answer(RST));
        let _ = listener.accept();
    }
    // So many answers had a buffer; none waits for one.
    let mut answers = 0;
    std::thread::sleep(Duration::from_millis(20));
    while guest.poll().is_some() {
        answers += 1;
    }
    assert!(answers <= IN_COUNT, "{answers}");
    guest.expect_nothing();
    listener.set_nonblocking(false).unwrap();
    guest.connect(&listener, 80, BUFFER);
}

#[test]
fn a_restored_driver_is_told_that_its_connections_are_gone() {
    let mut old = Guest::new();
    let listener = old.listen(80);
    let (request, mut stream) = old.connect(&listener, 80, BUFFER);
    let state = serde_json::to_string(&old.rig.pci.save()).unwrap();
    // Who is only saved keeps them.
    old.send(request.answer(RW).with(b"on"));
    assert_eq!(read(&mut stream, 2), b"on");
    let mut new = Guest::new();
    assert!(new.rig.pci.restore(&serde_json::from_str(&state).unwrap()));
    new.queues = new.rig.start(EVENT_IDX, RINGS);
    new.queues[2].submit(&new.rig.ram, &[Piece::In(OUT, 8)]);
    new.rig.notify(&new.queues[2]);
    std::thread::sleep(Duration::from_millis(20));
    assert!(
        new.queues[2].take(&new.rig.ram).is_none(),
        "a reset is told by itself"
    );
    new.rig.ram.store(OUT, u64::MAX).unwrap();
    let mut state: doppel_virtio::PciState = serde_json::from_str(&state).unwrap();
    // The rings as they are here.
    state.frontend.queues = new.rig.pci.save().frontend.queues;
    assert!(new.rig.pci.restore(&state));
    assert_eq!(new.queues[2].wait(&new.rig.ram).map(|used| used.1), Some(4));
    assert_eq!(new.rig.ram.load::<u32>(OUT), Some(0));
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_a_reset_heals() {
    let mut guest = Guest::new();
    for broken in [0, 1] {
        guest.queues = guest.rig.start(0, RINGS);
        let piece = match broken {
            0 => Piece::In(IN, 44),
            _ => Piece::Out(1 << 40, 44),
        };
        guest.queues[broken].submit(&guest.rig.ram, &[piece]);
        guest.rig.notify(&guest.queues[broken]);
        // Something for the buffer that is too short. The other ring breaks without it, and it would be left for the device after the reset.
        let stream = (broken == 0).then(|| UnixStream::connect(&guest.path).unwrap());
        if let Some(mut stream) = stream.as_ref() {
            stream.write_all(b"CONNECT 1\n").unwrap();
        }
        let end = Instant::now() + PATIENCE;
        while guest.rig.status() & NEEDS_RESET == 0 {
            assert!(Instant::now() < end, "no wish for a reset");
            std::thread::yield_now();
        }
    }
    guest.queues = guest.rig.start(0, RINGS);
    guest.given = 0;
    guest.give_buffers(IN_COUNT);
    let listener = guest.listen(80);
    guest.connect(&listener, 80, BUFFER);
}

#[test]
fn a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let socket = VsockSocket::open(&path).unwrap();
    let taken = VsockSocket::open(&path).unwrap_err();
    assert_eq!(taken.kind(), ErrorKind::AddrInUse);
    drop(socket);
    assert!(!path.exists(), "it goes with its owner");
    std::fs::write(&path, "a file").unwrap();
    assert!(VsockSocket::open(&path).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
}
