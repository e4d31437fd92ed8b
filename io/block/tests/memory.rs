//! What one request takes of the monitor's memory. A process of its own, and one test, since what is measured is the process.

mod support;

use std::fs;

use doppel_memory::GuestRam;
use support::{Made, Scratch, open_path, read, resident_kib};
use vm_memory::{GuestAddress, GuestMemoryBackend};

#[test]
fn no_request_takes_memory_in_proportion_to_its_length() {
    write_to_a_guessed_disk();
    discard_of_a_disk_in_pieces();
}

fn assert_little(what: &str, request: impl FnOnce()) {
    let before = resident_kib();
    request();
    let grown = (resident_kib() - before) >> 10;
    assert!(grown < 16, "{what}: {grown} MiB");
}

/// A guest may name one page of its RAM as often as it likes.
fn write_to_a_guessed_disk() {
    const LEN: u64 = 96 << 20;
    let scratch = Scratch::new();
    let path = scratch.file("disk", &[]);
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(LEN).unwrap();
    let disk = open_path(&path, "").unwrap();
    let ram = GuestRam::new(4 << 20).unwrap();
    let slice = |at, len| GuestMemoryBackend::get_slice(ram.view(), GuestAddress(at), len).unwrap();
    slice(0, 1 << 20).copy_from(&vec![0xeb_u8; 1 << 20]);
    let many = [slice(0, 1 << 20); 96];
    assert_little("write", || disk.write_from_guest(0, &many).unwrap());
    assert!(read(&*disk, LEN - 512, 512) == [0xeb; 512]);

    slice(0, 4).copy_from(b"QFI\xfb");
    // The sector goes on where the first slice ends, and the request where the sector ends.
    let parts = [slice(0, 2), slice(2, 1000)];
    let refused = disk.write_from_guest(0, &parts).unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
    assert!(read(&*disk, 0, 1024) == [0xeb; 1024]);
    disk.write_from_guest(4, &parts).unwrap();
    assert_eq!(&read(&*disk, 0, 9)[3..], b"\xebQFI\xfb\xeb");
    assert_eq!(&read(&*disk, 1000, 8), &[0xeb; 8]);
    slice(0, 4).copy_from(&[1_u8; 4]);
    disk.write_from_guest(510, &[slice(0, 1), slice(0, 3)])
        .unwrap();
    assert_eq!(&read(&*disk, 509, 6), b"\xeb\x01\x01\x01\x01\xeb");
}

/// All L2 tables are one, every other cluster of which is mapped.
fn discard_of_a_disk_in_pieces() {
    const LEN: u64 = 2 << 30;
    let scratch = Scratch::new();
    let mut image = Made::new(9, LEN, 65536);
    let (table, block, l2, data) = (1025, 1026, 1027, 1028);
    let used = |at| 1 << 63 | at;
    image.table(1, std::iter::repeat_n(used(image.place(l2)), 65536));
    image.refcounts(table, 1);
    image.table(table, [image.place(block)]);
    image.put(image.place(block) as usize, &[0xff; 130]);
    image.table(l2, [used(image.place(data)), 0].repeat(32));
    image.put(image.place(data) as usize, &[7; 512]);
    let path = scratch.file("disk.qcow2", &image.0);
    let disk = open_path(&path, "").unwrap();
    assert_eq!(read(&*disk, LEN - 1024, 513)[511..], [7, 0]);
    assert_little("discard", || disk.discard(0, LEN).unwrap());
    assert_eq!(read(&*disk, LEN - 1024, 512), [0; 512]);
}
