//! Hostile drivers: a campaign of random register accesses, rings and resets against the devices.
//!
//! A round is one device. The driver starts it honestly, more or less, and then does what comes to its mind: chains of random descriptors
//! (loops, tables in tables, buffers outside of memory, of gigabytes, on top of the rings), indices that jump, every register with every
//! value, queues moved, reset and enabled again, resets in the midst of requests, saved states. Afterwards must hold:
//!
//! - no thread of the device panicked;
//! - a reset comes back, and an honest driver is served after it;
//! - the part of RAM that no descriptor named is as it was;
//! - what lies beside a shared directory is as it was.

mod class;
mod random;
mod share;

use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use doppel_device::PciFunction;

use crate::testing::{DriverQueue, RAM_SIZE, Rig};
use crate::{EVENT_IDX, NEEDS_RESET};
use class::Class;
pub use random::Random;

/// Nobody names addresses from here on.
const UNTOUCHED: u64 = RAM_SIZE - (1 << 20);
const RINGS: u64 = 0x1_0000;
/// Where the buffers of chains are that are not all wrong; the first begins with what its class expects there.
const BUFFERS: u64 = 0x20_0000;
const HONEST_RINGS: u64 = 0x80_0000;
const HONEST_BUFFERS: u64 = 0x90_0000;

/// How far a campaign goes.
#[derive(Clone, Copy, Debug)]
pub struct Campaign {
    /// What the random numbers start from.
    pub seed: u64,
    /// Rounds at most.
    pub rounds: u64,
    /// Time at most.
    pub limit: Duration,
}

/// What a campaign did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    /// Devices.
    pub rounds: u64,
    /// Things done to them.
    pub actions: u64,
    /// Of those, chains offered.
    pub chains: u64,
    /// Times that a device was found to ask for a reset.
    pub broken: u64,
}

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Runs a campaign.
///
/// # Panics
/// Where a device does not stand it; the message has the seed of the round.
pub fn run(campaign: Campaign) -> Report {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::SeqCst);
            before(info);
        }));
    });
    let end = Instant::now() + campaign.limit;
    let mut report = Report::default();
    for round in 0..campaign.rounds {
        if Instant::now() >= end {
            break;
        }
        let seed = campaign.seed.wrapping_add(round);
        Round::new(seed, Random::seeded(seed)).run(&mut report);
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "seed {seed}: a panic");
        report.rounds += 1;
    }
    report
}

/// A round that does what the bytes say, as far as they go.
///
/// # Panics
/// As [`run`].
pub fn run_bytes(bytes: &[u8]) {
    Round::new(0, Random::of_bytes(bytes)).run(&mut Report::default());
}

impl Random {
    /// A value as registers dislike it.
    fn value(&mut self) -> u64 {
        match self.below(6) {
            0 => self.one(&[0, 1, 2, 4, 8, 0xf, 0x40, 0x7f, 0x80, 0xff, 0xffff]),
            1 => u64::MAX >> self.below(64),
            2 => 1 << self.below(64),
            3 => self.below(UNTOUCHED),
            _ => self.next(),
        }
    }

    /// An address for a buffer: seldom honest, never in the part that is to stay untouched.
    fn address(&mut self) -> u64 {
        match self.below(8) {
            0 => RINGS + self.below(0x2000),
            1 => RAM_SIZE + self.below(1 << 40),
            2 => u64::MAX - self.below(0x2000),
            3 => 0xc000_0000 + self.below(1 << 31),
            _ => self.below(UNTOUCHED - 0x2_0000),
        }
    }

    fn length(&mut self) -> u32 {
        match self.below(8) {
            0 => 0,
            1 => self.next() as u32 | 1 << 31,
            2 => self.below(0x1_0000) as u32,
            _ => self.one(&[1, 8, 15, 16, 17, 512, 513, 1024, 4096]),
        }
    }
}

struct Round {
    seed: u64,
    random: Random,
    rig: Rig,
    queues: Vec<DriverQueue>,
    class: Class,
    /// After the device.
    host: class::Kept,
}

impl Round {
    fn new(seed: u64, mut random: Random) -> Self {
        let class = Class::any(&mut random);
        let (device, kept) = class.device(&mut random);
        let rig = Rig::new(device);
        Round {
            seed,
            random,
            rig,
            queues: Vec::new(),
            class,
            host: kept,
        }
    }

    fn run(mut self, report: &mut Report) {
        self.start();
        for _ in 0..200 {
            if self.random.is_used_up() {
                break;
            }
            self.act(report);
            report.actions += 1;
        }
        report.broken += u64::from(self.rig.status() & NEEDS_RESET != 0);
        self.check_honest();
        self.rig.pci.stop();
        self.check_untouched();
    }

    fn start(&mut self) {
        let features = self.rig.offered() & self.random.next() | self.random.one(&[0, EVENT_IDX]);
        if self.random.below(2) == 0 {
            self.rig.use_msix(3);
        }
        self.queues = self.rig.start(features, RINGS);
    }

    fn act(&mut self, report: &mut Report) {
        match self.random.below(32) {
            0 => {
                report.broken += u64::from(self.rig.status() & NEEDS_RESET != 0);
                self.start();
            }
            1 => self.rig.set_status(0),
            2 | 3 => self.write_bar(),
            4 => self.write_config(),
            5 => self.reset_queue(),
            6 => self.save_and_restore(),
            7 => self.jump(),
            8 => self.scribble(),
            9..12 => self.notify(),
            // The device's threads have their turn.
            12 | 13 => std::thread::sleep(Duration::from_micros(200)),
            _ => {
                self.offer_chain();
                report.chains += 1;
            }
        }
    }

