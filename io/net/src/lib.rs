//! Network back-ends, behind one seam: what is at the other end of a guest's cable.
//!
//! Reading order: `link` (the seam), `port` (what makes a device of one side meet a back-end on the other), `user` (a
//! network behind an ordinary process). docs/network.md describes the networks.

mod checksum;
mod link;
mod port;
mod user;

pub use link::{
    Accepts, FRAME_MAX, HEADERS_MAX, Link, Offload, PartialChecksum, Received, Segment,
    Segmentation, Sent, Sink,
};
pub use port::Port;
pub use user::{Forward, ForwardError, GUEST, Transport, UserConfig, UserError, UserNetwork};
