//! What an instruction is to the translator: how it is emitted, which flags and registers it uses, whether it needs the vector state.
//!
//! Everything that names the machine's state and does not trap has to be found here (Popek and Goldberg's sensitive instructions); what is not
//! known for certain to be harmless is left to the monitor.

use iced_x86::{
    Code, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};

use crate::flags::{ALL, FlagUse};
use crate::frontend::{Decoding, Simd};
use crate::ordinary::{self, bit};

/// How the translator treats an instruction. Asked with `matches!` for each instruction: a comparison of two is a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Emitted as it is.
    Copy,
    /// One memory operand, which becomes a host address.
    Memory {
        size: u8,
        write: bool,
    },
    /// XSAVE, XSAVEC and XRSTOR.
    ExtendedState {
        write: bool,
    },
    /// Bit test with a register bit offset in memory: addresses beyond its operand.
    BitString,
    Lea,
    /// No effect that the guest could see (prefetches, long NOPs).
    Nothing,
    Push,
    Pop,
    Leave,
    Jump,
    JumpIndirect,
    Conditional,
    /// LOOP, LOOPcc, JRCXZ.
    Counted,
    Call,
    CallIndirect,
    Return,
    Swapgs,
    /// RDTSC, RDTSCP.
    Rdtsc,
    Rdpid,
    /// MOV from a segment register to a general one.
    ReadSelector,
    /// RDFSBASE and its kin.
    SegmentBase {
        segment: u8,
        write: bool,
    },
    Syscall,
    /// To 64-bit code.
    Sysret,
    /// IRETQ to user code.
    Iret,
    /// CLD and STD.
    DirectionFlag,
    /// MOV from CR2 or CR3.
    ReadControl,
    Serialize,
    /// PAUSE, of which the monitor is told now and then.
    Pause,
    Cli,
    Sti,
    /// STAC and CLAC: go on in the other mode's blocks.
    AlignmentFlag,
    Pushf,
    Popf,
    /// REP MOVS and REP STOS of elements of so many bytes.
    Repeat {
        size: u8,
        source: bool,
    },
    /// One element of so many bytes of a string.
    Element {
        size: u8,
        element: Element,
    },
    /// The monitor's interpreter executes it; ends the block.
    Interpret,
}

/// What is done with an element of a string.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Element {
    Load,
    Store,
    Scan,
    Move,
    Compare,
}

impl Class {
    pub fn ends_block(self) -> bool {
        use Class::*;
        matches!(
            self,
            Jump | JumpIndirect
                | Conditional
                | Counted
                | Call
                | CallIndirect
                | Return
                | AlignmentFlag
                | Syscall
                | Sysret
                | Iret
                | Interpret
        )
    }

    /// True where the emitted code destroys the host's flags before the instruction itself runs.
    pub fn checks(self) -> bool {
        use Class::*;
        matches!(
            self,
            Memory { .. }
                | BitString
                | ExtendedState { .. }
                | Push
                | Pop
                | Leave
                | JumpIndirect
                | Call
                | CallIndirect
                | Return
                | Rdtsc
                | Pause
                | SegmentBase { .. }
                | Syscall
                | Sysret
                | Iret
                | Cli
                | Sti
                | DirectionFlag
                | Pushf
                | Popf
                | Repeat { .. }
                | Element { .. }
        )
    }
}

/// What an instruction is to the translator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub class: Class,
    pub flags: FlagUse,
    /// General registers that it names or uses, a bit each.
    pub uses: u16,
    /// General registers that it may write.
    pub writes: u16,
    /// It uses x87 or vector registers, and is not left to the monitor.
    pub simd: bool,
}

impl Facts {
    pub fn of(info: &mut InstructionInfoFactory, i: &Instruction, how: Decoding) -> Self {
        ordinary::of(i).unwrap_or_else(|| Facts::of_any(info, i, how))
    }

    /// Of what only the interpreter can execute.
    pub fn interpreted(info: &mut InstructionInfoFactory, i: &Instruction) -> Self {
        let (uses, writes) = registers(info, i);
        let class = Class::Interpret;
        Facts {
            class,
            flags: flag_use(i, class),
            uses,
            writes,
            simd: false,
        }
    }

