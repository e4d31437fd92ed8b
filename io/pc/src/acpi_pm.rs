//! ACPI fixed hardware: PM1 event and control blocks, PM2 control, the PM timer, a general-purpose event block, the SMI command port.
//!
//! Offsets 0 to 15 are the block at the PM base port: PM1 status (0) and enable (2), PM1 control (4), PM timer (8),
//! GPE0 status (12) and enable (14). Offset 16 is the SMI command port, 17 the scratch port after it, and 18 PM2 control, whose one
//! bit (ARB_DIS) keeps other masters from memory while a processor sleeps in C3, which there is not: it is kept and does nothing.
//! Output 0 is the system control interrupt (level), input 0 the interrupt of the real-time clock: its rise is the RTC alarm event,
//! which wakes a guest that sleeps in its lightest state (S0).
//!
//! There is no firmware to own the hardware in legacy mode: the SMI command port does what its SMI handler would do.
//!
//! Source: ACPI specification 6.5, chapter 4.8.

use std::sync::Arc;

use doppel_device::{Chip, Nanos, Outputs, PowerControl, PowerRequest, periods, ticks};

/// The PM timer's frequency.
pub const PM_TIMER_HZ: u64 = 3_579_545;

const TIMER_BITS: u32 = 24;

/// Offsets of the SMI command port and its neighbour.
const COMMAND: u64 = 16;
const SCRATCH: u64 = 17;
/// Offset of PM2 control.
const PM2_CONTROL: u64 = 18;

/// PM1 status and enable bits.
const TIMER: u16 = 1 << 0;
const GLOBAL: u16 = 1 << 5;
const POWER_BUTTON: u16 = 1 << 8;
const SLEEP_BUTTON: u16 = 1 << 9;
const RTC_ALARM: u16 = 1 << 10;
const PM1_EVENTS: u16 = TIMER | GLOBAL | POWER_BUTTON | SLEEP_BUTTON | RTC_ALARM;

/// PM1 control bits.
const SCI_ENABLE: u16 = 1 << 0;
const SLEEP_TYPE: u16 = 7 << 10;
const SLEEP_ENABLE: u16 = 1 << 13;

/// PM2 control bits.
const ARBITER_DISABLE: u8 = 1 << 0;

/// Values that the machine's ACPI tables name.
#[derive(Clone, Copy, Debug)]
pub struct AcpiPmConfig {
    /// SLP_TYP of soft off.
    pub sleep_type_s5: u8,
    /// Written to the SMI command port to enter ACPI mode.
    pub acpi_enable: u8,
    /// Written there to leave it.
    pub acpi_disable: u8,
}

/// The chip.
pub struct AcpiPm {
    config: AcpiPmConfig,
    power: Arc<dyn PowerControl>,
    status: u16,
    enable: u16,
    control: u16,
    gpe_status: u16,
    gpe_enable: u16,
    scratch: u8,
    pm2_control: u8,
    /// The timer tick up to which the timer's top bit is looked at.
    seen: u64,
}

impl AcpiPm {
    /// Power management in legacy mode; soft off goes to `power`.
    pub fn new(config: AcpiPmConfig, power: Arc<dyn PowerControl>) -> Self {
        AcpiPm {
            config,
            power,
            status: 0,
            enable: 0,
            control: 0,
            gpe_status: 0,
            gpe_enable: 0,
            scratch: 0,
            pm2_control: 0,
            seen: 0,
        }
    }

