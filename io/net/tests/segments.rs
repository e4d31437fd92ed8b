//! TCP segment by segment: a guest that does what smoltcp would not, at a clock that a test moves.

mod support;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppel_device::{FakeClock, NANOS_PER_SECOND};
use doppel_net::{Accepts, GUEST, Link, Offload, Received, Transport, UserConfig, UserNetwork};
use rustix::net::{AddressFamily, SendFlags, SocketType, sockopt};
use smoltcp::wire::{IpProtocol, TcpPacket};
use support::{GATEWAY, LIMIT, MAC};

const FIN: u8 = 1;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
/// The guest's first sequence number.
const FIRST: u32 = 1000;
const PLENTY: u16 = 0xffff;

/// A segment for the guest.
#[derive(Clone, Debug)]
struct Segment {
    sequence: u32,
    acknowledged: u32,
    flags: u8,
    window: u16,
    data: Vec<u8>,
}

impl Segment {
    fn of_frame(frame: &[u8]) -> Segment {
        let packet = TcpPacket::new_checked(&frame[34..]).unwrap();
        Segment {
            sequence: packet.seq_number().0 as u32,
            acknowledged: packet.ack_number().0 as u32,
            flags: frame[34 + 13] & 0x3f,
            window: packet.window_len(),
            data: packet.payload().to_vec(),
        }
    }

    fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }
}

/// A guest's end of one connection.
struct Wire {
    network: UserNetwork,
    clock: Arc<FakeClock>,
    ports: (u16, u16),
    /// What the guest sends next, and what it has acknowledged.
    next: u32,
    acknowledged: u32,
}

impl Wire {
    fn to(port: u16) -> Wire {
        Wire::with(&UserConfig::default(), port)
    }

    fn with(config: &UserConfig, port: u16) -> Wire {
        let clock = Arc::new(FakeClock::new(Duration::ZERO));
        let mut network = UserNetwork::new(config, MAC, clock.clone()).unwrap();
        network.guest_accepts(Accepts::ALL);
        Wire {
            network,
            clock,
            ports: (40000, port),
            next: FIRST,
            acknowledged: 0,
        }
    }

    /// A connection whose handshake is done.
    fn connected(port: u16, window: u16) -> Wire {
        let mut wire = Wire::to(port);
        wire.syn();
        wire.wait();
        let answer = wire.pull().remove(0);
        assert_eq!(answer.flags, SYN | ACK);
        wire.acknowledged = answer.sequence.wrapping_add(1);
        wire.send(ACK, window, b"");
        wire
    }

    fn syn(&mut self) {
        self.next = FIRST;
        self.send(SYN, PLENTY, b"");
        self.next += 1;
    }

    fn send(&mut self, flags: u8, window: u16, data: &[u8]) {
        self.send_with(&[], flags, window, data);
    }

    fn send_with(&mut self, options: &[u8], flags: u8, window: u16, data: &[u8]) {
        let mut tcp = [&[0; 20], options].concat();
        tcp[..2].copy_from_slice(&self.ports.0.to_be_bytes());
        tcp[2..4].copy_from_slice(&self.ports.1.to_be_bytes());
        tcp[4..8].copy_from_slice(&self.next.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.acknowledged.to_be_bytes());
        (tcp[12], tcp[13]) = ((tcp.len() as u8 / 4) << 4, flags);
        tcp[14..16].copy_from_slice(&window.to_be_bytes());
        tcp.extend_from_slice(data);
        self.next += data.len() as u32;
        let frame = support::ip_frame(IpProtocol::Tcp, GATEWAY, &tcp, 0, false);
        self.network.send(Offload::default(), &frame);
    }

    /// Waits until there is something to pull.
    #[track_caller]
    fn wait(&mut self) {
        let start = Instant::now();
        while !self.network.has_frames() {
            assert!(start.elapsed() < LIMIT, "nothing comes");
            std::thread::sleep(Duration::from_micros(50));
            self.network.service();
        }
    }

    /// The next frame.
    fn pull_one(&mut self) -> Option<Segment> {
        let mut segment = None;
        let mut sink = |_, parts: &[&[u8]]| segment = Some(Segment::of_frame(&parts.concat()));
        match self.network.receive(65553, &mut sink) {
            Received::Frame => segment,
            other => {
                assert_eq!(other, Received::Nothing);
                None
            }
        }
    }

    /// All that comes now.
    fn pull(&mut self) -> Vec<Segment> {
        std::iter::from_fn(|| self.pull_one()).collect()
    }

