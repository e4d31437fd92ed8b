//! Finishing frames for a guest that takes no unfinished ones: checksums, and cutting up segments.

use std::collections::VecDeque;

use crate::checksum;
use crate::link::{Accepts, Offload, Segment, Segmentation};

const ETHERNET: usize = 14;
const TCP: usize = 20;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// Turns a frame into such as a guest takes that accepts `accepts`. A frame that makes no sense becomes none.
pub fn finish(offload: Offload, frame: Vec<u8>, accepts: Accepts) -> Vec<(Offload, Vec<u8>)> {
    if accepts.takes(offload) {
        return vec![(offload, frame)];
    }
    let whole = match offload.segmentation {
        Some(segmentation) => cut(segmentation, &frame).unwrap_or_default(),
        None => vec![frame],
    };
    let summed = whole.into_iter().filter_map(|mut frame| {
        sum(offload, &mut frame)?;
        Some((Offload::default(), frame))
    });
    summed.collect()
}

/// The same of frames that wait, which may have been kept for a guest that accepted more.
pub fn finish_waiting(frames: &mut VecDeque<(Offload, Vec<u8>)>, accepts: Accepts) {
    let waiting = std::mem::take(frames).into_iter();
    frames.extend(waiting.flat_map(|(offload, frame)| finish(offload, frame, accepts)));
}

