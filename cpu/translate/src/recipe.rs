//! Arithmetic flags that are not kept, but can be had again.
//!
//! Problem: a TLB check destroys the host's flags. Where they are dead (see `flags`) nobody saves them; but if that very access
//! faults, the guest's handler sees them in the frame.
//! Idea: the result of most instructions that set the flags is still there, and so is what it was made of: after `sub rsp, 40`
//! RSP tells all six. So the translator notes for each place that may fault how the flags are worked out from the registers there,
//! and the monitor does so if the place does fault. Where that is impossible the check saves them.
//! Invariant: a recipe is recorded for a place only if none of the registers it names was written since, except by a constant
//! that it takes back.
//! Cost: nothing that runs; some bytes beside the blocks.

use doppel_x86::interpret::arithmetic_flags::{add, logic, sub};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use crate::flags::{FlagSet, bits};
use crate::frontend::{Class, GuestInstruction};

/// A value of the time when the flags were set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// A general register, that has moved by so much since.
    Register {
        number: u8,
        moved: i32,
    },
    Constant(i32),
}

/// How the flags come from two values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Those of `left - right`.
    Compare,
    /// Those of the subtraction of `right` that gave `left`.
    Difference,
    /// Those of the addition of `right` that gave `left`.
    Sum,
    /// Those of `left & right`.
    And,
}

/// How some of the flags are worked out at one place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Recipe {
    pub kind: Kind,
    pub size: u8,
    pub left: Source,
    pub right: Source,
    /// What it gives.
    pub flags: FlagSet,
}

impl Source {
    fn register(r: Register) -> Option<Self> {
        let high = matches!(r, Register::AH | Register::BH | Register::CH | Register::DH);
        (r.is_gpr() && !high).then(|| Source::Register {
            number: r.full_register().number() as u8,
            moved: 0,
        })
    }

    fn operand(i: &Instruction, op: u32) -> Option<Self> {
        match i.op_kind(op) {
            OpKind::Register => Source::register(i.op_register(op)),
            OpKind::Memory => None,
            _ => Some(Source::Constant(i.immediate(op) as i32)),
        }
    }

    /// The same after an instruction.
    fn after(self, i: &GuestInstruction) -> Option<Self> {
        let Source::Register { number, moved } = self else {
            return Some(self);
        };
        if i.writes & 1 << number == 0 {
            return Some(self);
        }
        let (moves, by) = i.moves;
        let moved = i32::try_from(i64::from(moved).checked_add(by)?).ok()?;
        // Its negative is needed.
        moved.checked_neg()?;
        (moves == 1 << number).then_some(Source::Register { number, moved })
    }

    fn value(self, gpr: &[u64; 16]) -> u64 {
        match self {
            Source::Register { number, moved } => {
                gpr[usize::from(number)].wrapping_sub(moved as u64)
            }
            Source::Constant(v) => v as u64,
        }
    }
}

impl Recipe {
    /// For the flags that an instruction sets, right behind it.
    pub fn of(i: &GuestInstruction) -> Option<Self> {
        use Mnemonic::*;
        let d = &i.decoded;
        if !matches!(i.class, Class::Copy) || d.op_count() == 0 {
            return None;
        }
        let (left, size) = (Source::operand(d, 0)?, d.op0_register().size() as u8);
        let recipe = |kind, left, right| {
            Some(Recipe {
                kind,
                size,
                left,
                right,
                flags: i.flags.writes,
            })
        };
        let (one, all) = (Source::Constant(1), Source::Constant(-1));
        match d.mnemonic() {
            Inc => return recipe(Kind::Sum, left, one),
            Dec => return recipe(Kind::Difference, left, one),
            And | Or => return recipe(Kind::And, left, all),
            _ if d.op_count() < 2 => return None,
            _ => {}
        }
        let right = Source::operand(d, 1)?;
        let nothing = Source::Constant(0);
        match d.mnemonic() {
            Sub | Xor if left == right => recipe(Kind::And, nothing, nothing),
            Xor => recipe(Kind::And, left, all),
            Add if left != right => recipe(Kind::Sum, left, right),
            Sub => recipe(Kind::Difference, left, right),
            Cmp => recipe(Kind::Compare, left, right),
            Test => recipe(Kind::And, left, right),
            _ => None,
        }
    }

