//! Processors to choose from: the host's, and those of the x86-64 psABI's levels, which are the same on every host.
//!
//! A level is a processor that does not exist: it has the level's instruction sets and no others, family, model and stepping of a processor of Intel's
//! that had them first, and caches that are made up. Its CPUID is read like a host's, so that it passes the filter of `cpuid` too and what the monitor
//! emulates everywhere is added. So two hosts that can carry a level show a guest the same CPUID, to the last bit, but for the frequency of the
//! TSC (leaves 0x15, 0x16, 0x40000010), which is the host's. What a level does not have is #UD: [`CpuidModel::hidden`].
//!
//! Source: System V ABI, AMD64 supplement, section 3.1.1 (micro-architecture levels); Intel SDM vol. 2A, CPUID.

use std::fmt;
use std::str::FromStr;

use bitflags::bitflags;

use crate::arch_host;
use crate::cpuid::Host;
use crate::instruction_set::{Place, Reg, at};
use crate::tsc::TscFrequency;
use crate::{CpuidLeaf, CpuidModel, HiddenInstructions};

/// Which processor a guest sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum CpuModel {
    /// The host's, without what does not work here.
    #[default]
    Host,
    /// The level that every x86-64 processor has.
    V1,
    /// Up to SSE4.2, POPCNT and CMPXCHG16B.
    V2,
    /// Up to AVX2, BMI2 and FMA.
    V3,
    /// Up to AVX-512 F, BW, CD, DQ and VL.
    V4,
}

/// A host cannot carry a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this host's processor cannot be {model}, for it has no {}; take --cpu {instead}", .missing.join(", "))]
pub struct CpuModelError {
    model: CpuChoice,
    missing: Vec<&'static str>,
    instead: CpuModel,
}

impl CpuModel {
    /// All, from the host's on.
    pub const ALL: [CpuModel; 5] = [
        CpuModel::Host,
        CpuModel::V1,
        CpuModel::V2,
        CpuModel::V3,
        CpuModel::V4,
    ];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            CpuModel::Host => "host",
            CpuModel::V1 => "x86-64-v1",
            CpuModel::V2 => "x86-64-v2",
            CpuModel::V3 => "x86-64-v3",
            CpuModel::V4 => "x86-64-v4",
        }
    }
}

impl fmt::Display for CpuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for CpuModel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = CpuModel::ALL.into_iter().find(|m| m.name() == text);
        found.ok_or_else(|| {
            "write host (the host's, without what does not work here) or a level that is the same on every host: \
             x86-64-v1, x86-64-v2 (SSE4.2), x86-64-v3 (AVX2) or x86-64-v4 (AVX-512)"
                .to_owned()
        })
    }
}

bitflags! {
    /// Features that a guest has on request alone.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct CpuFeatures: u8 {
        /// Protection keys for user pages.
        const PKU = 1;
        /// 5-level paging.
        const LA57 = 1 << 1;
        /// MONITOR and MWAIT.
        const MONITOR = 1 << 2;
        /// Performance counters.
        const PMU = 1 << 3;
    }
}

/// One of them: its name, what a host that cannot carry it says that it lacks, and how a processor of this host comes to have it.
struct OnRequest {
    name: &'static str,
    feature: CpuFeatures,
    missing: &'static str,
    add: fn(CpuidModel, Host<'_>) -> Option<CpuidModel>,
}

const ON_REQUEST: &[OnRequest] = &[
    OnRequest {
        name: "pku",
        feature: CpuFeatures::PKU,
        missing: "PKU (protection keys)",
        add: |model, read| model.with_protection_keys(read),
    },
    OnRequest {
        name: "la57",
        feature: CpuFeatures::LA57,
        missing: "leaf 7 of CPUID",
        add: |model, _| model.with_la57(),
    },
    OnRequest {
        name: "monitor",
        feature: CpuFeatures::MONITOR,
        missing: "leaf 1 of CPUID",
        add: |model, _| model.with_monitor(),
    },
    OnRequest {
        name: "pmu",
        feature: CpuFeatures::PMU,
        missing: "leaf 1 of CPUID",
        add: |model, _| Some(model.with_counters()),
    },
];

/// Those of them that are asked for.
fn asked(features: CpuFeatures) -> impl Iterator<Item = &'static OnRequest> {
    let rows = ON_REQUEST.iter();
    rows.filter(move |row| features.contains(row.feature))
}

