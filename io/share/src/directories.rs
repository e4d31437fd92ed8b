//! Reading directories.

use std::mem::MaybeUninit;

use fuse_abi::linux::{FUSE_ROOT_ID, fuse_entry_out, fuse_open_out, fuse_read_in};
use rustix::fs::{FileType, OFlags, RawDir, RawDirEntry, SeekFrom, seek};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::handles::Open;
use crate::message::{Answer, Arguments, Call};
use crate::session::Session;

/// Bytes of `fuse_dirent` before the name.
const DIRENT_LEN: usize = 24;
/// Bytes that are asked of the host at a time, at least: an entry of any length fits.
const BUFFER_MIN: usize = 1024;
const BUFFER_MAX: usize = 64 << 10;

impl Session {
    pub(crate) fn opendir(&self, call: &Call) -> Result<Answer, Errno> {
        let node = self.descriptor(call.header.node)?;
        let descriptor = self.reopen(&node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let open = Open {
            descriptor,
            node: call.header.node,
            directory: true,
            flags: 0,
            reading: Default::default(),
        };
        let fh = self.add_handle(open, node)?;
        Answer::of(&fuse_open_out {
            fh,
            open_flags: 0,
            backing_id: 0,
        })
    }

    pub(crate) fn readdir(&self, call: &Call, plus: bool) -> Result<Answer, Errno> {
        let wanted: fuse_read_in = Arguments(call.arguments).take()?;
        let open = self.handles().get(wanted.fh, true)?;
        let room = call.room_len().min(wanted.size as usize);
        let _reading = open.reading.lock();
        seek(&open.descriptor, SeekFrom::Start(wanted.offset))?;
        // With attributes an entry takes about four times as much as the host's.
        let len = if plus { room / 4 } else { room };
        let mut buffer = vec![MaybeUninit::uninit(); len.clamp(BUFFER_MIN, BUFFER_MAX)];
        let mut entries = RawDir::new(&open.descriptor, &mut buffer);
        let mut out = Vec::new();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let len = entry_len(&entry, plus);
            if out.len() + len > room {
                break;
            }
            self.put(&mut out, &open, &entry, plus);
            // One buffer of the host's is enough: the guest asks again.
            if entries.is_buffer_empty() {
                break;
            }
        }
        Ok(Answer::Bytes(out))
    }

    fn put(&self, out: &mut Vec<u8>, directory: &Open, entry: &RawDirEntry<'_>, plus: bool) {
        let name = entry.file_name();
        let dots = matches!(name.to_bytes(), b"." | b"..");
        let mut inode = entry.ino();
        if dots && directory.node == FUSE_ROOT_ID {
            // What is above the share is nothing to the guest.
            let root = self.stat_descriptor(&self.share.root);
            inode = root.map_or(inode, |root| root.stx_ino);
        }
        if plus {
            let found = (!dots)
                .then(|| {
                    self.look_up_in(directory.node, &directory.descriptor, name)
                        .ok()
                })
                .flatten();
            // An entry with node 0 says nothing but that it is there.
            let found = found.map(|(id, found)| self.entry(id, &found));
            inode = found.map_or(inode, |found| found.attr.ino);
            out.extend(found.unwrap_or(nothing()).as_bytes());
        }
        out.extend(inode.to_le_bytes());
        out.extend(entry.next_entry_cookie().to_le_bytes());
        out.extend((name.count_bytes() as u32).to_le_bytes());
        out.extend(kind_number(entry.file_type()).to_le_bytes());
        out.extend(name.to_bytes());
        out.resize(out.len().next_multiple_of(8), 0);
    }
}

fn nothing() -> fuse_entry_out {
    fuse_entry_out::default()
}

fn entry_len(entry: &RawDirEntry<'_>, plus: bool) -> usize {
    let name = entry.file_name().count_bytes();
    let more = if plus { size_of::<fuse_entry_out>() } else { 0 };
    more + (DIRENT_LEN + name).next_multiple_of(8)
}

/// DT_* of Linux.
fn kind_number(kind: FileType) -> u32 {
    match kind {
        FileType::Unknown => 0,
        kind => kind.as_raw_mode() >> 12,
    }
}
