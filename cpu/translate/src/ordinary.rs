//! What the translator has to know of the instructions that nearly all code is made of.
//!
//! Problem: for every instruction that there is, iced-x86 tells which registers, flags and memory it uses, in general terms; to ask it for
//! each instruction of each block was a third of what a translation cost.
//! Idea: moves, arithmetic on general registers, pushes, pops and direct branches are nine in ten instructions, and a short table says the same of
//! them.
//! Invariant: where [`of`] gives an answer it is the one that `classify` works out from iced-x86; a test compares them for every opcode.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use crate::flags::{ALL, CF, FlagUse, OF, PF, SF, ZF};
use crate::frontend::{Class, Facts};

/// What an instruction does to its first operand.
#[derive(Clone, Copy, PartialEq, Eq)]
enum First {
    Read,
    Written,
}

const NONE: FlagUse = FlagUse {
    reads: 0,
    kills: 0,
    writes: 0,
};
const SETS_ALL: FlagUse = FlagUse {
    reads: 0,
    kills: ALL,
    writes: ALL,
};
const WITH_CARRY: FlagUse = FlagUse {
    reads: CF,
    kills: ALL,
    writes: ALL,
};
const BUT_CARRY: FlagUse = FlagUse {
    reads: 0,
    kills: ALL & !CF,
    writes: ALL & !CF,
};
const MULTIPLIES: FlagUse = FlagUse {
    reads: 0,
    kills: CF | OF,
    writes: ALL,
};

/// The facts of an ordinary instruction; `None` for all others.
pub(crate) fn of(i: &Instruction) -> Option<Facts> {
    computation(i).or_else(|| stack_or_branch(i))
}

fn stack_or_branch(i: &Instruction) -> Option<Facts> {
    use Code::*;
    const RSP: u16 = 1 << 4;
    let (class, flags, register) = match i.code() {
        Push_r64 => (Class::Push, NONE, Some(First::Read)),
        Pop_r64 => (Class::Pop, NONE, Some(First::Written)),
        Call_rel32_64 => (Class::Call, NONE, None),
        Retnq => (Class::Return, NONE, None),
        Jmp_rel8_64 | Jmp_rel32_64 => return Some(facts(Class::Jump, NONE, 0, 0)),
        _ if i.is_jcc_short_or_near() && i.op0_kind() == OpKind::NearBranch64 => {
            return Some(facts(Class::Conditional, condition(i)?, 0, 0));
        }
        _ => return None,
    };
    let operand = register.map_or(0, |_| bit(i.op0_register()));
    let written = if register == Some(First::Written) {
        operand
    } else {
        0
    };
    Some(facts(class, flags, RSP | operand, RSP | written))
}

fn facts(class: Class, flags: FlagUse, uses: u16, writes: u16) -> Facts {
    Facts {
        class,
        flags,
        uses,
        writes,
        simd: false,
    }
}

fn computation(i: &Instruction) -> Option<Facts> {
    let (first, flags) = effect(i)?;
    let (mut uses, mut writes, mut memory) = (0, 0, None);
    for op in 0..i.op_count() {
        let written = op == 0 && first == First::Written;
        match i.op_kind(op) {
            OpKind::Register => {
                let r = i.op_register(op);
                if !r.is_gpr() {
                    return None;
                }
                uses |= bit(r);
                writes |= if written { bit(r) } else { 0 };
            }
            OpKind::Memory => {
                uses |= bit(i.memory_base()) | bit(i.memory_index());
                memory = Some(written);
            }
            OpKind::NearBranch64 => return None,
            _ => {}
        }
    }
    let class = match memory {
        _ if i.mnemonic() == Mnemonic::Lea => Class::Lea,
        None => Class::Copy,
        Some(write) => Class::Memory {
            size: i.memory_size().size() as u8,
            write,
        },
    };
    Some(facts(class, flags, uses, writes))
}

/// What becomes of the first operand and of the flags.
fn effect(i: &Instruction) -> Option<(First, FlagUse)> {
    use Mnemonic::*;
    Some(match i.mnemonic() {
        Movsxd if i.code() == Code::Movsxd_r16_rm16 => return None,
        Mov | Movzx | Movsx | Movsxd | Lea | Not | Bswap => (First::Written, NONE),
        Add | Sub | And | Or | Xor | Neg => (First::Written, SETS_ALL),
        Cmp | Test => (First::Read, SETS_ALL),
        Adc | Sbb => (First::Written, WITH_CARRY),
        Inc | Dec => (First::Written, BUT_CARRY),
        Imul if i.op_count() > 1 => (First::Written, MULTIPLIES),
        Shl | Shr | Sar => (First::Written, shift(i)?),
        Nop if i.op_count() == 0 => (First::Read, NONE),
        Endbr64 => (First::Read, NONE),
        _ if is_cmovcc(i.mnemonic()) || is_setcc(i.mnemonic()) => (First::Written, condition(i)?),
        _ => return None,
    })
}

