//! One TLB check for several accesses.
//!
//! Problem: compiled code touches memory in runs off one base: a frame off RSP, a structure off a pointer, the pushes of a prologue. A
//! check for each costs more than the accesses.
//! Idea: the first access of a run checks the whole stretch from the lowest to the highest byte that the run will touch, for
//! writing if any of them writes, and leaves the host address in S0; the others use `[S0 + displacement]` and need neither check
//! nor flags. A base that moves by a constant (`push`, `add rsp, 8`) is followed.
//! Invariant: S0 is the host address of the run's root plus `at` as long as `run` says so; nothing between the accesses of
//! a run can change a mapping, since nothing between them leaves the block.
//! Where the stretch does not lie within one page, or may be read but not written, the block goes on in a translation of its
//! own from that instruction on ([`Form::Careful`](crate::blocks::Form::Careful)), in which each access has its check: it faults where the guest's instruction faults, and
//! marks as dirty what the guest writes. The check's slow path is patched to go there at once from then on.
//! Cost: a careful twin for the blocks that need one. Gain: see docs/translate.md.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::{RSP, S0};
use crate::frontend::{Class, GuestInstruction};
use crate::ordinary::bit;

/// Bytes that a run may stretch over: the longer, the more often it does not fit into a page.
pub(super) const LONGEST: i64 = 1024;

/// What an address is made of, apart from the displacement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Root {
    /// Base, index, scale and segment, a byte each, for a comparison in one go.
    parts: u32,
    /// The general registers among them, a bit each.
    registers: u16,
}

/// One access relative to a root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reference {
    pub root: Root,
    pub disp: i64,
    pub size: u16,
    pub write: bool,
}

/// What S0 reaches.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    root: Root,
    /// How far the root has moved since S0 was worked out.
    moved: i64,
    /// S0 is the host address of the root of that time plus this.
    at: i64,
    low: i64,
    high: i64,
    write: bool,
}

/// The stretch that a run will touch, relative to the root at its first access.
#[derive(Clone, Copy, Debug)]
pub(super) struct Stretch {
    pub low: i64,
    pub high: i64,
    pub write: bool,
}

impl Root {
    fn of_register(base: Register) -> Self {
        Root::new(base, Register::None, 1, Register::None)
    }

    fn new(base: Register, index: Register, scale: u8, segment: Register) -> Self {
        Root {
            parts: u32::from_le_bytes([base as u8, index as u8, scale, segment as u8]),
            registers: bit(base) | bit(index),
        }
    }

    fn uses(&self, registers: u16) -> bool {
        self.registers & registers != 0
    }

    /// It counts from the base of FS or GS.
    fn has_base(&self) -> bool {
        let [.., segment] = self.parts.to_le_bytes();
        segment != Register::None as u8
    }
}

/// The one memory access of an instruction, where it may share a check. [`GuestInstruction::reference`] holds it.
pub(crate) fn reference(i: &GuestInstruction) -> Option<Reference> {
    let word = i64::from(i.word);
    let stack = |base, disp, write| {
        Some(Reference {
            root: Root::of_register(base),
            disp,
            size: word as u16,
            write,
        })
    };
    let d = &i.decoded;
    let register = d.op0_kind() != OpKind::Memory;
    match i.class {
        _ if i.narrow && !register && based(d) => None,
        Class::Memory { size, write } => of_operand(d, size, write),
        Class::JumpIndirect if !register => of_operand(d, i.word, false),
        Class::Push | Class::CallIndirect if register => stack(Register::RSP, -word, true),
        Class::Call => stack(Register::RSP, -word, true),
        Class::Pop | Class::Return => stack(Register::RSP, 0, false),
        Class::Leave => stack(Register::RBP, 0, false),
        _ => None,
    }
}

/// Its address is not the offset.
fn based(d: &Instruction) -> bool {
    matches!(d.memory_segment(), Register::FS | Register::GS)
}

