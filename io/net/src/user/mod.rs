//! User networking: the guest in a network of its own, 10.0.2.0/24, whose gateway is an ordinary process.
//!
//! Nothing of it needs a privilege. A packet of the guest is not routed: what it is *for* is done with a socket of the host. A
//! TCP connection of the guest ends here and goes on as one of the host (`tcp`), datagrams and echo requests likewise
//! (`session`), the guest's address and name server come from `dhcp` and `resolver`, and forwarded ports (`forward`) lead the other way.
//!
//! The formats of packets are smoltcp's; its TCP is not used (docs/network.md says why).

mod dhcp;
mod forward;
mod fragments;
mod network;
mod poller;
mod resolver;
mod ring;
mod session;
mod table;
pub mod tcp;
pub mod wire;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;

use doppel_device::{Clock, NANOS_PER_SECOND, Nanos};
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol,
    EthernetRepr, Icmpv4Packet, IpProtocol, Ipv4Packet, UdpPacket,
};

use crate::link::{Accepts, Link, Offload, Received, Sent, Sink};
use dhcp::Dhcp;
pub use forward::{Forward, ForwardError, Transport};
use forward::{Forwards, Waiting};
use fragments::Fragments;
use network::{DNS, GATEWAY, GATEWAY_MAC, Network, is_for_many};
pub use network::{GUEST, may_be_guest};
use poller::{Kind, Poller, Token};
use resolver::Resolvers;
use session::{Ends, Protocol, Sessions};
use tcp::{SYN_FRAME, Tcp};

const ECHO_REQUEST: u8 = 8;
/// After so long a port is looked at again at which somebody waits for whom the host had no room.
const WITHOUT_ROOM: Nanos = NANOS_PER_SECOND / 5;

/// What a user network is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserConfig {
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<Forward>,
    /// The guest reaches nothing by itself.
    pub restrict: bool,
    /// Name servers to use instead of the host's.
    pub dns: Vec<SocketAddr>,
    /// Where the host's are named.
    pub resolv_conf: PathBuf,
    /// The longest IP packet, unfinished segments aside.
    pub mtu: u16,
    /// TCP connections at once.
    pub connections: usize,
    /// Datagram sessions at once.
    pub sessions: usize,
}

impl Default for UserConfig {
    fn default() -> Self {
        UserConfig {
            forwards: Vec::new(),
            restrict: false,
            dns: Vec::new(),
            resolv_conf: "/etc/resolv.conf".into(),
            mtu: 1500,
            connections: 4096,
            sessions: 1024,
        }
    }
}

/// Why there is no user network.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// A port cannot be forwarded.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// The host refused something.
    #[error("the user network cannot be made: {0}")]
    Host(#[from] std::io::Error),
}

/// The guest's gateway.
pub struct UserNetwork {
    network: Network,
    dhcp: Dhcp,
    tcp: Tcp,
    sessions: Sessions,
    fragments: Fragments,
    forwards: Forwards,
    /// Forwarded ports at which more clients wait than were let in, and when they are looked at again.
    crowded: BTreeMap<Token, Nanos>,
}

impl UserNetwork {
    /// A network for a guest with this MAC address.
    pub fn new(
        config: &UserConfig,
        guest: [u8; 6],
        clock: Arc<dyn Clock>,
    ) -> Result<Self, UserError> {
        let poller = Poller::new()?;
        let forwards = Forwards::open(&config.forwards, &poller)?;
        let resolvers = match config.dns.is_empty() {
            true => Resolvers::of_file(&config.resolv_conf),
            false => Resolvers::fixed(config.dns.clone()),
        };
        let guest = EthernetAddress(guest);
        let mtu = config.mtu.into();
        let (connections, sessions) = affordable(config.connections, config.sessions);
        Ok(UserNetwork {
            network: Network::new(clock, poller, resolvers, guest, mtu, config.restrict),
            dhcp: Dhcp::default(),
            tcp: Tcp::new(connections),
            sessions: Sessions::new(sessions),
            fragments: Fragments::default(),
            forwards,
            crowded: BTreeMap::new(),
        })
    }

    /// TCP connections, datagram sessions, and bytes of memory in their buffers.
    pub fn usage(&self) -> (usize, usize, usize) {
        (self.tcp.len(), self.sessions.len(), self.tcp.memory())
    }

