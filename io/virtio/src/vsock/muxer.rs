//! All connections of a device, and the host's sockets behind them.
//!
//! Who of the connections has something for the guest stands in a line, each at most once and each for one packet, so that none starves
//! and the line is no longer than there are connections. Nothing else grows: connections have a limit, their buffers have one, and
//! where the guest is owed too many refusals its packets are left in its ring.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use super::connection::{BUFFER, Connection, Stage};
use super::packet::{HOST, Header, STREAM, op};
use super::{VsockCounters, VsockSocket};
use crate::Buffers;

/// Connections at a time, those that have not said where to included.
pub const CONNECTIONS_MAX: usize = 1023;
/// Refusals that the guest is owed at most.
const REFUSALS_MAX: usize = 64;
/// A guest, or a program that connects, has so long to say what it has to.
const PATIENCE: Duration = Duration::from_secs(10);
/// A host that can open no more files is asked again after this.
const AGAIN: Duration = Duration::from_millis(200);
/// "CONNECT 4294967295" is shorter.
const GREETING_MAX: usize = 32;
/// Ports of the host that connections from there get, from here on.
const FIRST_PORT: u32 = 1 << 30;
/// What epoll calls the socket that is listened at.
const LISTENER: u64 = 0;
const EVENTS: usize = 64;

/// The ports of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    guest: u32,
    host: u32,
}

/// A program that has not said where it wants to be connected to.
struct Greeting {
    stream: UnixStream,
    text: Vec<u8>,
    until: Instant,
}

/// The connections of a device.
pub struct Muxer {
    cid: u64,
    socket: Arc<VsockSocket>,
    epoll: OwnedFd,
    /// When the listener is looked at again, where the host could not accept.
    deaf: Option<Instant>,
    connections: HashMap<Key, Connection>,
    /// By what epoll calls them.
    keys: HashMap<u64, Key>,
    greetings: HashMap<u64, Greeting>,
    line: VecDeque<Key>,
    refusals: VecDeque<Key>,
    next_token: u64,
    next_port: u32,
    counters: Arc<VsockCounters>,
}

impl Muxer {
    /// No connections yet; the guest has this address.
    pub fn new(
        cid: u64,
        socket: Arc<VsockSocket>,
        counters: Arc<VsockCounters>,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let muxer = Muxer {
            cid,
            socket,
            epoll,
            deaf: None,
            connections: HashMap::new(),
            keys: HashMap::new(),
            greetings: HashMap::new(),
            line: VecDeque::new(),
            refusals: VecDeque::new(),
            next_token: LISTENER + 1,
            next_port: FIRST_PORT,
            counters,
        };
        muxer.watch(muxer.socket.listener(), LISTENER, epoll::EventFlags::IN)?;
        Ok(muxer)
    }

    fn watch(&self, fd: impl AsFd, token: u64, flags: epoll::EventFlags) -> io::Result<()> {
        let data = epoll::EventData::new_u64(token);
        Ok(epoll::add(&self.epoll, fd, data, flags)?)
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.greetings.len() >= CONNECTIONS_MAX
    }

    /// True while packets of the guest can be answered.
    pub fn may_take(&self) -> bool {
        self.refusals.len() < REFUSALS_MAX
    }

    // ---- from the guest ----

    /// A packet of the guest.
    pub fn take(&mut self, header: &Header, payload: &Buffers<'_>) {
        if header.src_cid != self.cid || header.dst_cid != HOST {
            return;
        }
        let (guest, host) = (header.src_port, header.dst_port);
        let key = Key { guest, host };
        if header.kind != STREAM {
            return self.refuse(key, header);
        }
        let lingers = |c: &mut Connection| c.is_lingering();
        if header.op == op::REQUEST && self.connections.get_mut(&key).is_some_and(lingers) {
            self.remove(key);
        }
        let Some(connection) = self.connections.get_mut(&key) else {
            return match header.op {
                op::REQUEST => self.connect(key, header),
                _ => self.refuse(key, header),
            };
        };
        connection.note_credit(header);
        match header.op {
            op::RESPONSE => connection.established(key.host),
            op::RST => {
                if connection.reset_by_guest() {
                    return self.remove(key);
                }
            }
            op::SHUTDOWN => connection.shutdown(header.flags),
            op::RW => {
                let counter = &self.counters.sent_bytes;
                counter.fetch_add(header.len.into(), Ordering::Relaxed);
                connection.data(payload, header.len);
            }
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => connection.owe_credit(),
            _ => connection.reset(),
        }
        self.changed(key);
    }

