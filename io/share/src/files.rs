//! Open files: data goes between the host's file and guest RAM without a copy on the way.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;

use doppel_memory::{append_to_file, read_file_at, write_some_at};
use fuse_abi::linux::{
    FUSE_WRITE_CACHE, fuse_copy_file_range_in, fuse_create_in, fuse_fallocate_in, fuse_fsync_in,
    fuse_lseek_in, fuse_lseek_out, fuse_open_in, fuse_open_out, fuse_read_in, fuse_release_in,
    fuse_write_in, fuse_write_out,
};
use rustix::fs::{
    FallocateFlags, Mode, OFlags, SeekFrom, copy_file_range, fallocate, fdatasync, fsync, openat,
    seek, syncfs,
};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::attributes::MODE_MASK;
use crate::handles::Open;
use crate::message::{Answer, Arguments, Call};
use crate::nodes::Identity;
use crate::session::{Session, TRANSFER_MAX};

/// Bytes that one COPY_FILE_RANGE copies at most, so that none takes for ever.
const COPY_MAX: u64 = 16 << 20;
/// Of `fuse_fsync_in::fsync_flags`: data only.
const FDATASYNC: u32 = 1;

/// The flags of open(2) that a guest's count for. O_APPEND is seen to at each write, since pages that the guest writes back are
/// to go to their own place whoever opened the file.
fn flags_that_count(flags: u32) -> OFlags {
    let counted = OFlags::RWMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
    OFlags::from_bits_retain(flags) & counted
}

fn writes(flags: OFlags) -> bool {
    flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC)
}

fn errno(e: &io::Error) -> Errno {
    Errno::from_io_error(e).unwrap_or(Errno::INVAL)
}

impl Session {
    pub(crate) fn open(&self, call: &Call) -> Result<Answer, Errno> {
        let wanted: fuse_open_in = Arguments(call.arguments).take()?;
        let fh = self.open_node(call.header.node, wanted.flags)?;
        Answer::of(&open_out(fh))
    }

    /// Opens a regular file that the guest knows.
    pub(crate) fn open_node(&self, id: u64, flags: u32) -> Result<u64, Errno> {
        let counted = flags_that_count(flags);
        if writes(counted) {
            self.may_change()?;
        }
        if self.handles().is_full() {
            return Err(Errno::NFILE);
        }
        let node = self.descriptor(id)?;
        let descriptor = self.reopen(&node, counted)?;
        let open = Open {
            descriptor,
            node: id,
            directory: false,
            flags: (counted - OFlags::TRUNC).bits(),
            reading: Default::default(),
        };
        self.add_handle(open, node)
    }

    pub(crate) fn create(&self, call: &Call) -> Result<Answer, Errno> {
        self.may_change()?;
        let mut arguments = Arguments(call.arguments);
        let wanted: fuse_create_in = arguments.take()?;
        let name = arguments.name()?;
        if self.handles().is_full() {
            return Err(Errno::NFILE);
        }
        let exclusive = OFlags::from_bits_retain(wanted.flags).contains(OFlags::EXCL);
        let made = match self.make_file(call.header.node, name, &wanted) {
            // It is there already, so it is opened as what it is.
            Err(Errno::EXIST) if !exclusive => None,
            other => Some(other?),
        };
        let (id, found) = self.look_up(call.header.node, name)?;
        let opened = match made {
            Some(open) if open.0 == Identity::of(&found) => {
                let node = self.descriptor(id);
                node.and_then(|node| self.add_handle(Open { node: id, ..open.1 }, node))
            }
            _ => self.open_node(id, wanted.flags),
        };
        if opened.is_err() {
            self.nodes().forget(id, 1);
        }
        let mut answer = self.entry(id, &found).as_bytes().to_vec();
        answer.extend(open_out(opened?).as_bytes());
        Ok(Answer::Bytes(answer))
    }

    /// Makes a file that is not there yet; what it is, and open.
    fn make_file(
        &self,
        parent: u64,
        name: &CStr,
        wanted: &fuse_create_in,
    ) -> Result<(Identity, Open), Errno> {
        let directory = self.descriptor(parent)?;
        let counted = flags_that_count(wanted.flags) - OFlags::TRUNC;
        let flags = counted | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = wanted.mode & MODE_MASK;
        let descriptor = openat(&*directory, name, flags, Mode::from_raw_mode(mode))?;
        let found = self.stat_descriptor(&descriptor)?;
        if u32::from(found.stx_mode) & MODE_MASK != mode {
            self.set_mode(&descriptor, mode)?;
        }
        let open = Open {
            descriptor,
            node: 0,
            directory: false,
            flags: counted.bits(),
            reading: Default::default(),
        };
        Ok((Identity::of(&found), open))
    }

