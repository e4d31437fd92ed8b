//! Monitor and child on one processor.
//!
//! Problem: a vCPU's thread and its child take turns and never run at once. Left to itself the host's scheduler wakes each on another, idle processor, which
//! takes 15 to 60 µs where a switch on the same one takes 3.
//! Idea: the child follows the thread (`process`), and the thread is pinned to the processor that it is on. Pinned threads cannot be balanced between processors, so every so often (at
//! ticks of the guest's timer) the thread is let go for one run of a child, and pinned anew where it finds itself. For one run and no longer: a thread that is not pinned is woken at each stop on whatever
//! processor is idle, and takes its child along.
//! Cost: two system calls when it changes.

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// Ticks from one release to the next.
const TICKS: u32 = 8;

/// Where a vCPU's thread and its children are.
#[derive(Debug, Default)]
pub struct Pin {
    /// Where the thread may run when it is not pinned.
    all: Option<CpuSet>,
    here: Option<usize>,
    ticks: u32,
    released: bool,
    /// There is but one processor for it, or the host does not let it be pinned: that was so at the last tick.
    refused: bool,
}

impl Pin {
    /// Pins the calling thread, if it is not, and tells where; `None` where it is not to be pinned, once after it was let go.
    pub fn here(&mut self) -> Option<usize> {
        if std::mem::take(&mut self.released) || self.refused {
            return None;
        }
        if self.here.is_none() {
            let all = sched_getaffinity(None).ok()?;
            let cpu = sched_getcpu();
            self.refused = all.count() < 2 || sched_setaffinity(None, &only(cpu)).is_err();
            if self.refused {
                return None;
            }
            self.all = Some(all);
            self.here = Some(cpu);
        }
        self.here
    }

    /// Lets the thread go where it likes.
    pub fn release(&mut self) {
        if self.here.take().is_some()
            && let Some(all) = &self.all
        {
            let _ = sched_setaffinity(None, all);
        }
    }

    /// A tick of the guest's timer: now and then the thread is let go.
    pub fn tick(&mut self) {
        self.ticks += 1;
        self.refused = false;
        if self.ticks.is_multiple_of(TICKS) {
            self.released = true;
            self.release();
        }
    }
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_pinned_and_let_go() {
        std::thread::spawn(|| {
            let before = sched_getaffinity(None).unwrap().count();
            let mut pin = Pin::default();
            let Some(cpu) = pin.here() else {
                return assert!(before < 2, "there is only one to be on");
            };
            assert_eq!(sched_getcpu(), cpu);
            assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
            for _ in 0..TICKS {
                pin.tick();
            }
            assert_eq!(sched_getaffinity(None).unwrap().count(), before);
            assert_eq!(pin.here(), None, "let go for one run");
            assert!(pin.here().is_some());
        })
        .join()
        .unwrap();
    }
}
