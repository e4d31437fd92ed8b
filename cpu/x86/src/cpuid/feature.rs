//! Masks of the feature words: what is kept of the host's, and what is set on every host.

pub const fn bits(list: &[u32]) -> u32 {
    let mut mask = 0;
    let mut n = 0;
    while n < list.len() {
        mask |= 1 << list[n];
        n += 1;
    }
    mask
}

/// A feature word: `(host & keep) | set`.
pub struct Word {
    pub keep: u32,
    pub set: u32,
}

impl Word {
    pub fn of(&self, host: u32) -> u32 {
        host & self.keep | self.set
    }
}

/// SSE3, PCLMULQDQ, SSSE3, FMA, CX16, SSE4.1, SSE4.2, MOVBE, POPCNT, AES, XSAVE, AVX, F16C, RDRAND;
/// set: PCID, x2APIC, TSC deadline, hypervisor.
pub const LEAF1_ECX: Word = Word {
    keep: bits(&[0, 1, 9, 12, 13, 19, 20, 22, 23, 25, 26, 28, 29, 30]),
    set: bits(&[17, 21, 24, 31]),
};
/// FPU, CX8, CMOV, CLFSH, MMX, FXSR, SSE, SSE2, SS; set: VME, DE, PSE, TSC, MSR, PAE, MCE, APIC, SEP, MTRR, PGE, MCA, PAT,
/// PSE-36.
pub const LEAF1_EDX: Word = Word {
    keep: bits(&[0, 8, 15, 19, 23, 24, 25, 26, 27]),
    set: bits(&[1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 16, 17]),
};
/// BMI1, AVX2, FDP_EXCPTN_ONLY, BMI2, ERMS, ZERO_FCS_FDS, AVX-512 F and DQ, RDSEED, ADX, IFMA, CLFLUSHOPT, CLWB,
/// AVX-512 CD, SHA, BW, VL; set: FSGSBASE, TSC_ADJUST, SMEP, INVPCID, SMAP.
pub const LEAF7_EBX: Word = Word {
    keep: bits(&[
        3, 5, 6, 8, 9, 13, 16, 17, 18, 19, 21, 23, 24, 28, 29, 30, 31,
    ]),
    set: bits(&[0, 1, 7, 10, 20]),
};
/// VBMI, VBMI2, GFNI, VAES, VPCLMULQDQ, VNNI, BITALG, VPOPCNTDQ; set: UMIP, RDPID.
pub const LEAF7_ECX: Word = Word {
    keep: bits(&[1, 6, 8, 9, 10, 11, 12, 14]),
    set: bits(&[2, 22]),
};
/// FSRM, VP2INTERSECT, AVX-512 FP16; set: SERIALIZE, without which Linux serializes by IRET.
pub const LEAF7_EDX: Word = Word {
    keep: bits(&[4, 8, 23]),
    set: bits(&[14]),
};
/// Intel: ARCH_CAPABILITIES, IBRS and IBPB, STIBP.
pub const LEAF7_EDX_INTEL: u32 = bits(&[26, 27, 29]);
/// SHA512, SM3, SM4, AVX-VNNI, AVX-512 BF16, FZRM, FSRS, FSRC, AVX-IFMA.
pub const LEAF7_1_EAX: u32 = bits(&[0, 1, 2, 4, 5, 10, 11, 12, 23]);
/// AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16.
pub const LEAF7_1_EDX: u32 = bits(&[4, 5, 10]);
/// Intel: BHI_CTRL, without which Linux clears the branch history by a long loop in every system call, and MCDT_NO.
pub const LEAF7_2_EDX_INTEL: u32 = bits(&[4, 5]);
/// XSAVEOPT, XSAVEC, XGETBV with ECX = 1.
pub const LEAF_D_1_EAX: u32 = bits(&[0, 1, 2]);
pub const LEAF_D_1_EAX_XINUSE: u32 = 1 << 2;
/// LAHF, ABM, SSE4A, MISALIGNSSE, 3DNOWPREFETCH.
pub const EXTENDED_ECX: Word = Word {
    keep: bits(&[0, 5, 6, 7, 8]),
    set: 0,
};
/// AMD: CMP_LEGACY where there are several CPUs, TOPOEXT.
pub const EXTENDED_ECX_CMP_LEGACY: u32 = bits(&[1]);
pub const EXTENDED_ECX_TOPOEXT: u32 = bits(&[22]);
/// AMD: PerfCtrExtCore, on request alone.
pub const EXTENDED_ECX_CORE_COUNTERS: u32 = bits(&[23]);
/// AMD repeats leaf 1's EDX here.
pub const EXTENDED_EDX_REPEATED: u32 =
    bits(&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 14, 15, 16, 17, 23, 24]);
