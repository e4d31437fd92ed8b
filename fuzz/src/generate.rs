//! Programs: one form after the other (*enumerated*), and random sequences with branches, loops, calls.

use iced_x86::{
    Code, Encoder, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register,
};

use crate::catalogue::Catalogue;
use crate::layout::{DATA, LOOP_COUNTERS};
use crate::operands::{Build, Known};
use crate::program::{Item, Program};
use crate::random::Random;
use crate::state::State;

/// How a case's program is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One form of the catalogue, which the case's number picks, in random operands.
    Enumerated,
    /// Several random ones.
    Sequence,
}

/// Attempts at one instruction before another form is tried.
const ATTEMPTS: usize = 30;

struct Generator<'a> {
    r: Random,
    catalogue: &'a Catalogue,
    program: Program,
    known: Known,
    /// Flags that the manual leaves undefined here.
    undefined: u32,
    info: InstructionInfoFactory,
    /// Labels that are to stand a few instructions on.
    pending: Vec<(usize, usize)>,
    loops: u64,
}

/// The program of a case.
pub fn program(
    catalogue: &Catalogue,
    shape: Shape,
    case: u64,
    state: &State,
    r: Random,
) -> Program {
    let mut g = Generator {
        r,
        catalogue,
        program: Program::default(),
        known: Known {
            gpr: state.gpr.map(Some),
            fs: state.fs,
            gs: state.gs,
        },
        undefined: 0,
        info: InstructionInfoFactory::new(),
        pending: Vec::new(),
        loops: 0,
    };
    match shape {
        Shape::Enumerated => g.enumerated(case),
        Shape::Sequence => g.sequence(),
    }
    g.program
}

/// The form that an enumerated case is about.
pub fn form(catalogue: &Catalogue, case: u64) -> Code {
    catalogue.all[(case % catalogue.all.len() as u64) as usize]
}