fn of_operand(d: &Instruction, size: u8, write: bool) -> Option<Reference> {
    let (base, index) = (d.memory_base(), d.memory_index());
    let wide = |r: Register| r == Register::None || r.size() == 8;
    let disp = match base {
        Register::RIP => d.ip_rel_memory_address() as i64,
        _ => d.memory_displacement64() as i64,
    };
    // A root without registers is an absolute address, far from all others.
    let root = base != Register::None || index != Register::None;
    let segment = match d.memory_segment() {
        s @ (Register::FS | Register::GS) => s,
        _ => Register::None,
    };
    let scale = d.memory_index_scale() as u8;
    (wide(base) && wide(index) && root).then(|| Reference {
        root: Root::new(base, index, scale, segment),
        disp,
        size: u16::from(size),
        write,
    })
}

impl Run {
    /// A run that begins with a check of `stretch`.
    pub fn new(r: &Reference, stretch: Stretch) -> Self {
        Run {
            root: r.root,
            moved: 0,
            at: stretch.low,
            low: stretch.low,
            high: stretch.high,
            write: stretch.write,
        }
    }

    /// The displacement from S0 at which the access finds its bytes, if it lies within what was checked.
    pub fn find(&self, r: &Reference) -> Option<i32> {
        let from = r.disp.checked_add(self.moved)?;
        let within = from >= self.low && from + i64::from(r.size) <= self.high;
        let fits = r.root == self.root && within && (self.write || !r.write);
        fits.then_some((from - self.at) as i32)
    }

    /// Follows the run through an instruction that accesses nothing outside of it; false where it ends.
    #[inline]
    pub fn outlives(&mut self, i: &GuestInstruction) -> bool {
        i.leaves_s0 && self.follow(i)
    }

    /// A run off the root of a reference, as if it were checked everywhere: to plan with.
    pub fn anywhere(r: &Reference) -> Self {
        let everywhere = Stretch {
            low: i64::MIN / 2,
            high: i64::MAX / 2,
            write: true,
        };
        Run::new(r, everywhere)
    }

    /// True where the reference is off the run's root.
    pub fn is_off(&self, r: &Reference) -> bool {
        r.root == self.root
    }

    /// Follows the root through an instruction; false where it is lost.
    #[inline]
    pub fn follow(&mut self, i: &GuestInstruction) -> bool {
        let may_change = self.root.uses(i.writes) || changes_unseen(i);
        !may_change || self.follow_change(i)
    }

    fn follow_change(&mut self, i: &GuestInstruction) -> bool {
        if matches!(i.class, Class::Leave) {
            return self.follow_leave(i.word.into());
        }
        if changes_base(i) && self.root.has_base() {
            return false;
        }
        let (moves, by) = i.moves;
        if self.root.uses(i.writes & !moves) {
            return false;
        }
        let by = by.checked_mul(self.weight(moves));
        let moved = by.and_then(|by| self.moved.checked_add(by));
        self.moved = moved.unwrap_or(self.moved);
        moved.is_some()
    }

    /// `leave` makes RSP what RBP was, plus a word.
    fn follow_leave(&mut self, word: i64) -> bool {
        let framed = self.root == Root::of_register(Register::RBP);
        if framed {
            self.root = Root::of_register(Register::RSP);
            self.moved += word;
        }
        framed
    }

    /// How often a register counts in the root.
    fn weight(&self, register: u16) -> i64 {
        let [base, index, scale, _] = self.root.parts.to_le_bytes();
        let wide = Register::RAX as u8 + register.trailing_zeros() as u8;
        i64::from(base == wide) + i64::from(index == wide) * i64::from(scale)
    }
}

/// It changes what roots are made of, and that is no general register that it is known to write.
fn changes_unseen(i: &GuestInstruction) -> bool {
    matches!(i.class, Class::Leave) || changes_base(i)
}

/// It changes the base of FS or GS.
fn changes_base(i: &GuestInstruction) -> bool {
    matches!(
        i.class,
        Class::Swapgs | Class::SegmentBase { write: true, .. }
    )
}

