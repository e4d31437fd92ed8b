//! What is saved of a session, as plain structs.
//!
//! Nodes are found again by their names, and refused where somebody else is there; files are opened again. What cannot be had any more is a
//! stale node or a bad handle to the guest, as with a file server that was restarted.

use std::ffi::CString;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuse_abi::linux::FUSE_ROOT_ID;
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::handles::Open;
use crate::message::is_component;
use crate::nodes::{Identity, Place};
use crate::session::Session;
use crate::share::Share;

/// A node that the guest knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeState {
    /// Its number, above 1.
    pub id: u64,
    /// The number of the directory that it was found in.
    pub parent: u64,
    /// Its name there.
    pub name: Vec<u8>,
    /// Who it is.
    pub identity: Identity,
    /// Lookups that were not forgotten.
    pub lookups: u64,
}

/// A handle that the guest has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HandleState {
    /// Its number.
    pub number: u64,
    /// The node that is open.
    pub node: u64,
    /// It is a directory.
    pub directory: bool,
    /// The flags of open(2) that it has.
    pub flags: u32,
}

/// A session, without what is on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    /// Its INIT was there.
    pub started: bool,
    /// In ascending order.
    pub nodes: Vec<NodeState>,
    /// In ascending order.
    pub handles: Vec<HandleState>,
}

/// Numbers from here on are in nobody's state.
const NUMBERS_MAX: u64 = 1 << 62;

impl Session {
    /// What there is to save.
    pub fn save(&self) -> SessionState {
        let mut nodes: Vec<_> = self
            .nodes()
            .iter()
            .map(|(id, node)| NodeState {
                id,
                parent: node.place.parent,
                name: node.place.name.to_bytes().to_vec(),
                identity: node.identity,
                lookups: node.lookups,
            })
            .collect();
        nodes.sort_by_key(|node| node.id);
        let mut handles: Vec<_> = self
            .handles()
            .iter()
            .map(|(number, open)| HandleState {
                number,
                node: open.node,
                directory: open.directory,
                flags: open.flags,
            })
            .collect();
        handles.sort_by_key(|handle| handle.number);
        SessionState {
            started: self.started.load(Ordering::Acquire),
            nodes,
            handles,
        }
    }

    /// A session that goes on from a saved one; `None` where that makes no sense.
    pub fn restore(share: Arc<Share>, state: &SessionState) -> Option<Self> {
        let session = Session::new(share).ok()?;
        for node in &state.nodes {
            let possible = (FUSE_ROOT_ID + 1..NUMBERS_MAX).contains(&node.id)
                && is_component(&node.name)
                && session.nodes().get(node.id).is_err();
            let name = CString::new(node.name.clone()).ok()?;
            let place = Place::new(node.parent, &name);
            let mut nodes = session.nodes();
            let added = nodes.insert(node.id, node.identity, place, node.lookups);
            (possible && added.is_ok()).then_some(())?;
        }
        for handle in &state.handles {
            (handle.number < NUMBERS_MAX).then_some(())?;
            // What is gone is a bad handle from now on.
            let _ = session.reopen_handle(handle);
        }
        session.started.store(state.started, Ordering::Release);
        Some(session)
    }

    fn reopen_handle(&self, state: &HandleState) -> Result<(), Errno> {
        let mut flags = OFlags::from_bits_retain(state.flags);
        flags &= OFlags::RWMODE | OFlags::SYNC | OFlags::DSYNC;
        if state.directory {
            flags = OFlags::RDONLY | OFlags::DIRECTORY;
        } else if flags.intersects(OFlags::WRONLY | OFlags::RDWR) {
            self.may_change()?;
        }
        let node = self.descriptor(state.node)?;
        let open = Open {
            descriptor: self.reopen(&node, flags)?,
            node: state.node,
            directory: state.directory,
            flags: flags.bits(),
            reading: Default::default(),
        };
        self.handles().insert(state.number, open)?;
        self.nodes().opened(state.node, node);
        Ok(())
    }
}
