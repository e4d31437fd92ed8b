//! The 16550A UART: a PC's serial port.
//!
//! No bit is ever clocked out: what is written goes to the sink at once, and waits in the transmit FIFO only where the
//! sink is full. Input is pulled from the source when the receive FIFO has run empty, so a fast typist (or a pipe) is
//! held back by the host and loses nothing. It is pulled only while somebody listens (RTS is asserted or the
//! receive interrupt is on), so that what is typed while a kernel boots waits for its shell.
//!
//! Two liberties: a receive FIFO below its trigger level times out at once, as there is no line whose silence could be
//! waited for; and OUT2 does not gate the interrupt, since many small kernels never set it.
//!
//! Source: National Semiconductor PC16550D data sheet.

use std::collections::VecDeque;
use std::sync::Arc;

use doppel_device::{CharSink, CharSource, Chip, Nanos, Outputs};

const FIFO: usize = 16;

/// Registers.
const DATA: u64 = 0;
const IER: u64 = 1;
const IIR_FCR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const MSR: u64 = 6;
const SCRATCH: u64 = 7;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IER_LINE: u8 = 1 << 2;
const IER_MODEM: u8 = 1 << 3;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM: u8 = 0x00;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFOS: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVE: u8 = 1 << 1;
const FCR_CLEAR_TRANSMIT: u8 = 1 << 2;

const LCR_DLAB: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOPBACK: u8 = 1 << 4;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_HOLDING_EMPTY: u8 = 1 << 5;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 6;

const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
const MSR_RING_ENDED: u8 = 1 << 2;
/// The terminal at the other end is always there.
const MSR_CONNECTED: u8 = MSR_CTS | MSR_DSR | MSR_DCD;

/// The chip; output 0 is its interrupt.
pub struct Uart16550 {
    sink: Arc<dyn CharSink>,
    source: Arc<dyn CharSource>,
    divisor: [u8; 2],
    ier: u8,
    lcr: u8,
    mcr: u8,
    modem: u8,
    scratch: u8,
    fifos: bool,
    trigger: usize,
    overrun: bool,
    /// The transmitter-empty interrupt is requested: it is an event, taken back by reading IIR or by writing data.
    emptied: bool,
    received: VecDeque<u8>,
    to_send: VecDeque<u8>,
}

impl Uart16550 {
    /// A UART between the guest and a pair of back-ends.
    pub fn new(sink: Arc<dyn CharSink>, source: Arc<dyn CharSource>) -> Self {
        Uart16550 {
            sink,
            source,
            divisor: [12, 0],
            ier: 0,
            lcr: 0,
            mcr: 0,
            modem: MSR_CONNECTED,
            scratch: 0,
            fifos: false,
            trigger: 1,
            overrun: false,
            emptied: false,
            received: VecDeque::with_capacity(FIFO),
            to_send: VecDeque::with_capacity(FIFO),
        }
    }

    fn depth(&self) -> usize {
        if self.fifos { FIFO } else { 1 }
    }

    fn loopback(&self) -> bool {
        self.mcr & MCR_LOOPBACK != 0
    }

    fn divisor_access(&self) -> bool {
        self.lcr & LCR_DLAB != 0
    }

    // Transmit.

    fn transmit(&mut self, byte: u8) {
        self.emptied = false;
        if self.loopback() {
            self.receive(byte);
            self.emptied = true;
            return;
        }
        if self.to_send.len() < self.depth() {
            self.to_send.push_back(byte);
        }
        self.drain();
    }

    /// Offers the sink what waits.
    fn drain(&mut self) {
        if self.to_send.is_empty() {
            return;
        }
        let waiting = self.to_send.make_contiguous();
        let taken = self.sink.write(waiting).min(waiting.len());
        self.to_send.drain(..taken);
        if self.to_send.is_empty() {
            self.emptied = true;
        }
    }

    // Receive.

