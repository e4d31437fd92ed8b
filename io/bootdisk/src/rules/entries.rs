//! Entries of the Boot Loader Specification, type 1 (UAPI Group, UAPI.1): a text file for each kernel.

use std::cmp::Ordering;

use super::{Choice, locate, without_variables};
use crate::version::compare;
use crate::volume::Volume;

const FOLDERS: &[&str] = &["/loader/entries", "/boot/loader/entries"];
/// Entries that are read.
const ENTRIES_MAX: usize = 1000;
/// Bytes of one, which all are kept at a time; hard links make many of one file.
const ENTRY_MAX: usize = 64 << 10;

/// The entry that systemd-boot would boot: the one that loader.conf names, else the newest.
pub fn choose(volumes: &[Volume]) -> Option<Choice> {
    for (number, volume) in volumes.iter().enumerate() {
        for folder in FOLDERS {
            let mut entries = read(volume, folder);
            entries.sort_by(Entry::order);
            let wanted = wanted(volume, folder);
            let named = |e: &&Entry| wanted.as_deref().is_some_and(|name| e.is_named(name));
            let first = entries.iter().find(named);
            let ordered = first.into_iter().chain(&entries);
            let mut choices = ordered.filter_map(|entry| entry.choice(volumes, number));
            if let Some(choice) = choices.next() {
                return Some(choice);
            }
        }
    }
    None
}

/// What `default` in loader.conf names.
fn wanted(volume: &Volume, folder: &str) -> Option<String> {
    let path = format!("{}/loader.conf", folder.trim_end_matches("/entries"));
    let text = volume.text(&path)?;
    let mut lines = text.lines().filter_map(field);
    let (_, name) = lines.find(|(key, _)| *key == "default")?;
    Some(name.to_owned())
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Entry {
    name: String,
    linux: String,
    initrds: Vec<String>,
    options: Vec<String>,
    version: String,
    sort_key: Option<String>,
}

fn read(volume: &Volume, folder: &str) -> Vec<Entry> {
    let names = volume.list(folder).into_iter();
    let names = names.filter(|name| name.ends_with(".conf"));
    names
        .take(ENTRIES_MAX)
        .filter_map(|name| {
            let text = volume.text(&format!("{folder}/{name}"))?;
            (text.len() <= ENTRY_MAX).then(|| Entry::parse(&name, &text))?
        })
        .collect()
}

/// A line's key and value.
fn field(line: &str) -> Option<(&str, &str)> {
    let line = line.trim();
    if line.starts_with('#') {
        return None;
    }
    let (key, value) = line.split_once(|c: char| c.is_ascii_whitespace())?;
    Some((key, value.trim()))
}

impl Entry {
    fn parse(name: &str, text: &str) -> Option<Entry> {
        let mut entry = Entry {
            name: name.trim_end_matches(".conf").to_owned(),
            ..Entry::default()
        };
        for (key, value) in text.lines().filter_map(field) {
            match key {
                "linux" => entry.linux = value.to_owned(),
                "initrd" => entry
                    .initrds
                    .extend(value.split_ascii_whitespace().map(str::to_owned)),
                "options" => entry.options.push(value.to_owned()),
                "version" => entry.version = value.to_owned(),
                "sort-key" => entry.sort_key = Some(value.to_owned()),
                "architecture" if !value.eq_ignore_ascii_case("x64") => return None,
                _ => {}
            }
        }
        (!entry.linux.is_empty()).then_some(entry)
    }

    /// The order of the specification: with a sort key before those without, then the newest first.
    fn order(&self, other: &Entry) -> Ordering {
        let keyed = other.sort_key.is_some().cmp(&self.sort_key.is_some());
        let newest = || compare(&other.version, &self.version);
        keyed
            .then_with(|| self.sort_key.cmp(&other.sort_key))
            .then_with(newest)
            .then_with(|| compare(&other.name, &self.name))
    }

    /// Whether `default` means this: a name, with or without its ending, or the start of one before a `*`.
    fn is_named(&self, name: &str) -> bool {
        match name.strip_suffix('*') {
            Some(start) => self.name.starts_with(start),
            None => self.name == name.trim_end_matches(".conf"),
        }
    }

    fn choice(&self, volumes: &[Volume], number: usize) -> Option<Choice> {
        let initrds = self.initrds.iter().filter(|path| !path.contains('$'));
        Some(Choice {
            kernel: locate(volumes, number, &self.linux)?,
            initrds: initrds
                .map(|path| locate(volumes, number, path))
                .collect::<Option<_>>()?,
            options: without_variables(&self.options.join(" ")),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_parsed_and_ordered() {
        let text = "# c\ntitle Debian\nversion 6.1.0-9\nlinux\t/a/linux\ninitrd /a/initrd\ninitrd /b\n\
                    options root=UUID=1 ro\noptions quiet $kernelopts\n";
        let entry = Entry::parse("debian-6.1.0-9.conf", text).unwrap();
        assert_eq!(entry.initrds, ["/a/initrd", "/b"]);
        assert_eq!(entry.options, ["root=UUID=1 ro", "quiet $kernelopts"]);
        assert!(entry.is_named("debian-*") && entry.is_named("debian-6.1.0-9.conf"));
        assert!(!entry.is_named("debian"));
        let newer = Entry::parse("debian-6.1.0-10.conf", "version 6.1.0-10\nlinux /x").unwrap();
        assert_eq!(newer.order(&entry), Ordering::Less);
        assert!(Entry::parse("x.conf", "linux /x\narchitecture aa64").is_none());
        assert!(Entry::parse("x.conf", "efi /x.efi").is_none());
    }
}