    /// Without a look at the table of what is ordinary.
    pub fn of_any(info: &mut InstructionInfoFactory, i: &Instruction, how: Decoding) -> Self {
        let class = match i.is_invalid() {
            true => Class::Interpret,
            false => classify(info, i, how),
        };
        let (uses, writes) = registers(info, i);
        Facts {
            class,
            flags: flag_use(i, class),
            uses,
            writes,
            simd: uses_simd(i, class),
        }
    }
}

/// What leaves to the monitor, or stores RFLAGS, shows all flags as they are.
fn flag_use(i: &Instruction, class: Class) -> FlagUse {
    match class {
        Class::Interpret | Class::Syscall | Class::Iret | Class::Pushf => FlagUse {
            reads: ALL,
            ..FlagUse::default()
        },
        _ => FlagUse::of(i),
    }
}

/// The general registers that an instruction uses, and those of them that it may write.
fn registers(info: &mut InstructionInfoFactory, i: &Instruction) -> (u16, u16) {
    let used = info.info(i);
    let (mut uses, mut writes) = (0, 0);
    let memory = used
        .used_memory()
        .iter()
        .flat_map(|m| [m.base(), m.index()]);
    for r in memory {
        uses |= bit(r);
    }
    for u in used.used_registers() {
        let bit = bit(u.register());
        uses |= bit;
        let reads = matches!(
            u.access(),
            OpAccess::None | OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess
        );
        if !reads {
            writes |= bit;
        }
    }
    (uses, writes)
}

fn classify(info: &mut InstructionInfoFactory, i: &Instruction, how: Decoding) -> Class {
    if let Some(class) = inline_system(i, how) {
        return class;
    }
    if i.flow_control() != FlowControl::Next {
        return classify_branch(i);
    }
    if i.is_privileged() {
        return Class::Interpret;
    }
    if let Some(class) = extended_state(i, how) {
        return class;
    }
    match special(i, how) {
        Some(class) => class,
        // The host may have them. Where no guest does, they are no guest's.
        None if !doppel_x86::may_be_offered(i) => Class::Interpret,
        None if simd_needed(i) > how.simd => Class::Interpret,
        None => classify_operands(info, i),
    }
}

fn classify_branch(i: &Instruction) -> Class {
    match i.code() {
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => Class::Jump,
        Code::Call_rel32_64 => Class::Call,
        Code::Jmp_rm64 => Class::JumpIndirect,
        Code::Call_rm64 => Class::CallIndirect,
        Code::Retnq | Code::Retnq_imm16 => Class::Return,
        Code::Jrcxz_rel8_64
        | Code::Jecxz_rel8_64
        | Code::Loop_rel8_64_RCX
        | Code::Loop_rel8_64_ECX
        | Code::Loope_rel8_64_RCX
        | Code::Loope_rel8_64_ECX
        | Code::Loopne_rel8_64_RCX
        | Code::Loopne_rel8_64_ECX => Class::Counted,
        _ if i.flow_control() == FlowControl::ConditionalBranch
            && i.op0_kind() == OpKind::NearBranch64
            && i.is_jcc_short_or_near() =>
        {
            Class::Conditional
        }
        _ => Class::Interpret,
    }
}

