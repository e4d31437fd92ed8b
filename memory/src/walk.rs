//! The page walk: a linear address through the guest's page tables (Intel SDM vol. 3A, chapter 5; AMD APM vol. 2, chapter 5).
//!
//! All formats of x86 are one loop over levels; a [`Format`] table says how wide the entries are, how many
//! bits each level takes and where a large page may stand. Accessed and dirty bits are set with atomic
//! compare-and-exchange, as processors do, and only once every check has passed: a walk that
//! faults at its leaf has set the accessed bits of the levels above it and nothing else.

use crate::{GuestRam, PAGE_MASK};

/// How linear addresses are translated now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PagingMode {
    /// CR0.PG = 0: linear is physical.
    Off,
    /// 32-bit paging; the flag is CR4.PSE.
    Bits32 { pse: bool },
    /// PAE paging, with the four PDPTE registers that the last CR3 load read.
    Pae { pdpte: [u64; 4] },
    /// 4-level paging (long mode).
    Level4,
    /// 5-level paging (long mode with CR4.LA57).
    Level5,
}

impl PagingMode {
    /// Levels of the tables of long mode, where these are in use.
    pub fn long_levels(&self) -> Option<u32> {
        match self {
            PagingMode::Level4 => Some(4),
            PagingMode::Level5 => Some(5),
            _ => None,
        }
    }
}

/// Everything about the CPU's state that the page walk depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// The format in force.
    pub mode: PagingMode,
    /// Physical address of the root table (CR3 without its low bits).
    pub root: u64,
    /// CR0.WP.
    pub write_protect: bool,
    /// EFER.NXE.
    pub no_execute: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// CR4.SMAP.
    pub smap: bool,
    /// CR4.PGE.
    pub global_pages: bool,
    /// PKRU, where CR4.PKE is set.
    pub pkru: Option<u32>,
    /// Physical address width that CPUID announces (MAXPHYADDR).
    pub physical_bits: u32,
    /// G is reserved in entries of the fourth and fifth level (APM vol. 2, 5.3.3), not ignored (SDM vol. 3A, 4.5).
    pub upper_global_reserved: bool,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// A load.
    Read,
    /// A store or a read-modify-write.
    Write,
    /// An instruction fetch.
    Execute,
}

/// With which right an access is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Privilege {
    /// CPL 3.
    User = 0,
    /// CPL < 3, or implicit supervisor access (descriptor tables, TSS), with SMAP in force.
    Supervisor = 1,
    /// CPL < 3 with EFLAGS.AC = 1: SMAP lets user pages be accessed.
    SupervisorAc = 2,
}

/// What a page may be used for with some privilege.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRights {
    /// Loads.
    pub read: bool,
    /// Stores.
    pub write: bool,
    /// Instruction fetches.
    pub execute: bool,
}

/// The outcome of a walk: where the address lies and the combined rights of all levels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Guest physical address of the byte asked for.
    pub gpa: u64,
    /// log2 of the size of the guest's page: 12, 21, 22 or 30.
    pub page_shift: u32,
    /// U/S of all levels.
    pub rights_user: bool,
    /// R/W of all levels.
    pub rights_write: bool,
    /// Not XD at any level.
    pub rights_execute: bool,
    /// The leaf is global and CR4.PGE is set.
    pub global: bool,
    /// The leaf's dirty bit is set now.
    pub dirty: bool,
    /// The leaf's bits 62 to 59: a protection key where CR4.PKE is set and the tables are those of long mode.
    pub key: u8,
}

impl Translation {
    /// What the page's protection key does not forbid: loads and stores. Keys are for data in the user's pages, whoever wants it, and forbid
    /// a supervisor to write only where CR0.WP is set.
    fn key_allows(&self, p: &Paging, privilege: Privilege) -> (bool, bool) {
        let has_key = self.rights_user && p.mode.long_levels().is_some();
        let Some(pkru) = p.pkru.filter(|_| has_key) else {
            return (true, true);
        };
        let bits = pkru >> (2 * self.key);
        let access = bits & 1 == 0;
        let protects = privilege == Privilege::User || p.write_protect;
        (access, access && !(bits & 2 != 0 && protects))
    }

