//! The classes of devices that hostile drivers meet: each with a back-end in memory, what its requests begin with, and a request that an
//! honest driver would make.

use std::io::{self, IoSlice, IoSliceMut, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use doppel_block::BlockBackend;
use doppel_device::{CharSink, CharSource};

use super::Random;
use super::share::{Folder, fuse_init, fuse_message};
use crate::testing::Piece;
use crate::vsock::{HEADER_LEN, HOST, Header, STREAM};
use crate::{
    Balloon, BalloonControl, Blk, Console, ConsoleBackend, Rng, VirtioDevice, Vsock, VsockSocket,
    WindowSize,
};

const DISK_LEN: usize = 64 << 10;

/// What a device's host is made of.
pub(super) type Kept = Box<dyn Host>;

/// The host of a device.
pub(super) trait Host {
    /// True where nothing changed that the driver has no right to.
    fn is_well(&self) -> bool {
        true
    }
}

impl Host for () {}
impl<A, B> Host for (A, B) {}

impl Host for Folder {
    fn is_well(&self) -> bool {
        self.is_as_it_was()
    }
}

/// A class of devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Blk,
    Rng,
    Console,
    Balloon,
    Vsock,
    Fs,
}

/// A request that is served.
pub(super) struct Honest {
    /// Which queue it goes to.
    pub queue: usize,
    /// Its buffers.
    pub pieces: Vec<Piece>,
    /// Bytes written to them.
    pub used: u32,
    /// What is in memory before.
    pub memory: Vec<(u64, Vec<u8>)>,
    /// Requests that are made before, by queue.
    pub before: Vec<(usize, Vec<Piece>)>,
}

impl Class {
    /// One of them; blocks have the most to go wrong.
    pub(super) fn any(random: &mut Random) -> Self {
        random.one(&[
            Class::Blk,
            Class::Blk,
            Class::Blk,
            Class::Fs,
            Class::Fs,
            Class::Fs,
            Class::Rng,
            Class::Console,
            Class::Balloon,
            Class::Vsock,
            Class::Vsock,
        ])
    }

    /// A device.
    pub(super) fn device(self, random: &mut Random) -> (Box<dyn VirtioDevice>, Kept) {
        let device: Box<dyn VirtioDevice> = match self {
            Class::Blk => {
                let disk = Arc::new(MemoryDisk(Mutex::new(vec![0; DISK_LEN])));
                Box::new(Blk::new(disk, "hostile", 1 + random.below(3) as u32))
            }
            Class::Rng => Box::new(Rng::new()),
            Class::Vsock => return vsock(),
            Class::Fs => {
                let folder = Folder::new(random.next()).expect("a folder for temporary files");
                return (folder.device(), Box::new(folder));
            }
            Class::Balloon => {
                let control = BalloonControl::new(random.below(1 << 24)).expect("a descriptor");
                let often = random.below(2) == 0;
                Box::new(Balloon::new(
                    control,
                    often.then_some(Duration::from_micros(500)),
                ))
            }
            Class::Console => {
                let host = Arc::new(Chatter::default());
                let backend = ConsoleBackend {
                    sink: host.clone(),
                    source: host,
                    size: Some(Arc::new(WindowSize::new(25, 80))),
                };
                let console = Console::new(backend, random.below(2) == 0);
                Box::new(console.expect("a descriptor"))
            }
        };
        (device, Box::new(()))
    }

    /// What makes more than noise of a request.
    pub(super) fn header(self, random: &mut Random) -> Vec<u8> {
        match self {
            Class::Blk => {
                let code = random.one(&[0u32, 1, 4, 8, 11, 13, 13, 99]);
                let sector = random.one(&[0, 1, 100, 127, 128, u64::MAX]);
                let words = [&code.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()];
                words.concat()
            }
            Class::Balloon => {
                let number = random.below(0x1000) as u32;
                [number, number + 1, random.next() as u32]
                    .map(u32::to_le_bytes)
                    .concat()
            }
            Class::Vsock => packet(random).to_vec(),
            Class::Fs => fuse_message(random),
            Class::Rng | Class::Console => Vec::new(),
        }
    }

    /// Lengths that buffers of its requests often have.
    pub(super) fn lengths(self) -> [u32; 2] {
        match self {
            Class::Fs => [doppel_share::HEADER_LEN as u32 + 64, 512],
            Class::Vsock => [HEADER_LEN as u32, 512],
            _ => [16, 512],
        }
    }

