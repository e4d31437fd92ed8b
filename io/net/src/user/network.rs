//! The network that the guest sees: its addresses, its neighbours, and small frames on their way to it.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

use doppel_device::{Clock, Nanos};
use rustix::io::Errno;
use smoltcp::wire::{EthernetAddress, IpProtocol};

use crate::finish::finish_waiting;
use crate::link::{Accepts, Offload};
use crate::user::poller::{Poller, Token};
use crate::user::resolver::Resolvers;
use crate::user::wire::{self, Route};

/// The network, 10.0.2.0/24, as QEMU's users know it.
pub const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 0);
/// Its mask.
pub const MASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// The gateway; as a destination, the host's loopback.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The address that the first guest gets, and to which ports are forwarded.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The broadcast address.
pub const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 255);
/// The gateway's MAC address.
pub const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x52, 0x55, 10, 0, 2, 2]);

const DNS_PORT: u16 = 53;
const NEIGHBOURS_MAX: usize = 256;
const PACKET_MAX: usize = 65535;
const OUTBOX_FRAMES: usize = 1024;
const OUTBOX_BYTES: usize = 1 << 20;

/// Why a packet does not get where it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Nobody listens.
    Refused,
    /// ICMP destination unreachable, with its code.
    Unreachable(u8),
}

impl Refusal {
    /// No such network.
    pub const NETWORK: Refusal = Refusal::Unreachable(0);
    /// No such host.
    pub const HOST: Refusal = Refusal::Unreachable(1);
    /// Nobody listens at a UDP port.
    pub const PORT: u8 = 3;
    /// Forbidden.
    pub const PROHIBITED: Refusal = Refusal::Unreachable(13);

    /// What an error of the host's socket means.
    pub fn from_errno(error: Errno) -> Refusal {
        match error {
            Errno::NETUNREACH | Errno::NETDOWN => Refusal::NETWORK,
            Errno::HOSTUNREACH | Errno::HOSTDOWN | Errno::TIMEDOUT | Errno::ADDRNOTAVAIL => {
                Refusal::HOST
            }
            Errno::ACCESS | Errno::PERM => Refusal::PROHIBITED,
            _ => Refusal::Refused,
        }
    }
}

/// What all protocols share.
pub struct Network {
    /// The time of the call that is served.
    pub now: Nanos,
    /// The machine's clock.
    pub clock: Arc<dyn Clock>,
    /// Unfinished frames that the guest takes.
    pub accepts: Accepts,
    /// The longest IP packet, but for unfinished ones.
    pub mtu: usize,
    /// Only forwarded ports.
    pub restrict: bool,
    /// The host's name servers.
    pub resolvers: Resolvers,
    /// Host sockets.
    pub poller: Poller,
    /// Flows that may have a frame for the guest, each once.
    pub ready: VecDeque<Token>,
    neighbours: HashMap<Ipv4Addr, EthernetAddress>,
    guest: EthernetAddress,
    outbox: VecDeque<(Offload, Vec<u8>)>,
    outbox_bytes: usize,
    identification: u16,
}

impl Network {
    /// A network with nothing in it but a guest whose MAC address is `guest`.
    pub fn new(
        clock: Arc<dyn Clock>,
        poller: Poller,
        resolvers: Resolvers,
        guest: EthernetAddress,
        mtu: usize,
        restrict: bool,
    ) -> Self {
        Network {
            now: clock.now(),
            clock,
            accepts: Accepts::default(),
            mtu,
            restrict,
            resolvers,
            poller,
            ready: VecDeque::new(),
            neighbours: HashMap::new(),
            guest,
            outbox: VecDeque::new(),
            outbox_bytes: 0,
            identification: 0,
        }
    }

    /// Remembers who has `address`.
    pub fn learn(&mut self, address: Ipv4Addr, mac: EthernetAddress) {
        if !may_be_guest(address) || !mac.is_unicast() {
            return;
        }
        if self.neighbours.len() < NEIGHBOURS_MAX || self.neighbours.contains_key(&address) {
            self.neighbours.insert(address, mac);
        }
    }

