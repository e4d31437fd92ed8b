//! TCP: the guest's connections and the host's.

mod connection;
mod produce;
mod segment;

use std::collections::hash_map::RandomState;
use std::collections::{BTreeSet, HashMap};
use std::hash::BuildHasher;
use std::net::{SocketAddr, SocketAddrV4};
use std::os::fd::OwnedFd;
use std::time::Duration;

use doppel_device::Nanos;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use smoltcp::wire::IpProtocol;

use crate::link::{FRAME_MAX, Received, Sink};
use crate::user::network::{Network, Refusal};
use crate::user::poller::{EventFlags, Kind, Token};
use crate::user::table::Table;
use crate::user::wire::ETHERNET;
pub use connection::Flow;
use connection::{Connection, Fate, State};
pub use produce::SYN_FRAME;
use segment::SYN;
pub use segment::{ACK, Incoming, Outgoing, RST};

/// Memory of all connections, beyond which each gets little.
const PLENTY: usize = 32 << 20;

/// All TCP connections.
pub struct Tcp {
    table: Table<Connection>,
    by_flow: HashMap<Flow, Token>,
    deadlines: BTreeSet<(Nanos, Token)>,
    memory: usize,
    limit: usize,
    /// How many are with clients of forwarded ports.
    clients: usize,
    secret: RandomState,
}

impl Tcp {
    /// None yet, and never more than `limit`.
    pub fn new(limit: usize) -> Self {
        Tcp {
            table: Table::new(Kind::Tcp),
            by_flow: HashMap::new(),
            deadlines: BTreeSet::new(),
            memory: 0,
            limit: limit.max(1),
            clients: 0,
            secret: RandomState::new(),
        }
    }

    /// Number of connections.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// Bytes of memory in their buffers.
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// When [`Tcp::expire`] has something to do.
    pub fn deadline(&self) -> Option<Nanos> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// A segment from the guest: the payload of an IP packet.
    pub fn packet(
        &mut self,
        network: &mut Network,
        from: std::net::Ipv4Addr,
        to: std::net::Ipv4Addr,
        bytes: &[u8],
    ) {
        let Some(segment) = Incoming::parse(bytes) else {
            return;
        };
        let flow = Flow {
            guest: SocketAddrV4::new(from, segment.source_port),
            remote: SocketAddrV4::new(to, segment.destination_port),
        };
        let known = self.by_flow.get(&flow);
        let called = known.and_then(|token| self.table.get(*token));
        match known {
            Some(_) if called.is_some_and(|c| c.is_mistaken(&segment)) => {
                reject(network, flow, &segment);
            }
            Some(&token) => {
                let scarce = self.scarce();
                let now = network.now;
                self.with(network, token, |c, _| c.segment(&segment, now, scarce));
            }
            None if segment.has(RST) => {}
            None if segment.has(SYN) && !segment.has(ACK) => self.open(network, flow, &segment),
            None => reject(network, flow, &segment),
        }
    }

    fn scarce(&self) -> bool {
        self.memory > PLENTY
    }

    /// The guest calls.
    fn open(&mut self, network: &mut Network, flow: Flow, segment: &Incoming) {
        let refused =
            |network: &mut Network, refusal| refuse(network, flow, segment.sequence, refusal);
        if let Err(refusal) = network.target(flow.remote) {
            return refused(network, refusal);
        }
        if self.table.len() >= self.limit && !self.evict(network, false) {
            return refused(network, Refusal::Refused);
        }
        let (socket, connected) = match network.reach(flow.remote, connect) {
            Ok(begun) => begun,
            Err(refusal) => return refused(network, refusal),
        };
        let first = self.first_sequence(flow, network.now);
        let mut connection = Connection::new(flow, socket, State::Connecting, first, network.now);
        connection.take_syn(segment);
        if let Some(token) = self.insert(network, connection)
            && connected
        {
            self.with(network, token, |c, _| answer(c));
        }
    }

    /// A client of a forwarded port is here.
    pub fn call(
        &mut self,
        network: &mut Network,
        socket: OwnedFd,
        client: SocketAddrV4,
        guest: SocketAddrV4,
    ) {
        let many = self.clients >= (self.limit * 3).div_ceil(4);
        if (many || self.table.len() >= self.limit) && !self.evict(network, many) {
            return reset(&socket);
        }
        let free = |port: &u16| {
            let remote = SocketAddrV4::new(*client.ip(), *port);
            *port != 0 && !self.by_flow.contains_key(&Flow { guest, remote })
        };
        let mut ports = (0..=u16::MAX).map(|n| client.port().wrapping_add(n));
        let Some(port) = ports.find(free) else {
            return reset(&socket);
        };
        let remote = SocketAddrV4::new(*client.ip(), port);
        let flow = Flow { guest, remote };
        prepare(&socket);
        let first = self.first_sequence(flow, network.now);
        let mut connection = Connection::new(flow, socket, State::Calling, first, network.now);
        connection.syn_due = true;
        self.insert(network, connection);
    }

