//! The MC146818 real-time clock and the CMOS memory beside it.
//!
//! Offset 0 is the index port (0x70, whose top bit masks NMIs), offset 1 the data port (0x71). Output 0 is ISA interrupt 8.
//!
//! The clock keeps a number of seconds and the phase at which they change; the registers are worked out from it when they
//! are read. It runs on the machine's own time, as the quartz of a real one does, and is set to the host's clock once.
//! Flags are worked out too: what happened since they were last looked at. While an unread flag asserts the
//! interrupt nothing new can be noticed, so that the chip then has no deadline, and a guest that does not answer costs nothing.
//!
//! Source: Motorola MC146818A data sheet; the layout of CMOS memory as BIOSes and Linux have it.

use std::time::Duration;

use doppel_device::{Chip, NANOS_PER_SECOND, Nanos, Outputs};

use crate::calendar::{Civil, DAY};

const INDEX: u64 = 0;
const NMI_MASK: u8 = 0x80;

/// Registers.
const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;
/// The century, where the FADT of the machine says so.
pub const RTC_CENTURY: u8 = 0x32;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// The divider is held in reset: both of these bits.
const A_DIVIDER_RESET: u8 = 0x60;
/// Divider for a 32,768 Hz quartz, periodic rate 1024 Hz.
const A_AFTER_RESET: u8 = 0x26;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const B_SET: u8 = 1 << 7;
/// Flags in C and the bits in B that enable their interrupts.
const UPDATE_ENDED: u8 = 1 << 4;
const ALARM: u8 = 1 << 5;
const PERIODIC: u8 = 1 << 6;
const C_INTERRUPT: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;

const HOUR_PM: u8 = 0x80;
/// Alarm bytes from here on match everything.
const ALARM_ANY: u8 = 0xc0;

/// How long after the divider is released the seconds change.
const FIRST_UPDATE: Nanos = NANOS_PER_SECOND / 2;
/// How long before the seconds change the update flag is up.
const UPDATE_WARNING: Nanos = 244_000;

/// Where CMOS memory tells the memory size: kilobytes below 1 MiB; kilobytes above 1 MiB (twice); 64 KiB units
/// above 16 MiB; 64 KiB units above 4 GiB (three bytes).
const BASE_MEMORY: usize = 0x15;
const EXTENDED_MEMORY: [usize; 2] = [0x17, 0x30];
const MEMORY_ABOVE_16M: usize = 0x34;
const MEMORY_ABOVE_4G: usize = 0x5b;

/// The chip.
#[derive(Clone, Debug)]
pub struct Mc146818 {
    /// Everything but the time (which is there while [`B_SET`] holds the clock).
    ram: [u8; 128],
    index: u8,
    nmi_masked: bool,
    /// Seconds since 1970 at the last change of seconds before time 0, and how long before that was.
    seconds_at_zero: i64,
    phase: Nanos,
    /// What the clock shows while the divider is held.
    held: Option<i64>,
    /// Flags are up to date to this time.
    seen: Nanos,
}

impl Mc146818 {
    /// A clock that shows `wall` (since 1970) at time 0, in a machine with `low` bytes of memory below 4 GiB and `high` above.
    pub fn new(wall: Duration, low: u64, high: u64) -> Self {
        let mut ram = [0; 128];
        ram[usize::from(A)] = A_AFTER_RESET;
        ram[usize::from(B)] = B_24_HOURS;
        let units = |bytes: u64, unit: u64, most: u64| (bytes / unit).min(most).to_le_bytes();
        let extended = units(low.saturating_sub(1 << 20), 1 << 10, 0xffff);
        let above_16m = units(low.saturating_sub(16 << 20), 1 << 16, 0xffff);
        let above_4g = units(high, 1 << 16, 0xff_ffff);
        let base = 640u16.to_le_bytes();
        for (at, bytes) in [
            (BASE_MEMORY, &base[..]),
            (EXTENDED_MEMORY[0], &extended[..2]),
            (EXTENDED_MEMORY[1], &extended[..2]),
            (MEMORY_ABOVE_16M, &above_16m[..2]),
            (MEMORY_ABOVE_4G, &above_4g[..3]),
        ] {
            ram[at..at + bytes.len()].copy_from_slice(bytes);
        }
        Mc146818 {
            ram,
            index: 0,
            nmi_masked: false,
            seconds_at_zero: wall.as_secs() as i64,
            phase: wall.subsec_nanos().into(),
            held: None,
            seen: 0,
        }
    }

