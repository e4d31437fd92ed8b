//! What differs between how two engines left the machine.

use super::layout::*;
use super::machine::{Access, Ending, Final};
use super::supervisor::{RECORD_REGISTERS, RECORD_SYSTEM};

const ARITHMETIC: u64 = 0x8d5;
/// Their word in a record.
const RECORD_FLAGS: usize = 4;
/// Differences that are told.
const MOST: usize = 12;

/// A line for each difference: what the engine has, and what the interpreter. Without `flags`, frames and a CPU that shut down need not have the
/// same arithmetic flags.
pub fn differences(engine: &Final, interpreter: &Final, flags: bool) -> Vec<String> {
    let mut found = Vec::new();
    if engine.ending != interpreter.ending {
        let (a, b) = (engine.ending, interpreter.ending);
        found.push(format!("ending: {a:?}, interpreter {b:?}"));
    }
    let shut_down = engine.ending == Ending::Shutdown;
    for ((name, a), (_, b)) in engine.registers.iter().zip(&interpreter.registers) {
        let vague = *name == "rflags" && shut_down && !flags;
        if (a ^ b) & if vague { !ARITHMETIC } else { !0 } != 0 {
            found.push(format!("{name}: {a:#x}, interpreter {b:#x}"));
        }
    }
    if engine.vectors != interpreter.vectors {
        let (a, b) = (&engine.vectors, &interpreter.vectors);
        found.push(format!("x87 and vectors: {a:x?}\n  interpreter {b:x?}"));
    }
    if engine.msrs != interpreter.msrs {
        let (a, b) = (&engine.msrs, &interpreter.msrs);
        found.push(format!("MSRs: {a:x?}\n  interpreter {b:x?}"));
    }
    noted(&mut found, engine, interpreter, flags);
    if !engine.ram.is_empty() {
        log(&mut found, &engine.ram, &interpreter.ram, flags);
        memory(&mut found, &engine.ram, &interpreter.ram, flags);
    }
    found
}

fn noted(found: &mut Vec<String>, engine: &Final, interpreter: &Final, flags: bool) {
    if engine.noted == interpreter.noted {
        return;
    }
    let (a, b) = (&engine.noted, &interpreter.noted);
    // A stack may be in device memory, and a frame have flags before a handler clears them.
    let mask = if flags { !0 } else { !ARITHMETIC };
    let alike = |a: &Access, b: &Access| (a.0, a.1, a.2 & mask) == (b.0, b.1, b.2 & mask);
    let same = a.iter().zip(b).take_while(|(a, b)| alike(a, b)).count();
    if same == a.len() && same == b.len() {
        return;
    }
    let (a, b) = (a.get(same), b.get(same));
    found.push(format!(
        "access {same} to ports and devices: {a:x?}, interpreter {b:x?}"
    ));
}

fn word(ram: &[u8], at: u64) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&ram[at as usize..at as usize + 8]);
    u64::from_le_bytes(word)
}

