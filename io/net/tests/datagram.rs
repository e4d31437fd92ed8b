//! Everything of the user network but TCP: DHCP, ARP, DNS, UDP, echo, ICMP errors, fragments.

mod support;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket};
use std::time::Duration;

use doppel_net::{Forward, Transport, UserConfig};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::{dhcpv4, icmp, udp};
use smoltcp::wire::{
    EthernetFrame, Icmpv4Message, Icmpv4Packet, Icmpv4Repr, IpEndpoint, IpProtocol, Ipv4Address,
    Ipv4Packet, UdpPacket,
};
use support::{GATEWAY, Guest, OFFLOADS};

const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);

fn endpoint(ip: Ipv4Addr, port: u16) -> IpEndpoint {
    IpEndpoint::new(ip.into(), port)
}

fn answer(guest: &mut Guest, handle: SocketHandle, what: &str) -> (Vec<u8>, IpEndpoint) {
    guest.until(what, |guest| {
        let socket = guest.sockets.get_mut::<udp::Socket>(handle);
        let (data, from) = socket.recv().ok()?;
        Some((data.to_vec(), from.endpoint))
    })
}

fn send(guest: &mut Guest, handle: SocketHandle, to: IpEndpoint, data: &[u8]) {
    let socket = guest.sockets.get_mut::<udp::Socket>(handle);
    socket.send_slice(data, to).unwrap();
}

/// A UDP server on the loopback that answers each datagram once, in a thread of its own.
fn server(answers: usize, answer: impl Fn(&[u8]) -> Vec<u8> + Send + 'static) -> u16 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(support::LIMIT)).unwrap();
    let port = socket.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut buffer = [0; 65536];
        for _ in 0..answers {
            let (n, from) = socket.recv_from(&mut buffer).unwrap();
            socket.send_to(&answer(&buffer[..n]), from).unwrap();
        }
    });
    port
}

#[test]
fn a_dhcp_client_gets_the_address_that_qemus_users_expect() {
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[0]);
    guest.interface.update_ip_addrs(|ips| ips.clear());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let (address, router, dns) = guest.until("a lease", |guest| {
        let socket = guest.sockets.get_mut::<dhcpv4::Socket>(handle);
        match socket.poll()? {
            dhcpv4::Event::Configured(c) => Some((c.address, c.router, c.dns_servers.to_vec())),
            dhcpv4::Event::Deconfigured => None,
        }
    });
    assert_eq!(address.to_string(), "10.0.2.15/24");
    assert_eq!(router, Some(GATEWAY));
    assert_eq!(dns, [DNS]);
}

#[test]
fn who_has_an_address_is_informed_there_and_gets_none() {
    let mut udp = vec![0, 68, 0, 67, 1, 0, 0, 0, 1, 1, 6, 0];
    udp.resize(8 + 236, 0);
    udp[8 + 12..][..4].copy_from_slice(&[10, 0, 2, 15]);
    udp[8 + 28..][..6].copy_from_slice(&support::MAC);
    // A magic number; a message that informs.
    udp.extend_from_slice(&[99, 130, 83, 99, 53, 1, 8, 255]);
    let len = udp.len() as u16;
    udp[4..6].copy_from_slice(&len.to_be_bytes());
    let frame = support::ip_frame(IpProtocol::Udp, Ipv4Addr::BROADCAST, &udp, 0, false);
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[0]);
    guest.cable.link.send(Default::default(), &frame);
    guest.cable.pull();
    let (_, reply) = guest.cable.received.pop_front().unwrap();
    let ip = Ipv4Packet::new_checked(&reply[14..]).unwrap();
    assert_eq!(
        (&reply[..6], ip.dst_addr()),
        (&support::MAC[..], Ipv4Addr::new(10, 0, 2, 15))
    );
    let yours = &ip.payload()[8 + 16..][..4];
    assert_eq!(yours, [0; 4]);
}

#[test]
fn datagrams_find_their_way_and_back() {
    for accepts in OFFLOADS {
        let port = server(2, |question| [b"re: ", question].concat());
        let mut guest = Guest::new(&UserConfig::default(), accepts);
        let handle = guest.udp(5000);
        let to = endpoint(GATEWAY, port);
        for question in [&b"one"[..], b"two"] {
            send(&mut guest, handle, to, question);
            let (data, from) = answer(&mut guest, handle, "an answer");
            assert_eq!((data, from), ([b"re: ", question].concat(), to));
        }
    }
}

