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

use std::fs;
use std::io::{self, IoSlice, IoSliceMut};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

use doppel_block::BlockBackend;
use doppel_device::PciFunction;
use doppel_share::{HEADER_LEN, Limits, REPLY_LEN, Share, ShareSpec, opcode};

use crate::testing::{BAR_AT, DriverQueue, Piece, RAM_SIZE, Rig};
use crate::{Blk, EVENT_IDX, Fs, NEEDS_RESET, Rng, VirtioDevice};

/// Nobody names addresses from here on.
const UNTOUCHED: u64 = RAM_SIZE - (1 << 20);
const RINGS: u64 = 0x1_0000;
const HONEST_RINGS: u64 = 0x80_0000;
const HONEST_BUFFERS: u64 = 0x90_0000;
const DISK_LEN: usize = 64 << 10;

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
        Round::new(seed).run(&mut report);
        assert_eq!(PANICS.load(Ordering::SeqCst), 0, "seed {seed}: a panic");
        report.rounds += 1;
    }
    report
}

/// A disk in memory.
struct MemoryDisk(Mutex<Vec<u8>>);

impl MemoryDisk {
    fn with(&self, offset: u64, f: impl FnOnce(&mut [u8]) -> Option<()>) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let found = bytes.get_mut(at..).and_then(f);
        found.ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

impl BlockBackend for MemoryDisk {
    fn len(&self) -> u64 {
        DISK_LEN as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, offset: u64, into: &mut [IoSliceMut<'_>]) -> io::Result<()> {
        self.with(offset, |mut bytes| {
            for slice in into {
                let (now, rest) = bytes.split_at_mut_checked(slice.len())?;
                slice.copy_from_slice(now);
                bytes = rest;
            }
            Some(())
        })
    }
    fn write_at(&self, offset: u64, from: &[IoSlice<'_>]) -> io::Result<()> {
        self.with(offset, |mut bytes| {
            for slice in from {
                let (now, rest) = bytes.split_at_mut_checked(slice.len())?;
                now.copy_from_slice(slice);
                bytes = rest;
            }
            Some(())
        })
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }
    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        self.with(offset, |bytes| {
            bytes.get_mut(..len)?.fill(0);
            Some(())
        })
    }
}

/// A shared directory with something beside it that nobody may touch.
struct Folder(PathBuf);

const SECRET: &[u8] = b"secret";

impl Folder {
    fn new(seed: u64) -> io::Result<Self> {
        let name = format!("doppel-hostile-{}-{seed}", std::process::id());
        let folder = Folder(std::env::temp_dir().join(name));
        fs::create_dir_all(folder.0.join("share/folder"))?;
        fs::write(folder.0.join("secret"), SECRET)?;
        fs::write(folder.0.join("share/file"), "content")?;
        std::os::unix::fs::symlink("../secret", folder.0.join("share/link"))?;
        Ok(folder)
    }

    fn device(&self) -> Box<dyn VirtioDevice> {
        let spec = ShareSpec {
            tag: "hostile".to_owned(),
            directory: self.0.join("share"),
            read_only: false,
            owner: (0, 0),
        };
        let limits = Limits {
            open: 8,
            descriptors: 4,
            node_bytes: 8 << 10,
        };
        let share = Share::open(&spec, limits).expect("the folder is there");
        Box::new(Fs::new(Arc::new(share)))
    }

    fn is_as_it_was(&self) -> bool {
        let beside = fs::read_dir(&self.0).map_or(0, |entries| entries.count());
        beside == 2 && fs::read(self.0.join("secret")).is_ok_and(|now| now == SECRET)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

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
}

enum Class {
    Rng,
    Blk,
    Fs(Folder),
}

impl Round {
    fn new(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let (class, device): (_, Box<dyn VirtioDevice>) = match random.below(8) {
            0..=3 => {
                let disk = Arc::new(MemoryDisk(Mutex::new(vec![0; DISK_LEN])));
                let queues = 1 + random.below(3) as u32;
                (Class::Blk, Box::new(Blk::new(disk, "hostile", queues)))
            }
            4..=6 => {
                let folder = Folder::new(seed).expect("a folder for temporary files");
                let device = folder.device();
                (Class::Fs(folder), device)
            }
            _ => (Class::Rng, Box::new(Rng::new())),
        };
        Round {
            seed,
            random,
            rig: Rig::new(device),
            queues: Vec::new(),
            class,
        }
    }