fn sum(offload: Offload, frame: &mut [u8]) -> Option<()> {
    let Some(partial) = offload.checksum else {
        return Some(());
    };
    let covered = frame.get_mut(usize::from(partial.start)..)?;
    let at = usize::from(partial.offset);
    covered.get(at..at + 2)?;
    let sum = !checksum::data(covered);
    // 0 would mean "none" in UDP; both are the same sum.
    let sum = if sum == 0 { 0xffff } else { sum };
    covered[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    Some(())
}

/// Where things are in a TCP segment.
struct Layout {
    ip: usize,
    tcp: usize,
    data: usize,
    v4: bool,
}

fn layout(kind: Segment, frame: &[u8]) -> Option<Layout> {
    let (ethertype, v4) = match kind {
        Segment::Tcp4 => ([0x08, 0x00], true),
        Segment::Tcp6 => ([0x86, 0xdd], false),
    };
    let tagged = frame.get(12..14)? == [0x81, 0x00];
    let ip = if tagged { ETHERNET + 4 } else { ETHERNET };
    if frame.get(ip - 2..ip)? != ethertype {
        return None;
    }
    let header = if v4 {
        usize::from(frame.get(ip)? & 0xf) * 4
    } else {
        40
    };
    let protocol = *frame.get(ip + if v4 { 9 } else { 6 })?;
    let tcp = ip + header;
    let data = tcp + usize::from(frame.get(tcp + 12)? >> 4) * 4;
    let sound = header >= 20 && protocol == 6 && data >= tcp + TCP && data <= frame.len();
    sound.then_some(Layout { ip, tcp, data, v4 })
}

/// The packets that a network would make of a segment; their TCP checksums hold the sum over the pseudo header.
fn cut(segmentation: Segmentation, frame: &[u8]) -> Option<Vec<Vec<u8>>> {
    let at = layout(segmentation.kind, frame)?;
    let (headers, data) = frame.split_at(at.data);
    let size = usize::from(segmentation.size);
    let count = data.len().div_ceil(size).max(1);
    // A guest must not blow one frame up to gigabytes: as many bytes of headers as Linux' own limit of 64 segments and more.
    if count > 2048 {
        return None;
    }
    let piece = |n: usize| {
        let data = &data[(n * size).min(data.len())..((n + 1) * size).min(data.len())];
        let mut packet = [headers, data].concat();
        adjust(&mut packet, &at, n, size, n + 1 == count);
        packet
    };
    Some((0..count).map(piece).collect())
}

fn adjust(packet: &mut [u8], at: &Layout, n: usize, size: usize, last: bool) {
    let len = packet.len();
    if at.v4 {
        let ip = &mut packet[at.ip..at.tcp];
        ip[2..4].copy_from_slice(&((len - at.ip) as u16).to_be_bytes());
        let ident = u16::from_be_bytes([ip[4], ip[5]]).wrapping_add(n as u16);
        ip[4..6].copy_from_slice(&ident.to_be_bytes());
        ip[10..12].fill(0);
        let sum = !checksum::data(ip);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
    } else {
        packet[at.ip + 4..at.ip + 6].copy_from_slice(&((len - at.tcp) as u16).to_be_bytes());
    }
    let addresses = if at.v4 {
        at.ip + 12..at.ip + 20
    } else {
        at.ip + 8..at.ip + 40
    };
    let pseudo = [checksum::data(&packet[addresses]), 6, (len - at.tcp) as u16];
    let pseudo = checksum::combine(&pseudo);
    let tcp = &mut packet[at.tcp..];
    let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let sequence = sequence.wrapping_add((n * size) as u32);
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    if !last {
        tcp[13] &= !FIN_PSH;
    }
    if n > 0 {
        tcp[13] &= !CWR;
    }
    tcp[16..18].copy_from_slice(&pseudo.to_be_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::PartialChecksum;
    use smoltcp::wire::{IpProtocol, Ipv4Address, Ipv4Packet, TcpPacket, TcpSeqNumber};

    const FROM: Ipv4Address = Ipv4Address::new(192, 0, 2, 1);
    const TO: Ipv4Address = Ipv4Address::new(192, 0, 2, 2);

    fn segment(data: &[u8]) -> (Offload, Vec<u8>) {
        let mut frame = vec![0; 54 + data.len()];
        frame[12] = 8;
        let mut ip = Ipv4Packet::new_unchecked(&mut frame[14..]);
        ip.set_version(4);
        ip.set_header_len(20);
        ip.set_total_len(40 + data.len() as u16);
        ip.set_ident(0xffff);
        ip.set_next_header(IpProtocol::Tcp);
        ip.set_src_addr(FROM);
        ip.set_dst_addr(TO);
        ip.fill_checksum();
        let mut tcp = TcpPacket::new_unchecked(ip.payload_mut());
        tcp.set_header_len(20);
        tcp.set_seq_number(TcpSeqNumber(-5));
        tcp.set_fin(true);
        tcp.set_psh(true);
        tcp.set_ack(true);
        tcp.payload_mut().copy_from_slice(data);
        let pseudo = checksum::pseudo(FROM, TO, 6, 20 + data.len());
        tcp.set_checksum(pseudo);
        let offload = Offload {
            checksum: Some(PartialChecksum {
                start: 34,
                offset: 16,
            }),
            segmentation: Some(Segmentation {
                kind: Segment::Tcp4,
                size: 1000,
                header: 54,
            }),
        };
        (offload, frame)
    }

    #[test]
    fn a_segment_becomes_the_packets_that_a_network_would_make_of_it() {
        let data: Vec<u8> = (0..10_500u32).map(|n| (n * 13) as u8).collect();
        let (offload, frame) = segment(&data);
        let packets = finish(offload, frame, Accepts::default());
        assert_eq!(packets.len(), 11);
        let mut got = Vec::new();
        for (n, (offload, frame)) in packets.iter().enumerate() {
            assert_eq!(*offload, Offload::default());
            let ip = Ipv4Packet::new_checked(&frame[14..]).unwrap();
            assert!(ip.verify_checksum());
            assert_eq!(ip.ident(), 0xffffu16.wrapping_add(n as u16));
            let tcp = TcpPacket::new_checked(ip.payload()).unwrap();
            assert!(tcp.verify_checksum(&FROM.into(), &TO.into()));
            assert_eq!(tcp.seq_number(), TcpSeqNumber(-5) + n * 1000);
            assert_eq!((tcp.fin(), tcp.psh()), (n == 10, n == 10));
            got.extend_from_slice(tcp.payload());
        }
        assert_eq!(got, data);
    }

    #[test]
    fn what_the_guest_takes_is_left_alone() {
        let (offload, frame) = segment(&[1; 3000]);
        let same = finish(offload, frame.clone(), Accepts::ALL);
        assert_eq!(same, [(offload, frame)]);
    }

    #[test]
    fn nonsense_becomes_nothing_and_never_too_much() {
        let (mut offload, frame) = segment(&[1; 60000]);
        for len in 0..80 {
            finish(offload, frame[..len].to_vec(), Accepts::default());
        }
        offload.segmentation.as_mut().unwrap().size = 1;
        assert!(finish(offload, frame, Accepts::default()).is_empty());
    }
}
