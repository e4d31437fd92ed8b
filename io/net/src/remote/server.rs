//! The process that has a network: one thread between the monitor's socket and the back-end.

use std::fmt::Display;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;

use doppel_device::{Clock, NANOS_PER_SECOND};
use doppel_domain::answer_for;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, recv};

use super::message::{Hello, Message, RECORD_MAX, prefix};
use super::send_now;
use crate::link::{FRAME_MAX, Link, Received, Sent};

/// Frames in one direction before the other has its turn.
const BATCH: usize = 64;

/// Opens a network and serves it through `socket`, until the monitor closes that. `clock` is the one that the back-end's deadlines refer to.
///
/// # Errors
/// The network cannot be opened, which the monitor is told; or the socket fails; or the monitor says what is no message.
pub fn serve<E: Display>(
    socket: OwnedFd,
    clock: &dyn Clock,
    open: impl FnOnce() -> Result<(Box<dyn Link>, [u8; 6]), E>,
) -> io::Result<()> {
    let hello = |(link, mac): &(Box<dyn Link>, [u8; 6])| {
        let (accepts, mac) = (link.accepts(), *mac);
        Hello { accepts, mac }.encode()
    };
    let Some((link, _)) = answer_for(&socket, open(), hello)? else {
        return Ok(());
    };
    let mut server = Server {
        socket,
        link,
        from_guest: vec![0; RECORD_MAX + 1],
        refused: None,
        for_guest: Vec::with_capacity(RECORD_MAX),
    };
    while server.turn(clock)? {}
    Ok(())
}

struct Server {
    socket: OwnedFd,
    link: Box<dyn Link>,
    from_guest: Vec<u8>,
    /// Bytes of the record in `from_guest`, a frame that the back-end has no room for.
    refused: Option<usize>,
    /// A record that the socket has no room for; empty where there is none.
    for_guest: Vec<u8>,
}

/// How far one direction came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// There is nothing more, or it does not get on until something is ready.
    Waits,
    /// There may be more.
    More,
    /// The monitor is gone.
    End,
}

impl Server {
    /// Moves what there is, then waits for more. False at the end.
    fn turn(&mut self, clock: &dyn Clock) -> io::Result<bool> {
        if self.link.service() {
            self.offer_again();
        }
        let progress = [self.take_frames()?, self.give_frames()?];
        if progress.contains(&Progress::End) {
            return Ok(false);
        }
        if !progress.contains(&Progress::More) {
            self.wait(clock)?;
        }
        Ok(true)
    }

    fn wait(&self, clock: &dyn Clock) -> io::Result<()> {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, self.refused.is_none());
        wanted.set(PollFlags::OUT, !self.for_guest.is_empty());
        let news = self.link.descriptor();
        let mut descriptors = [
            PollFd::new(&self.socket, wanted),
            PollFd::new(&news, PollFlags::IN),
        ];
        let time = self.link.deadline().map(|at| {
            let wait = at.saturating_sub(clock.now());
            Timespec {
                tv_sec: (wait / NANOS_PER_SECOND) as i64,
                tv_nsec: (wait % NANOS_PER_SECOND) as _,
            }
        });
        match poll(&mut descriptors, time.as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn offer_again(&mut self) {
        if let Some(len) = self.refused.take() {
            self.take(len);
        }
    }

    /// Takes a record of the monitor's; false where it is none.
    fn take(&mut self, len: usize) -> bool {
        match Message::decode(&self.from_guest[..len]) {
            Some(Message::Frame(offload, frame)) => {
                self.refused = (self.link.send(offload, frame) == Sent::Full).then_some(len);
            }
            Some(Message::Accepts(accepts)) => self.link.guest_accepts(accepts),
            None => return false,
        }
        true
    }

    fn take_frames(&mut self) -> io::Result<Progress> {
        for _ in 0..BATCH {
            if self.refused.is_some() {
                return Ok(Progress::Waits);
            }
            let buffer = &mut self.from_guest[..];
            match retry_on_intr(|| recv(&self.socket, &mut *buffer, RecvFlags::DONTWAIT)) {
                Ok((0, _)) | Err(Errno::CONNRESET) => return Ok(Progress::End),
                Ok((len, _)) if self.take(len) => {}
                Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
                Err(Errno::AGAIN) => return Ok(Progress::Waits),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Progress::More)
    }

    fn give_frames(&mut self) -> io::Result<Progress> {
        for _ in 0..BATCH {
            if self.for_guest.is_empty() && !self.fetch() {
                return Ok(Progress::Waits);
            }
            match send_now(&self.socket, &[IoSlice::new(&self.for_guest)]) {
                Ok(()) => self.for_guest.clear(),
                Err(Errno::AGAIN | Errno::NOBUFS) => return Ok(Progress::Waits),
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(Progress::End),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Progress::More)
    }

    /// Gets the next frame for the guest; false where there is none.
    fn fetch(&mut self) -> bool {
        let record = &mut self.for_guest;
        let mut sink = |offload, parts: &[&[u8]]| {
            record.extend(prefix(offload));
            parts.iter().for_each(|part| record.extend(*part));
        };
        while self.link.has_frames() {
            match self.link.receive(FRAME_MAX, &mut sink) {
                Received::Frame => break,
                Received::Nothing => return false,
                // No frame is so long; one that is would stay for ever.
                Received::TooLong(_) => self.link.discard(),
            }
        }
        !self.for_guest.is_empty()
    }
}
