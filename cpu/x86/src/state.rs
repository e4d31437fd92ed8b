//! The state of one CPU, as plain data.
//!
//! `repr(C)`: translated code reaches the general registers, flags and TLBs at fixed offsets.

use std::sync::Arc;

use crate::interpret::{CodeCache, HostUnit};
use crate::pmu::Pmu;
use crate::{AddressSpaces, CpuidModel, GivenUp, arch_host, msr};
use bitflags::bitflags;
use doppel_memory::{GuestRam, LargePages, Paging, PagingMode, Peer, Privilege, Tlb, Window};

bitflags! {
    /// RFLAGS.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Rflags: u64 {
        const CF = 1;
        const ONE = 1 << 1;
        const PF = 1 << 2;
        const AF = 1 << 4;
        const ZF = 1 << 6;
        const SF = 1 << 7;
        const TF = 1 << 8;
        const IF = 1 << 9;
        const DF = 1 << 10;
        const OF = 1 << 11;
        const IOPL = 3 << 12;
        const NT = 1 << 14;
        const RF = 1 << 16;
        const VM = 1 << 17;
        const AC = 1 << 18;
        const VIF = 1 << 19;
        const VIP = 1 << 20;
        const ID = 1 << 21;
        /// The six arithmetic flags.
        const ARITHMETIC = 0x8d5;
    }

    /// CR0.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Cr0: u64 {
        const PE = 1;
        const MP = 1 << 1;
        const EM = 1 << 2;
        const TS = 1 << 3;
        const ET = 1 << 4;
        const NE = 1 << 5;
        const WP = 1 << 16;
        const AM = 1 << 18;
        const NW = 1 << 29;
        const CD = 1 << 30;
        const PG = 1 << 31;
    }

    /// CR4.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Cr4: u64 {
        const VME = 1;
        const PVI = 1 << 1;
        const TSD = 1 << 2;
        const DE = 1 << 3;
        const PSE = 1 << 4;
        const PAE = 1 << 5;
        const MCE = 1 << 6;
        const PGE = 1 << 7;
        const PCE = 1 << 8;
        const OSFXSR = 1 << 9;
        const OSXMMEXCPT = 1 << 10;
        const UMIP = 1 << 11;
        const LA57 = 1 << 12;
        const FSGSBASE = 1 << 16;
        const PCIDE = 1 << 17;
        const OSXSAVE = 1 << 18;
        const SMEP = 1 << 20;
        const SMAP = 1 << 21;
        const PKE = 1 << 22;
    }

    /// IA32_EFER.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct Efer: u64 {
        const SCE = 1;
        const LME = 1 << 8;
        const LMA = 1 << 10;
        const NXE = 1 << 11;
        const SVME = 1 << 12;
        const FFXSR = 1 << 14;
        const TCE = 1 << 15;
        const AUTOIBRS = 1 << 21;
    }
}

/// General registers by their encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Gpr {
    Rax,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

/// Segment registers by their encoding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Seg {
    Es,
    Cs,
    Ss,
    Ds,
    Fs,
    Gs,
}

/// A segment register (also LDTR and TR) with its hidden part.
///
/// `attributes` is laid out as the second dword of a descriptor shifted right by 8: type in bits 3:0, S bit 4,
/// DPL 6:5, P 7, limit 19:16 unused here, AVL 12, L 13, D/B 14, G 15; `UNUSABLE` (bit 16) marks a null selector.
/// `limit` is in bytes (already scaled by G).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Segment {
    pub base: u64,
    pub limit: u32,
    pub attributes: u32,
    pub selector: u16,
}

impl Segment {
    /// Attribute bit of a register that was loaded with a null selector.
    pub const UNUSABLE: u32 = 1 << 16;
    /// Attribute bit L (64-bit code).
    pub const L: u32 = 1 << 13;
    /// Attribute bit D/B.
    pub const DB: u32 = 1 << 14;

