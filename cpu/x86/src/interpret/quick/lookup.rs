//! Which function executes an instruction in a predecoded block, if any.

use iced_x86::{FlowControl, Instruction, MemorySize, Mnemonic, OpKind, Register};

use super::handlers::*;
use super::operand::Address;
use super::{Op, Run};
use crate::interpret::register::{gpr_index, register_size};

/// The functions for operands of 1, 2, 4 and 8 bytes.
type Sizes = [Run; 4];

macro_rules! sizes {
    ($f:ident $(, $o:ty)*) => {
        [$f::<$($o,)* 1>, $f::<$($o,)* 2>, $f::<$($o,)* 4>, $f::<$($o,)* 8>]
    };
}
macro_rules! conditions {
    ($f:ident $(, $s:literal)*) => {
        [
            $f::<0 $(, $s)*>, $f::<1 $(, $s)*>, $f::<2 $(, $s)*>, $f::<3 $(, $s)*>,
            $f::<4 $(, $s)*>, $f::<5 $(, $s)*>, $f::<6 $(, $s)*>, $f::<7 $(, $s)*>,
            $f::<8 $(, $s)*>, $f::<9 $(, $s)*>, $f::<10 $(, $s)*>, $f::<11 $(, $s)*>,
            $f::<12 $(, $s)*>, $f::<13 $(, $s)*>, $f::<14 $(, $s)*>, $f::<15 $(, $s)*>,
        ]
    };
}

/// The functions of a two-operand instruction by operand places.
struct Binary {
    rr: Sizes,
    ri: Sizes,
    rm: Sizes,
    mr: Sizes,
    mi: Sizes,
}

fn alu<O: Alu>() -> Binary {
    Binary {
        rr: sizes!(alu_rr, O),
        ri: sizes!(alu_ri, O),
        rm: sizes!(alu_rm, O),
        mr: sizes!(alu_mr, O),
        mi: sizes!(alu_mi, O),
    }
}

/// True where no instruction follows in the block.
pub(in crate::interpret) fn ends_block(i: &Instruction) -> bool {
    !matches!(
        i.flow_control(),
        FlowControl::Next | FlowControl::ConditionalBranch
    )
}

/// The instruction, resolved; it was decoded as if its block began at address 0.
pub(in crate::interpret) fn lookup(i: &Instruction) -> Option<Op> {
    if i.is_invalid() || i.has_lock_prefix() {
        return None;
    }
    let mut op = Op::none();
    op.begin = i.ip() as u8;
    op.end = i.next_ip() as u8;
    op.run = function(i, &mut op)?;
    Some(op)
}