    /// Takes and acknowledges data until `done`; says what came.
    #[track_caller]
    fn read(&mut self, done: impl Fn(&[u8]) -> bool) -> Vec<u8> {
        let (start, mut data) = (Instant::now(), Vec::new());
        while !done(&data) {
            assert!(start.elapsed() < LIMIT, "only {} bytes come", data.len());
            self.network.service();
            for segment in self.pull() {
                assert_eq!(segment.flags & !(ACK | 8), 0, "after {} bytes", data.len());
                data.extend_from_slice(&segment.data);
                self.acknowledged = segment.sequence.wrapping_add(segment.data.len() as u32);
            }
            self.send(ACK, PLENTY, b"");
        }
        data
    }
}

fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

fn connected(window: u16) -> (Wire, TcpStream) {
    let (listener, port) = listener();
    let wire = Wire::connected(port, window);
    (wire, listener.accept().unwrap().0)
}

#[test]
fn urgent_data_stays_where_it_is_in_the_stream() {
    let (mut wire, mut host) = connected(PLENTY);
    host.write_all(b"ab").unwrap();
    rustix::net::send(&host, b"c", SendFlags::OOB).unwrap();
    host.write_all(b"d").unwrap();
    let data = wire.read(|data| data.len() >= 4);
    assert_eq!(data, b"abcd");
}

#[test]
fn what_a_host_sent_before_it_broke_off_arrives_though_it_takes_no_more() {
    let (mut wire, mut host) = connected(PLENTY);
    wire.send(ACK, PLENTY, b"a question");
    host.read_exact(&mut [0; 3]).unwrap();
    host.write_all(&[7; 1000]).unwrap();
    // To close with unread data is to reset.
    drop(host);
    wire.send(ACK, PLENTY, b"another one");
    let (start, mut data) = (Instant::now(), Vec::new());
    loop {
        assert!(start.elapsed() < LIMIT, "no reset");
        wire.network.service();
        for segment in wire.pull() {
            data.extend_from_slice(&segment.data);
            if segment.has(RST) {
                return assert_eq!(data, [7; 1000]);
            }
        }
    }
}

#[test]
fn a_guest_that_answers_probes_of_its_closed_window_is_not_given_up() {
    let (mut wire, mut host) = connected(1000);
    // So that what it takes at once are two segments.
    wire.network.guest_accepts(Accepts::default());
    host.write_all(&[7; 1000]).unwrap();
    wire.wait();
    let first = wire.pull_one().unwrap();
    let taken = first.data.len();
    assert!((1..1000).contains(&taken), "{taken}");
    wire.acknowledged = first.sequence.wrapping_add(taken as u32);
    wire.send(ACK, 0, b"");
    assert!(wire.pull().iter().all(|segment| segment.data.is_empty()));
    for n in 0..40 {
        wire.clock.advance(31 * NANOS_PER_SECOND);
        wire.network.service();
        let probes = wire.pull();
        assert!(!probes.is_empty(), "no probe after {n}");
        assert!(probes.iter().all(|p| p.flags == ACK), "{n}: {probes:?}");
        wire.send(ACK, 0, b"");
    }
    wire.send(ACK, PLENTY, b"");
    assert_eq!(
        wire.read(|data| data.len() >= 1000 - taken).len(),
        1000 - taken
    );
}

#[test]
fn a_call_that_is_repeated_and_then_answered_is_not_answered_again() {
    let (_listener, port) = listener();
    let mut wire = Wire::to(port);
    wire.syn();
    wire.wait();
    let answer = wire.pull().remove(0);
    wire.syn();
    wire.acknowledged = answer.sequence.wrapping_add(1);
    wire.send(ACK, PLENTY, b"");
    let after = wire.pull();
    assert!(after.iter().all(|segment| !segment.has(SYN)), "{after:?}");
}

#[test]
fn flows_that_have_ended_leave_nothing_to_look_for() {
    let (_listener, port) = listener();
    let config = UserConfig {
        connections: 256,
        sessions: 1,
        ..UserConfig::default()
    };
    let mut wire = Wire::with(&config, port);
    for n in 0..100 {
        wire.ports.0 = 10_000 + n;
        wire.syn();
        wire.wait();
        wire.send(RST, 0, b"");
        assert_eq!(wire.network.usage().0, 0);
        assert!(!wire.network.has_frames(), "after {n} connections");
    }
    let host = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = host.local_addr().unwrap().port();
    for n in 0..100u16 {
        send_datagram(&mut wire.network, 2 * n, port);
        let (_, from) = host.recv_from(&mut [0; 8]).unwrap();
        host.send_to(b"answer", from).unwrap();
        wire.wait();
        send_datagram(&mut wire.network, 2 * n + 1, port);
        host.recv_from(&mut [0; 8]).unwrap();
        assert!(!wire.network.has_frames(), "after {n} sessions");
    }
}