    /// Descriptor type, bits 3:0.
    pub fn kind(&self) -> u32 {
        self.attributes & 0xf
    }
    /// Descriptor privilege level.
    pub fn dpl(&self) -> u8 {
        (self.attributes >> 5 & 3) as u8
    }
    /// True after a null selector was loaded.
    pub fn unusable(&self) -> bool {
        self.attributes & Self::UNUSABLE != 0
    }
    /// 64-bit code segment.
    pub fn long(&self) -> bool {
        self.attributes & Self::L != 0
    }
    /// Default size 32 bits (code), or a big stack.
    pub fn big(&self) -> bool {
        self.attributes & Self::DB != 0
    }
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Dtr {
    pub base: u64,
    pub limit: u16,
}

/// What the CPU executes now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuMode {
    /// Real-address mode.
    Real,
    /// Virtual-8086 mode.
    V86,
    /// Protected mode outside long mode, or compatibility mode, with 16-bit code.
    Bits16,
    /// The same with 32-bit code.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

/// Whether the CPU executes at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Executing.
    Active,
    /// In HLT.
    Halted,
    /// In MWAIT: until somebody stores to the line that is monitored, or an interrupt comes.
    Waiting {
        /// One that is masked ends it too, though it is not taken.
        masked: bool,
    },
    /// Waits for a start-up IPI.
    WaitForSipi,
    /// Triple fault.
    Shutdown,
}

/// Model-specific registers that are plain storage here.
#[repr(C)]
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Msrs {
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub mtrr_physical: [(u64, u64); 8],
    pub mtrr_fixed: [u64; 11],
    pub tsc_adjust: u64,
    pub spec_ctrl: u64,
    pub debugctl: u64,
    pub xss: u64,
    pub kvm_system_time: u64,
    pub kvm_wall_clock: u64,
    pub kvm_steal_time: u64,
    pub kvm_pv_eoi: u64,
    pub mcg_status: u64,
    pub microcode: u64,
    pub hwcr: u64,
    pub syscfg: u64,
    pub northbridge_cfg: u64,
    pub ls_cfg: u64,
    pub decode_cfg: u64,
}

/// The x87, SSE, AVX and AVX-512 state in the standard (non-compacted) XSAVE format of the host processor.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct FpuArea {
    /// As XSAVE writes it.
    pub bytes: [u8; FpuArea::SIZE],
}

impl FpuArea {
    /// Room for every component up to PKRU (AMX is not offered to guests).
    pub const SIZE: usize = 4096;
    /// Where FIP and FDP stand, the addresses of the last x87 instruction and of its operand.
    pub const FIP: usize = 8;
    const FDP: usize = 16;
    const FOP: usize = 6;

