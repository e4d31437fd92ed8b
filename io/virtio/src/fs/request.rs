//! A message of FUSE in a chain: a header and what follows it to read, room for the answer to write.

use doppel_share::{Answer, Call, HEADER_LEN, Header, REPLY_LEN, Session, reply};

use crate::{Broken, Buffers, Chain};

/// Bytes behind the header, without bulk data, at most: what a guest forgets at once may be long.
const ARGUMENTS_MAX: usize = 128 << 10;

/// A request that was read from a queue.
pub struct Request<'r> {
    head: u16,
    header: Header,
    arguments: Vec<u8>,
    data: Buffers<'r>,
    reply: Buffers<'r>,
    room: Buffers<'r>,
}

/// A request that is over: its head, and how many bytes were written.
pub type Done = (u16, u32);

impl<'r> Request<'r> {
    /// Takes header and arguments off a chain. A chain without room for an answer's header breaks the queue.
    pub fn parse(chain: Chain<'r>) -> Result<Self, Broken> {
        let Chain {
            head,
            mut readable,
            mut writable,
        } = chain;
        let mut bytes = [0; HEADER_LEN];
        let header = match readable.split_off_front(HEADER_LEN).read(&mut bytes) {
            HEADER_LEN => Header::parse(&bytes),
            _ => None,
        };
        let header = header.ok_or(Broken("a file system request without a header"))?;
        let reply = writable.split_off_front(REPLY_LEN);
        if header.wants_answer() && reply.len() < REPLY_LEN {
            return Err(Broken("a file system request without room for its answer"));
        }
        let arguments = header.arguments_len().unwrap_or(ARGUMENTS_MAX);
        let arguments = readable.split_off_front(arguments);
        let mut bytes = vec![0; arguments.len()];
        arguments.read(&mut bytes);
        Ok(Request {
            head,
            header,
            arguments: bytes,
            data: readable,
            reply,
            room: writable,
        })
    }

    /// What identifies it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Carries it out if that needs no waiting, or with `may_wait`; else nothing was done.
    pub fn carry_out(&self, session: &Session, may_wait: bool) -> Option<Done> {
        let call = Call {
            header: self.header,
            arguments: &self.arguments,
            data: self.data.slices(),
            room: self.room.slices(),
            may_wait,
        };
        let result = match session.call(&call) {
            Ok(Answer::Later) if !may_wait => return None,
            Ok(Answer::Later) => Ok(0),
            Ok(Answer::Bytes(bytes)) => Ok(self.room.write(&bytes)),
            Ok(Answer::Data(len)) => Ok(len),
            Err(errno) => Err(errno),
        };
        if !self.header.wants_answer() {
            return Some((self.head, 0));
        }
        self.reply.write(&reply(self.header.unique, result));
        Some((self.head, (REPLY_LEN + result.unwrap_or(0)) as u32))
    }
}
