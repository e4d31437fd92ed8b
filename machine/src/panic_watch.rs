//! Notices that the guest's Linux has panicked for good.
//!
//! A Linux kernel that panics with `panic=0` (the default) prints its last line, `---[ end Kernel panic - not
//! syncing: … ]---`, and spins for ever with interrupts on: no halt, no triple fault, nothing that the hardware
//! would notice. With `panic=N` it reboots before that line. So the line on the console says "and nothing else
//! was asked for". As a user may print such a line too (`cat` of an old log), it only raises suspicion: the
//! guest is dead if for [`PATIENCE`] after it nothing more is printed and no CPU executes HLT. A living guest soon
//! prints or idles.
//!
//! This is a heuristic: a kernel with no console on the serial line panics unnoticed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use doppel_device::{Alarm, CharSink, NANOS_PER_SECOND, Nanos, OnAlarm, Timers};

use crate::control::{Cause, Control};

/// How long a guest must be silent and busy after its panic.
const PATIENCE: Nanos = NANOS_PER_SECOND;
const PANIC: &[u8] = b"---[ end Kernel panic - not syncing";
const PANIC_END: &[u8] = b"]---";
const HALT: &[u8] = b"reboot: System halted";
/// Longer lines are no messages of the kernel.
const LINE_MAX: usize = 2048;

/// What the last complete line said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Nothing,
    Panicked,
    Halted,
}

/// Splits the console's bytes into lines and reads them.
#[derive(Default)]
struct LineReader {
    line: Vec<u8>,
}

impl LineReader {
    /// Takes one byte; tells what a line said when it ends.
    fn take(&mut self, byte: u8) -> Option<Said> {
        if byte != b'\n' {
            if self.line.len() < LINE_MAX {
                self.line.push(byte);
            }
            return None;
        }
        let said = meaning(self.line.trim_ascii_end());
        self.line.clear();
        Some(said)
    }
}

fn meaning(line: &[u8]) -> Said {
    let text = after_timestamp(line);
    if text.starts_with(PANIC) && text.ends_with(PANIC_END) {
        Said::Panicked
    } else if text == HALT {
        Said::Halted
    } else {
        Said::Nothing
    }
}

/// The text behind `[   12.345678] ` and what else printk puts in brackets.
fn after_timestamp(mut line: &[u8]) -> &[u8] {
    while line.first() == Some(&b'[') {
        let Some(end) = line.iter().position(|&b| b == b']') else {
            return line;
        };
        line = line[end + 1..].trim_ascii_start();
    }
    line
}

struct State {
    reader: LineReader,
    said: Said,
    // How many HLTs the machine had executed when the panic was announced.
    halts: u64,
}

/// A sink that passes everything on and reads along.
pub struct PanicWatch {
    to: Arc<dyn CharSink>,
    control: Arc<Control>,
    halts: Arc<AtomicU64>,
    state: Mutex<State>,
    timers: Arc<Timers>,
    alarm: Alarm,
}

impl PanicWatch {
    /// Reads along with `to`; `halts` counts the HLTs of all vCPUs.
    pub fn new(
        to: Arc<dyn CharSink>,
        control: Arc<Control>,
        halts: Arc<AtomicU64>,
        timers: &Arc<Timers>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| PanicWatch {
            to,
            control,
            halts,
            state: Mutex::new(State {
                reader: LineReader::default(),
                said: Said::Nothing,
                halts: 0,
            }),
            timers: timers.clone(),
            alarm: timers.alarm(this.clone()),
        })
    }

    /// True where the last thing that the kernel said is that it halts on purpose.
    pub fn announced_halt(&self) -> bool {
        self.lock().said == Said::Halted
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_along(&self, bytes: &[u8]) {
        let mut state = self.lock();
        let before = state.said;
        for &byte in bytes {
            state.said = state.reader.take(byte).unwrap_or(Said::Nothing);
        }
        if state.said == Said::Panicked {
            state.halts = self.halts.load(Ordering::Relaxed);
            let deadline = self.timers.clock().now() + PATIENCE;
            self.alarm.set(Some(deadline));
        } else if before == Said::Panicked {
            self.alarm.set(None);
        }
    }
}

impl CharSink for PanicWatch {
    fn write(&self, bytes: &[u8]) -> usize {
        let taken = self.to.write(bytes);
        if let Some(bytes) = bytes.get(..taken) {
            self.read_along(bytes);
        }
        taken
    }
}

impl OnAlarm for PanicWatch {
    fn on_alarm(&self) {
        let state = self.lock();
        let silent = state.said == Said::Panicked;
        let busy = self.halts.load(Ordering::Relaxed) == state.halts;
        drop(state);
        if silent && busy {
            self.control.end(Cause::Panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use doppel_device::FakeClock;

    struct Null;
    impl CharSink for Null {
        fn write(&self, bytes: &[u8]) -> usize {
            bytes.len()
        }
    }

    struct Rig {
        clock: Arc<FakeClock>,
        timers: Arc<Timers>,
        control: Arc<Control>,
        halts: Arc<AtomicU64>,
        watch: Arc<PanicWatch>,
    }

    fn rig() -> Rig {
        let clock = Arc::new(FakeClock::default());
        let timers = Timers::new(clock.clone()).unwrap();
        let control = Arc::new(Control::default());
        let halts = Arc::new(AtomicU64::new(0));
        let watch = PanicWatch::new(Arc::new(Null), control.clone(), halts.clone(), &timers);
        Rig {
            clock,
            timers,
            control,
            halts,
            watch,
        }
    }

    impl Rig {
        fn print(&self, text: &str) {
            for chunk in text.as_bytes().chunks(7) {
                self.watch.write(chunk);
            }
        }
        fn wait(&self) {
            self.clock.advance(2 * PATIENCE);
            self.timers.fire_due();
        }
    }

    const LAST_WORDS: &str =
        "[    1.234567] ---[ end Kernel panic - not syncing: VFS: Unable to mount ]---\r\n";

    #[test]
    fn last_words_and_then_silence_are_a_panic() {
        let rig = rig();
        rig.print("[    1.2] Kernel panic - not syncing: VFS: Unable to mount\r\n");
        rig.wait();
        assert!(!rig.control.is_ending());
        rig.print(LAST_WORDS);
        assert!(!rig.control.is_ending());
        rig.wait();
        assert_eq!(rig.control.wait(), Cause::Panic);
    }

    #[test]
    fn a_guest_that_prints_or_idles_afterwards_lives() {
        let rig = rig();
        rig.print(LAST_WORDS);
        rig.print("# ");
        rig.wait();
        rig.print(LAST_WORDS);
        rig.halts.fetch_add(1, Ordering::Relaxed);
        rig.wait();
        assert!(!rig.control.is_ending());
    }

    #[test]
    fn lines_that_quote_a_panic_are_no_panic() {
        for line in [
            "x ---[ end Kernel panic - not syncing: a ]---",
            "---[ end Kernel panic - not syncing: a",
            "[[[[[",
            "",
        ] {
            assert_eq!(meaning(line.as_bytes()), Said::Nothing, "{line}");
        }
        let coloured = "[    1.0][    T1] ---[ end Kernel panic - not syncing: a ]---";
        assert_eq!(meaning(coloured.as_bytes()), Said::Panicked);
    }

    #[test]
    fn a_halt_on_purpose_is_told_apart() {
        let rig = rig();
        assert!(!rig.watch.announced_halt());
        rig.print("[   12.5] reboot: System halted\r\n");
        assert!(rig.watch.announced_halt());
    }
}
