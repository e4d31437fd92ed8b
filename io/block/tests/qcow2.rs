//! qcow2 images and overlays: what can be opened, what cannot and why, and who else may have them open.

mod support;

use std::fs;
use std::io::{ErrorKind, IoSlice, IoSliceMut};
use std::process::Command;

use doppel_block::{BlockError, Format, create};
use support::{Scratch, check, complaint, has_qemu_img, open_path, qemu_img, read, write};

const MIB: u64 = 1 << 20;

#[test]
fn a_new_image_is_empty_and_takes_no_room() {
    let scratch = Scratch::new();
    for (name, format) in [("a", Format::Qcow2), ("b", Format::Raw)] {
        use std::os::unix::fs::MetadataExt;
        let path = scratch.path(name);
        create(&path, format, 20 << 30).unwrap();
        assert!(fs::metadata(&path).unwrap().blocks() < 2048, "{name}");
        let disk = open_path(&path, "").unwrap();
        assert_eq!((disk.len(), disk.read_only()), (20 << 30, false));
        assert_eq!(read(&*disk, (20 << 30) - 512, 512), [0; 512]);
        assert!(create(&path, format, MIB).is_err(), "it is there already");
    }
    assert!(create(&scratch.path("c"), Format::Raw, u64::MAX - 600).is_err());
    if has_qemu_img() {
        assert_eq!(check(&scratch.path("a")), 0);
    }
}

#[test]
fn new_images_of_one_size_are_equal_byte_for_byte() {
    let scratch = Scratch::new();
    let image = |name: &str| {
        let path = scratch.path(name);
        create(&path, Format::Qcow2, 64 * MIB).unwrap();
        fs::read(path).unwrap()
    };
    let first = image("0");
    (1..20).for_each(|n| assert!(image(&n.to_string()) == first, "{n}"));
}

#[test]
fn a_discarded_range_gives_its_storage_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    create(&path, Format::Qcow2, 64 * MIB).unwrap();
    let disk = open_path(&path, "").unwrap();
    write(&*disk, 0, &vec![7; 16 << 20]);
    disk.flush().unwrap();
    let blocks = || fs::metadata(&path).unwrap().blocks();
    let full = blocks();
    disk.discard(MIB + 512, 12 * MIB).unwrap();
    disk.flush().unwrap();
    assert!(blocks() + 20_000 < full, "{} of {full}", blocks());
    assert_eq!(read(&*disk, 2 * MIB, 4096), [0; 4096]);
    assert_eq!(read(&*disk, 0, 4096), [7; 4096]);
    // What was freed is used again.
    let end = fs::metadata(&path).unwrap().len();
    write(&*disk, 32 * MIB, &vec![9; 10 << 20]);
    assert_eq!(fs::metadata(&path).unwrap().len(), end);
    drop(disk);
    if has_qemu_img() {
        assert_eq!(check(&path), 0);
    }
}

#[test]
fn requests_without_bytes_do_nothing() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    create(&path, Format::Qcow2, MIB).unwrap();
    let disk = open_path(&path, "").unwrap();
    for offset in [0, 512, MIB] {
        disk.read_at(offset, &mut []).unwrap();
        let empty = &mut [IoSliceMut::new(&mut []), IoSliceMut::new(&mut [])];
        disk.read_at(offset, empty).unwrap();
        disk.write_at(offset, &[IoSlice::new(&[])]).unwrap();
        disk.discard(offset, 0).unwrap();
        disk.write_zeroes(offset, 0, true).unwrap();
        disk.write_zeroes(offset, 0, false).unwrap();
    }
}

#[test]
fn an_overlay_is_made_once_and_belongs_to_its_disk() {
    let scratch = Scratch::new();
    let base = scratch.file("base", &[7; 1 << 20]);
    let other = scratch.file("other", &[8; 1 << 20]);
    let over = scratch.path("over");
    let options = format!(",overlay={}", over.display());
    let disk = open_path(&base, &options).unwrap();
    write(&*disk, 4096, &[9; 512]);
    drop(disk);
    let disk = open_path(&base, &options).unwrap();
    assert_eq!(read(&*disk, 4095, 2), [7, 9]);
    let shared = open_path(&base, ",ro").unwrap();
    assert!(matches!(open_path(&base, ""), Err(BlockError::InUse(_))));
    drop((disk, shared));
    assert_eq!(fs::read(&base).unwrap(), [7; 1 << 20]);
    // Later it is a disk of its own.
    assert_eq!(read(&*open_path(&over, "").unwrap(), 4095, 2), [7, 9]);
    assert!(complaint(&other, &options).contains("was made over"));
    assert!(complaint(&base, ",ro,overlay=x").contains("either"));
    create(&scratch.path("lone"), Format::Qcow2, MIB).unwrap();
    let lone = format!(",overlay={}", scratch.path("lone").display());
    assert!(complaint(&base, &lone).contains("made over nothing"));
    let missing = scratch.path("missing");
    assert!(complaint(&missing, &options).contains("No such file"));
    fs::remove_file(&base).unwrap();
    let below = complaint(&over, "");
    assert!(
        below.contains("backing file") && below.contains("No such file"),
        "{below}"
    );
    assert!(
        fs::read_dir(scratch.0.path()).unwrap().count() == 3,
        "left-overs"
    );
}

