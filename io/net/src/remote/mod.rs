//! A network in a process of its own, a *driver domain*: its crash takes down neither the monitor nor the guest.
//!
//! Problem: a user network reads what a hostile guest and the hosts of the world send, with sockets of the user's. It should not do so where the guest's memory is.
//! Idea: the cut is at [`Link`]. A frame is a record of the socket between monitor and process, in both directions; the card and its rings stay in the monitor. A
//! ring in shared memory would copy a frame as often, since neither side may read in place what the other may change meanwhile, and would need a notification of
//! its own; the socket keeps records whole, wakes who waits, and is full when the other side does not get on.
//! Invariant: nothing is sent again. What was in the socket when a process died is lost, as a network loses frames, and so is what the guest sends until the
//! next one is there (a few milliseconds). Frames that the guest does not take are finished here, whatever the process says of them.
//! Cost: a copy into the kernel and one out of it for each frame, a system call each, and two changes of threads where the guest waits for an answer.
//!
//! What the guest knows of its network lasts: its address, since a new gateway gives who asks for an address that is free that one, and its link, which never
//! goes down. TCP connections through a user network end with the process, and either side is told by a reset (`flows`; the host's side by the kernel).

mod flows;
mod message;
mod server;

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use doppel_device::{Clock, Nanos};
use doppel_domain::{Domain, Frontend, Start};
use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, sendmsg, shutdown, sockopt,
};

use crate::finish::{finish, finish_waiting};
use crate::link::{Accepts, Link, Offload, Received, Sent, Sink};
use flows::{FLOWS_MAX, Flows};
use message::{Hello, Message, RECORD_MAX, prefix};
pub use server::serve;

/// Room for a few segments of 64 KiB under way; the host gives what it allows.
const SEND_BUFFER: usize = 1 << 20;
/// A process that lived so long was of use.
const USEFUL: Duration = Duration::from_millis(100);

/// A network that another process has.
pub struct RemoteLink {
    domain: Domain<Shared>,
    /// Of the process that there is, as far as is known here.
    socket: Option<Arc<OwnedFd>>,
    /// How many processes there were by then.
    generation: u64,
    accepts: Accepts,
    guest: Accepts,
    /// What the guest takes is still to be said.
    accepts_due: bool,
    buffer: Vec<u8>,
    /// The record in `buffer` is this frame, up to here.
    kept: Option<(Offload, usize)>,
    /// Packets into which one was cut.
    finished: VecDeque<(Offload, Vec<u8>)>,
    readable: bool,
    refused: bool,
    /// Where the process ends the guest's connections.
    flows: Option<Flows>,
    clock: Arc<dyn Clock>,
}

struct Shared {
    /// Readable when a process has sent something, takes something again, is there or gone.
    news: OwnedFd,
    state: Mutex<State>,
}

struct State {
    socket: Option<Arc<OwnedFd>>,
    generation: u64,
    started: Instant,
    deaths: u32,
    ended: bool,
}

impl Shared {
    fn new(socket: &Arc<OwnedFd>) -> io::Result<Self> {
        let shared = Shared {
            news: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            state: Mutex::new(State {
                socket: None,
                generation: 0,
                started: Instant::now(),
                deaths: 0,
                ended: false,
            }),
        };
        shared.take_on(socket)?;
        Ok(shared)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is a process.
    fn take_on(&self, socket: &Arc<OwnedFd>) -> io::Result<()> {
        // Less than that is slower, and no harm.
        let _ = sockopt::set_socket_send_buffer_size(&**socket, SEND_BUFFER);
        let mut state = self.state();
        if state.ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        state.generation += 1;
        state.started = Instant::now();
        state.socket = Some(socket.clone());
        // It can be written to, so this is news already.
        let what = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(state.generation);
        Ok(epoll::add(&self.news, &**socket, data, what)?)
    }
}

impl Frontend for Shared {
    /// The card reads what comes; what is waited for here is the end.
    fn attend(&self, socket: &OwnedFd) {
        // Where the host cannot even say so, the process goes.
        let _ = retry_on_intr(|| poll(&mut [PollFd::new(socket, PollFlags::RDHUP)], None));
        // What the card knows of the socket, it finds closed.
        let _ = shutdown(socket, Shutdown::Both);
        self.state().socket = None;
    }

