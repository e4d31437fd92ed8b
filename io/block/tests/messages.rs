//! The socket between the monitor and the process of a disk, when whoever is at the other end has fallen to the guest.
//!
//! The process takes any message: it answers, or ends the connection, and neither panics nor writes beyond the disk. The monitor takes any answer: every
//! request ends, with an error at worst, and guest memory that no request named stays as it is.
//!
//! `DOPPEL_DISK_MESSAGES=1000000 DOPPEL_DISK_SEED=7 cargo test --release -p doppel-block --test messages` is a longer campaign.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use doppel_block::{BlockBackend, BlockError, DiskSpec, Format, RemoteDisk, serve};
use doppel_memory::{Backing, GuestRam};
use fastrand::Rng;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socketpair,
};
use vm_memory::{GuestAddress, GuestMemoryBackend};

const LEN: u64 = 1 << 20;
const HEAD: usize = 32;
const LONGEST: usize = 128 << 10;

/// A number as it stands in a message: often one that makes sense, or just does not.
fn position(random: &mut Rng) -> u64 {
    let near = random.u64(..5) * 512;
    match random.u64(..8) {
        0 => u64::MAX - near,
        1 => random.u64(..),
        2 => 1 << random.u64(..64),
        3 => LEN - near,
        _ => random.u64(..LEN / 512) * 512,
    }
}

fn number(name: &str, usual: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(usual, |text| text.parse().expect("a number"))
}

