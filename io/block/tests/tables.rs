//! Small images whose tables promise more than there is: work for hours, or memory. They are refused when they are opened.

mod support;

use std::io::IoSlice;

use doppel_block::info;
use fastrand::Rng;
use support::{Guest, Made, Scratch, complaint, open_path, read, write};

/// The crate that writes looks for a free cluster one after the other: 2^40 of them here, in an image of 34 MiB.
#[test]
fn images_with_more_counts_than_clusters_are_not_written_to() {
    let scratch = Scratch::new();
    let mut image = Made::new(16, 1 << 30, 2);
    let block = image.place(514);
    image.refcounts(2, 512);
    image.table(2, std::iter::repeat_n(block, 4 << 20));
    image.put(block as usize, &[0xff; 65536]);
    let path = scratch.file("many.qcow2", &image.0);
    let says = complaint(&path, "");
    assert!(says.contains("a block twice"), "{says}");
    // Who only reads has no use for counts.
    assert_eq!(read(&*open_path(&path, ",ro").unwrap(), 0, 512), [0; 512]);
    assert_eq!(info(&path, None).unwrap().disk_len, 1 << 30);
}

#[test]
fn counts_far_beyond_the_end_of_the_file_are_refused_and_a_few_are_not() {
    let scratch = Scratch::new();
    for (beyond, refused) in [(1, false), (32, false), (33, true)] {
        let mut image = Made::new(16, 1 << 30, 2);
        let blocks: Vec<_> = (3..=3 + beyond).map(|n| image.place(n)).collect();
        image.refcounts(2, 1);
        image.put(blocks[beyond as usize] as usize, &[0; 65536]);
        image.put(blocks[0] as usize, &[0xff; 65536]);
        image.table(2, blocks);
        let path = scratch.file("beyond.qcow2", &image.0);
        if refused {
            let says = complaint(&path, "");
            assert!(says.contains("far beyond the end"), "{says}");
        } else {
            write(&*open_path(&path, "").unwrap(), 0, &[7; 512]);
        }
    }
}

/// An image that names itself as its backing file was opened 64 times, with 32 MiB of memory each.
#[test]
fn tables_of_a_chain_have_room_together() {
    let scratch = Scratch::new();
    let mut image = Made::new(16, 1 << 30, 4 << 20);
    image.refcounts(1, 1);
    image.number(104, 0xe279_2aca);
    image.number(108, 5);
    image.put(112, b"qcow2");
    image.put(128, b"self.qcow2");
    image.put(8, &128u64.to_be_bytes());
    image.number(16, 10);
    image.0.resize(513 << 16, 0);
    let path = scratch.file("self.qcow2", &image.0);
    let of_info = info(&path, None).unwrap_err().to_string();
    for says in [complaint(&path, ",ro"), of_info] {
        assert!(says.contains("too long together"), "{says}");
    }
}

/// A guest whose image counts its clusters in a piece of the guest's own disk: it says that the header is free, and the next write takes its place.
#[test]
fn a_guest_does_not_reach_the_header_of_its_image() {
    const USED: u32 = 5;
    const CLUSTER: u64 = 1 << 16;
    const COPIED: u64 = 1 << 63;
    let scratch = Scratch::new();
    let image = || {
        let mut image = Made::new(16, 1 << 30, 2);
        let [counts, of_disk] = [3, 4].map(|n| image.place(n));
        image.refcounts(2, 1);
        image.table(2, [counts]);
        image.put(counts as usize, &[(1 << USED) - 1]);
        image.table(1, [of_disk | COPIED]);
        image.table(4, [counts | COPIED]);
        image.0.resize(USED as usize * CLUSTER as usize, 0);
        image
    };
    let header = image().0[..CLUSTER as usize].to_vec();
    let other = vec![b'x'; CLUSTER as usize];
    let guest = Guest::new(1 << 20);
    for by_guest in [true, false] {
        let path = scratch.file("own-counts.qcow2", &image().0);
        let disk = open_path(&path, "").unwrap();
        write(&*disk, 0, &[0; 512]);
        let taken = match by_guest {
            true => guest.try_write(&*disk, CLUSTER, &other, &mut Rng::with_seed(1)),
            false => disk.write_at(CLUSTER, &[IoSlice::new(&other)]),
        };
        let error = taken.unwrap_err().to_string();
        assert!(error.contains("its own header"), "{error}");
        drop(disk);
        assert_eq!(std::fs::read(&path).unwrap()[..header.len()], header);
    }
}