fn send_datagram(network: &mut UserNetwork, n: u16, port: u16) {
    let mut udp = vec![0; 8];
    udp[..2].copy_from_slice(&(10_000 + n).to_be_bytes());
    udp[2..4].copy_from_slice(&port.to_be_bytes());
    udp[5] = 12;
    udp.extend_from_slice(b"data");
    let frame = support::ip_frame(IpProtocol::Udp, GATEWAY, &udp, 0, false);
    network.send(Offload::default(), &frame);
}

/// A device whose buffers are too small for anything throws away what there is, and is done.
#[test]
fn what_a_connection_has_for_a_guest_without_room_can_be_thrown_away() {
    let (_listener, port) = listener();
    let mut wire = Wire::to(port);
    wire.syn();
    wire.wait();
    let too_long = wire.network.receive(28, &mut |_, _| panic!("no room"));
    assert!(matches!(too_long, Received::TooLong(29..)), "{too_long:?}");
    wire.network.discard();
    assert!(!wire.network.has_frames());
    // It is lost as a network loses frames.
    wire.clock.advance(NANOS_PER_SECOND);
    wire.network.service();
    assert_eq!(wire.pull().remove(0).flags, SYN | ACK);
}

/// What the host sent is still in its socket, for the guest has no room: its announcement of some may be lost.
#[test]
fn a_closed_window_is_probed_for_what_the_host_has_sent() {
    let (mut wire, mut host) = connected(1000);
    host.write_all(&[7; 3000]).unwrap();
    wire.wait();
    let taken: usize = wire.pull().iter().map(|segment| segment.data.len()).sum();
    assert_eq!(taken, 1000);
    wire.acknowledged = wire.acknowledged.wrapping_add(1000);
    wire.send(ACK, 0, b"");
    assert!(wire.pull().is_empty());
    for n in 0..20 {
        wire.clock.advance(31 * NANOS_PER_SECOND);
        wire.network.service();
        let probes = wire.pull();
        assert_eq!(probes.len(), 1, "{n}");
        wire.send(ACK, 0, b"");
    }
    wire.send(ACK, PLENTY, b"");
    assert_eq!(wire.read(|data| data.len() >= 2000), [7; 2000]);
}

#[test]
fn a_reset_behind_the_hosts_end_is_passed_on() {
    let (mut wire, host) = connected(PLENTY);
    wire.send(ACK, PLENTY, b"what nobody reads");
    host.shutdown(Shutdown::Write).unwrap();
    let (start, mut ended) = (Instant::now(), false);
    while !ended {
        assert!(start.elapsed() < LIMIT, "no end");
        wire.network.service();
        ended = wire.pull().iter().any(|segment| segment.has(FIN));
    }
    wire.acknowledged = wire.acknowledged.wrapping_add(1);
    wire.send(ACK, PLENTY, b"");
    wire.pull();
    drop(host);
    wire.wait();
    assert!(wire.pull().iter().any(|segment| segment.has(RST)));
}

/// A guest that was slow once has what is sent again twice, and says so.
#[test]
fn what_was_sent_twice_for_once_does_not_lead_to_all_being_sent_twice() {
    const TOTAL: usize = 1_000_000;
    let (mut wire, mut host) = connected(PLENTY);
    wire.network.guest_accepts(Accepts::default());
    let host = std::thread::spawn(move || host.write_all(&[7; TOTAL]));
    wire.wait();
    let mut under_way = VecDeque::from([wire.pull()]);
    wire.clock.advance(NANOS_PER_SECOND);
    wire.network.service();
    under_way.push_back(wire.pull());
    let (start, mut sent, mut got) = (Instant::now(), 0, 0);
    while got < TOTAL {
        assert!(start.elapsed() < LIMIT, "only {got} bytes come");
        for segment in under_way.pop_front().unwrap_or_default() {
            sent += segment.data.len();
            if segment.sequence == wire.acknowledged {
                got += segment.data.len();
                wire.acknowledged = segment.sequence.wrapping_add(segment.data.len() as u32);
            }
            wire.send(ACK, PLENTY, b"");
        }
        wire.network.service();
        under_way.push_back(wire.pull());
    }
    host.join().unwrap().unwrap();
    assert!(sent < TOTAL + 200_000, "{sent} bytes for {TOTAL}");
}

/// A guest whose port 22 is forwarded, and where on the host.
fn forwarded() -> (Wire, SocketAddr) {
    forwarded_with(UserConfig::default())
}

