//! Steps of a generated kernel: a context that code begins in, and items, which can be left out one by one.

use anyhow::Result;
use iced_x86::code_asm::CodeAssembler;

use super::image::V86;
use super::layout::*;
use super::write::{Assembled, Levels, Mode, Paging, Traits, Writer};
use super::{encoded, keys, narrow, ordinary, protected, short, system, transfer};
use crate::random::Random;

/// Some instructions that do not depend on where they are.
#[derive(Clone, Debug)]
pub struct Item {
    /// What made it.
    pub name: &'static str,
    pub bytes: Vec<u8>,
}

/// What a step begins with.
#[derive(Clone, Debug)]
pub struct Context {
    pub mode: Mode,
    pub cpl: u8,
    pub cs: u16,
    pub ss: u16,
    /// DS and ES.
    pub data: u16,
    pub flags: u64,
    pub rsp: u64,
    /// RAX, RCX, RDX, RBX, RBP, RSI, RDI, R8 to R15.
    pub registers: [u64; 15],
    /// 0: as it is.
    pub cr3: u64,
    /// See [`step::RESTORES`].
    pub restores: u64,
}

/// A context and its code.
#[derive(Clone, Debug)]
pub struct Step {
    pub context: Context,
    pub items: Vec<Item>,
    /// Free bytes before the code.
    pub gap: u64,
}

type Make = fn(&mut Writer, &mut CodeAssembler) -> Assembled;
/// A name, how often, how it is made.
type Kind = (&'static str, u64, Make);

const EVERYWHERE: &[Kind] = &[
    ("accesses", 30, ordinary::accesses),
    ("compute", 10, ordinary::compute),
    ("loop", 14, ordinary::bounded_loop),
    ("strings", 8, ordinary::strings),
    ("stack", 12, ordinary::stack),
    ("call a routine", 12, ordinary::call_routine),
    ("patch a routine", 5, ordinary::patch_routine),
    ("patch itself", 4, ordinary::patch_itself),
    ("floating point", 5, ordinary::floating_point),
    ("exception", 7, ordinary::exception),
    ("random bytes", 2, ordinary::random_bytes),
    ("iret", 3, transfer::iret),
    ("iret onwards", 4, transfer::iret_onwards),
    ("far return", 4, transfer::far_return),
    ("far branch", 5, transfer::far_branch),
    ("system call", 7, transfer::system_call),
    ("load a segment", 7, transfer::load_segment),
    ("look at a descriptor", 4, transfer::look_at_descriptor),
    ("look at the system", 5, transfer::look_at_system),
    ("ports", 4, transfer::ports),
    ("system instruction", 6, encoded::instruction),
    ("extended state", 3, ordinary::extended_state),
];

const KERNEL: &[Kind] = &[
    ("change a mapping", 16, system::change_mapping),
    ("remap and access", 8, system::remap_and_access),
    ("remap and call", 8, system::remap_and_call),
    ("flushes", 6, system::flushes),
    ("switch the address space", 8, system::switch_address_space),
    ("control registers", 9, system::control_registers),
    (
        "model-specific registers",
        7,
        system::model_specific_registers,
    ),
    ("bases", 6, system::bases),
    ("debug registers", 6, system::debug_registers),
    ("descriptor tables", 5, system::descriptor_tables),
    ("stacks of the task", 3, system::task_stacks),
    ("another task", 2, system::another_task),
    ("actions", 6, system::actions),
    ("interrupts", 9, transfer::interrupts),
];

/// For narrow code of the kernel too.
const NARROW_KERNEL: &[Kind] = &[
    ("control registers", 9, narrow::control_registers),
    ("descriptor tables", 5, narrow::descriptor_tables),
];

const NARROW: &[Kind] = &[
    ("accesses", 24, narrow::accesses),
    ("compute", 8, narrow::compute),
    ("branches", 8, narrow::branches),
    ("loop", 12, narrow::bounded_loop),
    ("load a segment", 12, narrow::load_segment),
    ("only in narrow modes", 10, narrow::only_here),
    ("transfer", 9, narrow::transfer),
    ("strings", 6, narrow::strings),
    ("call a routine", 6, narrow::call_routine),
    ("exception", 5, narrow::exception),
    ("system instruction", 9, encoded::instruction),
    ("ports", 4, narrow::ports),
];

/// For 16-bit code too.
const SHORT: &[Kind] = &[
    ("short accesses", 40, short::accesses),
    ("short loop", 24, short::loops),
    ("short stack", 30, short::stack),
    ("short strings", 20, short::strings),
    ("short segments", 20, short::segments),
];

/// Code sizes and privileges of steps: how often, mode, CPL, CS, SS, DS.
const CONTEXTS: &[(u64, Mode, u8, u16, u16, u16)] = &[
    (40, Mode::Bits64, 3, U64, UDS, UDS),
    (36, Mode::Bits64, 0, K64, KDS, UDS),
    (14, Mode::Bits32, 3, U32, UDS, UDS),
    (4, Mode::Bits32, 0, K32, KDS, UDS),
    (4, Mode::Bits32, 1, C1, DS1, DS1),
    (3, Mode::Bits32, 2, C2, DS2, DS2),
    (6, Mode::Bits16, 3, U16, UDS, UDS),
    (8, Mode::Bits16, 3, U16, S16, D16),
];

/// The same without long mode; the last is virtual-8086 mode. There is no 16-bit code at CPL 0: through a flat segment its addresses reach nothing but the tables.
const PROTECTED_CONTEXTS: &[(u64, Mode, u8, u16, u16, u16)] = &[
    (40, Mode::Bits32, 3, U32, UDS, UDS),
    (36, Mode::Bits32, 0, K64, KDS, KDS),
    (6, Mode::Bits32, 1, C1, DS1, DS1),
    (4, Mode::Bits32, 2, C2, DS2, DS2),
    (10, Mode::Bits16, 3, U16, UDS, UDS),
    (10, Mode::Bits16, 3, U16, S16, D16),
    (20, Mode::Bits16, 3, 0xffff, 0xffff, 0xffff),
];

const PROTECTED: &[Kind] = &[("switch the task", 10, protected::switch_task)];

const PROTECTED_KERNEL: &[Kind] = &[
    ("change a mapping", 20, protected::change_mapping),
    ("change a task", 8, protected::change_task),
    ("interrupts", 9, narrow::interrupts),
];

/// For processors with protection keys, and for kernels whose levels change.
const KEYS: &[Kind] = &[("protection keys", 16, keys::change_rights)];
const LEVELS: &[Kind] = &[("change the levels", 12, system::change_levels)];

/// The kinds of items for a step.
fn kinds(context: &Context, traits: Traits) -> Vec<&'static [Kind]> {
    let long = traits.paging == Paging::Long;
    let mut kinds: Vec<&'static [Kind]> = match (context.mode, context.cpl) {
        (Mode::Bits16, _) if !long => vec![NARROW, SHORT, PROTECTED],
        (Mode::Bits16, _) => vec![NARROW, SHORT],
        (_, 0) if !long => vec![NARROW, NARROW_KERNEL, PROTECTED, PROTECTED_KERNEL],
        _ if !long => vec![NARROW, PROTECTED],
        (Mode::Bits64, 0) => vec![EVERYWHERE, KERNEL],
        (Mode::Bits64, _) => vec![EVERYWHERE],
        (_, 0) => vec![NARROW, NARROW_KERNEL],
        _ => vec![NARROW],
    };
    if traits.has_keys() {
        kinds.push(KEYS);
    }
    if traits.levels == Levels::Both && (context.mode, context.cpl) == (Mode::Bits64, 0) {
        kinds.push(LEVELS);
    }
    kinds
}