    /// A flow that was ready has ended. Its token would stay for as long as the guest has no buffers.
    pub fn forget(&mut self, token: Token) {
        self.ready.retain(|ready| *ready != token);
    }

    /// How a packet gets from `source` to the guest at `destination`.
    pub fn route(&self, source: Ipv4Addr, destination: Ipv4Addr) -> Route {
        let to = self.neighbours.get(&destination);
        Route {
            from: GATEWAY_MAC,
            to: *to.unwrap_or(&self.guest),
            source,
            destination,
        }
    }

    /// Where on the host a packet to `to` goes.
    pub fn target(&mut self, to: SocketAddrV4) -> Result<SocketAddr, Refusal> {
        if self.restrict {
            return Err(Refusal::PROHIBITED);
        }
        let ip = *to.ip();
        match ip {
            GATEWAY => Ok((Ipv4Addr::LOCALHOST, to.port()).into()),
            DNS if is_name_server(to) => self.resolvers.get(self.now).ok_or(Refusal::HOST),
            DNS => Err(Refusal::Refused),
            _ if is_local(ip) || !is_global_unicast(ip) => Err(Refusal::HOST),
            _ => Ok(SocketAddr::V4(to)),
        }
    }

    /// Has `begin` turn to where a packet to `to` goes; from a name server that cannot be reached, to the next one.
    pub fn reach<T>(
        &mut self,
        to: SocketAddrV4,
        begin: impl Fn(SocketAddr) -> Result<T, Errno>,
    ) -> Result<T, Refusal> {
        let mut tried = 1;
        loop {
            let target = self.target(to)?;
            match begin(target) {
                Err(_) if is_name_server(to) && tried < self.resolvers.len() => {
                    tried += 1;
                    self.resolvers.failed(target, self.now);
                }
                result => return result.map_err(Refusal::from_errno),
            }
        }
    }

    /// A number for the fragments of a packet.
    fn identification(&mut self) -> u16 {
        self.identification = self.identification.wrapping_add(1);
        self.identification
    }

    /// Sends a frame to the guest; it is lost where too many wait.
    pub fn post(&mut self, offload: Offload, frame: Vec<u8>) {
        if self.outbox.len() < OUTBOX_FRAMES && self.outbox_bytes + frame.len() <= OUTBOX_BYTES {
            self.outbox_bytes += frame.len();
            self.outbox.push_back((offload, frame));
        }
    }

    /// Whether so many more frames can be posted.
    fn has_room(&self, frames: usize, bytes: usize) -> bool {
        self.outbox.len() + frames <= OUTBOX_FRAMES && self.outbox_bytes + bytes <= OUTBOX_BYTES
    }

    /// The guest takes such unfinished frames from now on, and those that wait were posted for one that may have taken others.
    pub fn guest_accepts(&mut self, accepts: Accepts) {
        self.accepts = accepts;
        finish_waiting(&mut self.outbox, accepts);
        self.outbox_bytes = self.outbox.iter().map(|(_, frame)| frame.len()).sum();
    }

    /// The next posted frame.
    pub fn posted(&self) -> Option<&(Offload, Vec<u8>)> {
        self.outbox.front()
    }

    /// Drops the next posted frame.
    pub fn drop_posted(&mut self) {
        if let Some((_, frame)) = self.outbox.pop_front() {
            self.outbox_bytes -= frame.len();
        }
    }

    /// Tells the guest at `from` that what it sent to `to` does not arrive; `rest` are bytes 4 to 7 behind the IP header.
    pub fn unreachable(
        &mut self,
        code: u8,
        from: SocketAddrV4,
        to: SocketAddrV4,
        protocol: IpProtocol,
        rest: [u8; 4],
    ) {
        let quote = wire::quote(from, to, protocol, rest);
        let route = self.route(GATEWAY, *from.ip());
        self.post(
            Offload::default(),
            wire::icmp_error(&route, 3, code, &quote),
        );
    }

