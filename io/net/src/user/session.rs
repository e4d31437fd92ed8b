//! Sessions: datagrams between an address of the guest and one outside, UDP and echo requests alike.
//!
//! Each has a connected socket of its own, so that an answer finds its way and a refusal is told to whom it concerns. A session
//! ends when nothing was said for a while, as a NAT's mapping does (RFC 4787).

use std::collections::{BTreeSet, HashMap};
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use doppel_device::{NANOS_PER_SECOND, Nanos};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use smoltcp::wire::{Icmpv4Packet, IpProtocol};

use crate::link::Offload;
use crate::user::network::{DNS, GATEWAY, Network, Refusal, is_name_server};
use crate::user::poller::{EventFlags, Kind, Token};
use crate::user::table::Table;
use crate::user::wire;

const UNANSWERED: Nanos = 30 * NANOS_PER_SECOND;
const ANSWERED: Nanos = 120 * NANOS_PER_SECOND;
const DATAGRAM_MAX: usize = 65535;

/// The protocol of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// UDP.
    Udp,
    /// Echo request and reply; the guest's port is the identifier, the other is 0.
    Echo,
}

/// The two ends of a session as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ends {
    pub protocol: Protocol,
    pub guest: SocketAddrV4,
    pub remote: SocketAddrV4,
}

impl Ends {
    /// The protocol and bytes 4 to 7 of a packet of `len` bytes, as an ICMP error quotes them.
    fn quoted(&self, len: usize) -> (IpProtocol, [u8; 4]) {
        let [high, low] = ((wire::UDP + len) as u16).to_be_bytes();
        match self.protocol {
            Protocol::Udp => (IpProtocol::Udp, [high, low, 0, 0]),
            Protocol::Echo => {
                let [high, low] = self.guest.port().to_be_bytes();
                (IpProtocol::Icmp, [high, low, 0, 0])
            }
        }
    }
}

enum Socket {
    Own(OwnedFd),
    /// The socket of a forwarded port, and the client.
    Forward(Arc<OwnedFd>, SocketAddr),
}

struct Session {
    ends: Ends,
    socket: Socket,
    heard: Nanos,
    answered: bool,
    // The host's, where it is with one.
    name_server: Option<SocketAddr>,
    last_len: usize,
    armed: Nanos,
    queued: bool,
    readable: bool,
}

impl Session {
    fn deadline(&self) -> Nanos {
        self.heard + if self.answered { ANSWERED } else { UNANSWERED }
    }
}

/// All sessions.
pub struct Sessions {
    table: Table<Session>,
    by_ends: HashMap<Ends, Token>,
    by_client: HashMap<(u32, SocketAddr), Token>,
    deadlines: BTreeSet<(Nanos, Token)>,
    limit: usize,
    buffer: Vec<u8>,
}

impl Sessions {
    /// None yet, and never more than `limit`.
    pub fn new(limit: usize) -> Self {
        Sessions {
            table: Table::new(Kind::Session),
            by_ends: HashMap::new(),
            by_client: HashMap::new(),
            deadlines: BTreeSet::new(),
            limit: limit.max(1),
            buffer: vec![0; DATAGRAM_MAX],
        }
    }

    /// Number of sessions.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// When [`Sessions::expire`] has something to do.
    pub fn deadline(&self) -> Option<Nanos> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// The guest sends `data`: what UDP carries, or an ICMP packet.
    pub fn send(&mut self, network: &mut Network, ends: Ends, data: &[u8]) {
        if let Some(&token) = self.by_ends.get(&ends) {
            if !self.is_with_another(network, token) {
                return self.pass_on(network, token, data);
            }
            self.end(network, token);
        }
        match self.open(network, ends) {
            Ok(token) => self.pass_on(network, token, data),
            Err(Refusal::Refused) => unreachable(network, ends, Refusal::PORT, data.len()),
            Err(Refusal::Unreachable(code)) => unreachable(network, ends, code, data.len()),
        }
    }

    /// Whether a session is with another name server than is asked now.
    fn is_with_another(&self, network: &mut Network, token: Token) -> bool {
        let Some(session) = self.table.get(token) else {
            return false;
        };
        let server = session.name_server;
        server.is_some() && network.target(session.ends.remote).ok() != server
    }

