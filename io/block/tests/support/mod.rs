//! What tests of disks share: a scratch folder, `qemu-img` where the host has it, short calls.
#![allow(dead_code, reason = "each test file uses what it needs")]

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use doppel_block::{BlockBackend, BlockError, DiskSpec};
use doppel_memory::{GuestRam, GuestSlice};
use fastrand::Rng;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// A folder that goes when the test ends.
pub struct Scratch(pub tempfile::TempDir);

impl Scratch {
    pub fn new() -> Scratch {
        Scratch(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }
}

pub fn open(text: &str) -> Result<Arc<dyn BlockBackend>, BlockError> {
    text.parse::<DiskSpec>()?.open()
}

pub fn open_path(path: &Path, options: &str) -> Result<Arc<dyn BlockBackend>, BlockError> {
    open(&format!("{}{options}", path.display()))
}

pub fn complaint(path: &Path, options: &str) -> String {
    let error = open_path(path, options).err().expect("opened");
    error.to_string()
}

pub fn read(disk: &dyn BlockBackend, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    disk.read_at(offset, &mut [IoSliceMut::new(&mut bytes)])
        .unwrap();
    bytes
}

pub fn write(disk: &dyn BlockBackend, offset: u64, bytes: &[u8]) {
    disk.write_at(offset, &[IoSlice::new(bytes)]).unwrap();
}

/// `qemu-img`, if the host has it.
pub fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: qemu-img is not installed (Debian: qemu-utils)");
    }
    found
}

/// Runs `qemu-img` with words and then paths; what it printed.
pub fn qemu_img(words: &str, paths: &[&Path]) -> String {
    let mut command = Command::new("qemu-img");
    let output = command
        .args(words.split_whitespace())
        .args(paths)
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "qemu-img {words}: {printed}{complaints}"
    );
    printed
}

/// The most memory that this process has had.
pub fn resident_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// A version 3 image byte by byte: clusters of `1 << bits` bytes, counts of one bit, a disk of `size` bytes, the L1 table in the second cluster and the
/// refcount table where the test puts it. Header and L1 table are counted if its block is.
pub struct Made(pub Vec<u8>, u32);

impl Made {
    pub fn new(bits: u32, size: u64, l1_entries: u32) -> Made {
        let mut made = Made(vec![0; 1 << bits], bits);
        made.put(0, b"QFI\xfb\0\0\0\x03");
        made.number(20, bits);
        made.put(24, &size.to_be_bytes());
        made.number(36, l1_entries);
        made.put(40, &made.place(1).to_be_bytes());
        made.number(100, 104);
        made
    }

    /// Where a cluster is.
    pub fn place(&self, cluster: u64) -> u64 {
        cluster << self.1
    }

    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0.resize(self.0.len().max(at + bytes.len()), 0);
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn number(&mut self, at: usize, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    /// Puts a table at a cluster.
    pub fn table(&mut self, cluster: u64, entries: impl IntoIterator<Item = u64>) {
        let bytes: Vec<u8> = entries.into_iter().flat_map(u64::to_be_bytes).collect();
        self.put(self.place(cluster) as usize, &bytes);
    }

    /// Says where the refcount table is, and of how many clusters.
    pub fn refcounts(&mut self, cluster: u64, clusters: u32) {
        self.put(48, &self.place(cluster).to_be_bytes());
        self.number(56, clusters);
    }
}

/// What `qemu-img check` makes of an image: 0 is sound, 3 has leaked clusters, 2 is corrupt.
/// What `qemu-img check` ends with. A child that another test has just started may hold the image's lock until it executes its
/// program, so that a check that could not be made is made again.
pub fn check(path: &Path) -> i32 {
    let once = || {
        let output = Command::new("qemu-img").arg("check").arg(path).output();
        output.unwrap().status.code().unwrap()
    };
    let again = std::iter::repeat_with(|| {
        std::thread::sleep(std::time::Duration::from_millis(50));
        once()
    });
    let mut results = std::iter::once(once()).chain(again.take(40));
    results.find(|code| *code != 1).unwrap_or(1)
}

/// Guest RAM, through which a disk is read and written as a device does it.
pub struct Guest(GuestRam);

impl Guest {
    /// With room for `len` bytes and as much between them.
    pub fn new(len: u64) -> Guest {
        Guest(GuestRam::new((4 * len).max(1 << 20)).unwrap())
    }

    /// Pieces here and there that are `len` bytes together.
    fn pieces(&self, len: usize, random: &mut Rng) -> Vec<GuestSlice<'_>> {
        let (mut pieces, mut left, mut at) = (Vec::new(), len, random.u64(..4096));
        while left > 0 {
            let most = [left, 16, 4096][random.usize(..3)];
            let now = left.min(1 + random.usize(..most));
            let piece = GuestMemoryBackend::get_slice(self.0.view(), GuestAddress(at), now);
            pieces.push(piece.unwrap());
            at += now as u64 + random.u64(..2) * (now as u64).min(100);
            left -= now;
        }
        pieces
    }

    pub fn write(&self, disk: &dyn BlockBackend, offset: u64, bytes: &[u8], random: &mut Rng) {
        self.try_write(disk, offset, bytes, random).unwrap();
    }

    /// Without waiting if that is possible.
    pub fn try_write(
        &self,
        disk: &dyn BlockBackend,
        offset: u64,
        mut bytes: &[u8],
        random: &mut Rng,
    ) -> std::io::Result<()> {
        let pieces = self.pieces(bytes.len(), random);
        for piece in &pieces {
            piece.copy_from(&bytes[..piece.len()]);
            bytes = &bytes[piece.len()..];
        }
        let at_once = disk.try_write_from_guest(offset, &pieces);
        at_once.unwrap_or_else(|| disk.write_from_guest(offset, &pieces))
    }

    /// Without waiting if that is possible.
    pub fn read(&self, disk: &dyn BlockBackend, offset: u64, into: &mut [u8], random: &mut Rng) {
        let pieces = self.pieces(into.len(), random);
        for piece in &pieces {
            piece.copy_from(&vec![0xee; piece.len()]);
        }
        match disk.try_read_to_guest(offset, &pieces) {
            Some(result) => result.unwrap(),
            None => disk.read_to_guest(offset, &pieces).unwrap(),
        }
        let mut done = 0;
        for piece in &pieces {
            done += piece.copy_to(&mut into[done..done + piece.len()]);
        }
    }
}
