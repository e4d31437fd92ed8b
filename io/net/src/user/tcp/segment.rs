//! TCP segments: what one from the guest says, and headers of those to it.
//!
//! Source: RFC 9293, section 3.1; options of RFC 9293 (maximum segment size) and RFC 7323 (window scale).

use smoltcp::wire::{IpProtocol, TcpOption, TcpPacket};

use crate::checksum;
use crate::link::{Accepts, Offload, PartialChecksum, Segment, Segmentation};
use crate::user::wire::{self, BODY, Route};

/// FIN, SYN, RST, PSH, ACK.
pub const FIN: u8 = 1;
/// Opens a connection.
pub const SYN: u8 = 2;
/// Ends it at once.
pub const RST: u8 = 4;
/// Hand on what there is.
pub const PSH: u8 = 8;
/// The acknowledgement number counts.
pub const ACK: u8 = 16;

/// Bytes of a TCP header without options.
pub const HEADER: usize = 20;
/// Headers of a frame with data.
pub const DATA_HEADERS: usize = BODY + HEADER;
const SYN_OPTIONS: usize = 8;
const DEFAULT_MSS: u16 = 536;

/// A segment from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incoming<'a> {
    pub source_port: u16,
    pub destination_port: u16,
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    pub window: u16,
    /// Maximum segment size and window shift, of a SYN.
    pub options: Options,
    pub data: &'a [u8],
}

/// What a SYN tells of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    pub mss: u16,
    pub shift: Option<u8>,
}

impl<'a> Incoming<'a> {
    /// Reads the payload of an IP packet; `None` where it is damaged.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let packet = TcpPacket::new_checked(bytes).ok()?;
        let flags = bytes[13] & 0x3f;
        Some(Incoming {
            source_port: packet.src_port(),
            destination_port: packet.dst_port(),
            sequence: packet.seq_number().0 as u32,
            acknowledged: packet.ack_number().0 as u32,
            flags,
            window: packet.window_len(),
            options: options(packet.options(), flags & SYN != 0),
            data: packet.payload(),
        })
    }

    /// Whether all of `flags` are set.
    pub fn has(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }

    /// How much sequence space it takes.
    pub fn len(&self) -> u32 {
        self.data.len() as u32 + u32::from(self.has(SYN)) + u32::from(self.has(FIN))
    }
}

fn options(mut bytes: &[u8], wanted: bool) -> Options {
    let mut found = Options {
        mss: DEFAULT_MSS,
        shift: None,
    };
    while wanted && !bytes.is_empty() {
        let Ok((rest, option)) = TcpOption::parse(bytes) else {
            break;
        };
        match option {
            TcpOption::EndOfList => break,
            TcpOption::MaxSegmentSize(mss) => found.mss = mss,
            TcpOption::WindowScale(shift) => found.shift = Some(shift.min(14)),
            _ => {}
        }
        bytes = rest;
    }
    found
}

/// A segment to the guest, but for its data.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing {
    pub source_port: u16,
    pub destination_port: u16,
    pub sequence: u32,
    pub acknowledged: u32,
    pub flags: u8,
    pub window: u16,
    /// Of a SYN.
    pub options: Option<Options>,
}

/// Headers of a frame.
pub struct Headers {
    bytes: [u8; DATA_HEADERS + SYN_OPTIONS],
    len: usize,
}

impl AsRef<[u8]> for Headers {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Outgoing {
    /// The headers for `data`, for a guest that takes `accepts`, to be cut into pieces of `mss`, and what is left undone in them.
    pub fn headers(
        &self,
        accepts: Accepts,
        route: &Route,
        data: &[&[u8]],
        mss: u16,
    ) -> (Offload, Headers) {
        let header = HEADER + self.options.map_or(0, |_| SYN_OPTIONS);
        let len = data.iter().map(|part| part.len()).sum::<usize>();
        let total = header + len;
        let mut headers = Headers {
            bytes: [0; DATA_HEADERS + SYN_OPTIONS],
            len: BODY + header,
        };
        wire::put_headers(
            &mut headers.bytes,
            route,
            IpProtocol::Tcp,
            total,
            wire::Fragment::default(),
        );
        let tcp = &mut headers.bytes[BODY..BODY + header];
        self.put(tcp);
        let pseudo = wire::pseudo(route, IpProtocol::Tcp, total);
        let mut offload = Offload::default();
        if accepts.checksum {
            tcp[16..18].copy_from_slice(&pseudo.to_be_bytes());
            offload.checksum = Some(PartialChecksum {
                start: BODY as u16,
                offset: 16,
            });
            if len > mss.into() {
                offload.segmentation = Some(Segmentation {
                    kind: Segment::Tcp4,
                    size: mss,
                    header: headers.len as u16,
                });
            }
        } else {
            let sum = !checksum::combine(&[pseudo, checksum::data(tcp), checksum::parts(data)]);
            tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        }
        (offload, headers)
    }

    fn put(&self, tcp: &mut [u8]) {
        tcp[0..2].copy_from_slice(&self.source_port.to_be_bytes());
        tcp[2..4].copy_from_slice(&self.destination_port.to_be_bytes());
        tcp[4..8].copy_from_slice(&self.sequence.to_be_bytes());
        tcp[8..12].copy_from_slice(&self.acknowledged.to_be_bytes());
        tcp[12] = (tcp.len() as u8 / 4) << 4;
        tcp[13] = self.flags;
        tcp[14..16].copy_from_slice(&self.window.to_be_bytes());
        if let Some(options) = self.options {
            let [high, low] = options.mss.to_be_bytes();
            // Maximum segment size; then window scale behind a no-operation, or four of those.
            let scale = options.shift.map_or([1; 4], |shift| [1, 3, 3, shift]);
            tcp[HEADER..HEADER + 4].copy_from_slice(&[2, 4, high, low]);
            tcp[HEADER + 4..].copy_from_slice(&scale);
        }
    }

    /// A whole frame without data.
    pub fn frame(&self, accepts: Accepts, route: &Route) -> (Offload, Vec<u8>) {
        let (offload, headers) = self.headers(accepts, route, &[], u16::MAX);
        (offload, headers.as_ref().to_vec())
    }
}

/// Whether `a` is before `b` in sequence space.
pub fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}
