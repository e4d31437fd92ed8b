//! Kernels by their names, where no loader has left a configuration: what Debian's packages put into /boot.

use std::cmp::Ordering;

use super::{Choice, Place};
use crate::version::compare;
use crate::volume::Volume;

const FOLDERS: &[&str] = &["/boot", "/"];
/// What the initial RAM disk of kernel V is called.
const INITRDS: &[(&str, &str)] = &[
    ("initrd.img-", ""),
    ("initrd-", ""),
    ("initramfs-", ".img"),
    ("initrd-", ".img"),
];
/// Names without a version: kernel, initial RAM disk.
const PLAIN: &[(&str, &str)] = &[
    ("/vmlinuz", "/initrd.img"),
    ("/boot/vmlinuz", "/boot/initrd.img"),
    ("/boot/vmlinuz-linux", "/boot/initramfs-linux.img"),
    ("/vmlinuz-linux", "/initramfs-linux.img"),
    ("/boot/vmlinuz-virt", "/boot/initramfs-virt"),
    ("/boot/vmlinuz-lts", "/boot/initramfs-lts"),
];
/// Where `kernel-install` and unified kernel images have the command line.
const CMDLINE: &[&str] = &["/etc/kernel/cmdline", "/usr/lib/kernel/cmdline"];

/// The newest kernel that has an initial RAM disk, else the newest at all, else one without a version in its name.
pub fn choose(volumes: &[Volume]) -> Option<Choice> {
    let options = options(volumes);
    for (number, volume) in volumes.iter().enumerate() {
        let found = FOLDERS.iter().find_map(|folder| newest(volume, folder));
        if let Some((kernel, initrd)) = found.or_else(|| plain(volume)) {
            let place = |path| Place {
                volume: number,
                path,
            };
            return Some(Choice {
                kernel: place(kernel),
                initrds: initrd.map(place).into_iter().collect(),
                options,
            });
        }
    }
    None
}

fn options(volumes: &[Volume]) -> String {
    let texts = volumes
        .iter()
        .flat_map(|v| CMDLINE.iter().map(|path| v.text(path)));
    let text = texts.flatten().next().unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    lines.join(" ").trim().to_owned()
}

type Pair = (String, Option<String>);

fn newest(volume: &Volume, folder: &str) -> Option<Pair> {
    let names = volume.list(folder);
    let mut kernels: Vec<(&str, Option<String>)> = names
        .iter()
        .filter_map(|name| name.strip_prefix("vmlinuz-"))
        .filter(|version| version.starts_with(|c: char| c.is_ascii_digit()))
        .filter(|version| !version.ends_with(".old") && !version.ends_with(".dpkg-new"))
        .map(|version| (version, initrd(&names, version)))
        .collect();
    kernels.sort_by(order);
    let (version, initrd) = kernels.pop()?;
    let folder = folder.trim_end_matches('/');
    let path = |name: String| format!("{folder}/{name}");
    Some((path(format!("vmlinuz-{version}")), initrd.map(path)))
}

fn order(a: &(&str, Option<String>), b: &(&str, Option<String>)) -> Ordering {
    let complete = a.1.is_some().cmp(&b.1.is_some());
    complete.then_with(|| compare(a.0, b.0))
}

fn initrd(names: &[String], version: &str) -> Option<String> {
    let candidates = INITRDS
        .iter()
        .map(|(before, after)| format!("{before}{version}{after}"));
    candidates.into_iter().find(|name| names.contains(name))
}

fn plain(volume: &Volume) -> Option<Pair> {
    let (kernel, initrd) = PLAIN.iter().find(|(kernel, _)| volume.exists(kernel))?;
    let initrd = volume.exists(initrd).then(|| (*initrd).to_owned());
    Some(((*kernel).to_owned(), initrd))
}
