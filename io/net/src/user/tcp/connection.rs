//! One TCP connection of the guest, ended here and carried on by a socket of the host.
//!
//! **Problem.** Two connections are joined: the guest's, whose other end is this file, and the host's, which the
//! host's kernel looks after. Data must flow at the pace of the slower side, and each side must see what the other did: that
//! it was refused, that it has no more to say, that it broke off.
//!
//! **Idea.** The cable between guest and monitor loses nothing and reorders nothing. So this end needs no congestion
//! control, no reassembly and no estimate of round trips: it sends what the guest's window allows, takes segments
//! in their order only, and goes back to the last acknowledged byte in the rare case that the guest dropped
//! something (for lack of memory). Data for the guest is read from the socket when the guest has both window and buffers, and
//! kept only until it is acknowledged; data from the guest goes to the socket at once, and is kept only while that is full.
//!
//! **Invariant.** `out` holds the bytes from `una` on, so the guest's FIN is answered and ours is sent at `una + out.len()`; `rcv` is
//! what the guest was or will be told to send next, and everything before it is in the socket or in `inbox`.
//!
//! **Cost.** One copy per byte and direction beside the kernel's own; a lookup in a hash table per segment, whatever the number of
//! connections.
//!
//! Source: RFC 9293; RFC 5961 for segments that try to guess.

use std::io::IoSlice;
use std::net::SocketAddrV4;
use std::os::fd::OwnedFd;

use doppel_device::{NANOS_PER_SECOND, Nanos};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{SendAncillaryBuffer, SendFlags, Shutdown, sendmsg, shutdown};

use super::segment::{ACK, FIN, Incoming, RST, SYN, before};
use crate::user::network::Refusal;
use crate::user::ring::Ring;

/// What the guest may send before it hears from us, in bytes.
pub const WINDOW: usize = 1 << 20;
/// What is kept for a host that does not take it: what the guest may send, and what the unit of the window rounds off.
const INBOX_MAX: usize = WINDOW + (1 << SHIFT);
/// The shift of the windows that we announce.
pub const SHIFT: u8 = 5;
/// What is kept for the guest until it acknowledges it.
pub const OUT_MAX: usize = 1 << 20;
/// What a connection may keep in each direction when all of them together keep too much.
pub const SHARE_WHEN_SCARCE: usize = 16 << 10;

/// How much is read from a socket at first; twice as much each time that there was more.
pub const READ_FIRST: usize = 16 << 10;

/// First wait for an acknowledgement.
const RETRANSMIT: Nanos = NANOS_PER_SECOND / 2;
/// Longest wait.
const RETRANSMIT_MAX: Nanos = 30 * NANOS_PER_SECOND;
/// So many waits in vain, and the guest is gone.
const RETRANSMISSIONS: u32 = 10;
/// So many lead to the longest wait.
const RETRANSMISSIONS_GROW: u32 = 6;
/// A guest that says nothing for so long is asked whether it is still there.
const IDLE: Nanos = 2 * 60 * 60 * NANOS_PER_SECOND;
const PROBE_INTERVAL: Nanos = 75 * NANOS_PER_SECOND;
const PROBES: u32 = 9;
/// Empty buffers are kept for so long.
const KEEP: Nanos = NANOS_PER_SECOND;
/// A host that does not answer a call for so long is not there; the guest has given up as well.
const CONNECTING: Nanos = 130 * NANOS_PER_SECOND;

/// How far the connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The guest calls; its SYN waits for the host's connection.
    Connecting,
    /// The guest is called.
    Calling,
    /// The guest's call is answered.
    Answering,
    /// Data flows.
    Open,
}

/// The two ends as the guest sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The guest's end.
    pub guest: SocketAddrV4,
    /// The other.
    pub remote: SocketAddrV4,
}

/// What becomes of a connection after something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes on.
    Lives,
    /// It is over and both sides know.
    Done,
    /// The host is told that it is broken.
    ResetHost,
    /// Both are.
    ResetBoth,
}

