//! The transmit queue: frames of the guest on their way to the back-end.

use doppel_net::{FRAME_MAX, Link, Offload, Port, Sent};

use super::{Active, HEADER, NetCounters};
use crate::{Broken, Queue};

/// How far a drain of the queue came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transmitted {
    /// Nothing is left; the driver notifies of the next frame.
    All,
    /// The back-end has no room and will say when it has.
    Blocked,
    /// There is more, or somebody else is at the back-end.
    More,
}

/// A use of the back-end.
pub type Frame<'a> = &'a mut dyn FnMut(&mut dyn Link) -> Sent;

/// The queue.
pub struct Transmit {
    /// Its rings.
    pub queue: Queue,
    buffer: Vec<u8>,
}

impl Transmit {
    /// The queue of a driver that is ready.
    pub fn new(queue: Queue) -> Self {
        Transmit {
            queue,
            buffer: vec![0; HEADER + FRAME_MAX],
        }
    }

    /// Sends what there is, at most `limit.0` frames, and none of more than `limit.1` bytes. `send` uses the back-end, unless it is in use and should not be waited for.
    pub fn drain(
        &mut self,
        active: &Active,
        limit: (usize, usize),
        send: impl Fn(&Port, Frame) -> Option<Sent>,
    ) -> Result<Transmitted, Broken> {
        self.queue.quiet()?;
        let end = self.send_all(active, limit, send);
        self.queue.announce()?;
        end
    }

    fn send_all(
        &mut self,
        active: &Active,
        limit: (usize, usize),
        send: impl Fn(&Port, Frame) -> Option<Sent>,
    ) -> Result<Transmitted, Broken> {
        for _ in 0..limit.0 {
            let Some(chain) = self.queue.pop(&active.ram)? else {
                if self.queue.listen()? {
                    continue;
                }
                return Ok(Transmitted::All);
            };
            let length = chain.readable.len();
            if length > limit.1 {
                self.queue.undo_pop();
                return Ok(Transmitted::More);
            }
            let n = match length {
                n if n <= self.buffer.len() => chain.readable.read(&mut self.buffer),
                // Longer than any frame: it is lost.
                _ => 0,
            };
            let sent = match parse(&self.buffer[..n]) {
                Some((offload, frame)) => send(&active.port, &mut |link| link.send(offload, frame)),
                None => Some(Sent::Taken),
            };
            if sent == Some(Sent::Taken) {
                NetCounters::add(&active.counters.sent, 1);
                NetCounters::add(&active.counters.sent_bytes, n.saturating_sub(HEADER));
                self.queue.push(chain.head, 0)?;
                continue;
            }
            self.queue.undo_pop();
            return Ok(match sent {
                Some(_) => Transmitted::Blocked,
                None => Transmitted::More,
            });
        }
        Ok(Transmitted::More)
    }
}

fn parse(bytes: &[u8]) -> Option<(Offload, &[u8])> {
    let (header, frame) = bytes.split_at_checked(HEADER)?;
    let offload = Offload::decode(header.first_chunk()?, frame.len())?;
    Some((offload, frame))
}