#[test]
fn qemu_and_doppel_respect_each_others_locks() {
    if !has_qemu_img() {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    create(&path, Format::Qcow2, MIB).unwrap();
    let qemu_opens = |path: &std::path::Path| {
        let status = Command::new("qemu-img").arg("info").arg(path).output();
        status.unwrap().status.success()
    };
    let writer = open_path(&path, "").unwrap();
    assert!(!qemu_opens(&path));
    drop(writer);
    let reader = open_path(&path, ",ro").unwrap();
    assert!(qemu_opens(&path));
    drop(reader);
    let mut qemu = Command::new("qemu-io");
    qemu.arg("-f").arg("qcow2").arg(&path);
    qemu.stdin(std::process::Stdio::piped());
    qemu.stdout(std::process::Stdio::piped());
    let mut qemu = qemu.spawn().unwrap();
    // It prompts once it has the image open.
    let mut prompt = [0; 4];
    std::io::Read::read_exact(qemu.stdout.as_mut().unwrap(), &mut prompt).unwrap();
    for options in ["", ",ro"] {
        assert!(matches!(
            open_path(&path, options),
            Err(BlockError::InUse(_))
        ));
    }
    drop(qemu.stdin.take());
    qemu.wait().unwrap();
    assert!(open_path(&path, "").is_ok());
}

#[test]
fn a_truncated_image_is_refused_or_gives_errors_and_never_zeros_for_data() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    create(&path, Format::Qcow2, 4 * MIB).unwrap();
    let disk = open_path(&path, "").unwrap();
    write(&*disk, 0, &vec![7; 4 << 20]);
    disk.flush().unwrap();
    drop(disk);
    let whole = fs::read(&path).unwrap();
    let (mut refused, mut failed) = (0, 0);
    // Within the last cluster a file may end anywhere: what is missing there counts as zeros.
    for len in (0..whole.len()).step_by(65536) {
        fs::write(&path, &whole[..len]).unwrap();
        let Ok(disk) = open_path(&path, ",format=qcow2") else {
            refused += 1;
            continue;
        };
        for offset in (0..4 * MIB).step_by(32 << 10) {
            let mut bytes = [0xee; 512];
            match disk.read_at(offset, &mut [IoSliceMut::new(&mut bytes)]) {
                Ok(()) => assert!(bytes == [7; 512], "{len} {offset}"),
                Err(_) => failed += 1,
            }
        }
    }
    assert!(refused >= 3 && failed > 1000, "{refused} {failed}");
}

#[test]
fn what_is_no_image_says_why() {
    let scratch = Scratch::new();
    let text = scratch.file("text", &[b'a'; 4096]);
    assert!(complaint(&text, ",format=qcow2").contains("does not begin as one"));
    let short = scratch.file("short", b"QFI\xfb\0\0\0\x03");
    assert!(complaint(&short, "").contains("truncated"));
    let path = scratch.path("disk.qcow2");
    create(&path, Format::Qcow2, MIB).unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes[79] |= 1;
    fs::write(&path, bytes).unwrap();
    assert!(complaint(&path, "").contains("qemu-img check -r all"));
}