/// Sensitive instructions that are frequent enough in kernels to be emitted as code on the virtual state.
fn inline_system(i: &Instruction, how: Decoding) -> Option<Class> {
    if !how.inline_system {
        return None;
    }
    if (how.mode.is_narrow() || !how.inline_syscall) && i.code() == Code::Syscall {
        return Some(Class::Interpret);
    }
    match i.code() {
        // Virtual-8086 mode asks for IOPL.
        Code::Pushfq if how.user && how.mode.paragraphs => return Some(Class::Interpret),
        Code::Pushfq => return Some(Class::Pushf),
        Code::Syscall => return Some(Class::Syscall),
        Code::Rdpid_r64 => return Some(Class::Rdpid),
        Code::Cld | Code::Std => return Some(Class::DirectionFlag),
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg
            if i.op0_kind() == OpKind::Register =>
        {
            return Some(Class::ReadSelector);
        }
        Code::Rdfsbase_r32 | Code::Rdfsbase_r64 => return Some(segment_base(4, false)),
        Code::Rdgsbase_r32 | Code::Rdgsbase_r64 => return Some(segment_base(5, false)),
        Code::Wrfsbase_r32 | Code::Wrfsbase_r64 => return Some(segment_base(4, true)),
        Code::Wrgsbase_r32 | Code::Wrgsbase_r64 => return Some(segment_base(5, true)),
        _ if how.user => return None,
        _ => {}
    }
    match i.code() {
        Code::Swapgs => Some(Class::Swapgs),
        Code::Sysretq => Some(Class::Sysret),
        Code::Iretq => Some(Class::Iret),
        Code::Cli => Some(Class::Cli),
        Code::Sti => Some(Class::Sti),
        Code::Clac | Code::Stac => Some(Class::AlignmentFlag),
        Code::Popfq => Some(Class::Popf),
        Code::Mov_r64_cr if matches!(i.op1_register(), Register::CR2 | Register::CR3) => {
            Some(Class::ReadControl)
        }
        _ => None,
    }
}

fn segment_base(segment: u8, write: bool) -> Class {
    Class::SegmentBase { segment, write }
}

/// Instructions with a treatment of their own; above all those that name the machine's state, which x86-64
/// either traps (privileged) or, worse, does not.
fn special(i: &Instruction, how: Decoding) -> Option<Class> {
    use Mnemonic::*;
    Some(match i.mnemonic() {
        Popf | Popfd | Popfq | Pushf | Pushfd | Pushfq | Cli | Sti | Cld | Std | Clac | Stac => {
            Class::Interpret
        }
        Rdtscp if how.inline_system => Class::Rdtsc,
        Sgdt | Sidt | Sldt | Str | Smsw | Lar | Lsl | Verr | Verw | Cpuid | Rdtscp | Rdpid
        | Rdpmc | Xgetbv | Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase | Rdpkru | Wrpkru => {
            Class::Interpret
        }
        // Of registers 8 to 15 too, as the host executes them.
        Vzeroall | Vzeroupper if how.mode.is_narrow() => Class::Interpret,
        Rdtsc => Class::Rdtsc,
        Serialize => Class::Serialize,
        Pause if how.yield_spins => Class::Pause,
        In | Out | Insb | Insw | Insd | Outsb | Outsw | Outsd => Class::Interpret,
        Movsb | Movsw | Movsd | Movsq | Stosb | Stosw | Stosd | Stosq | Lodsb | Lodsw | Lodsd
        | Lodsq | Scasb | Scasw | Scasd | Scasq | Cmpsb | Cmpsw | Cmpsd | Cmpsq
            if i.is_string_instruction() =>
        {
            string(i, how)
                .filter(|_| how.inline_strings)
                .unwrap_or(Class::Interpret)
        }
        Xsave | Xsave64 | Xsaveopt | Xsaveopt64 | Xsavec | Xsavec64 | Xsaves | Xsaves64
        | Xrstor | Xrstor64 | Xrstors | Xrstors64 | Fxsave | Fxsave64 | Fxrstor | Fxrstor64
        | Fnsave | Fsave | Frstor | Fnstenv | Fstenv | Fldenv => Class::Interpret,
        Xlatb | Maskmovq | Maskmovdqu | Vmaskmovdqu | Vmaskmovps | Vmaskmovpd | Vpmaskmovd
        | Vpmaskmovq | Enter | Bound | Into | Lds | Les | Lfs | Lgs | Lss | Clzero | Rdsspd
        | Rdsspq | Incsspd | Incsspq | Xbegin | Xend | Xabort | Xtest | Monitor | Mwait
        | Monitorx | Mwaitx | Umonitor | Umwait | Tpause | Ptwrite | Movdir64b | Enqcmd
        | Enqcmds => Class::Interpret,
        Lea => Class::Lea,
        // AMD's processors load 32 bits, Intel's 16.
        Movsxd if i.code() == Code::Movsxd_r16_rm16 && has_memory(i) => Class::Interpret,
        // With a register 0F 0D is nothing on Intel's processors, undefined on AMD's.
        Reservednop if is_prefetch_of_register(i) => Class::Interpret,
        Prefetch | Prefetchw | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetchnta | Prefetchwt1
        | Prefetchit0 | Prefetchit1 | Reservednop => Class::Nothing,
        Nop | Cldemote if has_memory(i) => Class::Nothing,
        Leave if i.code() == Code::Leaveq => Class::Leave,
        Leave => Class::Interpret,
        Push => classify_push(i),
        Pop => classify_pop(i),
        Bt | Bts | Btr | Btc
            if i.op0_kind() == OpKind::Memory && i.op1_kind() == OpKind::Register =>
        {
            bit_string(i, how)
        }
        _ => return None,
    })
}

