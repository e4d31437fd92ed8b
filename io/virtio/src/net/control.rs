//! The control queue: what the driver wants of the card (virtio 1.2, 5.1.6.5).

use std::sync::{Arc, Mutex};

use doppel_memory::GuestRam;
use doppel_net::Port;
use virtio_bindings::virtio_net as bit;

use super::{Settings, accepts, lock};
use crate::{Broken, Queue};

const OK: u8 = bit::VIRTIO_NET_OK as u8;
const ERROR: u8 = bit::VIRTIO_NET_ERR as u8;
const RX_MODE: u8 = bit::VIRTIO_NET_CTRL_RX as u8;
const MAC: u8 = bit::VIRTIO_NET_CTRL_MAC as u8;
const MAC_TABLE_SET: u8 = bit::VIRTIO_NET_CTRL_MAC_TABLE_SET as u8;
const MAC_ADDR_SET: u8 = bit::VIRTIO_NET_CTRL_MAC_ADDR_SET as u8;
const GUEST_OFFLOADS: u8 = bit::VIRTIO_NET_CTRL_GUEST_OFFLOADS as u8;
const GUEST_OFFLOADS_SET: u8 = bit::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET as u8;
/// More than any command with a table of addresses that a driver would send.
const COMMAND_MAX: usize = 4096;

/// The queue.
pub struct Control {
    /// Its rings.
    pub queue: Queue,
    settings: Arc<Mutex<Settings>>,
    port: Arc<Port>,
}

impl Control {
    /// The queue of a driver that is ready.
    pub fn new(queue: Queue, settings: Arc<Mutex<Settings>>, port: Arc<Port>) -> Self {
        Control {
            queue,
            settings,
            port,
        }
    }

    /// Carries out what there is, at most `limit` commands: a driver waits for each before the next. True if there may be more.
    pub fn drain(&mut self, ram: &GuestRam, limit: usize) -> Result<bool, Broken> {
        for _ in 0..limit {
            let Some(chain) = self.queue.pop(ram)? else {
                if self.queue.listen()? {
                    continue;
                }
                return Ok(false);
            };
            let mut command = [0; COMMAND_MAX];
            let n = chain.readable.read(&mut command);
            let answer = self.command(&command[..n]);
            let written = chain.writable.write(&[answer]);
            self.queue.push(chain.head, written as u32)?;
            self.queue.announce()?;
        }
        Ok(true)
    }

    fn command(&self, command: &[u8]) -> u8 {
        let [class, what, rest @ ..] = command else {
            return ERROR;
        };
        match (*class, *what) {
            // The card filters nothing, so every mode is kept.
            (RX_MODE, 0..=5) | (MAC, MAC_TABLE_SET) => OK,
            (MAC, MAC_ADDR_SET) => match rest.first_chunk::<6>() {
                Some(mac) => {
                    lock(&self.settings).mac = *mac;
                    OK
                }
                None => ERROR,
            },
            (GUEST_OFFLOADS, GUEST_OFFLOADS_SET) => match rest.first_chunk::<8>() {
                Some(bits) => {
                    let bits = u64::from_le_bytes(*bits);
                    lock(&self.settings).offloads = Some(bits);
                    self.port.with(|link| link.guest_accepts(accepts(bits)));
                    OK
                }
                None => ERROR,
            },
            _ => ERROR,
        }
    }
}