fn function(i: &Instruction, op: &mut Op) -> Option<Run> {
    use Mnemonic as M;
    match i.mnemonic() {
        M::Add => binary(i, op, alu::<Add>()),
        M::Adc => binary(i, op, alu::<Adc>()),
        M::Sub => binary(i, op, alu::<Sub>()),
        M::Sbb => binary(i, op, alu::<Sbb>()),
        M::Cmp => binary(i, op, alu::<Cmp>()),
        M::And => binary(i, op, alu::<And>()),
        M::Or => binary(i, op, alu::<Or>()),
        M::Xor => binary(i, op, alu::<Xor>()),
        M::Test => binary(i, op, alu::<Test>()),
        M::Mov => binary(i, op, mov()),
        M::Inc => unary(i, op, sizes!(unary_r, Inc), sizes!(unary_m, Inc)),
        M::Dec => unary(i, op, sizes!(unary_r, Dec), sizes!(unary_m, Dec)),
        M::Neg => unary(i, op, sizes!(unary_r, Neg), sizes!(unary_m, Neg)),
        M::Not => unary(i, op, sizes!(unary_r, Not), sizes!(unary_m, Not)),
        M::Shl | M::Sal => shift(i, op, sizes!(shift_ri, Shl), sizes!(shift_rc, Shl)),
        M::Shr => shift(i, op, sizes!(shift_ri, Shr), sizes!(shift_rc, Shr)),
        M::Sar => shift(i, op, sizes!(shift_ri, Sar), sizes!(shift_rc, Sar)),
        M::Rol => shift(i, op, sizes!(shift_ri, Rol), sizes!(shift_rc, Rol)),
        M::Ror => shift(i, op, sizes!(shift_ri, Ror), sizes!(shift_rc, Ror)),
        // Makers differ.
        M::Movsxd if i.code() == iced_x86::Code::Movsxd_r16_rm16 => None,
        M::Movzx | M::Movsx | M::Movsxd => extension(i, op),
        M::Lea => lea_function(i, op),
        M::Imul => multiplication(i, op),
        M::Xchg => exchange(i, op),
        M::Bt => bit_function(i, op),
        M::Push | M::Pop => stack(i, op),
        M::Call | M::Jmp | M::Ret => transfer(i, op),
        M::Cdqe => Some(widen::<8>),
        M::Cwde => Some(widen::<4>),
        M::Cbw => Some(widen::<2>),
        M::Cqo => Some(spread_sign::<8>),
        M::Cdq => Some(spread_sign::<4>),
        M::Cwd => Some(spread_sign::<2>),
        M::Leave if i.op_count() == 0 && i.code() == iced_x86::Code::Leaveq => Some(leave),
        M::Nop | M::Endbr64 => Some(nop),
        _ => conditional(i, op),
    }
}

fn mov() -> Binary {
    Binary {
        rr: sizes!(mov_rr),
        ri: sizes!(mov_ri),
        rm: sizes!(mov_rm),
        mr: sizes!(mov_mr),
        mi: sizes!(mov_mi),
    }
}

/// Which of the functions for 1, 2, 4 and 8 bytes.
fn sized(functions: Sizes, size: usize) -> Option<Run> {
    let n = [1, 2, 4, 8].iter().position(|s| *s == size)?;
    Some(functions[n])
}

/// The number of the general register that operand `n` is, and its size; the second bytes of registers are left out.
fn general(i: &Instruction, n: u32) -> Option<(u8, usize)> {
    let r = i.op_register(n);
    let high = matches!(r, Register::AH | Register::BH | Register::CH | Register::DH);
    if i.op_kind(n) != OpKind::Register || high {
        return None;
    }
    Some((gpr_index(r)? as u8, register_size(r)))
}

fn is_memory(i: &Instruction, n: u32) -> bool {
    i.op_kind(n) == OpKind::Memory
}

fn immediate(i: &Instruction, n: u32) -> Option<i64> {
    i.try_immediate(n).ok().map(|v| v as i64)
}

/// Resolves how the memory operand's address is made; `None` for the rare kinds.
fn address(i: &Instruction, op: &mut Op) -> Option<()> {
    let (base, index) = (i.memory_base(), i.memory_index());
    let full = |r: Register| r == Register::None || r == Register::RIP || r.is_gpr64();
    let short = base == Register::None && index == Register::None && i.memory_displ_size() != 8;
    // An absolute address is shorter than 8 bytes after an address-size prefix.
    if !full(base) || !full(index) || short {
        return None;
    }
    op.displacement = i.memory_displacement64() as i64;
    op.base = gpr_index(base).unwrap_or(0) as u8;
    op.index = gpr_index(index).unwrap_or(0) as u8;
    op.shift = i.memory_index_scale().trailing_zeros() as u8;
    let (based, indexed) = (base != Register::None, index != Register::None);
    op.address = match (i.segment_prefix(), based, indexed) {
        (Register::FS | Register::GS, _, true) => return None,
        (Register::FS | Register::GS, ..) if base == Register::RIP => return None,
        (Register::FS, false, _) => Address::Fs,
        (Register::FS, true, _) => Address::FsBase,
        (Register::GS, false, _) => Address::Gs,
        (Register::GS, true, _) => Address::GsBase,
        _ if base == Register::RIP => Address::Rip,
        (_, true, false) => Address::Base,
        (_, true, true) => Address::BaseIndex,
        (_, false, true) => Address::Index,
        (_, false, false) => Address::Absolute,
    };
    Some(())
}

