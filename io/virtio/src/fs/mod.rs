//! The file system device (virtio 1.2, 5.11): a directory of the host, mounted in the guest by its tag.
//!
//! Messages of FUSE go through two queues: one of high priority, on which the guest forgets nodes, and one for requests. Each has a
//! thread. What would wait for the host's disk (a read that misses its cache, fsync) goes to a pool of a few threads. What the messages say is
//! the file server's business (`io/share`).

mod request;
mod serve;

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use doppel_seccomp::Kind;
use doppel_share::{Session, SessionState, Share};
use serde::{Deserialize, Serialize};

use crate::device::copy_config;
use crate::worker::Worker;
use crate::{Activation, DeviceState, Queue, VirtioDevice};

const QUEUE_SIZE: u16 = 512;
const REQUEST_QUEUES: u32 = 1;
/// Bytes of the tag in the configuration space.
const TAG_LEN: usize = 36;
const STATE_VERSION: u32 = 1;

/// What is saved of the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// 1.
    pub version: u32,
    /// What the guest's mount knows.
    pub session: SessionState,
}

/// The file system device.
pub struct Fs {
    share: Arc<Share>,
    /// From the first request on until a reset.
    session: Mutex<Option<Arc<Session>>>,
    worker: Option<Worker<Vec<Queue>>>,
}

impl Fs {
    /// A device for a directory.
    pub fn new(share: Arc<Share>) -> Self {
        Fs {
            share,
            session: Mutex::new(None),
            worker: None,
        }
    }

    fn session(&self) -> io::Result<Arc<Session>> {
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(session) = &*session {
            return Ok(session.clone());
        }
        let new = Arc::new(Session::new(self.share.clone())?);
        *session = Some(new.clone());
        Ok(new)
    }

    fn set_session(&mut self, to: Option<Session>) {
        let session = self.session.get_mut();
        *session.unwrap_or_else(PoisonError::into_inner) = to.map(Arc::new);
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u16 {
        virtio_bindings::virtio_ids::VIRTIO_ID_FS as u16
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 1 + REQUEST_QUEUES as usize]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = [0; TAG_LEN + 4];
        let tag = self.share.tag().bytes();
        bytes.iter_mut().zip(tag).for_each(|(to, byte)| *to = byte);
        bytes[TAG_LEN..].copy_from_slice(&REQUEST_QUEUES.to_le_bytes());
        copy_config(&bytes, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        let Activation {
            queues,
            ram,
            interrupt,
            ..
        } = activation;
        let session = self.session()?;
        let worker = Worker::start((Kind::Share, "virtio-fs"), interrupt, move |stop| {
            serve::serve(queues, &session, &ram, stop)
        })?;
        self.worker = Some(worker);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<Queue> {
        let queues = self.worker.take().and_then(Worker::stop);
        queues.unwrap_or_default()
    }

    fn reset(&mut self) {
        self.set_session(None);
    }

    fn save(&self) -> DeviceState {
        let session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let session = session.as_ref().map(|session| session.save());
        DeviceState::Fs(FsState {
            version: STATE_VERSION,
            session: session.unwrap_or_default(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> bool {
        let DeviceState::Fs(state) = state else {
            return false;
        };
        let session = Session::restore(self.share.clone(), &state.session);
        let restored = state.version == STATE_VERSION && session.is_some();
        self.set_session(session.filter(|_| restored));
        restored
    }
}
