//! The socket between the monitor and the process of a network, when whoever is at the other end has fallen to the guest.
//!
//! The process takes any message: it goes on, or ends the connection, and neither panics nor keeps what comes along. The monitor takes whatever the process says: the
//! guest gets frames that it takes, of lengths that there are, or none.
//!
//! `DOPPEL_NET_MESSAGES=1000000 DOPPEL_NET_SEED=7 cargo test --release -p doppel-net --test messages` is a longer campaign.

mod support;

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use doppel_device::HostClock;
use doppel_net::{
    Accepts, FRAME_MAX, Link, Offload, PartialChecksum, Received, RemoteLink, Segment,
    Segmentation, Sent, UserConfig, UserNetwork, serve,
};
use fastrand::Rng;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags,
    SocketType, recv, send, sendmsg, socketpair,
};
use smoltcp::wire::IpProtocol;
use support::{GATEWAY, MAC};

const FRAME: u8 = 1;
const ACCEPTS: u8 = 2;
/// It serves, takes everything, and the card has this address.
const HELLO: [u8; 8] = [0, 7, 2, 0, 0, 0, 0, 1];

fn bytes(random: &mut Rng, n: u64) -> Vec<u8> {
    (0..n).map(|_| random.u8(..)).collect()
}

fn any_accepts(random: &mut Rng) -> Accepts {
    Accepts {
        checksum: random.bool(),
        tcp4: random.bool(),
        tcp6: random.bool(),
    }
}

/// What is left undone, as it may be said, or just may not.
fn offload(random: &mut Rng) -> [u8; 10] {
    let any = match random.u64(..4) {
        0 => return bytes(random, 10).try_into().unwrap(),
        1 => Offload::default(),
        _ => Offload {
            checksum: Some(PartialChecksum {
                start: random.u16(..60),
                offset: random.u16(..20),
            }),
            segmentation: random.bool().then(|| Segmentation {
                kind: [Segment::Tcp4, Segment::Tcp6][random.usize(..2)],
                size: random.u16(..3000),
                header: random.u16(..100),
            }),
        },
    };
    any.encode()
}

/// Any frame: a segment of TCP, a call among them, or bytes.
fn frame(random: &mut Rng) -> Vec<u8> {
    let len = match random.u64(..8) {
        0 => random.u64(..FRAME_MAX as u64 + 64),
        _ => random.u64(..1600),
    };
    if random.u64(..3) == 0 {
        return bytes(random, len.min(200));
    }
    let mut tcp = vec![0; 20 + len.min(65_000) as usize];
    tcp[..2].copy_from_slice(&(40_000 + random.u16(..8)).to_be_bytes());
    tcp[2..4].copy_from_slice(&9u16.to_be_bytes());
    tcp[4..12].copy_from_slice(&bytes(random, 8));
    (tcp[12], tcp[13]) = (5 << 4, random.u8(..));
    let mut frame = support::ip_frame(IpProtocol::Tcp, GATEWAY, &tcp, 0, false);
    if random.u64(..4) == 0 {
        let at = random.usize(..60);
        frame[at % 54] = random.u8(..);
    }
    frame
}

fn record(random: &mut Rng) -> Vec<u8> {
    let mut record = vec![FRAME];
    record.extend(offload(random));
    record.extend(frame(random));
    record
}