    fn died(&self) -> Option<u32> {
        let mut state = self.state();
        if state.started.elapsed() >= USEFUL {
            state.deaths = 0;
        }
        state.deaths += 1;
        (!state.ended).then_some(state.deaths)
    }

    fn resume(&self, socket: &Arc<OwnedFd>, hello: &[u8]) -> io::Result<()> {
        Hello::decode(hello)?;
        self.take_on(socket)
    }

    fn end(&self) {
        let mut state = self.state();
        state.ended = true;
        if let Some(socket) = state.socket.take() {
            let _ = shutdown(&*socket, Shutdown::Both);
        }
    }
}

impl RemoteLink {
    /// Starts the process, which is to call [`serve`] with the other end of the socket, and waits until it has opened the network; and the
    /// MAC address of the card. Where the network `ends_connections`, as a user network does, a guest hears that they are gone when the process is.
    ///
    /// # Errors
    /// The process cannot be started, or says why it cannot open the network.
    pub fn new(
        start: Start,
        ends_connections: bool,
        clock: Arc<dyn Clock>,
    ) -> io::Result<(Self, [u8; 6])> {
        let mut network = None;
        let domain = Domain::new(start, |socket, hello| {
            network = Some(Hello::decode(hello)?);
            Shared::new(socket)
        })?;
        let Hello { accepts, mac } = network.ok_or(io::ErrorKind::InvalidData)?;
        domain.supervise()?;
        let link = RemoteLink {
            domain,
            socket: None,
            generation: 0,
            accepts,
            guest: Accepts::default(),
            accepts_due: false,
            buffer: vec![0; RECORD_MAX + 1],
            kept: None,
            finished: VecDeque::new(),
            readable: false,
            refused: false,
            flows: ends_connections.then(Flows::default),
            clock,
        };
        Ok((link, mac))
    }

    /// Turns to the process that there is by now. True where it is another.
    fn turn_to_process(&mut self) -> bool {
        let state = self.domain.frontend().state();
        if state.generation == self.generation {
            return false;
        }
        self.generation = state.generation;
        self.socket = state.socket.clone();
        drop(state);
        self.readable = true;
        self.accepts_due = true;
        if let Some(flows) = &mut self.flows {
            flows.lose(self.clock.now());
        }
        true
    }

    /// Asks the guest about connections that are gone.
    fn ask(&mut self) {
        if let Some(flows) = &mut self.flows {
            let questions = flows.ask(self.clock.now(), self.guest);
            // A guest that takes none need not hear them all.
            if self.finished.len() < FLOWS_MAX {
                self.finished.extend(questions);
            }
        }
    }

    /// Sends a record; false where the process has to take others first. Without a process it is lost.
    fn post(&mut self, parts: &[IoSlice]) -> bool {
        let Some(socket) = &self.socket else {
            return true;
        };
        match send_now(socket, parts) {
            Ok(()) => true,
            Err(Errno::AGAIN | Errno::NOBUFS) => false,
            // Longer than the host lets records be: it is lost.
            Err(Errno::MSGSIZE) => true,
            Err(_) => {
                self.give_up();
                true
            }
        }
    }

    fn say_what_guest_accepts(&mut self) {
        if self.accepts_due {
            let record = message::accepts(self.guest);
            self.accepts_due = !self.post(&[IoSlice::new(&record)]);
        }
    }

    /// Gets the next frame, so that its length is known.
    fn fetch(&mut self) {
        while self.kept.is_none() && self.finished.is_empty() && self.readable {
            let Some(socket) = &self.socket else {
                self.readable = false;
                return;
            };
            let buffer = &mut self.buffer[..];
            match retry_on_intr(|| recv(socket, &mut *buffer, RecvFlags::DONTWAIT)) {
                Ok((len, _)) if len > 0 => self.take(len),
                Err(Errno::AGAIN) => self.readable = false,
                // It is dead.
                _ => self.give_up(),
            }
        }
    }

