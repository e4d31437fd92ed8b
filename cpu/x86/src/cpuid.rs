//! The CPUID that the guest sees: the host's, filtered to what works here, plus what is emulated on every host.
//!
//! Guest user code may run on the processor itself, so an instruction set is offered only where the host has it; what
//! the monitor emulates (paging and system features) is offered always. The tables of `feature` allow bits by name: what they do
//! not name is hidden, so that a feature of a future processor stays hidden until someone looks at it.
//!
//! Sources: Intel SDM vol. 2A (CPUID), AMD APM vol. 3 appendix E, Linux Documentation/virt/kvm/x86/cpuid.rst.

mod feature;

use doppel_memory::MONITOR_LINE;

use crate::arch_host;
use crate::tsc::TscFrequency;
use crate::vendor::{Vendor, VendorTraits};
use crate::{Cpu, CpuMode, Cr4, HiddenInstructions, pmu};

/// EAX, EBX, ECX and EDX of one CPUID leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CpuidLeaf {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// Frequency of the local APIC timer before its divider, in Hz; it is announced to the guest.
pub const APIC_BUS_HZ: u64 = 1_000_000_000;

/// XCR0 components that guests have as the host has them: x87, SSE, AVX, AVX-512 (no MPX, PKRU, AMX).
pub const XCR0_MASK: u64 = 0xe7;
/// The state component of protection keys, which the monitor emulates: PKRU.
pub const XCR0_PKRU: u64 = 1 << PKRU;
const PKRU: u32 = 9;
const XCR0_AVX: u64 = 0b110;
const XCR0_AVX512: u64 = 0xe6;

/// The most that a guest's physical addresses may take, in bits.
const MOST_PHYSICAL_BITS: u32 = 46;

const HYPERVISOR_BASE: u32 = 0x4000_0000;
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
const EXTENDED_BASE: u32 = 0x8000_0000;
const MOST_EXTENDED: u32 = 0x8000_0021;
/// The basic leaves reach at least to the TSC's (0x15) and processor frequency's (0x16).
const LEAST_BASIC: u32 = 0x16;
const MOST_BASIC: u32 = 0x1f;

/// Where to read the host's CPUID: `(leaf, subleaf)`.
pub(crate) type Host<'a> = &'a dyn Fn(u32, u32) -> CpuidLeaf;

/// What CPUID says on the CPUs of one machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidModel {
    vendor: Vendor,
    traits: VendorTraits,
    cpus: u32,
    tsc_hz: u64,
    xcr0: u64,
    hidden: HiddenInstructions,
    counters: bool,
    /// Sorted by (leaf, subleaf); leaves that depend on the CPU's state or number are completed by [`Cpu::cpuid`].
    leaves: Vec<(u32, u32, CpuidLeaf)>,
}

impl CpuidModel {
    /// The model for a machine of `cpus` CPUs on this host. Measures the TSC's frequency where the host does not
    /// say it, which takes some milliseconds.
    pub fn host(cpus: u32) -> Self {
        Self::host_at(TscFrequency::of_host(), cpus)
    }

    /// The model for a machine of `cpus` CPUs on this host, whose TSC's frequency is known.
    pub fn host_at(tsc: TscFrequency, cpus: u32) -> Self {
        let read = |leaf, subleaf| arch_host::cpuid(leaf, subleaf);
        Self::from_host(&read, arch_host::xcr0(), tsc.hz(), cpus)
    }

    /// The model that follows from a host's CPUID, XCR0 and TSC frequency: the same for the same arguments.
    pub fn from_host(read: Host<'_>, host_xcr0: u64, tsc_hz: u64, cpus: u32) -> Self {
        let name = read(0, 0);
        let vendor = vendor_of(&name);
        let mut model = CpuidModel {
            vendor,
            traits: vendor.traits(),
            cpus: cpus.clamp(1, 255),
            tsc_hz,
            xcr0: guest_xcr0(read, host_xcr0),
            hidden: HiddenInstructions::default(),
            counters: false,
            leaves: Vec::new(),
        };
        model.add_basic(read);
        model.add_hypervisor();
        model.add_extended(read);
        model.sort();
        model
    }

