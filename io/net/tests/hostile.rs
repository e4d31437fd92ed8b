//! Hostile guests: whatever frames they send, the gateway neither panics nor grows without bound, and goes on working.
//!
//! `DOPPEL_NET_FRAMES=N cargo test --release -p doppel-net --test hostile` makes a campaign of N frames.

mod support;

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::sync::Arc;

use doppel_device::HostClock;
use doppel_net::{
    Accepts, Link, Offload, PartialChecksum, Received, Segment, Segmentation, UserConfig,
    UserNetwork,
};
use fastrand::Rng;
use smoltcp::socket::tcp::State;
use smoltcp::wire::IpProtocol;
use support::{GATEWAY, Guest, MAC, OFFLOADS};

fn bytes(random: &mut Rng, n: usize) -> Vec<u8> {
    (0..n).map(|_| random.u8(..)).collect()
}

fn config() -> UserConfig {
    UserConfig {
        connections: 64,
        sessions: 32,
        dns: vec!["127.0.0.1:9".parse().unwrap()],
        ..UserConfig::default()
    }
}

fn network() -> UserNetwork {
    let mut network = UserNetwork::new(&config(), MAC, Arc::new(HostClock::new())).unwrap();
    network.guest_accepts(Accepts::ALL);
    network
}

/// Frames of every protocol, to begin with.
fn seeds(port: u16) -> Vec<Vec<u8>> {
    let tcp = |flags: u8, data: &[u8]| {
        let mut tcp = vec![0; 20];
        tcp[..2].copy_from_slice(&40000u16.to_be_bytes());
        tcp[2..4].copy_from_slice(&port.to_be_bytes());
        (tcp[12], tcp[13]) = (5 << 4, flags);
        tcp[14] = 0xff;
        tcp.extend_from_slice(data);
        support::ip_frame(IpProtocol::Tcp, GATEWAY, &tcp, 0, false)
    };
    let mut udp = vec![0x13, 0x88, 0, 9, 0, 12, 0, 0];
    udp.extend_from_slice(b"data");
    let dns = Ipv4Addr::new(10, 0, 2, 3);
    let mut question = udp.clone();
    question[3] = 53;
    let mut dhcp = vec![0, 68, 0, 67, 1, 0, 0, 0, 1, 1, 6, 0];
    dhcp.resize(8 + 236, 0);
    dhcp.extend_from_slice(&[99, 130, 83, 99, 53, 1, 1, 255]);
    dhcp.resize(256, 0);
    let mut arp = frame_header(0x0806);
    arp.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend_from_slice(&MAC);
    arp.extend_from_slice(&[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2]);
    let echo = [8, 0, 0, 0, 0, 1, 0, 1, 1, 2, 3];
    vec![
        tcp(2, &[]),
        tcp(16, b"hello"),
        tcp(17, b"hello"),
        tcp(4, &[]),
        support::ip_frame(IpProtocol::Udp, GATEWAY, &udp, 0, false),
        support::ip_frame(IpProtocol::Udp, GATEWAY, &udp, 0, true),
        support::ip_frame(IpProtocol::Udp, GATEWAY, &udp, 65000, false),
        support::ip_frame(IpProtocol::Udp, dns, &question, 0, false),
        support::ip_frame(IpProtocol::Udp, GATEWAY, &dhcp, 0, false),
        support::ip_frame(IpProtocol::Icmp, GATEWAY, &echo, 0, false),
        arp,
    ]
}

fn frame_header(ethertype: u16) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend_from_slice(&MAC);
    frame.extend_from_slice(&ethertype.to_be_bytes());
    frame
}

/// Damages a frame; half of the time the IP header stays sound, so that what is behind it is looked at.
fn mutate(random: &mut Rng, seed: &[u8]) -> Vec<u8> {
    let mut frame = seed.to_vec();
    for _ in 0..1 + random.usize(..6) {
        let at = random.usize(..frame.len());
        match random.usize(..6) {
            0 => frame[at] = random.u8(..),
            1 => frame[at] ^= 1 << random.usize(..8),
            2 => frame.truncate(at.max(1)),
            3 => {
                let n = random.usize(..64);
                frame.extend(bytes(random, n));
            }
            4 => frame.resize((frame.len() + random.usize(..3000)).min(65553), 0x41),
            _ => frame[at] = [0, 0xff, 0x7f, 0x80][random.usize(..4)],
        }
    }
    if random.bool() && frame.len() > 34 && frame[12..14] == [8, 0] {
        let len = frame.len() - 14;
        let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]);
        ip.set_version(4);
        ip.set_header_len(20);
        ip.set_total_len(len.min(65535) as u16);
        // Nothing but the loopback is ever spoken to.
        ip.set_src_addr(Ipv4Addr::new(10, 0, 2, 15));
        ip.fill_checksum();
    }
    keep_home(&mut frame);
    frame
}