/// What is asked for: a model, and features beside what it has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuChoice {
    /// The model.
    pub model: CpuModel,
    /// Only [`CpuModel::Host`] takes any: the levels are the same everywhere.
    pub features: CpuFeatures,
}

impl CpuChoice {
    /// What such a processor does not execute as the host's may, on whatever host.
    pub fn hidden(self) -> HiddenInstructions {
        self.model.hidden()
    }
}

impl From<CpuModel> for CpuChoice {
    fn from(model: CpuModel) -> Self {
        let features = CpuFeatures::empty();
        CpuChoice { model, features }
    }
}

impl fmt::Display for CpuChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.model)?;
        asked(self.features).try_for_each(|row| write!(f, ",+{}", row.name))
    }
}

impl FromStr for CpuChoice {
    type Err = String;

    /// `MODEL[,+FEATURE]...`
    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split(',');
        let model: CpuModel = parts.next().unwrap_or_default().parse()?;
        let mut features = CpuFeatures::empty();
        for part in parts {
            let name = part.strip_prefix('+');
            let row = ON_REQUEST.iter().find(|row| Some(row.name) == name);
            features |= row.ok_or_else(|| unknown_feature(part))?.feature;
        }
        if model != CpuModel::Host && !features.is_empty() {
            return Err(format!(
                "{model} is the same on every host and takes no features; host does"
            ));
        }
        Ok(CpuChoice { model, features })
    }
}

fn unknown_feature(part: &str) -> String {
    let names: Vec<_> = ON_REQUEST
        .iter()
        .map(|row| format!("+{}", row.name))
        .collect();
    format!(
        "there is no feature \"{part}\" that could be asked for; after host, and a comma, write {}",
        names.join(" or ")
    )
}

