//! A guest of packets: smoltcp as its TCP/IP, wired to a back-end without a machine in between.
#![allow(dead_code, reason = "each test uses its part")]

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use doppel_device::HostClock;
use doppel_net::{
    Accepts, Forward, GUEST, Link, Offload, Received, Sent, Transport, UserConfig, UserNetwork,
};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::State;
use smoltcp::socket::{icmp, tcp, udp};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

pub const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
pub const LIMIT: Duration = Duration::from_secs(20);
/// With what guests negotiate today, and with nothing.
pub const OFFLOADS: [Accepts; 2] = [
    Accepts::ALL,
    Accepts {
        checksum: false,
        tcp4: false,
        tcp6: false,
    },
];

/// The cable: what goes in and out is counted, and may be dropped.
pub struct Cable {
    pub link: Box<dyn Link>,
    pub received: VecDeque<(Offload, Vec<u8>)>,
    refused: VecDeque<Vec<u8>>,
    pub from_guest: usize,
    pub largest: usize,
    /// Loses a frame in so many, each way.
    pub loses_one_in: Option<usize>,
    count: usize,
    checks: bool,
}

impl Cable {
    fn lost(&mut self) -> bool {
        self.count += 1;
        self.loses_one_in
            .is_some_and(|n| self.count.is_multiple_of(n))
    }

    fn push(&mut self) {
        while let Some(frame) = self.refused.front() {
            if self.link.send(Offload::default(), frame) == Sent::Full {
                return;
            }
            self.refused.pop_front();
        }
    }

    pub fn pull(&mut self) {
        self.push();
        let mut frames = Vec::new();
        let mut sink = |offload: Offload, parts: &[&[u8]]| frames.push((offload, parts.concat()));
        while self.link.receive(65553, &mut sink) == Received::Frame {}
        for frame in frames {
            self.largest = self.largest.max(frame.1.len());
            if !self.lost() {
                self.received.push_back(frame);
            }
        }
    }
}

pub struct Incoming(Vec<u8>);
pub struct Outgoing<'a>(&'a mut Cable);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.from_guest += 1;
        if !self.0.lost() {
            self.0.refused.push_back(frame);
            self.0.push();
        }
        result
    }
}

impl Device for Cable {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: smoltcp::time::Instant) -> Option<(Incoming, Outgoing<'_>)> {
        self.pull();
        let (_, frame) = self.received.pop_front()?;
        Some((Incoming(frame), Outgoing(self)))
    }

    fn transmit(&mut self, _: smoltcp::time::Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        if !self.checks {
            capabilities.checksum = ChecksumCapabilities::ignored();
            capabilities.checksum.ipv4 = smoltcp::phy::Checksum::Both;
        }
        capabilities
    }
}

/// A guest at 10.0.2.15.
pub struct Guest {
    pub cable: Cable,
    pub interface: Interface,
    pub sockets: SocketSet<'static>,
    start: Instant,
}

pub fn user(config: &UserConfig) -> Box<dyn Link> {
    Box::new(UserNetwork::new(config, MAC, Arc::new(HostClock::new())).unwrap())
}

/// As the monitor does: an ordinary user's usual limit of descriptors is lower than what it may have.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

impl Guest {
    pub fn new(config: &UserConfig, accepts: Accepts) -> Guest {
        raise_descriptor_limit();
        Guest::on(user(config), accepts, MAC, Ipv4Addr::new(10, 0, 2, 15))
    }

    pub fn on(mut link: Box<dyn Link>, accepts: Accepts, mac: [u8; 6], ip: Ipv4Addr) -> Guest {
        link.guest_accepts(accepts);
        let mut cable = Cable {
            link,
            received: VecDeque::new(),
            refused: VecDeque::new(),
            from_guest: 0,
            largest: 0,
            loses_one_in: None,
            count: 0,
            checks: !accepts.checksum,
        };
        let mut config = Config::new(EthernetAddress(mac).into());
        config.random_seed = 7;
        let start = Instant::now();
        let mut interface = Interface::new(config, &mut cable, smoltcp::time::Instant::ZERO);
        interface.update_ip_addrs(|ips| ips.push(IpCidr::new(ip.into(), 24)).unwrap());
        let gateway = GATEWAY;
        interface
            .routes_mut()
            .add_default_ipv4_route(gateway)
            .unwrap();
        Guest {
            cable,
            interface,
            sockets: SocketSet::new(Vec::new()),
            start,
        }
    }

