//! 32-bit and 16-bit code, of every mode but 64-bit mode, as code of 64-bit mode.
//!
//! Problem: the host runs in 64-bit mode, where some encodings mean something else, the stack moves by 8 bytes, addresses have 64 bits, and
//! segments have neither base nor limit.
//! Idea: an instruction is decoded as the guest has it, then turned into the 64-bit instruction that does the same to the registers' low
//! parts ([`widen`]); most of 32-bit code have the same bytes. Everything behind the decoder knows that one only, and how wide what it pushes, the stack pointer
//! and its addresses are, which are worked out in 32 bits and cut to 16 where the guest's processor does. Where the segments of data, stack and code are
//! flat, as they are in 32-bit systems of today, that is all ([`Mode::flat`]): such code has as many checks as 64-bit code and may share them. Through other
//! segments, and FS and GS always, an access is compared with the limit and the base is added.
//! Offsets in a block count from its linear page as ever; what the page begins at in terms of EIP, its *origin*, differs from that where the
//! code segment has a base, and may be negative. A branch's target is worked out as the guest's processor does, wrapped and compared with the
//! limit, when the block is translated; so blocks of such code are for one base and one limit.
//! Invariant: a block runs only while the CPU is in the mode of its key. Segment registers change in the interpreter alone, and when
//! it is done the mode is looked at anew. Registers r8 to r15 are never written, and nothing depends on the upper halves of the others.
//! What is left to the interpreter: encodings that 64-bit mode lacks, segments that expand down, loads of segment registers, and the
//! last byte before EIP or an address wraps.
//! Cost: an access through FS, GS or a segment that is not flat takes three instructions more, with a 16-bit address four.

use doppel_memory::PAGE_MASK;
use doppel_x86::{Cpu, CpuMode, Seg, Segment};
use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind, Register};

/// The last page of a 32-bit address space.
pub(crate) const LAST_NARROW_PAGE: u64 = 0xffff_f000;

/// What instructions are by default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Width {
    #[default]
    Bits64,
    Bits32,
    Bits16,
}

/// What code takes for granted of the CPU's mode and segments: a part of a block's key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Mode {
    pub width: Width,
    /// A 32-bit stack; DS, ES and SS begin at 0, end at 4 GiB and may be written, and CS begins and ends there.
    pub flat: bool,
    /// The stack pointer is SP.
    pub short_stack: bool,
    /// Paging is off, and linear addresses are offsets in the CPU's window (see `window`).
    pub window: bool,
    /// CPL 1 or 2.
    pub middle: bool,
    /// Real or virtual-8086 mode, where segments are paragraphs and have no rights.
    pub paragraphs: bool,
    /// Base and limit of CS; 0 in 64-bit mode.
    pub base: u32,
    pub limit: u32,
}

impl Mode {
    /// 64-bit mode, CPL 0 or 3.
    pub const LONG: Mode = Mode {
        width: Width::Bits64,
        flat: false,
        short_stack: false,
        window: false,
        middle: false,
        paragraphs: false,
        base: 0,
        limit: 0,
    };

    /// 32-bit code and stack, CPL 0 or 3, all segments flat.
    pub const FLAT: Mode = Mode {
        width: Width::Bits32,
        flat: true,
        limit: u32::MAX,
        ..Mode::LONG
    };

    /// The CPU's; `None` where its code is not translated.
    pub fn of(cpu: &Cpu) -> Option<Self> {
        let middle = matches!(cpu.cpl, 1 | 2);
        let width = match cpu.mode() {
            CpuMode::Bits64 => {
                return Some(Mode {
                    middle,
                    ..Mode::LONG
                });
            }
            CpuMode::Bits32 => Width::Bits32,
            CpuMode::Bits16 | CpuMode::V86 | CpuMode::Real => Width::Bits16,
        };
        let paragraphs = matches!(cpu.mode(), CpuMode::V86 | CpuMode::Real);
        let (cs, ss) = (cpu.segment(Seg::Cs), cpu.segment(Seg::Ss));
        let short_stack = cpu.mode() == CpuMode::V86 || !ss.big();
        let flat = [Seg::Ds, Seg::Es, Seg::Ss]
            .into_iter()
            .all(|s| is_whole(cpu.segment(s)) && last(cpu.segment(s), true, true) >= 0);
        // What no descriptor says is not packed.
        let descriptor = cs.limit < 1 << 20 || cs.limit & 0xfff == 0xfff;
        (descriptor && cs.base <= u32::MAX.into()).then_some(Mode {
            width,
            flat: flat && is_whole(cs) && !short_stack && width == Width::Bits32,
            short_stack,
            window: false,
            middle,
            paragraphs,
            base: cs.base as u32,
            limit: cs.limit,
        })
    }

