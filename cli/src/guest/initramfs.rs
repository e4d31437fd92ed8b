//! The default guest's initial root file system: busybox, kernel modules and an init.

use super::cpio::Archive;
use super::modules::{self, Module};
use anyhow::Result;

const INIT: &str = include_str!("init.sh");

const UDHCPC: &str = include_str!("udhcpc.sh");

const PROFILE: &str = "\
export PS1='\\u@\\h:\\w\\$ '
alias ll='ls -l'
";

/// Modules that an initramfs brings: drivers of paravirtual devices and the file systems a disk is likely to have.
/// What a kernel has built in, or knows nothing of, is passed over.
pub const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "virtio_scsi",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtio_pmem",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "9p",
    "9pnet_virtio",
    "pvpanic_mmio",
    "pvpanic_pci",
    "sd_mod",
    "sr_mod",
    "ext4",
    "crc32c_generic",
    "crc32c_intel",
    "xfs",
    "vfat",
    "exfat",
    "nls_ascii",
    "nls_cp437",
    "nls_iso8859_1",
    "nls_utf8",
    "isofs",
    "udf",
    "squashfs",
    "erofs",
    "overlay",
    "fuse",
    "loop",
    "af_packet",
];

const DIRECTORIES: &[&str] = &[
    "bin", "dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp", "usr/bin", "usr/sbin", "mnt",
];

/// A number that changes with what `build` writes.
pub fn recipe() -> u32 {
    let inputs = format!("1\n{INIT}\n{UDHCPC}\n{PROFILE}\n{MODULES:?}\n{DIRECTORIES:?}");
    crc32fast::hash(inputs.as_bytes())
}

/// The programs that it brings.
pub struct Programs<'a> {
    /// All of user land.
    pub busybox: &'a [u8],
    /// What tells the monitor how a script ended.
    pub debug_exit: &'a [u8],
}

/// The archive for a kernel of the given release. It is not compressed: the guest boots faster for it.
pub fn build(programs: &Programs, release: &str, available: Vec<Module>) -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in DIRECTORIES {
        archive.directory(directory);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("bin/busybox", 0o755, programs.busybox);
    archive.symlink("bin/sh", "busybox");
    archive.symlink("sbin/modprobe", "../bin/busybox");
    archive.file("sbin/debug-exit", 0o755, programs.debug_exit);
    archive.file("etc/udhcpc.sh", 0o755, UDHCPC.as_bytes());
    archive.file("etc/profile", 0o644, PROFILE.as_bytes());
    archive.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", 0o644, b"root:x:0:\n");
    add_modules(&mut archive, release, modules::closure(available, MODULES)?);
    Ok(archive.finish())
}

fn add_modules(archive: &mut Archive, release: &str, modules: Vec<Module>) {
    let folder = format!("lib/modules/{release}");
    archive.directory(&folder);
    for module in &modules {
        archive.file(&format!("{folder}/{}", module.path), 0o644, &module.elf);
    }
    let indices = [
        ("modules.dep", modules::dependency_index(&modules)),
        ("modules.alias", modules::alias_index(&modules)),
    ];
    for (name, index) in indices {
        archive.file(&format!("{folder}/{name}"), 0o644, index.as_bytes());
    }
}