    /// What this page may be used for with `privilege`.
    pub fn rights(&self, p: &Paging, privilege: Privilege) -> PageRights {
        let (key_reads, key_writes) = self.key_allows(p, privilege);
        if privilege == Privilege::User {
            return PageRights {
                read: self.rights_user && key_reads,
                write: self.rights_user && self.rights_write && key_writes,
                execute: self.rights_user && self.rights_execute,
            };
        }
        let smap = p.smap && self.rights_user && privilege == Privilege::Supervisor;
        PageRights {
            read: !smap && key_reads,
            write: !smap && key_writes && (self.rights_write || !p.write_protect),
            execute: self.rights_execute && !(p.smep && self.rights_user),
        }
    }
}

/// A page fault: the error code that #PF pushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFault {
    /// P, W/R, U/S, RSVD, I/D and PK bits.
    pub error_code: u32,
}

pub(crate) const P: u64 = 1;
pub(crate) const RW: u64 = 1 << 1;
pub(crate) const US: u64 = 1 << 2;
pub(crate) const A: u64 = 1 << 5;
pub(crate) const D: u64 = 1 << 6;
pub(crate) const PS: u64 = 1 << 7;
pub(crate) const G: u64 = 1 << 8;
pub(crate) const XD: u64 = 1 << 63;

const PF_P: u32 = 1;
const PF_W: u32 = 1 << 1;
const PF_U: u32 = 1 << 2;
const PF_RSVD: u32 = 1 << 3;
const PF_ID: u32 = 1 << 4;
const PF_PK: u32 = 1 << 5;

/// Where the protection key stands in a leaf.
const KEY_SHIFT: u32 = 59;

pub(crate) struct Format {
    entry_size: u64,
    index_bits: u32,
    /// Levels whose entries may map a page (bit per level; 1 is the page table).
    large: u32,
}

const FORMAT_32: Format = Format {
    entry_size: 4,
    index_bits: 10,
    large: 0b100,
};
pub(crate) const FORMAT_64: Format = Format {
    entry_size: 8,
    index_bits: 9,
    large: 0b1100,
};
const FORMAT_PAE: Format = Format {
    entry_size: 8,
    index_bits: 9,
    large: 0b100,
};

/// Walks the guest's page tables for `linear`, checks the rights and sets accessed and dirty bits.
pub fn walk(
    ram: &GuestRam,
    p: &Paging,
    linear: u64,
    kind: AccessKind,
    privilege: Privilege,
) -> Result<Translation, PageFault> {
    Walk {
        ram,
        p,
        linear,
        kind: Some(kind),
        privilege,
    }
    .run()
}

/// Walks as [`walk`] does but only looks: no accessed or dirty bit is set and no right is checked.
/// For debuggers and for reading code.
pub fn probe(ram: &GuestRam, p: &Paging, linear: u64) -> Option<Translation> {
    Walk {
        ram,
        p,
        linear,
        kind: None,
        privilege: Privilege::Supervisor,
    }
    .run()
    .ok()
}

/// log2 of the pages that [`code_neighbours`] looks at: a processor has two cache lines of a page table at hand.
const NEIGHBOURS_BITS: u32 = 4;

/// Other pages of user code that a processor may well have in its TLB when it has the 4 KiB page at `linear`, with where they lie: those of
/// the same aligned 64 KiB, in tables of long mode, that may be executed and were accessed before, so that no bit has to be set.
pub fn code_neighbours<'a>(
    ram: &'a GuestRam,
    p: &'a Paging,
    linear: u64,
) -> impl Iterator<Item = (u64, u64)> + use<'a> {
    let walk = Walk {
        ram,
        p,
        linear,
        kind: None,
        privilege: Privilege::User,
    };
    let index = linear >> 12 & 0x1ff;
    let first = index >> NEIGHBOURS_BITS << NEIGHBOURS_BITS;
    let others = (first..first + (1 << NEIGHBOURS_BITS)).filter(move |n| *n != index);
    let table = walk.table_of_user_code();
    let pairs = table
        .into_iter()
        .flat_map(move |table| others.clone().map(move |n| (table, n)));
    pairs.filter_map(move |(table, n)| {
        let gpa = walk.user_code(table, n)?;
        Some(((linear & !PAGE_MASK) ^ ((index ^ n) << 12), gpa))
    })
}

pub(crate) struct Walk<'a> {
    pub ram: &'a GuestRam,
    pub p: &'a Paging,
    pub linear: u64,
    /// `None` only looks.
    pub kind: Option<AccessKind>,
    pub privilege: Privilege,
}

/// Why a walk ends early.
enum Break {
    Fault(PageFault),
    /// Another processor changed an entry between our look at it and our accessed or dirty bit.
    Raced,
}

