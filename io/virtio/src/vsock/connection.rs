//! One connection: a stream of the guest and a Unix socket of the host, with flow control by credit (virtio 1.2, 5.10.6.3).
//!
//! Each side says how many bytes it keeps for the other (`buf_alloc`) and how many it has passed on so far (`fwd_cnt`); the other
//! never has more under way. Bytes for the host go to its socket at once, and what that does not take waits here, never more than
//! [`BUFFER`]. Bytes for the guest stay in the host's socket until the guest has room and a buffer.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::event::epoll::EventFlags;

use super::packet::{Header, NO_RECEIVE, NO_SEND, op};
use crate::Buffers;

/// Bytes that are kept for a host that does not read.
pub const BUFFER: u32 = 64 << 10;
/// The guest is told when so many bytes were passed on since it last heard of it.
const UPDATE: u32 = BUFFER / 4;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The guest was asked, or is about to be; until when it may answer.
    Asked(Instant),
    /// Bytes flow.
    Established,
    /// A reset is the last that the guest hears of it.
    Over,
}

/// What the guest is to be told.
#[derive(Clone, Copy, Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    /// The host's end, until nothing goes through it any more.
    pub stream: Option<UnixStream>,
    /// What epoll calls it.
    pub token: u64,
    /// What epoll was told to look for.
    pub watched: EventFlags,
    /// It stands in line to give the guest something.
    pub in_line: bool,
    stage: Stage,
    owed: Owed,
    // Towards the host.
    buffer: VecDeque<u8>,
    passed_on: u32,
    told: u32,
    guest_shut: u32,
    // Towards the guest.
    sent: u32,
    guest_buffer: u32,
    guest_passed_on: u32,
    readable: bool,
    host_shut: u32,
    hung_up: bool,
    /// There are bytes for the guest and no room for them there; it was asked to say when there is.
    stalled: bool,
    /// The guest is through with it; bytes for the host are left.
    forgotten: bool,
}

impl Connection {
    fn new(stream: UnixStream, token: u64, stage: Stage, owed: Owed) -> Self {
        Connection {
            stream: Some(stream),
            token,
            watched: EventFlags::empty(),
            in_line: false,
            stage,
            owed,
            buffer: VecDeque::new(),
            passed_on: 0,
            told: 0,
            guest_shut: 0,
            sent: 0,
            guest_buffer: 0,
            guest_passed_on: 0,
            readable: false,
            host_shut: 0,
            hung_up: false,
            stalled: false,
            forgotten: false,
        }
    }

    /// One that the guest asked for.
    pub fn accepted(stream: UnixStream, token: u64, request: &Header) -> Self {
        let owed = Owed {
            response: true,
            ..Owed::default()
        };
        let mut connection = Connection::new(stream, token, Stage::Established, owed);
        connection.note_credit(request);
        connection
    }

    /// One that a program of the host asks for; the guest has to answer in time.
    pub fn asked(stream: UnixStream, token: u64, until: Instant) -> Self {
        let owed = Owed {
            request: true,
            ..Owed::default()
        };
        Connection::new(stream, token, Stage::Asked(until), owed)
    }

    /// How far it is.
    pub fn stage(&self) -> Stage {
        self.stage
    }

    /// Ends it; the guest is told.
    pub fn reset(&mut self) {
        self.stage = Stage::Over;
        self.stream = None;
        self.buffer = VecDeque::new();
        self.owed = Owed::default();
    }

    /// The guest says that it is over. True where there is nothing left to do here either.
    pub fn reset_by_guest(&mut self) -> bool {
        // What it sent before it closed the connection in order is for the host to read still.
        self.forgotten = self.guest_shut & NO_SEND != 0;
        self.guest_shut = NO_SEND | NO_RECEIVE;
        !self.is_lingering()
    }

    /// True where the guest is through with it, and bytes for the host are left.
    pub fn is_lingering(&self) -> bool {
        self.forgotten && !self.buffer.is_empty()
    }

    /// True where the guest is through with it, and nothing is left.
    pub fn is_done(&self) -> bool {
        self.forgotten && self.buffer.is_empty()
    }