/// MMXEXT; set: SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
pub const EXTENDED_EDX: Word = Word {
    keep: bits(&[22]),
    set: bits(&[11, 20, 26, 27, 29]),
};
pub const EXTENDED_EDX_SYSCALL: u32 = bits(&[11]);
/// XSAVEERPTR; set: SSB_NO, BTC_NO.
pub const LEAF8_EBX_AMD: Word = Word {
    keep: bits(&[2]),
    set: bits(&[26, 29]),
};
/// Nested data breakpoints are ignored, writes to FS and GS bases do not serialize, LFENCE always does, null selectors
/// clear the base, automatic IBRS, no SMM control MSR, SRSO_NO.
pub const LEAF21_EAX: u32 = bits(&[0, 1, 2, 6, 8, 9, 29]);
/// TSA_SQ_NO, TSA_L1_NO.
pub const LEAF21_ECX: u32 = bits(&[1, 2]);

/// What goes where the host's operating system does not enable AVX: FMA, AVX, F16C of leaf 1.
pub const NEEDS_AVX_LEAF1_ECX: u32 = bits(&[12, 28, 29]);
/// AVX2, and everything of AVX-512.
pub const NEEDS_AVX_LEAF7_EBX: u32 = bits(&[5]) | NEEDS_AVX512_LEAF7_EBX;
pub const NEEDS_AVX512_LEAF7_EBX: u32 = bits(&[16, 17, 21, 28, 30, 31]);
/// VAES, VPCLMULQDQ.
pub const NEEDS_AVX_LEAF7_ECX: u32 = bits(&[9, 10]) | NEEDS_AVX512_LEAF7_ECX;
pub const NEEDS_AVX512_LEAF7_ECX: u32 = bits(&[1, 6, 11, 12, 14]);
pub const NEEDS_AVX512_LEAF7_EDX: u32 = bits(&[8, 23]);
pub const NEEDS_AVX_LEAF7_1_EAX: u32 = bits(&[0, 1, 2, 4, 23]) | NEEDS_AVX512_LEAF7_1_EAX;
pub const NEEDS_AVX512_LEAF7_1_EAX: u32 = bits(&[5]);

/// MONITOR, on request alone.
pub const LEAF1_ECX_MONITOR: u32 = bits(&[3]);
pub const LEAF1_EDX_APIC: u32 = bits(&[9]);
pub const LEAF1_ECX_XSAVE: u32 = bits(&[26]);
pub const LEAF1_ECX_OSXSAVE: u32 = bits(&[27]);
/// PKU, on request alone; OSPKE, which follows CR4.PKE.
pub const LEAF7_ECX_PKU: u32 = bits(&[3]);
pub const LEAF7_ECX_OSPKE: u32 = bits(&[4]);
/// LA57, on request alone.
pub const LEAF7_ECX_LA57: u32 = bits(&[16]);
pub const LEAF1_EDX_HTT: u32 = bits(&[28]);
/// ARAT.
pub const LEAF6_EAX: u32 = bits(&[2]);
/// Invariant TSC.
pub const LEAF7_POWER_EDX: u32 = bits(&[8]);
/// CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, STEAL_TIME, PV_EOI, CLOCKSOURCE_STABLE.
pub const KVM_EAX: u32 = bits(&[0, 1, 3, 5, 6, 24]);
/// PV_UNHALT, PV_TLB_FLUSH, PV_SEND_IPI, PV_SCHED_YIELD: where there are several CPUs.
pub const KVM_EAX_SEVERAL: u32 = bits(&[7, 9, 11, 13]);