fn number(name: &str, usual: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(usual, |text| text.parse().expect("a number"))
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

/// A record with a file, which nobody asked for.
fn send_file(socket: &OwnedFd, record: &[u8]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [socket.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
    let _ = sendmsg(
        socket,
        &[IoSlice::new(record)],
        &mut control,
        SendFlags::NOSIGNAL,
    );
}

#[test]
fn the_process_of_a_network_takes_any_message() {
    let mut left = number("DOPPEL_NET_MESSAGES", 20_000);
    let mut random = Rng::with_seed(number("DOPPEL_NET_SEED", 1));
    let (mut ends, files) = (0, open_files());
    while left > 0 {
        let kind = SocketType::SEQPACKET;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
        let server = thread::spawn(move || {
            let clock = Arc::new(HostClock::new());
            let config = UserConfig {
                connections: 64,
                sessions: 32,
                dns: vec!["127.0.0.1:9".parse().unwrap()],
                ..UserConfig::default()
            };
            serve(theirs, &*clock.clone(), || {
                UserNetwork::new(&config, MAC, clock).map(|n| (Box::new(n) as Box<dyn Link>, MAC))
            })
        });
        let mut buffer = vec![0; 70_000];
        assert_eq!(
            recv(&ours, &mut buffer[..], RecvFlags::empty()).unwrap().0,
            8
        );
        // What makes no sense ends the connection, and a process; mostly it makes some.
        while left > 0 {
            left -= 1;
            let record = match random.u64(..50) {
                0 => vec![ACCEPTS, random.u8(..8)],
                1 if random.u64(..20) == 0 => {
                    let n = random.u64(..100);
                    bytes(&mut random, n)
                }
                _ => record(&mut random),
            };
            let sent = match random.u64(..64) {
                0 => {
                    send_file(&ours, &record);
                    Ok(0)
                }
                _ => send(&ours, &record, SendFlags::NOSIGNAL),
            };
            if sent.is_err_and(|error| error == Errno::PIPE) {
                ends += 1;
                break;
            }
            while recv(&ours, &mut buffer[..], RecvFlags::DONTWAIT).is_ok_and(|(n, _)| n > 0) {}
        }
        drop(ours);
        let _ = server.join().expect("no panic");
    }
    println!("{ends} connections ended");
    assert!(ends > 2);
    assert!(open_files() <= files + 8, "{files}, then {}", open_files());
}

/// A process that says what it likes: frames, more than anybody wants, nonsense; or it goes, or stands still.
fn lie(socket: &OwnedFd, random: &mut Rng) -> io::Result<()> {
    send(socket, &HELLO, SendFlags::NOSIGNAL)?;
    let mut buffer = vec![0; 70_000];
    loop {
        let mut record = record(random);
        match random.u64(..400) {
            0 => return Ok(()),
            1 => record.clear(),
            2 => record.truncate(random.usize(..12)),
            3 => record[0] = random.u8(..),
            4 => record.resize(random.usize(..100_000) + 1, 7),
            5 => record = vec![ACCEPTS, 7],
            6 => thread::sleep(Duration::from_millis(20)),
            _ => {}
        }
        send(socket, &record, SendFlags::NOSIGNAL)?;
        if random.u64(..3) == 0 {
            let _ = recv(socket, &mut buffer[..], RecvFlags::DONTWAIT);
        }
    }
}

#[test]
fn the_monitor_takes_whatever_a_networks_process_says() {
    let rounds = number("DOPPEL_NET_MESSAGES", 20_000) / 4;
    let seed = Arc::new(AtomicU64::new(number("DOPPEL_NET_SEED", 1)));
    let starts = seed.clone();
    let first = seed.load(Ordering::Relaxed);
    let start = move |socket: OwnedFd| -> io::Result<Child> {
        let mut random = Rng::with_seed(seed.fetch_add(1, Ordering::Relaxed));
        thread::spawn(move || lie(&socket, &mut random));
        // What can be waited for.
        Command::new("true").stdin(Stdio::null()).spawn()
    };
    let clock = Arc::new(HostClock::new());
    let (mut link, mac) = RemoteLink::new(Box::new(start), true, clock).unwrap();
    assert_eq!(mac, [2, 0, 0, 0, 0, 1]);
    let mut random = Rng::with_seed(99);
    let mut accepts = Accepts::default();
    let (mut frames, mut full) = (0u64, 0);
    let end = Instant::now() + Duration::from_secs(60 + rounds / 200);
    while frames < rounds {
        assert!(Instant::now() < end, "{frames} frames: it hangs");
        link.service();
        if random.u64(..50) == 0 {
            accepts = any_accepts(&mut random);
            link.guest_accepts(accepts);
        }
        let sent = link.send(Offload::default(), &frame(&mut random));
        full += u32::from(sent == Sent::Full);
        let room = match random.u64(..4) {
            0 => random.usize(..3000),
            _ => FRAME_MAX,
        };
        let mut sink = |offload: Offload, parts: &[&[u8]]| {
            assert!(accepts.takes(offload), "{accepts:?} {offload:?}");
            let len: usize = parts.iter().map(|part| part.len()).sum();
            assert!(len <= room, "{len} {room}");
            frames += 1;
        };
        match link.receive(room, &mut sink) {
            Received::TooLong(len) => {
                assert!(len > room && len <= FRAME_MAX);
                assert_eq!(len, link.next_length());
                link.discard();
            }
            Received::Frame => {}
            Received::Nothing => thread::sleep(Duration::from_micros(200)),
        }
    }
    let starts = starts.load(Ordering::Relaxed) - first;
    println!("{frames} frames, {starts} processes, {full} times full");
    assert!(starts > 3);
    let (done, ended) = std::sync::mpsc::channel();
    thread::spawn(move || {
        drop(link);
        let _ = done.send(());
    });
    assert!(
        ended.recv_timeout(Duration::from_secs(20)).is_ok(),
        "it hangs"
    );
}

/// A guest that takes no frames hears nothing of its connections either, however often their process dies.
#[test]
fn what_the_monitor_asks_of_a_guest_that_takes_nothing_has_a_limit() {
    const FLOWS: u16 = 4000;
    let starts = Arc::new(AtomicU64::new(0));
    let counted = starts.clone();
    let start = move |socket: OwnedFd| -> io::Result<Child> {
        counted.fetch_add(1, Ordering::Relaxed);
        thread::spawn(move || {
            let _ = send(&socket, &HELLO, SendFlags::NOSIGNAL);
            let start = Instant::now();
            let mut buffer = vec![0; 70_000];
            while start.elapsed() < Duration::from_millis(150) {
                let frame = recv(&socket, &mut buffer[..], RecvFlags::DONTWAIT);
                if frame.is_err() {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        Command::new("true").stdin(Stdio::null()).spawn()
    };
    let clock = Arc::new(HostClock::new());
    let (mut link, _) = RemoteLink::new(Box::new(start), true, clock).unwrap();
    link.service();
    for port in 0..FLOWS {
        let mut tcp = vec![0; 20];
        tcp[..2].copy_from_slice(&(1024 + port).to_be_bytes());
        (tcp[12], tcp[13]) = (5 << 4, 16);
        let frame = support::ip_frame(IpProtocol::Tcp, GATEWAY, &tcp, 0, false);
        while link.send(Offload::default(), &frame) == Sent::Full {
            link.service();
        }
    }
    let start = Instant::now();
    while starts.load(Ordering::Relaxed) < 10 {
        assert!(start.elapsed() < support::LIMIT, "it is not started again");
        link.service();
        thread::sleep(Duration::from_millis(1));
    }
    let mut frames = 0;
    while link.receive(FRAME_MAX, &mut |_, _| frames += 1) == Received::Frame {}
    assert!((1000..=2 * u32::from(FLOWS)).contains(&frames), "{frames}");
}