impl Walk<'_> {
    fn run(&self) -> Result<Translation, PageFault> {
        loop {
            match self.attempt() {
                Ok(t) => return Ok(t),
                Err(Break::Fault(f)) => return Err(f),
                Err(Break::Raced) => {}
            }
        }
    }

    fn attempt(&self) -> Result<Translation, Break> {
        match self.p.mode {
            PagingMode::Off => Ok(Translation {
                gpa: self.linear,
                page_shift: 12,
                rights_user: true,
                rights_write: true,
                rights_execute: true,
                global: false,
                dirty: true,
                key: 0,
            }),
            PagingMode::Bits32 { .. } => self.levels(&FORMAT_32, 2, self.p.root),
            PagingMode::Pae { pdpte } => {
                let e = pdpte[(self.linear >> 30) as usize & 3];
                if e & P == 0 {
                    return Err(self.fault(0));
                }
                self.levels(&FORMAT_PAE, 2, e & self.address_mask())
            }
            PagingMode::Level4 => self.levels(&FORMAT_64, 4, self.p.root),
            PagingMode::Level5 => self.levels(&FORMAT_64, 5, self.p.root),
        }
    }

    fn levels(&self, f: &Format, top: u32, root: u64) -> Result<Translation, Break> {
        let (mut table, mut rights, mut level) = (root, RW | US, top);
        loop {
            let shift = 12 + f.index_bits * (level - 1);
            let index = (self.linear >> shift) & ((1 << f.index_bits) - 1);
            let at = table + index * f.entry_size;
            let entry = self.load(f, at);
            if entry & P == 0 {
                return Err(self.fault(0));
            }
            let leaf = level == 1 || (entry & PS != 0 && self.large_allowed(f, level));
            if entry & self.reserved(f, level, leaf) != 0 {
                return Err(self.fault(PF_P | PF_RSVD));
            }
            rights &= entry | XD;
            rights |= entry & XD;
            if leaf {
                return self.leaf(f, at, entry, rights, shift);
            }
            self.set_bits(f, at, entry, A)?;
            table = if f.entry_size == 4 {
                entry & 0xffff_f000
            } else {
                entry & self.address_mask()
            };
            level -= 1;
        }
    }

    fn leaf(
        &self,
        f: &Format,
        at: u64,
        entry: u64,
        rights: u64,
        shift: u32,
    ) -> Result<Translation, Break> {
        let offset = (1u64 << shift) - 1;
        let base = match (f.entry_size, shift) {
            // PSE-36: bits 13 to 20 are physical address bits 32 to 39.
            (4, 22) => (entry & 0xffc0_0000) | (entry >> 13 & 0xff) << 32,
            (4, _) => entry & 0xffff_f000,
            _ => entry & self.address_mask() & !offset,
        };
        let mut t = Translation {
            gpa: base | (self.linear & offset),
            page_shift: shift,
            rights_user: rights & US != 0,
            rights_write: rights & RW != 0,
            rights_execute: rights & XD == 0 || !self.p.no_execute,
            global: entry & G != 0 && self.p.global_pages,
            dirty: entry & D != 0,
            key: (entry >> KEY_SHIFT & 0xf) as u8,
        };
        let Some(kind) = self.kind else { return Ok(t) };
        let r = t.rights(self.p, self.privilege);
        let allowed = match kind {
            AccessKind::Read => r.read,
            AccessKind::Write => r.write,
            AccessKind::Execute => r.execute,
        };
        if !allowed {
            return Err(self.fault(PF_P | self.key_fault(&t, kind)));
        }
        let set = if kind == AccessKind::Write { A | D } else { A };
        self.set_bits(f, at, entry, set)?;
        t.dirty |= kind == AccessKind::Write;
        Ok(t)
    }

    /// PK, where the page's key forbids the access, whatever else does.
    fn key_fault(&self, t: &Translation, kind: AccessKind) -> u32 {
        let (read, write) = t.key_allows(self.p, self.privilege);
        let forbidden = match kind {
            AccessKind::Read => !read,
            AccessKind::Write => !write,
            AccessKind::Execute => false,
        };
        if forbidden { PF_PK } else { 0 }
    }

    /// The page table for an address in long mode, where all levels above let user code be executed.
    fn table_of_user_code(&self) -> Option<u64> {
        let top = self.p.mode.long_levels()?;
        let (mut table, f) = (self.p.root, &FORMAT_64);
        for level in (2..=top).rev() {
            let index = self.linear >> (12 + f.index_bits * (level - 1)) & 0x1ff;
            let entry = self.load(f, table + index * f.entry_size);
            let wrong = entry & (self.reserved(f, level, false) | PS | XD);
            if entry & (P | US | A) != P | US | A || wrong != 0 {
                return None;
            }
            table = entry & self.address_mask();
        }
        Some(table)
    }

    /// The page that an entry of such a table maps, where it may be executed and was accessed.
    fn user_code(&self, table: u64, index: u64) -> Option<u64> {
        let entry = self.load(&FORMAT_64, table + index * FORMAT_64.entry_size);
        let right = entry & (P | US | A) == P | US | A;
        // One that is global is to be walked to, which is noted.
        let global = if self.p.global_pages { G } else { 0 };
        let wrong = entry & (self.reserved(&FORMAT_64, 1, true) | XD | global);
        (right && wrong == 0).then(|| entry & self.address_mask())
    }

    pub(crate) fn load(&self, f: &Format, at: u64) -> u64 {
        // What is not RAM reads as all ones, as an open bus does.
        if f.entry_size == 4 {
            u64::from(self.ram.load::<u32>(at).unwrap_or(u32::MAX))
        } else {
            self.ram.load::<u64>(at).unwrap_or(u64::MAX)
        }
    }

    /// Sets accessed and dirty bits where they are clear. The compare makes sure that they go into the entry that was
    /// checked: a writable entry that became read-only must not turn dirty.
    fn set_bits(&self, f: &Format, at: u64, entry: u64, bits: u64) -> Result<(), Break> {
        if self.kind.is_none() || entry & bits == bits {
            return Ok(());
        }
        let Some(ptr) = self.ram.ptr(at) else {
            return Ok(());
        };
        self.ram.tracker().mark_dirty(at);
        let unchanged = if f.entry_size == 4 {
            ptr.compare_exchange(entry as u32, (entry | bits) as u32)
                .is_ok()
        } else {
            ptr.compare_exchange(entry, entry | bits).is_ok()
        };
        if self.ram.tracker().has_code(at) {
            self.ram.written_by_device(at, f.entry_size);
        }
        if unchanged { Ok(()) } else { Err(Break::Raced) }
    }

    fn large_allowed(&self, f: &Format, level: u32) -> bool {
        match self.p.mode {
            PagingMode::Bits32 { pse } => pse,
            _ => f.large >> level & 1 != 0,
        }
    }

    /// The bits that must be zero in an entry of this level.
    pub(crate) fn reserved(&self, f: &Format, level: u32, leaf: bool) -> u64 {
        if f.entry_size == 4 {
            return if leaf && level == 2 {
                self.pse36_reserved()
            } else {
                0
            };
        }
        let mut bits = !self.address_mask() & 0x000f_ffff_ffff_f000;
        if !self.p.no_execute {
            bits |= XD;
        }
        if self.p.mode.long_levels().is_none() {
            bits |= 0x7ff0_0000_0000_0000;
        }
        if leaf && level > 1 {
            bits |= ((1u64 << (12 + 9 * (level - 1))) - 1) & !0x1fff;
        }
        if !leaf && level > 1 && f.large >> level & 1 == 0 {
            bits |= PS;
        }
        if level > 3 && self.p.upper_global_reserved {
            bits |= G;
        }
        bits
    }

    /// Bits 13 to 20 of a 4 MiB entry hold physical address bits 32 to 39, as far as there are so many; bit 21 is 0.
    fn pse36_reserved(&self) -> u64 {
        let high_bits = self.p.physical_bits.clamp(32, 40) - 32;
        0x3f_e000 & !(((1 << high_bits) - 1) << 13)
    }

    pub(crate) fn address_mask(&self) -> u64 {
        ((1u64 << self.p.physical_bits) - 1) & !PAGE_MASK & 0x000f_ffff_ffff_f000
    }

    fn fault(&self, bits: u32) -> Break {
        let mut error_code = bits;
        if self.kind == Some(AccessKind::Write) {
            error_code |= PF_W;
        }
        if self.privilege == Privilege::User {
            error_code |= PF_U;
        }
        if self.kind == Some(AccessKind::Execute)
            && (self.p.smep
                || (self.p.no_execute && !matches!(self.p.mode, PagingMode::Bits32 { .. })))
        {
            error_code |= PF_ID;
        }
        Break::Fault(PageFault { error_code })
    }
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
