//! A stop of the whole machine by its host, as the guest hears of it.
//!
//! Problem: SIGSTOP, a debugger, a laptop's lid or a host that has no time for it stop a machine for seconds, but not the TSC. To the guest's kernel a CPU hung
//! then, and it prints that it locked up. Idea: KVM's clock page, one for each CPU, has a flag for this (`PVCLOCK_GUEST_STOPPED`,
//! Linux Documentation/virt/kvm/x86/msr.rst); Linux looks at it before it complains, takes it back and lets its watchdogs begin anew. A
//! stop shows in that the timer thread wakes late; whoever is first, this thread with the interrupt that was due or a CPU that takes one, tells every CPU, and
//! an interrupt is when a guest looks at its watchdogs. Cost: a look at the clock for each interrupt.
//! Limit: where the stop comes while the guest handles a tick, it may look before either has told it, and complain: on a busy host about one stop in ten.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use doppel_memory::GuestRam;
use doppel_x86::write_clock_stopped;

/// The page of a CPU that has none.
const NONE: u64 = u64::MAX;

/// Where the clock pages of a machine's CPUs are.
pub struct ClockPages {
    ram: Arc<GuestRam>,
    pages: Vec<AtomicU64>,
}

impl ClockPages {
    /// None yet.
    pub fn new(ram: Arc<GuestRam>, cpus: u32) -> Arc<Self> {
        let pages = (0..cpus).map(|_| AtomicU64::new(NONE)).collect();
        Arc::new(ClockPages { ram, pages })
    }

    /// Where that of a CPU is from now on.
    pub fn set(&self, cpu: u32, page: Option<u64>) {
        if let Some(place) = self.pages.get(cpu as usize) {
            place.store(page.unwrap_or(NONE), Ordering::Relaxed);
        }
    }

    /// Tells the guest that the host has stopped it for a while.
    pub fn tell_of_stop(&self) {
        let pages = self.pages.iter().map(|page| page.load(Ordering::Relaxed));
        for page in pages.filter(|page| *page != NONE) {
            write_clock_stopped(&self.ram, page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cpu_with_a_page_is_told_of_a_stop() {
        const FLAGS: u64 = 29;
        let ram = Arc::new(GuestRam::new(1 << 20).unwrap());
        let pages = ClockPages::new(ram.clone(), 3);
        pages.set(0, Some(0x1000));
        pages.set(2, Some(0x2000));
        pages.set(0, None);
        pages.set(7, Some(0x3000));
        ram.store(0x2000 + FLAGS, 1u8).unwrap();
        pages.tell_of_stop();
        let flags = [0u64, 0x1000, 0x2000, 0x3000].map(|at| ram.load::<u8>(at + FLAGS).unwrap());
        assert_eq!(flags, [0, 0, 3, 0]);
        // Beyond RAM is nothing.
        pages.set(1, Some(1 << 40));
        pages.tell_of_stop();
    }
}
