//! The TCP connections of a guest whose network ends them: what its own segments say of them.
//!
//! When the process that ends them dies, the guest is to hear of it. What it sends is answered with a reset by the next process, but a guest that only reads sends
//! nothing. So it is asked, by a segment from before its window, as a peer asks that keeps a connection alive (RFC 9293, 3.8.4): its
//! answer is what the next process resets, with the number that makes the reset count. A guest that knows the connection no more resets it itself. A guest
//! answers such segments twice a second at most (Linux, net.ipv4.tcp_invalid_ratelimit), and that process may die as well: so it is asked a few times.

use std::collections::HashMap;
use std::net::SocketAddrV4;

use doppel_device::{NANOS_PER_SECOND, Nanos};
use smoltcp::wire::{EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet};

use crate::link::{Accepts, Offload};
use crate::user::tcp::{ACK, Flow, Incoming, Outgoing, RST};
use crate::user::wire::Route;

/// As many as a user network has connections at most.
pub const FLOWS_MAX: usize = 4096;
/// How often the guest is asked about each, and how long there is between.
const QUESTIONS: u32 = 3;
const INTERVAL: Nanos = 11 * NANOS_PER_SECOND / 10;

/// What the guest's last segment said.
#[derive(Clone, Copy)]
struct Last {
    guest: EthernetAddress,
    gateway: EthernetAddress,
    next: u32,
    acknowledged: u32,
}

/// Connections that there may be.
#[derive(Default)]
pub struct Flows {
    there: HashMap<Flow, Last>,
    /// Of processes that died.
    gone: HashMap<Flow, Last>,
    /// Questions that are still to be asked about these, and when.
    questions: u32,
    at: Option<Nanos>,
}

impl Flows {
    /// Notes what a frame of the guest's says of its connection, if it has one.
    pub fn note(&mut self, frame: &[u8]) {
        let Some((flow, last, ended)) = parse(frame) else {
            return;
        };
        if ended {
            self.there.remove(&flow);
            self.gone.remove(&flow);
            return;
        }
        if let Some(gone) = self.gone.get_mut(&flow) {
            *gone = last;
        }
        insert(&mut self.there, flow, last);
    }

    /// The process died that had them.
    pub fn lose(&mut self, now: Nanos) {
        for (flow, last) in std::mem::take(&mut self.there) {
            insert(&mut self.gone, flow, last);
        }
        if !self.gone.is_empty() {
            (self.questions, self.at) = (QUESTIONS, Some(now));
        }
    }

    /// When [`Flows::ask`] has something to ask.
    pub fn deadline(&self) -> Option<Nanos> {
        self.at
    }

    /// What the guest is to be asked by now: a frame for each connection that is gone.
    pub fn ask(&mut self, now: Nanos, accepts: Accepts) -> Vec<(Offload, Vec<u8>)> {
        if self.at.is_none_or(|at| now < at) {
            return Vec::new();
        }
        let questions = self.gone.iter().map(|(flow, last)| last.question(flow));
        let questions = questions.map(|(segment, route)| segment.frame(accepts, &route));
        let questions = questions.collect();
        self.questions -= 1;
        self.at = (self.questions > 0).then_some(now + INTERVAL);
        if self.at.is_none() {
            self.gone.clear();
        }
        questions
    }
}

impl Last {
    fn question(&self, flow: &Flow) -> (Outgoing, Route) {
        let route = Route {
            from: self.gateway,
            to: self.guest,
            source: *flow.remote.ip(),
            destination: *flow.guest.ip(),
        };
        let segment = Outgoing {
            source_port: flow.remote.port(),
            destination_port: flow.guest.port(),
            sequence: self.acknowledged.wrapping_sub(1),
            acknowledged: self.next,
            flags: ACK,
            window: 0,
            options: None,
        };
        (segment, route)
    }
}

/// Where there are too many, another makes room.
fn insert(flows: &mut HashMap<Flow, Last>, flow: Flow, last: Last) {
    if flows.len() >= FLOWS_MAX && !flows.contains_key(&flow) {
        let any = flows.keys().next().copied();
        any.and_then(|flow| flows.remove(&flow));
    }
    flows.insert(flow, last);
}

/// The connection that a segment is of, what it says, and whether it ends that at once.
fn parse(frame: &[u8]) -> Option<(Flow, Last, bool)> {
    let frame = EthernetFrame::new_checked(frame).ok()?;
    if frame.ethertype() != EthernetProtocol::Ipv4 {
        return None;
    }
    let packet = Ipv4Packet::new_checked(frame.payload()).ok()?;
    if packet.next_header() != IpProtocol::Tcp || packet.more_frags() || packet.frag_offset() != 0 {
        return None;
    }
    let segment = Incoming::parse(packet.payload())?;
    let flow = Flow {
        guest: SocketAddrV4::new(packet.src_addr(), segment.source_port),
        remote: SocketAddrV4::new(packet.dst_addr(), segment.destination_port),
    };
    let last = Last {
        guest: frame.src_addr(),
        gateway: frame.dst_addr(),
        next: segment.sequence.wrapping_add(segment.len()),
        acknowledged: segment.acknowledged,
    };
    // A call that is not answered is made again.
    let ended = segment.has(RST);
    (segment.has(ACK) || ended).then_some((flow, last, ended))
}