    pub fn poll(&mut self) {
        self.cable.link.service();
        let now = smoltcp::time::Instant::from_micros(self.start.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.cable, &mut self.sockets);
    }

    /// Polls until `done` says so.
    #[track_caller]
    pub fn until<R>(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> Option<R>) -> R {
        let start = Instant::now();
        loop {
            self.poll();
            if let Some(result) = done(self) {
                return result;
            }
            assert!(start.elapsed() < LIMIT, "{what}: not in {LIMIT:?}");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    pub fn stream(&mut self, buffer: usize) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; buffer]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    pub fn connect(&mut self, to: SocketAddrV4, port: u16) -> SocketHandle {
        let handle = self.stream(256 << 10);
        let socket = self.sockets.get_mut::<tcp::Socket>(handle);
        let context = self.interface.context();
        socket
            .connect(context, (*to.ip(), to.port()), port)
            .unwrap();
        handle
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Sends of `data` behind what was `sent`, and ends; adds what comes in to what was `received`.
    pub fn exchange_some(
        &mut self,
        handle: SocketHandle,
        data: &[u8],
        sent: &mut usize,
        received: &mut Vec<u8>,
    ) {
        let socket = self.tcp(handle);
        if socket.may_send() {
            while socket.can_send() && *sent < data.len() {
                *sent += socket.send_slice(&data[*sent..]).unwrap();
            }
            if *sent == data.len() {
                socket.close();
            }
        }
        while socket.can_recv() {
            let take = |bytes: &mut [u8]| {
                received.extend_from_slice(bytes);
                (bytes.len(), ())
            };
            socket.recv(take).unwrap();
        }
    }

    pub fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 8], vec![0; 65536]);
        let mut socket = udp::Socket::new(buffer(), buffer());
        socket.bind(port).unwrap();
        self.sockets.add(socket)
    }

    pub fn icmp(&mut self, endpoint: icmp::Endpoint) -> SocketHandle {
        let buffer =
            || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 8], vec![0; 4096]);
        let mut socket = icmp::Socket::new(buffer(), buffer());
        socket.bind(endpoint).unwrap();
        self.sockets.add(socket)
    }
}

/// A frame of the guest with an IPv4 payload.
pub fn ip_frame(
    protocol: smoltcp::wire::IpProtocol,
    to: Ipv4Addr,
    payload: &[u8],
    offset: u16,
    more: bool,
) -> Vec<u8> {
    let mut frame = vec![0; 34 + payload.len()];
    frame[..6].copy_from_slice(&[0x52, 0x55, 10, 0, 2, 2]);
    frame[6..12].copy_from_slice(&MAC);
    frame[12] = 8;
    let mut ip = smoltcp::wire::Ipv4Packet::new_unchecked(&mut frame[14..]);
    ip.set_version(4);
    ip.set_header_len(20);
    ip.set_total_len(20 + payload.len() as u16);
    ip.set_ident(99);
    ip.set_frag_offset(offset);
    ip.set_more_frags(more);
    ip.set_hop_limit(64);
    ip.set_next_header(protocol);
    ip.set_src_addr(Ipv4Address::new(10, 0, 2, 15));
    ip.set_dst_addr(to);
    ip.fill_checksum();
    ip.payload_mut().copy_from_slice(payload);
    frame
}

/// Bytes that show where they belong.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// A server for one client.
pub fn server<R: Send + 'static>(
    serve: impl FnOnce(TcpStream) -> R + Send + 'static,
) -> (SocketAddrV4, JoinHandle<R>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let thread = thread::spawn(move || serve(listener.accept().unwrap().0));
    (SocketAddrV4::new(GATEWAY, port), thread)
}

/// Sends `data`, ends, and reads to the end.
pub fn exchange(guest: &mut Guest, to: SocketAddrV4, port: u16, data: &[u8]) -> Vec<u8> {
    let handle = guest.connect(to, port);
    let (mut sent, mut received) = (0, Vec::new());
    guest.until("an exchange", |guest| {
        guest.exchange_some(handle, data, &mut sent, &mut received);
        let state = guest.tcp(handle).state();
        let ended = matches!(state, State::TimeWait | State::Closed);
        ended.then_some(())
    });
    guest.sockets.remove(handle);
    received
}

/// Leads an address of the host to a port of the guest.
pub fn forwarded(transport: Transport, host: SocketAddr, port: u16) -> Vec<Forward> {
    vec![Forward {
        transport,
        host,
        guest: SocketAddrV4::new(GUEST, port),
    }]
}
