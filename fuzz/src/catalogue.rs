//! Which instructions are generated: all that user code may execute, but for those whose outcome is no function of
//! the state, or the host's and not the guest's by right. `tests/sensitive.rs` has the latter.

use doppel_x86::Cpu;
use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic, OpCodeOperandKind};

use crate::features::offered;

/// Every instruction form that is tested.
pub struct Catalogue {
    /// All of them.
    pub all: Vec<Code>,
    /// Those that compiled code is made of, for sequences.
    pub common: Vec<Code>,
    /// Those that may stand in the middle of a sequence.
    pub straight: Vec<Code>,
}

impl Catalogue {
    /// For a guest with this CPU.
    pub fn new(cpu: &Cpu) -> Self {
        let all: Vec<Code> = Code::values().filter(|c| tested(cpu, *c)).collect();
        let pick = |f: fn(Code) -> bool| all.iter().copied().filter(|c| f(*c)).collect();
        Catalogue {
            common: pick(|c| straight(c) && common(c)),
            straight: pick(straight),
            all,
        }
    }
}

fn tested(cpu: &Cpu, code: Code) -> bool {
    let op = code.op_code();
    op.is_instruction()
        && op.mode64()
        && why_not(code).is_none()
        && !matches!(op.encoding(), EncodingKind::MVEX | EncodingKind::D3NOW)
        && code.cpuid_features().iter().all(|f| offered(cpu, *f))
}

/// Why an instruction that user code may execute is not generated.
pub fn why_not(code: Code) -> Option<&'static str> {
    use Mnemonic::*;
    Some(match code.mnemonic() {
        Syscall | Sysenter | Sysret | Sysexit | Sysretq | Sysexitq => "enters the host's kernel",
        Rdtsc | Rdtscp | Rdpid | Rdpmc | Rdrand | Rdseed | Cpuid | Xgetbv => {
            "its result is not a function of the state"
        }
        Sgdt | Sidt | Sldt | Str | Smsw | Lar | Lsl | Verr | Verw => {
            "reads tables that the host's kernel has made"
        }
        Lss | Lfs | Lgs | Iret | Iretd | Iretq | Retf => {
            "loads segment registers from the host's tables"
        }
        Jmp | Call if is_far(code) => "loads segment registers from the host's tables",
        Mov | Pop if loads_segment(code) => "loads segment registers from the host's tables",
        Xsave | Xsave64 | Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64 | Xrstor | Xrstor64 => {
            "the host saves more than the guest has"
        }
        Fxsave | Fxsave64 | Fnsave | Fsave | Fnstenv | Fstenv => {
            "stores the address of the last x87 instruction"
        }
        Xbegin | Xabort | Xend | Xtest | Xsusldtrk | Xresldtrk => "transactions abort at will",
        Monitor | Mwait | Monitorx | Mwaitx | Umonitor | Umwait | Tpause => {
            "may wait, and for the host"
        }
        _ if code.cpuid_features().iter().any(hypervisor) => "may be the host's hypervisor's",
        Fstcw | Fstsw | Feni | Fdisi | Fclex | Finit | Fsetpm => {
            "an assembler's name for WAIT and another instruction"
        }
        Ud0 => "makers differ",
        // 0x66 before a branch: Intel's processors ignore it, AMD's do not.
        _ if narrow_branch(code) => "makers differ",
        Bswap if code == Code::Bswap_r16 => "undefined",
        _ => return None,
    })
}

fn hypervisor(f: &CpuidFeature) -> bool {
    matches!(
        f,
        CpuidFeature::VMX | CpuidFeature::SVM | CpuidFeature::SMX | CpuidFeature::TDX
    )
}

fn is_far(code: Code) -> bool {
    format!("{code:?}").contains("_m16") || format!("{code:?}").contains("_ptr")
}

fn loads_segment(code: Code) -> bool {
    use OpCodeOperandKind::*;
    let op = code.op_code();
    op.op_count() > 0 && matches!(op.op0_kind(), seg_reg | ds | es | ss | fs | gs)
}

fn narrow_branch(code: Code) -> bool {
    use OpCodeOperandKind::*;
    let op = code.op_code();
    let relative = op
        .op_kinds()
        .iter()
        .any(|k| matches!(k, br16_1 | br16_2 | br32_1 | br32_4));
    relative
        || matches!(
            code,
            Code::Jmp_rm16
                | Code::Jmp_rm32
                | Code::Call_rm16
                | Code::Call_rm32
                | Code::Retnw
                | Code::Retnw_imm16
        )
}

/// No branch, and nothing that always faults.
fn straight(code: Code) -> bool {
    use Mnemonic::*;
    let op = code.op_code();
    let branch = code.is_jcc_short_or_near()
        || code.is_jmp_short_or_near()
        || code.is_jmp_near_indirect()
        || code.is_call_near()
        || code.is_call_near_indirect()
        || code.is_loop()
        || code.is_loopcc()
        || code.is_jcx_short();
    let ends = matches!(
        code.mnemonic(),
        Ret | Int
            | Int3
            | Int1
            | Ud0
            | Ud1
            | Ud2
            | Hlt
            | In
            | Out
            | Insb
            | Insw
            | Insd
            | Outsb
            | Outsw
            | Outsd
            | Cli
            | Sti
            | Wrfsbase
            | Wrgsbase
    );
    !branch && !ends && !op.is_privileged()
}

fn common(code: Code) -> bool {
    use Mnemonic::*;
    matches!(
        code.mnemonic(),
        Mov | Movzx
            | Movsx
            | Movsxd
            | Lea
            | Add
            | Sub
            | Adc
            | Sbb
            | And
            | Or
            | Xor
            | Cmp
            | Test
            | Inc
            | Dec
            | Neg
            | Not
            | Shl
            | Shr
            | Sar
            | Rol
            | Ror
            | Rcl
            | Imul
            | Mul
            | Push
            | Pop
            | Xchg
            | Xadd
            | Cmpxchg
            | Cmpxchg16b
            | Bt
            | Bts
            | Btr
            | Sete
            | Setne
            | Setb
            | Setl
            | Seto
            | Setp
            | Cmove
            | Cmovne
            | Cmovb
            | Cmovle
            | Cmovo
            | Bswap
            | Cdq
            | Cqo
            | Cdqe
            | Movsb
            | Movsq
            | Stosb
            | Stosq
            | Lodsb
            | Scasb
            | Cmpsb
            | Movaps
            | Movups
            | Movdqa
            | Movdqu
            | Paddd
            | Pxor
            | Movd
            | Movq
            | Addsd
            | Mulss
            | Pushfq
            | Popfq
            | Lahf
            | Sahf
            | Cld
            | Std
            | Stc
            | Clc
            | Cmc
            | Leave
            | Enter
            | Xlatb
            | Adcx
            | Adox
            | Mulx
            | Shlx
            | Popcnt
            | Tzcnt
            | Movbe
    )
}