    /// The same with #UD at the instructions of every set that CPUID does not tell of, whether the host's processor has it or not.
    pub(crate) fn hiding(mut self) -> Self {
        self.hidden = HiddenInstructions::of(&|leaf, subleaf| self.get(leaf, subleaf));
        self
    }

    /// Whose processor it is.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }
    /// Where it does otherwise than another maker's.
    #[inline]
    pub(crate) fn traits(&self) -> &VendorTraits {
        &self.traits
    }
    /// The instructions that raise #UD, or do something else, though the host's processor may have them.
    pub fn hidden(&self) -> HiddenInstructions {
        self.hidden
    }
    /// The options of iced-x86 for what this processor executes.
    pub(crate) fn decoder_options(&self) -> u32 {
        self.traits.decoder_options | self.hidden.decoder_options()
    }
    /// CPUs of the machine.
    pub fn cpus(&self) -> u32 {
        self.cpus
    }
    /// Frequency of the TSC in Hz.
    pub fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }
    /// The XCR0 bits that a guest may set.
    pub fn xcr0(&self) -> u64 {
        self.xcr0
    }
    /// Family, model and stepping (leaf 1 EAX), which reset leaves in EDX.
    pub fn signature(&self) -> u32 {
        self.get(1, 0).eax
    }
    /// Width of physical addresses.
    pub fn physical_bits(&self) -> u32 {
        self.get(EXTENDED_BASE + 8, 0).eax & 0xff
    }
    /// True where XSAVE is offered, and with it CR4.OSXSAVE.
    pub fn has_xsave(&self) -> bool {
        self.get(1, 0).ecx & feature::LEAF1_ECX_XSAVE != 0
    }

    /// True where XGETBV tells which components of the extended state are in use.
    pub fn tells_components_in_use(&self) -> bool {
        self.get(0xd, 1).eax & feature::LEAF_D_1_EAX_XINUSE != 0
    }

    /// True where protection keys are offered, and with them CR4.PKE.
    pub fn has_protection_keys(&self) -> bool {
        self.get(7, 0).ecx & feature::LEAF7_ECX_PKU != 0
    }

    /// The same with protection keys, where the host that `read` tells of has them: PKRU takes its place in an XSAVE area.
    pub(crate) fn with_protection_keys(mut self, read: Host<'_>) -> Option<Self> {
        let place = read(0xd, PKRU);
        let has = read(7, 0).ecx & feature::LEAF7_ECX_PKU != 0 && read(0xd, 0).eax >> PKRU & 1 != 0;
        if self.xcr0 == 0 || !has || place.eax != 8 {
            return None;
        }
        self.xcr0 |= XCR0_PKRU;
        self.leaf_mut(7, 0)?.ecx |= feature::LEAF7_ECX_PKU;
        let area = self.leaf_mut(0xd, 0)?;
        area.eax |= XCR0_PKRU as u32;
        area.ecx = area.ecx.max(place.eax + place.ebx);
        self.insert(0xd, PKRU, CpuidLeaf { edx: 0, ..place });
        Some(self)
    }

    /// True where 5-level paging is offered, and with it CR4.LA57.
    pub fn has_la57(&self) -> bool {
        self.get(7, 0).ecx & feature::LEAF7_ECX_LA57 != 0
    }

    /// The same with 5-level paging.
    pub(crate) fn with_la57(mut self) -> Option<Self> {
        const LINEAR_BITS: u32 = 57;
        self.leaf_mut(7, 0)?.ecx |= feature::LEAF7_ECX_LA57;
        let sizes = self.leaf_mut(EXTENDED_BASE + 8, 0)?;
        sizes.eax = sizes.eax & 0xff | LINEAR_BITS << 8;
        Some(self)
    }

    /// True where MONITOR and MWAIT are offered.
    pub fn has_monitor(&self) -> bool {
        self.get(1, 0).ecx & feature::LEAF1_ECX_MONITOR != 0
    }

    /// The same with MONITOR and MWAIT, which wait for a store to a line and know one depth of sleep (C1).
    pub(crate) fn with_monitor(mut self) -> Option<Self> {
        const LINE: u32 = MONITOR_LINE as u32;
        const MASKED_INTERRUPTS_END_IT: u32 = 0b11;
        const ONE_KIND_OF_C1: u32 = 1 << 4;
        self.leaf_mut(1, 0)?.ecx |= feature::LEAF1_ECX_MONITOR;
        let monitor = CpuidLeaf {
            eax: LINE,
            ebx: LINE,
            ecx: MASKED_INTERRUPTS_END_IT,
            edx: ONE_KIND_OF_C1,
        };
        self.insert(5, 0, monitor);
        Some(self)
    }

    /// True where performance counters are offered.
    pub fn has_counters(&self) -> bool {
        self.counters
    }

    /// The same with performance counters: Intel's tell of themselves in leaf 0xA, AMD's of those beyond the four that all have.
    pub(crate) fn with_counters(mut self) -> Self {
        const VERSION: u32 = 2;
        const EVENTS: u32 = 7;
        /// Of these: last-level cache references and misses, branches and mispredicted ones.
        const CANNOT_BE_COUNTED: u32 = 0b111_1000;
        self.counters = true;
        if self.vendor == Vendor::Intel {
            let (general, fixed) = (pmu::GENERAL as u32, pmu::FIXED as u32);
            let leaf = CpuidLeaf {
                eax: VERSION | general << 8 | pmu::WIDTH << 16 | EVENTS << 24,
                ebx: CANNOT_BE_COUNTED,
                ecx: 0,
                edx: fixed | pmu::WIDTH << 5,
            };
            self.insert(0xa, 0, leaf);
        } else if let Some(features) = self.leaf_mut(EXTENDED_BASE + 1, 0) {
            features.ecx |= feature::EXTENDED_ECX_CORE_COUNTERS;
        }
        self
    }

    fn leaf_mut(&mut self, leaf: u32, subleaf: u32) -> Option<&mut CpuidLeaf> {
        let found = self
            .leaves
            .iter_mut()
            .find(|l| (l.0, l.1) == (leaf, subleaf));
        found.map(|l| &mut l.2)
    }

    /// Adds a leaf to a model that is complete.
    fn insert(&mut self, leaf: u32, subleaf: u32, value: CpuidLeaf) {
        self.add(leaf, subleaf, value);
        self.sort();
    }

    fn sort(&mut self) {
        self.leaves.sort_by_key(|l| (l.0, l.1));
    }

    /// Adds a leaf to a model that is yet to be [sorted](Self::sort).
    fn add(&mut self, leaf: u32, subleaf: u32, value: CpuidLeaf) {
        self.leaves.push((leaf, subleaf, value));
    }

    pub(crate) fn get(&self, leaf: u32, subleaf: u32) -> CpuidLeaf {
        self.leaves
            .binary_search_by_key(&(leaf, subleaf), |l| (l.0, l.1))
            .map_or(CpuidLeaf::default(), |n| self.leaves[n].2)
    }

    fn has_avx(&self) -> bool {
        self.xcr0 & XCR0_AVX == XCR0_AVX
    }
    fn has_avx512(&self) -> bool {
        self.xcr0 & XCR0_AVX512 == XCR0_AVX512
    }

    /// Takes from `word` the features whose registers the host's operating system does not enable.
    fn without_disabled(&self, word: u32, needs_avx: u32, needs_avx512: u32) -> u32 {
        let avx = if self.has_avx() { 0 } else { needs_avx };
        let avx512 = if self.has_avx512() { 0 } else { needs_avx512 };
        word & !avx & !avx512
    }

    fn add_basic(&mut self, read: Host<'_>) {
        let name = read(0, 0);
        let most = name.eax.clamp(LEAST_BASIC, MOST_BASIC);
        self.add(0, 0, CpuidLeaf { eax: most, ..name });
        self.add(1, 0, self.leaf1(read(1, 0)));
        self.add(2, 0, read(2, 0));
        if self.vendor == Vendor::Intel {
            self.add_caches(read, 4, intel_cache_sharing);
        }
        let arat = CpuidLeaf {
            eax: feature::LEAF6_EAX,
            ..CpuidLeaf::default()
        };
        self.add(6, 0, arat);
        self.add_leaf7(read);
        self.add_xsave(read);
        self.add(0x15, 0, self.tsc_leaf());
        self.add(0x16, 0, self.frequency_leaf());
    }

    fn leaf1(&self, host: CpuidLeaf) -> CpuidLeaf {
        let mut ecx = feature::LEAF1_ECX.of(host.ecx);
        if self.xcr0 == 0 {
            ecx &= !feature::LEAF1_ECX_XSAVE;
        }
        let mut edx = feature::LEAF1_EDX.of(host.edx);
        if self.cpus > 1 {
            edx |= feature::LEAF1_EDX_HTT;
        }
        CpuidLeaf {
            eax: host.eax,
            // The APIC ID goes to bits 31:24 for each CPU; the brand index of bits 7:0 is long out of use.
            ebx: host.ebx & 0xff00 | self.cpus << 16,
            ecx: self.without_disabled(ecx, feature::NEEDS_AVX_LEAF1_ECX, 0),
            edx,
        }
    }

    fn add_leaf7(&mut self, read: Host<'_>) {
        use feature as f;
        if read(0, 0).eax < 7 {
            return;
        }
        let host = read(7, 0);
        let mut edx = f::LEAF7_EDX.of(host.edx);
        if self.vendor == Vendor::Intel {
            edx |= f::LEAF7_EDX_INTEL;
        }
        let intel = self.vendor == Vendor::Intel;
        let subleaves = if intel { 2 } else { host.eax.min(1) };
        let leaf = CpuidLeaf {
            eax: subleaves,
            ebx: self.without_disabled(
                f::LEAF7_EBX.of(host.ebx),
                f::NEEDS_AVX_LEAF7_EBX,
                f::NEEDS_AVX512_LEAF7_EBX,
            ),
            ecx: self.without_disabled(
                f::LEAF7_ECX.of(host.ecx),
                f::NEEDS_AVX_LEAF7_ECX,
                f::NEEDS_AVX512_LEAF7_ECX,
            ),
            edx: self.without_disabled(edx, f::NEEDS_AVX512_LEAF7_EDX, f::NEEDS_AVX512_LEAF7_EDX),
        };
        self.add(7, 0, leaf);
        if host.eax >= 1 {
            self.add(7, 1, self.leaf7_1(read(7, 1)));
        }
        if intel {
            let mitigations = CpuidLeaf {
                edx: f::LEAF7_2_EDX_INTEL,
                ..CpuidLeaf::default()
            };
            self.add(7, 2, mitigations);
        }
    }

    fn leaf7_1(&self, host: CpuidLeaf) -> CpuidLeaf {
        use feature as f;
        CpuidLeaf {
            eax: self.without_disabled(
                host.eax & f::LEAF7_1_EAX,
                f::NEEDS_AVX_LEAF7_1_EAX,
                f::NEEDS_AVX512_LEAF7_1_EAX,
            ),
            edx: self.without_disabled(host.edx & f::LEAF7_1_EDX, f::LEAF7_1_EDX, 0),
            ..CpuidLeaf::default()
        }
    }

    /// Leaf 0xD: the components and where the host's XSAVE puts them.
    fn add_xsave(&mut self, read: Host<'_>) {
        if self.xcr0 == 0 {
            return;
        }
        let mut most = 0x240;
        for component in 2..=7u32 {
            if self.xcr0 >> component & 1 != 0 {
                let host = read(0xd, component);
                most = most.max(host.eax + host.ebx);
                self.add(0xd, component, CpuidLeaf { edx: 0, ..host });
            }
        }
        let sizes = CpuidLeaf {
            eax: self.xcr0 as u32,
            ebx: 0x240,
            ecx: most,
            edx: 0,
        };
        self.add(0xd, 0, sizes);
        let extended = CpuidLeaf {
            eax: read(0xd, 1).eax & feature::LEAF_D_1_EAX,
            ..CpuidLeaf::default()
        };
        self.add(0xd, 1, extended);
    }

    fn add_caches(&mut self, read: Host<'_>, leaf: u32, sharing: fn(&Self, CpuidLeaf) -> u32) {
        for n in 0..16 {
            let host = read(leaf, n);
            if host.eax & 0x1f == 0 {
                break;
            }
            let eax = host.eax & 0x3fff | sharing(self, host);
            self.add(leaf, n, CpuidLeaf { eax, ..host });
        }
    }

    /// TSC = crystal × EBX / EAX; the crystal is the local APIC timer's clock.
    fn tsc_leaf(&self) -> CpuidLeaf {
        CpuidLeaf {
            eax: (APIC_BUS_HZ / 1000) as u32,
            ebx: (self.tsc_hz / 1000) as u32,
            ecx: APIC_BUS_HZ as u32,
            edx: 0,
        }
    }

    fn frequency_leaf(&self) -> CpuidLeaf {
        let mhz = (self.tsc_hz / 1_000_000) as u32;
        CpuidLeaf {
            eax: mhz,
            ebx: mhz,
            ecx: 100,
            edx: 0,
        }
    }

    /// The leaves by which KVM introduces itself.
    fn add_hypervisor(&mut self) {
        let name = CpuidLeaf {
            eax: HYPERVISOR_TIMING,
            ebx: u32::from_le_bytes(*b"KVMK"),
            ecx: u32::from_le_bytes(*b"VMKV"),
            edx: u32::from_le_bytes(*b"M\0\0\0"),
        };
        self.add(HYPERVISOR_BASE, 0, name);
        let several = match self.cpus {
            1 => 0,
            _ => feature::KVM_EAX_SEVERAL,
        };
        let features = CpuidLeaf {
            eax: feature::KVM_EAX | several,
            ..CpuidLeaf::default()
        };
        self.add(HYPERVISOR_BASE + 1, 0, features);
        let timing = CpuidLeaf {
            eax: (self.tsc_hz / 1000) as u32,
            ebx: (APIC_BUS_HZ / 1000) as u32,
            ..CpuidLeaf::default()
        };
        self.add(HYPERVISOR_TIMING, 0, timing);
    }

    fn add_extended(&mut self, read: Host<'_>) {
        let amd = self.vendor == Vendor::Amd;
        let host = read(EXTENDED_BASE, 0);
        let most = if amd {
            MOST_EXTENDED
        } else {
            EXTENDED_BASE + 8
        };
        self.add(EXTENDED_BASE, 0, CpuidLeaf { eax: most, ..host });
        self.add(EXTENDED_BASE + 1, 0, self.extended_features(read));
        for leaf in 2..=4 {
            self.add(EXTENDED_BASE + leaf, 0, read(EXTENDED_BASE + leaf, 0));
        }
        self.add(EXTENDED_BASE + 6, 0, read(EXTENDED_BASE + 6, 0));
        let power = CpuidLeaf {
            edx: feature::LEAF7_POWER_EDX,
            ..CpuidLeaf::default()
        };
        self.add(EXTENDED_BASE + 7, 0, power);
        self.add(EXTENDED_BASE + 8, 0, self.address_sizes(read));
        if amd {
            self.add_amd(read);
        }
    }

    fn extended_features(&self, read: Host<'_>) -> CpuidLeaf {
        use feature as f;
        let host = read(EXTENDED_BASE + 1, 0);
        let mut ecx = f::EXTENDED_ECX.of(host.ecx);
        let mut edx = f::EXTENDED_EDX.of(host.edx);
        if self.vendor == Vendor::Amd {
            ecx |= f::EXTENDED_ECX_TOPOEXT;
            if self.cpus > 1 {
                ecx |= f::EXTENDED_ECX_CMP_LEGACY;
            }
            edx |= f::LEAF1_EDX.of(read(1, 0).edx) & f::EXTENDED_EDX_REPEATED;
        }
        CpuidLeaf {
            eax: host.eax,
            ebx: host.ebx & 0xf000_0000,
            ecx,
            edx,
        }
    }

    fn address_sizes(&self, read: Host<'_>) -> CpuidLeaf {
        const LINEAR_BITS: u32 = 48;
        let host = read(EXTENDED_BASE + 8, 0);
        let physical = (host.eax & 0xff).clamp(36, MOST_PHYSICAL_BITS);
        let eax = physical | LINEAR_BITS << 8;
        if self.vendor == Vendor::Intel {
            return CpuidLeaf {
                eax,
                ..CpuidLeaf::default()
            };
        }
        CpuidLeaf {
            eax,
            ebx: feature::LEAF8_EBX_AMD.of(host.ebx),
            ecx: (self.cpus - 1) | self.id_bits() << 12,
            edx: 0,
        }
    }

    fn add_amd(&mut self, read: Host<'_>) {
        for leaf in [0x8000_0005, 0x8000_0019, 0x8000_001a] {
            self.add(leaf, 0, read(leaf, 0));
        }
        self.add_caches(read, 0x8000_001d, amd_cache_sharing);
        let extended = CpuidLeaf {
            eax: feature::LEAF21_EAX,
            ecx: feature::LEAF21_ECX,
            ..CpuidLeaf::default()
        };
        self.add(MOST_EXTENDED, 0, extended);
    }

    /// Bits of an APIC ID that tell the CPUs of the (single) package apart.
    fn id_bits(&self) -> u32 {
        u32::BITS - (self.cpus - 1).leading_zeros()
    }

    /// Leaves 0xB and 0x1F: one thread per core, all cores in one package.
    fn topology(&self, subleaf: u32, id: u32) -> CpuidLeaf {
        let (eax, ebx, level) = match subleaf {
            0 => (0, 1, 1),
            1 => (self.id_bits(), self.cpus, 2),
            _ => (0, 0, 0),
        };
        CpuidLeaf {
            eax,
            ebx,
            ecx: subleaf & 0xff | level << 8,
            edx: id,
        }
    }
}