fn is_prefetch_of_register(i: &Instruction) -> bool {
    matches!(
        i.code(),
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    )
}

/// Saves and restores of the vector state as it is while translated code runs. (XSAVEOPT remembers where it was restored from, which
/// the monitor's own saves would mix up.)
fn extended_state(i: &Instruction, how: Decoding) -> Option<Class> {
    use Mnemonic::*;
    let write = match i.mnemonic() {
        Xsave | Xsave64 | Xsavec | Xsavec64 => true,
        Xrstor | Xrstor64 => false,
        _ => return None,
    };
    let inline = how.inline_xsave && !how.mode.is_narrow() && how.simd >= Simd::Avx;
    inline.then_some(Class::ExtendedState { write })
}

/// A string instruction at addresses of the mode's width in flat segments, or at any outside of 64-bit mode in others. Of the repeated ones, those that
/// move and store.
fn string(i: &Instruction, how: Decoding) -> Option<Class> {
    use Mnemonic::*;
    let element = match i.mnemonic() {
        Lodsb | Lodsw | Lodsd | Lodsq => Element::Load,
        Stosb | Stosw | Stosd | Stosq => Element::Store,
        Scasb | Scasw | Scasd | Scasq => Element::Scan,
        Movsb | Movsw | Movsd | Movsq => Element::Move,
        _ => Element::Compare,
    };
    let narrow = (0..i.op_count())
        .any(|op| matches!(i.op_kind(op), OpKind::MemoryESEDI | OpKind::MemorySegESI));
    let segmented = how.mode.is_narrow() && !how.mode.flat;
    let plain = narrow == how.mode.is_narrow() && i.segment_prefix() == Register::None;
    if !segmented && !plain {
        return None;
    }
    let size = i.memory_size().size() as u8;
    match (i.has_rep_prefix(), i.has_repne_prefix(), element) {
        (false, false, _) => Some(Class::Element { size, element }),
        (true, false, Element::Move) => Some(Class::Repeat { size, source: true }),
        (true, false, Element::Store) => Some(Class::Repeat {
            size,
            source: false,
        }),
        _ => None,
    }
}

fn bit_string(i: &Instruction, how: Decoding) -> Class {
    let based = matches!(i.memory_segment(), Register::FS | Register::GS);
    let segmented = how.mode.is_narrow() && (!how.mode.flat || based);
    if segmented || !how.mode.is_narrow() && short_addresses(i) {
        Class::Interpret
    } else {
        Class::BitString
    }
}

/// True where addresses are computed in 32 bits.
fn short_addresses(i: &Instruction) -> bool {
    match (i.memory_base(), i.memory_index()) {
        (Register::None, Register::None) => i.memory_displ_size() != 8,
        (Register::None, register) | (register, _) => register.size() != 8,
    }
}

fn classify_push(i: &Instruction) -> Class {
    match i.code() {
        Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 | Code::Push_rm64 => Class::Push,
        _ => Class::Interpret,
    }
}

fn classify_pop(i: &Instruction) -> Class {
    match i.code() {
        Code::Pop_r64 => Class::Pop,
        Code::Pop_rm64 if i.op0_kind() == OpKind::Register => Class::Pop,
        _ => Class::Interpret,
    }
}

