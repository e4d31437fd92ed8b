//! What a stop costs on this host.
//!
//! Problem: whether it pays to execute user code directly depends on what a stop costs, and that is 3 µs on one host and 15 on another: what the host's kernel does
//! between two processes differs with the processor and what it is mitigated against.
//! Idea: a child is stopped a few times before the guest starts, by fetches from where nothing is mapped, for which it needs no code.
//! The least counts, since the host is at work for others now and then.
//! Cost: some 20 stops with a change of a mapping, and as many without; they are made while the guest's kernel is loaded.

use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

use crate::{Change, Child, DirectError, KickFlag, Stop, UserState, Zygote};

const ROUNDS: usize = 20;
const PAGE: u64 = 4096;
/// Linear addresses that the stub and its like may lie at, but not both.
const PLACES: [u64; 2] = [0x4000_0000, 0x5000_0000];

/// What the policy reckons with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prices {
    /// From user code to the monitor and back.
    pub stop: Duration,
    /// The change of a mapping on the way.
    pub change: Duration,
}

impl Prices {
    /// On the hosts by which the policy was made.
    pub const USUAL: Prices = Prices {
        stop: Duration::from_nanos(3_000),
        change: Duration::from_nanos(1_500),
    };
    const LEAST: Prices = Prices {
        stop: Duration::from_nanos(1_000),
        change: Duration::from_nanos(500),
    };
    /// A price that is no obstacle to trying at all.
    const MOST: Prices = Prices {
        stop: Duration::from_micros(100),
        change: Duration::from_micros(100),
    };

    /// Of this host.
    pub fn measure(zygote: &Zygote) -> Result<Self, DirectError> {
        let before = sched_getaffinity(None).ok();
        // A child on another processor would have to be woken there, which takes longer.
        let _ = sched_setaffinity(None, &only(sched_getcpu()));
        let prices = Self::measure_here(zygote);
        if let Some(before) = before {
            let _ = sched_setaffinity(None, &before);
        }
        prices
    }

    fn measure_here(zygote: &Zygote) -> Result<Self, DirectError> {
        let reserved = zygote.reserved();
        let free = |at: &&u64| !reserved.contains(*at);
        let at = *PLACES.iter().find(free).unwrap_or(&PLACES[0]);
        let mut child = zygote.spawn()?;
        let map = Change::Map {
            at: at + PAGE,
            offset: 0,
            len: PAGE,
            write: false,
            execute: false,
            populate: false,
        };
        let stop = least(&mut child, at, &[])?;
        let changed = least(&mut child, at, &[map])?;
        let change = changed.saturating_sub(stop);
        Ok(Prices {
            stop: stop.clamp(Self::LEAST.stop, Self::MOST.stop),
            change: change.clamp(Self::LEAST.change, Self::MOST.change),
        })
    }
}

/// The shortest time from entering a child to its stop.
fn least(child: &mut Child, at: u64, changes: &[Change]) -> Result<Duration, DirectError> {
    let kick = KickFlag::new();
    let mut user = UserState::new(at);
    let mut least = Duration::MAX;
    for _ in 0..ROUNDS {
        user.rip = at;
        let start = Instant::now();
        match child.run(&mut user, changes, &kick)? {
            Stop::Gone { .. } => return Err(DirectError::Gone),
            _ => least = least.min(start.elapsed()),
        }
    }
    Ok(least)
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    #[test]
    fn this_host_has_prices() {
        let ram = std::fs::File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&ram, PAGE).unwrap();
        let zygote = match Zygote::new(&ram, PAGE) {
            Ok(zygote) => zygote,
            Err(e) => return eprintln!("SKIPPED: no direct execution here: {e}"),
        };
        let affinity = sched_getaffinity(None).unwrap();
        let prices = Prices::measure(&zygote).unwrap();
        assert!(prices.stop > Prices::LEAST.stop, "{prices:?}");
        assert!(prices.change > Prices::LEAST.change / 2, "{prices:?}");
        assert_eq!(sched_getaffinity(None).unwrap(), affinity);
    }
}
