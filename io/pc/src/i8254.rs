//! The 8254 programmable interval timer and the port that goes with it (0x61).
//!
//! Offsets 0 to 3 are the chip (ports 0x40 to 0x43), offset 4 is port 0x61: the gate and the output of channel 2, by
//! which kernels calibrate faster clocks. Output 0 is that of channel 0, ISA interrupt 0.
//!
//! Nothing counts: a channel remembers the tick at which its count was loaded and works out the rest from the time. A count that is written while
//! one is counted down takes its place at once (modes 0 and 4), at the end of a cycle (2), of half a cycle (3), or when the gate rises (1 and 5).
//!
//! Source: Intel 8254 data sheet.

use doppel_device::{Chip, Nanos, Outputs, periods, ticks};

/// The oscillator's frequency.
pub const PIT_HZ: u64 = 1_193_182;

/// A guest may ask for an interrupt every two ticks; it gets them no more often than this.
const SHORTEST_PERIOD: Nanos = 20_000;

/// The tick of what happens when the gate rises, and not before.
const TRIGGER: u64 = u64::MAX;

const CONTROL: u64 = 3;
const PORT_61: u64 = 4;
const GATE_2: u8 = 1 << 0;
const PORT_61_WRITABLE: u8 = 0x0f;
const REFRESH: u8 = 1 << 4;
const OUT_2: u8 = 1 << 5;
/// Half a period of the memory refresh that bit 4 of port 0x61 shows.
const REFRESH_NANOS: Nanos = 15_085;

/// Bits 5:4 of a control word: which bytes of a count are accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    Low = 1,
    High = 2,
    LowHigh = 3,
}

