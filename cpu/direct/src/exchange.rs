//! Exchange areas: memory that the monitor shares with one child each, and the turns they take.
//!
//! A child's guest can write to its area whenever it finds it. The monitor reads and writes it by volatile and atomic operations only, takes
//! everything that it reads for a claim, and keeps nothing there that it relies on.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use rustix::thread::futex::{self, Flags};
use rustix::time::Timespec;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use crate::arch_stub::{BENCH, OWNER, OWNER_DIED, SLEEPS, WORD};

/// How often a sleeping monitor looks after a child that does not answer.
const CHECKUP: Duration = Duration::from_millis(50);

/// A piece of a file that is shared with a child, as the monitor sees it: one exchange area, or one child's orders.
#[derive(Debug)]
pub(crate) struct Shared {
    region: MmapRegion,
}

/// How a wait for the monitor's turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It is the monitor's turn. `proven` where the kernel says so and not only the memory: the child is in the stub.
    Monitor { proven: bool },
    /// Not yet, after a while.
    NotYet,
    /// The kernel or nonsense in the word says that the child is dead.
    Dead,
}

impl Shared {
    /// Maps piece number `n` of `size` bytes of the file.
    pub fn map(file: &Arc<File>, n: u64, size: u64) -> io::Result<Shared> {
        let place = FileOffset::from_arc(file.clone(), n * size);
        let region = MmapRegion::from_file(place, size as usize).map_err(io::Error::other)?;
        Ok(Shared { region })
    }

    fn word32(&self, at: usize) -> &AtomicU32 {
        self.region
            .get_atomic_ref(at)
            .expect("the layout's offsets are aligned and in the area")
    }

    fn word64(&self, at: usize) -> &AtomicU64 {
        self.region
            .get_atomic_ref(at)
            .expect("the layout's offsets are aligned and in the area")
    }

    pub fn load32(&self, at: usize) -> u32 {
        self.word32(at).load(Ordering::Relaxed)
    }
    pub fn store32(&self, at: usize, value: u32) {
        self.word32(at).store(value, Ordering::Relaxed);
    }
    pub fn load64(&self, at: usize) -> u64 {
        self.word64(at).load(Ordering::Relaxed)
    }
    pub fn store64(&self, at: usize, value: u64) {
        self.word64(at).store(value, Ordering::Relaxed);
    }
    /// Copies bytes out of the area.
    pub fn read(&self, at: usize, to: &mut [u8]) {
        let slice = self.region.get_slice(at, to.len());
        slice
            .expect("the layout's pieces are in the area")
            .copy_to(to);
    }
    /// Copies bytes into the area.
    pub fn write(&self, at: usize, from: &[u8]) {
        let slice = self.region.get_slice(at, from.len());
        slice
            .expect("the layout's pieces are in the area")
            .copy_from(from);
    }

    /// Says whose turn it is before there is a child.
    pub fn begin(&self, owner: u32) {
        self.word32(WORD).store(owner, Ordering::SeqCst);
    }

    /// Gives the child `owner` the turn and wakes it where it sleeps.
    pub fn give(&self, owner: u32, benched: bool) -> io::Result<()> {
        let old = self.word32(WORD).swap(owner, Ordering::SeqCst);
        if benched {
            futex::wake(self.word32(BENCH), Flags::empty(), 1)?;
        } else if old & SLEEPS != 0 {
            futex::wake(self.word32(WORD), Flags::empty(), 1)?;
        }
        Ok(())
    }

    /// Sleeps until it is the monitor's turn, a while at most.
    pub fn wait(&self, owner: u32) -> Turn {
        let word = self.word32(WORD);
        let mut woken = false;
        loop {
            let seen =
                word.compare_exchange(owner, owner | SLEEPS, Ordering::SeqCst, Ordering::SeqCst);
            match seen {
                Err(value) if value & OWNER_DIED != 0 => return Turn::Dead,
                Err(value) if value & OWNER == 0 => return Turn::Monitor { proven: woken },
                Err(value) if value & OWNER != owner => return Turn::Dead,
                _ => {}
            }
            let timeout = Timespec::try_from(CHECKUP).ok();
            let slept = futex::wait(word, Flags::empty(), owner | SLEEPS, timeout.as_ref());
            if slept == Err(rustix::io::Errno::TIMEDOUT) {
                return Turn::NotYet;
            }
            // Nobody but the stub's one call wakes the monitor, and that call has set the word to 0.
            woken = slept.is_ok();
        }
    }

    /// Moves a child that sleeps in the stub, in the monitor's turn, to the bench, from where it must be woken. False where it does not sleep there.
    pub fn bench(&self) -> bool {
        let (word, bench) = (self.word32(WORD), self.word32(BENCH));
        futex::cmp_requeue(word, Flags::empty(), 0, 1, bench, SLEEPS).is_ok_and(|n| n > 0)
    }
}