    fn frame(&mut self, bytes: &[u8]) -> Option<()> {
        let frame = EthernetFrame::new_checked(bytes).ok()?;
        let to = frame.dst_addr();
        if to != GATEWAY_MAC && !to.is_multicast() {
            return None;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => self.arp(frame.payload()),
            EthernetProtocol::Ipv4 => self.ip(frame.src_addr(), frame.payload()),
            _ => None,
        }
    }

    fn arp(&mut self, bytes: &[u8]) -> Option<()> {
        let ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr: mac,
            source_protocol_addr: ip,
            target_protocol_addr: wanted,
            ..
        } = ArpRepr::parse(&ArpPacket::new_checked(bytes).ok()?).ok()?
        else {
            return None;
        };
        self.network.learn(ip, mac);
        if operation != ArpOperation::Request || ![GATEWAY, DNS].contains(&wanted) {
            return None;
        }
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: GATEWAY_MAC,
            source_protocol_addr: wanted,
            target_hardware_addr: mac,
            target_protocol_addr: ip,
        };
        let header = EthernetRepr {
            src_addr: GATEWAY_MAC,
            dst_addr: mac,
            ethertype: EthernetProtocol::Arp,
        };
        let mut frame = vec![0; header.buffer_len() + reply.buffer_len()];
        header.emit(&mut EthernetFrame::new_unchecked(&mut frame));
        let body = &mut frame[header.buffer_len()..];
        reply.emit(&mut ArpPacket::new_unchecked(body));
        self.network.post(Offload::default(), frame);
        Some(())
    }

    fn ip(&mut self, mac: EthernetAddress, bytes: &[u8]) -> Option<()> {
        let packet = Ipv4Packet::new_checked(bytes).ok()?;
        if packet.version() != 4 || !packet.verify_checksum() {
            return None;
        }
        let (from, to) = (packet.src_addr(), packet.dst_addr());
        let protocol = packet.next_header();
        if from.is_unspecified() {
            return self.boot_message(protocol, packet.payload());
        }
        if !may_be_guest(from) {
            return None;
        }
        self.network.learn(from, mac);
        if packet.more_frags() || packet.frag_offset() != 0 {
            let whole = self.fragments.add(&packet, self.network.now)?;
            return self.payload(protocol, from, to, &whole);
        }
        self.payload(protocol, from, to, packet.payload())
    }

    /// A packet of somebody who has no address yet.
    fn boot_message(&mut self, protocol: IpProtocol, payload: &[u8]) -> Option<()> {
        let datagram = UdpPacket::new_checked(payload).ok()?;
        if protocol == IpProtocol::Udp && datagram.dst_port() == dhcp::SERVER_PORT {
            self.dhcp.message(&mut self.network, datagram.payload());
        }
        Some(())
    }

    fn payload(
        &mut self,
        protocol: IpProtocol,
        from: Ipv4Addr,
        to: Ipv4Addr,
        bytes: &[u8],
    ) -> Option<()> {
        let network = &mut self.network;
        match protocol {
            IpProtocol::Tcp | IpProtocol::Icmp if is_for_many(to) => {}
            IpProtocol::Tcp => self.tcp.packet(network, from, to, bytes),
            IpProtocol::Udp => self.datagram(from, to, bytes)?,
            IpProtocol::Icmp => {
                let packet = Icmpv4Packet::new_checked(bytes).ok()?;
                if u8::from(packet.msg_type()) == ECHO_REQUEST && packet.msg_code() == 0 {
                    let ends = Ends {
                        protocol: Protocol::Echo,
                        guest: SocketAddrV4::new(from, packet.echo_ident()),
                        remote: SocketAddrV4::new(to, 0),
                    };
                    session::echo(network, &mut self.sessions, ends, bytes);
                }
            }
            _ => {}
        }
        Some(())
    }

    fn datagram(&mut self, from: Ipv4Addr, to: Ipv4Addr, bytes: &[u8]) -> Option<()> {
        let datagram = UdpPacket::new_checked(bytes).ok()?;
        let data = datagram.payload();
        if datagram.dst_port() == dhcp::SERVER_PORT && (to == GATEWAY || to.is_broadcast()) {
            self.dhcp.message(&mut self.network, data);
            return Some(());
        }
        let ends = Ends {
            protocol: Protocol::Udp,
            guest: SocketAddrV4::new(from, datagram.src_port()),
            remote: SocketAddrV4::new(to, datagram.dst_port()),
        };
        if network::is_global_unicast(to) && !is_for_many(to) {
            self.sessions.send(&mut self.network, ends, data);
        }
        Some(())
    }

    fn let_in(&mut self, token: Token) {
        let waiting = match token.kind() {
            Some(Kind::Listener) => self
                .forwards
                .accept(token, &mut self.network, &mut self.tcp),
            Some(Kind::UdpForward) => {
                self.forwards
                    .receive(token, &mut self.network, &mut self.sessions)
            }
            _ => Waiting::Nobody,
        };
        let again = match waiting {
            Waiting::Nobody => return,
            Waiting::More => self.network.now,
            Waiting::WithoutRoom => self.network.now + WITHOUT_ROOM,
        };
        self.crowded.insert(token, again);
    }

    /// Gives a posted frame to `sink`, if there is one.
    fn posted(&mut self, room: usize, sink: &mut dyn FnMut(Offload, &[&[u8]])) -> Received {
        let Some((offload, frame)) = self.network.posted() else {
            return Received::Nothing;
        };
        if frame.len() > room {
            return Received::TooLong(frame.len());
        }
        sink(*offload, &[frame]);
        self.network.drop_posted();
        Received::Frame
    }
}

