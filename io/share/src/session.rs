//! A session: what one mount of a share knows, and what becomes of each of its requests.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use fuse_abi::linux::{
    self as fuse, fuse_batch_forget_in, fuse_forget_in, fuse_forget_one, fuse_init_in,
    fuse_init_out,
};
use rustix::fs::{AtFlags, Statx};
use rustix::io::Errno;

use crate::handles::{Handles, Open};
use crate::message::{Answer, Arguments, Call, opcode};
use crate::nodes::Nodes;
use crate::share::Share;

/// Bytes that one request reads or writes at most.
pub const TRANSFER_MAX: usize = 1 << 20;
/// The oldest protocol that is spoken: that of Linux 5.4, the first with virtio-fs.
const MINOR_MIN: u32 = 31;
/// Requests that the guest's kernel has under way in the background, and from when on it holds back.
const BACKGROUND: (u16, u16) = (64, 48);
/// What the protocol leaves open and is done here.
const OFFERED: u32 = fuse::FUSE_ASYNC_READ
    | fuse::FUSE_BIG_WRITES
    | fuse::FUSE_ATOMIC_O_TRUNC
    | fuse::FUSE_AUTO_INVAL_DATA
    | fuse::FUSE_DO_READDIRPLUS
    | fuse::FUSE_READDIRPLUS_AUTO
    | fuse::FUSE_ASYNC_DIO
    | fuse::FUSE_PARALLEL_DIROPS
    | fuse::FUSE_MAX_PAGES;
/// Devices whose inode numbers are told apart.
const DEVICES_MAX: usize = 0x1_0000;

/// What one mount of a share knows. Requests may come from several threads.
pub struct Session {
    pub(crate) share: Arc<Share>,
    pub(crate) root: Arc<OwnedFd>,
    nodes: Mutex<Nodes>,
    handles: Mutex<Handles>,
    devices: Mutex<Vec<(u32, u32)>>,
    pub(crate) started: AtomicBool,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Session {
    /// A session before its INIT.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new(share: Arc<Share>) -> std::io::Result<Self> {
        Ok(Session {
            root: Arc::new(share.root.try_clone()?),
            nodes: Mutex::new(Nodes::new(share.limits)),
            handles: Mutex::new(Handles::new(share.limits.open)),
            devices: Mutex::default(),
            started: AtomicBool::new(false),
            share,
        })
    }