/// A message as it goes over the socket.
fn message(id: u64, kind: u32, status: u32, (offset, len): (u64, u64), data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + data.len());
    bytes.extend(id.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(status.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(data);
    bytes
}

/// Any request, with data or pieces of memory. Never without an answer, but for those that are no message.
fn request(id: u64, random: &mut Rng) -> Vec<u8> {
    let kind = 1 + random.u32(..9);
    let mut data = Vec::new();
    for _ in 0..random.u64(..6) {
        data.extend(position(random).to_le_bytes());
        data.extend(random.u64(..8192).to_le_bytes());
    }
    if random.u64(..16) == 0 {
        data.resize(random.usize(..60_000), id as u8);
    }
    let range = (position(random), position(random));
    message(id, kind, random.u32(..), range, &data)
}

fn pair() -> (OwnedFd, OwnedFd) {
    let kind = SocketType::SEQPACKET;
    socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap()
}

fn image(folder: &tempfile::TempDir, format: Format) -> DiskSpec {
    let path = folder.path().join("image");
    doppel_block::create(&path, format, LEN).unwrap();
    format!("{},format={format}", path.display())
        .parse()
        .unwrap()
}

#[test]
fn the_process_of_a_disk_takes_any_message() {
    let rounds = number("DOPPEL_DISK_MESSAGES", 6_000);
    let mut random = Rng::with_seed(number("DOPPEL_DISK_SEED", 1));
    for format in [Format::Raw, Format::Qcow2] {
        let folder = tempfile::tempdir().unwrap();
        let spec = image(&folder, format);
        let (ours, theirs) = pair();
        let server = thread::spawn(move || {
            let open = || -> Result<Arc<dyn BlockBackend>, BlockError> { spec.open() };
            serve(theirs, open)
        });
        let mut buffer = vec![0; LONGEST];
        let mut hear = || recv(&ours, &mut buffer[..], RecvFlags::empty()).map(|(n, _)| n);
        assert!(hear().unwrap() > 0, "its hello");
        for id in 0..rounds {
            send(&ours, &request(id, &mut random), SendFlags::NOSIGNAL).unwrap();
            assert!(hear().unwrap() >= HEAD, "an answer to each");
        }
        // What is no message ends the connection.
        let mut nonsense = request(0, &mut random);
        nonsense[8] = 0xff;
        nonsense.truncate(HEAD);
        for _ in 0..16 {
            let _ = send(&ours, &nonsense, SendFlags::NOSIGNAL);
        }
        server.join().expect("no panic").unwrap();
        let path = folder.path().join("image");
        let len = std::fs::metadata(&path).unwrap().len();
        // A qcow2 image of so much has four clusters of tables, and a few more in the course of things.
        assert!(len <= LEN + (1 << 20), "{format}: {len}");
    }
}

/// A process that answers as it likes: mostly as it should, else with another status or length, with what nobody asked for or with what is
/// no answer, or it goes. (One that keeps an answer to itself is a disk that takes long, which nobody can tell it from.)
fn lie(socket: &OwnedFd, random: &mut Rng) -> io::Result<()> {
    // It serves, a disk of this length, to be written.
    let hello = [&[0], &LEN.to_le_bytes()[..], &[0]].concat();
    send(socket, &hello, SendFlags::NOSIGNAL)?;
    let mut buffer = vec![0; LONGEST];
    loop {
        let (n, _) = recv(socket, &mut buffer[..], RecvFlags::empty())?;
        if n < HEAD {
            return Ok(());
        }
        let asked = &buffer[..n];
        let id = u64::from_le_bytes(asked[..8].try_into().map_err(io::Error::other)?);
        let kind = u32::from_le_bytes(asked[8..12].try_into().map_err(io::Error::other)?);
        let data = vec![0x5a; 65536];
        let data = match random.u64(..8) {
            0 => &data[..],
            1 => &data[..random.usize(..4096)],
            _ => &data[..4096],
        };
        let mut answer = message(id, kind, 0, (0, 0), data);
        match random.u64(..24) {
            0 => answer.truncate(random.usize(..HEAD)),
            1 => answer[8] = random.u8(..),
            3 => answer[12..16].copy_from_slice(&random.u32(..).to_le_bytes()),
            4 => return Ok(()),
            2 => {
                // Answers that nobody asked for.
                for stray in 0..100 {
                    let stray = message(id + 1000 + stray, kind, 0, (0, 0), data);
                    send(socket, &stray, SendFlags::NOSIGNAL)?;
                }
            }
            _ => {}
        }
        if answer.is_empty() {
            return Ok(());
        }
        send(socket, &answer, SendFlags::NOSIGNAL)?;
    }
}

#[test]
fn the_monitor_takes_any_answer_of_a_disks_process() {
    let requests = number("DOPPEL_DISK_MESSAGES", 6_000) / 60;
    let seed = Arc::new(AtomicU64::new(number("DOPPEL_DISK_SEED", 1)));
    let start = move |socket: OwnedFd| -> io::Result<Child> {
        let mut random = Rng::with_seed(seed.fetch_add(1, Ordering::Relaxed));
        thread::spawn(move || lie(&socket, &mut random));
        // What can be killed and waited for.
        Command::new("sleep")
            .arg("60")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
    };
    let disk = RemoteDisk::new(Box::new(start)).unwrap();
    let ram = Arc::new(GuestRam::with_backing(1 << 20, Backing::Memfd).unwrap());
    // It may be refused, as everything.
    while disk.use_memory(Some(&ram)).is_err() {}
    let (mut good, mut bad) = (0, 0);
    let mut random = Rng::with_seed(99);
    let mut buffer = [0; 4096];
    for _ in 0..requests {
        let offset = random.u64(..LEN / 4096) * 4096;
        let slice = || ram.view().get_slice(GuestAddress(0x8000), 4096).unwrap();
        let done = match random.u64(..5) {
            0 => disk.read_at(offset, &mut [IoSliceMut::new(&mut buffer)]),
            1 => disk.write_at(offset, &[IoSlice::new(&buffer)]),
            2 => disk.read_to_guest(offset, &[slice()]),
            3 => disk.write_from_guest(offset, &[slice()]),
            _ => disk.flush(),
        };
        match done {
            Ok(()) => good += 1,
            Err(_) => bad += 1,
        }
    }
    println!("{good} requests done, {bad} failed");
    assert!(good > bad && bad > 0, "{good} {bad}");
    assert_eq!(ram.load::<u64>(0x7ff8), Some(0));
    assert_eq!(ram.load::<u64>(0x9000), Some(0));
    let (done, ended) = std::sync::mpsc::channel();
    thread::spawn(move || {
        drop(disk);
        let _ = done.send(());
    });
    assert!(
        ended.recv_timeout(Duration::from_secs(20)).is_ok(),
        "it hangs"
    );
}
