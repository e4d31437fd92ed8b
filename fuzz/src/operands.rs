//! From an instruction form to an instruction: a register or memory operand of every kind that the form allows, prefixes, masks.
//!
//! A memory operand is made backwards: the address that it shall reach is chosen first (aligned or not, across pages, not
//! present, read only), then registers that can form it. The values that registers are known to hold are followed;
//! where none fits, the caller puts a move in front ([`Build::before`]).

use iced_x86::{
    Code, EncodingKind, Instruction, MemorySize, Mnemonic, OpCodeOperandKind, OpKind, Register,
    RoundingControl,
};

use crate::layout::{CODE, CONSTANT, DATA, STACK, STACK_START};
use crate::random::Random;

/// What registers hold, as far as it is known.
#[derive(Clone, Debug)]
pub struct Known {
    pub gpr: [Option<u64>; 16],
    pub fs: u64,
    pub gs: u64,
}

/// An instruction being made.
pub struct Build<'a> {
    pub r: &'a mut Random,
    pub known: &'a mut Known,
    /// Registers to be loaded before it.
    pub before: Vec<(usize, u64)>,
    evex: bool,
    high_bytes: bool,
}

const RSP: usize = 4;
const RSI: usize = 6;
const RDI: usize = 7;
const RCX: usize = 1;
const RBX: usize = 3;
const RAX: usize = 0;

/// The register of a number, in a bank that begins with `first`.
fn nth(first: Register, n: u64) -> Register {
    Register::try_from(first as usize + n as usize).unwrap_or(first)
}

impl<'a> Build<'a> {
    /// Makes one instruction, or gives up.
    pub fn instruction(
        r: &'a mut Random,
        known: &'a mut Known,
        code: Code,
    ) -> Option<(Vec<(usize, u64)>, Instruction)> {
        let op = code.op_code();
        let high_bytes = r.percent(30);
        let mut build = Build {
            r,
            known,
            before: Vec::new(),
            evex: op.encoding() == EncodingKind::EVEX,
            high_bytes,
        };
        let mut i = Instruction::default();
        i.set_code(code);
        if op.is_string_instruction_like() {
            build.string(&mut i);
        }
        let memory = build.r.percent(60);
        build.decorate_vector(&mut i, memory);
        for (n, kind) in op.op_kinds().iter().enumerate() {
            build.operand(&mut i, n as u32, *kind, memory)?;
        }
        build.decorate_legacy(&mut i);
        build.implicit(&i);
        Some((build.before, i))
    }

    fn set(&mut self, register: usize, value: u64) {
        self.before.retain(|(n, _)| *n != register);
        self.before.push((register, value));
        self.known.gpr[register] = Some(value);
    }

    /// A value for a register, mostly left as it is where it is known to do.
    fn want(&mut self, register: usize, suits: impl Fn(u64) -> bool, value: u64) -> u64 {
        match self.known.gpr[register] {
            Some(v) if suits(v) => v,
            _ => {
                self.set(register, value);
                value
            }
        }
    }

    /// EVEX: opmask, zeroing, broadcast, rounding.
    fn decorate_vector(&mut self, i: &mut Instruction, memory: bool) {
        let op = i.code().op_code();
        if op.can_use_op_mask_register() && (op.require_op_mask_register() || self.r.percent(50)) {
            i.set_op_mask(nth(Register::K1, self.r.below(7)));
            i.set_zeroing_masking(op.can_use_zeroing_masking() && self.r.percent(40));
        }
        if memory {
            i.set_is_broadcast(op.can_broadcast() && self.r.percent(50));
            if i.zeroing_masking() && stores_to_memory(i.code()) {
                i.set_zeroing_masking(false);
            }
        } else if op.can_use_rounding_control() && self.r.percent(50) {
            const ROUNDING: [RoundingControl; 4] = [
                RoundingControl::RoundToNearest,
                RoundingControl::RoundDown,
                RoundingControl::RoundUp,
                RoundingControl::RoundTowardZero,
            ];
            i.set_rounding_control(*self.r.pick(&ROUNDING));
        } else if op.can_suppress_all_exceptions() && self.r.percent(30) {
            i.set_suppress_all_exceptions(true);
        }
    }

    /// LOCK, REP and useless segment prefixes.
    fn decorate_legacy(&mut self, i: &mut Instruction) {
        let op = i.code().op_code();
        let written_memory = i.op_count() > 0 && i.op0_kind() == OpKind::Memory;
        if op.can_use_lock_prefix() && written_memory && self.r.percent(40) {
            i.set_has_lock_prefix(true);
        }
        if op.is_string_instruction_like() {
            self.repeat(i);
        }
    }