impl Link for UserNetwork {
    fn accepts(&self) -> Accepts {
        Accepts {
            tcp6: false,
            ..Accepts::ALL
        }
    }

    fn guest_accepts(&mut self, accepts: Accepts) {
        self.network.guest_accepts(accepts);
    }

    fn send(&mut self, _offload: Offload, frame: &[u8]) -> Sent {
        // What is left undone is not needed: no packet leaves, only what is in it.
        self.network.now = self.network.clock.now();
        let _dropped = self.frame(frame);
        Sent::Taken
    }

    fn receive(&mut self, room: usize, sink: Sink) -> Received {
        self.network.now = self.network.clock.now();
        loop {
            match self.posted(room, sink) {
                Received::Nothing => {}
                result => return result,
            }
            let Some(token) = self.network.ready.pop_front() else {
                return Received::Nothing;
            };
            match token.kind() {
                Some(Kind::Tcp) => match self.tcp.produce(&mut self.network, token, room, sink) {
                    Received::Nothing => {}
                    result => return result,
                },
                _ => self.sessions.produce(&mut self.network, token),
            }
        }
    }

    fn next_length(&self) -> usize {
        match (self.network.posted(), self.network.ready.front()) {
            (Some((_, frame)), _) => frame.len(),
            (None, Some(token)) => self.tcp.next_length(*token, self.network.mtu),
            (None, None) => 0,
        }
    }

    fn discard(&mut self) {
        if self.network.posted().is_some() {
            return self.network.drop_posted();
        }
        // A connection makes its frame when it is asked: this one is lost on its way.
        self.receive(SYN_FRAME, &mut |_, _| {});
    }

    fn has_frames(&self) -> bool {
        self.network.posted().is_some() || !self.network.ready.is_empty()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.network.poller.as_fd()
    }

    fn deadline(&self) -> Option<Nanos> {
        let crowded = self.crowded.values().min().copied();
        let deadlines = [crowded, self.tcp.deadline(), self.sessions.deadline()];
        deadlines.into_iter().flatten().min()
    }

    fn service(&mut self) -> bool {
        self.network.now = self.network.clock.now();
        let now = self.network.now;
        let due = self.crowded.extract_if(.., |_, again| *again <= now);
        for (token, _) in due.collect::<Vec<_>>() {
            self.let_in(token);
        }
        for (token, flags) in self.network.poller.events() {
            match token.kind() {
                Some(Kind::Tcp) => self.tcp.event(&mut self.network, token, flags),
                Some(Kind::Session) => self.sessions.event(&mut self.network, token, flags),
                _ => self.let_in(token),
            }
        }
        self.tcp.expire(&mut self.network);
        self.sessions.expire(&mut self.network);
        false
    }
}

/// What the process's limit of descriptors has room for: half of it for connections and sessions together.
fn affordable(connections: usize, sessions: usize) -> (usize, usize) {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let half = limit.map_or(usize::MAX, |n| n as usize / 2);
    let wanted = connections + sessions;
    if wanted <= half {
        return (connections, sessions);
    }
    let share = |n: usize| (n * half / wanted).max(1);
    (share(connections), share(sessions))
}
