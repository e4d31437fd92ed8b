//! The receive queue: frames for the guest, spread over its buffers (virtio 1.2, 5.1.6.4).

use doppel_memory::GuestRam;
use doppel_net::{Link, Offload, Received};

use super::{Active, HEADER, NetCounters};
use crate::{Broken, Chain, Queue};

/// The queue.
pub struct Receive {
    /// Its rings.
    pub queue: Queue,
    mergeable: bool,
}

/// Buffers that were taken from the ring and not used yet, in order.
struct Spare<'r> {
    chains: Vec<Chain<'r>>,
    used: usize,
    dry: bool,
}

impl<'r> Spare<'r> {
    fn free(&self) -> &[Chain<'r>] {
        &self.chains[self.used..]
    }
}

impl Receive {
    /// The queue of a driver that is ready, which takes frames in several buffers if `mergeable`.
    pub fn new(queue: Queue, mergeable: bool) -> Self {
        Receive { queue, mergeable }
    }

    /// Takes frames from the back-end until it has none or the guest has no buffers, at most `limit`. True if there may be more.
    pub fn fill(&mut self, active: &Active, limit: usize) -> Result<bool, Broken> {
        let mut spare = Spare {
            chains: Vec::new(),
            used: 0,
            dry: false,
        };
        self.queue.quiet()?;
        let more = self.fill_with(active, &mut spare, limit);
        for _ in spare.free() {
            self.queue.undo_pop();
        }
        if spare.used > 0 {
            self.queue.announce()?;
        }
        more
    }

    fn fill_with<'r>(
        &mut self,
        active: &'r Active,
        spare: &mut Spare<'r>,
        limit: usize,
    ) -> Result<bool, Broken> {
        for _ in 0..limit {
            let wanted = active.port.with(|link| match link.has_frames() {
                true => link.next_length(),
                false => 0,
            });
            if wanted == 0 {
                return Ok(false);
            }
            let room = self.gather(&active.ram, spare, HEADER + wanted)?;
            match self.receive(active, spare, room)? {
                Received::Frame => {}
                Received::Nothing => return Ok(false),
                Received::TooLong(len)
                    if self.gather(&active.ram, spare, HEADER + len)? >= HEADER + len => {}
                Received::TooLong(_) if self.hopeless(spare) => {
                    active.port.with(|link: &mut dyn Link| link.discard());
                }
                // A buffer may have come since the ring was found dry; else the driver says when one comes.
                Received::TooLong(_) => {
                    if !self.queue.listen()? {
                        return Ok(false);
                    }
                    spare.dry = false;
                }
            }
        }
        Ok(true)
    }

    /// No number of buffers would help.
    fn hopeless(&self, spare: &Spare) -> bool {
        let buffers = spare.free().len();
        buffers > 0 && (!self.mergeable || buffers >= usize::from(self.queue.size()))
    }

    /// Takes buffers from the ring until they have room for `wanted` bytes; says for how many they have.
    fn gather<'r>(
        &mut self,
        ram: &'r GuestRam,
        spare: &mut Spare<'r>,
        wanted: usize,
    ) -> Result<usize, Broken> {
        let mut room: usize = match self.mergeable {
            true => spare.free().iter().map(|chain| chain.writable.len()).sum(),
            false => spare.free().first().map_or(0, |chain| chain.writable.len()),
        };
        while room < wanted && !spare.dry && (self.mergeable || spare.free().is_empty()) {
            match self.queue.pop(ram)? {
                Some(chain) => {
                    room += chain.writable.len();
                    spare.chains.push(chain);
                }
                None => spare.dry = true,
            }
        }
        Ok(room)
    }

    /// Gets one frame into the buffers.
    fn receive(
        &mut self,
        active: &Active,
        spare: &mut Spare,
        room: usize,
    ) -> Result<Received, Broken> {
        let Some(room) = room.checked_sub(HEADER).filter(|room| *room > 0) else {
            return Ok(Received::TooLong(1));
        };
        let mut filled: Vec<(u16, u32)> = Vec::new();
        let mut total = 0;
        let chains = spare.free();
        let received = active.port.with(|link| {
            let mut sink = |offload: Offload, parts: &[&[u8]]| {
                (filled, total) = scatter(chains, offload, parts);
            };
            link.receive(room, &mut sink)
        });
        if received == Received::Frame {
            spare.used += filled.len();
            NetCounters::add(&active.counters.received, 1);
            NetCounters::add(&active.counters.received_bytes, total - HEADER);
            self.queue.push_all(&filled)?;
        }
        Ok(received)
    }
}

/// Writes header and frame over the chains; which were filled with how many bytes, and how many in all.
fn scatter(chains: &[Chain], offload: Offload, parts: &[&[u8]]) -> (Vec<(u16, u32)>, usize) {
    let total = HEADER + parts.iter().map(|part| part.len()).sum::<usize>();
    let mut filled = Vec::new();
    let mut left = total;
    for chain in chains {
        let n = chain.writable.len().min(left);
        filled.push((chain.head, n as u32));
        left -= n;
        if left == 0 {
            break;
        }
    }
    let mut header = [0; HEADER];
    header[..doppel_net::HEADER].copy_from_slice(&offload.encode());
    header[doppel_net::HEADER..].copy_from_slice(&(filled.len() as u16).to_le_bytes());
    let slices = chains.iter().flat_map(|chain| chain.writable.slices());
    let mut slices = slices
        .map(|slice| (slice, 0))
        .collect::<Vec<_>>()
        .into_iter();
    let mut current = slices.next();
    for part in std::iter::once(&header[..]).chain(parts.iter().copied()) {
        let mut rest = part;
        while !rest.is_empty() {
            let Some((slice, at)) = &mut current else {
                return (filled, total);
            };
            if *at == slice.len() {
                current = slices.next();
                continue;
            }
            let n = rest.len().min(slice.len() - *at);
            // The slice is as long as it says.
            let _ = vm_memory::Bytes::write_slice(*slice, &rest[..n], *at);
            *at += n;
            rest = &rest[n..];
        }
    }
    (filled, total)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::testing::{DriverQueue, Piece};

    /// They have no room, so that no number of them is enough for a frame.
    #[test]
    fn no_more_buffers_are_gathered_than_there_are_descriptors() {
        let ram = Arc::new(GuestRam::new(2 << 20).unwrap());
        let mut driver = DriverQueue::new(0, 16, 0x1_0000);
        let mut receive = Receive::new(driver.device_half(&ram, true), true);
        let mut spare = Spare {
            chains: Vec::new(),
            used: 0,
            dry: false,
        };
        driver.submit(&ram, &[Piece::Out(0x10_0000, 8)]);
        let mut broken = false;
        // A driver that keeps pace.
        for _ in 0..64 {
            spare.dry = false;
            broken |= receive.gather(&ram, &mut spare, 100).is_err();
            driver.offer(&ram, 0);
        }
        assert!(broken && spare.chains.len() <= usize::from(driver.size));
    }
}