    /// 64-bit or 32-bit code of CPL 0 or 3 in a flat code segment, on a stack as wide.
    pub fn is_usual(self) -> bool {
        !self.is_placed() && !self.short_stack && !self.middle
    }

    /// Bits of an instruction.
    pub fn bits(self) -> u32 {
        match self.width {
            Width::Bits64 => 64,
            Width::Bits32 => 32,
            Width::Bits16 => 16,
        }
    }

    /// Not 64-bit mode.
    pub fn is_narrow(self) -> bool {
        self.width != Width::Bits64
    }

    /// Bytes of the stack pointer.
    pub fn stack(self) -> u8 {
        match (self.is_narrow(), self.short_stack) {
            (false, _) => 8,
            (true, false) => 4,
            (true, true) => 2,
        }
    }

    /// Its blocks have to know their origin: EIP is not the linear address, wraps at 64 KiB, or is compared with a limit.
    pub fn is_placed(self) -> bool {
        let whole = self.base == 0 && self.limit == u32::MAX;
        self.is_narrow() && (self.width == Width::Bits16 || !whole)
    }

    /// RIP, cut off as it is in this mode.
    pub fn cut(self, rip: u64) -> u64 {
        match self.width {
            Width::Bits64 => rip,
            Width::Bits32 => rip & 0xffff_ffff,
            Width::Bits16 => rip & 0xffff,
        }
    }

    /// The linear address of the code at RIP.
    pub fn linear(self, rip: u64) -> u64 {
        match self.is_narrow() {
            true => rip.wrapping_add(self.base.into()) & 0xffff_ffff,
            false => rip,
        }
    }

    /// RIP of the beginning of the page that holds the code at RIP; may be negative.
    pub fn origin(self, rip: u64) -> u64 {
        rip.wrapping_sub(self.linear(rip) & PAGE_MASK)
    }

    /// How many bytes from RIP on may be translated: up to the limit, without the byte before EIP wraps.
    pub fn room(self, rip: u64) -> u64 {
        let most = match self.width {
            Width::Bits64 => return u64::MAX,
            Width::Bits32 => u32::MAX - 1,
            Width::Bits16 => 0xfffe,
        };
        let end = u64::from(self.limit.min(most)) + 1;
        end.saturating_sub(rip)
    }
}

/// It begins at 0 and ends at 4 GiB.
fn is_whole(segment: &Segment) -> bool {
    segment.base == 0 && segment.limit == u32::MAX
}

/// The last offset that may be accessed through a segment; -1 where none may, or where that takes more than a comparison. Where segments
/// are paragraphs they have no rights.
pub(crate) fn last(segment: &Segment, write: bool, rights: bool) -> i64 {
    const CODE: u32 = 8;
    const EXPAND_DOWN: u32 = 4;
    const WRITABLE: u32 = 2;
    const ORDINARY: u32 = 0x10;
    let is = |bits: u32| segment.attributes & bits != 0;
    let expands_down = is(EXPAND_DOWN) && !is(CODE);
    let allowed = match (is(CODE), write) {
        // In code segments this bit lets them be read.
        (true, false) => is(WRITABLE),
        (true, true) => false,
        (false, write) => is(WRITABLE) || !write,
    };
    let usable = !segment.unusable() && is(ORDINARY) && allowed;
    match !expands_down && (usable || !rights) {
        true => i64::from(segment.limit),
        false => -1,
    }
}

/// What became of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Widened {
    /// The host's bytes for it are not the guest's.
    pub encode: bool,
    /// Bytes of what it pushes or pops, and of the near address that it goes to.
    pub word: u8,
    /// Its addresses, or its counter, have 16 bits.
    pub short: bool,
}

