//! A network in another process: here the test's own program, which serves one when it is told to.

mod support;

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use doppel_device::{HostClock, Nanos};
use doppel_net::{Accepts, Link, NetConfig, Offload, Received, RemoteLink, Sent, Sink, serve};
use rustix::event::epoll;
use smoltcp::socket::tcp::State;
use support::{GATEWAY, Guest, MAC, OFFLOADS, exchange, pattern, server};

const NETWORK: &str = "DOPPEL_TEST_NETWORK";
const ECHO: &str = "echo";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);

/// Not a test, but the other process.
#[test]
fn the_other_process() {
    let Ok(network) = std::env::var(NETWORK) else {
        return;
    };
    let socket = io::stdin().as_fd().try_clone_to_owned().unwrap();
    let clock = Arc::new(HostClock::new());
    serve(socket, &*clock.clone(), || match network.as_str() {
        ECHO => Ok((Box::new(Echo::new()) as Box<dyn Link>, MAC)),
        network => {
            let config: NetConfig = network.parse().unwrap();
            config.open(0, clock)
        }
    })
    .unwrap();
    std::process::exit(0);
}

/// A network that gives every frame back. It has room for a hundred.
struct Echo {
    frames: VecDeque<(Offload, Vec<u8>)>,
    refused: bool,
    nothing: OwnedFd,
}

impl Echo {
    fn new() -> Self {
        Echo {
            frames: VecDeque::new(),
            refused: false,
            nothing: epoll::create(epoll::CreateFlags::CLOEXEC).unwrap(),
        }
    }
}

impl Link for Echo {
    fn accepts(&self) -> Accepts {
        Accepts::ALL
    }
    fn guest_accepts(&mut self, _: Accepts) {}
    fn send(&mut self, offload: Offload, frame: &[u8]) -> Sent {
        if self.frames.len() == 100 {
            self.refused = true;
            return Sent::Full;
        }
        self.frames.push_back((offload, frame.to_vec()));
        Sent::Taken
    }
    fn receive(&mut self, _: usize, sink: Sink) -> Received {
        match self.frames.pop_front() {
            Some((offload, frame)) => {
                sink(offload, &[&frame]);
                Received::Frame
            }
            None => Received::Nothing,
        }
    }
    fn discard(&mut self) {}
    fn has_frames(&self) -> bool {
        !self.frames.is_empty()
    }
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.nothing.as_fd()
    }
    fn deadline(&self) -> Option<Nanos> {
        // Room comes by itself.
        self.refused.then_some(0)
    }
    fn service(&mut self) -> bool {
        let offer_again = self.refused && self.frames.len() < 100;
        self.refused &= !offer_again;
        offer_again
    }
}

/// A network in a process, and who that is by now.
#[derive(Clone, Default)]
struct Rig {
    process: Arc<AtomicU32>,
    starts: Arc<AtomicU32>,
    /// No process can be started.
    out_of_order: Arc<AtomicBool>,
}

impl Rig {
    fn link(&self, network: &str) -> io::Result<(RemoteLink, [u8; 6])> {
        let (rig, network) = (self.clone(), network.to_owned());
        let start = move |socket: OwnedFd| -> io::Result<Child> {
            if rig.out_of_order.load(Ordering::SeqCst) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let child = Command::new(std::env::current_exe()?)
                .args(["--exact", "the_other_process", "--nocapture"])
                .env(NETWORK, &network)
                .stdin(Stdio::from(socket))
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            rig.process.store(child.id(), Ordering::SeqCst);
            rig.starts.fetch_add(1, Ordering::SeqCst);
            Ok(child)
        };
        RemoteLink::new(Box::new(start), true, Arc::new(HostClock::new()))
    }

    fn guest(&self, network: &str, accepts: Accepts) -> Guest {
        let (link, mac) = self.link(network).unwrap();
        assert_eq!(mac, MAC);
        Guest::on(Box::new(link), accepts, mac, GUEST)
    }

    fn signal(&self, signal: &str) {
        let pid = self.process.load(Ordering::SeqCst).to_string();
        let _ = Command::new("kill")
            .args([signal, &pid])
            .stderr(Stdio::null())
            .status();
    }

