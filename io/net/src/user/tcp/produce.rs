//! What a connection sends to the guest: the next frame, when a device asks for one.

use std::io::IoSliceMut;

use doppel_device::Nanos;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvAncillaryBuffer, RecvFlags, recvmsg};

use super::connection::{Connection, Fate, OUT_MAX, SHARE_WHEN_SCARCE, SHIFT, State, WINDOW};
use super::segment::{ACK, DATA_HEADERS, FIN, HEADER, Options, Outgoing, PSH, SYN};
use crate::link::{Received, Sink};
use crate::user::network::Network;
use crate::user::wire::IPV4;

/// How much is read from a socket at once.
const READ: usize = 256 << 10;
/// The longest frame that is not data; with less room than that nothing is sent.
pub const SYN_FRAME: usize = DATA_HEADERS + 8;
/// The longest payload of an IP packet.
const SEGMENT_MAX: usize = 65535 - IPV4 - HEADER;

impl Connection {
    /// Gives the next frame to `sink`, if there is one and it fits into `room`.
    pub fn produce(
        &mut self,
        network: &Network,
        room: usize,
        scarce: bool,
        sink: Sink,
    ) -> (Received, Fate) {
        if room < SYN_FRAME {
            return (Received::TooLong(SYN_FRAME), Fate::Lives);
        }
        if self.syn_due {
            self.send_syn(network, scarce, sink);
            return (Received::Frame, Fate::Lives);
        }
        if self.state != State::Open {
            return (Received::Nothing, Fate::Lives);
        }
        if std::mem::take(&mut self.probe_due) {
            let before = self.una.wrapping_sub(1);
            self.send(network, (before, ACK, 0), scarce, sink);
            return (Received::Frame, Fate::Lives);
        }
        if self.wants_data() && self.read(scarce).is_err() {
            return (Received::Nothing, Fate::ResetBoth);
        }
        let longest = self.longest(network, room);
        let received = self.send_data(network, longest, scarce, sink);
        (received, self.fate())
    }

    fn unsent(&self) -> usize {
        self.out.len().saturating_sub(self.in_flight())
    }

    /// What the guest's window has room for.
    fn allowed(&self) -> usize {
        (self.window as usize).saturating_sub(self.in_flight())
    }

    /// Whether the next frame may have data.
    pub fn has_data(&self) -> bool {
        self.state == State::Open && (self.unsent() > 0 || self.wants_data())
    }

    fn wants_data(&self) -> bool {
        self.readable && !self.host_ended && self.unsent() == 0 && self.allowed() > 0
    }

    /// Whether [`Connection::produce`] may have something.
    pub fn has_frames(&self) -> bool {
        let open = self.state == State::Open;
        let data = self.unsent() > 0 && self.allowed() > 0;
        let end = self.host_ended && self.in_flight() == self.out.len() && !self.end_acknowledged;
        self.syn_due || open && (self.ack_due || self.probe_due || data || end || self.wants_data())
    }

    /// Payload of a segment: what the guest takes, cut so that it falls into whole packets.
    fn longest(&self, network: &Network, room: usize) -> usize {
        let mss = usize::from(self.mss).min(network.mtu - IPV4 - HEADER);
        let room = room - DATA_HEADERS;
        match network.accepts.tcp4 {
            true if room >= mss => room.min(SEGMENT_MAX) / mss * mss,
            _ => room.min(mss),
        }
    }

