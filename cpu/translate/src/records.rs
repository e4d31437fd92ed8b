//! Blocks, exits, TLB checks, instruction boundaries, indirect branches and recipes as the tables keep them: packed.
//!
//! Problem: there are a hundred thousand blocks after a boot and a dozen facts about each, most of which nobody ever asks for; yet each
//! byte of them is a byte of host memory that was touched, and each list of its own a call of the allocator.
//! Idea: one array per kind, filled in the order of translation, so that a block names its first entry; positions count from the block,
//! host addresses from the cache. Lists (the blocks of a page, the exits that lead to a block) run through the records themselves.
//! Invariant: what is packed comes out as it went in: packing asserts that everything fits. What is bounded by the size of a block fits
//! in 15 bits ([`MAX_CODE`]).
//! Cost: an exit is unpacked when it is taken, in a few instructions.

use crate::blocks::{BlockId, Form, Key};
use crate::flags::FlagPlace;
use crate::frontend::Simd;
use crate::narrow::{LAST_NARROW_PAGE, Mode, Width};
use crate::recipe::{Kind, Recipe, Source};
use crate::rewrite::{AccessSite, Base, Boundary, BranchSite, ExitSite, Part};

/// Most bytes of host code that one block can have.
pub(crate) const MAX_CODE: usize = 1 << 15;

/// No block, no exit: the end of a list.
pub(crate) const NONE: u32 = u32::MAX;

fn narrow(position: u32) -> u16 {
    u16::try_from(position).expect("a position lies within a block")
}

fn bit(n: u32, is: bool) -> u8 {
    u8::from(is) << n
}

/// The number that stands for no borrowed register: a scratch register, which is never borrowed.
const NOT_BORROWED: u8 = 10;

fn pack_borrowed(register: Option<u8>) -> u8 {
    assert!(register.is_none_or(|r| r < 16 && r != NOT_BORROWED));
    register.unwrap_or(NOT_BORROWED)
}

fn unpack_borrowed(number: u8) -> Option<u8> {
    Some(number & 15).filter(|n| *n != NOT_BORROWED)
}

fn flag_place(saved: bool) -> FlagPlace {
    if saved {
        FlagPlace::Saved
    } else {
        FlagPlace::Registers
    }
}

/// A [`Key`]; equal where the keys are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct PackedKey {
    /// From the lowest bit on: privilege, vector state, form, what the mode is but for the code segment, whether there is no page; then the physical address,
    /// with the lower bits of the limit below it outside of 64-bit mode.
    low: u64,
    /// In 64-bit mode the linear page, or 0 where there is none; else base, linear page and the upper bits of the limit.
    base: u64,
}

const SIMD: [Simd; 4] = [Simd::None, Simd::Sse, Simd::Avx, Simd::Avx512];
const FORMS: [Form; 3] = [Form::Normal, Form::TwoPages, Form::Careful];
const WIDTHS: [Width; 3] = [Width::Bits64, Width::Bits32, Width::Bits16];
const DYNAMIC: u64 = 1 << 13;
const FLAGS: u32 = 14;
const LOW_LIMIT: u32 = 9;
/// Bits of physical addresses that keys have room for.
const GPA_BITS: u32 = u64::BITS - FLAGS;
pub(crate) const NARROW_GPA_BITS: u32 = GPA_BITS - LOW_LIMIT;

/// A limit as descriptors have it: 20 bits, and one that says that they count pages.
fn pack_limit(limit: u32) -> u64 {
    match limit < 1 << 20 {
        true => limit.into(),
        false => u64::from(limit >> 12) | 1 << 20,
    }
}

fn unpack_limit(packed: u64) -> u32 {
    match packed >> 20 {
        0 => packed as u32,
        _ => (packed as u32) << 12 | 0xfff,
    }
}

impl PackedKey {
    pub fn new(key: &Key) -> Self {
        let m = &key.mode;
        let narrow = m.is_narrow();
        let bits = if narrow { NARROW_GPA_BITS } else { GPA_BITS };
        assert!(key.gpa < 1 << bits && key.privilege < 4);
        let flags = [m.flat, m.short_stack, m.middle, m.paragraphs, m.window];
        let flags = (8..).zip(flags).map(|(n, is)| u64::from(is) << n);
        let mut low = u64::from(key.privilege)
            | (key.simd as u64) << 2
            | (key.form as u64) << 4
            | (m.width as u64) << 6
            | flags.sum::<u64>();
        let origin = match key.base {
            Base::Fixed(origin) => origin,
            Base::Dynamic => {
                low |= DYNAMIC;
                0
            }
        };
        if !narrow {
            low |= key.gpa << FLAGS;
            return PackedKey { low, base: origin };
        }
        let limit = pack_limit(m.limit);
        low |= key.gpa << (FLAGS + LOW_LIMIT) | (limit & ((1 << LOW_LIMIT) - 1)) << FLAGS;
        let page = match key.base {
            Base::Fixed(origin) => m.linear(origin) >> 12,
            Base::Dynamic => 0,
        };
        let base = u64::from(m.base) | page << 32 | limit >> LOW_LIMIT << 52;
        PackedKey { low, base }
    }

