//! Raw images: what is written is read, what the host refuses is an error, and nobody else writes to them.

mod support;

use std::fs;
use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::path::Path;

use doppel_block::{BlockError, DiskSpec};
use support::{Scratch, open, open_path, read};

#[test]
fn what_is_written_in_pieces_is_read_in_others() {
    let scratch = Scratch::new();
    let path = scratch.file("disk", &[7; 8192]);
    let disk = open_path(&path, ",format=raw").unwrap();
    assert_eq!((disk.len(), disk.read_only()), (8192, false));
    let from = [
        IoSlice::new(b"abc"),
        IoSlice::new(b""),
        IoSlice::new(b"defgh"),
    ];
    disk.write_at(100, &from).unwrap();
    let (mut a, mut b) = ([0; 5], [0; 4]);
    let into = &mut [IoSliceMut::new(&mut a), IoSliceMut::new(&mut b)];
    disk.read_at(99, into).unwrap();
    assert_eq!((&a, &b), (b"\x07abcd", b"efgh"));
    disk.flush().unwrap();
    assert_eq!(&fs::read(path).unwrap()[100..108], b"abcdefgh");
}

#[test]
fn more_slices_than_the_host_takes_at_a_time_are_taken() {
    let scratch = Scratch::new();
    let path = scratch.file("disk", &[0; 16384]);
    let disk = open_path(&path, ",format=raw").unwrap();
    let bytes: Vec<u8> = (0..9000).map(|n| (n % 251) as u8).collect();
    let from: Vec<_> = bytes.chunks(3).map(IoSlice::new).collect();
    disk.write_at(512, &from).unwrap();
    let mut got = vec![0; bytes.len()];
    let mut into: Vec<_> = got.chunks_mut(3).map(IoSliceMut::new).collect();
    disk.read_at(512, &mut into).unwrap();
    assert_eq!(got, bytes);
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros_and_give_storage_back() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new();
    let path = scratch.file("disk", &[7; 1 << 20]);
    let disk = open_path(&path, ",format=raw").unwrap();
    let before = fs::metadata(&path).unwrap().blocks();
    disk.discard(0, 256 << 10).unwrap();
    disk.write_zeroes((256 << 10) + 3, 1000, false).unwrap();
    disk.write_zeroes(512 << 10, 256 << 10, true).unwrap();
    assert!(fs::metadata(&path).unwrap().blocks() <= before - 900);
    assert_eq!(read(&*disk, 0, 256 << 10), vec![0; 256 << 10]);
    let edges = read(&*disk, 256 << 10, 1006);
    assert_eq!(
        (&edges[..3], &edges[3..1003], &edges[1003..]),
        (&[7; 3][..], &[0; 1000][..], &[7; 3][..])
    );
    assert_eq!(read(&*disk, 512 << 10, 256 << 10), vec![0; 256 << 10]);
    assert_eq!(read(&*disk, 768 << 10, 5), [7; 5]);
    assert_eq!(disk.len(), 1 << 20);
}

#[test]
fn a_file_that_ends_within_a_sector_is_filled_up_with_zeros() {
    let scratch = Scratch::new();
    let path = scratch.file("disk", &[7; 1000]);
    let disk = open_path(&path, ",format=raw").unwrap();
    assert_eq!(disk.len(), 1024);
    let tail = read(&*disk, 990, 34);
    assert_eq!((&tail[..10], &tail[10..]), (&[7; 10][..], &[0; 24][..]));
    disk.write_at(1020, &[IoSlice::new(&[9; 4])]).unwrap();
    assert_eq!(read(&*disk, 1018, 6), [0, 0, 9, 9, 9, 9]);
}

#[test]
fn a_file_that_was_truncated_meanwhile_gives_errors_and_no_zeros() {
    let scratch = Scratch::new();
    let path = scratch.file("disk", &[7; 8192]);
    let disk = open_path(&path, ",format=raw").unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(4096).unwrap();
    let mut bytes = [0; 1024];
    let result = disk.read_at(4096 - 512, &mut [IoSliceMut::new(&mut bytes)]);
    assert_eq!(result.unwrap_err().kind(), ErrorKind::UnexpectedEof);
    assert_eq!(read(&*disk, 0, 4096), [7; 4096]);
}

