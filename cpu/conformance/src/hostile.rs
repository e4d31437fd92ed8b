//! Random bytes as guest code: no engine may crash, hang or fail to come back.

use std::time::{Duration, Instant};

use doppel_x86::{Activity, Exit, Rflags};
use fastrand::Rng;

use crate::engines::Row;
use crate::layout::*;
use crate::machine::{Action, Machine};

/// What a hostile guest came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Guests that ran.
    pub guests: u64,
    /// Of them, those that ended in a triple fault.
    pub shutdowns: u64,
    /// Of them, those that halted.
    pub halts: u64,
    /// Of them, those that were still running.
    pub running: u64,
}

/// Bytes that make more of random code: prefixes, the two-byte map, system instructions, string instructions.
const SPICE: &[u8] = &[
    0x0f, 0x0f, 0x48, 0x66, 0xf2, 0xf3, 0xf0, 0x67, 0x64, 0x65, 0xcd, 0xcf, 0xfa, 0xfb, 0x9c, 0x9d,
    0xa4, 0xa5, 0xaa, 0xab, 0x8e, 0x62, 0xc4, 0xc5, 0xff, 0xeb, 0xe8, 0xc3, 0x01, 0x00, 0x20, 0x22,
    0x30, 0x32, 0xae, 0xc7,
];

fn code(random: &mut Rng, len: usize) -> Vec<u8> {
    (0..len)
        .map(|_| {
            let w = random.u64(..);
            if w & 0x300 == 0 {
                SPICE[(w >> 16) as usize % SPICE.len()]
            } else {
                w as u8
            }
        })
        .collect()
}

/// Runs one guest of random bytes for at most `limit`.
pub fn run(row: &Row, seed: u64, limit: Duration) -> Outcome {
    let mut random = Rng::with_seed(seed);
    let mut m = Machine::new(row);
    if random.bool() {
        m.to_user();
    }
    for vector in 0..=255 {
        // Most faults go on behind the fault, so that a guest lives longer.
        m.action(vector, Action::Resume);
    }
    for page in (CODE..CODE + 0x4000).step_by(0x1000) {
        let bytes = code(&mut random, 0x1000);
        m.put_bytes(page, &bytes);
        m.put_bytes(page - CODE + USER_CODE, &bytes);
    }
    let base = m.cpu().rip;
    for n in 0..15 {
        let in_memory = random.u64(..3) > 0;
        let v = if in_memory {
            base + random.u64(..0x8_0000)
        } else {
            random.u64(..)
        };
        if n != 4 {
            m.cpu_mut().gpr[n] = v;
        }
    }
    m.cpu_mut().rflags |= Rflags::from_bits_truncate(random.u64(..) & 0xcd5);
    let began = Instant::now();
    while began.elapsed() < limit {
        let kicker = m.kicker();
        let timer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(2));
            kicker.kick();
        });
        let to = base + random.u64(..0x4000);
        m.cpu_mut().gpr[15] = to;
        let exit = m.run_once();
        timer.join().expect("the timer");
        match exit {
            Exit::Kicked => {
                if random.bool() {
                    m.bus.lines.interrupt(random.u8(..));
                }
            }
            Exit::Halted if m.cpu().activity == Activity::Halted => {
                m.forget();
                m.bus.lines.nmi();
                if m.cpu().nmi_blocked {
                    return outcome(|o| o.halts = 1);
                }
            }
            Exit::Halted => return outcome(|o| o.halts = 1),
            Exit::Shutdown => return outcome(|o| o.shutdowns = 1),
        }
    }
    outcome(|o| o.running = 1)
}

fn outcome(f: impl Fn(&mut Outcome)) -> Outcome {
    let mut o = Outcome {
        guests: 1,
        ..Outcome::default()
    };
    f(&mut o);
    o
}

impl std::ops::AddAssign for Outcome {
    fn add_assign(&mut self, o: Outcome) {
        self.guests += o.guests;
        self.shutdowns += o.shutdowns;
        self.halts += o.halts;
        self.running += o.running;
    }
}
