//! A shared file in memory: what one writes by mapping it others read by read(2), and the other way round. Argument: a file to make.

use std::ffi::c_void;
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

unsafe extern "C" {
    fn mmap(at: *mut c_void, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
    fn msync(at: *mut c_void, len: usize, flags: i32) -> i32;
}

const READ: i32 = 1;
const WRITE: i32 = 2;
const SHARED: i32 = 1;
const MS_SYNC: i32 = 4;
const LEN: usize = 1 << 20;

fn main() {
    let path = std::env::args().nth(1).expect("a file to make");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    file.set_len(LEN as u64).unwrap();
    // SAFETY: a new mapping of a file that is as long.
    let at = unsafe { mmap(std::ptr::null_mut(), LEN, READ | WRITE, SHARED, file.as_raw_fd(), 0) };
    assert!(at as isize > 0, "mmap: {}", std::io::Error::last_os_error());
    // SAFETY: the mapping, which this thread alone uses; the file changes by this thread's own writes alone, outside of the borrow's uses.
    let bytes = unsafe { std::slice::from_raw_parts_mut(at.cast::<u8>(), LEN) };
    for (n, byte) in bytes.iter_mut().enumerate() {
        *byte = (n / 7) as u8;
    }
    let mut back = vec![0; LEN];
    file.read_exact_at(&mut back, 0).unwrap();
    assert!(back == bytes, "read(2) sees what the mapping has");
    file.write_all_at(b"written", 4094).unwrap();
    assert_eq!(&bytes[4094..4101], b"written");
    // SAFETY: the mapping.
    assert_eq!(unsafe { msync(at, LEN, MS_SYNC) }, 0);
    println!("mapped: passed");
}
