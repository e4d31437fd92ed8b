//! Locks on image files, the same that QEMU takes, so that two virtual machines never write to one image.
//!
//! QEMU (block/file-posix.c) says what it does with a file by shared locks on single bytes: byte 100 + n for "I need permission n", byte
//! 200 + n for "nobody else may have permission n". A conflict is found by a look at the others' locks after one's own are
//! taken, so that of two that start together at least one sees the other. They are locks of the open file description (F_OFD_SETLK): no other
//! open file of this process releases them, and the kernel does when the process dies.

use std::fs::File;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// How long a conflict is waited out: a process that was killed may not be gone yet, and one that was forked keeps all locks until it
/// executes its program.
const PATIENCE: Duration = Duration::from_millis(300);
const PAUSE: Duration = Duration::from_millis(10);

const PERMISSION: i64 = 100;
const FORBIDDANCE: i64 = 200;

const CONSISTENT_READ: u32 = 1 << 0;
const WRITE: u32 = 1 << 1;
const RESIZE: u32 = 1 << 3;
const PERMISSIONS: u32 = 5;

/// Says to others what is done with `file`, and that nobody else may write to it; false where another has it in a way that does
/// not go with that. Where the file system knows no locks it goes without.
pub(crate) fn lock(file: &File, writable: bool) -> io::Result<bool> {
    let needed = match writable {
        true => CONSISTENT_READ | WRITE | RESIZE,
        false => CONSISTENT_READ,
    };
    let end = Instant::now() + PATIENCE;
    loop {
        match claim(file, needed, WRITE | RESIZE) {
            Ok(false) if Instant::now() < end => thread::sleep(PAUSE),
            Err(Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                return Ok(true);
            }
            result => return Ok(result?),
        }
    }
}

fn claim(file: &File, needed: u32, forbidden: u32) -> nix::Result<bool> {
    for (base, set) in [(PERMISSION, needed), (FORBIDDANCE, forbidden)] {
        for byte in bytes(base, set) {
            match fcntl(file, FcntlArg::F_OFD_SETLK(&at(byte, libc::F_RDLCK))) {
                Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
                result => result?,
            };
        }
    }
    for (base, set) in [(FORBIDDANCE, needed), (PERMISSION, forbidden)] {
        for byte in bytes(base, set) {
            let mut found = at(byte, libc::F_WRLCK);
            fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
            if i32::from(found.l_type) != libc::F_UNLCK {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn bytes(base: i64, set: u32) -> impl Iterator<Item = i64> {
    let numbers = (0..PERMISSIONS).filter(move |n| set & (1 << n) != 0);
    numbers.map(move |n| base + i64::from(n))
}

fn at(byte: i64, kind: i32) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    }
}