#[derive(Clone, Debug)]
struct Channel {
    mode: u8,
    access: Access,
    bcd: bool,
    /// Ticks of a cycle, 1 to 65536.
    period: u64,
    /// No count was written since the last control word.
    null: bool,
    /// A period that counting takes up at a tick: the end of a cycle, or [`TRIGGER`].
    next: Option<(u64, u64)>,
    gate: bool,
    /// The tick at which counting began, or went on; `None` while it stands.
    since: Option<u64>,
    /// Ticks of the cycle that were counted before.
    counted: u64,
    low_byte: Option<u8>,
    high_next: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Channel {
            mode: 0,
            access: Access::LowHigh,
            bcd: false,
            period: 0x1_0000,
            null: true,
            next: None,
            gate,
            since: None,
            counted: 0,
            low_byte: None,
            high_next: false,
            latched: None,
            latched_status: None,
        }
    }

    fn elapsed(&self, tick: u64) -> u64 {
        self.counted + self.since.map_or(0, |since| tick.saturating_sub(since))
    }

    fn control(&mut self, word: u8, access: Access) {
        let mode = word >> 1 & 7;
        *self = Channel {
            // 6 and 7 mean 2 and 3.
            mode: if mode > 5 { mode - 4 } else { mode },
            access,
            bcd: word & 1 != 0,
            ..Channel::new(self.gate)
        };
    }

    fn load(&mut self, value: u16, tick: u64) {
        let count = if self.bcd {
            from_bcd(value)
        } else {
            value.into()
        };
        let whole = if self.bcd { 10_000 } else { 0x1_0000 };
        let period = if count == 0 { whole } else { count };
        self.null = false;
        match (self.mode, self.since) {
            (1 | 5, _) => self.next = Some((period, TRIGGER)),
            (2 | 3, Some(_)) => self.next = Some((period, self.end_of_part(tick))),
            _ => self.begin(period, self.gate.then_some(tick)),
        }
    }

    fn begin(&mut self, period: u64, since: Option<u64>) {
        (self.period, self.since, self.counted, self.next) = (period, since, 0, None);
    }

    /// The tick at which a cycle ends, of a square wave half a cycle.
    fn end_of_part(&self, tick: u64) -> u64 {
        let (done, high) = (self.elapsed(tick) % self.period, self.period.div_ceil(2));
        let end = match self.mode {
            3 if done < high => high,
            _ => self.period,
        };
        tick + end - done
    }

    /// Takes up the period that waits, if its time has come.
    fn settle(&mut self, tick: u64) {
        let Some((period, at)) = self.next.filter(|(_, at)| *at <= tick) else {
            return;
        };
        let within_cycle = !self.elapsed(at).is_multiple_of(self.period);
        self.begin(period, Some(at));
        if within_cycle {
            self.counted = period.div_ceil(2);
        }
    }

    fn set_gate(&mut self, gate: bool, tick: u64) {
        if gate == std::mem::replace(&mut self.gate, gate) || self.null {
            return;
        }
        match (self.mode, gate) {
            (0 | 4, true) => self.since = Some(tick),
            (0 | 4, false) => {
                self.counted = self.elapsed(tick);
                self.since = None;
            }
            (_, true) => self.begin(self.newest_period(), Some(tick)),
            (2 | 3, false) => self.begin(self.newest_period(), None),
            (_, false) => {}
        }
    }

    fn newest_period(&self) -> u64 {
        self.next.map_or(self.period, |(period, _)| period)
    }

    fn out(&self, tick: u64) -> bool {
        let Some(_) = self.since else {
            return self.mode != 0 || !self.null && self.counted >= self.period;
        };
        let elapsed = self.elapsed(tick);
        match self.mode {
            0 | 1 => elapsed >= self.period,
            2 => elapsed % self.period != self.period - 1 || self.period == 1,
            3 => elapsed % self.period < self.period.div_ceil(2),
            _ => elapsed != self.period,
        }
    }

    /// The first tick after `tick` at which the output rises, if it does without anybody's help.
    fn next_rise(&self, tick: u64) -> Option<u64> {
        let rise = self.next_rise_in_period(tick);
        match self.next {
            Some((_, at)) if at != TRIGGER && rise.is_none_or(|rise| at < rise) => {
                let mut then = self.clone();
                then.settle(at);
                then.next_rise_in_period(tick.max(at))
            }
            _ => rise,
        }
    }

    fn next_rise_in_period(&self, tick: u64) -> Option<u64> {
        let since = self.since?;
        let in_cycle = match self.mode {
            0 | 1 => self.period,
            2 | 3 => {
                let cycles = self.elapsed(tick) / self.period + 1;
                self.period.checked_mul(cycles)?
            }
            _ => self.period + 1,
        };
        let at = since.checked_add(in_cycle.saturating_sub(self.counted))?;
        (at > tick && !(self.period == 1 && matches!(self.mode, 2 | 3))).then_some(at)
    }

    fn count(&self, tick: u64) -> u16 {
        let elapsed = self.elapsed(tick);
        let count = match self.mode {
            2 => self.period - elapsed % self.period,
            3 => self.period - elapsed.wrapping_mul(2) % self.period,
            _ if self.bcd => (self.period + 10_000 - elapsed % 10_000) % 10_000,
            _ => self.period.wrapping_sub(elapsed) & 0xffff,
        };
        if self.bcd {
            to_bcd(count)
        } else {
            count as u16
        }
    }

    fn latch_count(&mut self, tick: u64) {
        if self.latched.is_none() {
            self.latched = Some(self.count(tick));
        }
    }

    fn latch_status(&mut self, tick: u64) {
        let status = u8::from(self.out(tick)) << 7
            | u8::from(self.null || self.next.is_some()) << 6
            | (self.access as u8) << 4
            | self.mode << 1
            | u8::from(self.bcd);
        self.latched_status.get_or_insert(status);
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self
            .latched
            .unwrap_or_else(|| self.count(tick))
            .to_le_bytes();
        let (byte, last) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::LowHigh => {
                let second = self.high_next;
                self.high_next = !second;
                (if second { high } else { low }, second)
            }
        };
        if last {
            self.latched = None;
        }
        byte
    }

    fn write(&mut self, byte: u8, tick: u64) {
        let value = match (self.access, self.low_byte.take()) {
            (Access::Low, _) => u16::from(byte),
            (Access::High, _) => u16::from(byte) << 8,
            (Access::LowHigh, Some(low)) => u16::from_le_bytes([low, byte]),
            (Access::LowHigh, None) => {
                self.low_byte = Some(byte);
                if self.mode == 0 {
                    self.begin(self.period, None);
                }
                return;
            }
        };
        self.load(value, tick);
    }
}

fn from_bcd(value: u16) -> u64 {
    (0..4).rev().fold(0, |sum, digit| {
        sum * 10 + u64::from(value >> (4 * digit) & 0xf)
    })
}

fn to_bcd(value: u64) -> u16 {
    let digit = |n: u32| (value / 10u64.pow(n) % 10) << (4 * n);
    (digit(0) | digit(1) | digit(2) | digit(3)) as u16
}