    fn is_narrow(self) -> bool {
        self.low >> 6 & 3 != 0
    }

    pub fn gpa(self) -> u64 {
        match self.is_narrow() {
            true => self.low >> (FLAGS + LOW_LIMIT),
            false => self.low >> FLAGS,
        }
    }

    pub fn base(self) -> Base {
        if self.low & DYNAMIC != 0 {
            return Base::Dynamic;
        }
        if !self.is_narrow() {
            return Base::Fixed(self.base);
        }
        let page = (self.base >> 32) as u32 & 0xf_ffff;
        let origin = (page << 12).wrapping_sub(self.base as u32);
        // No code is translated that begins as far up as what this would be otherwise.
        Base::Fixed(match origin > LAST_NARROW_PAGE as u32 {
            true => i64::from(origin as i32) as u64,
            false => origin.into(),
        })
    }

    pub fn form(self) -> Form {
        FORMS[self.low as usize >> 4 & 3]
    }

    pub fn mode(self) -> Mode {
        let is = |n: u32| self.low >> n & 1 != 0;
        let (base, limit) = match self.is_narrow() {
            true => {
                let low = self.low >> FLAGS & ((1 << LOW_LIMIT) - 1);
                let limit = unpack_limit(self.base >> 52 << LOW_LIMIT | low);
                (self.base as u32, limit)
            }
            false => (0, 0),
        };
        Mode {
            width: WIDTHS[self.low as usize >> 6 & 3],
            flat: is(8),
            short_stack: is(9),
            middle: is(10),
            paragraphs: is(11),
            window: is(12),
            base,
            limit,
        }
    }

    pub fn privilege(self) -> u8 {
        self.low as u8 & 3
    }

    pub fn unpack(self) -> Key {
        Key {
            gpa: self.gpa(),
            privilege: self.privilege(),
            simd: SIMD[self.low as usize >> 2 & 3],
            base: self.base(),
            form: self.form(),
            mode: self.mode(),
        }
    }
}

/// One block. Host addresses are offsets in the cache.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockRecord {
    pub key: PackedKey,
    pub host: u32,
    /// Number of its first boundary; the next block's first is behind its last.
    pub first_boundary: u32,
    /// First of the exits that lead here.
    pub incoming: u32,
    /// The next block of the same page.
    pub next_in_page: BlockId,
    /// Entries by where the flags are, and the one for callers with the vector state loaded.
    pub entry_registers: u16,
    pub entry_saved: u16,
    pub entry_simd: u16,
    /// Bytes of host code, less one.
    pub last: u16,
    pub guest_len: u16,
    /// Uses the vector state.
    pub simd: bool,
    pub alive: bool,
    /// It has a second page.
    pub straddles: bool,
}

/// Where the link of an exit hangs in the list of its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// It is in no list.
    Nothing,
    /// It is the first of this block's.
    Block(BlockId),
    Exit(u32),
}

/// One exit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExitRecord {
    /// The target from bit 24 on, signed; the stub from bit 8 on; booleans.
    word: i64,
    pub block: BlockId,
    /// Position of the displacement and, in the upper half, of the gate's; or the number of the slot.
    place: u32,
    before: u32,
    /// The next exit that leads to the same block.
    pub next: u32,
}

const EXIT_SAVED: i64 = 1;
const EXIT_INTERPRET: i64 = 2;
const EXIT_CHANGES_MODE: i64 = 4;
const EXIT_PATCH: i64 = 8;
const EXIT_SLOT: i64 = 16;
const EXIT_GATE: i64 = 32;
/// The way through an open gate begins behind its displacement.
const BEHIND_GATE: u32 = 4;
/// In `before`: what is left is a block and not an exit.
const FIRST: u32 = 1 << 31;

