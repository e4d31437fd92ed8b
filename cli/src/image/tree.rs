//! A file system as a tree in memory, contents on the host's disk: read from a tar stream, changed, and written out again in an order
//! that depends on nothing but the names.

use anyhow::{Context, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    Directory,
    /// A regular file; its content is in this file of the host.
    File(PathBuf),
    Symlink(String),
    /// Another name of the file at this path.
    Hardlink(String),
    /// A device node: 'c' or 'b', major, minor.
    Device(char, u32, u32),
}

/// An entry of the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    pub uid: u64,
    pub gid: u64,
    /// Seconds since 1970.
    pub modified: u64,
    /// Extended attributes.
    pub attributes: BTreeMap<String, Vec<u8>>,
}

/// The tree; paths have no slash at either end.
pub struct Tree {
    nodes: BTreeMap<String, Node>,
    store: PathBuf,
    files: u64,
    /// No entry is younger.
    epoch: u64,
}

impl Tree {
    /// An empty tree that keeps contents in the directory `store`.
    pub fn new(store: &Path, epoch: u64) -> Tree {
        Tree {
            nodes: BTreeMap::new(),
            store: store.to_owned(),
            files: 0,
            epoch,
        }
    }

    /// Adds all that is in a tar stream.
    pub fn read(&mut self, from: impl Read) -> Result<()> {
        let mut archive = tar::Archive::new(from);
        for entry in archive.entries()? {
            self.add(entry?)?;
        }
        // What comes after the end, lest the writer dies of a closed pipe.
        io::copy(&mut archive.into_inner(), &mut io::sink())?;
        self.order_links();
        let paths = self.nodes.keys().filter_map(|path| path.rsplit_once('/'));
        let folders: BTreeSet<String> = paths.map(|(folder, _)| folder.to_owned()).collect();
        folders.iter().for_each(|folder| self.directory(folder));
        Ok(())
    }

    /// Of the names of a file, the first is the file and the others are links, whichever came first in the stream.
    fn order_links(&mut self) {
        let mut names: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (path, node) in &self.nodes {
            if let Kind::Hardlink(target) = &node.kind {
                names.entry(target.clone()).or_default().push(path.clone());
            }
        }
        for (target, mut paths) in names {
            let Some(node) = self.nodes.get(&target).cloned() else {
                continue;
            };
            paths.push(target);
            paths.sort();
            let first = paths.remove(0);
            for path in paths {
                let kind = Kind::Hardlink(first.clone());
                self.nodes.insert(
                    path,
                    Node {
                        kind,
                        ..node.clone()
                    },
                );
            }
            self.nodes.insert(first, node);
        }
    }

    fn add(&mut self, mut entry: tar::Entry<impl Read>) -> Result<()> {
        let path = clean(&entry.path()?.to_string_lossy());
        let attributes = attributes(&mut entry)?;
        let header = entry.header().clone();
        let target = || -> Result<String> {
            let name = entry.link_name()?.context("a link without a target")?;
            Ok(name.to_string_lossy().into_owned())
        };
        let device = |kind| -> Result<Kind> {
            let major = header.device_major()?.unwrap_or_default();
            Ok(Kind::Device(
                kind,
                major,
                header.device_minor()?.unwrap_or_default(),
            ))
        };
        let kind = match header.entry_type() {
            tar::EntryType::Directory => Kind::Directory,
            tar::EntryType::Symlink => Kind::Symlink(target()?),
            tar::EntryType::Link => Kind::Hardlink(clean(&target()?)),
            tar::EntryType::Char => device('c')?,
            tar::EntryType::Block => device('b')?,
            tar::EntryType::Regular | tar::EntryType::Continuous => {
                Kind::File(self.keep(&mut entry)?)
            }
            _ => return Ok(()),
        };
        let node = Node {
            kind,
            mode: header.mode()? & 0o7777,
            uid: header.uid()?,
            gid: header.gid()?,
            modified: header.mtime()?.min(self.epoch),
            attributes,
        };
        self.nodes.insert(path, node);
        Ok(())
    }

    fn keep(&mut self, mut content: impl Read) -> Result<PathBuf> {
        self.files += 1;
        let path = self.store.join(self.files.to_string());
        let mut file = File::create(&path).with_context(|| path.display().to_string())?;
        io::copy(&mut content, &mut file).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// Adds a directory and those above it, of root's.
    pub fn directory(&mut self, path: &str) {
        for (end, _) in path.match_indices('/').chain([(path.len(), "")]) {
            let epoch = self.epoch;
            let above = self.nodes.entry(path[..end].to_owned());
            above.or_insert_with(|| own(Kind::Directory, 0o755, epoch));
        }
    }

    /// Adds or replaces a file of root's.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let kind = Kind::File(self.keep(content)?);
        self.put(path, kind, mode);
        Ok(())
    }

    /// Adds or replaces a symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.put(path, Kind::Symlink(target.to_owned()), 0o777);
    }

    fn put(&mut self, path: &str, kind: Kind, mode: u32) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
        self.nodes
            .insert(path.to_owned(), own(kind, mode, self.epoch));
    }

    /// Takes out entries.
    pub fn remove(&mut self, unwanted: impl Fn(&str, &Node) -> bool) {
        self.nodes.retain(|path, node| !unwanted(path, node));
    }

    /// Sets the mode of an entry.
    pub fn set_mode(&mut self, path: &str, mode: u32) {
        if let Some(node) = self.nodes.get_mut(path) {
            node.mode = mode;
        }
    }

    /// The content of a file as text.
    pub fn text(&self, path: &str) -> Result<String> {
        match self.nodes.get(path).map(|node| &node.kind) {
            Some(Kind::File(content)) => Ok(std::fs::read_to_string(content)?),
            _ => anyhow::bail!("there is no file /{path} in the image"),
        }
    }

    /// All entries, directories before what is in them.
    pub fn entries(&self) -> impl Iterator<Item = (&str, &Node)> {
        let entries = self.nodes.iter().map(|(path, node)| (path.as_str(), node));
        entries.filter(|(path, _)| !path.is_empty())
    }

    /// The root directory, if it was given.
    pub fn root(&self) -> Option<&Node> {
        self.nodes.get("")
    }
}

fn own(kind: Kind, mode: u32, modified: u64) -> Node {
    Node {
        kind,
        mode,
        uid: 0,
        gid: 0,
        modified,
        attributes: BTreeMap::new(),
    }
}

fn clean(path: &str) -> String {
    let path = path.strip_prefix("./").unwrap_or(path).trim_matches('/');
    if path == "." {
        String::new()
    } else {
        path.to_owned()
    }
}

/// Extended attributes in the records of GNU tar.
fn attributes(entry: &mut tar::Entry<impl Read>) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut found = BTreeMap::new();
    for record in entry.pax_extensions()?.into_iter().flatten() {
        let record = record?;
        if let Some(name) = record.key()?.strip_prefix("SCHILY.xattr.") {
            found.insert(name.to_owned(), record.value_bytes().to_vec());
        }
    }
    Ok(found)
}