    /// The guest has masked NMIs at the index port.
    pub fn nmi_masked(&self) -> bool {
        self.nmi_masked
    }

    // Bytes as the guest has chosen to see them.

    fn encode(&self, value: i64) -> u8 {
        let value = value.rem_euclid(100) as u8;
        if self.b(B_BINARY) {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, byte: u8) -> i64 {
        if self.b(B_BINARY) {
            byte.into()
        } else {
            i64::from(byte >> 4) * 10 + i64::from(byte & 0xf)
        }
    }

    fn encode_hour(&self, hour: i64) -> u8 {
        if self.b(B_24_HOURS) {
            return self.encode(hour);
        }
        let pm = if hour >= 12 { HOUR_PM } else { 0 };
        self.encode((hour + 11) % 12 + 1) | pm
    }

    fn decode_hour(&self, byte: u8) -> i64 {
        if self.b(B_24_HOURS) {
            return self.decode(byte);
        }
        let pm = if byte & HOUR_PM != 0 { 12 } else { 0 };
        self.decode(byte & !HOUR_PM) % 12 + pm
    }

    fn register(&self, register: u8) -> u8 {
        self.ram[usize::from(register)]
    }

    fn b(&self, bit: u8) -> bool {
        self.register(B) & bit != 0
    }

    // The time.

    fn seconds(&self, now: Nanos) -> i64 {
        if let Some(seconds) = self.held {
            return seconds;
        }
        let passed = now.saturating_add(self.phase) / NANOS_PER_SECOND;
        self.seconds_at_zero.saturating_add(passed as i64)
    }

    /// Writes the time into its registers.
    fn show(&mut self, now: Nanos) {
        let civil = Civil::from_seconds(self.seconds(now));
        for (register, value) in [
            (SECONDS, self.encode(civil.second)),
            (MINUTES, self.encode(civil.minute)),
            (HOURS, self.encode_hour(civil.hour)),
            (WEEKDAY, self.encode(civil.weekday + 1)),
            (DAY_OF_MONTH, self.encode(civil.day)),
            (MONTH, self.encode(civil.month)),
            (YEAR, self.encode(civil.year)),
            (RTC_CENTURY, self.encode(civil.year.div_euclid(100))),
        ] {
            self.ram[usize::from(register)] = value;
        }
    }

    /// Makes the seconds be this many; they keep their phase.
    fn set_seconds(&mut self, seconds: i64, now: Nanos) {
        match &mut self.held {
            Some(held) => *held = seconds,
            None => self.seconds_at_zero += seconds - self.seconds(now),
        }
    }

    /// Takes the time from its registers.
    fn take(&mut self, now: Nanos) {
        let field = |register| self.decode(self.register(register));
        let civil = Civil {
            year: field(RTC_CENTURY) * 100 + field(YEAR),
            month: field(MONTH),
            day: field(DAY_OF_MONTH),
            weekday: 0,
            hour: self.decode_hour(self.register(HOURS)),
            minute: field(MINUTES),
            second: field(SECONDS),
        };
        self.set_seconds(civil.to_seconds(), now);
    }

    /// Nothing but a write to the registers changes the time.
    fn stands(&self) -> bool {
        self.b(B_SET) || self.held.is_some()
    }

    fn update_in_progress(&self, now: Nanos) -> bool {
        let into = now.saturating_add(self.phase) % NANOS_PER_SECOND;
        !self.stands() && into >= NANOS_PER_SECOND - UPDATE_WARNING
    }

    // Events: the first one after a time.

    fn next_update(&self, after: Nanos) -> Option<Nanos> {
        let into = after.saturating_add(self.phase) % NANOS_PER_SECOND;
        (!self.stands()).then(|| after.saturating_add(NANOS_PER_SECOND - into))
    }

    fn next_periodic(&self, after: Nanos) -> Option<Nanos> {
        let shift = match self.register(A) & 0xf {
            _ if self.held.is_some() => return None,
            0 => return None,
            // The two fastest rates are those of 8 and 9.
            rate @ (1 | 2) => rate + 6,
            rate => rate - 1,
        };
        // Periods in units of 2^-15 s; `period * count` is exact at every second.
        let count = ((u128::from(after) << 15) / u128::from(NANOS_PER_SECOND)) >> shift;
        let at = ((count + 1) << shift) * u128::from(NANOS_PER_SECOND);
        u64::try_from(at.div_ceil(1 << 15)).ok()
    }

    fn next_alarm(&self, after: Nanos) -> Option<Nanos> {
        let first = self.next_update(after)?;
        let time = self.seconds(first).rem_euclid(DAY);
        let wait = self.seconds_to_alarm(time)?;
        Some(first.saturating_add(wait as u64 * NANOS_PER_SECOND))
    }

    /// Hour, minute and second of the alarm, `None` for any. There is none where one of them never comes, for which
    /// nobody may search a whole day at each access.
    fn alarm(&self) -> Option<[Option<i64>; 3]> {
        let wanted = |register| {
            let byte = self.register(register);
            (byte < ALARM_ANY).then_some(byte)
        };
        let alarm = [
            wanted(HOURS_ALARM).map(|byte| self.decode_hour(byte)),
            wanted(MINUTES_ALARM).map(|byte| self.decode(byte)),
            wanted(SECONDS_ALARM).map(|byte| self.decode(byte)),
        ];
        let comes = |(field, most): (&Option<i64>, i64)| field.is_none_or(|value| value <= most);
        alarm.iter().zip([23, 59, 59]).all(comes).then_some(alarm)
    }

    /// Seconds from a time of day to the first one that matches the alarm, 0 to a day.
    fn seconds_to_alarm(&self, time: i64) -> Option<i64> {
        let [hour, minute, second] = self.alarm()?;
        let matches = |wanted: Option<i64>, is: i64| wanted.is_none_or(|wanted| wanted == is);
        // From now, then from the beginning of each next minute and hour: where the larger does not match the smaller
        // cannot.
        let mut at = time;
        while at <= time + DAY {
            let (h, m, s) = (at / 3600 % 24, at / 60 % 60, at % 60);
            if !matches(hour, h) {
                at += 3600 - at % 3600;
            } else if !matches(minute, m) {
                at += 60 - at % 60;
            } else if !matches(second, s) {
                at += 1;
            } else {
                return Some(at - time);
            }
        }
        None
    }

    // Flags and the interrupt.

    fn events(&self, after: Nanos) -> [(u8, Option<Nanos>); 3] {
        [
            (UPDATE_ENDED, self.next_update(after)),
            (PERIODIC, self.next_periodic(after)),
            (ALARM, self.next_alarm(after)),
        ]
    }

    fn sync(&mut self, now: Nanos) {
        for (flag, at) in self.events(self.seen) {
            if at.is_some_and(|at| at <= now) {
                self.ram[usize::from(C)] |= flag;
            }
        }
        self.seen = self.seen.max(now);
    }

    fn interrupt(&self) -> bool {
        self.register(B) & self.register(C) & (UPDATE_ENDED | ALARM | PERIODIC) != 0
    }

    fn read_data(&mut self, now: Nanos) -> u8 {
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | RTC_CENTURY if !self.b(B_SET) => {
                self.show(now);
                self.register(self.index)
            }
            A if self.update_in_progress(now) => self.register(A) | A_UPDATE_IN_PROGRESS,
            C => {
                let interrupt = if self.interrupt() { C_INTERRUPT } else { 0 };
                std::mem::take(&mut self.ram[usize::from(C)]) | interrupt
            }
            D => D_VALID,
            index => self.register(index),
        }
    }

