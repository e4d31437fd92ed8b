//! Where the makers' processors differ: one row for each maker, which the CPUID model keeps. An instruction asks for a trait by its name, never for the maker.
//!
//! Sources: Intel SDM and AMD APM, at the instruction's page unless another place is named. *Seen* is what AMD's processors were found to do, of which their manual says
//! nothing (docs/testing.md, "On which processors"). `interpret/tests/makers.rs` and the conformance tests hold the interpreter to both columns. Tables of registers and of CPUID's leaves, by maker, are in `msr`, `pmu`
//! and `cpuid`.

use iced_x86::DecoderOptions;

/// Whose processor it is: vendors differ in some instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel, and whoever follows it.
    Intel,
    /// AuthenticAMD and HygonGenuine.
    Amd,
}

/// What a maker's processors do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VendorTraits {
    /// How iced-x86 decodes for them. APM vol. 3, JMP: an operand-size prefix makes a near branch of 64-bit mode one to 16 bits; SDM vol. 2A, JMP: it is ignored.
    pub decoder_options: u32,
    /// CPUID of a leaf beyond the highest returns zeros (APM vol. 3, appendix E), not the highest basic leaf (SDM vol. 2A, CPUID).
    pub zeros_beyond_last_leaf: bool,
    /// The revision of the microcode that IA32_BIOS_SIGN_ID has (SDM vol. 4: in the upper half; APM vol. 2, appendix A: PATCH_LEVEL).
    pub microcode_revision: u64,
    /// EFER.AIBRSE can be set (APM vol. 2, 3.1.7).
    pub automatic_ibrs: bool,
    /// The interrupt of a counter's overflow masks its entry of the local APIC (SDM vol. 3A, local vector table), which APM vol. 2 does not say.
    pub counter_interrupt_masks_itself: bool,

    /// SYSCALL and SYSRET are there in legacy and compatibility mode (APM vol. 3), not in 64-bit mode alone (SDM vol. 2B).
    pub syscall_outside_64_bit_mode: bool,
    /// SYSRET to an address that is not canonical faults before it leaves the kernel (SDM vol. 2B), not after (APM vol. 3).
    pub sysret_checks_address: bool,
    /// SYSENTER and SYSEXIT are there in long mode (SDM vol. 2B); not so in APM vol. 3.
    pub sysenter_in_long_mode: bool,
    /// SYSEXIT looks at the privilege before anything else. Seen.
    pub sysexit_checks_privilege_first: bool,

    /// Bit 8 of PML4 and PML5 entries is reserved (APM vol. 2, 5.3.3), not ignored (SDM vol. 3A, 4.5).
    pub upper_global_reserved: bool,

    /// IA32_MISC_ENABLE switches MONITOR and MWAIT on (SDM vol. 4), not HWCR off, and to user code (APM vol. 3).
    pub monitor_in_misc_enable: bool,
    /// The extensions of MONITOR and MWAIT are all of RCX in 64-bit mode (SDM vol. 2B), not ECX (APM vol. 3).
    pub monitor_extensions_in_rcx: bool,
    /// An SS override of MONITOR's makes #SS of its #GP in 64-bit mode (SDM vol. 2B). Not so: seen.
    pub monitor_uses_stack_segment: bool,

    /// No instruction breakpoint is met behind MOV SS and POP SS (SDM vol. 3A, 7.8.3), which hold no more than interrupts back in APM vol. 3 (MOV, POP) and traps in vol. 2 (15.21.5).
    pub mov_ss_holds_instruction_breakpoints: bool,
    /// A single step between the iterations of a repeated string instruction sets RF in what it pushes, as an interrupt there does (SDM vol. 3B, instruction-breakpoint exception condition). Not so: seen.
    pub step_in_repetition_sets_rf: bool,
    /// CMPS and SCAS that fault between iterations leave the flags from before them (SDM vol. 2B, REP), not those of the last comparison. The latter: seen.
    pub repetition_sets_flags_at_end: bool,
    /// 0F 0D with a register is nothing (SDM vol. 2D, appendix A); #UD in APM vol. 3, PREFETCH.
    pub prefetch_of_register: bool,
    /// MOVSXD to 16 bits loads so many bytes (SDM vol. 2B: r/m16). Four: seen.
    pub movsxd_to_word_loads: usize,

    /// An access that ends at an address that is not canonical is checked for alignment all the same, by its first address. Not so: seen.
    pub alignment_before_last_address: bool,
    /// #AC is raised for vectors too, in units of 16 bytes: seen. Not so: SDM vol. 3A, 6.15, interrupt 17.
    pub vectors_checked_for_alignment: bool,
    /// #AC is raised for VCVTPH2PS and VCVTPS2PH: seen. Not so: SDM vol. 2A, exceptions of type 11.
    pub half_precision_checked_for_alignment: bool,
    /// SHA instructions of SSE raise #GP where their operand is misaligned (SDM vol. 2B). Not so: seen.
    pub sha_needs_alignment: bool,
    /// Unpacks and shifts of SSE load half of a 16-byte operand where they need no more. Seen.
    pub loads_needed_half_alone: bool,
    /// Stores of the processor's state look at the last byte of all that was asked for before anything else, FXRSTOR too, and XRSTOR at XCOMP_BV: so that byte has to be there even if it is not
    /// written, and of two pages that are not, its page is told. Seen.
    pub state_end_first: bool,
    /// VCVTPS2PH raises #XM before the faults of its store (SDM vol. 2C). The other way round: seen.
    pub vcvtps2ph_computes_before_store: bool,
    /// An x87 store that an unmasked exception suppresses raises its faults all the same. Seen.
    pub suppressed_store_faults: bool,
    /// VGATHER of AVX2 that faults touches nothing but the elements before, in both registers: seen. In SDM vol. 2C it writes all of both.
    pub faulting_gather_keeps_rest: bool,
}

