//! A virtqueue as a device sees it (virtio 1.2, 2.7, split virtqueues).
//!
//! The rings are the crate `virtio-queue`'s; this is what it leaves open. A ring that makes no sense is an error, [`Broken`], after which the
//! device stops and asks for a reset: nothing a driver writes there is followed further. No more chains are under way than there are
//! descriptors, so that whoever keeps requests keeps no more of them either. Interrupts are sent only where the driver's
//! `used_event` (or its flag, without VIRTIO_F_EVENT_IDX) asks for one.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use doppel_memory::GuestRam;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{QueueOwnedT, QueueState as RingState, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::{Chain, Interrupt, Notifier};

/// The driver's rings make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Broken(pub &'static str);

/// Where a queue's rings are, and how far the device got in them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// The driver enabled it.
    pub enabled: bool,
    /// Number of descriptors, a power of two.
    pub size: u16,
    /// Guest physical address of the descriptors.
    pub descriptors: u64,
    /// Of the ring that the driver writes.
    pub driver: u64,
    /// Of the ring that the device writes.
    pub device: u64,
    /// Chains taken, modulo 2^16.
    pub taken: u16,
    /// Chains given back, modulo 2^16.
    pub used: u16,
}

/// A queue that the driver enabled.
pub struct Queue {
    index: u16,
    ring: virtio_queue::Queue,
    /// Chains given back, modulo 2^16, when the driver was last told.
    announced: u16,
    /// Heads of chains that were taken and not served.
    unserved: Vec<u16>,
    ram: Arc<GuestRam>,
    notifier: Arc<Notifier>,
    interrupt: Arc<dyn Interrupt>,
}

/// An interrupt that is due, or none.
#[must_use]
pub(crate) struct Announcement(Option<(Arc<dyn Interrupt>, u16)>);

impl Announcement {
    /// Sends it.
    pub fn send(self) {
        if let Some((interrupt, index)) = self.0 {
            interrupt.queue(index);
        }
    }
}

