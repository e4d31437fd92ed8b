//! Page tables of random bits: the walk and the TLB against a model that is written down again from the manual (Intel SDM vol. 3A,
//! chapter 5) over a copy of RAM.
//!
//! Whatever a guest's tables say, a walk ends, answers as the model does, changes what the model changes (accessed and dirty bits) and
//! nothing else; and a TLB that was filled with the answer leads to that byte of RAM or nowhere, with no right that the tables do not give.
//!
//! `DOPPEL_WALK_ROUNDS=100000 DOPPEL_WALK_SEED=7 cargo test --release -p doppel-memory --test hostile` is a longer campaign.

use doppel_memory::{
    AccessKind, GuestRam, PageFault, Paging, PagingMode, Peer, Privilege, Tlb, VGA_HOLE, walk,
};
use fastrand::Rng;

const RAM: u64 = 1 << 20;
/// Pages that hold tables; the last two of them lie around the hole at 640 KiB.
const TABLES: [u64; 10] = [
    0, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000, 0x6000, 0x7000, 0x9_f000, 0xc_0000,
];
const WALKS: u64 = 200;
const PAGE: u64 = 4096;

const P: u64 = 1;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const XD: u64 = 1 << 63;

/// Bits of PKRU for a key: no access, no writes.
const AD: u32 = 1;
const WD: u32 = 2;
/// The bit of the error code for a key that forbids it.
const PK: u32 = 1 << 5;

fn pick<T: Copy>(random: &mut Rng, from: &[T]) -> T {
    from[random.usize(..from.len())]
}

/// An entry: mostly present and to a table or a page of RAM, with one wrong bit now and then.
fn entry(random: &mut Rng) -> u64 {
    let to = match random.u64(..8) {
        0..5 => pick(random, &TABLES),
        5 | 6 => random.u64(..2 * RAM) & !(PAGE - 1),
        _ => random.u64(..) & 0x000f_ffff_ffff_f000,
    };
    let flags = random.u64(..) & 0x1ff;
    let mut entry = to | flags | P | ((RW | US) * u64::from(random.u64(..4) > 0));
    if random.u64(..4) > 0 {
        entry &= !PS;
    }
    match random.u64(..16) {
        0 => entry ^ 1 << random.u64(..64),
        1 => random.u64(..),
        2 => entry | XD,
        4..8 => entry | random.u64(..16) << 59,
        3 => entry & !P,
        _ => entry,
    }
}

fn paging(random: &mut Rng) -> Paging {
    let pdpte = [0; 4].map(|_: u64| pick(random, &TABLES) | u64::from(random.u64(..8) > 0));
    let mode = match random.u64(..5) {
        0 => PagingMode::Bits32 { pse: random.bool() },
        1 => PagingMode::Pae { pdpte },
        2 => PagingMode::Level5,
        _ => PagingMode::Level4,
    };
    Paging {
        mode,
        root: match random.u64(..8) {
            0 => random.u64(..2 * RAM) & !(PAGE - 1),
            _ => pick(random, &TABLES),
        },
        write_protect: random.bool(),
        no_execute: random.bool(),
        smep: random.bool(),
        smap: random.bool(),
        global_pages: random.bool(),
        pkru: random.bool().then(|| random.u32(..) & random.u32(..)),
        physical_bits: pick(random, &[32, 36, 40, 46, 52]),
        // Half of the entries have that bit.
        upper_global_reserved: random.u8(..8) == 0,
    }
}

/// An address whose indices are small, so that walks of one round meet the same entries.
fn linear(random: &mut Rng, mode: &PagingMode) -> u64 {
    let wide = random.u64(..);
    match mode {
        PagingMode::Level4 | PagingMode::Level5 => {
            let index = [48, 39, 30, 21, 12].map(|shift| (wide >> shift & 7) << shift);
            index.iter().sum::<u64>() | wide & 0xfff
        }
        _ => wide & 0xc0e0_7fff,
    }
}

/// What the manual says of a walk.
struct Model<'a> {
    memory: &'a mut [u8],
    p: &'a Paging,
    linear: u64,
    kind: AccessKind,
    privilege: Privilege,
}

/// Where it leads, and whether it may be read and written.
#[derive(Debug, PartialEq)]
struct Found {
    gpa: u64,
    page_shift: u32,
    read: bool,
    write: bool,
}