fn is_cmovcc(m: Mnemonic) -> bool {
    (Mnemonic::Cmova..=Mnemonic::Cmovs).contains(&m)
}

fn is_setcc(m: Mnemonic) -> bool {
    (Mnemonic::Seta..=Mnemonic::Sets).contains(&m)
}

/// Shifts by a constant that is not zero.
fn shift(i: &Instruction) -> Option<FlagUse> {
    let last = i.op_count() - 1;
    if i.op_kind(last) != OpKind::Immediate8 {
        return None;
    }
    let count = i.immediate8();
    let one = if count == 1 { OF } else { 0 };
    (count & 0x1f != 0).then_some(FlagUse {
        reads: 0,
        kills: CF | PF | ZF | SF | one,
        writes: ALL,
    })
}

fn condition(i: &Instruction) -> Option<FlagUse> {
    use iced_x86::ConditionCode::*;
    let reads = match i.condition_code() {
        o | no => OF,
        b | ae => CF,
        e | ne => ZF,
        be | a => CF | ZF,
        s | ns => SF,
        p | np => PF,
        l | ge => SF | OF,
        le | g => ZF | SF | OF,
        None => return Option::None,
    };
    Some(FlagUse { reads, ..NONE })
}

/// A general register, as a bit.
pub(crate) fn bit(r: Register) -> u16 {
    GENERAL[r as usize]
}

/// For each register the general one that it is, or is a part of.
const GENERAL: [u16; 256] = {
    let mut bits = [0; 256];
    let mut n = 0;
    while n < 16 {
        let low = match n {
            0..4 => Register::AL as usize,
            _ => Register::SPL as usize - 4,
        };
        let names = [
            low,
            Register::AX as usize,
            Register::EAX as usize,
            Register::RAX as usize,
        ];
        let mut width = 0;
        while width < names.len() {
            bits[names[width] + n] = 1 << n;
            width += 1;
        }
        if n < 4 {
            bits[Register::AH as usize + n] = 1 << n;
        }
        n += 1;
    }
    bits
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frontend::{Decoding, Simd};
    use doppel_x86::HiddenInstructions;
    use iced_x86::{Decoder, DecoderOptions, InstructionInfoFactory};

    /// Every opcode of one and two bytes, under each prefix that changes what it is, with operands of every kind.
    fn every_encoding(mut check: impl FnMut(&[u8])) {
        let prefixes: [&[u8]; 12] = [
            &[],
            &[0x66],
            &[0x48],
            &[0x4d],
            &[0x44],
            &[0x41],
            &[0x66, 0x48],
            &[0x67],
            &[0xf2],
            &[0xf3],
            &[0xf0],
            &[0x65],
        ];
        let operands = [
            0x00, 0x05, 0x04, 0x44, 0x84, 0xc0, 0xc4, 0xd8, 0xe3, 0xff, 0x18, 0x20, 0x28, 0x33,
            0x39, 0x50, 0x9a, 0xc8, 0xe8, 0xf0, 0xf8, 0xd0,
        ];
        for prefix in prefixes {
            for escape in [&[][..], &[0x0f]] {
                for opcode in 0..=255 {
                    for modrm in operands {
                        for rest in [
                            [0u8; 8],
                            [1; 8],
                            [0x20; 8],
                            [0x9c, 0xc1, 7, 0x80, 0x41, 0xff, 1, 0],
                        ] {
                            let head = [prefix, escape, &[opcode, modrm]].concat();
                            check(&[&head[..], &rest].concat());
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn every_part_of_a_general_register_is_known() {
        for r in Register::values() {
            let number = r.full_register().number();
            let expected = if r.is_gpr() { 1 << number } else { 0 };
            assert_eq!(bit(r), expected, "{r:?}");
        }
    }

    #[test]
    fn the_table_says_what_the_library_says() {
        let mut info = InstructionInfoFactory::new();
        let (mut ordinary, mut all) = (0, 0);
        for user in [false, true] {
            let how = Decoding {
                mode: crate::narrow::Mode::LONG,
                origin: 0,
                simd: Simd::Avx512,
                user,
                flag_liveness: true,
                inline_system: true,
                inline_syscall: true,
                inline_strings: true,
                inline_xsave: true,
                yield_spins: true,
                extend: true,
                hidden: HiddenInstructions::NONE,
            };
            every_encoding(|bytes| {
                let i = Decoder::with_ip(64, bytes, 0x100, DecoderOptions::NONE).decode();
                if i.is_invalid() {
                    return;
                }
                all += 1;
                if let Some(facts) = of(&i) {
                    ordinary += 1;
                    assert_eq!(facts, Facts::of_any(&mut info, &i, how), "{bytes:x?} {i}");
                }
            });
        }
        assert!(ordinary > all / 3, "{ordinary} of {all}");
    }
}