const INTEL: VendorTraits = VendorTraits {
    decoder_options: DecoderOptions::NONE,
    zeros_beyond_last_leaf: false,
    microcode_revision: 1 << 32,
    automatic_ibrs: false,
    counter_interrupt_masks_itself: true,
    syscall_outside_64_bit_mode: false,
    sysret_checks_address: true,
    sysenter_in_long_mode: true,
    sysexit_checks_privilege_first: false,
    upper_global_reserved: false,
    monitor_in_misc_enable: true,
    monitor_extensions_in_rcx: true,
    monitor_uses_stack_segment: true,
    mov_ss_holds_instruction_breakpoints: true,
    step_in_repetition_sets_rf: true,
    repetition_sets_flags_at_end: true,
    prefetch_of_register: true,
    movsxd_to_word_loads: 2,
    alignment_before_last_address: true,
    vectors_checked_for_alignment: false,
    half_precision_checked_for_alignment: false,
    sha_needs_alignment: true,
    loads_needed_half_alone: false,
    state_end_first: true,
    vcvtps2ph_computes_before_store: true,
    suppressed_store_faults: false,
    faulting_gather_keeps_rest: false,
};

const AMD: VendorTraits = VendorTraits {
    decoder_options: DecoderOptions::AMD,
    zeros_beyond_last_leaf: true,
    microcode_revision: 0x0100_0065,
    automatic_ibrs: true,
    counter_interrupt_masks_itself: false,
    syscall_outside_64_bit_mode: true,
    sysret_checks_address: false,
    sysenter_in_long_mode: false,
    sysexit_checks_privilege_first: true,
    upper_global_reserved: true,
    monitor_in_misc_enable: false,
    monitor_extensions_in_rcx: false,
    monitor_uses_stack_segment: false,
    mov_ss_holds_instruction_breakpoints: false,
    step_in_repetition_sets_rf: false,
    repetition_sets_flags_at_end: false,
    prefetch_of_register: false,
    movsxd_to_word_loads: 4,
    alignment_before_last_address: false,
    vectors_checked_for_alignment: true,
    half_precision_checked_for_alignment: true,
    sha_needs_alignment: false,
    loads_needed_half_alone: true,
    state_end_first: false,
    vcvtps2ph_computes_before_store: false,
    suppressed_store_faults: true,
    faulting_gather_keeps_rest: true,
};

impl Vendor {
    pub(crate) const fn traits(self) -> VendorTraits {
        match self {
            Vendor::Intel => INTEL,
            Vendor::Amd => AMD,
        }
    }
}
