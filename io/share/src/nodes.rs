//! The nodes that a guest knows: what FUSE counts its lookups and forgets of.
//!
//! A node is known by where it was last found (its parent and its name there) and by who it is. A descriptor is a cache: those
//! of nodes that are not open are closed when there are too many, the longest unused first.

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use fuse_abi::linux::FUSE_ROOT_ID;
use rustix::fs::{FileType, Statx};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::share::Limits;

/// What tells a file of the host from any other, over time too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    device: (u32, u32),
    inode: u64,
    /// Time of birth, seconds and nanoseconds: an inode's number is used again.
    born: (i64, u32),
    /// The bits of the mode that say what it is.
    kind: u16,
}

impl Identity {
    pub fn of(found: &Statx) -> Self {
        Identity {
            device: (found.stx_dev_major, found.stx_dev_minor),
            inode: found.stx_ino,
            born: (found.stx_btime.tv_sec, found.stx_btime.tv_nsec),
            kind: found.stx_mode & 0o170_000,
        }
    }

    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.kind.into())
    }
}

/// Where a node was last found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub parent: u64,
    pub name: CString,
}

/// A node.
#[derive(Debug)]
pub struct Node {
    pub identity: Identity,
    pub place: Place,
    /// Times that the guest was told of it and has not forgotten.
    pub lookups: u64,
    /// Handles to it.
    pub opens: u32,
    pub descriptor: Option<Arc<OwnedFd>>,
    /// Used since it came to the front of the line to be closed.
    recent: bool,
}

/// What a node costs beside its name.
const NODE_BYTES: usize = size_of::<Node>() + size_of::<(Identity, u64)>() + 64;

/// All nodes but the root.
pub struct Nodes {
    table: HashMap<u64, Node>,
    by_identity: HashMap<Identity, u64>,
    next: u64,
    bytes: usize,
    /// Those with a descriptor, in the order to be closed. Some have none any more.
    line: VecDeque<u64>,
    limits: Limits,
}

impl Nodes {
    pub fn new(limits: Limits) -> Self {
        Nodes {
            table: HashMap::new(),
            by_identity: HashMap::new(),
            next: FUSE_ROOT_ID + 1,
            bytes: 0,
            line: VecDeque::new(),
            limits,
        }
    }

    pub fn len(&self) -> usize {
        self.table.len()
    }

    pub fn get(&self, id: u64) -> Result<&Node, Errno> {
        self.table.get(&id).ok_or(Errno::STALE)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &Node)> {
        self.table.iter().map(|(id, node)| (*id, node))
    }

    /// The guest is told of what was found at a place; its number.
    pub fn found(&mut self, identity: Identity, place: Place) -> Result<u64, Errno> {
        if let Some(id) = self.by_identity.get(&identity).copied() {
            self.moved(identity, place);
            if let Some(node) = self.table.get_mut(&id) {
                node.lookups = node.lookups.saturating_add(1);
            }
            return Ok(id);
        }
        let id = self.next;
        self.next += 1;
        self.insert(id, identity, place, 1)?;
        Ok(id)
    }

    /// A node with a number of its own.
    pub fn insert(
        &mut self,
        id: u64,
        identity: Identity,
        place: Place,
        lookups: u64,
    ) -> Result<(), Errno> {
        let bytes = NODE_BYTES + place.name.count_bytes();
        if self.bytes + bytes > self.limits.node_bytes {
            return Err(Errno::NOMEM);
        }
        self.bytes += bytes;
        self.next = self.next.max(id.saturating_add(1));
        self.by_identity.insert(identity, id);
        let node = Node {
            identity,
            place,
            lookups,
            opens: 0,
            descriptor: None,
            recent: false,
        };
        self.table.insert(id, node);
        Ok(())
    }

    /// Somebody is at another place now; if the guest does not know who it is, that is nothing to us.
    pub fn moved(&mut self, identity: Identity, place: Place) {
        let id = self.by_identity.get(&identity);
        if let Some(node) = id.and_then(|id| self.table.get_mut(id)) {
            self.bytes += place.name.count_bytes();
            self.bytes -= node.place.name.count_bytes();
            node.place = place;
        }
    }

    /// The guest forgets `lookups` of the times that it was told.
    pub fn forget(&mut self, id: u64, lookups: u64) {
        if let Some(node) = self.table.get_mut(&id) {
            node.lookups = node.lookups.saturating_sub(lookups);
            self.drop_if_unknown(id);
        }
    }

    /// One more handle to it. Its descriptor stays as long, since its name may not.
    pub fn opened(&mut self, id: u64, descriptor: Arc<OwnedFd>) {
        if let Some(node) = self.table.get_mut(&id) {
            node.opens += 1;
            node.descriptor.get_or_insert(descriptor);
        }
    }

