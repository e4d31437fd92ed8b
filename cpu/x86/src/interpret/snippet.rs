//! Makes snippets: one instruction of the guest's, re-encoded so that it may run on the host.
//!
//! The memory operand becomes `[r]` with a register that the instruction does not otherwise use; a general register operand
//! that is (part of) RSP becomes a second such register. Everything else is the guest's instruction as it is; so are its bytes, where they are
//! known and RSP is not among its registers. The library's encoder does the rest (see [`crate::patch`]).

use iced_x86::{
    CpuidFeature, Encoder, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    OpKind, Register, RoundingControl,
};

use super::arch_native::SnippetCode;
use super::availability::{HostFeatures, Unit};
use super::register::{gpr_index, register_size};
use super::vector::component;
use crate::patch::{Operand, with_operand};
use crate::{Cpu, Gpr};

/// What there is to know about a snippet.
#[derive(Clone, Copy)]
pub(super) struct Snippet {
    pub code: SnippetCode,
    pub plan: Plan,
}

/// How the operands of an instruction reach its snippet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub unit: Unit,
    pub memory: Option<Memory>,
    /// The register that stands for RSP.
    pub stack_pointer: Option<usize>,
    /// State components that it has nothing to do with.
    pub untouched: u64,
    /// It never raises underflow, so it heeds flush-to-zero also where underflow is not masked.
    pub flushes: bool,
}

impl Plan {
    /// The state components that the instruction reads or writes, as bits of XCR0.
    pub fn components(&self, cpu: &Cpu) -> u64 {
        self.unit.components(cpu.xcr0) & !self.untouched
    }
}

/// The memory operand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Memory {
    /// Bytes.
    pub size: usize,
    pub read: bool,
    pub write: bool,
    /// The register that holds the address of the bounce buffer.
    pub register: usize,
    pub aligned: Aligned,
}

/// Whether a misaligned memory operand is an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Aligned {
    No,
    /// Unless MXCSR.MM is set (AMD).
    UnlessMxcsr,
    /// On processors of which SHA needs it.
    AsVendor,
    Always,
}

/// Instructions with one encoding but for their memory operand's address share a snippet: this is its key.
pub(super) fn normalize(i: &Instruction) -> Instruction {
    let mut key = *i;
    if (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) {
        key.set_memory_base(Register::None);
        key.set_memory_index(Register::None);
        key.set_memory_index_scale(1);
        key.set_memory_displacement64(0);
        key.set_memory_displ_size(0);
        key.set_segment_prefix(Register::None);
    }
    key
}

/// The code and the plan for a [normalized](normalize) instruction, whose bytes are these; `None` where the host must not execute it.
pub(super) fn compile(
    key: &Instruction,
    bytes: Option<&[u8]>,
    host: &mut HostFeatures,
) -> Option<(Vec<u8>, Plan)> {
    let unit = Unit::of(key)?;
    let harmless = key.flow_control() == FlowControl::Next && !key.is_privileged();
    if !harmless || !host.cover(key) || key.is_vsib() {
        return None;
    }
    let info = InstructionInfoFactory::new().info(key).clone();
    let mut free = free_registers(&info);
    let mut native = *key;
    let memory = match key.op_kinds().position(|k| k == OpKind::Memory) {
        Some(op) => {
            let register = free.next()?;
            native.set_memory_base(Register::RAX + register as u32);
            let access = info.op_access(op as u32);
            Some(memory(key, unit, access, register)?)
        }
        None if info.used_memory().is_empty() => None,
        None => return None,
    };
    let stack_pointer = replace_stack_pointer(&mut native, &mut free)?;
    let known = bytes.filter(|_| stack_pointer.is_none());
    let patched = known.and_then(|bytes| patched(key, bytes, memory.as_ref()));
    let mut code = match patched {
        Some(code) => code,
        None => encoded(&native)?,
    };
    code.push(RET);
    let plan = Plan {
        unit,
        memory,
        stack_pointer,
        untouched: untouched(key, unit),
        flushes: flushes(key),
    };
    Some((code, plan))
}