    fn receive(&mut self, byte: u8) {
        if self.received.len() < self.depth() {
            self.received.push_back(byte);
            return;
        }
        self.overrun = true;
        if !self.fifos {
            // Without FIFOs the new byte replaces the old one.
            self.received.clear();
            self.received.push_back(byte);
        }
    }

    /// Fetches input once all that was there is read.
    fn fill(&mut self) {
        let listening = self.mcr & MCR_RTS != 0 || self.ier & IER_RECEIVED != 0;
        if self.received.is_empty() && listening && !self.loopback() {
            let mut buffer = [0; FIFO];
            let buffer = &mut buffer[..self.depth()];
            let n = self.source.read(buffer).min(buffer.len());
            self.received.extend(&buffer[..n]);
        }
    }

    fn read_data(&mut self) -> u8 {
        let byte = self.received.pop_front();
        self.fill();
        byte.unwrap_or(0)
    }

    // Interrupts.

    /// The reason with the highest priority.
    fn interrupt(&self) -> u8 {
        let on = |bit| self.ier & bit != 0;
        if on(IER_LINE) && self.overrun {
            IIR_LINE
        } else if on(IER_RECEIVED) && self.received.len() >= self.trigger {
            IIR_RECEIVED
        } else if on(IER_RECEIVED) && !self.received.is_empty() {
            IIR_TIMEOUT
        } else if on(IER_TRANSMITTER_EMPTY) && self.emptied {
            IIR_TRANSMITTER_EMPTY
        } else if on(IER_MODEM) && self.modem & 0xf != 0 {
            IIR_MODEM
        } else {
            IIR_NONE
        }
    }

    fn read_iir(&mut self) -> u8 {
        let reason = self.interrupt();
        if reason == IIR_TRANSMITTER_EMPTY {
            self.emptied = false;
        }
        reason | if self.fifos { IIR_FIFOS } else { 0 }
    }

    fn write_ier(&mut self, value: u8) {
        let turned_on = value & !self.ier;
        self.ier = value & 0xf;
        if turned_on & IER_TRANSMITTER_EMPTY != 0 && self.to_send.is_empty() {
            self.emptied = true;
        }
        self.fill();
    }

    // The rest.

    fn write_fcr(&mut self, value: u8) {
        let enable = value & FCR_ENABLE != 0;
        let changes = enable != self.fifos;
        self.fifos = enable;
        if changes || value & FCR_CLEAR_RECEIVE != 0 {
            self.received.clear();
            self.overrun = false;
        }
        if (changes || value & FCR_CLEAR_TRANSMIT != 0) && !self.to_send.is_empty() {
            self.to_send.clear();
            self.emptied = true;
        }
        self.trigger = if enable {
            [1, 4, 8, 14][usize::from(value >> 6)]
        } else {
            1
        };
        self.fill();
    }

    fn write_mcr(&mut self, value: u8) {
        self.mcr = value & 0x1f;
        let now = if self.loopback() {
            looped_back(self.mcr)
        } else {
            MSR_CONNECTED
        };
        self.set_modem_lines(now);
        self.fill();
    }

    fn set_modem_lines(&mut self, now: u8) {
        let changed = (self.modem ^ now) >> 4;
        let mut deltas = changed & 0xb;
        if self.modem & !now & MSR_RI != 0 {
            deltas |= MSR_RING_ENDED;
        }
        self.modem = now | self.modem & 0xf | deltas;
    }

    fn read_lsr(&mut self) -> u8 {
        let mut value = 0;
        if !self.received.is_empty() {
            value |= LSR_DATA_READY;
        }
        if self.to_send.is_empty() {
            value |= LSR_HOLDING_EMPTY | LSR_TRANSMITTER_EMPTY;
        }
        if std::mem::take(&mut self.overrun) {
            value |= LSR_OVERRUN;
        }
        value
    }

    fn read_msr(&mut self) -> u8 {
        let value = self.modem;
        self.modem &= 0xf0;
        value
    }
}