    /// Sends a UDP datagram to the guest, in fragments where it is too long.
    pub fn post_datagram(&mut self, from: SocketAddrV4, to: SocketAddrV4, data: &[u8]) {
        let route = self.route(*from.ip(), *to.ip());
        let whole = wire::IPV4 + wire::UDP + data.len() <= self.mtu;
        let partial = whole && self.accepts.checksum;
        let (offload, bytes) = wire::datagram(&route, from.port(), to.port(), data, partial);
        self.post_packet(&route, IpProtocol::Udp, offload, &bytes);
    }

    /// Sends the payload of an IP packet to the guest, in fragments where it is too long for the network. What is longer than any packet is lost.
    pub fn post_packet(
        &mut self,
        route: &Route,
        protocol: IpProtocol,
        offload: Offload,
        bytes: &[u8],
    ) {
        if wire::IPV4 + bytes.len() > PACKET_MAX {
            return;
        }
        let whole = wire::IPV4 + bytes.len() <= self.mtu;
        let step = match whole {
            true => bytes.len().max(1),
            false => (self.mtu - wire::IPV4) & !7,
        };
        let identification = if whole { 0 } else { self.identification() };
        let pieces = bytes.len().div_ceil(step);
        if !self.has_room(pieces, bytes.len() + pieces * wire::BODY) {
            return;
        }
        for (n, piece) in bytes.chunks(step).enumerate() {
            let fragment = wire::Fragment {
                identification,
                offset: (n * step) as u16,
                more: n + 1 < pieces,
            };
            let mut frame = vec![0; wire::BODY + piece.len()];
            wire::put_headers(&mut frame, route, protocol, piece.len(), fragment);
            frame[wire::BODY..].copy_from_slice(piece);
            self.post(offload, frame);
        }
    }
}

/// Whether what is sent there is a question to the host's name servers.
pub fn is_name_server(to: SocketAddrV4) -> bool {
    *to.ip() == DNS && to.port() == DNS_PORT
}

/// Whether an address is in the guest's network.
pub fn is_local(address: Ipv4Addr) -> bool {
    address & MASK == NETWORK
}

/// Whether a guest may have an address.
pub fn may_be_guest(address: Ipv4Addr) -> bool {
    is_local(address) && ![NETWORK, GATEWAY, DNS, BROADCAST].contains(&address)
}

/// Whether an address is that of many, about packets to which nobody is told of errors (RFC 1122, 3.2.2).
pub fn is_for_many(address: Ipv4Addr) -> bool {
    address.is_multicast() || address.is_broadcast() || address == BROADCAST
}

/// Whether packets of a guest may go there at all.
pub fn is_global_unicast(ip: Ipv4Addr) -> bool {
    let [first, ..] = ip.octets();
    first != 0 && first != 127 && first < 224
}

/// As what the guest sees a peer on the host: its address, or the gateway's where it could not answer to that.
pub fn seen_from_guest(peer: SocketAddr) -> SocketAddrV4 {
    let ip = match peer.ip() {
        IpAddr::V4(ip) if is_global_unicast(ip) && !is_local(ip) => ip,
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) if is_global_unicast(ip) && !is_local(ip) => ip,
            _ => GATEWAY,
        },
        _ => GATEWAY,
    };
    SocketAddrV4::new(ip, peer.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_that_the_guest_cannot_answer_is_the_gateway() {
        let seen = |peer: &str| seen_from_guest(peer.parse().unwrap()).to_string();
        assert_eq!(seen("127.0.0.1:5"), "10.0.2.2:5");
        assert_eq!(seen("[::1]:5"), "10.0.2.2:5");
        assert_eq!(seen("10.0.2.77:5"), "10.0.2.2:5");
        assert_eq!(seen("192.0.2.1:5"), "192.0.2.1:5");
        assert_eq!(seen("[::ffff:192.0.2.1]:5"), "192.0.2.1:5");
    }
}