/// The chip.
#[derive(Clone, Debug)]
pub struct I8254 {
    channels: [Channel; 3],
    port_61: u8,
    /// The tick up to which edges of channel 0 are seen.
    seen: u64,
    rose: bool,
    out: bool,
    quiet_until: Nanos,
}

impl Default for I8254 {
    fn default() -> Self {
        I8254 {
            channels: [true, true, false].map(Channel::new),
            port_61: 0,
            seen: 0,
            rose: false,
            out: false,
            quiet_until: 0,
        }
    }
}

impl I8254 {
    /// A timer with nothing programmed.
    pub fn new() -> Self {
        Self::default()
    }

    /// Looks for edges of channel 0 up to `now`; returns the tick.
    fn sync(&mut self, now: Nanos) -> u64 {
        let tick = ticks(now, PIT_HZ).max(self.seen);
        if self.channels[0]
            .next_rise(self.seen)
            .is_some_and(|at| at <= tick)
        {
            self.rose = true;
            self.quiet_until = now.saturating_add(SHORTEST_PERIOD);
        }
        self.seen = tick;
        for channel in &mut self.channels {
            channel.settle(tick);
        }
        self.out = self.channels[0].out(tick);
        tick
    }

    fn control(&mut self, word: u8, tick: u64) {
        let access = match word >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            3 => Access::LowHigh,
            _ if word < 0xc0 => return self.latch_counts(1 << (word >> 6), tick),
            _ => return self.read_back(word, tick),
        };
        match self.channels.get_mut(usize::from(word >> 6)) {
            Some(channel) => channel.control(word, access),
            None => self.read_back(word, tick),
        }
    }

    fn latch_counts(&mut self, channels: u8, tick: u64) {
        for (n, channel) in self.channels.iter_mut().enumerate() {
            if channels >> n & 1 != 0 {
                channel.latch_count(tick);
            }
        }
    }

    fn read_back(&mut self, word: u8, tick: u64) {
        let channels = word >> 1 & 7;
        if word & 0x20 == 0 {
            self.latch_counts(channels, tick);
        }
        for (n, channel) in self.channels.iter_mut().enumerate() {
            if word & 0x10 == 0 && channels >> n & 1 != 0 {
                channel.latch_status(tick);
            }
        }
    }

    fn read_port_61(&self, tick: u64, now: Nanos) -> u8 {
        let refresh = (now / REFRESH_NANOS) & 1 != 0;
        let out = self.channels[2].out(tick);
        self.port_61 | if refresh { REFRESH } else { 0 } | if out { OUT_2 } else { 0 }
    }
}

impl Chip for I8254 {
    fn read(&mut self, offset: u64, _size: u8, now: Nanos) -> u64 {
        let tick = self.sync(now);
        let value = match offset {
            0..=2 => self.channels[offset as usize].read(tick),
            PORT_61 => self.read_port_61(tick, now),
            _ => 0xff,
        };
        value.into()
    }

    fn write(&mut self, offset: u64, _size: u8, value: u64, now: Nanos) {
        let tick = self.sync(now);
        let value = value as u8;
        match offset {
            0..=2 => self.channels[offset as usize].write(value, tick),
            CONTROL => self.control(value, tick),
            PORT_61 => {
                self.port_61 = value & PORT_61_WRITABLE;
                self.channels[2].set_gate(value & GATE_2 != 0, tick);
            }
            _ => {}
        }
        self.out = self.channels[0].out(tick);
    }

    fn outputs(&mut self) -> Outputs {
        Outputs {
            level: self.out.into(),
            rose: std::mem::take(&mut self.rose).into(),
        }
    }

    fn next_deadline(&self) -> Option<Nanos> {
        let rise = self.channels[0].next_rise(self.seen)?;
        Some(periods(rise, PIT_HZ).max(self.quiet_until))
    }