    fn run(mut self, report: &mut Report) {
        self.start();
        for _ in 0..200 {
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
        self.rig.pci.place(BAR_AT as u32);
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
        self.rig.pci.place(BAR_AT as u32);
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
        match self.class {
            // A header that is looked at.
            Class::Blk => {
                let code = self.random.one(&[0u32, 1, 4, 8, 11, 13, 13, 99]);
                ram.write_from_device(0x20_0000, &code.to_le_bytes());
                let sector = self.random.one(&[0, 1, 100, 127, 128, u64::MAX]);
                ram.write_from_device(0x20_0008, &sector.to_le_bytes());
            }
            Class::Fs(_) => {
                let message = fuse_message(&mut self.random);
                ram.write_from_device(0x20_0000, &message);
            }
            Class::Rng => {}
        }
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
                let lens = match self.class {
                    Class::Fs(_) => [HEADER_LEN as u32 + 64, 512],
                    _ => [16, 512],
                };
                (address, len) = (0x20_0000 + 0x1000 * u64::from(n), self.random.one(&lens));
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
        self.rig.pci.place(BAR_AT as u32);
        let seed = self.seed;
        let (rig, ram) = (&self.rig, &self.rig.ram);
        let mut queues = rig.start(EVENT_IDX, HONEST_RINGS);
        // The first queue of a file system has no answers.
        let mut queue = queues.swap_remove(usize::from(matches!(self.class, Class::Fs(_))));
        let [out, data, status] = [0, 0x1000, 0x2000].map(|at| HONEST_BUFFERS + at);
        ram.write_from_device(out, &[0; 512]);
        let (pieces, expected) = match self.class {
            Class::Rng => (vec![Piece::In(data, 512)], 512),
            Class::Blk => {
                let pieces = [
                    Piece::Out(out, 16),
                    Piece::In(data, 512),
                    Piece::In(status, 1),
                ];
                (pieces.to_vec(), 513)
            }
            Class::Fs(_) => {
                ram.write_from_device(out, &fuse_init());
                let pieces = [
                    Piece::Out(out, HEADER_LEN as u32 + 64),
                    Piece::In(data, 512),
                ];
                (pieces.to_vec(), REPLY_LEN as u32 + 64)
            }
        };
        queue.submit(ram, &pieces);
        rig.notify(&queue);
        let used = queue.wait(ram);
        assert_eq!(
            used.map(|u| u.1),
            Some(expected),
            "seed {seed}: an honest request"
        );
    }

    fn check_untouched(&self) {
        if let Class::Fs(folder) = &self.class {
            assert!(
                folder.is_as_it_was(),
                "seed {}: beside the share",
                self.seed
            );
        }
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

/// A request of FUSE that starts a session: protocol 7.38.
fn fuse_init() -> Vec<u8> {
    let mut message = vec![0; HEADER_LEN + 64];
    message[4] = opcode::INIT as u8;
    message[HEADER_LEN] = 7;
    message[HEADER_LEN + 4] = 38;
    message
}

/// A request of FUSE, seldom a sensible one.
fn fuse_message(random: &mut Random) -> Vec<u8> {
    if random.below(8) == 0 {
        return fuse_init();
    }
    let mut message = vec![0; HEADER_LEN];
    message[4] = match random.below(53) as u32 {
        // These the host would feel: gigabytes set aside, everything written to its disks.
        opcode::FALLOCATE | opcode::SYNCFS => opcode::LOOKUP,
        code => code,
    } as u8;
    let node = random.one(&[1, 1, 2, 3, 4, 5, u64::MAX]);
    message[16..24].copy_from_slice(&node.to_le_bytes());
    // Arguments of one to eleven words: handles, sizes, flags, whatever they are taken for.
    for _ in 0..random.below(11) {
        let word = match random.below(3) {
            0 => random.value(),
            1 => random.below(9),
            _ => random.below(1 << 12) << 32 | random.below(512),
        };
        message.extend(word.to_le_bytes());
    }
    for _ in 0..2 {
        let name = random.one(&[
            "file",
            "folder",
            "link",
            "..",
            ".",
            "",
            "../secret",
            "folder/../../secret",
            "new",
            "newer",
            "secret",
        ]);
        message.extend(name.as_bytes());
        message.push(0);
    }
    message
}