#[test]
fn the_name_server_is_the_hosts_and_the_next_one_is_tried() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server(1, |_| b"an address".to_vec());
    let config = UserConfig {
        dns: vec![
            silent.local_addr().unwrap(),
            SocketAddr::from(([127, 0, 0, 1], port)),
        ],
        ..UserConfig::default()
    };
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handle = guest.udp(5000);
    let to = endpoint(DNS, 53);
    send(&mut guest, handle, to, b"a question");
    let mut buffer = [0; 100];
    silent.set_read_timeout(Some(support::LIMIT)).unwrap();
    guest.poll();
    guest.poll();
    assert_eq!(silent.recv(&mut buffer).unwrap(), 10);
    // Sooner it would be another question.
    std::thread::sleep(Duration::from_millis(1100));
    send(&mut guest, handle, to, b"a question");
    let (data, from) = answer(&mut guest, handle, "an answer");
    assert_eq!((&data[..], from), (&b"an address"[..], to));
}

/// As C libraries ask for both kinds of addresses.
#[test]
fn two_questions_at_once_from_one_socket_are_both_answered() {
    let port = server(2, |question| [b"re: ", question].concat());
    let config = UserConfig {
        dns: vec![SocketAddr::from(([127, 0, 0, 1], port))],
        ..UserConfig::default()
    };
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handle = guest.udp(5000);
    for question in [&b"A"[..], b"AAAA"] {
        send(&mut guest, handle, endpoint(DNS, 53), question);
    }
    let mut answers = [(); 2].map(|()| answer(&mut guest, handle, "both answers").0);
    answers.sort();
    assert_eq!(answers, [&b"re: A"[..], b"re: AAAA"]);
}

