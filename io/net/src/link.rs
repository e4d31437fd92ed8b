//! The seam between a network device and a back-end: Ethernet frames, with what is left undone in them.
//!
//! A guest with a modern driver does not cut its stream into packets of 1500 bytes nor sum them up: it hands over one TCP
//! segment of up to 64 KiB and says in a header how the network would have to cut it ([`Offload`]). A back-end that ends
//! the connection itself, as the user network does, never cuts it at all. Both directions work like that, and each side
//! says beforehand what it takes ([`Accepts`]).
//!
//! Frames towards the guest are *pulled*: a device asks when its driver has put buffers into the ring. So there is no
//! queue between back-end and device that could grow, and a slow guest slows down whoever sends to it.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use doppel_device::Nanos;

/// The longest frame of any back-end, unfinished ones included: 64 KiB and an Ethernet header with a VLAN tag.
pub const FRAME_MAX: usize = 65535 + 18;

/// A checksum that is not computed yet: the field holds the sum over the pseudo header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// The sum runs from here to the end of the frame.
    pub start: u16,
    /// The field is so many bytes behind `start`.
    pub offset: u16,
}

/// What kind of segment is to be cut up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
}

/// How to cut a segment that is longer than the network's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// What it is.
    pub kind: Segment,
    /// Bytes of payload in each packet.
    pub size: u16,
    /// Bytes of headers; a hint, as virtio has it.
    pub header: u16,
}

/// What is left undone in a frame.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// A checksum to be computed.
    pub checksum: Option<PartialChecksum>,
    /// Segmentation to be done.
    pub segmentation: Option<Segmentation>,
}

/// Unfinished frames that a side takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Accepts {
    /// Frames whose checksum is not computed.
    pub checksum: bool,
    /// TCP segments over IPv4 that are too long.
    pub tcp4: bool,
    /// TCP segments over IPv6 that are too long.
    pub tcp6: bool,
}

impl Accepts {
    /// Everything.
    pub const ALL: Accepts = Accepts {
        checksum: true,
        tcp4: true,
        tcp6: true,
    };

    /// Whether a frame is taken in which this is left undone.
    #[must_use]
    pub fn takes(self, offload: Offload) -> bool {
        let whole = match offload.segmentation.map(|s| s.kind) {
            None => true,
            Some(Segment::Tcp4) => self.tcp4,
            Some(Segment::Tcp6) => self.tcp6,
        };
        whole && (self.checksum || offload.checksum.is_none())
    }
}

/// What became of a frame from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// It is on its way, or lost as a network loses frames.
    Taken,
    /// There is no room: offer it again when [`Link::service`] says so.
    Full,
}

/// What became of a wish for a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// The sink got one.
    Frame,
    /// There is none now.
    Nothing,
    /// There is one, of so many bytes, which is more than there is room for. It is kept.
    TooLong(usize),
}

/// Where a frame for the guest goes: what is left undone in it and its parts, to be put together.
pub type Sink<'a> = &'a mut dyn FnMut(Offload, &[&[u8]]);

/// A back-end: the other end of the guest's cable. Nothing in it blocks.
pub trait Link: Send {
    /// Unfinished frames that [`Link::send`] takes.
    fn accepts(&self) -> Accepts;
    /// Tells which unfinished frames the guest takes; none before the first call.
    fn guest_accepts(&mut self, accepts: Accepts);
    /// Takes a frame from the guest.
    fn send(&mut self, offload: Offload, frame: &[u8]) -> Sent;
    /// Gives the next frame for the guest to `sink`, if it has at most `room` bytes.
    fn receive(&mut self, room: usize, sink: Sink) -> Received;
    /// A bound of the next frame's length, so that a device need not find buffers for more.
    fn next_length(&self) -> usize {
        FRAME_MAX
    }
    /// Throws the frame away that was too long.
    fn discard(&mut self);
    /// Whether [`Link::receive`] may have something.
    fn has_frames(&self) -> bool;
    /// A descriptor that is readable once for each news that [`Link::service`] should look at (an epoll instance with
    /// edge-triggered members). It stays the same.
    fn descriptor(&self) -> BorrowedFd<'_>;
    /// When [`Link::service`] has to be called at the latest.
    fn deadline(&self) -> Option<Nanos>;
    /// How many processes that have the network followed the first; none where it has no process of its own.
    fn restarts(&self) -> Arc<AtomicU64> {
        Arc::default()
    }
    /// Looks after host sockets and timers. True where [`Link::send`] has room again after it had not.
    fn service(&mut self) -> bool;
}
