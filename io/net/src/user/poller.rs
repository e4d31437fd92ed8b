//! Readiness of host sockets: one epoll instance, edge-triggered, and what its events are for.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
pub use rustix::event::epoll::EventFlags;

/// What an event is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A TCP connection.
    Tcp,
    /// Datagrams, or echo requests, between two addresses.
    Session,
    /// A forwarded TCP port.
    Listener,
    /// A forwarded UDP port.
    UdpForward,
}

const KINDS: [Kind; 4] = [Kind::Tcp, Kind::Session, Kind::Listener, Kind::UdpForward];
const GENERATIONS: u64 = 0xff_ffff;

/// A flow as epoll knows it: kind, generation, index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Token(u64);

impl Token {
    /// The token of a slot.
    pub fn new(kind: Kind, index: u32, generation: u32) -> Self {
        let generation = u64::from(generation) & GENERATIONS;
        Token((kind as u64) << 56 | generation << 32 | u64::from(index))
    }

    /// What it is for.
    pub fn kind(self) -> Option<Kind> {
        KINDS.get((self.0 >> 56) as usize).copied()
    }

    /// Which slot.
    pub fn index(self) -> u32 {
        self.0 as u32
    }
}

/// The epoll instance.
pub struct Poller(OwnedFd);

impl Poller {
    /// Watches nothing.
    pub fn new() -> io::Result<Self> {
        Ok(Poller(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Tells of every change of `socket` until that is closed.
    pub fn add(&self, socket: impl AsFd, token: Token) -> io::Result<()> {
        let wanted = EventFlags::IN | EventFlags::PRI | EventFlags::OUT | EventFlags::RDHUP;
        let flags = wanted | EventFlags::ET;
        Ok(epoll::add(
            &self.0,
            socket,
            epoll::EventData::new_u64(token.0),
            flags,
        )?)
    }

    /// What happened since the last time.
    pub fn events(&self) -> Vec<(Token, EventFlags)> {
        let mut events = Vec::with_capacity(256);
        let now = rustix::time::Timespec::default();
        let spare = rustix::buffer::spare_capacity(&mut events);
        // An interrupted call is made again on the next occasion: what it would have told is still there.
        let _ = epoll::wait(&self.0, spare, Some(&now));
        let event = |e: &epoll::Event| (Token(e.data.u64()), e.flags);
        events.iter().map(event).collect()
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