    fn repeat(&mut self, i: &mut Instruction) {
        match self.r.below(4) {
            0 => {}
            1 => i.set_has_repne_prefix(true),
            _ => i.set_has_rep_prefix(true),
        }
        if i.has_rep_prefix() || i.has_repne_prefix() {
            let count = match self.r.below(10) {
                0 => 0,
                1 => self.r.below(0x3000),
                _ => self.r.below(40),
            };
            self.want(RCX, |v| v < 100, count);
        }
    }

    /// Operands that no operand names.
    fn implicit(&mut self, i: &Instruction) {
        use Mnemonic::*;
        match i.mnemonic() {
            Enter if self.r.percent(95) => {
                self.want(RSP, near_stack, STACK_START);
            }
            Leave => {
                let at = STACK_START - 8 * self.r.below(64);
                self.want(5, near_stack, at);
            }
            // Quotients that fit, mostly.
            Div | Idiv if self.r.percent(75) => {
                let high = if self.r.percent(80) {
                    0
                } else {
                    self.r.below(16)
                };
                self.want(2, |v| v < 64, high);
                if i.op0_kind() == OpKind::Register && self.r.percent(50) {
                    let divisor = self.r.value() | 1;
                    let n = i.op0_register().full_register().number();
                    if !matches!(n, RAX | 2 | RSP) && i.op0_register().size() > 1 {
                        self.set(n, divisor);
                    }
                }
            }
            _ if i.is_stack_instruction() && self.r.percent(97) => {
                self.want(RSP, near_stack, STACK_START);
            }
            _ => {}
        }
    }

    /// The pointers of a string instruction.
    fn string(&mut self, _: &mut Instruction) {
        for register in [RSI, RDI] {
            let at = self.target(8);
            self.want(register, |v| DATA.contains(v), at);
        }
    }