fn forwarded_with(config: UserConfig) -> (Wire, SocketAddr) {
    let (free, _) = listener();
    let host = free.local_addr().unwrap();
    drop(free);
    let config = UserConfig {
        forwards: support::forwarded(Transport::Tcp, host, 22),
        ..config
    };
    (Wire::with(&config, 0), host)
}

/// As from a connection of earlier, of which the guest waits for late segments.
#[test]
fn a_guest_that_takes_a_call_for_an_old_connection_is_reset_and_called_again() {
    let (mut wire, host) = forwarded();
    let client = TcpStream::connect(host).unwrap();
    wire.ports = (22, client.local_addr().unwrap().port());
    wire.wait();
    let call = wire.pull().remove(0);
    assert_eq!(call.flags, SYN);
    wire.acknowledged = call.sequence.wrapping_sub(5000);
    wire.send(ACK, PLENTY, b"");
    let reset = wire.pull().remove(0);
    assert_eq!((reset.flags, reset.sequence), (RST, wire.acknowledged));
    wire.clock.advance(NANOS_PER_SECOND);
    wire.network.service();
    let again = wire.pull().remove(0);
    assert_eq!((again.flags, again.sequence), (SYN, call.sequence));
    wire.acknowledged = call.sequence.wrapping_add(1);
    wire.send(SYN | ACK, PLENTY, b"");
    let answer = wire.pull().remove(0);
    assert_eq!(
        (answer.flags, answer.acknowledged),
        (ACK, wire.next.wrapping_add(1))
    );
}

/// So that a guest that waits for late segments of an old one tells them apart (RFC 9293, 3.4.1).
#[test]
fn the_numbers_of_a_new_connection_are_beyond_those_of_the_last_between_the_same_ports() {
    let (mut wire, host) = forwarded();
    let mut last = None;
    for n in 0..10 {
        let client = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        sockopt::set_socket_reuseaddr(&client, true).unwrap();
        let address = SocketAddrV4::new([127, 0, 0, 1].into(), wire.ports.1);
        rustix::net::bind(&client, &address).unwrap();
        rustix::net::connect(&client, &host).unwrap();
        let client = TcpStream::from(client);
        wire.ports = (22, client.local_addr().unwrap().port());
        wire.wait();
        let first = wire.pull().remove(0).sequence;
        let beyond = last.is_none_or(|last: u32| (first.wrapping_sub(last) as i32) > 0);
        assert!(beyond, "call {n}: {first} after {last:?}");
        last = Some(first);
        wire.acknowledged = first.wrapping_add(1);
        wire.send(RST | ACK, 0, b"");
        assert!((&client).read(&mut [0]).is_err());
        wire.clock.advance(NANOS_PER_SECOND);
    }
}

/// A driver that follows another, as an operating system's follows its loader's.
#[test]
fn what_waits_is_finished_for_a_guest_that_takes_less_than_before() {
    let (free, port) = listener();
    drop(free);
    let mut wire = Wire::to(port);
    wire.send(ACK, PLENTY, b"of a connection that there is not");
    wire.network.guest_accepts(Accepts::default());
    let mut frames = Vec::new();
    let mut sink = |offload, parts: &[&[u8]]| frames.push((offload, parts.concat()));
    assert_eq!(wire.network.receive(65553, &mut sink), Received::Frame);
    let (offload, frame) = frames.remove(0);
    assert_eq!(offload, Offload::default());
    let packet = TcpPacket::new_checked(&frame[34..]).unwrap();
    assert!(packet.verify_checksum(&GATEWAY.into(), &GUEST.into()));
}

