//! Attributes: what a guest sees of a file's owner, mode and times, and what it may change.
//!
//! Files belong to the user who runs the monitor, and are shown as those of the share's owner (root unless said otherwise); what belongs to
//! others is shown as nobody's. Set-user-ID and set-group-ID bits go neither way: on the host they would lend the user's rights to whoever runs
//! the file, in the guest root's.

use std::os::fd::OwnedFd;

use fuse_abi::linux::{
    FATTR_ATIME, FATTR_ATIME_NOW, FATTR_FH, FATTR_GID, FATTR_MODE, FATTR_MTIME, FATTR_MTIME_NOW,
    FATTR_SIZE, FATTR_UID, fuse_attr, fuse_attr_out, fuse_entry_out, fuse_kstatfs, fuse_setattr_in,
    fuse_statfs_out,
};
use rustix::fs::{
    AtFlags, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, chmodat, fstatvfs,
    ftruncate, utimensat,
};
use rustix::io::Errno;

use crate::message::{Answer, Arguments, Call};
use crate::session::Session;
use crate::tree::link_of;

/// The owner of what is not the user's.
const NOBODY: u32 = 65534;
/// The bits of a mode that pass: rwx and the sticky bit.
pub(crate) const MODE_MASK: u32 = 0o1777;
/// Seconds for which the guest need not ask again.
const VALID: u64 = 1;

impl Session {
    /// The attributes of a file as a guest sees them.
    pub(crate) fn attributes(&self, found: &Statx) -> fuse_attr {
        let shown = |id, user, owner| if id == user { owner } else { NOBODY };
        let (user, owner) = (self.share.user, self.share.owner);
        let seconds = |seconds: i64| seconds as u64;
        fuse_attr {
            ino: self.inode_number(found),
            size: found.stx_size,
            blocks: found.stx_blocks,
            atime: seconds(found.stx_atime.tv_sec),
            mtime: seconds(found.stx_mtime.tv_sec),
            ctime: seconds(found.stx_ctime.tv_sec),
            atimensec: found.stx_atime.tv_nsec,
            mtimensec: found.stx_mtime.tv_nsec,
            ctimensec: found.stx_ctime.tv_nsec,
            mode: u32::from(found.stx_mode) & (0o170_000 | MODE_MASK),
            nlink: found.stx_nlink,
            uid: shown(found.stx_uid, user.0, owner.0),
            gid: shown(found.stx_gid, user.1, owner.1),
            rdev: device_number(found.stx_rdev_major, found.stx_rdev_minor),
            blksize: found.stx_blksize,
            flags: 0,
        }
    }

    /// The answer to whatever finds or makes a node.
    pub(crate) fn entry(&self, id: u64, found: &Statx) -> fuse_entry_out {
        fuse_entry_out {
            nodeid: id,
            generation: 0,
            entry_valid: VALID,
            attr_valid: VALID,
            entry_valid_nsec: 0,
            attr_valid_nsec: 0,
            attr: self.attributes(found),
        }
    }

    fn attributes_out(&self, found: &Statx) -> Result<Answer, Errno> {
        Answer::of(&fuse_attr_out {
            attr_valid: VALID,
            attr_valid_nsec: 0,
            dummy: 0,
            attr: self.attributes(found),
        })
    }

    pub(crate) fn getattr(&self, call: &Call) -> Result<Answer, Errno> {
        self.attributes_out(&self.stat(call.header.node)?)
    }

    pub(crate) fn setattr(&self, call: &Call) -> Result<Answer, Errno> {
        self.may_change()?;
        let wanted: fuse_setattr_in = Arguments(call.arguments).take()?;
        let node = self.descriptor(call.header.node)?;
        let has = |bit| wanted.valid & bit != 0;
        if has(FATTR_UID | FATTR_GID) {
            let now = self.attributes(&self.stat_descriptor(&*node)?);
            let same = (!has(FATTR_UID) || wanted.uid == now.uid)
                && (!has(FATTR_GID) || wanted.gid == now.gid);
            if !same {
                return Err(Errno::PERM);
            }
        }
        if has(FATTR_MODE) {
            self.set_mode(&node, wanted.mode)?;
        }
        if has(FATTR_SIZE) {
            self.set_size(&node, &wanted)?;
        }
        if has(FATTR_ATIME | FATTR_MTIME) {
            let times = times(&wanted);
            utimensat(&*node, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        self.attributes_out(&self.stat_descriptor(&*node)?)
    }

    /// Sets the mode, but for the bits that do not pass.
    pub(crate) fn set_mode(&self, node: &OwnedFd, mode: u32) -> Result<(), Errno> {
        let mode = Mode::from_raw_mode(mode & MODE_MASK);
        chmodat(&self.share.proc, link_of(node), mode, AtFlags::empty())
    }

    fn set_size(&self, node: &OwnedFd, wanted: &fuse_setattr_in) -> Result<(), Errno> {
        if wanted.valid & FATTR_FH != 0 {
            let open = self.handles().get(wanted.fh, false)?;
            return ftruncate(&open.descriptor, wanted.size);
        }
        ftruncate(self.reopen(node, OFlags::WRONLY)?, wanted.size)
    }

    pub(crate) fn statfs(&self) -> Result<Answer, Errno> {
        let found = fstatvfs(&self.share.root)?;
        let cut = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        Answer::of(&fuse_statfs_out {
            st: fuse_kstatfs {
                blocks: found.f_blocks,
                bfree: found.f_bfree,
                bavail: found.f_bavail,
                files: found.f_files,
                ffree: found.f_ffree,
                bsize: cut(found.f_bsize),
                namelen: cut(found.f_namemax),
                frsize: cut(found.f_frsize),
                padding: 0,
                spare: [0; 6],
            },
        })
    }
}

fn times(wanted: &fuse_setattr_in) -> Timestamps {
    let time = |set: u32, now: u32, seconds: u64, nanoseconds: u32| {
        let tv_nsec = match wanted.valid {
            valid if valid & now != 0 => UTIME_NOW,
            valid if valid & set != 0 => nanoseconds.into(),
            _ => UTIME_OMIT,
        };
        Timespec {
            tv_sec: seconds as i64,
            tv_nsec,
        }
    };
    Timestamps {
        last_access: time(FATTR_ATIME, FATTR_ATIME_NOW, wanted.atime, wanted.atimensec),
        last_modification: time(FATTR_MTIME, FATTR_MTIME_NOW, wanted.mtime, wanted.mtimensec),
    }
}

/// `new_encode_dev` of Linux.
fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}
