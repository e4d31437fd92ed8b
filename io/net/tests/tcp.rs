//! TCP through the user network, between smoltcp as the guest and real servers on the loopback.

mod support;

use rustix::process::{Resource, getrlimit, setrlimit};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use doppel_net::{Forward, Transport, UserConfig};
use smoltcp::socket::tcp::State;
use support::{GATEWAY, Guest, OFFLOADS, exchange, pattern, server};

#[test]
fn data_goes_both_ways_and_each_side_ends_for_itself() {
    let data = pattern(3_000_000);
    for accepts in OFFLOADS {
        let echo = data.clone();
        let (to, server) = server(move |mut client| {
            let mut got = Vec::new();
            client.read_to_end(&mut got).unwrap();
            assert!(got == echo, "the guest's data arrived damaged");
            client.write_all(&got).unwrap();
        });
        let mut guest = Guest::new(&UserConfig::default(), accepts);
        let received = exchange(&mut guest, to, 40000, &data);
        server.join().unwrap();
        assert_eq!(received.len(), data.len());
        assert!(received == data, "the host's data arrived damaged");
        let whole = guest.cable.largest > 30_000;
        assert_eq!(whole, accepts.tcp4, "{}", guest.cable.largest);
    }
}

#[test]
fn lost_frames_are_sent_again() {
    // Few losses: smoltcp waits long for each of them.
    let data = pattern(60_000);
    let (to, server) = server(move |mut client| {
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        client.write_all(&got).unwrap();
    });
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[1]);
    guest.cable.loses_one_in = Some(23);
    let handle = guest.connect(to, 40000);
    guest.until("a connection", |g| g.tcp(handle).may_send().then_some(()));
    let (mut sent, mut received) = (0, Vec::new());
    guest.until("an exchange over a bad cable", |guest| {
        guest.exchange_some(handle, &data, &mut sent, &mut received);
        (received.len() == data.len()).then_some(())
    });
    server.join().unwrap();
    assert!(received == data);
}

#[test]
fn a_port_where_nobody_listens_refuses() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[0]);
    let start = Instant::now();
    let handle = guest.connect(SocketAddrV4::new(GATEWAY, port), 40000);
    let was_open = guest.until("a refusal", |guest| {
        let state = guest.tcp(handle).state();
        assert_ne!(state, State::Established, "accepted, then closed");
        (state == State::Closed).then_some(false)
    });
    assert!(!was_open && start.elapsed() < Duration::from_secs(1));
}

#[test]
fn a_host_that_breaks_off_resets_the_guest_and_the_other_way() {
    let (to, host) = server(|client| {
        let mut bytes = [0; 3];
        (&client).read_exact(&mut bytes).unwrap();
        // To close with unread data is to reset.
        thread::sleep(Duration::from_millis(50));
    });
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[0]);
    let handle = guest.connect(to, 40000);
    guest.until("data", |guest| {
        let socket = guest.tcp(handle);
        socket
            .can_send()
            .then(|| socket.send_slice(b"abcdef").unwrap())
    });
    guest.until("a reset", |guest| {
        (guest.tcp(handle).state() == State::Closed).then_some(())
    });
    host.join().unwrap();

    let (to, host) = server(|mut client| {
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes).unwrap_err().kind()
    });
    let handle = guest.connect(to, 40001);
    guest.until("a connection", |g| g.tcp(handle).may_send().then_some(()));
    guest.tcp(handle).abort();
    guest.until("the end", |_| host.is_finished().then_some(()));
    assert_eq!(host.join().unwrap(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_slow_reader_on_either_side_slows_the_other_down() {
    // The host does not read.
    let (to, host) = server(|client| {
        thread::sleep(Duration::from_millis(400));
        let mut all = Vec::new();
        (&client).read_to_end(&mut all).unwrap();
        all
    });
    let data = pattern(20_000_000);
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[0]);
    let handle = guest.connect(to, 40000);
    let mut sent = 0;
    let start = Instant::now();
    guest.until("all sent", |guest| {
        let socket = guest.tcp(handle);
        while socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        if start.elapsed() < Duration::from_millis(300) {
            assert!(sent < 12_000_000, "nobody slows the guest down: {sent}");
        }
        (sent == data.len()).then(|| socket.close())
    });
    guest.until("all read", |_| host.is_finished().then_some(()));
    assert!(host.join().unwrap() == data);

    // The guest does not read.
    let copy = data.clone();
    let (to, host) = server(move |mut client| {
        let start = Instant::now();
        client.write_all(&copy).unwrap();
        start.elapsed()
    });
    let handle = guest.connect(to, 40001);
    let start = Instant::now();
    let mut received = Vec::new();
    guest.until("all read", |guest| {
        if start.elapsed() < Duration::from_millis(300) {
            return None;
        }
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            let take = |bytes: &mut [u8]| {
                received.extend_from_slice(bytes);
                (bytes.len(), ())
            };
            socket.recv(take).unwrap();
        }
        (received.len() == data.len()).then_some(())
    });
    assert!(received == data);
    assert!(host.join().unwrap() > Duration::from_millis(200));
}