    /// The power button is pressed: a guest with ACPI shuts down.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON;
    }

    /// General-purpose event `bit` (0 to 15) happens.
    pub fn raise_gpe(&mut self, bit: u8) {
        self.gpe_status |= 1u16.checked_shl(bit.into()).unwrap_or(0);
    }

    /// The timer status is set whenever the timer's top bit changes.
    fn sync(&mut self, now: Nanos) {
        let tick = ticks(now, PM_TIMER_HZ);
        if tick >> (TIMER_BITS - 1) != self.seen >> (TIMER_BITS - 1) {
            self.status |= TIMER;
        }
        self.seen = tick;
    }

    fn block(&self, now: Nanos) -> [u8; 16] {
        let timer = ticks(now, PM_TIMER_HZ) as u32 & ((1 << TIMER_BITS) - 1);
        let mut block = [0; 16];
        let parts: [(usize, &[u8]); 6] = [
            (0, &self.status.to_le_bytes()),
            (2, &self.enable.to_le_bytes()),
            (4, &self.control.to_le_bytes()),
            (8, &timer.to_le_bytes()),
            (12, &self.gpe_status.to_le_bytes()),
            (14, &self.gpe_enable.to_le_bytes()),
        ];
        for (at, bytes) in parts {
            block[at..at + bytes.len()].copy_from_slice(bytes);
        }
        block
    }

    fn write_byte(&mut self, offset: u64, byte: u8) {
        let shift = (offset & 1) * 8;
        let bits = u16::from(byte) << shift;
        let others = !(0xff << shift);
        match offset {
            0 | 1 => self.status &= !bits,
            2 | 3 => self.enable = self.enable & others | bits & PM1_EVENTS,
            4 | 5 => self.write_control(self.control & others | bits),
            12 | 13 => self.gpe_status &= !bits,
            14 | 15 => self.gpe_enable = self.gpe_enable & others | bits,
            COMMAND => self.command(byte),
            SCRATCH => self.scratch = byte,
            PM2_CONTROL => self.pm2_control = byte & ARBITER_DISABLE,
            _ => {}
        }
    }

    fn write_control(&mut self, value: u16) {
        self.control = value & (SCI_ENABLE | SLEEP_TYPE);
        let sleep_type = (value & SLEEP_TYPE) >> 10;
        if value & SLEEP_ENABLE != 0 && sleep_type == self.config.sleep_type_s5.into() {
            self.power.request(PowerRequest::PowerOff);
        }
    }

    fn command(&mut self, command: u8) {
        if command == self.config.acpi_enable {
            self.control |= SCI_ENABLE;
        } else if command == self.config.acpi_disable {
            self.control &= !SCI_ENABLE;
        }
    }

    fn interrupt(&self) -> bool {
        let events = self.status & self.enable & PM1_EVENTS | self.gpe_status & self.gpe_enable;
        self.control & SCI_ENABLE != 0 && events != 0
    }
}

impl Chip for AcpiPm {
    const WIDTH: u8 = 4;

    fn read(&mut self, offset: u64, size: u8, now: Nanos) -> u64 {
        self.sync(now);
        let block = self.block(now);
        let byte = |at: u64| match block.get(at as usize) {
            Some(byte) => *byte,
            None if at == SCRATCH => self.scratch,
            None if at == PM2_CONTROL => self.pm2_control,
            None => 0,
        };
        (0..u64::from(size)).fold(0, |value, n| value | u64::from(byte(offset + n)) << (8 * n))
    }

    fn write(&mut self, offset: u64, size: u8, value: u64, now: Nanos) {
        self.sync(now);
        for n in 0..u64::from(size) {
            self.write_byte(offset + n, (value >> (8 * n)) as u8);
        }
    }

    fn set_input(&mut self, _input: u32, level: bool, _now: Nanos) {
        if level {
            self.status |= RTC_ALARM;
        }
    }

    fn outputs(&mut self) -> Outputs {
        Outputs {
            level: self.interrupt().into(),
            rose: 0,
        }
    }

    fn next_deadline(&self) -> Option<Nanos> {
        let wanted =
            self.control & SCI_ENABLE != 0 && self.enable & TIMER != 0 && self.status & TIMER == 0;
        let next = (self.seen >> (TIMER_BITS - 1)) + 1;
        wanted.then(|| periods(next << (TIMER_BITS - 1), PM_TIMER_HZ))
    }