    /// Every packet of the guest tells of its buffer.
    pub fn note_credit(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_passed_on = header.fwd_cnt;
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_passed_on);
        self.guest_buffer.saturating_sub(under_way)
    }

    /// The guest answers that it takes the connection; the program is told, with the port that the host's end has.
    pub fn established(&mut self, port: u32) {
        if !matches!(self.stage, Stage::Asked(_)) {
            return self.reset();
        }
        self.stage = Stage::Established;
        self.put(format!("OK {port}\n").as_bytes());
        // What the program is told is no byte of the guest's.
        self.passed_on = 0;
    }

    /// Bytes of the guest.
    pub fn data(&mut self, payload: &Buffers<'_>, len: u32) {
        let room = BUFFER - self.buffer.len() as u32;
        let may_send = self.stage == Stage::Established && self.guest_shut & NO_SEND == 0;
        if !may_send || len > room || payload.len() < len as usize {
            return self.reset();
        }
        let mut bytes = vec![0; len as usize];
        let n = payload.read(&mut bytes);
        self.put(&bytes[..n]);
    }

    /// Passes bytes on to the host, or keeps them.
    fn put(&mut self, bytes: &[u8]) {
        let mut rest = bytes;
        while self.buffer.is_empty() && !rest.is_empty() {
            match self.write(rest) {
                0 => break,
                n => rest = &rest[n..],
            }
        }
        self.buffer.extend(rest);
    }

    /// Writes to the host what it takes now. A host that takes nothing any more takes everything.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let Some(stream) = self
            .stream
            .as_mut()
            .filter(|_| self.host_shut & NO_RECEIVE == 0)
        else {
            self.pass_on(bytes.len());
            return bytes.len();
        };
        match stream.write(bytes) {
            Ok(n) => {
                self.pass_on(n);
                n
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => 0,
            Err(e) if e.kind() == ErrorKind::Interrupted => 0,
            Err(_) => {
                self.shut_host(NO_RECEIVE);
                self.pass_on(bytes.len());
                bytes.len()
            }
        }
    }

    fn pass_on(&mut self, n: usize) {
        self.passed_on = self.passed_on.wrapping_add(n as u32);
        if self.passed_on.wrapping_sub(self.told) >= UPDATE {
            self.owed.credit_update = true;
        }
    }

    /// Writes what waits, and does what was to be done after it.
    pub fn flush(&mut self) {
        loop {
            let (front, _) = self.buffer.as_slices();
            if front.is_empty() {
                break;
            }
            let front = front.to_vec();
            match self.write(&front) {
                0 => return,
                // A host that takes nothing any more has had the rest thrown away.
                n => drop(self.buffer.drain(..n.min(self.buffer.len()))),
            }
        }
        self.buffer = VecDeque::new();
        self.follow_guest();
    }

    /// The guest sends or receives no more.
    pub fn shutdown(&mut self, flags: u32) {
        if self.stage != Stage::Established {
            return self.reset();
        }
        self.guest_shut |= flags & (NO_RECEIVE | NO_SEND);
        self.follow_guest();
    }

    /// Closes the host's end as far as the guest has closed its own, after all bytes.
    fn follow_guest(&mut self) {
        let Some(stream) = &self.stream else { return };
        if self.guest_shut & NO_RECEIVE != 0 {
            let _ = stream.shutdown(Shutdown::Read);
        }
        if self.guest_shut & NO_SEND != 0 && self.buffer.is_empty() {
            let _ = stream.shutdown(Shutdown::Write);
            if self.guest_shut & NO_RECEIVE != 0 {
                self.reset();
            }
        }
    }

    /// The guest wants to know how much was passed on.
    pub fn owe_credit(&mut self) {
        self.owed.credit_update = true;
    }

    /// What epoll found.
    pub fn happened(&mut self, events: EventFlags) {
        if events.intersects(EventFlags::IN | EventFlags::HUP | EventFlags::ERR) {
            self.readable = true;
        }
        if events.intersects(EventFlags::HUP | EventFlags::ERR) {
            self.hung_up = true;
            if matches!(self.stage, Stage::Asked(_)) {
                return self.reset();
            }
            // Where the end was read, or nobody reads, there is nothing more to come.
            if !self.may_read() {
                self.shut_host(NO_SEND | NO_RECEIVE);
            }
        }
        if events.contains(EventFlags::OUT) || self.hung_up {
            self.flush();
        }
    }

    /// The host sends or receives no more, which the guest is told.
    fn shut_host(&mut self, flags: u32) {
        if self.host_shut | flags != self.host_shut {
            self.host_shut |= flags;
            self.owed.shutdown = true;
        }
        if self.host_shut == NO_SEND | NO_RECEIVE {
            self.stream = None;
            self.buffer = VecDeque::new();
        }
    }

    /// True while there may be bytes for the guest.
    fn may_read(&self) -> bool {
        self.stage == Stage::Established
            && self.host_shut & NO_SEND == 0
            && self.guest_shut & NO_RECEIVE == 0
    }

    /// What epoll is to look for.
    pub fn interest(&self) -> EventFlags {
        let mut wanted = EventFlags::empty();
        if self.may_read() && !self.readable && self.credit() > 0 {
            wanted |= EventFlags::IN;
        }
        if !self.buffer.is_empty() {
            wanted |= EventFlags::OUT;
        }
        match wanted.is_empty() {
            // A hang-up is told of whatever is asked for; once is enough.
            true => EventFlags::ET,
            false => wanted,
        }
    }

    /// True where the guest has something to get.
    pub fn has_packet(&mut self) -> bool {
        let stalled = self.readable && self.may_read() && self.credit() == 0;
        if stalled && !std::mem::replace(&mut self.stalled, stalled) {
            self.owed.credit_request = true;
        }
        self.stalled = stalled;
        let Owed {
            request,
            response,
            credit_update,
            credit_request,
            shutdown,
        } = self.owed;
        let control = request || response || credit_update || credit_request || shutdown;
        let data = self.readable && self.may_read() && !stalled;
        !self.forgotten && (self.stage == Stage::Over || control || data)
    }

    /// The next packet for the guest, what of the header is the connection's: operation, flags and length. Bytes go to `payload`.
    pub fn packet(&mut self, payload: &Buffers<'_>) -> Option<Header> {
        let (op, flags, len) = self.next(payload)?;
        self.told = self.passed_on;
        self.owed.credit_update = false;
        Some(Header {
            op,
            flags,
            len,
            buf_alloc: BUFFER,
            fwd_cnt: self.passed_on,
            ..Header::default()
        })
    }

    fn next(&mut self, payload: &Buffers<'_>) -> Option<(u16, u32, u32)> {
        if self.forgotten {
            return None;
        }
        if self.stage == Stage::Over {
            return Some((op::RST, 0, 0));
        }
        if std::mem::take(&mut self.owed.request) {
            return Some((op::REQUEST, 0, 0));
        }
        if std::mem::take(&mut self.owed.response) {
            return Some((op::RESPONSE, 0, 0));
        }
        if let Some(n) = self.read(payload) {
            return Some((op::RW, 0, n));
        }
        if std::mem::take(&mut self.owed.shutdown) {
            return Some((op::SHUTDOWN, self.host_shut, 0));
        }
        if std::mem::take(&mut self.owed.credit_request) {
            return Some((op::CREDIT_REQUEST, 0, 0));
        }
        self.owed.credit_update.then_some((op::CREDIT_UPDATE, 0, 0))
    }

    /// Reads from the host what there is and the guest has room for.
    fn read(&mut self, payload: &Buffers<'_>) -> Option<u32> {
        if !self.readable || !self.may_read() {
            return None;
        }
        let most = (self.credit() as usize)
            .min(payload.len())
            .min(BUFFER as usize);
        if most == 0 {
            return None;
        }
        let mut bytes = vec![0; most];
        match self.read_host(&mut bytes) {
            Ok(0) => {
                let both = NO_SEND | NO_RECEIVE;
                self.shut_host(if self.hung_up { both } else { NO_SEND });
                None
            }
            Ok(n) => {
                payload.write(&bytes[..n]);
                self.sent = self.sent.wrapping_add(n as u32);
                Some(n as u32)
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => None,
            Err(_) => {
                self.shut_host(NO_SEND | NO_RECEIVE);
                None
            }
        }
    }

    fn read_host(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match &mut self.stream {
            Some(stream) => stream.read(bytes),
            None => Ok(0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It had said that it sends no more, and closes while bytes wait for it.
    #[test]
    fn a_host_that_is_gone_takes_what_waited_with_it() {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        let mut connection = Connection::accepted(ours, 1, &Header::default());
        connection.host_shut = NO_SEND;
        connection.buffer.extend([1; 100]);
        drop(theirs);
        connection.flush();
        assert!(connection.buffer.is_empty() && connection.stream.is_none());
        assert_eq!(connection.host_shut, NO_SEND | NO_RECEIVE);
    }
}