/// Turns an instruction of other modes into the 64-bit one that does the same; `None` where 64-bit mode has nothing like it. `origin` is
/// that of its page.
pub(crate) fn widen(i: &mut Instruction, mode: Mode, origin: u64) -> Option<Widened> {
    if i.is_invalid() || mode.paragraphs && i.encoding() != EncodingKind::Legacy {
        return None;
    }
    let short = (0..i.op_count()).any(|op| short_operand(i, op));
    let wide_result = i.op_count() > 0 && i.op0_register().size() > 2;
    if short && i.mnemonic() == Mnemonic::Lea && wide_result {
        return None;
    }
    let mut out = Widened {
        encode: i.encoding() != EncodingKind::Legacy || mode.width == Width::Bits16,
        word: widen_branch(i, mode, origin)?,
        short,
    };
    if let Some((code, short)) = counted(i.code()) {
        i.set_code(code);
        out.short = short;
    }
    let of_stack_width = replacement(i.code());
    if let Some((code, word)) = of_stack_width {
        i.set_code(code);
        out.word = word;
    } else if let Some(code) = long_form(i.code()) {
        i.set_code(code);
        out.encode = true;
    } else if !i.code().op_code().mode64() {
        return None;
    }
    for op in 0..i.op_count() {
        if of_stack_width.is_some() && i.op_kind(op) == OpKind::Register {
            i.set_op_register(op, i.op_register(op).full_register());
        }
        if i.op_kind(op) == OpKind::Memory {
            widen_address(i, short);
            // What stands for an address alone here is relative to RIP there.
            let alone = i.memory_base() == Register::None && i.memory_index() == Register::None;
            out.encode |= alone || short;
        }
    }
    Some(out)
}

/// Addresses of 16 bits, also implied ones.
fn short_operand(i: &Instruction, op: u32) -> bool {
    match i.op_kind(op) {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => true,
        OpKind::Memory => {
            let registers = [i.memory_base(), i.memory_index()];
            registers.into_iter().any(|r| r.size() == 2)
                || registers == [Register::None; 2] && i.memory_displ_size() == 2
        }
        _ => false,
    }
}

fn widen_address(i: &mut Instruction, short: bool) {
    let (base, index) = (i.memory_base(), i.memory_index());
    let segment = i.memory_segment();
    let wide = |r: Register| match r.is_gpr16() || r.is_gpr32() {
        true => r.full_register(),
        false => r,
    };
    let disp = match short {
        true => i64::from(i.memory_displacement32() as i16),
        false => i64::from(i.memory_displacement32() as i32),
    };
    i.set_memory_base(wide(base));
    i.set_memory_index(wide(index));
    i.set_memory_displacement64(disp as u64);
    i.set_memory_displ_size(match disp {
        0 if base != Register::None => 0,
        _ => 8,
    });
    debug_assert_eq!(segment, i.memory_segment());
}

/// Branches by their targets, which become offsets from the page that may be negative; tells how many bytes of the instruction pointer
/// they write. `None` where there is no such branch, or where it goes beyond the code segment.
fn widen_branch(i: &mut Instruction, mode: Mode, origin: u64) -> Option<u8> {
    let default = match mode.width {
        Width::Bits16 => 2,
        _ => 4,
    };
    if i.op_count() == 0 {
        return Some(default);
    }
    let (offset, word) = match i.op0_kind() {
        OpKind::NearBranch16 if mode.is_placed() => (u64::from(i.near_branch16()), 2),
        OpKind::NearBranch32 => (i64::from(i.near_branch32() as i32) as u64, 4),
        OpKind::NearBranch16 | OpKind::FarBranch16 | OpKind::FarBranch32 => return None,
        _ => return Some(default),
    };
    use Code::*;
    let code = match i.code() {
        Jmp_rel8_16 | Jmp_rel16 | Jmp_rel8_32 | Jmp_rel32_32 => Jmp_rel32_64,
        Call_rel16 | Call_rel32_32 => Call_rel32_64,
        _ if counted(i.code()).is_some() => i.code(),
        _ if i.is_jcc_short_or_near() => *CONDITIONAL.get(i.condition_code() as usize - 1)?,
        _ => return None,
    };
    let target = match mode.is_placed() {
        true => placed(offset, word, mode, origin)?,
        false => offset,
    };
    i.set_code(code);
    i.set_op0_kind(OpKind::NearBranch64);
    i.set_near_branch64(target);
    Some(word)
}