/// One record, in words.
pub fn record(ram: &[u8], n: u64) -> String {
    let at = |word_number: u64| word(ram, LOG + n * RECORD + 8 * word_number);
    const NAMES: [&str; 15] = [
        "rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    let registers: String = NAMES
        .iter()
        .enumerate()
        .map(|(n, name)| format!(" {name} {:x}", at(RECORD_REGISTERS + n as u64)))
        .collect();
    let system: Vec<u64> = (0..7).map(|n| at(RECORD_SYSTEM + n)).collect();
    format!(
        "vector {:#x} error {:#x} rip {:#x} cs {:#x} flags {:#x} rsp {:#x} ss {:#x}{registers}; cr2 {:#x} cr0 {:#x} cr3 {:#x} cr4 {:#x} dr6 {:#x} dr7 {:#x} selectors {:#x}",
        at(0),
        at(1),
        at(2),
        at(3),
        at(4),
        at(5),
        at(6),
        system[0],
        system[1],
        system[2],
        system[3],
        system[4],
        system[5],
        system[6],
    )
}

/// How many records there are.
pub fn records(ram: &[u8]) -> u64 {
    (word(ram, LOG_NEXT).saturating_sub(LOG) / RECORD).min(MOST_RECORDS)
}

fn log(found: &mut Vec<String>, a: &[u8], b: &[u8], flags: bool) {
    let (of_a, of_b) = (records(a), records(b));
    if of_a != of_b {
        found.push(format!("records: {of_a}, interpreter {of_b}"));
    }
    let words = |ram: &[u8], n: u64| {
        let mut words: Vec<_> = (0..RECORD / 8)
            .map(|i| word(ram, LOG + n * RECORD + 8 * i))
            .collect();
        words[RECORD_FLAGS] &= if flags { !0 } else { !ARITHMETIC };
        words
    };
    let differs = (0..of_a.min(of_b)).find(|n| words(a, *n) != words(b, *n));
    if let Some(n) = differs {
        if n > 0 {
            found.push(format!("record {} of both: {}", n - 1, record(a, n - 1)));
        }
        found.push(format!(
            "record {n}: {}\n  interpreter {}",
            record(a, n),
            record(b, n)
        ));
    }
}

fn memory(found: &mut Vec<String>, a: &[u8], b: &[u8], flags: bool) {
    let not_log = |at: usize| !(LOG as usize..(LOG + RECORD * MOST_RECORDS) as usize).contains(&at);
    let differ = (0..a.len())
        .step_by(8)
        .filter(|at| not_log(*at))
        .map(|at| (at, word(a, at as u64), word(b, at as u64)))
        .filter(|(at, a, b)| a != b && !(is_table(*at as u64) && sets_more(*a, *b)))
        .filter(|(_, a, b)| flags || !are_flags_of_frames(*a, *b));
    let all: Vec<_> = differ.collect();
    for (at, a, b) in all.iter().take(MOST) {
        found.push(format!("memory {at:#x}: {a:#x}, interpreter {b:#x}"));
    }
    if all.len() > MOST {
        found.push(format!("and {} words more", all.len() - MOST));
    }
}

/// Whether page tables are there.
pub fn is_table(at: u64) -> bool {
    TABLES.contains(&at)
}

/// An entry in which the engine has set A or D too. A processor may do so for an access that it then does not make (Intel SDM
/// vol. 3A, 4.8), and an engine does where the page is found before the rest of the access is checked.
fn sets_more(engine: u64, interpreter: u64) -> bool {
    // Of two entries where they are 32 bits wide.
    const A_AND_D: u64 = 3 << 5 | 3 << 37;
    let more = engine ^ interpreter;
    more & !A_AND_D == 0 && engine & more == more
}

/// Flags in a frame on a stack that nobody clears, as in [`noted`]: of one word, or two of 32 bits, or anywhere on a stack that is not aligned.
fn are_flags_of_frames(a: u64, b: u64) -> bool {
    const FIXED: u32 = 2;
    const MOST: u32 = 1 << 22;
    let flags = |shift: u32| {
        let (a, b) = ((a >> shift) as u32, (b >> shift) as u32);
        a & b & FIXED != 0 && a < MOST && u64::from(a ^ b) & !ARITHMETIC == 0
    };
    let alike = |shift: u32| (a ^ b) >> shift & u64::from(u32::MAX) == 0 || flags(shift);
    let within = |shift: u32| (a ^ b) & !(ARITHMETIC << shift) == 0 && flags(shift);
    alike(0) && alike(32) || (8..64).step_by(8).any(within)
}

/// Whether a case's end can be compared.
pub fn comparable(f: &Final) -> bool {
    f.ending != Ending::TimedOut
}

#[cfg(test)]
mod tests {
    use super::are_flags_of_frames;

    #[test]
    fn flags_on_a_stack_are_known_wherever_they_stand() {
        let (some, others) = (0x1_0202, 0x1_0286);
        for shift in [0, 8, 16, 24, 32, 40] {
            assert!(
                are_flags_of_frames(some << shift, others << shift),
                "{shift}"
            );
        }
        assert!(are_flags_of_frames(
            some << 32 | others,
            others << 32 | some
        ));
        assert!(
            !are_flags_of_frames(some, others ^ 2),
            "a bit that is always set"
        );
        assert!(
            !are_flags_of_frames(some | 1 << 40, others),
            "another difference"
        );
        assert!(!are_flags_of_frames(some, others | 0x200_0000), "no flags");
        assert!(
            !are_flags_of_frames(some << 16, others << 16 | 1),
            "beside them"
        );
    }
}
