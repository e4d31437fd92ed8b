//! The process that has a disk: requests come from the monitor, a thread does each.

use std::fmt::Display;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread;

use doppel_domain::{EndOnPanic, answer_for, receive, send};
use doppel_memory::{GuestRam, GuestSlice};
use doppel_seccomp::{Kind as ThreadKind, narrowed};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use super::message::{DATA_MAX, Hello, Kind, MESSAGE_MAX, Message, PIECES_MAX, status};
use crate::BlockBackend;

/// Requests that are carried out at a time: as many as the device hands out.
const THREADS: usize = 16;

struct Server {
    socket: OwnedFd,
    disk: Arc<dyn BlockBackend>,
    ram: RwLock<Option<Arc<GuestRam>>>,
}

/// Opens a disk and does what is asked of it through `socket`, until the monitor closes that.
///
/// # Errors
/// The disk cannot be opened, which the monitor is told; or the socket fails.
pub fn serve<E: Display>(
    socket: OwnedFd,
    open: impl FnOnce() -> Result<Arc<dyn BlockBackend>, E>,
) -> io::Result<()> {
    let hello = |disk: &Arc<dyn BlockBackend>| {
        let (len, read_only) = (disk.len(), disk.read_only());
        Hello { len, read_only }.encode()
    };
    let Some(disk) = answer_for(&socket, open(), hello)? else {
        return Ok(());
    };
    let server = Server {
        socket,
        disk,
        ram: RwLock::default(),
    };
    thread::scope(|scope| {
        for _ in 1..THREADS {
            // Fewer threads do it too.
            let thread = thread::Builder::new().name("disk".to_owned());
            let _ = thread.spawn_scoped(scope, narrowed(ThreadKind::DiskServer, || server.run()));
        }
        server.run();
    });
    Ok(())
}

impl Server {
    fn run(&self) {
        let _watch = EndOnPanic;
        let mut buffer = vec![0; MESSAGE_MAX];
        while let Ok(Some((len, file))) = receive(&self.socket, &mut buffer) {
            let Some(request) = Message::decode(&buffer[..len]) else {
                return;
            };
            let mut answer = Message::new(request.kind, request.offset, request.len);
            answer.id = request.id;
            answer.status = status(&self.carry_out(&request, file, &mut answer.data));
            if send(&self.socket, &answer.encode(), None).is_err() {
                return;
            }
        }
    }

    fn carry_out(
        &self,
        request: &Message,
        file: Option<File>,
        data: &mut Vec<u8>,
    ) -> io::Result<()> {
        let (disk, offset, len) = (&self.disk, request.offset, request.len);
        match request.kind {
            Kind::ReadToGuest => self.with_pieces(request, Permissions::Write, |to| {
                disk.read_to_guest(offset, to)
            }),
            Kind::WriteFromGuest => {
                self.with_pieces(request, Permissions::Read, |from| {
                    disk.write_from_guest(offset, from)
                })?;
                disk.settle()
            }
            Kind::Read => {
                data.resize(len.min(DATA_MAX as u64) as usize, 0);
                disk.read_at(offset, &mut [IoSliceMut::new(data)])
            }
            Kind::Write => {
                disk.write_at(offset, &[IoSlice::new(&request.data)])?;
                disk.settle()
            }
            Kind::Flush => disk.flush(),
            Kind::Discard => disk.discard(offset, len).and_then(|()| disk.settle()),
            Kind::WriteZeroes | Kind::Unmap => {
                let may_unmap = request.kind == Kind::Unmap;
                disk.write_zeroes(offset, len, may_unmap)?;
                disk.settle()
            }
            Kind::Memory => self.use_memory(len, file),
        }
    }

    fn use_memory(&self, size: u64, file: Option<File>) -> io::Result<()> {
        let ram = file.map(|file| GuestRam::of_file(size, file));
        let ram = ram.transpose().map_err(io::Error::other)?;
        *self.ram.write().unwrap_or_else(PoisonError::into_inner) = ram.map(Arc::new);
        Ok(())
    }

    fn with_pieces(
        &self,
        request: &Message,
        access: Permissions,
        f: impl FnOnce(&[GuestSlice<'_>]) -> io::Result<()>,
    ) -> io::Result<()> {
        let ram = self
            .ram
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let ram = ram.ok_or(io::ErrorKind::InvalidInput)?;
        let outside = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let mut pieces = Vec::new();
        for (address, len) in request.pieces().take(PIECES_MAX) {
            let len = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
            let found = ram.view().get_slices(GuestAddress(address), len, access);
            for piece in found.map_err(outside)? {
                pieces.push(piece.map_err(outside)?);
            }
        }
        f(&pieces)
    }
}