    fn open(&mut self, network: &mut Network, ends: Ends) -> Result<Token, Refusal> {
        let begin = |target| Ok((target, connect(ends.protocol, target)?));
        let (target, socket) = network.reach(ends.remote, begin)?;
        self.make_room(network, false);
        let token = self.table.next_token();
        network
            .poller
            .add(&socket, token)
            .map_err(|_| Refusal::PROHIBITED)?;
        let token = self.insert(network, ends, Socket::Own(socket));
        if let Some(session) = self.table.get_mut(token) {
            session.name_server = Some(target).filter(|_| is_name_server(ends.remote));
        }
        Ok(token)
    }

    /// Sees that there is a slot for another session: the one whose time is up first goes. Clients of forwarded ports, whose
    /// addresses may be made up, have half of them at most.
    fn make_room(&mut self, network: &mut Network, forwarded: bool) {
        let many = forwarded && self.by_client.len() >= self.limit.div_ceil(2);
        if !many && self.table.len() < self.limit {
            return;
        }
        let is_client = |s: &Session| matches!(s.socket, Socket::Forward(..));
        let sessions = self.table.iter().filter(|(_, s)| !many || is_client(s));
        let first = sessions.min_by_key(|(_, s)| s.deadline());
        if let Some(token) = first.map(|(token, _)| token) {
            self.end(network, token);
        }
    }

    fn insert(&mut self, network: &Network, ends: Ends, socket: Socket) -> Token {
        let mut session = Session {
            ends,
            socket,
            heard: network.now,
            answered: false,
            name_server: None,
            last_len: 0,
            armed: 0,
            queued: false,
            readable: false,
        };
        session.armed = session.deadline();
        let armed = session.armed;
        let token = self.table.insert(session);
        self.by_ends.insert(ends, token);
        self.deadlines.insert((armed, token));
        token
    }

