//! A disk in a process of its own, a *driver domain*: its crash takes down neither the monitor nor the guest.
//!
//! Problem: what is behind a disk (image formats, above all) is the likeliest part of a monitor to crash, and holds the least of its
//! state. Vhost-user would move the whole device away, queues included. But whoever writes to guest RAM has to say so before the guest is told
//! (`doppel_memory::DmaBitmap`), for the sake of translated code; and what another process wrote on behalf of a descriptor cannot be known from the
//! rings afterwards, since a guest may have changed them. Requests under way would have to be kept in shared memory, too.
//! Idea: the cut is at [`BlockBackend`]. The monitor takes requests out of the rings, checks them, and sends them on: a few numbers and
//! the guest physical addresses of their buffers. The other process maps the guest's RAM (a memfd) and moves the data between it and the image. When it
//! answers, the monitor notes what was written and tells the guest. What was not answered is still here: when the process dies,
//! it is started anew (`doppel_domain`) and gets all of that again.
//! Invariant: a request is carried out by one process at a time (the old one is reaped before the next starts), and a write is answered
//! only when the end of the process could not lose it ([`BlockBackend::settle`]). So a guest sees every answered write, and nothing
//! of an old one comes later.
//! Cost: two system calls and two changes of threads for a request; tables of qcow2 images are written with each write that
//! changes them.
//!
//! A request on which the process dies every time is given up with an I/O error.

mod message;
mod server;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use doppel_domain::{Domain, Frontend, Start, receive, send};
use doppel_memory::{GuestRam, GuestSlice};
use rustix::net::{Shutdown, shutdown};
use vm_memory::bitmap::Bitmap;

use crate::backend::{check_range, check_writable, reads_len, writes_len};
use crate::guest::guest_len;
use crate::{BlockBackend, SECTOR};
use message::{DATA_MAX, Hello, Kind, MESSAGE_MAX, Message, PIECES_MAX, result};
pub use server::serve;

/// So many processes die with a request before it is given up.
const DEATHS_MAX: u32 = 6;
/// So many processes die without an answer to anything before all requests are given up: a process that always dies before it takes one.
const DEATHS_IN_A_ROW: u32 = 24;
/// From so many on, it is sent alone, so that others are not blamed for it.
const SUSPECT: u32 = 2;
/// A disk that another process has.
pub struct RemoteDisk {
    domain: Domain<Shared>,
    len: u64,
    read_only: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    answered: Condvar,
}

#[derive(Default)]
struct State {
    /// Where requests go, while there is a process.
    socket: Option<Arc<OwnedFd>>,
    memory: Option<(u64, File)>,
    /// Times that the memory changed.
    memories: u64,
    next: u64,
    pending: BTreeMap<u64, Pending>,
    answers: BTreeMap<u64, Message>,
    /// Of the process, since an answer came last.
    deaths: u32,
    ended: bool,
}

/// A request without an answer.
struct Pending {
    bytes: Vec<u8>,
    /// The process that there is has it.
    sent: bool,
    /// Processes that died with it.
    deaths: u32,
}

impl State {
    /// Gives a request a number and notes that it waits.
    fn add(&mut self, mut request: Message) -> (u64, Vec<u8>) {
        request.id = self.next;
        self.next += 1;
        let bytes = request.encode();
        let pending = Pending {
            bytes: bytes.clone(),
            sent: self.socket.is_some(),
            deaths: 0,
        };
        self.pending.insert(request.id, pending);
        (request.id, bytes)
    }
}

impl RemoteDisk {
    /// Starts the process, which is to call [`serve`] with the other end of the socket, and waits until it has opened the disk.
    ///
    /// # Errors
    /// The process cannot be started, or says why it cannot open the disk.
    pub fn new(start: Start) -> io::Result<Self> {
        let mut disk = None;
        let domain = Domain::new(start, |socket, hello| {
            disk = Some(Hello::decode(hello)?);
            let shared = Shared::default();
            shared.state().socket = Some(socket.clone());
            Ok(shared)
        })?;
        let Hello { len, read_only } = disk.ok_or(io::ErrorKind::InvalidData)?;
        Ok(RemoteDisk {
            domain,
            len: len / SECTOR * SECTOR,
            read_only,
        })
    }