impl Generator<'_> {
    fn enumerated(&mut self, case: u64) {
        let code = form(self.catalogue, case);
        let items = self.program.items.len();
        for _ in 0..ATTEMPTS {
            if self.random_instruction(code) {
                break;
            }
            self.program.items.truncate(items);
        }
        // What a branch may skip.
        let marker = Instruction::with2(Code::Mov_r64_imm64, Register::R8, 0x600d_u64);
        if let Ok(marker) = marker {
            self.emit(marker);
        }
        self.finish();
    }

    fn sequence(&mut self) {
        let length = 1 + self.r.below(30) as usize;
        while self.program.items.len() < length {
            match self.r.below(100) {
                0..8 => self.forward(),
                8..12 => self.counted_loop(),
                12..15 => self.call(),
                15..18 => self.indirect(),
                18..24 => self.push_and_pop(),
                24..70 => self.random_of(|c| &c.common),
                70..98 => self.random_of(|c| &c.straight),
                _ => self.random_of(|c| &c.all),
            }
            self.land();
        }
        self.finish();
    }

    /// Places the labels that are left at the end.
    fn finish(&mut self) {
        let end = self.program.items.len();
        for (label, _) in std::mem::take(&mut self.pending) {
            self.program.labels[label] = end;
        }
    }

    /// Places the labels whose time has come.
    fn land(&mut self) {
        let here = self.program.items.len();
        let due: Vec<usize> = self
            .pending
            .iter()
            .filter(|(_, at)| *at <= here)
            .map(|(l, _)| *l)
            .collect();
        if due.is_empty() {
            return;
        }
        self.define_flags();
        self.pending.retain(|(_, at)| *at > here);
        for label in due {
            self.program.labels[label] = self.program.items.len();
        }
    }

    fn new_label(&mut self) -> usize {
        self.program.labels.push(self.program.items.len());
        self.program.labels.len() - 1
    }

    fn later(&mut self) -> usize {
        let label = self.new_label();
        let distance = 2 + self.r.below(5) as usize;
        self.pending
            .push((label, self.program.items.len() + distance));
        label
    }

    fn random_of(&mut self, list: fn(&Catalogue) -> &Vec<Code>) {
        let code = *self.r.pick(list(self.catalogue));
        let items = self.program.items.len();
        let labels = self.program.labels.len();
        if !self.random_instruction(code) {
            self.program.items.truncate(items);
            self.program.labels.truncate(labels);
            self.pending.retain(|(l, _)| *l < labels);
        }
    }

    /// One instruction of a form, with what it needs before it; false where it cannot be made.
    fn random_instruction(&mut self, code: Code) -> bool {
        for _ in 0..ATTEMPTS {
            let known = self.known.clone();
            let made = Build::instruction(&mut self.r, &mut self.known, code);
            let Some((before, i)) = made.filter(|(_, i)| encodes(i)) else {
                self.known = known;
                continue;
            };
            for (register, value) in before {
                self.load(register, value);
            }
            let branch = i.op_count() > 0 && i.op0_kind() == OpKind::NearBranch64;
            let label = branch.then(|| self.later());
            let prefix = self.prefix(&i);
            self.emit_item(Item {
                instruction: i,
                prefix,
                label,
            });
            return true;
        }
        false
    }

    /// Prefixes that change nothing, sometimes.
    fn prefix(&mut self, i: &Instruction) -> Vec<u8> {
        let legacy = i.code().op_code().encoding() == iced_x86::EncodingKind::Legacy;
        let plain = legacy && i.segment_prefix() == Register::None && !i.has_lock_prefix();
        if plain && self.r.percent(3) {
            vec![*self.r.pick(&[0x2e, 0x3e, 0x26, 0x36])]
        } else {
            Vec::new()
        }
    }

    /// `mov register, value`, in one of its forms.
    fn load(&mut self, register: usize, value: u64) {
        let number = register as u64;
        let r64 = nth(Register::RAX, number);
        let r32 = nth(Register::EAX, number);
        let made = match value {
            v if v <= u32::MAX.into() => Instruction::with2(Code::Mov_r32_imm32, r32, v as u32),
            v => Instruction::with2(Code::Mov_r64_imm64, r64, v),
        };
        if let Ok(i) = made {
            self.emit(i);
        }
        self.known.gpr[register] = Some(value);
    }

    fn emit(&mut self, i: Instruction) {
        self.emit_item(Item::plain(i));
    }

    fn emit_item(&mut self, item: Item) {
        let i = item.instruction;
        let reads_undefined = self.undefined & i.rflags_read() != 0;
        if reads_undefined || i.flow_control() != iced_x86::FlowControl::Next {
            self.define_flags();
        }
        self.undefined = self.undefined & !i.rflags_modified() | i.rflags_undefined();
        for used in self.info.info(&i).used_registers() {
            let written = !matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
            let register = used.register().full_register();
            if written && register.is_gpr64() && !keeps_stack(&i, register) {
                self.known.gpr[register.number()] = None;
            }
        }
        self.program.items.push(item);
    }

    /// A comparison, where flags are undefined.
    fn define_flags(&mut self) {
        if self.undefined == 0 {
            return;
        }
        let (a, b) = (self.r.below(16), self.r.below(16));
        self.undefined = 0;
        let compare = Instruction::with2(
            Code::Cmp_r64_rm64,
            nth(Register::RAX, a),
            nth(Register::RAX, b),
        );
        if let Ok(i) = compare {
            self.emit(i);
        }
    }

    /// A branch forwards over a few instructions.
    fn forward(&mut self) {
        const NEAR: [Code; 5] = [
            Code::Jmp_rel8_64,
            Code::Jmp_rel32_64,
            Code::Jrcxz_rel8_64,
            Code::Jecxz_rel8_64,
            Code::Loop_rel8_64_RCX,
        ];
        let conditional: Vec<Code> = self
            .catalogue
            .all
            .iter()
            .copied()
            .filter(|c| c.is_jcc_short_or_near())
            .collect();
        let code = if self.r.percent(80) {
            *self.r.pick(&conditional)
        } else {
            *self.r.pick(&NEAR)
        };
        let label = self.later();
        self.jump(code, label);
    }

    fn jump(&mut self, code: Code, label: usize) {
        if let Ok(instruction) = Instruction::with_branch(code, 0) {
            self.emit_item(Item {
                instruction,
                prefix: Vec::new(),
                label: Some(label),
            });
        }
    }

    /// A loop of a few instructions, counted in memory so that they cannot make it endless (mostly).
    fn counted_loop(&mut self) {
        let counter = LOOP_COUNTERS + 8 * self.loops;
        self.loops += 1;
        let place = iced_x86::MemoryOperand::with_displ(counter, 8);
        let count = 2 + self.r.below(6) as u32;
        let Ok(set) = Instruction::with2(Code::Mov_rm32_imm32, place, count) else {
            return;
        };
        self.emit(set);
        self.define_flags();
        // What was known before the loop need not hold in its second round.
        self.known.gpr = [None; 16];
        let start = self.new_label();
        for _ in 0..1 + self.r.below(5) {
            match self.r.below(4) {
                0 => self.random_of(|c| &c.straight),
                _ => self.random_of(|c| &c.common),
            }
        }
        if let Ok(count_down) = Instruction::with1(Code::Dec_rm32, place) {
            self.emit(count_down);
        }
        let code = *self.r.pick(&[Code::Jne_rel8_64, Code::Jne_rel32_64]);
        self.jump(code, start);
    }

    /// A call of a function that stands behind the call, and a jump over it.
    fn call(&mut self) {
        self.stack();
        let (function, over) = (self.new_label(), self.new_label());
        self.jump(Code::Call_rel32_64, function);
        if self.r.percent(50) {
            self.random_of(|c| &c.common);
        }
        self.jump(Code::Jmp_rel32_64, over);
        self.program.labels[function] = self.program.items.len();
        for _ in 0..self.r.below(3) {
            self.random_of(|c| &c.common);
        }
        self.define_flags();
        self.stack_if_lost();
        self.emit(ret());
        self.program.labels[over] = self.program.items.len();
        self.known.gpr = [None; 16];
    }

    /// A jump through a register, memory or the stack to a label a few instructions on.
    fn indirect(&mut self) {
        let label = self.later();
        let register = nth(Register::RAX, *self.r.pick(&[0, 1, 3, 6, 8, 10, 11, 13]));
        let memory = iced_x86::MemoryOperand::with_displ(DATA.base + 8 * self.r.below(256), 8);
        let lea = Instruction::with2(
            Code::Lea_r64_m,
            register,
            iced_x86::MemoryOperand::with_base_displ(Register::RIP, 0),
        );
        let Ok(instruction) = lea else { return };
        let how = self.r.below(4);
        if how == 2 {
            self.stack();
        }
        self.emit_item(Item {
            instruction,
            prefix: Vec::new(),
            label: Some(label),
        });
        let rest = match how {
            0 => vec![Instruction::with1(Code::Jmp_rm64, register)],
            1 => vec![
                Instruction::with2(Code::Mov_rm64_r64, memory, register),
                Instruction::with1(Code::Jmp_rm64, memory),
            ],
            2 => vec![Instruction::with1(Code::Push_r64, register), Ok(ret())],
            _ => vec![Instruction::with1(Code::Call_rm64, register)],
        };
        for i in rest.into_iter().flatten() {
            self.emit(i);
        }
    }

    fn push_and_pop(&mut self) {
        const PUSHES: [Code; 5] = [
            Code::Push_r64,
            Code::Push_rm64,
            Code::Pushq_imm32,
            Code::Pushfq,
            Code::Push_rm16,
        ];
        self.stack();
        let code = *self.r.pick(&PUSHES);
        let _ = self.random_instruction(code);
        if self.r.percent(30) {
            self.random_of(|c| &c.common);
        }
        let code = *self
            .r
            .pick(&[Code::Pop_r64, Code::Pop_rm64, Code::Pop_r64, Code::Popfq]);
        let _ = self.random_instruction(code);
    }

    /// RSP within the stack.
    fn stack(&mut self) {
        if self.known.gpr[4].is_none() {
            self.load(4, crate::layout::STACK_START);
        }
    }

    fn stack_if_lost(&mut self) {
        if self.known.gpr[4].is_none() && self.r.percent(30) {
            self.stack();
        }
    }
}

fn ret() -> Instruction {
    Instruction::with(Code::Retnq)
}

fn nth(first: Register, n: u64) -> Register {
    Register::try_from(first as usize + n as usize).unwrap_or(first)
}

fn encodes(i: &Instruction) -> bool {
    let mut i = *i;
    if i.op_count() > 0 && i.op0_kind() == OpKind::NearBranch64 {
        i.set_near_branch64(crate::layout::CODE.base);
    }
    Encoder::new(64)
        .encode(&i, crate::layout::CODE.base)
        .is_ok()
}

/// Pushes and pops leave RSP in the stack.
fn keeps_stack(i: &Instruction, register: Register) -> bool {
    register == Register::RSP
        && i.is_stack_instruction()
        && !matches!(i.mnemonic(), Mnemonic::Leave | Mnemonic::Enter)
        && !(i.mnemonic() == Mnemonic::Pop
            && i.op0_kind() == OpKind::Register
            && i.op0_register().full_register() == Register::RSP)
}