#[test]
fn ranges_beyond_the_end_and_writes_to_a_read_only_disk_are_refused() {
    let scratch = Scratch::new();
    let path = scratch.file("disk", &[7; 4096]);
    let disk = open_path(&path, ",format=raw").unwrap();
    for offset in [3585, 4096, u64::MAX] {
        let write = disk.write_at(offset, &[IoSlice::new(&[0; 512])]);
        let read = disk.read_at(offset, &mut [IoSliceMut::new(&mut [0; 512])]);
        for result in [write, read, disk.discard(offset, 512)] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidInput);
        }
        let zero = disk.write_zeroes(offset, 512, true);
        assert_eq!(zero.unwrap_err().kind(), ErrorKind::InvalidInput);
    }
    drop(disk);
    let disk = open_path(&path, ",format=raw,ro").unwrap();
    assert!(disk.read_only());
    let write = disk.write_at(0, &[IoSlice::new(&[0; 512])]);
    for result in [write, disk.discard(0, 512), disk.write_zeroes(0, 512, true)] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
    disk.flush().unwrap();
    assert_eq!(fs::read(path).unwrap(), [7; 4096]);
}

#[test]
fn an_image_has_one_writer_or_many_readers() {
    let scratch = Scratch::new();
    let path = scratch.file("disk", &[7; 4096]);
    let busy = |options| matches!(open_path(&path, options), Err(BlockError::InUse(_)));
    let writer = open_path(&path, "").unwrap();
    assert!(busy("") && busy(",ro"));
    drop(writer);
    let reader = open_path(&path, ",ro").unwrap();
    let another = open_path(&path, ",ro").unwrap();
    assert!(busy(""));
    drop((reader, another));
    assert!(!busy(""));
}

#[test]
fn what_cannot_be_opened_says_why() {
    let scratch = Scratch::new();
    let complaint = |text: &str| open(text).err().unwrap().to_string();
    let missing = scratch.0.path().join("missing");
    assert!(complaint(&missing.display().to_string()).contains("No such file"));
    let folder = scratch.0.path().display().to_string();
    assert!(complaint(&format!("{folder},ro")).contains("neither a regular file"));
    assert!(complaint("/dev/null").contains("neither a regular file"));
    assert!(complaint("").contains("needs the name"));
    assert!(complaint("a,b").contains("no option"));
    assert!(complaint("a,format=vdi").contains("unknown image format"));
    let vmdk = scratch.file("a.vmdk", b"KDMV123");
    assert!(complaint(&vmdk.display().to_string()).contains("qemu-img convert"));
}

#[test]
fn commas_in_names_are_written_twice() {
    let spec: DiskSpec = "a,,b,format=raw,overlay=c,,".parse().unwrap();
    assert_eq!(spec.path, Path::new("a,b"));
    assert_eq!(spec.overlay.as_deref(), Some(Path::new("c,")));
}

/// Otherwise a guest could give itself any file of the host at its next start.
#[test]
fn a_raw_disk_whose_format_was_guessed_cannot_be_made_to_look_like_another() {
    let scratch = Scratch::new();
    let path = scratch.file("disk", &[0; 4096]);
    let disk = open_path(&path, "").unwrap();
    let at_once = disk.write_at(0, &[IoSlice::new(b"QFI\xfb"), IoSlice::new(&[0; 508])]);
    assert_eq!(at_once.unwrap_err().kind(), ErrorKind::PermissionDenied);
    disk.write_at(2, &[IoSlice::new(b"I\xfb")]).unwrap();
    let second = disk.write_at(0, &[IoSlice::new(b"QF")]);
    assert_eq!(second.unwrap_err().kind(), ErrorKind::PermissionDenied);
    disk.write_at(0, &[IoSlice::new(&[0xeb; 1024])]).unwrap();
    drop(disk);
    let disk = open_path(&path, ",format=raw").unwrap();
    disk.write_at(0, &[IoSlice::new(b"QFI\xfb")]).unwrap();
}