    /// RFC 6528: a number that nobody guesses, and beyond those of the last connection of the flow, at 16 MB/s as in Linux.
    fn first_sequence(&self, flow: Flow, now: Nanos) -> u32 {
        (self.secret.hash_one(flow) as u32).wrapping_add((now >> 6) as u32)
    }

    fn insert(&mut self, network: &mut Network, connection: Connection) -> Option<Token> {
        let token = self.table.next_token();
        // Where epoll takes no more, the connection goes as it came.
        if network.poller.add(&connection.socket, token).is_err() {
            reset(&connection.socket);
            return None;
        }
        self.clients += usize::from(connection.is_client);
        self.by_flow.insert(connection.flow, token);
        self.table.insert(connection);
        self.with(network, token, |_, _| Fate::Lives);
        Some(token)
    }

    /// Makes room: a connection goes that both sides have ended, or else the one that has waited longest for a host, or of those with a client for the guest.
    fn evict(&mut self, network: &mut Network, client: bool) -> bool {
        let oldest = |may_go: fn(&Connection) -> bool| {
            let of_kind = self.table.iter().filter(|(_, c)| c.is_client || !client);
            let found = of_kind.filter(|(_, c)| may_go(c));
            found.min_by_key(|(_, c)| c.heard).map(|(t, _)| t)
        };
        let ended = oldest(Connection::is_ended).map(|t| (t, Fate::Done));
        let waiting = || oldest(|c| c.state != State::Open).map(|t| (t, Fate::ResetBoth));
        let Some((token, fate)) = ended.or_else(waiting) else {
            return false;
        };
        self.with(network, token, |_, _| fate);
        true
    }

    /// Something happened at a host socket.
    pub fn event(&mut self, network: &mut Network, token: Token, flags: EventFlags) {
        let readable = EventFlags::IN | EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR;
        let ragged = EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR | EventFlags::PRI;
        self.with(network, token, |connection, _| {
            if connection.state == State::Connecting {
                return look_for_host(connection, flags);
            }
            connection.readable |= flags.intersects(readable);
            connection.ragged |= flags.intersects(ragged);
            // Nothing is read behind the end that would tell of it.
            if connection.host_ended && flags.contains(EventFlags::ERR) {
                connection.deaf |= !matches!(sockopt::socket_error(&connection.socket), Ok(Ok(())));
            }
            if flags.contains(EventFlags::OUT) {
                return connection.flush();
            }
            connection.fate()
        });
    }

    /// The next frame of a connection that was taken from the queue of those that are ready. It goes to the end of that again
    /// if it may have another one.
    pub fn produce(
        &mut self,
        network: &mut Network,
        token: Token,
        room: usize,
        sink: Sink,
    ) -> Received {
        let scarce = self.scarce();
        let mut received = Received::Nothing;
        self.with(network, token, |connection, network| {
            let (result, fate) = connection.produce(network, room, scarce, sink);
            received = result;
            // One that had nothing waits for something to happen, even where it has data.
            connection.queued = result == Received::Nothing;
            fate
        });
        if let Some(connection) = self.table.get_mut(token)
            && received == Received::Nothing
        {
            connection.queued = false;
        }
        received
    }

    /// A bound of the length of what [`Tcp::produce`] gives next, or of a datagram where it is not of a connection.
    pub fn next_length(&self, token: Token, mtu: usize) -> usize {
        match self.table.get(token) {
            Some(connection) if !connection.has_data() => SYN_FRAME,
            Some(_) => FRAME_MAX,
            None => mtu + ETHERNET,
        }
    }

    /// Time has passed.
    pub fn expire(&mut self, network: &mut Network) {
        while let Some(&(at, token)) = self.deadlines.first()
            && at <= network.now
        {
            self.deadlines.remove(&(at, token));
            let now = network.now;
            self.with(network, token, |connection, _| {
                connection.armed = None;
                if connection.deadline() <= now {
                    connection.expire(now)
                } else {
                    Fate::Lives
                }
            });
        }
    }

    /// Calls into a connection, then sees to what follows: its end, its deadline, its place among those that are ready.
    fn with(
        &mut self,
        network: &mut Network,
        token: Token,
        f: impl FnOnce(&mut Connection, &Network) -> Fate,
    ) {
        let Some(connection) = self.table.get_mut(token) else {
            return;
        };
        let memory = connection.memory();
        let fate = f(connection, network);
        self.memory = self.memory + connection.memory() - memory;
        if fate != Fate::Lives {
            return self.end(network, token, fate);
        }
        connection.persist(network.now);
        let deadline = connection.deadline();
        if connection.armed.is_none_or(|armed| deadline < armed) {
            if let Some(armed) = connection.armed.replace(deadline) {
                self.deadlines.remove(&(armed, token));
            }
            self.deadlines.insert((deadline, token));
        }
        if !connection.queued && connection.has_frames() {
            connection.queued = true;
            network.ready.push_back(token);
        }
    }

