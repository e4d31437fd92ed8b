//! Random requests, most of them nearly right, from several threads at once.
//!
//! `DOPPEL_SHARE_REQUESTS=N DOPPEL_SHARE_SEED=S` make a longer campaign (`cargo xtask hostile` sets them).

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::thread;

use doppel_memory::GuestSlice;
use doppel_share::{Call, Header, opcode};
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

/// xorshift64*.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % n
    }

    fn word(&mut self) -> u64 {
        match self.below(8) {
            0 => u64::MAX >> self.below(64),
            1 => 1 << self.below(64),
            2 => self.below(16) << 32 | self.below(512),
            3 => self.below(8) << 32 | 0o100_644,
            _ => self.below(12),
        }
    }

    fn arguments(&mut self, code: u32) -> Vec<u8> {
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
            bytes.extend(self.word().to_le_bytes());
        }
        for _ in 0..2 {
            bytes.extend(NAMES[self.below(NAMES.len() as u64) as usize].bytes());
            bytes.push(0);
        }
        if self.below(20) == 0 {
            bytes.truncate(self.below(bytes.len() as u64) as usize);
        }
        bytes
    }
}

/// One request; whether it was carried out.
fn request(mount: &Mount, random: &mut Random) -> bool {
    let code = match random.below(53) as u32 {
        // The host would feel these, or there would be nothing left to do.
        opcode::FALLOCATE | opcode::SYNCFS => opcode::LOOKUP,
        opcode::DESTROY => opcode::CREATE,
        opcode::INIT if random.below(20) != 0 => opcode::CREATE,
        code => code,
    };
    let arguments = random.arguments(code);
    let pieces = |at: u64, len: u64| -> Vec<GuestSlice<'_>> {
        let view = mount.ram.view();
        vec![view.get_slice(GuestAddress(at), len as usize).unwrap()]
    };
    let (data, room) = (random.below(4) * 2048, random.below(5) * 1024);
    let call = Call {
        header: Header {
            opcode: code,
            unique: 0,
            node: if random.below(2) == 0 {
                ROOT
            } else {
                random.word()
            },
        },
        arguments: &arguments,
        data: &pieces(0x1000, data),
        room: &pieces(0x10_0000, room),
        may_wait: random.below(2) == 0,
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
                    let mut random = Random(0x9e37_79b9 * (n + THREADS * (seed - 1) + 1));
                    (0..rounds).filter(|_| request(mount, &mut random)).count() as u64
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    assert!(done > THREADS * rounds / 20, "{done}: too wild");
    assert_eq!(fs::read(mount.host("../secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(mount.host("..")).unwrap().count(), 2);
    let (_, handles) = mount.session.counts();
    assert!(handles <= support::SMALL.open);
    let after = fs::read_dir("/proc/self/fd").unwrap().count();
    let most = 2 * support::SMALL.open + support::SMALL.descriptors + 16;
    assert!(after < before + most, "{before} {after}");
}