fn vendor_of(name: &CpuidLeaf) -> Vendor {
    let amd = [*b"Auth", *b"Hygo"].map(u32::from_le_bytes);
    if amd.contains(&name.ebx) {
        Vendor::Amd
    } else {
        Vendor::Intel
    }
}

/// The XCR0 bits that the host's processor and operating system both have.
fn guest_xcr0(read: Host<'_>, host_xcr0: u64) -> u64 {
    if read(1, 0).ecx & feature::LEAF1_ECX_XSAVE == 0 || read(0, 0).eax < 0xd {
        return 0;
    }
    let mut xcr0 = u64::from(read(0xd, 0).eax) & host_xcr0 & XCR0_MASK;
    if xcr0 & XCR0_AVX512 != XCR0_AVX512 {
        xcr0 &= 0x7;
    }
    xcr0
}

/// Leaf 4, EAX bits 31:26 (cores of the package) and 25:14 (threads that share the cache): the last level is shared.
fn intel_cache_sharing(model: &CpuidModel, host: CpuidLeaf) -> u32 {
    let ids = model.cpus.next_power_of_two() - 1;
    let level = host.eax >> 5 & 7;
    let shared = if level >= 3 { ids } else { 0 };
    ids.min(0x3f) << 26 | shared << 14
}