/// A configuration with these name servers.
fn resolving(dns: &[SocketAddr]) -> UserConfig {
    UserConfig {
        dns: dns.to_vec(),
        ..UserConfig::default()
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// What a guest sends arrives, and where from.
fn heard(guest: &mut Guest, host: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    host.set_nonblocking(true).unwrap();
    guest.until("a datagram at the host", |_| {
        let mut buffer = [0; 100];
        let (n, from) = host.recv_from(&mut buffer).ok()?;
        Some((buffer[..n].to_vec(), from))
    })
}

/// As resolvers do that take another port for each try.
#[test]
fn a_question_from_another_port_goes_to_the_next_name_server_too() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server(1, |_| b"an address".to_vec());
    let config = resolving(&[silent.local_addr().unwrap(), loopback(port)]);
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handles = [5000, 5001].map(|port| guest.udp(port));
    send(&mut guest, handles[0], endpoint(DNS, 53), b"a question");
    heard(&mut guest, &silent);
    std::thread::sleep(Duration::from_millis(1100));
    send(&mut guest, handles[1], endpoint(DNS, 53), b"a question");
    let (data, _) = answer(&mut guest, handles[1], "an answer");
    assert_eq!(data, b"an address");
}

#[test]
fn a_name_server_that_is_not_there_is_left_out() {
    let free = UdpSocket::bind("127.0.0.1:0").unwrap();
    let refusing = free.local_addr().unwrap();
    drop(free);
    let port = server(1, |_| b"an address".to_vec());
    let config = resolving(&[refusing, loopback(port)]);
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handles = [5000, 5001].map(|port| guest.udp(port));
    send(&mut guest, handles[0], endpoint(DNS, 53), b"a question");
    let refused = (Icmpv4Message::DstUnreachable, 3);
    assert_eq!(loop_for_icmp(&mut guest), refused);
    send(&mut guest, handles[1], endpoint(DNS, 53), b"a question");
    let (data, _) = answer(&mut guest, handles[1], "an answer");
    assert_eq!(data, b"an address");
}

/// As one with an IPv6 address is on a host without a way there.
#[test]
fn a_name_server_that_the_host_cannot_reach_is_left_out() {
    let out_of_reach = SocketAddr::from(([255, 255, 255, 255], 53));
    let port = server(1, |_| b"an address".to_vec());
    let config = resolving(&[out_of_reach, loopback(port)]);
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handle = guest.udp(5000);
    send(&mut guest, handle, endpoint(DNS, 53), b"a question");
    let (data, _) = answer(&mut guest, handle, "an answer");
    assert_eq!(data, b"an address");

    let (to, host) = support::server(|mut client| std::io::Read::read(&mut client, &mut [0; 9]));
    let config = resolving(&[out_of_reach, loopback(to.port())]);
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handle = guest.connect(SocketAddrV4::new(DNS, 53), 5000);
    guest.until("a connection", |g| g.tcp(handle).may_send().then_some(()));
    guest.tcp(handle).send_slice(b"length").unwrap();
    guest.until("a question", |_| host.is_finished().then_some(()));
    assert_eq!(host.join().unwrap().unwrap(), 6);
}

#[test]
fn the_only_name_server_may_take_its_time() {
    let slow = UdpSocket::bind("127.0.0.1:0").unwrap();
    let config = resolving(&[slow.local_addr().unwrap()]);
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handle = guest.udp(5000);
    send(&mut guest, handle, endpoint(DNS, 53), b"a question");
    let (_, from) = heard(&mut guest, &slow);
    std::thread::sleep(Duration::from_millis(1100));
    send(&mut guest, handle, endpoint(DNS, 53), b"a question");
    heard(&mut guest, &slow);
    // The first one's.
    slow.send_to(b"an address", from).unwrap();
    let (data, _) = answer(&mut guest, handle, "an answer");
    assert_eq!(data, b"an address");
}

#[test]
fn a_name_server_that_answers_no_more_is_left_by_those_that_it_answered() {
    let first = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server(1, |_| b"another".to_vec());
    let config = resolving(&[first.local_addr().unwrap(), loopback(port)]);
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handle = guest.udp(5000);
    send(&mut guest, handle, endpoint(DNS, 53), b"a question");
    let (_, from) = heard(&mut guest, &first);
    first.send_to(b"an address", from).unwrap();
    answer(&mut guest, handle, "an answer");
    send(&mut guest, handle, endpoint(DNS, 53), b"a second one");
    heard(&mut guest, &first);
    std::thread::sleep(Duration::from_millis(1100));
    send(&mut guest, handle, endpoint(DNS, 53), b"a second one");
    let (data, _) = answer(&mut guest, handle, "another answer");
    assert_eq!(data, b"another");
}

#[test]
fn the_session_that_makes_room_is_the_one_that_was_silent_longest() {
    let host = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = host.local_addr().unwrap().port();
    let config = UserConfig {
        connections: 64,
        sessions: 2,
        ..UserConfig::default()
    };
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handles = [5000, 5001, 5002].map(|port| guest.udp(port));
    let mut first = None;
    for n in [0, 1, 0, 2] {
        send(&mut guest, handles[n], endpoint(GATEWAY, port), b"hello");
        let (_, from) = heard(&mut guest, &host);
        let first = *first.get_or_insert(from);
        assert_eq!(from == first, n == 0);
        std::thread::sleep(Duration::from_millis(5));
    }
    host.send_to(b"still there", first.unwrap()).unwrap();
    let (data, _) = answer(&mut guest, handles[0], "an answer");
    assert_eq!(data, b"still there");
}

/// Their addresses may all be made up.
#[test]
fn clients_of_a_forwarded_port_leave_the_guests_own_sessions_alone() {
    let free = UdpSocket::bind("127.0.0.1:0").unwrap();
    let forwarded = free.local_addr().unwrap();
    drop(free);
    let config = UserConfig {
        connections: 64,
        sessions: 8,
        forwards: vec![Forward {
            transport: Transport::Udp,
            host: forwarded,
            guest: SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 15), 53),
        }],
        ..UserConfig::default()
    };
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let host = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = host.local_addr().unwrap().port();
    let own = guest.udp(5000);
    send(&mut guest, own, endpoint(GATEWAY, port), b"a question");
    let (_, from) = heard(&mut guest, &host);
    let inside = guest.udp(53);
    for _ in 0..20 {
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.send_to(b"flood", forwarded).unwrap();
        answer(&mut guest, inside, "a client");
    }
    host.send_to(b"an answer", from).unwrap();
    let (data, _) = answer(&mut guest, own, "an answer");
    assert_eq!(data, b"an answer");
}

#[test]
fn a_session_for_which_another_made_room_is_answered() {
    let port = server(3, |question| question.to_vec());
    let config = UserConfig {
        connections: 64,
        sessions: 2,
        ..UserConfig::default()
    };
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    for source in [5000, 5001, 5002] {
        let handle = guest.udp(source);
        send(&mut guest, handle, endpoint(GATEWAY, port), b"hello");
        let (data, _) = answer(&mut guest, handle, "an answer");
        assert_eq!(data, b"hello", "{source}");
    }
}

