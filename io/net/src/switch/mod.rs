//! A switch without a server: the machines of one user on one host, joined by sockets in a directory.
//!
//! **Problem.** Machines come and go, each one an ordinary process. A switch that one of them runs dies with it.
//!
//! **Idea.** There is no switch, only ports: each machine binds a datagram socket in the switch's directory and sends
//! frames straight to the sockets of the others. It learns behind which socket a MAC address is from what comes in, and
//! sends to all of them what it does not know. Nobody forwards for anybody, so there can be no loop, and whoever is left goes on.
//!
//! **Cost.** A copy by the kernel into the other process, and no other process in between. A machine that stops reading stops
//! those who send to it for a tenth of a second; after that its frames are lost, as on a cable that is not plugged in.

mod directory;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io::IoSlice;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use doppel_device::{Clock, Nanos};
use rustix::event::epoll;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, sendmsg};

use crate::finish::{finish, finish_waiting};
use crate::header::HEADER;
use crate::link::{Accepts, FRAME_MAX, Link, Offload, Received, Sent, Sink};
use directory::Place;
pub use directory::{SwitchError, make_switch_folder, switch_folder};

/// The sender's number, then what is left undone.
const PREFIX: usize = 2 + HEADER;
const OWN: u64 = u64::MAX;
/// How long a full peer stops the sender.
const PATIENCE: Nanos = 100_000_000;
/// The directory is not read more often.
const SCAN_INTERVAL: Nanos = 5_000_000;
const ADDRESSES_MAX: usize = 4096;

type Mac = [u8; 6];

struct Peer {
    socket: OwnedFd,
    full_since: Option<Nanos>,
}

/// A machine's port of a switch.
pub struct Switch {
    place: Place,
    poller: OwnedFd,
    clock: Arc<dyn Clock>,
    peers: BTreeMap<u16, Peer>,
    scanned: Option<Nanos>,
    addresses: HashMap<Mac, u16>,
    accepts: Accepts,
    readable: bool,
    waiting: VecDeque<(Offload, Vec<u8>)>,
    /// A frame was refused.
    refused: bool,
    buffer: Vec<u8>,
}

impl Switch {
    /// Joins the switch `name`, which comes into being with the first machine that does.
    pub fn join(name: &str, clock: Arc<dyn Clock>) -> Result<Self, SwitchError> {
        let place = Place::claim(name)?;
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(SwitchError::host)?;
        watch(&poller, &place.socket, OWN, epoll::EventFlags::IN).map_err(SwitchError::host)?;
        Ok(Switch {
            place,
            poller,
            clock,
            peers: BTreeMap::new(),
            scanned: None,
            addresses: HashMap::new(),
            accepts: Accepts::default(),
            readable: true,
            waiting: VecDeque::new(),
            refused: false,
            buffer: vec![0; PREFIX + FRAME_MAX],
        })
    }

    /// A MAC address that no other machine at this switch has, and that is the same whenever machines join in the same order.
    pub fn mac(&self) -> Mac {
        let [a, b] = self.place.hash.to_be_bytes();
        let [_, slot] = self.place.slot.to_be_bytes();
        [0x52, 0x54, 0x01, a, b, slot]
    }

    fn scan(&mut self) {
        let now = self.clock.now();
        if self.scanned.is_some_and(|at| now < at + SCAN_INTERVAL) {
            return;
        }
        self.scanned = Some(now);
        for slot in self.place.others() {
            if !self.peers.contains_key(&slot)
                && let Some(socket) = self.place.connect(slot)
                && watch(&self.poller, &socket, slot.into(), epoll::EventFlags::OUT).is_ok()
            {
                let full_since = None;
                self.peers.insert(slot, Peer { socket, full_since });
            }
        }
    }

    /// Sends to one peer; false where it is full and the frame should wait.
    fn send_to(&mut self, slot: u16, parts: &[IoSlice], may_wait: bool) -> bool {
        let Some(peer) = self.peers.get_mut(&slot) else {
            return true;
        };
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let control = &mut SendAncillaryBuffer::default();
        match retry_on_intr(|| sendmsg(&peer.socket, parts, control, flags)) {
            Ok(_) => peer.full_since = None,
            Err(Errno::AGAIN | Errno::NOBUFS) => {
                let now = self.clock.now();
                let since = *peer.full_since.get_or_insert(now);
                return !may_wait || now >= since + PATIENCE;
            }
            // Longer than a datagram may be on this host: lost.
            Err(Errno::MSGSIZE) => {}
            Err(_) => self.forget(slot),
        }
        true
    }

