//! The "newc" cpio format, which the Linux kernel unpacks as its initial root file system.
//!
//! Layout (Linux `Documentation/driver-api/early-userspace/buffer-format.rst`): each member is a header of ASCII
//! hexadecimal fields, its name and its data, the latter two padded to 4 bytes; a member called `TRAILER!!!` ends the
//! archive. Archives may follow one another in one initrd; a later member replaces an earlier one of the same name.
//! No member needs a privilege to be written, device nodes included: they are only headers here.

use std::collections::BTreeSet;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;
/// The modification time of every member, so that the same input gives the same archive: the beginning of the year 2000. Some programs refuse
/// files from before 1980, which ZIP archives cannot have.
const TIME: u32 = 946_684_800;
const TRAILER: &str = "TRAILER!!!";

/// An archive being written. Parent directories are added as they are needed.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    members: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// An empty archive.
    pub fn new() -> Archive {
        Archive::default()
    }

    /// Adds a directory, and those above it, with mode 0755.
    pub fn directory(&mut self, path: &str) {
        let path = path.trim_matches('/');
        if path.is_empty() || !self.directories.insert(path.to_owned()) {
            return;
        }
        self.parents(path);
        self.member(path, DIRECTORY | 0o755, (0, 0), &[]);
    }

    /// Adds a regular file with the permission bits `mode`.
    pub fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.parents(path);
        self.member(path, REGULAR | mode, (0, 0), content);
    }

    /// Adds a symbolic link to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.member(path, SYMLINK | 0o777, (0, 0), target.as_bytes());
    }

    /// Adds a character device node.
    pub fn character_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.parents(path);
        self.member(path, CHARACTER_DEVICE | mode, (major, minor), &[]);
    }

    /// The finished archive, padded so that another may follow it.
    pub fn finish(mut self) -> Vec<u8> {
        self.member(TRAILER, 0, (0, 0), &[]);
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.trim_matches('/').rsplit_once('/') {
            self.directory(parent);
        }
    }

    fn member(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        let name = path.trim_matches('/');
        self.members += 1;
        let links = if mode & DIRECTORY != 0 { 2 } else { 1 };
        let fields = [
            self.members,
            mode,
            0, // owner
            0, // group
            links,
            TIME,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0, // check sum: none in newc
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_is_a_header_a_name_and_data_each_padded_to_four_bytes() {
        let mut archive = Archive::new();
        archive.file("ab", 0o644, b"hello");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[6 + 8..6 + 16], b"000081A4", "mode");
        assert_eq!(&bytes[6 + 40..6 + 48], b"386D4380", "modification time");
        assert_eq!(&bytes[6 + 48..6 + 56], b"00000005", "file size");
        assert_eq!(
            &bytes[6 + 88..6 + 96],
            b"00000003",
            "name size counts the NUL"
        );
        assert_eq!(&bytes[110..116], b"ab\0\0\0\0");
        assert_eq!(&bytes[116..124], b"hello\0\0\0");
        assert_eq!(&bytes[124..130], b"070701", "the trailer follows");
        assert_eq!(bytes.len() % 512, 0);
    }

    #[test]
    fn parents_come_once_and_before_their_children() {
        let mut archive = Archive::new();
        archive.file("/usr/bin/a", 0o755, b"");
        archive.file("/usr/bin/b", 0o755, b"");
        let bytes = archive.finish();
        let text = String::from_utf8_lossy(&bytes);
        let names: Vec<&str> = ["usr\0", "usr/bin\0", "usr/bin/a\0", "usr/bin/b\0"].to_vec();
        let places: Vec<usize> = names.iter().map(|name| text.find(name).unwrap()).collect();
        assert!(places.is_sorted(), "{places:?}");
        assert_eq!(text.matches("usr/bin\0").count(), 1);
    }

    /// The format's own reader, where the host has one, finds what was written.
    #[test]
    fn the_hosts_cpio_or_busybox_reads_it_back() {
        use std::io::Write;
        use std::process::{Command, Stdio};
        let mut archive = Archive::new();
        archive.file("etc/greeting", 0o644, b"hello\n");
        archive.symlink("bin/sh", "busybox");
        archive.character_device("dev/console", 0o600, 5, 1);
        let Ok(mut child) = Command::new("cpio")
            .args(["-it", "--quiet"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            eprintln!("SKIPPED: no cpio on this host to read the archive with");
            return;
        };
        let bytes = archive.finish();
        child.stdin.take().unwrap().write_all(&bytes).unwrap();
        let output = child.wait_with_output().unwrap();
        let listed = String::from_utf8(output.stdout).unwrap();
        assert_eq!(
            listed.lines().collect::<Vec<_>>(),
            ["etc", "etc/greeting", "bin", "bin/sh", "dev", "dev/console"]
        );
    }
}