    /// The state after reset or FNINIT: FCW 0x37f, MXCSR 0x1f80, everything else in its initial state.
    pub fn reset() -> Self {
        let mut bytes = [0; Self::SIZE];
        bytes[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        bytes[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        FpuArea { bytes }
    }
    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([
            self.bytes[24],
            self.bytes[25],
            self.bytes[26],
            self.bytes[27],
        ])
    }

    /// FOP, the opcode of the last x87 instruction: 11 bits.
    pub fn fop(&self) -> u16 {
        u16::from_le_bytes([self.bytes[Self::FOP], self.bytes[Self::FOP + 1]])
    }

    /// Sets FOP.
    pub fn set_fop(&mut self, opcode: u16) {
        self.bytes[Self::FOP..Self::FIP].copy_from_slice(&opcode.to_le_bytes());
    }

    /// FIP.
    pub fn fip(&self) -> u64 {
        self.word(Self::FIP)
    }

    /// Sets FIP.
    pub fn set_fip(&mut self, address: u64) {
        self.set_word(Self::FIP, address);
    }

    /// FDP.
    pub fn fdp(&self) -> u64 {
        self.word(Self::FDP)
    }

    /// Sets FDP.
    pub fn set_fdp(&mut self, address: u64) {
        self.set_word(Self::FDP, address);
    }

    /// Eight bytes of the area.
    pub(crate) fn word(&self, at: usize) -> u64 {
        let bytes = self.bytes[at..].first_chunk();
        bytes.copied().map_or(0, u64::from_le_bytes)
    }

    fn set_word(&mut self, at: usize, v: u64) {
        self.bytes[at..at + 8].copy_from_slice(&v.to_le_bytes());
    }
}

impl std::fmt::Debug for FpuArea {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FpuArea {{ mxcsr: {:#x}, .. }}", self.mxcsr())
    }
}

/// What is counted while the CPU runs, whatever the engine.
#[repr(C)]
#[derive(Clone, Debug, Default)]
#[allow(missing_docs)]
pub struct Counters {
    pub interpreted_instructions: u64,
    /// Those of them that ran in predecoded blocks.
    pub quick_instructions: u64,
    /// Blocks predecoded.
    pub predecoded_blocks: u64,
    pub exceptions: [u64; 32],
    pub interrupts: u64,
    pub page_walks: u64,
    pub tlb_flushes: u64,
    /// Address spaces whose translations were still there when they became current again.
    pub spaces_resumed: u64,
    pub port_accesses: u64,
    pub mmio_accesses: u64,
    pub msr_accesses: u64,
    pub halts: u64,
    /// MWAITs that found a line to wait for.
    pub monitor_waits: u64,
    /// Overflows of performance counters that interrupted.
    pub counter_interrupts: u64,
    pub page_crossings: u64,
    pub code_writes: u64,
    /// Times that the host's processor was offered to others for a CPU that spins.
    pub spin_yields: u64,
    /// Locked accesses for which all other CPUs were stopped.
    pub split_locks: u64,
    /// Flushes that other CPUs asked for while this one was halted.
    pub deferred_flushes: u64,
    pub hypercalls: u64,
}

/// Flushes of linear-address translations that happened and that a translator has yet to follow.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flushed {
    /// Every translation that is not global.
    pub non_global: bool,
    /// Every translation.
    pub global: bool,
    /// Another PCID became current: nothing was flushed, but other translations are in use (see [`crate::AddressSpaces`]).
    pub switched: bool,
    /// These linear pages (bounded: past [`Flushed::MOST_PAGES`] it becomes `global`).
    pub pages: Vec<u64>,
}

impl Flushed {
    /// Pages listed one by one before the list is given up for a full flush.
    pub const MOST_PAGES: usize = 64;

    /// True while there is nothing to follow.
    pub fn is_empty(&self) -> bool {
        !self.non_global && !self.global && !self.switched && self.pages.is_empty()
    }