    pub(crate) fn nodes(&self) -> MutexGuard<'_, Nodes> {
        locked(&self.nodes)
    }

    pub(crate) fn handles(&self) -> MutexGuard<'_, Handles> {
        locked(&self.handles)
    }

    /// Nodes that the guest knows, and handles that it has.
    pub fn counts(&self) -> (usize, usize) {
        (self.nodes().len(), self.handles().iter().count())
    }

    /// Whether the guest may change anything.
    pub(crate) fn may_change(&self) -> Result<(), Errno> {
        match self.share.read_only {
            true => Err(Errno::ROFS),
            false => Ok(()),
        }
    }

    /// Gives a handle a number, and keeps its node while it lives.
    pub(crate) fn add_handle(&self, open: Open, node: Arc<OwnedFd>) -> Result<u64, Errno> {
        let id = open.node;
        let number = self.handles().add(open)?;
        self.nodes().opened(id, node);
        Ok(number)
    }

    /// Inode numbers of different devices are told apart by their upper bits.
    pub(crate) fn inode_number(&self, found: &Statx) -> u64 {
        let device = (found.stx_dev_major, found.stx_dev_minor);
        let mut devices = locked(&self.devices);
        let n = devices.iter().position(|known| *known == device);
        let n = n.unwrap_or_else(|| {
            if devices.len() < DEVICES_MAX {
                devices.push(device);
            }
            devices.len() - 1
        });
        found.stx_ino ^ (n as u64) << 48
    }

    /// Carries out a request.
    pub fn call(&self, call: &Call) -> Result<Answer, Errno> {
        use opcode as op;
        match call.header.opcode {
            op::INIT => return self.init(call),
            op::INTERRUPT => return Answer::done(),
            _ if !self.started.load(Ordering::Acquire) => return Err(Errno::IO),
            _ => {}
        }
        match call.header.opcode {
            op::FSYNC | op::FSYNCDIR | op::SYNCFS | op::FALLOCATE | op::COPY_FILE_RANGE
                if !call.may_wait =>
            {
                Ok(Answer::Later)
            }
            op::LOOKUP => self.lookup(call),
            op::FORGET => self.forget(call),
            op::BATCH_FORGET => self.batch_forget(call),
            op::GETATTR => self.getattr(call),
            op::SETATTR => self.setattr(call),
            op::READLINK => self.readlink(call),
            op::SYMLINK => self.symlink(call),
            op::MKNOD => self.mknod(call),
            op::MKDIR => self.mkdir(call),
            op::UNLINK => self.unlink(call, AtFlags::empty()),
            op::RMDIR => self.unlink(call, AtFlags::REMOVEDIR),
            op::RENAME => self.rename(call),
            op::RENAME2 => self.rename2(call),
            op::LINK => self.link(call),
            op::OPEN => self.open(call),
            op::CREATE => self.create(call),
            op::READ => self.read(call),
            op::WRITE => self.write(call),
            op::STATFS => self.statfs(),
            op::RELEASE | op::RELEASEDIR => self.release(call),
            op::FSYNC => self.fsync(call, false),
            op::FSYNCDIR => self.fsync(call, true),
            op::SYNCFS => self.syncfs(),
            op::FLUSH => Answer::done(),
            op::OPENDIR => self.opendir(call),
            op::READDIR => self.readdir(call, false),
            op::READDIRPLUS => self.readdir(call, true),
            op::FALLOCATE => self.fallocate(call),
            op::LSEEK => self.lseek(call),
            op::COPY_FILE_RANGE => self.copy(call),
            op::DESTROY => {
                self.end();
                Answer::done()
            }
            _ => Err(Errno::NOSYS),
        }
    }

    fn init(&self, call: &Call) -> Result<Answer, Errno> {
        let wanted: fuse_init_in = {
            // Older kernels end the structure earlier.
            let mut bytes = [0; size_of::<fuse_init_in>()];
            let len = call.arguments.len().min(bytes.len());
            bytes[..len].copy_from_slice(&call.arguments[..len]);
            Arguments(&bytes).take()?
        };
        let spoken = fuse::FUSE_KERNEL_VERSION;
        let mut answer = fuse_init_out {
            major: spoken,
            minor: fuse::FUSE_KERNEL_MINOR_VERSION,
            ..fuse_init_out::default()
        };
        if wanted.major < spoken || wanted.major == spoken && wanted.minor < MINOR_MIN {
            return Err(Errno::PROTO);
        }
        // A newer major version hears which one is spoken, and asks again.
        if wanted.major == spoken {
            self.end();
            answer.max_readahead = wanted.max_readahead.min(TRANSFER_MAX as u32);
            answer.flags = wanted.flags & OFFERED;
            (answer.max_background, answer.congestion_threshold) = BACKGROUND;
            answer.max_write = TRANSFER_MAX as u32;
            answer.max_pages = (TRANSFER_MAX >> 12) as u16;
            answer.time_gran = 1;
            self.started.store(true, Ordering::Release);
        }
        Answer::of(&answer)
    }

    /// Forgets everything.
    fn end(&self) {
        self.started.store(false, Ordering::Release);
        *self.handles() = Handles::new(self.share.limits.open);
        *self.nodes() = Nodes::new(self.share.limits);
    }

    fn forget(&self, call: &Call) -> Result<Answer, Errno> {
        let wanted: fuse_forget_in = Arguments(call.arguments).take()?;
        self.nodes().forget(call.header.node, wanted.nlookup);
        Answer::done()
    }

    fn batch_forget(&self, call: &Call) -> Result<Answer, Errno> {
        let mut arguments = Arguments(call.arguments);
        let wanted: fuse_batch_forget_in = arguments.take()?;
        for _ in 0..wanted.count {
            let one: fuse_forget_one = arguments.take()?;
            self.nodes().forget(one.nodeid, one.nlookup);
        }
        Answer::done()
    }
}