#[test]
fn a_udp_port_where_nobody_listens_is_unreachable() {
    let free = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = free.local_addr().unwrap().port();
    drop(free);
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[0]);
    let handle = guest.udp(5000);
    send(&mut guest, handle, endpoint(GATEWAY, port), b"hello");
    assert_eq!(
        loop_for_icmp(&mut guest),
        (Icmpv4Message::DstUnreachable, 3)
    );
}

fn ping(guest: &mut Guest, to: Ipv4Addr) -> (Icmpv4Message, u8) {
    let handle = guest.icmp(icmp::Endpoint::Ident(77));
    let socket = guest.sockets.get_mut::<icmp::Socket>(handle);
    let request = Icmpv4Repr::EchoRequest {
        ident: 77,
        seq_no: 1,
        data: b"0123456789",
    };
    let bytes = socket.send(request.buffer_len(), to.into()).unwrap();
    request.emit(&mut Icmpv4Packet::new_unchecked(bytes), &Default::default());
    loop_for_icmp(guest)
}

#[test]
fn the_gateway_and_the_name_server_answer_pings() {
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[1]);
    for to in [GATEWAY, DNS] {
        let (kind, _) = ping(&mut guest, to);
        assert_eq!(kind, Icmpv4Message::EchoReply);
    }
}

/// Without privileges an echo request leaves the host only where `net.ipv4.ping_group_range` lets it.
#[test]
fn a_ping_beyond_the_gateway_is_forbidden_where_the_host_forbids_it() {
    let range = std::fs::read_to_string("/proc/sys/net/ipv4/ping_group_range").unwrap();
    let range: Vec<u64> = range
        .split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect();
    if range[0] <= range[1] {
        eprintln!("SKIPPED: this host allows ping sockets, and no test sends anything beyond it");
        return;
    }
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[0]);
    let refusal = ping(&mut guest, Ipv4Addr::new(192, 0, 2, 1));
    assert_eq!(refusal, (Icmpv4Message::DstUnreachable, 13));
}

/// RFC 1122, 3.2.2.
#[test]
fn there_are_no_errors_about_what_is_for_everybody() {
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[0]);
    let mut call = vec![0; 20];
    (call[1], call[3], call[12], call[13]) = (9, 9, 5 << 4, 2);
    let echo = [8, 0, 0, 0, 0, 1, 0, 1];
    for to in [[255; 4], [10, 0, 2, 255], [224, 0, 0, 1]] {
        for (protocol, payload) in [(IpProtocol::Icmp, &echo[..]), (IpProtocol::Tcp, &call)] {
            let frame = support::ip_frame(protocol, to.into(), payload, 0, false);
            guest.cable.link.send(Default::default(), &frame);
            guest.cable.pull();
            assert!(guest.cable.received.is_empty(), "{protocol} to {to:?}");
        }
    }
}