fn weighted<'a, T>(r: &mut Random, from: &[&'a [T]], weight: fn(&T) -> u64) -> &'a T {
    let all = || from.iter().copied().flatten();
    let mut left = r.below(all().map(weight).sum());
    for kind in all() {
        match left.checked_sub(weight(kind)) {
            Some(rest) => left = rest,
            None => return kind,
        }
    }
    &from[0][0]
}

fn context(r: &mut Random, traits: Traits) -> Context {
    let long = traits.paging == Paging::Long;
    let contexts = if long { CONTEXTS } else { PROTECTED_CONTEXTS };
    let (_, mode, cpl, cs, ss, data) = *weighted(r, &[contexts], |c| c.0);
    let v86 = cs == 0xffff;
    let mut w = Writer {
        r,
        traits,
        mode,
        cpl,
        v86,
    };
    let registers = std::array::from_fn(|_| match w.r.percent(45) {
        true => w.pointer(),
        false => w.r.value(),
    });
    let flags = match w.r.percent(75) {
        true => 0x202,
        false => w.flags() & !0x2_4000,
    };
    let flags = match v86 {
        true => flags | V86 | w.r.below(4) << 12,
        false => flags,
    };
    let stack = match ss {
        S16 => USER_STACK - S16_BASE,
        KS16 => STEP_STACK - KS16_BASE,
        _ if cpl == 3 => USER_STACK,
        _ => STEP_STACK,
    };
    let rsp = match w.r.percent(92) {
        true => stack - 0x400 + w.r.below(0x40),
        false => w.pointer(),
    };
    let rsp = match ss {
        _ if v86 => 0xfff0,
        // Handlers of 32 bits go on with ESP, and need room.
        KS16 => STEP_STACK - KS16_BASE,
        _ => rsp,
    };
    let cr3 = match w.r.below(10) {
        0..5 => w.root(),
        _ => 0,
    };
    Context {
        mode,
        cpl,
        cs,
        ss,
        data,
        flags,
        rsp,
        registers,
        cr3,
        restores: u64::from(w.r.percent(40)) | u64::from(w.r.percent(80)) << 1,
    }
}

impl Step {
    /// A random one.
    pub fn random(r: &mut Random, traits: Traits) -> Result<Self> {
        let context = context(r, traits);
        let kinds = kinds(&context, traits);
        let mut items = Vec::new();
        for _ in 0..1 + r.below(8) {
            let (name, _, make) = weighted(r, &kinds, |k| k.1);
            let mut w = Writer {
                r: &mut *r,
                traits,
                mode: context.mode,
                cpl: context.cpl,
                v86: context.flags & V86 != 0,
            };
            items.push(Item {
                name,
                bytes: w.assemble(make)?,
            });
        }
        Ok(Step {
            context,
            items,
            gap: match r.percent(30) {
                true => r.below(0x200),
                false => r.below(16),
            },
        })
    }
}
