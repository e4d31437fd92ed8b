//! What is found on disks: with each kind of partition table and file system, by each rule; and on damaged ones.
//!
//! ext4 file systems are made by `mke2fs` (Debian: e2fsprogs), FAT ones by the crate that reads them.

use std::fs;
use std::io::{Cursor, IoSlice, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use doppel_block::testing::MemoryDisk;
use doppel_block::{BlockBackend, DiskSpec, Format};
use doppel_bootdisk::{BootFiles, find, gpt};
use fastrand::Rng;

const MIB: u64 = 1 << 20;
const LIMIT: u64 = 64 * MIB;
const UUID: &str = "01234567-89ab-cdef-0123-456789abcdef";

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Scratch {
        Scratch(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An ext4 file system with files; none where the host cannot make one.
    fn ext4(&self, files: &[(&str, &str)]) -> Option<Vec<u8>> {
        let tree = self.path("tree");
        let _ = fs::remove_dir_all(&tree);
        fs::create_dir(&tree).unwrap();
        for (path, content) in files {
            let path = tree.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match content.strip_prefix("-> ") {
                Some(target) => std::os::unix::fs::symlink(target, path).unwrap(),
                None => fs::write(path, content).unwrap(),
            }
        }
        let image = self.path("image");
        let _ = fs::remove_file(&image);
        let output = Command::new("mke2fs")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .args(["-q", "-t", "ext4", "-U", UUID, "-d"])
            .args([&tree, &image])
            .arg("8M")
            .output();
        let Ok(output) = output else {
            eprintln!("SKIPPED: mke2fs is not installed (Debian: e2fsprogs)");
            return None;
        };
        assert!(output.status.success(), "{output:?}");
        Some(fs::read(image).unwrap())
    }

    fn disk(&self, content: &[u8]) -> Arc<dyn BlockBackend> {
        let path = self.path("disk");
        fs::write(&path, content).unwrap();
        let mut spec = DiskSpec::new(path);
        spec.format = Some(Format::Raw);
        spec.open().unwrap()
    }
}

fn fat(files: &[(&str, &str)]) -> Vec<u8> {
    let mut image = Cursor::new(vec![0; 4 << 20]);
    let options = fatfs::FormatVolumeOptions::new().volume_id(0xabcd_1234);
    fatfs::format_volume(&mut image, options).unwrap();
    let volume = fatfs::FileSystem::new(&mut image, fatfs::FsOptions::new()).unwrap();
    for (path, content) in files {
        let mut folder = volume.root_dir();
        let mut parts: Vec<&str> = path.split('/').collect();
        let name = parts.pop().unwrap();
        for part in parts {
            folder = folder.create_dir(part).unwrap();
        }
        let mut file = folder.create_file(name).unwrap();
        file.write_all(content.as_bytes()).unwrap();
    }
    drop(volume);
    image.into_inner()
}

/// A disk with a GUID partition table and one partition.
fn with_gpt(content: &[u8]) -> Vec<u8> {
    let len = content.len() as u64 + 2 * MIB;
    let table = gpt::new_table(len, gpt::Guid([1; 16]), gpt::Guid([0x5a; 16]));
    assert!(table.len >= content.len() as u64);
    let mut disk = vec![0; len as usize];
    disk[..table.head.len()].copy_from_slice(&table.head);
    let tail = disk.len() - table.tail.len();
    disk[tail..].copy_from_slice(&table.tail);
    disk[table.start as usize..][..content.len()].copy_from_slice(content);
    disk
}

/// A disk with a master boot record: partitions 1 and 5, the second a logical one.
fn with_mbr(first: &[u8], second: &[u8]) -> Vec<u8> {
    let sectors = |bytes: &[u8]| (bytes.len() / 512) as u32;
    let (a, b) = (2048, 2048 + sectors(first));
    let mut disk = vec![0; 512 * 2048];
    disk.extend(first);
    disk.extend(vec![0; 512 * 64]);
    disk.extend(second);
    entry(&mut disk[..512], 0, 0x83, a, sectors(first));
    entry(&mut disk[..512], 1, 0x05, b, 64 + sectors(second));
    disk[440..444].copy_from_slice(&0xfeed_f00d_u32.to_le_bytes());
    let at = b as usize * 512;
    entry(&mut disk[at..at + 512], 0, 0x83, 64, sectors(second));
    disk
}

fn entry(sector: &mut [u8], n: usize, kind: u8, start: u32, len: u32) {
    let entry = &mut sector[446 + 16 * n..][..16];
    entry[4] = kind;
    entry[8..12].copy_from_slice(&start.to_le_bytes());
    entry[12..].copy_from_slice(&len.to_le_bytes());
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
}

fn found(disk: &Arc<dyn BlockBackend>) -> (String, String, Option<String>, String) {
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    let BootFiles {
        place,
        kernel,
        initrd,
        cmdline,
    } = find(disk, LIMIT).unwrap_or_else(|e| panic!("{e}"));
    (place, text(kernel), initrd.map(text), cmdline)
}

/// A Debian without a boot loader.
const DEBIAN: &[(&str, &str)] = &[
    ("boot/vmlinuz-6.1.0-9-cloud-amd64", "old"),
    ("boot/initrd.img-6.1.0-9-cloud-amd64", "old rd"),
    ("boot/vmlinuz-6.1.0-10-cloud-amd64", "new"),
    ("boot/initrd.img-6.1.0-10-cloud-amd64", "new rd"),
    ("boot/vmlinuz-6.2.0-1-cloud-amd64", "half installed"),
    ("etc/fstab", ""),
];

#[test]
fn the_newest_complete_kernel_is_taken_on_every_kind_of_partition_table() {
    let scratch = Scratch::new();
    let Some(debian) = scratch.ext4(DEBIAN) else {
        return;
    };
    let kernel = "/boot/vmlinuz-6.1.0-10-cloud-amd64";
    let fat = fat(&[("readme", "nothing")]);
    for (name, disk) in [
        ("the whole disk", debian.clone()),
        ("partition 1", with_gpt(&debian)),
        ("partition 1", with_mbr(&debian, &fat)),
        ("partition 5", with_mbr(&fat, &debian)),
    ] {
        let (place, content, initrd, cmdline) = found(&scratch.disk(&disk));
        assert_eq!(place, format!("{name}: {kernel}"));
        assert_eq!(
            (content.as_str(), initrd.as_deref()),
            ("new", Some("new rd"))
        );
        assert_eq!(cmdline, format!("root=UUID={UUID} ro"));
    }
}

#[test]
fn a_damaged_first_partition_table_is_made_up_for_by_the_second() {
    let scratch = Scratch::new();
    let mut disk = with_gpt(&fat(&[("vmlinuz", "kernel")]));
    disk[600] ^= 1;
    assert_eq!(found(&scratch.disk(&disk)).0, "partition 1: /vmlinuz");
}

#[test]
fn without_an_initial_ram_disk_the_root_is_named_as_the_kernel_understands_it() {
    let scratch = Scratch::new();
    let files = [
        ("vmlinuz", "-> boot/linux"),
        ("boot/linux", "k"),
        ("sbin/init", ""),
    ];
    let Some(root) = scratch.ext4(&files) else {
        return;
    };
    let guid = "5a5a5a5a-5a5a-5a5a-5a5a-5a5a5a5a5a5a";
    for (disk, cmdline) in [
        (root.clone(), "root=/dev/vda ro".to_owned()),
        (with_gpt(&root), format!("root=PARTUUID={guid} ro")),
        (
            with_mbr(&root, &[]),
            "root=PARTUUID=feedf00d-01 ro".to_owned(),
        ),
    ] {
        let (_, kernel, initrd, found) = found(&scratch.disk(&disk));
        assert_eq!((kernel.as_str(), initrd), ("k", None));
        assert_eq!(found, cmdline);
    }
}

#[test]
fn the_command_line_of_kernel_install_is_taken() {
    let scratch = Scratch::new();
    let mut files = DEBIAN.to_vec();
    files.push(("etc/kernel/cmdline", "# mine\nroot=LABEL=x quiet\n"));
    let Some(root) = scratch.ext4(&files) else {
        return;
    };
    assert_eq!(found(&scratch.disk(&root)).3, "root=LABEL=x quiet");
}

#[test]
fn boot_loader_specification_entries_come_first() {
    let scratch = Scratch::new();
    let esp = |loader: &str| {
        fat(&[
            ("loader/loader.conf", loader),
            (
                "loader/entries/a-6.9.conf",
                "title A\nversion 6.9\nlinux /a/6.9/linux\ninitrd /a/6.9/initrd\noptions root=/dev/x quiet\n",
            ),
            (
                "loader/entries/a-6.10.conf",
                "title A\nversion 6.10\nlinux /a/6.10/linux\ninitrd /a/6.10/one\ninitrd /a/6.10/two\noptions rw\n",
            ),
            ("a/6.9/linux", "6.9"),
            ("a/6.9/initrd", "rd 6.9"),
            ("a/6.10/linux", "6.10"),
            ("a/6.10/one", "one"),
            ("a/6.10/two", "two"),
        ])
    };
    let Some(root) = scratch.ext4(DEBIAN) else {
        return;
    };
    let newest = scratch.disk(&with_mbr(&esp("timeout 3\n"), &root));
    let (place, kernel, initrd, cmdline) = found(&newest);
    assert_eq!(place, "partition 1: /a/6.10/linux");
    assert_eq!(kernel, "6.10");
    assert_eq!(initrd.as_deref(), Some("one\0two"));
    assert_eq!(cmdline, format!("root=UUID={UUID} ro rw"));
    drop(newest);
    let newer = format!("version 6.11\nlinux /a/new\n{}", "#".repeat(1 << 16));
    let too_long = fat(&[
        ("loader/entries/a-6.11.conf", &newer),
        ("loader/entries/a-6.9.conf", "version 6.9\nlinux /a/old\n"),
        ("a/new", "new"),
        ("a/old", "old"),
    ]);
    let too_long = scratch.disk(&with_mbr(&too_long, &root));
    assert_eq!(found(&too_long).1, "old");
    drop(too_long);
    let named = scratch.disk(&with_mbr(&esp("default a-6.9*\n"), &root));
    let (_, kernel, _, cmdline) = found(&named);
    assert_eq!(
        (kernel.as_str(), cmdline.as_str()),
        ("6.9", "root=/dev/x quiet")
    );
}

const GRUB: &str = "set default=\"${saved_entry}\"\n\
    menuentry 'New' --id new {\n linux /vmlinuz-2 root=/dev/vda2 quiet\n initrd /initrd-2\n}\n\
    menuentry 'Old' --id old {\n linux /vmlinuz-1 root=/dev/vda2 $x\n}\n";

#[test]
fn the_default_entry_of_grub_is_booted_from_a_boot_partition() {
    let scratch = Scratch::new();
    let files = [
        ("grub/grub.cfg", GRUB),
        ("grub/grubenv", "saved_entry=old\n"),
        ("vmlinuz-1", "one"),
        ("vmlinuz-2", "two"),
        ("initrd-2", "rd"),
    ];
    let Some(boot) = scratch.ext4(&files) else {
        return;
    };
    let (place, kernel, initrd, cmdline) = found(&scratch.disk(&with_gpt(&boot)));
    assert_eq!(place, "partition 1: /vmlinuz-1");
    assert_eq!((kernel.as_str(), initrd), ("one", None));
    assert_eq!(cmdline, "root=/dev/vda2");
    let Some(boot) = scratch.ext4(&[&files[..1], &files[2..]].concat()) else {
        return;
    };
    let (_, kernel, initrd, cmdline) = found(&scratch.disk(&with_gpt(&boot)));
    assert_eq!((kernel.as_str(), initrd.as_deref()), ("two", Some("rd")));
    assert_eq!(cmdline, "root=/dev/vda2 quiet");
    // Where its files are not there, the rule after it counts.
    let Some(boot) = scratch.ext4(&files[..3]) else {
        return;
    };
    let (_, kernel, ..) = found(&scratch.disk(&with_gpt(&boot)));
    assert_eq!(kernel, "one");
}

#[test]
fn a_disk_without_a_kernel_says_what_is_on_it_and_what_was_looked_for() {
    let scratch = Scratch::new();
    let mut xfs = vec![0; 1 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    let disk = scratch.disk(&with_mbr(&fat(&[]), &xfs));
    let says = find(&disk, LIMIT).err().unwrap().to_string();
    for part in [
        "partition 1 (FAT without a kernel)",
        "partition 5 (xfs",
        "/boot/vmlinuz-*",
        "--kernel",
    ] {
        assert!(says.contains(part), "{says}");
    }
    drop(disk);
    let says = find(&scratch.disk(&[0; 4096]), LIMIT).err().unwrap();
    assert!(
        says.to_string()
            .contains("the whole disk (nothing that is known)")
    );
    assert!(find(&scratch.disk(&[]), LIMIT).is_err());
}

#[test]
fn a_file_larger_than_the_guests_memory_is_an_error_that_says_so() {
    let scratch = Scratch::new();
    let big = "x".repeat(3 << 20);
    let disk = scratch.disk(&fat(&[("vmlinuz", &big)]));
    let says = find(&disk, 2 * MIB).err().unwrap().to_string();
    assert!(
        says.contains("/vmlinuz: it has 3 MiB") && says.contains("--memory"),
        "{says}"
    );
}

/// Damage to disks of all kinds; `DOPPEL_DISK_FUZZ` says how many (`cargo xtask disks` sets it).
#[test]
fn damaged_disks_neither_crash_nor_hang() {
    let count = std::env::var("DOPPEL_DISK_FUZZ").map_or(300, |n| n.parse().unwrap());
    let scratch = Scratch::new();
    let esp = fat(&[
        ("loader/entries/a.conf", "linux /linux\noptions root=x\n"),
        ("linux", &"k".repeat(100_000)),
    ]);
    let mut seeds = vec![with_gpt(&esp), with_mbr(&esp, &esp)];
    if let Some(root) = scratch.ext4(DEBIAN) {
        seeds.extend([with_gpt(&root), with_mbr(&esp, &root), root]);
    }
    let disk = Arc::new(MemoryDisk::default());
    let seed = std::env::var("DOPPEL_DISK_SEED").map_or(1, |n| n.parse().unwrap());
    let mut random = Rng::with_seed(seed);
    let (mut found, mut slowest) = (0, Duration::ZERO);
    for number in 0..count {
        let mut image = seeds[random.usize(..seeds.len())].clone();
        let used: Vec<usize> = (0..image.len())
            .step_by(512)
            .filter(|at| image[*at..*at + 512] != [0; 512])
            .collect();
        for _ in 0..1 + random.usize(..8) {
            let at = used[random.usize(..used.len())] + random.usize(..508);
            match random.u8(..3) {
                0 => image[at] ^= 1 << random.u8(..8),
                1 => image[at] = random.u8(..),
                _ => image[at..at + 4].copy_from_slice(&random.u32(..).to_le_bytes()),
            }
        }
        *disk.0.write().unwrap() = image;
        let start = Instant::now();
        let disk: Arc<dyn BlockBackend> = disk.clone();
        found += u64::from(find(&disk, LIMIT).is_ok());
        let took = start.elapsed();
        assert!(took < Duration::from_secs(30), "{number}: {took:?}");
        slowest = slowest.max(took);
    }
    eprintln!("{count} disks, a kernel on {found}, the slowest took {slowest:?}");
    assert!(found > count / 10);
}

/// The crate that reads it would ask for 150 GB at once, or for hundreds of blocks of 32 MiB, which ends the process. Without the feature of checksums a
/// superblock needs none.
#[test]
fn a_file_system_that_takes_more_memory_than_any_is_named() {
    const BLOCKS_COUNT: usize = 0x04;
    const LOG_BLOCK_SIZE: usize = 0x18;
    const BLOCKS_PER_GROUP: usize = 0x20;
    let scratch = Scratch::new();
    let Some(root) = scratch.ext4(DEBIAN) else {
        return;
    };
    let error_with = |words: &[(usize, u32)]| {
        const SUPERBLOCK: usize = 1024;
        const FEATURE_RO_COMPAT: usize = 0x64;
        let mut root = root.clone();
        for (at, value) in words.iter().chain(&[(FEATURE_RO_COMPAT, 0)]) {
            root[SUPERBLOCK + at..][..4].copy_from_slice(&value.to_le_bytes());
        }
        find(&scratch.disk(&root), LIMIT).err().unwrap().to_string()
    };
    let many = error_with(&[(BLOCKS_COUNT, u32::MAX), (BLOCKS_PER_GROUP, 1)]);
    assert!(many.contains("block groups"), "{many}");
    for log in [7, 15, u32::MAX] {
        let large = error_with(&[(LOG_BLOCK_SIZE, log)]);
        assert!(large.contains("64 KiB at most"), "{large}");
    }
}

#[test]
fn a_kernel_is_found_through_qcow2() {
    let scratch = Scratch::new();
    let Some(debian) = scratch.ext4(DEBIAN) else {
        return;
    };
    let path: &Path = &scratch.path("disk.qcow2");
    let content = with_gpt(&debian);
    doppel_block::create(path, Format::Qcow2, content.len() as u64).unwrap();
    let disk = DiskSpec::new(path).open().unwrap();
    disk.write_at(0, &[IoSlice::new(&content)]).unwrap();
    assert_eq!(found(&disk).1, "new");
}