/// A feature that a level has beyond the one below it.
type Feature = (&'static str, Place);

const V2: &[Feature] = &[
    ("SSE3", at(1, 0, Reg::C, 0)),
    ("SSSE3", at(1, 0, Reg::C, 9)),
    ("CMPXCHG16B", at(1, 0, Reg::C, 13)),
    ("SSE4.1", at(1, 0, Reg::C, 19)),
    ("SSE4.2", at(1, 0, Reg::C, 20)),
    ("POPCNT", at(1, 0, Reg::C, 23)),
    ("LAHF in 64-bit mode", at(0x8000_0001, 0, Reg::C, 0)),
];

const V3: &[Feature] = &[
    ("FMA", at(1, 0, Reg::C, 12)),
    ("MOVBE", at(1, 0, Reg::C, 22)),
    ("XSAVE", at(1, 0, Reg::C, 26)),
    ("AVX", at(1, 0, Reg::C, 28)),
    ("F16C", at(1, 0, Reg::C, 29)),
    ("BMI1", at(7, 0, Reg::B, 3)),
    ("AVX2", at(7, 0, Reg::B, 5)),
    ("BMI2", at(7, 0, Reg::B, 8)),
    ("LZCNT", at(0x8000_0001, 0, Reg::C, 5)),
];

const V4: &[Feature] = &[
    ("AVX512F", at(7, 0, Reg::B, 16)),
    ("AVX512DQ", at(7, 0, Reg::B, 17)),
    ("AVX512CD", at(7, 0, Reg::B, 28)),
    ("AVX512BW", at(7, 0, Reg::B, 30)),
    ("AVX512VL", at(7, 0, Reg::B, 31)),
];

/// FPU, CX8, CMOV, CLFLUSH, MMX, FXSR, SSE, SSE2, self-snoop: what every x86-64 processor has, in leaf 1's EDX.
const BASELINE_EDX: u32 = 1 | 1 << 8 | 1 << 15 | 0xf << 23 | 1 << 19 | 1 << 27;

/// Where Intel's processors have the state components in an XSAVE area: `(component, size, offset)`. AMD's have those of AVX-512 elsewhere.
const COMPONENTS: [(u32, u32, u32); 4] = [
    (2, 0x100, 0x240),
    (5, 0x40, 0x440),
    (6, 0x200, 0x480),
    (7, 0x400, 0x680),
];

/// Level, type, ways and sets of the caches: 32 KiB twice, 1 MiB, 16 MiB for all, in lines of 64 bytes.
const CACHES: [(u32, u32, u32, u32); 4] = [
    (1, 1, 8, 64),
    (1, 2, 8, 64),
    (2, 3, 16, 1024),
    (3, 3, 16, 16384),
];

impl CpuModel {
    /// What such a processor does not execute as the host's may, on whatever host.
    pub fn hidden(self) -> HiddenInstructions {
        if self == CpuModel::Host {
            return HiddenInstructions::NONE;
        }
        const ANY_HZ: u64 = 1_000_000_000;
        let read = |leaf, subleaf| self.leaf(leaf, subleaf);
        CpuidModel::from_host(&read, self.xcr0(), ANY_HZ, 1)
            .hiding()
            .hidden()
    }

    fn features(self) -> impl Iterator<Item = &'static Feature> {
        let tables = [(CpuModel::V2, V2), (CpuModel::V3, V3), (CpuModel::V4, V4)];
        let had = tables.into_iter().filter(move |(level, _)| *level <= self);
        had.flat_map(|(_, table)| table)
    }

    fn xcr0(self) -> u64 {
        match self {
            CpuModel::Host | CpuModel::V1 | CpuModel::V2 => 0,
            CpuModel::V3 => 0x7,
            CpuModel::V4 => 0xe7,
        }
    }

    /// Leaf 1, EAX: Nocona, Nehalem, Haswell, Skylake-SP.
    fn signature(self) -> u32 {
        match self {
            CpuModel::Host | CpuModel::V1 => 0x0f41,
            CpuModel::V2 => 0x106a5,
            CpuModel::V3 => 0x306c3,
            CpuModel::V4 => 0x50654,
        }
    }

    /// What the CPUID of a processor that is nothing but this level tells.
    fn leaf(self, leaf: u32, subleaf: u32) -> CpuidLeaf {
        let mut told = self.identity(leaf, subleaf);
        let here = |p: &Place| (p.leaf, p.subleaf) == (leaf, subleaf);
        for (_, place) in self.features().filter(|(_, place)| here(place)) {
            match place.register {
                Reg::A => told.eax |= 1 << place.bit,
                Reg::B => told.ebx |= 1 << place.bit,
                Reg::C => told.ecx |= 1 << place.bit,
                Reg::D => told.edx |= 1 << place.bit,
            }
        }
        told
    }

    /// What it is, without its instruction sets.
    fn identity(self, leaf: u32, subleaf: u32) -> CpuidLeaf {
        /// CLFLUSH works on 8 times 8 bytes.
        const CLFLUSH_LINE: u32 = 8 << 8;
        const L2_IN_EXTENDED_LEAF: u32 = 1024 << 16 | 8 << 12 | 64;
        const PHYSICAL_BITS: u32 = 46;
        let (eax, ebx, ecx, edx) = match (leaf, subleaf) {
            (0, _) => (0x16, word(b"Genu"), word(b"ntel"), word(b"ineI")),
            (1, _) => (self.signature(), CLFLUSH_LINE, 0, BASELINE_EDX),
            // Caches are in leaf 4; the rest describes TLBs.
            (2, _) => (0x7603_6301, 0x00f0_b5ff, 0, 0x00c3_0000),
            (4, n) => return CACHES.get(n as usize).map_or(CpuidLeaf::default(), cache),
            (0xd, 0) => (self.xcr0() as u32, 0, 0, 0),
            (0xd, n) => return self.component(n),
            (0x8000_0000, _) => (0x8000_0008, 0, 0, 0),
            (0x8000_0002..=0x8000_0004, _) => return self.brand(leaf - 0x8000_0002),
            (0x8000_0006, _) => (0, 0, L2_IN_EXTENDED_LEAF, 0),
            (0x8000_0008, _) => (PHYSICAL_BITS, 0, 0, 0),
            _ => (0, 0, 0, 0),
        };
        CpuidLeaf { eax, ebx, ecx, edx }
    }

    fn component(self, n: u32) -> CpuidLeaf {
        let has = |c: &&(u32, u32, u32)| c.0 == n && self.xcr0() >> n & 1 != 0;
        let found = COMPONENTS.iter().find(has);
        found.map_or(CpuidLeaf::default(), |(_, eax, ebx)| CpuidLeaf {
            eax: *eax,
            ebx: *ebx,
            ..CpuidLeaf::default()
        })
    }

    /// A third of the name that programs show.
    fn brand(self, third: u32) -> CpuidLeaf {
        let text = format!("Doppel {} processor", self.name());
        let mut bytes = [0; 48];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        let words = |n: usize| {
            let at = 16 * third as usize + 4 * n;
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        CpuidLeaf {
            eax: words(0),
            ebx: words(1),
            ecx: words(2),
            edx: words(3),
        }
    }

    /// What a host lacks to carry this: `host` is what it offers to guests.
    fn missing(self, host: &CpuidModel) -> Vec<&'static str> {
        let read = |leaf, subleaf| host.get(leaf, subleaf);
        let lacks = |f: &&Feature| !f.1.is_in(&read);
        let mut missing: Vec<_> = self.features().filter(lacks).map(|f| f.0).collect();
        let elsewhere = |&(n, size, offset): &(u32, u32, u32)| {
            let there = host.get(0xd, n);
            self.xcr0() >> n & 1 != 0 && (there.eax, there.ebx, there.ecx & 2) != (size, offset, 0)
        };
        if missing.is_empty() && COMPONENTS.iter().any(elsewhere) {
            missing.push("XSAVE area with Intel's layout");
        }
        missing
    }

    /// The highest level that a host can carry.
    fn highest(host: &CpuidModel) -> CpuModel {
        let levels = CpuModel::ALL.into_iter().skip(1).rev();
        let mut carried = levels.filter(|level| level.missing(host).is_empty());
        carried.next().unwrap_or_default()
    }
}

