//! 32-bit code, protected and compatibility mode, as code of 64-bit mode.
//!
//! Problem: the host runs in 64-bit mode, where some encodings mean something else, the stack moves by 8 bytes, addresses have 64 bits, and
//! segments have neither base nor limit.
//! Idea: an instruction is decoded as the guest has it, then turned into the 64-bit instruction that does the same to the registers' low
//! halves ([`widen`]); most have the same bytes. Everything behind the decoder knows that one only. Addresses are worked
//! out in 32 bits, which cuts them off as the guest's processor does. Where the segments of data, stack and code are
//! flat, as they are in every system of today, that is all ([`Mode::Flat`]): such code has as many checks as 64-bit code and may share them. Other
//! segments ([`Mode::Segmented`]), and FS and GS always, have the access compared with the limit and the base added.
//! Invariant: a block runs only while the CPU is in the mode of its key. Segment registers change in the interpreter alone, and when
//! it is done the mode is looked at anew. Registers r8 to r15 are never written, and nothing depends on the upper halves of the others.
//! What is left to the interpreter: 16-bit code, stacks and addresses, code segments that are not flat, and encodings that 64-bit mode lacks.
//! Cost: an access through FS, GS or a segment that is not flat takes three instructions more.

use doppel_x86::{Cpu, CpuMode, Seg, Segment};
use iced_x86::{Code, EncodingKind, Instruction, OpKind, Register};

/// What code takes for granted of the CPU's mode and segments: a part of a block's key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Mode {
    /// 64-bit mode.
    #[default]
    Long,
    /// 32-bit code and stack; CS, DS, ES and SS begin at 0 and end at 4 GiB, and the last three may be written.
    Flat,
    /// 32-bit code in a flat segment, and a 32-bit stack.
    Segmented,
}

impl Mode {
    /// By their numbers.
    pub const ALL: [Mode; 3] = [Mode::Long, Mode::Flat, Mode::Segmented];

    /// The CPU's; `None` where its code is not translated.
    pub fn of(cpu: &Cpu) -> Option<Self> {
        match cpu.mode() {
            CpuMode::Bits64 => Some(Mode::Long),
            CpuMode::Bits32 => narrow(cpu),
            _ => None,
        }
    }

    /// Bits of an address.
    pub fn bits(self) -> u32 {
        if self.is_narrow() { 32 } else { 64 }
    }

    pub fn is_narrow(self) -> bool {
        self != Mode::Long
    }

    /// An address cut off as it is in this mode.
    pub fn cut(self, linear: u64) -> u64 {
        match self.is_narrow() {
            true => linear & 0xffff_ffff,
            false => linear,
        }
    }
}

fn narrow(cpu: &Cpu) -> Option<Mode> {
    let whole = |s: Seg| {
        let segment = cpu.segment(s);
        segment.base == 0 && segment.limit == u32::MAX
    };
    let ring = matches!(cpu.cpl, 0 | 3);
    if !ring || !whole(Seg::Cs) || !cpu.segment(Seg::Ss).big() {
        return None;
    }
    let data = |s: Seg| whole(s) && last(cpu.segment(s), true) >= 0;
    let flat = [Seg::Ds, Seg::Es, Seg::Ss].into_iter().all(data);
    Some(match flat {
        true => Mode::Flat,
        false => Mode::Segmented,
    })
}

/// The last offset that may be accessed through a segment; -1 where none may, or where that takes more than a comparison.
pub(crate) fn last(segment: &Segment, write: bool) -> i64 {
    const CODE: u32 = 8;
    const EXPAND_DOWN: u32 = 4;
    const WRITABLE: u32 = 2;
    const ORDINARY: u32 = 0x10;
    let is = |bits: u32| segment.attributes & bits != 0;
    let allowed = match (is(CODE), write) {
        // In code segments this bit lets them be read.
        (true, false) => is(WRITABLE),
        (true, true) => false,
        (false, write) => !is(EXPAND_DOWN) && (is(WRITABLE) || !write),
    };
    match !segment.unusable() && is(ORDINARY) && allowed {
        true => i64::from(segment.limit),
        false => -1,
    }
}

/// What became of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Widened {
    /// The host's bytes for it are the guest's, but for a memory operand.
    Same,
    /// It has to be encoded.
    Changed,
    /// 64-bit mode has nothing like it.
    None,
}

/// Turns a 32-bit instruction into the 64-bit one that does the same.
pub(crate) fn widen(i: &mut Instruction) -> Widened {
    if i.is_invalid() {
        return Widened::None;
    }
    let short = (0..i.op_count()).any(|op| short_operand(i, op));
    if short || !widen_branch(i) {
        return Widened::None;
    }
    let mut changed = match i.encoding() {
        EncodingKind::Legacy => Widened::Same,
        _ => Widened::Changed,
    };
    let of_stack_width = replacement(i.code());
    if let Some(code) = of_stack_width {
        i.set_code(code);
    } else if let Some(code) = long_form(i.code()) {
        i.set_code(code);
        changed = Widened::Changed;
    } else if !i.code().op_code().mode64() {
        return Widened::None;
    }
    for op in 0..i.op_count() {
        if of_stack_width.is_some() && i.op_kind(op) == OpKind::Register {
            i.set_op_register(op, i.op_register(op).full_register());
        }
        if i.op_kind(op) == OpKind::Memory {
            widen_address(i);
            // What stands for an address alone here is relative to RIP there.
            let alone = i.memory_base() == Register::None && i.memory_index() == Register::None;
            changed = if alone { Widened::Changed } else { changed };
        }
    }
    changed
}

