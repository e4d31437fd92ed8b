//! The monitor's messages to the process of a disk, and to that of a network: whatever they are, the process answers or ends.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use doppel_block::{BlockError, DiskSpec};
use doppel_device::HostClock;
use doppel_net::{Link, UserNetwork};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketFlags, SocketType, recv, send, shutdown,
    socketpair,
};

use crate::choices::Choices;
use crate::frames::{MAC, network};
use crate::{Door, Take};

pub const DISK: Door = Door {
    name: "disk-messages",
    longest: 4 << 10,
    words: &[
        b"\x01\0\0\0",
        b"\x02\0\0\0",
        b"\x03\0\0\0",
        b"\x04\0\0\0",
        b"\x05\0\0\0",
        b"\x06\0\0\0",
        b"\0\x02\0\0\0\0\0\0",
        b"\0\0\x10\0\0\0\0\0",
        b"\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
    seeds: disk_seeds,
    open: open_disk,
};

pub const NETWORK: Door = Door {
    name: "network-messages",
    longest: 8 << 10,
    words: &[b"\x01", b"\x02", b"\x08\x00\x45\x00", b"\x0a\x00\x02\x02"],
    seeds: network_seeds,
    open: open_network,
};

/// Messages in an input at most: all fit into a socket.
const MOST: usize = 24;

fn pair() -> (OwnedFd, OwnedFd) {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    socketpair(family, kind, SocketFlags::CLOEXEC, None).expect("descriptors")
}

/// Sends all messages, then listens until the process has hung up.
fn talk(ours: &OwnedFd, bytes: &[u8]) {
    let mut choices = Choices::new(bytes);
    for _ in 0..MOST {
        let message = choices.piece();
        if message.is_empty() {
            break;
        }
        // It may have hung up.
        let _ = send(ours, message, SendFlags::NOSIGNAL);
    }
    let _ = shutdown(ours, Shutdown::Write);
    let mut buffer = vec![0; 256 << 10];
    while recv(ours, &mut buffer[..], RecvFlags::empty()).is_ok_and(|(n, _)| n > 0) {}
}

fn open_disk() -> anyhow::Result<Take> {
    let folder = tempfile::tempdir()?;
    let path: PathBuf = folder.path().join("disk");
    Ok(Box::new(move |bytes| {
        let _keep = &folder;
        std::fs::write(&path, vec![0x33; 1 << 20]).expect("room for a disk");
        let spec: DiskSpec = format!("{},format=raw", path.display())
            .parse()
            .expect("a disk");
        let (ours, theirs) = pair();
        let process = thread::spawn(move || {
            let opened: Result<_, BlockError> = spec.open();
            doppel_block::serve(theirs, || opened)
        });
        talk(&ours, bytes);
        // An error of the connection is the right end of nonsense; a panic is not.
        let _ = process.join().expect("no panic");
        let len = std::fs::metadata(&path).expect("the disk").len();
        assert_eq!(len, 1 << 20, "the disk grew");
    }))
}

fn open_network() -> anyhow::Result<Take> {
    Ok(Box::new(|bytes| {
        let (ours, theirs) = pair();
        let process = thread::spawn(move || {
            let clock = Arc::new(HostClock::new());
            doppel_net::serve(theirs, &*clock.clone(), || {
                let opened = UserNetwork::new(&network(), MAC, clock);
                opened.map(|n| (Box::new(n) as Box<dyn Link>, MAC))
            })
        });
        talk(&ours, bytes);
        let _ = process.join().expect("no panic");
    }))
}

fn piece(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_le_bytes(), message].concat()
}

/// One of each kind: identity, kind, status, offset, length, data (`io/block/src/remote`).
fn disk_seeds() -> Vec<Vec<u8>> {
    let message = |kind: u32| {
        let range = [512u64.to_le_bytes(), 1024u64.to_le_bytes()].concat();
        let head = [
            u64::from(kind).to_le_bytes().to_vec(),
            kind.to_le_bytes().to_vec(),
            vec![0; 4],
            range,
        ]
        .concat();
        piece(&[head, vec![0x44; if kind == 2 { 1024 } else { 0 }]].concat())
    };
    let mut seeds: Vec<_> = (0..10).map(message).collect();
    seeds.push(seeds.concat());
    seeds
}

fn network_seeds() -> Vec<Vec<u8>> {
    let arp = [
        &[0xff; 6][..],
        &MAC,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
        &MAC,
        &[10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2],
    ]
    .concat();
    let frame = piece(&[&[1; 1][..], &[0; 10], &arp].concat());
    let accepts = piece(&[2, 7]);
    vec![
        accepts.clone(),
        frame.clone(),
        [accepts, frame.clone(), frame].concat(),
    ]
}
