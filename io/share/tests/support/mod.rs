//! A guest's kernel as the file server sees it: messages made by hand, one at a time.
#![allow(dead_code)]

use std::path::PathBuf;
use std::sync::Arc;

use doppel_memory::{GuestRam, GuestSlice};
use doppel_share::{Answer, Call, Header, Limits, Session, Share, opcode};
use fuse_abi::linux::{fuse_attr_out, fuse_mkdir_in, fuse_open_in, fuse_release_in, fuse_write_in};
use fuse_abi::linux::{fuse_create_in, fuse_entry_out, fuse_init_in, fuse_open_out, fuse_read_in};
use rustix::io::Errno;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub const ROOT: u64 = 1;
const DATA_AT: u64 = 0x1000;
const ROOM_AT: u64 = 0x40_0000;

/// A share in a folder of its own; beside it lies what the guest must not get.
pub struct Mount {
    pub session: Session,
    pub ram: GuestRam,
    pub folder: tempfile::TempDir,
}

pub const SMALL: Limits = Limits {
    open: 64,
    descriptors: 16,
    node_bytes: 1 << 20,
};

impl Mount {
    pub fn new(options: &str) -> Self {
        Self::with(options, SMALL)
    }

    pub fn with(options: &str, limits: Limits) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("share")).unwrap();
        std::fs::write(folder.path().join("secret"), "secret").unwrap();
        let spec = format!("t={}/share{options}", folder.path().display());
        let share = Share::open(&spec.parse().unwrap(), limits).unwrap();
        let mount = Mount {
            session: Session::new(Arc::new(share)).unwrap(),
            ram: GuestRam::new(8 << 20).unwrap(),
            folder,
        };
        mount.init();
        mount
    }

    pub fn share(&self) -> Arc<Share> {
        let spec = format!("t={}/share", self.folder.path().display());
        Arc::new(Share::open(&spec.parse().unwrap(), SMALL).unwrap())
    }

    fn init(&self) {
        let init = fuse_init_in {
            major: 7,
            minor: 37,
            max_readahead: 1 << 17,
            flags: u32::MAX,
            ..Default::default()
        };
        self.send(opcode::INIT, 0, init.as_bytes()).unwrap();
    }

    /// A path on the host: in the share, or with `..` beside it.
    pub fn host(&self, path: &str) -> PathBuf {
        self.folder.path().join("share").join(path)
    }

    fn slices(&self, at: u64, len: usize) -> Vec<GuestSlice<'_>> {
        vec![self.ram.view().get_slice(GuestAddress(at), len).unwrap()]
    }

    pub fn send(&self, opcode: u32, node: u64, arguments: &[u8]) -> Result<Vec<u8>, Errno> {
        self.send_with(opcode, node, arguments, &[], 64 << 10)
    }

    pub fn send_with(
        &self,
        opcode: u32,
        node: u64,
        arguments: &[u8],
        data: &[u8],
        room: usize,
    ) -> Result<Vec<u8>, Errno> {
        self.ram.write_from_device(DATA_AT, data);
        let call = Call {
            header: Header {
                opcode,
                unique: 1,
                node,
            },
            arguments,
            data: &self.slices(DATA_AT, data.len()),
            room: &self.slices(ROOM_AT, room),
            may_wait: true,
        };
        match self.session.call(&call)? {
            Answer::Bytes(bytes) => Ok(bytes),
            Answer::Data(len) => {
                let byte = |n| self.ram.load::<u8>(ROOM_AT + n).unwrap();
                Ok((0..len as u64).map(byte).collect())
            }
            Answer::Later => panic!("there was leave to wait"),
        }
    }

    pub fn lookup(&self, parent: u64, name: &str) -> Result<fuse_entry_out, Errno> {
        let answer = self.send(opcode::LOOKUP, parent, &text(name))?;
        Ok(read(&answer))
    }

    pub fn node(&self, parent: u64, name: &str) -> u64 {
        self.lookup(parent, name).unwrap().nodeid
    }

    pub fn getattr(&self, node: u64) -> Result<fuse_attr_out, Errno> {
        let answer = self.send(opcode::GETATTR, node, &[0; 16])?;
        Ok(read(&answer))
    }

    pub fn open(&self, node: u64, flags: i32) -> Result<u64, Errno> {
        let wanted = fuse_open_in {
            flags: flags as u32,
            open_flags: 0,
        };
        let answer = self.send(opcode::OPEN, node, wanted.as_bytes())?;
        Ok(read::<fuse_open_out>(&answer).fh)
    }

    pub fn release(&self, fh: u64) -> Result<Vec<u8>, Errno> {
        let wanted = fuse_release_in {
            fh,
            ..Default::default()
        };
        self.send(opcode::RELEASE, 0, wanted.as_bytes())
    }

    /// The node and the handle.
    pub fn create(&self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64), Errno> {
        let wanted = fuse_create_in {
            flags: 2,
            mode,
            umask: 0,
            open_flags: 0,
        };
        let answer = self.send(opcode::CREATE, parent, &with_text(&wanted, name))?;
        let (entry, open) = answer.split_at(size_of::<fuse_entry_out>());
        Ok((
            read::<fuse_entry_out>(entry).nodeid,
            read::<fuse_open_out>(open).fh,
        ))
    }

    pub fn mkdir(&self, parent: u64, name: &str, mode: u32) -> Result<u64, Errno> {
        let wanted = fuse_mkdir_in { mode, umask: 0 };
        let answer = self.send(opcode::MKDIR, parent, &with_text(&wanted, name))?;
        Ok(read::<fuse_entry_out>(&answer).nodeid)
    }

    pub fn write(&self, fh: u64, offset: u64, data: &[u8], flags: i32) -> Result<(), Errno> {
        let wanted = fuse_write_in {
            fh,
            offset,
            size: data.len() as u32,
            flags: flags as u32,
            ..Default::default()
        };
        let room = 8;
        let answer = self.send_with(opcode::WRITE, 0, wanted.as_bytes(), data, room)?;
        assert_eq!(answer[..4], (data.len() as u32).to_le_bytes());
        Ok(())
    }

    pub fn read(&self, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, Errno> {
        self.send_with(
            opcode::READ,
            0,
            read_in(fh, offset, size).as_bytes(),
            &[],
            size as usize,
        )
    }
}

pub fn read_in(fh: u64, offset: u64, size: u32) -> fuse_read_in {
    fuse_read_in {
        fh,
        offset,
        size,
        ..Default::default()
    }
}

pub fn read<T: FromBytes>(bytes: &[u8]) -> T {
    T::read_from_prefix(bytes).unwrap().0
}

pub fn text(name: &str) -> Vec<u8> {
    [name.as_bytes(), b"\0"].concat()
}

pub fn with_text(value: &(impl IntoBytes + Immutable), name: &str) -> Vec<u8> {
    [value.as_bytes(), &text(name)].concat()
}