    pub(crate) fn read(&self, call: &Call) -> Result<Answer, Errno> {
        let wanted: fuse_read_in = Arguments(call.arguments).take()?;
        let open = self.handles().get(wanted.fh, false)?;
        let len = (wanted.size as usize).min(TRANSFER_MAX);
        let room = front(call.room, len);
        let file = open.descriptor.as_fd();
        match read_file_at(file, wanted.offset, &room, !call.may_wait) {
            Ok(n) => Ok(Answer::Data(n as usize)),
            Err(e) if !call.may_wait && e.kind() == io::ErrorKind::WouldBlock => Ok(Answer::Later),
            // A file system that cannot say whether it would wait.
            Err(e) if !call.may_wait && errno(&e) == Errno::OPNOTSUPP => Ok(Answer::Later),
            Err(e) => Err(errno(&e)),
        }
    }

    pub(crate) fn write(&self, call: &Call) -> Result<Answer, Errno> {
        let wanted: fuse_write_in = Arguments(call.arguments).take()?;
        let open = self.handles().get(wanted.fh, false)?;
        let len = wanted.size as usize;
        let data = front(call.data, len);
        if len > TRANSFER_MAX || data.iter().map(|s| s.len()).sum::<usize>() != len {
            return Err(Errno::INVAL);
        }
        let file = open.descriptor.as_fd();
        let appends = OFlags::from_bits_retain(wanted.flags).contains(OFlags::APPEND);
        let written = match appends && wanted.write_flags & FUSE_WRITE_CACHE == 0 {
            true => append_to_file(file, &data),
            false => write_some_at(file, wanted.offset, &data),
        };
        Answer::of(&fuse_write_out {
            size: written.map_err(|e| errno(&e))? as u32,
            padding: 0,
        })
    }

    pub(crate) fn release(&self, call: &Call) -> Result<Answer, Errno> {
        let wanted: fuse_release_in = Arguments(call.arguments).take()?;
        let node = self.handles().remove(wanted.fh)?;
        self.nodes().closed(node);
        Answer::done()
    }

    pub(crate) fn fsync(&self, call: &Call, directory: bool) -> Result<Answer, Errno> {
        let wanted: fuse_fsync_in = Arguments(call.arguments).take()?;
        let open = self.handles().get(wanted.fh, directory)?;
        match wanted.fsync_flags & FDATASYNC != 0 {
            true => fdatasync(&open.descriptor)?,
            false => fsync(&open.descriptor)?,
        }
        Answer::done()
    }

    pub(crate) fn syncfs(&self) -> Result<Answer, Errno> {
        // The root is open by name only, which syncfs(2) does not take.
        syncfs(self.reopen(&self.share.root, OFlags::RDONLY | OFlags::DIRECTORY)?)?;
        Answer::done()
    }

    pub(crate) fn fallocate(&self, call: &Call) -> Result<Answer, Errno> {
        self.may_change()?;
        let wanted: fuse_fallocate_in = Arguments(call.arguments).take()?;
        let open = self.handles().get(wanted.fh, false)?;
        let mode = FallocateFlags::from_bits_retain(wanted.mode);
        fallocate(&open.descriptor, mode, wanted.offset, wanted.length)?;
        Answer::done()
    }

    pub(crate) fn lseek(&self, call: &Call) -> Result<Answer, Errno> {
        const SEEK_DATA: u32 = 3;
        const SEEK_HOLE: u32 = 4;
        let wanted: fuse_lseek_in = Arguments(call.arguments).take()?;
        let open = self.handles().get(wanted.fh, false)?;
        let to = match wanted.whence {
            SEEK_DATA => SeekFrom::Data(wanted.offset),
            SEEK_HOLE => SeekFrom::Hole(wanted.offset),
            _ => return Err(Errno::INVAL),
        };
        let offset = seek(&open.descriptor, to)?;
        Answer::of(&fuse_lseek_out { offset })
    }

    pub(crate) fn copy(&self, call: &Call) -> Result<Answer, Errno> {
        self.may_change()?;
        let wanted: fuse_copy_file_range_in = Arguments(call.arguments).take()?;
        let (from, to) = {
            let handles = self.handles();
            (
                handles.get(wanted.fh_in, false)?,
                handles.get(wanted.fh_out, false)?,
            )
        };
        let (mut at, mut onto) = (wanted.off_in, wanted.off_out);
        let len = wanted.len.min(COPY_MAX) as usize;
        let (from, to) = (&from.descriptor, &to.descriptor);
        let copied = copy_file_range(from, Some(&mut at), to, Some(&mut onto), len)?;
        Answer::of(&fuse_write_out {
            size: copied as u32,
            padding: 0,
        })
    }
}

fn open_out(fh: u64) -> fuse_open_out {
    fuse_open_out {
        fh,
        open_flags: 0,
        backing_id: 0,
    }
}

/// The first `len` bytes of pieces, or all.
fn front<'r>(
    pieces: &[doppel_memory::GuestSlice<'r>],
    mut len: usize,
) -> Vec<doppel_memory::GuestSlice<'r>> {
    let mut taken = Vec::new();
    for piece in pieces {
        let now = piece.len().min(len);
        if now == 0 {
            continue;
        }
        taken.extend(piece.subslice(0, now).ok());
        len -= now;
    }
    taken
}