/// A connection.
pub struct Connection {
    pub flow: Flow,
    pub socket: OwnedFd,
    pub state: State,
    /// The host's end is a client of a forwarded port.
    pub is_client: bool,
    /// The first byte that the guest has not acknowledged, the next to send, and the end of what was ever sent.
    pub una: u32,
    pub next: u32,
    pub max: u32,
    /// What the guest takes beyond `una`.
    pub window: u32,
    pub window_shift: u8,
    pub mss: u16,
    pub out: Ring,
    pub host_ended: bool,
    pub end_acknowledged: bool,
    pub duplicates: u8,
    /// What is before this may have been sent twice, and is then acknowledged twice too.
    pub resent: Option<u32>,
    pub retransmit_at: Option<Nanos>,
    pub retransmissions: u32,
    /// What the guest sends next, and up to where it may.
    pub rcv: u32,
    pub edge: u32,
    pub scaled: bool,
    pub inbox: Ring,
    pub guest_ended: bool,
    pub shut: bool,
    /// The host takes nothing more. What it sent before that is still read, and then the guest is reset as well.
    pub deaf: bool,
    pub ack_due: bool,
    pub syn_due: bool,
    pub probe_due: bool,
    /// As far as known, reading and writing the socket would get somewhere.
    pub readable: bool,
    pub writable: bool,
    /// A short read does not mean that nothing follows: the host's side is closing, or urgent data is on its way, before which the kernel stops.
    pub ragged: bool,
    /// How much to read from the socket at once.
    pub chunk: usize,
    pub heard: Nanos,
    pub probes: u32,
    /// Why the host could not be reached.
    pub refusal: Option<Refusal>,
    pub queued: bool,
    pub armed: Option<Nanos>,
}

impl Connection {
    /// A new one, with our first sequence number.
    pub fn new(flow: Flow, socket: OwnedFd, state: State, first: u32, now: Nanos) -> Self {
        Connection {
            flow,
            socket,
            state,
            is_client: state == State::Calling,
            una: first,
            next: first,
            max: first,
            window: 0,
            window_shift: 0,
            mss: 536,
            out: Ring::default(),
            host_ended: false,
            end_acknowledged: false,
            duplicates: 0,
            resent: None,
            retransmit_at: None,
            retransmissions: 0,
            rcv: 0,
            edge: 0,
            scaled: false,
            inbox: Ring::default(),
            guest_ended: false,
            shut: false,
            deaf: false,
            ack_due: false,
            syn_due: false,
            probe_due: false,
            readable: false,
            writable: false,
            ragged: false,
            chunk: READ_FIRST,
            heard: now,
            probes: 0,
            refusal: None,
            queued: false,
            armed: None,
        }
    }

    /// Notes what the guest's SYN says.
    pub fn take_syn(&mut self, segment: &Incoming) {
        self.rcv = segment.sequence.wrapping_add(1);
        self.edge = self.rcv;
        self.mss = segment.options.mss.max(64);
        self.scaled = segment.options.shift.is_some();
        self.window_shift = segment.options.shift.unwrap_or(0);
        self.window = segment.window.into();
    }

    /// Bytes sent and not acknowledged, the SYN and the FIN counted.
    pub fn in_flight(&self) -> usize {
        self.next.wrapping_sub(self.una) as usize
    }

    /// Bytes of memory that it takes.
    pub fn memory(&self) -> usize {
        self.out.capacity() + self.inbox.capacity()
    }

    /// A segment of the guest arrives. `scarce` says that memory is.
    pub fn segment(&mut self, segment: &Incoming, now: Nanos, scarce: bool) -> Fate {
        self.heard = now;
        self.probes = 0;
        match self.state {
            State::Connecting if segment.has(RST) => Fate::ResetHost,
            State::Connecting => Fate::Lives,
            State::Calling => self.answer(segment),
            State::Answering | State::Open => self.synchronized(segment, now, scarce),
        }
    }

    /// The guest answers our call.
    fn answer(&mut self, segment: &Incoming) -> Fate {
        let ours = self.answers_call(segment);
        if segment.has(RST) {
            return if ours { Fate::ResetHost } else { Fate::Lives };
        }
        if ours && segment.has(SYN) {
            self.take_syn(segment);
            self.open();
        }
        Fate::Lives
    }

    fn answers_call(&self, segment: &Incoming) -> bool {
        segment.has(ACK) && segment.acknowledged == self.next && self.next != self.una
    }

    /// Whether the guest, which is called, takes that for something of an old connection.
    pub fn is_mistaken(&self, segment: &Incoming) -> bool {
        let answer = segment.has(ACK) && !segment.has(RST);
        self.state == State::Calling && answer && !self.answers_call(segment)
    }