pub(crate) fn has_memory(i: &Instruction) -> bool {
    (0..i.op_count()).any(|op| i.op_kind(op) == OpKind::Memory)
}

fn uses_simd(i: &Instruction, class: Class) -> bool {
    match class {
        Class::Copy | Class::Memory { .. } => simd_needed(i) != Simd::None,
        Class::ExtendedState { .. } => true,
        _ => false,
    }
}

fn simd_needed(i: &Instruction) -> Simd {
    use iced_x86::{CpuidFeature, EncodingKind};
    // It is as old as the processor, but looks at CR0.TS as the coprocessor's own instructions do.
    if i.mnemonic() == Mnemonic::Wait {
        return Simd::Sse;
    }
    match i.encoding() {
        EncodingKind::EVEX | EncodingKind::MVEX => Simd::Avx512,
        EncodingKind::VEX | EncodingKind::XOP => {
            let general = i.cpuid_features().iter().all(|f| {
                matches!(
                    f,
                    CpuidFeature::BMI1 | CpuidFeature::BMI2 | CpuidFeature::TBM | CpuidFeature::LWP
                )
            });
            if general {
                Simd::None
            } else if i.cpuid_features().iter().any(|f| is_avx512(*f)) {
                Simd::Avx512
            } else {
                Simd::Avx
            }
        }
        _ if i.cpuid_features().iter().all(|f| general_feature(*f)) => Simd::None,
        _ => Simd::Sse,
    }
}

fn is_avx512(f: iced_x86::CpuidFeature) -> bool {
    use iced_x86::CpuidFeature::*;
    matches!(f, AVX512F | AVX512BW | AVX512DQ | AVX512VL | AVX512CD)
}

/// Features of instructions that touch neither x87 nor vector registers.
fn general_feature(f: iced_x86::CpuidFeature) -> bool {
    use iced_x86::CpuidFeature::*;
    matches!(
        f,
        INTEL8086
            | INTEL186
            | INTEL286
            | INTEL386
            | INTEL486
            | X64
            | CMOV
            | BMI1
            | BMI2
            | POPCNT
            | LZCNT
            | ADX
            | MOVBE
            | CX8
            | CMPXCHG16B
            | RDRAND
            | RDSEED
            | CLFSH
            | CLFLUSHOPT
            | CLWB
            | PAUSE
            | MULTIBYTENOP
            | CET_IBT
            | SMAP
            | TSC
            | FSGSBASE
            | RDPID
            | RDTSCP
            | MOVDIRI
            | SERIALIZE
            | WBNOINVD
            | PREFETCHW
            | MSR
            | CPUID
    )
}

fn classify_operands(info: &mut InstructionInfoFactory, i: &Instruction) -> Class {
    let forbidden = (0..i.op_count()).any(|op| {
        i.op_kind(op) == OpKind::Register && {
            let r = i.op_register(op);
            r.is_segment_register()
                || r.is_cr()
                || r.is_dr()
                || r.is_tr()
                || r.is_bnd()
                || r.is_tmm()
        }
    });
    if forbidden || i.is_vsib() || i.is_stack_instruction() {
        return Class::Interpret;
    }
    let used = info.info(i);
    match used.used_memory() {
        [] => Class::Copy,
        [one] if has_memory(i) => {
            let write = matches!(
                one.access(),
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            );
            let size = i.memory_size().size();
            if size == 0 || size > 64 || two_scratch_operands(i) {
                return Class::Interpret;
            }
            Class::Memory {
                size: size as u8,
                write,
            }
        }
        _ => Class::Interpret,
    }
}

/// Both r10 and r11 as operands beside a memory operand: there is no scratch register left.
fn two_scratch_operands(i: &Instruction) -> bool {
    let uses = |r| {
        (0..i.op_count())
            .any(|op| i.op_kind(op) == OpKind::Register && i.op_register(op).full_register() == r)
    };
    uses(Register::R10) && uses(Register::R11)
}