impl ExitRecord {
    /// For an exit of `block`.
    pub fn new(block: BlockId, site: &ExitSite) -> Self {
        let is = |flag, is| if is { flag } else { 0 };
        let word = site.target << 24
            | i64::from(narrow(site.stub)) << 8
            | is(EXIT_SAVED, site.flags == FlagPlace::Saved)
            | is(EXIT_INTERPRET, site.interpret)
            | is(EXIT_CHANGES_MODE, site.changes_mode)
            | is(EXIT_PATCH, site.patch.is_some())
            | is(EXIT_SLOT, site.slot.is_some())
            | is(EXIT_GATE, site.gate.is_some());
        assert!(word >> 24 == site.target && !(site.patch.is_some() && site.slot.is_some()));
        let place = match site.slot {
            Some(slot) => slot,
            None => {
                let gate = site.gate.map_or(0, |(gate, open)| {
                    assert!(open == gate + BEHIND_GATE);
                    gate
                });
                u32::from(narrow(gate)) << 16 | u32::from(narrow(site.patch.unwrap_or_default()))
            }
        };
        ExitRecord {
            word,
            block,
            place,
            before: NONE,
            next: NONE,
        }
    }

    pub fn site(&self) -> ExitSite {
        let is = |flag| self.word & flag != 0;
        ExitSite {
            target: self.word >> 24,
            patch: is(EXIT_PATCH).then_some(self.place & 0xffff),
            stub: u32::from((self.word >> 8) as u16),
            gate: is(EXIT_GATE).then_some((self.place >> 16, (self.place >> 16) + BEHIND_GATE)),
            flags: flag_place(is(EXIT_SAVED)),
            interpret: is(EXIT_INTERPRET),
            slot: is(EXIT_SLOT).then_some(self.place),
            changes_mode: is(EXIT_CHANGES_MODE),
        }
    }

    pub fn before(&self) -> Before {
        match self.before {
            NONE => Before::Nothing,
            n if n & FIRST != 0 => Before::Block(n & !FIRST),
            n => Before::Exit(n),
        }
    }

    pub fn set_before(&mut self, before: Before) {
        self.before = match before {
            Before::Nothing => NONE,
            Before::Block(block) => FIRST | block,
            Before::Exit(exit) => exit,
        };
    }
}

/// One TLB check.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AccessRecord {
    pub block: BlockId,
    careful: u32,
    offset: u16,
    span: u16,
    retry: u16,
    done: u16,
    own_from: u16,
    own_size: u8,
    bits: u8,
}

impl AccessRecord {
    /// For a check of `block`.
    pub fn new(block: BlockId, site: &AccessSite) -> Self {
        AccessRecord {
            block,
            careful: site.careful.unwrap_or(NONE),
            offset: site.offset,
            span: site.span,
            retry: narrow(site.retry),
            done: narrow(site.done),
            own_from: site.own.from | u16::from(site.own.repeats) << 15,
            own_size: site.own.size,
            bits: bit(0, site.write)
                | bit(1, site.own.write)
                | bit(2, site.own_operand)
                | bit(3, site.flags == FlagPlace::Saved)
                | pack_borrowed(site.borrowed) << 4,
        }
    }

    pub fn site(&self) -> AccessSite {
        let is = |n: u32| self.bits >> n & 1 != 0;
        AccessSite {
            offset: self.offset,
            span: self.span,
            write: is(0),
            own: Part {
                from: self.own_from & 0x7fff,
                size: self.own_size,
                write: is(1),
                repeats: self.own_from >> 15 != 0,
            },
            careful: Some(self.careful).filter(|n| *n != NONE),
            own_operand: is(2),
            retry: self.retry.into(),
            done: self.done.into(),
            flags: flag_place(is(3)),
            borrowed: unpack_borrowed(self.bits >> 4),
        }
    }
}

/// One boundary: position (15 bits), offset of the guest instruction (12), borrowed register (4), flags (1).
#[derive(Clone, Copy, Debug)]
pub(crate) struct BoundaryRecord(u32);

impl BoundaryRecord {
    pub fn new(b: &Boundary) -> Self {
        assert!(b.guest < 1 << 12 && b.host < 1 << 15);
        let saved = u32::from(b.flags == FlagPlace::Saved);
        let low = u32::from(pack_borrowed(b.borrowed)) << 1 | saved;
        BoundaryRecord(b.host << 17 | u32::from(b.guest) << 5 | low)
    }

    /// Position of its code.
    pub fn host(self) -> u32 {
        self.0 >> 17
    }

    pub fn unpack(self) -> Boundary {
        Boundary {
            host: self.host(),
            guest: (self.0 >> 5 & 0xfff) as u16,
            flags: flag_place(self.0 & 1 != 0),
            borrowed: unpack_borrowed((self.0 >> 1) as u8),
        }
    }
}

