//! Descriptor chains: what a driver puts into a queue, checked (virtio 1.2, 2.7.4 and 2.7.5).
//!
//! A chain is read once, and every buffer of it is looked up in the guest's RAM before a device sees any. What comes out is pieces of RAM:
//! first those that the device reads, then those that it writes. The driver may still change what is *in* them.

use doppel_memory::{GuestRam, GuestSlice};
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestMemory, Permissions};

use crate::Broken;

/// No chain of an honest driver has more buffers; Linux stops at 1024 as well.
pub const SEGMENTS_MAX: usize = 1024;

/// Pieces of guest RAM, one after another.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'r>(Vec<GuestSlice<'r>>);

impl<'r> Buffers<'r> {
    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.0.iter().map(|slice| slice.len()).sum()
    }

    /// True where there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|slice| slice.len() == 0)
    }

    /// The pieces.
    pub fn slices(&self) -> &[GuestSlice<'r>] {
        &self.0
    }

    /// The first `at` bytes, or all, leave; what stays are those behind them.
    pub fn split_off_front(&mut self, at: usize) -> Buffers<'r> {
        let mut front = Vec::new();
        let mut left = at;
        while left > 0 && !self.0.is_empty() {
            let len = self.0[0].len();
            let Ok((head, tail)) = self.0[0].split_at(left.min(len)) else {
                break;
            };
            left -= head.len();
            front.push(head);
            if tail.is_empty() {
                self.0.remove(0);
            } else {
                self.0[0] = tail;
            }
        }
        Buffers(front)
    }

    /// Copies bytes out of the front, as many as there are; says how many. They stay there.
    pub fn read(&self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            let rest = &mut into[done..];
            if rest.is_empty() {
                break;
            }
            done += slice.read(rest, 0).unwrap_or(0);
        }
        done
    }

    /// Copies bytes to the front, as many as have room; says how many.
    pub fn write(&self, from: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.0 {
            let rest = &from[done..];
            if rest.is_empty() {
                break;
            }
            done += slice.write(rest, 0).unwrap_or(0);
        }
        done
    }
}

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
            true => (&mut self.writable.0, Permissions::Write),
            false if self.writable.0.is_empty() => (&mut self.readable.0, Permissions::Read),
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
        match self.readable.0.len() + self.writable.0.len() {
            0..=SEGMENTS_MAX => Ok(()),
            _ => Err(Broken("a chain of too many buffers")),
        }
    }
}