/// The next ICMP message, seen on the cable: smoltcp would keep some to itself.
fn loop_for_icmp(guest: &mut Guest) -> (Icmpv4Message, u8) {
    let start = std::time::Instant::now();
    loop {
        let now = smoltcp::time::Instant::from_micros(start.elapsed().as_micros() as i64 + 1000);
        guest
            .interface
            .poll_egress(now, &mut guest.cable, &mut guest.sockets);
        guest.cable.link.service();
        guest.cable.pull();
        for (_, frame) in std::mem::take(&mut guest.cable.received) {
            let ip = Ipv4Packet::new_unchecked(&frame[14..]);
            if EthernetFrame::new_unchecked(&frame[..]).ethertype()
                == smoltcp::wire::EthernetProtocol::Ipv4
                && ip.next_header() == IpProtocol::Icmp
            {
                let packet = Icmpv4Packet::new_checked(&frame[34..]).unwrap();
                assert!(packet.verify_checksum());
                return (packet.msg_type(), packet.msg_code());
            }
            // An answer to ARP.
            guest.cable.received.push_back((Default::default(), frame));
            guest
                .interface
                .poll_ingress_single(now, &mut guest.cable, &mut guest.sockets);
        }
        assert!(start.elapsed() < support::LIMIT);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn long_datagrams_travel_in_fragments_both_ways() {
    let port = server(1, |question| question.repeat(3));
    let mut guest = Guest::new(&UserConfig::default(), OFFLOADS[0]);
    let data: Vec<u8> = (0..5000u32).map(|n| (n * 7) as u8).collect();
    // By hand: what smoltcp sends here is not longer than its MTU.
    let mut udp = vec![0; 8 + data.len()];
    let mut packet = UdpPacket::new_unchecked(&mut udp);
    packet.set_src_port(5000);
    packet.set_dst_port(port);
    packet.set_len(8 + data.len() as u16);
    packet.payload_mut().copy_from_slice(&data);
    let pieces: Vec<_> = udp.chunks(1480).collect();
    for (n, piece) in pieces.iter().enumerate() {
        let more = n + 1 < pieces.len();
        let frame = support::ip_frame(IpProtocol::Udp, GATEWAY, piece, (n * 1480) as u16, more);
        guest.cable.link.send(Default::default(), &frame);
    }
    let mut whole = vec![0; 8 + 3 * data.len()];
    let mut seen = 0;
    let start = std::time::Instant::now();
    while seen < whole.len() {
        assert!(start.elapsed() < support::LIMIT, "{seen} bytes came back");
        guest.cable.link.service();
        guest.cable.pull();
        for (offload, frame) in std::mem::take(&mut guest.cable.received) {
            assert_eq!(
                offload.checksum, None,
                "a fragment has no checksum of its own"
            );
            let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
            assert!(frame.len() <= 1514 && ip.verify_checksum());
            let at = usize::from(ip.frag_offset());
            whole[at..at + ip.payload().len()].copy_from_slice(ip.payload());
            seen += ip.payload().len();
        }
    }
    let packet = UdpPacket::new_checked(&whole[..]).unwrap();
    let (from, to) = (GATEWAY, Ipv4Address::new(10, 0, 2, 15));
    assert!(packet.verify_checksum(&from.into(), &to.into()));
    assert_eq!(packet.payload(), data.repeat(3));
}

#[test]
fn a_forwarded_udp_port_leads_into_the_guest_and_back_to_each_client() {
    let free = UdpSocket::bind("127.0.0.1:0").unwrap();
    let host = free.local_addr().unwrap();
    drop(free);
    let config = UserConfig {
        forwards: support::forwarded(Transport::Udp, host, 53),
        ..UserConfig::default()
    };
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handle = guest.udp(53);
    let clients = [(); 2].map(|()| {
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        client.connect(host).unwrap();
        client.set_read_timeout(Some(support::LIMIT)).unwrap();
        client
    });
    for (n, client) in clients.iter().enumerate() {
        client.send(&[n as u8; 3]).unwrap();
    }
    for _ in 0..clients.len() {
        let (data, from) = answer(&mut guest, handle, "a client");
        assert_eq!(from.addr.to_string(), "10.0.2.2");
        send(&mut guest, handle, from, &[data[0] + 10; 2]);
    }
    guest.poll();
    for (n, client) in clients.iter().enumerate() {
        let mut buffer = [0; 10];
        assert_eq!(client.recv(&mut buffer).unwrap(), 2);
        assert_eq!(buffer[0], 10 + n as u8);
    }
}

#[test]
fn a_restricted_guest_reaches_nothing() {
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    silent.set_nonblocking(true).unwrap();
    let config = UserConfig {
        restrict: true,
        ..UserConfig::default()
    };
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let handle = guest.udp(5000);
    let port = silent.local_addr().unwrap().port();
    send(&mut guest, handle, endpoint(GATEWAY, port), b"hello");
    assert_eq!(
        loop_for_icmp(&mut guest),
        (Icmpv4Message::DstUnreachable, 13)
    );
    assert!(silent.recv(&mut [0]).is_err());
}

/// IPv6 has room for more than IPv4, with its own header, takes.
#[test]
fn a_datagram_that_no_packet_of_the_guests_network_holds_is_lost() {
    let Ok(free) = UdpSocket::bind("[::1]:0") else {
        eprintln!("SKIPPED: this host has no IPv6");
        return;
    };
    let host = free.local_addr().unwrap();
    drop(free);
    let config = UserConfig {
        forwards: support::forwarded(Transport::Udp, host, 53),
        ..UserConfig::default()
    };
    let mut guest = Guest::new(&config, OFFLOADS[0]);
    let client = UdpSocket::bind("[::1]:0").unwrap();
    for len in [65_527, 65_507] {
        client.send_to(&vec![7; len], host).unwrap();
    }
    let mut end = 0;
    let start = std::time::Instant::now();
    while end < 8 + 65_507 {
        assert!(start.elapsed() < support::LIMIT, "{end} bytes come");
        guest.cable.link.service();
        guest.cable.pull();
        for (_, frame) in std::mem::take(&mut guest.cable.received) {
            let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
            end = usize::from(ip.frag_offset()) + ip.payload().len();
            assert!(20 + end <= 65_535, "{end} bytes in fragments");
        }
    }
}