    /// Reads from the host what the guest's window allows.
    fn read(&mut self, scarce: bool) -> Result<(), Errno> {
        let limit = if scarce { SHARE_WHEN_SCARCE } else { OUT_MAX };
        let amount = self.allowed().min(limit.saturating_sub(self.out.len()));
        let amount = amount.min(self.chunk);
        if amount == 0 {
            return Ok(());
        }
        let socket = &self.socket;
        let receive = |parts: &mut [IoSliceMut]| {
            let control = &mut RecvAncillaryBuffer::default();
            let receive = || recvmsg(socket, parts, control, RecvFlags::DONTWAIT);
            retry_on_intr(receive).map(|message| message.bytes)
        };
        match self.out.fill(amount, receive) {
            // That was all, and no end in order.
            Ok(0) | Err(Errno::AGAIN) if self.deaf => return Err(Errno::CONNRESET),
            Ok(0) => self.host_ended = true,
            Ok(n) => {
                self.readable = self.ragged || n == amount;
                self.chunk = if n == amount {
                    (2 * n).min(READ)
                } else {
                    self.chunk
                };
            }
            Err(Errno::AGAIN) => self.readable = false,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn send_data(
        &mut self,
        network: &Network,
        longest: usize,
        scarce: bool,
        sink: Sink,
    ) -> Received {
        let unsent = self.unsent();
        let mut n = unsent.min(self.allowed()).min(longest);
        if n < unsent && n < self.mss.into() && self.in_flight() > 0 {
            // A sliver: the acknowledgement that is due will open the window further.
            n = 0;
        }
        let end = self.host_ended && !self.end_acknowledged;
        let end = end && self.in_flight() + n == self.out.len();
        if n == 0 && !end && !self.ack_due {
            return Received::Nothing;
        }
        let push = if n > 0 && n == unsent { PSH } else { 0 };
        let fin = if end { FIN } else { 0 };
        self.send(network, (self.next, ACK | push | fin, n), scarce, sink);
        if n > 0 || end {
            self.next = self.next.wrapping_add(n as u32 + u32::from(end));
            if super::segment::before(self.max, self.next) {
                self.max = self.next;
            }
            if self.retransmit_at.is_none() {
                self.await_acknowledgement(network.now);
            }
        }
        Received::Frame
    }

    /// Data, here or in the host's socket, waits for a window that may have opened unheard (RFC 9293, 3.8.6.1).
    pub fn persist(&mut self, now: Nanos) {
        let more = self.unsent() > 0 || self.readable && !self.host_ended;
        let closed = self.state == State::Open && self.allowed() == 0;
        if closed && more && self.retransmit_at.is_none() {
            self.await_acknowledgement(now);
        }
    }

    fn send_syn(&mut self, network: &Network, scarce: bool, sink: Sink) {
        self.syn_due = false;
        let answering = self.state == State::Answering;
        let flags = if answering { SYN | ACK } else { SYN };
        let shift = (self.scaled || !answering).then_some(SHIFT);
        let options = Options {
            mss: (network.mtu - IPV4 - HEADER) as u16,
            shift,
        };
        // The window of a SYN is not scaled.
        let window = self.inbox_room(scarce).min(u16::MAX.into()) as u16;
        self.edge = self.rcv.wrapping_add(window.into());
        self.emit(network, self.una, flags, window, Some(options), 0, sink);
        self.next = self.una.wrapping_add(1);
        self.max = self.next;
        self.ack_due = false;
        if self.retransmit_at.is_none() {
            self.await_acknowledgement(network.now);
        }
    }

    /// What may be asked of the guest: what is more would be lost and sent again late.
    fn inbox_room(&self, scarce: bool) -> usize {
        let limit = if scarce { SHARE_WHEN_SCARCE } else { WINDOW };
        limit.saturating_sub(self.inbox.len())
    }

    /// Sends a segment: its number, its flags, and how much data.
    fn send(
        &mut self,
        network: &Network,
        (sequence, flags, n): (u32, u8, usize),
        scarce: bool,
        sink: Sink,
    ) {
        let shift = if self.scaled { SHIFT } else { 0 };
        let window = (self.inbox_room(scarce) >> shift).min(u16::MAX.into());
        let edge = self.rcv.wrapping_add((window << shift) as u32);
        // What was once allowed stays so, though the window in units of its scale may say a few bytes less.
        if super::segment::before(self.edge, edge) {
            self.edge = edge;
        }
        self.ack_due = false;
        self.emit(network, sequence, flags, window as u16, None, n, sink);
    }

    #[expect(clippy::too_many_arguments, reason = "they are the fields of a header")]
    fn emit(
        &self,
        network: &Network,
        sequence: u32,
        flags: u8,
        window: u16,
        options: Option<Options>,
        n: usize,
        sink: Sink,
    ) {
        let header = Outgoing {
            source_port: self.flow.remote.port(),
            destination_port: self.flow.guest.port(),
            sequence,
            acknowledged: if flags & ACK != 0 { self.rcv } else { 0 },
            flags,
            window,
            options,
        };
        let data = self.out.slices(self.in_flight(), n);
        let route = network.route(*self.flow.remote.ip(), *self.flow.guest.ip());
        let mss = (network.mtu - IPV4 - HEADER).min(self.mss.into()) as u16;
        let (offload, headers) = header.headers(network.accepts, &route, &data, mss);
        sink(offload, &[headers.as_ref(), data[0], data[1]]);
    }
}