impl Model<'_> {
    fn wide(&self) -> bool {
        !matches!(self.p.mode, PagingMode::Bits32 { .. })
    }

    fn is_ram(at: u64) -> bool {
        at < RAM && !VGA_HOLE.contains(&at)
    }

    fn load(&self, at: u64) -> u64 {
        let bytes: u64 = if self.wide() { 8 } else { 4 };
        if !Self::is_ram(at) {
            return u64::MAX >> (64 - 8 * bytes);
        }
        let byte = |n: u64| u64::from(self.memory[(at + n) as usize]) << (8 * n);
        (0..bytes).map(byte).sum()
    }

    fn fault(&self, bits: u32) -> PageFault {
        let fetch =
            self.kind == AccessKind::Execute && (self.p.smep || self.p.no_execute && self.wide());
        let write = self.kind == AccessKind::Write;
        let user = self.privilege == Privilege::User;
        let flags = u32::from(write) << 1 | u32::from(user) << 2 | u32::from(fetch) << 4;
        PageFault {
            error_code: bits | flags,
        }
    }

    /// Bits that must be 0.
    fn reserved(&self, level: u32, leaf: bool) -> u64 {
        let width = self.p.physical_bits;
        if !self.wide() {
            // PSE-36: bit 21, and what the width does not reach of address bits 32 to 39, which stand from bit 13 on.
            let reached = width.clamp(32, 40) - 32;
            let high = (13 + reached..21).fold(1 << 21, |bits, n| bits | 1u64 << n);
            return if leaf && level == 2 { high } else { 0 };
        }
        let long = matches!(self.p.mode, PagingMode::Level4 | PagingMode::Level5);
        let mut bits = (width..52).fold(0, |bits, n| bits | 1u64 << n);
        bits |= if self.p.no_execute { 0 } else { XD };
        bits |= if long { 0 } else { 0x7ff0_0000_0000_0000 };
        if leaf && level > 1 {
            // Between PAT, bit 12, and the frame.
            let frame = 12 + 9 * (level - 1);
            bits |= (13..frame).fold(0, |bits, n| bits | 1u64 << n);
        }
        if level >= 4 {
            bits |= PS;
            bits |= G * u64::from(self.p.upper_global_reserved);
        }
        bits
    }

    /// The first table and its level, unless there is none.
    fn top(&self) -> Option<(u32, u64)> {
        match self.p.mode {
            PagingMode::Level4 => Some((4, self.p.root)),
            PagingMode::Level5 => Some((5, self.p.root)),
            PagingMode::Bits32 { .. } => Some((2, self.p.root)),
            PagingMode::Pae { pdpte } => {
                let entry = pdpte[(self.linear >> 30 & 3) as usize];
                (entry & P != 0).then_some((2, entry & self.frame()))
            }
            PagingMode::Off => None,
        }
    }

    fn run(&mut self) -> Result<Found, PageFault> {
        let Some((mut level, mut table)) = self.top() else {
            return Err(self.fault(0));
        };
        let (index_bits, size) = if self.wide() { (9, 8) } else { (10, 4) };
        let large = self.p.mode != PagingMode::Bits32 { pse: false };
        let (mut writable, mut user, mut execute) = (true, true, true);
        loop {
            let shift = 12 + index_bits * (level - 1);
            let at = table + (self.linear >> shift & ((1 << index_bits) - 1)) * size;
            let entry = self.load(at);
            if entry & P == 0 {
                return Err(self.fault(0));
            }
            let leaf = level == 1 || level < 4 && entry & PS != 0 && large;
            if entry & self.reserved(level, leaf) != 0 {
                return Err(self.fault(0b1001));
            }
            writable &= entry & RW != 0;
            user &= entry & US != 0;
            execute &= entry & XD == 0 || !self.wide() || !self.p.no_execute;
            if leaf {
                let mut rights = self.rights(user, writable, execute);
                let key = self.key(user, entry);
                if self.forbids(key) {
                    return Err(self.fault(1 | PK));
                }
                rights.0 &= key & AD == 0;
                rights.1 &= key == 0 || key == WD && self.writes_despite_wd();
                return self.leaf((at, entry), (level, shift), rights);
            }
            self.mark(at, A);
            table = entry & self.frame();
            level -= 1;
        }
    }

    fn leaf(
        &mut self,
        (at, entry): (u64, u64),
        (level, shift): (u32, u32),
        (read, write, fetch): (bool, bool, bool),
    ) -> Result<Found, PageFault> {
        let (allowed, bits) = match self.kind {
            AccessKind::Read => (read, A),
            AccessKind::Write => (write, A | D),
            AccessKind::Execute => (fetch, A),
        };
        if !allowed {
            return Err(self.fault(1));
        }
        self.mark(at, bits);
        let offset = (1u64 << shift) - 1;
        let base = match (self.wide(), level) {
            (false, 2) => entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32,
            _ => entry & self.frame() & !offset,
        };
        Ok(Found {
            gpa: base | self.linear & offset,
            page_shift: shift,
            read,
            write,
        })
    }

    fn frame(&self) -> u64 {
        match self.wide() {
            true => (1u64 << self.p.physical_bits) - PAGE,
            false => 0xffff_f000,
        }
    }

    fn rights(&self, user: bool, writable: bool, execute: bool) -> (bool, bool, bool) {
        if self.privilege == Privilege::User {
            return (user, user && writable, user && execute);
        }
        let kept_out = self.p.smap && user && self.privilege == Privilege::Supervisor;
        (
            !kept_out,
            !kept_out && (writable || !self.p.write_protect),
            execute && !(self.p.smep && user),
        )
    }

    /// The two bits of PKRU for a leaf, where there are keys.
    fn key(&self, user: bool, entry: u64) -> u32 {
        match (self.p.pkru, self.p.mode) {
            (Some(pkru), PagingMode::Level4 | PagingMode::Level5) if user => {
                let key = entry >> 59 & 0b1111;
                pkru >> (key * 2) & (AD | WD)
            }
            (..) => 0,
        }
    }

    /// A supervisor may, while CR0.WP is clear.
    fn writes_despite_wd(&self) -> bool {
        self.privilege != Privilege::User && !self.p.write_protect
    }

    fn forbids(&self, bits: u32) -> bool {
        match self.kind {
            AccessKind::Read => bits & AD != 0,
            AccessKind::Write => bits & AD != 0 || bits & WD != 0 && !self.writes_despite_wd(),
            AccessKind::Execute => false,
        }
    }

    /// Sets bits of the lowest byte of an entry, if it is in RAM.
    fn mark(&mut self, at: u64, bits: u64) {
        if Self::is_ram(at) {
            self.memory[at as usize] |= bits as u8;
        }
    }
}

