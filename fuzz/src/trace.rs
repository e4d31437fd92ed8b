//! What a case executed, instruction by instruction, and which flags the manual leaves undefined at its end.

use doppel_x86::{Cpu, Gpr, Rflags};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, RflagsBits};

const MXCSR_MASKS: u32 = 0x1f80;
const MXCSR_OM: u32 = 0x400;
const MXCSR_UM: u32 = 0x800;

/// Follows a case through the interpreter.
pub struct Trace<'a> {
    code: &'a [u8],
    rip: u64,
    /// What was executed, in order.
    pub codes: Vec<Code>,
    undefined: u32,
    last: Instruction,
    /// An instruction read what the manual leaves undefined: processors may differ from there on.
    pub unspecified: bool,
}

impl<'a> Trace<'a> {
    /// Of code that lies at `rip`.
    pub fn new(code: &'a [u8], rip: u64) -> Self {
        Trace {
            code,
            rip,
            codes: Vec::new(),
            undefined: 0,
            last: Instruction::default(),
            unspecified: false,
        }
    }

    /// Notes the instruction that the CPU is about to execute.
    pub fn begin(&mut self, cpu: &Cpu) {
        self.last = Instruction::default();
        let at = cpu.rip.wrapping_sub(self.rip) as usize;
        if at >= self.code.len() {
            return;
        }
        let i = Decoder::with_ip(64, &self.code[at..], cpu.rip, DecoderOptions::NONE).decode();
        if i.is_invalid() {
            return;
        }
        self.codes.push(i.code());
        self.unspecified |= self.undefined & i.rflags_read() != 0
            || unspecified_result(&i, cpu)
            || complex_half(&i) && cpu.fpu.mxcsr() & MXCSR_MASKS != MXCSR_MASKS
            || half(&i) && cpu.fpu.mxcsr() & MXCSR_UM == 0
            || scales(&i) && cpu.fpu.mxcsr() & MXCSR_OM == 0
            || moves_nothing(&i, cpu);
        self.last = i;
    }

    /// It led to `rip`, perhaps through an exception that is to return there.
    pub fn end(&mut self, rip: u64) {
        if rip == self.last.ip() {
            return;
        }
        let undefined = match tests_a_bit(&self.last) {
            true => 0,
            false => self.last.rflags_undefined(),
        };
        if !may_leave_flags(&self.last) {
            let i = &self.last;
            self.undefined &= !(i.rflags_written() | i.rflags_cleared() | i.rflags_set());
        }
        self.undefined |= undefined;
        if rotates_through_carry(&self.last) {
            self.undefined |= RflagsBits::OF;
        }
    }

    /// The arithmetic flags that nobody specifies now.
    pub fn undefined_flags(&self) -> u64 {
        let bits = [
            (RflagsBits::OF, Rflags::OF),
            (RflagsBits::SF, Rflags::SF),
            (RflagsBits::ZF, Rflags::ZF),
            (RflagsBits::AF, Rflags::AF),
            (RflagsBits::CF, Rflags::CF),
            (RflagsBits::PF, Rflags::PF),
        ];
        bits.iter()
            .filter(|(bit, _)| self.undefined & bit != 0)
            .fold(0, |all, (_, flag)| all | flag.bits())
    }
}

impl Trace<'_> {
    /// Which byte a page fault names is not specified: the instruction touches several addresses, or masks bytes out.
    pub fn vague_address(&self) -> bool {
        use Mnemonic::*;
        let masked = matches!(
            self.last.mnemonic(),
            Vmaskmovps
                | Vmaskmovpd
                | Vpmaskmovd
                | Vpmaskmovq
                | Maskmovq
                | Maskmovdqu
                | Vmaskmovdqu
                | Frstor
                | Fldenv
                | Fxrstor
                | Fxrstor64
        );
        masked || self.last.has_op_mask() || self.last.is_vsib()
    }

    /// A store of 80 bits that faults may have stored the first of them.
    pub fn stores_in_parts(&self) -> bool {
        self.last.code() == Code::Fstp_m80fp || self.last.code() == Code::Fbstp_m80bcd
    }

    /// A call that faults for its target may have stored the return address.
    pub fn calls(&self) -> bool {
        self.last.mnemonic() == Mnemonic::Call
    }

    /// The instruction may fault, but processors let it change TOP or the flags of MXCSR before that.
    pub fn changes_state_early(&self) -> bool {
        let i = &self.last;
        let stores = i.op_count() > 0 && i.op0_kind() != OpKind::Register;
        let mmx =
            (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
        mmx || stores && i.mnemonic() == Mnemonic::Vcvtps2ph
    }
}

