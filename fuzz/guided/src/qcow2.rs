//! qcow2 images: opened, read, written, discarded, flushed.

use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};

use doppel_block::{BlockBackend, DiskSpec};

use crate::choices::Choices;
use crate::{Door, Take};

pub const DOOR: Door = Door {
    name: "qcow2",
    longest: 64 << 10,
    words: &[
        b"QFI\xfb",
        b"\0\0\0\x02",
        b"\0\0\0\x03",
        b"\xe2\x79\x2a\xca",
        b"\x68\x03\xf8\x57",
        b"\x80\0\0\0\0\0",
        b"\x40\0\0\0\0\0",
        b"\0\0\0\0\0\0\x0a\0",
    ],
    seeds,
    open,
};

/// Bytes before the image that say what is done with it.
const DONE: usize = 64;
const CLUSTER: usize = 512;

fn open() -> anyhow::Result<Take> {
    let folder = tempfile::tempdir()?;
    let path: PathBuf = folder.path().join("image");
    Ok(Box::new(move |bytes| {
        let (done, image) = bytes.split_at(bytes.len().min(DONE));
        std::fs::write(folder.path().join("image"), image).expect("room for an image");
        let mut choices = Choices::new(done);
        let options = [",format=qcow2", ",format=qcow2,ro"][choices.below(2) as usize];
        if let Some(disk) = disk(&path, options) {
            while !choices.is_empty() {
                request(&*disk, &mut choices);
            }
        }
    }))
}

fn disk(path: &Path, options: &str) -> Option<std::sync::Arc<dyn BlockBackend>> {
    let spec: DiskSpec = format!("{}{options}", path.display()).parse().ok()?;
    spec.open().ok()
}

fn request(disk: &dyn BlockBackend, choices: &mut Choices<'_>) {
    let sectors = disk.len() / 512;
    let kind = choices.byte() % 6;
    let count = (1 + choices.below(160)).min(sectors);
    let offset = choices.below(sectors.saturating_sub(count) + 1) * 512;
    let mut bytes = vec![0x5a; (count * 512) as usize];
    // Whatever comes of these is right.
    let _ = match kind {
        0 => disk.read_at(offset, &mut [IoSliceMut::new(&mut bytes)]),
        1 | 2 => disk.write_at(offset, &[IoSlice::new(&bytes)]),
        3 => disk.flush(),
        4 => disk.discard(offset, count * 512),
        _ => disk.write_zeroes(offset, count * 512, count.is_multiple_of(2)),
    };
}

/// Images of 64 KiB in clusters of 512 bytes: empty, and with a cluster of data, one of zeroes and a snapshot's table.
fn seeds() -> Vec<Vec<u8>> {
    let every = (0..DONE as u8).map(|n| n.wrapping_mul(37));
    let done: Vec<u8> = every.collect();
    let image = |version: u32, used: bool| {
        let mut seed = done.clone();
        seed.extend(image(version, used));
        seed
    };
    vec![image(2, false), image(3, false), image(3, true)]
}

/// Header, L1 table, refcount table, refcounts, L2 table and a cluster of data, in this order (qcow2 specification, QEMU's docs/interop/qcow2.txt).
fn image(version: u32, used: bool) -> Vec<u8> {
    let at = |n: u64| n * CLUSTER as u64;
    let mut b = vec![0; 6 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| b[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &version.to_be_bytes());
    put(20, &9u32.to_be_bytes());
    put(24, &(64u64 << 10).to_be_bytes());
    put(36, &2u32.to_be_bytes());
    put(40, &at(1).to_be_bytes());
    put(48, &at(2).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    if version == 3 {
        put(96, &4u32.to_be_bytes());
        put(100, &104u32.to_be_bytes());
    }
    put(2 * CLUSTER, &at(3).to_be_bytes());
    for n in 0..if used { 6 } else { 4 } {
        put(3 * CLUSTER + 2 * n, &1u16.to_be_bytes());
    }
    if used {
        const COPIED: u64 = 1 << 63;
        put(CLUSTER, &(COPIED | at(4)).to_be_bytes());
        put(4 * CLUSTER, &(COPIED | at(5)).to_be_bytes());
        put(4 * CLUSTER + 8, &1u64.to_be_bytes());
        put(5 * CLUSTER, &[0x77; CLUSTER]);
    }
    b
}