    /// A request of an honest driver, with what it needs from `at` on.
    pub(super) fn honest(self, at: u64) -> Honest {
        let data = Piece::In(at + 0x1000, 512);
        let (queue, pieces, used) = match self {
            Class::Blk => {
                let (header, status) = (Piece::Out(at, 16), Piece::In(at + 0x2000, 1));
                (0, vec![header, data, status], 513)
            }
            Class::Rng => (0, vec![data], 512),
            // The first queue of a file system has no answers.
            Class::Fs => {
                let message = fuse_init();
                let out = Piece::Out(at, message.len() as u32);
                return Honest {
                    queue: 1,
                    pieces: vec![out, data],
                    used: doppel_share::REPLY_LEN as u32 + 64,
                    memory: vec![(at, message)],
                    before: Vec::new(),
                };
            }
            Class::Console => (1, vec![Piece::Out(at, 512)], 0),
            // Where nobody listens.
            Class::Vsock => (1, vec![Piece::Out(at, 44)], 0),
            Class::Balloon => (4, vec![Piece::In(at + 0x1000, 4096)], 0),
        };
        Honest {
            queue,
            pieces,
            used,
            memory: vec![(at, vec![0; 16])],
            before: Vec::new(),
        }
    }
}

const CID: u32 = 3;
/// Somebody listens at these ports, and never reads.
const PORTS: [u32; 2] = [80, 81];

/// A socket device with a host that accepts nothing, and one that does nothing but connect, which last as long as what is kept.
fn vsock() -> (Box<dyn VirtioDevice>, Kept) {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("doppel-hostile-vsock-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let socket = VsockSocket::open(&path).expect("a socket");
    let listen = |port| {
        let mut path = path.clone().into_os_string();
        path.push(format!("_{port}"));
        let listener = UnixListener::bind(&path).expect("a socket");
        // It is there as long as it is open.
        (listener, Removed(path.into()))
    };
    let listeners = PORTS.map(listen);
    let mut callers = Vec::new();
    for port in 1..4 {
        let mut caller = UnixStream::connect(&path).expect("a connection");
        let _ = writeln!(caller, "CONNECT {port}");
        let _ = caller.write_all(&[7; 1000]);
        callers.push(caller);
    }
    let device = Box::new(Vsock::new(CID, Arc::new(socket)));
    (device, Box::new((listeners, callers)))
}

/// A file that goes with this.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A header that is often right.
fn packet(random: &mut Random) -> [u8; HEADER_LEN] {
    let port = |random: &mut Random| random.one(&[1u32, 2, 3, 80, 81, 82, 1 << 30, (1 << 30) + 1]);
    let header = Header {
        src_cid: random.one(&[CID.into(), CID.into(), CID.into(), 4, u64::MAX]),
        dst_cid: random.one(&[HOST, HOST, HOST, 1, 9]),
        src_port: port(random),
        dst_port: port(random),
        len: random.one(&[0, 16, 512, 4096, u32::MAX]),
        kind: random.one(&[STREAM, STREAM, STREAM, 2]),
        op: random.below(9) as u16,
        flags: random.below(5) as u32,
        buf_alloc: random.one(&[0, 100, 1 << 16, u32::MAX]),
        fwd_cnt: random.one(&[0, 100, 1 << 16, u32::MAX]),
    };
    header.bytes()
}

/// A host that reads and types now and then.
#[derive(Default)]
struct Chatter(AtomicU32);

impl Chatter {
    fn some(&self, of: usize) -> usize {
        let n = self.0.fetch_add(1, Ordering::Relaxed) as usize;
        of.min(n.wrapping_mul(7919) % 5000)
    }
}

impl CharSink for Chatter {
    fn write(&self, bytes: &[u8]) -> usize {
        bytes.len()
    }
}

impl CharSource for Chatter {
    fn read(&self, buffer: &mut [u8]) -> usize {
        let n = self.some(buffer.len());
        buffer[..n].fill(b'x');
        n
    }
}

/// A disk in memory.
struct MemoryDisk(Mutex<Vec<u8>>);

impl MemoryDisk {
    fn with(&self, offset: u64, f: impl FnOnce(&mut [u8]) -> Option<()>) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = bytes.get_mut(at..).and_then(f);
        found.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl BlockBackend for MemoryDisk {
    fn len(&self) -> u64 {
        DISK_LEN as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        self.with(offset, |mut bytes| {
            for slice in into {
                let (now, rest) = bytes.split_at_mut_checked(slice.len())?;
                slice.copy_from_slice(now);
                bytes = rest;
            }
            Some(())
        })
    }
    fn write_at(&self, offset: u64, from: &[IoSlice<'_>]) -> io::Result<()> {
        self.with(offset, |mut bytes| {
            for slice in from {
                let (now, rest) = bytes.split_at_mut_checked(slice.len())?;
                now.copy_from_slice(slice);
                bytes = rest;
            }
            Some(())
        })
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.with(offset, |bytes| {
            bytes.get_mut(..len)?.fill(0);
            Some(())
        })
    }
}
