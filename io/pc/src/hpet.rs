//! The high precision event timer: one counter of 64 bits, and three timers that compare with it.
//!
//! Outputs 0 to 23 are the inputs of the I/O APIC that a timer may be routed to; 24 and 25 are where timers 0 and 1 go in place of the 8254's and the
//! real-time clock's interrupts while *legacy replacement* is on, and 26 is high as long as it is.
//!
//! The counter is worked out from the time when it is read, and what timers did from how far it has come since they were last looked at: however
//! many periods have passed, that is one interrupt. A timer whose interrupt is off, or whose level is still asserted, has no deadline.
//! A timer whose period is shorter than [`SHORTEST`] interrupts no more often than that.
//!
//! Source: IA-PC HPET (High Precision Event Timers) Specification 1.0a, chapter 2.3.

use doppel_device::{Chip, Nanos, Outputs, all_ones};

/// Length of the window.
pub const HPET_LEN: u64 = 0x400;
/// What output timers 0 and 1 have in place of the 8254's and the clock's interrupt.
pub const HPET_LEGACY: [u32; 2] = [24, 25];
/// The output that says so.
pub const HPET_REPLACES: u32 = 26;
/// The I/O APIC's inputs that a timer may have, a bit each: ISA interrupts that nobody else has.
pub const HPET_ROUTES: u32 = 1 << 10 | 1 << 11;
/// General capabilities, as the ACPI table repeats their lower half: revision 1, three timers, 64 bits, legacy replacement, Intel's.
pub const HPET_ID: u32 = 0x8086 << 16 | 1 << 15 | 1 << 13 | (TIMERS as u32 - 1) << 8 | 1;

const TIMERS: usize = 3;
/// Nanoseconds from one count to the next.
const PERIOD: Nanos = 10;
const FEMTOSECONDS: u64 = 1_000_000;
/// Of one timer, so that a guest does not occupy the host.
const SHORTEST: u64 = 20_000 / PERIOD;

const CAPABILITIES: u64 = 0;
const CONFIGURATION: u64 = 0x10;
const STATUS: u64 = 0x20;
const COUNTER: u64 = 0xf0;
const FIRST_TIMER: u64 = 0x100;
const TIMER_LEN: u64 = 0x20;
const COMPARATOR: u64 = 8;

/// General configuration.
const ENABLE: u64 = 1 << 0;
const LEGACY: u64 = 1 << 1;

/// Configuration of a timer.
const LEVEL: u64 = 1 << 1;
const INTERRUPT: u64 = 1 << 2;
const PERIODIC: u64 = 1 << 3;
const SET_VALUE: u64 = 1 << 6;
const NARROW: u64 = 1 << 8;
const ROUTE: u64 = 0x1f << 9;
const WRITABLE: u64 = LEVEL | INTERRUPT | PERIODIC | SET_VALUE | NARROW;
/// It can be periodic, has 64 bits, and these routes.
const ABILITIES: u64 = (HPET_ROUTES as u64) << 32 | 1 << 5 | 1 << 4;

#[derive(Clone, Copy, Debug)]
struct Timer {
    configuration: u64,
    comparator: u64,
    period: u64,
}

impl Timer {
    const RESET: Timer = Timer {
        configuration: 0,
        comparator: u64::MAX,
        period: 0,
    };

    fn has(&self, bits: u64) -> bool {
        self.configuration & bits != 0
    }

    fn mask(&self) -> u64 {
        match self.has(NARROW) {
            true => u32::MAX.into(),
            false => u64::MAX,
        }
    }

    fn route(&self) -> u32 {
        ((self.configuration & ROUTE) >> 9) as u32
    }

    /// Counts until the counter, now at `from`, has next come to the comparator.
    fn distance(&self, from: u64) -> u128 {
        match self.comparator.wrapping_sub(from) & self.mask() {
            0 => u128::from(self.mask()) + 1,
            d => d.into(),
        }
    }

