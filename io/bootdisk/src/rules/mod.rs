//! The rules by which a kernel is found, the first that applies counts.
//!
//! 1. [`entries`]: files of the Boot Loader Specification, as systemd-boot and Fedora have them.
//! 2. [`grub`]: the default entry of GRUB's configuration, as Debian's `update-grub` writes it.
//! 3. [`names`]: the newest `/boot/vmlinuz-VERSION` with its initial RAM disk, else `/vmlinuz`.

mod entries;
mod grub;
mod names;

use crate::volume::Volume;
use crate::{BootDiskError, BootFiles};

/// A rule: what it chooses on a disk, if anything.
pub type Rule = fn(&[Volume]) -> Option<Choice>;

/// All rules in their order.
pub const ALL: &[Rule] = &[entries::choose, grub::choose, names::choose];

/// A file on a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which volume.
    pub volume: usize,
    /// Where on it.
    pub path: String,
}

/// What a rule chose.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The kernel.
    pub kernel: Place,
    /// Initial RAM disks, in their order.
    pub initrds: Vec<Place>,
    /// Command line, with or without `root=`.
    pub options: String,
}

impl Choice {
    /// Reads the files.
    pub fn load(self, volumes: &[Volume], limit: u64) -> Result<BootFiles, BootDiskError> {
        let read = |place: &Place, limit| volumes[place.volume].load(&place.path, limit);
        let kernel = read(&self.kernel, limit)?;
        let mut initrd = Vec::new();
        for place in &self.initrds {
            // The kernel wants each archive to begin at a multiple of four.
            initrd.resize(initrd.len().next_multiple_of(4), 0);
            let room = limit.saturating_sub(initrd.len() as u64);
            initrd.extend(read(place, room)?);
        }
        Ok(BootFiles {
            place: volumes[self.kernel.volume].place(&self.kernel.path),
            kernel,
            cmdline: with_root(&self.options, volumes, !self.initrds.is_empty()),
            initrd: (!self.initrds.is_empty()).then_some(initrd),
        })
    }
}

/// Where a file is that a configuration on volume `first` names: there, in /boot there or without it, or on another volume.
fn locate(volumes: &[Volume], first: usize, path: &str) -> Option<Place> {
    let path = format!("/{}", path.trim_start_matches('/'));
    let shorter = path.strip_prefix("/boot").filter(|p| p.starts_with('/'));
    let longer = format!("/boot{path}");
    let others = (0..volumes.len()).filter(|n| *n != first);
    std::iter::once(first).chain(others).find_map(|volume| {
        let candidates = [Some(path.as_str()), shorter, Some(&longer)];
        let found = candidates.into_iter().flatten();
        let mut found = found.filter(|path| volumes[volume].exists(path));
        let path = found.next()?.to_owned();
        Some(Place { volume, path })
    })
}

/// The options, with the root file system in them.
fn with_root(options: &str, volumes: &[Volume], initrd: bool) -> String {
    let options = options.trim();
    if words(options).any(|word| word.starts_with("root=")) {
        return options.to_owned();
    }
    match root(volumes, initrd) {
        Some(root) => format!("root={root} ro {options}").trim_end().to_owned(),
        None => options.to_owned(),
    }
}

fn words(options: &str) -> impl Iterator<Item = &str> {
    options.split_ascii_whitespace()
}

/// What only a root file system has.
const ROOT_SIGNS: &[&str] = &[
    "/etc/fstab",
    "/etc/os-release",
    "/sbin/init",
    "/etc/inittab",
];

/// The root file system by the most lasting name that who mounts it understands: the kernel alone knows no UUIDs of file systems.
fn root(volumes: &[Volume], initrd: bool) -> Option<String> {
    let is_root = |volume: &&Volume| ROOT_SIGNS.iter().any(|sign| volume.exists(sign));
    let volume = volumes.iter().find(is_root)?;
    if let (true, Some(files)) = (initrd, volume.files()) {
        return Some(format!("UUID={}", files.uuid()));
    }
    let partition = &volume.partition;
    match &partition.uuid {
        Some(uuid) => Some(format!("PARTUUID={uuid}")),
        None => Some(partition.device()),
    }
}

/// Options without what only their own loader could fill in: `$kernelopts`, `${extra_cmdline}`.
fn without_variables(options: &str) -> String {
    let plain: Vec<&str> = words(options).filter(|word| !word.contains('$')).collect();
    plain.join(" ")
}