    fn end(&mut self, network: &mut Network, token: Token, fate: Fate) {
        let Some(connection) = self.table.remove(token) else {
            return;
        };
        if connection.queued {
            network.forget(token);
        }
        self.memory -= connection.memory();
        self.clients -= usize::from(connection.is_client);
        self.by_flow.remove(&connection.flow);
        if let Some(armed) = connection.armed {
            self.deadlines.remove(&(armed, token));
        }
        if fate == Fate::Done {
            end_in_order(&connection.socket);
        }
        if fate == Fate::ResetBoth {
            break_off(network, &connection);
        }
    }
}

/// Begins a connection; says whether it is there already, as it is to the host itself.
fn connect(target: SocketAddr) -> Result<(OwnedFd, bool), Errno> {
    let family = match target {
        SocketAddr::V4(_) => AddressFamily::INET,
        SocketAddr::V6(_) => AddressFamily::INET6,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    prepare(&socket);
    match rustix::net::connect(&socket, &target) {
        Ok(()) => Ok((socket, true)),
        Err(Errno::INPROGRESS | Errno::INTR) => Ok((socket, false)),
        Err(error) => Err(error),
    }
}

/// The guest decides when its data goes out, and dead peers are noticed. A process that is killed resets its connections: the host's side would take an
/// end for the guest's, with all that it sent. None of it is needed for the connection to work.
/// Urgent data stays in the stream (RFC 6093): otherwise its last byte would have to be fetched by itself.
fn prepare(socket: &OwnedFd) {
    reset(socket);
    let _ = sockopt::set_tcp_nodelay(socket, true);
    let _ = sockopt::set_socket_keepalive(socket, true);
    let _ = sockopt::set_socket_oobinline(socket, true);
}

/// The host's connection is there, or is not.
fn look_for_host(connection: &mut Connection, flags: EventFlags) -> Fate {
    if !flags.intersects(EventFlags::OUT | EventFlags::ERR | EventFlags::HUP) {
        return Fate::Lives;
    }
    match sockopt::socket_error(&connection.socket) {
        Ok(Ok(())) if flags.contains(EventFlags::OUT) => {
            connection.readable = flags.contains(EventFlags::IN);
            connection.ragged = flags.intersects(EventFlags::RDHUP | EventFlags::PRI);
            answer(connection)
        }
        Ok(Ok(())) => Fate::Lives,
        Ok(Err(error)) | Err(error) => {
            connection.refusal = Some(Refusal::from_errno(error));
            Fate::ResetBoth
        }
    }
}

fn answer(connection: &mut Connection) -> Fate {
    connection.state = State::Answering;
    connection.writable = true;
    connection.syn_due = true;
    Fate::Lives
}

impl Drop for Tcp {
    /// The network is taken down: hosts get what the guest sent, and an end.
    fn drop(&mut self) {
        let connections = self.table.iter();
        connections.for_each(|(_, connection)| end_in_order(&connection.socket));
    }
}

/// Closes when all is sent.
fn end_in_order(socket: &OwnedFd) {
    let _ = sockopt::set_socket_linger(socket, None);
}

/// Closes with a reset, unless something else is said.
fn reset(socket: &OwnedFd) {
    let _ = sockopt::set_socket_linger(socket, Some(Duration::ZERO));
}

/// Tells the guest that its call is not answered.
fn refuse(network: &mut Network, flow: Flow, sequence: u32, refusal: Refusal) {
    match refusal {
        Refusal::Unreachable(code) => {
            let rest = sequence.to_be_bytes();
            network.unreachable(code, flow.guest, flow.remote, IpProtocol::Tcp, rest);
        }
        Refusal::Refused => post(network, flow, 0, sequence.wrapping_add(1), RST | ACK),
    }
}

/// Answers a segment of a connection that there is not (RFC 9293, 3.10.7.1).
fn reject(network: &mut Network, flow: Flow, segment: &Incoming) {
    if segment.has(ACK) {
        post(network, flow, segment.acknowledged, 0, RST);
    } else {
        let upto = segment.sequence.wrapping_add(segment.len());
        post(network, flow, 0, upto, RST | ACK);
    }
}

fn break_off(network: &mut Network, connection: &Connection) {
    let flow = connection.flow;
    match connection.state {
        State::Calling => {}
        State::Connecting => {
            let refusal = connection.refusal.unwrap_or(Refusal::HOST);
            refuse(network, flow, connection.rcv.wrapping_sub(1), refusal);
        }
        _ => post(network, flow, connection.next, connection.rcv, RST | ACK),
    }
}

fn post(network: &mut Network, flow: Flow, sequence: u32, acknowledged: u32, flags: u8) {
    let outgoing = Outgoing {
        source_port: flow.remote.port(),
        destination_port: flow.guest.port(),
        sequence,
        acknowledged,
        flags,
        window: 0,
        options: None,
    };
    let route = network.route(*flow.remote.ip(), *flow.guest.ip());
    let (offload, frame) = outgoing.frame(network.accepts, &route);
    network.post(offload, frame);
}
