//! File systems that a kernel may lie on: ext2 to ext4 ([`ext4`]) and FAT ([`fat`]), read only. Others are told by name.

mod ext4;
mod fat;

use std::io;

use crate::BootDiskError;
use crate::partition::Partition;
use crate::reader::Reader;

/// Names in a directory that are looked at.
const NAMES_MAX: usize = 10_000;
/// Bytes of a configuration file.
const TEXT_MAX: u64 = 1 << 20;

/// What can be done with a file system. Paths are absolute and use `/`.
pub trait FileSystem {
    /// Names in a directory, without `.` and `..`, at most so many.
    fn list(&self, path: &str, most: usize) -> io::Result<Vec<String>>;
    /// The content of a regular file, symbolic links followed; an error where it is longer than `limit` bytes.
    fn read(&self, path: &str, limit: u64) -> io::Result<Vec<u8>>;
    /// Whether there is anything at a path.
    fn exists(&self, path: &str) -> bool;
    /// As `root=UUID=` takes it.
    fn uuid(&self) -> String;
    /// For messages.
    fn kind(&self) -> &'static str;
}

/// A partition and what is on it.
pub struct Volume {
    /// Where it is.
    pub partition: Partition,
    content: Content,
}

enum Content {
    Readable(Box<dyn FileSystem>),
    Other(String),
}

/// What other file systems begin with: offset, bytes, name.
const OTHERS: &[(u64, &[u8], &str)] = &[
    (0, b"XFSB", "xfs, which cannot be read"),
    (0x10040, b"_BHRfS_M", "btrfs, which cannot be read"),
    (0, b"LUKS\xba\xbe", "an encrypted volume (LUKS)"),
    (512, b"LABELONE", "an LVM volume, which cannot be read"),
    (0x1000 - 10, b"SWAPSPACE2", "swap space"),
    (3, b"NTFS", "NTFS"),
    (0x400, b"\x10\x20\xf5\xf2", "f2fs, which cannot be read"),
    (0, b"hsqs", "squashfs, which cannot be read"),
    (0x8001, b"CD001", "a CD image, which cannot be read"),
];

impl Volume {
    /// Looks at what is on a partition.
    pub fn open(reader: &Reader, partition: Partition) -> Volume {
        let content = content(reader, &partition);
        Volume { partition, content }
    }

    /// The file system, if it can be read.
    pub fn files(&self) -> Option<&dyn FileSystem> {
        match &self.content {
            Content::Readable(files) => Some(&**files),
            Content::Other(_) => None,
        }
    }

    /// For messages.
    pub fn describe(&self) -> String {
        let what = match &self.content {
            Content::Readable(files) => format!("{} without a kernel", files.kind()),
            Content::Other(name) => name.clone(),
        };
        format!("{} ({what})", self.partition.name())
    }

    /// A text file, if it is there, is one, and is not too long.
    pub fn text(&self, path: &str) -> Option<String> {
        let bytes = self.files()?.read(path, TEXT_MAX).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Names in a directory, sorted; none where there is no such directory.
    pub fn list(&self, path: &str) -> Vec<String> {
        let found = self.files().map(|files| files.list(path, NAMES_MAX));
        let mut names = found.and_then(Result::ok).unwrap_or_default();
        names.sort();
        names
    }

    /// Whether there is anything at a path.
    pub fn exists(&self, path: &str) -> bool {
        self.files().is_some_and(|files| files.exists(path))
    }

    /// A file that is needed.
    pub fn load(&self, path: &str, limit: u64) -> Result<Vec<u8>, BootDiskError> {
        let result = match &self.content {
            Content::Readable(files) => files.read(path, limit),
            Content::Other(name) => Err(io::Error::other(name.clone())),
        };
        result.map_err(|error| BootDiskError::File {
            place: self.place(path),
            what: error.to_string(),
        })
    }

    /// A path for messages.
    pub fn place(&self, path: &str) -> String {
        format!("{}: {path}", self.partition.name())
    }
}

fn content(reader: &Reader, partition: &Partition) -> Content {
    match ext4::Ext4::open(reader, partition) {
        Some(Ok(files)) => return Content::Readable(Box::new(files)),
        Some(Err(error)) => return Content::Other(format!("ext4, {error}")),
        None => {}
    }
    match fat::Fat::open(reader, partition) {
        Some(Ok(files)) => return Content::Readable(Box::new(files)),
        Some(Err(error)) => return Content::Other(format!("FAT, {error}")),
        None => {}
    }
    let found = OTHERS.iter().find(|(offset, magic, _)| {
        let mut bytes = vec![0; magic.len()];
        let at = partition.start + offset;
        reader.read(at, &mut bytes).is_ok() && bytes == *magic
    });
    let name = found.map_or("nothing that is known", |(_, _, name)| *name);
    Content::Other(name.to_owned())
}

/// The error for a file that is longer than may be.
fn too_long(len: u64, limit: u64) -> io::Error {
    let mib = |n: u64| n.div_ceil(1 << 20);
    io::Error::other(format!(
        "it has {} MiB, and there is room for {}; give the guest more --memory",
        mib(len),
        mib(limit)
    ))
}
