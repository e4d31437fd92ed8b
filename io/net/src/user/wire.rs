//! Headers of frames for the guest.

use std::net::{Ipv4Addr, SocketAddrV4};

use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, Icmpv4Packet, IpProtocol, Ipv4Packet,
    UdpPacket,
};

use crate::checksum;
use crate::link::{Offload, PartialChecksum};

/// Bytes of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4: usize = 20;
/// Where the payload of IPv4 begins in our frames.
pub const BODY: usize = ETHERNET + IPV4;
/// Bytes of a UDP header.
pub const UDP: usize = 8;

const TTL: u8 = 64;

/// Where a packet comes from and goes to.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// The MAC address of the gateway.
    pub from: EthernetAddress,
    /// That of the guest.
    pub to: EthernetAddress,
    /// The IP address that it comes from.
    pub source: Ipv4Addr,
    /// The one that it goes to.
    pub destination: Ipv4Addr,
}

/// A piece of a packet that is too long for the network.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fragment {
    /// What pieces of one packet have in common.
    pub identification: u16,
    /// Where it begins in the packet.
    pub offset: u16,
    /// It is not the last.
    pub more: bool,
}

/// Writes Ethernet and IPv4 headers for a payload of `len` bytes to the front of `frame`.
pub fn put_headers(
    frame: &mut [u8],
    route: &Route,
    protocol: IpProtocol,
    len: usize,
    piece: Fragment,
) {
    let mut ethernet = EthernetFrame::new_unchecked(&mut *frame);
    ethernet.set_dst_addr(route.to);
    ethernet.set_src_addr(route.from);
    ethernet.set_ethertype(EthernetProtocol::Ipv4);
    let mut ip = Ipv4Packet::new_unchecked(&mut frame[ETHERNET..]);
    ip.set_version(4);
    ip.set_header_len(IPV4 as u8);
    ip.set_dscp(0);
    ip.set_ecn(0);
    ip.set_total_len((IPV4 + len) as u16);
    ip.set_ident(piece.identification);
    ip.clear_flags();
    ip.set_frag_offset(piece.offset);
    ip.set_more_frags(piece.more);
    ip.set_dont_frag(!piece.more && piece.offset == 0);
    ip.set_hop_limit(TTL);
    ip.set_next_header(protocol);
    ip.set_src_addr(route.source);
    ip.set_dst_addr(route.destination);
    ip.fill_checksum();
}

/// The sum over the pseudo header.
pub fn pseudo(route: &Route, protocol: IpProtocol, len: usize) -> u16 {
    checksum::pseudo(route.source, route.destination, protocol.into(), len)
}

/// A frame with an IPv4 payload that `fill` writes.
pub fn frame(
    route: &Route,
    protocol: IpProtocol,
    len: usize,
    fill: impl FnOnce(&mut [u8]),
) -> Vec<u8> {
    let mut frame = vec![0; BODY + len];
    put_headers(&mut frame, route, protocol, len, Fragment::default());
    fill(&mut frame[BODY..]);
    frame
}

/// A UDP datagram (header and data), its checksum complete, or left to the receiver where it `may_be_partial`.
pub fn datagram(
    route: &Route,
    from: u16,
    to: u16,
    data: &[u8],
    may_be_partial: bool,
) -> (Offload, Vec<u8>) {
    let len = UDP + data.len();
    let mut bytes = vec![0; len];
    let mut udp = UdpPacket::new_unchecked(&mut bytes);
    udp.set_src_port(from);
    udp.set_dst_port(to);
    udp.set_len(len as u16);
    udp.payload_mut().copy_from_slice(data);
    let pseudo = pseudo(route, IpProtocol::Udp, len);
    if may_be_partial {
        udp.set_checksum(pseudo);
        return (partial(6), bytes);
    }
    let sum = !checksum::combine(&[pseudo, checksum::data(&bytes)]);
    let sum = if sum == 0 { 0xffff } else { sum };
    UdpPacket::new_unchecked(&mut bytes).set_checksum(sum);
    (Offload::default(), bytes)
}

/// A checksum that the receiver computes, so many bytes into the payload of IPv4.
pub fn partial(offset: u16) -> Offload {
    Offload {
        checksum: Some(PartialChecksum {
            start: BODY as u16,
            offset,
        }),
        segmentation: None,
    }
}

/// An ICMP error about a packet that began with `original` (its IP header and 8 bytes).
pub fn icmp_error(route: &Route, kind: u8, code: u8, original: &[u8]) -> Vec<u8> {
    frame(route, IpProtocol::Icmp, 8 + original.len(), |body| {
        body[8..].copy_from_slice(original);
        (body[0], body[1]) = (kind, code);
        Icmpv4Packet::new_unchecked(body).fill_checksum();
    })
}

/// The start of a packet of `flow` that a guest sent, as an ICMP error quotes it.
pub fn quote(
    from: SocketAddrV4,
    to: SocketAddrV4,
    protocol: IpProtocol,
    rest: [u8; 4],
) -> [u8; IPV4 + 8] {
    let route = Route {
        from: EthernetAddress::default(),
        to: EthernetAddress::default(),
        source: *from.ip(),
        destination: *to.ip(),
    };
    let mut frame = [0; BODY + 8];
    put_headers(&mut frame, &route, protocol, 8, Fragment::default());
    let mut quote = [0; IPV4 + 8];
    quote.copy_from_slice(&frame[ETHERNET..]);
    quote[IPV4..][..2].copy_from_slice(&from.port().to_be_bytes());
    quote[IPV4 + 2..][..2].copy_from_slice(&to.port().to_be_bytes());
    quote[IPV4 + 4..].copy_from_slice(&rest);
    quote
}