    fn open(&mut self) {
        self.state = State::Open;
        self.syn_due = false;
        self.una = self.next;
        self.retransmit_at = None;
        self.retransmissions = 0;
        self.ack_due = true;
    }

    fn synchronized(&mut self, segment: &Incoming, now: Nanos, scarce: bool) -> Fate {
        if segment.has(RST) {
            return self.reset(segment);
        }
        if segment.has(SYN) {
            self.ack_due = true;
            let again = segment.sequence.wrapping_add(1) == self.rcv;
            self.syn_due |= self.state == State::Answering && again;
            return Fate::Lives;
        }
        if !segment.has(ACK) {
            return Fate::Lives;
        }
        if self.state == State::Answering {
            if segment.acknowledged != self.next {
                return Fate::ResetBoth;
            }
            self.open();
            self.ack_due = false;
        }
        self.acknowledge(segment, now);
        self.take_data(segment, scarce);
        self.fate()
    }

    /// RFC 5961: only a reset at the expected place counts, others in the window are asked about.
    fn reset(&mut self, segment: &Incoming) -> Fate {
        if segment.sequence == self.rcv {
            return Fate::ResetHost;
        }
        let within = !before(segment.sequence, self.rcv) && before(segment.sequence, self.edge);
        self.ack_due |= within;
        Fate::Lives
    }

    fn acknowledge(&mut self, segment: &Incoming, now: Nanos) {
        let upto = segment.acknowledged;
        if before(self.max, upto) {
            self.ack_due = true;
            return;
        }
        if before(upto, self.una) {
            return;
        }
        let window = u32::from(segment.window) << self.window_shift;
        let advance = upto.wrapping_sub(self.una) as usize;
        if advance > 0 {
            self.advance(upto, advance, now);
        } else if segment.data.is_empty()
            && window == self.window
            && self.in_flight() > 0
            && !segment.has(FIN)
        {
            self.duplicates = self.duplicates.saturating_add(1);
            // RFC 6582: those that answer what was sent again for once tell of no loss.
            if self.duplicates == 3 && self.resent.is_none() {
                self.go_back();
            }
        }
        self.window = window;
        if window == 0 {
            // Who answers probes is there, for as long as that lasts (RFC 9293, 3.8.6.1), but is not asked more often for that.
            self.retransmissions = self.retransmissions.min(RETRANSMISSIONS_GROW);
        }
        if window > 0 && self.in_flight() == 0 {
            self.retransmissions = 0;
            self.retransmit_at = None;
        }
    }

    fn advance(&mut self, upto: u32, advance: usize, now: Nanos) {
        self.end_acknowledged |= self.host_ended && advance > self.out.len();
        self.out.consume(advance);
        self.una = upto;
        if before(self.next, upto) {
            self.next = upto;
        }
        self.duplicates = 0;
        self.resent = self.resent.filter(|end| !before(*end, upto));
        self.retransmissions = 0;
        self.retransmit_at = (self.in_flight() > 0).then_some(now + RETRANSMIT);
    }

    /// Sends again what is not acknowledged.
    fn go_back(&mut self) {
        self.next = self.una;
        self.resent = Some(self.max);
    }

    fn take_data(&mut self, segment: &Incoming, scarce: bool) {
        if segment.len() == 0 {
            // A probe with an old number is to be answered.
            self.ack_due |= segment.sequence != self.rcv;
            return;
        }
        self.ack_due = true;
        let known = self.rcv.wrapping_sub(segment.sequence) as usize;
        if before(self.rcv, segment.sequence) || known > segment.data.len() || self.guest_ended {
            return;
        }
        let new = &segment.data[known..];
        let room = self.edge.wrapping_sub(self.rcv) as usize;
        let taken = self.pass_on(&new[..new.len().min(room)], scarce);
        self.rcv = self.rcv.wrapping_add(taken as u32);
        if segment.has(FIN) && taken == new.len() {
            self.rcv = self.rcv.wrapping_add(1);
            self.guest_ended = true;
        }
        self.shut_if_ended();
    }

    /// Gives data to the host, or keeps it; says how much of it.
    fn pass_on(&mut self, data: &[u8], scarce: bool) -> usize {
        let mut sent = 0;
        if self.inbox.is_empty() && self.writable && !data.is_empty() {
            sent = self.write(&[IoSlice::new(data)], data.len());
        }
        if self.deaf {
            return data.len();
        }
        let limit = if scarce { SHARE_WHEN_SCARCE } else { INBOX_MAX };
        let room = limit.saturating_sub(self.inbox.len());
        let kept = (data.len() - sent).min(room);
        if kept > 0 {
            self.inbox.push(&data[sent..sent + kept]);
        }
        sent + kept
    }