/// An offset from the page as EIP says it; `None` beyond the limit.
fn placed(offset: u64, word: u8, mode: Mode, origin: u64) -> Option<u64> {
    let eip = origin.wrapping_add(offset)
        & match word {
            2 => 0xffff,
            _ => 0xffff_ffff,
        };
    (mode.room(eip) > 0).then_some(eip.wrapping_sub(origin))
}

/// Conditional branches in the order of their conditions' encoding.
const CONDITIONAL: [Code; 16] = [
    Code::Jo_rel32_64,
    Code::Jno_rel32_64,
    Code::Jb_rel32_64,
    Code::Jae_rel32_64,
    Code::Je_rel32_64,
    Code::Jne_rel32_64,
    Code::Jbe_rel32_64,
    Code::Ja_rel32_64,
    Code::Js_rel32_64,
    Code::Jns_rel32_64,
    Code::Jp_rel32_64,
    Code::Jnp_rel32_64,
    Code::Jl_rel32_64,
    Code::Jge_rel32_64,
    Code::Jle_rel32_64,
    Code::Jg_rel32_64,
];

/// A branch on a counter, and whether that is CX.
fn counted(code: Code) -> Option<(Code, bool)> {
    use Code::*;
    Some(match code {
        Jcxz_rel8_16 | Jcxz_rel8_32 => (Jecxz_rel8_64, true),
        Jecxz_rel8_16 | Jecxz_rel8_32 => (Jecxz_rel8_64, false),
        Loop_rel8_16_CX | Loop_rel8_32_CX => (Loop_rel8_64_ECX, true),
        Loop_rel8_16_ECX | Loop_rel8_32_ECX => (Loop_rel8_64_ECX, false),
        Loope_rel8_16_CX | Loope_rel8_32_CX => (Loope_rel8_64_ECX, true),
        Loope_rel8_16_ECX | Loope_rel8_32_ECX => (Loope_rel8_64_ECX, false),
        Loopne_rel8_16_CX | Loopne_rel8_32_CX => (Loopne_rel8_64_ECX, true),
        Loopne_rel8_16_ECX | Loopne_rel8_32_ECX => (Loopne_rel8_64_ECX, false),
        _ => return None,
    })
}

/// What moves the stack, or sets the instruction pointer, by the width of its operand: the rewriter is told how far that is.
fn replacement(code: Code) -> Option<(Code, u8)> {
    use Code::*;
    Some(match code {
        Push_r32 => (Push_r64, 4),
        Pop_r32 => (Pop_r64, 4),
        Push_rm32 => (Push_rm64, 4),
        Pop_rm32 => (Pop_rm64, 4),
        Pushd_imm8 => (Pushq_imm8, 4),
        Pushd_imm32 => (Pushq_imm32, 4),
        Retnd => (Retnq, 4),
        Retnd_imm16 => (Retnq_imm16, 4),
        Leaved => (Leaveq, 4),
        Pushfd => (Pushfq, 4),
        Popfd => (Popfq, 4),
        Jmp_rm32 => (Jmp_rm64, 4),
        Call_rm32 => (Call_rm64, 4),
        Push_r16 => (Push_r64, 2),
        Pop_r16 => (Pop_r64, 2),
        Push_rm16 => (Push_rm64, 2),
        Pop_rm16 => (Pop_rm64, 2),
        Pushw_imm8 => (Pushq_imm8, 2),
        Push_imm16 => (Pushq_imm32, 2),
        Retnw => (Retnq, 2),
        Retnw_imm16 => (Retnq_imm16, 2),
        Leavew => (Leaveq, 2),
        Pushfw => (Pushfq, 2),
        Popfw => (Popfq, 2),
        Jmp_rm16 => (Jmp_rm64, 2),
        Call_rm16 => (Call_rm64, 2),
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
