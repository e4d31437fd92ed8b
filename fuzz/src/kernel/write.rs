//! What all generators of steps draw from: values, addresses, page table entries, registers, and an assembler for a mode.

use anyhow::Result;
use iced_x86::IcedError;
use iced_x86::code_asm::registers::*;
use iced_x86::code_asm::{AsmRegister32, AsmRegister64, CodeAssembler};

use doppel_x86::CpuFeatures;

use super::layout::*;
use crate::random::Random;

/// How a kernel translates addresses, and with it whether it is in long mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// Long mode.
    Long,
    /// Protected mode without paging.
    Off,
    /// Protected mode with 32-bit paging.
    Bits32,
    /// Protected mode with PAE paging.
    Pae,
}

/// Levels of the page tables of long mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Levels {
    Four,
    Five,
    /// Steps change them.
    Both,
}

/// What the host lets a guest's processor have.
#[derive(Clone, Copy, Debug)]
pub struct Offered {
    /// Bits of a physical address.
    pub physical_bits: u32,
    pub features: CpuFeatures,
}

/// What holds for a whole case.
#[derive(Clone, Copy, Debug)]
pub struct Traits {
    pub paging: Paging,
    /// Address spaces have PCIDs.
    pub pcids: bool,
    /// Some pages are global.
    pub globals: bool,
    /// Bits of a physical address.
    pub physical_bits: u32,
    /// What the processor has by request.
    pub features: CpuFeatures,
    pub levels: Levels,
}

impl Traits {
    /// Protection keys.
    pub fn has_keys(&self) -> bool {
        self.features.contains(CpuFeatures::PKU)
    }

    /// What only some kernels have.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let all = [
            ("protection keys", self.has_keys()),
            ("5 levels", self.levels == Levels::Five),
            ("4 and 5 levels", self.levels == Levels::Both),
        ];
        all.into_iter()
            .filter(|(_, has)| *has)
            .map(|(name, _)| name)
    }

    /// Where the experiments' first page is.
    pub fn aliases(&self) -> &'static [u64] {
        match self.levels {
            Levels::Four => &ALIASES,
            _ => &WIDE_ALIASES,
        }
    }
}

/// The code size of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Bits64,
    Bits32,
    Bits16,
}

impl Mode {
    pub fn bits(self) -> u32 {
        match self {
            Mode::Bits64 => 64,
            Mode::Bits32 => 32,
            Mode::Bits16 => 16,
        }
    }
}

/// Registers for data; those for loop counters are others.
const DATA_REGISTERS: [AsmRegister64; 12] = [
    gpr64::rax,
    gpr64::rcx,
    gpr64::rdx,
    gpr64::rbx,
    gpr64::rsi,
    gpr64::rdi,
    gpr64::r8,
    gpr64::r9,
    gpr64::r10,
    gpr64::r11,
    gpr64::r12,
    gpr64::r15,
];
const COUNTERS: [AsmRegister64; 3] = [gpr64::rbp, gpr64::r13, gpr64::r14];
const DATA_REGISTERS32: [AsmRegister32; 6] = [
    gpr32::eax,
    gpr32::ecx,
    gpr32::edx,
    gpr32::ebx,
    gpr32::esi,
    gpr32::edi,
];
/// Pages of the experiments that are used: the first and the last.
const FIRST_PAGES: u64 = 24;
const LAST_PAGES: u64 = 8;

/// Everything that decides one item.
pub struct Writer<'a> {
    pub r: &'a mut Random,
    pub traits: Traits,
    pub mode: Mode,
    pub cpl: u8,
    /// It is virtual-8086 mode.
    pub v86: bool,
}

pub type Assembled = Result<(), IcedError>;