    fn write_data(&mut self, value: u8, now: Nanos) {
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY..=YEAR | RTC_CENTURY => {
                if self.b(B_SET) {
                    self.ram[usize::from(self.index)] = value;
                } else {
                    self.show(now);
                    self.ram[usize::from(self.index)] = value;
                    self.take(now);
                }
            }
            A => self.write_a(value, now),
            B => self.write_b(value, now),
            C | D => {}
            index => self.ram[usize::from(index)] = value,
        }
    }

    /// Whoever sets the clock to a part of a second holds the divider and lets go of it half a second after a full one.
    fn write_a(&mut self, value: u8, now: Nanos) {
        let hold = value & A_DIVIDER_RESET == A_DIVIDER_RESET;
        let seconds = self.seconds(now);
        if hold {
            self.held = Some(seconds);
        } else if self.held.take().is_some() {
            let to_full = NANOS_PER_SECOND - now % NANOS_PER_SECOND;
            self.phase = (to_full + NANOS_PER_SECOND - FIRST_UPDATE) % NANOS_PER_SECOND;
            self.set_seconds(seconds, now);
        }
        self.ram[usize::from(A)] = value & !A_UPDATE_IN_PROGRESS;
    }

    fn write_b(&mut self, value: u8, now: Nanos) {
        let (held, hold) = (self.b(B_SET), value & B_SET != 0);
        if hold && !held {
            self.show(now);
        } else if held && !hold {
            self.take(now);
        }
        // Setting the clock turns the update interrupt off.
        let cleared = if hold { UPDATE_ENDED } else { 0 };
        self.ram[usize::from(B)] = value & !cleared;
    }
}