/// RAM, and the model's copy of it.
struct Round {
    ram: GuestRam,
    copy: Vec<u8>,
}

impl Round {
    fn new() -> Round {
        Round {
            ram: GuestRam::new(RAM).unwrap(),
            copy: vec![0; RAM as usize],
        }
    }

    fn fill(&mut self, random: &mut Rng, wide: bool) {
        for at in words() {
            let entry = match wide {
                true => entry(random),
                false => entry(random) & 0xffff_ffff | entry(random) << 32,
            };
            self.ram.store(at, entry).unwrap();
            let at = at as usize;
            self.copy[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        }
    }

    /// True where all tables are as the model has them.
    fn is_like_the_model(&self) -> bool {
        words().all(|at| {
            let word = self.ram.load::<u64>(at).unwrap();
            word.to_le_bytes() == self.copy[at as usize..at as usize + 8]
        })
    }

    /// A walk, the model's, and what a TLB makes of it. True where it led somewhere.
    fn walk(&mut self, p: &Paging, random: &mut Rng, tlb: &mut Tlb, cpu: &Peer) -> bool {
        use Privilege::{Supervisor, SupervisorAc, User};
        let linear = linear(random, &p.mode);
        let kind = pick(
            random,
            &[AccessKind::Read, AccessKind::Write, AccessKind::Execute],
        );
        let privilege = pick(random, &[User, Supervisor, SupervisorAc]);
        let what = format!("{linear:#x} {kind:?} {privilege:?} {p:x?}");
        let memory = &mut self.copy;
        let mut model = Model {
            memory,
            p,
            linear,
            kind,
            privilege,
        };
        let expected = model.run();
        let found = walk(&self.ram, p, linear, kind, privilege);
        let shown = found.map(|t| {
            let rights = t.rights(p, privilege);
            Found {
                gpa: t.gpa,
                page_shift: t.page_shift,
                read: rights.read,
                write: rights.write,
            }
        });
        assert_eq!(shown, expected, "{what}");
        let Ok(t) = found else { return false };
        let rights = t.rights(p, privilege);
        tlb.fill(linear, &t, rights, &self.ram, cpu);
        let looks = [
            (tlb.lookup_read(linear, 1), rights.read),
            (tlb.lookup_write(linear, 1), rights.write && t.dirty),
        ];
        for (host, right) in looks {
            let Some(host) = host else { continue };
            let own = self.ram.ptr(t.gpa).map(|own| own.addr());
            assert_eq!((Some(host.addr()), right), (own, true), "{what}");
        }
        true
    }
}

/// Where entries are.
fn words() -> impl Iterator<Item = u64> {
    let table = |table: u64| (table..table + PAGE).step_by(8);
    TABLES.into_iter().flat_map(table)
}

#[test]
fn random_page_tables_are_walked_as_the_manual_says_and_no_further() {
    let number = |name: &str, usual| {
        let given = std::env::var(name).ok();
        given.map_or(usual, |text| text.parse().expect("a number"))
    };
    let rounds = number("DOPPEL_WALK_ROUNDS", 400);
    let mut random = Rng::with_seed(number("DOPPEL_WALK_SEED", 1));
    let (mut led, mut faults) = (0u64, 0u64);
    let mut round = Round::new();
    let cpu = round.ram.tracker().join();
    for _ in 0..rounds {
        let p = paging(&mut random);
        round.fill(&mut random, !matches!(p.mode, PagingMode::Bits32 { .. }));
        let mut tlb = Tlb::default();
        for _ in 0..WALKS {
            match round.walk(&p, &mut random, &mut tlb, &cpu) {
                true => led += 1,
                false => faults += 1,
            }
        }
        assert!(round.is_like_the_model(), "{p:x?}");
    }
    println!("{led} walks led somewhere, {faults} faulted");
    assert!(
        led * 20 > faults && faults * 20 > led,
        "{led} {faults}: too tame"
    );
}