    /// Says how much the host took.
    fn write(&mut self, parts: &[IoSlice], len: usize) -> usize {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let control = &mut SendAncillaryBuffer::default();
        match retry_on_intr(|| sendmsg(&self.socket, parts, control, flags)) {
            Ok(n) => {
                self.writable = n == len;
                n
            }
            Err(error) => {
                self.writable = false;
                if error != Errno::AGAIN {
                    self.deaf = true;
                    // Reading shows what is still there, up to the end.
                    (self.readable, self.ragged) = (true, true);
                }
                0
            }
        }
    }

    /// The host takes data again.
    pub fn flush(&mut self) -> Fate {
        self.writable = !self.deaf;
        while self.writable && !self.inbox.is_empty() {
            let len = self.inbox.len();
            let inbox = std::mem::take(&mut self.inbox);
            let sent = self.write(&inbox.slices(0, len).map(IoSlice::new), len);
            self.inbox = inbox;
            self.inbox.consume(if self.deaf { len } else { sent });
            self.ack_due = true;
        }
        self.shut_if_ended();
        self.fate()
    }

    fn shut_if_ended(&mut self) {
        if self.guest_ended && !self.shut && self.inbox.is_empty() {
            self.shut = true;
            // An error here (the host reset it) shows when the socket is read.
            let _ = shutdown(&self.socket, Shutdown::Write);
        }
    }

    /// What becomes of it now.
    pub fn fate(&self) -> Fate {
        if self.deaf && self.host_ended && self.out.is_empty() {
            Fate::ResetBoth
        } else if self.over() {
            Fate::Done
        } else {
            Fate::Lives
        }
    }

    /// Both sides have ended and both ends are acknowledged.
    fn over(&self) -> bool {
        self.end_acknowledged && self.shut && !self.ack_due
    }

    /// Nothing is missing but the guest's acknowledgement of the host's end.
    pub fn is_ended(&self) -> bool {
        let end_sent = self.host_ended && self.out.is_empty() && self.max != self.una;
        self.state == State::Open && end_sent && self.shut && !self.ack_due
    }

    /// When time itself has something to do.
    pub fn deadline(&self) -> Nanos {
        let quiet = match (self.state, self.probes) {
            (State::Connecting, _) => self.heard + CONNECTING,
            (_, 0) => self.heard + IDLE,
            (_, n) => self.heard + IDLE + u64::from(n) * PROBE_INTERVAL,
        };
        let buffers = match self.memory() > 0 && self.out.is_empty() && self.inbox.is_empty() {
            true => self.heard + KEEP,
            false => quiet,
        };
        let quiet = quiet.min(buffers);
        self.retransmit_at.map_or(quiet, |at| at.min(quiet))
    }

    /// The deadline has passed.
    pub fn expire(&mut self, now: Nanos) -> Fate {
        if self.retransmit_at.is_some_and(|at| at <= now) {
            return self.retransmit(now);
        }
        if self.memory() > 0 && self.out.is_empty() && self.inbox.is_empty() {
            self.out.release();
            self.inbox.release();
            self.chunk = READ_FIRST;
            return Fate::Lives;
        }
        if self.state == State::Connecting {
            return Fate::ResetBoth;
        }
        self.probes += 1;
        if self.probes > PROBES {
            return Fate::ResetBoth;
        }
        self.probe_due = true;
        Fate::Lives
    }

    fn retransmit(&mut self, now: Nanos) -> Fate {
        self.retransmissions += 1;
        if self.retransmissions > RETRANSMISSIONS {
            return Fate::ResetBoth;
        }
        match self.state {
            State::Open if self.window == 0 || self.in_flight() == 0 => self.probe_due = true,
            State::Open => self.go_back(),
            _ => self.syn_due = true,
        }
        self.await_acknowledgement(now);
        Fate::Lives
    }

    /// Something is to be acknowledged.
    pub fn await_acknowledgement(&mut self, now: Nanos) {
        let wait = (RETRANSMIT << self.retransmissions).min(RETRANSMIT_MAX);
        self.retransmit_at = Some(now + wait);
    }
}
