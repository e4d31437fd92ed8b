//! From nodes to what is on the host: the only place where names are opened.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use fuse_abi::linux::FUSE_ROOT_ID;
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat, openat2, statx,
};
use rustix::io::Errno;

use crate::nodes::{Identity, Place};
use crate::session::Session;

/// Nodes above one without a descriptor, at most.
const DEPTH_MAX: usize = 4096;

fn asked() -> StatxFlags {
    StatxFlags::BASIC_STATS | StatxFlags::BTIME
}

impl Session {
    /// What is at a name of a directory; a symbolic link is not followed.
    pub(crate) fn stat_name(&self, parent: &OwnedFd, name: &CStr) -> Result<Statx, Errno> {
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
        statx(parent, name, flags, asked())
    }

    /// What a descriptor is.
    pub(crate) fn stat_descriptor(&self, of: impl AsFd) -> Result<Statx, Errno> {
        statx(of, c"", AtFlags::EMPTY_PATH, asked())
    }

    /// The attributes of a node.
    pub(crate) fn stat(&self, id: u64) -> Result<Statx, Errno> {
        if id == FUSE_ROOT_ID {
            return self.stat_descriptor(&self.share.root);
        }
        let (identity, place) = {
            let mut nodes = self.nodes();
            if let Some(descriptor) = nodes.descriptor(id) {
                drop(nodes);
                return self.stat_descriptor(&*descriptor);
            }
            let node = nodes.get(id)?;
            (node.identity, node.place.clone())
        };
        let found = self.stat_name(&*self.descriptor(place.parent)?, &place.name);
        found
            .ok()
            .filter(|found| Identity::of(found) == identity)
            .ok_or(Errno::STALE)
    }

    /// A descriptor (O_PATH) of a node.
    pub(crate) fn descriptor(&self, id: u64) -> Result<Arc<OwnedFd>, Errno> {
        let mut missing = Vec::new();
        let mut at = id;
        let mut descriptor = loop {
            if let Some(descriptor) = self.known_descriptor(at) {
                break descriptor;
            }
            let nodes = self.nodes();
            let node = nodes.get(at)?;
            missing.push((at, node.identity, node.place.clone()));
            at = node.place.parent;
            if missing.len() > DEPTH_MAX {
                return Err(Errno::STALE);
            }
        };
        for (id, identity, place) in missing.into_iter().rev() {
            descriptor = Arc::new(self.open_checked(&descriptor, &place.name, identity)?);
            self.nodes().keep(id, descriptor.clone());
        }
        Ok(descriptor)
    }

    fn known_descriptor(&self, id: u64) -> Option<Arc<OwnedFd>> {
        match id {
            FUSE_ROOT_ID => Some(self.root.clone()),
            _ => self.nodes().descriptor(id),
        }
    }

    /// Opens one component (O_PATH), if it is still who it was.
    fn open_checked(
        &self,
        parent: &OwnedFd,
        name: &CStr,
        identity: Identity,
    ) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let below = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        // A symbolic link itself can be opened by O_PATH, but not where none may be met.
        let opened = match identity.kind() {
            FileType::Symlink => openat(parent, name, flags, Mode::empty()),
            _ => openat2(parent, name, flags, Mode::empty(), below),
        };
        let opened = match opened {
            Err(Errno::NOENT | Errno::LOOP) => return Err(Errno::STALE),
            other => other?,
        };
        match Identity::of(&self.stat_descriptor(&opened)?) == identity {
            true => Ok(opened),
            false => Err(Errno::STALE),
        }
    }

    /// Opens a node's file for data: a regular file or a directory, nothing else.
    pub(crate) fn reopen(&self, node: &OwnedFd, flags: OFlags) -> Result<OwnedFd, Errno> {
        let kind = Identity::of(&self.stat_descriptor(node)?).kind();
        match kind {
            FileType::RegularFile | FileType::Directory => {}
            FileType::Symlink => return Err(Errno::LOOP),
            _ => return Err(Errno::ACCESS),
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        openat(&self.share.proc, link_of(node), flags, Mode::empty())
    }

    /// The guest asks what is at a name: its number, counted as a lookup, and its attributes.
    pub(crate) fn look_up(&self, parent: u64, name: &CStr) -> Result<(u64, Statx), Errno> {
        let directory = self.descriptor(parent)?;
        self.look_up_in(parent, &directory, name)
    }

    /// The same where the directory is open.
    pub(crate) fn look_up_in(
        &self,
        parent: u64,
        directory: &OwnedFd,
        name: &CStr,
    ) -> Result<(u64, Statx), Errno> {
        let found = self.stat_name(directory, name)?;
        let place = Place::new(parent, name);
        let id = self.nodes().found(Identity::of(&found), place)?;
        Ok((id, found))
    }
}

/// The name of a descriptor in `/proc/self/fd`.
pub(crate) fn link_of(descriptor: &OwnedFd) -> CString {
    let number = descriptor.as_raw_fd().to_string();
    CString::new(number).unwrap_or_default()
}