    /// One less.
    pub fn closed(&mut self, id: u64) {
        if let Some(node) = self.table.get_mut(&id) {
            node.opens = node.opens.saturating_sub(1);
            if node.descriptor.is_some() {
                self.line.push_back(id);
            }
            self.drop_if_unknown(id);
            self.close_some();
        }
    }

    fn drop_if_unknown(&mut self, id: u64) {
        let unknown = |node: &Node| node.lookups == 0 && node.opens == 0;
        if !self.table.get(&id).is_some_and(unknown) {
            return;
        }
        if let Some(node) = self.table.remove(&id) {
            self.bytes -= NODE_BYTES + node.place.name.count_bytes();
            if self.by_identity.get(&node.identity) == Some(&id) {
                self.by_identity.remove(&node.identity);
            }
        }
    }

    /// The descriptor of a node, if there is one.
    pub fn descriptor(&mut self, id: u64) -> Option<Arc<OwnedFd>> {
        let node = self.table.get_mut(&id)?;
        node.recent = true;
        node.descriptor.clone()
    }

    /// Keeps a descriptor, and closes others if there are too many.
    pub fn keep(&mut self, id: u64, descriptor: Arc<OwnedFd>) {
        if let Some(node) = self.table.get_mut(&id)
            && node.descriptor.is_none()
        {
            node.descriptor = Some(descriptor);
            self.line.push_back(id);
        }
        self.close_some();
    }

    fn close_some(&mut self) {
        // Each turn takes one out of the line for good, or its mark of being used.
        while self.line.len() > self.limits.descriptors {
            let Some(id) = self.line.pop_front() else {
                return;
            };
            match self.table.get_mut(&id) {
                // It comes back into the line when it is closed.
                Some(node) if node.opens > 0 => {}
                Some(node) if node.recent && node.descriptor.is_some() => {
                    node.recent = false;
                    self.line.push_back(id);
                }
                Some(node) => node.descriptor = None,
                None => {}
            }
        }
    }
}

impl Place {
    pub fn new(parent: u64, name: &CStr) -> Self {
        Place {
            parent,
            name: name.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(inode: u64) -> Identity {
        Identity {
            device: (8, 1),
            inode,
            born: (1, 2),
            kind: 0o100_000,
        }
    }

    fn place(name: &CStr) -> Place {
        Place::new(1, name)
    }

    fn nodes(limits: Limits) -> Nodes {
        Nodes::new(limits)
    }

    const LIMITS: Limits = Limits {
        open: 4,
        descriptors: 3,
        node_bytes: 4000,
    };

    fn descriptor() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/dev/null").unwrap().into())
    }

    #[test]
    fn a_node_is_gone_when_all_lookups_are_forgotten_and_no_handle_is_left() {
        let mut nodes = nodes(LIMITS);
        let id = nodes.found(identity(7), place(c"a")).unwrap();
        assert_eq!(nodes.found(identity(7), place(c"b")), Ok(id));
        assert_eq!(nodes.get(id).unwrap().place, place(c"b"));
        nodes.forget(id, 1);
        nodes.opened(id, descriptor());
        nodes.forget(id, u64::MAX);
        assert_eq!(nodes.len(), 1, "a handle is left");
        nodes.closed(id);
        assert_eq!((nodes.len(), nodes.bytes), (0, 0));
        nodes.forget(id, 1);
        let again = nodes.found(identity(7), place(c"a")).unwrap();
        assert_ne!(again, id, "a number is not used twice");
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let mut nodes = nodes(LIMITS);
        let found: Vec<_> = (0..100)
            .map(|n| nodes.found(identity(n), place(c"x")))
            .collect();
        assert_eq!(found.last(), Some(&Err(Errno::NOMEM)));
        assert!(nodes.bytes <= 4000 && nodes.len() > 5);
        nodes.forget(2, 1);
        assert!(nodes.found(identity(1000), place(c"x")).is_ok());
    }

    #[test]
    fn descriptors_have_a_bound_and_those_of_open_nodes_stay() {
        let mut nodes = nodes(Limits {
            node_bytes: 1 << 20,
            ..LIMITS
        });
        let ids: Vec<_> = (0..10)
            .map(|n| nodes.found(identity(n), place(c"x")).unwrap())
            .collect();
        for id in &ids {
            nodes.opened(ids[0], descriptor());
            nodes.keep(*id, descriptor());
            nodes.closed(ids[0]);
            nodes.opened(ids[0], descriptor());
        }
        let held = |nodes: &Nodes| nodes.iter().filter(|(_, n)| n.descriptor.is_some()).count();
        assert!(nodes.get(ids[0]).unwrap().descriptor.is_some(), "open");
        assert!(held(&nodes) <= 4, "{}", held(&nodes));
        for _ in 0..10 {
            nodes.closed(ids[0]);
        }
        for id in &ids {
            nodes.keep(*id, descriptor());
        }
        assert!(held(&nodes) <= 3 && nodes.line.len() <= 3);
    }
}