/// Leaf 0x8000001D, EAX bits 25:14.
fn amd_cache_sharing(model: &CpuidModel, host: CpuidLeaf) -> u32 {
    let level = host.eax >> 5 & 7;
    if level >= 3 {
        (model.cpus - 1) << 14
    } else {
        0
    }
}

impl Cpu {
    /// What CPUID returns on this CPU now.
    pub fn cpuid(&self, leaf: u32, subleaf: u32) -> CpuidLeaf {
        let leaf = self.leaf_in_range(leaf);
        let model = &self.cpuid;
        match leaf {
            1 => self.cpuid_features(),
            4 | 7 | 0xd | 0x8000_001d => match (leaf, subleaf) {
                (0xd, 0 | 1) => self.cpuid_xsave(subleaf),
                (7, 0) => self.cpuid_more_features(),
                _ => model.get(leaf, subleaf),
            },
            0xb | 0x1f => model.topology(subleaf, self.id),
            0x8000_0001 => self.cpuid_extended_features(),
            0x8000_001e if model.vendor == Vendor::Amd => CpuidLeaf {
                eax: self.id,
                ebx: self.id & 0xff,
                ..CpuidLeaf::default()
            },
            _ => model.get(leaf, 0),
        }
    }

    /// A leaf beyond the highest is the highest basic one, or all zero, as the hypervisor's are.
    fn leaf_in_range(&self, leaf: u32) -> u32 {
        let highest = self.cpuid.get(0, 0).eax;
        let known = match leaf {
            0x8000_0000..=0x8000_ffff => leaf <= self.cpuid.get(EXTENDED_BASE, 0).eax,
            0x4000_0000..=0x4000_ffff => true,
            _ => leaf <= highest,
        };
        if known || self.cpuid.traits.zeros_beyond_last_leaf {
            leaf
        } else {
            highest
        }
    }