fn binary(i: &Instruction, op: &mut Op, f: Binary) -> Option<Run> {
    if let Some((target, size)) = general(i, 0) {
        op.target = target;
        if let Some((source, _)) = general(i, 1) {
            op.source = source;
            return sized(f.rr, size);
        }
        if is_memory(i, 1) {
            address(i, op)?;
            return sized(f.rm, size);
        }
        op.immediate = immediate(i, 1)?;
        return sized(f.ri, size);
    }
    if !is_memory(i, 0) {
        return None;
    }
    address(i, op)?;
    if let Some((source, size)) = general(i, 1) {
        op.source = source;
        return sized(f.mr, size);
    }
    op.immediate = immediate(i, 1)?;
    sized(f.mi, i.memory_size().size())
}

fn unary(i: &Instruction, op: &mut Op, r: Sizes, m: Sizes) -> Option<Run> {
    if let Some((target, size)) = general(i, 0) {
        op.target = target;
        return sized(r, size);
    }
    if !is_memory(i, 0) {
        return None;
    }
    address(i, op)?;
    sized(m, i.memory_size().size())
}

fn shift(i: &Instruction, op: &mut Op, by_immediate: Sizes, by_cl: Sizes) -> Option<Run> {
    let (target, size) = general(i, 0)?;
    op.target = target;
    if i.op1_kind() == OpKind::Register {
        return sized(by_cl, size);
    }
    op.immediate = immediate(i, 1)?;
    sized(by_immediate, size)
}

macro_rules! extensions {
    ($f:ident, $key:expr) => {
        match $key {
            (1, 2, false) => $f::<1, 2, false> as Run,
            (1, 4, false) => $f::<1, 4, false>,
            (1, 8, false) => $f::<1, 8, false>,
            (2, 4, false) => $f::<2, 4, false>,
            (2, 8, false) => $f::<2, 8, false>,
            (1, 2, true) => $f::<1, 2, true>,
            (1, 4, true) => $f::<1, 4, true>,
            (1, 8, true) => $f::<1, 8, true>,
            (2, 4, true) => $f::<2, 4, true>,
            (2, 8, true) => $f::<2, 8, true>,
            (4, 8, true) => $f::<4, 8, true>,
            _ => return None,
        }
    };
}

fn extension(i: &Instruction, op: &mut Op) -> Option<Run> {
    let (target, to) = general(i, 0)?;
    let signed = i.mnemonic() != Mnemonic::Movzx;
    op.target = target;
    if let Some((source, from)) = general(i, 1) {
        op.source = source;
        return Some(extensions!(extend_rr, (from, to, signed)));
    }
    if !is_memory(i, 1) {
        return None;
    }
    address(i, op)?;
    Some(extensions!(extend_rm, (i.memory_size().size(), to, signed)))
}

fn lea_function(i: &Instruction, op: &mut Op) -> Option<Run> {
    let (target, size) = general(i, 0)?;
    op.target = target;
    address(i, op)?;
    sized(sizes!(lea), size)
}

/// The forms with two and three operands.
fn multiplication(i: &Instruction, op: &mut Op) -> Option<Run> {
    let (target, size) = general(i, 0)?;
    op.target = target;
    match i.op_count() {
        2 if is_memory(i, 1) => {
            address(i, op)?;
            sized(sizes!(imul_rm), size)
        }
        2 => {
            op.source = general(i, 1)?.0;
            sized(sizes!(imul_rr), size)
        }
        3 if !is_memory(i, 1) => {
            op.source = general(i, 1)?.0;
            op.immediate = immediate(i, 2)?;
            sized(sizes!(imul_rri), size)
        }
        _ => None,
    }
}

