//! What a case executed, instruction by instruction, and which flags the manual leaves undefined at its end.

use doppel_x86::{Cpu, Gpr, Rflags};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, RflagsBits};

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
        self.unspecified |= self.undefined & i.rflags_read() != 0 || unspecified_result(&i, cpu);
        self.last = i;
    }

    /// It was executed, and raised no exception.
    pub fn end(&mut self) {
        if !may_leave_flags(&self.last) {
            self.undefined &= !self.last.rflags_modified();
        }
        self.undefined |= self.last.rflags_undefined();
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

/// With a count of zero these leave the flags alone.
fn may_leave_flags(i: &Instruction) -> bool {
    use Mnemonic::*;
    let shift = matches!(
        i.mnemonic(),
        Shl | Sal | Shr | Sar | Rol | Ror | Rcl | Rcr | Shld | Shrd
    );
    shift || i.has_rep_prefix() || i.has_repne_prefix()
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