/// AVX-512 instructions that only use vectors 16 to 31 leave the upper parts of the others alone, and the other way round. (MXCSR is loaded with XMM.)
fn untouched(key: &Instruction, unit: Unit) -> u64 {
    if unit != Unit::Avx512 {
        return 0;
    }
    let registers = key
        .op_kinds()
        .zip(0..)
        .filter(|(kind, _)| *kind == OpKind::Register);
    let vectors = registers
        .map(|(_, n)| key.op_register(n))
        .filter(|r| r.is_vector_register());
    let (high, low): (Vec<_>, Vec<_>) = vectors.partition(|r| r.number() >= 16);
    let mut untouched = 0;
    if high.is_empty() {
        untouched |= component::HIGH_ZMM;
    }
    if low.is_empty() {
        untouched |= component::AVX | component::ZMM_HIGH;
    }
    untouched
}

/// The instruction's own bytes with its memory operand replaced.
fn patched(key: &Instruction, bytes: &[u8], memory: Option<&Memory>) -> Option<Vec<u8>> {
    let Some(memory) = memory else {
        return Some(bytes.to_vec());
    };
    let operand = Operand {
        base: memory.register as u8,
        disp: 0,
        renamed: None,
    };
    Some(with_operand(key, bytes, operand)?.get().to_vec())
}

fn encoded(native: &Instruction) -> Option<Vec<u8>> {
    let mut encoder = Encoder::new(64);
    encoder.encode(native, 0).ok()?;
    Some(encoder.take_buffer())
}

fn flushes(key: &Instruction) -> bool {
    use Mnemonic::*;
    let suppresses =
        key.suppress_all_exceptions() || key.rounding_control() != RoundingControl::None;
    suppresses
        || matches!(
            key.mnemonic(),
            Vreducepd
                | Vreduceps
                | Vreducesd
                | Vreducess
                | Vrcp14pd
                | Vrcp14ps
                | Vrcp14sd
                | Vrcp14ss
                | Vrsqrt14pd
                | Vrsqrt14ps
                | Vrsqrt14sd
                | Vrsqrt14ss
        )
}

const RET: u8 = 0xc3;

fn free_registers(info: &iced_x86::InstructionInfo) -> impl Iterator<Item = usize> + use<> {
    let used = info
        .used_registers()
        .iter()
        .filter_map(|r| gpr_index(r.register()))
        .fold(1u16 << Gpr::Rsp as u32, |used, n| used | 1 << n);
    (0..16).rev().filter(move |n| used >> n & 1 == 0)
}

fn memory(key: &Instruction, unit: Unit, access: OpAccess, register: usize) -> Option<Memory> {
    let (read, write) = match access {
        OpAccess::Read | OpAccess::CondRead => (true, false),
        OpAccess::Write | OpAccess::CondWrite => (false, true),
        OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
        _ => return None,
    };
    let size = key.memory_size().size();
    let fits = (1..=super::native::BOUNCE_SIZE).contains(&size);
    fits.then_some(Memory {
        size,
        read,
        write,
        register,
        aligned: alignment(key, unit, size),
    })
}

fn alignment(i: &Instruction, unit: Unit, size: usize) -> Aligned {
    use Mnemonic::*;
    match i.mnemonic() {
        Movaps | Movapd | Movdqa | Movntps | Movntpd | Movntdq | Movntdqa | Vmovaps | Vmovapd
        | Vmovdqa | Vmovdqa32 | Vmovdqa64 | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa => {
            Aligned::Always
        }
        Movups | Movupd | Movdqu | Lddqu | Pcmpistri | Pcmpistrm | Pcmpestri | Pcmpestrm
        | Pcmpestri64 | Pcmpestrm64 => Aligned::No,
        _ if i.cpuid_features().contains(&CpuidFeature::SHA) => Aligned::AsVendor,
        _ if matches!(unit, Unit::Sse | Unit::MmxSse) && size == 16 => Aligned::UnlessMxcsr,
        _ => Aligned::No,
    }
}

/// Replaces RSP as a register operand; the outcome is what replaces it, `None` inside where there is nothing to do.
fn replace_stack_pointer(
    native: &mut Instruction,
    free: &mut impl Iterator<Item = usize>,
) -> Option<Option<usize>> {
    const RSP: usize = Gpr::Rsp as usize;
    let mut with = None;
    for op in 0..native.op_count() {
        let r = native.op_register(op);
        if native.op_kind(op) != OpKind::Register || gpr_index(r) != Some(RSP) {
            continue;
        }
        let n = match with {
            Some(n) => n,
            None => free.next()?,
        };
        with = Some(n);
        native.set_op_register(op, sized(n, register_size(r))?);
    }
    Some(with)
}

/// General register `n` with `size` bytes.
fn sized(n: usize, size: usize) -> Option<Register> {
    let first = match size {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        _ => return None,
    };
    Some(first + n as u32)
}