impl Queue {
    /// The queue `index` of a device, which the driver placed at `state`.
    pub(crate) fn new(
        index: u16,
        state: &QueueState,
        event_idx: bool,
        ram: Arc<GuestRam>,
        notifier: Arc<Notifier>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, Broken> {
        let ring = virtio_queue::Queue::try_from(RingState {
            max_size: state.size,
            next_avail: state.taken,
            next_used: state.used,
            event_idx_enabled: event_idx,
            size: state.size,
            ready: true,
            desc_table: state.descriptors,
            avail_ring: state.driver,
            used_ring: state.device,
        })
        .map_err(|_| Broken("a ring of an impossible size or alignment"))?;
        // The crate takes a ring at address 0 for none.
        if state.driver == 0 || !ring.is_valid(ram.view()) {
            return Err(Broken("a ring outside of memory"));
        }
        Ok(Queue {
            index,
            announced: ring.next_used(),
            unserved: Vec::new(),
            ring,
            ram,
            notifier,
            interrupt,
        })
    }

    /// Which of the device's queues it is.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The memory that it was made with.
    pub(crate) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// What the driver's notifications raise.
    pub fn notifier(&self) -> &Arc<Notifier> {
        &self.notifier
    }

    /// Where the rings are, and how far the device got in them.
    pub fn state(&self) -> QueueState {
        QueueState {
            enabled: true,
            size: self.ring.size(),
            descriptors: self.ring.desc_table(),
            driver: self.ring.avail_ring(),
            device: self.ring.used_ring(),
            taken: self.ring.next_avail(),
            used: self.ring.next_used(),
        }
    }

    /// The next request, if there is one. One that is broken stays where it is. `ram` is the memory that the queue was made with.
    pub fn pop<'r>(&mut self, ram: &'r GuestRam) -> Result<Option<Chain<'r>>, Broken> {
        const TOO_MANY: Broken = Broken("a ring with more requests than descriptors");
        // The crate counts those that were not taken. A driver may not offer a chain again before it has it back (virtio 1.2, 2.7).
        let room = self.under_way() < self.ring.size();
        let mut available = self.ring.iter(ram.view()).map_err(|_| TOO_MANY)?;
        let chain = available.next();
        let parsed = chain.map(|chain| match room {
            true => Chain::parse(chain, ram),
            false => Err(TOO_MANY),
        });
        let parsed = parsed.transpose();
        if parsed.is_err() {
            self.ring.go_to_previous_position();
        }
        parsed
    }

    /// Chains taken and not given back.
    fn under_way(&self) -> u16 {
        let taken = self.ring.next_avail();
        taken.wrapping_sub(self.ring.next_used())
    }

    /// Whether there is a request to take.
    pub fn has_next(&self) -> Result<bool, Broken> {
        let available = self.ring.avail_idx(self.ram.view(), Ordering::Acquire);
        let available = available.map_err(|_| Broken("a ring outside of memory"))?;
        Ok(available.0 != self.ring.next_avail())
    }

    /// Puts the request that was taken last back, as if it had not been taken.
    pub fn undo_pop(&mut self) {
        self.ring.go_to_previous_position();
    }

    /// Takes note of a request that is not served before the device stops. It is as if it had not been taken, once
    /// [`Queue::rewind`] has put it into the ring again.
    pub(crate) fn leave(&mut self, head: u16) {
        self.unserved.push(head);
    }

    /// Puts the requests that were left back into the ring, for the device to go on with later.
    ///
    /// What was taken after them may have been given back before them, so that they do not stand side by side. The driver has reused
    /// no more entries than it got chains back: those before the next one to take are free for as many as are under way. It does not
    /// look at entries that it wrote.
    pub(crate) fn rewind(&mut self) -> Result<(), Broken> {
        for head in std::mem::take(&mut self.unserved).into_iter().rev() {
            self.ring.go_to_previous_position();
            let slot = self.ring.next_avail() % self.ring.size();
            let at = GuestAddress(self.ring.avail_ring() + 4 + 2 * u64::from(slot));
            self.ram
                .view()
                .write_obj(head.to_le(), at)
                .map_err(|_| Broken("a ring outside of memory"))?;
        }
        Ok(())
    }

    /// Gives a request back, with `written` bytes in its buffers.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.ring
            .add_used(self.ram.view(), head, written)
            .map_err(|_| Broken("a request that there cannot be"))
    }

    /// Gives several requests back that are one to the driver: it sees all of them or none.
    pub fn push_all(&mut self, requests: &[(u16, u32)]) -> Result<(), Broken> {
        let Some(((last, written), others)) = requests.split_last() else {
            return Ok(());
        };
        let first = self.ring.next_used();
        for (n, (head, written)) in others.iter().enumerate() {
            let slot = first.wrapping_add(n as u16) % self.ring.size();
            let at = GuestAddress(self.ring.used_ring() + 4 + 8 * u64::from(slot));
            let element = u64::from(*written) << 32 | u64::from(*head);
            self.ram
                .view()
                .write_obj(element.to_le(), at)
                .map_err(|_| Broken("a ring outside of memory"))?;
        }
        self.ring
            .set_next_used(first.wrapping_add(others.len() as u16));
        self.push(*last, *written)
    }

    /// Tells the driver of what was given back since the last call, if it wants to know.
    pub fn announce(&mut self) -> Result<(), Broken> {
        self.announcement()?.send();
        Ok(())
    }

    /// What [`Queue::announce`] does, for later: a driver that is woken needs the queue.
    pub(crate) fn announcement(&mut self) -> Result<Announcement, Broken> {
        let wanted = self.wants_interrupt()?;
        let to = wanted.then(|| (self.interrupt.clone(), self.index));
        Ok(Announcement(to))
    }

    fn wants_interrupt(&mut self) -> Result<bool, Broken> {
        // What was given back is to be seen before the wish is looked at (virtio 1.2, 2.7.10).
        fence(Ordering::SeqCst);
        let at = match self.ring.event_idx_enabled() {
            true => 4 + 2 * u64::from(self.ring.size()),
            false => 0,
        };
        let at = GuestAddress(self.ring.avail_ring() + at);
        let wish = self.ram.view().load::<u16>(at, Ordering::Relaxed);
        let wish = wish.map_err(|_| Broken("a ring outside of memory"))?;
        let used = self.ring.next_used();
        let announced = std::mem::replace(&mut self.announced, used);
        Ok(match self.ring.event_idx_enabled() {
            // The entry that the driver waits for is among those given back meanwhile.
            true => used.wrapping_sub(wish).wrapping_sub(1) < used.wrapping_sub(announced),
            false => u32::from(wish) & VRING_AVAIL_F_NO_INTERRUPT == 0,
        })
    }

    /// Asks the driver not to notify, since the device looks by itself.
    pub fn quiet(&mut self) -> Result<(), Broken> {
        self.ring
            .disable_notification(self.ram.view())
            .map_err(|_| Broken("a ring outside of memory"))
    }

    /// Asks the driver to notify of the next request. True where one came meanwhile: look again.
    pub fn listen(&mut self) -> Result<bool, Broken> {
        self.ring
            .enable_notification(self.ram.view())
            .map_err(|_| Broken("a ring outside of memory"))
    }

    /// Has the device ask for a reset.
    pub fn give_up(&self, broken: Broken) {
        let why = format!("queue {}: {broken}", self.index);
        self.interrupt.needs_reset(&why);
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Queue").field(&self.state()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{DriverQueue, Piece};

    const RINGS: u64 = 0x1_0000;
    const BUFFER: u64 = 0x10_0000;

    fn ends() -> (Arc<GuestRam>, DriverQueue, Queue) {
        let ram = Arc::new(GuestRam::new(2 << 20).unwrap());
        let driver = DriverQueue::new(0, 4, RINGS);
        let queue = driver.device_half(&ram, true);
        (ram, driver, queue)
    }

    #[test]
    fn a_chain_that_is_under_way_is_not_taken_again_and_again() {
        let (ram, mut driver, mut queue) = ends();
        driver.submit(&ram, &[Piece::In(BUFFER, 8)]);
        for _ in 1..driver.size {
            driver.offer(&ram, 0);
        }
        for _ in 0..driver.size {
            assert_eq!(queue.pop(&ram).unwrap().unwrap().head, 0);
        }
        assert!(queue.pop(&ram).unwrap().is_none());
        driver.offer(&ram, 0);
        for _ in 0..3 {
            assert!(queue.pop(&ram).is_err());
        }
        queue.push(0, 8).unwrap();
        assert!(queue.pop(&ram).unwrap().is_some());
    }

    #[test]
    fn what_was_left_is_taken_again_whatever_the_driver_offered_meanwhile() {
        let (ram, mut driver, mut queue) = ends();
        let pop = |queue: &mut Queue| queue.pop(&ram).unwrap().map(|chain| chain.head);
        for _ in 0..4 {
            driver.submit(&ram, &[Piece::In(BUFFER, 8)]);
        }
        for n in 0..4 {
            assert_eq!(pop(&mut queue), Some(n));
        }
        // The entries of 0 and 1 are used for 1 and 2 again.
        for n in [1, 2] {
            queue.push(n, 8).unwrap();
            driver.offer(&ram, n);
        }
        assert_eq!(pop(&mut queue), Some(1));
        for n in [0, 3, 1] {
            queue.leave(n);
        }
        queue.rewind().unwrap();
        assert_eq!(queue.state().taken, queue.state().used);
        for n in [0, 3, 1, 2] {
            assert_eq!(pop(&mut queue), Some(n));
        }
        assert_eq!(pop(&mut queue), None);
    }
}