/// The register that an instruction moves by a constant (as a mask), and by how much.
pub(crate) fn constant_move(i: &GuestInstruction) -> (u16, i64) {
    let d = &i.decoded;
    let stack = 1u16 << RSP;
    let word = i64::from(i.word);
    match i.class {
        Class::Copy | Class::Lea => {}
        Class::Push | Class::Call => return (stack, -word),
        Class::Pop if d.op0_register() != Register::RSP => return (stack, word),
        _ => return (0, 0),
    }
    let by = match d.code() {
        Code::Add_rm64_imm8 | Code::Add_rm64_imm32 | Code::Add_RAX_imm32 => d.immediate(1) as i64,
        Code::Sub_rm64_imm8 | Code::Sub_rm64_imm32 | Code::Sub_RAX_imm32 => {
            (d.immediate(1) as i64).wrapping_neg()
        }
        Code::Inc_rm64 => 1,
        Code::Dec_rm64 => -1,
        Code::Lea_r64_m
            if d.memory_base() == d.op0_register() && d.memory_index() == Register::None =>
        {
            d.memory_displacement64() as i64
        }
        code if i.narrow => match narrow_move(d, code) {
            Some(by) => by,
            None => return (0, 0),
        },
        _ => return (0, 0),
    };
    match d.op0_kind() {
        OpKind::Register => (1 << d.op0_register().number(), by),
        _ => (0, 0),
    }
}

/// The same for what moves the low half of a register, which is all that counts in 32-bit code.
fn narrow_move(d: &Instruction, code: Code) -> Option<i64> {
    let immediate = || i64::from(d.immediate(1) as i32);
    Some(match code {
        Code::Add_rm32_imm8 | Code::Add_rm32_imm32 | Code::Add_EAX_imm32 => immediate(),
        Code::Sub_rm32_imm8 | Code::Sub_rm32_imm32 | Code::Sub_EAX_imm32 => -immediate(),
        Code::Inc_rm32 => 1,
        Code::Dec_rm32 => -1,
        Code::Lea_r32_m => {
            let own = d.memory_base() == d.op0_register().full_register();
            (own && d.memory_index() == Register::None)
                .then_some(d.memory_displacement64() as i64)?
        }
        _ => return None,
    })
}

/// True where the translation of an instruction leaves S0 as the address of its own access, or alone. [`GuestInstruction::leaves_s0`] holds it.
pub(crate) fn leaves_s0(i: &GuestInstruction) -> bool {
    match i.class {
        Class::Copy => i.uses & 1 << S0 == 0,
        Class::Lea => super::copied_lea(&i.decoded) && i.uses & 1 << S0 == 0,
        Class::Nothing | Class::Conditional => true,
        Class::Memory { .. } | Class::Push | Class::Pop | Class::Leave => i.reference.is_some(),
        _ => false,
    }
}

impl Stretch {
    /// What one reference touches.
    pub fn of(r: &Reference) -> Option<Self> {
        Some(Stretch {
            low: r.disp,
            high: r.disp.checked_add(i64::from(r.size))?,
            write: r.write,
        })
    }

    /// With what another reference of the run touches; `None` where it would be too long, or where its lowest byte is no displacement.
    pub fn with(&self, run: &Run, r: &Reference) -> Option<Self> {
        let from = r.disp.checked_add(run.moved)?;
        let low = self.low.min(from);
        let high = self.high.max(from.checked_add(i64::from(r.size))?);
        let write = self.write || r.write;
        let fits = high - low <= LONGEST && i32::try_from(low).is_ok();
        fits.then_some(Stretch { low, high, write })
    }
}

/// The stretch of the run that begins with the first of `instructions`.
pub(super) fn plan(instructions: &[GuestInstruction]) -> Option<Stretch> {
    let first = instructions.first()?.reference?;
    let mut stretch = Stretch::of(&first)?;
    let mut run = Run::anywhere(&first);
    for i in instructions {
        if let Some(r) = i.reference {
            if !run.is_off(&r) {
                break;
            }
            let Some(longer) = stretch.with(&run, &r) else {
                break;
            };
            stretch = longer;
        }
        if !run.outlives(i) {
            break;
        }
    }
    Some(stretch)
}