/// One indirect branch: what it adds to RSP (20 bits, signed), its offset (12).
#[derive(Clone, Copy, Debug)]
pub(crate) struct BranchRecord {
    pub block: BlockId,
    word: i32,
}

impl BranchRecord {
    /// For a branch of `block`.
    pub fn new(block: BlockId, site: &BranchSite) -> Self {
        let word = site.moves_rsp << 12 | i32::from(site.offset);
        assert!(site.offset < 1 << 12 && word >> 12 == site.moves_rsp);
        BranchRecord { block, word }
    }

    /// Offset of the guest instruction in its page.
    pub fn offset(self) -> u16 {
        (self.word & 0xfff) as u16
    }

    /// What it adds to RSP.
    pub fn moves_rsp(self) -> i32 {
        self.word >> 12
    }
}

/// One recipe: its two sources' constants; and in `bits`, from bit 0 on, the register of each (5 bits), kind (2), logarithm of the
/// size (2), flags (6), and how far back the next of its chain is (12), 0 where it is the last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RecipeRecord {
    constants: [i32; 2],
    bits: u32,
}

/// The register of a constant.
const NO_REGISTER: u32 = 16;
const KINDS: [Kind; 4] = [Kind::Compare, Kind::Difference, Kind::Sum, Kind::And];

fn pack_source(source: Source) -> (u32, i32) {
    match source {
        Source::Register { number, moved } => (number.into(), moved),
        Source::Constant(value) => (NO_REGISTER, value),
    }
}

fn unpack_source(register: u32, constant: i32) -> Source {
    match register & 31 {
        NO_REGISTER => Source::Constant(constant),
        number => Source::Register {
            number: number as u8,
            moved: constant,
        },
    }
}

impl RecipeRecord {
    /// A recipe whose next is so many before it, 0 for none.
    pub fn new(recipe: &Recipe, back: u32) -> Self {
        let [left, right] = [recipe.left, recipe.right].map(pack_source);
        assert!(left.0 <= NO_REGISTER && right.0 <= NO_REGISTER);
        assert!(recipe.flags < 1 << 6 && back < 1 << 12);
        assert!(recipe.size.is_power_of_two() && recipe.size <= 8);
        RecipeRecord {
            constants: [left.1, right.1],
            bits: left.0
                | right.0 << 5
                | (recipe.kind as u32) << 10
                | recipe.size.trailing_zeros() << 12
                | u32::from(recipe.flags) << 14
                | back << 20,
        }
    }

    pub fn recipe(self) -> Recipe {
        let [left, right] = self.constants;
        Recipe {
            kind: KINDS[self.bits as usize >> 10 & 3],
            size: 1 << (self.bits >> 12 & 3),
            left: unpack_source(self.bits, left),
            right: unpack_source(self.bits >> 5, right),
            flags: (self.bits >> 14 & 0x3f) as u8,
        }
    }

