//! Arithmetic flags: where they are, and whether anyone will ask.
//!
//! Problem: a TLB check destroys the host's flags, which are the guest's flags.
//! Idea: within a block the flags are either *in the registers* (the host's RFLAGS) or *saved* (in the context, in LAHF/SETO
//! form). A check saves them first, but only where a later instruction, or the next block, can still read them:
//! liveness is computed backwards over the block. Between blocks nothing is converted for nothing: a block has two
//! entries, one for callers whose flags are in the registers and one for callers that saved them, and prefers whichever its first
//! flag event wants; for a block that overwrites the flags first, the two entries are the same.
//! Invariant: at every point of a block where some flag is live, the recorded place holds all six flags.
//! At an instruction that faults, dead flags (overwritten before any read on the fault-free path) are worked out by the monitor
//! (see `recipe` and `rewrite::lost`); the option `flag_liveness = false` saves them at each check instead.
//! Cost: a save is five instructions, a restore four; measured figures stand in docs/translate.md.

use doppel_x86::Rflags;
use iced_x86::{Instruction, Mnemonic, OpKind, RflagsBits};

/// A set of arithmetic flags.
pub(crate) type FlagSet = u8;

pub(crate) const CF: FlagSet = 1;
pub(crate) const PF: FlagSet = 2;
pub(crate) const AF: FlagSet = 4;
pub(crate) const ZF: FlagSet = 8;
pub(crate) const SF: FlagSet = 16;
pub(crate) const OF: FlagSet = 32;
/// All six.
pub(crate) const ALL: FlagSet = 63;

/// Where the guest's flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FlagPlace {
    Registers,
    Saved,
}

/// What one instruction does with the flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct FlagUse {
    pub reads: FlagSet,
    /// Overwritten whatever the operands are.
    pub kills: FlagSet,
    /// May be overwritten.
    pub writes: FlagSet,
}

impl FlagUse {
    pub fn of(i: &Instruction) -> Self {
        let reads = set(i.rflags_read());
        let defined = set(i.rflags_written() | i.rflags_cleared() | i.rflags_set());
        let undefined = match tests_a_bit(i.mnemonic()) {
            true => 0,
            false => set(i.rflags_undefined()),
        };
        let writes = defined | undefined;
        if conditional_writer(i) {
            return FlagUse {
                reads,
                kills: 0,
                writes,
            };
        }
        // What the manuals leave undefined some processors leave alone; but no processor leaves AF alone in
        // the logical operations (they clear it), and these are what most often kills the flags.
        let kills = if logical(i.mnemonic()) {
            writes
        } else {
            defined
        };
        FlagUse {
            reads,
            kills,
            writes,
        }
    }

    /// The flags live before an instruction, given those live after it.
    pub fn live_before(&self, after: FlagSet) -> FlagSet {
        (after & !self.kills) | self.reads
    }

    /// True where the instruction needs the flags in the registers before it runs.
    pub fn needs_registers(&self, live_after: FlagSet) -> bool {
        self.reads != 0 || (self.writes != 0 && live_after & !self.kills != 0)
    }
}

fn logical(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test
    )
}

/// Every processor leaves the flags alone here that the manuals call undefined.
fn tests_a_bit(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    )
}

/// Shifts and rotates leave the flags alone where the count is zero, and so do repeated comparisons.
fn conditional_writer(i: &Instruction) -> bool {
    use Mnemonic::*;
    if i.is_string_instruction() && (i.has_rep_prefix() || i.has_repne_prefix()) {
        return true;
    }
    let shift = matches!(
        i.mnemonic(),
        Shl | Shr | Sar | Sal | Rol | Ror | Rcl | Rcr | Shld | Shrd
    );
    if !shift {
        return false;
    }
    let last = i.op_count() - 1;
    match i.op_kind(last) {
        OpKind::Immediate8 => i.immediate8() & 0x1f == 0 || i.immediate8() & 0x3f == 0,
        _ => true,
    }
}

fn set(bits: u32) -> FlagSet {
    FLAGS
        .iter()
        .filter(|(bit, ..)| bits & bit != 0)
        .fold(0, |s, (_, f, _)| s | f)
}

/// The bits of RFLAGS that a set stands for.
pub(crate) fn bits(set: FlagSet) -> u64 {
    FLAGS
        .iter()
        .filter(|(_, f, _)| set & f != 0)
        .fold(0, |all, (.., flag)| all | flag.bits())
}

const FLAGS: [(u32, FlagSet, Rflags); 6] = [
    (RflagsBits::CF, CF, Rflags::CF),
    (RflagsBits::PF, PF, Rflags::PF),
    (RflagsBits::AF, AF, Rflags::AF),
    (RflagsBits::ZF, ZF, Rflags::ZF),
    (RflagsBits::SF, SF, Rflags::SF),
    (RflagsBits::OF, OF, Rflags::OF),
];

/// LAHF/SETO form of the arithmetic flags of an RFLAGS value.
pub(crate) fn pack(rflags: u64) -> u64 {
    ((rflags & 0xd5) | 2) << 8 | (rflags >> 11 & 1)
}

/// The arithmetic flags of an RFLAGS value from LAHF/SETO form.
pub(crate) fn unpack(saved: u64) -> u64 {
    (saved >> 8 & 0xd5) | (saved & 1) << 11
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::Decoder;

    fn flag_use(bytes: &[u8]) -> FlagUse {
        FlagUse::of(&Decoder::new(64, bytes, 0).decode())
    }

    #[test]
    fn packing_is_reversible() {
        for f in [0u64, 0x8d5, 0x801, 0x44, 0x80] {
            assert_eq!(unpack(pack(f)), f);
        }
    }

    #[test]
    fn comparisons_and_logic_kill_everything() {
        assert_eq!(flag_use(&[0x48, 0x39, 0xd8]).kills, ALL); // cmp rax, rbx
        assert_eq!(flag_use(&[0x85, 0xc0]).kills, ALL); // test eax, eax
        assert_eq!(flag_use(&[0x31, 0xc0]).kills, ALL); // xor eax, eax
    }

    #[test]
    fn bit_tests_write_the_carry_alone() {
        let bt = flag_use(&[0x0f, 0xba, 0x23, 3]); // bt dword [rbx], 3
        assert_eq!((bt.kills, bt.writes), (CF, CF));
    }

    #[test]
    fn inc_and_shifts_by_cl_merge() {
        let inc = flag_use(&[0xff, 0xc0]);
        assert_eq!(inc.kills, ALL & !CF);
        assert!(inc.needs_registers(CF) && !inc.needs_registers(ZF));
        let shl = flag_use(&[0xd3, 0xe0]);
        assert_eq!(shl.kills, 0);
        assert!(shl.needs_registers(ZF));
    }

    #[test]
    fn readers_make_flags_live() {
        let adc = flag_use(&[0x11, 0xd8]);
        assert_eq!(adc.live_before(0), CF);
        assert_eq!(flag_use(&[0x48, 0x89, 0xd8]).live_before(ZF), ZF);
    }
}
