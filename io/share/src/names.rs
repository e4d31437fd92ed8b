//! Names: what makes, moves and removes entries of directories.

use std::ffi::CStr;

use fuse_abi::linux::{
    fuse_link_in, fuse_mkdir_in, fuse_mknod_in, fuse_rename_in, fuse_rename2_in,
};
use rustix::fs::{
    AtFlags, FileType, Mode, RenameFlags, linkat, mkdirat, mknodat, readlinkat, renameat_with,
    symlinkat, unlinkat,
};
use rustix::io::Errno;

use crate::attributes::MODE_MASK;
use crate::message::{Answer, Arguments, Call};
use crate::nodes::{Identity, Place};
use crate::session::Session;
use crate::tree::link_of;

impl Session {
    pub(crate) fn lookup(&self, call: &Call) -> Result<Answer, Errno> {
        let name = Arguments(call.arguments).name()?;
        let (id, found) = self.look_up(call.header.node, name)?;
        Answer::of(&self.entry(id, &found))
    }

    /// The answer to what made a name: the node there, with the mode that was wanted whatever the monitor's umask is.
    fn made(&self, parent: u64, name: &CStr, mode: Option<u32>) -> Result<Answer, Errno> {
        let (id, mut found) = self.look_up(parent, name)?;
        if let Some(mode) = mode
            && u32::from(found.stx_mode) & MODE_MASK != mode & MODE_MASK
        {
            let fixed = self.fix_mode(id, mode);
            if let Err(errno) = fixed {
                self.nodes().forget(id, 1);
                return Err(errno);
            }
            found = self.stat(id)?;
        }
        Answer::of(&self.entry(id, &found))
    }

    fn fix_mode(&self, id: u64, mode: u32) -> Result<(), Errno> {
        let node = self.descriptor(id)?;
        self.set_mode(&node, mode)
    }

    pub(crate) fn mknod(&self, call: &Call) -> Result<Answer, Errno> {
        self.may_change()?;
        let mut arguments = Arguments(call.arguments);
        let wanted: fuse_mknod_in = arguments.take()?;
        let name = arguments.name()?;
        let kind = FileType::from_raw_mode(wanted.mode);
        match kind {
            FileType::RegularFile | FileType::Fifo | FileType::Socket => {}
            _ => return Err(Errno::PERM),
        }
        let parent = self.descriptor(call.header.node)?;
        let mode = Mode::from_raw_mode(wanted.mode & MODE_MASK);
        mknodat(&*parent, name, kind, mode, 0)?;
        self.made(call.header.node, name, Some(wanted.mode))
    }

    pub(crate) fn mkdir(&self, call: &Call) -> Result<Answer, Errno> {
        self.may_change()?;
        let mut arguments = Arguments(call.arguments);
        let wanted: fuse_mkdir_in = arguments.take()?;
        let name = arguments.name()?;
        let parent = self.descriptor(call.header.node)?;
        mkdirat(&*parent, name, Mode::from_raw_mode(wanted.mode & MODE_MASK))?;
        self.made(call.header.node, name, Some(wanted.mode))
    }

    pub(crate) fn symlink(&self, call: &Call) -> Result<Answer, Errno> {
        self.may_change()?;
        let mut arguments = Arguments(call.arguments);
        let (name, content) = (arguments.name()?, arguments.link()?);
        let parent = self.descriptor(call.header.node)?;
        symlinkat(content, &*parent, name)?;
        self.made(call.header.node, name, None)
    }

    pub(crate) fn link(&self, call: &Call) -> Result<Answer, Errno> {
        self.may_change()?;
        let mut arguments = Arguments(call.arguments);
        let wanted: fuse_link_in = arguments.take()?;
        let name = arguments.name()?;
        let old = self.descriptor(wanted.oldnodeid)?;
        let parent = self.descriptor(call.header.node)?;
        let (proc, link) = (&self.share.proc, link_of(&old));
        // What is followed is the entry of /proc/self/fd, which leads to the node itself.
        linkat(proc, link, &*parent, name, AtFlags::SYMLINK_FOLLOW)?;
        self.made(call.header.node, name, None)
    }

    pub(crate) fn readlink(&self, call: &Call) -> Result<Answer, Errno> {
        let node = self.descriptor(call.header.node)?;
        let content = readlinkat(&*node, c"", Vec::new())?;
        Ok(Answer::Bytes(content.into_bytes()))
    }

    pub(crate) fn unlink(&self, call: &Call, flags: AtFlags) -> Result<Answer, Errno> {
        self.may_change()?;
        let name = Arguments(call.arguments).name()?;
        let parent = self.descriptor(call.header.node)?;
        unlinkat(&*parent, name, flags)?;
        Answer::done()
    }

    pub(crate) fn rename(&self, call: &Call) -> Result<Answer, Errno> {
        let mut arguments = Arguments(call.arguments);
        let wanted: fuse_rename_in = arguments.take()?;
        self.rename_to(call.header.node, wanted.newdir, 0, arguments)
    }

    pub(crate) fn rename2(&self, call: &Call) -> Result<Answer, Errno> {
        let mut arguments = Arguments(call.arguments);
        let wanted: fuse_rename2_in = arguments.take()?;
        self.rename_to(call.header.node, wanted.newdir, wanted.flags, arguments)
    }

    fn rename_to(
        &self,
        from: u64,
        to: u64,
        flags: u32,
        mut names: Arguments<'_>,
    ) -> Result<Answer, Errno> {
        self.may_change()?;
        let (old, new) = (names.name()?, names.name()?);
        let flags = RenameFlags::from_bits_retain(flags);
        if !(RenameFlags::NOREPLACE | RenameFlags::EXCHANGE).contains(flags) {
            return Err(Errno::INVAL);
        }
        let (source, target) = (self.descriptor(from)?, self.descriptor(to)?);
        renameat_with(&*source, old, &*target, new, flags)?;
        self.note_place(to, new)?;
        if flags.contains(RenameFlags::EXCHANGE) {
            self.note_place(from, old)?;
        }
        Answer::done()
    }

    /// Remembers who is at a name now.
    fn note_place(&self, parent: u64, name: &CStr) -> Result<(), Errno> {
        let directory = self.descriptor(parent)?;
        if let Ok(found) = self.stat_name(&directory, name) {
            let place = Place::new(parent, name);
            self.nodes().moved(Identity::of(&found), place);
        }
        Ok(())
    }
}