    /// Kills the process, and waits until there is another.
    fn kill(&self) {
        let starts = self.starts.load(Ordering::SeqCst);
        self.signal("-9");
        while self.starts.load(Ordering::SeqCst) == starts {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

#[test]
fn a_guest_reaches_the_host_through_another_process() {
    let data = pattern(3_000_000);
    for accepts in OFFLOADS {
        let (to, server) = server(|mut client| {
            let mut got = Vec::new();
            client.read_to_end(&mut got).unwrap();
            client.write_all(&got).unwrap();
        });
        let mut guest = Rig::default().guest("user", accepts);
        let received = exchange(&mut guest, to, 40000, &data);
        server.join().unwrap();
        assert!(received == data, "{} bytes", received.len());
        assert_eq!(guest.cable.largest > 30_000, accepts.tcp4);
    }
}

/// A server that says what it got, if the client ended, and counts those that did and those that broke off.
fn counting_server() -> (u16, Arc<[AtomicUsize; 2]>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let counts = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let counted = counts.clone();
    let expected = pattern(200_000);
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut got = Vec::new();
            let ended = client.read_to_end(&mut got);
            // Who has the end has all: what a killed process leaves is no end.
            assert!(ended.is_err() || got == expected, "{} bytes", got.len());
            let _ = client.write_all(&got);
            counted[usize::from(ended.is_err())].fetch_add(1, Ordering::SeqCst);
        }
    });
    (port, counts)
}

/// How long one waits before one calls again.
const CALL: Duration = Duration::from_millis(300);

/// One exchange with the server; what came back, if it came to its end.
fn attempt(guest: &mut Guest, to: SocketAddrV4, port: u16, data: &[u8]) -> Option<Vec<u8>> {
    let handle = guest.connect(to, port);
    let (mut sent, mut received, mut ended) = (0, Vec::new(), false);
    let called = Instant::now();
    let whole = guest.until("an exchange, or its end", |guest| {
        guest.exchange_some(handle, data, &mut sent, &mut received);
        let socket = guest.tcp(handle);
        ended |= socket.state() == State::TimeWait;
        // A call that a process took with it is made again after seconds.
        let unheard = socket.state() == State::SynSent && called.elapsed() > CALL;
        (ended || unheard || socket.state() == State::Closed).then_some(ended)
    });
    guest.sockets.remove(handle);
    whole.then_some(received)
}

#[test]
fn a_network_whose_process_is_killed_over_and_over_damages_nothing() {
    const KILLS: u32 = 40;
    let rig = Rig::default();
    let mut guest = rig.guest("user", Accepts::ALL);
    let (port, counts) = counting_server();
    let to = SocketAddrV4::new(GATEWAY, port);
    let data = pattern(200_000);
    let over = AtomicBool::new(false);
    let (mut whole, mut broken) = (0, 0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for n in 0..KILLS {
                thread::sleep(Duration::from_millis(u64::from(n * 137 % 350) + 3));
                rig.kill();
            }
            over.store(true, Ordering::SeqCst);
        });
        let mut port = 20000;
        while !over.load(Ordering::SeqCst) {
            port += 1;
            match attempt(&mut guest, to, port, &data) {
                Some(back) => {
                    assert!(back == data, "{} bytes", back.len());
                    whole += 1;
                }
                None => broken += 1,
            }
        }
        let last = (1..20).find_map(|n| attempt(&mut guest, to, port + n, &data));
        assert!(last.is_some_and(|back| back == data), "after it all");
    });
    println!("{whole} exchanges, {broken} broken off, the server's: {counts:?}");
    assert!(rig.starts.load(Ordering::SeqCst) > KILLS);
    assert!(whole > 0 && broken > 0, "{whole} {broken}");
}

#[test]
fn a_guest_that_only_reads_hears_that_its_connection_is_gone() {
    let (to, server) = server(|mut client| {
        client.write_all(b"wait").unwrap();
        let ended = client.read(&mut [0; 8]);
        assert!(ended.is_err(), "{ended:?}: an end is not what it is");
    });
    let rig = Rig::default();
    let mut guest = rig.guest("user", Accepts::ALL);
    let handle = guest.connect(to, 40000);
    guest.until("a greeting", |guest| {
        (guest.tcp(handle).recv_queue() == 4).then_some(())
    });
    rig.kill();
    guest.until("a reset", |guest| {
        (guest.tcp(handle).state() == State::Closed).then_some(())
    });
    server.join().unwrap();
}

