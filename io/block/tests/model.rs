//! Random requests to disks of every kind, beside a plain row of bytes in memory; `qemu-img` has the last word.

mod support;

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use doppel_block::{BlockBackend, DiskSpec, Format, create};
use fastrand::Rng;
use support::{Guest, Scratch, check, has_qemu_img, open_path, qemu_img, read};

const DISK: u64 = 3 << 20;

/// A disk and what must be on it.
struct Pair {
    disk: Option<Arc<dyn BlockBackend>>,
    model: Vec<u8>,
    path: PathBuf,
    options: String,
    random: Rng,
    guest: Guest,
    /// A discarded range may read as before, until it is written.
    vague: Vec<bool>,
}

impl Pair {
    fn new(path: &Path, options: &str, model: Vec<u8>, seed: u64) -> Pair {
        Pair {
            disk: Some(open_path(path, options).unwrap()),
            vague: vec![false; model.len()],
            model,
            path: path.to_owned(),
            options: options.to_owned(),
            random: Rng::with_seed(seed),
            guest: Guest::new(DISK),
        }
    }

    fn disk(&self) -> &dyn BlockBackend {
        self.disk.as_deref().unwrap()
    }

    /// Some sectors, often few, now and then many, or of a whole cluster.
    fn range(&mut self) -> std::ops::Range<usize> {
        let sectors = self.model.len() as u64 / 512;
        let most = [1, 8, 128, 700][self.random.usize(..4)];
        let len = 1 + self.random.u64(..most);
        let start = self.random.u64(..sectors - len + 1);
        let aligned = self.random.u64(..3) == 0;
        let start = if aligned { start / 128 * 128 } else { start };
        (start * 512) as usize..((start + len) * 512) as usize
    }

    fn step(&mut self) {
        let range = self.range();
        let offset = range.start as u64;
        let len = range.len() as u64;
        match self.random.u64(..20) {
            0..8 => self.write(range),
            8..14 => self.read(range),
            14 => self.disk().flush().unwrap(),
            15 | 16 => {
                let may_unmap = self.random.bool();
                self.disk().write_zeroes(offset, len, may_unmap).unwrap();
                self.model[range.clone()].fill(0);
                self.vague[range].fill(false);
            }
            17 | 18 => {
                self.disk().discard(offset, len).unwrap();
                self.vague[range].fill(true);
            }
            _ => {
                self.disk = None;
                self.disk = Some(open_path(&self.path, &self.options).unwrap());
            }
        }
    }

    fn write(&mut self, range: std::ops::Range<usize>) {
        let bytes: Vec<u8> = (range.clone()).map(|_| self.random.u8(..)).collect();
        let offset = range.start as u64;
        if self.random.bool() {
            let (a, b) = bytes.split_at(self.random.usize(..bytes.len()));
            let slices = [IoSlice::new(a), IoSlice::new(b)];
            self.disk().write_at(offset, &slices).unwrap();
        } else {
            let disk = self.disk.as_deref().unwrap();
            self.guest.write(disk, offset, &bytes, &mut self.random);
        }
        self.model[range.clone()].copy_from_slice(&bytes);
        self.vague[range].fill(false);
    }

    fn read(&mut self, range: std::ops::Range<usize>) {
        let mut bytes = vec![0xee; range.len()];
        let offset = range.start as u64;
        if self.random.bool() {
            let middle = self.random.usize(..bytes.len());
            let (a, b) = bytes.split_at_mut(middle);
            let slices = &mut [IoSliceMut::new(a), IoSliceMut::new(b)];
            self.disk().read_at(offset, slices).unwrap();
        } else {
            let disk = self.disk.as_deref().unwrap();
            self.guest.read(disk, offset, &mut bytes, &mut self.random);
        }
        self.compare(range.start, &bytes);
    }

    /// What was read is what must be there; from now on a discarded byte is what it was read as.
    fn compare(&mut self, start: usize, bytes: &[u8]) {
        for (at, byte) in (start..).zip(bytes) {
            if std::mem::take(&mut self.vague[at]) && *byte == 0 {
                self.model[at] = 0;
            }
            assert_eq!(self.model[at], *byte, "at {at:#x}");
        }
    }

    fn compare_all(&mut self) {
        let bytes = read(self.disk(), 0, self.model.len());
        self.compare(0, &bytes);
    }
}

/// Steps, and at the end the image as QEMU sees it.
fn run(scratch: &Scratch, name: &str, path: &Path, options: &str, model: Vec<u8>) {
    for seed in 0..4 {
        eprintln!("{name}, seed {seed}");
        let mut pair = Pair::new(path, options, model.clone(), seed);
        // Later rounds go on with what the one before left.
        if seed > 0 {
            pair.vague.fill(true);
            pair.model = read(pair.disk(), 0, pair.model.len());
        }
        (0..400).for_each(|_| pair.step());
        pair.compare_all();
        pair.disk().flush().unwrap();
        let Pair { disk, model, .. } = pair;
        drop(disk);
        let image = options.strip_prefix(",overlay=").map_or(path, Path::new);
        let expected = scratch.file("expected", &model);
        if has_qemu_img() && !options.contains("raw") {
            assert_eq!(check(image), 0, "{name}");
            qemu_img("compare -F raw", &[image, &expected]);
        }
    }
}

