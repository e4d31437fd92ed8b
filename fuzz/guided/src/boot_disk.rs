//! Disks that a kernel is looked for on: partition tables, FAT, ext4, configurations of boot loaders.
//!
//! An input is a disk without its empty sectors: each that is not has its number before it. So a file system of megabytes is an input of kilobytes.

use std::io::{Cursor, Write};
use std::process::Command;
use std::sync::Arc;

use doppel_block::BlockBackend;
use doppel_block::testing::MemoryDisk;
use doppel_bootdisk::find;

use crate::choices::Choices;
use crate::{Door, Take};

pub const DOOR: Door = Door {
    name: "boot-disk",
    longest: 96 << 10,
    words: &[
        b"EFI PART",
        b"\x55\xaa",
        b"\x53\xef",
        b"FAT12   ",
        b"FAT16   ",
        b"\xeb\x58\x90",
        b"linux /linux\n",
        b"options root=x\n",
        b"loader",
        b"entries",
        b"vmlinuz-1",
        b"\x0a\xf3",
        b"LABELONE",
    ],
    seeds,
    open,
};

const SECTOR: usize = 512;
/// Of a disk.
const LONGEST: usize = 8 << 20;
/// Of a kernel or an initial RAM disk.
const LIMIT: u64 = 1 << 20;

fn open() -> anyhow::Result<Take> {
    let memory = Arc::new(MemoryDisk::default());
    Ok(Box::new(move |bytes| {
        unpack(bytes, &mut memory.0.write().expect("no panic before"));
        let disk: Arc<dyn BlockBackend> = memory.clone();
        // Found or not: both are right.
        let _ = find(&disk, LIMIT);
    }))
}

fn unpack(bytes: &[u8], disk: &mut Vec<u8>) {
    disk.clear();
    let mut choices = Choices::new(bytes);
    while !choices.is_empty() {
        let number = usize::from(u16::from_le_bytes([choices.byte(), choices.byte()]));
        let at = number * SECTOR % LONGEST;
        let sector = choices.bytes(SECTOR);
        disk.resize(disk.len().max(at + SECTOR), 0);
        disk[at..at + sector.len()].copy_from_slice(sector);
    }
}

fn pack(disk: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let last = disk.len() / SECTOR - 1;
    for (n, sector) in disk.chunks_exact(SECTOR).enumerate() {
        if n == last || sector.iter().any(|byte| *byte != 0) {
            bytes.extend((n as u16).to_le_bytes());
            bytes.extend(sector);
        }
    }
    bytes
}

fn seeds() -> Vec<Vec<u8>> {
    let mut volumes = vec![fat(64 << 10), fat(2 << 20)];
    volumes.extend(ext4());
    let mut disks: Vec<_> = volumes.iter().map(|v| with_mbr(v)).collect();
    disks.extend(volumes);
    let packed = disks.iter().map(|disk| pack(disk));
    packed.filter(|seed| seed.len() <= DOOR.longest).collect()
}

fn fat(size: usize) -> Vec<u8> {
    let mut image = Cursor::new(vec![0; size]);
    let options = fatfs::FormatVolumeOptions::new().volume_id(0xabcd_1234);
    fatfs::format_volume(&mut image, options).expect("a volume");
    let volume = fatfs::FileSystem::new(&mut image, fatfs::FsOptions::new()).expect("a volume");
    let entries = volume
        .root_dir()
        .create_dir("loader")
        .and_then(|d| d.create_dir("entries"));
    let file = entries.and_then(|d| d.create_file("a.conf"));
    let text = b"title a\nlinux /linux\ninitrd /initrd\noptions root=x\n";
    file.and_then(|mut f| f.write_all(text)).expect("room");
    for name in ["linux", "initrd"] {
        let file = volume.root_dir().create_file(name);
        file.and_then(|mut f| f.write_all(&[b'k'; 1000]))
            .expect("room");
    }
    drop(volume);
    image.into_inner()
}

/// With a kernel in /boot, where the host has the program that makes such a file system.
fn ext4() -> Option<Vec<u8>> {
    let folder = tempfile::tempdir().ok()?;
    let (root, image) = (folder.path().join("root"), folder.path().join("image"));
    std::fs::create_dir_all(root.join("boot")).ok()?;
    for name in ["vmlinuz-6.1.0-1-amd64", "initrd.img-6.1.0-1-amd64"] {
        std::fs::write(root.join("boot").join(name), [b'k'; 1000]).ok()?;
    }
    std::fs::create_dir_all(root.join("etc")).ok()?;
    std::fs::write(root.join("etc/fstab"), "/dev/vda1 / ext4 defaults 0 1\n").ok()?;
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-t", "ext4", "-O", "^has_journal", "-N", "16", "-d"]);
    let output = command.arg(&root).arg(&image).arg("512k").output().ok()?;
    output
        .status
        .success()
        .then(|| std::fs::read(image).ok())
        .flatten()
}

/// One partition, from sector 64 on.
fn with_mbr(volume: &[u8]) -> Vec<u8> {
    const FIRST: u32 = 64;
    let mut disk = vec![0; FIRST as usize * SECTOR];
    disk.extend(volume);
    let entry = &mut disk[446..462];
    entry[4] = 0x83;
    entry[8..12].copy_from_slice(&FIRST.to_le_bytes());
    entry[12..].copy_from_slice(&((volume.len() / SECTOR) as u32).to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}