impl Writer<'_> {
    /// The bytes of some code that does not depend on where it is.
    pub fn assemble(
        &mut self,
        code: impl FnOnce(&mut Self, &mut CodeAssembler) -> Assembled,
    ) -> Result<Vec<u8>> {
        let mut a = CodeAssembler::new(self.mode.bits())?;
        code(self, &mut a)?;
        Ok(a.assemble(0)?)
    }

    pub fn register(&mut self) -> AsmRegister64 {
        *self.r.pick(&DATA_REGISTERS)
    }

    pub fn register32(&mut self) -> AsmRegister32 {
        *self.r.pick(&DATA_REGISTERS32)
    }

    pub fn counter(&mut self) -> AsmRegister64 {
        *self.r.pick(&COUNTERS)
    }

    /// The root of an address space of four levels. A page that is global is to be the same in all: there is one then.
    pub fn root(&mut self) -> u64 {
        match self.traits.globals {
            true => PML4,
            false => *self.r.pick(&[PML4, PML4_B]),
        }
    }

    /// How often a loop runs.
    pub fn times(&mut self) -> u64 {
        match self.r.percent(12) {
            true => 1 + self.r.below(4000),
            false => 1 + self.r.below(60),
        }
    }

    /// The number of a page of the experiments.
    pub fn page(&mut self) -> u64 {
        if self.traits.paging == Paging::Off {
            return self.r.below(SPARE_PAGES - 1);
        }
        match self.r.percent(80) {
            true => self.r.below(FIRST_PAGES),
            false => 512 - LAST_PAGES + self.r.below(LAST_PAGES),
        }
    }

    /// An offset in a page, often near its end.
    fn offset(&mut self) -> u64 {
        match self.r.below(4) {
            0 => 0xfe0 + self.r.below(0x20),
            1 => self.r.below(0x20),
            2 => self.r.below(0x1000),
            _ => self.r.below(0x1000) & !0xf,
        }
    }

    fn alias(&mut self) -> u64 {
        match (self.mode, self.traits.paging) {
            (Mode::Bits64, _) => *self.r.pick(self.traits.aliases()),
            (_, Paging::Off) => SPARE,
            _ => ALIASES[1],
        }
    }

    /// Where data may be, or where none may.
    pub fn pointer(&mut self) -> u64 {
        let at = match self.r.below(100) {
            0..44 => self.alias() + self.page() * 0x1000 + self.offset(),
            44..64 => USER_DATA + self.r.below(7) * 0x1000 + self.offset(),
            64..78 => KERNEL_DATA + self.r.below(7) * 0x1000 + self.offset(),
            78..86 => self.large(),
            86..89 => SPARE + self.r.below(SPARE_PAGES - 1) * 0x1000 + self.offset(),
            89..91 => USER_STACK - 0x800 + self.offset() / 2,
            91..96 => self.edge(),
            _ => self.r.value(),
        };
        let at = match self.mode {
            Mode::Bits64 => at,
            _ => at & 0xffff_ffff,
        };
        // The tables are not for steps that do not know what they do.
        match at < RAM && !(KERNEL_DATA..KERNEL_PAD).contains(&at) && at < USER_DATA {
            true => USER_DATA + (at & 0x7fff),
            false => at,
        }
    }

    fn large(&mut self) -> u64 {
        let (base, pages, shift) = match self.r.percent(50) {
            true => (LARGE, LARGE_PAGES, 21),
            false => (HUGE, HUGE_PAGES, 30),
        };
        let page = self.r.below(pages) << shift;
        let base = match self.traits.levels != Levels::Four && self.r.percent(30) {
            true => base + (1 << 48),
            false => base,
        };
        base + page + SPARE + self.r.below(SPARE_PAGES - 1) * 0x1000 + self.offset()
    }

    /// Near the ends of the canonical addresses, or of all.
    fn edge(&mut self) -> u64 {
        const EDGES: [u64; 6] = [
            1 << 47,
            0xffff_8000_0000_0000,
            0,
            1 << 32,
            1 << 56,
            0xff00_0000_0000_0000,
        ];
        let at = *self.r.pick(&EDGES);
        at.wrapping_sub(16).wrapping_add(self.r.below(32))
    }

    /// An address of the identity map, at times as only five levels have it.
    pub fn wide(&mut self, at: u64) -> u64 {
        match self.traits.levels != Levels::Four && self.r.percent(30) {
            true => at | WIDE,
            false => at,
        }
    }

    /// One that is not canonical, or would not be with fewer levels.
    pub fn beyond(&mut self) -> u64 {
        match self.traits.levels {
            Levels::Four => 1 << 47,
            _ => *self.r.pick(&[1 << 47, 1 << 48, 1 << 56, !(1 << 56)]),
        }
    }

    /// Where a page table entry has its protection key; most of a kernel's without keys are 0.
    fn key(&mut self) -> u64 {
        match self.traits.has_keys() && self.traits.paging == Paging::Long && self.r.percent(60) {
            true => self.r.below(16) << 59,
            false => 0,
        }
    }

    /// Rights for PKRU, which most often let key 0 alone.
    pub fn rights(&mut self) -> u32 {
        let rights = match self.r.below(4) {
            0 => 0,
            1 => self.r.bits() & self.r.bits(),
            2 => (1 + self.r.below(3)) << (2 * self.r.below(16)),
            _ => self.r.bits(),
        };
        let of_key_0 = if self.r.percent(90) { 3 } else { 0 };
        rights as u32 & !of_key_0
    }

    /// The address of a routine in the experiments' pages or in RAM.
    pub fn routine(&mut self) -> u64 {
        let slot = match self.r.percent(25) {
            true => 63,
            false => self.r.below(64),
        };
        // What a CALL to no address leaves is open, and four levels have few.
        let narrow = self.traits.levels == Levels::Both && self.r.percent(85);
        let alias = match narrow && self.mode == Mode::Bits64 {
            true => *self.r.pick(&ALIASES),
            false => self.alias(),
        };
        match self.r.percent(85) || self.mode != Mode::Bits64 {
            true => alias + self.page() * 0x1000 + slot * 0x40,
            false => SPARE + self.r.below(ROUTINE_PAGES) * 0x1000 + slot * 0x40,
        }
    }

    fn entry_bits(&mut self) -> u64 {
        let mut bits = 0;
        let chances = [
            (0, 93),
            (1, 75),
            (2, 75),
            (3, 10),
            (4, 10),
            (5, 60),
            (6, 50),
        ];
        for (bit, percent) in chances {
            bits |= u64::from(self.r.percent(percent)) << bit;
        }
        bits |= (self.r.bits() & 0xe00) | (self.r.bits() & 0x7ff0_0000_0000_0000);
        if self.r.percent(20) {
            bits |= 1 << 63;
        }
        if self.traits.globals && self.r.percent(30) {
            bits |= 1 << 8;
        }
        if self.r.percent(3) && self.traits.physical_bits < 52 {
            let reserved = u64::from(52 - self.traits.physical_bits);
            bits |= 1 << (u64::from(self.traits.physical_bits) + self.r.below(reserved));
        }
        bits
    }

    /// An entry of a page table.
    pub fn entry(&mut self) -> u64 {
        let page = match self.r.below(100) {
            0..25 => SPARE + self.r.below(ROUTINE_PAGES) * 0x1000,
            25..90 => SPARE + self.r.below(SPARE_PAGES) * 0x1000,
            90..94 => USER_DATA + self.r.below(7) * 0x1000,
            94..98 => DEVICE,
            _ => RAM + self.r.below(64) * 0x1000,
        };
        page | self.entry_bits() | u64::from(self.r.percent(10)) << 7
    }

    /// An entry of a page that can be used.
    pub fn good_entry(&mut self) -> u64 {
        (SPARE + self.r.below(SPARE_PAGES) * 0x1000) | 7 | self.key()
    }

    /// An entry of a large page of `1 << shift` bytes.
    pub fn large_entry(&mut self, shift: u32) -> u64 {
        let page = match self.r.percent(85) {
            true => 0,
            false => self.r.below(4) << shift,
        };
        let reserved = match self.r.percent(6) {
            true => 1u64 << (13 + self.r.below(u64::from(shift) - 13)),
            false => 0,
        };
        page | self.entry_bits() | 0x80 | reserved | u64::from(self.r.percent(10)) << 12
    }

    /// The identity map's entry of a page.
    pub fn own_entry(&mut self, at: u64) -> u64 {
        let is_users = (USER_CODE..SPARE).contains(&at);
        let has_key = (USER_DATA..USER_DATA + 0x7000).contains(&at);
        let user = if is_users { 4 } else { 0 };
        let key = if has_key { self.key() } else { 0 };
        at | 3 | user | key
    }

    /// An entry that leads to a table.
    pub fn table_entry(&mut self, table: u64) -> u64 {
        let bits = match self.r.percent(80) {
            true => 7,
            false => self.entry_bits() & !0x100,
        };
        table | bits
    }

    /// A selector: of the fixed descriptors, of random ones, of call gates, in the LDT, null.
    pub fn selector(&mut self) -> u16 {
        let rpl = match self.r.percent(70) {
            true => u16::from(self.cpl),
            false => self.r.below(4) as u16,
        };
        let index = match self.r.below(100) {
            0..40 => *self.r.pick(&[K64, KDS, U32, UDS, U64, U16, K32]) & !7,
            40..65 => 8 * (RANDOM_DESCRIPTORS.start / 8 + self.r.below(48) as u16),
            65..75 => 8 * (CALL_GATES.start / 8 + self.r.below(32) as u16),
            75..85 => (8 * self.r.below(32) as u16) | 4,
            85..90 => 0,
            90..93 => *self.r.pick(&[TR, LDTR]),
            _ => self.r.bits() as u16 & !7,
        };
        index | rpl
    }

    /// RFLAGS for POPF and IRET.
    pub fn flags(&mut self) -> u64 {
        let mut flags = 2 | (self.r.bits() & 0x8d5);
        let chances = [
            (8, 8),
            (9, 75),
            (10, 8),
            (14, 4),
            (16, 8),
            (17, 1),
            (18, 20),
            (21, 20),
        ];
        for (bit, percent) in chances {
            flags |= u64::from(self.r.percent(percent)) << bit;
        }
        if self.r.percent(25) {
            flags |= self.r.below(4) << 12;
        }
        flags
    }
}