    fn write_bar(&mut self) {
        let block = self
            .random
            .one(&[0, 0, 0, 0x1000, 0x2000, 0x3000, 0x4000, 0x6000, 0x7000]);
        let offset = block + self.random.below(0x60);
        let (size, value) = (self.random.one(&[1, 2, 4, 8]), self.random.value());
        // A ring on top of what is to stay untouched would not be the device's fault.
        let place = (0x20..0x38).contains(&offset);
        let value = if place { value % UNTOUCHED } else { value };
        self.rig.write(offset, size, value);
        self.rig.read(offset, size);
    }

    fn write_config(&mut self) {
        let offset = self.random.below(0x100) as u16;
        // Through the window to the BAR the address of a ring could become anything.
        if (0x80..0x98).contains(&offset) {
            self.rig.pci.config_read(offset, 4);
            return;
        }
        let size = self.random.one(&[1, 2, 4]);
        let value = self.random.value() as u32;
        self.rig.pci.config_write(offset, size, value);
        self.notify();
        self.rig.place();
    }

    fn reset_queue(&mut self) {
        let n = self.random.below(self.queues.len() as u64) as u16;
        self.rig.write(0x16, 2, n.into());
        self.rig.write(0x3a, 2, 1);
        if self.random.below(4) != 0 {
            self.queues[usize::from(n)] = self.rig.enable_queue(n, RINGS + 0x1_0000 * u64::from(n));
        }
    }

    fn save_and_restore(&mut self) {
        let mut state = self.rig.pci.save();
        if self.random.below(2) == 0 {
            let n = self.random.below(state.frontend.queues.len() as u64) as usize;
            let queue = &mut state.frontend.queues[n];
            queue.taken = self.random.next() as u16;
            queue.size = self.random.value() as u16;
        }
        self.rig.pci.restore(&state);
        self.rig.place();
    }

    /// An index that was never reached.
    fn jump(&mut self) {
        let (index, ahead) = (self.pick(), self.random.value() as u16);
        let queue = &self.queues[index];
        self.rig.ram.store(queue.avail() + 2, ahead);
    }

    /// Bytes over the rings.
    fn scribble(&mut self) {
        let at = RINGS + self.random.below(0x2000);
        let bytes = self.random.next().to_le_bytes();
        // An address that would come of it may be any, so none of the descriptors is written whole.
        self.rig.ram.write_from_device(at, &bytes[..2]);
    }

    fn notify(&mut self) {
        let index = self.pick();
        self.rig.notify(&self.queues[index]);
    }

    fn pick(&mut self) -> usize {
        self.random.below(self.queues.len() as u64) as usize
    }

    fn offer_chain(&mut self) {
        let index = self.pick();
        let ram = &self.rig.ram;
        let queue = &mut self.queues[index];
        let first = self.random.below(queue.size.into()) as u16;
        let count = self.random.below(6) as u16 + 1;
        let header = self.class.header(&mut self.random);
        ram.write_from_device(BUFFERS, &header);
        for n in 0..count {
            let number = first.wrapping_add(n) % queue.size;
            let honest = self.random.below(3) != 0;
            let last = n + 1 == count;
            let mut flags = if last { 0 } else { 1 };
            flags |= if honest {
                u16::from(n > 0) * 2
            } else {
                self.random.below(8) as u16
            };
            let (mut address, mut len) = (self.random.address(), self.random.length());
            if honest {
                (address, len) = (
                    BUFFERS + 0x1000 * u64::from(n),
                    self.random.one(&self.class.lengths()),
                );
            }
            let next = match self.random.below(10) {
                0 => self.random.next() as u16,
                1 => first,
                _ => number.wrapping_add(1) % queue.size,
            };
            let table = queue.base;
            DriverQueue::put_descriptor(ram, table, number, (address, len, flags, next));
        }
        queue.offer(ram, first);
        if self.random.below(2) == 0 {
            self.rig.notify(queue);
        }
    }

    /// After a reset an honest driver is served.
    fn check_honest(&mut self) {
        self.rig.place();
        let seed = self.seed;
        let (rig, ram) = (&self.rig, &self.rig.ram);
        let mut queues = rig.start(EVENT_IDX, HONEST_RINGS);
        let honest = self.class.honest(HONEST_BUFFERS);
        for (at, bytes) in honest.memory {
            ram.write_from_device(at, &bytes);
        }
        for (queue, pieces) in honest.before {
            queues[queue].submit(ram, &pieces);
        }
        let queue = &mut queues[honest.queue];
        queue.submit(ram, &honest.pieces);
        rig.notify(queue);
        let used = queue.wait(ram);
        let class = self.class;
        assert_eq!(
            used.map(|u| u.1),
            Some(honest.used),
            "seed {seed}: an honest request to {class:?}"
        );
    }

    fn check_untouched(&self) {
        assert!(
            self.host.is_well(),
            "seed {}: the host of {:?}",
            self.seed,
            self.class
        );
        for at in (UNTOUCHED..RAM_SIZE).step_by(8) {
            assert_eq!(
                self.rig.ram.load::<u64>(at),
                Some(0),
                "seed {}: {at:#x}",
                self.seed
            );
        }
    }
}