    /// Sends to every peer, those included that took the place of one that is gone.
    fn send_to_all(&mut self, parts: &[IoSlice]) {
        self.scan();
        let known: Vec<u16> = self.peers.keys().copied().collect();
        let mut gone = false;
        for &to in &known {
            self.send_to(to, parts, false);
            gone |= !self.peers.contains_key(&to);
        }
        if gone {
            let left: Vec<u16> = self.peers.keys().copied().collect();
            self.scan();
            let found: Vec<u16> = self.peers.keys().copied().collect();
            for to in found.into_iter().filter(|to| !left.contains(to)) {
                self.send_to(to, parts, false);
            }
        }
    }

    fn forget(&mut self, slot: u16) {
        self.peers.remove(&slot);
        self.addresses.retain(|_, at| *at != slot);
        // Another machine may have its place already.
        self.scanned = None;
    }

    fn learn(&mut self, mac: Mac, slot: u16) {
        if mac[0] & 1 == 0
            && (self.addresses.len() < ADDRESSES_MAX || self.addresses.contains_key(&mac))
        {
            self.addresses.insert(mac, slot);
        }
    }

    /// Takes a frame from the socket; false where there is none.
    fn take(&mut self) -> bool {
        let buffer = &mut self.buffer[..];
        let receive = || {
            let flags = RecvFlags::DONTWAIT;
            rustix::net::recv(&self.place.socket, &mut *buffer, flags)
        };
        let mut receive = receive;
        let n = match retry_on_intr(&mut receive) {
            Ok((n, _)) => n,
            Err(_) => {
                self.readable = false;
                return false;
            }
        };
        if let Some((prefix, frame)) = self.buffer[..n].split_first_chunk::<PREFIX>()
            && let [low, high, header @ ..] = prefix
            && let Some(source) = frame.get(6..12).and_then(|mac| mac.try_into().ok())
            && let Some(offload) = Offload::decode(header, frame.len())
        {
            let frames = finish(offload, frame.to_vec(), self.accepts);
            self.waiting.extend(frames);
            let slot = u16::from_le_bytes([*low, *high]);
            if !self.peers.contains_key(&slot) {
                self.scan();
            }
            self.learn(source, slot);
        }
        true
    }

    fn next(&mut self) -> bool {
        while self.waiting.is_empty() && self.readable {
            self.take();
        }
        !self.waiting.is_empty()
    }
}

impl Link for Switch {
    fn accepts(&self) -> Accepts {
        Accepts::ALL
    }

    fn guest_accepts(&mut self, accepts: Accepts) {
        self.accepts = accepts;
        // Those that wait may be for another driver.
        finish_waiting(&mut self.waiting, accepts);
    }

    fn send(&mut self, offload: Offload, frame: &[u8]) -> Sent {
        let Some(destination) = frame.first_chunk::<6>() else {
            return Sent::Taken;
        };
        let header = offload.encode();
        let slot = self.place.slot.to_le_bytes();
        let parts = [
            IoSlice::new(&slot),
            IoSlice::new(&header),
            IoSlice::new(frame),
        ];
        if let Some(&to) = self.addresses.get(destination)
            && self.peers.contains_key(&to)
        {
            let sent = self.send_to(to, &parts, true);
            self.refused |= !sent;
            return if sent { Sent::Taken } else { Sent::Full };
        }
        self.send_to_all(&parts);
        Sent::Taken
    }

    fn receive(&mut self, room: usize, sink: Sink) -> Received {
        if !self.next() {
            return Received::Nothing;
        }
        let (offload, frame) = &self.waiting[0];
        if frame.len() > room {
            return Received::TooLong(frame.len());
        }
        sink(*offload, &[frame]);
        self.waiting.pop_front();
        Received::Frame
    }

    fn discard(&mut self) {
        self.waiting.pop_front();
    }

    fn has_frames(&self) -> bool {
        self.readable || !self.waiting.is_empty()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    fn deadline(&self) -> Option<Nanos> {
        let full = self.peers.values().filter_map(|peer| peer.full_since).min();
        full.filter(|_| self.refused).map(|since| since + PATIENCE)
    }

    fn service(&mut self) -> bool {
        let mut events = Vec::with_capacity(64);
        let now = rustix::time::Timespec::default();
        let spare = rustix::buffer::spare_capacity(&mut events);
        let _ = epoll::wait(&self.poller, spare, Some(&now));
        let mut room = false;
        for event in &events {
            match event.data.u64() {
                OWN => self.readable = true,
                _ => room = true,
            }
        }
        let late = self.deadline().is_some_and(|at| at <= self.clock.now());
        let offer_again = self.refused && (room || late);
        self.refused &= !offer_again;
        offer_again
    }
}

fn watch(
    poller: &OwnedFd,
    socket: &OwnedFd,
    of: u64,
    what: epoll::EventFlags,
) -> Result<(), Errno> {
    let data = epoll::EventData::new_u64(of);
    epoll::add(poller, socket, data, what | epoll::EventFlags::ET)
}
