//! A directory that is shared, and under what terms.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{CWD, Mode, OFlags, PROC_SUPER_MAGIC, fstatfs, openat};
use rustix::process::{Resource, getegid, geteuid, getrlimit};

/// Bytes of a tag at most (virtio 1.2, 5.11.4).
pub const TAG_MAX: usize = 36;

/// Why a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// It cannot be opened.
    #[error("--share: {0} cannot be shared: {1}; name a directory that you may read")]
    Directory(PathBuf, io::Error),
    /// There is no procfs.
    #[error("--share needs /proc/self/fd, to open files that it has found: {0}; mount /proc")]
    Proc(io::Error),
}

/// What is to be shared: `TAG=DIR[,ro][,owner=UID[:GID]]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareSpec {
    /// What the guest mounts it by, 1 to 36 bytes.
    pub tag: String,
    /// The directory.
    pub directory: PathBuf,
    /// The guest may not change anything.
    pub read_only: bool,
    /// Whom the guest sees as the owner of what belongs to the user who runs the monitor: uid and gid.
    pub owner: (u32, u32),
}

impl FromStr for ShareSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = "write TAG=DIR[,ro][,owner=UID[:GID]]";
        let (tag, mut directory) = text.split_once('=').ok_or(form)?;
        if !(1..=TAG_MAX).contains(&tag.len()) || tag.contains('\0') {
            return Err(format!("a tag has 1 to {TAG_MAX} bytes; {form}"));
        }
        let (mut read_only, mut owner) = (false, (0, 0));
        // A directory may have commas in its name, so options are taken off the end.
        while let Some((front, option)) = directory.rsplit_once(',') {
            match option.split_once('=') {
                None if option == "ro" => read_only = true,
                Some(("owner", ids)) => {
                    owner = parse_owner(ids).ok_or("an owner is UID or UID:GID, in numbers")?;
                }
                _ => break,
            }
            directory = front;
        }
        if directory.is_empty() {
            return Err(form.to_owned());
        }
        Ok(ShareSpec {
            tag: tag.to_owned(),
            directory: directory.into(),
            read_only,
            owner,
        })
    }
}

fn parse_owner(text: &str) -> Option<(u32, u32)> {
    let (user, group) = text.split_once(':').unwrap_or((text, text));
    Some((user.parse().ok()?, group.parse().ok()?))
}

/// How much a guest can have the monitor hold for a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Files and directories that are open at a time; more are ENFILE.
    pub open: usize,
    /// Descriptors that are kept for nodes that are not open. Beyond it they are closed and opened again when needed.
    pub descriptors: usize,
    /// Bytes of what is remembered of the nodes that the guest knows; more are ENOMEM.
    pub node_bytes: usize,
}

impl Limits {
    /// What fits into the descriptors that this process may have, `shares` of them sharing half of those.
    pub fn of_process(shares: usize) -> Self {
        let may = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
        let mine = usize::try_from(may).unwrap_or(usize::MAX) / 2 / shares.max(1);
        let descriptors = (mine / 4).clamp(16, 1024);
        Limits {
            // An open file has a descriptor for its node and one for its data.
            open: (mine.saturating_sub(descriptors) / 2).clamp(16, 65536),
            descriptors,
            node_bytes: 64 << 20,
        }
    }
}

/// A directory of the host that a guest may have.
pub struct Share {
    pub(crate) root: OwnedFd,
    /// `/proc/self/fd`.
    pub(crate) proc: OwnedFd,
    pub(crate) read_only: bool,
    pub(crate) owner: (u32, u32),
    /// Who runs the monitor.
    pub(crate) user: (u32, u32),
    pub(crate) limits: Limits,
    tag: String,
}

impl Share {
    /// Opens the directory.
    pub fn open(spec: &ShareSpec, limits: Limits) -> Result<Self, ShareError> {
        let directory = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            openat(CWD, path, flags, Mode::empty())
        };
        let root = directory(&spec.directory)
            .map_err(|e| ShareError::Directory(spec.directory.clone(), e.into()))?;
        let proc = directory(Path::new("/proc/self/fd")).and_then(|proc| {
            let is_proc = fstatfs(&proc)?.f_type == PROC_SUPER_MAGIC;
            is_proc.then_some(proc).ok_or(rustix::io::Errno::NOSYS)
        });
        Ok(Share {
            root,
            proc: proc.map_err(|e| ShareError::Proc(e.into()))?,
            read_only: spec.read_only,
            owner: spec.owner,
            user: (geteuid().as_raw(), getegid().as_raw()),
            limits,
            tag: spec.tag.clone(),
        })
    }

    /// What the guest mounts it by.
    pub fn tag(&self) -> &str {
        &self.tag
    }
}

impl fmt::Debug for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Share").field(&self.tag).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_written_with_its_tag_directory_and_options() {
        let spec = |text: &str| text.parse::<ShareSpec>().unwrap();
        let plain = spec("home=/a/b");
        assert_eq!(
            (plain.tag.as_str(), plain.read_only, plain.owner),
            ("home", false, (0, 0))
        );
        let all = spec("t=/a=b,c,owner=1000:100,ro");
        assert_eq!(all.directory, Path::new("/a=b,c"));
        assert_eq!((all.read_only, all.owner), (true, (1000, 100)));
        assert_eq!(spec("t=x,owner=7").owner, (7, 7));
        let long = format!("{}=/", "x".repeat(37));
        for bad in ["", "t", "t=", "=/x", "t=/x,owner=me", "t=,ro", &long] {
            assert!(bad.parse::<ShareSpec>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_no_directory_is_an_error_that_says_so() {
        let limits = Limits::of_process(1);
        for bad in ["t=/nowhere/at/all", "t=/etc/passwd"] {
            let error = Share::open(&bad.parse().unwrap(), limits).unwrap_err();
            assert!(error.to_string().contains("cannot be shared"), "{error}");
        }
    }
}