    fn pass_on(&mut self, network: &mut Network, token: Token, data: &[u8]) {
        let Some(session) = self.table.get_mut(token) else {
            return;
        };
        session.heard = network.now;
        session.last_len = data.len();
        if let Some(server) = session.name_server {
            network.resolvers.asked(server, network.now);
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let send = || match &session.socket {
            Socket::Own(socket) => rustix::net::send(socket, data, flags),
            Socket::Forward(socket, client) => rustix::net::sendto(&**socket, data, flags, client),
        };
        if let Err(error) = retry_on_intr(send) {
            self.failed(network, token, error);
            // The error may have been that of an earlier datagram; this one has its chance.
            if let Some(Session {
                socket: Socket::Own(socket),
                ..
            }) = self.table.get_mut(token)
            {
                let _ = rustix::net::send(&*socket, data, flags);
            }
        }
    }

    /// Tells the guest of an error that it is the cause of.
    fn failed(&mut self, network: &mut Network, token: Token, error: Errno) {
        let Some(session) = self.table.get_mut(token) else {
            return;
        };
        if let Some(server) = session.name_server {
            network.resolvers.failed(server, network.now);
        }
        let (ends, len) = (session.ends, session.last_len);
        match (error, Refusal::from_errno(error)) {
            (Errno::CONNREFUSED, _) => unreachable(network, ends, Refusal::PORT, len),
            (_, Refusal::Unreachable(code)) => unreachable(network, ends, code, len),
            _ => {}
        }
    }

    /// Something happened at a session's socket.
    pub fn event(&mut self, network: &mut Network, token: Token, flags: EventFlags) {
        if let Some(session) = self.table.get_mut(token)
            && flags.intersects(EventFlags::IN | EventFlags::ERR)
        {
            session.readable = true;
            if !std::mem::replace(&mut session.queued, true) {
                network.ready.push_back(token);
            }
        }
    }

    /// Posts the next datagram of a session that was taken from the queue of those that are ready.
    pub fn produce(&mut self, network: &mut Network, token: Token) {
        let Some(session) = self.table.get_mut(token) else {
            return;
        };
        session.queued = false;
        let Socket::Own(socket) = &session.socket else {
            return;
        };
        let receive = || rustix::net::recv(socket, &mut self.buffer[..], RecvFlags::DONTWAIT);
        match retry_on_intr(receive) {
            Ok((n, _)) => {
                session.answered = true;
                session.heard = network.now;
                if let Some(server) = session.name_server {
                    network.resolvers.answered(server);
                }
                deliver(network, session.ends, &mut self.buffer[..n]);
            }
            Err(Errno::AGAIN) => session.readable = false,
            Err(error) => self.failed(network, token, error),
        }
        self.event_again(network, token);
    }

    fn event_again(&mut self, network: &mut Network, token: Token) {
        if let Some(session) = self.table.get_mut(token)
            && session.readable
        {
            session.queued = true;
            network.ready.push_back(token);
        }
    }

    /// A client of the forwarded port `forward` sent `data` to the guest.
    pub fn forward(
        &mut self,
        network: &mut Network,
        forward: (u32, &Arc<OwnedFd>),
        client: (SocketAddr, SocketAddrV4),
        guest: SocketAddrV4,
        data: &[u8],
    ) {
        let (number, socket) = forward;
        let (client, seen) = client;
        let known = self.by_client.get(&(number, client)).copied();
        let token = known.or_else(|| {
            let ends = self.free_ends(seen, guest)?;
            self.make_room(network, true);
            let socket = Socket::Forward(socket.clone(), client);
            let token = self.insert(network, ends, socket);
            self.by_client.insert((number, client), token);
            Some(token)
        });
        if let Some(session) = token.and_then(|token| self.table.get_mut(token)) {
            session.heard = network.now;
            session.answered = true;
            network.post_datagram(session.ends.remote, guest, data);
        }
    }

    fn free_ends(&self, seen: SocketAddrV4, guest: SocketAddrV4) -> Option<Ends> {
        let mut candidates = (0..=u16::MAX).map(|n| Ends {
            protocol: Protocol::Udp,
            guest,
            remote: SocketAddrV4::new(*seen.ip(), seen.port().wrapping_add(n)),
        });
        candidates.find(|e| e.remote.port() != 0 && !self.by_ends.contains_key(e))
    }

    /// Time has passed.
    pub fn expire(&mut self, network: &mut Network) {
        while let Some(&(at, token)) = self.deadlines.first()
            && at <= network.now
        {
            self.deadlines.remove(&(at, token));
            let Some(session) = self.table.get_mut(token) else {
                continue;
            };
            session.armed = session.deadline();
            if session.armed <= network.now {
                self.end(network, token);
            } else {
                self.deadlines.insert((session.armed, token));
            }
        }
    }

    fn end(&mut self, network: &mut Network, token: Token) {
        let Some(session) = self.table.remove(token) else {
            return;
        };
        if session.queued {
            network.forget(token);
        }
        self.by_ends.remove(&session.ends);
        self.deadlines.remove(&(session.armed, token));
        if let Socket::Forward(_, client) = session.socket {
            self.by_client
                .retain(|(_, of), held| *of != client || *held != token);
        }
    }
}

fn connect(protocol: Protocol, target: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = match target {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let protocol = match protocol {
        Protocol::Udp => None,
        Protocol::Echo => Some(ipproto::ICMP),
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, protocol)?;
    rustix::net::connect(&socket, &target)?;
    Ok(socket)
}

fn unreachable(network: &mut Network, ends: Ends, code: u8, len: usize) {
    let (protocol, rest) = ends.quoted(len);
    network.unreachable(code, ends.guest, ends.remote, protocol, rest);
}

fn deliver(network: &mut Network, ends: Ends, data: &mut [u8]) {
    match ends.protocol {
        Protocol::Udp => network.post_datagram(ends.remote, ends.guest, data),
        Protocol::Echo => {
            if let Ok(mut packet) = Icmpv4Packet::new_checked(&mut *data) {
                packet.set_echo_ident(ends.guest.port());
                packet.fill_checksum();
                post_icmp(network, ends, data);
            }
        }
    }
}

/// An echo request of the guest, an ICMP packet: the gateway and the name server answer by themselves.
pub fn echo(network: &mut Network, sessions: &mut Sessions, ends: Ends, packet: &[u8]) {
    if ![GATEWAY, DNS].contains(ends.remote.ip()) {
        return sessions.send(network, ends, packet);
    }
    let mut reply = packet.to_vec();
    reply[0] = 0;
    Icmpv4Packet::new_unchecked(&mut reply).fill_checksum();
    post_icmp(network, ends, &reply);
}

fn post_icmp(network: &mut Network, ends: Ends, packet: &[u8]) {
    let route = network.route(*ends.remote.ip(), *ends.guest.ip());
    network.post_packet(&route, IpProtocol::Icmp, Offload::default(), packet);
}