    fn take(&mut self, len: usize) {
        let Some(Message::Frame(offload, frame)) = Message::decode(&self.buffer[..len]) else {
            return self.give_up();
        };
        match self.guest.takes(offload) {
            true => self.kept = Some((offload, len)),
            false => self
                .finished
                .extend(finish(offload, frame.to_vec(), self.guest)),
        }
    }

    /// The process is of no use; its supervisor, who sees the socket closed, ends it and starts another.
    fn give_up(&mut self) {
        self.readable = false;
        if let Some(socket) = self.socket.take() {
            let _ = shutdown(&*socket, Shutdown::Both);
        }
    }

    fn next_frame(&self) -> Option<(Offload, &[u8])> {
        match (self.finished.front(), self.kept) {
            (Some((offload, frame)), _) => Some((*offload, frame)),
            (None, Some((offload, end))) => Some((offload, &self.buffer[message::PREFIX..end])),
            (None, None) => None,
        }
    }
}

impl Link for RemoteLink {
    fn accepts(&self) -> Accepts {
        self.accepts
    }

    fn guest_accepts(&mut self, accepts: Accepts) {
        self.guest = accepts;
        // What came before it said so.
        finish_waiting(&mut self.finished, accepts);
        if let Some((_, len)) = self.kept.take() {
            self.take(len);
        }
        self.accepts_due = true;
        self.say_what_guest_accepts();
    }

    fn send(&mut self, offload: Offload, frame: &[u8]) -> Sent {
        let prefix = prefix(offload);
        let sent = self.post(&[IoSlice::new(&prefix), IoSlice::new(frame)]);
        self.refused |= !sent;
        if let (Some(flows), true) = (&mut self.flows, sent) {
            flows.note(frame);
        }
        if sent { Sent::Taken } else { Sent::Full }
    }

    fn receive(&mut self, room: usize, sink: Sink) -> Received {
        self.fetch();
        let Some((offload, frame)) = self.next_frame() else {
            return Received::Nothing;
        };
        if frame.len() > room {
            return Received::TooLong(frame.len());
        }
        sink(offload, &[frame]);
        self.discard();
        Received::Frame
    }

    fn next_length(&self) -> usize {
        self.next_frame().map_or(0, |(_, frame)| frame.len())
    }

    fn discard(&mut self) {
        if self.finished.pop_front().is_none() {
            self.kept = None;
        }
        self.fetch();
    }

    fn has_frames(&self) -> bool {
        self.next_frame().is_some()
    }

    fn restarts(&self) -> Arc<AtomicU64> {
        self.domain.restarts().clone()
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.domain.frontend().news.as_fd()
    }

    fn deadline(&self) -> Option<Nanos> {
        self.flows.as_ref().and_then(Flows::deadline)
    }

    fn service(&mut self) -> bool {
        let mut events = Vec::with_capacity(4);
        let now = rustix::time::Timespec::default();
        let spare = rustix::buffer::spare_capacity(&mut events);
        let _ = epoll::wait(&self.domain.frontend().news, spare, Some(&now));
        let another = self.turn_to_process();
        let of_this = |event: &&epoll::Event| event.data.u64() == self.generation;
        let flags = events.iter().filter(of_this).map(|event| event.flags);
        let flags = flags.fold(epoll::EventFlags::empty(), |all, flags| all | flags);
        let ends = epoll::EventFlags::HUP | epoll::EventFlags::ERR;
        self.readable |= flags.intersects(epoll::EventFlags::IN | ends);
        self.say_what_guest_accepts();
        self.ask();
        self.fetch();
        let room = another || flags.intersects(epoll::EventFlags::OUT | ends);
        let offer_again = self.refused && room;
        self.refused &= !offer_again;
        offer_again
    }
}

/// Sends a record, unless the socket is full.
fn send_now(socket: impl AsFd, parts: &[IoSlice]) -> Result<(), Errno> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let control = &mut SendAncillaryBuffer::default();
    retry_on_intr(|| sendmsg(&socket, parts, control, flags)).map(drop)
}