/// The modem status that the modem control outputs make in loopback mode.
fn looped_back(mcr: u8) -> u8 {
    [
        (MCR_RTS, MSR_CTS),
        (MCR_DTR, MSR_DSR),
        (MCR_OUT1, MSR_RI),
        (MCR_OUT2, MSR_DCD),
    ]
    .into_iter()
    .filter(|(output, _)| mcr & output != 0)
    .fold(0, |status, (_, input)| status | input)
}

impl Chip for Uart16550 {
    fn read(&mut self, offset: u64, _size: u8, _now: Nanos) -> u64 {
        let value = match offset {
            DATA | IER if self.divisor_access() => self.divisor[offset as usize],
            DATA => self.read_data(),
            IER => self.ier,
            IIR_FCR => self.read_iir(),
            LCR => self.lcr,
            MCR => self.mcr,
            LSR => self.read_lsr(),
            MSR => self.read_msr(),
            SCRATCH => self.scratch,
            _ => 0xff,
        };
        value.into()
    }

    fn write(&mut self, offset: u64, _size: u8, value: u64, _now: Nanos) {
        let value = value as u8;
        match offset {
            DATA | IER if self.divisor_access() => self.divisor[offset as usize] = value,
            DATA => self.transmit(value),
            IER => self.write_ier(value),
            IIR_FCR => self.write_fcr(value),
            LCR => self.lcr = value,
            MCR => self.write_mcr(value),
            SCRATCH => self.scratch = value,
            _ => {}
        }
    }

    fn backend_ready(&mut self, _now: Nanos) {
        self.drain();
        self.fill();
    }