#[test]
fn thousands_of_short_connections_leave_nothing_behind() {
    // As the monitor does at its start.
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = SocketAddrV4::new(GATEWAY, listener.local_addr().unwrap().port());
    const COUNT: u16 = 3000;
    let host = thread::spawn(move || {
        for _ in 0..COUNT {
            let (mut client, _) = listener.accept().unwrap();
            let mut bytes = Vec::new();
            client.read_to_end(&mut bytes).unwrap();
            client.write_all(&bytes).unwrap();
        }
    });
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[0]);
    let before = descriptors();
    for n in 0..COUNT {
        assert_eq!(exchange(&mut guest, to, 10000 + n, b"hello"), b"hello");
    }
    host.join().unwrap();
    // Of the last ones the guest forgot to acknowledge the end. Other tests of this process open a few files too.
    guest.until("the end of the last ones", |_| {
        (descriptors() < before + 50).then_some(())
    });
}

#[test]
fn a_forwarded_port_leads_into_the_guest() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let host: SocketAddr = free.local_addr().unwrap();
    drop(free);
    let guest_port = SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 15), 22);
    let config = UserConfig {
        forwards: vec![Forward {
            transport: Transport::Tcp,
            host,
            guest: guest_port,
        }],
        restrict: true,
        ..UserConfig::default()
    };
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let taken = doppel_net::UserNetwork::new(
        &config,
        support::MAC,
        std::sync::Arc::new(doppel_device::HostClock::new()),
    );
    let message = taken.err().unwrap().to_string();
    assert!(message.contains("taken"), "{message}");

    let data = pattern(1_000_000);
    let copy = data.clone();
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(host).unwrap();
        stream.write_all(&copy).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        got
    });
    let handle = guest.stream(256 << 10);
    guest.tcp(handle).listen(22).unwrap();
    let mut received = Vec::new();
    guest.until("the client's data", |guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            let take = |bytes: &mut [u8]| {
                received.extend_from_slice(bytes);
                (bytes.len(), ())
            };
            socket.recv(take).unwrap();
        }
        (socket.state() == State::CloseWait).then_some(())
    });
    assert!(received == data);
    let from = guest.tcp(handle).remote_endpoint().unwrap();
    assert_eq!(from.addr.to_string(), "10.0.2.2");
    guest.tcp(handle).send_slice(b"thanks").unwrap();
    guest.tcp(handle).close();
    guest.until("the answer", |_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap(), b"thanks");

    // Nobody listens in the guest any more: the client is reset.
    let client = thread::spawn(move || {
        let mut stream = TcpStream::connect(host).unwrap();
        stream.read(&mut [0]).unwrap_err().kind()
    });
    guest.until("a refusal", |_| client.is_finished().then_some(()));
    assert_eq!(client.join().unwrap(), std::io::ErrorKind::ConnectionReset);
}
