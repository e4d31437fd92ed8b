//! Host files to guest RAM and back, without a copy on the way.
//!
//! The guest may change the bytes while the host's kernel works on them, so no Rust slice is made of them: the kernel gets addresses. What
//! it wrote is reported to the tracker of pages before the caller knows that it is there.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::GuestSlice;
use crate::dma::note_written;

/// Pieces that the host takes at a time (UIO_MAXIOV).
const PIECES_MAX: usize = 1024;

/// Which way bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToGuest,
    FromGuest,
}

/// Reads from `offset` of a file into guest RAM, as far as the file goes; how many bytes. With `at_once` it is an error of
/// kind `WouldBlock` where the host would have to wait for its disk.
pub fn read_file_at(
    file: BorrowedFd<'_>,
    offset: u64,
    into: &[GuestSlice<'_>],
    at_once: bool,
) -> io::Result<u64> {
    let flags = if at_once { libc::RWF_NOWAIT } else { 0 };
    let (done, end) = transfer(file, offset, into, Direction::ToGuest, flags);
    // After an error too: nobody says what the host wrote before it.
    note_written(into);
    end.map(|()| done)
}

/// Writes guest RAM to `offset` of a file; how many bytes, which is all unless the file has an end. After an error nobody knows how many.
pub fn write_file_at(
    file: BorrowedFd<'_>,
    offset: u64,
    from: &[GuestSlice<'_>],
) -> io::Result<u64> {
    let (done, end) = transfer(file, offset, from, Direction::FromGuest, 0);
    end.map(|()| done)
}

/// The same as a program's write(2): how many bytes, which may be fewer, and an error only where it is none.
pub fn write_some_at(
    file: BorrowedFd<'_>,
    offset: u64,
    from: &[GuestSlice<'_>],
) -> io::Result<u64> {
    some(transfer(file, offset, from, Direction::FromGuest, 0))
}

/// The same behind a file's end, wherever that is by then.
pub fn append_to_file(file: BorrowedFd<'_>, from: &[GuestSlice<'_>]) -> io::Result<u64> {
    let append = libc::RWF_APPEND;
    some(transfer(file, 0, from, Direction::FromGuest, append))
}

fn some((done, end): (u64, io::Result<()>)) -> io::Result<u64> {
    match (done, end) {
        (0, Err(error)) => Err(error),
        (done, _) => Ok(done),
    }
}

/// How many bytes were transferred, and how it ended.
fn transfer(
    file: BorrowedFd<'_>,
    offset: u64,
    slices: &[GuestSlice<'_>],
    direction: Direction,
    flags: i32,
) -> (u64, io::Result<()>) {
    let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard_mut()).collect();
    let mut pieces: Vec<_> = guards
        .iter()
        .filter(|guard| guard.len() > 0)
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let (mut rest, mut done) = (pieces.as_mut_slice(), 0);
    while !rest.is_empty() {
        match call(file, offset + done, rest, direction, flags) {
            Ok(0) => break,
            Ok(n) => {
                done += n as u64;
                rest = advance(rest, n);
            }
            Err(error) => return (done, Err(error)),
        }
    }
    (done, Ok(()))
}

/// One system call; how many bytes.
fn call(
    file: BorrowedFd<'_>,
    offset: u64,
    pieces: &[libc::iovec],
    direction: Direction,
    flags: i32,
) -> io::Result<usize> {
    let offset = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (fd, at) = (file.as_raw_fd(), pieces.as_ptr());
    let count = pieces.len().min(PIECES_MAX) as i32;
    loop {
        // SAFETY: the pieces are guest RAM, which lives as long as the slices that the caller holds, and which nobody sees as a Rust
        // reference; `count` of them are there.
        let n = unsafe {
            match direction {
                Direction::ToGuest => libc::preadv2(fd, at, count, offset, flags),
                Direction::FromGuest => libc::pwritev2(fd, at, count, offset, flags),
            }
        };
        match usize::try_from(n) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// What is left of the pieces after `n` bytes.
fn advance(mut pieces: &mut [libc::iovec], mut n: usize) -> &mut [libc::iovec] {
    while let Some(first) = pieces.first_mut() {
        if n < first.iov_len {
            first.iov_base = first.iov_base.wrapping_byte_add(n);
            first.iov_len -= n;
            break;
        }
        n -= first.iov_len;
        pieces = &mut pieces[1..];
    }
    pieces
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom, Write};
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    use vm_memory::{GuestAddress, GuestMemoryBackend};

    use super::*;
    use crate::GuestRam;

    fn file(content: &[u8]) -> std::fs::File {
        // SAFETY: a valid C string; the descriptor is ours.
        let mut file = unsafe {
            use std::os::fd::FromRawFd;
            std::fs::File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC))
        };
        file.write_all(content).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file
    }

    fn slices<'r>(ram: &'r GuestRam, pieces: &[(u64, usize)]) -> Vec<GuestSlice<'r>> {
        let slice = |&(at, len)| ram.view().get_slice(GuestAddress(at), len).unwrap();
        pieces.iter().map(slice).collect()
    }

    #[test]
    fn bytes_go_to_their_pieces_and_are_noted() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let cpu = ram.tracker().join();
        ram.tracker().add_code(0x5000, 8, &cpu);
        cpu.take_requests();
        let content: Vec<u8> = (0..=255).collect();
        let into = slices(&ram, &[(0x1ffe, 4), (0x9000, 0), (0x5000, 96)]);
        let n = read_file_at(file(&content).as_fd(), 7, &into, false).unwrap();
        assert_eq!((n, ram.load::<u32>(0x1ffe)), (100, None));
        assert_eq!(ram.load::<u16>(0x1ffe), Some(0x0807));
        assert_eq!(ram.load::<u16>(0x2000), Some(0x0a09));
        assert_eq!(ram.load::<u8>(0x505f), Some(106));
        assert_eq!(cpu.take_requests().0.code, [(0x5000, 0b11)].into());
        let dirty = [0x1000, 0x2000, 0x5000].map(|at| ram.tracker().is_dirty(at));
        assert_eq!(dirty, [true; 3]);
    }

    #[test]
    fn a_file_ends_where_it_ends() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let into = slices(&ram, &[(0x1000, 8), (0x2000, 8)]);
        let file = file(&[5; 10]);
        assert_eq!(read_file_at(file.as_fd(), 0, &into, false).unwrap(), 10);
        assert_eq!(read_file_at(file.as_fd(), 10, &into, false).unwrap(), 0);
        assert!(read_file_at(file.as_fd(), u64::MAX, &into, false).is_err());
    }

    #[test]
    fn appended_bytes_go_behind_the_end() {
        let ram = GuestRam::new(1 << 20).unwrap();
        ram.write_from_device(0x1000, b"end");
        let file = file(b"begin");
        for _ in 0..2 {
            let from = slices(&ram, &[(0x1000, 2), (0x1002, 1)]);
            assert_eq!(append_to_file(file.as_fd(), &from).unwrap(), 3);
        }
        let mut all = [0; 11];
        file.read_exact_at(&mut all, 0).unwrap();
        assert_eq!(&all, b"beginendend");
    }

    #[test]
    fn a_program_is_told_what_a_full_file_took_and_a_disk_that_it_is_full() {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = memfd_create("full", flags).unwrap();
        ftruncate(&file, 0x1000).unwrap();
        fcntl_add_seals(&file, SealFlags::GROW).unwrap();
        let ram = GuestRam::new(1 << 20).unwrap();
        let from = slices(&ram, &[(0x1000, 0x2000)]);
        assert_eq!(write_some_at(file.as_fd(), 0, &from).unwrap(), 0x1000);
        assert!(write_some_at(file.as_fd(), 0x1000, &from).is_err());
        assert!(write_file_at(file.as_fd(), 0, &from).is_err());
    }

    #[test]
    fn more_pieces_than_the_host_takes_at_once_are_written() {
        let ram = GuestRam::new(1 << 20).unwrap();
        let pieces: Vec<_> = (0..3000u64).map(|n| (0x1000 + 16 * n, 3)).collect();
        for (n, (at, _)) in pieces.iter().enumerate() {
            ram.write_from_device(*at, &[n as u8; 3]);
        }
        let file = file(&[]);
        let n = write_file_at(file.as_fd(), 5, &slices(&ram, &pieces)).unwrap();
        assert_eq!(n, 9000);
        let mut back = vec![0; 9000];
        file.read_exact_at(&mut back, 5).unwrap();
        assert!(back.iter().enumerate().all(|(n, b)| *b == (n / 3) as u8));
    }
}