    /// The counter goes from `from` to `to`; true where it comes by the comparator.
    fn count(&mut self, from: u64, to: u64) -> bool {
        let (distance, counted) = (self.distance(from), u128::from(to.wrapping_sub(from)));
        if distance > counted {
            return false;
        }
        if self.has(PERIODIC) && self.period != 0 {
            let periods = (counted - distance) / u128::from(self.period) + 1;
            let ahead = (periods as u64).wrapping_mul(self.period);
            self.comparator = self.comparator.wrapping_add(ahead) & self.mask();
        }
        true
    }

    fn configure(&mut self, value: u64) {
        let mut configuration = self.configuration & !WRITABLE | value & WRITABLE;
        // A route that there is not is not taken, which the guest reads back.
        if HPET_ROUTES >> ((value & ROUTE) >> 9) & 1 != 0 {
            configuration = configuration & !ROUTE | value & ROUTE;
        }
        self.configuration = configuration;
        self.comparator &= self.mask();
        self.period &= self.mask();
    }

    /// A store to the comparator: to the value that it waits for, and of a periodic timer to its period.
    fn compare(&mut self, merge: impl Fn(u64) -> u64) {
        let mask = self.mask();
        let periodic = self.has(PERIODIC);
        if !periodic || self.has(SET_VALUE) {
            self.comparator = merge(self.comparator) & mask;
        }
        if periodic {
            self.period = merge(self.period) & mask;
        }
        self.configuration &= !SET_VALUE;
    }
}

/// The chip.
#[derive(Clone, Debug)]
pub struct Hpet {
    configuration: u64,
    /// What the counter was when it last started, or is while it stands, and when that was.
    base: u64,
    since: Nanos,
    /// The timers are up to date to this count.
    seen: u64,
    timers: [Timer; TIMERS],
    /// Timers with a level that is asserted, a bit each.
    status: u64,
    rose: u32,
}

impl Default for Hpet {
    fn default() -> Self {
        Self::new()
    }
}

impl Hpet {
    /// After reset: the counter stands at 0.
    pub fn new() -> Self {
        Hpet {
            configuration: 0,
            base: 0,
            since: 0,
            seen: 0,
            timers: [Timer::RESET; TIMERS],
            status: 0,
            rose: 0,
        }
    }

    fn counts(&self) -> bool {
        self.configuration & ENABLE != 0
    }

    fn replaces(&self) -> bool {
        self.counts() && self.configuration & LEGACY != 0
    }

    fn counter(&self, now: Nanos) -> u64 {
        match self.counts() {
            true => (self.base).wrapping_add(now.saturating_sub(self.since) / PERIOD),
            false => self.base,
        }
    }

    /// The output of a timer, as a bit.
    fn output(&self, n: usize) -> u32 {
        match HPET_LEGACY.get(n) {
            Some(legacy) if self.replaces() => 1 << legacy,
            _ => (1 << self.timers[n].route()) & HPET_ROUTES,
        }
    }

    fn sync(&mut self, now: Nanos) {
        let (from, to) = (self.seen, self.counter(now));
        self.seen = to;
        for n in 0..TIMERS {
            if from == to || !self.timers[n].count(from, to) {
                continue;
            }
            if self.timers[n].has(LEVEL) {
                self.status |= 1 << n;
            } else if self.timers[n].has(INTERRUPT) {
                self.rose |= self.output(n);
            }
        }
    }

    fn register(&self, at: u64, now: Nanos) -> u64 {
        match at {
            CAPABILITIES => (PERIOD * FEMTOSECONDS) << 32 | u64::from(HPET_ID),
            CONFIGURATION => self.configuration,
            STATUS => self.status,
            COUNTER => self.counter(now),
            _ => match timer(at) {
                Some((n, 0)) => self.timers[n].configuration | ABILITIES,
                Some((n, COMPARATOR)) => self.timers[n].comparator,
                _ => 0,
            },
        }
    }

    /// Starts or stops the counter, and what legacy replacement takes from others.
    fn configure(&mut self, value: u64, now: Nanos) {
        self.base = self.counter(now);
        self.since = now;
        self.configuration = value & (ENABLE | LEGACY);
    }

