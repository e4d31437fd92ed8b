//! A tap device of the host, for users who have one (Linux, Documentation/networking/tuntap.rst).

use std::ffi::c_void;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use doppel_device::Nanos;
use rustix::event::epoll;
use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

use crate::header::HEADER;
use crate::link::{Accepts, FRAME_MAX, Link, Offload, Received, Sent, Sink};

const DEVICE: &str = "/dev/net/tun";
const NAME_MAX: usize = 15;

const TUNSETIFF: Opcode = 0x4004_54ca;
const TUNSETOFFLOAD: Opcode = 0x4004_54d0;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;
const TUN_F_CSUM: usize = 1;
const TUN_F_TSO4: usize = 2;
const TUN_F_TSO6: usize = 4;

/// Why a tap device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// A name that is none.
    #[error(
        "{0:?} is no name for a tap device: it has 1 to {NAME_MAX} characters, none of them '/'"
    )]
    Name(String),
    /// No right to use tap devices at all.
    #[error("{DEVICE} cannot be opened: {0}")]
    Device(io::Error),
    /// No right to this one.
    #[error(
        "the tap device {0} is not yours: ask root for `ip tuntap add {0} mode tap user NAME`, or take --net user"
    )]
    NotYours(String),
    /// The host refused something else.
    #[error("the tap device {0}: {1}")]
    Host(String, io::Error),
}

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

struct SetInterface(Request);

// SAFETY: TUNSETIFF reads and writes a `struct ifreq`, of 40 bytes on x86-64, which `Request` is; it lives as long as the call.
unsafe impl Ioctl for SetInterface {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        TUNSETIFF
    }

    fn as_ptr(&mut self) -> *mut c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

struct SetOffload(usize);

// SAFETY: TUNSETOFFLOAD takes its argument as a number and follows no pointer.
unsafe impl Ioctl for SetOffload {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        TUNSETOFFLOAD
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0)
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// A tap device.
pub struct Tap {
    device: OwnedFd,
    poller: OwnedFd,
    buffer: Vec<u8>,
    // A frame that was too long for the guest's buffers.
    kept: Option<usize>,
    readable: bool,
    refused: bool,
}

impl Tap {
    /// Opens the tap device `name`.
    pub fn open(name: &str) -> Result<Self, TapError> {
        if name.is_empty() || name.len() > NAME_MAX || name.contains(['/', '\0', '%']) {
            return Err(TapError::Name(name.to_owned()));
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let device = rustix::fs::open(DEVICE, flags, Mode::empty())
            .map_err(|error| TapError::Device(error.into()))?;
        let mut request = Request {
            name: [0; 16],
            flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR,
            rest: [0; 22],
        };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        let host = |error: Errno| match error {
            Errno::PERM => TapError::NotYours(name.to_owned()),
            error => TapError::Host(name.to_owned(), error.into()),
        };
        // SAFETY: the descriptor is that of the tun driver, whose request `SetInterface` is.
        unsafe { ioctl(&device, SetInterface(request)) }.map_err(host)?;
        let poller = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host)?;
        let what = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&poller, &device, epoll::EventData::new_u64(0), what).map_err(host)?;
        Ok(Tap {
            device,
            poller,
            buffer: vec![0; HEADER + FRAME_MAX],
            kept: None,
            readable: true,
            refused: false,
        })
    }

    fn fetch(&mut self) -> Option<usize> {
        if self.kept.is_none() && self.readable {
            let buffer = &mut self.buffer[..];
            let device = &self.device;
            match retry_on_intr(|| rustix::io::read(device, &mut *buffer)) {
                Ok(n) => self.kept = Some(n),
                Err(_) => self.readable = false,
            }
        }
        self.kept
    }
}

impl Link for Tap {
    fn accepts(&self) -> Accepts {
        Accepts::ALL
    }

    fn guest_accepts(&mut self, accepts: Accepts) {
        let bit = |wanted: bool, bit: usize| if wanted { bit } else { 0 };
        let bits = bit(accepts.checksum, TUN_F_CSUM)
            | bit(accepts.checksum && accepts.tcp4, TUN_F_TSO4)
            | bit(accepts.checksum && accepts.tcp6, TUN_F_TSO6);
        // SAFETY: the descriptor is that of the tun driver, whose request `SetOffload` is.
        let set = unsafe { ioctl(&self.device, SetOffload(bits)) };
        debug_assert!(set.is_ok(), "{set:?}");
    }

    fn send(&mut self, offload: Offload, frame: &[u8]) -> Sent {
        let header = offload.encode();
        let parts = [IoSlice::new(&header), IoSlice::new(frame)];
        match retry_on_intr(|| rustix::io::writev(&self.device, &parts)) {
            Err(Errno::AGAIN) => {
                self.refused = true;
                Sent::Full
            }
            // A frame that the host does not like, or a device that is down, loses it.
            _ => Sent::Taken,
        }
    }

    fn receive(&mut self, room: usize, sink: Sink) -> Received {
        while let Some(n) = self.fetch() {
            if n > HEADER + room {
                return Received::TooLong(n - HEADER);
            }
            self.kept = None;
            let Some((header, frame)) = self.buffer[..n].split_first_chunk() else {
                continue;
            };
            // A kernel says nothing that makes no sense; what it might say one day is lost.
            if let Some(offload) = Offload::decode(header, frame.len()) {
                sink(offload, &[frame]);
                return Received::Frame;
            }
        }
        Received::Nothing
    }

    fn discard(&mut self) {
        self.kept = None;
    }

    fn has_frames(&self) -> bool {
        self.kept.is_some() || self.readable
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.poller.as_fd()
    }

    fn deadline(&self) -> Option<Nanos> {
        None
    }

    fn service(&mut self) -> bool {
        let mut events = Vec::with_capacity(4);
        let now = rustix::time::Timespec::default();
        let spare = rustix::buffer::spare_capacity(&mut events);
        let _ = epoll::wait(&self.poller, spare, Some(&now));
        let flags = events
            .iter()
            .map(|event: &epoll::Event| event.flags)
            .fold(epoll::EventFlags::empty(), |all, flags| all | flags);
        self.readable |= flags.contains(epoll::EventFlags::IN);
        let offer_again = self.refused && flags.contains(epoll::EventFlags::OUT);
        self.refused &= !offer_again;
        offer_again
    }
}