    fn advance(&mut self, now: Nanos) {
        self.sync(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::{Requests, every_register_takes_everything};
    use doppel_device::NANOS_PER_SECOND;

    fn chip() -> (AcpiPm, Arc<Requests>) {
        let requests = Arc::new(Requests::default());
        let config = AcpiPmConfig {
            sleep_type_s5: 5,
            acpi_enable: 2,
            acpi_disable: 3,
        };
        (AcpiPm::new(config, requests.clone()), requests)
    }

    #[test]
    fn the_timer_runs_at_its_frequency_and_wraps_at_24_bits() {
        let (mut pm, _) = chip();
        assert_eq!(pm.read(8, 4, NANOS_PER_SECOND), PM_TIMER_HZ);
        let wrapped = (PM_TIMER_HZ * 10) & 0xff_ffff;
        assert_eq!(pm.read(8, 4, 10 * NANOS_PER_SECOND), wrapped);
    }

    #[test]
    fn acpi_mode_is_entered_and_left_by_the_command_port() {
        let (mut pm, _) = chip();
        assert_eq!(pm.read(4, 2, 0), 0);
        pm.write(16, 1, 2, 0);
        assert_eq!(pm.read(4, 2, 0), 1);
        pm.write(16, 1, 9, 0);
        assert_eq!(pm.read(4, 2, 0), 1);
        pm.write(16, 1, 3, 0);
        assert_eq!(pm.read(4, 2, 0), 0);
    }

    #[test]
    fn sleep_type_5_is_power_off_and_others_are_nothing() {
        let (mut pm, requests) = chip();
        pm.write(4, 2, 5 << 10 | 1, 0);
        pm.write(4, 2, 1 << 13 | 3 << 10 | 1, 0);
        assert_eq!(requests.take(), []);
        pm.write(4, 2, 1 << 13 | 5 << 10 | 1, 0);
        assert_eq!(requests.take(), [PowerRequest::PowerOff]);
        assert_eq!(pm.read(4, 2, 0), 5 << 10 | 1, "SLP_EN reads as 0");
    }

    #[test]
    fn the_power_button_interrupts_until_its_status_is_cleared() {
        let (mut pm, _) = chip();
        pm.write(2, 2, POWER_BUTTON.into(), 0);
        pm.press_power_button();
        assert_eq!(pm.outputs().level, 0, "legacy mode");
        pm.write(16, 1, 2, 0);
        assert_eq!(pm.outputs().level, 1);
        pm.write(0, 2, 0x0001, 0);
        assert_eq!(pm.outputs().level, 1);
        assert_eq!(pm.read(0, 4, 0), 0x0100_0100);
        pm.write(1, 1, 0x01, 0);
        assert_eq!(pm.outputs().level, 0);
    }

    #[test]
    fn an_interrupt_of_the_clock_is_an_event() {
        let (mut pm, _) = chip();
        pm.write(16, 1, 2, 0);
        pm.set_input(0, true, 0);
        assert_eq!(pm.outputs().level, 0, "not enabled");
        pm.write(2, 2, RTC_ALARM.into(), 0);
        assert_eq!(pm.outputs().level, 1);
        pm.write(0, 2, RTC_ALARM.into(), 0);
        pm.set_input(0, false, 0);
        assert_eq!(pm.outputs().level, 0);
    }

    #[test]
    fn the_timer_interrupts_when_its_top_bit_changes() {
        let (mut pm, _) = chip();
        pm.write(16, 1, 2, 0);
        pm.write(2, 2, TIMER.into(), 0);
        let due = pm.next_deadline().unwrap();
        assert_eq!(due, periods(1 << 23, PM_TIMER_HZ));
        pm.advance(due - 1);
        assert_eq!(pm.outputs().level, 0);
        pm.advance(due);
        assert_eq!((pm.outputs().level, pm.next_deadline()), (1, None));
        pm.write(0, 2, TIMER.into(), due);
        assert_eq!(pm.outputs().level, 0);
        assert_eq!(pm.next_deadline(), Some(periods(2 << 23, PM_TIMER_HZ)));
    }

    #[test]
    fn general_purpose_events_interrupt_too() {
        let (mut pm, _) = chip();
        pm.write(16, 1, 2, 0);
        pm.write(14, 2, 0x8000, 0);
        pm.raise_gpe(15);
        pm.raise_gpe(16);
        assert_eq!(pm.outputs().level, 1);
        pm.write(12, 4, 0x8000_8000, 0);
        assert_eq!(pm.outputs().level, 0);
    }

    #[test]
    fn pm2_control_keeps_its_one_bit() {
        let (mut pm, _) = chip();
        pm.write(18, 1, 0xff, 0);
        assert_eq!(pm.read(18, 1, 0), 1);
        pm.write(18, 1, 0xfe, 0);
        assert_eq!(pm.read(18, 1, 0), 0);
    }

    #[test]
    fn nothing_written_breaks_it() {
        let (mut pm, requests) = chip();
        every_register_takes_everything(&mut pm, 20, |pm, random| {
            pm.raise_gpe(random as u8);
            pm.press_power_button();
            requests.take();
        });
    }
}