    /// The number of the process that was started first.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.domain.process()
    }

    fn call(&self, request: Message) -> io::Result<Message> {
        self.domain.supervise()?;
        self.domain.frontend().call(request)
    }

    fn guest_call(&self, kind: Kind, offset: u64, pieces: &[GuestSlice<'_>]) -> io::Result<()> {
        let mut at = offset;
        // The monitor takes no more pieces from a guest than fit into one message.
        for pieces in pieces.chunks(PIECES_MAX) {
            let len = guest_len(pieces);
            let addressed = pieces
                .iter()
                .map(|piece| (piece.bitmap().address(), piece.len() as u64));
            let request = Message::new(kind, at, len).with_pieces(addressed);
            self.call(request)?;
            at += len;
        }
        Ok(())
    }
}

impl BlockBackend for RemoteDisk {
    fn len(&self) -> u64 {
        self.len
    }

    fn restarts(&self) -> Arc<AtomicU64> {
        self.domain.restarts().clone()
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, mut offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        check_range(offset, reads_len(into), self.len)?;
        for slice in into {
            for part in slice.chunks_mut(DATA_MAX) {
                let request = Message::new(Kind::Read, offset, part.len() as u64);
                let answer = self.call(request)?;
                let data = answer.data.get(..part.len());
                part.copy_from_slice(data.ok_or(io::ErrorKind::InvalidData)?);
                offset += part.len() as u64;
            }
        }
        Ok(())
    }