    pub(crate) fn page(&mut self, linear: u64) {
        if self.pages.len() < Self::MOST_PAGES {
            self.pages.push(linear);
        } else {
            self.non_global = true;
            self.global = true;
        }
    }
}

/// One CPU. Made by [`Cpu::new`] in the state after reset.
#[repr(C)]
#[derive(Debug)]
#[allow(missing_docs)]
pub struct Cpu {
    pub gpr: [u64; 16],
    pub rip: u64,
    /// Exact between instructions; bit 1 is always set.
    pub rflags: Rflags,
    /// Indexed by [`Seg`].
    pub seg: [Segment; 6],
    pub ldtr: Segment,
    pub tr: Segment,
    pub gdtr: Dtr,
    pub idtr: Dtr,
    pub cr0: Cr0,
    pub cr2: u64,
    /// With the PCID in bits 11:0 where CR4.PCIDE is set.
    pub cr3: u64,
    pub cr4: Cr4,
    pub efer: Efer,
    pub xcr0: u64,
    /// The rights of protection keys, state component 9, which is kept here and not in `fpu`: engines execute nothing that reads it there.
    pub pkru: u32,
    /// DR0 to DR3, unused, unused, DR6, DR7.
    pub dr: [u64; 8],
    /// Data and port breakpoints that the present instruction hit, and a task switch that it led to: bits for DR6.
    pub(crate) breakpoint_hits: u64,
    pub cpl: u8,
    /// The instruction after STI, MOV SS or POP SS: interrupts (and for the latter #DB) wait for one instruction.
    pub interrupt_shadow: bool,
    pub mov_ss_shadow: bool,
    /// An NMI is being handled: further ones wait for IRET.
    pub nmi_blocked: bool,
    pub activity: Activity,
    pub msr: Msrs,
    /// Guest TSC = host TSC + this.
    pub tsc_offset: u64,
    /// Guest TSC frequency in Hz (the host's).
    pub tsc_hz: u64,
    /// Host TSC at the machine's start, where the paravirtual clock counts from: the same on all CPUs of a machine.
    pub tsc_origin: u64,
    /// PDPTE registers of PAE paging, read by the last CR3 load.
    pub pdpte: [u64; 4],
    /// PAUSEs until the machine is told that the CPU spins.
    pub pauses_left: i32,
    /// This CPU's number, its initial APIC ID.
    pub id: u32,
    /// The local APIC is on, as IA32_APIC_BASE was last written.
    pub(crate) apic_enabled: bool,
    pub fpu: FpuArea,
    /// Indexed by [`Privilege`].
    pub tlb: [Tlb; 3],
    /// What the interpreter remembers of the code.
    pub(crate) code: CodeCache,
    /// The host's processor, as the unit that executes SIMD and x87 instructions.
    pub(crate) host: HostUnit,
    /// Physical address width.
    pub physical_bits: u32,
    pub counters: Counters,
    /// Writes `(guest physical address, length)` to granules with translated code; a translator drains it.
    pub code_writes: Vec<(u64, u32)>,
    /// What CPUID says.
    pub cpuid: Arc<CpuidModel>,
    /// Where INVLPG has to forget more than one page.
    pub large_pages: LargePages,
    /// A page of the user's that is global may be cached, in whatever is kept of other PCIDs too.
    pub global_user_pages: bool,
    /// What was flushed since a translator last looked: it keeps linear addresses of code itself.
    pub flushed: Flushed,
    /// Whose translations the TLBs hold, and what is kept of others.
    pub spaces: AddressSpaces,
    /// Permissions to write that were taken away since somebody last looked.
    pub given_up: GivenUp,
    /// FERR# is asserted.
    pub(crate) numeric_error: bool,
    /// User code executed CPUID since somebody last looked.
    pub asked_cpuid: bool,
    /// Physical memory as it is accessed without paging, where somebody accesses it that way.
    pub window: Option<Window>,
    pub ram: Arc<GuestRam>,
    /// This CPU as the others that share the RAM see it.
    pub peer: Arc<Peer>,
    /// Performance counters.
    pub pmu: Pmu,
}

impl Cpu {
    /// The state after reset of the only CPU of a machine, as [`Cpu::with_model`] with [`CpuidModel::host`].
    pub fn new(id: u32, ram: Arc<GuestRam>) -> Box<Self> {
        Self::with_model(id, ram, Arc::new(CpuidModel::host(1)))
    }

    /// The state after reset (Intel SDM vol. 3A, table 10-1), on the heap since it is large. The TSC starts near 0;
    /// CPUs of one machine take `tsc_origin` and `tsc_offset` from the first.
    pub fn with_model(id: u32, ram: Arc<GuestRam>, cpuid: Arc<CpuidModel>) -> Box<Self> {
        let origin = arch_host::tsc();
        let data = Segment {
            base: 0,
            limit: 0xffff,
            attributes: 0x93,
            selector: 0,
        };
        let mut cpu = Box::new(Cpu {
            gpr: [0; 16],
            rip: 0xfff0,
            rflags: Rflags::ONE,
            seg: [data; 6],
            ldtr: Segment {
                attributes: 0x82,
                limit: 0xffff,
                ..Segment::default()
            },
            tr: Segment {
                attributes: 0x8b,
                limit: 0xffff,
                ..Segment::default()
            },
            gdtr: Dtr {
                base: 0,
                limit: 0xffff,
            },
            idtr: Dtr {
                base: 0,
                limit: 0xffff,
            },
            cr0: Cr0::ET | Cr0::NW | Cr0::CD,
            cr2: 0,
            cr3: 0,
            cr4: Cr4::empty(),
            efer: Efer::empty(),
            xcr0: 1,
            pkru: 0,
            dr: [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400],
            breakpoint_hits: 0,
            cpl: 0,
            interrupt_shadow: false,
            mov_ss_shadow: false,
            nmi_blocked: false,
            activity: Activity::Active,
            msr: Msrs {
                pat: 0x0007_0406_0007_0406,
                misc_enable: 1,
                ..Msrs::default()
            },
            tsc_offset: origin.wrapping_neg(),
            tsc_hz: cpuid.tsc_hz(),
            tsc_origin: origin,
            pdpte: [0; 4],
            pauses_left: 0,
            id,
            apic_enabled: true,
            fpu: FpuArea::reset(),
            tlb: Default::default(),
            code: CodeCache::default(),
            host: HostUnit::default(),
            physical_bits: cpuid.physical_bits(),
            counters: Counters::default(),
            code_writes: Vec::new(),
            cpuid,
            large_pages: LargePages::default(),
            global_user_pages: false,
            flushed: Flushed::default(),
            spaces: AddressSpaces::default(),
            given_up: GivenUp::default(),
            numeric_error: false,
            asked_cpuid: false,
            window: None,
            pmu: Pmu::default(),
            peer: ram.tracker().join(),
            ram,
        });
        cpu.seg[Seg::Cs as usize] = Segment {
            base: 0xffff_0000,
            limit: 0xffff,
            attributes: 0x9b,
            selector: 0xf000,
        };
        cpu.gpr[Gpr::Rdx as usize] = cpu.cpuid.signature().into();
        msr::reset(&mut cpu);
        cpu
    }

