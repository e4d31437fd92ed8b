//! Descriptor chains: what a driver puts into a queue, checked (virtio 1.2, 2.7.4 and 2.7.5).
//!
//! A chain is read once, and every buffer of it is looked up in the guest's RAM before a device sees any. What comes out is pieces of RAM:
//! first those that the device reads, then those that it writes. The driver may still change what is *in* them.

use doppel_memory::GuestRam;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, Permissions};

use crate::{Broken, Buffers};

/// No chain of an honest driver has more buffers; Linux stops at 1024 as well.
pub const SEGMENTS_MAX: usize = 1024;

/// A request of the driver.
#[derive(Clone, Debug)]
pub struct Chain<'r> {
    /// What identifies it when it is given back.
    pub head: u16,
    /// What the device reads.
    pub readable: Buffers<'r>,
    /// What the device writes.
    pub writable: Buffers<'r>,
}

impl<'r> Chain<'r> {
    /// Reads all descriptors of a chain.
    pub(crate) fn parse(
        mut descriptors: DescriptorChain<&'r doppel_memory::GuestView>,
        ram: &'r GuestRam,
    ) -> Result<Self, Broken> {
        let mut chain = Chain {
            head: descriptors.head_index(),
            readable: Buffers::default(),
            writable: Buffers::default(),
        };
        let mut last = None;
        for descriptor in descriptors.by_ref() {
            chain.add(&descriptor, ram)?;
            last = Some(descriptor);
        }
        // The crate ends a chain where it cannot go on; a good one ends by itself.
        match last {
            Some(descriptor) if !descriptor.has_next() => Ok(chain),
            _ => Err(Broken("a chain of descriptors that leads nowhere")),
        }
    }

    fn add(&mut self, descriptor: &Descriptor, ram: &'r GuestRam) -> Result<(), Broken> {
        let (to, access) = match descriptor.is_write_only() {
            true => (self.writable.pieces_mut(), Permissions::Write),
            false if self.writable.slices().is_empty() => {
                (self.readable.pieces_mut(), Permissions::Read)
            }
            false => return Err(Broken("a buffer to read behind one to write")),
        };
        let outside = || Broken("a buffer outside of memory");
        let slices = ram
            .view()
            .get_slices(descriptor.addr(), descriptor.len() as usize, access)
            .map_err(|_| outside())?;
        for slice in slices {
            to.push(slice.map_err(|_| outside())?);
        }
        match self.readable.slices().len() + self.writable.slices().len() {
            0..=SEGMENTS_MAX => Ok(()),
            _ => Err(Broken("a chain of too many buffers")),
        }
    }
}