    fn cpuid_features(&self) -> CpuidLeaf {
        let mut leaf = self.cpuid.get(1, 0);
        leaf.ebx |= (self.id & 0xff) << 24;
        if self.cr4.contains(Cr4::OSXSAVE) {
            leaf.ecx |= feature::LEAF1_ECX_OSXSAVE;
        }
        // Intel SDM vol. 3A, "Enabling or Disabling the Local APIC".
        if !self.apic_enabled {
            leaf.edx &= !feature::LEAF1_EDX_APIC;
        }
        if !self.has_monitor_now() {
            leaf.ecx &= !feature::LEAF1_ECX_MONITOR;
        }
        leaf
    }

    fn cpuid_extended_features(&self) -> CpuidLeaf {
        let mut leaf = self.cpuid.get(0x8000_0001, 0);
        let has_syscall = self.cpuid.traits.syscall_outside_64_bit_mode;
        if !has_syscall && self.mode() != CpuMode::Bits64 {
            leaf.edx &= !feature::EXTENDED_EDX_SYSCALL;
        }
        leaf
    }

    fn cpuid_more_features(&self) -> CpuidLeaf {
        let mut leaf = self.cpuid.get(7, 0);
        if self.cr4.contains(Cr4::PKE) {
            leaf.ecx |= feature::LEAF7_ECX_OSPKE;
        }
        leaf
    }

    /// EBX is the size of the area for what is enabled now.
    fn cpuid_xsave(&self, subleaf: u32) -> CpuidLeaf {
        const LEGACY_AND_HEADER: u32 = 0x240;
        let mut leaf = self.cpuid.get(0xd, subleaf);
        if leaf == CpuidLeaf::default() {
            return leaf;
        }
        leaf.ebx = LEGACY_AND_HEADER;
        for component in (2..=PKRU).filter(|n| self.xcr0 >> n & 1 != 0) {
            let c = self.cpuid.get(0xd, component);
            leaf.ebx = if subleaf == 0 {
                leaf.ebx.max(c.eax + c.ebx)
            } else {
                // Compacted: bit 1 of ECX asks for 64-byte alignment.
                let aligned = if c.ecx & 2 != 0 {
                    leaf.ebx.next_multiple_of(64)
                } else {
                    leaf.ebx
                };
                aligned + c.eax
            };
        }
        leaf
    }
}

#[cfg(test)]
#[path = "cpuid_tests.rs"]
mod tests;