    fn operand(
        &mut self,
        i: &mut Instruction,
        n: u32,
        kind: OpCodeOperandKind,
        memory: bool,
    ) -> Option<()> {
        use OpCodeOperandKind as K;
        use Register as R;
        let register = match kind {
            K::mem | K::sibmem => return self.memory(i, n),
            K::mem_vsib32x | K::mem_vsib64x => return self.gather(i, n, R::XMM0),
            K::mem_vsib32y | K::mem_vsib64y => return self.gather(i, n, R::YMM0),
            K::mem_vsib32z | K::mem_vsib64z => return self.gather(i, n, R::ZMM0),
            K::mem_offs => return self.offset(i, n),
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::zmm_or_mem
            | K::k_or_mem
                if memory =>
            {
                return self.memory(i, n);
            }
            K::r8_or_mem | K::r8_reg | K::r8_opcode => self.byte(),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => self.general(R::AX),
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                self.general(R::EAX)
            }
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                self.general(R::RAX)
            }
            // The register holds an address.
            K::r16_reg_mem | K::r32_reg_mem | K::r64_reg_mem => return None,
            K::seg_reg => *self.r.pick(&[R::ES, R::CS, R::SS, R::DS, R::FS, R::GS]),
            K::k_reg | K::k_rm | K::k_vvvv | K::k_or_mem => nth(R::K0, self.r.below(8)),
            K::kp1_reg => nth(R::K0, 2 * self.r.below(4)),
            K::mm_reg | K::mm_rm | K::mm_or_mem => nth(R::MM0, self.r.below(8)),
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_or_mem | K::xmm_is4 | K::xmm_is5 => {
                self.vector(R::XMM0)
            }
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_or_mem | K::ymm_is4 | K::ymm_is5 => {
                self.vector(R::YMM0)
            }
            K::zmm_reg | K::zmm_rm | K::zmm_vvvv | K::zmm_or_mem => self.vector(R::ZMM0),
            K::xmmp3_vvvv => nth(R::XMM0, 4 * self.r.below(8)),
            K::zmmp3_vvvv => nth(R::ZMM0, 4 * self.r.below(8)),
            K::cr_reg => *self.r.pick(&[R::CR0, R::CR2, R::CR3, R::CR4, R::CR8]),
            K::dr_reg => nth(R::DR0, self.r.below(8)),
            K::es => R::ES,
            K::cs => R::CS,
            K::ss => R::SS,
            K::ds => R::DS,
            K::fs => R::FS,
            K::gs => R::GS,
            K::al => R::AL,
            K::cl => R::CL,
            K::ax => R::AX,
            K::dx => R::DX,
            K::eax => R::EAX,
            K::rax => R::RAX,
            K::st0 => R::ST0,
            K::sti_opcode => nth(R::ST0, self.r.below(8)),
            _ => return self.other(i, n, kind),
        };
        i.set_op_register(n, register);
        Some(())
    }

    /// Immediates, string operands, branch targets.
    fn other(&mut self, i: &mut Instruction, n: u32, kind: OpCodeOperandKind) -> Option<()> {
        use OpCodeOperandKind as K;
        let (op_kind, value) = match kind {
            K::imm8 if i.mnemonic() == Mnemonic::Int => {
                // Not the host's system calls.
                let vector = self.r.below(0x80);
                (OpKind::Immediate8, vector)
            }
            K::imm8 if n > 0 && i.op_kind(n - 1) == OpKind::Immediate16 => {
                (OpKind::Immediate8_2nd, self.r.below(4))
            }
            K::imm8 if (0..n).any(|m| i.op_kind(m) == OpKind::Immediate8) => {
                (OpKind::Immediate8_2nd, self.r.bits() & 0xff)
            }
            K::imm8 => (OpKind::Immediate8, self.immediate() & 0xff),
            K::imm8_const_1 => (OpKind::Immediate8, 1),
            K::imm4_m2z => (OpKind::Immediate8, self.r.below(16)),
            K::imm8sex16 => (OpKind::Immediate8to16, self.immediate() as i8 as u64),
            K::imm8sex32 => (OpKind::Immediate8to32, self.immediate() as i8 as u64),
            K::imm8sex64 => (OpKind::Immediate8to64, self.immediate() as i8 as u64),
            K::imm16 if matches!(i.mnemonic(), Mnemonic::Enter | Mnemonic::Ret) => {
                (OpKind::Immediate16, 8 * self.r.below(16))
            }
            K::imm16 => (OpKind::Immediate16, self.immediate() & 0xffff),
            K::imm32 => (OpKind::Immediate32, self.immediate() & 0xffff_ffff),
            K::imm32sex64 => (OpKind::Immediate32to64, self.immediate() as i32 as u64),
            K::imm64 => (OpKind::Immediate64, self.immediate()),
            K::br64_1 | K::br64_4 => {
                i.set_op_kind(n, OpKind::NearBranch64);
                return Some(());
            }
            K::seg_rSI => return self.string_operand(i, n, OpKind::MemorySegRSI),
            K::es_rDI => return self.string_operand(i, n, OpKind::MemoryESRDI),
            K::seg_rDI => {
                let at = self.target(16);
                self.want(RDI, |v| DATA.contains(v), at);
                i.set_op_kind(n, OpKind::MemorySegRDI);
                return Some(());
            }
            K::seg_rBX_al => {
                let at = self.target(256);
                self.want(RBX, |v| DATA.contains(v), at);
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base(Register::RBX);
                i.set_memory_index(Register::AL);
                return Some(());
            }
            _ => return None,
        };
        i.set_op_kind(n, op_kind);
        match op_kind {
            OpKind::Immediate8 => i.set_immediate8(value as u8),
            OpKind::Immediate8_2nd => i.set_immediate8_2nd(value as u8),
            _ => i.set_immediate_u64(n, value),
        }
        Some(())
    }

    fn immediate(&mut self) -> u64 {
        self.r.value()
    }

    fn string_operand(&mut self, i: &mut Instruction, n: u32, kind: OpKind) -> Option<()> {
        i.set_op_kind(n, kind);
        if kind == OpKind::MemorySegRSI && self.r.percent(10) {
            i.set_segment_prefix(*self.r.pick(&[Register::ES, Register::CS, Register::DS]));
        }
        Some(())
    }

    fn byte(&mut self) -> Register {
        match self.high_bytes {
            // AL to BL, AH to BH.
            true => nth(Register::AL, self.r.below(8)),
            // SPL now and then.
            false => match self.r.below(16) {
                n if (4..8).contains(&n) => nth(Register::SPL, n - 4),
                n if n >= 8 => nth(Register::R8L, n - 8),
                n => nth(Register::AL, n),
            },
        }
    }

    /// r10 and r11 more often than others, since the translator keeps them in memory; RSP seldom.
    fn general(&mut self, first: Register) -> Register {
        let n = match self.r.below(10) {
            0 => 10,
            1 => 11,
            _ => self.r.below(16),
        };
        let n = if n == RSP as u64 && self.r.percent(80) {
            10
        } else {
            n
        };
        nth(first, n)
    }

    fn vector(&mut self, first: Register) -> Register {
        let all = if self.evex { 32 } else { 16 };
        // The registers with small indices are left alone, mostly.
        let n = self.r.below(all);
        let n = if (12..16).contains(&n) && self.r.percent(80) {
            n - 12
        } else {
            n
        };
        nth(first, n)
    }

    /// An address that an operand of so many bytes shall be at.
    fn target(&mut self, size: u64) -> u64 {
        let size = size.max(1);
        let aligned = |r: &mut Random, base: u64, len: u64| {
            let unit = size.next_power_of_two().min(64);
            base + r.below((len - 512) / unit) * unit
        };
        match self.r.below(100) {
            0..55 => aligned(self.r, DATA.base, DATA.len),
            55..78 => DATA.base + self.r.below(DATA.len - 600),
            78..86 => DATA.base + 0x1000 * (1 + self.r.below(2)) - self.r.below(size + 1),
            86..89 => STACK_START - 256 + self.r.below(256),
            89..92 => DATA.base + DATA.len - self.r.below(size + 1),
            92..95 => CONSTANT.base + self.r.below(0xf00),
            95..96 => DATA.base - 0x8000 + self.r.below(0x7000),
            96..97 => CODE.base + self.r.below(CODE.len),
            97..98 => STACK.base + STACK.len - self.r.below(size + 1),
            98..99 if size <= 8 => self.r.value(),
            99 if size <= 8 => 0x7fff_ffff_ffff - self.r.below(64) + self.r.below(64),
            _ => self.r.value() & !0xfff | 0x100,
        }
    }

    /// A memory operand of any form of addressing.
    fn memory(&mut self, i: &mut Instruction, n: u32) -> Option<()> {
        i.set_op_kind(n, OpKind::Memory);
        let size = match i.memory_size() {
            MemorySize::Unknown => 8,
            s => s.size() as u64,
        };
        let mut target = self.target(size);
        target = target.wrapping_sub(self.segment(i));
        let narrow = self.r.percent(8);
        if narrow {
            target &= 0xffff_ffff;
        }
        match self.r.below(10) {
            0 => self.rip_relative(i, target, narrow),
            1 => self.absolute(i, target),
            2 => self.index_only(i, target, narrow),
            3..6 => self.base_and_index(i, target, narrow),
            _ => self.base_only(i, target, narrow),
        }
    }

    /// Sometimes FS or GS, seldom a segment that does nothing. The base that it adds.
    fn segment(&mut self, i: &mut Instruction) -> u64 {
        match self.r.below(24) {
            0 | 1 => {
                i.set_segment_prefix(Register::FS);
                self.known.fs
            }
            2 | 3 => {
                i.set_segment_prefix(Register::GS);
                self.known.gs
            }
            4 => {
                i.set_segment_prefix(*self.r.pick(&[Register::ES, Register::CS, Register::DS]));
                0
            }
            _ => 0,
        }
    }

    fn address_register(&self, n: usize, narrow: bool) -> Register {
        let first = if narrow { Register::EAX } else { Register::RAX };
        nth(first, n as u64)
    }

    fn displacement(&mut self, i: &mut Instruction, displacement: i64) -> Option<()> {
        let displacement = i32::try_from(displacement).ok()?;
        let size = match displacement {
            0 if self.r.percent(50) => 0,
            // The encoder takes 1 where it fits; EVEX scales it.
            -128..=127 if self.r.percent(80) => 1,
            _ => 8,
        };
        i.set_memory_displ_size(size);
        i.set_memory_displacement64(i64::from(displacement) as u64);
        Some(())
    }

    /// A displacement to `target` from what is known, or a register that is loaded so that a random one leads there.
    fn base(&mut self, target: u64, narrow: bool) -> (usize, i64) {
        let reach = |v: u64| {
            let v = if narrow { v & 0xffff_ffff } else { v };
            let d = target.wrapping_sub(v) as i64;
            i32::try_from(d).ok().map(i64::from)
        };
        for _ in 0..4 {
            let n = self.r.below(16) as usize;
            if let Some(d) = self.known.gpr[n].and_then(reach) {
                return (n, d);
            }
        }
        let n = loop {
            let n = self.r.below(16) as usize;
            if n != RSP {
                break n;
            }
        };
        let d = match self.r.below(3) {
            0 => 0,
            1 => self.r.below(256) as i64 - 128,
            _ => self.r.bits() as i32 as i64 >> 8,
        };
        let v = target.wrapping_sub(d as u64);
        self.set(n, if narrow { v & 0xffff_ffff } else { v });
        (n, d)
    }

    fn base_only(&mut self, i: &mut Instruction, target: u64, narrow: bool) -> Option<()> {
        let (n, d) = self.base(target, narrow);
        i.set_memory_base(self.address_register(n, narrow));
        self.displacement(i, d)
    }

    fn index(&mut self, i: &mut Instruction, narrow: bool, not: usize) -> u64 {
        let n = loop {
            let n = self.r.below(16) as usize;
            if n != RSP && n != not {
                break n;
            }
        };
        let small = match self.r.below(3) {
            0 => self.r.below(32).wrapping_neg(),
            _ => self.r.below(256),
        };
        let v = self.want(n, |v| v.wrapping_add(512) < 1024, small);
        let scale = 1 << self.r.below(4);
        i.set_memory_index(self.address_register(n, narrow));
        i.set_memory_index_scale(scale);
        v.wrapping_mul(scale.into())
    }

    fn base_and_index(&mut self, i: &mut Instruction, target: u64, narrow: bool) -> Option<()> {
        // The index first: loading it must not take the base's value away.
        let offset = self.index(i, narrow, 16);
        let index = i.memory_index().number();
        let (n, d) = self.base(target.wrapping_sub(offset), narrow);
        if n == index && self.before.iter().any(|(r, _)| *r == n) {
            return None;
        }
        i.set_memory_base(self.address_register(n, narrow));
        self.displacement(i, d)
    }

    fn index_only(&mut self, i: &mut Instruction, target: u64, narrow: bool) -> Option<()> {
        let offset = self.index(i, narrow, 16);
        let d = target.wrapping_sub(offset) as i64;
        i.set_memory_displ_size(8);
        i.set_memory_displacement64(i64::from(i32::try_from(d).ok()?) as u64);
        Some(())
    }

    fn absolute(&mut self, i: &mut Instruction, target: u64) -> Option<()> {
        let d = i32::try_from(target as i64).ok()?;
        i.set_memory_displ_size(8);
        i.set_memory_displacement64(i64::from(d) as u64);
        Some(())
    }

    fn rip_relative(&mut self, i: &mut Instruction, target: u64, narrow: bool) -> Option<()> {
        let base = if narrow { Register::EIP } else { Register::RIP };
        i.set_memory_base(base);
        i.set_memory_displ_size(if narrow { 4 } else { 8 });
        i.set_memory_displacement64(target);
        Some(())
    }

    /// A vector of small indices, off a base in the data.
    fn gather(&mut self, i: &mut Instruction, n: u32, first: Register) -> Option<()> {
        i.set_op_kind(n, OpKind::Memory);
        let target = DATA.base + 0x800 + self.r.below(0x800);
        let (base, d) = self.base(target, false);
        i.set_memory_base(self.address_register(base, false));
        let index = if self.r.percent(90) {
            12 + self.r.below(4)
        } else {
            self.r.below(16)
        };
        i.set_memory_index(nth(first, index));
        i.set_memory_index_scale(1 << self.r.below(4));
        self.displacement(i, d)
    }

    /// A 64-bit absolute address.
    fn offset(&mut self, i: &mut Instruction, n: u32) -> Option<()> {
        i.set_op_kind(n, OpKind::Memory);
        let target = self.target(8).wrapping_sub(self.segment(i));
        i.set_memory_displ_size(8);
        i.set_memory_displacement64(target);
        Some(())
    }
}

fn near_stack(v: u64) -> bool {
    (STACK.base + 0x200..STACK.base + STACK.len - 0x200).contains(&v)
}

/// The first operand is memory that is written (zeroing is not allowed there).
fn stores_to_memory(code: Code) -> bool {
    use OpCodeOperandKind::*;
    matches!(
        code.op_code().op0_kind(),
        mem | xmm_or_mem | ymm_or_mem | zmm_or_mem
    )
}

trait StringLike {
    fn is_string_instruction_like(&self) -> bool;
}

impl StringLike for iced_x86::OpCodeInfo {
    fn is_string_instruction_like(&self) -> bool {
        self.op_kinds()
            .iter()
            .any(|k| matches!(k, OpCodeOperandKind::seg_rSI | OpCodeOperandKind::es_rDI))
    }
}