impl Chip for Mc146818 {
    fn read(&mut self, offset: u64, _size: u8, now: Nanos) -> u64 {
        self.sync(now);
        let value = match offset {
            // The index port cannot be read.
            INDEX => 0xff,
            _ => self.read_data(now),
        };
        value.into()
    }

    fn write(&mut self, offset: u64, _size: u8, value: u64, now: Nanos) {
        self.sync(now);
        let value = value as u8;
        match offset {
            INDEX => {
                self.index = value & !NMI_MASK;
                self.nmi_masked = value & NMI_MASK != 0;
            }
            _ => self.write_data(value, now),
        }
    }

    fn outputs(&mut self) -> Outputs {
        Outputs {
            level: self.interrupt().into(),
            rose: 0,
        }
    }

    fn next_deadline(&self) -> Option<Nanos> {
        if self.interrupt() {
            return None;
        }
        let enabled = |flag: &u8| self.b(*flag);
        let events = self.events(self.seen).into_iter();
        events
            .filter(|(flag, _)| enabled(flag))
            .filter_map(|(_, at)| at)
            .min()
    }

    fn advance(&mut self, now: Nanos) {
        self.sync(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::every_register_takes_everything;

    const SECOND: Nanos = NANOS_PER_SECOND;

    /// Sunday, 9 September 2001, 01:46:40.25.
    fn clock() -> Mc146818 {
        Mc146818::new(Duration::from_millis(1_000_000_000_250), 1 << 31, 1 << 32)
    }

    fn get(rtc: &mut Mc146818, register: u8, now: Nanos) -> u8 {
        rtc.write(INDEX, 1, register.into(), now);
        rtc.read(1, 1, now) as u8
    }

    fn set(rtc: &mut Mc146818, register: u8, value: u8, now: Nanos) {
        rtc.write(INDEX, 1, register.into(), now);
        rtc.write(1, 1, value.into(), now);
    }

    fn time(rtc: &mut Mc146818, now: Nanos) -> [u8; 8] {
        [
            RTC_CENTURY,
            YEAR,
            MONTH,
            DAY_OF_MONTH,
            HOURS,
            MINUTES,
            SECONDS,
            WEEKDAY,
        ]
        .map(|register| get(rtc, register, now))
    }

    #[test]
    fn the_time_is_shown_in_bcd_or_binary() {
        let mut rtc = clock();
        assert_eq!(time(&mut rtc, 0), [0x20, 1, 9, 9, 1, 0x46, 0x40, 1]);
        let later = time(&mut rtc, 20 * SECOND);
        assert_eq!(later, [0x20, 1, 9, 9, 1, 0x47, 0, 1]);
        set(&mut rtc, B, B_24_HOURS | B_BINARY, 0);
        assert_eq!(time(&mut rtc, 0), [20, 1, 9, 9, 1, 46, 40, 1]);
    }

    #[test]
    fn seconds_change_when_the_walls_do() {
        let mut rtc = clock();
        assert_eq!(get(&mut rtc, SECONDS, 749_999_999), 0x40);
        assert_eq!(get(&mut rtc, SECONDS, 750_000_000), 0x41);
        assert_eq!(
            get(&mut rtc, A, 749_900_000),
            A_AFTER_RESET | A_UPDATE_IN_PROGRESS
        );
        assert_eq!(get(&mut rtc, A, 750_000_000), A_AFTER_RESET);
    }

    #[test]
    fn hours_can_be_twelve() {
        let mut rtc = clock();
        for (hour, byte) in [
            (0, 0x12),
            (1, 0x01),
            (11, 0x11),
            (12, 0x92),
            (13, 0x81),
            (23, 0x91),
        ] {
            set(&mut rtc, B, B_24_HOURS, 0);
            set(&mut rtc, HOURS, ((hour / 10) << 4) | (hour % 10), 0);
            set(&mut rtc, B, 0, 0);
            assert_eq!(get(&mut rtc, HOURS, 0), byte);
            set(&mut rtc, HOURS, byte, 0);
            assert_eq!(get(&mut rtc, HOURS, 0), byte);
        }
    }

    /// The steps of Linux's `mc146818_set_time`.
    #[test]
    fn it_is_set_and_goes_on_from_there() {
        let mut rtc = clock();
        set(&mut rtc, B, B_SET | B_24_HOURS, 0);
        let new = [
            (RTC_CENTURY, 0x19),
            (YEAR, 0x99),
            (MONTH, 0x12),
            (DAY_OF_MONTH, 0x31),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x58),
        ];
        for (register, value) in new {
            set(&mut rtc, register, value, 0);
        }
        assert_eq!(get(&mut rtc, SECONDS, 5 * SECOND), 0x58, "held");
        set(&mut rtc, B, B_24_HOURS, 5 * SECOND);
        assert_eq!(time(&mut rtc, 7 * SECOND), [0x20, 0, 1, 1, 0, 0, 0, 7]);
    }

    #[test]
    fn the_first_update_comes_half_a_second_after_the_divider_is_released() {
        let mut rtc = clock();
        let (set_at, released) = (SECOND / 10, 9 * SECOND + SECOND / 3);
        set(&mut rtc, B, B_SET | B_24_HOURS, set_at);
        set(&mut rtc, A, A_AFTER_RESET | 0x70, set_at);
        set(&mut rtc, SECONDS, 0x05, set_at);
        set(&mut rtc, B, B_24_HOURS | UPDATE_ENDED | PERIODIC, set_at);
        get(&mut rtc, C, set_at);
        assert_eq!(rtc.next_deadline(), None, "held");
        assert_eq!(get(&mut rtc, SECONDS, released), 0x05);
        set(&mut rtc, A, A_AFTER_RESET & 0xf0, released);
        assert_eq!(rtc.next_deadline(), Some(released + SECOND / 2));
        assert_eq!(get(&mut rtc, SECONDS, released + SECOND / 2 - 1), 0x05);
        assert_eq!(get(&mut rtc, SECONDS, released + SECOND / 2), 0x06);
        assert_eq!(get(&mut rtc, SECONDS, released + SECOND * 3 / 2), 0x07);
        set(&mut rtc, A, 0x60, released + SECOND * 3 / 2);
        assert_eq!(get(&mut rtc, SECONDS, released + SECOND * 30), 0x07);
    }

    #[test]
    fn the_alarm_comes_at_its_time() {
        let mut rtc = clock();
        for (register, value) in [
            (HOURS_ALARM, 0x02),
            (MINUTES_ALARM, 0x00),
            (SECONDS_ALARM, 0x05),
        ] {
            set(&mut rtc, register, value, 0);
        }
        set(&mut rtc, B, B_24_HOURS | ALARM, 0);
        let wait = 13 * 60 + 20 + 5;
        assert_eq!(rtc.next_deadline(), Some(wait * SECOND - SECOND / 4));
        set(&mut rtc, HOURS_ALARM, 0xff, 0);
        set(&mut rtc, MINUTES_ALARM, 0xff, 0);
        let due = rtc.next_deadline().unwrap();
        assert_eq!(due, 25 * SECOND - SECOND / 4);
        rtc.advance(due);
        assert_eq!((rtc.outputs().level, rtc.next_deadline()), (1, None));
        assert_eq!(
            get(&mut rtc, C, due),
            C_INTERRUPT | ALARM | UPDATE_ENDED | PERIODIC
        );
        assert_eq!(rtc.outputs().level, 0);
        assert_eq!(rtc.next_deadline(), Some(due + 60 * SECOND));
        set(&mut rtc, HOURS_ALARM, 0x24, due);
        assert_eq!(rtc.next_deadline(), None, "no such hour");
    }

    #[test]
    fn an_alarm_that_never_comes_is_not_searched_for() {
        let mut rtc = clock();
        set(&mut rtc, B, B_24_HOURS | ALARM, 0);
        for (never, alarm) in [
            (true, [0xff, 0xff, 0x7f]),
            (true, [0xff, 0x60, 0xff]),
            (true, [0x24, 0xff, 0xff]),
            (false, [0x23, 0x59, 0x59]),
            (false, [0xff, 0xff, 0xff]),
        ] {
            for (register, value) in [HOURS_ALARM, MINUTES_ALARM, SECONDS_ALARM]
                .into_iter()
                .zip(alarm)
            {
                set(&mut rtc, register, value, 0);
            }
            assert_eq!(rtc.alarm().is_none(), never, "{alarm:x?}");
            assert_eq!(rtc.next_deadline().is_none(), never, "{alarm:x?}");
        }
        set(&mut rtc, SECONDS_ALARM, 60, 0);
        set(&mut rtc, B, B_24_HOURS | B_BINARY | ALARM, 0);
        assert_eq!(rtc.alarm(), None);
    }

    #[test]
    fn an_alarm_of_this_very_second_comes_tomorrow() {
        let mut rtc = clock();
        for (register, value) in [
            (HOURS_ALARM, 0x01),
            (MINUTES_ALARM, 0x46),
            (SECONDS_ALARM, 0x40),
        ] {
            set(&mut rtc, register, value, 0);
        }
        set(&mut rtc, B, B_24_HOURS | ALARM, 0);
        assert_eq!(rtc.next_deadline(), Some(86_400 * SECOND - SECOND / 4));
    }

    #[test]
    fn the_periodic_interrupt_has_its_rate_and_waits_to_be_read() {
        let mut rtc = clock();
        set(&mut rtc, B, B_24_HOURS | PERIODIC, 0);
        for (rate, hz) in [(6, 1024), (3, 8192), (15, 2), (1, 256), (2, 128)] {
            set(&mut rtc, A, 0x20 | rate, 0);
            get(&mut rtc, C, 0);
            assert_eq!(
                rtc.next_deadline(),
                Some(SECOND.div_ceil(hz)),
                "rate {rate}"
            );
        }
        set(&mut rtc, A, 0x26, 0);
        let mut count = 0;
        while let Some(due) = rtc.next_deadline().filter(|due| *due <= SECOND) {
            rtc.advance(due);
            assert_eq!(rtc.next_deadline(), None);
            assert_eq!(get(&mut rtc, C, due) & 0xc0, 0xc0);
            count += 1;
        }
        assert_eq!(count, 1024);
    }

    #[test]
    fn updates_interrupt_every_second() {
        let mut rtc = clock();
        set(&mut rtc, B, B_24_HOURS | UPDATE_ENDED, 0);
        assert_eq!(rtc.next_deadline(), Some(750_000_000));
        rtc.advance(750_000_000);
        assert_eq!(get(&mut rtc, C, 750_000_000) & 0x90, 0x90);
        assert_eq!(rtc.next_deadline(), Some(1_750_000_000));
    }

    #[test]
    fn cmos_memory_tells_the_memory_size_and_keeps_what_is_written() {
        let mut rtc = clock();
        for (register, value) in [(0x15, 0x80), (0x16, 0x02), (0x30, 0xff), (0x31, 0xff)] {
            assert_eq!(get(&mut rtc, register, 0), value);
        }
        let above_16m = [0x34, 0x35].map(|register| get(&mut rtc, register, 0));
        assert_eq!(u16::from_le_bytes(above_16m), 0x7f00);
        let above_4g = [0x5b, 0x5c, 0x5d].map(|register| get(&mut rtc, register, 0));
        assert_eq!(above_4g, [0, 0, 1]);
        set(&mut rtc, 0x7f, 0x5a, 0);
        assert_eq!(get(&mut rtc, 0xff, 0), 0x5a);
        assert!(rtc.nmi_masked());
    }

    #[test]
    fn nothing_written_breaks_it() {
        every_register_takes_everything(&mut clock(), 3, |_, _| ());
    }
}