    fn set_counter(&mut self, value: u64) {
        // While it counts, a store has no effect.
        if !self.counts() {
            (self.base, self.seen) = (value, value);
        }
    }
}

/// The timer that a register belongs to, and which of its own it is.
fn timer(at: u64) -> Option<(usize, u64)> {
    let at = at.checked_sub(FIRST_TIMER)?;
    let n = (at / TIMER_LEN) as usize;
    (n < TIMERS).then_some((n, at % TIMER_LEN))
}

impl Chip for Hpet {
    const WIDTH: u8 = 8;

    fn read(&mut self, offset: u64, size: u8, now: Nanos) -> u64 {
        self.sync(now);
        let value = self.register(offset & !7, now);
        value >> ((offset & 7) * 8) & all_ones(size)
    }

    fn write(&mut self, offset: u64, size: u8, value: u64, now: Nanos) {
        self.sync(now);
        let at = offset & !7;
        let shift = (offset & 7) * 8;
        let (mask, bits) = (all_ones(size) << shift, value << shift);
        let merge = |old: u64| old & !mask | bits & mask;
        let new = merge(self.register(at, now));
        match at {
            CONFIGURATION => self.configure(new, now),
            STATUS => self.status &= !(bits & mask),
            COUNTER => self.set_counter(new),
            _ => match timer(at) {
                Some((n, 0)) => {
                    self.timers[n].configure(new);
                    // An edge has no status, and one that is left would hide the next.
                    if !self.timers[n].has(LEVEL) {
                        self.status &= !(1 << n);
                    }
                }
                Some((n, COMPARATOR)) => self.timers[n].compare(merge),
                _ => {}
            },
        }
    }

    fn outputs(&mut self) -> Outputs {
        let mut level = u32::from(self.replaces()) << HPET_REPLACES;
        for n in 0..TIMERS {
            let asserted = self.counts() && self.status >> n & 1 != 0;
            if asserted && self.timers[n].has(INTERRUPT) {
                level |= self.output(n);
            }
        }
        let rose = std::mem::take(&mut self.rose);
        Outputs { level, rose }
    }

    fn next_deadline(&self) -> Option<Nanos> {
        let counted = self.seen.wrapping_sub(self.base);
        let deadline = |(n, timer): (usize, &Timer)| {
            if !timer.has(INTERRUPT) || self.status >> n & 1 != 0 {
                return None;
            }
            let distance = timer.distance(self.seen);
            let often = timer.has(PERIODIC) && timer.period < SHORTEST;
            let distance = distance.max(if often { SHORTEST.into() } else { 0 });
            let after = (u128::from(counted) + distance) * u128::from(PERIOD);
            u64::try_from(after).ok()?.checked_add(self.since)
        };
        let timers = self.timers.iter().enumerate();
        (self.counts()).then(|| timers.filter_map(deadline).min())?
    }