/// As little as each gets when all together keep much. What comes on top is sent again too late.
#[test]
fn no_more_is_asked_for_than_is_taken_when_memory_is_scarce() {
    let (listener, port) = listener();
    let mut wire = Wire::to(port);
    // Of these the guest acknowledges nothing.
    let mut hosts = Vec::new();
    for n in 0.. {
        if wire.network.usage().2 > 32 << 20 {
            break;
        }
        assert!(n < 60);
        wire.ports.0 = 10_000 + n;
        wire.next = FIRST;
        wire.send_with(&[1, 3, 3, 7], SYN, PLENTY, b"");
        wire.next += 1;
        wire.wait();
        let answer = wire.pull().remove(0);
        wire.acknowledged = answer.sequence.wrapping_add(1);
        wire.send(ACK, PLENTY, b"");
        let (mut host, _) = listener.accept().unwrap();
        hosts.push(std::thread::spawn(move || {
            let _ = host.write_all(&[7; 3 << 20]);
        }));
        let (start, mut got) = (Instant::now(), 0);
        while got < 1 << 20 && wire.network.usage().2 <= 32 << 20 {
            assert!(start.elapsed() < LIMIT, "only {got} bytes come");
            wire.network.service();
            got += wire.pull().iter().map(|s| s.data.len()).sum::<usize>();
        }
    }
    wire.ports.0 = 20_000;
    wire.syn();
    wire.wait();
    let mut answer = wire.pull().remove(0);
    wire.acknowledged = answer.sequence.wrapping_add(1);
    wire.send(ACK, PLENTY, b"");
    let (_slow, _) = listener.accept().unwrap();
    let mut sent = 0;
    while answer.window > 0 {
        assert!(sent < 100 << 20, "nothing stops the guest");
        let data = vec![7; usize::from(answer.window).min(60_000)];
        wire.send(ACK, PLENTY, &data);
        sent += data.len();
        wire.network.service();
        answer = wire.pull().pop().unwrap();
        assert_eq!(answer.acknowledged, wire.next, "after {sent} bytes");
    }
    drop(wire);
    for host in hosts {
        host.join().unwrap();
    }
}

/// The segment by which the guest hears of a client, which the host may take its time to tell of.
fn called(wire: &mut Wire) -> Segment {
    let start = Instant::now();
    loop {
        wire.network.service();
        if let Some(call) = wire.pull().into_iter().find(|s| s.flags == SYN) {
            return call;
        }
        assert!(start.elapsed() < LIMIT, "no client is heard of");
    }
}

#[test]
fn clients_of_a_forwarded_port_leave_the_guest_connections_of_its_own() {
    // Few enough for a user who may have 1,024 descriptors.
    let (mut wire, host) = forwarded_with(UserConfig {
        connections: 8,
        sessions: 8,
        ..UserConfig::default()
    });
    let mut clients = Vec::new();
    for n in 0..20 {
        let client = TcpStream::connect(host).unwrap();
        wire.ports = (22, client.local_addr().unwrap().port());
        clients.push(client);
        if n < 6 {
            let call = called(&mut wire);
            wire.acknowledged = call.sequence.wrapping_add(1);
            wire.send(SYN | ACK, PLENTY, b"");
        }
        wire.network.service();
        wire.pull();
    }
    assert_eq!(wire.network.usage().0, 6);
    let (_listener, port) = listener();
    wire.ports = (40_000, port);
    wire.syn();
    wire.wait();
    assert_eq!(wire.pull().remove(0).flags, SYN | ACK);
}

/// Opens a connection to each of the ports of the guest, and says what was answered.
fn open(wire: &mut Wire, ports: std::ops::Range<u16>) -> Vec<u8> {
    let mut answers = Vec::new();
    for port in ports {
        wire.ports.0 = port;
        wire.acknowledged = 0;
        wire.syn();
        wire.wait();
        let answer = wire.pull().remove(0);
        wire.acknowledged = answer.sequence.wrapping_add(1);
        if answer.flags == SYN | ACK {
            wire.send(ACK, PLENTY, b"");
        }
        answers.push(answer.flags);
    }
    answers
}

#[test]
fn connections_that_both_sides_have_ended_make_room_for_new_ones() {
    const MOST: u16 = 4;
    let (listener, port) = listener();
    let config = UserConfig {
        connections: MOST.into(),
        sessions: 4,
        ..UserConfig::default()
    };
    let mut wire = Wire::with(&config, port);
    assert_eq!(
        open(&mut wire, 10_001..10_001 + MOST),
        [SYN | ACK; MOST as usize]
    );
    let refused = open(&mut wire, 20_000..20_001)[0];
    assert_eq!(refused & (SYN | RST), RST, "all of them live");

    // The last one is ended by the host and by the guest, which does not hear of the first.
    let hosts: Vec<_> = (0..MOST).map(|_| listener.accept().unwrap().0).collect();
    wire.ports.0 = 10_000 + MOST;
    hosts[usize::from(MOST) - 1]
        .shutdown(Shutdown::Write)
        .unwrap();
    wire.wait();
    let end = wire.pull().remove(0);
    assert!(end.has(FIN), "{end:?}");
    wire.next = FIRST + 1;
    wire.acknowledged = end.sequence;
    wire.send(FIN | ACK, PLENTY, b"");
    wire.pull();
    assert_eq!(wire.network.usage().0, MOST.into());

    assert_eq!(open(&mut wire, 20_000..20_001), [SYN | ACK]);
    assert_eq!(wire.network.usage().0, MOST.into());
    assert_eq!(open(&mut wire, 20_001..20_002)[0] & (SYN | RST), RST);
}