fn filled(seed: u64) -> Vec<u8> {
    let mut random = Rng::with_seed(seed);
    let chunk = |n: u64| if n.is_multiple_of(3) { 0 } else { n as u8 };
    let mut bytes = Vec::new();
    while bytes.len() < DISK as usize {
        let byte = chunk(random.u64(..) >> 7);
        bytes.extend((0..37_000).map(|n| if byte == 0 { 0 } else { byte ^ (n >> 9) as u8 }));
    }
    bytes.truncate(DISK as usize);
    bytes
}

#[test]
fn a_raw_disk_is_a_row_of_bytes() {
    let scratch = Scratch::new();
    let model = filled(1);
    let path = scratch.file("disk", &model);
    run(&scratch, "raw", &path, ",format=raw", model);
}

#[test]
fn a_new_qcow2_disk_is_a_row_of_bytes() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    create(&path, Format::Qcow2, DISK).unwrap();
    run(&scratch, "qcow2", &path, "", vec![0; DISK as usize]);
}

#[test]
fn images_that_qemu_made_are_rows_of_bytes() {
    if !has_qemu_img() {
        return;
    }
    for (name, options) in [
        ("v3", ""),
        ("v2", "-o compat=0.10"),
        ("small clusters", "-o cluster_size=512"),
        ("large clusters", "-o cluster_size=2M"),
        ("one bit counts", "-o refcount_bits=1"),
        ("wide counts", "-o refcount_bits=64,cluster_size=4k"),
        ("lazy counts", "-o lazy_refcounts=on"),
        ("compressed", "-c"),
        ("v2 compressed", "-c -o compat=0.10"),
    ] {
        let scratch = Scratch::new();
        let model = filled(2);
        let from = scratch.file("from", &model);
        let path = scratch.path("disk.qcow2");
        let words = format!("convert -f raw -O qcow2 {options}");
        qemu_img(&words, &[&from, &path]);
        run(&scratch, name, &path, "", model);
    }
}

#[test]
fn an_overlay_is_a_row_of_bytes_and_leaves_what_is_below_alone() {
    let scratch = Scratch::new();
    let model = filled(3);
    let base = scratch.file("base", &model);
    let overlay = format!(",overlay={}", scratch.path("over.qcow2").display());
    run(&scratch, "over raw", &base, &overlay, model.clone());
    assert!(fs::read(&base).unwrap() == model, "the base has changed");
    if !has_qemu_img() {
        return;
    }
    for (name, words) in [
        ("over qcow2", "convert -f raw -O qcow2"),
        ("over compressed", "convert -c -f raw -O qcow2"),
    ] {
        let base_image = scratch.path("base.qcow2");
        qemu_img(words, &[&base, &base_image]);
        let before = fs::read(&base_image).unwrap();
        let _ = fs::remove_file(scratch.path("over.qcow2"));
        run(&scratch, name, &base_image, &overlay, model.clone());
        assert!(
            fs::read(&base_image).unwrap() == before,
            "the base has changed"
        );
    }
}

#[test]
fn a_version_2_image_over_another_is_a_row_of_bytes() {
    if !has_qemu_img() {
        return;
    }
    let scratch = Scratch::new();
    let model = filled(4);
    let base = scratch.file("base", &model);
    let path = scratch.path("over.qcow2");
    let words = "create -q -f qcow2 -o compat=0.10 -F raw -b";
    qemu_img(words, &[&base, &path]);
    run(&scratch, "v2 over raw", &path, "", model);
}

/// Threads that write to their own sectors of the same clusters, with flushes and discards between.
#[test]
fn many_threads_at_once_do_not_disturb_each_other() {
    let scratch = Scratch::new();
    let path = scratch.path("disk.qcow2");
    create(&path, Format::Qcow2, DISK).unwrap();
    let disk = DiskSpec::new(&path).open().unwrap();
    const THREADS: u64 = 8;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let disk = disk.clone();
            scope.spawn(move || {
                let mut random = Rng::with_seed(thread);
                let guest = Guest::new(4096);
                let mut last = std::collections::BTreeMap::new();
                for step in 0..300 {
                    let sector = random.u64(..DISK / 512 / THREADS) * THREADS + thread;
                    let value = random.u8(..);
                    let sector_bytes = [value; 512];
                    if thread % 2 == 0 {
                        let bytes = [IoSlice::new(&sector_bytes)];
                        disk.write_at(sector * 512, &bytes).unwrap();
                    } else {
                        guest.write(&*disk, sector * 512, &sector_bytes, &mut random);
                    }
                    last.insert(sector, value);
                    match step % 50 {
                        7 => disk.flush().unwrap(),
                        // Another thread's sectors are in the same cluster: a discard of less than a cluster changes nothing.
                        9 => disk.discard(sector * 512, 512).unwrap(),
                        _ => {}
                    }
                    let (sector, value) = last.iter().nth(step / 2).unwrap_or((&sector, &value));
                    assert_eq!(read(&*disk, sector * 512, 512), [*value; 512]);
                }
                for (sector, value) in last {
                    assert_eq!(read(&*disk, sector * 512, 512), [value; 512]);
                }
            });
        }
    });
    disk.flush().unwrap();
    drop(disk);
    if has_qemu_img() {
        assert_eq!(check(&path), 0);
    }
}