    fn advance(&mut self, now: Nanos) {
        self.sync(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::every_register_takes_everything;

    const MS: Nanos = 1_000_000;
    const TIMER_0: u64 = FIRST_TIMER;
    const TIMER_2: u64 = FIRST_TIMER + 2 * TIMER_LEN;

    /// On, with the counter at 0 at time 0.
    fn counting() -> Hpet {
        let mut hpet = Hpet::new();
        hpet.write(CONFIGURATION, 8, ENABLE, 0);
        hpet
    }

    fn to_input_11(more: u64) -> u64 {
        11 << 9 | INTERRUPT | more
    }

    /// When outputs rose, up to a time.
    fn rises(hpet: &mut Hpet, until: Nanos) -> Vec<(Nanos, u32)> {
        let mut rises = Vec::new();
        while let Some(at) = hpet.next_deadline().filter(|at| *at <= until) {
            hpet.advance(at);
            rises.push((at, hpet.outputs().rose));
        }
        hpet.advance(until);
        rises
    }

    #[test]
    fn it_says_what_it_is() {
        let mut hpet = Hpet::new();
        assert_eq!(hpet.read(CAPABILITIES, 8, 0), 0x0098_9680_8086_a201);
        assert_eq!(hpet.read(CAPABILITIES + 4, 4, 0), 10_000_000);
        assert_eq!(hpet.read(TIMER_2, 8, 0), 0x0c00_0000_0030);
        assert_eq!(hpet.read(TIMER_2 + COMPARATOR, 8, 0), u64::MAX);
        assert_eq!(hpet.read(FIRST_TIMER + 3 * TIMER_LEN, 8, 0), 0);
    }

    #[test]
    fn the_counter_counts_while_it_may() {
        let mut hpet = Hpet::new();
        assert_eq!(hpet.read(COUNTER, 8, MS), 0);
        hpet.write(COUNTER, 4, 0xffff_fff0, MS);
        hpet.write(CONFIGURATION, 4, ENABLE, MS);
        assert_eq!(hpet.read(COUNTER, 8, 2 * MS), 0xffff_fff0 + 100_000);
        hpet.write(COUNTER, 8, 5, 2 * MS);
        assert_eq!(hpet.read(COUNTER + 4, 4, 2 * MS), 1, "not while it counts");
        hpet.write(CONFIGURATION, 4, 0, 2 * MS);
        assert_eq!(hpet.read(COUNTER, 8, 9 * MS), 0xffff_fff0 + 100_000);
        hpet.write(COUNTER, 8, 5, 9 * MS);
        assert_eq!(hpet.read(COUNTER, 8, 9 * MS), 5);
    }

    #[test]
    fn a_timer_interrupts_once() {
        let mut hpet = counting();
        hpet.write(TIMER_2, 4, to_input_11(0), 0);
        hpet.write(TIMER_2 + COMPARATOR, 4, 100_000, 0);
        hpet.write(TIMER_2 + COMPARATOR + 4, 4, 0, 0);
        assert_eq!(rises(&mut hpet, 100 * MS), [(MS, 1 << 11)]);
        assert_eq!(hpet.read(STATUS, 8, 100 * MS), 0, "an edge has no status");
    }

    #[test]
    fn one_of_32_bits_does_so_again_when_the_counter_wraps() {
        let mut hpet = counting();
        hpet.write(TIMER_2, 4, to_input_11(NARROW), 0);
        hpet.write(TIMER_2 + COMPARATOR, 8, 1 << 40 | 100_000, 0);
        assert_eq!(hpet.read(TIMER_2 + COMPARATOR, 8, 0), 100_000);
        let round = (1 << 32) * PERIOD;
        let at = |n: u64| (MS + n * round, 1 << 11);
        assert_eq!(rises(&mut hpet, 2 * round), [at(0), at(1)]);
    }

    #[test]
    fn a_periodic_one_goes_on() {
        let mut hpet = counting();
        hpet.write(TIMER_2, 4, to_input_11(PERIODIC | SET_VALUE), 0);
        // As Linux does: the first time, then the period.
        hpet.write(TIMER_2 + COMPARATOR, 4, 500_000, 0);
        hpet.write(TIMER_2 + COMPARATOR + 4, 4, 0, 0);
        hpet.write(TIMER_2 + COMPARATOR, 4, 100_000, 0);
        hpet.write(TIMER_2, 4, to_input_11(PERIODIC | SET_VALUE), 0);
        hpet.write(TIMER_2 + COMPARATOR + 4, 4, 0, 0);
        let at = |ms| (ms * MS, 1 << 11);
        assert_eq!(rises(&mut hpet, 7 * MS), [at(5), at(6), at(7)]);
        // Many periods at once are one interrupt, and the next comes where it would have come.
        hpet.advance(20 * MS + 1);
        assert_eq!(hpet.outputs().rose, 1 << 11);
        assert_eq!(hpet.next_deadline(), Some(21 * MS));
        assert_eq!(hpet.read(TIMER_2 + COMPARATOR, 8, 20 * MS + 1), 2_100_000);
    }

    #[test]
    fn a_level_stays_until_the_guest_has_seen_it() {
        let mut hpet = counting();
        hpet.write(TIMER_2, 4, to_input_11(LEVEL | PERIODIC | SET_VALUE), 0);
        hpet.write(TIMER_2 + COMPARATOR, 8, 100_000, 0);
        hpet.advance(MS);
        assert_eq!(hpet.outputs().level, 1 << 11);
        assert_eq!(hpet.next_deadline(), None, "nothing new can happen");
        assert_eq!(hpet.read(STATUS, 4, MS), 1 << 2);
        hpet.write(STATUS, 4, 1 << 2, MS);
        assert_eq!(hpet.outputs().level, 0);
        assert_eq!(hpet.next_deadline(), Some(2 * MS));
    }

    #[test]
    fn without_its_interrupt_a_timer_of_levels_still_shows_its_status() {
        let mut hpet = counting();
        hpet.write(TIMER_2, 4, 11 << 9 | LEVEL, 0);
        hpet.write(TIMER_2 + COMPARATOR, 8, 100_000, 0);
        assert_eq!(hpet.next_deadline(), None);
        assert_eq!(hpet.read(STATUS, 8, MS), 1 << 2);
        assert_eq!(hpet.outputs().level, 0);
    }

    #[test]
    fn a_status_that_nobody_cleared_does_not_hide_edges() {
        let mut hpet = counting();
        hpet.write(TIMER_2, 4, 11 << 9 | LEVEL, 0);
        hpet.write(TIMER_2 + COMPARATOR, 8, 100_000, 0);
        hpet.advance(MS);
        hpet.write(TIMER_2, 4, to_input_11(0), MS);
        hpet.write(TIMER_2 + COMPARATOR, 8, 200_000, MS);
        assert_eq!(hpet.outputs().level, 0);
        assert_eq!(rises(&mut hpet, 3 * MS), [(2 * MS, 1 << 11)]);
    }

    #[test]
    fn only_routes_that_there_are_are_taken() {
        let mut hpet = counting();
        hpet.write(TIMER_2, 4, to_input_11(0), 0);
        hpet.write(TIMER_2, 4, 20 << 9 | INTERRUPT, 0);
        assert_eq!(hpet.read(TIMER_2, 4, 0) & ROUTE, 11 << 9);
        hpet.write(TIMER_0, 4, INTERRUPT, 0);
        hpet.write(TIMER_0 + COMPARATOR, 8, 100, 0);
        assert_eq!(rises(&mut hpet, MS), [(1000, 0)], "no route yet");
    }

    #[test]
    fn it_takes_the_place_of_the_8254() {
        let mut hpet = counting();
        hpet.write(TIMER_0, 4, to_input_11(0), 0);
        hpet.write(TIMER_0 + COMPARATOR, 8, 100_000, 0);
        assert_eq!(hpet.outputs().level, 0);
        hpet.write(CONFIGURATION, 4, ENABLE | LEGACY, 0);
        assert_eq!(hpet.outputs().level, 1 << HPET_REPLACES);
        assert_eq!(rises(&mut hpet, 2 * MS), [(MS, 1 << HPET_LEGACY[0])]);
        hpet.write(CONFIGURATION, 4, LEGACY, 2 * MS);
        assert_eq!(hpet.outputs().level, 0, "not while it stands");
    }

    #[test]
    fn a_short_period_does_not_occupy_the_host() {
        let mut hpet = counting();
        hpet.write(TIMER_2, 4, to_input_11(PERIODIC | SET_VALUE), 0);
        hpet.write(TIMER_2 + COMPARATOR, 8, 1, 0);
        assert!(rises(&mut hpet, MS).len() <= 50);
        hpet.write(TIMER_2, 4, to_input_11(PERIODIC | SET_VALUE), MS);
        hpet.write(TIMER_2 + COMPARATOR, 8, 0, MS);
        assert_eq!(rises(&mut hpet, 2 * MS), []);
    }

    #[test]
    fn it_takes_everything() {
        every_register_takes_everything(&mut Hpet::new(), 0x180, |_, _| {});
    }
}