    /// The mode that decides how code is decoded.
    pub fn mode(&self) -> CpuMode {
        let cs = &self.seg[Seg::Cs as usize];
        if !self.cr0.contains(Cr0::PE) {
            return CpuMode::Real;
        }
        if self.rflags.contains(Rflags::VM) {
            return CpuMode::V86;
        }
        match (self.efer.contains(Efer::LMA) && cs.long(), cs.big()) {
            (true, _) => CpuMode::Bits64,
            (false, true) => CpuMode::Bits32,
            (false, false) => CpuMode::Bits16,
        }
    }

    /// The privilege of ordinary (explicit) data accesses now.
    #[inline]
    pub fn privilege(&self) -> Privilege {
        if self.cpl == 3 {
            Privilege::User
        } else if self.rflags.contains(Rflags::AC) {
            Privilege::SupervisorAc
        } else {
            Privilege::Supervisor
        }
    }

    /// What the page walk needs to know.
    pub fn paging(&self) -> Paging {
        let mode = if !self.cr0.contains(Cr0::PG) {
            PagingMode::Off
        } else if self.efer.contains(Efer::LMA) {
            match self.cr4.contains(Cr4::LA57) {
                true => PagingMode::Level5,
                false => PagingMode::Level4,
            }
        } else if self.cr4.contains(Cr4::PAE) {
            PagingMode::Pae { pdpte: self.pdpte }
        } else {
            PagingMode::Bits32 {
                pse: self.cr4.contains(Cr4::PSE),
            }
        };
        let root_mask = if mode.long_levels().is_some() {
            0x000f_ffff_ffff_f000
        } else {
            0xffff_f000
        };
        Paging {
            mode,
            root: self.cr3 & root_mask,
            write_protect: self.cr0.contains(Cr0::WP),
            no_execute: self.efer.contains(Efer::NXE),
            smep: self.cr4.contains(Cr4::SMEP),
            smap: self.cr4.contains(Cr4::SMAP),
            global_pages: self.cr4.contains(Cr4::PGE),
            pkru: self.cr4.contains(Cr4::PKE).then_some(self.pkru),
            physical_bits: self.physical_bits,
            upper_global_reserved: self.cpuid.traits().upper_global_reserved,
        }
    }

    /// Sets PKRU. What the TLBs hold was found with the rights of before.
    pub(crate) fn set_pkru(&mut self, v: u32) {
        let changes = self.pkru != v;
        self.pkru = v;
        if changes && self.cr4.contains(Cr4::PKE) {
            self.empty_tlbs();
        }
    }

    /// A general register.
    #[inline]
    pub fn reg(&self, r: Gpr) -> u64 {
        self.gpr[r as usize]
    }

    /// A segment register.
    #[inline]
    pub fn segment(&self, s: Seg) -> &Segment {
        &self.seg[s as usize]
    }
}
