//! Random bytes as guest code: no engine may crash, hang or fail to come back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use doppel_x86::{Activity, Exit, Kick, Rflags, Seg};
use fastrand::Rng;

use crate::bus::TestBus;
use crate::engines::Row;
use crate::layout::*;
use crate::legacy::{Legacy, LegacyMachine, kind};
use crate::machine::{Action, Machine};

/// What hostile guests came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Guests that ran.
    pub guests: u64,
    /// Of them, those that ended in a triple fault; some begin again and have several ends.
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

/// Modes outside of long mode.
const LEGACY: [Legacy; 7] = [
    Legacy::Real,
    Legacy::V86(0),
    Legacy::V86(3),
    Legacy::Protected(0),
    Legacy::Protected(1),
    Legacy::Protected(2),
    Legacy::Protected(3),
];

/// Runs one guest of random bytes for at most `limit`, in whichever mode: half of them begin in long mode.
pub fn run(row: &Row, seed: u64, limit: Duration) -> Outcome {
    let mut random = Rng::with_seed(seed);
    match random.bool() {
        true => run_long(row, random, limit),
        false => run_legacy(row, random, limit),
    }
}

/// In real, virtual-8086 or protected mode: begun anew after each exception, in segments of whatever kind and place.
fn run_legacy(row: &Row, mut random: Rng, limit: Duration) -> Outcome {
    const BASE: u64 = 0x1_0000;
    let mode = LEGACY[random.usize(..LEGACY.len())];
    let mut m = LegacyMachine::new(row, mode);
    let mut bus = TestBus::new(m.ram.clone());
    let fill = |m: &LegacyMachine, random: &mut Rng| {
        for page in (BASE..BASE + 0x1_0000).step_by(0x1000) {
            let bytes = code(random, 0x1000);
            m.ram.ptr(page).expect("RAM").write(&bytes);
        }
    };
    fill(&m, &mut random);
    let began = Instant::now();
    let mut o = outcome(|_| ());
    while began.elapsed() < limit {
        if random.u8(..64) == 0 {
            fill(&m, &mut random);
        }
        m.start();
        for seg in [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
            segment(&mut m, seg, mode, &mut random);
        }
        let cpu = m.cpu_mut();
        for n in 0..16 {
            cpu.gpr[n] = match random.u8(..3) {
                0 => random.u64(..),
                _ => random.u64(..0x1_0000),
            };
        }
        cpu.rip = random.u64(..0x1_0000);
        cpu.rflags |= Rflags::from_bits_truncate(random.u64(..) & 0xed5);
        // A kick makes an end of one that goes round; the next begins.
        let kicker = m.kicker();
        match kicked_after(1, kicker, || m.run_once(&mut bus)) {
            Exit::Kicked => o.running = 1,
            Exit::Halted => o.halts = 1,
            Exit::Shutdown => o.shutdowns = 1,
        }
    }
    o
}

/// Gives a segment register what may stand in it: of virtual-8086 mode a paragraph, of protected mode anything.
fn segment(m: &mut LegacyMachine, seg: Seg, mode: Legacy, random: &mut Rng) {
    if !matches!(mode, Legacy::Protected(_)) {
        let base = random.u64(..0xffff) << 4;
        let base = if seg == Seg::Cs { 0x1_0000 } else { base };
        return m.set_segment(seg, base, 0xffff, kind::DATA);
    }
    const DATA: [u32; 3] = [kind::DATA, kind::READ_ONLY, kind::EXPAND_DOWN];
    const CODE: [u32; 2] = [kind::CODE, kind::EXECUTE_ONLY];
    let of = match seg {
        Seg::Cs => CODE[random.usize(..2)],
        Seg::Ss => [kind::DATA, kind::EXPAND_DOWN][random.usize(..2)],
        _ => DATA[random.usize(..3)],
    };
    let big = if random.bool() { kind::BIG } else { 0 };
    let base = match (seg, random.u8(..3)) {
        (Seg::Cs, 0) | (_, 2) => 0,
        (Seg::Cs, _) => 0x1_0000,
        _ => random.u64(..0x11_0000),
    };
    let limit = [0xffff, u32::MAX, random.u32(..0x2_0000)][random.usize(..3)];
    m.set_segment(seg, base, limit, of | big);
}

fn run_long(row: &Row, mut random: Rng, limit: Duration) -> Outcome {
    let mut m = Machine::new(row);
    match random.u8(..3) {
        0 => {}
        1 => m.to_user(),
        _ => m.to_user32(),
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
        let to = base + random.u64(..0x4000);
        m.cpu_mut().gpr[15] = to;
        let kicker = m.kicker();
        match kicked_after(2, kicker, || m.run_once()) {
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

/// Runs a guest, which is called out after so long.
fn kicked_after(milliseconds: u64, kicker: Arc<dyn Kick>, run: impl FnOnce() -> Exit) -> Exit {
    let timer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(milliseconds));
        kicker.kick();
    });
    let exit = run();
    timer.join().expect("the timer");
    exit
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