    fn refuse(&mut self, key: Key, header: &Header) {
        if header.op != op::RST {
            self.counters.refused.fetch_add(1, Ordering::Relaxed);
            self.refusals.push_back(key);
        }
    }

    fn connect(&mut self, key: Key, request: &Header) {
        let stream = match self.is_full() {
            true => None,
            false => self.socket.connect(key.host).ok(),
        };
        let token = self.token();
        match stream {
            Some(stream) => self.add(key, Connection::accepted(stream, token, request)),
            None => self.refuse(key, request),
        }
    }

    fn add(&mut self, key: Key, mut connection: Connection) {
        let watched = epoll::EventFlags::ET;
        let added = match &connection.stream {
            Some(stream) => self.watch(stream, connection.token, watched),
            None => Ok(()),
        };
        connection.watched = watched;
        if added.is_err() {
            connection.reset();
        }
        self.counters.connections.fetch_add(1, Ordering::Relaxed);
        self.keys.insert(connection.token, key);
        self.connections.insert(key, connection);
        self.changed(key);
    }

    fn remove(&mut self, key: Key) {
        if let Some(connection) = self.connections.remove(&key) {
            self.keys.remove(&connection.token);
            if connection.in_line {
                self.line.retain(|other| *other != key);
            }
        }
    }

    /// Sees to it that epoll looks for what a connection waits for, and that it stands in line if it has something.
    fn changed(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else {
            return;
        };
        if connection.is_done() {
            return self.remove(key);
        }
        let wanted = connection.interest();
        if let Some(stream) = &connection.stream
            && wanted != connection.watched
        {
            let data = epoll::EventData::new_u64(connection.token);
            connection.watched = wanted;
            if epoll::modify(&self.epoll, stream, data, wanted).is_err() {
                connection.reset();
            }
        }
        if connection.has_packet() && !std::mem::replace(&mut connection.in_line, true) {
            self.line.push_back(key);
        }
    }

    // ---- to the guest ----

    /// True where the guest may have something to get.
    pub fn has_packets(&self) -> bool {
        !self.refusals.is_empty() || !self.line.is_empty()
    }

    /// The next packet for the guest; its bytes go to `payload`.
    pub fn packet(&mut self, payload: &Buffers<'_>) -> Option<Header> {
        if let Some(key) = self.refusals.pop_front() {
            let header = Header {
                op: op::RST,
                ..Header::default()
            };
            return Some(self.addressed(key, header));
        }
        // Nobody has a second turn before all had one.
        for _ in 0..self.line.len() {
            let key = self.line.pop_front()?;
            let connection = self.connections.get_mut(&key)?;
            connection.in_line = false;
            let packet = connection.packet(payload);
            if connection.stage() == Stage::Over {
                self.remove(key);
            } else {
                self.changed(key);
            }
            if let Some(header) = packet {
                let counter = &self.counters.received_bytes;
                counter.fetch_add(header.len.into(), Ordering::Relaxed);
                return Some(self.addressed(key, header));
            }
        }
        None
    }

    fn addressed(&self, key: Key, header: Header) -> Header {
        Header {
            src_cid: HOST,
            dst_cid: self.cid,
            src_port: key.host,
            dst_port: key.guest,
            kind: STREAM,
            ..header
        }
    }

    // ---- from the host ----

