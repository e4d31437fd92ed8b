//! From guest memory to a list of decoded instructions: one block.
//!
//! A block begins anywhere, goes on after a conditional branch forwards that is not taken, ends at the first other instruction that
//! changes the control flow or that the monitor must execute, and never leaves its page. Instructions are decoded as if the page began at address 0, so that branch targets and RIP-relative addresses come out
//! relative to the page: that makes a block independent of where the guest maps it.

use iced_x86::{
    Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory,
    Mnemonic, OpAccess, OpKind, Register,
};

use doppel_memory::Privilege;

use crate::engine::TranslateOptions;
use crate::flags::{ALL, FlagSet, FlagUse};
use crate::narrow::{Mode, Widened, widen};
use crate::ordinary;
use crate::rewrite::{Reference, constant_move, reference};

/// Which instructions the guest's control registers let run: a part of a block's key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Simd {
    #[default]
    None,
    Sse,
    Avx,
    Avx512,
}

/// What decoding depends on besides the bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Decoding {
    pub simd: Simd,
    pub mode: Mode,
    /// CPL 3.
    pub user: bool,
    pub flag_liveness: bool,
    pub inline_system: bool,
    pub inline_strings: bool,
    pub inline_xsave: bool,
    pub yield_spins: bool,
    /// Go on after a conditional branch forwards.
    pub extend: bool,
}

impl Decoding {
    /// For code that runs with this vector state and at this [`Privilege`].
    pub fn new(simd: Simd, mode: Mode, privilege: u8, options: &TranslateOptions) -> Self {
        Decoding {
            simd,
            mode,
            user: privilege == Privilege::User as u8,
            flag_liveness: options.flag_liveness,
            inline_system: options.inline_system,
            inline_strings: options.inline_strings,
            inline_xsave: options.inline_xsave,
            yield_spins: options.yield_spins,
            extend: options.extend,
        }
    }
}