    /// How far before it the next of its chain is.
    pub fn back(self) -> Option<u32> {
        Some(self.bits >> 20).filter(|n| *n != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::ALL;

    fn check(key: Key) {
        assert_eq!(PackedKey::new(&key).unpack(), key);
    }

    #[test]
    fn keys_come_out_as_they_went_in() {
        let (forms, simds) = (FORMS.into_iter().cycle(), SIMD.into_iter().cycle());
        let gpas = [(0, 0), ((1 << 41) - 1, 2), (0x12_3456, 1)].into_iter();
        for ((form, simd), (gpa, privilege)) in forms.zip(simds).zip(gpas.cycle()).take(12) {
            let key = |base, mode| Key {
                gpa,
                privilege,
                simd,
                base,
                form,
                mode,
            };
            for base in [
                Base::Dynamic,
                Base::Fixed(0),
                Base::Fixed(0xffff_ffff_8100_0000),
            ] {
                check(key(base, Mode::LONG));
            }
            check(key(Base::Dynamic, Mode::FLAT));
            let window = Mode {
                window: true,
                ..Mode::FLAT
            };
            check(key(Base::Fixed(0x10_0000), window));
            for n in 0..48 {
                let is = |bit: u32| n >> bit & 1 != 0;
                let mode = Mode {
                    width: if is(0) { Width::Bits16 } else { Width::Bits32 },
                    flat: false,
                    short_stack: is(1),
                    window: false,
                    middle: is(2),
                    paragraphs: is(3),
                    base: [0, 0x7c40, 0xffff_f345][n >> 4],
                    limit: [0xffff, u32::MAX, 0x12_3fff, 77][n & 3],
                };
                for rip in [0u64, 0x100, 0x3cc0, 0xffff, 0x1234_5678, 0xffff_efff] {
                    check(key(Base::Fixed(mode.origin(rip)), mode));
                }
            }
        }
    }

    #[test]
    fn exits_come_out_as_they_went_in() {
        for n in 0..128u32 {
            let is = |bit: u32| n >> bit & 1 != 0;
            let site = ExitSite {
                target: if is(0) { -(1 << 32) } else { (1 << 32) + 4095 },
                patch: (is(1) && !is(2)).then_some(0x7ffc),
                slot: is(2).then_some(5 << 28),
                stub: 0x7fff,
                gate: (is(6) && !is(2)).then_some((0x7ff0, 0x7ff4)),
                flags: flag_place(is(3)),
                interpret: is(4),
                changes_mode: is(5),
            };
            let packed = ExitRecord::new(n, &site);
            assert_eq!(format!("{:?}", packed.site()), format!("{site:?}"));
            assert_eq!((packed.block, packed.before()), (n, Before::Nothing));
        }
    }

    #[test]
    fn checks_come_out_as_they_went_in() {
        for n in 0..32u32 {
            let is = |bit: u32| n >> bit & 1 != 0;
            let site = AccessSite {
                offset: 4095,
                span: 4096,
                write: is(0),
                own: Part {
                    from: 4032,
                    size: 64,
                    write: is(1),
                    repeats: is(4),
                },
                careful: is(2).then_some(70_000),
                own_operand: is(3),
                retry: 0x7fff,
                done: 0x7ffe,
                flags: flag_place(is(4)),
                borrowed: Some(n as u8 % 16).filter(|r| *r != NOT_BORROWED),
            };
            let packed = AccessRecord::new(n, &site);
            assert_eq!(format!("{:?}", packed.site()), format!("{site:?}"));
        }
    }

    #[test]
    fn boundaries_come_out_as_they_went_in() {
        for (host, guest, borrowed) in [(0, 0, None), (0x7fff, 4095, Some(15)), (7, 9, Some(0))] {
            for saved in [false, true] {
                let boundary = Boundary {
                    host,
                    guest,
                    flags: flag_place(saved),
                    borrowed,
                };
                let packed = BoundaryRecord::new(&boundary);
                assert_eq!(format!("{:?}", packed.unpack()), format!("{boundary:?}"));
                assert_eq!(packed.host(), host);
            }
        }
    }

    #[test]
    fn branches_come_out_as_they_went_in() {
        for (offset, moves_rsp) in [(0, 0), (4095, -8), (4095, 8 + 0xffff), (1, 8)] {
            let site = BranchSite {
                offset,
                moves_rsp,
                stub: 0,
            };
            let packed = BranchRecord::new(7, &site);
            assert_eq!((packed.offset(), packed.moves_rsp()), (offset, moves_rsp));
            assert_eq!(packed.block, 7);
        }
    }

    #[test]
    fn recipes_come_out_as_they_went_in() {
        let register = |number, moved| Source::Register { number, moved };
        let sources = [
            register(0, i32::MAX),
            register(15, -i32::MAX),
            Source::Constant(i32::MIN),
            Source::Constant(-1),
        ];
        for (n, kind) in KINDS.into_iter().enumerate() {
            for (left, right) in sources.into_iter().zip(sources.into_iter().rev()) {
                for (flags, back) in [(ALL, None), (1, Some(4095)), (1 << 5, Some(1))] {
                    let recipe = Recipe {
                        kind,
                        size: 1 << n,
                        left,
                        right,
                        flags,
                    };
                    let packed = RecipeRecord::new(&recipe, back.unwrap_or(0));
                    assert_eq!((packed.recipe(), packed.back()), (recipe, back));
                }
            }
        }
    }

    #[test]
    fn lists_tell_blocks_from_exits() {
        for before in [Before::Block(7), Before::Exit(7), Before::Nothing] {
            let mut exit = ExitRecord {
                word: 0,
                block: 0,
                place: 0,
                before: 0,
                next: 0,
            };
            exit.set_before(before);
            assert_eq!(exit.before(), before);
        }
    }

    #[test]
    fn records_are_small() {
        assert_eq!(size_of::<BlockRecord>(), 48);
        assert_eq!(size_of::<ExitRecord>(), 24);
        assert_eq!(size_of::<AccessRecord>(), 20);
        assert_eq!(size_of::<BoundaryRecord>(), 4);
        assert_eq!(size_of::<BranchRecord>(), 8);
        assert_eq!(size_of::<RecipeRecord>(), 12);
    }
}