#[test]
fn images_that_qemu_makes_are_written_to() {
    if !has_qemu_img() {
        return;
    }
    let scratch = Scratch::new();
    let base = scratch.file("base", &[7; 1 << 20]);
    let path = scratch.path("disk.qcow2");
    let try_it = |what: &str| {
        let disk = open_path(&path, "");
        let disk = disk.unwrap_or_else(|error| panic!("{what}: {error}"));
        for offset in [0, 700_000 / 512 * 512, MIB] {
            write(&*disk, offset, &[9; 4096]);
        }
        drop(disk);
        assert_eq!(check(&path), 0, "{what}");
    };
    for (cluster, bits) in [("512", 64), ("64k", 1), ("64k", 16), ("2M", 1)] {
        let options = format!("-o cluster_size={cluster},refcount_bits={bits}");
        for allocated in ["off", "metadata", "falloc", "full"] {
            let words = format!("create -q -f qcow2 {options},preallocation={allocated}");
            qemu_img(&words, &[&path, "5M".as_ref()]);
            try_it(&words);
        }
        let grow = "resize -q --preallocation=falloc";
        qemu_img(grow, &[&path, "+9M".as_ref()]);
        try_it(grow);
        qemu_img("resize -q --shrink", &[&path, "2M".as_ref()]);
        try_it("shrink");
        let words = format!("convert -O qcow2 -c {options}");
        qemu_img(&words, &[&base, &path]);
        qemu_img("resize -q", &[&path, "3M".as_ref()]);
        try_it(&words);
    }
}

/// Where the image above does not name the format, what is below may be what a guest wrote to a raw disk.
#[test]
fn a_backing_file_that_is_only_guessed_to_be_qcow2_may_not_name_further_files() {
    if !has_qemu_img() {
        return;
    }
    let scratch = Scratch::new();
    let secret = scratch.file("secret", &[7; 1 << 20]);
    let (fake, top) = (scratch.path("fake"), scratch.path("top"));
    qemu_img("create -q -f qcow2 -F raw -b", &[&secret, &fake]);
    qemu_img("create -q -f qcow2 -F qcow2 -b", &[&fake, &top]);
    assert_eq!(read(&*open_path(&top, "").unwrap(), 0, 4), [7; 4]);
    // The format is dropped from the header of the one on top.
    let mut bytes = fs::read(&top).unwrap();
    let name = bytes
        .windows(4)
        .position(|w| w == 0xe279_2aca_u32.to_be_bytes());
    let name = name.unwrap();
    bytes[name..name + 4].copy_from_slice(&0x1234_5678_u32.to_be_bytes());
    fs::write(&top, bytes).unwrap();
    let says = complaint(&top, "");
    assert!(says.contains("rebase"), "{says}");
}

#[test]
fn images_that_stand_on_themselves_are_refused() {
    if !has_qemu_img() {
        return;
    }
    let scratch = Scratch::new();
    let (a, b) = (scratch.path("a"), scratch.path("b"));
    qemu_img(
        "create -q -f qcow2 -u -F qcow2 -b",
        &[&b, &a, "1M".as_ref()],
    );
    qemu_img(
        "create -q -f qcow2 -u -F qcow2 -b",
        &[&a, &b, "1M".as_ref()],
    );
    assert!(open_path(&a, "").is_err());
    let says = complaint(&a, ",ro");
    assert!(says.contains("too many images"), "{says}");
}

#[test]
fn internal_snapshots_are_left_as_they_were() {
    if !has_qemu_img() {
        return;
    }
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    create(&path, Format::Qcow2, MIB).unwrap();
    write(
        &*open_path(&path, "").unwrap(),
        0,
        &[7; 200_000 / 512 * 512],
    );
    qemu_img("snapshot -c before", &[&path]);
    let disk = open_path(&path, "").unwrap();
    write(&*disk, 65536, &[9; 512]);
    assert_eq!(read(&*disk, 65536 + 511, 2), [9, 7]);
    disk.discard(131_072, 65536).unwrap();
    drop(disk);
    assert_eq!(check(&path), 0);
    qemu_img("snapshot -a before", &[&path]);
    let disk = open_path(&path, ",ro").unwrap();
    assert_eq!(read(&*disk, 0, 198_656), [7; 198_656]);
}

#[test]
fn ranges_beyond_the_end_and_writes_to_a_read_only_image_are_refused() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    create(&path, Format::Qcow2, MIB).unwrap();
    let disk = open_path(&path, "").unwrap();
    for offset in [MIB - 511, MIB, u64::MAX] {
        let write = disk.write_at(offset, &[IoSlice::new(&[0; 512])]);
        let read = disk.read_at(offset, &mut [IoSliceMut::new(&mut [0; 512])]);
        let zero = disk.write_zeroes(offset, 512, true);
        for result in [write, read, zero, disk.discard(offset, 512)] {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::InvalidInput);
        }
    }
    drop(disk);
    let before = fs::read(&path).unwrap();
    let disk = open_path(&path, ",ro").unwrap();
    let write = disk.write_at(0, &[IoSlice::new(&[1; 512])]);
    for result in [write, disk.discard(0, 512), disk.write_zeroes(0, 512, true)] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
    disk.flush().unwrap();
    drop(disk);
    assert!(fs::read(&path).unwrap() == before);
}
