//! Random requests, most of them nearly right, from several threads at once.
//!
//! `DOPPEL_SHARE_REQUESTS=N DOPPEL_SHARE_SEED=S` make a longer campaign (`cargo xtask hostile` sets them).

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::thread;

use doppel_memory::GuestSlice;
use doppel_share::{Call, Header, opcode};
use fastrand::Rng;
use support::{Mount, ROOT};
use vm_memory::{GuestAddress, GuestMemoryBackend};

const THREADS: u64 = 3;
const NAMES: &[&str] = &[
    "a",
    "b",
    "c",
    "d",
    "file",
    "link",
    "up",
    "..",
    ".",
    "",
    "../secret",
    "a/..",
    "a/b",
    "secret",
];

fn word(random: &mut Rng) -> u64 {
    match random.u64(..8) {
        0 => u64::MAX >> random.u64(..64),
        1 => 1 << random.u64(..64),
        2 => random.u64(..16) << 32 | random.u64(..512),
        3 => random.u64(..8) << 32 | 0o100_644,
        _ => random.u64(..12),
    }
}

fn arguments(random: &mut Rng, code: u32) -> Vec<u8> {
    let words = match code {
        opcode::LOOKUP | opcode::UNLINK | opcode::RMDIR | opcode::SYMLINK => 0,
        opcode::MKDIR | opcode::RENAME | opcode::LINK => 1,
        opcode::MKNOD | opcode::CREATE | opcode::RENAME2 => 2,
        opcode::WRITE | opcode::READ => 5,
        _ => 11,
    };
    let mut bytes = Vec::new();
    if code == opcode::INIT {
        bytes.extend([7, 0, 0, 0, 38, 0, 0, 0]);
    }
    for _ in 0..words {
        bytes.extend(word(random).to_le_bytes());
    }
    for _ in 0..2 {
        bytes.extend(NAMES[random.usize(..NAMES.len())].bytes());
        bytes.push(0);
    }
    if random.u64(..20) == 0 {
        bytes.truncate(random.usize(..bytes.len()));
    }
    bytes
}

/// One request; whether it was carried out.
fn request(mount: &Mount, random: &mut Rng) -> bool {
    let code = match random.u32(..53) {
        // The host would feel these, or there would be nothing left to do.
        opcode::FALLOCATE | opcode::SYNCFS => opcode::LOOKUP,
        opcode::DESTROY => opcode::CREATE,
        opcode::INIT if random.u64(..20) != 0 => opcode::CREATE,
        code => code,
    };
    let arguments = arguments(random, code);
    let pieces = |at: u64, len: u64| -> Vec<GuestSlice<'_>> {
        let view = mount.ram.view();
        vec![view.get_slice(GuestAddress(at), len as usize).unwrap()]
    };
    let (data, room) = (random.u64(..4) * 2048, random.u64(..5) * 1024);
    let call = Call {
        header: Header {
            opcode: code,
            unique: 0,
            node: if random.bool() { ROOT } else { word(random) },
        },
        arguments: &arguments,
        data: &pieces(0x1000, data),
        room: &pieces(0x10_0000, room),
        may_wait: random.bool(),
    };
    mount.session.call(&call).is_ok()
}

#[test]
fn whatever_a_guest_asks_for_it_stays_inside_and_holds_no_more_than_it_may() {
    let number = |name: &str, usual| {
        let given = std::env::var(name).ok();
        given.map_or(usual, |text| text.parse().expect("a number"))
    };
    let rounds = number("DOPPEL_SHARE_REQUESTS", 30_000);
    let seed = number("DOPPEL_SHARE_SEED", 1);
    let mount = Mount::new("");
    fs::write(mount.host("file"), "content").unwrap();
    symlink("../secret", mount.host("link")).unwrap();
    symlink("..", mount.host("up")).unwrap();
    let before = fs::read_dir("/proc/self/fd").unwrap().count();
    let done: u64 = thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|n| {
                let mount = &mount;
                scope.spawn(move || {
                    let mut random = Rng::with_seed(n + THREADS * seed);
                    (0..rounds).filter(|_| request(mount, &mut random)).count() as u64
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert!(done > THREADS * rounds / 20, "{done}: too wild");
    // Not by way of the share, whose mode the guest may have changed.
    let around = mount.folder.path();
    assert_eq!(fs::read(around.join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(around).unwrap().count(), 2);
    let (_, handles) = mount.session.counts();
    assert!(handles <= support::SMALL.open);
    let after = fs::read_dir("/proc/self/fd").unwrap().count();
    let most = 2 * support::SMALL.open + support::SMALL.descriptors + 16;
    assert!(after < before + most, "{before} {after}");
}