    /// The same after an instruction, whatever it does to the flags.
    pub fn after(self, i: &GuestInstruction) -> Option<Self> {
        Some(Recipe {
            left: self.left.after(i)?,
            right: self.right.after(i)?,
            ..self
        })
    }

    /// The same for some of the flags.
    pub fn only(self, flags: FlagSet) -> Self {
        Recipe { flags, ..self }
    }

    /// RFLAGS with its flags in place.
    pub fn apply(&self, rflags: u64, gpr: &[u64; 16]) -> u64 {
        let size = usize::from(self.size);
        let (left, right) = (self.left.value(gpr), self.right.value(gpr));
        let (_, flags) = match self.kind {
            Kind::Compare => sub(left, right, 0, size),
            Kind::Difference => sub(left.wrapping_add(right), right, 0, size),
            Kind::Sum => add(left.wrapping_sub(right), right, 0, size),
            Kind::And => logic(left & right, size),
        };
        let which = bits(self.flags);
        rflags & !which | flags & which
    }
}

/// The instruction may leave a flag as it is, or set it.
pub(crate) fn may_set(i: &GuestInstruction) -> bool {
    i.flags.writes != 0 && i.flags.kills == 0
}

/// The flags that an instruction certainly sets, undefined ones included.
pub(crate) fn sets(i: &GuestInstruction) -> FlagSet {
    if may_set(i) { 0 } else { i.flags.writes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::{ALL, CF};
    use crate::frontend::{Decoding, Simd, decode};

    fn instructions(bytes: &[u8]) -> Vec<GuestInstruction> {
        let how = Decoding {
            simd: Simd::None,
            user: true,
            flag_liveness: true,
            ..Decoding::default()
        };
        let mut info = iced_x86::InstructionInfoFactory::new();
        decode(&mut info, bytes, 0, how).unwrap().instructions
    }

    fn recipe(bytes: &[u8]) -> Option<Recipe> {
        Recipe::of(&instructions(bytes)[0])
    }

    #[test]
    fn results_tell_the_flags() {
        let mut gpr = [0u64; 16];
        let sub_eax_imm = recipe(&[0x83, 0xe8, 5]).unwrap();
        gpr[0] = u64::from(3u32.wrapping_sub(5));
        let (_, flags) = sub(3, 5, 0, 4);
        assert_eq!(sub_eax_imm.apply(0, &gpr), flags);
        let add_rax_rbx = recipe(&[0x48, 0x01, 0xd8]).unwrap();
        (gpr[0], gpr[3]) = (1 << 63, 1);
        let (_, flags) = add((1 << 63) - 1, 1, 0, 8);
        assert_eq!(add_rax_rbx.apply(2, &gpr), flags | 2);
        let inc_al = recipe(&[0xfe, 0xc0]).unwrap();
        assert_eq!(inc_al.flags, ALL & !CF);
        gpr[0] = 0;
        assert_eq!(inc_al.apply(1, &gpr), add(255, 1, 0, 1).1 & !1 | 1);
        let xor_eax_eax = recipe(&[0x31, 0xc0]).unwrap();
        gpr[0] = 77;
        assert_eq!(xor_eax_eax.apply(0, &gpr), 0x44);
    }

    #[test]
    fn what_is_lost_has_no_recipe() {
        assert!(recipe(&[0x48, 0x01, 0xc0]).is_none()); // add rax, rax
        assert!(recipe(&[0xc1, 0xe0, 4]).is_none()); // shl eax, 4
        assert!(recipe(&[0x00, 0xe0]).is_none()); // add al, ah
        assert!(recipe(&[0x48, 0x03, 0x03]).is_none()); // add rax, [rbx]
    }

    #[test]
    fn registers_that_move_by_a_constant_are_followed() {
        // sub rsp, 8; push rax; lea rsp, [rsp + 32]; mov rsp, rax
        let code = [
            0x48, 0x83, 0xec, 8, 0x50, 0x48, 0x8d, 0x64, 0x24, 32, 0x48, 0x89, 0xc4,
        ];
        let list = instructions(&code);
        let at_first = Recipe::of(&list[0]).unwrap();
        let later = at_first.after(&list[1]).unwrap().after(&list[2]).unwrap();
        let mut gpr = [0u64; 16];
        gpr[4] = 4;
        let flags = at_first.apply(0, &gpr);
        gpr[4] = 4 + 32 - 8;
        assert_eq!(later.apply(0, &gpr), flags);
        assert!(later.after(&list[3]).is_none());
    }
}