/// With a count of zero these leave the flags alone.
fn may_leave_flags(i: &Instruction) -> bool {
    use Mnemonic::*;
    let shift = matches!(
        i.mnemonic(),
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd
    );
    shift || i.has_rep_prefix() || i.has_repne_prefix()
}

/// Every processor leaves the flags alone here that the manual calls undefined.
fn tests_a_bit(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(i.mnemonic(), Bt | Bts | Btr | Btc)
}

/// OF is undefined for all counts but 1, also for those that leave the operand as it is.
fn rotates_through_carry(i: &Instruction) -> bool {
    let by_one = i.op_count() == 2 && i.op1_kind() == OpKind::Immediate8 && i.immediate8() == 1;
    matches!(i.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) && !by_one
}

/// Products of complex half-precision numbers: this maker's processors do not raise the SIMD floating-point
/// exceptions of the second step.
fn complex_half(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(
        i.mnemonic(),
        Vfmaddcph
            | Vfcmaddcph
            | Vfmulcph
            | Vfcmulcph
            | Vfmaddcsh
            | Vfcmaddcsh
            | Vfmulcsh
            | Vfcmulcsh
    )
}

/// Half-precision results: whether one that is tiny and exact raises underflow cannot be asked of the processor without
/// unmasking it, which the interpreter does not do.
fn half(i: &Instruction) -> bool {
    i.mnemonic() == Mnemonic::Vcvtps2ph
        || i.cpuid_features()
            .contains(&iced_x86::CpuidFeature::AVX512_FP16)
}

/// An overflow that is not masked is precise where the result but for its exponent is, which nothing tells.
fn scales(i: &Instruction) -> bool {
    use Mnemonic::*;
    matches!(i.mnemonic(), Vscalefps | Vscalefpd | Vscalefss | Vscalefsd)
}

/// MASKMOV with a mask of zeros may or may not fault, nor is it said which bytes of another page count.
fn moves_nothing(i: &Instruction, cpu: &Cpu) -> bool {
    let n = match i.mnemonic() {
        Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu | Mnemonic::Maskmovq => {
            i.op2_register().number()
        }
        _ => return false,
    };
    if cpu.reg(Gpr::Rdi) & 0xfff > 0x1000 - 16 {
        return true;
    }
    let fpu = &cpu.fpu.bytes;
    let mask = if i.mnemonic() == Mnemonic::Maskmovq {
        let top = usize::from(fpu[3] >> 3 & 7);
        &fpu[32 + 16 * ((n + 8 - top) % 8)..][..8]
    } else {
        &fpu[160 + 16 * n..][..16]
    };
    mask.iter().all(|b| b & 0x80 == 0)
}

/// Shifts of 16 bits by more than 16.
fn unspecified_result(i: &Instruction, cpu: &Cpu) -> bool {
    use Mnemonic::*;
    let narrow = match i.op0_kind() {
        OpKind::Register => i.op0_register().size() == 2,
        _ => i.memory_size().size() == 2,
    };
    let count = match i.op_count() {
        3 if i.op2_kind() == OpKind::Register => cpu.reg(Gpr::Rcx),
        3 => i.immediate(2),
        _ => 0,
    };
    matches!(i.mnemonic(), Shld | Shrd) && narrow && count & 31 > 16
}
