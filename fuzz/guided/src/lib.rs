//! Fuzzing that coverage guides, of the doors of SECURITY.md whose bytes are files, packets, messages and code.
//!
//! Problem: random damage finds what is one step from a right file; what is three steps away, behind a check, it hardly ever does.
//! Idea: libFuzzer keeps each input that reaches new code of ours and goes on from there. A [`Door`] is what it needs: a function of bytes that
//! must not panic, hang or grow, inputs to begin with (*seeds*, made by code, so that none is in the repository), and words that the format
//! knows (a *dictionary*). One program serves all doors; the variable `DOPPEL_DOOR` names one.
//! Invariant: a door keeps no state from one input to the next that could change what an input does.
//! Cost: nothing of this is in the monitor. Without `cfg(fuzzing)` the program runs files through a door, which shows a finding again without a fuzzer.

mod boot_disk;
mod choices;
mod code;
mod frames;
mod kernel;
mod kernels;
mod messages;
mod qcow2;
mod registers;
mod rings;
mod share;

/// Somewhere bytes of a stranger come in.
pub struct Door {
    /// What `DOPPEL_DOOR` says.
    pub name: &'static str,
    /// Bytes of an input at most.
    pub longest: usize,
    /// Words of the format.
    pub words: &'static [&'static [u8]],
    /// What to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Makes what takes inputs.
    pub open: fn() -> anyhow::Result<Take>,
}

/// Takes an input. A panic is a finding.
pub type Take = Box<dyn FnMut(&[u8])>;

/// All of them.
pub const DOORS: [Door; 11] = [
    qcow2::DOOR,
    boot_disk::DOOR,
    kernel::DOOR,
    frames::DOOR,
    share::DOOR,
    rings::DOOR,
    registers::DOOR,
    messages::DISK,
    messages::NETWORK,
    code::DOOR,
    kernels::DOOR,
];

impl Door {
    /// By its name.
    ///
    /// # Errors
    /// A sentence with the names that there are.
    pub fn named(name: &str) -> anyhow::Result<&'static Door> {
        let found = DOORS.iter().find(|door| door.name == name);
        found.ok_or_else(|| {
            let names: Vec<_> = DOORS.iter().map(|door| door.name).collect();
            anyhow::anyhow!("{name}: no door; there are {}", names.join(", "))
        })
    }

    /// The words as libFuzzer reads them: a line each, quoted, what is not plain text in hexadecimal.
    pub fn dictionary(&self) -> String {
        let escaped = |byte: &u8| format!("\\x{byte:02x}");
        let line = |word: &&[u8]| format!("\"{}\"\n", word.iter().map(escaped).collect::<String>());
        self.words.iter().map(line).collect()
    }
}