/// Addresses of 16 bits, also implied ones.
fn short_operand(i: &Instruction, op: u32) -> bool {
    match i.op_kind(op) {
        OpKind::MemorySegSI
        | OpKind::MemorySegDI
        | OpKind::MemoryESDI
        | OpKind::NearBranch16
        | OpKind::FarBranch16
        | OpKind::FarBranch32 => true,
        OpKind::Memory => {
            let registers = [i.memory_base(), i.memory_index()];
            registers.into_iter().any(|r| r.size() == 2)
                || registers == [Register::None; 2] && i.memory_displ_size() == 2
        }
        _ => false,
    }
}

fn widen_address(i: &mut Instruction) {
    let (base, index) = (i.memory_base(), i.memory_index());
    let wide = |r: Register| match r.is_gpr32() {
        true => r.full_register(),
        false => r,
    };
    let disp = i.memory_displacement32() as i32;
    i.set_memory_base(wide(base));
    i.set_memory_index(wide(index));
    i.set_memory_displacement64(i64::from(disp) as u64);
    i.set_memory_displ_size(match disp {
        0 if base != Register::None => 0,
        _ => 8,
    });
}

/// Branches by their targets, which become offsets from the page that may be negative; false where there is no such branch.
fn widen_branch(i: &mut Instruction) -> bool {
    if i.op_count() == 0 || i.op0_kind() != OpKind::NearBranch32 {
        return true;
    }
    use Code::*;
    let target = i64::from(i.near_branch32() as i32);
    let code = match i.code() {
        Jmp_rel8_32 => Jmp_rel8_64,
        Jmp_rel32_32 => Jmp_rel32_64,
        Call_rel32_32 => Call_rel32_64,
        Jecxz_rel8_32 => Jecxz_rel8_64,
        Loop_rel8_32_ECX => Loop_rel8_64_ECX,
        Loope_rel8_32_ECX => Loope_rel8_64_ECX,
        Loopne_rel8_32_ECX => Loopne_rel8_64_ECX,
        code => match CONDITIONAL.iter().find(|(narrow, _)| *narrow == code) {
            Some((_, wide)) => *wide,
            None => return false,
        },
    };
    i.set_code(code);
    i.set_op0_kind(OpKind::NearBranch64);
    i.set_near_branch64(target as u64);
    true
}

macro_rules! conditional {
    ($($narrow:ident $wide:ident,)*) => { &[$((Code::$narrow, Code::$wide)),*] };
}

const CONDITIONAL: &[(Code, Code)] = conditional! {
    Jo_rel8_32 Jo_rel8_64, Jno_rel8_32 Jno_rel8_64, Jb_rel8_32 Jb_rel8_64, Jae_rel8_32 Jae_rel8_64,
    Je_rel8_32 Je_rel8_64, Jne_rel8_32 Jne_rel8_64, Jbe_rel8_32 Jbe_rel8_64, Ja_rel8_32 Ja_rel8_64,
    Js_rel8_32 Js_rel8_64, Jns_rel8_32 Jns_rel8_64, Jp_rel8_32 Jp_rel8_64, Jnp_rel8_32 Jnp_rel8_64,
    Jl_rel8_32 Jl_rel8_64, Jge_rel8_32 Jge_rel8_64, Jle_rel8_32 Jle_rel8_64, Jg_rel8_32 Jg_rel8_64,
    Jo_rel32_32 Jo_rel32_64, Jno_rel32_32 Jno_rel32_64, Jb_rel32_32 Jb_rel32_64, Jae_rel32_32 Jae_rel32_64,
    Je_rel32_32 Je_rel32_64, Jne_rel32_32 Jne_rel32_64, Jbe_rel32_32 Jbe_rel32_64, Ja_rel32_32 Ja_rel32_64,
    Js_rel32_32 Js_rel32_64, Jns_rel32_32 Jns_rel32_64, Jp_rel32_32 Jp_rel32_64, Jnp_rel32_32 Jnp_rel32_64,
    Jl_rel32_32 Jl_rel32_64, Jge_rel32_32 Jge_rel32_64, Jle_rel32_32 Jle_rel32_64, Jg_rel32_32 Jg_rel32_64,
};

/// What moves the stack by the width of the mode: the rewriter knows how far that is.
fn replacement(code: Code) -> Option<Code> {
    use Code::*;
    Some(match code {
        Push_r32 => Push_r64,
        Pop_r32 => Pop_r64,
        Push_rm32 => Push_rm64,
        Pop_rm32 => Pop_rm64,
        Pushd_imm8 => Pushq_imm8,
        Pushd_imm32 => Pushq_imm32,
        Retnd => Retnq,
        Retnd_imm16 => Retnq_imm16,
        Leaved => Leaveq,
        Pushfd => Pushfq,
        Popfd => Popfq,
        Jmp_rm32 => Jmp_rm64,
        Call_rm32 => Call_rm64,
        _ => return None,
    })
}

/// The form of an instruction whose short one is a prefix in 64-bit mode.
fn long_form(code: Code) -> Option<Code> {
    use Code::*;
    Some(match code {
        Inc_r32 => Inc_rm32,
        Dec_r32 => Dec_rm32,
        Inc_r16 => Inc_rm16,
        Dec_r16 => Dec_rm16,
        _ => return None,
    })
}
