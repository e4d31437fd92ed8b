//! Reassembly of IPv4 packets that a guest sent in pieces (RFC 791, 3.2; overlaps make a packet invalid, as in RFC 5722).

use std::collections::HashMap;
use std::net::Ipv4Addr;

use doppel_device::{NANOS_PER_SECOND, Nanos};
use smoltcp::wire::Ipv4Packet;

const PACKETS_MAX: usize = 16;
const PACKET_MAX: usize = 65535 - 20;
const PATIENCE: Nanos = 30 * NANOS_PER_SECOND;

type Key = (Ipv4Addr, Ipv4Addr, u8, u16);

#[derive(Default)]
struct Partial {
    began: Nanos,
    bytes: Vec<u8>,
    // Pieces that are there, in order, none touching the next.
    pieces: Vec<(usize, usize)>,
    total: Option<usize>,
}

impl Partial {
    /// Takes a piece; false where the packet cannot become whole.
    fn add(&mut self, offset: usize, data: &[u8], last: bool) -> bool {
        let end = offset + data.len();
        let fits = end <= PACKET_MAX && self.total.is_none_or(|total| end <= total && !last);
        let at = self.pieces.partition_point(|piece| piece.0 < offset);
        let after = self.pieces.get(at).is_none_or(|next| end <= next.0);
        let before = at == 0 || self.pieces[at - 1].1 <= offset;
        if !fits || !after || !before || data.is_empty() {
            return false;
        }
        if last {
            self.total = Some(end);
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[offset..end].copy_from_slice(data);
        self.pieces.insert(at, (offset, end));
        self.join(at);
        self.total.is_none_or(|total| self.bytes.len() <= total)
    }

    fn join(&mut self, at: usize) {
        if self
            .pieces
            .get(at + 1)
            .is_some_and(|next| next.0 == self.pieces[at].1)
        {
            self.pieces[at].1 = self.pieces.remove(at + 1).1;
        }
        if at > 0 && self.pieces[at - 1].1 == self.pieces[at].0 {
            self.pieces[at - 1].1 = self.pieces.remove(at).1;
        }
    }

    fn is_whole(&self) -> bool {
        self.total.is_some_and(|total| self.pieces == [(0, total)])
    }
}

/// Packets that are not whole yet.
#[derive(Default)]
pub struct Fragments {
    packets: HashMap<Key, Partial>,
}

impl Fragments {
    /// Takes a fragment; the payload of the packet if it is whole now.
    pub fn add(&mut self, packet: &Ipv4Packet<&[u8]>, now: Nanos) -> Option<Vec<u8>> {
        let key = (
            packet.src_addr(),
            packet.dst_addr(),
            packet.next_header().into(),
            packet.ident(),
        );
        self.packets.retain(|_, p| p.began + PATIENCE > now);
        if !self.packets.contains_key(&key) && self.packets.len() >= PACKETS_MAX {
            let oldest = self.packets.iter().min_by_key(|(_, p)| p.began);
            let oldest = oldest.map(|(key, _)| *key);
            oldest.and_then(|key| self.packets.remove(&key));
        }
        let partial = self.packets.entry(key).or_default();
        if partial.pieces.is_empty() {
            partial.began = now;
        }
        let valid = partial.add(
            packet.frag_offset().into(),
            packet.payload(),
            !packet.more_frags(),
        );
        let whole = partial.is_whole();
        if valid && !whole {
            return None;
        }
        self.packets.remove(&key).filter(|_| valid).map(|p| p.bytes)
    }

    /// Bytes of memory in packets that are not whole.
    #[cfg(test)]
    pub fn memory(&self) -> usize {
        self.packets.values().map(|p| p.bytes.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(ident: u16, offset: u16, data: &[u8], more: bool) -> Vec<u8> {
        let mut bytes = vec![0; 20 + data.len()];
        let mut ip = Ipv4Packet::new_unchecked(&mut bytes);
        ip.set_version(4);
        ip.set_header_len(20);
        ip.set_total_len(20 + data.len() as u16);
        ip.set_ident(ident);
        ip.set_frag_offset(offset);
        ip.set_more_frags(more);
        ip.payload_mut().copy_from_slice(data);
        bytes
    }

    fn add(to: &mut Fragments, bytes: &[u8], now: Nanos) -> Option<Vec<u8>> {
        to.add(&Ipv4Packet::new_checked(bytes).unwrap(), now)
    }

    #[test]
    fn pieces_come_together_in_any_order() {
        let data: Vec<u8> = (0..3000u32).map(|n| n as u8).collect();
        let cuts = [0..1000, 1000..2000, 2000..3000];
        for order in [
            [0, 1, 2],
            [2, 1, 0],
            [1, 2, 0],
            [1, 0, 2],
            [2, 0, 1],
            [0, 2, 1],
        ] {
            let mut fragments = Fragments::default();
            let mut got = None;
            for n in order {
                assert_eq!(got, None);
                let piece = cuts[n].clone();
                let bytes = fragment(7, piece.start as u16, &data[piece], n != 2);
                got = add(&mut fragments, &bytes, 0);
            }
            assert_eq!(got.as_deref(), Some(&data[..]), "{order:?}");
            assert_eq!(fragments.memory(), 0);
        }
    }

    #[test]
    fn overlaps_and_overlong_packets_come_to_nothing() {
        let mut fragments = Fragments::default();
        assert_eq!(
            add(&mut fragments, &fragment(1, 0, &[1; 800], true), 0),
            None
        );
        assert_eq!(
            add(&mut fragments, &fragment(1, 792, &[1; 80], false), 0),
            None
        );
        assert_eq!(fragments.memory(), 0, "given up");
        assert_eq!(
            add(&mut fragments, &fragment(1, 65528, &[1; 80], false), 0),
            None
        );
        assert_eq!(add(&mut fragments, &fragment(2, 8, &[], true), 0), None);
        assert_eq!(fragments.memory(), 0);
        // The end is known, and something comes behind it.
        add(&mut fragments, &fragment(3, 800, &[1; 8], false), 0);
        add(&mut fragments, &fragment(3, 1600, &[1; 8], true), 0);
        assert_eq!(fragments.memory(), 0);
    }

    #[test]
    fn memory_is_bounded_and_given_back() {
        let mut fragments = Fragments::default();
        for ident in 0..1000 {
            add(
                &mut fragments,
                &fragment(ident, 65000, &[1; 8], true),
                ident.into(),
            );
        }
        assert!(fragments.packets.len() <= PACKETS_MAX);
        add(
            &mut fragments,
            &fragment(1, 8, &[1; 8], true),
            2000 + PATIENCE,
        );
        assert_eq!(fragments.packets.len(), 1);
    }
}
