//! Network back-ends, behind one seam: what is at the other end of a guest's cable.
//!
//! Reading order: `link` (the seam), `port` (what a device holds of a back-end), `user` (a network behind an ordinary
//! process), `switch` (machines among themselves), `tap_unsafe` (a device of the host), `remote` (any of them in a process of its own), `options` (what a user
//! writes). docs/network.md describes the networks.

mod checksum;
mod finish;
mod header;
mod link;
mod options;
mod port;
mod remote;
mod switch;
mod tap_unsafe;
mod user;

pub use header::HEADER;
pub use link::{
    Accepts, FRAME_MAX, Link, Offload, PartialChecksum, Received, Segment, Segmentation, Sent, Sink,
};
pub use options::{NetConfig, NetError, Network, StartNetwork};
pub use port::Port;
pub use remote::{RemoteLink, serve};
pub use switch::{Switch, SwitchError, make_switch_folder, switch_folder};
pub use tap_unsafe::{Tap, TapError};
pub use user::{Forward, ForwardError, GUEST, Transport, UserConfig, UserError, UserNetwork};