/// No frame of a test leaves for anywhere but the gateway, the name server and addresses that are nowhere.
fn keep_home(frame: &mut [u8]) {
    if frame.len() < 34 {
        return;
    }
    let to = [frame[30], frame[31], frame[32]];
    let home = to == [10, 0, 2] || frame[30] == 127 || frame[30] >= 224 || frame[30] == 0;
    if !home {
        frame[30..33].copy_from_slice(&[10, 0, 2]);
        let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..34]);
        if ip.header_len() == 20 {
            ip.fill_checksum();
        }
    }
}

fn offload(random: &mut Rng) -> Offload {
    if random.bool() {
        return Offload::default();
    }
    Offload {
        checksum: Some(PartialChecksum {
            start: random.u16(..),
            offset: random.u16(..),
        }),
        segmentation: Some(Segmentation {
            kind: [Segment::Tcp4, Segment::Tcp6][random.usize(..2)],
            size: random.u16(..),
            header: random.u16(..),
        }),
    }
}

fn drain(network: &mut UserNetwork, room: usize) -> usize {
    let mut frames = 0;
    network.service();
    loop {
        let mut len = 0;
        let result = network.receive(room, &mut |_, parts| {
            len = parts.iter().map(|part| part.len()).sum();
        });
        match result {
            Received::Frame => frames += 1,
            Received::Nothing => return frames,
            Received::TooLong(n) => {
                assert!(n > room);
                network.discard();
                return frames;
            }
        }
        assert!(len <= room, "{len} bytes for {room}");
        assert!(frames < 100_000, "it never ends");
    }
}

#[test]
fn random_and_damaged_frames_do_no_harm() {
    let frames = std::env::var("DOPPEL_NET_FRAMES").map_or(60_000, |n| n.parse().unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    let seeds = seeds(port);
    let mut random =
        Rng::with_seed(std::env::var("DOPPEL_NET_SEED").map_or(1, |n| n.parse().unwrap()));
    let mut network = network();
    let mut clients = Vec::new();
    let (mut answers, mut accepted) = (0, 0);
    for n in 0..frames {
        let frame = match random.usize(..20) {
            0 => {
                let len = random.usize(..2000);
                let mut frame = bytes(&mut random, len);
                keep_home(&mut frame);
                frame
            }
            1 => seeds[random.usize(..seeds.len())].clone(),
            _ => {
                let seed = random.usize(..seeds.len());
                mutate(&mut random, &seeds[seed])
            }
        };
        network.send(offload(&mut random), &frame);
        if random.usize(..4) == 0 {
            let room = [65553, 1514, 600, 60, 0][random.usize(..5)];
            answers += drain(&mut network, room);
        }
        if n % 64 == 0 {
            while let Ok((client, _)) = listener.accept() {
                accepted += 1;
                clients.push(client);
            }
            clients.truncate(8);
            let (connections, sessions, memory) = network.usage();
            assert!(
                connections <= 64 && sessions <= 32,
                "{connections} {sessions}"
            );
            assert!(memory < 64 << 20, "{memory}");
        }
    }
    assert!(
        answers > frames / 100 && accepted > 0,
        "{answers} {accepted}"
    );
}

#[test]
fn a_flood_of_calls_is_bounded_and_leaves_room_for_an_honest_one() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new(&config(), OFFLOADS[0]);
    for n in 0..20_000u32 {
        let mut tcp = vec![0; 20];
        tcp[..2].copy_from_slice(&(1024 + (n % 60_000) as u16).to_be_bytes());
        tcp[2..4].copy_from_slice(&port.to_be_bytes());
        tcp[4..8].copy_from_slice(&n.to_be_bytes());
        (tcp[12], tcp[13]) = (5 << 4, 2);
        let frame = support::ip_frame(IpProtocol::Tcp, GATEWAY, &tcp, 0, false);
        guest.cable.link.send(Offload::default(), &frame);
    }
    let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
    assert!(open < 400, "{open} descriptors");
    let server = std::thread::spawn(move || {
        loop {
            let (client, _) = listener.accept().unwrap();
            if client.peer_addr().is_ok()
                && std::io::Read::read(&mut &client, &mut [0; 2]).ok() == Some(2)
            {
                return;
            }
        }
    });
    let handle = guest.connect(SocketAddrV4::new(GATEWAY, port), 999);
    guest.until("an honest call", |guest| {
        let socket = guest.tcp(handle);
        if socket.state() == State::Established && socket.can_send() && socket.send_queue() == 0 {
            socket.send_slice(b"hi").unwrap();
        }
        server.is_finished().then_some(())
    });
}

#[test]
fn datagrams_to_everywhere_keep_few_sockets() {
    let mut network = network();
    for n in 0..5000u16 {
        let mut udp = vec![0; 12];
        udp[..2].copy_from_slice(&(n + 1024).to_be_bytes());
        udp[2..4].copy_from_slice(&9u16.to_be_bytes());
        udp[5] = 12;
        let frame = support::ip_frame(IpProtocol::Udp, GATEWAY, &udp, 0, false);
        network.send(Offload::default(), &frame);
    }
    let (_, sessions, _) = network.usage();
    assert!(sessions <= 32, "{sessions}");
    // Nobody pulled: what waits for the guest is bounded too.
    assert!(drain(&mut network, 65553) <= 6000);
}