#[test]
fn a_forwarded_port_works_again_and_a_guest_need_not_say_that_it_is_there() {
    let port = free_port();
    let rig = Rig::default();
    let network = format!("user,hostfwd=tcp::{port}-:80");
    let mut guest = rig.guest(&network, Accepts::ALL);
    for round in 0..3 {
        let handle = guest.stream(4096);
        guest.tcp(handle).listen(80).unwrap();
        let client = thread::spawn(move || {
            let end = Instant::now() + support::LIMIT;
            loop {
                let mut answer = Vec::new();
                let client = TcpStream::connect((Ipv4Addr::LOCALHOST, port));
                let read = client.and_then(|mut client| client.read_to_end(&mut answer));
                if read.is_ok() && answer == b"hello" {
                    return;
                }
                assert!(Instant::now() < end, "{read:?}");
                thread::sleep(Duration::from_millis(5));
            }
        });
        guest.until("a client", |guest| {
            let socket = guest.tcp(handle);
            match socket.state() {
                // The call of a process that is gone.
                State::Closed if !client.is_finished() => socket.listen(80).unwrap(),
                _ if socket.may_send() && socket.send_queue() == 0 => {
                    let _ = socket.send_slice(b"hello");
                    socket.close();
                }
                _ => {}
            }
            client.is_finished().then_some(())
        });
        client.join().unwrap();
        guest.sockets.remove(handle);
        assert_eq!(rig.starts.load(Ordering::SeqCst), 1 + round);
        rig.kill();
    }
}

#[test]
fn without_a_process_frames_are_lost_and_nothing_else_happens() {
    let rig = Rig::default();
    let mut guest = rig.guest("user", Accepts::ALL);
    rig.out_of_order.store(true, Ordering::SeqCst);
    rig.signal("-9");
    let (to, server) = server(|mut client| {
        let mut got = Vec::new();
        client.read_to_end(&mut got).unwrap();
        client.write_all(&got).unwrap();
    });
    let dead = Instant::now();
    while dead.elapsed() < Duration::from_millis(700) {
        guest.poll();
        let sent = guest.cable.link.send(Offload::default(), &[0xff; 1500]);
        if dead.elapsed() > Duration::from_millis(300) {
            assert_eq!(sent, Sent::Taken);
        }
    }
    rig.out_of_order.store(false, Ordering::SeqCst);
    let received = exchange(&mut guest, to, 40001, &pattern(5000));
    server.join().unwrap();
    assert!(received == pattern(5000));
}

#[test]
fn a_process_that_stands_still_stops_the_guest_and_loses_nothing() {
    let rig = Rig::default();
    let (mut link, _) = rig.link(ECHO).unwrap();
    link.service();
    rig.signal("-STOP");
    // Frames of all lengths with a number each.
    let frame = |n: u32| {
        let mut frame = vec![n as u8; 14 + (n as usize * 7919) % 3000];
        frame[..4].copy_from_slice(&n.to_be_bytes());
        frame
    };
    let room = (0..).find(|n| link.send(Offload::default(), &frame(*n)) == Sent::Full);
    let room = room.unwrap();
    assert!((20..100_000).contains(&room), "{room}");
    assert!(!link.service(), "there is no room yet");
    rig.signal("-CONT");
    // More than fits into both sockets, so that either side is full at times.
    let (mut sent, mut expected, mut may) = (room, 0, false);
    let end = Instant::now() + support::LIMIT;
    while expected < 5 * room {
        assert!(Instant::now() < end, "{sent} sent, {expected} came back");
        may |= link.service();
        while may && sent < 5 * room {
            may = link.send(Offload::default(), &frame(sent)) == Sent::Taken;
            sent += u32::from(may);
        }
        let mut came = Vec::new();
        let mut sink = |_: Offload, parts: &[&[u8]]| came.push(parts.concat());
        while link.receive(65553, &mut sink) == Received::Frame {}
        for back in came {
            assert!(back == frame(expected), "{expected}");
            expected += 1;
        }
    }
}

#[test]
fn a_network_that_cannot_be_opened_says_why() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    for (network, why) in [
        (format!("user,hostfwd=tcp::{port}-:22"), port.to_string()),
        ("switch=a/b".to_owned(), "no name for a switch".to_owned()),
        ("tap=nosuchtap0/".to_owned(), "no name for a tap".to_owned()),
    ] {
        let error = Rig::default().link(&network).err().unwrap().to_string();
        assert!(error.contains(&why), "{network}: {error}");
    }
}