    /// Deals with what the host's sockets have.
    ///
    /// # Errors
    /// The host is out of memory.
    pub fn service(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(EVENTS);
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let spare = rustix::buffer::spare_capacity(&mut events);
        match epoll::wait(&self.epoll, spare, Some(&at_once)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        for event in events {
            let (token, flags) = (event.data.u64(), event.flags);
            if token == LISTENER {
                self.accept();
            } else if let Some(key) = self.keys.get(&token).copied() {
                if let Some(connection) = self.connections.get_mut(&key) {
                    connection.happened(flags);
                }
                self.changed(key);
            } else {
                self.greet(token);
            }
        }
        Ok(())
    }

    fn accept(&mut self) {
        for _ in 0..EVENTS {
            let accepted = self.socket.listener().accept();
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => continue,
                Err(_) => {
                    let _ = epoll::delete(&self.epoll, self.socket.listener());
                    self.deaf = Some(Instant::now() + AGAIN);
                    return;
                }
            };
            let token = self.token();
            let good = stream.set_nonblocking(true).is_ok() && !self.is_full();
            if good && self.watch(&stream, token, epoll::EventFlags::IN).is_ok() {
                let until = Instant::now() + PATIENCE;
                let text = Vec::new();
                let greeting = Greeting {
                    stream,
                    text,
                    until,
                };
                self.greetings.insert(token, greeting);
            }
        }
    }

    /// Reads "CONNECT port\n" and not a byte more.
    fn greet(&mut self, token: u64) {
        let Some(greeting) = self.greetings.get_mut(&token) else {
            return;
        };
        loop {
            let mut byte = [0];
            match greeting.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if greeting.text.len() < GREETING_MAX => greeting.text.push(byte[0]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                _ => {
                    self.greetings.remove(&token);
                    return;
                }
            }
        }
        let Some(greeting) = self.greetings.remove(&token) else {
            return;
        };
        let Some(guest) = wanted_port(&greeting.text) else {
            return;
        };
        let key = Key {
            guest,
            host: self.free_port(guest),
        };
        let until = Instant::now() + PATIENCE;
        // It is watched already, as something else.
        let _ = epoll::delete(&self.epoll, &greeting.stream);
        self.add(key, Connection::asked(greeting.stream, token, until));
    }

    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = self.next_port.wrapping_add(1).max(FIRST_PORT);
            if !self.connections.contains_key(&Key { guest, host }) {
                return host;
            }
        }
    }

    // ---- time ----

    /// How long until somebody has waited long enough.
    pub fn patience(&self) -> Option<Duration> {
        let asked = self.connections.values().filter_map(|c| match c.stage() {
            Stage::Asked(until) => Some(until),
            _ => None,
        });
        let greetings = self.greetings.values().map(|g| g.until);
        let first = asked.chain(greetings).chain(self.deaf).min()?;
        Some(first.saturating_duration_since(Instant::now()))
    }

    /// Ends what has waited long enough.
    pub fn expire(&mut self) {
        let now = Instant::now();
        self.greetings.retain(|_, greeting| greeting.until > now);
        let is_late = |c: &Connection| matches!(c.stage(), Stage::Asked(until) if until <= now);
        let late = self.connections.iter().filter(|(_, c)| is_late(c));
        let late: Vec<_> = late.map(|(key, _)| *key).collect();
        for key in late {
            if let Some(connection) = self.connections.get_mut(&key) {
                connection.reset();
            }
            self.changed(key);
        }
        if self.deaf.is_some_and(|until| until <= now) {
            let listened = self.watch(self.socket.listener(), LISTENER, epoll::EventFlags::IN);
            self.deaf = listened.err().map(|_| now + AGAIN);
        }
    }
}

/// Readable where [`Muxer::service`] has something to do.
impl AsFd for Muxer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn wanted_port(text: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(text).ok()?;
    let number = text.trim_end_matches('\r').strip_prefix("CONNECT ")?;
    let digits = number.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| number.parse().ok()).flatten()
}

// A buffer is never so large that its length does not fit the header.
const _: () = assert!(BUFFER < u32::MAX / 2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_greeting_names_a_port() {
        assert_eq!(wanted_port(b"CONNECT 5000"), Some(5000));
        assert_eq!(wanted_port(b"CONNECT 4294967295\r"), Some(u32::MAX));
        for bad in [
            &b"CONNECT"[..],
            b"CONNECT ",
            b"CONNECT +1",
            b"CONNECT 4294967296",
            b"\xff",
        ] {
            assert_eq!(wanted_port(bad), None);
        }
    }
}