fn exchange(i: &Instruction, op: &mut Op) -> Option<Run> {
    let (target, size) = general(i, 0)?;
    op.target = target;
    op.source = general(i, 1)?.0;
    sized(sizes!(xchg_rr), size)
}

fn bit_function(i: &Instruction, op: &mut Op) -> Option<Run> {
    let (target, size) = general(i, 0)?;
    op.target = target;
    if let Some((source, _)) = general(i, 1) {
        op.source = source;
        return sized(sizes!(bt_rr), size);
    }
    op.immediate = immediate(i, 1)?;
    sized(sizes!(bt_ri), size)
}

/// PUSH and POP of 64 bits.
fn stack(i: &Instruction, op: &mut Op) -> Option<Run> {
    let pushes = i.mnemonic() == Mnemonic::Push;
    if let Some((target, 8)) = general(i, 0) {
        op.target = target;
        return Some(if pushes { push_r } else { pop_r });
    }
    let full = i.stack_pointer_increment() == -8;
    if !pushes || !full {
        return None;
    }
    op.immediate = immediate(i, 0)?;
    Some(push_i)
}

/// Near JMP, CALL and RET of 64 bits.
fn transfer(i: &Instruction, op: &mut Op) -> Option<Run> {
    use iced_x86::Code;
    let code = i.code();
    if code == Code::Retnq {
        return Some(ret);
    }
    let calls = code.is_call_near() || code.is_call_near_indirect();
    let jumps = code.is_jmp_short_or_near() || code.is_jmp_near_indirect();
    if !calls && !jumps {
        return None;
    }
    if i.op0_kind() == OpKind::NearBranch64 {
        op.immediate = i.near_branch64() as i64;
        return Some(if calls { call } else { jmp });
    }
    if let Some((target, 8)) = general(i, 0) {
        op.target = target;
        return Some(if calls { call_r } else { jmp_r });
    }
    if !is_memory(i, 0) || i.memory_size() != MemorySize::QwordOffset {
        return None;
    }
    address(i, op)?;
    Some(if calls { call_m } else { jmp_m })
}

/// Jcc, SETcc and CMOVcc.
fn conditional(i: &Instruction, op: &mut Op) -> Option<Run> {
    let cc = (i.condition_code() as usize).checked_sub(1)?;
    let code = i.code();
    if code.is_jcc_short_or_near() && i.op0_kind() == OpKind::NearBranch64 {
        op.immediate = i.near_branch64() as i64;
        return Some(conditions!(jcc)[cc]);
    }
    if is_setcc(i.mnemonic()) {
        let m = sizes_of(conditions!(set_m)[cc]);
        return unary(i, op, sizes_of(conditions!(set_r)[cc]), m);
    }
    if !is_cmovcc(i.mnemonic()) {
        return None;
    }
    let (target, size) = general(i, 0)?;
    op.target = target;
    if let Some((source, _)) = general(i, 1) {
        op.source = source;
        return match size {
            4 => Some(conditions!(cmov_rr, 4)[cc]),
            8 => Some(conditions!(cmov_rr, 8)[cc]),
            _ => None,
        };
    }
    address(i, op)?;
    match size {
        4 => Some(conditions!(cmov_rm, 4)[cc]),
        8 => Some(conditions!(cmov_rm, 8)[cc]),
        _ => None,
    }
}

/// A function whose operand always has one byte.
fn sizes_of(f: Run) -> Sizes {
    [f; 4]
}

fn is_setcc(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Seto | Setno
            | Setb
            | Setae
            | Sete
            | Setne
            | Setbe
            | Seta
            | Sets
            | Setns
            | Setp
            | Setnp
            | Setl
            | Setge
            | Setle
            | Setg
    )
}

fn is_cmovcc(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        m,
        Cmovo
            | Cmovno
            | Cmovb
            | Cmovae
            | Cmove
            | Cmovne
            | Cmovbe
            | Cmova
            | Cmovs
            | Cmovns
            | Cmovp
            | Cmovnp
            | Cmovl
            | Cmovge
            | Cmovle
            | Cmovg
    )
}