const fn word(text: &[u8; 4]) -> u32 {
    u32::from_le_bytes(*text)
}

/// Leaf 4, whose numbers are one less than what they count.
fn cache((level, kind, ways, sets): &(u32, u32, u32, u32)) -> CpuidLeaf {
    const SELF_INITIALIZING: u32 = 1 << 8;
    const LINE: u32 = 64;
    CpuidLeaf {
        eax: kind | level << 5 | SELF_INITIALIZING,
        ebx: (ways - 1) << 22 | (LINE - 1),
        ecx: sets - 1,
        edx: 0,
    }
}

impl CpuidModel {
    /// What is asked for shows in a machine of `cpus` CPUs on this host.
    pub fn of(
        choice: impl Into<CpuChoice>,
        tsc: TscFrequency,
        cpus: u32,
    ) -> Result<Self, CpuModelError> {
        let choice = choice.into();
        let model = Self::on(Self::host_at(tsc, cpus), choice.model)?;
        model.with(choice, &arch_host::cpuid)
    }

    /// The same with features that are had by request, on this host.
    pub fn requesting(self, features: CpuFeatures) -> Result<Self, CpuModelError> {
        let model = CpuModel::Host;
        self.with(CpuChoice { model, features }, &arch_host::cpuid)
    }

    /// The same with the features that are asked for beside, on a host that `read` tells of.
    fn with(
        self,
        choice: CpuChoice,
        read: &dyn Fn(u32, u32) -> CpuidLeaf,
    ) -> Result<Self, CpuModelError> {
        asked(choice.features).try_fold(self, |model, row| {
            (row.add)(model, read).ok_or_else(|| CpuModelError {
                model: choice,
                missing: vec![row.missing],
                instead: choice.model,
            })
        })
    }

    /// The same on a host that offers `host` to guests.
    fn on(host: CpuidModel, model: CpuModel) -> Result<Self, CpuModelError> {
        if model == CpuModel::Host {
            return Ok(host);
        }
        let missing = model.missing(&host);
        if !missing.is_empty() {
            let instead = CpuModel::highest(&host);
            return Err(CpuModelError {
                model: model.into(),
                missing,
                instead,
            });
        }
        let read = |leaf, subleaf| model.leaf(leaf, subleaf);
        let level = Self::from_host(&read, model.xcr0(), host.tsc_hz(), host.cpus());
        Ok(level.hiding())
    }
}

#[cfg(test)]
#[path = "cpu_model_tests.rs"]
mod tests;