/// How the translator treats an instruction.
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
    /// The monitor's interpreter executes it; ends the block.
    Interpret,
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
    fn of(info: &mut InstructionInfoFactory, i: &Instruction, how: Decoding) -> Self {
        ordinary::of(i).unwrap_or_else(|| Facts::of_any(info, i, how))
    }

    /// Of what only the interpreter can execute.
    fn interpreted(info: &mut InstructionInfoFactory, i: &Instruction) -> Self {
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

/// One guest instruction of a block.
#[derive(Clone, Debug)]
pub(crate) struct GuestInstruction {
    pub decoded: Instruction,
    /// Offset in its page.
    pub offset: u16,
    pub class: Class,
    /// It uses x87 or vector registers, and is not left to the monitor.
    pub simd: bool,
    pub flags: FlagUse,
    /// General registers that it may write, a bit each.
    pub writes: u16,
    /// General registers that it names or uses, a bit each.
    pub uses: u16,
    pub live_before: FlagSet,
    pub live_after: FlagSet,
    /// Its memory access, where others off the same base may share its check.
    pub reference: Option<Reference>,
    /// General registers that it moves by a constant, and by how much.
    pub moves: (u16, i64),
    /// Bytes that a push, a pop or a near address has in its mode.
    pub word: u8,
    /// The host's bytes for it are not the guest's.
    pub encode: bool,
}

impl GuestInstruction {
    /// To be decoded in place: it is large, and the processor is slow to copy what was just written in pieces.
    fn blank() -> Self {
        GuestInstruction {
            decoded: Instruction::default(),
            offset: 0,
            class: Class::Nothing,
            simd: false,
            flags: FlagUse::default(),
            writes: 0,
            uses: 0,
            live_before: ALL,
            live_after: ALL,
            reference: None,
            moves: (0, 0),
            word: 8,
            encode: false,
        }
    }

    /// Fills in what is known of what was decoded.
    fn learn(&mut self, info: &mut InstructionInfoFactory, how: Decoding) {
        let narrow = how.mode.is_narrow();
        let widened = match narrow {
            true => widen(&mut self.decoded),
            false => Widened::Same,
        };
        let mut facts = match widened {
            Widened::None => Facts::interpreted(info, &self.decoded),
            _ => Facts::of(info, &self.decoded, how),
        };
        if narrow && accesses_code_segment(&self.decoded, facts.class) {
            facts = Facts::interpreted(info, &self.decoded);
        }
        self.word = (how.mode.bits() / 8) as u8;
        self.encode = widened == Widened::Changed;
        self.offset = self.decoded.ip() as u16;
        self.class = facts.class;
        self.simd = facts.simd;
        self.flags = facts.flags;
        self.writes = facts.writes;
        self.uses = facts.uses;
        self.reference = reference(self).filter(|_| how.mode != Mode::Segmented);
        self.moves = constant_move(self);
    }

    /// It is of 32-bit code.
    pub fn is_narrow(&self) -> bool {
        self.word == 4
    }

    /// True where the emitted code may leave to the monitor before the instruction is done.
    pub fn may_leave(&self) -> bool {
        match self.class {
            Class::Copy => !self.always_completes(),
            Class::Lea
            | Class::Nothing
            | Class::ReadSelector
            | Class::ReadControl
            | Class::DirectionFlag
            | Class::Rdpid
            | Class::Swapgs => false,
            _ => true,
        }
    }

    /// It touches general registers alone, and the processor raises no exception.
    fn always_completes(&self) -> bool {
        let d = &self.decoded;
        let divides = matches!(d.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
        !divides && !d.has_lock_prefix() && !self.simd
    }
}

/// A decoded block.
#[derive(Default)]
pub(crate) struct GuestBlock {
    pub instructions: Vec<GuestInstruction>,
    /// The bytes from the start of the block on.
    pub bytes: Vec<u8>,
    /// Offset of the start in its page.
    pub start: u16,
    /// Offset one past the end; may lie beyond the page where the only instruction straddles it.
    pub end: u16,
    /// The next instruction begins in this page and ends in the next.
    pub straddler_follows: bool,
    /// Some instruction that is not left to the monitor uses x87 or vector registers.
    pub simd: bool,
}

impl GuestBlock {
    /// True where the block writes memory in an instruction that must be atomic.
    pub fn is_atomic(&self) -> bool {
        self.instructions
            .iter()
            .any(|i| i.decoded.has_lock_prefix() || i.decoded.mnemonic() == Mnemonic::Xchg)
    }

    /// The bytes of one of its instructions.
    pub fn bytes_of(&self, i: &GuestInstruction) -> &[u8] {
        let from = usize::from(i.offset - self.start);
        &self.bytes[from..from + i.decoded.len()]
    }

    /// True where it may go on behind the first `len` bytes.
    pub fn ran_out(&self, len: usize) -> bool {
        let ended = self
            .instructions
            .last()
            .is_some_and(|last| last.class.ends_block());
        self.straddler_follows || (!ended && usize::from(self.end - self.start) == len)
    }

    /// Cuts the block after its first instruction.
    pub fn keep_first(&mut self, flag_liveness: bool) {
        self.instructions.truncate(1);
        if let Some(first) = self.instructions.first_mut() {
            self.end = first.offset + first.decoded.len() as u16;
            self.simd = first.simd;
            if first.class == Class::Sti {
                first.class = Class::Interpret;
            }
            first.live_after = ALL;
            if flag_liveness {
                first.live_before = first.flags.live_before(ALL);
            }
        }
        self.bytes.truncate(usize::from(self.end - self.start));
        self.straddler_follows = false;
    }
}

/// Instructions in a block at most.
const MOST_INSTRUCTIONS: usize = 48;

/// Bytes of guest code that a block can be made from at most.
pub(crate) const MOST_BYTES: usize = MOST_INSTRUCTIONS * 15;

/// Conditional branches that a block goes on after at most.
const MOST_SIDE_EXITS: usize = 4;

/// Decodes one block from `bytes`, which begin at `start` in the page and go to its end (or 15 bytes on, for
/// one instruction that straddles), or are [`MOST_BYTES`] at least. `None` where not even one instruction fits.
pub(crate) fn decode(
    info: &mut InstructionInfoFactory,
    bytes: &[u8],
    start: u16,
    how: Decoding,
) -> Option<GuestBlock> {
    let mut block = GuestBlock::default();
    block.decode(info, bytes, start, how).then_some(block)
}

impl GuestBlock {
    /// The same into a block that is done with, for its buffers; false where not even one instruction fits.
    pub fn decode(
        &mut self,
        info: &mut InstructionInfoFactory,
        bytes: &[u8],
        start: u16,
        how: Decoding,
    ) -> bool {
        self.instructions.clear();
        self.bytes.clear();
        (self.start, self.end, self.straddler_follows) = (start, start, false);
        let at = u64::from(start);
        let mut decoder = Decoder::with_ip(how.mode.bits(), bytes, at, DecoderOptions::NONE);
        let mut side_exits = 0;
        while self.instructions.len() < MOST_INSTRUCTIONS && decoder.can_decode() {
            self.instructions.push(GuestInstruction::blank());
            let Some(i) = self.instructions.last_mut() else {
                break;
            };
            decoder.decode_out(&mut i.decoded);
            if i.decoded.is_invalid() && decoder.last_error() == DecoderError::NoMoreBytes {
                self.instructions.pop();
                self.straddler_follows = true;
                break;
            }
            i.learn(info, how);
            self.end = i.decoded.next_ip() as u16;
            let goes_on = i.class == Class::Conditional && how.extend && forwards(&i.decoded);
            if goes_on && side_exits < MOST_SIDE_EXITS {
                side_exits += 1;
            } else if i.class.ends_block() {
                break;
            }
        }
        let Some(last) = self.instructions.last_mut() else {
            return false;
        };
        if last.class == Class::Sti {
            // Its shadow reaches into the next block: the interpreter knows how.
            last.class = Class::Interpret;
        }
        let len = usize::from(self.end - start);
        self.bytes.extend_from_slice(&bytes[..len]);
        self.simd = self.instructions.iter().any(|i| i.simd);
        if how.flag_liveness {
            liveness(&mut self.instructions);
        }
        true
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
    for r in memory.filter(|r| r.is_gpr()) {
        uses |= 1 << r.full_register().number();
    }
    for u in used
        .used_registers()
        .iter()
        .filter(|u| u.register().is_gpr())
    {
        let bit = 1 << u.register().full_register().number();
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

fn liveness(instructions: &mut [GuestInstruction]) {
    let mut live = ALL;
    for i in instructions.iter_mut().rev() {
        if i.class == Class::Conditional {
            live = ALL; // nobody knows of the other way
        }
        i.live_after = live;
        live = i.flags.live_before(live);
        i.live_before = live;
    }
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
    if how.mode.is_narrow() && i.code() == Code::Syscall {
        return Some(Class::Interpret);
    }
    match i.code() {
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
        Rdtsc => Class::Rdtsc,
        Serialize => Class::Serialize,
        Pause if how.yield_spins => Class::Pause,
        In | Out | Insb | Insw | Insd | Outsb | Outsw | Outsd => Class::Interpret,
        Movsb | Movsw | Movsd | Movsq | Stosb | Stosw | Stosd | Stosq | Lodsb | Lodsw | Lodsd
        | Lodsq | Scasb | Scasw | Scasd | Scasq | Cmpsb | Cmpsw | Cmpsd | Cmpsq
            if i.is_string_instruction() =>
        {
            repeated(i, how)
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

/// Saves and restores of the vector state as it is while translated code runs. (XSAVEOPT remembers where it was restored from, which
/// the monitor's own saves would mix up.)
fn extended_state(i: &Instruction, how: Decoding) -> Option<Class> {
    use Mnemonic::*;
    let write = match i.mnemonic() {
        Xsave | Xsave64 | Xsavec | Xsavec64 => true,
        Xrstor | Xrstor64 => false,
        _ => return None,
    };
    let inline = how.inline_xsave && how.mode == Mode::Long && how.simd >= Simd::Avx;
    inline.then_some(Class::ExtendedState { write })
}

fn repeated(i: &Instruction, how: Decoding) -> Option<Class> {
    let (size, source) = match i.code() {
        Code::Movsb_m8_m8 => (1, true),
        Code::Movsw_m16_m16 => (2, true),
        Code::Movsd_m32_m32 => (4, true),
        Code::Movsq_m64_m64 => (8, true),
        Code::Stosb_m8_AL => (1, false),
        Code::Stosw_m16_AX => (2, false),
        Code::Stosd_m32_EAX => (4, false),
        Code::Stosq_m64_RAX => (8, false),
        _ => return None,
    };
    let narrow = (0..i.op_count())
        .any(|op| matches!(i.op_kind(op), OpKind::MemoryESEDI | OpKind::MemorySegESI));
    let flat = how.mode != Mode::Segmented && narrow == how.mode.is_narrow();
    let plain = i.segment_prefix() == Register::None && !i.has_repne_prefix();
    (i.has_rep_prefix() && flat && plain).then_some(Class::Repeat { size, source })
}

fn bit_string(i: &Instruction, how: Decoding) -> Class {
    let based = matches!(i.memory_segment(), Register::FS | Register::GS);
    let segmented = how.mode == Mode::Segmented || how.mode == Mode::Flat && based;
    if segmented || how.mode == Mode::Long && short_addresses(i) {
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

/// Where it is not to be written, and perhaps not to be read.
fn accesses_code_segment(i: &Instruction, class: Class) -> bool {
    let accesses = has_memory(i) && !matches!(class, Class::Lea | Class::Nothing);
    accesses && i.memory_segment() == Register::CS
}

fn forwards(i: &Instruction) -> bool {
    i.near_branch64() as i64 > i.ip() as i64
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