    fn write_at(&self, mut offset: u64, from: &[IoSlice<'_>]) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, writes_len(from), self.len)?;
        for part in from.iter().flat_map(|slice| slice.chunks(DATA_MAX)) {
            let mut request = Message::new(Kind::Write, offset, part.len() as u64);
            request.data = part.to_vec();
            self.call(request)?;
            offset += part.len() as u64;
        }
        Ok(())
    }

    fn read_to_guest(&self, offset: u64, into: &[GuestSlice<'_>]) -> io::Result<()> {
        check_range(offset, guest_len(into), self.len)?;
        let done = self.guest_call(Kind::ReadToGuest, offset, into);
        // After an error too: nobody says what was written before it.
        for piece in into {
            piece.bitmap().mark_dirty(0, piece.len());
        }
        done
    }

    fn write_from_guest(&self, offset: u64, from: &[GuestSlice<'_>]) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, guest_len(from), self.len)?;
        self.guest_call(Kind::WriteFromGuest, offset, from)
    }

    fn use_memory(&self, ram: Option<&GuestRam>) -> io::Result<()> {
        let memory = ram.map(|ram| {
            let file = ram.file().ok_or_else(|| {
                io::Error::other("a disk in a process of its own needs guest memory in a memfd")
            })?;
            Ok::<_, io::Error>((ram.size(), file.try_clone()?))
        });
        self.domain.supervise()?;
        self.domain.frontend().use_memory(memory.transpose()?)
    }

    fn flush(&self) -> io::Result<()> {
        self.call(Message::new(Kind::Flush, 0, 0)).map(drop)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, len, self.len)?;
        self.call(Message::new(Kind::Discard, offset, len))
            .map(drop)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        check_writable(self)?;
        check_range(offset, len, self.len)?;
        let kind = match may_unmap {
            true => Kind::Unmap,
            false => Kind::WriteZeroes,
        };
        self.call(Message::new(kind, offset, len)).map(drop)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends a request and waits for its answer, however many processes that takes.
    fn call(&self, request: Message) -> io::Result<Message> {
        let (id, bytes, socket) = {
            let mut state = self.state();
            let (id, bytes) = state.add(request);
            (id, bytes, state.socket.clone())
        };
        if let Some(socket) = socket {
            // Where that fails the process is dead, and the next gets it.
            let _ = send(&*socket, &bytes, None);
        }
        self.wait_for(id, self.state())
    }

    fn wait_for(&self, id: u64, mut state: MutexGuard<'_, State>) -> io::Result<Message> {
        loop {
            if let Some(answer) = state.answers.remove(&id) {
                return result(answer.status).map(|()| answer);
            }
            let woken = self.answered.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The process learns of the memory now, and each that follows it at its start. No request is under way.
    fn use_memory(&self, memory: Option<(u64, File)>) -> io::Result<()> {
        let mut state = self.state();
        state.memory = memory;
        state.memories += 1;
        // After a death it is a flush that is sent again, to a process that knows the memory by then.
        let (id, _) = state.add(Message::new(Kind::Flush, 0, 0));
        if let Some(socket) = &state.socket {
            let (size, file) = match &state.memory {
                Some((size, file)) => (*size, Some(file.as_fd())),
                None => (0, None),
            };
            let mut request = Message::new(Kind::Memory, 0, size);
            request.id = id;
            let _ = send(&**socket, &request.encode(), file);
        }
        self.wait_for(id, state).map(drop)
    }

    fn pass_on(&self, answer: Message) {
        let mut state = self.state();
        state.deaths = 0;
        if state.pending.remove(&answer.id).is_some() {
            state.answers.insert(answer.id, answer);
            self.answered.notify_all();
        }
    }

    /// Passes answers on until the one to a suspect was among them: if the process dies, it dies of that. False where it did.
    fn wait_for_answer_to(&self, id: u64, socket: &OwnedFd) -> bool {
        let mut buffer = vec![0; MESSAGE_MAX];
        while self.state().pending.contains_key(&id) {
            match hear(socket, &mut buffer) {
                Ok(answer) => self.pass_on(answer),
                Err(_) => return false,
            }
        }
        true
    }
}

impl Frontend for Shared {
    /// Passes answers on.
    fn attend(&self, socket: &OwnedFd) {
        let mut buffer = vec![0; MESSAGE_MAX];
        while let Ok(answer) = hear(socket, &mut buffer) {
            self.pass_on(answer);
        }
        self.state().socket = None;
    }

    /// A process died: what has seen too many of them die, or at the end everything, is answered with an error. How many died since
    /// the last answer; `None` at the end.
    fn died(&self) -> Option<u32> {
        let mut state = self.state();
        let ended = state.ended;
        state.deaths += 1;
        let mut lost = Message::new(Kind::Flush, 0, 0);
        lost.status = rustix::io::Errno::IO.raw_os_error().unsigned_abs();
        let requests = state.pending.values_mut();
        requests.for_each(|request| request.deaths += u32::from(std::mem::take(&mut request.sent)));
        let all = ended || state.deaths.is_multiple_of(DEATHS_IN_A_ROW);
        let requests = state
            .pending
            .extract_if(.., |_, request| all || request.deaths >= DEATHS_MAX);
        let gone: Vec<_> = requests.collect();
        let lost = gone.into_iter().map(|(id, _)| (id, lost.clone()));
        state.answers.extend(lost);
        self.answered.notify_all();
        (!ended).then_some(state.deaths)
    }

    /// A new process is told of the memory and of all that waits.
    fn resume(&self, socket: &Arc<OwnedFd>, _: &[u8]) -> io::Result<()> {
        let mut told = None;
        let mut waiting: Vec<_> = loop {
            let mut state = self.state();
            if state.ended {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            if told == Some(state.memories) {
                // Whoever comes from here on sends by itself.
                state.socket = Some(socket.clone());
                let pending = state.pending.iter();
                break pending
                    .map(|(id, p)| (p.deaths, *id, p.bytes.clone()))
                    .collect();
            }
            told = Some(state.memories);
            let memory = state.memory.as_ref();
            let memory = memory.map(|(size, file)| file.try_clone().map(|file| (*size, file)));
            drop(state);
            if let Some((size, file)) = memory.transpose()? {
                let request = Message::new(Kind::Memory, 0, size).encode();
                send(&**socket, &request, Some(file.as_fd()))?;
                result(hear(socket, &mut vec![0; MESSAGE_MAX])?.status)?;
            }
        };
        waiting.sort_unstable();
        for (deaths, id, request) in waiting {
            if let Some(pending) = self.state().pending.get_mut(&id) {
                pending.sent = true;
            }
            // It may have died again; then this is found out where answers are waited for.
            let _ = send(&**socket, &request, None);
            if deaths >= SUSPECT && !self.wait_for_answer_to(id, socket) {
                break;
            }
        }
        Ok(())
    }

    fn end(&self) {
        let mut state = self.state();
        state.ended = true;
        if let Some(socket) = state.socket.take() {
            let _ = shutdown(&*socket, Shutdown::Both);
        }
    }
}

/// Waits for one message.
fn hear(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Message> {
    let (len, _) = receive(socket, buffer)?.ok_or(io::ErrorKind::UnexpectedEof)?;
    Message::decode(&buffer[..len]).ok_or_else(|| io::ErrorKind::InvalidData.into())
}