    fn outputs(&mut self) -> Outputs {
        Outputs {
            level: (self.interrupt() != IIR_NONE).into(),
            rose: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torture::every_register_takes_everything;
    use std::sync::Mutex;

    /// A host terminal that takes `room` bytes.
    #[derive(Default)]
    struct Terminal {
        shown: Mutex<Vec<u8>>,
        typed: Mutex<VecDeque<u8>>,
        room: Mutex<usize>,
    }
    impl CharSink for Terminal {
        fn write(&self, bytes: &[u8]) -> usize {
            let mut room = self.room.lock().unwrap();
            let n = bytes.len().min(*room);
            *room -= n;
            self.shown.lock().unwrap().extend(&bytes[..n]);
            n
        }
    }
    impl CharSource for Terminal {
        fn read(&self, buffer: &mut [u8]) -> usize {
            let mut typed = self.typed.lock().unwrap();
            let n = typed.len().min(buffer.len());
            for (to, byte) in buffer.iter_mut().zip(typed.drain(..n)) {
                *to = byte;
            }
            n
        }
    }

    fn uart() -> (Uart16550, Arc<Terminal>) {
        let terminal = Arc::new(Terminal::default());
        *terminal.room.lock().unwrap() = 1_000_000;
        (Uart16550::new(terminal.clone(), terminal.clone()), terminal)
    }

    fn get(uart: &mut Uart16550, register: u64) -> u8 {
        uart.read(register, 1, 0) as u8
    }

    fn set(uart: &mut Uart16550, register: u64, value: u8) {
        uart.write(register, 1, value.into(), 0);
    }

    fn type_in(uart: &mut Uart16550, terminal: &Terminal, bytes: &[u8]) {
        terminal.typed.lock().unwrap().extend(bytes);
        uart.backend_ready(0);
    }

    #[test]
    fn what_is_written_is_shown() {
        let (mut uart, terminal) = uart();
        for byte in *b"hello" {
            assert_eq!(get(&mut uart, LSR), 0x60);
            set(&mut uart, DATA, byte);
        }
        assert_eq!(*terminal.shown.lock().unwrap(), b"hello");
    }

    /// The steps of Linux's `autoconfig`.
    #[test]
    fn linux_finds_a_16550a() {
        let (mut uart, _) = uart();
        set(&mut uart, IER, 0);
        assert_eq!(get(&mut uart, IER), 0);
        set(&mut uart, IER, 0xff);
        assert_eq!(get(&mut uart, IER), 0x0f);
        set(&mut uart, IER, 0);
        set(&mut uart, MCR, MCR_LOOPBACK | 0x0a);
        assert_eq!(get(&mut uart, MSR) & 0xf0, 0x90);
        set(&mut uart, MCR, 0);
        set(&mut uart, LCR, 0xbf);
        set(&mut uart, IIR_FCR, 0);
        set(&mut uart, LCR, 0);
        set(&mut uart, IIR_FCR, FCR_ENABLE);
        assert_eq!(get(&mut uart, IIR_FCR) >> 6, 3);
        set(&mut uart, IIR_FCR, FCR_ENABLE | 0x20);
        assert_eq!(get(&mut uart, IIR_FCR) >> 5, 6, "no 64 byte FIFO");
        set(&mut uart, SCRATCH, 0x5a);
        assert_eq!(get(&mut uart, SCRATCH), 0x5a);
    }

    /// `size_fifo` of Linux's driver.
    #[test]
    fn the_fifo_holds_16_bytes() {
        let (mut uart, terminal) = uart();
        set(&mut uart, IIR_FCR, 0x07);
        set(&mut uart, MCR, MCR_LOOPBACK);
        for byte in 0..=255 {
            set(&mut uart, DATA, byte);
        }
        assert_eq!(get(&mut uart, LSR), 0x63, "overrun");
        let count = (0..).take_while(|byte| {
            get(&mut uart, LSR) & LSR_DATA_READY != 0 && get(&mut uart, DATA) == *byte
        });
        assert_eq!(count.count(), 16);
        assert!(terminal.shown.lock().unwrap().is_empty());
    }

    /// `serial8250_do_startup` tests for a transmitter whose interrupt comes only once.
    #[test]
    fn the_transmitter_interrupt_comes_each_time_it_is_turned_on() {
        let (mut uart, _) = uart();
        for _ in 0..2 {
            set(&mut uart, IER, IER_TRANSMITTER_EMPTY);
            assert_eq!(uart.outputs().level, 1);
            assert_eq!(get(&mut uart, IIR_FCR), IIR_TRANSMITTER_EMPTY);
            assert_eq!(get(&mut uart, IIR_FCR), IIR_NONE);
            assert_eq!(uart.outputs().level, 0);
            set(&mut uart, IER, 0);
        }
        set(&mut uart, IER, IER_TRANSMITTER_EMPTY);
        get(&mut uart, IIR_FCR);
        set(&mut uart, DATA, b'x');
        assert_eq!(get(&mut uart, IIR_FCR), IIR_TRANSMITTER_EMPTY);
    }

    #[test]
    fn a_full_sink_holds_the_transmitter_and_loses_nothing() {
        let (mut uart, terminal) = uart();
        *terminal.room.lock().unwrap() = 2;
        set(&mut uart, IIR_FCR, FCR_ENABLE);
        set(&mut uart, IER, IER_TRANSMITTER_EMPTY);
        get(&mut uart, IIR_FCR);
        for byte in *b"0123456789abcdefX" {
            set(&mut uart, DATA, byte);
        }
        assert_eq!(get(&mut uart, LSR), 0);
        assert_eq!(get(&mut uart, IIR_FCR), 0xc1);
        *terminal.room.lock().unwrap() = 100;
        uart.backend_ready(0);
        assert_eq!(get(&mut uart, LSR), 0x60);
        assert_eq!(get(&mut uart, IIR_FCR), 0xc2);
        assert_eq!(*terminal.shown.lock().unwrap(), b"0123456789abcdefX");
    }

    #[test]
    fn input_arrives_with_the_right_interrupts() {
        let (mut uart, terminal) = uart();
        set(&mut uart, IIR_FCR, 0x41);
        set(&mut uart, IER, 0x0f);
        get(&mut uart, IIR_FCR);
        type_in(&mut uart, &terminal, b"abc");
        assert_eq!(get(&mut uart, IIR_FCR), 0xc0 | IIR_TIMEOUT);
        let mut got = Vec::new();
        while get(&mut uart, LSR) & LSR_DATA_READY != 0 {
            got.push(get(&mut uart, DATA));
        }
        assert_eq!(got, b"abc");
        assert_eq!(uart.outputs().level, 0);
        type_in(&mut uart, &terminal, b"abcd");
        assert_eq!(get(&mut uart, IIR_FCR), 0xc0 | IIR_RECEIVED);
    }

    #[test]
    fn a_flood_of_input_is_held_back_by_the_host_and_all_arrives() {
        let (mut uart, terminal) = uart();
        set(&mut uart, IIR_FCR, 0x81);
        set(&mut uart, MCR, MCR_RTS);
        let flood: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        type_in(&mut uart, &terminal, &flood);
        assert_eq!(terminal.typed.lock().unwrap().len(), 1000 - 16);
        let mut got = Vec::new();
        loop {
            let status = get(&mut uart, LSR);
            assert_eq!(status & LSR_OVERRUN, 0);
            if status & LSR_DATA_READY == 0 {
                break;
            }
            got.push(get(&mut uart, DATA));
        }
        assert_eq!(got, flood);
    }

    #[test]
    fn what_is_typed_before_anybody_listens_waits() {
        let (mut uart, terminal) = uart();
        type_in(&mut uart, &terminal, b"early");
        set(&mut uart, IIR_FCR, 0x07);
        assert_eq!(get(&mut uart, LSR), 0x60);
        set(&mut uart, IER, IER_RECEIVED);
        assert_eq!(get(&mut uart, DATA), b'e');
    }

    #[test]
    fn line_errors_come_before_data_and_modem_changes_last() {
        let (mut uart, _) = uart();
        set(&mut uart, MCR, MCR_LOOPBACK);
        set(&mut uart, IER, 0x0f);
        set(&mut uart, DATA, 1);
        set(&mut uart, DATA, 2);
        assert_eq!(get(&mut uart, IIR_FCR), IIR_LINE);
        assert_eq!(get(&mut uart, LSR), 0x63);
        assert_eq!(get(&mut uart, IIR_FCR), IIR_RECEIVED);
        assert_eq!(get(&mut uart, DATA), 2, "replaced");
        assert_eq!(get(&mut uart, IIR_FCR), IIR_TRANSMITTER_EMPTY);
        assert_eq!(get(&mut uart, IIR_FCR), IIR_MODEM);
        assert_eq!(get(&mut uart, MSR), 0x0b, "CTS, DSR and DCD went away");
        assert_eq!(get(&mut uart, IIR_FCR), IIR_NONE);
        set(&mut uart, MCR, MCR_LOOPBACK | MCR_OUT1);
        set(&mut uart, MCR, MCR_LOOPBACK);
        assert_eq!(get(&mut uart, MSR), MSR_RING_ENDED);
    }

    #[test]
    fn the_divisor_hides_behind_dlab() {
        let (mut uart, terminal) = uart();
        set(&mut uart, LCR, 0x83);
        set(&mut uart, 0, 1);
        set(&mut uart, 1, 2);
        assert_eq!((get(&mut uart, 0), get(&mut uart, 1)), (1, 2));
        set(&mut uart, LCR, 0x03);
        assert_eq!((get(&mut uart, 1), get(&mut uart, LCR)), (0, 3));
        assert!(terminal.shown.lock().unwrap().is_empty());
    }

    #[test]
    fn nothing_written_breaks_it() {
        let (mut uart, terminal) = uart();
        every_register_takes_everything(&mut uart, 9, |uart, random| {
            *terminal.room.lock().unwrap() = random as usize % 40;
            type_in(uart, &terminal, &random.to_le_bytes());
            terminal.shown.lock().unwrap().clear();
        });
    }
}