    fn advance(&mut self, now: Nanos) {
        self.sync(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::every_register_takes_everything;

    /// Time at which tick `n` has just happened.
    fn at(tick: u64) -> Nanos {
        periods(tick, PIT_HZ)
    }

    fn program(pit: &mut I8254, channel: u8, mode: u8, count: u16, now: Nanos) {
        pit.write(CONTROL, 1, (channel << 6 | 0x30 | mode << 1).into(), now);
        for byte in count.to_le_bytes() {
            pit.write(channel.into(), 1, byte.into(), now);
        }
    }

    fn latched(pit: &mut I8254, channel: u8, now: Nanos) -> u16 {
        pit.write(CONTROL, 1, (channel << 6).into(), now);
        let low = pit.read(channel.into(), 1, now) as u8;
        u16::from_le_bytes([low, pit.read(channel.into(), 1, now) as u8])
    }

    /// Rising edges of output 0 at each deadline up to `end`.
    fn rises(pit: &mut I8254, end: Nanos) -> Vec<Nanos> {
        let mut rises = Vec::new();
        let mut level = pit.outputs().level;
        while let Some(now) = pit.next_deadline().filter(|at| *at <= end) {
            pit.advance(now);
            let outputs = pit.outputs();
            if outputs.rose != 0 || outputs.level > level {
                rises.push(now);
            }
            level = outputs.level;
        }
        rises
    }

    #[test]
    fn rate_generator_and_square_wave_interrupt_every_period() {
        for mode in [2, 3] {
            let mut pit = I8254::new();
            program(&mut pit, 0, mode, 11_932, 0);
            let rises = rises(&mut pit, 100_000_000);
            let expected: Vec<_> = (1..10).map(|n| at(n * 11_932)).collect();
            assert_eq!(rises, expected, "mode {mode}");
        }
    }

    #[test]
    fn terminal_count_interrupts_once() {
        let mut pit = I8254::new();
        program(&mut pit, 0, 0, 1000, at(5));
        assert_eq!(pit.outputs().level, 0);
        assert_eq!(rises(&mut pit, 1 << 40), [at(1005)]);
        assert_eq!(pit.outputs().level, 1);
        program(&mut pit, 0, 0, 0, at(2000));
        assert_eq!(rises(&mut pit, 1 << 40), [at(2000 + 65_536)], "0 is 65536");
    }

    #[test]
    fn a_software_strobe_is_one_tick_long() {
        let mut pit = I8254::new();
        program(&mut pit, 2, 4, 100, 0);
        pit.write(PORT_61, 1, 1, 0);
        for (tick, level) in [(99, OUT_2), (100, 0), (101, OUT_2)] {
            assert_eq!(pit.read(PORT_61, 1, at(tick)) as u8 & OUT_2, level);
        }
    }

    #[test]
    fn counts_are_read_whole_by_latching() {
        let mut pit = I8254::new();
        program(&mut pit, 0, 2, 1000, 0);
        assert_eq!(latched(&mut pit, 0, at(300)), 700);
        assert_eq!(latched(&mut pit, 0, at(1300)), 700);
        program(&mut pit, 1, 3, 1000, at(2000));
        assert_eq!(
            latched(&mut pit, 1, at(2300)),
            400,
            "a square wave counts by two"
        );
    }

    /// `quick_pit_calibrate` of Linux: channel 2 in mode 0, read without a latch.
    #[test]
    fn linux_calibrates_by_reading_channel_2() {
        let mut pit = I8254::new();
        pit.write(PORT_61, 1, 0x01, 0);
        program(&mut pit, 2, 0, 0xffff, 0);
        for tick in [0, 256, 1024, 65_000] {
            pit.read(2, 1, at(tick));
            assert_eq!(pit.read(2, 1, at(tick)), (0xffff - tick) >> 8);
        }
        assert_eq!(pit.read(PORT_61, 1, at(65_534)) as u8 & 0x2f, 0x01);
        assert_eq!(pit.read(PORT_61, 1, at(65_535)) as u8 & 0x2f, 0x21);
    }

    #[test]
    fn the_gate_holds_the_count() {
        let mut pit = I8254::new();
        program(&mut pit, 2, 0, 1000, 0);
        assert_eq!(latched(&mut pit, 2, at(100)), 1000);
        pit.write(PORT_61, 1, 1, at(100));
        assert_eq!(latched(&mut pit, 2, at(300)), 800);
        pit.write(PORT_61, 1, 0, at(300));
        assert_eq!(latched(&mut pit, 2, at(900)), 800);
        pit.write(PORT_61, 1, 1, at(900));
        assert_eq!(pit.read(PORT_61, 1, at(1699)) as u8 & OUT_2, 0);
        assert_eq!(pit.read(PORT_61, 1, at(1700)) as u8 & OUT_2, OUT_2);
    }

    #[test]
    fn a_one_shot_waits_for_its_gate() {
        let mut pit = I8254::new();
        program(&mut pit, 2, 1, 50, 0);
        let out = |pit: &mut I8254, tick| pit.read(PORT_61, 1, at(tick)) as u8 & OUT_2 != 0;
        assert!(out(&mut pit, 10));
        pit.write(PORT_61, 1, 1, at(10));
        assert!(!out(&mut pit, 59));
        assert!(out(&mut pit, 60));
    }

    fn write_count(pit: &mut I8254, channel: u8, count: u16, now: Nanos) {
        for byte in count.to_le_bytes() {
            pit.write(channel.into(), 1, byte.into(), now);
        }
    }

    #[test]
    fn a_new_count_waits_for_the_trigger_or_the_end_of_a_cycle() {
        let out = |pit: &mut I8254, tick| pit.read(PORT_61, 1, at(tick)) as u8 & OUT_2 != 0;
        for mode in [1, 5] {
            let mut pit = I8254::new();
            program(&mut pit, 2, mode, 100, 0);
            pit.write(PORT_61, 1, 1, at(10));
            write_count(&mut pit, 2, 40, at(20));
            let low = |pit: &mut I8254, tick| !out(pit, tick);
            let (before, end) = if mode == 1 { (true, 110) } else { (false, 111) };
            assert_eq!(low(&mut pit, 60), before, "{mode}");
            assert_eq!((low(&mut pit, end - 1), low(&mut pit, end)), (true, false));
            pit.write(PORT_61, 1, 0, at(200));
            pit.write(PORT_61, 1, 1, at(210));
            let end = if mode == 1 { 250 } else { 251 };
            assert_eq!((low(&mut pit, end - 1), low(&mut pit, end)), (true, false));
        }
        let mut pit = I8254::new();
        program(&mut pit, 0, 2, 1000, 0);
        write_count(&mut pit, 0, 300, at(1400));
        assert_eq!(latched(&mut pit, 0, at(1500)), 500);
        assert_eq!(rises(&mut pit, at(2700)), [at(2000), at(2300), at(2600)]);
        let mut pit = I8254::new();
        program(&mut pit, 0, 3, 1000, 0);
        write_count(&mut pit, 0, 300, at(1400));
        // The half that was high ends at 1500; low for 150, then both halves.
        assert_eq!(rises(&mut pit, at(2000)), [at(1650), at(1950)]);
    }

    #[test]
    fn the_first_byte_of_a_new_count_stops_the_old() {
        let mut pit = I8254::new();
        program(&mut pit, 0, 0, 1000, 0);
        pit.write(0, 1, 0x10, at(500));
        assert_eq!((pit.next_deadline(), pit.outputs().level), (None, 0));
        pit.write(0, 1, 0, at(600));
        assert_eq!(pit.next_deadline(), Some(at(616)));
    }

    #[test]
    fn read_back_tells_mode_and_output() {
        let mut pit = I8254::new();
        program(&mut pit, 0, 2, 100, 0);
        pit.write(CONTROL, 1, 0xc2, at(30));
        assert_eq!(pit.read(0, 1, at(60)), 0xb4);
        assert_eq!(pit.read(0, 1, at(60)), 70);
        assert_eq!(pit.read(0, 1, at(60)), 0);
        assert_eq!(pit.read(0, 1, at(60)), 40, "no longer latched");
        pit.write(CONTROL, 1, 0x30, 0);
        pit.write(CONTROL, 1, 0xe2, 0);
        assert_eq!(pit.read(0, 1, 0), 0x70, "no count yet");
    }

    fn program_bcd_zero(pit: &mut I8254, now: Nanos) {
        for (offset, value) in [(CONTROL, 0x35), (0, 0), (0, 0)] {
            pit.write(offset, 1, value, now);
        }
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let mut pit = I8254::new();
        pit.write(CONTROL, 1, 0x35, 0);
        pit.write(0, 1, 0x00, 0);
        pit.write(0, 1, 0x10, 0);
        assert_eq!(latched(&mut pit, 0, at(1)), 0x0999);
        program_bcd_zero(&mut pit, at(10));
        assert_eq!(latched(&mut pit, 0, at(11)), 0x9999);
    }

    #[test]
    fn bit_4_of_port_61_toggles() {
        let mut pit = I8254::new();
        let seen: Vec<_> = (0..4)
            .map(|n| pit.read(PORT_61, 1, n * REFRESH_NANOS) as u8 & REFRESH)
            .collect();
        assert_eq!(seen, [0, REFRESH, 0, REFRESH]);
    }

    #[test]
    fn nothing_written_breaks_it() {
        every_register_takes_everything(&mut I8254::new(), 6, |_, _| ());
    }
}
